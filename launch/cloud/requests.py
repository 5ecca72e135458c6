"""What the flags of `create` ask for, checked before anything is sent."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from cloud.command_line import positive
from cloud.records import Record
from cloud.tables import check_zone, parse_slice
from selfrag_jax.errors import UserError


def new_record(values: dict[str, Any]) -> Record:
    """Returns what the flags of `create` ask for. Raises UserError if it cannot be."""
    name = values["name"]
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,48}[a-z0-9])?", name):
        raise UserError(f"--name={name}: small letters, digits and -, a letter first, at most 50")
    slice_ = parse_slice(values["type"])
    check_zone(slice_, values["zone"], values["unlisted_zone"])
    positive(values, "slices", "poll")
    kinds = [k for k in ("spot", "reserved", "flex_start") if values[k]]
    if len(kinds) > 1:
        raise UserError(f"--{kinds[0]} and --{kinds[1]}: give one of them; none means on demand")
    if kinds == ["flex_start"] and not values["max_run_duration"]:
        raise UserError("--flex_start needs --max_run_duration, such as 4h (at most 7d)")
    for flag in ("valid_until", "max_run_duration"):
        if values[flag] and not re.fullmatch(r"(\d+[dhms])+", values[flag]):
            raise UserError(f"--{flag}={values[flag]}: expected a duration such as 90m, 6h or 2d")
    if values["startup"] and not Path(values["startup"]).is_file():
        raise UserError(f"--startup={values['startup']}: no such file")
    return Record(
        name=name,
        zone=values["zone"],
        type=slice_.accelerator_type,
        slices=values["slices"],
        project=values["project"],
        provisioning=kinds[0].replace("_", "-") if kinds else "on-demand",
        runtime=values["runtime"] or str(slice_.generation.runtime),
        startup=str(Path(values["startup"]).resolve()) if values["startup"] else None,
        valid_until=values["valid_until"],
        max_run_duration=values["max_run_duration"],
        service_account=values["service_account"],
        network=values["network"],
        internal_ips=values["internal_ips"],
    )
