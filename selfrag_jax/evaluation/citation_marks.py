"""Citation marks in a text, as ALCE reads them: "The port is old [1][2]."

ALCE's eval.py finds every `\\[\\d+`, gives it to the sentence that nltk puts it in, and looks at
the first three of a sentence. A mark after the full stop counts for the next sentence.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise

from selfrag_jax.text.sentences import split_sentences

MARKS_PER_SENTENCE = 3  # ALCE's --at_most_citations
# Longer numbers are years and the like, "[2015]": content, which gets round brackets.
_MARK = re.compile(r"\s*\[\d{1,3}(?:\s*[,;–-]\s*\d{1,3})*\]")
_BRACKETED_NUMBER = re.compile(r"\[(\d[^\[\]]*)\]")
_OPEN_NUMBER = re.compile(r"\[(?=\d)")
_TERMINATOR = re.compile(r"[.!?…。！？।؟]")
# Where nltk may end a sentence: other scripts' full stops are none to it.
_ENDS_AS_NLTK = re.compile(r"[.!?][\"'”’»)\]}]*\s+\Z")
# "(So he said.) It is.": nltk splits here, split_sentences does not. Not after initials, "(D.C.)".
_AFTER_BRACKET = re.compile(r"(?<=[.!?][)\]])(?<![.\s(]\w[.!?].)\s+(?=[A-Z\"“(])")


def remove_marks(text: str) -> str:
    """Returns the text without citation marks; nothing in it reads as one any more.

    A bracketed text that begins with a number, "[2 May]", gets round brackets: ALCE would take it
    for a mark.
    """
    text = _MARK.sub("", text)
    text = _BRACKETED_NUMBER.sub(r"(\1)", text)
    return _OPEN_NUMBER.sub("(", text).strip()


def one_line(text: str) -> str:
    """Returns the text without marks on one line: ALCE cuts an output at its first line break."""
    return " ".join(remove_marks(text).split())


def marked_text(answer: str, segments: Sequence[str], cited: Sequence[Sequence[int]]) -> str:
    """Returns the answer on one line, each sentence with the marks of the segments it overlaps.

    cited: the marks of each segment, numbers from 1. Marks that the answer has already are removed.
    """
    answer = one_line(answer)
    spans = _spans(answer, [one_line(s) for s in segments])
    marked, start = [], 0
    for sentence in _sentences(answer):
        end = start + len(sentence.rstrip())
        overlapping = (c for (a, b), c in zip(spans, cited, strict=True) if a < end and b > start)
        marked.append(_with_marks(sentence, overlapping))
        start += len(sentence)
    return "".join(marked)


def _sentences(text: str) -> list[str]:
    """Splits text where nltk does, as far as it is known without its models."""
    sentences: list[str] = []
    for piece in (p for s in split_sentences(text) for p in _after_brackets(s)):
        if sentences and not _ENDS_AS_NLTK.search(sentences[-1]):
            sentences[-1] += piece
        else:
            sentences.append(piece)
    return sentences


def _after_brackets(sentence: str) -> list[str]:
    ends = [0, *(m.end() for m in _AFTER_BRACKET.finditer(sentence)), len(sentence)]
    return [sentence[a:b] for a, b in pairwise(ends)]


def _with_marks(sentence: str, cited: Iterable[Sequence[int]]) -> str:
    """Puts the first three distinct marks before the punctuation that ends the sentence."""
    numbers = list(dict.fromkeys(n for marks in cited for n in marks))[:MARKS_PER_SENTENCE]
    last = next((i for i in range(len(sentence) - 1, -1, -1) if sentence[i].isalnum()), None)
    if not numbers or last is None:  # without a word there is nothing to support
        return sentence
    stop = _TERMINATOR.search(sentence, last + 1)
    cut = stop.start() if stop else len(sentence.rstrip())
    marks = "".join(f"[{n}]" for n in numbers)
    head = sentence[:cut].rstrip()
    return f"{head} {marks}{sentence[len(head) :]}"


def _spans(answer: str, segments: Sequence[str]) -> list[tuple[int, int]]:
    """Returns where each segment stands in the answer, (start, end) in characters.

    White space is ignored. A released script changes a segment's first or last character, so these
    may differ. A segment that is not found gets the gap between its neighbours.
    """
    at = [i for i, c in enumerate(answer) if not c.isspace()]
    squeezed = "".join(answer[i] for i in at)
    found: list[tuple[int, int] | None] = []
    cursor = 0
    for segment in segments:
        text = "".join(segment.split())
        place = _find(squeezed, text, cursor) if text else (cursor, cursor)
        found.append(place)
        cursor = place[1] if place else cursor
    spans = []
    for i, place in enumerate(found):
        before = next((p[1] for p in reversed(found[:i]) if p), 0)
        after = next((p[0] for p in found[i + 1 :] if p), len(squeezed))
        start, end = place or (before, after)
        spans.append((at[start], at[end - 1] + 1) if end > start else (0, 0))
    return spans


def _find(text: str, segment: str, cursor: int) -> tuple[int, int] | None:
    """The next place of the segment; without its first or last character, only near the cursor."""
    near = cursor + len(segment) + 1
    for candidate, end in ((segment, len(text)), (segment[:-1], near), (segment[1:], near)):
        if candidate and (start := text.find(candidate, cursor, end)) >= 0:
            return start, start + len(candidate)
    return None
