"""Tables of results.json in Markdown, and the mean of several runs.

The order of systems, tasks and metrics here is their order in all reports.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from selfrag_jax.errors import UserError
from selfrag_jax.files import read_json

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
        raise UserError(f"{path}: holds no results")
    for i, row in enumerate(rows):
        if missing := {"system", "task", "metric", "value", "low", "high", "n"} - set(row):
            raise UserError(f"{path}: row {i + 1} lacks {', '.join(sorted(missing))}")
    return rows


def mean_over_seeds(runs: Sequence[Sequence[Row]]) -> list[Row]:
    """One row for each that all runs have: the mean over runs, and its 95% interval by Student's t over the runs.

    Raises BadInput for fewer than two runs, which have no interval, and when the runs have no row in common.
    """
    if len(runs) < 2:
        raise UserError("a mean over seeds needs two runs or more")
    from scipy.stats import t

    keyed = [{(r["system"], r["task"], r["metric"]): r for r in rows} for rows in runs]
    common = [key for key in keyed[0] if all(key in rows for rows in keyed)]
    if not common:
        raise UserError("the runs have no result in common")
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


def _cells(
    rows: Sequence[Row], metric: str
) -> tuple[list[str], list[str], dict[tuple[str, str], Row]]:
    found = {(r["system"], r["task"]): r for r in rows if r["metric"] == metric}
    systems = [s for s in SYSTEMS if any((s, t) in found for t in TASKS)]
    return systems, [t for t in TASKS if any((s, t) in found for s in systems)], found


def _critic_cells(rows: Sequence[Row]) -> tuple[list[str], list[str], dict[tuple[str, str], Row]]:
    found = {
        (r["metric"], r["task"]): r
        for r in rows
        if r["system"] == "critic" and r["task"] != "critic"
    }
    return (
        [t for t in TASKS if any(t == task for _, task in found)],
        list(dict.fromkeys(m for m, _ in found)),
        found,
    )


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
        lines = [
            f"### {title} (%)",
            "",
            "| system | " + " | ".join(tasks) + " |",
            "|---" * (len(tasks) + 1) + "|",
        ]
        for s in systems:
            cells = []
            for t in tasks:
                row = found.get((s, t))
                interval = (
                    f" ({100 * row['low']:.0f}–{100 * row['high']:.0f})"
                    if row and t == "long_tail"
                    else ""
                )
                cells.append(_percent(row) + interval)
            lines.append(f"| {_TITLES[s]} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    if differences:
        lines = [
            "### Differences",
            "",
            "| " + " | ".join(_DIFFERENCE_HEAD) + " |",
            "|---" * len(_DIFFERENCE_HEAD) + "|",
        ]
        parts.append(
            "\n".join(
                lines + [f"| {' | '.join(line)} |" for line in _difference_lines(differences)]
            )
        )
    critic = [r for r in rows if r["system"] == "critic" and r["task"] == "critic"]
    if critic:
        lines = ["### Critic accuracy (%)", "", "| group | accuracy | n |", "|---|---|---|"]
        lines += [
            f"| {r['metric'].removesuffix('_accuracy')} | {_percent(r)} | {r['n']} |"
            for r in critic
        ]
        parts.append("\n".join(lines))
        tasks, metrics, found = _critic_cells(rows)
        lines = [
            "### Critic accuracy by kind of question (%)",
            "",
            "| group | " + " | ".join(tasks) + " |",
        ]
        lines.append("|---" * (len(tasks) + 1) + "|")
        for m in metrics:
            lines.append(
                f"| {m.removesuffix('_accuracy')} | "
                + " | ".join(_percent(found.get((m, t))) for t in tasks)
                + " |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"
