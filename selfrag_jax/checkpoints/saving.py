"""Checkpoints while training: saving in the background, resuming from the latest intact one.

Orbax is imported within the functions: importing it takes long, and not every command needs it.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from selfrag_jax.checkpoints import fingerprints
from selfrag_jax.checkpoints.integrity import (
    DamagedCheckpoint,
    compare_fingerprints,
    first_line,
    latest_intact,
    make_record,
    non_corruption_error,
    read_record,
)
from selfrag_jax.checkpoints.orbax_errors import silence_secondary_errors
from selfrag_jax.checkpoints.workdirs import (
    CHECKPOINTS,
    DAMAGED,
    FROZEN,
    NO_LOSS,
    checkpoint_folder,
    read_loss,
)
from selfrag_jax.errors import UserError
from selfrag_jax.files import write_json
from selfrag_jax.models.params import Params
from selfrag_jax.storage.paths import absolute, as_path, explained, is_remote

_IN_TURN = 2**26  # bytes of further arrays that are written with the largest one
_MIN_CHUNK_BYTES = 2**20  # smaller chunks cost more in overhead than partial reads save


# ---- saving ----------------------------------------------------------------------------------
def checkpoint_manager(
    workdir: str | Path, keep_last: int, keep_best: int, in_turn: int | None = None
):
    """Orbax's CheckpointManager of a workdir, which is made if it is missing.

    keep_best: how many checkpoints with the lowest loss are kept beside the last ones.
    in_turn: None to write checkpoints in the background; else the bytes of the largest array.
        Then saving returns when all is written, with few arrays in work at a time: their compressed
        copies take memory.
    """
    import orbax.checkpoint as ocp

    from selfrag_jax.checkpoints.orbax_streaming import preservation_policy

    as_path(workdir).mkdir(parents=True, exist_ok=True)
    _repair_losses(as_path(workdir) / CHECKPOINTS)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=preservation_policy(keep_last, keep_best, _loss),
        enable_async_checkpointing=in_turn is None,
        best_fn=_loss,
        best_mode="min",
        cleanup_tmp_directories=True,
    )
    handlers: Any = None
    if in_turn is not None:
        # Orbax refuses an array that is larger than the limit.
        limit = (1.1 * in_turn + _IN_TURN) / 1e9
        handlers = {
            "state": ocp.StandardCheckpointHandler(save_concurrent_gb=limit),
            "data": ocp.JsonCheckpointHandler(),
        }
    folder = absolute(workdir) / CHECKPOINTS
    return ocp.CheckpointManager(folder, item_handlers=handlers, options=options)


def _loss(metrics: dict[str, float]) -> float:
    return metrics["loss"]


def _repair_losses(folder: Path) -> None:
    """Replaces losses that cannot be read: Orbax reads all at once and fails on a damaged one."""
    if jax.process_index() != 0:
        return
    for file in folder.glob("*/metrics/metrics"):
        if read_loss(file) is None:
            print(
                f"warning: {file}: the loss cannot be read; this checkpoint cannot be the best",
                file=sys.stderr,
            )
            write_json(file, {"loss": NO_LOSS})


def save_checkpoint(manager, step: int, state: Any, position: dict[str, Any], loss: float) -> None:
    """Saves a checkpoint, in the background if the manager does so.

    position: of the data iterator. loss: what the best checkpoint is chosen by.
    """
    import orbax.checkpoint as ocp

    # A copy: the caller may change what `position` holds while it is being written.
    record = json.loads(json.dumps(make_record(position, fingerprints.tree_fingerprints(state))))
    state = {k: v for k, v in state.items() if k != FROZEN}
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(state, jax.tree.map(_chunk_by_layer, state)),
        data=ocp.args.JsonSave(record),
    )
    manager.save(step, args=items, metrics={"loss": loss})


def set_loss(manager, workdir: str | Path, step: int, loss: float) -> None:
    """Replaces the loss of a saved checkpoint; of several processes, the main one writes it."""
    if jax.process_index() == 0:
        write_json(checkpoint_folder(workdir, step) / "metrics" / "metrics", {"loss": loss})
    all_processes_agree(True)  # waits for the main one
    manager.reload()


def _chunk_by_layer(x: jax.Array):
    """Chunks a stack by layer on disk, so that `convert` can read one layer without the others."""
    import orbax.checkpoint as ocp

    layer_bytes = math.prod(x.sharding.shard_shape(x.shape)[1:]) * x.dtype.itemsize
    if x.ndim != 3 or layer_bytes < _MIN_CHUNK_BYTES:
        return ocp.SaveArgs()
    return ocp.SaveArgs(chunk_byte_size=layer_bytes, shard_axes=(0,))


@contextmanager
def writing_checkpoints(manager, workdir: str | Path) -> Iterator[Any]:
    """Waits, however the block is left, for the checkpoint that is being written in the background.

    Raises OSError when one could not be written, because the disk is full for example. Earlier
    checkpoints are kept. Where the block itself is left by an exception (Ctrl-C, for example), that
    one is raised, and a checkpoint that could not be written is a warning.
    """
    silence_secondary_errors()
    try:
        try:
            yield manager
        except BaseException as stop:
            _close_after(stop, manager, workdir)
            raise
        manager.close()
    except Exception as e:
        if known := _explain_failed_write(e, workdir):
            raise OSError(known) from e
        raise


def _close_after(stop: BaseException, manager, workdir: str | Path) -> None:
    """Waits for the writes in the background; what fails in them must not hide `stop`."""
    try:
        manager.close()
    except Exception as e:
        if isinstance(stop, Exception) and _explain_failed_write(stop, workdir):
            return  # the same failure, told once
        known = _explain_failed_write(e, workdir)
        reason = known or f"{workdir}: a checkpoint could not be written ({first_line(e)})"
        print(f"warning: {reason}", file=sys.stderr)


def _explain_failed_write(e: Exception, workdir: str | Path) -> str:
    """What to tell the user of a failed write; "" if the disk or bucket is not the cause."""
    code = re.search(r"os_error_code='(\d+)'", str(e)) if isinstance(e, ValueError) else None
    if code:  # from tensorstore
        reason = os.strerror(int(code.group(1)))
        return (
            f"{workdir}: a checkpoint could not be written ({reason}); earlier ones are kept. "
            "Make room, and the same command continues."
        )
    if is_remote(workdir) and (reason := _why_bucket_failed(e)):
        return (
            f"{workdir}: a checkpoint could not be written ({reason}); earlier ones are kept. "
            "The same command continues."
        )
    return ""


def _why_bucket_failed(e: Exception) -> str:
    """In one line; "" if it is no error of a bucket."""
    line = first_line(e)
    of_tensorstore = isinstance(e, ValueError) and re.match(r"[A-Z_]+: ", line)
    is_request = type(explained(e, "")) is not type(e) or isinstance(e, OSError)
    return line if of_tensorstore or is_request else ""


# ---- the weights that LoRA does not train ----------------------------------------------------
def save_frozen(workdir: str | Path, frozen: Params) -> None:
    """Saves the weights that LoRA does not train, for later readers of the model.

    Called before the first checkpoint is written.
    """
    import orbax.checkpoint as ocp

    folder = absolute(workdir) / FROZEN
    save_args = jax.tree.map(_chunk_by_layer, frozen)
    with writing_checkpoints(ocp.StandardCheckpointer(), workdir) as checkpointer:
        checkpointer.save(folder, frozen, save_args=save_args, force=True)


def check_frozen(workdir: str | Path, step: int, frozen: Params) -> None:
    """Raises UserError when the checkpoint's LoRA was trained on other frozen weights."""
    _, expected = read_record(workdir, step)
    actual = fingerprints.tree_fingerprints({FROZEN: frozen})
    try:
        compare_fingerprints(actual, expected, fingerprints.path_name((FROZEN,)))
    except DamagedCheckpoint as e:
        raise UserError(
            f"{workdir}: the base is not the one that this training began with ({e}); choose "
            "another workdir"
        ) from e


