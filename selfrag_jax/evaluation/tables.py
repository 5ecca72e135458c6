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
SYSTEM_TITLES = {
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
SYSTEMS = tuple(SYSTEM_TITLES)
METRIC_TITLES = {
    "accuracy": "Accuracy",
    "all_parts": "All parts right",
    "retrieval_rate": "Retrieval rate",
    "citation_precision": "Citation precision",
    "citation_recall": "Citation recall",
    "fact_precision": "Facts told that are true",
}
DIFFERENCE_HEADER = (
    "difference in accuracy, paired",
    "task",
    "points",
    "95% interval",
    "questions",
)


def read_results(path: str | Path) -> list[Row]:
    """Returns the rows of a results.json.

    Raises UserError naming the file if it has no rows or a row lacks a field.
    """
    rows = read_json(path).get("rows")
    if not rows:
        raise UserError(f"{path}: holds no results")
    for i, row in enumerate(rows):
        if missing := {"system", "task", "metric", "value", "low", "high", "n"} - set(row):
            raise UserError(f"{path}: row {i + 1} lacks {', '.join(sorted(missing))}")
    return rows


def mean_over_seeds(runs: Sequence[Sequence[Row]]) -> list[Row]:
    """Averages the rows that all runs have; the 95% interval is Student's t over the runs.

    Raises UserError for fewer than two runs, which have no interval, and for runs without a common
    row.
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
            {
                "system": system,
                "task": task,
                "metric": metric,
                "value": mean,
                "low": max(0.0, mean - half),
                "high": min(1.0, mean + half),
                "n": sum(rows[key]["n"] for rows in keyed),
            }
        )
    return out


def metric_table(
    rows: Sequence[Row], metric: str
) -> tuple[list[str], list[str], dict[tuple[str, str], Row]]:
    """Returns the systems and tasks that have results, and the row of each (system, task)."""
    found = {(r["system"], r["task"]): r for r in rows if r["metric"] == metric}
    systems = [s for s in SYSTEMS if any((s, t) in found for t in TASKS)]
    return systems, [t for t in TASKS if any((s, t) in found for s in systems)], found


def critic_rows(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Returns the critic's results over all queries: group, accuracy, number of queries."""
    return [
        (r["metric"].removesuffix("_accuracy"), percent(r), str(r["n"]))
        for r in rows
        if r["system"] == "critic" and r["task"] == "critic"
    ]


def percent(row: Row | None) -> str:
    return "" if row is None else f"{100 * row['value']:.1f}"


def difference_rows(differences: Sequence[Row]) -> list[tuple[str, ...]]:
    """Returns the cells of each difference, in the order of DIFFERENCE_HEADER."""
    titles = {system: title.removeprefix("– ") for system, title in SYSTEM_TITLES.items()}
    return [
        (
            f"{titles[d['system']]} over {titles[d['over']]}",
            d["task"],
            f"{100 * d['value']:.1f}",
            f"{100 * d['low']:.1f} to {100 * d['high']:.1f}",
            str(d["n"]),
        )
        for d in differences
    ]


def markdown(rows: Sequence[Row], differences: Sequence[Row] = ()) -> str:
    """Returns all tables as Markdown, in per cent; long-tail results show their 95% interval.

    `differences` holds rows with system, over (the other system), task, value, low, high and n.
    """
    parts = []
    for metric, title in METRIC_TITLES.items():
        systems, tasks, found = metric_table(rows, metric)
        if systems:
            body = [
                (SYSTEM_TITLES[s], *(_cell(found.get((s, t)), t) for t in tasks)) for s in systems
            ]
            parts.append(_markdown_table(f"{title} (%)", ("system", *tasks), body))
    if differences:
        body = difference_rows(differences)
        parts.append(_markdown_table("Differences", DIFFERENCE_HEADER, body))
    if critic := critic_rows(rows):
        header = ("group", "accuracy", "n")
        parts.append(_markdown_table("Critic accuracy (%)", header, critic))
        parts.append(_critic_by_kind(rows))
    return "\n\n".join(parts) + "\n"


def _cell(row: Row | None, task: str) -> str:
    if row is None or task != "long_tail":
        return percent(row)
    return f"{percent(row)} ({100 * row['low']:.0f}–{100 * row['high']:.0f})"


def _critic_by_kind(rows: Sequence[Row]) -> str:
    found = {
        (r["metric"], r["task"]): r
        for r in rows
        if r["system"] == "critic" and r["task"] != "critic"
    }
    tasks = [t for t in TASKS if any(t == task for _, task in found)]
    body = [
        (m.removesuffix("_accuracy"), *(percent(found.get((m, t))) for t in tasks))
        for m in dict.fromkeys(m for m, _ in found)
    ]
    return _markdown_table("Critic accuracy by kind of question (%)", ("group", *tasks), body)


def _markdown_table(title: str, header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [f"### {title}", "", _markdown_row(header), "|---" * len(header) + "|"]
    return "\n".join(lines + [_markdown_row(cells) for cells in body])


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {cells[0]} | {' | '.join(cells[1:])} |"
