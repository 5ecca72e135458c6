"""Writes a model that the package ships: what LoRA trained, small enough for a wheel.

    from selfrag_jax.checkpoints.shipping import ship
    ship("W/generator", "selfrag_jax/demo", base="smollm2", answer_config="small",
         about="finds and quotes, does not reason", command="selfrag train ...", scores={...})

The adapter is in f16. The training has to leave the rows of the base's tokens as they are
(`--config.generator.optimizer.old_rows_factor=0`), or the vocabulary alone would take 57 MB twice.
SmolLM2-135M with rank 16 takes 9.8 MB, of which the new rows have 17 kB, and 1.8 MB of tokenizer.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from selfrag_jax import artifacts
from selfrag_jax.checkpoints import loading
from selfrag_jax.checkpoints.converting import convert
from selfrag_jax.errors import UserError
from selfrag_jax.files import read_json, write_json
from selfrag_jax.gguf_files.header import is_gguf
from selfrag_jax.huggingface import hub, shipped
from selfrag_jax.models.params import count_parameters, flatten

MOST_BYTES = 20_000_000  # of the folder: a wheel of 100 MB is the most that PyPI takes
_DTYPE = "float16"
# Relative, of an array: the adapter's factors are rounded to f16. Another version of the base (one
# quantized to 4 bits, say) differs by more.
_TOLERANCE = 2e-3


def ship(
    workdir: str | Path,
    out: str | Path,
    base: str,
    about: str,
    answer_config: str,
    command: str,
    scores: dict[str, Any],
    step: str = "last",
) -> int:
    """Writes the folder `out` from a finished training with LoRA; returns its size in bytes.

    base: the name by which users find the base. about, answer_config: as in ShippedModel. command:
    what makes the model again. scores: what was measured with it. Both are kept as they are. step:
    the checkpoint, as in `convert`.

    Raises UserError if `out` exists, if the folder would be larger than MOST_BYTES, or if the model
    that a user gets is not the one that was trained.
    """
    workdir, out = artifacts.require_finished(workdir, "train"), Path(out)
    made = read_json(artifacts.manifest_path(workdir))
    unfinished = out.with_name(f".{out.name}.ship.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        if out.exists():
            raise UserError(f"{out}: already exists; remove it, or choose another folder")
        trained_parameters = convert(
            workdir, unfinished, "peft", _DTYPE, False, step=step, base=base
        )
        artifacts.manifest_path(unfinished).unlink()  # made.json has more
        parameters = _check_same_model(workdir, unfinished, base)
        record = {
            "about": about,
            "base": base,
            "parameters": parameters,
            "trained_parameters": trained_parameters,
            "answer_config": answer_config,
            "scores": scores,
            "date": time.strftime("%Y-%m-%d"),
            "command": command,
            "step": step,
            "base_is_gguf": is_gguf(hub.model_folder(base)),
            **{name: made[name] for name in ("config", "inputs", "counts", "versions")},
        }
        write_json(unfinished / shipped.MADE, record)
        shipped.read_made(unfinished)
        size = _checked_size(unfinished)
        unfinished.rename(out)
        return size
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _check_same_model(workdir: Path, adapter: Path, base: str) -> int:
    """The number of parameters of the model. Raises UserError if the adapter gives another one."""
    trained, again = loading.load(workdir), loading.load(adapter)
    pairs = zip(flatten(trained.params), flatten(again.params), strict=True)
    for (path, expected), (_, actual) in pairs:
        difference = float(np.linalg.norm(np.asarray(actual) - np.asarray(expected)))
        if difference > _TOLERANCE * float(np.linalg.norm(expected)):
            raise UserError(
                f"{workdir}: with {base} as it is found here, {'/'.join(path)} is not what was "
                f"trained; train from --config.base={base}"
            )
    return count_parameters(trained.params)


def _checked_size(folder: Path) -> int:
    """The size of a folder. Raises UserError if it is too large to be shipped."""
    sizes = {file.name: file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    if (total := sum(sizes.values())) > MOST_BYTES:
        largest = max(sizes, key=lambda name: sizes[name])
        raise UserError(
            f"{total / 1e6:.1f} MB, of which {largest} has {sizes[largest] / 1e6:.1f}; at most "
            f"{MOST_BYTES / 1e6:.0f} MB are shipped: train with optimizer.old_rows_factor=0, or "
            "with a lower rank"
        )
    return total
