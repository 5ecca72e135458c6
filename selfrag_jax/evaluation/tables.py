"""Tables of results.json in Markdown, and the mean of several runs.

The order of systems, tasks and metrics here is their order in all reports.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from selfrag_jax.errors import UserError
from selfrag_jax.evaluation.answer_checks import is_finite
from selfrag_jax.evaluation.mauve_score import RUNS
from selfrag_jax.evaluation.scores import AMOUNTS
from selfrag_jax.files import read_object

Row = dict[str, Any]
INTERVAL = ("value", "low", "high")
NOT_95 = {"mauve": f"range of {RUNS} seeds"}  # metrics whose ends are something else
SYSTEM_TITLES = {
    "selfrag": "Self-RAG",
    "base_few_shot": "Base, few-shot",
    "base_few_shot_rag": "Base with the top passage, few-shot",
    "no_retrieval": "No retrieval",
    "rag_top1": "Standard RAG, top 1",
    "rag_topk": "Standard RAG, top K",
    "selfrag_always": "Self-RAG, always",
    "selfrag_adaptive": "Self-RAG, adaptive",
    "selfrag_never": "Self-RAG, never",
    "ablation_no_retrieval": "– no retrieval at test time",
    "ablation_hard_constraints": "– the Retrieve token alone decides",
    "ablation_top1": "– own top passage only",
    "ablation_no_isrel": "– without IsRel",
    "ablation_no_issup": "– without IsSup",
    "ablation_no_isuse": "– without IsUse",
    "ablation_no_seqscore": "– without p(segment)",
    "train_no_critic": "trained without critic",
    "train_no_retriever": "trained without retriever",
}
TASKS = ("long_tail", "well_known", "no_need", "claims", "multiple_choice", "two_part", "biography")
# Of any world, in the order of the tables.
_TASK_ORDER = ("facts", "unanswerable", *TASKS, "comparison", "description")
_WITH_INTERVAL = ("facts", "long_tail")  # of the tasks of quickstarts
SYSTEMS = tuple(SYSTEM_TITLES)
METRIC_TITLES = {
    "accuracy": "Accuracy",
    "all_parts": "All parts right",
    "retrieval_rate": "Retrieval rate",
    "citation_precision": "Citation precision",
    "citation_recall": "Citation recall",
    "fact_precision": "Facts told that are true",
}
CRITIC_HEADER = ("group", "accuracy", "expected calibration error", "n")
DIFFERENCE_HEADER = (
    "difference in accuracy, paired",
    "task",
    "points",
    "95% interval",
    "questions",
)


def read_results(path: str | Path) -> list[Row]:
    """Returns the rows of a results.json.

    Raises UserError naming the file if it has no rows, or a row lacks a field or a finite number.
    """
    rows = read_object(path, ()).get("rows")
    if not rows or not isinstance(rows, list):
        raise UserError(f"{path}: holds no results")
    names = ("system", "task", "metric")
    for i, row in enumerate(rows):
        present = set(row) if isinstance(row, dict) else set()
        if missing := {*names, *INTERVAL, "n"} - present:
            raise UserError(f"{path}: row {i + 1} lacks {', '.join(sorted(missing))}")
        # A time has no interval: low and high are null.
        ends = ("low", "high") if (row["low"], row["high"]) != (None, None) else ()
        for field in ("value", *ends, "n"):
            if not is_finite(row[field]):
                raise UserError(
                    f"{path}: row {i + 1}: {field} must be a finite number, found {row[field]!r}"
                )
        if not all(isinstance(row[name], str) for name in names):
            raise UserError(f"{path}: row {i + 1}: {', '.join(names)} must be texts")
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
                "low": mean - half if metric in AMOUNTS else max(0.0, mean - half),
                "high": mean + half if metric in AMOUNTS else min(1.0, mean + half),
                "n": sum(rows[key]["n"] for rows in keyed),
            }
        )
    return out


def metric_table(
    rows: Sequence[Row], metric: str
) -> tuple[list[str], list[str], dict[tuple[str, str], Row]]:
    """Returns the systems and tasks that have results, and the row of each (system, task).

    Those of quickstarts come in their order, others after them as in `rows`.
    """
    found = {
        (r["system"], r["task"]): r
        for r in rows
        if r["metric"] == metric and r["system"] != "critic"
    }
    systems = _in_order([s for s, _ in found], SYSTEMS)
    return systems, _in_order([t for _, t in found], _TASK_ORDER), found


def metrics_of(rows: Sequence[Row]) -> list[str]:
    """Returns the metrics of answers in `rows`, in the order of METRIC_TITLES, others after."""
    return _in_order([r["metric"] for r in rows if r["system"] != "critic"], tuple(METRIC_TITLES))


def _in_order(names: Sequence[str], order: Sequence[str]) -> list[str]:
    return [n for n in order if n in names] + [n for n in dict.fromkeys(names) if n not in order]


def system_title(system: str) -> str:
    return SYSTEM_TITLES.get(system, system)


def metric_heading(metric: str) -> str:
    """Returns the title of a metric's table, with its unit."""
    title = METRIC_TITLES.get(metric, metric.replace("_", " ").capitalize())
    return title if metric in AMOUNTS else f"{title} (%)"


