"""Models on disk: a trainer's workdir with Orbax checkpoints, or a Hugging Face folder.

A workdir holds `model.json` (the architecture), the tokenizer, and `checkpoints/<step>` with three items: `state`
(parameters and optimizer state), `data` (the position of the data iterator, and a fingerprint of every array) and `metrics`
(the loss that the best are chosen by). Orbax writes a checkpoint under a temporary name and renames it, so one that was
interrupted is never restored. One that is not what was saved is passed over, with a warning. What LoRA does not train lies
in `frozen`, once.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from selfrag_jax.checkpoints import fingerprints
from selfrag_jax.huggingface import weights as huggingface
from selfrag_jax.models import lora
from selfrag_jax.models.llama import LlamaConfig, Model
from selfrag_jax.models.params import Params, leaves
from selfrag_jax.records import BadInput, read_json, write_json
from selfrag_jax.text.tokenizer import Tokenizer

NO_LOSS = sys.float_info.max  # of a checkpoint that is none of the best
MODEL_FILE, CHECKPOINTS, FROZEN, DAMAGED = "model.json", "checkpoints", "frozen", "damaged"


@dataclass(frozen=True)
class LoadedModel:
    model: Model
    params: Params | None  # None: not read
    tokenizer: Tokenizer
    mesh: jax.sharding.Mesh | None = None  # over which the parameters are split


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
class Damaged(ValueError):
    """A checkpoint is not what was saved."""


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
        raise Damaged(f"{file} is not what was written")
    return row["position"], row["fingerprints"]


def _compare(found: dict[str, int], wanted: dict[str, int], item: str = "") -> None:
    """item: compares what begins with this name only."""
    wanted = {path: value for path, value in wanted.items() if path.startswith(item)}
    for path in sorted(found.keys() | wanted.keys()):
        if found.get(path) != wanted.get(path):
            raise Damaged(f"the bits of {path} are not those that were saved")


def newest_whole(steps: Sequence[int], workdir: str | Path, read: Callable[[int], Any]) -> tuple[int, Any] | None:
    """The last step whose checkpoint `read` finds whole, and what it read; None when there is no checkpoint.

    Warns of those that are passed over. Raises BadInput when all are damaged, and OSError when the file system fails.
    """
    errors_once()
    damaged = []
    for step in sorted(steps, reverse=True):
        try:
            found = read(step)
        except Exception as e:  # Orbax and tensorstore raise many kinds
            if other := _no_damage(e, Path(workdir) / CHECKPOINTS / str(step)):
                raise other from e
            damaged.append(f"{Path(workdir) / CHECKPOINTS / str(step)}: {_first_line(e)}")
            continue
        for line in damaged:
            print(f"warning: {line}; step {step} is taken instead", file=sys.stderr)
        return step, found
    if damaged:
        raise BadInput(f"no checkpoint can be read, all seem damaged: {'; '.join(damaged)}")
    return None


def _no_damage(e: Exception, what: Path) -> Exception | None:
    """The error to raise where reading failed for another reason than damage: a full device, a full host, a disk that does
    not answer, something else for the user to mend. None for damage."""
    code = re.search(r"os_error_code='(\d+)'", str(e))
    if code and int(code.group(1)) != errno.ENOENT:
        return OSError(f"{what}: {os.strerror(int(code.group(1)))}")
    other = (jax.errors.JaxRuntimeError, MemoryError, OSError, BadInput)
    return e if isinstance(e, other) and not isinstance(e, FileNotFoundError) else None


def _first_line(e: Exception) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0][:300]


# ---- while training --------------------------------------------------------------------------------------------------
def manager(workdir: str | Path, keep_last: int, keep_best: int):
    """Orbax's CheckpointManager of a workdir. keep_best: how many beside the last ones are kept, by their loss."""
    import orbax.checkpoint as ocp
    from orbax.checkpoint import checkpoint_managers as policies

    _mend_losses(Path(workdir) / CHECKPOINTS)

    class BestOfTheOthers(policies.BestN):
        def should_preserve(self, checkpoints, *, context):
            last = [False] * len(checkpoints[-keep_last:])
            return [*super().should_preserve(checkpoints[:-keep_last], context=context), *last]

    best = BestOfTheOthers(get_metric_fn=_loss, reverse=True, n=keep_best, keep_checkpoints_without_metrics=False)
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
        if _loss_in(file) is None:
            print(f"warning: {file}: the loss cannot be read; this checkpoint counts as none of the best", file=sys.stderr)
            write_json(file, {"loss": NO_LOSS})


