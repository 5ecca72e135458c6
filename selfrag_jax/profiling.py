"""Traces of a loop's steps, for xprof or TensorBoard; the parts of a step have names in them.

The names are those of `jax.named_scope` in models/, training/ and engine/. They change no result.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from selfrag_jax.errors import UserError
from selfrag_jax.storage.paths import as_path, is_remote

UNTRACED_STEPS = 2  # the first compiles; the second may once more, for the donated state's layout


def check_steps(steps: int) -> int:
    """Returns the value of --profile. Raises UserError if it is negative."""
    if steps < 0:
        raise UserError(f"--profile={steps}: must be a number of steps, at least 0")
    return steps


class Profile:
    """Traces `steps` steps into `folder`, after those that compile; with 0 it does nothing.

    A context manager around a loop whose steps run in `step`. When the loop ends, a trace that is
    under way is written as it is.
    """

    def __init__(self, folder: str | Path, steps: int):
        self.folder, self.steps = as_path(folder), steps
        # jax writes to a disk; a trace for a bucket is sent when it is complete.
        self._copy = TemporaryDirectory() if steps and is_remote(folder) else None
        self._seen, self._traced = 0, 0  # steps that began
        self._is_tracing = False

    def __enter__(self) -> Profile:
        return self

    def step(self, number: int, pending: Any = None) -> AbstractContextManager[Any]:
        """Starts or ends the trace if it is time to; returns the context to run a step in.

        pending: arrays of the previous step, which are waited for, so that a trace has whole steps.
        """
        if not self.steps:
            return nullcontext()
        if self._is_tracing and self._traced == self.steps:
            self._stop(pending)
        if self._seen == UNTRACED_STEPS:
            self._start(pending)
        self._seen += 1
        if not self._is_tracing:
            return nullcontext()
        self._traced += 1
        from jax.profiler import StepTraceAnnotation

        return StepTraceAnnotation("step", step_num=number)

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        if self._is_tracing:
            self._stop()
        elif self.steps and not self._traced and error is None:
            print(
                f"--profile={self.steps}: nothing was traced, as no more than the first "
                f"{UNTRACED_STEPS} steps ran, which compile",
                file=sys.stderr,
            )

    def _start(self, pending: Any) -> None:
        import jax

        jax.block_until_ready(pending)
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # each Python call would be an event, and take its time
        jax.profiler.start_trace(
            self._copy.name if self._copy else self.folder, profiler_options=options
        )
        self._is_tracing = True

    def _stop(self, pending: Any = None) -> None:
        import jax

        jax.block_until_ready(pending)
        self._is_tracing = False
        jax.profiler.stop_trace()
        if self._copy:
            for file in Path(self._copy.name).rglob("*"):
                if file.is_file():
                    name = file.relative_to(self._copy.name).as_posix()
                    (self.folder / name).write_bytes(file.read_bytes())
        print(
            f"{self._traced} steps traced: {self.folder}; to look at them: "
            f"pip install xprof && xprof --logdir={self.folder}",
            file=sys.stderr,
        )
