"""What is true in a world: parses questions, sentences and passages into facts and judges them.

The language is regular, so every sentence that a model writes can be checked exactly against a
passage. The rule teacher (critic/collecting.py) and the evaluation of critics and citations use
these judgements.
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
class ParsedInstruction:
    """What an instruction asks for."""

    form: str  # fact, two_part, biography, claim, choice, common or unknown
    name: str = ""
    relations: tuple[str, ...] = ()
    claimed: str = ""  # the value that a claim states


@cache
def _clause_patterns() -> list[tuple[str, re.Pattern]]:
    phrases = {(r.phrase, r.name) for k in KINDS.values() for r in k.relations}
    # Longest first, so that a phrase is never matched as a part of a longer one.
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


def parse_facts(text: str) -> list[Fact]:
    """Returns the facts stated by sentences of the form "N clause, clause and clause.", in order.

    Other sentences state no facts.
    """
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


def passage_facts(p: Passage) -> set[Fact]:
    return set(parse_facts(p.text))


def parse_instruction(instruction: str) -> ParsedInstruction:
    """Returns what an instruction asks for; its form is "unknown" if it does not parse."""
    text = instruction.strip()
    if text.lower() in _common_answers():
        return ParsedInstruction("common")
    if m := re.fullmatch(r"Tell me about (?P<n>.+)\.", text):
        return ParsedInstruction("biography", m["n"])
    if m := re.fullmatch(r"Is it true that (?P<c>.+)\?", text):
        facts = parse_facts(m["c"] + ".")
        if len(facts) == 1:
            [fact] = facts
            return ParsedInstruction("claim", fact.name, (fact.relation,), fact.value)
    if m := re.fullmatch(r"(?P<q>.+\?) A: .+", text):
        inner = parse_instruction(m["q"])
        if inner.form == "fact":
            return ParsedInstruction("choice", inner.name, inner.relations)
    for m in re.finditer(r" and ", text):
        a, b = _parse_question(text[: m.start()] + "?"), _parse_question(text[m.end() :])
        if a and b and a[1] == b[1]:
            return ParsedInstruction("two_part", a[1], (a[0], b[0]))
    if hit := _parse_question(text):
        return ParsedInstruction("fact", hit[1], (hit[0],))
    return ParsedInstruction("unknown")


def _parse_question(text: str) -> tuple[str, str] | None:
    """Returns (relation, name) of a single question, or None."""
    for relation, pattern in _question_patterns():
        if m := pattern.fullmatch(text):
            return relation, m["n"]
    return None


def is_relevant(instruction: str, p: Passage) -> bool:
    """Returns whether a passage is about the entity that the instruction asks about."""
    asked = parse_instruction(instruction)
    return bool(asked.name) and any(f.name == asked.name for f in passage_facts(p))


def support(instruction: str, p: Passage, output: str) -> str:
    """Returns the IsSup token: how many of the output's facts the passage states.

    A passage states a fact if it has the same name, relation and value. Claims and choices are
    judged by what the passage states about the attribute in question.
    """
    asked, evidence = parse_instruction(instruction), passage_facts(p)
    answer = output.strip()
    is_verdict = asked.form == "claim" and answer in (language.TRUE, language.FALSE)
    if is_verdict or asked.form == "choice":
        subject = (asked.name, asked.relations[0])
        stated = [f.value for f in evidence if (f.name, f.relation) == subject]
        if is_verdict:
            verdict = language.TRUE if asked.claimed in stated else language.FALSE
            supported = bool(stated) and answer == verdict
        else:
            label = re.escape(answer.rstrip("."))
            option = re.search(rf"(?:^|\s){label}: {_VALUE}", instruction)
            supported = option is not None and option["v"] in stated
        return reflection.FULLY if supported else reflection.NO_SUPPORT
    facts = parse_facts(output)
    num_supported = sum(f in evidence for f in facts)
    if facts and num_supported == len(facts):
        return reflection.FULLY
    return reflection.PARTIALLY if num_supported else reflection.NO_SUPPORT


def utility(instruction: str, output: str) -> str:
    """Returns the IsUse token. It ignores evidence, as the critic sees none (paper, Table 1).

    5: answers everything that was asked; 3: answers a part; 2: states something else about the
    entity; 1: is about another entity, or no answer at all.
    """
    asked, text = parse_instruction(instruction), output.strip()
    if asked.form == "common":
        return _utility_token(5 if text == _common_answers()[instruction.strip().lower()] else 1)
    if asked.form == "claim":
        return _utility_token(5 if text in (language.TRUE, language.FALSE) else 1)
    if asked.form == "choice":
        return _utility_token(5 if text.rstrip(".") in language.CHOICE_LABELS else 1)
    facts = parse_facts(text)
    if not facts or any(f.name != asked.name for f in facts):
        return _utility_token(1)
    stated = {f.relation for f in facts}
    if asked.form == "biography":
        return _utility_token(5 if len(stated) >= 4 else 3)
    num_answered = sum(r in stated for r in asked.relations)
    if num_answered == 0:
        return _utility_token(2)
    return _utility_token(5 if num_answered == len(asked.relations) else 3)


def _utility_token(k: int) -> str:
    return reflection.ISUSE[k - 1]


def needs_retrieval(
    instruction: str,
    known_names: Iterable[str],
    preceding: str = "",
    evidence: Passage | None = None,
) -> str:
    """Returns the Retrieve token before the next segment (paper, Table 1).

    Before the first segment: retrieve unless the entity is well known. Later: in a biography,
    continue while the evidence holds attributes that were not yet stated, correctly or not;
    otherwise retrieve.
    """
    asked = parse_instruction(instruction)
    if not asked.name or asked.name in known_names:
        return reflection.NO_RETRIEVAL
    if not preceding or evidence is None:
        return reflection.RETRIEVAL
    stated = {f.relation for f in parse_facts(preceding)}
    remaining = {f.relation for f in passage_facts(evidence) if f.name == asked.name} - stated
    if asked.form == "biography" and remaining:
        return reflection.CONTINUE
    return reflection.RETRIEVAL


def judge(query: CritiqueQuery, known_names: Iterable[str]) -> str:
    """Returns the true reflection token for a critique query.

    Raises ValueError on an unknown group and on missing evidence.
    """
    if query.group == "retrieve":
        return needs_retrieval(query.instruction, known_names, query.preceding, query.evidence)
    if query.group == "isuse":
        return utility(query.instruction, query.output)
    if query.group not in ("isrel", "issup"):
        raise ValueError(f"unknown critique group {query.group!r}")
    if query.evidence is None:
        raise ValueError(f"a critique query of group {query.group!r} needs evidence")
    if query.group == "issup":
        return support(query.instruction, query.evidence, query.output)
    if is_relevant(query.instruction, query.evidence):
        return reflection.RELEVANT
    return reflection.IRRELEVANT


def read_truth(file: str | Path) -> Callable[[CritiqueQuery], str]:
    """Returns the judge for a world, given the teacher.jsonl that `selfrag world` wrote for it.

    The judge maps a critique query to its true reflection token. Raises UserError if the file holds
    no entities or a row lacks a field.
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
    """Returns whether a passage fully supports a segment; serves as the judge of citations."""
    return support(instruction, passage, segment) == reflection.FULLY


def stated_facts(text: str) -> list[tuple[str, str, str]]:
    """Returns (name, relation, value) of each fact that a text states."""
    return [(f.name, f.relation, f.value) for f in parse_facts(text)]
