"""The architecture that a config names, for compiling and planning without its weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from ml_collections import ConfigDict

from selfrag_jax.checkpoints.workdirs import MODEL_FILE, read_architecture
from selfrag_jax.errors import UserError
from selfrag_jax.gguf_files.header import is_gguf
from selfrag_jax.huggingface import hub, weights
from selfrag_jax.huggingface.adapter_config import is_adapter
from selfrag_jax.models.architectures import ARCHITECTURES, architecture
from selfrag_jax.models.llama import LlamaConfig
from selfrag_jax.text import reflection
from selfrag_jax.training.starting_model import embedded_base

_ADDED_TOKENS = len(reflection.ALL) + 1  # and [PAD]


def config_architecture(c: ConfigDict, dtype: str | None) -> LlamaConfig:
    """Returns the architecture of a config, with rows for the reflection tokens and [PAD].

    c.architecture: a published one by name (models/architectures.py); a config.json, or the folder
        of a model; None for that of `c.base`.
    dtype: of activations; None for float32.
    Raises UserError if there is neither, or a field of the config.json is not supported.
    """
    dtype = dtype or "float32"
    name = None if c.architecture is None else str(c.architecture)  # a folder may be called 7
    if name in ARCHITECTURES:
        return architecture(name, _ADDED_TOKENS, dtype)
    if name is None:
        if c.get("base") in (None, "scratch"):
            raise UserError(
                "config: architecture is none, and base is no model; give one of them as the "
                f"folder of a model, or architecture as one of {', '.join(ARCHITECTURES)}"
            )
        read = model_architecture(c.base)
    elif Path(name).exists():
        read = model_architecture(name)
    else:
        raise UserError(
            f"architecture={name!r}: must be one of {', '.join(ARCHITECTURES)}; or a "
            "config.json or the folder of a model, and there is none of this name"
        )
    return replace(read, vocab_size=read.vocab_size + _ADDED_TOKENS, dtype=dtype)


def model_architecture(model: str | Path) -> LlamaConfig:
    """Returns the architecture of a model; of the hub's, its config.json alone is downloaded.

    model: a config.json, a GGUF file, a Hugging Face folder, that of a PEFT adapter (whose tensors
    tell the size of the vocabulary, so it is downloaded), a training workdir, a name on the hub, or
    "embedded".
    Raises UserError if there is none, or a field of it is not supported.
    """
    path = Path(model)
    if path.is_file() and not is_gguf(path):
        return weights.config_from_json(path)
    folder = embedded_base() if model == "embedded" else hub.config_folder(model)
    if (folder / MODEL_FILE).is_file():
        return replace(read_architecture(folder), lora=None, vocab_padding=0)
    if is_adapter(folder):
        folder = hub.model_folder(model)
    return weights.read_config(folder)


def follow_base(c: ConfigDict, overrides: Iterable[str]) -> ConfigDict:
    """Returns `c`; its architecture is the base's if --config.base was given and it was not."""
    given = {o.partition("=")[0] for o in overrides}
    if "architecture" in c and "base" in given and "architecture" not in given:
        c.architecture = None
    return c
