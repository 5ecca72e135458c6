"""Reads adapter_config.json of a PEFT adapter: low-rank adaptation (LoRA) of linear layers.

Each field is honoured, known not to affect what the adapted model computes, or refused by name.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfrag_jax.artifacts import ADAPTER_BASE as BASE
from selfrag_jax.artifacts import ADAPTER_CONFIG, local_base
from selfrag_jax.errors import UserError
from selfrag_jax.files import read_json
from selfrag_jax.gguf_files.header import is_gguf
from selfrag_jax.huggingface import hub
from selfrag_jax.huggingface.config_json import check_counts, positive
from selfrag_jax.huggingface.weight_files import has_weights

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")

# Which layers are adapted is told by the tensors; the rest is of the training.
_NEUTRAL = frozenset(
    "auto_mapping corda_config ensure_weight_tying eva_config exclude_modules inference_mode "
    "layers_pattern layers_to_transform lora_dropout loftq_config megatron_config megatron_core "
    "peft_version qalora_group_size runtime_config target_modules task_type".split()
)
_HONOURED = frozenset(
    f"r lora_alpha use_rslora rank_pattern alpha_pattern modules_to_save revision peft_type {BASE} "
    "init_lora_weights bias".split()
)
# Other beginnings (pissa, olora, corda, loftq, lora_ga) change the base's weights, too.
_BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class AdapterConfig:
    """rank_pattern, alpha_pattern: regular expressions of modules' names and their own values."""

    path: Path
    base: str
    revision: str | None
    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    modules_to_save: tuple[str, ...]  # whole modules that the adapter replaces

    def scale(self, module: str, rank: int) -> float:
        """What A B of a module is multiplied by. rank: of its tensors.

        Raises UserError if it should have another rank.
        """
        expected = self._value(self.rank_pattern, module, self.rank)
        if rank != expected:
            raise UserError(
                f"{self.path}: {module!r} has rank {rank} in the weights, {expected} here"
            )
        alpha = self._value(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def _value(self, patterns: dict[str, Any], module: str, otherwise: Any) -> Any:
        for pattern, value in patterns.items():
            try:
                if re.match(rf"(.*\.)?({pattern})$", module):
                    return value
            except re.error as e:
                raise UserError(f"{self.path}: {pattern!r} is no pattern of names ({e})") from None
        return otherwise


def read_adapter_config(path: Path) -> AdapterConfig:
    """Raises UserError naming a field that is missing or not supported."""
    row = read_json(path)
    if not isinstance(row, dict):
        raise UserError(f"{path}: expected the fields of an adapter, found a {type(row).__name__}")
    if missing := [field for field in ("peft_type", BASE) if field not in row]:
        raise UserError(f"{path}: lacks {missing[0]}")
    if row["peft_type"] != "LORA":
        raise UserError(
            f"{path}: an adapter of the kind {row['peft_type']!r} is not supported; only LORA is. "
            "Merge it with PEFT's merge_and_unload, and save the model that comes back"
        )
    if not isinstance(row[BASE], str) or not row[BASE]:
        raise UserError(f"{path}: {BASE}={row[BASE]!r}: must name the model that was adapted")
    if row.get("bias") not in (None, "none"):
        raise _unsupported(path, row, "bias")
    if row.get("init_lora_weights") not in _BEGINNINGS:
        raise _unsupported(path, row, "init_lora_weights")
    for field in sorted(row.keys() - _NEUTRAL - _HONOURED):
        if row[field]:  # absent, false, or empty: not used
            raise _unsupported(path, row, field)
    for field in ("rank_pattern", "alpha_pattern"):
        if not isinstance(row.get(field) or {}, dict):
            raise UserError(f"{path}: {field}={row[field]!r}: expected an object")
    ranks, alphas = (row.get(f) or {} for f in ("rank_pattern", "alpha_pattern"))
    check_counts(path, {"r": row.get("r", 8)} | ranks, ["r", *ranks])
    saved = row.get("modules_to_save") or ()
    if not isinstance(saved, (list, tuple)) or not all(isinstance(m, str) for m in saved):
        raise UserError(f"{path}: modules_to_save={saved!r}: expected a list of names")
    return AdapterConfig(
        path,
        row[BASE],
        row.get("revision"),
        row.get("r", 8),
        positive(path, "lora_alpha", row.get("lora_alpha", 8)),
        bool(row.get("use_rslora")),
        ranks,
        {k: positive(path, f"alpha_pattern.{k}", v) for k, v in alphas.items()},
        tuple(saved),
    )


def _unsupported(path: Path, row: dict[str, Any], field: str) -> UserError:
    return UserError(
        f"{path}: {field}={row[field]!r} is not supported. Merge the adapter with PEFT's "
        "merge_and_unload, and save the model that comes back"
    )


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter. Raises UserError if it holds a whole model, too."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return False
    if not has_weights(folder):
        return True
    if beside := [name for name in ADAPTER_FILES if (folder / name).is_file()]:
        raise UserError(
            f"{folder}: holds both a model and an adapter ({beside[0]}); move one of them"
        )
    return False


def base_folder(c: AdapterConfig) -> Path:
    """The folder of the model that was adapted; downloads it from the hub if needed.

    Raises UserError naming the adapter's field if there is none, or if it is no plain model.
    """
    local = local_base(c.path.parent)
    if local is None and c.revision not in (None, "", "main"):
        raise UserError(
            f"{c.path}: revision={c.revision!r} of {c.base} is not supported; download it, and "
            f"write its folder into {BASE}"
        )
    try:
        folder = local or hub.model_folder(c.base)
    except UserError as e:
        raise UserError(f"{c.path}: {BASE}: {e}; write there where the adapted model is") from None
    if (folder / hub.WORKDIR_FILE).is_file():
        raise UserError(
            f"{c.path}: {BASE}: {folder} is a training workdir; make a Hugging Face folder of it "
            "(`selfrag convert --format=huggingface`), and write that there"
        )
    if is_gguf(folder):
        raise UserError(
            f"{c.path}: {BASE}: {folder} is a GGUF file; make a Hugging Face folder of it "
            "(`selfrag convert --format=huggingface`), and write that there"
        )
    if is_adapter(folder):
        raise UserError(
            f"{c.path}: {BASE}: {folder} is an adapter itself; merge that one first "
            "(`selfrag convert --format=huggingface`), and write the merged model there"
        )
    return folder
