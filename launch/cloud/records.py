"""What was asked of a TPU: one small JSON file each, so that later commands need only --name."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from cloud.tables import Slice, parse_slice
from selfrag_jax.errors import UserError
from selfrag_jax.files import read_object, write_json


@dataclass(frozen=True)
class Job:
    """The stage that runs on a TPU."""

    arguments: tuple[str, ...]  # of `selfrag`
    version: str  # the packed commit
    env: tuple[str, ...] = ()  # names of variables; their values are never recorded
    start: str = ""  # tells this start from earlier ones, on the hosts too


@dataclass(frozen=True)
class Record:
    """A queued resource of this name, and what runs on it."""

    name: str
    zone: str
    type: str  # accelerator type
    slices: int = 1
    project: str | None = None  # None: gcloud has no default
    provisioning: str = "on-demand"  # spot, reserved, flex-start
    runtime: str = ""
    startup: str | None = None  # a script that each VM runs when it boots
    valid_until: str | None = None
    max_run_duration: str | None = None
    service_account: str | None = None
    network: str | None = None
    internal_ips: bool = False
    job: Job | None = None

    @property
    def slice(self) -> Slice:
        return parse_slice(self.type)

    @property
    def nodes(self) -> list[str]:
        """The TPU VMs' names, one for each slice."""
        if self.slices == 1:
            return [self.name]
        return [f"{self.name}-{i}" for i in range(self.slices)]

    @property
    def num_hosts(self) -> int:
        return self.slices * self.slice.hosts


def folder() -> Path:
    """Where the records are: $SELFRAG_LAUNCH, else below ~/.local/state."""
    if chosen := os.environ.get("SELFRAG_LAUNCH"):
        return Path(chosen)
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "selfrag_jax" / "launch"


def path(name: str) -> Path:
    return folder() / f"{name}.json"


def write(record: Record) -> None:
    write_json(path(record.name), asdict(record))


def read(name: str) -> Record:
    """Raises UserError if nothing is known of this name."""
    if not path(name).is_file():
        known = ", ".join(names()) or "none"
        raise UserError(
            f"--name={name}: nothing is recorded of it in {folder()} (recorded: {known}); "
            "`create` records it"
        )
    known_fields = {f.name for f in fields(Record)}
    found = read_object(path(name), ("name", "zone", "type"))
    if unknown := set(found) - known_fields:
        raise UserError(f"{path(name)}: unknown field {min(unknown)!r}; written by a newer version")
    if job := found.get("job"):
        env, start = tuple(job["env"]), job.get("start", "")
        found["job"] = Job(tuple(job["arguments"]), job["version"], env, start)
    return Record(**found)


def names() -> list[str]:
    return sorted(p.stem for p in folder().glob("*.json"))


def forget(name: str) -> None:
    path(name).unlink(missing_ok=True)
