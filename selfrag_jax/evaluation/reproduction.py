"""Our figures beside the paper's: one run, all tasks (Table 2), and why they may differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from selfrag_jax.evaluation import tables
from selfrag_jax.evaluation.systems import FULL, PLAIN, System
from selfrag_jax.evaluation.tasks import SHORT_FORM_METRICS, Task
from selfrag_jax.text.plain_prompts import RELEASED

Row = dict[str, Any]
SIZES = ("7b", "13b")  # of the paper's models
SIZE_50K = "7b, 50k"  # Table 3's models are trained on 50k rows
COLUMNS = ("task", "metric", "size", "paper", "value", "difference", "low", "high", "n")


def published(task: Task, system: System, metric: str) -> dict[str, float]:
    """The paper's figures by model, in percent; `accuracy` is the task's main metric."""
    if system.name == FULL:
        return task.figure(metric)
    name = task.figure_name(metric)
    found = {"7b": system.table2, SIZE_50K: system.table3}
    figures = {size: table.get(task.name, {}).get(name) for size, table in found.items()}
    return {size: figure for size, figure in figures.items() if figure is not None}


def table_text(rows: Sequence[Row]) -> str:
    """Metric, ours with its interval, and the paper's figures, in percent."""
    sizes = [*SIZES, *([SIZE_50K] if any(SIZE_50K in r.get("paper", {}) for r in rows) else [])]
    lines = [("metric", "ours", "95% interval", "n", *(f"paper {size}" for size in sizes))]
    for row in rows:
        value, interval = tables.percent(row), tables.interval_text(row, between="–")
        paper = row.get("paper", {})
        figures = (f"{100 * paper[size]:.1f}" if size in paper else "" for size in sizes)
        lines.append((row["metric"], value, interval, f"{row['n']:,}", *figures))
    return aligned(lines)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


# ---- all tasks of a folder -----------------------------------------------------------------------
def comparison(results: Sequence[tuple[Task, Sequence[Row]]]) -> list[Row]:
    """Ours and the paper's figures of full Self-RAG, for each task, metric and size; fractions.

    Main metrics come without a figure too, where the paper has none.
    """
    found = []
    for task, rows in results:
        named = {row["metric"] for row in rows}
        for row in rows:
            metric = row["metric"]
            if metric == "accuracy" and task.main_metric in named:
                continue  # the same number
            for size in SIZES:
                paper = row.get("paper", {}).get(size)
                if paper is None and metric not in (task.main_metric, "accuracy"):
                    continue
                gap = None if paper is None else row["value"] - paper
                one = {"task": task.spec, "metric": metric, "size": size, "paper": paper}
                ends = {name: row[name] for name in ("value", "low", "high", "n")}
                found.append(one | {"difference": gap} | ends)
    return found


def comparison_lines(rows: Sequence[Row], size: str) -> list[tuple[str, ...]]:
    """Heading and cells, in percent, of the rows of one model size."""
    head = ("task", "metric", f"paper {size}", "ours", "difference", "95% interval")
    lines: list[tuple[str, ...]] = [head]
    for r in rows:
        if r["size"] == size:
            paper = "" if r["paper"] is None else f"{100 * r['paper']:.1f}"
            gap = "" if r["difference"] is None else f"{100 * r['difference']:+.1f}"
            interval = tables.interval_text(r, between="–")
            cells = r["task"], r["metric"], paper, f"{100 * r['value']:.1f}", gap, interval
            lines.append(cells)
    return lines


def markdown(rows: Sequence[Row], reasons: Sequence[str]) -> str:
    """The comparison of each size, and the known causes of gaps."""
    parts = []
    for size in SIZES:
        head, *body = comparison_lines(rows, size)
        parts.append(tables.markdown_table(f"Self-RAG {size.upper()}, Table 2 (%)", head, body))
    return "\n\n".join(parts) + "\n\n" + causes_markdown(reasons)


def causes_markdown(reasons: Sequence[str]) -> str:
    lines = [f"- {reason}" for reason in reasons]
    return "\n".join(["### Known causes of differences", "", *lines]) + "\n"


# ---- causes --------------------------------------------------------------------------------------
def causes(
    task: Task,
    systems: Sequence[System],
    values: dict[str, Any],
    metrics: set[str],
    file: str,
    others: Sequence[str],
) -> list[str]:
    """The known reasons for a gap between the paper's figures and ours, one line each.

    values: of the command's flags. metrics: those that were computed. file: the name of the task's;
    others: names of those that could have been taken instead.
    """
    found = []
    if task.instruction and task.script_name and not values["instructions"]:
        found.append("prompt: our wording of the instruction; --instructions takes the released")
    is_searched = any(s.is_search for s in systems)
    if is_searched and values["scorer"] != "released" and task.variant == "paper":
        found.append("scorer: the paper's equations; the paper's figures come from its scripts'")
    found += _causes_of_passages(task, bool(values["index"]), file, others)
    if task.main_metric not in metrics:
        found.append(
            f"metric: {task.main_metric} was not computed; it takes a judge or another program"
        )
    elif task.figures and task.main_metric in SHORT_FORM_METRICS:
        found.append(
            f"metric: {task.metric}; the paper's figures are the scripts' match, which "
            f"--task={task.name}:released computes"
        )
    if any(s.table3.get(task.name) for s in systems if s.name != FULL):
        found.append("training: Table 3's models are trained on 50k rows, published ones on 150k")
    if baselines := [s for s in systems if s.model == PLAIN]:
        found += _causes_of_baselines(task, baselines, values)
    return [f"{task.spec}: {line}" for line in found]


def _causes_of_passages(task: Task, has_index: bool, file: str, others: Sequence[str]) -> list[str]:
    """Whose passages were read: the index's, or the file's own."""
    ours = f"those of {file}" + (", of the index where a question has none" if has_index else "")
    papers = f"; the paper's are from {task.retriever}" if task.retriever else ""
    also = f"; the folder also has {', '.join(others)}" if others else ""
    return [f"passages: {ours}{papers}{also}"] if has_index or papers or also else []


def _causes_of_baselines(
    task: Task, baselines: Sequence[System], values: dict[str, Any]
) -> list[str]:
    if not any(s.table2.get(task.name) for s in baselines):
        return []
    found = ["baselines: the paper's model is Llama-2 7B (--plain_model)"]
    prompt = values["plain_prompt"] or "selfrag"
    if prompt not in {p.name for p in RELEASED}:
        found.append(f"baselines: their prompt is {prompt}; --plain_prompt has the released ones")
    found.append("baselines: greedy; the released script samples (temperature 0.8, top_p 0.95)")
    if any(s.passages for s in baselines):
        found.append(
            "baselines: the paper prepends the top passages, and the released command takes one by "
            "default; its figure stands beside rag_top1 and rag_topk"
        )
    return found
