"""The hosts of a TPU: runs scripts on each, copies files to each, and names those that fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from cloud.failures import CloudFailure, explain_on_host
from cloud.processes import LIMIT, Finished, Runner
from cloud.records import Record

AT_A_TIME = 16  # connections; each is a process of gcloud


@dataclass(frozen=True, order=True)
class Host:
    node: str  # the TPU VM, one for each slice
    worker: int
    label: str  # "host 2", "slice 1 host 2"


def hosts_of(record: Record) -> list[Host]:
    several = record.slices > 1
    return [
        Host(node, worker, f"slice {i} host {worker}" if several else f"host {worker}")
        for i, node in enumerate(record.nodes)
        for worker in range(record.slice.hosts)
    ]


@dataclass(frozen=True)
class Hosts:
    """All hosts of a TPU, reached through gcloud."""

    record: Record
    runner: Runner

    @property
    def all(self) -> list[Host]:
        return hosts_of(self.record)

    def ssh(self, host: Host, script: str) -> list[str]:
        """Returns the command that runs a script on a host."""
        return self._gcloud("ssh", host, host.node) + [f"--command={script}"]

    def copy(self, host: Host, file: str, target: str) -> list[str]:
        """Returns the command that copies a file to `target`, below the host's home folder."""
        return self._gcloud("scp", host, file, f"{host.node}:{target}")

    def _gcloud(self, verb: str, host: Host, *arguments: str) -> list[str]:
        record = self.record
        command = ["gcloud", "compute", "tpus", "tpu-vm", verb, *arguments]
        command += [f"--zone={record.zone}", f"--worker={host.worker}", "--quiet"]
        if record.project:
            command.append(f"--project={record.project}")
        if record.internal_ips:
            command.append("--internal-ip")
        return command

    def run(self, what: str, script: str, seconds: float = LIMIT) -> dict[Host, Finished]:
        """Runs a script on every host. Raises CloudFailure that names the hosts where it failed."""
        return self.each(what, lambda host: self.ssh(host, script), seconds)

    def each(
        self, what: str, command: Callable[[Host], Sequence[str]], seconds: float = LIMIT
    ) -> dict[Host, Finished]:
        """Runs a command for every host. Raises CloudFailure that names the hosts that failed."""
        results = self.attempt(command, seconds)
        failed = {host: done for host, done in results.items() if done.status}
        if failed:
            raise _failure(what, failed, len(results))
        return results

    def attempt(
        self, command: Callable[[Host], Sequence[str]], seconds: float = LIMIT
    ) -> dict[Host, Finished]:
        """Runs a command for every host, whatever its status. seconds: at most, on each."""
        first, *others = self.all
        if self.runner.dry_run:
            return {host: self.runner.attempt(command(host)) for host in self.all}
        # One host first: gcloud creates the ssh key then, and registers it with the project.
        results = {first: self.runner.attempt(command(first), seconds)}
        with ThreadPoolExecutor(AT_A_TIME) as pool:
            done = pool.map(lambda host: self.runner.attempt(command(host), seconds), others)
            try:
                results |= dict(zip(others, done, strict=True))
            except BaseException:  # Ctrl-C reaches this thread only
                pool.shutdown(wait=False, cancel_futures=True)
                self.runner.interrupt()
                raise
        return results


def unreachable(done: Finished) -> bool:
    """Whether a command failed on the way to its host."""
    if not done.status:
        return False
    kind, _, _ = explain_on_host(done.output + done.errors, done.status)
    return kind in ("ssh", "not_found", "network", "timeout")


def _failure(what: str, failed: dict[Host, Finished], total: int) -> CloudFailure:
    """Returns the failure of `what` on some of the hosts, in the words of the first."""
    names = ", ".join(host.label for host in failed)
    first = next(iter(failed.values()))
    kind, said, remedy = explain_on_host(first.output + first.errors, first.status)
    parts = [f"{'ssh' if kind == 'ssh' else what} failed on {names} of {total}: {said}"]
    if others := total - len(failed):
        parts.append(f"the other {others} answered")
    if remedy:
        parts.append(remedy)
    return CloudFailure(kind, "; ".join(parts))
