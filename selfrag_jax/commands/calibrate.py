"""`selfrag calibrate`: questions with answers in, the threshold that `selfrag answer` uses out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from selfrag_jax import artifacts
from selfrag_jax.commands.answer import answers_in_folder
from selfrag_jax.commands.command import Command, Flag
from selfrag_jax.commands.model_flags import (
    ANSWER_CONFIG_FLAG,
    CALIBRATION,
    CALIBRATION_FIELDS,
    DEFAULT_CONFIG,
    LOADING_FLAGS,
    MODEL_FLAGS,
    SEARCH_FLAGS,
    load_selfrag,
    search_changes,
)
from selfrag_jax.data.questions import read_questions
from selfrag_jax.errors import UserError
from selfrag_jax.evaluation.metrics import has_gold
from selfrag_jax.evaluation.scores import score
from selfrag_jax.files import read_object, write_json
from selfrag_jax.records import Question
from selfrag_jax.search.config import ALWAYS, NEVER

if TYPE_CHECKING:
    from selfrag_jax.answering.selfrag import SelfRAG
    from selfrag_jax.evaluation.calibration import ThresholdChoice

Row = dict[str, Any]


def calibrate_file(
    rag: SelfRAG,
    input_path: str | Path,
    work: str | Path,
    rate: float | None,
    changes: dict[str, Any],
    seed: int,
) -> ThresholdChoice:
    """Answers all questions with and without retrieval, and picks the threshold between them.

    work: folder for the answers; an interrupted run continues. rate: as in
    evaluation/calibration.py. Raises UserError if the model scores as the released scripts do,
    whose gate is no probability, and if a question failed or has no gold answer.
    """
    from selfrag_jax.evaluation.calibration import calibrate, check_rate

    check_rate(rate)
    if changes.get("scorer", rag.config.search.scorer) != "paper":
        raise UserError(
            "--scorer=released: its gate compares quotients of logarithms, for which a threshold "
            "of p(retrieve) means nothing; calibrate with --scorer=paper"
        )
    questions, work = read_questions(input_path), Path(work)
    if no_gold := [q.id for q in questions if not has_gold(q)]:
        raise UserError(
            f"{input_path}: {len(no_gold)} of {len(questions)} questions have no gold answer, "
            f"{no_gold[0]!r} first; a threshold is chosen by accuracy"
        )
    artifacts.require_own_or_empty(work, "calibrate")
    with artifacts.exclusive_workdir(work):
        artifacts.claim_workdir(work, "calibrate", {}, {})
        always = answers_in_folder(rag, input_path, work, {**changes, "mode": ALWAYS})
        never = answers_in_folder(rag, input_path, work, {**changes, "mode": NEVER})
    p = np.array([row["p_retrieve"] for row in always])
    with_, without = (_accuracies(questions, rows) for rows in (always, never))
    return calibrate(p, with_, without, rate, seed)


def _check_out(out: Path, input_path: str | Path) -> None:
    """Raises UserError if `out` cannot be written, or is there and no calibration."""
    artifacts.check_output(out, "calibrate", {"input": input_path})
    if out.is_file():
        try:
            read_object(out, CALIBRATION_FIELDS)
        except UserError:
            raise UserError(
                f"{out}: was not made by `selfrag calibrate`; choose another --out"
            ) from None


def _accuracies(questions: Sequence[Question], rows: Sequence[Row]) -> np.ndarray:
    return np.array(score(questions, rows, judge=None, facts_of=None)["accuracy"])


def run(values: dict[str, Any], _: list[str]) -> None:
    if (values["rate"] is None) == (not values["best"]):
        raise UserError("give either --rate, a wanted retrieval rate, or --best for the accuracy")
    if values["model"] and not Path(values["model"]).is_dir() and not values["out"]:
        raise UserError(f"--model={values['model']}: is no folder here; --out says where to write")
    rag = load_selfrag(values | {"threshold": None, "mode": None}, calibrated=False)
    folder = Path(rag.sources["model"])
    out = Path(values["out"] or folder / CALIBRATION)
    work = Path(values["work"] or out.with_suffix(".answers"))
    _check_out(out, values["input"])
    seed = values["bootstrap_seed"]
    changes = json.loads(json.dumps(search_changes(values | {"threshold": None, "mode": None})))
    found = calibrate_file(rag, values["input"], work, values["rate"], changes, seed)
    threshold = round(found.threshold[0], 6)
    aim = "best accuracy" if values["best"] else f"retrieval rate {values['rate']:g}"
    write_json(out, {
        "threshold": threshold,
        "low": found.threshold[1],
        "high": found.threshold[2],
        "accuracy": found.accuracy,
        "retrieval_rate": found.retrieval_rate,
        "aim": aim,
        "input": Path(values["input"]).name,
        "model": artifacts.fingerprint(folder),
    })  # fmt: skip
    for name, (value, low, high) in asdict(found).items():
        print(f"{name.replace('_', ' '):<15} {value:.4f}  ({low:.4f}–{high:.4f})")
    print(f"{out}: " + (
        "`selfrag answer` takes it from there" if out == folder / CALIBRATION
        else f"pass --threshold={threshold}"
    ))  # fmt: skip


COMMAND = Command(
    example="selfrag calibrate --model=W/generator --index=W/index --input=dev.jsonl --rate=0.5",
    flags=(
        *MODEL_FLAGS,
        Flag("input", "questions with gold answers, other than those you evaluate", required=True),
        Flag("rate", "the share of questions that shall retrieve, from 0 to 1", type=float,
             group="Threshold"),
        Flag("best", "instead of --rate: the most accurate threshold; of equals, the one that "
             "retrieves least",
             False, type=bool, group="Threshold"),
        Flag(
            "out",
            f"default: {CALIBRATION} in the model's folder, where `answer` finds it",
            writes=True,
            default_beside=("model", "workdir"),
        ),
        Flag("work", "folder of the answers; default: beside --out, as .answers", writes=True),
        *(f for f in SEARCH_FLAGS if f.name not in ("mode", "threshold")),
        *LOADING_FLAGS,
        Flag("bootstrap_seed", "seed of the intervals", 0, type=int),
        ANSWER_CONFIG_FLAG,
    ),
    run=run,
    default_config=DEFAULT_CONFIG,
)  # fmt: skip
