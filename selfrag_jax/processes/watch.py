"""Notices that a process of the job has failed or gone, and stops this one with a line about it.

Each process writes a state into the store every two seconds: a count that goes up, and at its end
an exit status. A thread of every process reads the states of the others. One that has failed, or
whose count has not changed for `SECONDS_SILENT`, stops all.

If process 0 dies the store dies with it, and JAX aborts the others at once, with a stack trace and
no name. So each of them has a small helper process that outlives it and prints the line.
"""

from __future__ import annotations

import _thread
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from selfrag_jax.processes.group import Group

SECONDS_SILENT = 30.0  # of a process that is then taken for dead
_INTERVAL = 2.0
_GRACE = 10.0  # seconds for this process to end by itself, unless it waits for a lost one
_SAVING = 120.0  # seconds that process 0 waits for the others' parts of a last checkpoint
_STATES = "selfrag/state"
_AGAIN = "The same command continues where it was"

# Reads its input until this process ends. A byte there says that it ended by itself.
_HELPER = """
import socket, sys
if not sys.stdin.buffer.read():
    try:
        socket.create_connection((sys.argv[1], int(sys.argv[2])), 3)
    except OSError:
        sys.stderr.write(sys.argv[3] + "\\n")
"""


class Watch:
    """Watches the other processes of a group, in a thread, from `start` to `finish`."""

    def __init__(
        self, group: Group, client: Any, command: str, address: str, saves_on_sigterm: bool
    ):
        """address: of the coordinator, HOST:PORT. saves_on_sigterm: see `joining.join`."""
        self._group, self._client, self._command = group, client, command
        self._address, self._saves_on_sigterm = address, saves_on_sigterm
        self._done = threading.Event()  # nothing more to watch
        self._main_ended = threading.Event()
        self._status: int | None = None
        self._message, self._beat = "", 0
        self._exit_with: int | None = None  # because of another process
        self._lost: int | None = None  # the process that is gone
        self._everyone_ended = threading.Event()
        self._lock = threading.Lock()
        self._last_change = {i: (time.monotonic(), -1) for i in range(group.count)}
        self._helper: subprocess.Popen | None = None
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGUSR1, self._interrupt)
        if not self._group.is_main:
            self._helper = self._start_helper()
        self._thread.start()

    def finish(self, status: int, message: str) -> None:
        """Tells the others how this process ends.

        After a success, waits until all have succeeded; raises SystemExit if one fails meanwhile.
        After a failure, process 0 waits a little, so that the others see the reason.
        """
        if self._exit_with is not None:  # for another's failure, which all have seen
            message = ""
        with self._lock:
            self._status, self._message = status, message.replace("\n", " ")
        self._write_state()
        if status == 0:
            while not self._everyone_ended.wait(0.2):
                pass
        else:
            self._main_ended.set()
            if self._group.is_main:
                saves = status == 143 and self._saves_on_sigterm
                self._everyone_ended.wait(_SAVING if saves else _GRACE + 2 * _INTERVAL)
        self._done.set()
        self._thread.join(2 * _INTERVAL)
        if self._helper is not None and self._helper.stdin is not None:
            with contextlib.suppress(OSError):
                self._helper.stdin.write(b".")
                self._helper.stdin.close()

    def another_is_gone(self, error: BaseException) -> bool:
        """Whether another process is found to be gone within the time that this takes."""
        if isinstance(error, SystemExit):
            return self._exit_with is not None
        with contextlib.suppress(SystemExit):
            limit = time.monotonic() + SECONDS_SILENT + 3 * _INTERVAL
            while self._exit_with is None and time.monotonic() < limit:
                time.sleep(0.2)
        return self._exit_with is not None

    # ---- the thread ------------------------------------------------------------------------------
    def _run(self) -> None:
        while not self._done.wait(_INTERVAL):
            try:
                self._write_state()
                states = self._read_states()
            except RuntimeError:  # process 0 is gone: JAX is about to abort this process
                return
            if self._exit_with is None and (found := self._fault(states)):
                self._stop(*found)
            if all(s.get("status") is not None or i == self._lost for i, s in states.items()):
                self._everyone_ended.set()

    def _write_state(self) -> None:
        with self._lock:
            self._beat += 1
            state = {"beat": self._beat, "status": self._status, "message": self._message[:500]}
        self._client.key_value_set(
            f"{_STATES}/{self._group.index}", json.dumps(state), allow_overwrite=True
        )

    def _read_states(self) -> dict[int, dict[str, Any]]:
        states: dict[int, dict[str, Any]] = {i: {} for i in range(self._group.count)}
        for key, text in self._client.key_value_dir_get(f"{_STATES}/"):
            states[int(key.rpartition("/")[2])] = json.loads(text)
        return states

    def _fault(self, states: dict[int, dict[str, Any]]) -> tuple[str, int] | None:
        """The reason to stop, and the exit status, if there is one."""
        now = time.monotonic()
        for i, state in states.items():
            if i == self._group.index:
                continue
            status, beat = state.get("status"), state.get("beat", 0)
            if status and not (status == 143 and self._saves_on_sigterm):
                why = state["message"] or f"ended with status {status}"
                return f"{self._group.name(i)}: {why}", status
            if beat != self._last_change[i][1]:
                self._last_change[i] = now, beat
            silent = now - self._last_change[i][0]
            if status is None and silent > SECONDS_SILENT:
                self._lost = i
                return (
                    f"{self._group.name(i)} is gone: nothing was heard of it for {silent:.0f} "
                    f"seconds. {_AGAIN}"
                ), 1
        return None

    def _stop(self, why: str, status: int) -> None:
        self._exit_with = status
        print(f"selfrag {self._command}: stops: {why}", file=sys.stderr, flush=True)
        # Raises SystemExit in the main thread, unless that waits for a lost process.
        _thread.interrupt_main(signal.SIGUSR1)
        if self._main_ended.wait(_GRACE):
            return
        with self._lock:
            self._status = status
        with contextlib.suppress(RuntimeError):
            self._write_state()
        if self._group.is_main:
            time.sleep(2 * _INTERVAL)  # the others read their reason in this process
        os._exit(status)

    def _interrupt(self, *_: Any) -> None:
        if self._exit_with is not None and not self._main_ended.is_set():
            sys.exit(self._exit_with)

    def _start_helper(self) -> subprocess.Popen:
        host, _, port = self._address.rpartition(":")
        line = (
            f"selfrag {self._command}: stopped for {self._group.name(0)}, which coordinates the "
            f"others and does not answer at {self._address}. {_AGAIN}"
        )
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _HELPER, host.strip("[]"), port, line],
            stdin=subprocess.PIPE,
            start_new_session=True,  # a signal to this process's group is not for the helper
        )
