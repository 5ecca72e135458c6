"""Turns SIGTERM into a request to stop after the current step."""

from __future__ import annotations

import os
import signal

import jax


class StopSignal:
    """Within the block, SIGTERM is noted instead of ending the process (main thread only).

    Of several processes one alone may get the signal: they agree on the step by JAX's preemption service.
    """

    def __init__(self, saved):
        self._saved, self.noted, self._several = saved, False, jax.process_count() > 1

    def caught(self, step: int) -> bool:
        """Whether this is the step to stop at."""
        if self._several:
            self.noted = self._saved.reached_preemption(step)
        return self.noted

    def __enter__(self):
        try:
            self._old = None if self._several else signal.signal(signal.SIGTERM, self._catch)
        except ValueError:  # not in the main thread
            self._old = None
        return self

    def _catch(self, *_):
        self.noted = True
        os.write(2, b"\nSIGTERM: saving a checkpoint before leaving\n")

    def __exit__(self, *_):
        if self._old is not None:
            signal.signal(signal.SIGTERM, self._old)
