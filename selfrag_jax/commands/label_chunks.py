"""The chunks of rows that `selfrag label` works through, and how processes share them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfrag_jax.data.instructions import instruction_of, instruction_rows
from selfrag_jax.files import read_object, write_text
from selfrag_jax.processes.group import Group
from selfrag_jax.records import GeneratorExample, Instruction, generator_example_from, read_rows

if TYPE_CHECKING:
    from selfrag_jax.critic.labelling import LabelConfig


@dataclass(frozen=True)
class Chunks:
    """The rows of the input, a fixed number at a time, and the file of each such chunk.

    A chunk's record is written before its file of examples, which marks it as finished.
    """

    folder: Path
    input: Path
    config: LabelConfig
    num_rows: int

    @property
    def number(self) -> int:
        return -(-self.num_rows // self.config.chunk)

    def size(self, c: int) -> int:
        return min(self.config.chunk, self.num_rows - c * self.config.chunk)

    def file(self, c: int) -> Path:
        return self.folder / f"{c * self.config.chunk:08d}.jsonl"

    def record(self, c: int) -> Path:
        return self.file(c).with_suffix(".json")

    def files(self, c: int) -> tuple[Path, Path]:
        return self.record(c), self.file(c)

    def missing(self) -> list[int]:
        return [c for c in range(self.number) if not self.file(c).is_file()]

    def read(self, wanted: Sequence[int]) -> Iterator[tuple[int, dict[str, Instruction]]]:
        """Yields (number, rows by their place in the file) of the chunks `wanted`, in order."""
        left, rows = set(wanted), {}
        for i, (where, row) in enumerate(instruction_rows(self.input, announce=False)):
            c = i // self.config.chunk
            if c in left:
                rows[where] = instruction_of(where, row)
                if len(rows) == self.size(c):
                    yield c, rows
                    rows = {}

    def examples(self) -> Iterator[GeneratorExample]:
        for c in range(self.number):
            yield from (generator_example_from(*row) for row in read_rows(self.file(c)))

    def records(self) -> Iterator[dict[str, Any]]:
        for c in range(self.number):
            yield read_object(self.record(c), ("failed", "evidence_cut", "nothing_found"))


def share_of(chunks: Chunks, group: Group) -> list[int]:
    """Returns the chunks that this process labels: every n-th of those that no process has."""
    here = [c for c in range(chunks.number) if chunks.file(c).is_file()]
    everywhere = {c for some in group.gather("chunks", here) for c in some}
    left = [c for c in range(chunks.number) if c not in everywhere]
    return left[group.index :: group.count]


def send_to_main(chunks: Chunks, group: Group) -> None:
    """Brings all chunks to process 0, which writes those that its disk lacks."""
    group.barrier("chunks are labelled")
    missing = group.from_main("missing chunks", chunks.missing)
    # On a shared disk nothing is missing.
    here = [] if group.is_main else [c for c in missing if chunks.file(c).is_file()]
    texts = [[c, *(f.read_text(encoding="utf-8") for f in chunks.files(c))] for c in here]
    for some in group.to_main("chunks", texts)[1:]:
        for c, record, examples in some:
            for file, text in zip(chunks.files(c), (record, examples), strict=True):
                write_text(file, text)
