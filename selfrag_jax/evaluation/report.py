"""The report: results.json as Markdown tables and as one self-contained HTML page with plots and critique trees."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from selfrag_jax.records import BadInput, atomic_write, read_json

Row = dict[str, Any]
TITLE = "Self-RAG in the synthetic world"
_TITLES = {
    "no_retrieval": "No retrieval",
    "rag_top1": "Standard RAG, top 1",
    "rag_topk": "Standard RAG, top K",
    "selfrag_always": "Self-RAG, always",
    "selfrag_adaptive": "Self-RAG, adaptive",
    "selfrag_never": "Self-RAG, never",
    "ablation_top1": "– own top passage only",
    "ablation_no_isrel": "– without IsRel",
    "ablation_no_issup": "– without IsSup",
    "ablation_no_isuse": "– without IsUse",
    "ablation_no_seqscore": "– without p(segment)",
    "train_no_critic": "trained without critic",
    "train_no_retriever": "trained without retriever",
}
TASKS = ("long_tail", "well_known", "no_need", "claims", "multiple_choice", "two_part", "biography")
SYSTEMS = tuple(_TITLES)


def read_results(path: str | Path) -> list[Row]:
    """Rows of a results.json. Raises BadInput naming the file when it has none or they lack a field."""
    rows = read_json(path).get("rows")
    if not rows:
        raise BadInput(f"{path}: holds no results")
    for i, row in enumerate(rows):
        if missing := {"system", "task", "metric", "value", "low", "high", "n"} - set(row):
            raise BadInput(f"{path}: row {i + 1} lacks {', '.join(sorted(missing))}")
    return rows


def mean_over_seeds(runs: Sequence[Sequence[Row]]) -> list[Row]:
    """One row for each that all runs have: the mean over runs, and its 95% interval by Student's t over the runs.

    Raises BadInput for fewer than two runs, which have no interval, and when the runs have no row in common.
    """
    if len(runs) < 2:
        raise BadInput("a mean over seeds needs two runs or more")
    from scipy.stats import t

    keyed = [{(r["system"], r["task"], r["metric"]): r for r in rows} for rows in runs]
    common = [key for key in keyed[0] if all(key in rows for rows in keyed)]
    if not common:
        raise BadInput("the runs have no result in common")
    out, n = [], len(runs)
    for key in common:
        values = np.array([rows[key]["value"] for rows in keyed])
        mean = float(values.mean())
        half = float(t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n))
        system, task, metric = key
        out.append(
            {"system": system, "task": task, "metric": metric, "value": mean, "low": max(0.0, mean - half),
             "high": min(1.0, mean + half), "n": sum(rows[key]["n"] for rows in keyed)}
        )  # fmt: skip
    return out


def _cells(rows: Sequence[Row], metric: str) -> tuple[list[str], list[str], dict[tuple[str, str], Row]]:
    found = {(r["system"], r["task"]): r for r in rows if r["metric"] == metric}
    systems = [s for s in SYSTEMS if any((s, t) in found for t in TASKS)]
    return systems, [t for t in TASKS if any((s, t) in found for s in systems)], found


def _critic_cells(rows: Sequence[Row]) -> tuple[list[str], list[str], dict[tuple[str, str], Row]]:
    found = {(r["metric"], r["task"]): r for r in rows if r["system"] == "critic" and r["task"] != "critic"}
    return [t for t in TASKS if any(t == task for _, task in found)], list(dict.fromkeys(m for m, _ in found)), found


def _percent(row: Row | None) -> str:
    return "" if row is None else f"{100 * row['value']:.1f}"


def _difference_lines(differences: Sequence[Row]) -> list[tuple[str, ...]]:
    return [
        (
            f"{_TITLES[d['system']].removeprefix('– ')} over {_TITLES[d['over']].removeprefix('– ')}", d["task"],
            f"{100 * d['value']:.1f}", f"{100 * d['low']:.1f} to {100 * d['high']:.1f}", str(d["n"]),
        )
        for d in differences
    ]  # fmt: skip


_DIFFERENCE_HEAD = ("difference in accuracy, paired", "task", "points", "95% interval", "questions")


def markdown(rows: Sequence[Row], differences: Sequence[Row] = ()) -> str:
    """All tables as Markdown; per cent, with the 95% interval of the first task's accuracy.

    differences: rows with system, over (another system), task, value, low, high, n.
    """
    parts = []
    for metric, title in (
        ("accuracy", "Accuracy"),
        ("all_parts", "All parts right"),
        ("retrieval_rate", "Retrieval rate"),
        ("citation_precision", "Citation precision"),
        ("citation_recall", "Citation recall"),
        ("fact_precision", "Facts told that are true"),
    ):
        systems, tasks, found = _cells(rows, metric)
        if not systems:
            continue
        lines = [f"### {title} (%)", "", "| system | " + " | ".join(tasks) + " |", "|---" * (len(tasks) + 1) + "|"]
        for s in systems:
            cells = []
            for t in tasks:
                row = found.get((s, t))
                interval = f" ({100 * row['low']:.0f}–{100 * row['high']:.0f})" if row and t == "long_tail" else ""
                cells.append(_percent(row) + interval)
            lines.append(f"| {_TITLES[s]} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    if differences:
        lines = ["### Differences", "", "| " + " | ".join(_DIFFERENCE_HEAD) + " |", "|---" * len(_DIFFERENCE_HEAD) + "|"]
        parts.append("\n".join(lines + [f"| {' | '.join(line)} |" for line in _difference_lines(differences)]))
    critic = [r for r in rows if r["system"] == "critic" and r["task"] == "critic"]
    if critic:
        lines = ["### Critic accuracy (%)", "", "| group | accuracy | n |", "|---|---|---|"]
        lines += [f"| {r['metric'].removesuffix('_accuracy')} | {_percent(r)} | {r['n']} |" for r in critic]
        parts.append("\n".join(lines))
        tasks, metrics, found = _critic_cells(rows)
        lines = ["### Critic accuracy by kind of question (%)", "", "| group | " + " | ".join(tasks) + " |"]
        lines.append("|---" * (len(tasks) + 1) + "|")
        for m in metrics:
            lines.append(f"| {m.removesuffix('_accuracy')} | " + " | ".join(_percent(found.get((m, t))) for t in tasks) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#1c2733}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.3rem .7rem;text-align:right;border-bottom:1px solid #dde3ea}
td:first-child,th:first-child{text-align:left}th{font-weight:600;background:#f4f7fa}
.bar{display:inline-block;height:.8rem;background:#3b7dd8;border-radius:2px;vertical-align:middle}
.card{border:1px solid #dde3ea;border-radius:8px;padding:1rem 1.2rem;margin:1rem 0}
.chosen td{background:#eaf5ea}.muted{color:#667}.q{font-weight:600}
"""


