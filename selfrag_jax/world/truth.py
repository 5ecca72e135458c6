"""What is true in a world, read from its language: parsing of questions, sentences and passages into facts.

The language is regular, so every sentence that a model writes can be checked against a passage exactly. The rule
teacher (critique/collect.py) and the evaluation of critics and citations judge by this module.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from selfrag_jax.errors import UserError
from selfrag_jax.records import Passage, read_rows
from selfrag_jax.text import reflection
from selfrag_jax.text.prompts import CritiqueQuery
from selfrag_jax.world import language
from selfrag_jax.world.language import KINDS

_VALUE = r"(?P<v>[^\s,.?]+ [^\s,.?]+)"  # two words


@dataclass(frozen=True)
class Fact:
    name: str
    relation: str
    value: str


@dataclass(frozen=True)
class Asked:
    """What an instruction asks: `form` is one of fact, two_part, biography, claim, choice, common, unknown."""

    form: str
    name: str = ""
    relations: tuple[str, ...] = ()
    claimed: str = ""  # the value a claim states


@cache
def _clause_patterns() -> list[tuple[str, re.Pattern]]:
    phrases = {(r.phrase, r.name) for k in KINDS.values() for r in k.relations}
    # Longest first: "was founded in" must not be read as part of another phrase.
    return [
        (name, re.compile(re.escape(phrase).replace(r"\{v\}", _VALUE)))
        for phrase, name in sorted(phrases, key=lambda p: (-len(p[0]), p))
    ]


@cache
def _question_patterns() -> list[tuple[str, re.Pattern]]:
    questions = {(q, r.name) for k in KINDS.values() for r in k.relations for q in r.questions}
    return [
        (name, re.compile(re.escape(q).replace(r"\{n\}", r"(?P<n>.+?)"), re.IGNORECASE))
        for q, name in sorted(questions, key=lambda p: (-len(p[0]), p))
    ]


@cache
def _common_answers() -> dict[str, str]:
    return {q.lower(): answer for questions, answer in language.COMMON_KNOWLEDGE for q in questions}


def facts_of(text: str) -> list[Fact]:
    """The facts that sentences of the form "N clause, clause and clause." state, in order; nothing for other text."""
    facts = []
    for sentence in re.split(r"(?<=\.)\s+", text.strip()):
        hits = sorted(
            (m.start(), m.end(), relation, m["v"])
            for relation, pattern in _clause_patterns()
            for m in pattern.finditer(sentence)
        )
        if not hits:
            continue
        name = sentence[: hits[0][0]].strip()
        facts += [Fact(name, relation, value) for _, _, relation, value in hits]
    return facts


def facts_of_passage(p: Passage) -> set[Fact]:
    return set(facts_of(p.text))


def parse(instruction: str) -> Asked:
    """What the instruction asks for."""
    text = instruction.strip()
    if text.lower() in _common_answers():
        return Asked("common")
    if m := re.fullmatch(r"Tell me about (?P<n>.+)\.", text):
        return Asked("biography", m["n"])
    if m := re.fullmatch(r"Is it true that (?P<c>.+)\?", text):
        facts = facts_of(m["c"] + ".")
        if len(facts) == 1:
            return Asked("claim", facts[0].name, (facts[0].relation,), facts[0].value)
    if m := re.fullmatch(r"(?P<q>.+\?) A: .+", text):
        inner = parse(m["q"])
        if inner.form == "fact":
            return Asked("choice", inner.name, inner.relations)
    for m in re.finditer(r" and ", text):
        a, b = _question(text[: m.start()] + "?"), _question(text[m.end() :])
        if a and b and a[1] == b[1]:
            return Asked("two_part", a[1], (a[0], b[0]))
    if hit := _question(text):
        return Asked("fact", hit[1], (hit[0],))
    return Asked("unknown")


def _question(text: str) -> tuple[str, str] | None:
    """(relation, name) of a single question."""
    for relation, pattern in _question_patterns():
        if m := pattern.fullmatch(text):
            return relation, m["n"]
    return None


def is_relevant(instruction: str, p: Passage) -> bool:
    """A passage is relevant when it is about the entity that the instruction asks about."""
    asked = parse(instruction)
    return bool(asked.name) and any(f.name == asked.name for f in facts_of_passage(p))


def support(instruction: str, p: Passage, output: str) -> str:
    """The IsSup token: how many of the output's facts the passage states, with the same name and value."""
    asked, known = parse(instruction), facts_of_passage(p)
    if asked.form == "claim" and output.strip() in (language.TRUE, language.FALSE):
        stated = [
            f.value for f in known if (f.name, f.relation) == (asked.name, asked.relations[0])
        ]
        verdict = language.TRUE if asked.claimed in stated else language.FALSE
        return reflection.FULLY if stated and output.strip() == verdict else reflection.NO_SUPPORT
    if asked.form == "choice":
        option = re.search(
            rf"(?:^|\s){re.escape(output.strip().rstrip('.'))}: {_VALUE}", instruction
        )
        stated = [
            f.value for f in known if (f.name, f.relation) == (asked.name, asked.relations[0])
        ]
        return reflection.FULLY if option and option["v"] in stated else reflection.NO_SUPPORT
    facts = facts_of(output)
    supported = sum(f in known for f in facts)
    if facts and supported == len(facts):
        return reflection.FULLY
    return reflection.PARTIALLY if supported else reflection.NO_SUPPORT


