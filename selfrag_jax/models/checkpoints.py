"""Models on disk: a trainer's workdir with Orbax checkpoints, or a Hugging Face folder.

A workdir holds `model.json` (the architecture), the tokenizer, and `checkpoints/<step>` with two items: `state`
(parameters and optimizer state) and `data` (the position of the data iterator, and a fingerprint of every array). Orbax
writes a checkpoint under a temporary name and renames it, so one that was interrupted is never restored. One whose
arrays are not those that were saved is passed over, with a warning. What LoRA does not train lies in `frozen`, once.

An array's fingerprint is the sum of its elements' bits, each times an odd number of its own, modulo 2^32. One flipped bit
always changes it; devices compute it where the array is, and it is the same on every mesh.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from selfrag_jax.models import huggingface, lora
from selfrag_jax.models.llama import LlamaConfig, Model
from selfrag_jax.models.params import Params, leaves
from selfrag_jax.records import BadInput, read_json, write_json
from selfrag_jax.tokenizer import Tokenizer

MODEL_FILE, CHECKPOINTS, FROZEN, DAMAGED = "model.json", "checkpoints", "frozen", "damaged"


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


# ---- fingerprints ----------------------------------------------------------------------------------------------------
@jax.jit
def _fingerprints(arrays: list[jax.Array]) -> jax.Array:
    """Of all in one program: several that talk between processes could overtake each other."""

    def one(x):
        bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
        flat = jnp.zeros((), jnp.uint32)
        for axis, size in enumerate(x.shape):  # modulo 2^32, as uint32 is
            flat = flat * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        return jnp.sum(bits * (2 * flat + 1), dtype=jnp.uint32)

    return jnp.stack([one(x) for x in arrays])


def fingerprints(tree: Any) -> dict[str, int]:
    """Of every array of a tree, by its path."""
    paths, arrays = zip(*jax.tree_util.tree_leaves_with_path(tree), strict=True)
    return dict(zip(map(jax.tree_util.keystr, paths), map(int, jax.device_get(_fingerprints(list(arrays)))), strict=True))


def fingerprint_of(part: np.ndarray, first: int = 0) -> int:
    """The share that a part of a host array, from its flat index `first` on, has in the array's fingerprint."""
    bits = np.ascontiguousarray(part).reshape(-1).view(f"uint{8 * part.dtype.itemsize}")
    total, step = 0, 1 << 22
    for at in range(0, bits.size, step):
        some = bits[at : at + step].astype(np.uint32)
        odd = (2 * (np.arange(some.size, dtype=np.uint64) + np.uint64(first + at)) + 1).astype(np.uint32)
        total += int((some * odd).sum(dtype=np.uint64))
    return total % 2**32


class _Damaged(ValueError):
    pass


_NOT_DAMAGE = (jax.errors.JaxRuntimeError, MemoryError)  # a device or a host that is full


def _compare(found: dict[str, int], wanted: dict[str, int]) -> None:
    for path, value in wanted.items():
        if path in found and found[path] != value:
            raise _Damaged(f"the bits of {path} are not those that were saved")


# ---- while training --------------------------------------------------------------------------------------------------
def manager(workdir: str | Path, keep_last: int, keep_best: int):
    """Orbax's CheckpointManager of a workdir. keep_best: how many beside the last ones, by their loss."""
    import orbax.checkpoint as ocp
    from orbax.checkpoint import checkpoint_managers as policies

    best = policies.BestN(get_metric_fn=_loss, reverse=True, n=keep_best, keep_checkpoints_without_metrics=False)
    kept = policies.AnyPreservationPolicy([policies.LatestN(keep_last), *([best] if keep_best else [])])
    options = ocp.CheckpointManagerOptions(
        preservation_policy=kept, enable_async_checkpointing=True, best_fn=_loss, best_mode="min"
    )
    return ocp.CheckpointManager(Path(workdir).absolute() / CHECKPOINTS, options=options)


def _loss(metrics: dict[str, float]) -> float:
    return metrics["loss"]


def save(saved, step: int, state: Any, data: dict[str, Any], loss: float) -> None:
    """Saves in the background. data: the position of the data iterator; loss: what the best checkpoint is chosen by."""
    import orbax.checkpoint as ocp

    data = data | {"fingerprints": fingerprints(state)}
    state = {k: v for k, v in state.items() if k != FROZEN}
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data))
    saved.save(step, args=args, metrics={"loss": loss})


