"""Reads a finished model: a training workdir, a Hugging Face folder, a GGUF file, or the hub's.

workdirs.py describes a workdir. Its latest intact checkpoint is read, and parameters are given as a
plain model has them: LoRA merged, padding of the vocabulary removed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np

from selfrag_jax.artifacts import ADAPTER_CONFIG
from selfrag_jax.checkpoints import fingerprints
from selfrag_jax.checkpoints.integrity import (
    compare_fingerprints,
    first_line,
    latest_intact,
    non_corruption_error,
    read_record,
)
from selfrag_jax.checkpoints.vocabulary_rows import check_vocabulary_fits, unpad_vocabulary
from selfrag_jax.checkpoints.workdirs import (
    CHECKPOINTS,
    FROZEN,
    MODEL_FILE,
    candidate_steps,
    checkpoint_folder,
    read_architecture,
)
from selfrag_jax.errors import UserError
from selfrag_jax.files import read_object
from selfrag_jax.gguf_files.architecture import open_llama
from selfrag_jax.gguf_files.header import is_gguf
from selfrag_jax.huggingface import adapters, hub, weights
from selfrag_jax.models import lora
from selfrag_jax.models.llama import Model
from selfrag_jax.models.params import Params, flatten
from selfrag_jax.storage.paths import is_remote
from selfrag_jax.text import gguf_vocabulary
from selfrag_jax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class LoadedModel:
    model: Model
    params: Params | None  # None: not read
    tokenizer: Tokenizer
    mesh: jax.sharding.Mesh | None = None  # over which the parameters are sharded

    def __repr__(self) -> str:
        """One line; the parameters would be thousands."""
        c = self.model.config
        if self.params is None:
            return f"Llama of {c.num_layers} layers, without its parameters"
        leaves = jax.tree.leaves(self.params)
        dtypes = {str(leaf.dtype) for leaf in leaves}
        dtype = "int8" if c.quantized else "/".join(sorted(dtypes))
        device = next(iter(leaves[0].devices())) if isinstance(leaves[0], jax.Array) else "host"
        where = f"{self.mesh.size} devices" if self.mesh is not None else str(device)
        count = sum(int(leaf.size) for leaf in leaves)
        return f"Llama of {c.num_layers} layers, {_shown(count)} parameters, {dtype}, on {where}"


def _shown(count: int) -> str:
    """A number of parameters with three digits: 135M, 6.74B."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def load(path: str | Path, mode: str | None = None) -> LoadedModel:
    """Reads a model for inference or as the start of a fine-tune.

    path: a training workdir, a Hugging Face folder, a GGUF file, or a hub name. mode: of the
    tokenizer, for a folder that does not record it. Raises UserError when there is no model, or it
    cannot be read.
    """
    path = hub.model_folder(path)
    loaded = load_without_params(path, mode)
    if not (path / MODEL_FILE).is_file():
        return replace(loaded, params=weights.load_folder(path)[1])
    trained = read_architecture(path)
    _, params = latest_intact(
        candidate_steps(path), path, lambda step: _read_checkpoint(path, step)
    )
    if trained.lora is not None:
        params = lora.merge_adapters(params, trained.lora)
    return replace(loaded, params=unpad_vocabulary(params, trained))


def load_without_params(path: str | Path, mode: str | None = None) -> LoadedModel:
    """Like `load`, but does not read the parameters: they are None."""
    path = hub.model_folder(path)
    if (path / MODEL_FILE).is_file():
        model = Model(replace(read_architecture(path), lora=None, vocab_padding=0))
    elif weights.is_model(path):
        model = Model(weights.read_config(path))
    else:
        raise _no_model(path)
    tokenizer = read_tokenizer(path, mode)
    check_vocabulary_fits(path, tokenizer.vocab_size, model.config)
    return LoadedModel(model, None, tokenizer)


def read_tokenizer(path: Path, mode: str | None = None) -> Tokenizer:
    """Tokenizer.load, whose errors it raises as UserError. Unchanged files are read once."""
    folder = adapters.tokenizer_folder(path)
    if not (Tokenizer.is_in(folder) or (path / MODEL_FILE).is_file() or weights.is_model(path)):
        raise _no_model(path)
    try:
        if is_gguf(folder):  # an adapter without a tokenizer has that of its base
            return gguf_vocabulary.read_tokenizer(open_llama(folder).fields, folder, mode)
        return _open_tokenizer(folder, mode, None if is_remote(folder) else _small_files(folder))
    except (FileNotFoundError, ValueError) as e:
        raise UserError(str(e)) from e


@lru_cache(maxsize=2)  # commands check a model before they load it
def _open_tokenizer(folder: Path, mode: str | None, _: Any) -> Tokenizer:
    return Tokenizer.load(folder, mode)


def _small_files(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of the files of a folder that may be a tokenizer's."""
    stats = ((p.name, p.stat()) for p in sorted(folder.iterdir()) if p.is_file())
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def _no_model(path: Path) -> UserError:
    """The error of a folder without a model, which says who made the folder."""
    made = path / "manifest.json"
    stage = read_object(made, ()).get("stage") if made.is_file() else None
    what = f"was made by `selfrag {stage}` and holds no model" if stage else "no model here"
    return UserError(
        f"{path}: {what}; expected a training workdir ({MODEL_FILE}, {CHECKPOINTS}/), a Hugging "
        f"Face folder ({weights.CONFIG}, {weights.WEIGHTS}) or a PEFT adapter's ({ADAPTER_CONFIG})"
        f"{hub.gguf_hint(path)}"
    )


def _read_checkpoint(workdir: Path, step: int) -> Params:
    """The parameters of a checkpoint in host memory, with those that LoRA froze."""
    _, expected = read_record(workdir, step)
    params = _read_tree(checkpoint_folder(workdir, step) / "state", "params")["params"]
    _check_tree("params", params, expected)
    if (workdir / FROZEN).is_dir():
        try:
            frozen = _read_tree(workdir / FROZEN)
            _check_tree(FROZEN, frozen, expected)
        except Exception as e:
            other = non_corruption_error(e, workdir / FROZEN)
            raise other or frozen_weights_damaged(workdir, e) from e
        params = lora.join_trained(params, frozen)
    return params


def frozen_weights_damaged(workdir: Path, e: Exception) -> UserError:
    """The error for a damaged `frozen/`. Every checkpoint needs it, so no earlier one would do."""
    return UserError(
        f"{workdir / FROZEN}: the weights that LoRA does not train are damaged "
        f"({first_line(e)}); the checkpoints may be intact. Remove {FROZEN}/ and manifest.json "
        "there and run the same `selfrag train` again: it writes them anew from the base"
    )


def _read_tree(folder: Path, item: str | None = None) -> Any:
    """A saved tree in host memory, whatever devices or mesh it was saved from.

    item: reads only the subtree of this name, and returns it under that name.
    """
    from selfrag_jax.checkpoints import orbax_streaming  # imports Orbax, which takes long

    tree = orbax_streaming.open_tree(folder)
    if item is not None:
        tree = {item: tree[item]}
    reads = jax.tree.map(lambda array: array.read(), tree)  # all at the same time
    return jax.tree.map(lambda read: np.asarray(read.result()), reads)


def _check_tree(name: str, tree: Params, expected: dict[str, int]) -> None:
    actual = {
        fingerprints.path_name((name, *path)): fingerprints.part_fingerprint(np.asarray(leaf))
        for path, leaf in flatten(tree)
    }
    compare_fingerprints(actual, expected, fingerprints.path_name((name,)))
