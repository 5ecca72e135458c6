"""Splits documents into passages of at most so many words, at ends of sentences where possible.

DPR split Wikipedia into disjoint passages of 100 words, each with its article's title (Karpukhin et
al., 2020, Section 4.1); Self-RAG was trained on those.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from selfrag_jax.text.sentences import split_sentences

# A word is at most 20 characters between white space, or two of a script without spaces: Thai, Lao,
# Khmer, Chinese, Japanese.
_UNSPACED = (
    r"\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_UNSPACED}]{{1,2}}|[^\s{_UNSPACED}]{{1,20}}")
_HEADING = re.compile(r"#{1,6}[ \t]+(.*)", re.DOTALL)
_FENCE = re.compile(r" {0,3}(```|~~~)")


def split_words(text: str, most: int) -> list[str]:
    """Splits a text into pieces of at most `most` words that, joined, are the text.

    A piece ends where a sentence does. A longer sentence (a table, say) may be cut at the end of
    any of its lines, and a longer line anywhere. Takes linear time. Returns [] for blank text.
    """
    pieces: list[str] = []
    start = at = words = 0  # of the piece that is growing: where it begins and ends, its words
    for unit in _units(text, most):
        ends = [at + word.end() for word in _WORD.finditer(unit)]
        if words == most or (words + len(ends) > most >= len(ends)):
            pieces.append(text[start:at])
            start, words = at, 0
        # A longer line is cut anyway, so it follows on. The last piece may be joined by what comes.
        cuts = ends[most - words - 1 : -1 : most]
        for end in cuts:
            pieces.append(text[start:end])
            start = end
        words += len(ends) - most * len(cuts)
        at += len(unit)
    if start < len(text) and text.strip():
        pieces.append(text[start:])
    return pieces


def _units(text: str, most: int) -> Iterator[str]:
    """Yields the sentences of a text, and the lines of those that have more than `most` words."""
    for sentence in split_sentences(text):
        if len(_WORD.findall(sentence)) > most:
            yield from sentence.splitlines(keepends=True)
        else:
            yield sentence


def sections(markdown: str) -> list[tuple[str, str]]:
    """Returns (heading, text) of a Markdown document's sections; joined, the texts are all of it.

    A text begins with its heading's line. What stands before the first heading has the heading "",
    and a heading without a text of its own goes with the next one. Lines within fences (```) are no
    headings.
    """
    found: list[tuple[str, list[str]]] = [("", [])]
    has_text = False
    for line, heading in _lines(markdown):
        if heading is not None and has_text:
            found.append((heading, []))
            has_text = False
        elif heading is not None:
            found[-1] = (heading, found[-1][1])
        else:
            has_text = has_text or not line.isspace()
        found[-1][1].append(line)
    return [(heading, "".join(lines)) for heading, lines in found]


def first_heading(markdown: str) -> str:
    """Returns the first heading of a Markdown document, "" without one."""
    return next((heading for _, heading in _lines(markdown) if heading), "")


def _lines(markdown: str) -> Iterator[tuple[str, str | None]]:
    """Yields each line, and the heading that it is."""
    fence = ""
    for line in markdown.splitlines(keepends=True):
        mark = _FENCE.match(line)
        heading = None if fence or mark else _HEADING.match(line)
        if mark and fence in ("", mark[1]):
            fence = "" if fence else mark[1]
        yield line, heading[1].rstrip().rstrip("# \t") if heading else None
