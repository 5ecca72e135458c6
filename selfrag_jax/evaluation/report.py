"""The report: results.json as Markdown tables and as one self-contained HTML page with plots and critique trees."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from selfrag_jax.evaluation.tables import (
    _DIFFERENCE_HEAD,
    _TITLES,
    Row,
    _cells,
    _difference_lines,
    _percent,
    markdown,
)
from selfrag_jax.files import atomic_write

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
            hint = (
                f"95% interval {100 * row['low']:.1f} to {100 * row['high']:.1f}, n = {row['n']}"
                if row
                else ""
            )
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
            f"<td>{p if p == '' else f'{p:.2f}'}</td>"
            for p in (*probabilities, n["isuse"][4], n["p_segment"], n["score"])
        )
        mark = ' class="chosen"' if n["chosen"] else ""
        lines += f"<tr{mark}><td>{html.escape(passage)}</td><td style='text-align:left'>{html.escape(n['text'])}</td>{cells}</tr>"
    head = "<th>passage</th><th style='text-align:left'>segment</th><th>Relevant</th><th>Fully supported</th><th>Utility 5</th><th>p(segment)</th><th>score</th>"
    decision = "retrieved" if row["retrieved"] else "no retrieval"
    return (
        f"<div class='card'><div class='q'>{html.escape(row['question'])}</div><div>{html.escape(row['answer'])}</div>"
        f"<div class='muted'>p(retrieve) {row['p_retrieve']:.2f}: {decision}</div><table><tr>{head}</tr>{lines}</table></div>"
    )


def write_report(
    rows: Sequence[Row],
    examples: Sequence[Row],
    out: str | Path,
    title: str,
    differences: Sequence[Row] = (),
) -> None:
    """Writes results.md and index.html under `out`.

    examples: rows of `selfrag answer` to show with their critiques; differences: see `markdown`.
    """
    out = Path(out)
    with atomic_write(out / "results.md") as f:
        f.write(f"# {title}\n\n{markdown(rows, differences)}")
    sections = [
        f"<h1>{html.escape(title)}</h1><h2>Accuracy on questions about rare entities (%)</h2>{_html_bars(rows)}"
    ]
    for metric in (
        "accuracy",
        "all_parts",
        "retrieval_rate",
        "citation_precision",
        "citation_recall",
        "fact_precision",
    ):
        if _cells(rows, metric)[0]:
            sections.append(
                f"<h2>{metric.replace('_', ' ').capitalize()} (%)</h2>{_html_table(rows, metric)}"
            )
    if differences:
        table = "".join(
            f"<tr>{''.join(f'<td>{html.escape(x)}</td>' for x in line)}</tr>"
            for line in _difference_lines(differences)
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
        sections.append(
            "<h2>Some questions, with the critique of each passage</h2>"
            + "".join(map(_html_answer, examples))
        )
    with atomic_write(out / "index.html") as f:
        f.write(
            f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>"
            f"<style>{_STYLE}</style><body>{''.join(sections)}</body></html>\n"
        )
