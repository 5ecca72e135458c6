"""What a process is about to do: its code, versions, flags and config, compared over all.

Hosts of one job that differ in these would train or answer something that nobody asked for, or wait
for each other without end.
"""

from __future__ import annotations

import hashlib
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from selfrag_jax.errors import UserError
from selfrag_jax.processes.group import Group

_PACKAGE = Path(__file__).parents[1]


def require_same(group: Group, settings: dict[str, Any]) -> None:
    """Raises UserError, in every process, naming the processes that differ and the first field.

    settings: of this process, JSON data by name; what a nested one differs in is named too.
    """
    everyone = group.gather("about", code() | settings)
    for i, other in enumerate(everyone):
        if other != everyone[0]:
            name, theirs, mine = difference(other, everyone[0])
            others = [j for j, o in enumerate(everyone) if o == other]
            who = group.name(i)
            if len(others) > 1:
                who = f"processes {', '.join(map(str, others))} ({group.hosts[i]}, ...)"
            raise UserError(
                f"--distributed: {who} and {group.name(0)} differ in {name}: {theirs} and {mine}; "
                "run one version of the code with the same flags and config on every host"
            )


def code() -> dict[str, Any]:
    """Returns the versions of what this process runs, the commit of a checkout, its sources' hash.

    The hash tells apart checkouts of one commit that have been changed.
    """
    digest = hashlib.sha256()
    for file in sorted(_PACKAGE.rglob("*.py")):
        digest.update(f"{file.relative_to(_PACKAGE)} ".encode() + file.read_bytes())
    versions = {name: metadata.version(name) for name in ("selfrag-jax", "jax", "jaxlib")}
    return {
        "commit": _commit(),
        "versions": versions | {"python": platform.python_version()},
        "sources": digest.hexdigest()[:12],
    }


def _commit() -> str:
    """The commit of the checkout that the package lies in; "" if it is installed otherwise."""
    root = _PACKAGE.parent
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip()


def difference(theirs: Any, mine: Any, at: str = "") -> tuple[str, str, str]:
    """Returns the name of the first field in which two values differ, and both values as text."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        for key in [*mine, *(k for k in theirs if k not in mine)]:
            if theirs.get(key) != mine.get(key):
                return difference(theirs.get(key), mine.get(key), f"{at}.{key}" if at else key)
    return at, str(theirs), str(mine)
