"""How useful an answer is (IsUse), and what its words say."""

from __future__ import annotations

import re
from collections.abc import Collection

from selfrag_jax.facts import comparisons, everyday, language
from selfrag_jax.facts.reading import FactAsked, Reader
from selfrag_jax.text import reflection
from selfrag_jax.text.normalising import normalise

REFUSAL_UTILITY = 3
FULL_DESCRIPTION = 3  # facts that a description states, or all if there are fewer


def utility(reader: Reader, instruction: str, output: str) -> str:
    """Returns the IsUse token. It ignores evidence, as the critic sees none (paper, Table 1).

    5: answers all that was asked; 3: a part, or a refusal; 2: states something else about the
    entity; 1: is about another entity, or no answer at all.
    """
    asked, text = reader.instruction(instruction), output.strip()
    if asked.everyday is not None:
        return _utility(5 if everyday.is_right(asked.everyday, text) else 1)
    if is_refusal(text):
        return _utility(REFUSAL_UTILITY)
    if asked.form == "claim":
        return _utility(1 if verdict_of(text) is None else 5)
    if asked.form == "choice":
        return _utility(1 if label_of(text, asked.choices) is None else 5)
    if not asked.names:
        return _utility(1)
    facts = reader.stated(text, asked.names[0])
    own = {(f.name, f.relation) for f in facts if f.name in asked.names}
    if facts and not own:
        return _utility(1)
    if asked.form == "description":
        return _utility(_description_utility(reader, asked, own, text))
    return _utility(_answer_utility(reader, asked, own, text))


def _description_utility(
    reader: Reader, asked: FactAsked, own: set[tuple[str, str]], text: str
) -> int:
    e = reader.entities[asked.names[0]]
    n = len(own)
    if not own:  # no template fits: by the values
        n = len({a for a, _ in e.facts if any(holds(text, v) for v in e.values(a))})
    return 5 if n >= min(FULL_DESCRIPTION, len(e.facts)) else 3 if n else 1


def _answer_utility(reader: Reader, asked: FactAsked, own: set[tuple[str, str]], text: str) -> int:
    assert asked.relation is not None
    wanted = {(name, asked.relation.name) for name in asked.names}
    answered = len(wanted & own)
    if not own:
        found = reader.values_in(text, asked.relation.value_type)
        answered = min(len(found), len(wanted))
    if asked.comparison:
        concludes = any(normalise(c) in normalise(text) for c in conclusions(reader, asked))
        done = answered + concludes
        return 5 if done == 3 else 3 if done else 2 if own else 1
    return 5 if answered else 2 if own else 1


# ---- what answers say ---------------------------------------------------------------------------
def conclusions(reader: Reader, asked: FactAsked) -> list[str]:
    """All conclusions that a comparison can have."""
    assert asked.comparison is not None
    names = [language.asked_name(reader.entities[n]) for n in asked.names]
    return [c.format(x=x) for c in asked.comparison.conclusions for x in names]


def right_conclusion(reader: Reader, asked: FactAsked) -> str | None:
    """Returns the true last sentence of a comparison; None if a value is unknown."""
    assert asked.comparison is not None and asked.relation is not None
    a, b = (reader.entities[n] for n in asked.names)
    attribute = asked.relation.attribute
    if not (a.values(attribute) and b.values(attribute)):
        return None
    names = language.asked_name(a), language.asked_name(b)
    values = a.value(attribute), b.value(attribute)
    return comparisons.conclusion(asked.comparison, names, values)


def is_refusal(text: str) -> bool:
    return any(sign in normalise(text) for sign in language.REFUSED)


def verdict_of(text: str) -> bool | None:
    """What an answer to a claim says; None if it is neither true nor false."""
    words = normalise(text).split()
    found = {w in ("true", "yes") for w in words if w in ("true", "yes", "false", "no")}
    return found.pop() if len(found) == 1 else None


def label_of(text: str, choices: Collection[tuple[str, str]]) -> str | None:
    """The label that an answer chooses: one that stands by itself, or that of the value named."""
    if m := re.search(r"\(([A-D])\)|^([A-D])(?:[.:)](?=\s|$)|$)", text.strip()):
        return m[1] or m[2]
    named = [label for label, value in choices if holds(text, value)]
    return named[0] if len(named) == 1 else None


def holds(text: str, value: str) -> bool:
    return f" {normalise(value)} " in f" {normalise(text)} "


def _utility(k: int) -> str:
    return reflection.ISUSE[k - 1]
