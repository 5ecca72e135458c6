"""`selfrag evaluate --task=NAME --input=FILE`: answers a benchmark, scores it, compares figures.

Called by commands/evaluate.py, which has the flags.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from selfrag_jax import artifacts
from selfrag_jax.answering.config import AnswerConfig
from selfrag_jax.commands.answer import answer_file, answer_identity, answering_time, read_checked
from selfrag_jax.commands.model_flags import (
    load_from,
    model_and_config,
    search_changes,
)
from selfrag_jax.errors import StageFailed, UserError
from selfrag_jax.evaluation import mauve_score, scores, tables, tasks
from selfrag_jax.evaluation.answer_rows import pair
from selfrag_jax.evaluation.fact_precision import FactVerifier, verified_by
from selfrag_jax.evaluation.judges import EntailmentJudge
from selfrag_jax.evaluation.metrics import FactReader, SupportJudge, has_gold
from selfrag_jax.evaluation.tasks import Task
from selfrag_jax.files import write_json
from selfrag_jax.processes.group import current
from selfrag_jax.records import Question, read_rows, write_jsonl

Row = dict[str, Any]
ANSWERS, SCORES, METRICS = "answers.jsonl", "scores.jsonl", "metrics.json"
SIZES = ("7b", "13b")  # of the paper's models


@dataclass(frozen=True)
class Scoring:
    """Who judges citations and reads facts, the model of MAUVE, and the seed of the bootstrap."""

    judge_name: str
    judge: SupportJudge | EntailmentJudge | None
    facts_of: FactReader | FactVerifier | None
    mauve_model: str  # the folder of a language model; "" for none
    seed: int


def evaluate_one(values: dict[str, Any], how: Scoring) -> None:
    """`selfrag evaluate --task=NAME`: prints the table."""
    task = _worded(tasks.load(values["task"]), values)
    out = Path(values["out"] or default_folder(values["input"], task))
    rows = run_task(task, values, values["input"], out, how)
    if not current().is_main:
        return
    print(f"{table_text(rows)}\n{out}")


def evaluate_all(values: dict[str, Any], how: Scoring) -> None:
    """Evaluates every task whose file is in --data, and prints our figures beside the paper's.

    Goes on where a task fails, and raises StageFailed at the end if one did. Several processes stop
    there: the others may have gone on with this task.
    """
    if not values["data"]:
        raise UserError("missing --data, the folder of the tasks' files")
    results, failed = [], []
    for task, file in find_files(values["data"]):
        try:
            task = _worded(task, values)
            out = Path(values["out"] or values["data"]) / default_folder(file, task).name
            rows = run_task(task, values, file, out, how)
            results += [(task, rows)] if current().is_main else []
        except (UserError, StageFailed) as e:
            if current().count > 1:
                raise
            failed.append(f"{task.name}: {e}")
            print(failed[-1], file=sys.stderr)
    if results:
        for size in SIZES:
            print(comparison_text(results, size) + "\n")
        print("\n".join(line for task, rows in results for line in causes(task, values, rows)))
    if failed:
        raise StageFailed(f"{len(failed)} tasks were not evaluated; the first, {failed[0]}")


def _worded(task: Task, values: dict[str, Any]) -> Task:
    """The task with the user's instruction if there is one; says so on the screen."""
    task = tasks.with_instruction(task, values["instructions"])
    print(task.describe(values["instructions"]), file=sys.stderr)
    return task


def default_folder(input_path: str | Path, task: Task) -> Path:
    """Where a task is evaluated without --out: beside its file, as FILE-TASK."""
    path = Path(input_path)
    return path.with_name(f"{path.name.partition('.')[0]}-{task.spec.replace(':', '-')}")


