"""`selfrag evaluate --task=critic`: asks a critic about labelled queries, and scores its answers.

Called by commands/evaluate.py, which has the flags.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from selfrag_jax import artifacts, locks
from selfrag_jax.errors import StageFailed
from selfrag_jax.evaluation.critic_scores import BINS
from selfrag_jax.files import write_json
from selfrag_jax.progress import progress
from selfrag_jax.records import CriticExample, read_rows, write_jsonl
from selfrag_jax.text import reflection

if TYPE_CHECKING:
    from selfrag_jax.critic.critic import Critic, CriticConfig
    from selfrag_jax.evaluation.critic_evaluation import GroupVerdicts

Row = dict[str, Any]
CRITIC = "critic"  # as --task, and as the task of its rows
BATCHES_PER_CHUNK = 16  # asked between two saves; sorted by length, they are padded little
PREDICTIONS, PARTS = "predictions.jsonl", "parts"
AXES = ("the label", "the critic's answer")  # of a confusion matrix


def evaluate_critic(
    critic: str | Path,
    data: str | Path,
    config: CriticConfig,
    out: str | Path,
    seed: int = 0,
    bins: int = BINS,
    released: bool = False,
) -> dict[str, GroupVerdicts]:
    """Asks a critic about labelled queries; writes answers, scores and plots to the folder `out`.

    critic: a training workdir, a Hugging Face folder or a hub name; data: critic data; released: it
    is a published file. Returns the verdicts on each group. An interrupted run continues after the
    last finished chunk; a finished one is not asked again, only its scores and plots are written
    anew, from the answers.

    Raises UserError if the critic was trained with other prompts, or is none, and as reading critic
    data does.
    """
    from selfrag_jax.data.critic_examples import read_critic_examples

    out, folder = Path(out), _critic_folder(critic, config)
    inputs: dict[str, str | Path] = {"critic": folder, "data": data}
    made = asdict(config) | ({"format": "released"} if released else {})
    examples = read_critic_examples(data, released)
    is_finished = artifacts.is_finished(out, "evaluate", made, inputs)
    if not is_finished or not (out / PREDICTIONS).is_file():
        artifacts.require_own_or_empty(out, "evaluate")
        ask = _open_critic(folder, config)  # before anything is written
        with locks.exclusive_workdir(out):
            artifacts.claim_workdir(out, "evaluate", made, inputs)
            write_jsonl(out / PREDICTIONS, _ask_in_chunks(ask, examples, config.batch, out))
    every = [row for _, row in read_rows(out / PREDICTIONS)]
    predictions = [row for row in every if "error" not in row]
    if without := len(every) - len(predictions):
        first = next(row["error"] for row in every if "error" in row)
        print(
            f"{without:,} of {len(every):,} queries are left out of the scores, as "
            f"{out / PREDICTIONS} says; the first: {first}",
            file=sys.stderr,
        )
    if not predictions:
        raise StageFailed(f"{data}: no query fits the critic")
    verdicts = _write_scores(predictions, out, seed, bins)
    counts = {"queries": len(examples), **{g: len(v.labels) for g, v in verdicts.items()}}
    counts["left_out"] = without
    artifacts.write_manifest(out, "evaluate", made, inputs, counts)
    artifacts.remove_parts(out / PARTS)
    return verdicts


def _critic_folder(critic: str | Path, config: CriticConfig) -> Path:
    """The folder of a critic. Raises UserError if it is unfinished or was trained otherwise."""
    from selfrag_jax.checkpoints.workdirs import MODEL_FILE
    from selfrag_jax.critic.critic import check_wording
    from selfrag_jax.huggingface import hub

    folder = hub.model_folder(critic)
    if (folder / MODEL_FILE).is_file():
        artifacts.require_finished(folder, "train", "critic")
    check_wording(folder, config.brief)
    return folder


def _open_critic(folder: Path, config: CriticConfig) -> Critic:
    from selfrag_jax.checkpoints import loading
    from selfrag_jax.critic.critic import Critic

    return Critic(loading.load(folder), config)


def _ask_in_chunks(
    critic: Critic, examples: Sequence[CriticExample], batch: int, out: Path
) -> list[Row]:
    """Returns the critic's answers, one row for each example; those of each chunk are kept."""
    from selfrag_jax.data.critic_examples import critique_query

    rows: list[Row] = []
    size = BATCHES_PER_CHUNK * batch
    with progress("evaluate critic", len(examples), "queries") as bar:
        for start in range(0, len(examples), size):
            chunk, file = examples[start : start + size], out / PARTS / f"{start:08d}.jsonl"
            if file.is_file():
                bar.skip(len(chunk))
            else:
                judged = critic.judge_fitting([critique_query(e) for e in chunk])
                write_jsonl(file, map(_prediction, chunk, judged))
                bar.advance(len(chunk))
            rows += [row for _, row in read_rows(file)]
    return rows


def _prediction(example: CriticExample, judged: Float[np.ndarray, " n"] | str) -> Row:
    """judged: a distribution, or why there is none."""
    row = {"id": example.id, "task": example.task, "label": example.output}
    if isinstance(judged, str):
        return row | {"error": judged}
    tokens = reflection.GROUPS[example.task]
    return row | {
        "answer": tokens[int(judged.argmax())],
        "distribution": dict(zip(tokens, map(float, judged), strict=True)),
    }


def _write_scores(
    predictions: Sequence[Row], out: Path, seed: int, bins: int
) -> dict[str, GroupVerdicts]:
    """Writes metrics.json and the plots; returns the verdicts in reflection.GROUPS' order."""
    from selfrag_jax.evaluation import critic_evaluation, plots

    found = critic_evaluation.by_group(
        [p["task"] for p in predictions],
        [p["label"] for p in predictions],
        [[p["distribution"][token] for token in reflection.GROUPS[p["task"]]] for p in predictions],
    )
    verdicts = {group: found[group] for group in reflection.GROUPS if group in found}
    rows = [
        *critic_evaluation.accuracy_rows(verdicts, CRITIC, seed),
        *critic_evaluation.calibration_rows(verdicts, CRITIC, seed, bins),
        *critic_evaluation.kappa_rows(verdicts, CRITIC, seed),
    ]
    metrics: dict[str, Any] = {"rows": rows, "seed": seed, "confusion": {}, "reliability": {}}
    for group, v in verdicts.items():
        reliability, confusion = v.reliability(bins), v.confusion
        metrics["confusion"][group] = {
            "labels": reflection.GROUPS[group],
            "table": confusion.tolist(),
        }
        metrics["reliability"][group] = reliability.to_rows()
        plots.reliability_diagram(
            out / f"reliability_{group}.svg", group, reliability, v.calibration_error(bins)
        )
        plots.confusion_plot(out / f"confusion_{group}.svg", group, confusion, *AXES)
    write_json(out / "metrics.json", metrics)
    return verdicts
