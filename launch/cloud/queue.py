"""Queued resources: how TPU VMs are asked for, what state they are in, and how they are let go."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cloud.failures import CloudFailure, explain
from cloud.processes import Runner
from cloud.records import Record

WAITING = ("WAITING_FOR_RESOURCES", "ACCEPTED", "CREATING", "PROVISIONING")
_CHANGING_NODES = ("CREATING", "STARTING", "RESTARTING", "REPAIRING")
# Failures of `create` after which nothing of ours exists (another's may, under the same name).
NOTHING_MADE = ("login", "api", "project", "permission", "exists", "zone", "type")
MISSING = "MISSING"  # our name for a request that does not exist

_FINAL = ("ACTIVE", "FAILED", "SUSPENDED", MISSING)  # what a request stays, of itself

# Looks in a row. Nothing is deleted because of a single one, or of one lost connection.
_BAD_LOOKS, _FAILED_LOOKS = 3, 10
_LONGEST_PAUSE = 900.0  # seconds between two looks that fail
_LONGEST_CHANGE = 3600.0  # seconds that TPU VMs may take to start or to be repaired
_DELETION = 3600.0  # seconds, at most

pause: Callable[[float], None] = time.sleep  # the tests do not wait


@dataclass(frozen=True)
class State:
    """The state of a queued resource, and what is wrong with it."""

    name: str  # ACTIVE, WAITING, ..., MISSING
    reason: str = ""
    nodes_change: bool = False  # TPU VMs that do not work yet start or are repaired

    @property
    def works(self) -> bool:
        return self.name == "ACTIVE" and not self.reason

    @property
    def waits(self) -> bool:
        return self.name in WAITING

    @property
    def changes(self) -> bool:
        """Whether it will soon be another state, such as SUSPENDING, or one that we do not know."""
        return self.nodes_change or self.name not in (*_FINAL, *WAITING)

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}" if self.reason else self.name


@dataclass
class Looks:
    """What looks at a TPU in a row come to."""

    poll: float  # seconds between two
    _bad: int = 0
    _changing: float = 0.0  # seconds

    def good(self) -> None:
        self._bad, self._changing = 0, 0.0

    def bad(self) -> bool:
        """Counts a look that found the TPU lost; returns whether that is certain by now."""
        self._bad += 1
        return self._bad >= _BAD_LOOKS

    def verdict(self, state: State) -> str:
        """Returns works, waits, doubtful (look again) or lost."""
        if state.works or state.waits:
            self.good()
            return "works" if state.works else "waits"
        if state.changes and self._changing < _LONGEST_CHANGE:
            self._changing += self.poll
            return "waits"
        return "lost" if self.bad() else "doubtful"


@dataclass
class Patience:
    """Bears looks that fail, several in a row, with growing pauses: no network here, say."""

    name: str
    poll: float
    tell: Callable[[str], None]
    _failed: int = 0

    def worked(self) -> None:
        self._failed = 0

    def failed(self, e: CloudFailure) -> None:
        """Pauses. Raises the failure when it is one too many."""
        self._failed += 1
        if self._failed >= _FAILED_LOOKS:
            raise e
        seconds = max(self.poll, min(self.poll * 2 ** (self._failed - 1), _LONGEST_PAUSE))
        self.tell(f"{self.name}: {e}; looking again in {seconds:.0f} s")
        pause(seconds)


@dataclass(frozen=True)
class Queue:
    """The queued resource of a record."""

    record: Record
    runner: Runner

    def _gcloud(self, *arguments: str, alpha: bool = False) -> list[str]:
        command = ["gcloud", *(["alpha"] if alpha else []), "compute", "tpus", *arguments]
        command.append(f"--zone={self.record.zone}")
        if self.record.project:
            command.append(f"--project={self.record.project}")
        return command

    # ---- create ----------------------------------------------------------------------------------
    def create_command(self) -> list[str]:
        r = self.record
        flags = [f"--accelerator-type={r.type}", f"--runtime-version={r.runtime}"]
        if r.slices == 1:
            flags.append(f"--node-id={r.name}")
        else:
            flags += [f"--node-count={r.slices}", f"--node-prefix={r.name}"]
        if r.provisioning in ("spot", "reserved"):
            flags.append(f"--{r.provisioning}")
        elif r.provisioning == "flex-start":
            flags.append("--provisioning-model=flex-start")
        if r.max_run_duration:
            flags.append(f"--max-run-duration={r.max_run_duration}")
        if r.valid_until:
            flags.append(f"--valid-until-duration={r.valid_until}")
        if r.startup:
            flags.append(f"--metadata-from-file=startup-script={r.startup}")
        if r.service_account:
            flags.append(f"--service-account={r.service_account}")
        if r.network:
            flags.append(f"--network={r.network}")
        if r.internal_ips:
            flags.append("--internal-ips")
        alpha = r.provisioning == "flex-start" or r.max_run_duration is not None
        return self._gcloud(
            "queued-resources", "create", r.name, *flags, "--async", "--quiet", alpha=alpha
        )

    def create(self) -> None:
        """Asks for the TPU. Raises CloudFailure; it says so if half of the request was made."""
        done = self.runner.attempt(self.create_command(), finish=True)
        if not done.status:
            return
        failure = explain(f"creating {self.record.name}", done.errors + done.output, done.status)
        if failure.kind not in NOTHING_MADE:
            try:
                state = self.state()
            except CloudFailure:
                raise failure from None
            if state.name != MISSING:
                raise CloudFailure(
                    failure.kind,
                    f"{failure}. The request exists all the same ({state}) and holds quota: "
                    f"`python launch/tpu.py resume --name={self.record.name}` makes it again, "
                    "`delete` frees it",
                )
        raise failure

    # ---- state -----------------------------------------------------------------------------------
    def state(self) -> State:
        """Returns the state of the request and, where it is active, of its TPU VMs."""
        command = self._gcloud("queued-resources", "describe", self.record.name, "--format=json")
        try:
            found = self.runner.json(f"describing {self.record.name}", command)
        except CloudFailure as e:
            if e.kind != "not_found":
                raise
            return State(MISSING, "the request does not exist")
        if found is None:  # --dry_run
            return State("ACTIVE")
        state = found.get("state", {})
        name = state.get("state", "UNKNOWN")
        if name == "ACTIVE":
            return self._state_of_nodes()
        error = state.get("failedData", {}).get("error", {}).get("message", "")
        by = {"SERVICE": "by Google", "USER": "by a user"}.get(state.get("stateInitiator"), "")
        suspended = name in ("SUSPENDED", "SUSPENDING")
        reason = error or (f"{name.lower()} {by}".strip() if suspended else "")
        if suspended and self.record.provisioning == "spot":
            reason += " (pre-empted, most likely)"
        return State(name, reason)

    def _state_of_nodes(self) -> State:
        """Returns the state of an active request, whose TPU VMs need not work."""
        wrong, change = [], True
        for node in self.record.nodes:
            try:
                found = self.node(node)
            except CloudFailure as e:
                if e.kind != "not_found":
                    raise
                wrong.append(f"{node} does not exist")
                change = False
                continue
            hosts, state = len(found.get("networkEndpoints", [])), found.get("state", "UNKNOWN")
            if state != "READY":
                wrong.append(f"{node} is {state}")
                change &= state in _CHANGING_NODES
            elif hosts != self.record.slice.hosts:
                wrong.append(f"{node} has {hosts} of {self.record.slice.hosts} hosts")
                change = False
        if not wrong:
            return State("ACTIVE")
        return State("ACTIVE", f"{'' if change else 'half-created: '}{', '.join(wrong)}", change)

    def node(self, name: str) -> dict[str, Any]:
        command = self._gcloud("tpu-vm", "describe", name, "--format=json")
        return self.runner.json(f"describing {name}", command)

    def wait(self, poll: float, tell: Callable[[str], None]) -> State:
        """Waits until the TPU is ready or lost, and returns that state. tell: gets each new state.

        Raises CloudFailure when many looks in a row have failed.
        """
        told, looks, patience = "", Looks(poll), Patience(self.record.name, poll, tell)
        while True:
            try:
                state = self.state()
            except CloudFailure as e:
                patience.failed(e)
                continue
            patience.worked()
            if str(state) != told:
                told = str(state)
                tell(f"{self.record.name}: {told}")
            if looks.verdict(state) in ("works", "lost"):
                return state
            pause(poll)

    # ---- delete ----------------------------------------------------------------------------------
    def delete_command(self, wait: bool) -> list[str]:
        command = self._gcloud("queued-resources", "delete", self.record.name, "--force", "--quiet")
        return command if wait else [*command, "--async"]

    def delete(self, wait: bool) -> str:
        """Deletes the request and its TPU VMs, also those that outlived it; returns what it did."""
        done = self.runner.attempt(self.delete_command(wait), _DELETION, finish=True)
        if not done.status:
            return "deleted" if wait else "is being deleted"
        failure = explain(f"deleting {self.record.name}", done.errors + done.output, done.status)
        if failure.kind != "not_found":
            raise failure
        left = []
        for node in self.record.nodes:
            delete = self._gcloud("tpu-vm", "delete", node, "--quiet")
            command = delete if wait else [*delete, "--async"]
            done = self.runner.attempt(command, _DELETION, finish=True)
            if not done.status:
                left.append(node)
            elif (e := explain(f"deleting {node}", done.errors, done.status)).kind != "not_found":
                raise e
        if left:
            return f"had no request any more; deleted what was left: {', '.join(left)}"
        return "did not exist any more"


def default_project(runner: Runner) -> str | None:
    """Returns gcloud's project. It is recorded: later commands must not look in another one."""
    if runner.dry_run:
        return None
    project = runner.attempt(["gcloud", "config", "get-value", "project"]).output.strip()
    return None if project in ("", "(unset)") else project
