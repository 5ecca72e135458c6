"""All published sets by name, and their rows as instructions with counts."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from selfrag_jax.data import prepared
from selfrag_jax.data.published_files import Faults, RowFault
from selfrag_jax.data.released import generator_example
from selfrag_jax.data.sources.instruction_sets import INSTRUCTION_SETS
from selfrag_jax.data.sources.knowledge_sets import KNOWLEDGE_SETS
from selfrag_jax.data.sources.published import PublishedSet
from selfrag_jax.records import Instruction


def convert_generator_row(row: dict[str, Any]) -> Instruction:
    made = generator_example(row)
    return Instruction(made.id, made.instruction, made.output, made.input, made.dataset_name)


GENERATOR_DATA = PublishedSet(
    prepared.GENERATOR,
    ("train.jsonl", "*generator*.jsonl"),
    "huggingface.co/datasets/selfrag/selfrag_train_data, or `selfrag label` writes it",
    convert_generator_row,
    own_ids=True,
)
SETS = {made.name: made for made in (*INSTRUCTION_SETS, *KNOWLEDGE_SETS, GENERATOR_DATA)}


@dataclass
class SetCounts:
    """What became of the rows of a set; `faults` holds the rows left out, by reason."""

    read: int = 0
    usable: int = 0
    kept: int = 0  # of the usable ones; fewer with a limit
    faults: Faults = field(default_factory=Faults)


def read_set(
    published: PublishedSet,
    files: Sequence[Path],
    counts: SetCounts,
    limit: int | None = None,
    seed: int = 0,
    advance: Callable[[int], None] = lambda n: None,
) -> Iterator[Instruction]:
    """Yields the instructions of a set in the order of its files, and counts its rows.

    limit: at most so many, drawn with `seed` from all usable rows. advance: called with 1 per row.
    """
    usable = _usable(published, files, counts, advance)
    for made in usable if limit is None else _sample(usable, limit, f"{published.name}-{seed}"):
        counts.kept += 1
        yield made


def _usable(
    published: PublishedSet,
    files: Sequence[Path],
    counts: SetCounts,
    advance: Callable[[int], None],
) -> Iterator[Instruction]:
    seen: set[str] = set()
    for file in files:
        for number, row in published.rows(file):
            counts.read += 1
            advance(1)
            try:
                if isinstance(row, RowFault):
                    raise row
                made = _checked(published, published.convert(row), counts.read)
                if not published.own_ids:
                    if made.id in seen:
                        raise RowFault("duplicate id")
                    seen.add(made.id)
            except RowFault as fault:
                where = f"{file.name}:{number}" if len(files) > 1 else number
                counts.faults.add(str(fault), where)
                continue
            counts.usable += 1
            yield made


def _checked(published: PublishedSet, made: Instruction, number: int) -> Instruction:
    if not made.instruction.strip():
        raise RowFault("empty instruction")
    if not made.output.strip():
        raise RowFault("empty output")
    try:
        f"{made.id}{made.instruction}{made.input}{made.output}".encode()
    except UnicodeEncodeError:
        raise RowFault("unpaired surrogate") from None
    if published.own_ids:
        return made
    # The set's name makes ids differ between sets; rows without an id are numbered.
    own_id = (made.id or str(number)).removeprefix(f"{published.name}_")
    return replace(made, id=f"{published.name}_{own_id}", dataset_name=published.name)


def _sample(rows: Iterator[Instruction], limit: int, seed: str) -> list[Instruction]:
    """At most `limit` of the rows, each as likely as any other, in their order."""
    rng = random.Random(f"prepare-{seed}")
    kept: list[tuple[int, Instruction]] = []
    for number, row in enumerate(rows):
        if number < limit:
            kept.append((number, row))
        elif (at := rng.randrange(number + 1)) < limit:
            kept[at] = (number, row)
    return [row for _, row in sorted(kept, key=lambda pair: pair[0])]
