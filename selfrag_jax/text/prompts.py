"""Text formats in and out: the instruction template, passages, reflection tokens in published outputs.

A prompt is a list of parts for tokenizer.encode: `str` is ordinary text, `Control` a control token. Published
training data spells control tokens inside its `output` field; `parse_output` turns that text into parts. Only text
that is known to be training data goes through it; questions and corpora never do.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from selfrag_jax.records import Passage, Question
from selfrag_jax.text import reflection
from selfrag_jax.text.tokenizer import INPUT, INSTRUCTION, NEWLINE, RESPONSE, Control, Part

_CONTROL = re.compile("|".join(re.escape(t) for t in sorted(reflection.ALL, key=len, reverse=True)))


def instruction(text: str, input_text: str = "") -> list[Part]:
    """The generator's and critic's prompt: instruction template, an optional input field, and the response heading."""
    parts: list[Part] = [Control(INSTRUCTION), text]
    if input_text:
        parts += [Control(INPUT), input_text]
    return [*parts, Control(RESPONSE)]


def passage(p: Passage) -> list[Part]:
    """`<paragraph>{title}\\n{text}</paragraph>`."""
    return [
        Control(reflection.PARAGRAPH_OPEN),
        *passage_text(p),
        Control(reflection.PARAGRAPH_CLOSE),
    ]


def passage_text(p: Passage) -> list[Part]:
    return [p.title, Control(NEWLINE), p.text] if p.title else [p.text]


def parse_output(text: str) -> list[Part]:
    """Splits a published `output` into text and control parts; newlines inside a passage become Control(NEWLINE)."""
    parts: list[Part] = []
    at, inside = 0, False
    for match in _CONTROL.finditer(text):
        parts += _text(text[at : match.start()], inside)
        parts.append(Control(match.group()))
        inside = match.group() == reflection.PARAGRAPH_OPEN
        at = match.end()
    return parts + _text(text[at:], False)


def _text(text: str, in_passage: bool) -> list[Part]:
    if not text:
        return []
    if in_passage and "\n" in text:
        title, body = text.split("\n", 1)
        return [title, Control(NEWLINE), body] if title else [body]
    return [text]


def format_passage(p: Passage) -> str:
    """The passage as published data spells it. Control tokens in its title and text are defused (see `defuse`)."""
    return f"{reflection.PARAGRAPH_OPEN}{defuse(p.title)}\n{defuse(p.text)}{reflection.PARAGRAPH_CLOSE}"


def defuse(text: str) -> str:
    """Breaks up control tokens that stand in user text, so that a text file cannot smuggle one into training data."""
    return _CONTROL.sub(lambda m: m.group()[0] + " " + m.group()[1:], text)


@dataclass(frozen=True)
class CritiqueQuery:
    """One question to the critic or the teacher. Fields that a group does not use stay empty (see CRITIQUES)."""

    group: str
    instruction: str
    preceding: str = ""  # sentences already written
    evidence: Passage | None = None
    output: str = ""


@dataclass(frozen=True)
class Critique:
    """How a group's question is put (paper, Appendix D, Tables 8-12), and which fields it needs."""

    question: str
    brief: str  # for small models
    fields: tuple[str, ...]


CRITIQUES: dict[str, Critique] = {
    "retrieve": Critique(
        "Given an instruction, the preceding sentences and the evidence found so far, decide whether the next sentence "
        "needs factual grounding from retrieved documents. Answer with [Retrieval], [No Retrieval], or, when the given "
        "evidence is enough for the next sentence too, [Continue to Use Evidence].",
        "retrieval?",
        ("instruction", "preceding", "evidence"),
    ),
    "isrel": Critique(
        "Given an instruction and a piece of evidence, decide whether the evidence is relevant to the instruction and "
        "useful for a response to it. Answer with [Relevant] or [Irrelevant].",
        "relevant?",
        ("instruction", "evidence"),
    ),
    "issup": Critique(
        "Given an instruction, evidence and an output, decide how far the output is supported by the evidence alone. "
        "Answer with [Fully supported], [Partially supported] or [No support / Contradictory].",
        "supported?",
        ("instruction", "evidence", "output"),
    ),
    "isuse": Critique(
        "Given an instruction and an output, rate how helpful and informative the output appears as a response, from "
        "[Utility:1] (off the point) to [Utility:5] (complete).",
        "useful?",
        ("instruction", "output"),
    ),
}


def critique(query: CritiqueQuery, brief: bool) -> list[Part]:
    """The critic's prompt for one query, in the instruction template.

    The order of fields puts what is judged last, right before the token that judges it. `brief` is for small models: the
    group's name and the instruction, then the evidence and the output as a reader would meet them.
    """
    spec = CRITIQUES[query.group]
    if brief:
        return _brief(spec, query)
    label = lambda name, value: [f"{name}: ", value]  # noqa: E731
    body: list[Part] = [*label("Task instruction", query.instruction)]
    if "evidence" in spec.fields and query.evidence is not None:
        title, *rest = passage_text(query.evidence)
        body += [Control(NEWLINE), *label("Evidence", title), *rest]
    if "preceding" in spec.fields and query.preceding:
        body += [Control(NEWLINE), *label("Preceding sentences", query.preceding)]
    if "output" in spec.fields:
        body += [Control(NEWLINE), *label("Output", query.output)]
    return [
        Control(INSTRUCTION),
        spec.question,
        Control(INPUT),
        *body,
        Control(RESPONSE),
    ]


def _brief(spec: Critique, query: CritiqueQuery) -> list[Part]:
    parts: list[Part] = [Control(INSTRUCTION), spec.brief, query.instruction, Control(RESPONSE)]
    if "evidence" in spec.fields and query.evidence is not None:
        parts += passage(query.evidence)
    if "preceding" in spec.fields and query.preceding:
        parts.append(query.preceding)
    if "output" in spec.fields:
        parts.append(query.output)
    return parts


def query_for(instruction_text: str, preceding: Sequence[str]) -> str:
    """The retrieval query of a segment: the input, and for later segments the previous one too (paper, Section 3.3)."""
    return instruction_text if not preceding else f"{instruction_text} {preceding[-1]}"


def question_text(q: Question) -> str:
    """The instruction of a question; options follow it where it has any."""
    if not q.choices:
        return q.question
    return q.question + " " + " ".join(f"{label}: {text}" for label, text in q.choices)
