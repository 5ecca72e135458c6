"""Sentence splitting: Self-RAG's segments are sentences (paper, Section 3.1)."""

from __future__ import annotations

from functools import cache


@cache
def _segmenter():
    import pysbd

    return pysbd.Segmenter(language="en", clean=False)


def split_sentences(text: str) -> list[str]:
    """The sentences of `text`, without surrounding space; never empty for text that isn't blank."""
    text = text.strip()
    if not any(c in text[:-1] for c in ".!?\n"):  # one sentence: most short answers
        return [text] if text else []
    return [s for part in _segmenter().segment(text) if (s := part.strip())]
