"""Text formats in and out: the instruction template, passages, reflection tokens in training data.

A prompt is a list of parts for Tokenizer.encode: `str` is ordinary text, `Control` a control token.
Published training data spells out control tokens in its `output` field, and `parse_output` splits
that text into parts. Only training data goes through it, never questions or corpora.
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
    """The prompt of generator and critic: an instruction, an optional input, a response heading."""
    parts: list[Part] = [Control(INSTRUCTION), text]
    if input_text:
        parts += [Control(INPUT), input_text]
    return [*parts, Control(RESPONSE)]


def question_text(q: Question) -> str:
    """The instruction that asks a question: its task's wording, or the question and its choices."""
    if q.prompt:
        return q.prompt
    if not q.choices:
        return q.question
    return q.question + " " + " ".join(f"{label}: {text}" for label, text in q.choices)


def retrieval_query(instruction_text: str, preceding: Sequence[str]) -> str:
    """The retrieval query of a segment: the question with its input, and the previous segment.

    The first segment has none before it. See Section 3.3 of the paper.
    """
    return instruction_text if not preceding else f"{instruction_text} {preceding[-1]}"


def question_prompt(q: Question) -> list[Part]:
    """The prompt of a question: its text and choices, and its input if it has one."""
    return instruction(question_text(q), q.input)


# ---- passages and training outputs --------------------------------------------------------------
def passage(p: Passage) -> list[Part]:
    """`<paragraph>{title}\\n{text}</paragraph>`."""
    opening, closing = Control(reflection.PARAGRAPH_OPEN), Control(reflection.PARAGRAPH_CLOSE)
    return [opening, *_title_and_text(p.title, p.text), closing]


def _title_and_text(title: str, text: str) -> list[Part]:
    return [title, Control(NEWLINE), text] if title else [text]


def parse_output(text: str) -> list[Part]:
    """Splits a published `output` into text and control parts.

    The newline after a passage's title becomes Control(NEWLINE).
    """
    parts: list[Part] = []
    at, in_passage = 0, False
    for match in _CONTROL.finditer(text):
        parts += _text_parts(text[at : match.start()], in_passage)
        parts.append(Control(match.group()))
        in_passage = match.group() == reflection.PARAGRAPH_OPEN
        at = match.end()
    return parts + _text_parts(text[at:], False)


def closes_paragraphs(parts: Sequence[Part]) -> bool:
    """Whether each `<paragraph>` is followed by its own `</paragraph>` before the next."""
    markup = [p.token for p in parts if isinstance(p, Control) and p.token in reflection.MARKUP]
    return markup == list(reflection.MARKUP) * (len(markup) // 2)


def _text_parts(text: str, in_passage: bool) -> list[Part]:
    if not text:
        return []
    if in_passage and "\n" in text:
        return _title_and_text(*text.split("\n", 1))
    return [text]


def format_passage(p: Passage) -> str:
    """The passage as published training data spells it, with control tokens in it escaped."""
    title, text = escape_controls(p.title), escape_controls(p.text)
    return f"{reflection.PARAGRAPH_OPEN}{title}\n{text}{reflection.PARAGRAPH_CLOSE}"


def escape_controls(text: str) -> str:
    """Breaks up control tokens in user text, so that it cannot inject one into training data."""
    return _CONTROL.sub(lambda m: m.group()[0] + " " + m.group()[1:], text)


# ---- the critic's prompts -----------------------------------------------------------------------
@dataclass(frozen=True)
class CritiqueQuery:
    """A query to the critic or the teacher. Fields that its group does not use stay empty."""

    group: str  # a key of reflection.GROUPS and CRITIQUES
    instruction: str
    preceding: str = ""  # sentences written so far
    evidence: Passage | None = None
    output: str = ""


@dataclass(frozen=True)
class CritiqueTemplate:
    """How a group's query is phrased (paper, Appendix D, Tables 8-12), and the fields it needs."""

    question: str
    brief: str  # the question for small models
    fields: tuple[str, ...]
    optional: tuple[str, ...] = ()  # fields that published data has


CRITIQUES: dict[str, CritiqueTemplate] = {
    "retrieve": CritiqueTemplate(
        "Given an instruction, the preceding sentences and the evidence found so far, decide "
        "whether the next sentence needs factual grounding from retrieved documents. Answer with "
        "[Retrieval], [No Retrieval], or, when the given evidence is enough for the next sentence "
        "too, [Continue to Use Evidence].",
        "retrieval?",
        ("instruction", "preceding", "evidence"),
        ("output",),
    ),
    "isrel": CritiqueTemplate(
        "Given an instruction and a piece of evidence, decide whether the evidence is relevant to "
        "the instruction and useful for a response to it. Answer with [Relevant] or [Irrelevant].",
        "relevant?",
        ("instruction", "evidence"),
    ),
    "issup": CritiqueTemplate(
        "Given an instruction, evidence and an output, decide how far the output is supported by "
        "the evidence alone. Answer with [Fully supported], [Partially supported] or "
        "[No support / Contradictory].",
        "supported?",
        ("instruction", "evidence", "output"),
    ),
    "isuse": CritiqueTemplate(
        "Given an instruction and an output, rate how helpful and informative the output appears "
        "as a response, from [Utility:1] (off the point) to [Utility:5] (complete).",
        "useful?",
        ("instruction", "output"),
    ),
}


def critique(query: CritiqueQuery, brief: bool) -> list[Part]:
    """The critic's prompt for one query, in the instruction template.

    The text to judge comes last, right before the token that judges it. brief: the form for small
    models, which has a short question and the instruction, then evidence and output as the
    generator's own prompt has them.
    """
    template = CRITIQUES[query.group]
    if brief:
        return _brief_critique(template, query)
    body: list[Part] = ["Task instruction: ", query.instruction]
    if "evidence" in template.fields and query.evidence is not None:
        evidence = _title_and_text(query.evidence.title, query.evidence.text)
        body += [Control(NEWLINE), "Evidence: ", *evidence]
    if "preceding" in template.fields and query.preceding:
        body += [Control(NEWLINE), "Preceding sentences: ", query.preceding]
    if _shows_output(template, query):
        body += [Control(NEWLINE), "Output: ", query.output]
    return [Control(INSTRUCTION), template.question, Control(INPUT), *body, Control(RESPONSE)]


def _brief_critique(template: CritiqueTemplate, query: CritiqueQuery) -> list[Part]:
    heading, response = Control(INSTRUCTION), Control(RESPONSE)
    parts: list[Part] = [heading, template.brief, query.instruction, response]
    if "evidence" in template.fields and query.evidence is not None:
        parts += passage(query.evidence)
    if "preceding" in template.fields and query.preceding:
        parts.append(query.preceding)
    if _shows_output(template, query):
        parts.append(query.output)
    return parts


def _shows_output(template: CritiqueTemplate, query: CritiqueQuery) -> bool:
    return "output" in template.fields or ("output" in template.optional and bool(query.output))
