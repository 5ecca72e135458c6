"""Joins the processes of a job (`--distributed`), and ends them together.

`join` is called before anything touches a device. The processes first tell each other what they are
about to do, and go on only if it is the same. `leave` ends a process: where all have succeeded they
end together, and where one has failed the others learn it and stop too (watch.py).
"""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import traceback
from typing import Any

from selfrag_jax.errors import UserError
from selfrag_jax.processes import about, group
from selfrag_jax.processes.watch import Watch

_watch: Watch | None = None


def join(spec: str, command: str, settings: dict[str, Any], saves_on_sigterm: bool) -> None:
    """Makes this process one of several that run the same command.

    spec: "auto" where JAX can find the others (TPU slices, Slurm, MPI, Kubernetes), else
    "HOST:PORT,PROCESSES,INDEX". settings: the flags and the config, which must be the same in all.
    saves_on_sigterm: the command stops by JAX's preemption service, which has all processes save at
    one step; of other commands, a process that gets SIGTERM ends, and with it the job.

    Raises UserError for any other spec, and in every process if one differs from process 0 in its
    code, versions, flags or config.
    """
    global _watch
    _initialize(spec)
    import jax
    from jax._src import distributed  # jax.distributed has no public access to its store

    state = distributed.global_state
    joined = group.Group(state.process_id, state.num_processes, state.client)
    if joined.count == 1:
        return
    group.set_current(joined)
    joined.hosts = joined.gather("host", socket.gethostname())
    _watch = Watch(joined, state.client, command, str(state.coordinator_address), saves_on_sigterm)
    _watch.start()
    about.require_same(joined, settings)
    # All at once: a backend waits for the others, but not for long.
    jax.local_devices()
    if not saves_on_sigterm and signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        # JAX has put its preemption notice in the place of ours.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def leave(status: int, message: str = "") -> None:
    """Ends this process's part in the job; returns only if all processes have succeeded.

    message: what went wrong, in one line. A no-op outside a job.
    """
    global _watch
    if _watch is None:
        return
    try:
        _watch.finish(status, message)
    except SystemExit as e:  # another has failed after this one was done
        status = int(e.code or 1)
        _watch.finish(status, "")
    if status:
        # Without JAX's shutdown, which waits minutes for those that are gone.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    _watch = None
    import jax

    jax.distributed.shutdown()


def stopped_for_another(error: BaseException) -> bool:
    """Whether an unexpected error is explained by another process that has gone.

    Waits as long as it takes to know that. The watch has then printed the line that says so.
    """
    return _watch is not None and _watch.another_is_gone(error)


def report_failure(error: BaseException) -> None:
    """Prints an unexpected error and ends this process, which is one of a job; else a no-op."""
    if _watch is not None:
        traceback.print_exception(error)
        lines = str(error).splitlines() or [""]
        leave(1, f"{type(error).__name__}: {lines[0]}")


def _initialize(spec: str) -> None:
    import jax

    if spec == "auto":
        try:
            jax.distributed.initialize()
        except (ValueError, RuntimeError) as e:
            raise UserError(
                f"--distributed=auto: JAX finds no other processes here ({e}); "
                "give HOST:PORT,PROCESSES,INDEX"
            ) from None
        return
    match = re.fullmatch(r"([^,]+:\d+),(\d+),(\d+)", spec)
    if not match or int(match.group(3)) >= int(match.group(2)):
        raise UserError(
            f"--distributed={spec}: expected auto, or HOST:PORT,PROCESSES,INDEX "
            "such as 10.0.0.1:9000,4,0"
        )
    try:
        jax.distributed.initialize(
            coordinator_address=match.group(1),
            num_processes=int(match.group(2)),
            process_id=int(match.group(3)),
            # Detection would leave each process only one GPU under Slurm or Open MPI.
            cluster_detection_method="deactivate",
        )
    except RuntimeError as e:
        raise UserError(f"--distributed={spec}: {str(e).splitlines()[0]}") from None
