"""`selfrag compare`: the scores of two runs in, their paired differences out."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from selfrag_jax import artifacts
from selfrag_jax.commands.command import INPUT, Command, Flag
from selfrag_jax.commands.evaluate import scores_path
from selfrag_jax.errors import UserError
from selfrag_jax.files import write_json
from selfrag_jax.records import read_rows


def compare_files(
    first: str | Path,
    second: str | Path,
    task: str | Path | None = None,
    out: str | Path | None = None,
    seed: int = 0,
) -> str:
    """Compares two runs on the same questions; returns the table, and writes it as JSON to `out`.

    A run is its scores, its metrics, the folder of both, or, with the question file `task`, its
    predictions. Raises UserError if the runs are of different questions.
    """
    from selfrag_jax.evaluation import comparison

    files = [_file(first, task), _file(second, task)]
    if files[0].samefile(files[1]):
        raise UserError(f"{files[0]}: is both runs; give the scores of two")
    inputs: dict[str, str | Path] = {"first": files[0], "second": files[1]}
    if task:
        inputs["task"] = task
    if out:
        artifacts.check_output(out, "compare", inputs)
    runs = [_scores(file, task) for file in files]
    try:
        differences = comparison.compare(runs[0], runs[1], seed)
    except UserError as e:
        raise UserError(f"{files[0]} and {files[1]}: {e}") from None
    if out:
        artifacts.claim_rewritten(out, "compare")
        write_json(out, {"differences": [asdict(d) for d in differences], "seed": seed})
        counts = {"questions": len(runs[0])}
        artifacts.write_manifest(out, "compare", {"seed": seed}, inputs, counts)
    return comparison.text(differences)


def _file(run: str | Path, task: str | Path | None) -> Path:
    """The file of scores, or of predictions if there is a task, that a run's name stands for."""
    path = Path(run)
    if path.is_dir():
        path = path / ("answers.jsonl" if task else "scores.jsonl")
    elif path.name.endswith("metrics.json"):
        path = scores_path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; `selfrag evaluate` writes a run's scores")
    return path


def _scores(file: Path, task: str | Path | None) -> list[dict[str, Any]]:
    from selfrag_jax.data.questions import read_questions
    from selfrag_jax.evaluation import answer_rows, scores
    from selfrag_jax.evaluation.answer_checks import is_number, require_text

    if task:
        try:
            return scores.score_questions(read_questions(task), answer_rows.read_predictions(file))
        except UserError as e:
            raise UserError(f"{file}: {e}") from None
    rows = []
    for where, row in read_rows(file):
        values = row.get("metrics")
        if "id" not in row or not isinstance(values, dict):
            raise UserError(
                f"{where}: missing field 'id' or 'metrics'; expected a row of scores.jsonl, which "
                "`selfrag evaluate` writes; predictions need --task as well"
            )
        require_text(where, row, "question")
        for name, value in values.items():
            if not is_number(value):
                raise UserError(f"{where}: metric {name!r} must be a number, found {value!r}")
        rows.append(row)
    if not rows:
        raise UserError(f"{file}: holds no scores")
    return rows


def run(values: dict[str, Any], runs: list[str]) -> None:
    if len(runs) != 2:
        raise UserError(f"two runs are compared, found {len(runs)}; for example: {COMMAND.example}")
    first, second = runs
    print(compare_files(first, second, values["task"], values["out"], values["seed"]))
    if values["out"]:
        print(f"\n{values['out']}")


COMMAND = Command(
    example="selfrag compare a.scores.jsonl b.scores.jsonl --out=difference.json",
    flags=(
        Flag(
            "task",
            "the question file, if the runs are predictions of `selfrag answer`",
            group=INPUT,
        ),
        Flag(
            "out",
            "JSON file to write: the differences, with the ids that only one has right",
            writes=True,
        ),
        Flag("seed", "seed of the bootstrap and the test", 0, type=int),
    ),
    run=run,
    positional_paths=True,
    positional="RUN RUN",
    positional_help="RUN: scores.jsonl or metrics.json of an evaluation, or the folder of both; "
    "with --task, answers",
)
