"""Instructions that need no passage: sums, small talk, small tasks on a few words.

Each has one form that is read back (`expected`), so that an answer can be judged. The test has
other words, numbers and phrasings than training.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from selfrag_jax.text.normalising import normalise


@dataclass(frozen=True)
class EverydayRow:
    question: str
    output: str
    answers: tuple[str, ...]  # one of them is in every right answer


# Each line: the question | the same in the test's words | the answer | what shows that it is right.
_TALK = """
Hello! | Hi there! | Hello! How can I help you? | help
Good morning. | Good afternoon. | Good day to you! What can I do for you? | do for you
Thank you very much. | Thanks a lot! | You are welcome! | welcome
How are you? | How are you doing today? | I am well, thank you. How can I help? | well
Goodbye! | Bye for now! | Goodbye, and have a nice day! | goodbye
Who are you? | What are you? | I am an assistant that answers questions. | assistant
Tell me a joke. | Do you know a joke? | What has hands but no arms? A clock! | clock
What can you do? | How can you help me? | I can answer questions and help a little. | questions
I am tired. | I feel so tired today. | I am sorry to hear that. Take a rest. | rest
Wish me luck. | I have an exam today, wish me luck! | Good luck! | luck
"""
_OPPOSITES = (
    "hot cold, big small, fast slow, high low, light dark, wet dry, old new, hard soft, full empty,"
    " early late, loud quiet, rich poor, strong weak, thick thin, near far, good bad, happy sad,"
    " clean dirty, first last, open closed, up down, left right, true false, inside outside"
).split(", ")
_PLURALS = (
    "mouse mice, child children, foot feet, tooth teeth, man men, woman women, goose geese,"
    " leaf leaves, knife knives, wolf wolves, city cities, baby babies, box boxes, bus buses,"
    " dish dishes, story stories, shelf shelves, potato potatoes"
).split(", ")
_WORDS = (
    "apple river stone garden window market summer letter horse table bridge candle forest island"
    " kitchen lemon mountain ocean pencil rabbit silver ticket valley winter yellow basket"
).split()
# The test's words.
_TEST_WORDS = (
    "autumn butter castle dinner engine flower hammer jacket ladder mirror needle orange pepper"
    " spring tunnel village"
).split()


@cache
def _talk() -> tuple[tuple[str, str, str, str], ...]:
    rows = (line.split(" | ") for line in _TALK.strip().splitlines())
    return tuple((a, b, c, d) for a, b, c, d in rows)


# ---- the forms -----------------------------------------------------------------------------------
def _small_talk(rng: random.Random, is_test: bool) -> str:
    row = rng.choice(_talk())
    return row[is_test]


def _sum(rng: random.Random, is_test: bool) -> str:
    x, y = rng.randint(2, 60), rng.randint(2, 60)
    frames = ("What is {x} plus {y}?", "Add {x} and {y}.", "How much is {x} and {y} together?")
    frame = "Calculate {x} + {y}." if is_test else rng.choice(frames)
    return frame.format(x=x, y=y)


def _difference(rng: random.Random, is_test: bool) -> str:
    x, y = sorted((rng.randint(2, 90), rng.randint(2, 90)))
    frame = "Calculate {y} - {x}." if is_test else "What is {y} minus {x}?"
    return frame.format(x=x, y=y)


def _larger(rng: random.Random, is_test: bool) -> str:
    x, y = rng.sample(range(2, 100), 2)
    return f"Which number is greater, {x} or {y}?" if is_test else f"Which is larger, {x} or {y}?"


def _opposite(rng: random.Random, is_test: bool) -> str:
    # One pair in four belongs to the test.
    i = rng.choice([i for i in range(len(_OPPOSITES)) if (i % 4 == 0) == is_test])
    word = _OPPOSITES[i].split()[0]
    return f"Give the opposite of {word}." if is_test else f"What is the opposite of {word}?"


def _plural(rng: random.Random, is_test: bool) -> str:
    i = rng.choice([i for i in range(len(_PLURALS)) if (i % 4 == 0) == is_test])
    word = _PLURALS[i].split()[0]
    return f"Give the plural of {word}." if is_test else f"What is the plural of {word}?"


def _capitals(rng: random.Random, is_test: bool) -> str:
    word = rng.choice(_TEST_WORDS if is_test else _WORDS)
    return f"Spell {word} in capitals." if is_test else f"Write the word {word} in capital letters."


def _order(rng: random.Random, is_test: bool) -> str:
    words = ", ".join(rng.sample(_TEST_WORDS if is_test else _WORDS, 3))
    return f"Sort by alphabet: {words}." if is_test else f"Put into alphabetical order: {words}."


def _sentence(rng: random.Random, is_test: bool) -> str:
    word = rng.choice(_TEST_WORDS if is_test else _WORDS)
    return f"Use the word {word} in a sentence." if is_test else f"Make a sentence with {word}."


_FORMS: tuple[Callable[[random.Random, bool], str], ...] = (
    _small_talk, _sum, _sum, _difference, _larger, _opposite, _plural, _capitals, _order, _sentence,
)  # fmt: skip


def draw(rng: random.Random, is_test: bool) -> EverydayRow:
    """Draws an instruction of training or of the test, with its answer."""
    question = rng.choice(_FORMS)(rng, is_test)
    row = expected(question)
    assert row is not None, question
    return row


# ---- reading back --------------------------------------------------------------------------------
@cache
def _of_talk() -> dict[str, EverydayRow]:
    return {
        normalise(q): EverydayRow(q, answer, (sign,))
        for a, b, answer, sign in _talk()
        for q in (a, b)
    }


def _pairs(pairs: list[str]) -> dict[str, str]:
    return dict(pair.split() for pair in pairs)


def _number(question: str) -> tuple[str, str] | None:
    """The answer to a sum, a difference or a comparison of numbers, and what shows it."""
    found = [int(x) for x in re.findall(r"\d+", question)]
    if len(found) != 2:
        return None
    x, y = found
    if re.fullmatch(r"What is \d+ plus \d+\?|Add .*|How much is .*|Calculate \d+ \+ .*", question):
        return f"{x} plus {y} is {x + y}.", str(x + y)
    if re.fullmatch(r"What is \d+ minus \d+\?|Calculate \d+ - .*", question):
        return f"{x} minus {y} is {x - y}.", str(x - y)
    if re.fullmatch(r"Which (is larger|number is greater), .*", question):
        return f"{max(x, y)} is larger than {min(x, y)}.", f"{max(x, y)} is"
    return None


def _word(question: str) -> tuple[str, str] | None:
    """The answer to a small task on words, and what shows it."""
    if m := re.fullmatch(r"(?:What is|Give) the (opposite|plural) of (\w+)[?.]", question):
        other = _pairs(_OPPOSITES if m[1] == "opposite" else _PLURALS).get(m[2])
        return (f"The {m[1]} of {m[2]} is {other}.", other) if other else None
    if m := re.fullmatch(r"(?:Spell|Write the word) (\w+) in capital(?:s|\sletters)\.", question):
        return f"{m[1].upper()}.", m[1].upper()
    if m := re.fullmatch(r"(?:Sort by alphabet|Put into alphabetical order): (.+)\.", question):
        words = ", ".join(sorted(m[1].split(", ")))
        return f"{words}.", words
    if m := re.fullmatch(
        r"(?:Use the word|Make a sentence with) (\w+)(?: in a sentence)?\.", question
    ):
        return f"We saw the {m[1]} yesterday.", m[1]
    return None


def expected(question: str) -> EverydayRow | None:
    """Returns an everyday instruction with its answer; None if the text is none."""
    text = question.strip()
    if row := _of_talk().get(normalise(text)):
        return row
    if found := _number(text) or _word(text):
        return EverydayRow(text, found[0], (found[1],))
    return None


def is_right(question: EverydayRow, answer: str) -> bool:
    text = f" {normalise(answer)} "
    return any(f" {normalise(a)} " in text for a in question.answers)
