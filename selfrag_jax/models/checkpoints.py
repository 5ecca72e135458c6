"""Models on disk: a trainer's workdir with Orbax checkpoints, or a Hugging Face folder.

A workdir holds `model.json` (the architecture), the tokenizer, and `checkpoints/<step>` with two items: `state`
(parameters and optimizer state) and `data` (the position of the data iterator). Orbax writes a checkpoint under a
temporary name and renames it, so one that was interrupted is never restored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from selfrag_jax.models import huggingface
from selfrag_jax.models.llama import LlamaConfig, Model, Params
from selfrag_jax.records import BadInput, read_json, write_json
from selfrag_jax.tokenizer import Tokenizer

MODEL_FILE, CHECKPOINTS = "model.json", "checkpoints"


@dataclass(frozen=True)
class LoadedModel:
    model: Model
    params: Params
    tokenizer: Tokenizer


def write_architecture(workdir: str | Path, config: LlamaConfig, tokenizer: Tokenizer) -> None:
    tokenizer.save(workdir)
    write_json(Path(workdir) / MODEL_FILE, asdict(config))


def read_architecture(workdir: Path) -> LlamaConfig:
    """The model.json of a workdir. Raises BadInput when it is none."""
    file = workdir / MODEL_FILE
    try:
        return LlamaConfig(**read_json(file))
    except (TypeError, ValueError) as e:
        raise BadInput(f"{file}: is no architecture of this version: {e}") from None


def manager(workdir: str | Path, keep: int = 2):
    """Orbax's CheckpointManager of a workdir."""
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
    return ocp.CheckpointManager(Path(workdir).absolute() / CHECKPOINTS, options=options)


def save(checkpoint_manager, step: int, state: Any, data: dict[str, Any]) -> None:
    import orbax.checkpoint as ocp

    args = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data))
    checkpoint_manager.save(step, args=args)


def restore(checkpoint_manager, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
    """State shaped and sharded `like` the given tree, and the data iterator's position."""
    import orbax.checkpoint as ocp

    args = ocp.args.Composite(state=ocp.args.StandardRestore(like), data=ocp.args.JsonRestore())
    restored = checkpoint_manager.restore(step, args=args)
    return restored.state, restored.data


def load(path: str | Path) -> LoadedModel:
    """Reads a model for inference or as the start of a fine-tune.

    path: a trainer's workdir or a Hugging Face folder. Raises BadInput saying what was looked for.
    """
    path = Path(path)
    if (path / MODEL_FILE).is_file():
        return LoadedModel(Model(read_architecture(path)), _load_params(path), read_tokenizer(path))
    if (path / huggingface.CONFIG).is_file():
        config, params = huggingface.load(path)
        return LoadedModel(Model(config), params, read_tokenizer(path))
    raise BadInput(
        f"{path}: no model here; expected a training workdir ({MODEL_FILE}, {CHECKPOINTS}/) "
        f"or a Hugging Face folder ({huggingface.CONFIG}, {huggingface.WEIGHTS})"
    )


def read_tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.load(path)
    except (FileNotFoundError, ValueError) as e:
        raise BadInput(str(e)) from e


def _load_params(path: Path) -> Params:
    import orbax.checkpoint as ocp

    handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
    handlers.add("state", ocp.args.PyTreeRestore, ocp.PyTreeCheckpointHandler())
    handlers.add("data", ocp.args.JsonRestore, ocp.JsonCheckpointHandler())
    with ocp.CheckpointManager(path.absolute() / CHECKPOINTS, handler_registry=handlers) as saved:
        step = saved.latest_step()
        if step is None:
            raise BadInput(f"{path}: training has not saved a checkpoint yet; run `selfrag train` again to continue it")
        # Into host memory: what device or mesh they were saved from does not matter.
        shapes = saved.item_metadata(step)["state"].tree
        on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
        args = ocp.args.Composite(state=ocp.args.PyTreeRestore(restore_args=on_host))
        return saved.restore(step, args=args)["state"]["params"]


def with_vocabulary(
    config: LlamaConfig, params: Params, vocab_size: int, like: Mapping[int, Sequence[int]] | None = None
) -> tuple[LlamaConfig, Params]:
    """Grows the vocabulary to `vocab_size`; new rows start at the mean of the old ones (as for new reflection tokens).

    like: for some of the new ids the old ids whose mean row they start from instead. Raises BadInput when the vocabulary
    would shrink.
    """
    if vocab_size < config.vocab_size:
        raise BadInput(
            f"the tokenizer has {vocab_size} tokens, the model {config.vocab_size}: they do not belong together; take the "
            "tokenizer that came with the model"
        )
    new = vocab_size - config.vocab_size

    def grow(table, axis: int):
        rows = np.moveaxis(np.asarray(table), axis, 0)
        rows = np.concatenate([rows, np.repeat(rows.mean(0, keepdims=True), new, 0)])
        for i, old in (like or {}).items():
            if i >= config.vocab_size:
                rows[i] = rows[list(old)].mean(0)
        return np.moveaxis(rows, 0, axis)

    grown = {**params, "embed": {"embedding": grow(params["embed"]["embedding"], 0)}}
    if "head" in params:
        grown["head"] = {"kernel": grow(params["head"]["kernel"], 1)}
    return replace(config, vocab_size=vocab_size), grown
