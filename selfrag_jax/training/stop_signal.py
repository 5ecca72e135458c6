"""Turns SIGTERM into a request to stop, or into an end at once where there is nothing to save."""

from __future__ import annotations

import os
import signal
import socket
import threading

import jax

_SECONDS_TO_LEAVE = 0.5  # for the main thread, before the process is ended from another one
_SAVING = b"\nSIGTERM: saving a checkpoint before exiting\n"
_ENDING = b"\nSIGTERM: no step was done yet; the same command starts again\n"


def reached_preemption(count: int) -> bool:
    """Returns whether the job is to stop at `count`, which grows alike in all processes."""
    from jax.experimental import multihost_utils

    try:
        return multihost_utils.reached_preemption_sync_point(count)
    except RuntimeError:  # the preemption service is off
        return False


class StopSignal:
    """Inside its `with` block SIGTERM is recorded, and training stops after a micro-batch.

    Until `begin` there is nothing to save: SIGTERM ends the process with status 143, even while
    XLA compiles, when Python cannot handle signals.

    Works in the main thread only; elsewhere SIGTERM keeps its effect. In a run of several
    processes perhaps only one gets the signal: JAX's preemption service makes all of them stop at
    the same micro-batch, and from the beginning.
    """

    def __init__(self) -> None:
        self.received = False
        self._has_begun = False
        self._multi_process = jax.process_count() > 1
        self._is_handler = False
        self._left = threading.Event()

    def begin(self) -> None:
        """From now on there are steps to save."""
        self._has_begun = True

    def should_stop(self, count: int) -> bool:
        """Returns whether training should stop now.

        count: grows from call to call, in the same way in all processes.
        """
        if self._multi_process:
            self.received = self.received or reached_preemption(count)
        return self.received

    def __enter__(self) -> StopSignal:
        if self._multi_process or threading.current_thread() is not threading.main_thread():
            return self
        self._is_handler = True
        self._previous = signal.signal(signal.SIGTERM, self._catch)
        # Python's own handler waits until compiled code returns; a byte in a socket does not.
        self._awaits, self._wakes = socket.socketpair()
        self._wakes.setblocking(False)
        self._previous_fd = signal.set_wakeup_fd(self._wakes.fileno(), warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def _catch(self, *_) -> None:
        if not self._has_begun:
            os.write(2, _ENDING)
            raise SystemExit(143)
        if not self.received:
            os.write(2, _SAVING)
        self.received = True

    def _watch(self) -> None:
        """Ends the process on SIGTERM if the main thread is in compiled code before `begin`."""
        while numbers := self._awaits.recv(64):
            if signal.SIGTERM in numbers and not self._has_begun:
                if self._left.wait(_SECONDS_TO_LEAVE) or self._has_begun:
                    continue
                os.write(2, _ENDING)
                os._exit(143)

    def __exit__(self, *_) -> None:
        if not self._is_handler:
            return
        self._left.set()
        signal.set_wakeup_fd(self._previous_fd)
        signal.signal(signal.SIGTERM, self._previous)
        self._wakes.close()  # which ends the watcher
        self._watcher.join()
        self._awaits.close()