def critic_rows(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Returns the critic's results over all queries, in the order of CRITIC_HEADER."""
    found = {r["metric"]: r for r in rows if r["system"] == "critic" and r["task"] == "critic"}
    return [
        (group, percent(r), percent(found.get(f"{group}_ece")), str(r["n"]))
        for metric, r in found.items()
        if (group := metric.removesuffix("_accuracy")) != metric
    ]


def percent(row: Row | None) -> str:
    return "" if row is None else _number(row["metric"], row["value"], 1)


def interval_text(row: Row, digits: int = 1, between: str = " to ") -> str:
    """Returns the ends of a row's interval; "" for one without (a time).

    It is a 95% interval, but for metrics of NOT_95, which say so.
    """
    if row["low"] is None:
        return ""
    ends = between.join(_number(row["metric"], row[end], digits) for end in ("low", "high"))
    return ", ".join(filter(None, (ends, NOT_95.get(row["metric"]))))


def _number(metric: str, value: float, digits: int) -> str:
    """Returns a share in per cent, an amount as it is; critiques and times have two more digits."""
    if metric not in AMOUNTS:
        return f"{100 * value:.{digits}f}"
    return f"{value:.{digits + 2 * metric.startswith(('mean_', 'seconds'))}f}"


def difference_rows(differences: Sequence[Row]) -> list[tuple[str, ...]]:
    """Returns the cells of each difference, in the order of DIFFERENCE_HEADER."""

    def title(system: str) -> str:
        return system_title(system).removeprefix("– ")

    return [
        (
            f"{title(d['system'])} over {title(d['over'])}",
            d["task"],
            f"{100 * d['value']:.1f}",
            f"{100 * d['low']:.1f} to {100 * d['high']:.1f}",
            str(d["n"]),
        )
        for d in differences
    ]


def markdown(rows: Sequence[Row], differences: Sequence[Row] = ()) -> str:
    """Returns all tables as Markdown, in per cent.

    Results of a quickstart's main task, and of tasks outside of quickstarts, show their 95%
    interval.

    `differences` holds rows with system, over (the other system), task, value, low, high and n.
    """
    parts = []
    for metric in metrics_of(rows):
        systems, tasks, found = metric_table(rows, metric)
        body = [(system_title(s), *(_cell(found.get((s, t)), t) for t in tasks)) for s in systems]
        parts.append(markdown_table(metric_heading(metric), ("system", *tasks), body))
    if differences:
        body = difference_rows(differences)
        parts.append(markdown_table("Differences", DIFFERENCE_HEADER, body))
    if critic := critic_rows(rows):
        parts.append(markdown_table("Critic accuracy (%)", CRITIC_HEADER, critic))
        parts.append(_critic_by_kind(rows))
    return "\n\n".join(parts) + "\n"


def _cell(row: Row | None, task: str) -> str:
    if row is None or (task in _TASK_ORDER and task not in _WITH_INTERVAL):
        return percent(row)
    digits = 1 if row["metric"] in AMOUNTS else 0
    ends = interval_text(row, digits, "–")
    return f"{percent(row)} ({ends})" if ends else percent(row)


def _critic_by_kind(rows: Sequence[Row]) -> str:
    found = {
        (r["metric"], r["task"]): r
        for r in rows
        if r["system"] == "critic" and r["task"] != "critic"
    }
    tasks = _in_order([t for _, t in found], _TASK_ORDER)
    body = [
        (m.removesuffix("_accuracy"), *(percent(found.get((m, t))) for t in tasks))
        for m in dict.fromkeys(m for m, _ in found)
    ]
    return markdown_table("Critic accuracy by kind of question (%)", ("group", *tasks), body)


def markdown_table(title: str, header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Returns a table in Markdown below its title."""
    lines = [f"### {title}", "", _markdown_row(header), "|---" * len(header) + "|"]
    return "\n".join(lines + [_markdown_row(cells) for cells in body])


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {cells[0]} | {' | '.join(cells[1:])} |"
