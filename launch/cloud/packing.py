"""Packs the checkout's own commit, which is then installed on every host."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from cloud import records
from cloud.processes import Runner
from selfrag_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def pack(dirty: bool, runner: Runner) -> str:
    """Packs the committed tree for the hosts; returns its version, which names the archive.

    dirty: pack changes of tracked files as well. Raises UserError if there are some and it is not
    given, and outside a git checkout.
    """
    root, git = ROOT, ["git", "-C", str(ROOT)]
    reading = Runner()  # also with --dry_run: reading the checkout changes nothing
    if reading.attempt([*git, "rev-parse", "--verify", "HEAD"]).status:
        raise UserError(f"{root}: is no git checkout with a commit; hosts install a commit of it")
    version = reading.run("git rev-parse", [*git, "rev-parse", "--short=12", "HEAD"]).strip()
    tree = "HEAD"
    changes = reading.run("git status", [*git, "status", "--porcelain"]).splitlines()
    tracked = [line[3:] for line in changes if not line.startswith("??")]
    new = [line[3:] for line in changes if line.startswith("??")]
    if tracked and not dirty:
        raise UserError(
            f"{root}: {_some(tracked)} not committed; hosts would run something else. Commit, or "
            "give --dirty to pack the changes too"
        )
    if new:
        print(f"warning: not packed, as git does not track it: {_some(new)}", file=sys.stderr)
    if tracked:
        # A commit object of the changes that touches neither the branch nor the files.
        tree = reading.run("git stash create", [*git, "stash", "create"]).strip()
        changed = reading.run("git diff", [*git, "diff", "HEAD"])
        version += f"-dirty-{hashlib.sha256(changed.encode()).hexdigest()[:8]}"
    archive = archive_path(version)
    if not archive.is_file() or runner.dry_run:
        if not runner.dry_run:
            archive.parent.mkdir(parents=True, exist_ok=True)
        temporary = archive if runner.dry_run else archive.with_name(f".{archive.name}.tmp")
        command = [*git, "archive", "--format=tar.gz", f"--output={temporary}", tree]
        runner.run("packing the commit", command)
        if not runner.dry_run:
            temporary.replace(archive)
    return version


def archive_path(version: str) -> Path:
    """Kept beside the records, so that a later `resume` installs the same commit."""
    return records.folder() / "packages" / f"selfrag-{version}.tar.gz"


def _some(files: list[str]) -> str:
    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
    return ", ".join(files[:3]) + more
