"""`selfrag doctor`: what this machine has, and what is missing for which command."""

from __future__ import annotations

import difflib
import json
from typing import Any

import selfrag_jax
from selfrag_jax.commands import SUMMARIES
from selfrag_jax.commands.command import OUTPUT, Command, Flag
from selfrag_jax.errors import StageFailed, UserError


def diagnose(workdir: str, timeout: float, try_network: bool) -> dict[str, Any]:
    """Returns all findings, as `--json` prints them. Bytes are numbers; nothing is secret."""
    from selfrag_jax.doctor import machine, packages
    from selfrag_jax.doctor.devices import DeviceProbe

    with DeviceProbe.start() as probe:  # takes longest, so it runs beside the rest
        found: dict[str, Any] = {
            "selfrag_jax": selfrag_jax.__version__,
            "host": machine.host(),
            "packages": packages.report(),
            "disk": machine.disk(workdir),
            "caches": machine.caches(),
            "credentials": machine.credentials(),
            "hub": machine.hub(),
            "network": machine.network() if try_network else None,
        }
        return found | {"devices": probe.report(timeout)}


def render(found: dict[str, Any]) -> str:
    """The findings as lines of text."""
    host, packages = found["host"], found["packages"]
    lines = [
        ("selfrag_jax", f"{found['selfrag_jax']}, Python {host['python']}, {host['system']}"),
        *_device_lines(found["devices"]),
        ("host", f"{host['cores']} cores, {_memory(host['memory'])}"),
        ("disk", _disk(found["disk"])),
    ]
    for name, cache in found["caches"].items():
        more = "over " if cache["more"] else ""
        lines.append((name, f"{more}{_size(cache['bytes'])} in {cache['path']}"))
    for name, place in found["credentials"].items():
        lines.append((f"key for {name}", f"found ({place})" if place else "none"))
    lines.append(("hub", found["hub"]))
    for address, state in (found["network"] or {}).items():
        lines.append(("network", f"{address}: {state}"))
    for name, version in packages["versions"].items():
        lines.append((name, version or "-"))
    width = max(len(name) for name, _ in lines)
    text = [f"{name:<{width}}  {value}" for name, value in lines]
    return "\n".join([*text, "", *_missing_lines(packages)])


def _device_lines(devices: dict[str, Any]) -> list[tuple[str, str]]:
    lines = []
    kinds = [(d["platform"], d["kind"], d["memory"]) for d in devices["found"]]
    for platform, kind, memory in dict.fromkeys(kinds):
        size = f", {_size(memory)} each to use" if memory else ""
        count = kinds.count((platform, kind, memory))
        lines.append(("devices", f"{count} x {platform} ({kind}){size}"))
    if devices["problem"]:
        lines.append(("PROBLEM", devices["problem"]))
    return lines


def _missing_lines(packages: dict[str, Any]) -> list[str]:
    from selfrag_jax.doctor.packages import USES, pip_command

    lines = [f"does not fit: {problem}" for problem in packages["mismatches"]]
    for extra, absent in packages["missing"].items():
        if not absent:
            continue
        names = ", ".join(m["name"] for m in absent)
        uses = [f"{name}: {u.used_for}" for name, u in USES.items() if extra in u.extras]
        note = f" ({'; '.join(uses)})" if uses else ""
        command = pip_command("" if extra == "core" else extra)
        lines.append(f"missing for {extra}{note}: {names}\n    {command}")
    return lines or ["nothing is missing"]


def _memory(memory: dict[str, Any]) -> str:
    text = f"{_size(memory['total'])} of memory"
    if memory["available"] is not None:
        text += f", {_size(memory['available'])} available"
    if memory["limit"] is not None:
        text += f", at most {_size(memory['limit'])} in this container"
    return text


def _disk(disk: dict[str, Any]) -> str:
    note = "" if disk["writable"] else ", NOT writable"
    return f"{_size(disk['free'])} of {_size(disk['total'])} free in {disk['folder']}{note}"


def _size(n: float) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


def _check_stage(name: str) -> None:
    if name not in SUMMARIES:
        close = difflib.get_close_matches(name, SUMMARIES, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"one of {', '.join(SUMMARIES)}"
        raise UserError(f"--stage={name}: no such command; {hint}")


def run(values: dict[str, Any], _: list[str]) -> None:
    from selfrag_jax.doctor.packages import lacking

    stage = values["stage"]
    if stage:
        _check_stage(stage)
    if values["timeout"] <= 0:
        raise UserError(f"--timeout={values['timeout']}: must be above 0")
    found = diagnose(values["workdir"], values["timeout"], values["network"])
    lacks = lacking(stage) if stage else []
    if values["json"]:
        print(json.dumps(found | ({"stage": {stage: lacks}} if stage else {}), indent=2))
    else:
        print(render(found))
    if lacks:
        raise StageFailed(f"{stage} lacks " + "; ".join(lacks))


COMMAND = Command(
    example="selfrag doctor\nselfrag doctor --stage=prepare --json",
    flags=(
        Flag(
            "stage",
            "a command; exit status 1 if a package that it may use is missing",
            group="What is looked at",
            choices=tuple(SUMMARIES),
        ),
        Flag(
            "workdir",
            "folder whose disk is looked at",
            ".",
            group="What is looked at",
            is_folder=True,
        ),
        Flag("timeout", "seconds for JAX to find its devices", 60.0, type=float),
        Flag(
            "network",
            "try to reach the hub and buckets",
            False,
            type=bool,
            group="What is looked at",
        ),
        Flag("json", "print everything as JSON", False, type=bool, group=OUTPUT),
    ),
    run=run,
)