# ---- resuming --------------------------------------------------------------------------------
def restore_last(manager, workdir: str | Path, like: Any) -> tuple[Any, dict[str, Any]] | None:
    """(state, position of the data iterator) of the latest intact checkpoint; None without one.

    like: a tree of the shapes and shardings of the state. Damaged checkpoints after that one are
    moved to `damaged/`, with a warning. Raises UserError when all are damaged.
    """
    steps = manager.all_steps()
    if not steps:
        return None
    step, restored = latest_intact(
        steps, workdir, lambda step: restore_checkpoint(workdir, step, like)
    )
    _move_aside_after(manager, workdir, step)
    return restored


def restore_checkpoint(workdir: str | Path, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
    """(state, position of the data iterator) of one checkpoint.

    Raises DamagedCheckpoint, or whatever Orbax raises, when it is damaged for any of the processes.
    """
    import orbax.checkpoint as ocp

    folder = checkpoint_folder(workdir, step)
    error: Exception | None = None
    fatal_error: Exception | None = None
    try:
        position, expected = read_record(workdir, step)
        # The manager would wait for the other processes only on success, so it is not used here.
        state = ocp.StandardCheckpointHandler().restore(
            absolute(folder) / "state", args=ocp.args.StandardRestore(like)
        )
    except Exception as e:
        error = e
        if non_corruption_error(e, folder) is not None:
            fatal_error = e
    # When one process has to stop, none falls back to an earlier checkpoint.
    if not all_processes_agree(fatal_error is None):
        raise fatal_error or OSError(f"{folder}: another process cannot read it")
    # What is damaged for one process is restored by none.
    if not all_processes_agree(error is None):
        raise error or DamagedCheckpoint("it is damaged for another process")
    frozen = fingerprints.path_name((FROZEN,))
    expected = {name: value for name, value in expected.items() if not name.startswith(frozen)}
    compare_fingerprints(fingerprints.tree_fingerprints(state), expected)
    return state, position


def all_processes_agree(agree: bool) -> bool:
    """Whether every process passes True."""
    if jax.process_count() == 1:
        return agree
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.array([agree])).all())


def _move_aside_after(manager, workdir: str | Path, intact: int) -> None:
    """Moves aside the damaged checkpoints after step `intact`: training will save them again."""
    damaged = [step for step in manager.all_steps() if step > intact]
    if not damaged:
        return
    if jax.process_index() == 0:
        folder = as_path(workdir) / DAMAGED
        folder.mkdir(exist_ok=True)
        for step in damaged:
            names = (folder / f"{step}.{i}" for i in itertools.count())
            checkpoint_folder(workdir, step).rename(next(p for p in names if not p.exists()))
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("damaged checkpoints are aside")
    manager.reload()
