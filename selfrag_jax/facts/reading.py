"""Reads instructions and answers back: what is asked, and which facts a text states.

Sentences of the templates are read exactly. A template is split at its fields; the name in it must
be that of an entity, so that titles with commas, full stops and "or" are read rightly, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

from selfrag_jax.facts import comparisons, everyday, language, relations
from selfrag_jax.facts.comparisons import Comparison
from selfrag_jax.facts.everyday import EverydayRow
from selfrag_jax.facts.relations import RELATIONS, FactRelation
from selfrag_jax.facts.table import TableEntity
from selfrag_jax.text.normalising import normalise

_PRONOUNS = {"it", "he", "she", "they", "this film", "this city", "this country"}
_END = re.compile(r"[.!?](?=\s|$)")
_CHOICES = re.compile(r"(?<=[?.]) (?=A: )")


@dataclass(frozen=True)
class Stated:
    """A fact that a text states: name and value as in the table, or as in the text if unknown."""

    name: str
    relation: str
    value: str


@dataclass(frozen=True)
class FactAsked:
    """What an instruction asks: form is fact, claim, choice, comparison, description, everyday or
    unknown."""

    form: str
    names: tuple[str, ...] = ()
    relation: FactRelation | None = None
    claimed: str = ""  # the value that a claim states
    choices: tuple[tuple[str, str], ...] = ()  # (label, value)
    comparison: Comparison | None = None
    everyday: EverydayRow | None = None


@dataclass(frozen=True)
class _Frame:
    """A template with one gap for a name (and one for a value), split at them, in lower case."""

    parts: tuple[str, ...]
    relation: FactRelation | None = None

    @property
    def weight(self) -> int:
        return sum(map(len, self.parts))


def _frame(template: str, relation: FactRelation | None = None) -> _Frame:
    return _Frame(tuple(p.lower() for p in re.split(r"\{\w+\}", template)), relation)


def _heaviest(frames: Iterator[_Frame]) -> tuple[_Frame, ...]:
    return tuple(sorted(frames, key=lambda f: (-f.weight, f.parts)))


@cache
def _questions() -> tuple[_Frame, ...]:
    return _heaviest(_frame(q, r) for r in RELATIONS for q in (*r.questions, *r.test_questions))


@cache
def _statements() -> tuple[_Frame, ...]:
    return _heaviest(_frame(s.removesuffix("."), r) for r in RELATIONS for s in r.statements)


@cache
def _claims() -> tuple[_Frame, ...]:
    return _heaviest(_frame(f) for f in (*language.CLAIMS, *language.TEST_CLAIMS))


@cache
def _descriptions() -> tuple[_Frame, ...]:
    return _heaviest(_frame(f) for f in (*language.DESCRIPTIONS, *language.TEST_DESCRIPTIONS))


@cache
def _comparisons() -> tuple[tuple[_Frame, Comparison], ...]:
    pairs = [
        (_frame(q, c.asked), c)
        for c in comparisons.COMPARISONS
        for q in (*c.questions, *c.test_questions)
    ]
    return tuple(sorted(pairs, key=lambda p: (-p[0].weight, p[0].parts)))


def _gap(frame: _Frame, text: str) -> str | None:
    """The text in the one gap of a frame; None if the frame does not fit."""
    start, end = frame.parts
    lower = text.lower()
    fits = lower.startswith(start) and lower.endswith(end) and len(text) > len(start) + len(end)
    return text[len(start) : len(text) - len(end)].strip() if fits else None


def _gaps(frame: _Frame, text: str) -> Iterator[tuple[str, str]]:
    """The texts in the two gaps of a frame, for every place where the part between them occurs."""
    start, middle, end = frame.parts
    lower = text.lower()
    if not lower.startswith(start) or not lower.endswith(end):
        return
    inner = text[len(start) : len(text) - len(end)]
    at = inner.lower().find(middle, 1)
    while at > 0:
        first, second = inner[:at].strip(), inner[at + len(middle) :].strip()
        if first and second:
            yield first, second
        at = inner.lower().find(middle, at + 1)


class Reader:
    """Reads texts about the entities of a world."""

    def __init__(self, entities: Sequence[TableEntity]):
        self.entities: Mapping[str, TableEntity] = {e.name: e for e in entities}
        self._names: dict[tuple[str, str], str] = {}
        # The name first, then the short name and aliases of what is asked about, then the others'.
        for e in entities:
            self._names[e.kind, normalise(e.name)] = e.name
        for asked in (True, False):
            for e in entities:
                if e.is_asked == asked:
                    for name in e.names:
                        self._names.setdefault((e.kind, normalise(name)), e.name)
        self._values: dict[str, dict[str, str]] = {r.value_type: {} for r in RELATIONS}
        for e in entities:
            for r in relations.of_kind(e.kind):
                for value in e.values(r.attribute):
                    # The value to show of whoever has it first; aliases are compared by entity.
                    self._values[r.value_type].setdefault(normalise(value), e.value(r.attribute))
        self.instruction = lru_cache(maxsize=50_000)(self._instruction)

    # ---- names and values ------------------------------------------------------------------------
    def name(self, text: str, kind: str = "") -> str:
        """Returns the name of the entity that a text names; "" if there is none."""
        key = normalise(text)
        kinds = [kind] if kind else ["film", "person", "city", "country", "element", "airport"]
        return next((self._names[k, key] for k in kinds if (k, key) in self._names), "")

    def matches(self, name: str, attribute: str, value: str) -> bool:
        """Whether a value, in any of its spellings, is the entity's for an attribute."""
        e = self.entities.get(name)
        return e is not None and normalise(value) in map(normalise, e.values(attribute))

    def value(self, name: str, r: FactRelation, text: str) -> str:
        """Returns a value as the table shows it; as the text has it if it is unknown."""
        text = text.strip().removesuffix(".").strip()
        bare = re.sub(r"^(?:an?|the)\s", "", text, flags=re.IGNORECASE)
        if self.matches(name, r.attribute, text):
            return self.entities[name].value(r.attribute)
        known = self._values[r.value_type]
        return known.get(normalise(text)) or known.get(normalise(bare)) or text

    def values_in(self, text: str, value_type: str) -> list[str]:
        """Returns the values of a type that a text holds as whole words, longest first, in order.

        In each place the longest one counts: "New York" is not "York".
        """
        if value_type == "code":  # in capitals: "per" and "man" are words
            text = " ".join(re.findall(r"\b[A-Z]{3}\b", text))
        words, known = normalise(text).split(), self._values[value_type]
        found, i = [], 0
        while i < len(words):
            for n in range(min(8, len(words) - i), 0, -1):
                if (key := " ".join(words[i : i + n])) in known:
                    found.append(key)
                    i += n - 1
                    break
            i += 1
        return found

    # ---- instructions ----------------------------------------------------------------------------
    def _instruction(self, instruction: str) -> FactAsked:
        """Returns what an instruction asks."""
        text = " ".join(instruction.split())
        if row := everyday.expected(text):
            return FactAsked("everyday", everyday=row)
        question, *options = _CHOICES.split(text, maxsplit=1)
        if options and (asked := self._fact(question)):
            labelled = re.findall(r"([A-D]): (.*?)(?= [A-D]: |$)", options[0])
            return FactAsked("choice", asked.names, asked.relation, choices=tuple(labelled))
        for found in (self._claim(text), self._comparison(text), self._fact(text)):
            if found and self.entities.keys() >= set(found.names):
                return found
        for frame in _descriptions():
            if (gap := _gap(frame, text)) and (name := self.name(gap)):
                return FactAsked("description", (name,))
        return self._fact(text) or FactAsked("unknown")

    def _fact(self, text: str) -> FactAsked | None:
        """A question about one fact; of a name that nothing has, if no frame fits a known one."""
        unknown = None
        for frame in _questions():
            if gap := _gap(frame, text):
                assert frame.relation is not None
                if name := self.name(gap, frame.relation.kind):
                    return FactAsked("fact", (name,), frame.relation)
                unknown = unknown or FactAsked("fact", (gap,), frame.relation)
        return unknown

    def _claim(self, text: str) -> FactAsked | None:
        for frame in _claims():
            if (gap := _gap(frame, text)) and (found := self._statement(gap, needs_name=True)):
                r = relations.by_name()[found.relation]
                return FactAsked("claim", (found.name,), r, claimed=found.value)
        return None

    def _comparison(self, text: str) -> FactAsked | None:
        for frame, c in _comparisons():
            for a, b in _gaps(frame, text):
                names = self.name(a, c.asked.kind), self.name(b, c.asked.kind)
                if all(names):
                    return FactAsked("comparison", names, c.asked, comparison=c)
        return None

    # ---- statements ------------------------------------------------------------------------------
    def _statement(self, sentence: str, needs_name: bool = False) -> Stated | None:
        """The fact of one sentence; of an unknown name only if no frame fits a known one."""
        text = sentence.strip().removesuffix(".").strip()
        unknown = None
        for frame in _statements():
            r = frame.relation
            assert r is not None
            if len(frame.parts) != 3:
                continue
            for gap, value in _gaps(frame, text):
                if name := self.name(gap, r.kind):
                    return Stated(name, r.name, self.value(name, r, value))
                unknown = unknown or Stated(gap, r.name, self.value(gap, r, value))
        return None if needs_name else unknown

    def stated(self, text: str, subject: str = "") -> list[Stated]:
        """Returns the facts that a text states, in order.

        A sentence is the shortest piece between full stops that a template fits, as names and
        values hold full stops. subject: the entity that a pronoun means before any is named.
        """
        return [fact for fact, _ in self.pieces(text, subject) if fact is not None]

    def pieces(self, text: str, subject: str = "") -> list[tuple[Stated | None, str]]:
        """Returns (fact, sentence) of all sentences; None for those that no template fits."""
        ends = [m.end() for m in _END.finditer(text)]
        if not ends or text[ends[-1] :].strip():
            ends.append(len(text))
        out: list[tuple[Stated | None, str]] = []
        start, i = 0, 0
        while i < len(ends):
            found, until = None, i
            for j in range(i, min(i + 4, len(ends))):
                fact = self._statement(text[start : ends[j]])
                if fact and fact.name in self.entities:
                    found, until = fact, j
                    break
                found = found or (fact if j == i else None)
            if found and found.name.lower() in _PRONOUNS and subject:
                e = self.entities.get(subject)
                r = relations.by_name()[found.relation]
                r = next((x for x in _alike(r) if e and x.kind == e.kind), r)
                found = Stated(subject, r.name, self.value(subject, r, found.value))
            if found and found.name in self.entities:
                subject = found.name
            out.append((found, text[start : ends[until]].strip()))
            start, i = ends[until], until + 1
        return [piece for piece in out if piece[1]]


@cache
def _alike(r: FactRelation) -> tuple[FactRelation, ...]:
    """The relations whose statements are those of `r`: "It was released in 1999."""
    return tuple(x for x in RELATIONS if set(x.statements) & set(r.statements))
