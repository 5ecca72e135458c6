"""Sentence splitting: Self-RAG's segments are sentences (paper, Section 3.1)."""

from __future__ import annotations

from functools import cache


@cache
def _segmenter():
    import pysbd

    return pysbd.Segmenter(language="en", clean=False)


def split_sentences(text: str) -> list[str]:
    """Returns the stripped sentences of `text`; the list is empty only for blank text."""
    text = text.strip()
    if not any(c in text[:-1] for c in ".!?\n"):  # a single sentence, as most short answers are
        return [text] if text else []
    return [s for part in _segmenter().segment(text) if (s := part.strip())]
