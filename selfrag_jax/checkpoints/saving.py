"""Checkpoints while training: saving in the background, resuming from the latest intact one.

Orbax is imported within the functions: importing it takes long, and not every command needs it.
"""

from __future__ import annotations

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
    Damaged,
    _compare,
    _record,
    latest_intact,
    non_corruption_error,
    read_record,
)
from selfrag_jax.checkpoints.orbax_errors import silence_secondary_errors
from selfrag_jax.checkpoints.workdirs import CHECKPOINTS, DAMAGED, FROZEN, NO_LOSS, _loss_in
from selfrag_jax.errors import UserError
from selfrag_jax.files import write_json
from selfrag_jax.models.params import Params


# ---- while training --------------------------------------------------------------------------------------------------
def checkpoint_manager(workdir: str | Path, keep_last: int, keep_best: int):
    """Orbax's CheckpointManager of a workdir. keep_best: how many beside the last ones are kept, by their loss."""
    import orbax.checkpoint as ocp
    from orbax.checkpoint import checkpoint_managers as policies

    _mend_losses(Path(workdir) / CHECKPOINTS)

    class BestOfTheOthers(policies.BestN):
        def should_preserve(self, checkpoints, *, context):
            last = [False] * len(checkpoints[-keep_last:])
            return [*super().should_preserve(checkpoints[:-keep_last], context=context), *last]

    best = BestOfTheOthers(
        get_metric_fn=_loss, reverse=True, n=keep_best, keep_checkpoints_without_metrics=False
    )
    kept = policies.AnyPreservationPolicy(
        [policies.LatestN(keep_last), *([best] if keep_best else [])]
    )
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
            print(
                f"warning: {file}: the loss cannot be read; this checkpoint counts as none of the best",
                file=sys.stderr,
            )
            write_json(file, {"loss": NO_LOSS})


def _loss(metrics: dict[str, float]) -> float:
    return metrics["loss"]


def save_checkpoint(saved, step: int, state: Any, data: dict[str, Any], loss: float) -> None:
    """Saves in the background. data: the position of the data iterator; loss: what the best checkpoint is chosen by."""
    import orbax.checkpoint as ocp

    # As it is now: the caller may go on changing what `data` holds while it is being written.
    record = json.loads(json.dumps(_record(data, fingerprints.tree_fingerprints(state))))
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
def writing_checkpoints(saved, workdir: str | Path) -> Iterator[Any]:
    """Within the block checkpoints are written in the background; leaving it, in whatever way, waits for the last one.

    Raises OSError when one could not be written, because the disk is full for example. The ones before it are kept.
    """
    silence_secondary_errors()
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

    with writing_checkpoints(ocp.StandardCheckpointer(), workdir) as one:
        one.save(
            Path(workdir).absolute() / FROZEN,
            frozen,
            save_args=jax.tree.map(_by_layer, frozen),
            force=True,
        )


def check_frozen(workdir: str | Path, step: int, frozen: Params) -> None:
    """Raises BadInput when these are not the weights beside which the checkpoint's LoRA was trained."""
    _, wanted = read_record(Path(workdir), step)
    try:
        _compare(
            fingerprints.tree_fingerprints({FROZEN: frozen}),
            wanted,
            fingerprints.path_name((FROZEN,)),
        )
    except Damaged as e:
        raise UserError(
            f"{workdir}: the base is not the one that this training began with ({e}); choose another workdir"
        ) from e


def restore_last(saved, workdir: str | Path, like: Any) -> tuple[Any, dict[str, Any]] | None:
    """State shaped and sharded `like` the given tree, and the position of the data iterator; None if nothing was saved.

    A damaged checkpoint is moved to `damaged/`, with a warning, and the one before it is taken. Raises BadInput when all
    are damaged.
    """
    found = latest_intact(saved.all_steps(), workdir, lambda step: _restore(workdir, step, like))
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
    fatal = error is not None and non_corruption_error(error, what) is not None
    if not _agreed(not fatal):  # none goes on to an earlier one where another has stopped
        raise error if fatal else OSError(f"{what}: another process cannot read it")
    if not _agreed(error is None):  # what is damaged for one process, none takes
        raise error or Damaged("it is damaged for another process")
    prints = fingerprints.tree_fingerprints(found)
    frozen = fingerprints.path_name((FROZEN,))
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
            free = next(
                p
                for i in range(len(later) + 100)
                if not (p := Path(workdir) / DAMAGED / f"{step}.{i}").exists()
            )
            free.parent.mkdir(exist_ok=True)
            (Path(workdir) / CHECKPOINTS / str(step)).rename(free)
    if later:
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices("damaged checkpoints are aside")
        saved.reload()
