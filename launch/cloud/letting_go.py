"""Lets go of a TPU when a command fails or is interrupted, so that nothing is paid for idle."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from cloud import records
from cloud.failures import CloudFailure
from cloud.queue import Queue
from selfrag_jax.errors import StageFailed


class NothingMade(CloudFailure):
    """`create` was refused: nothing of ours exists, though another's may, under the same name."""


def end_on_signals() -> None:
    """Makes SIGTERM, and SIGHUP of a closed terminal, end the program as Ctrl-C does."""

    def end(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, end)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
        signal.signal(signal.SIGHUP, end)


@contextmanager
def frees_quota(q: Queue, on_exit: bool, on_failure: bool = True) -> Iterator[None]:
    """Deletes the request when the block is left by an error, if that was asked for.

    on_exit: it was asked for. on_failure: for any error, not for an interruption alone.
    """
    try:
        yield
    except NothingMade:
        raise
    except BaseException as e:
        interrupted = not isinstance(e, Exception)  # Ctrl-C, a signal
        if on_exit and (on_failure or interrupted):
            free(q)
        elif not isinstance(e, StageFailed):
            print(
                f"\n{q.record.name} is still there, and holds quota: "
                f"python launch/tpu.py delete --name={q.record.name}",
                file=sys.stderr,
            )
        raise


def free(q: Queue) -> None:
    """Deletes the request and its record. Says so if it cannot."""
    try:
        done = q.delete(wait=False)
        if not q.runner.dry_run:
            records.forget(q.record.name)
        print(f"\n{q.record.name}: {done}", file=sys.stderr)
    except CloudFailure as e:
        print(f"\n{e}\nit is still there, and holds quota: delete it by hand", file=sys.stderr)
