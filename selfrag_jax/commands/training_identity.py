"""What identifies a training, so that only the same one goes on in its workdir."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from selfrag_jax import artifacts
from selfrag_jax.commands.training_rows import held_out_share
from selfrag_jax.errors import UserError
from selfrag_jax.files import read_object
from selfrag_jax.storage.paths import as_path
from selfrag_jax.text import reflection

if TYPE_CHECKING:
    from selfrag_jax.training.config import TrainConfig

# Fields of TrainConfig that change where or how fast a model is trained, but not what it learns:
# a training may continue with other values.
RUNTIME_ONLY_FIELDS = (
    "mesh", "save_every", "log_every", "rows_per_device", "loss_chunk", "remat", "attention",
    "keep_last", "keep_best",
)  # fmt: skip


def training_identity(
    c: ConfigDict,
    role: str,
    section: TrainConfig,
    data: str | Path,
    released: bool,
    held_out: str | None,
    workdir: str | Path,
) -> tuple[dict[str, Any], dict[str, str | Path]]:
    """What identifies a training: its settings and its inputs.

    workdir: where it is, or may be, recorded.
    """
    from selfrag_jax.training.starting_model import base_folder

    made: dict[str, Any] = {
        "role": role,
        "train": {
            k: v for k, v in section.manifest_fields().items() if k not in RUNTIME_ONLY_FIELDS
        },
        "weights": group_weights(c, role),
        "brief": c.label.critic.brief,
    }
    if released:
        made["format"] = "released"
    inputs: dict[str, str | Path] = {"data": data}
    if held_out is not None and (share := held_out_share(held_out)) is not None:
        made["held_out"] = share
    elif held_out is not None:
        inputs["held_out"] = held_out
    if c.base == "scratch":
        made["scratch"] = c.scratch.to_dict() | {"seed": c.seed}
    else:
        made |= base_identity(c, workdir)
        inputs["base"] = base_folder(c)
    return made, inputs


def base_identity(c: ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """What identifies the base beside its files.

    The tokenizer's mode is recorded where a vocabulary leaves a choice, named in the config or not.
    A training goes on with what it has recorded if that is the same mode: earlier versions recorded
    llama_fast where their configs named it, and None for what a base has by itself.
    """
    from selfrag_jax.checkpoints import loading
    from selfrag_jax.training.starting_model import base_folder, new_row_words, tokenizer_mode

    mode = tokenizer_mode(c)
    chosen = mode if c.tokenizer or mode.startswith("llama") else None
    recorded = _recorded_tokenizer(as_path(workdir), chosen)
    if recorded != chosen:
        own = loading.read_tokenizer(base_folder(c)).mode
        if (recorded or own) == mode:
            chosen = recorded
    return {"base": str(c.base), "new_rows": new_row_words(c), "tokenizer": chosen}


def _recorded_tokenizer(workdir: Path, otherwise: str | None) -> str | None:
    """The mode in the record of a training that was begun in `workdir`, if there is any."""
    for file in (workdir / artifacts.STARTED, artifacts.manifest_path(workdir)):
        if file.is_file():
            made = read_object(file, ())
            return made.get("config", {}).get("tokenizer", otherwise)
    return otherwise


def group_weights(c: ConfigDict, role: str) -> dict[str, float]:
    """The loss weight of each group of reflection tokens, checked."""
    name, weights = f"{role}_weights", dict(c[f"{role}_weights"].items())
    groups = ", ".join(reflection.GROUPS)
    if wrong := sorted(set(weights) ^ set(reflection.GROUPS)):
        fault = "unknown" if wrong[0] in weights else "missing"
        raise UserError(f"config {name}: {wrong[0]!r} is {fault}; the groups are {groups}")
    for group, weight in weights.items():
        if isinstance(weight, (str, bool)) or weight is None or not 0 <= weight < float("inf"):
            raise UserError(f"config {name}: {group}={weight!r} must be a number, 0 or above")
    return {k: float(v) for k, v in weights.items()}
