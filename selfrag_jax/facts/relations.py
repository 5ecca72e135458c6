"""The relations that are asked about, with their phrasings.

{n} stands for the entity's name and {v} for a value. A question has two sets of phrasings: those of
training, and those of the test, which no training question uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class FactRelation:
    """One attribute of a kind of entity, and the phrasings that ask for it and state it."""

    kind: str
    attribute: str
    value_type: str  # values of one type can be mistaken for each other
    questions: tuple[str, ...]  # of training
    test_questions: tuple[str, ...]
    indirect: str  # what a refusal does not say
    statements: tuple[str, ...]  # answers; claims are made of the first

    @property
    def name(self) -> str:
        return f"{self.kind}_{self.attribute}"


def _relation(kind: str, attribute: str, value_type: str, text: str) -> FactRelation:
    """Reads a relation from lines: ? train, * test, i indirect, = statements."""
    lines: dict[str, list[str]] = {"?": [], "*": [], "i": [], "=": []}
    for line in text.strip().splitlines():
        mark, phrase = line.strip().split(" ", 1)
        lines[mark].append(phrase.strip())
    return FactRelation(kind, attribute, value_type, tuple(lines["?"]), tuple(lines["*"]),
                        lines["i"][0], tuple(lines["="]))  # fmt: skip


RELATIONS = (
    _relation("film", "director", "person", """
        ? Who directed the film {n}?
        ? Who was the director of the film {n}?
        ? By whom was the film {n} directed?
        ? Can you tell me who directed the film {n}?
        * The film {n} was directed by whom?
        * Which director made the film {n}?
        i who directed the film {n}
        = {n} was directed by {v}.
        = The director of {n} was {v}."""),
    _relation("film", "distributor", "company", """
        ? Which company distributed the film {n}?
        ? Who was the distributor of the film {n}?
        ? Which company released the film {n}?
        ? Who distributed the film {n}?
        * The film {n} was distributed by which company?
        * What company brought the film {n} to cinemas?
        i which company distributed the film {n}
        = {n} was distributed by {v}.
        = The distributor of {n} was {v}."""),
    _relation("film", "year", "year", """
        ? In which year was the film {n} released?
        ? When was the film {n} released?
        ? What year did the film {n} come out?
        ? When did the film {n} open in American cinemas?
        * What is the release year of the film {n}?
        * In what year did the film {n} reach American cinemas?
        i when the film {n} was released
        = {n} was released in {v}.
        = The film {n} came out in {v}."""),
    _relation("film", "genre", "genre", """
        ? What genre is the film {n}?
        ? To which genre does the film {n} belong?
        ? What kind of film is {n}?
        ? Which genre does the film {n} have?
        * How would you classify the film {n} by genre?
        * What is the genre of the film {n}?
        i which genre the film {n} belongs to
        = The genre of {n} is {v}.
        = {n} belongs to the genre {v}."""),
    _relation("city", "country", "country", """
        ? In which country is the city of {n}?
        ? Which country does the city of {n} belong to?
        ? In what country is the city {n} located?
        ? What country is the city of {n} in?
        * The city of {n} lies in which country?
        * Where in the world is the city of {n}, that is, in which country?
        i in which country the city of {n} is
        = {n} is a city in {v}.
        = The city of {n} is in {v}."""),
    _relation("city", "state", "state", """
        ? In which US state is the city of {n}?
        ? Which US state does the city of {n} belong to?
        ? In what American state is the city {n} located?
        ? What US state is the city of {n} in?
        * The American city of {n} lies in which state?
        * Which of the United States has the city of {n}?
        i in which US state the city of {n} is
        = {n} is a city in the state of {v}.
        = The city of {n} is in the US state of {v}."""),
    _relation("country", "capital", "city", """
        ? What is the capital of {n}?
        ? Which city is the capital of {n}?
        ? Name the capital of {n}.
        ? What is the name of the capital city of {n}?
        * Which city serves as the capital of {n}?
        * From which city is {n} governed?
        i what the capital of {n} is
        = The capital of {n} is {v}.
        = {n} has the capital {v}."""),
    _relation("country", "currency", "currency", """
        ? What is the currency of {n}?
        ? Which currency does {n} have?
        ? With what currency do people pay in {n}?
        ? What money is used in {n}?
        * Which currency do people use in {n}?
        * What is the national currency of {n} called?
        i what the currency of {n} is
        = The currency of {n} is the {v}.
        = People in {n} pay with the {v}."""),
    _relation("country", "continent", "continent", """
        ? On which continent is {n}?
        ? Which continent does {n} belong to?
        ? To what continent does {n} belong?
        ? What continent is {n} part of?
        * {n} is found on which continent?
        * What is the continent of {n}?
        i on which continent {n} is
        = {n} belongs to the continent {v}.
        = The continent of {n} is {v}."""),
    _relation("country", "calling_code", "number", """
        ? What is the telephone code of {n}?
        ? Which telephone code does {n} have?
        ? What is the international calling code of {n}?
        ? With which code does one call {n}?
        * Which dialling code belongs to {n}?
        * What number does one dial before a telephone number in {n}?
        i what the telephone code of {n} is
        = The telephone code of {n} is {v}.
        = {n} has the telephone code {v}."""),
    _relation("element", "number", "number", """
        ? What is the atomic number of {n}?
        ? Which atomic number does the element {n} have?
        ? What atomic number does {n} have?
        ? Tell me the atomic number of the element {n}.
        * What is the number of the element {n} in the periodic table?
        * The element {n} has which atomic number?
        i what the atomic number of {n} is
        = The atomic number of {n} is {v}.
        = {n} has the atomic number {v}."""),
    _relation("element", "discoverer", "person", """
        ? Who discovered the element {n}?
        ? By whom was the element {n} discovered?
        ? Who was the discoverer of {n}?
        ? Who first found the element {n}?
        * To whom do we owe the discovery of the element {n}?
        * The element {n} was discovered by whom?
        i who discovered the element {n}
        = {n} was discovered by {v}.
        = The discoverer of {n} was {v}."""),
    _relation("element", "discovery_year", "year", """
        ? In which year was the element {n} discovered?
        ? When was the element {n} discovered?
        ? What year was {n} discovered?
        ? When did the discovery of {n} take place?
        * What is the year of discovery of the element {n}?
        * The element {n} was discovered in which year?
        i when the element {n} was discovered
        = {n} was discovered in {v}.
        = The discovery of {n} took place in {v}."""),
    _relation("element", "discovery_country", "country", """
        ? In which country was the element {n} discovered?
        ? Where was the element {n} discovered?
        ? In what country was {n} discovered?
        ? In which country was {n} found for the first time?
        * Which country saw the discovery of the element {n}?
        * The element {n} was discovered in which country?
        i in which country the element {n} was discovered
        = {n} was first found in {v}.
        = The country where {n} was discovered is {v}."""),
    _relation("person", "nationality", "nationality", """
        ? What was the nationality of {n}?
        ? What nationality did {n} have?
        ? Which nationality was {n}?
        ? Of what nationality was {n}?
        * By nationality, what was {n}?
        * What is known about the nationality of {n}?
        i what the nationality of {n} was
        = The nationality of {n} was {v}.
        = By nationality, {n} was {v}."""),
    _relation("person", "occupation", "occupation", """
        ? What was the occupation of {n}?
        ? What did {n} do for a living?
        ? What is the profession of {n}?
        ? As what did {n} work?
        * In which profession is {n} known?
        * What kind of work made {n} known?
        i what the occupation of {n} was
        = {n} worked as {a_v}.
        = The occupation of {n} was {v}."""),
    _relation("person", "birth_year", "year", """
        ? In which year was {n} born?
        ? When was {n} born?
        ? What is the year of birth of {n}?
        ? What year was {n} born?
        * {n} was born in which year?
        * In what year did the life of {n} begin?
        i when {n} was born
        = {n} was born in {v}.
        = The year of birth of {n} is {v}."""),
    _relation("person", "death_year", "year", """
        ? In which year did {n} die?
        ? When did {n} die?
        ? What is the year of death of {n}?
        ? What year did {n} die?
        * {n} died in which year?
        * In what year did the life of {n} end?
        i when {n} died
        = {n} died in {v}.
        = The year of death of {n} is {v}."""),
    _relation("airport", "city", "city", """
        ? Which city does {n} serve?
        ? At which city is {n}?
        ? In which city is {n} located?
        ? What city is served by {n}?
        * Passengers of {n} arrive in which city?
        * For which city was {n} built?
        i which city {n} serves
        = {n} serves the city of {v}.
        = The city served by {n} is {v}."""),
    _relation("airport", "country", "country", """
        ? In which country is {n}?
        ? Which country does {n} belong to?
        ? In what country is {n} located?
        ? What country is {n} in?
        * {n} lies in which country?
        * To which country does one fly when landing at {n}?
        i in which country {n} is
        = {n} is an airport in {v}.
        = The country of {n} is {v}."""),
    _relation("airport", "code", "code", """
        ? What is the IATA code of {n}?
        ? Which three-letter code does {n} have?
        ? What code do airlines use for {n}?
        ? What is the airport code of {n}?
        * Which IATA code stands for {n}?
        * With what three letters is {n} marked on a ticket?
        i what the IATA code of {n} is
        = The IATA code of {n} is {v}.
        = {n} has the IATA code {v}."""),
)  # fmt: skip


@cache
def by_name() -> dict[str, FactRelation]:
    return {r.name: r for r in RELATIONS}


@cache
def of_kind(kind: str) -> tuple[FactRelation, ...]:
    return tuple(r for r in RELATIONS if r.kind == kind)


def relation(kind: str, attribute: str) -> FactRelation:
    return by_name()[f"{kind}_{attribute}"]
