"""Turns SIGTERM into a request to stop after the current step."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import jax

if TYPE_CHECKING:
    import orbax.checkpoint as ocp


class StopSignal:
    """Inside its `with` block SIGTERM is recorded and does not end the process.

    Works in the main thread only; elsewhere SIGTERM keeps its effect. In a run of several
    processes perhaps only one gets the signal: JAX's preemption service makes all of them stop at
    the same step.
    """

    def __init__(self, manager: ocp.CheckpointManager):
        self.received = False
        self._manager = manager
        self._multi_process = jax.process_count() > 1

    def should_stop(self, step: int) -> bool:
        """Returns whether training should stop after `step`."""
        if self._multi_process:
            self.received = self._manager.reached_preemption(step)
        return self.received

    def __enter__(self) -> StopSignal:
        try:
            self._previous = (
                None if self._multi_process else signal.signal(signal.SIGTERM, self._catch)
            )
        except ValueError:  # not in the main thread
            self._previous = None
        return self

    def _catch(self, *_) -> None:
        self.received = True
        os.write(2, b"\nSIGTERM: saving a checkpoint before exiting\n")

    def __exit__(self, *_) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
