"""What is true in a world of facts: the judge of critiques, and of citations.

What a passage states is known from the world's teacher.jsonl. A passage that is not the world's is
read for names and values. Answers of models are no regular sentences: what the templates do not fit
is judged by the values that it holds.

A passage about the entity that was asked about is relevant, even if it lacks the attribute, as in
the synthetic encyclopedia: IsRel asks what a passage is about, IsSup what it says (paper, Table 1).
A refusal ("The passages do not say ...") has no support, whatever the passage: nothing in a passage
states it, and an answer that a passage supports must win. Its utility is 3, as it keeps to the
question without an answer.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfrag_jax.errors import UserError
from selfrag_jax.facts import relations, usefulness
from selfrag_jax.facts.reading import FactAsked, Reader, Stated
from selfrag_jax.facts.table import TableEntity, from_row
from selfrag_jax.records import Passage, read_rows
from selfrag_jax.text import reflection
from selfrag_jax.text.normalising import normalise
from selfrag_jax.text.prompts import CritiqueQuery

WORLD = "facts"  # the field `world` of teacher.jsonl


def passage_key(p: Passage) -> str:
    """What a passage is recognised by, wherever it was copied."""
    return hashlib.sha256(f"{p.title}\n{p.text}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Content:
    """What a passage is about, and the (name, attribute) pairs that it states."""

    about: frozenset[str]
    states: frozenset[tuple[str, str]]


class Truth:
    """The truth about a world of facts."""

    def __init__(
        self,
        entities: Collection[TableEntity],
        known: Collection[str],
        contents: Mapping[str, Content],
    ):
        """known: names of entities whose facts need no retrieval. contents: by passage_key."""
        self.reader = Reader(tuple(entities))
        self.known, self.contents = frozenset(known), contents

    # ---- what the commands ask -------------------------------------------------------------------
    def judge(self, query: CritiqueQuery) -> str:
        """Returns the true reflection token for a critique query.

        Raises ValueError on an unknown group and on missing evidence.
        """
        if query.group == "retrieve":
            return self.needs_retrieval(query.instruction, query.preceding, query.evidence)
        if query.group == "isuse":
            return usefulness.utility(self.reader, query.instruction, query.output)
        if query.group not in ("isrel", "issup"):
            raise ValueError(f"unknown critique group {query.group!r}")
        if query.evidence is None:
            raise ValueError(f"a critique query of group {query.group!r} needs evidence")
        if query.group == "issup":
            return self.support(query.instruction, query.evidence, query.output)
        asked = self.reader.instruction(query.instruction)
        relevant = bool(set(asked.names) & self.content(query.evidence, asked).about)
        return reflection.RELEVANT if relevant else reflection.IRRELEVANT

    def supports(self, instruction: str, passage: Passage, segment: str) -> bool:
        """Returns whether a passage fully supports a segment: the judge of citations."""
        return self.support(instruction, passage, segment) == reflection.FULLY

    def stated_facts(self, text: str) -> list[tuple[str, str, str]]:
        """Returns (name, relation, value) of each fact that a text states."""
        return [(f.name, f.relation, f.value) for f in self.reader.stated(text)]

    def entity_of(self, question: str) -> str:
        """Returns the entity that a question is about, the first of two; "" if there is none."""
        return next(iter(self.reader.instruction(question).names), "")

    # ---- passages --------------------------------------------------------------------------------
    def content(self, p: Passage, asked: FactAsked) -> Content:
        """What a passage states; of one that is not the world's, about the asked entities alone."""
        if found := self.contents.get(passage_key(p)):
            return found
        text = f" {normalise(p.title)} {normalise(p.text)} "

        def holds(value: str) -> bool:
            return f" {normalise(value)} " in text

        known = [self.reader.entities[n] for n in asked.names if n in self.reader.entities]
        about = {e.name for e in known if any(map(holds, e.names))}
        states = {
            (e.name, attribute)
            for e in known
            if e.name in about
            for attribute, values in e.facts
            if any(map(holds, values))
        }
        return Content(frozenset(about), frozenset(states))

    # ---- IsSup -----------------------------------------------------------------------------------
    def support(self, instruction: str, p: Passage, output: str) -> str:
        """Returns the IsSup token: how many of the output's facts the passage states."""
        asked, text = self.reader.instruction(instruction), output.strip()
        if asked.form in ("everyday", "unknown") or usefulness.is_refusal(text):
            return reflection.NO_SUPPORT
        content = self.content(p, asked)
        if asked.form in ("claim", "choice"):
            return self._verdict_support(asked, content, text)
        if asked.comparison and (share := self._conclusion_share(asked, content, text)) is not None:
            return _level(share)
        shares = [
            share
            for fact, sentence in self.reader.pieces(text, next(iter(asked.names), ""))
            if (share := self._share(asked, content, fact, sentence)) is not None
        ]
        return _level(sum(shares) / len(shares)) if shares else reflection.NO_SUPPORT

    def _share(
        self, asked: FactAsked, content: Content, fact: Stated | None, sentence: str
    ) -> float | None:
        """How much of a sentence a passage states, 0 to 1; None if it states nothing."""
        if fact is None:
            checks = list(self._checks_of_values(asked, content, sentence))
            return sum(checks) / len(checks) if checks else None
        attribute = relations.by_name()[fact.relation].attribute
        is_stated = (fact.name, attribute) in content.states
        return float(is_stated and self.reader.matches(fact.name, attribute, fact.value))

    def _checks_of_values(self, asked: FactAsked, content: Content, text: str) -> Iterator[bool]:
        """Whether the passage states them, of each value in a text that no template fits.

        A value of the asked relation's type must be the value asked for. Another one must be any
        that the passage states about the entity.
        """
        entities = [self.reader.entities[n] for n in asked.names if n in self.reader.entities]
        for e in entities:
            for name in e.names:
                text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", " ", text, flags=re.IGNORECASE)
        types = {r.value_type: None for e in entities for r in relations.of_kind(e.kind)}
        for value_type in types:
            is_asked = asked.relation is not None and asked.relation.value_type == value_type
            if value_type == "number" and not is_asked:  # "20 million dollars" is no telephone code
                continue
            for value in self.reader.values_in(text, value_type):
                yield any(
                    (e.name, r.attribute) in content.states
                    and self.reader.matches(e.name, r.attribute, value)
                    for e in entities
                    for r in ([asked.relation] if is_asked and asked.relation else
                              relations.of_kind(e.kind))
                )  # fmt: skip

    def _verdict_support(self, asked: FactAsked, content: Content, text: str) -> str:
        """Of the answer to a claim or a choice: by what the passage states of the attribute."""
        assert asked.relation is not None
        name, attribute = asked.names[0], asked.relation.attribute
        if (name, attribute) not in content.states:
            return reflection.NO_SUPPORT
        if asked.form == "claim":
            verdict = usefulness.verdict_of(text)
            is_true = self.reader.matches(name, attribute, asked.claimed)
            is_right = verdict is not None and verdict == is_true
        else:
            chosen = dict(asked.choices).get(usefulness.label_of(text, asked.choices) or "", "")
            is_right = bool(chosen) and self.reader.matches(name, attribute, chosen)
        return reflection.FULLY if is_right else reflection.NO_SUPPORT

    def _conclusion_share(self, asked: FactAsked, content: Content, text: str) -> float | None:
        """Of the last sentence of a comparison: the share of the two values that are stated."""
        if normalise(text) not in map(normalise, usefulness.conclusions(self.reader, asked)):
            return None
        right = usefulness.right_conclusion(self.reader, asked)
        if right is None or normalise(text) != normalise(right):
            return 0.0
        assert asked.relation is not None
        return sum((n, asked.relation.attribute) in content.states for n in asked.names) / 2

    # ---- Retrieve --------------------------------------------------------------------------------
    def needs_retrieval(
        self, instruction: str, preceding: str = "", evidence: Passage | None = None
    ) -> str:
        """Returns the Retrieve token before the next segment (paper, Table 1).

        Before the first segment: retrieve unless nothing is to be looked up or the entity is well
        known. Later: go on with evidence that has what was not yet stated; conclude without
        retrieval; otherwise retrieve.
        """
        asked = self.reader.instruction(instruction)
        if asked.form == "everyday" or (asked.names and self.known >= set(asked.names)):
            return reflection.NO_RETRIEVAL
        if not preceding or not asked.names:
            return reflection.RETRIEVAL
        stated = {(f.name, f.relation) for f in self.reader.stated(preceding, asked.names[0])}
        left = self._wanted(asked) - stated
        if not left:
            return reflection.NO_RETRIEVAL
        has = self.content(evidence, asked).states if evidence is not None else frozenset()
        kinds = {n: self.reader.entities[n].kind for n in asked.names if n in self.reader.entities}
        held = {(n, f"{kinds[n]}_{attribute}") for n, attribute in has if n in kinds}
        return reflection.CONTINUE if left & held else reflection.RETRIEVAL

    def _wanted(self, asked: FactAsked) -> set[tuple[str, str]]:
        """The (name, relation) pairs that an answer states."""
        if asked.relation is not None:
            return {(name, asked.relation.name) for name in asked.names}
        e = self.reader.entities[asked.names[0]]
        return {(e.name, f"{e.kind}_{attribute}") for attribute in e.attributes}


