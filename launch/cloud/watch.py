"""Restarts a stage that was pre-empted, died or hangs; it resumes from its last checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cloud import queue, records, remote
from cloud.failures import CloudFailure, explain_on_host
from cloud.hosts import Host, Hosts, unreachable
from cloud.jobs import check_startable, flags_of_job, install, start, stop
from cloud.processes import Runner
from cloud.queue import Looks, Patience, Queue
from cloud.records import Record
from selfrag_jax.errors import StageFailed, UserError

_FIRST_BACKOFF, _LONGEST_BACKOFF = 30.0, 900.0  # seconds before a restart; doubles each time
_WRONG_INPUT = 2  # the exit status of `selfrag` that a restart cannot change
_PROBE = 120.0  # seconds, at most

clock: Callable[[], float] = time.monotonic


@dataclass(frozen=True)
class Diagnosis:
    """What a look at the hosts came to.

    kind: finished, runs, waits (in the queue, or for TPU VMs), unreachable, doubtful (lost, but to
    be looked at again), lost, died, hangs, or wrong (input).
    """

    kind: str
    text: str


@dataclass
class Watcher:
    """Looks after one TPU. What it remembers between two looks is here."""

    record: Record
    runner: Runner
    hang_minutes: float
    poll: float  # seconds
    max_restarts: int
    tell: Callable[[str], None] = print
    restarts: int = 0
    _backoff: float = _FIRST_BACKOFF
    _progress: str = ""
    _progress_at: float = field(default_factory=lambda: clock())
    _cpu: dict[Host, float] = field(default_factory=dict)  # when the progress was last new

    def __post_init__(self) -> None:
        self._looks = Looks(self.poll)

    # ---- looking ---------------------------------------------------------------------------------
    def look(self) -> Diagnosis:
        """Returns how the request and all hosts are doing. Raises StageFailed if it was deleted."""
        self._read_record()
        state = Queue(self.record, self.runner).state()
        if state.works:
            return self.judge(check_hosts(self.record, self.runner))
        return Diagnosis(self._looks.verdict(state), str(state))

    def _read_record(self) -> None:
        """Other commands may have deleted the TPU, or started another stage on it."""
        if not records.path(self.record.name).is_file():
            raise StageFailed(f"{self.record.name}: was deleted; it is not made again")
        self.record = records.read(self.record.name)

    def judge(self, healths: dict[Host, remote.Health | str]) -> Diagnosis:
        """Returns what this look means, given the earlier ones."""
        diagnosis = diagnose(healths)
        if diagnosis.kind in ("unreachable", "lost"):
            if self._looks.bad():
                return Diagnosis("lost", diagnosis.text)
            unsure = "doubtful" if diagnosis.kind == "lost" else "unreachable"
            return Diagnosis(unsure, diagnosis.text)
        self._looks.good()
        if diagnosis.kind == "runs" and (hang := self._hang(healths)):
            return hang
        return diagnosis

    def _hang(self, healths: dict[Host, remote.Health | str]) -> Diagnosis | None:
        found = {host: h for host, h in healths.items() if isinstance(h, remote.Health)}
        progress = next((h.progress for h in found.values() if h.progress), "")
        cpu = {host: h.cpu_seconds for host, h in found.items()}
        if progress != self._progress or not self._cpu:
            if self._progress:
                self._backoff = _FIRST_BACKOFF  # it has worked since the last restart
            self._progress, self._progress_at, self._cpu = progress, clock(), cpu
        silent = clock() - self._progress_at
        # A log that was silent before we came counts too.
        logged = min((h.log_age for h in found.values() if h.progress), default=0.0)
        minutes = max(silent, logged) / 60
        if minutes < self.hang_minutes:
            return None
        return Diagnosis("hangs", hang_text(found, self._cpu, progress, minutes))

    # ---- acting ----------------------------------------------------------------------------------
    def repair(self, diagnosis: Diagnosis) -> None:
        """Starts the stage again, on a new TPU if this one is lost.

        Raises UserError, before anything is deleted, if the stage could not be started then.
        """
        self._read_record()
        check_startable(self.record, self.runner)
        if diagnosis.kind == "lost":
            make_again(self.record, self.runner, self.poll, self.tell)
        else:  # what is left of it waits for hosts that are gone
            stop(self.record, self.runner)
        self._looks.good()
        install(self.record, self.runner)  # does nothing where it was done
        self.record = start(self.record, self.runner)
        self._progress, self._progress_at, self._cpu = "", clock(), {}
        self.tell(f"{self.record.name}: started again; it goes on from its last checkpoint")

    def watch(self) -> None:
        """Returns when the stage has finished.

        Raises StageFailed when it has been started again `max_restarts` times, and at once for a
        command that a restart cannot mend.
        """
        patience = Patience(self.record.name, self.poll, self.tell)
        while True:
            try:
                diagnosis = self.look()
            except CloudFailure as e:
                patience.failed(e)
                continue
            patience.worked()
            if diagnosis.kind == "finished":
                self.tell(f"{self.record.name}: {diagnosis.text}")
                return
            if diagnosis.kind == "wrong":
                raise StageFailed(f"{self.record.name}: {diagnosis.text}")
            if diagnosis.kind in ("lost", "died", "hangs"):
                self._restart(diagnosis)
            queue.pause(self.poll)

    def _restart(self, diagnosis: Diagnosis) -> None:
        self.tell(f"{self.record.name}: {diagnosis.text}")
        if self.restarts >= self.max_restarts:
            raise StageFailed(
                f"{self.record.name}: gave up after {self.restarts} restarts "
                f"(--max_restarts); the last reason: {diagnosis.text}"
            )
        self.restarts += 1
        self.tell(
            f"{self.record.name}: restart {self.restarts} of {self.max_restarts} in "
            f"{self._backoff:.0f} s"
        )
        queue.pause(self._backoff)
        self._backoff = min(2 * self._backoff, _LONGEST_BACKOFF)
        try:
            self.repair(diagnosis)
        except StageFailed as e:  # it may be lost once more while it is made
            self.tell(f"{self.record.name}: {e}")


def make_way(record: Record, runner: Runner, tell: Callable[[str], None]) -> None:
    """Stops a stage that only some hosts have started. Raises StageFailed if one runs otherwise."""
    found = {h: x for h, x in check_hosts(record, runner).items() if isinstance(x, remote.Health)}
    running = [host.label for host, health in found.items() if health.alive]
    ours = all(health.started for health in found.values() if health.alive)
    if running and ours and not all(health.started for health in found.values()):
        tell(f"{record.name}: runs on {', '.join(running)} only; stopping it")
        stop(record, runner)
    elif running:
        raise StageFailed(f"{record.name}: a stage runs already on {', '.join(running)}")


def make_again(record: Record, runner: Runner, poll: float, tell: Callable[[str], None]) -> None:
    """Deletes a request and asks for the same again; waits until it is active.

    Spot VMs cannot be restarted, so that a pre-empted one has to go first. Raises UserError, before
    anything is deleted, if the same cannot be asked for.
    """
    if record.startup and not Path(record.startup).is_file():
        raise UserError(f"{record.startup}: the startup script of {record.name} is gone")
    q = Queue(record, runner)
    tell(f"{record.name}: {q.delete(wait=True)}")
    q.create()
    state = q.wait(poll, tell)
    if not state.works:
        raise StageFailed(f"{record.name}: {state}")


def check_hosts(record: Record, runner: Runner) -> dict[Host, remote.Health | str]:
    """Returns the health of each host, or why it was not reached.

    Raises CloudFailure if gcloud does not let us connect at all.
    """
    start = record.job.start if record.job else ""
    script = remote.probe(record.name, flags_of_job(record).get("workdir"), start)
    hosts = Hosts(record, runner)
    results = hosts.attempt(lambda host: hosts.ssh(host, script), _PROBE)
    healths: dict[Host, remote.Health | str] = {}
    for host, done in results.items():
        if not done.status:
            healths[host] = remote.read_health(done.output)
            continue
        kind, said, advice = explain_on_host(done.output + done.errors, done.status)
        if kind in ("login", "api", "project", "permission"):  # it is we who are shut out
            raise CloudFailure(kind, f"{host.label}: {said}; {advice}")
        what = "not reached" if unreachable(done) else "the look at it failed"
        healths[host] = f"{what} ({said[:120]})"
    return healths


def diagnose(healths: dict[Host, remote.Health | str]) -> Diagnosis:
    """Returns what the hosts' health means for the job, naming the hosts that matter."""
    silent = {host: h for host, h in healths.items() if isinstance(h, str)}
    found = {host: h for host, h in healths.items() if isinstance(h, remote.Health)}
    if silent:
        text = ", ".join(f"{host.label}: {h}" for host, h in silent.items())
        return Diagnosis("unreachable", text)
    if gone := [host.label for host, h in found.items() if h.preempted]:
        return Diagnosis("lost", f"pre-empted: {', '.join(gone)}")
    if others := [host.label for host, h in found.items() if h.alive and not h.started]:
        return Diagnosis("wrong", f"another stage runs on {', '.join(others)}")
    if all(h.exit_status == 0 for h in found.values()):
        return Diagnosis("finished", "the stage has finished on all hosts")
    wrong = {host: h for host, h in found.items() if h.exit_status == _WRONG_INPUT}
    if wrong:
        host, health = next(iter(wrong.items()))
        return Diagnosis(
            "wrong", f"the stage refuses its input on {host.label}: {health.last_line[:300]}"
        )
    dead = {host: h for host, h in found.items() if not h.alive and h.exit_status != 0}
    if dead:
        texts = [f"{host.label}: {_end(h)}" for host, h in dead.items()]
        return Diagnosis("died", "; ".join(texts))
    return Diagnosis(
        "runs", next((h.progress for h in found.values() if h.progress), "no step yet")
    )


def _end(h: remote.Health) -> str:
    """Says how a stage has ended."""
    if h.exit_status is None:
        text = "the process is gone" if h.started else "nothing runs"
    else:
        text = f"exit status {h.exit_status}"
    return f"{text} ({h.last_line[:160]})" if h.last_line else text


def hang_text(
    found: dict[Host, remote.Health], before: dict[Host, float], progress: str, minutes: float
) -> str:
    """Says that nothing has progressed, and which host is the likely cause.

    before: CPU seconds of each host when the last progress was seen. The host that stands still
    among others that wait busily is the one to look at, as is one that has finished alone.
    """
    text = f"no progress for {minutes:.0f} minutes (last: {progress or 'none'})"
    if ended := [host.label for host, h in found.items() if h.exit_status is not None]:
        return f"{text}; ended while the others wait: {', '.join(ended)}"
    idle = [host.label for host, h in found.items() if h.cpu_seconds - before.get(host, 0.0) < 1.0]
    if idle and len(idle) < len(found):
        return f"{text}; no CPU time was used on {', '.join(idle)}"
    named = "all hosts stand still" if idle else "all hosts are busy"
    return f"{text}; {named}: {', '.join(host.label for host in found)}"
