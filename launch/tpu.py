"""Rents Google Cloud TPUs and runs stages of selfrag on them, through gcloud.

    python launch/tpu.py create --name=gen --type=v6e-16 --zone=us-east5-b --spot
    python launch/tpu.py run --name=gen train --config=generator_7b --role=generator \
        --data=gs://B/data.jsonl --workdir=gs://B/generator
    python launch/tpu.py resume --name=gen --watch      # until it has finished
    python launch/tpu.py delete --name=gen

launch/README.md has the traps. --dry_run prints the commands of gcloud and does nothing.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable
from typing import Any

from cloud import flags, jobs, packing, queue, records, remote, watch
from cloud.command_line import Subcommand, main, positive, stage_command
from cloud.failures import CloudFailure
from cloud.letting_go import NothingMade, end_on_signals, free, frees_quota
from cloud.processes import Runner, require_program
from cloud.queue import MISSING, NOTHING_MADE, Queue, default_project
from cloud.records import Job, Record
from cloud.requests import new_record

from selfrag_jax.commands.command import Command
from selfrag_jax.errors import StageFailed, UserError

Values = dict[str, Any]


# ---- create --------------------------------------------------------------------------------------
def create(values: Values, _: list[str]) -> None:
    record, runner = new_record(values), _runner(values)
    old: Record | None = None
    if record.project is None:
        record = dataclasses.replace(record, project=default_project(runner))
    q = Queue(record, runner)
    if records.path(record.name).is_file() and not runner.dry_run:
        old = records.read(record.name)
        if Queue(old, runner).state().name != MISSING:
            raise UserError(
                f"--name={record.name}: is there already ({old.type} in {old.zone}); `resume` it, "
                "`delete` it, or take another name"
            )
    if not runner.dry_run:
        records.write(record)  # first: what was asked for must be deletable, whatever happens next
    with frees_quota(q, values["delete_on_exit"]):
        try:
            q.create()
        except CloudFailure as e:
            if e.kind not in NOTHING_MADE or runner.dry_run:
                raise
            if old:  # what ran on it can still be resumed
                records.write(old)
            else:
                records.forget(record.name)
            raise NothingMade(e.kind, str(e)) from None
        if not values["wait"]:
            _teller(runner)(
                f"{record.name}: asked for; `python launch/tpu.py status --name={record.name}`"
            )
            return
        state = q.wait(values["poll"], _teller(runner))
        if not state.works:
            raise StageFailed(
                f"{record.name}: {state}; `resume` deletes it and asks again, `delete` frees its "
                "quota"
            )


# ---- run -----------------------------------------------------------------------------------------
def run(values: Values, positional: list[str]) -> None:
    record, runner = records.read(values["name"]), _runner(values)
    arguments = stage_command(positional, record.num_hosts > 1, flags.RUN)
    env = tuple(values["env"] or ())
    if wrong := [n for n in env if not re.fullmatch(r"[A-Za-z_]\w*", n)]:
        raise UserError(f"--env={wrong[0]}: expected names of variables, without their values")
    version = packing.pack(values["dirty"], runner)
    before, record = record, dataclasses.replace(record, job=Job(tuple(arguments), version, env))
    jobs.check_startable(record, runner)
    state = Queue(record, runner).state()
    if not state.works:
        raise StageFailed(f"{record.name}: {state}; a stage needs it ACTIVE (`resume`, `create`)")
    if not runner.dry_run:
        watch.make_way(before, runner, print)
    jobs.install(record, runner)
    try:
        jobs.start(record, runner)
    except CloudFailure as e:
        raise CloudFailure(
            e.kind, f"{e}; `resume --name={record.name}` stops it everywhere and starts it again"
        ) from None
    if not runner.dry_run:
        name = f"--name={record.name}"
        print(f"{record.name}: selfrag {arguments[0]} runs on {record.num_hosts} host(s)")
        print(f"  python launch/tpu.py logs {name} --follow")
        print(f"  python launch/tpu.py resume {name} --watch")


# ---- logs, status --------------------------------------------------------------------------------
def logs(values: Values, _: list[str]) -> None:
    record, runner = records.read(values["name"]), _runner(values)
    jobs.job_of(record)
    if not runner.dry_run:
        require_program("gcloud")
    # A connection that is lost says nothing about the stage.
    with frees_quota(Queue(record, runner), values["delete_on_exit"], on_failure=False):
        if jobs.show_logs(record, runner, values["lines"], values["follow"]):
            raise StageFailed("some hosts gave no log; `status` says how they are")


def status(values: Values, _: list[str]) -> None:
    runner = _runner(values)
    if not values["name"]:
        for name in records.names():
            record = records.read(name)
            print(f"{_title(record)}: {Queue(record, runner).state()}")
        return
    record = records.read(values["name"])
    state = Queue(record, runner).state()
    _teller(runner)(f"{_title(record)}: {state}")
    if record.job is None or not (state.works or runner.dry_run):
        if not (state.works or state.waits or state.changes):
            raise StageFailed(f"{record.name}: {state}; `resume` makes it again")
        return
    _teller(runner)(f"  selfrag {' '.join(record.job.arguments)}  (commit {record.job.version})")
    watcher = _watcher(record, runner, values)
    healths = watch.check_hosts(record, runner)
    if runner.dry_run:
        return
    for host, health in healths.items():
        print(f"  {host.label:<8} {_health_text(health)}")
    if (step := jobs.saved_step(record, runner)) is not None:
        print(f"  last checkpoint: step {step}")
    diagnosis = watcher.judge(healths)
    if diagnosis.kind not in ("runs", "finished"):
        raise StageFailed(f"{record.name}: {diagnosis.text}")


def _title(record: Record) -> str:
    slices = f"{record.slices} x " if record.slices > 1 else ""
    return f"{record.name} ({slices}{record.type}, {record.zone}, {record.provisioning})"


def _health_text(health: remote.Health | str) -> str:
    if isinstance(health, str):
        return health
    if not health.started:
        return "another stage runs" if health.alive else "nothing runs"
    running = "runs" if health.alive else f"ended, exit status {health.exit_status}"
    parts = [running, health.progress, f"last line {health.log_age:.0f} s ago"]
    if health.checkpoint is not None:
        parts.append(f"last checkpoint: step {health.checkpoint}")
    return ", ".join(part for part in parts if part)


# ---- resume, delete ------------------------------------------------------------------------------
def resume(values: Values, _: list[str]) -> None:
    positive(values, "poll", "hang_minutes")
    record, runner = records.read(values["name"]), _runner(values)
    watcher = _watcher(record, runner, values)
    q = Queue(record, runner)
    if values["watch"]:  # now, and not in the middle of the night
        jobs.check_startable(record, runner)
    with frees_quota(q, values["delete_on_exit"]):
        if runner.dry_run:
            _print_resume(watcher)
        elif record.job is None:
            if values["recreate"] or not q.wait(values["poll"], print).works:
                watch.make_again(record, runner, values["poll"], print)
        else:
            _resume(watcher, values)
    if values["delete_on_exit"] and values["watch"]:
        free(q)


def _print_resume(watcher: watch.Watcher) -> None:
    record, runner = watcher.record, watcher.runner
    watch.make_again(record, runner, watcher.poll, lambda _: None)
    if record.job:
        jobs.install(record, runner)
        jobs.start(record, runner)


def _resume(watcher: watch.Watcher, values: Values) -> None:
    record = watcher.record
    if values["recreate"]:
        watcher.repair(watch.Diagnosis("lost", "--recreate"))
    if values["watch"]:
        watcher.watch()
        return
    while True:
        diagnosis = watcher.look()
        print(f"{record.name}: {diagnosis.text}")
        if diagnosis.kind == "waits":
            state = Queue(record, watcher.runner).wait(values["poll"], print)
            if not state.works:
                diagnosis = watch.Diagnosis("lost", str(state))
                break
        elif diagnosis.kind == "doubtful":
            queue.pause(values["poll"])
        else:
            break
    if diagnosis.kind == "wrong":
        raise StageFailed(f"{record.name}: a restart cannot mend this; start another with `run`")
    if diagnosis.kind == "unreachable":
        raise StageFailed(
            f"{record.name}: is ACTIVE, but does not answer; try again, or --recreate"
        )
    if diagnosis.kind not in ("runs", "finished"):
        watcher.repair(diagnosis)


def delete(values: Values, _: list[str]) -> None:
    record, runner = records.read(values["name"]), _runner(values)
    _teller(runner)(f"{record.name}: {Queue(record, runner).delete(wait=values['wait'])}")
    if not runner.dry_run:
        records.forget(record.name)


def _runner(values: Values) -> Runner:
    return Runner(dry_run=values["dry_run"])


def _teller(runner: Runner) -> Callable[[str], None]:
    """Returns print; with --dry_run, which has no news, a function that is silent."""
    return (lambda _: None) if runner.dry_run else print


def _watcher(record: Record, runner: Runner, values: Values) -> watch.Watcher:
    return watch.Watcher(
        record,
        runner,
        hang_minutes=values["hang_minutes"],
        poll=values.get("poll", 60.0),
        max_restarts=values.get("max_restarts", 0),
    )


# ---- the commands --------------------------------------------------------------------------------
COMMANDS = {
    "create": Subcommand(
        "Asks for a TPU through queued resources, and waits for it.",
        Command(
            "python launch/tpu.py create --name=gen --type=v6e-16 --zone=us-east5-b --spot",
            flags.CREATE,
            create,
        ),
    ),
    "run": Subcommand(
        "Installs this checkout's commit on all hosts and starts a stage on them, detached.",
        Command(
            "python launch/tpu.py run --name=gen train --config=generator_7b --role=generator "
            "--data=gs://B/data.jsonl --workdir=gs://B/generator",
            flags.RUN,
            run,
            positional="STAGE and its flags",
        ),
    ),
    "logs": Subcommand(
        "Prints the logs of all hosts, each line with its host.",
        Command("python launch/tpu.py logs --name=gen --follow", flags.LOGS, logs),
    ),
    "status": Subcommand(
        "Says how the request and every host are: step, checkpoint, age of the last line.",
        Command("python launch/tpu.py status --name=gen", flags.STATUS, status),
    ),
    "resume": Subcommand(
        "Makes a lost TPU again and starts the stage again, from its last checkpoint.",
        Command("python launch/tpu.py resume --name=gen --watch", flags.RESUME, resume),
    ),
    "delete": Subcommand(
        "Deletes the request and its TPU VMs, which frees the quota.",
        Command("python launch/tpu.py delete --name=gen", flags.DELETE, delete),
    ),
}

if __name__ == "__main__":
    end_on_signals()
    sys.exit(main("launch/tpu.py", COMMANDS))
