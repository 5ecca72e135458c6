"""The code that needs Orbax's private parts. Written for orbax-checkpoint 0.12.

  - `open_tree` opens the arrays of a saved tree without reading them, so that a caller may read one
    item of several, or one layer at a time.
  - `save_streamed` writes arrays that are produced part by part while they are written.
  - `preservation_policy` keeps the best checkpoints beside the last ones.

Orbax's public API always holds whole arrays, so the first two override handlers of array types,
including their private methods `_background_serialize` and `_open_and_write`. Check this file when
Orbax is upgraded.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint import checkpoint_managers, future, type_handlers
from orbax.checkpoint._src.serialization import tensorstore_utils

from selfrag_jax.checkpoints.orbax_errors import silence_secondary_errors
from selfrag_jax.storage.paths import absolute


def _tree_handler(*handlers: tuple[type, Any]) -> ocp.PyTreeCheckpointHandler:
    """Orbax's handler of trees, with these (leaf type, handler) pairs instead of its defaults."""
    registry = type_handlers.create_type_handler_registry(*handlers)
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


# ---- reading ---------------------------------------------------------------------------------
class _OpenOnlyHandler(type_handlers.NumpyHandler):
    """Opens arrays instead of reading them, whatever type they were saved from."""

    _array_metadata_store = None  # Orbax warns when it is missing; chunks are found without it

    def __init__(self, type_name: str):
        super().__init__()
        self._type_name = type_name

    def typestr(self) -> str:
        """The type name by which Orbax looks up the handler of a saved array."""
        return self._type_name

    async def deserialize(self, infos, args=None):
        opened = []
        for info in infos:
            spec = tensorstore_utils.build_array_read_spec(
                info, use_ocdbt=info.is_ocdbt_checkpoint, metadata_key=None
            )
            opened.append(await ts.open(ts.Spec(spec.json), open=True, context=info.ts_context))
        return opened


def open_tree(folder: Path) -> Any:
    """The tree that Orbax saved in `folder`, as unread tensorstore arrays."""
    handler = _tree_handler(
        (np.ndarray, _OpenOnlyHandler("np.ndarray")), (jax.Array, _OpenOnlyHandler("jax.Array"))
    )
    return handler.restore(absolute(folder), args=ocp.args.PyTreeRestore())


# ---- writing ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class StreamedArray:
    """A leaf for `save_streamed`: an array that is produced part by part while it is written."""

    shape: tuple[int, ...]
    dtype: np.dtype
    stacked: bool  # True: the parts are the layers along axis 0; False: one part, the whole array
    read_parts: Callable[[], Iterator[np.ndarray]]
    on_written: Callable[[], None]  # called after the last part

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


class _StreamHandler(type_handlers.NumpyHandler):
    """Writes StreamedArray leaves as numpy arrays, one leaf at a time, in a thread of Orbax."""

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)
        self.stopped = threading.Event()

    async def _background_serialize(self, values, infos, args=None):
        for value, info, arg in zip(values, infos, args, strict=True):
            await super()._background_serialize([value], [info], [arg])

    async def serialize(self, values, infos, args=None):
        args = args or [ocp.SaveArgs()] * len(values)
        write = self._background_serialize(values, infos, args)
        return [future.CommitFutureAwaitingContractedSignals(write, name="stream")]

    async def _open_and_write(self, value: StreamedArray, tspec: dict[str, Any], ts_context):
        if value.stacked:  # a chunk per layer: else each write would rewrite the whole array
            tspec["metadata"]["chunks"] = (1, *value.shape[1:])
        array = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
        for i, part in enumerate(value.read_parts()):
            if self.stopped.is_set():
                raise InterruptedError("saving was interrupted")
            await (array[i] if value.stacked else array).write(part)
        value.on_written()


def save_streamed(folder: Path, params: Any) -> None:
    """Saves a tree of StreamedArrays as the `params` of checkpoint 0 below `folder`.

    The checkpoint's `data` is an empty object: the caller replaces it. A signal stops the writing
    and is raised when nothing is written any more.
    """
    stream = _StreamHandler()
    state_handler = _tree_handler(
        (StreamedArray, stream), (jax.Array, type_handlers.ArrayHandler())
    )
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    registry.add("state", ocp.args.PyTreeSave, state_handler)
    registry.add("data", ocp.args.JsonSave, ocp.JsonCheckpointHandler())
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    silence_secondary_errors()
    with ocp.CheckpointManager(folder, options=options, handler_registry=registry) as manager:
        state = ocp.args.PyTreeSave({"params": params})
        items = ocp.args.Composite(state=state, data=ocp.args.JsonSave({}))
        _run_shielded(partial(manager.save, 0, args=items), stream.stopped)


def _run_shielded(save: Callable[[], Any], stopped: threading.Event) -> None:
    """Runs `save` in a thread of its own, which no signal reaches.

    When a signal ends the wait, `stopped` is set, and what the signal raised propagates only after
    all of Orbax's threads have ended: one of them could still write to what the caller removes.
    """
    running = threading.Lock()
    errors: list[BaseException] = []

    def run() -> None:
        with running:
            try:
                if not stopped.is_set():
                    save()
            except BaseException as e:
                errors.append(e)

    thread = threading.Thread(target=run, name="save")
    try:
        thread.start()
        thread.join()
    except BaseException:
        stopped.set()
        with running:  # the save has ended, or will see `stopped` and not begin
            raise
    if errors:
        raise errors[0]


# ---- which checkpoints are kept --------------------------------------------------------------
def preservation_policy(
    keep_last: int, keep_best: int, loss: Callable[[Any], float]
) -> checkpoint_managers.PreservationPolicy:
    """Keeps the last checkpoints and, of the earlier ones, those with the lowest loss.

    loss: of a checkpoint's metrics.
    """
    latest = checkpoint_managers.LatestN(keep_last)
    if not keep_best:
        return checkpoint_managers.AnyPreservationPolicy([latest])

    class BestOfEarlier(checkpoint_managers.BestN):
        def should_preserve(self, checkpoints, *, context):
            earlier, last = checkpoints[:-keep_last], checkpoints[-keep_last:]
            return [*super().should_preserve(earlier, context=context), *([False] * len(last))]

    best = BestOfEarlier(
        get_metric_fn=loss, reverse=True, n=keep_best, keep_checkpoints_without_metrics=False
    )
    return checkpoint_managers.AnyPreservationPolicy([latest, best])
