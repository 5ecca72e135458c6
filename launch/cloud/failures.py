"""What gcloud and kubectl say when they fail, as one line with a remedy."""

from __future__ import annotations

import re
from dataclasses import dataclass

from selfrag_jax.errors import StageFailed


class CloudFailure(StageFailed):
    """A command of the cloud that failed. kind: the first column of _KINDS, or "other"."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class _Kind:
    name: str
    pattern: str  # in what the command printed
    remedy: str


# The first match counts. Sources: the issues of marin, levanter, skypilot and terraform that quote
# these messages, and gcloud's documentation.
_KINDS = (
    _Kind(
        "timeout",
        r"ERROR: no answer within",  # processes.py
        "try again; `python launch/tpu.py status` says how it is",
    ),
    _Kind(
        "login",
        r"gcloud auth login|Reauthentication|active account selected|invalid_grant",
        "log in: gcloud auth login",
    ),
    _Kind(
        "api",
        r"SERVICE_DISABLED|has not been used in project|API .{0,60}not enabled",
        "switch the API on: gcloud services enable tpu.googleapis.com",
    ),
    _Kind(
        "project",
        r"Failed to find attribute \[project\]|core/project",
        "give --project=P to `create`, or: gcloud config set project P",
    ),
    _Kind(
        "quota",
        r"[Qq]uota",
        "suspended and failed requests hold quota too: list them with `gcloud compute tpus "
        "queued-resources list --zone=ZONE`, free ours with `python launch/tpu.py delete`; else "
        "ask for more at console.cloud.google.com/iam-admin/quotas, or take another zone",
    ),
    _Kind(
        "capacity",
        r"no more capacity|[Ii]nsufficient (reserved )?capacity|ZONE_RESOURCE_POOL_EXHAUSTED"
        r"|RESOURCE_EXHAUSTED|[Ss]tockout",
        "the zone has none left: try another zone or a smaller slice, or leave a request in the "
        "queue with --valid_until=24h",
    ),
    _Kind(
        "zone",
        r"[Ii]nvalid (value for field 'zone'|zone|location)|Permission denied on 'locations/"
        r"|[Ll]ocation .{0,80}not (found|supported)|not available in zone",
        "check --zone: `gcloud compute tpus locations list`",
    ),
    _Kind(
        "permission",
        r"PERMISSION_DENIED|does not have permission|[Pp]ermission '[\w.]+' denied|\b403\b",
        "your account needs the role TPU Admin (roles/tpu.admin) in this project, and Service "
        "Account User to give VMs a service account",
    ),
    _Kind(
        "jobset",
        r"no matches for kind \"JobSet\"|ensure CRDs are installed",
        "the cluster lacks JobSet: github.com/kubernetes-sigs/jobset has the manifests to apply",
    ),
    _Kind("exists", r"ALREADY_EXISTS|already exists", "resume it, delete it, or take another name"),
    _Kind("not_found", r"NOT_FOUND|was not found|\b404\b", "nothing has this name in this zone"),
    _Kind(
        "type",
        r"[Aa]ccelerator[ _]?[Tt]ype|[Tt]opology|[Rr]untime[ _]?[Vv]ersion",
        "this zone has no such slice or runtime: `gcloud compute tpus accelerator-types list "
        "--zone=ZONE`",
    ),
    _Kind(
        "ssh",
        r"Permission denied \(publickey|Connection (refused|timed out|closed|reset)|port 22"
        r"|(exited with return code|exit status) \[?255",
        "a firewall rule must let port 22 through (with --internal_ips, a tunnel or a VM inside "
        "the network), and the host must be up: `python launch/tpu.py status`",
    ),
    _Kind(
        "network",
        r"[Cc]ould not resolve|Unable to find the server|Failed to establish|ConnectionError",
        "this machine reaches no Google API; try again",
    ),
)  # fmt: skip


_OF_CONNECTION = re.compile(
    r"^ERROR: (\(gcloud|no answer within)|^ssh: |^kex_|Permission denied \(publickey"
    r"|^Connection (closed|reset|timed)"
)


# What gcloud says of a connection beside the host's own words.
NOISE = re.compile(r"exited with return code|: Attempting to connect to worker|^Retrying: ")


def explain(what: str, output: str, status: int) -> CloudFailure:
    """Returns the failure of `what`, such as "creating q". output: what the command printed."""
    kind = next((k for k in _KINDS if re.search(k.pattern, output)), None)
    said = _essence(output) or f"exit status {status}"
    if kind is None:
        return CloudFailure("other", f"{what} failed: {said}")
    return CloudFailure(kind.name, f"{what} failed ({kind.name}): {said}; {kind.remedy}")


def explain_on_host(output: str, status: int) -> tuple[str, str, str]:
    """Returns (kind, what was said, remedy) of a command that ran on a host through gcloud.

    Only what gcloud and ssh say themselves has a kind: a script's own words, such as pip's about
    a quota or a 403, are "other" and have no remedy of the cloud's.
    """
    own = "\n".join(line for line in output.splitlines() if _OF_CONNECTION.search(line))
    kind = next((k for k in _KINDS if re.search(k.pattern, own)), None)
    said = _essence(output) or f"exit status {status}"
    return (kind.name, said, kind.remedy) if kind else ("other", said, "")


def _essence(output: str) -> str:
    """Returns the message of an output: its ERROR line, else its last line; at most 300 letters."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    # gcloud's own lines say no more than the status of ssh; the host's words are above them.
    lines = [line for line in lines if not NOISE.search(line)] or lines
    errors = [line for line in lines if line.startswith("ERROR")]
    said = (errors or lines[-1:] or [""])[0]
    said = re.sub(r"^ERROR: (\([\w.-]+\) )?", "", said)
    return " ".join(said.split())[:300].rstrip(" .;")
