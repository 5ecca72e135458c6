"""Runs gcloud, kubectl and git with lists of arguments; with --dry_run prints them instead."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cloud.failures import CloudFailure, explain
from selfrag_jax.errors import UserError

INSTALL = {
    "gcloud": "https://cloud.google.com/sdk/docs/install",
    "kubectl": "gcloud components install kubectl",
    "git": "https://git-scm.com/downloads",
}


LIMIT = 600.0  # seconds for a command; a dropped connection would otherwise hang forever
_TIMED_OUT = 124  # our status of a command that was ended, as that of `timeout`


@dataclass(frozen=True)
class Finished:
    status: int
    output: str  # stdout
    errors: str  # stderr


@dataclass
class Runner:
    """Runs commands, or only prints them in the form that can be pasted into a shell."""

    dry_run: bool = False
    printed: list[str] = field(default_factory=list)
    _running: set[subprocess.Popen[str]] = field(default_factory=set)

    def attempt(
        self, command: Sequence[str], seconds: float = LIMIT, finish: bool = False
    ) -> Finished:
        """Runs a command, whatever its status. With dry_run it counts as successful.

        seconds: it is ended after so long, and has failed. finish: Ctrl-C waits until it has ended,
        so that it is known what it did.
        """
        if self.dry_run:
            line = shlex.join(command)
            self.printed.append(line)
            print(line)
            return Finished(0, "", "")
        require_program(command[0])
        # A session of its own, so that the ssh which gcloud starts can be ended with it.
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
            stdin=subprocess.DEVNULL, start_new_session=True,
        ) as process:  # fmt: skip
            self._running.add(process)
            try:
                output, errors = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                _kill(process)
                return Finished(_TIMED_OUT, "", f"ERROR: no answer within {seconds:.0f} s\n")
            except BaseException:
                if finish:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.communicate(timeout=seconds)
                _kill(process)
                raise
            finally:
                self._running.discard(process)
        return Finished(process.returncode, output, errors)

    def interrupt(self) -> None:
        """Ends all commands that other threads wait for."""
        for process in list(self._running):
            _kill(process)

    def run(self, what: str, command: Sequence[str]) -> str:
        """Returns what a command printed. Raises CloudFailure, which says that `what` failed."""
        done = self.attempt(command)
        if done.status:
            raise explain(what, done.errors + done.output, done.status)
        return done.output

    def json(self, what: str, command: Sequence[str]) -> Any:
        """Returns the JSON that a command printed; None with dry_run."""
        output = self.run(what, command)
        if self.dry_run:
            return None
        try:
            return json.loads(output)
        except json.JSONDecodeError:
            said = output[:100]
            raise CloudFailure("other", f"{what}: {command[0]} printed no JSON: {said!r}") from None


def _kill(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:  # else its number may be another's
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def require_program(name: str) -> None:
    """Raises UserError if a program is not installed."""
    if shutil.which(name) is None:
        raise UserError(f"{name} is not installed: {INSTALL.get(name, 'not on the PATH')}")
