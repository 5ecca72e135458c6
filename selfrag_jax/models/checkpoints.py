"""Models on disk: a trainer's workdir with Orbax checkpoints, or a Hugging Face folder.

A workdir holds `model.json` (the architecture), the tokenizer, and `checkpoints/<step>` with two items: `state`
(parameters and optimizer state) and `data` (the position of the data iterator, and a fingerprint of every array). Orbax
writes a checkpoint under a temporary name and renames it, so one that was interrupted is never restored. One that is not
what was saved is passed over, with a warning. What LoRA does not train lies in `frozen`, once.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from selfrag_jax.models import fingerprints, huggingface, lora
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


# ---- what makes a checkpoint whole -----------------------------------------------------------------------------------
class _Damaged(ValueError):
    pass


def write_record(file: Path, position: dict[str, Any], prints: dict[str, int]) -> None:
    """The `data` of a checkpoint, for one that is not written by training."""
    file.write_text(json.dumps(_record(position, prints)))


def _record(position: dict[str, Any], prints: dict[str, int]) -> dict[str, Any]:
    row = {"position": position, "fingerprints": prints}
    return row | {"sha256": hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()}


def read_record(workdir: Path, step: int) -> tuple[dict[str, Any], dict[str, int]]:
    """(position of the data iterator, fingerprints) of a checkpoint. Raises ValueError when it is not what was written."""
    file = Path(workdir) / CHECKPOINTS / str(step) / "data" / "metadata"
    row = json.loads(file.read_text())
    if row != _record(row["position"], row["fingerprints"]):
        raise _Damaged(f"{file} is not what was written")
    return row["position"], row["fingerprints"]


def _compare(found: dict[str, int], wanted: dict[str, int], item: str = "") -> None:
    """item: compares what begins with this name only."""
    wanted = {path: value for path, value in wanted.items() if path.startswith(item)}
    for path in sorted(found.keys() | wanted.keys()):
        if found.get(path) != wanted.get(path):
            raise _Damaged(f"the bits of {path} are not those that were saved")


def _newest_whole(steps: Sequence[int], workdir: str | Path, read: Callable[[int], Any]) -> tuple[int, Any] | None:
    """The last step whose checkpoint `read` finds whole, and what it read; None when there is no checkpoint.

    Warns of those that are passed over. Raises BadInput when all are damaged, and OSError when the file system fails.
    """
    damaged = []
    for step in sorted(steps, reverse=True):
        try:
            found = read(step)
        except Exception as e:  # Orbax and tensorstore raise many kinds
            code = re.search(r"os_error_code='(\d+)'", str(e))
            if code and int(code.group(1)) != errno.ENOENT:
                raise OSError(f"{Path(workdir) / CHECKPOINTS / str(step)}: {os.strerror(int(code.group(1)))}") from e
            if isinstance(e, (jax.errors.JaxRuntimeError, MemoryError, OSError)) and not isinstance(e, FileNotFoundError):
                raise  # a full device, a full host, a disk that does not answer
            damaged.append(f"{Path(workdir) / CHECKPOINTS / str(step)}: {_first_line(e)}")
            continue
        for line in damaged:
            print(f"warning: {line}; step {step} is taken instead", file=sys.stderr)
        return step, found
    if damaged:
        raise BadInput(f"no checkpoint can be read, all seem damaged: {'; '.join(damaged)}")
    return None


def _first_line(e: Exception) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0][:300]


# ---- while training --------------------------------------------------------------------------------------------------
def manager(workdir: str | Path, keep_last: int, keep_best: int):
    """Orbax's CheckpointManager of a workdir. keep_best: how many beside the last ones, by their loss."""
    import orbax.checkpoint as ocp
    from orbax.checkpoint import checkpoint_managers as policies

    _mend_losses(Path(workdir) / CHECKPOINTS)
    best = policies.BestN(get_metric_fn=_loss, reverse=True, n=keep_best, keep_checkpoints_without_metrics=False)
    kept = policies.AnyPreservationPolicy([policies.LatestN(keep_last), *([best] if keep_best else [])])
    options = ocp.CheckpointManagerOptions(
        preservation_policy=kept,
        enable_async_checkpointing=True,
        best_fn=_loss,
        best_mode="min",
        cleanup_tmp_directories=True,
    )
    return ocp.CheckpointManager(Path(workdir).absolute() / CHECKPOINTS, options=options)


def _mend_losses(folder: Path) -> None:
    """Orbax reads the loss of every checkpoint at once, and fails on one that is damaged."""
    for file in folder.glob("*/metrics/metrics") if jax.process_index() == 0 else ():
        try:
            float(json.loads(file.read_text())["loss"])
        except (ValueError, KeyError, TypeError):
            print(f"warning: {file}: the loss cannot be read; this checkpoint counts as none of the best", file=sys.stderr)
            write_json(file, {"loss": sys.float_info.max})


