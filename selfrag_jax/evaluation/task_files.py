"""Which file of a folder holds a task's questions: the published one, before all others."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from selfrag_jax import artifacts
from selfrag_jax.errors import UserError
from selfrag_jax.evaluation import tasks
from selfrag_jax.evaluation.tasks import Task
from selfrag_jax.files import read_object

MAKES_QUESTIONS = "retrieve"  # the one command whose output is a question file
OWN_ENDINGS = (".scores", ".metrics", ".manifest", "answers", "predictions")


@dataclass(frozen=True)
class FoundFile:
    """A task, its file, and the names of other files of the folder that look like the task's."""

    task: Task
    file: Path
    others: tuple[str, ...] = ()


def find_files(data: str | Path) -> list[FoundFile]:
    """Returns the file of each task that has one in a folder. Raises UserError if none has.

    A task's patterns are in order of preference: the first one that matches decides, and of its
    files the first by name. Answers and scores of ours are never taken.
    """
    data = Path(data)
    if not data.is_dir():
        raise UserError(f"--data={data}: no such folder")
    every, found = [tasks.load(name) for name in tasks.names()], []
    for task in every:
        matches = dict.fromkeys(
            p
            for pattern in task.files
            for p in sorted(data.glob(pattern))
            if p.is_file() and not _is_output(p)
        )
        if not matches:
            continue
        file, *rest = matches
        others = tuple(p.name for p in rest)
        if others:
            print(f"{task.name}: takes {file.name}, not {', '.join(others)}", file=sys.stderr)
        found.append(FoundFile(task, file, others))
    if not found:
        looked_for = ", ".join(pattern for task in every for pattern in task.files)
        raise UserError(f"--data={data}: holds no task's file; looked for {looked_for}")
    return found


def _is_output(file: Path) -> bool:
    """Whether a file is no question file: made by a command that answers or scores."""
    stem = file.name.removesuffix(".gz").rpartition(".")[0]
    if stem.endswith(OWN_ENDINGS):
        return True
    manifest = artifacts.manifest_path(file)
    return manifest.is_file() and read_object(manifest, ()).get("stage") != MAKES_QUESTIONS
