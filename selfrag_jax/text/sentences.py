"""Sentence splitting: Self-RAG's segments are sentences (paper, Section 3.1)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import accumulate

# sentencex takes time that grows with the square of a run without white space (Chinese, Japanese).
_LONG_RUN = re.compile(r"\S{2000,}")
_BLOCK = 1000  # characters of such a run, at least, that are split at once
# sentencex fails where an initial is followed by such a space (of several bytes) and a full stop.
_WIDE_SPACE = re.compile(r"[^\S\x00-\x7f](?=\.)")
_END = re.compile(r"[.!?。！？।؟]+[\"'”’」』）)\]]*")


def split_sentences(text: str) -> list[str]:
    """Splits a text into sentences that, joined, are the text: no character is ever lost.

    A sentence keeps the white space after it. Pieces without a letter or digit ("..", "♬") belong
    to the sentence before them, or to the first one. Returns [] only for blank text.
    """
    if not text.strip():
        return []
    sentences: list[list[str]] = []  # of parts
    last_has_word = False
    for piece in _pieces(text):
        start = len(piece) - len(piece.lstrip())
        if sentences and start:
            sentences[-1].append(piece[:start])
            piece = piece[start:]
        has_word = _has_word(piece)
        if sentences and not (has_word and last_has_word):
            sentences[-1].append(piece)
            last_has_word = last_has_word or has_word
        else:
            sentences.append([piece])
            last_has_word = has_word
    return ["".join(parts) for parts in sentences]


def _pieces(text: str) -> list[str]:
    if not any(c in text.rstrip()[:-1] for c in ".!?\n。！？।؟"):
        return [text]  # a single sentence, as most short answers are; nothing is imported
    import sentencex

    spaced = _WIDE_SPACE.sub(" ", text)  # of the same length
    pieces = [piece for block in _blocks(spaced) for piece in sentencex.segment("en", block)]
    if "".join(pieces) != spaced:
        return [text]
    ends = list(accumulate(map(len, pieces)))
    return [text[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _blocks(text: str) -> Iterator[str]:
    """Cuts long runs without white space after some ends of sentences."""
    start = 0
    for run in _LONG_RUN.finditer(text):
        at = run.start() + _BLOCK
        while end := _END.search(text, at, run.end()):
            yield text[start : end.end()]
            start = end.end()
            at = start + _BLOCK
    if start < len(text):
        yield text[start:]


def _has_word(text: str) -> bool:
    return any(map(str.isalnum, text))