def _loss(metrics: dict[str, float]) -> float:
    return metrics["loss"]


def save(saved, step: int, state: Any, data: dict[str, Any], loss: float) -> None:
    """Saves in the background. data: the position of the data iterator; loss: what the best checkpoint is chosen by."""
    import orbax.checkpoint as ocp

    # As it is now: the caller may go on changing what `data` holds while it is being written.
    record = json.loads(json.dumps(_record(data, fingerprints.of_tree(state))))
    state = {k: v for k, v in state.items() if k != FROZEN}
    by_layer = ocp.args.StandardSave(state, jax.tree.map(_by_layer, state))
    args = ocp.args.Composite(state=by_layer, data=ocp.args.JsonSave(record))
    saved.save(step, args=args, metrics={"loss": loss})


def _by_layer(x: jax.Array):
    """How an array is cut into pieces on disk: a stack by its layers, so that `convert` reads one without the others."""
    import orbax.checkpoint as ocp

    layer = math.prod(x.sharding.shard_shape(x.shape)[1:]) * x.dtype.itemsize
    if x.ndim != 3 or layer < 2**20:  # pieces of less than a megabyte cost more than they spare
        return ocp.SaveArgs()
    return ocp.SaveArgs(chunk_byte_size=layer, shard_axes=(0,))


@contextmanager
def writing(saved, workdir: str | Path) -> Iterator[Any]:
    """Within the block checkpoints are written in the background; leaving it, in whatever way, waits for the last one.

    Raises OSError when one could not be written, because the disk is full for example. The ones before it are kept.
    """
    errors_once()
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


def errors_once() -> None:
    """Of a checkpoint that cannot be written or read, Orbax logs what each of its threads died of, asyncio what each of Orbax's tasks
    died of that was not waited for, and Orbax prints that others have no one left to tell: hundreds of lines around the one error,
    which is raised besides. They come when they like, so this stays."""
    for logger in ("absl", "asyncio"):
        logging.getLogger(logger).addFilter(_not_of_orbax)
    if getattr(sys.unraisablehook, "func", None) is not _unless_too_late:
        sys.unraisablehook = partial(_unless_too_late, sys.unraisablehook)


def _not_of_orbax(record: logging.LogRecord) -> bool:
    if not record.exc_info:
        return True
    where = [record.pathname, *(frame.f_code.co_filename for frame, _ in traceback.walk_tb(record.exc_info[2]))]
    return not any(f"{os.sep}orbax{os.sep}" in file for file in where)


def _unless_too_late(otherwise: Callable[[Any], None], error: Any) -> None:
    too_late = error.exc_type is RuntimeError and str(error.exc_value) == "Event loop is closed"
    code = getattr(error.object, "cr_code", None)
    if not too_late and not (code and f"{os.sep}orbax{os.sep}" in code.co_filename):
        otherwise(error)


def save_frozen(workdir: str | Path, frozen: Params) -> None:
    """What a training with LoRA leaves as it is, for whoever reads the model later: written before the first checkpoint."""
    import orbax.checkpoint as ocp

    with writing(ocp.StandardCheckpointer(), workdir) as one:
        one.save(Path(workdir).absolute() / FROZEN, frozen, save_args=jax.tree.map(_by_layer, frozen), force=True)