def _html_table(rows: Sequence[Row], metric: str) -> str:
    systems, tasks, found = _cells(rows, metric)
    head = "".join(f"<th>{html.escape(t.replace('_', ' '))}</th>" for t in tasks)
    body = ""
    for s in systems:
        cells = ""
        for t in tasks:
            row = found.get((s, t))
            hint = f"95% interval {100 * row['low']:.1f} to {100 * row['high']:.1f}, n = {row['n']}" if row else ""
            cells += f'<td title="{hint}">{_percent(row)}</td>'
        body += f"<tr><td>{html.escape(_TITLES[s])}</td>{cells}</tr>"
    return f"<table><tr><th>system</th>{head}</tr>{body}</table>"


def _html_bars(rows: Sequence[Row]) -> str:
    """Long-tail accuracy of every system as bars."""
    systems, _, found = _cells(rows, "accuracy")
    lines = ""
    for s in systems:
        if row := found.get((s, "long_tail")):
            bar = f'<span class="bar" style="width:{24 * row["value"]:.1f}rem"></span>'
            lines += f"<tr><td>{html.escape(_TITLES[s])}</td><td style='text-align:left'>{bar} {_percent(row)}</td></tr>"
    return f"<table>{lines}</table>"


def _html_answer(row: Row) -> str:
    """One question with the critique of each passage."""
    lines = ""
    for n in row["tree"]:
        passage = n["passage"]["text"] if n["passage"] else "(no passage)"
        probabilities = (n["isrel"][1], n["issup"][0]) if n["passage"] else ("", "")
        cells = "".join(
            f"<td>{p if p == '' else f'{p:.2f}'}</td>" for p in (*probabilities, n["isuse"][4], n["p_segment"], n["score"])
        )
        mark = ' class="chosen"' if n["chosen"] else ""
        lines += (
            f"<tr{mark}><td>{html.escape(passage)}</td><td style='text-align:left'>{html.escape(n['text'])}</td>{cells}</tr>"
        )
    head = "<th>passage</th><th style='text-align:left'>segment</th><th>Relevant</th><th>Fully supported</th><th>Utility 5</th><th>p(segment)</th><th>score</th>"
    decision = "retrieved" if row["retrieved"] else "no retrieval"
    return (
        f"<div class='card'><div class='q'>{html.escape(row['question'])}</div><div>{html.escape(row['answer'])}</div>"
        f"<div class='muted'>p(retrieve) {row['p_retrieve']:.2f}: {decision}</div><table><tr>{head}</tr>{lines}</table></div>"
    )


def write(rows: Sequence[Row], examples: Sequence[Row], out: str | Path, title: str, differences: Sequence[Row] = ()) -> None:
    """Writes results.md and index.html under `out`.

    examples: rows of `selfrag answer` to show with their critiques; differences: see `markdown`.
    """
    out = Path(out)
    with atomic_write(out / "results.md") as f:
        f.write(f"# {title}\n\n{markdown(rows, differences)}")
    sections = [f"<h1>{html.escape(title)}</h1><h2>Accuracy on questions about rare entities (%)</h2>{_html_bars(rows)}"]
    for metric in ("accuracy", "all_parts", "retrieval_rate", "citation_precision", "citation_recall", "fact_precision"):
        if _cells(rows, metric)[0]:
            sections.append(f"<h2>{metric.replace('_', ' ').capitalize()} (%)</h2>{_html_table(rows, metric)}")
    if differences:
        table = "".join(
            f"<tr>{''.join(f'<td>{html.escape(x)}</td>' for x in line)}</tr>" for line in _difference_lines(differences)
        )
        head = "".join(f"<th>{html.escape(x)}</th>" for x in _DIFFERENCE_HEAD)
        sections.append(f"<h2>Differences</h2><table><tr>{head}</tr>{table}</table>")
    critic = "".join(
        f"<tr><td>{html.escape(r['metric'].removesuffix('_accuracy'))}</td><td>{_percent(r)}</td><td>{r['n']}</td></tr>"
        for r in rows
        if r["system"] == "critic" and r["task"] == "critic"
    )
    if critic:
        sections.append(
            f"<h2>Critic accuracy (%)</h2><table><tr><th>group</th><th>accuracy</th><th>n</th></tr>{critic}</table>"
        )
    if examples:
        sections.append("<h2>Some questions, with the critique of each passage</h2>" + "".join(map(_html_answer, examples)))
    with atomic_write(out / "index.html") as f:
        f.write(
            f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>"
            f"<style>{_STYLE}</style><body>{''.join(sections)}</body></html>\n"
        )