def _loss(metrics: dict[str, float]) -> float:
    return metrics["loss"]


def save(saved, step: int, state: Any, data: dict[str, Any], loss: float) -> None:
    """Saves in the background. data: the position of the data iterator; loss: what the best checkpoint is chosen by."""
    import orbax.checkpoint as ocp

    record = _record(data, fingerprints.of_tree(state))
    state = {k: v for k, v in state.items() if k != FROZEN}
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(record))
    saved.save(step, args=args, metrics={"loss": loss})


@contextmanager
def writing(saved, workdir: str | Path) -> Iterator[Any]:
    """Within the block checkpoints are written in the background; leaving it, in whatever way, waits for the last one.

    Raises OSError when one could not be written, because the disk is full for example. The ones before it are kept.
    """
    try:
        with saved:
            yield saved
    except ValueError as e:  # tensorstore's
        code = re.search(r"os_error_code='(\d+)'", str(e))
        if not code:
            raise
        raise OSError(
            f"{workdir}: a checkpoint could not be written ({os.strerror(int(code.group(1)))}); the ones before it are kept. "
            "Make room, and the same command continues."
        ) from e


def save_frozen(workdir: str | Path, frozen: Params) -> None:
    """What a training with LoRA leaves as it is, for whoever reads the model later: written before the first checkpoint."""
    import orbax.checkpoint as ocp

    with writing(ocp.StandardCheckpointer(), workdir) as one:
        one.save(Path(workdir).absolute() / FROZEN, frozen, force=True)


def restore_last(saved, workdir: str | Path, like: Any) -> tuple[Any, dict[str, Any]] | None:
    """State shaped and sharded `like` the given tree, and the position of the data iterator; None if nothing was saved.

    A damaged checkpoint is moved to `damaged/`, with a warning, and the one before it is taken. Raises BadInput when all
    are damaged.
    """
    found = _newest_whole(saved.all_steps(), workdir, lambda step: _restore(workdir, step, like))
    if found is None:
        return None
    step, restored = found
    _move_aside(saved, workdir, step)
    return restored


def _restore(workdir, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
    import orbax.checkpoint as ocp

    found = error = None
    try:
        position, wanted = read_record(workdir, step)
        # Not by the manager, which waits for the other processes only where it succeeds.
        folder = Path(workdir).absolute() / CHECKPOINTS / str(step) / "state"
        found = ocp.StandardCheckpointHandler().restore(folder, args=ocp.args.StandardRestore(like))
    except Exception as e:
        error = e
    if not _agreed(error is None):  # what one process cannot read, none takes
        raise error or _Damaged("another process cannot read it")
    prints = fingerprints.of_tree(found)
    _compare(prints, {k: v for k, v in wanted.items() if not k.startswith(fingerprints.name((FROZEN,)))})
    return found, position


def _agreed(mine: bool) -> bool:
    """Whether all processes say yes."""
    if jax.process_count() == 1:
        return mine
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.array([mine])).all())


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


def saved_steps(workdir: Path) -> list[int]:
    """Steps of which there is a checkpoint. Raises BadInput when there is none."""
    folder = Path(workdir) / CHECKPOINTS
    steps = sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []
    if not steps:
        raise BadInput(f"{workdir}: training has not saved a checkpoint yet; run `selfrag train` again to continue it")
    return steps


def _load_params(path: Path) -> Params:
    """Of the last checkpoint that is whole, in host memory."""
    _, params = _newest_whole(saved_steps(path), path, lambda step: _params_of(path, step))
    return params


def _params_of(path: Path, step: int) -> Params:
    _, wanted = read_record(path, step)
    params = _on_host(path / CHECKPOINTS / str(step) / "state")["params"]
    _compare(_host_fingerprints("params", params), wanted, fingerprints.name(("params",)))
    if (path / FROZEN).is_dir():
        frozen = _on_host(path / FROZEN)
        _compare(_host_fingerprints(FROZEN, frozen), wanted, fingerprints.name((FROZEN,)))
        params = lora.join(params, frozen)
    return params


def _on_host(folder: Path) -> Any:
    """A saved tree in host memory: what device or mesh it was saved from does not matter."""
    import orbax.checkpoint as ocp

    handler = ocp.PyTreeCheckpointHandler()
    shapes = handler.metadata(folder.absolute()).tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
    return handler.restore(folder.absolute(), args=ocp.args.PyTreeRestore(restore_args=as_numpy))


def _host_fingerprints(item: str, tree: Params) -> dict[str, int]:
    return {fingerprints.name((item, *at)): fingerprints.of_part(np.asarray(leaf)) for at, leaf in leaves(tree)}


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
