"""The table of facts that ships with the package: typed entities with aliases and a popularity.

table.jsonl.xz has one JSON object a line, compressed. README.md names its sources and licences;
make_table.py makes it.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from selfrag_jax.errors import UserError
from selfrag_jax.files import atomic_write

FILE = Path(__file__).with_name("table.jsonl.xz")
KINDS = ("film", "city", "country", "element", "person", "airport")


@dataclass(frozen=True)
class TableEntity:
    """An entity with its facts.

    name is unique in the table and the title of its passages ("Psycho (1998)"); `short` is what a
    text calls it ("Psycho"). Each fact has all its right values, the one to show first.
    """

    kind: str
    name: str
    short: str
    aliases: tuple[str, ...]
    popularity: float
    decile: int  # of the popularity within the kind, 0 to 9; look-alikes count as well
    is_asked: bool  # False: only a look-alike, as its name alone does not say which one is meant
    facts: tuple[tuple[str, tuple[str, ...]], ...]  # (attribute, right values)
    details: tuple[tuple[str, str], ...]  # what passages also tell and nobody asks about

    def values(self, attribute: str) -> tuple[str, ...]:
        """Returns the right values of an attribute; () if the table has none."""
        return dict(self.facts).get(attribute, ())

    def value(self, attribute: str) -> str:
        return self.values(attribute)[0]

    @property
    def attributes(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.facts)

    @property
    def names(self) -> tuple[str, ...]:
        """All that a text may call it, the unique name first."""
        return tuple(dict.fromkeys((self.name, self.short, *self.aliases)))


def to_row(e: TableEntity) -> dict[str, Any]:
    """Returns an entity as the table's JSON, without its empty fields and its decile."""
    row: dict[str, Any] = {"kind": e.kind, "name": e.name}
    row |= {"short": e.short} if e.short != e.name else {}
    row |= {"aliases": list(e.aliases)} if e.aliases else {}
    row["popularity"] = int(e.popularity) if e.popularity == int(e.popularity) else e.popularity
    row |= {} if e.is_asked else {"look_alike": True}
    row["facts"] = {name: list(values) for name, values in e.facts}
    return row | ({"details": dict(e.details)} if e.details else {})


def from_row(row: dict[str, Any], decile: int) -> TableEntity:
    return TableEntity(
        kind=row["kind"],
        name=row["name"],
        short=row.get("short") or row["name"],
        aliases=tuple(row.get("aliases") or ()),
        popularity=float(row["popularity"]),
        decile=decile,
        is_asked=not row.get("look_alike"),
        facts=tuple((name, tuple(values)) for name, values in row["facts"].items()),
        details=tuple((row.get("details") or {}).items()),
    )


def deciles(rows: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Returns name -> decile of the popularity within the row's kind, 0 for the least popular."""
    of_kind: dict[str, list[tuple[float, str]]] = {}
    for row in rows:
        of_kind.setdefault(row["kind"], []).append((row["popularity"], row["name"]))
    return {
        name: 10 * i // len(pairs)
        for pairs in of_kind.values()
        for i, (_, name) in enumerate(sorted(pairs))
    }


def write_table(path: str | Path, entities: Iterable[TableEntity]) -> int:
    """Writes a table, sorted by kind and name; returns its bytes."""
    ordered = sorted(entities, key=lambda e: (KINDS.index(e.kind), e.name))
    lines = (
        json.dumps(to_row(e), ensure_ascii=False, separators=(",", ":")) + "\n" for e in ordered
    )
    data = lzma.compress("".join(lines).encode(), preset=9 | lzma.PRESET_EXTREME)
    with atomic_write(path, "wb") as f:
        f.write(data)
    return len(data)


@cache
def read_table(path: Path = FILE) -> tuple[TableEntity, ...]:
    """Returns the entities of a table. Raises UserError if it is damaged."""
    try:
        rows = [json.loads(line) for line in lzma.decompress(path.read_bytes()).splitlines()]
    except (OSError, lzma.LZMAError, ValueError) as e:
        raise UserError(f"{path}: the table of facts is not readable ({e}); reinstall") from None
    of_name = deciles(rows)
    return tuple(from_row(row, of_name[row["name"]]) for row in rows)
