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
from selfrag_jax.text.tokenizer import Tokenizer

NO_LOSS = sys.float_info.max  # of a checkpoint that is none of the best
MODEL_FILE, CHECKPOINTS, FROZEN, DAMAGED = "model.json", "checkpoints", "frozen", "damaged"


def write_architecture(workdir: str | Path, config: LlamaConfig, tokenizer: Tokenizer) -> None:
    tokenizer.save(workdir)
    write_json(Path(workdir) / MODEL_FILE, asdict(config))


def read_architecture(workdir: Path) -> LlamaConfig:
    """The model.json of a workdir. Raises BadInput when it is none."""
    file = workdir / MODEL_FILE
    try:
        return LlamaConfig(**read_json(file))
    except (TypeError, ValueError) as e:
        raise UserError(f"{file}: is no architecture of this version: {e}") from None


def saved_steps(workdir: Path) -> list[int]:
    """Steps of which there is a checkpoint, in order."""
    folder = Path(workdir) / CHECKPOINTS
    return (
        sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []
    )


def candidate_steps(workdir: Path, step: str = "last") -> list[int]:
    """The checkpoints of which the newest whole one is read. step: "last" (any), "best" (the one of the lowest loss), or the
    number of one. Raises BadInput when there is none of that name."""
    steps = saved_steps(workdir)
    if not steps:
        raise UserError(
            f"{workdir}: training has not saved a checkpoint yet; run `selfrag train` again to continue it"
        )
    if step == "last":
        return steps
    if step == "best":
        files = {s: Path(workdir) / CHECKPOINTS / str(s) / "metrics" / "metrics" for s in steps}
        losses = {
            s: loss for s, file in files.items() if (loss := _loss_in(file)) not in (None, NO_LOSS)
        }
        if not losses:
            raise UserError(
                f"{workdir}: no checkpoint has a loss to choose the best by; there are {', '.join(map(str, steps))}"
            )
        return [min(losses, key=losses.get)]
    if not step.isdigit() or int(step) not in steps:
        raise UserError(
            f"--step={step}: must be last, best, or one of {', '.join(map(str, steps))}"
        )
    return [int(step)]


def _loss_in(file: Path) -> float | None:
    try:
        return float(json.loads(file.read_text())["loss"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
