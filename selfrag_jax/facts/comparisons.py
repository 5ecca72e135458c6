"""Comparisons of two entities: how they are asked, and the sentence that concludes the answer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from selfrag_jax.facts import relations
from selfrag_jax.facts.relations import FactRelation


@dataclass(frozen=True)
class Comparison:
    """A question about two entities {a} and {b}, by one of their relations.

    order: "less" or "more" names the entity with that value; "same" asks whether the values agree.
    """

    relation: str
    order: str
    questions: tuple[str, ...]
    test_questions: tuple[str, ...]
    conclusions: tuple[str, ...]  # of {x}, the one that it is; for "same": of yes and of no

    @property
    def asked(self) -> FactRelation:
        return relations.by_name()[self.relation]


COMPARISONS = (
    Comparison(
        "film_year",
        "less",
        ("Which film was released earlier, {a} or {b}?",
         "Which of the films {a} and {b} is older?"),
        ("Between the films {a} and {b}, which came out first?",),
        ("So {x} is the earlier film.",),
    ),
    Comparison(
        "film_director",
        "same",
        ("Do the films {a} and {b} have the same director?",
         "Were the films {a} and {b} directed by the same person?"),
        ("Did one person direct both {a} and {b}?",),
        ("So both films have the same director.", "So the films have different directors."),
    ),
    Comparison(
        "person_birth_year",
        "less",
        ("Who was born earlier, {a} or {b}?", "Which of the two is older, {a} or {b}?"),
        ("Between {a} and {b}, who was born first?",),
        ("So {x} was born earlier.",),
    ),
    Comparison(
        "person_nationality",
        "same",
        ("Did {a} and {b} have the same nationality?", "Were {a} and {b} of the same nationality?"),
        ("Is the nationality of {a} that of {b}?",),
        ("So both had the same nationality.", "So they had different nationalities."),
    ),
    Comparison(
        "city_country",
        "same",
        ("Are the cities {a} and {b} in the same country?",
         "Do the cities {a} and {b} belong to the same country?"),
        ("Are the cities of {a} and {b} both in one country?",),
        ("So both are in the same country.", "So they are in different countries."),
    ),
    Comparison(
        "city_state",
        "same",
        ("Are the cities {a} and {b} in the same US state?",
         "Do the cities {a} and {b} belong to the same US state?"),
        ("Are the cities of {a} and {b} both in one US state?",),
        ("So both are in the same state.", "So they are in different states."),
    ),
    Comparison(
        "country_continent",
        "same",
        ("Are {a} and {b} on the same continent?", "Do {a} and {b} belong to the same continent?"),
        ("Are {a} and {b} both on one continent?",),
        ("So both are on the same continent.", "So they are on different continents."),
    ),
    Comparison(
        "element_number",
        "more",
        ("Which element has the higher atomic number, {a} or {b}?",
         "Which of the elements {a} and {b} comes later in the periodic table?"),
        ("Between the elements {a} and {b}, which has the greater atomic number?",),
        ("So {x} has the higher atomic number.",),
    ),
    Comparison(
        "airport_country",
        "same",
        ("Are {a} and {b} in the same country?", "Do {a} and {b} lie in the same country?"),
        ("Are the airports {a} and {b} both in one country?",),
        ("So both airports are in the same country.",
         "So the airports are in different countries."),
    ),
)  # fmt: skip


@cache
def of_relation() -> dict[str, Comparison]:
    return {c.relation: c for c in COMPARISONS}


def conclusion(c: Comparison, names: tuple[str, str], values: tuple[str, str]) -> str:
    """Returns the last sentence of the answer, given the two names and values."""
    if c.order == "same":
        return c.conclusions[values[0] != values[1]]
    first_wins = (int(values[0]) < int(values[1])) == (c.order == "less")
    return c.conclusions[0].format(x=names[0] if first_wins else names[1])