def check_frozen(workdir: str | Path, step: int, frozen: Params) -> None:
    """Raises BadInput when these are not the weights beside which the checkpoint's LoRA was trained."""
    _, wanted = read_record(Path(workdir), step)
    try:
        _compare(fingerprints.of_tree({FROZEN: frozen}), wanted, fingerprints.name((FROZEN,)))
    except Damaged as e:
        raise BadInput(f"{workdir}: the base is not the one that this training began with ({e}); choose another workdir") from e


def restore_last(saved, workdir: str | Path, like: Any) -> tuple[Any, dict[str, Any]] | None:
    """State shaped and sharded `like` the given tree, and the position of the data iterator; None if nothing was saved.

    A damaged checkpoint is moved to `damaged/`, with a warning, and the one before it is taken. Raises BadInput when all
    are damaged.
    """
    found = newest_whole(saved.all_steps(), workdir, lambda step: _restore(workdir, step, like))
    if found is None:
        return None
    step, restored = found
    _move_aside(saved, workdir, step)
    return restored


def _restore(workdir, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
    import orbax.checkpoint as ocp

    found = error = None
    what = Path(workdir) / CHECKPOINTS / str(step)
    try:
        position, wanted = read_record(workdir, step)
        # Not by the manager, which waits for the other processes only where it succeeds.
        folder = what.absolute() / "state"
        found = ocp.StandardCheckpointHandler().restore(folder, args=ocp.args.StandardRestore(like))
    except Exception as e:
        error = e
    fatal = error is not None and _no_damage(error, what) is not None
    if not _agreed(not fatal):  # none goes on to an earlier one where another has stopped
        raise error if fatal else OSError(f"{what}: another process cannot read it")
    if not _agreed(error is None):  # what is damaged for one process, none takes
        raise error or Damaged("it is damaged for another process")
    prints = fingerprints.of_tree(found)
    frozen = fingerprints.name((FROZEN,))
    _compare(prints, {k: v for k, v in wanted.items() if not k.startswith(frozen)})
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
    found = describe(path, mode)
    if not (path / MODEL_FILE).is_file():
        return replace(found, params=huggingface.load(path)[1])
    trained = read_architecture(path)
    params = _load_params(path)
    if trained.lora is not None:
        params = lora.merge(params, trained.lora)
    return replace(found, params=unpad_vocabulary(params, trained))


def describe(path: str | Path, mode: str | None = None) -> LoadedModel:
    """As `load`, without reading the parameters: they are None."""
    path = huggingface.local(path)
    if (path / MODEL_FILE).is_file():
        model = Model(replace(read_architecture(path), lora=None, vocab_padding=0))
    elif (path / huggingface.CONFIG).is_file():
        model = Model(huggingface.config_from_json(path / huggingface.CONFIG))
    else:
        raise BadInput(
            f"{path}: no model here; expected a training workdir ({MODEL_FILE}, {CHECKPOINTS}/) "
            f"or a Hugging Face folder ({huggingface.CONFIG}, {huggingface.WEIGHTS})"
        )
    tokenizer = read_tokenizer(path, mode)
    check_rows(path, tokenizer.vocab_size, model.config)
    return LoadedModel(model, None, tokenizer)


def check_rows(what: str | Path, tokens: int, config: LlamaConfig) -> None:
    """Raises BadInput where there are more tokens than rows: another model's tokenizer. The ids beyond would be read as the last."""
    if tokens > config.vocab_size:
        raise BadInput(
            f"{what}: its tokenizer has {tokens} tokens, its model {config.vocab_size} rows: they do not belong together; take the "
            "tokenizer that came with the model (`selfrag convert --reflection_tokens` adds rows for reflection tokens)"
        )


def read_tokenizer(path: Path, mode: str | None = None) -> Tokenizer:
    try:
        return Tokenizer.load(path, mode)
    except (FileNotFoundError, ValueError) as e:
        raise BadInput(str(e)) from e


def saved_steps(workdir: Path) -> list[int]:
    """Steps of which there is a checkpoint, in order."""
    folder = Path(workdir) / CHECKPOINTS
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def steps_to_read(workdir: Path, step: str = "last") -> list[int]:
    """The checkpoints of which the newest whole one is read. step: "last" (any), "best" (the one of the lowest loss), or the
    number of one. Raises BadInput when there is none of that name."""
    steps = saved_steps(workdir)
    if not steps:
        raise BadInput(f"{workdir}: training has not saved a checkpoint yet; run `selfrag train` again to continue it")
    if step == "last":
        return steps
    if step == "best":
        files = {s: Path(workdir) / CHECKPOINTS / str(s) / "metrics" / "metrics" for s in steps}
        losses = {s: loss for s, file in files.items() if (loss := _loss_in(file)) not in (None, NO_LOSS)}
        if not losses:
            raise BadInput(f"{workdir}: no checkpoint has a loss to choose the best by; there are {', '.join(map(str, steps))}")
        return [min(losses, key=losses.get)]
    if not step.isdigit() or int(step) not in steps:
        raise BadInput(f"--step={step}: must be last, best, or one of {', '.join(map(str, steps))}")
    return [int(step)]


def _loss_in(file: Path) -> float | None:
    try:
        return float(json.loads(file.read_text())["loss"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _load_params(path: Path) -> Params:
    """Of the last checkpoint that is whole, in host memory."""
    _, params = newest_whole(steps_to_read(path), path, lambda step: _params_of(path, step))
    return params


def _params_of(path: Path, step: int) -> Params:
    _, wanted = read_record(path, step)
    params = _on_host(path / CHECKPOINTS / str(step) / "state", "params")["params"]
    _compare(_host_fingerprints("params", params), wanted, fingerprints.name(("params",)))
    if (path / FROZEN).is_dir():
        try:
            frozen = _on_host(path / FROZEN)
            _compare(_host_fingerprints(FROZEN, frozen), wanted, fingerprints.name((FROZEN,)))
        except Exception as e:
            raise _no_damage(e, path / FROZEN) or frozen_is_damaged(path, e) from e
        params = lora.join(params, frozen)
    return params


def frozen_is_damaged(workdir: Path, e: Exception) -> BadInput:
    return BadInput(
        f"{workdir / FROZEN}: the weights that LoRA left as they are are damaged ({_first_line(e)}); the checkpoints may be whole. "
        f"Remove {FROZEN}/ and manifest.json there and run the same `selfrag train` again: it is written anew from the base"
    )


def _on_host(folder: Path, item: str | None = None) -> Any:
    """A saved tree in host memory: what device or mesh it was saved from does not matter. item: only what has this name."""
    from selfrag_jax.checkpoints import orbax_streaming as opened  # with Orbax, which takes its time

    tree = opened.open_tree(folder)
    reading = jax.tree.map(lambda array: array.read(), tree if item is None else {item: tree[item]})
    return jax.tree.map(lambda one: np.asarray(one.result()), reading)


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
    config: LlamaConfig, params: Params | None, old: int, vocab_size: int, like: Mapping[int, Sequence[int]] | None = None
) -> tuple[LlamaConfig, Params | None]:
    """Gives the tokens from `old` on, up to `vocab_size`, their rows: the mean of the old ones (as for new reflection tokens).

    A table may have more rows than the tokenizer has tokens; new tokens take those first. like: for some of the new ids
    the old ids whose mean row they start from instead. Without params the config alone is grown. Raises BadInput when there are more tokens than rows already.
    """
    check_rows("the model to be grown", old, config)
    size = max(config.vocab_size, vocab_size)

    def grow(table, axis: int):
        rows = np.moveaxis(table, axis, 0)
        mean = rows[:old].mean(0, dtype=np.float32, keepdims=True).astype(rows.dtype)  # bf16 would be summed in bf16
        rows = np.concatenate([rows, np.repeat(mean, size - len(rows), 0)])
        rows[old:vocab_size] = mean
        for i, words in (like or {}).items():
            if i >= old:
                rows[i] = rows[list(words)].mean(0, dtype=np.float32)
        return np.moveaxis(rows, 0, axis)

    return replace(config, vocab_size=size), None if params is None else _each_table(params, grow)