def _level(share: float) -> str:
    if share == 1:
        return reflection.FULLY
    return reflection.PARTIALLY if share > 0 else reflection.NO_SUPPORT


# ---- teacher.jsonl -------------------------------------------------------------------------------
def read_truth(file: str | Path) -> Truth:
    """Returns the truth about a world, given the teacher.jsonl that `selfrag world` wrote for it.

    Raises UserError if the file holds no entities or a row lacks a field.
    """
    entities: list[TableEntity] = []
    known: list[str] = []
    contents: dict[str, Content] = {}
    for where, row in read_rows(file):
        try:
            if row["world"] != WORLD:
                raise UserError(f"{where}: field 'world': {row['world']!r} is not {WORLD!r}")
            if "key" in row:
                contents[row["key"]] = _content(row)
            else:
                entities.append(from_row(row, row["decile"]))
                known += [row["name"]] if row["is_known"] else []
        except (KeyError, TypeError, AttributeError, ValueError) as e:
            raise UserError(
                f"{where}: lacks what the truth about facts needs ({e}); "
                "write the world again with `selfrag world`"
            ) from None
    if not entities:
        raise UserError(f"{file}: holds no entities")
    return Truth(entities, known, contents)


def _content(row: dict[str, Any]) -> Content:
    states = frozenset((name, attribute) for name, attribute in row["states"])
    return Content(frozenset(row["about"]), states)