def run_task(
    task: Task, values: dict[str, Any], input_path: str | Path, out: str | Path, how: Scoring
) -> list[Row]:
    """Answers and scores one file; returns the rows of OUT/metrics.json.

    values: of the command's flags. Answers that are there already are kept, and the model is loaded
    only if some are missing. Of several processes all answer, and process 0 alone scores and
    writes; the others get no rows. Raises UserError before the model is loaded if the file lacks
    what the task asks or scores with, and StageFailed if no question could be answered.
    """
    out, changes = Path(out), task_changes(task, values)
    model, index, config = model_and_config(values, calibrated=False)
    questions = read_checked(input_path, task, index is not None, changes["mode"])
    _require_gold(input_path, task, questions)
    if how.mauve_model:
        mauve_score.long_answers(questions)
    artifacts.check_output(out, "evaluate", {})
    answers = _answered(task, input_path, out, changes, (model, index, config), questions)
    if not current().is_main:
        return []
    failed = [row for row in answers if row["error"]]
    if len(failed) == len(answers):
        raise StageFailed(
            f"{input_path}: no question could be answered; the first, {failed[0]['id']!r}: "
            f"{failed[0]['error']}"
        )
    if failed:
        print(
            f"{len(failed)} of {len(answers)} answers are missing and count as wrong; the same "
            "command tries them again",
            file=sys.stderr,
        )
    if isinstance(how.facts_of, FactVerifier) and (
        notice := how.facts_of.notice(pair(questions, answers))
    ):
        print(f"{input_path}: {notice}", file=sys.stderr)
    rows = scores.score_questions(questions, answers, how.judge, how.facts_of)
    write_jsonl(out / SCORES, rows)
    results = scores.result_rows("selfrag", task.spec, scores.columns(rows), how.seed)
    seconds, timed = answering_time(out / ANSWERS)
    if timed:
        results.append(scores.seconds_row("selfrag", task.spec, seconds, timed))
    if how.mauve_model:
        mauve = mauve_score.mauve_of_answers(questions, answers, how.mauve_model, how.seed)
        results.append({"system": "selfrag", "task": task.spec, **mauve})
    for row in results:
        if figure := task.figure(row["metric"]):
            row["paper"] = {size: percent / 100 for size, percent in figure.items()}
    judged = {} if how.judge is None else {"judge": how.judge_name}
    judged |= verified_by(how.facts_of, results)
    metrics = {"rows": results, "seed": how.seed, **judged, "failed": len(failed)}
    write_json(out / METRICS, metrics)
    inputs: dict[str, str | Path] = {"input": input_path, "answers": out / ANSWERS}
    made = {"task": asdict(task), "judge": how.judge_name, "seed": how.seed}
    artifacts.write_manifest(out, "evaluate", made, inputs, {"questions": len(rows)})
    return results


def task_changes(task: Task, values: dict[str, Any]) -> dict[str, Any]:
    """The search's settings: the task's, then --config.answer.search.x=, then the search's flags.

    A setting that the user changed in the config is left to it.
    """
    given = {k: v for k, v in search_changes(values).items() if k != "seed"}  # the bootstrap's
    in_config = {
        assignment.partition("=")[0].rpartition(".")[2]
        for assignment in values["overrides"]
        if assignment.startswith("answer.search.")
    }
    settings = task.settings(given.get("scorer", ""))
    return {k: v for k, v in settings.items() if k not in in_config} | given


def _answered(
    task: Task,
    input_path: str | Path,
    out: Path,
    changes: dict[str, Any],
    model: tuple[Path, Path | None, AnswerConfig],
    questions: list[Question],
) -> list[Row]:
    """The rows of OUT/answers.jsonl, answered if they are not there yet."""
    folder, index, config = model
    identity = answer_identity(config, task.name, changes, task)
    inputs: dict[str, str | Path] = {"input": input_path, "model": folder}
    if index:
        inputs["index"] = index
    file = out / ANSWERS

    def is_done() -> bool:
        if not artifacts.is_finished(file, "answer", identity, inputs):
            return False
        return not any(row["error"] for _, row in read_rows(file))

    if not current().from_main("answers are there", is_done):
        answer_file(load_from(*model), input_path, file, task.name, changes, task, questions)
    return [row for _, row in read_rows(file)] if current().is_main else []


