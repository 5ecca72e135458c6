"""`selfrag evaluate --task=NAME --input=FILE`: answers benchmarks, scores them, compares figures.

Called by commands/evaluate.py, which has the flags. task_plans.py decides what is run, task_runs.py
runs one system on one task.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from selfrag_jax import artifacts
from selfrag_jax.commands.answer import read_checked
from selfrag_jax.commands.task_plans import SYSTEMS_FOLDER, Planner, SystemRun, TaskFile
from selfrag_jax.commands.task_runs import SCORES, Models, Scoring, check_folder, run_system
from selfrag_jax.errors import StageFailed, UserError
from selfrag_jax.evaluation import (
    mauve_score,
    reproduction,
    system_tables,
    systems,
    task_files,
    tasks,
)
from selfrag_jax.evaluation.metrics import has_gold
from selfrag_jax.evaluation.system_tables import SystemResult
from selfrag_jax.evaluation.systems import FULL, System
from selfrag_jax.evaluation.tasks import Task
from selfrag_jax.files import atomic_write, write_json, write_text
from selfrag_jax.processes.group import current
from selfrag_jax.records import Question, read_rows
from selfrag_jax.search.config import ALWAYS, NEVER

Row = dict[str, Any]
REPRODUCTION = "reproduction"


@dataclass
class _Outcome:
    """What came out of all runs: results in the order of tasks and systems, and what failed."""

    files: dict[str, TaskFile] = field(default_factory=dict)  # by the task's spec
    results: list[SystemResult] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def metrics(self, name: str) -> list[tuple[Task, Sequence[Row]]]:
        return [(r.task, r.metrics) for r in self.results if r.system.name == name]


def evaluate_one(values: dict[str, Any], how: Scoring) -> None:
    """`selfrag evaluate --task=NAME`: prints the table, of one system or of several."""
    asked, named = systems.chosen(values["systems"] or (FULL,))
    task = _worded(tasks.load(values["task"]), values)
    out = Path(values["out"] or default_folder(values["input"], task))
    where, planner = TaskFile(task, Path(values["input"]), out), Planner(values)
    read = _Questions()
    runs = _plan(planner, where, asked, named, read)
    if values["mauve"] and runs:
        mauve_score.long_answers(read.of(where, runs))
    if not runs:
        raise UserError("--systems: none of these systems can be run as asked; see above")
    outcome = _Outcome()
    _run_all(runs, how, outcome, read, stop_at_errors=len(runs) == 1)
    if outcome.results and len(runs) == 1 and not outcome.failed:
        print(f"{reproduction.table_text(outcome.results[0].metrics)}\n{runs[0].folder}")
    if outcome.results and [s.name for s in asked] != [FULL]:
        _write_systems(outcome, asked, values, out, how.seed)
    _raise_failures(outcome, "systems")


def evaluate_all(values: dict[str, Any], how: Scoring) -> None:
    """Evaluates every task whose file is in --data, and prints our figures beside the paper's.

    Goes on where a task fails, and raises StageFailed at the end if one did. Several processes stop
    there: the others may have gone on with this task.
    """
    if not values["data"]:
        raise UserError("missing --data, the folder of the tasks' files")
    asked, _ = systems.chosen(values["systems"] or (FULL,))
    planner, outcome, runs = Planner(values), _Outcome(), []
    read = _Questions()
    root = Path(values["out"] or values["data"])
    for found in task_files.find_files(values["data"]):
        try:
            task = _worded(found.task, values)
            out = root / default_folder(found.file, task).name
            where = TaskFile(task, found.file, out, found.others)
            planned = _plan(planner, where, asked, set(), read)
            if values["mauve"] and planned and not _has_long_answers(where, planned, read):
                planned = [replace(run, with_mauve=False) for run in planned]
            runs += planned
        except UserError as e:
            outcome.failed.append(f"{found.task.name}: {e}")
            print(outcome.failed[-1], file=sys.stderr)
    if values["mauve"]:
        of = dict.fromkeys(run.where.task.name for run in runs if run.with_mauve)
        print(f"--mauve: computed for {', '.join(of) or 'no task'}", file=sys.stderr)
    _run_all(runs, how, outcome, read, stop_at_errors=False)
    if outcome.metrics(FULL):
        _write_reproduction(outcome, asked, values, root)
        if not values["systems"]:
            print("\nTable 3 (ablations): the same command with --systems=selfrag,ablations")
    if outcome.results and [s.name for s in asked] != [FULL]:
        _write_systems(outcome, asked, values, root, how.seed)
    _raise_failures(outcome, "tasks")


def _raise_failures(outcome: _Outcome, what: str) -> None:
    if outcome.failed:
        raise StageFailed(
            f"{len(outcome.failed)} {what} were not evaluated; the first, {outcome.failed[0]}"
        )


def _worded(task: Task, values: dict[str, Any]) -> Task:
    """The task with the user's instruction if there is one; says so on the screen."""
    task = tasks.with_instruction(task, values["instructions"])
    print(task.describe(values["instructions"]), file=sys.stderr)
    return task


