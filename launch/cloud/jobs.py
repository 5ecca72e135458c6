"""A stage on all hosts of a TPU: install its commit, start it, stop it, follow its logs."""

from __future__ import annotations

import dataclasses
import os
import shlex
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

from cloud import packing, records, remote
from cloud.failures import NOISE
from cloud.hosts import Host, Hosts
from cloud.processes import LIMIT, Runner
from cloud.records import Job, Record
from selfrag_jax.errors import UserError

_INSTALLATION = 3600.0  # seconds, at most


def job_of(record: Record) -> Job:
    """Raises UserError if nothing was run on this TPU yet."""
    if record.job is None:
        raise UserError(f"--name={record.name}: nothing was run on it yet; start with `run`")
    return record.job


def flags_of_job(record: Record) -> dict[str, str]:
    """Returns the flags of the stage, written --name=value or --name value."""
    arguments = record.job.arguments if record.job else ()
    found = {}
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        if argument.startswith("--"):
            name, eq, value = argument.removeprefix("--").partition("=")
            found[name] = value if eq else following
    return found


def check_startable(record: Record, runner: Runner) -> None:
    """Raises UserError if this machine lacks what a start of the job needs.

    It is called before a TPU is made for it, which would be paid for and idle.
    """
    job = job_of(record)
    archive = packing.archive_path(job.version)
    if not archive.is_file() and not runner.dry_run:
        raise UserError(f"{archive}: the packed commit is gone; start with `run` instead")
    if missing := [name for name in job.env if name not in os.environ]:
        raise UserError(f"--env={','.join(missing)}: not set in this shell")


def install(record: Record, runner: Runner) -> None:
    """Copies the packed commit to all hosts and installs it. Hosts that have it do nothing."""
    check_startable(record, runner)
    version = job_of(record).version
    archive = packing.archive_path(version)
    hosts = Hosts(record, runner)
    hosts.each("copying the commit", lambda host: hosts.copy(host, str(archive), archive.name))
    script = remote.install(version, archive.name)
    hosts.run(f"installing {version}", script, seconds=_INSTALLATION)


def start(record: Record, runner: Runner) -> Record:
    """Starts the stage on all hosts, detached; returns the record with this start.

    The record is written first: if only some hosts start, `resume` knows what is to run, and the
    hosts which it is not yet on by the start's name.
    """
    job, hosts = (
        dataclasses.replace(job_of(record), start=uuid.uuid4().hex[:8]),
        Hosts(record, runner),
    )
    record = dataclasses.replace(record, job=job)
    if not runner.dry_run:
        records.write(record)
    if job.env:
        with _EnvFile(record, job.env, runner) as file:
            target = f".{remote.FOLDER}-{record.name}-env"
            hosts.each("copying the environment", lambda host: hosts.copy(host, file, target))
    script = remote.start(record.name, job.version, job.arguments, job.start)
    hosts.run(f"starting {job.arguments[0]}", script)
    return record


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

    threads, deadline = [], time.monotonic() + LIMIT
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
            thread.join(None if follow else max(0.1, deadline - time.monotonic()))
    finally:
        for process in processes:
            process.terminate()
    for thread in threads:
        thread.join(1.0)
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
