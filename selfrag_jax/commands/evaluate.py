"""`selfrag evaluate`: gold answers and predictions in, metrics out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from selfrag_jax import artifacts
from selfrag_jax.commands.command import Command, Flag
from selfrag_jax.data.questions import read_questions
from selfrag_jax.errors import UserError
from selfrag_jax.evaluation.metrics import SupportJudge
from selfrag_jax.evaluation.scores import Row, result_rows, score
from selfrag_jax.files import write_json
from selfrag_jax.records import read_rows
from selfrag_jax.world import truth

JUDGES: dict[str, SupportJudge | None] = {"none": None, "world": truth.fully_supports}


def evaluate_file(
    task_file: str | Path, predictions: str | Path, judge: str, out: str | Path, seed: int
) -> list[Row]:
    """Scores a predictions file of `selfrag answer`, writes the results to `out` and returns them.

    Raises UserError on an unknown judge, and on predictions that lack a field or a question.
    """
    if judge not in JUDGES:
        raise UserError(f"--judge={judge!r}: must be one of {', '.join(JUDGES)}")
    task_file, predictions = Path(task_file), Path(predictions)
    if task_file.exists() and predictions.exists() and task_file.samefile(predictions):
        raise UserError(
            f"{predictions}: is both the task and the predictions; "
            "--task is the question file with gold answers"
        )
    questions = read_questions(task_file)
    rows = []
    for where, row in read_rows(predictions):
        for name in ("id", "answer", "retrieved", "segments", "citations", "passages"):
            if name not in row:
                raise UserError(
                    f"{where}: missing field {name!r}; expected a row of `selfrag answer`"
                )
        rows.append(row)
    values = score(questions, rows, JUDGES[judge], truth.stated_facts)
    results = result_rows("selfrag", task_file.stem, values, seed)
    write_json(out, {"rows": results})
    config, inputs = {"judge": judge, "seed": seed}, {"task": task_file, "predictions": predictions}
    artifacts.write_manifest(out, "evaluate", config, inputs, {})
    return results


def run(values: dict[str, Any], _: list[str]) -> None:
    out = values["out"] or Path(values["predictions"]).with_suffix(".metrics.json")
    for row in evaluate_file(
        values["task"], values["predictions"], values["judge"], out, values["seed"]
    ):
        value, low, high = (100 * row[name] for name in ("value", "low", "high"))
        print(f"{row['metric']:<20} {value:.1f}  ({low:.1f}–{high:.1f}, n = {row['n']})")
    print(out)


COMMAND = Command(
    example="selfrag evaluate --task=questions.jsonl --predictions=answers.jsonl",
    flags=(
        Flag("task", "the question file with gold answers", required=True),
        Flag("predictions", "written by `selfrag answer`", required=True),
        Flag("judge", "of citations: none, or world (the synthetic world's truth)", "none"),
        Flag("seed", "of the bootstrap", 0, type=int),
        Flag("out", "default: beside the predictions, as .metrics.json"),
    ),
    run=run,
)
