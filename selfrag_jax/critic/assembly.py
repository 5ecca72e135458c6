"""Labelled segments to the published training format (paper, Section 3.2.2, Algorithm 2).

A segment is written as its Retrieve token, then

    [Retrieval]                 the passage, its IsRel token, the text, the IsSup token
    [Continue to Use Evidence]  the text, and the IsSup token of the passage at hand
    [No Retrieval]              the text

The IsUse token of the whole output comes last. Control tokens that the text or a passage spells are
broken up, so every control token in the result is one that this module wrote.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from selfrag_jax.records import Passage
from selfrag_jax.text import prompts, reflection


@dataclass(frozen=True)
class LabelledSegment:
    """A part of an output with its critiques. Fields that its action does not need stay empty."""

    text: str  # with the white space after it
    action: str  # the Retrieve token
    passage: Passage | None = None  # found for this segment
    relevance: str = ""  # the IsRel token of the passage
    support: str = ""  # the IsSup token of the passage, or of the one that is still at hand

    def __post_init__(self):
        if self.action not in reflection.RETRIEVE:
            raise ValueError(f"action {self.action!r} is no Retrieve token")
        retrieves = self.action == reflection.RETRIEVAL
        if (self.passage is not None) != retrieves or bool(self.relevance) != retrieves:
            raise ValueError(f"{self.action}: only [Retrieval] has a passage and its IsRel token")
        if bool(self.support) != (self.action != reflection.NO_RETRIEVAL):
            raise ValueError(f"{self.action}: an IsSup token needs a passage, found or at hand")


def assemble(segments: Sequence[LabelledSegment], utility: str) -> str:
    """Returns the `output` of a training row.

    A single space after a segment is dropped, since the next token says that a new segment begins;
    any other white space, such as a line break, is kept in front of the IsSup token. So the text
    parts, joined by a space where none ends in white space, are the output again. (Where the output
    had no space between two sentences, as Chinese has none, the joined text has one.) The outer
    white space of the output is dropped.
    """
    written = []
    for i, segment in enumerate(segments):
        text = segment.text if i else segment.text.lstrip()
        text = segment_text(text) if i + 1 < len(segments) else text.rstrip()
        written.append(_written(segment, prompts.escape_controls(text)))
    return "".join(written) + utility


def segment_text(text: str) -> str:
    """A segment's text without the space after it, if that is all the white space there is."""
    stripped = text.rstrip()
    return stripped if text == stripped + " " else text


def _written(segment: LabelledSegment, text: str) -> str:
    if segment.passage is None:
        return segment.action + text + segment.support
    passage = prompts.format_passage(segment.passage)
    return segment.action + passage + segment.relevance + text + segment.support
