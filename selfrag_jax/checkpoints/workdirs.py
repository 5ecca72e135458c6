"""The layout of a training workdir, and which checkpoints it has.

    model.json             the architecture, a LlamaConfig
    tokenizer files        see text/tokenizer.py
    checkpoints/<step>/    written by Orbax, three items:
        state                  parameters and optimizer state
        data                   position of the data iterator, fingerprints (see integrity.py)
        metrics                the loss by which the best checkpoint is chosen
    frozen/                the weights that LoRA does not train, written once
    damaged/<step>.<n>/    damaged checkpoints, moved aside when training resumed

Orbax writes a checkpoint under a temporary name and renames it when it is complete.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from selfrag_jax.errors import UserError
from selfrag_jax.files import read_json, write_json
from selfrag_jax.models.llama import LlamaConfig
from selfrag_jax.storage.paths import as_path
from selfrag_jax.text.tokenizer import Tokenizer

MODEL_FILE, CHECKPOINTS, FROZEN, DAMAGED = "model.json", "checkpoints", "frozen", "damaged"
NO_LOSS = sys.float_info.max  # the recorded loss of a checkpoint that cannot be the best


def write_architecture(workdir: str | Path, config: LlamaConfig, tokenizer: Tokenizer) -> None:
    """Writes the tokenizer and model.json."""
    tokenizer.save(workdir)
    write_json(as_path(workdir) / MODEL_FILE, asdict(config))


def read_architecture(workdir: Path) -> LlamaConfig:
    """Reads model.json. Raises UserError when it is missing or not a valid architecture."""
    file = workdir / MODEL_FILE
    try:
        return LlamaConfig(**read_json(file))
    except (TypeError, ValueError) as e:
        raise UserError(f"{file}: not an architecture of this version: {e}") from None


def checkpoint_folder(workdir: str | Path, step: int) -> Path:
    return as_path(workdir) / CHECKPOINTS / str(step)


def saved_steps(workdir: str | Path) -> list[int]:
    """The steps that have a checkpoint, in ascending order."""
    folder = as_path(workdir) / CHECKPOINTS
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())


def candidate_steps(workdir: str | Path, step: str = "last") -> list[int]:
    """The steps to read a model from: the latest intact one of them is taken. Never empty.

    step: "last" (all steps), "best" (the step with the lowest loss) or a step number. Raises
    UserError when no checkpoint matches.
    """
    steps = saved_steps(workdir)
    if not steps:
        raise UserError(
            f"{workdir}: training has not saved a checkpoint yet; run `selfrag train` again to "
            "continue it"
        )
    if step == "last":
        return steps
    if step == "best":
        return [_best_step(workdir, steps)]
    if not step.isdigit() or int(step) not in steps:
        listed = ", ".join(map(str, steps))
        raise UserError(f"--step={step}: must be last, best, or one of {listed}")
    return [int(step)]


def _best_step(workdir: str | Path, steps: list[int]) -> int:
    losses = {}
    for step in steps:
        loss = read_loss(checkpoint_folder(workdir, step) / "metrics" / "metrics")
        if loss is not None and loss != NO_LOSS:
            losses[step] = loss
    if not losses:
        raise UserError(
            f"{workdir}: no checkpoint has a loss to choose the best by; there are "
            f"{', '.join(map(str, steps))}"
        )
    return min(losses, key=lambda step: losses[step])


def read_loss(metrics_file: Path) -> float | None:
    """The loss in a checkpoint's metrics file, or None when it cannot be read."""
    try:
        return float(json.loads(metrics_file.read_text())["loss"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