@contextmanager
def writing(saved, workdir: str | Path) -> Iterator[None]:
    """Within the block checkpoints are written in the background; leaving it, in whatever way, waits for the last one.

    Raises OSError when one could not be written, because the disk is full for example. The ones before it are kept.
    """
    try:
        with saved:
            yield
    except ValueError as e:  # tensorstore's
        code = re.search(r"os_error_code='(\d+)'", str(e))
        if not code:
            raise
        raise OSError(
            f"{workdir}: a checkpoint could not be written ({os.strerror(int(code.group(1)))}); the ones before it are kept. "
            "Make room, and the same command continues."
        ) from e


def save_frozen(workdir: str | Path, frozen: Params) -> None:
    """What a training with LoRA leaves as it is: written once, before the first checkpoint."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as one:
        one.save(Path(workdir).absolute() / FROZEN, frozen, force=True)


def restore_last(saved, workdir: str | Path, like: Any) -> tuple[Any, dict[str, Any]] | None:
    """State shaped and sharded `like` the given tree, and the position of the data iterator; None if nothing was saved.

    A damaged checkpoint is moved to `damaged/`, with a warning, and the one before it is taken. Raises BadInput when all
    are damaged.
    """
    found = _newest_whole(saved, workdir, lambda step: _restore(saved, workdir, step, like))
    if found is None:
        return None
    step, restored = found
    _move_aside(saved, workdir, step)
    return restored


def _newest_whole(saved, workdir: str | Path, read: Callable[[int], Any]) -> tuple[int, Any] | None:
    """The last step whose checkpoint `read` finds whole, and what it read; None when there is no checkpoint.

    Warns of those that are passed over. Raises BadInput when all are damaged.
    """
    damaged = []
    for step in sorted(saved.all_steps(), reverse=True):
        try:
            found = read(step)
        except _NOT_DAMAGE:
            raise
        except Exception as e:  # Orbax and tensorstore raise many kinds
            damaged.append(f"{Path(workdir) / CHECKPOINTS / str(step)}: {_first_line(e)}")
            continue
        for line in damaged:
            print(f"warning: {line}; step {step} is taken instead", file=sys.stderr)
        return step, found
    if damaged:
        raise BadInput(f"no checkpoint can be read: {'; '.join(damaged)}. Remove {workdir} to begin anew.")
    return None


def _restore(saved, workdir, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
    import orbax.checkpoint as ocp

    trained = {k: v for k, v in like.items() if k != FROZEN}
    found = saved.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(trained), data=ocp.args.JsonRestore()))
    state, data = found.state, found.data
    if FROZEN in like:
        with ocp.StandardCheckpointer() as one:
            state = state | {FROZEN: one.restore(Path(workdir).absolute() / FROZEN, like[FROZEN])}
    _compare(fingerprints(state), data.pop("fingerprints", {}))
    return state, data


def _move_aside(saved, workdir, good: int) -> None:
    """Moves all checkpoints after `good` out of the way: their steps will be saved again."""
    later = [step for step in saved.all_steps() if step > good]  # all of them damaged
    if later and jax.process_index() == 0:
        for step in later:
            free = next(p for i in range(len(later) + 100) if not (p := Path(workdir) / DAMAGED / f"{step}.{i}").exists())
            free.parent.mkdir(exist_ok=True)
            (Path(workdir) / CHECKPOINTS / str(step)).rename(free)
    if later:
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices("damaged checkpoints are aside")
        saved.reload()


def _first_line(e: Exception) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0][:300]


# ---- afterwards ------------------------------------------------------------------------------------------------------
def load(path: str | Path, mode: str | None = None) -> LoadedModel:
    """Reads a model for inference or as the start of a fine-tune.

    path: a trainer's workdir, a Hugging Face folder, or a hub name. mode: of its tokenizer, where the folder records none.
    Raises BadInput saying what was looked for.
    """
    path = huggingface.local(path)
    if (path / MODEL_FILE).is_file():
        config = read_architecture(path)
        params = _load_params(path)
        if config.lora is not None:
            params = lora.merge(params, config.lora)
        params = unpad_vocabulary(params, config)
        return LoadedModel(Model(replace(config, lora=None, vocab_padding=0)), params, read_tokenizer(path, mode))
    if (path / huggingface.CONFIG).is_file():
        config, params = huggingface.load(path)
        return LoadedModel(Model(config), params, read_tokenizer(path, mode))
    raise BadInput(
        f"{path}: no model here; expected a training workdir ({MODEL_FILE}, {CHECKPOINTS}/) "
        f"or a Hugging Face folder ({huggingface.CONFIG}, {huggingface.WEIGHTS})"
    )


def read_tokenizer(path: Path, mode: str | None = None) -> Tokenizer:
    try:
        return Tokenizer.load(path, mode)
    except (FileNotFoundError, ValueError) as e:
        raise BadInput(str(e)) from e


def open_last(path: Path, handlers) -> Any:
    """The CheckpointManager of a finished or interrupted training, for reading. Raises BadInput when nothing was saved."""
    import orbax.checkpoint as ocp

    saved = ocp.CheckpointManager(path.absolute() / CHECKPOINTS, handler_registry=handlers)
    if saved.latest_step() is None:
        raise BadInput(f"{path}: training has not saved a checkpoint yet; run `selfrag train` again to continue it")
    return saved


def _load_params(path: Path) -> Params:
    """Of the last checkpoint that is whole, in host memory."""
    import orbax.checkpoint as ocp

    handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
    handlers.add("state", ocp.args.PyTreeRestore, ocp.PyTreeCheckpointHandler())
    handlers.add("data", ocp.args.JsonRestore, ocp.JsonCheckpointHandler())
    with open_last(path, handlers) as saved:
        _, params = _newest_whole(saved, path, lambda step: _params_of(saved, path, step))
    return params


def _params_of(saved, path: Path, step: int) -> Params:
    import orbax.checkpoint as ocp

    # Into host memory: what device or mesh they were saved from does not matter.
    on_host = lambda tree: jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)  # noqa: E731
    args = ocp.args.PyTreeRestore(restore_args=on_host(saved.item_metadata(step)["state"].tree))
    found = saved.restore(step, args=ocp.args.Composite(state=args, data=ocp.args.JsonRestore()))
    wanted, params = (found["data"] or {}).get("fingerprints", {}), found["state"]["params"]
    _compare(_host_fingerprints("params", params), wanted)
    if (path / FROZEN).is_dir():
        with ocp.PyTreeCheckpointer() as one:
            shapes = one.metadata(path.absolute() / FROZEN).item_metadata.tree
            frozen = one.restore(path.absolute() / FROZEN, restore_args=on_host(shapes))
        _compare(_host_fingerprints(FROZEN, frozen), wanted)
        params = lora.join(params, frozen)
    return params


def _host_fingerprints(item: str, tree: Params) -> dict[str, int]:
    return {keystr((item, *at)): fingerprint_of(np.asarray(leaf)) for at, leaf in leaves(tree)}


def keystr(path: tuple[str, ...]) -> str:
    """A path as `fingerprints` writes it."""
    return "".join(f"[{key!r}]" for key in path)


# ---- the vocabulary's rows -------------------------------------------------------------------------------------------
def pad_vocabulary(params: Params, config: LlamaConfig) -> Params:
    """Adds the rows that no token has."""
    pad = config.vocab_padding
    return params if not pad else _each_table(params, lambda x, axis: np.pad(x, [(0, pad * (axis == i)) for i in (0, 1)]))


def unpad_vocabulary(params: Params, config: LlamaConfig) -> Params:
    """Removes the rows that no token has."""
    pad, V = config.vocab_padding, config.vocab_size
    return params if not pad else _each_table(params, lambda x, axis: np.take(x, range(V), axis))


def _each_table(params: Params, change) -> Params:
    """change(table, axis of the vocabulary), applied to the embedding and the head, if there is one."""
    out = {**params, "embed": {"embedding": change(np.asarray(params["embed"]["embedding"]), 0)}}
    if "head" in params:
        out["head"] = {"kernel": change(np.asarray(params["head"]["kernel"]), 1)}
    return out


def with_vocabulary(
    config: LlamaConfig, params: Params, old: int, vocab_size: int, like: Mapping[int, Sequence[int]] | None = None
) -> tuple[LlamaConfig, Params]:
    """Gives the tokens from `old` on, up to `vocab_size`, their rows: the mean of the old ones (as for new reflection tokens).

    A table may have more rows than the tokenizer has tokens; new tokens take those first. like: for some of the new ids
    the old ids whose mean row they start from instead. Raises BadInput when there are more tokens than rows already.
    """
    if old > config.vocab_size:
        raise BadInput(
            f"the tokenizer has {old} tokens, the model {config.vocab_size} rows: they do not belong together; take the "
            "tokenizer that came with the model"
        )
    size = max(config.vocab_size, vocab_size)

    def grow(table, axis: int):
        rows = np.moveaxis(table, axis, 0)
        mean = rows[:old].mean(0, keepdims=True)
        rows = np.concatenate([rows, np.repeat(mean, size - len(rows), 0)])
        rows[old:vocab_size] = mean
        for i, words in (like or {}).items():
            if i >= old:
                rows[i] = rows[list(words)].mean(0)
        return np.moveaxis(rows, 0, axis)

    return replace(config, vocab_size=size), _each_table(params, grow)