def default_folder(input_path: str | Path, task: Task) -> Path:
    """Where a task is evaluated without --out: beside its file, as FILE-TASK."""
    path = Path(input_path)
    return path.with_name(f"{path.name.partition('.')[0]}-{task.spec.replace(':', '-')}")


# ---- the runs ------------------------------------------------------------------------------------
def _plan(
    planner: Planner,
    where: TaskFile,
    asked: Sequence[System],
    named: set[str],
    read: _Questions,
) -> list[SystemRun]:
    """The runs of a task. Of a group, systems that cannot be run are left out, with a notice.

    named: systems that the user named singly. Raises UserError, before a model is loaded, if one of
    them cannot be run, and if the file lacks what the task asks or scores with.
    """
    runs = []
    for system in asked:
        if why := planner.refusal(where, system):
            if system.name in named:
                raise UserError(f"--systems={system.name}: {why}")
            print(f"{where.task.spec}: leaves out {system.name}: {why}", file=sys.stderr)
        else:
            runs.append(planner.run(where, system))
    if runs:
        questions = read.of(where, runs)
        _require_gold(where, questions)
        for run in runs:
            check_folder(run.folder, run.model, run.index)
    return runs


class _Questions:
    """The questions of the file that was read last; of several files, one is held at a time."""

    def __init__(self) -> None:
        self._last: tuple[TaskFile, str] | None = None
        self._questions: list[Question] = []

    def of(self, where: TaskFile, runs: Sequence[SystemRun]) -> list[Question]:
        """Raises UserError as read_checked does: for questions without passages, if one is read."""
        mode = ALWAYS if any(run.reads_passages for run in runs) else NEVER
        if self._last not in ((where, mode), (where, ALWAYS)):
            self._questions = read_checked(where.input, where.task, runs[0].index is not None, mode)
            self._last = where, mode
        return self._questions


def _has_long_answers(where: TaskFile, runs: Sequence[SystemRun], read: _Questions) -> bool:
    """Whether MAUVE can be computed; of a task for which the paper reports it, says why not."""
    try:
        mauve_score.long_answers(read.of(where, runs))
    except UserError as e:
        if where.task.figure("mauve"):
            print(f"{where.input}: {e}", file=sys.stderr)
        return False
    return True


def _require_gold(where: TaskFile, questions: Sequence[Question]) -> None:
    without = [q.id for q in questions if not has_gold(q)]
    if without and where.task.needs_gold:
        raise UserError(
            f"{where.input}: {len(without)} of {len(questions)} questions have no gold answer, "
            f"{without[0]!r} first, so --task={where.task.name} cannot score them; "
            "`selfrag answer` answers files without"
        )