def _require_gold(input_path: str | Path, task: Task, questions: Sequence[Question]) -> None:
    without = [q.id for q in questions if not has_gold(q)]
    if without and task.needs_gold:
        raise UserError(
            f"{input_path}: {len(without)} of {len(questions)} questions have no gold answer, "
            f"{without[0]!r} first, so --task={task.name} cannot score them; `selfrag answer` "
            "answers files without"
        )


# ---- the table -----------------------------------------------------------------------------------
def table_text(rows: Sequence[Row]) -> str:
    """Metric, ours with its interval, and the paper's figures, in percent."""
    lines = [("metric", "ours", "95% interval", "n", *(f"paper {size}" for size in SIZES))]
    for row in rows:
        value, interval = tables.percent(row), tables.interval_text(row, between="–")
        paper = row.get("paper", {})
        figures = (f"{100 * paper[size]:.1f}" if size in paper else "" for size in SIZES)
        lines.append((row["metric"], value, interval, f"{row['n']:,}", *figures))
    return _aligned(lines)


def _aligned(lines: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


# ---- all tasks of a folder -----------------------------------------------------------------------
def find_files(data: str | Path) -> list[tuple[Task, Path]]:
    """The tasks whose published files lie in a folder. Raises UserError if none do."""
    data = Path(data)
    if not data.is_dir():
        raise UserError(f"--data={data}: no such folder")
    every, found = [tasks.load(name) for name in tasks.names()], []
    for task in every:
        matches = sorted({p for pattern in task.files for p in data.glob(pattern) if p.is_file()})
        matches = [p for p in matches if not p.name.endswith(".manifest.json")]
        if len(matches) > 1:
            names = ", ".join(p.name for p in matches)
            print(f"{task.name}: takes {matches[0].name} of {names}", file=sys.stderr)
        found += [(task, p) for p in matches[:1]]
    if not found:
        looked_for = ", ".join(pattern for task in every for pattern in task.files)
        raise UserError(f"--data={data}: holds no task's file; looked for {looked_for}")
    return found


def comparison_text(results: Sequence[tuple[Task, Sequence[Row]]], size: str) -> str:
    """Task, metric, the paper's figure, ours and the difference, in percent."""
    lines = [("task", "metric", f"paper {size}", "ours", "difference", "95% interval")]
    for task, rows in results:
        named = {row["metric"] for row in rows}
        for row in rows:
            metric = row["metric"]
            if metric == "accuracy" and task.metric in named:
                continue  # the same number
            figure = row.get("paper", {}).get(size)
            if figure is None and metric not in (task.metric, "accuracy"):
                continue
            value, low, high = (100 * row[name] for name in ("value", "low", "high"))
            paper = "" if figure is None else f"{100 * figure:.1f}"
            gap = "" if figure is None else f"{value - 100 * figure:+.1f}"
            lines.append((task.spec, metric, paper, f"{value:.1f}", gap, f"{low:.1f}–{high:.1f}"))
    return _aligned(lines)


def causes(task: Task, values: dict[str, Any], rows: Sequence[Row]) -> list[str]:
    """The known reasons for a gap between the paper's figure and ours, one line each."""
    found = []
    if task.instruction and task.script_name and not values["instructions"]:
        found.append("prompt: our wording of the instruction; --instructions takes the released")
    if values["scorer"] != "released" and task.variant == "paper":
        found.append("scorer: the paper's equations; the paper's figures come from its scripts'")
    if values["index"]:
        found.append("passages: of the index where a question has none of its own")
    if task.metric not in {row["metric"] for row in rows}:
        found.append(f"metric: {task.metric} was not computed; it takes a judge or another program")
    return [f"{task.spec}: {line}" for line in found]
