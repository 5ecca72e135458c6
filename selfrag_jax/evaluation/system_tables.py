"""The table of systems: main metric by task, the paper's figures, and what each change costs.

A row has system, task, metric, value, low, high, n; table2 and table3, the paper's figures; and,
where full Self-RAG was run too, difference (this system - full), its paired 95% interval
difference_low and difference_high, p, and paper_difference, Table 3's. All are fractions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from selfrag_jax.evaluation import comparison, reproduction, tables
from selfrag_jax.evaluation.systems import BY_NAME, FULL, System
from selfrag_jax.evaluation.tasks import Task

Row = dict[str, Any]
COLUMNS = (
    "system", "task", "metric", "value", "low", "high", "n", "table2", "table3",
    "difference", "difference_low", "difference_high", "p", "paper_difference",
)  # fmt: skip


@dataclass(frozen=True)
class SystemResult:
    """A system's results on a task: its rows of metrics.json and of scores.jsonl."""

    task: Task
    system: System
    metrics: Sequence[Row]
    scores: Sequence[Row]


def system_rows(results: Sequence[SystemResult], seed: int) -> list[Row]:
    """The table's rows; results without the task's main metric, or accuracy, have none.

    seed: of the bootstrap and the test.
    """
    full = {r.task.spec: r for r in results if r.system.name == FULL}
    rows = []
    for result in results:
        by_metric = {row["metric"]: row for row in result.metrics}
        metric = next((m for m in (result.task.main_metric, "accuracy") if m in by_metric), None)
        if metric is None:
            continue
        kept = ("system", "task", "metric", "value", "low", "high", "n")
        row = {name: by_metric[metric][name] for name in kept} | _paper(result)
        if result.system.name != FULL and result.task.spec in full:
            row |= _difference(result, full[result.task.spec], metric, seed)
        rows.append(row)
    return rows


def _paper(result: SystemResult) -> Row:
    task, system = result.task, result.system
    table2 = reproduction.published(task, system, task.main_metric)
    table3 = system.table3.get(task.name, {}).get(task.metric)
    found: Row = {}
    if "7b" in table2:
        found["table2"] = _fraction(table2["7b"])
    if table3 is not None:
        found["table3"] = _fraction(table3)
        full = BY_NAME[FULL].table3[task.name][task.metric]
        if system.name != FULL:
            found["paper_difference"] = _fraction(table3 - full)
    return found


def _fraction(percent: float) -> float:
    return round(percent / 100, 4)


def _difference(result: SystemResult, full: SystemResult, metric: str, seed: int) -> Row:
    """{} if no question has the metric in both: facts are judged only where something was read."""
    mine, theirs = (
        [row | {"metrics": {k: v for k, v in row["metrics"].items() if k == metric}} for row in r]
        for r in (result.scores, full.scores)
    )
    having = ({str(row["id"]) for row in rows if row["metrics"]} for rows in (mine, theirs))
    if not set.intersection(*having):
        return {}
    [d] = comparison.compare(mine, theirs, seed)
    ends = {"difference_low": d.low, "difference_high": d.high}
    return {"difference": d.value, **ends, "p": d.p}


# ---- text ----------------------------------------------------------------------------------------
def score_lines(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Heading and cells: for each task ours with its interval, and the paper's figures."""
    systems, tasks, found = _cells(rows)
    with_paper = {t for s, t in found if {"table2", "table3"} & set(found[s, t])}
    head = ["system"]
    for t in tasks:
        head += [f"{t} {_metric(rows, t)}", *(["paper"] if t in with_paper else [])]
    lines = [tuple(head)]
    for s in systems:
        cells = [s]
        for t in tasks:
            row = found.get((s, t))
            cells.append("" if row is None else f"{tables.percent(row)} ({_interval(row)})")
            cells += [_paper_text(row)] if t in with_paper else []
        lines.append(tuple(cells))
    return lines


def difference_lines(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Heading and cells: each system minus full Self-RAG, in points; [] if nothing is compared."""
    compared = [r for r in rows if "difference" in r]
    systems, tasks, found = _cells(compared)
    if not found:
        return []
    with_paper = {t for s, t in found if "paper_difference" in found[s, t]}
    head = ["minus full Self-RAG"]
    for t in tasks:
        head += [t, *(["paper"] if t in with_paper else [])]
    lines = [tuple(head)]
    for s in systems:
        cells = [s]
        for t in tasks:
            row = found.get((s, t), {})
            cells.append(_difference_text(row))
            if t in with_paper:
                paper = row.get("paper_difference")
                cells.append("" if paper is None else f"{100 * paper:+.1f}")
        lines.append(tuple(cells))
    return lines


def text(rows: Sequence[Row]) -> str:
    both = score_lines(rows), difference_lines(rows)
    return "\n\n".join(reproduction.aligned(lines) for lines in both if lines)


def markdown(rows: Sequence[Row], reasons: Sequence[str]) -> str:
    titles = "Systems (%; T2, T3: the paper's Tables 2 and 3)", "Differences in points, paired"
    parts = []
    for title, lines in zip(titles, (score_lines(rows), difference_lines(rows)), strict=True):
        if lines:
            parts.append(tables.markdown_table(title, lines[0], lines[1:]))
    return "\n\n".join([*parts, reproduction.causes_markdown(reasons)])


def _cells(rows: Sequence[Row]) -> tuple[list[str], list[str], dict[tuple[str, str], Row]]:
    found = {(r["system"], r["task"]): r for r in rows}
    asked = {s for s, _ in found}
    return [s for s in BY_NAME if s in asked], list(dict.fromkeys(t for _, t in found)), found


def _metric(rows: Sequence[Row], task: str) -> str:
    return next(r["metric"] for r in rows if r["task"] == task)


def _interval(row: Row) -> str:
    return tables.interval_text(row, between="–")


def _paper_text(row: Row | None) -> str:
    named = {"T2": "table2", "T3": "table3"}
    figures = {t: row[name] for t, name in named.items() if name in row} if row else {}
    return ", ".join(f"{100 * value:.1f} {t}" for t, value in figures.items())


def _difference_text(row: Row) -> str:
    if "difference" not in row:
        return ""
    value, low, high = (100 * row[f"difference{end}"] for end in ("", "_low", "_high"))
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"
