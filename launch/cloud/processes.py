"""Runs gcloud, kubectl and git with lists of arguments; with --dry_run prints them instead."""

from __future__ import annotations

import json
import shlex
import shutil
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

    def attempt(self, command: Sequence[str]) -> Finished:
        """Runs a command to its end, whatever its status. With dry_run it counts as successful."""
        if self.dry_run:
            line = shlex.join(command)
            self.printed.append(line)
            print(line)
            return Finished(0, "", "")
        require_program(command[0])
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL
        )
        return Finished(done.returncode, done.stdout, done.stderr)

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


def require_program(name: str) -> None:
    """Raises UserError if a program is not installed."""
    if shutil.which(name) is None:
        raise UserError(f"{name} is not installed: {INSTALL.get(name, 'not on the PATH')}")
