"""A stage on all hosts of a TPU: install its commit, start it, stop it, follow its logs."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import threading
from pathlib import Path

from cloud import packing, remote
from cloud.failures import NOISE
from cloud.hosts import Host, Hosts
from cloud.processes import Runner
from cloud.records import Job, Record
from selfrag_jax.errors import UserError


def job_of(record: Record) -> Job:
    """Raises UserError if nothing was run on this TPU yet."""
    if record.job is None:
        raise UserError(f"--name={record.name}: nothing was run on it yet; start with `run`")
    return record.job


def flags_of_job(record: Record) -> dict[str, str]:
    """Returns the flags of the stage, written --name=value or --name value."""
    arguments = record.job.arguments if record.job else ()
    found = {}
    for argument, following in zip(arguments, (*arguments[1:], ""), strict=True):
        if argument.startswith("--"):
            name, eq, value = argument.removeprefix("--").partition("=")
            found[name] = value if eq else following
    return found


def install(record: Record, runner: Runner) -> None:
    """Copies the packed commit to all hosts and installs it. Hosts that have it do nothing."""
    version = job_of(record).version
    archive = packing.archive_path(version)
    if not archive.is_file() and not runner.dry_run:
        raise UserError(f"{archive}: the packed commit is gone; start with `run` instead")
    hosts = Hosts(record, runner)
    hosts.each("copying the commit", lambda host: hosts.copy(host, str(archive), archive.name))
    hosts.run(f"installing {version}", remote.install(version, archive.name))


def start(record: Record, runner: Runner) -> None:
    """Starts the stage on all hosts, detached."""
    job, hosts = job_of(record), Hosts(record, runner)
    if job.env:
        with _EnvFile(record, job.env, runner) as file:
            target = f".{remote.FOLDER}-{record.name}-env"
            hosts.each("copying the environment", lambda host: hosts.copy(host, file, target))
    hosts.run(f"starting {job.arguments[0]}", remote.start(record.name, job.version, job.arguments))


def stop(record: Record, runner: Runner) -> None:
    """Ends the stage on all hosts; it saves a checkpoint if it still can."""
    Hosts(record, runner).run("stopping the stage", remote.stop(record.name))


class _EnvFile:
    """A private file with `export NAME=value` lines, which is removed after the block.

    Values never stand in a command line, where every user of the machine could read them.
    """

    def __init__(self, record: Record, names: tuple[str, ...], runner: Runner):
        self.path = packing.archive_path("x").with_name(f".{record.name}.env")
        self.names, self.runner = names, runner

    def __enter__(self) -> str:
        if missing := [name for name in self.names if name not in os.environ]:
            raise UserError(f"--env={','.join(missing)}: not set in this shell")
        if not self.runner.dry_run:
            lines = [f"export {name}={shlex.quote(os.environ[name])}\n" for name in self.names]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch(mode=0o600)
            self.path.chmod(0o600)
            self.path.write_text("".join(lines))
        return str(self.path)

    def __exit__(self, *_: object) -> None:
        self.path.unlink(missing_ok=True)


# ---- logs ----------------------------------------------------------------------------------------
def show_logs(record: Record, runner: Runner, lines: int, follow: bool) -> int:
    """Prints the logs of all hosts, each line with its host's name; returns how many failed."""
    hosts = Hosts(record, runner)
    script = remote.follow(record.name, lines, follow)
    commands = {host: hosts.ssh(host, script) for host in hosts.all}
    if runner.dry_run:
        for command in commands.values():
            runner.attempt(command)
        return 0
    width = max(len(host.label) for host in commands)
    lock, failed, processes = threading.Lock(), [], []

    def pump(host: Host, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if not NOISE.search(line):
                with lock:
                    print(f"{host.label:<{width}} | {line.rstrip()}", flush=True)
        if process.wait():
            failed.append(host.label)

    threads = []
    try:
        for host, command in commands.items():
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                errors="replace", stdin=subprocess.DEVNULL,
            )  # fmt: skip
            processes.append(process)
            threads.append(threading.Thread(target=pump, args=(host, process), daemon=True))
            threads[-1].start()
        for thread in threads:
            thread.join()
    finally:
        for process in processes:
            process.terminate()
    if failed:
        print(f"no log from {', '.join(sorted(failed))}", file=sys.stderr)
    return len(failed)


def saved_step(record: Record, runner: Runner) -> int | None:
    """Returns the last checkpoint's step of a workdir in a bucket; None if that is not known."""
    workdir = flags_of_job(record).get("workdir", "")
    if not workdir.startswith("gs://"):
        return None
    done = runner.attempt(["gcloud", "storage", "ls", f"{workdir.rstrip('/')}/checkpoints/"])
    steps = [Path(line.strip().rstrip("/")).name for line in done.output.splitlines()]
    return max((int(step) for step in steps if step.isdigit()), default=None)