def utility(instruction: str, output: str) -> str:
    """The IsUse token, judged by the output's form alone, as the critic sees no evidence (paper, Table 1).

    5: answers all that was asked; 3: a part of it; 2: tells something else about the entity asked about;
    1: about another entity, or no answer at all.
    """
    asked, text = parse(instruction), output.strip()
    if asked.form == "common":
        return _utility(5 if text == _common_answers()[instruction.strip().lower()] else 1)
    if asked.form == "claim":
        return _utility(5 if text in (language.TRUE, language.FALSE) else 1)
    if asked.form == "choice":
        return _utility(5 if text.rstrip(".") in language.CHOICE_LABELS else 1)
    facts = facts_of(text)
    if not facts or any(f.name != asked.name for f in facts):
        return _utility(1)
    told = {f.relation for f in facts}
    if asked.form == "biography":
        return _utility(5 if len(told) >= 4 else 3)
    answered = sum(r in told for r in asked.relations)
    if answered == 0:
        return _utility(2)
    return _utility(5 if answered == len(asked.relations) else 3)


def _utility(k: int) -> str:
    return reflection.ISUSE[k - 1]


def needs_retrieval(
    instruction: str,
    known_names: Iterable[str],
    preceding: str = "",
    evidence: Passage | None = None,
) -> str:
    """The Retrieve token before the next segment (paper, Table 1).

    Before the first segment: retrieval for entities that are not well known. Later: continue while the evidence holds
    attributes that have not been told yet, rightly or wrongly; otherwise retrieve.
    """
    asked = parse(instruction)
    if not asked.name or asked.name in known_names:
        return reflection.NO_RETRIEVAL
    if not preceding or evidence is None:
        return reflection.RETRIEVAL
    told = {f.relation for f in facts_of(preceding)}
    left = {f.relation for f in facts_of_passage(evidence) if f.name == asked.name} - told
    return reflection.CONTINUE if asked.form == "biography" and left else reflection.RETRIEVAL


def judge(query: CritiqueQuery, known_names: Iterable[str]) -> str:
    """The true reflection token for a critique query. Raises ValueError on an unknown group."""
    if query.group == "retrieve":
        return needs_retrieval(query.instruction, known_names, query.preceding, query.evidence)
    if query.group == "isrel":
        return (
            reflection.RELEVANT
            if is_relevant(query.instruction, query.evidence)
            else reflection.IRRELEVANT
        )
    if query.group == "issup":
        return support(query.instruction, query.evidence, query.output)
    if query.group == "isuse":
        return utility(query.instruction, query.output)
    raise ValueError(f"unknown critique group {query.group!r}")


def read_truth(file: str | Path) -> Callable[[CritiqueQuery], str]:
    """The judge of the world that `selfrag world` wrote `file` (teacher.jsonl) for.

    Raises UserError for a file that holds no entities.
    """
    rows = list(read_rows(file))
    if not rows:
        raise UserError(f"{file}: holds no entities")
    for where, row in rows:
        if "entity" not in row or "group" not in row:
            raise UserError(
                f"{where}: expected the fields entity and group, as `selfrag world` writes them"
            )
    known = frozenset(row["entity"] for _, row in rows if row["group"] == "known")
    return lambda query: judge(query, known)


def fully_supports(instruction: str, passage: Passage, segment: str) -> bool:
    """Whether a passage fully supports a segment: the judge of citations."""
    return support(instruction, passage, segment) == reflection.FULLY


def stated_facts(text: str) -> list[tuple[str, str, str]]:
    """(name, relation, value) of each fact that a text states."""
    return [(f.name, f.relation, f.value) for f in facts_of(text)]