def _run_all(
    runs: Sequence[SystemRun],
    how: Scoring,
    outcome: _Outcome,
    read: _Questions,
    stop_at_errors: bool,
) -> None:
    """Runs all, those of one model together; adds results, in the order of `runs`, and failures.

    Of several processes, process 0 alone has results.
    """
    by_model: dict[Path, dict[str, list[SystemRun]]] = {}
    for run in runs:
        by_model.setdefault(run.model, {}).setdefault(run.where.task.spec, []).append(run)
    models, found = Models(), {}
    for of_task in by_model.values():
        for some in of_task.values():
            questions = read.of(some[0].where, some)
            for run in some:
                name = f"{run.where.task.name}, {run.system.name}" if len(runs) > 1 else ""
                if name:
                    print(name, file=sys.stderr)
                try:
                    rows = run_system(run, questions, models, how)
                except (UserError, StageFailed) as e:
                    if stop_at_errors or current().count > 1:  # the others would wait for ever
                        raise
                    outcome.failed.append(f"{name or run.where.task.name}: {e}")
                    print(outcome.failed[-1], file=sys.stderr)
                    continue
                if not current().is_main:
                    continue
                scored = [row for _, row in read_rows(run.folder / SCORES)]
                outcome.files[run.where.task.spec] = run.where
                found[run.folder] = SystemResult(run.where.task, run.system, rows, scored)
    outcome.results += [found[run.folder] for run in runs if run.folder in found]


# ---- tables --------------------------------------------------------------------------------------
def _causes(outcome: _Outcome, asked: Sequence[System], values: dict[str, Any]) -> list[str]:
    computed: dict[str, set[str]] = {}
    for r in outcome.results:
        computed.setdefault(r.task.spec, set()).update(row["metric"] for row in r.metrics)
    lines = []
    for spec, metrics in computed.items():
        where = outcome.files[spec]
        name = where.input.name
        lines += reproduction.causes(where.task, asked, values, metrics, name, where.others)
    return lines


def _write_reproduction(
    outcome: _Outcome, asked: Sequence[System], values: dict[str, Any], root: Path
) -> None:
    """Prints Table 2 beside ours and why they differ; writes both to ROOT/reproduction.*."""
    rows = reproduction.comparison(outcome.metrics(FULL))
    reasons = _causes(outcome, asked, values)
    for size in reproduction.SIZES:
        print(reproduction.aligned(reproduction.comparison_lines(rows, size)) + "\n")
    print("\n".join(reasons))
    text = reproduction.markdown(rows, reasons)
    _write_tables(root / REPRODUCTION, rows, reasons, text, reproduction.COLUMNS)


def _write_systems(
    outcome: _Outcome, asked: Sequence[System], values: dict[str, Any], out: Path, seed: int
) -> None:
    """Prints the table of systems; writes it to OUT/systems.*."""
    rows = system_tables.system_rows(outcome.results, seed)
    reasons = _causes(outcome, asked, values)
    print("\n" + system_tables.text(rows))
    if not outcome.metrics(FULL) or not values["all"]:
        print("\n" + "\n".join(reasons))
    text = system_tables.markdown(rows, reasons)
    _write_tables(out / SYSTEMS_FOLDER, rows, reasons, text, system_tables.COLUMNS)
    print(f"{out / SYSTEMS_FOLDER}.md")


def _write_tables(
    stem: Path, rows: Sequence[Row], reasons: Sequence[str], text: str, columns: Sequence[str]
) -> None:
    """Writes STEM.json, .md and .csv anew; a stranger's file of that name is moved aside."""
    main, others = stem.with_name(f"{stem.name}.json"), (".md", ".csv")
    if not artifacts.manifest_path(main).is_file():
        for ending in others:
            artifacts.claim_rewritten(stem.with_name(stem.name + ending), "evaluate")
    artifacts.claim_rewritten(main, "evaluate")
    write_text(stem.with_name(f"{stem.name}.md"), text)
    with atomic_write(stem.with_name(f"{stem.name}.csv")) as f:
        table = csv.DictWriter(f, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    write_json(main, {"rows": list(rows), "causes": list(reasons)})
    artifacts.write_manifest(main, "evaluate", {}, {}, {"rows": len(rows)})
