"""How an entity is asked about and spoken of: claims, descriptions, statements, refusals.

{n} stands for the entity's name, {v} for a value and {s} for a statement without its full stop. The
phrasings of questions about one fact are in relations.py.
"""

from __future__ import annotations

from collections.abc import Iterable

from selfrag_jax.facts.relations import FactRelation, of_kind
from selfrag_jax.facts.table import TableEntity

TRUE, FALSE = "True.", "False."
CHOICE_LABELS = ("A", "B", "C", "D")
REFUSAL = "The passages do not say {indirect}."
# What metrics look for in a refusal: they compare without articles, by inclusion.
REFUSED = ("passages do not say", "passages do not tell", "do not know")

# Frames of claims and descriptions: of training, and of the test.
CLAIMS = (
    "Is it true that {s}?",
    "True or false: {s}.",
    "Is this statement true? {s}.",
    "Say whether this is true: {s}.",
)
TEST_CLAIMS = ("Is the following claim true or false? {s}.", "Is this correct? {s}.")
DESCRIPTIONS = (
    "Tell me about {n}.",
    "What do you know about {n}?",
    "Describe {n} in a few sentences.",
    "Write a short text about {n}.",
)
TEST_DESCRIPTIONS = ("Give me a short description of {n}.", "Summarise what is known about {n}.")


def asked_name(e: TableEntity) -> str:
    """How a question names an entity: its short name with an article, or with what marks it."""
    return e.name if e.name.startswith(e.short) else e.short


def asked_relations(e: TableEntity) -> list[FactRelation]:
    return [r for r in of_kind(e.kind) if e.values(r.attribute)]


# ---- sentences -----------------------------------------------------------------------------------
def with_article(word: str) -> str:
    return f"{'an' if word[:1].lower() in 'aeiou' else 'a'} {word}"


def capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def filled(template: str, name: str, value: str = "", capital: bool = True) -> str:
    """Returns a sentence of a template, with a capital at its beginning, or none of its own."""
    text = template.format(n=name, v=value, a_v=with_article(value) if value else "")
    if text.endswith(".."):  # "Warner Bros."
        text = text[:-1]
    if capital:
        return capitalised(text)
    return text[:1].lower() + text[1:] if template[:1] not in "{" else text


def refusal(r: FactRelation, name: str) -> str:
    return REFUSAL.format(indirect=r.indirect.format(n=name))


def claim(frame: str, r: FactRelation, name: str, value: str) -> str:
    """Returns a claim: "Is it true that X was directed by Y?"."""
    statement = filled(
        r.statements[0], name, value, capital=not frame.startswith("Is it true that")
    )
    return frame.format(s=statement.removesuffix("."))


def listed(items: Iterable[str]) -> str:
    *first, last = items
    return f"{', '.join(first)} and {last}" if first else last
