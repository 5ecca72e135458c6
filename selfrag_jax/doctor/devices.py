"""The devices that JAX finds, asked for in another process: a TPU that hangs cannot hang us."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

from selfrag_jax import accelerators

_MARK = "devices of JAX: "
# The memory of a GPU is what JAX would reserve: three quarters, unless told otherwise.
_PROGRAM = f"""
import json, jax
def described(d):
    memory = (d.memory_stats() or {{}}).get("bytes_limit") if d.platform != "cpu" else None
    return dict(platform=d.platform, kind=d.device_kind, memory=memory)
print({_MARK!r} + json.dumps([described(d) for d in jax.local_devices()]))
"""


@dataclass
class DeviceProbe:
    """A process that starts JAX's devices and prints them."""

    process: subprocess.Popen[bytes]
    output: IO[bytes]
    errors: IO[bytes]
    started: float

    @classmethod
    @contextmanager
    def start(cls) -> Iterator[DeviceProbe]:
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        # Files, not pipes: a process that cannot be killed would keep a pipe open.
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM],
                stdin=subprocess.DEVNULL, stdout=output, stderr=errors, env=environment,
                start_new_session=True,
            )  # fmt: skip
            yield cls(process, output, errors, time.monotonic())

    def report(self, timeout: float) -> dict[str, Any]:
        """Waits until `timeout` seconds after the start; returns devices, and what went wrong."""
        try:
            self.process.wait(max(0.0, self.started + timeout - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
        devices: list[dict[str, Any]] = []
        for line in self._text(self.output).splitlines():
            if line.startswith(_MARK):
                devices = json.loads(line.removeprefix(_MARK))
        attached = [name for name, has in _ATTACHED.items() if has()]
        messages = [line for line in self._text(self.errors).splitlines() if line.strip()]
        problem = _problem(devices, attached, messages, self.process.returncode, timeout)
        return {"found": devices, "attached": attached, "problem": problem, "messages": messages}

    @staticmethod
    def _text(file: IO[bytes]) -> str:
        file.seek(0)
        return file.read().decode(errors="replace")


_ATTACHED = {"gpu": accelerators.has_gpu, "tpu": accelerators.has_tpu}


def _problem(
    devices: list[dict[str, Any]],
    attached: list[str],
    messages: list[str],
    status: int | None,
    timeout: float,
) -> str | None:
    """Returns in one line what is wrong, or None."""
    last = f": {messages[-1]}" if messages else ""
    if status is None:
        return (
            f"JAX found no devices within {timeout:.0f} s (--timeout). On a slice of several "
            "hosts it waits for all of them: run `selfrag doctor` on each at the same time. A TPU "
            f"may also be held by another process{last}"
        )
    if not devices:
        return f"JAX does not start (status {status}){last}"
    if attached and all(d["platform"] == "cpu" for d in devices):
        if platforms := os.environ.get("JAX_PLATFORMS"):
            return f"this machine has a {attached[0]}, but JAX_PLATFORMS={platforms} hides it"
        return (
            f"this machine has device files of a {attached[0]}, but JAX uses the CPU (without its "
            f"plugin: pip install 'selfrag-jax[{attached[0]}]'){last}"
        )
    return None
