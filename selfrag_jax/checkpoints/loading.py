"""Models on disk: a trainer's workdir with Orbax checkpoints, or a Hugging Face folder.

A workdir holds `model.json` (the architecture), the tokenizer, and `checkpoints/<step>` with three items: `state`
(parameters and optimizer state), `data` (the position of the data iterator, and a fingerprint of every array) and `metrics`
(the loss that the best are chosen by). Orbax writes a checkpoint under a temporary name and renames it, so one that was
interrupted is never restored. One that is not what was saved is passed over, with a warning. What LoRA does not train lies
in `frozen`, once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from selfrag_jax.checkpoints import fingerprints
from selfrag_jax.checkpoints.integrity import (
    _compare,
    _first_line,
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
    read_architecture,
)
from selfrag_jax.errors import UserError
from selfrag_jax.huggingface import hub, weights
from selfrag_jax.models import lora
from selfrag_jax.models.llama import Model
from selfrag_jax.models.params import Params, flatten
from selfrag_jax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class LoadedModel:
    model: Model
    params: Params | None  # None: not read
    tokenizer: Tokenizer
    mesh: jax.sharding.Mesh | None = None  # over which the parameters are split


# ---- afterwards ------------------------------------------------------------------------------------------------------
def load(path: str | Path, mode: str | None = None) -> LoadedModel:
    """Reads a model for inference or as the start of a fine-tune.

    path: a trainer's workdir, a Hugging Face folder, or a hub name. mode: of its tokenizer, where the folder records none.
    Raises BadInput saying what was looked for.
    """
    path = hub.model_folder(path)
    found = load_without_params(path, mode)
    if not (path / MODEL_FILE).is_file():
        return replace(found, params=weights.load_folder(path)[1])
    trained = read_architecture(path)
    params = _load_params(path)
    if trained.lora is not None:
        params = lora.merge_adapters(params, trained.lora)
    return replace(found, params=unpad_vocabulary(params, trained))


def load_without_params(path: str | Path, mode: str | None = None) -> LoadedModel:
    """As `load`, without reading the parameters: they are None."""
    path = hub.model_folder(path)
    if (path / MODEL_FILE).is_file():
        model = Model(replace(read_architecture(path), lora=None, vocab_padding=0))
    elif (path / weights.CONFIG).is_file():
        model = Model(weights.config_from_json(path / weights.CONFIG))
    else:
        raise UserError(
            f"{path}: no model here; expected a training workdir ({MODEL_FILE}, {CHECKPOINTS}/) "
            f"or a Hugging Face folder ({weights.CONFIG}, {weights.WEIGHTS})"
        )
    tokenizer = read_tokenizer(path, mode)
    check_vocabulary_fits(path, tokenizer.vocab_size, model.config)
    return LoadedModel(model, None, tokenizer)


def read_tokenizer(path: Path, mode: str | None = None) -> Tokenizer:
    try:
        return Tokenizer.load(path, mode)
    except (FileNotFoundError, ValueError) as e:
        raise UserError(str(e)) from e


def _load_params(path: Path) -> Params:
    """Of the last checkpoint that is whole, in host memory."""
    _, params = latest_intact(candidate_steps(path), path, lambda step: _params_of(path, step))
    return params


def _params_of(path: Path, step: int) -> Params:
    _, wanted = read_record(path, step)
    params = _on_host(path / CHECKPOINTS / str(step) / "state", "params")["params"]
    _compare(_host_fingerprints("params", params), wanted, fingerprints.path_name(("params",)))
    if (path / FROZEN).is_dir():
        try:
            frozen = _on_host(path / FROZEN)
            _compare(_host_fingerprints(FROZEN, frozen), wanted, fingerprints.path_name((FROZEN,)))
        except Exception as e:
            raise non_corruption_error(e, path / FROZEN) or frozen_weights_damaged(path, e) from e
        params = lora.join_trained(params, frozen)
    return params


def frozen_weights_damaged(workdir: Path, e: Exception) -> UserError:
    return UserError(
        f"{workdir / FROZEN}: the weights that LoRA left as they are are damaged ({_first_line(e)}); the checkpoints may be whole. "
        f"Remove {FROZEN}/ and manifest.json there and run the same `selfrag train` again: it is written anew from the base"
    )


def _on_host(folder: Path, item: str | None = None) -> Any:
    """A saved tree in host memory: what device or mesh it was saved from does not matter. item: only what has this name."""
    from selfrag_jax.checkpoints import orbax_streaming  # with Orbax, which takes its time

    tree = orbax_streaming.open_tree(folder)
    reading = jax.tree.map(lambda array: array.read(), tree if item is None else {item: tree[item]})
    return jax.tree.map(lambda one: np.asarray(one.result()), reading)


def _host_fingerprints(item: str, tree: Params) -> dict[str, int]:
    return {
        fingerprints.path_name((item, *at)): fingerprints.part_fingerprint(np.asarray(leaf))
        for at, leaf in flatten(tree)
    }
