"""The batch files of one job on disk, and how far each has come."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from selfrag_jax.critic.teachers.teacher import Usage
from selfrag_jax.files import read_json, write_json, write_text

MAX_REQUESTS, MAX_BYTES = 50_000, 200_000_000  # of one file
STATE = "state.json"

Line = tuple[str, str, Usage]  # key, line of JSON, the most tokens it can take


def split(lines: Sequence[Line]) -> Iterator[list[Line]]:
    """Yields parts that are small enough for a file."""
    part: list[Line] = []
    size = 0
    for line in lines:
        length = len(line[1].encode())
        if part and (len(part) == MAX_REQUESTS or size + length > MAX_BYTES):
            yield part
            part, size = [], 0
        part.append(line)
        size += length
    if part:
        yield part


@dataclass
class BatchFile:
    name: str
    requests: int
    most_in: int  # the most tokens that its requests can take
    most_out: int
    state: str = "written"  # then sending, sent, collected; or dropped, unsent
    batch_id: str = ""
    status: str = ""  # of a batch that is over
    results: list[str] = field(default_factory=list)  # ids of its files of results
    error: str = ""


class BatchFolder:
    """A folder with batch files and a file of their states, which is rewritten at each change."""

    def __init__(self, folder: Path):
        self.folder = folder
        state = folder / STATE
        self.files: list[BatchFile] = []
        if state.is_file():
            self.files = [BatchFile(**row) for row in read_json(state)["files"]]

    def path(self, file: BatchFile) -> Path:
        return self.folder / file.name

    def add(self, lines: Sequence[Line]) -> BatchFile:
        """Writes a file of requests and notes it."""
        text = "".join(line for _, line, _ in lines)
        digest = hashlib.sha256(f"{self.folder.name}{text}".encode()).hexdigest()[:12]
        most = sum((usage for _, _, usage in lines), Usage())
        name = f"{len(self.files):04}-{digest}.jsonl"
        file = BatchFile(name, len(lines), most.tokens_in, most.tokens_out)
        write_text(self.folder / name, text)
        self.files.append(file)
        self._save()
        return file

    def unfinished(self) -> list[BatchFile]:
        return [file for file in self.files if file.state not in ("collected", "dropped")]

    def update(self, file: BatchFile, **changes: Any) -> None:
        for name, value in changes.items():
            setattr(file, name, value)
        self._save()

    def mark(self, files: Iterable[BatchFile], state: str) -> None:
        for file in files:
            file.state = state
        self._save()

    def _save(self) -> None:
        write_json(self.folder / STATE, {"files": [asdict(file) for file in self.files]})
