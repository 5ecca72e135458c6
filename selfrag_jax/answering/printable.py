"""Texts of passages and models as a terminal may show them: inert, and not too long."""

from __future__ import annotations

import re
import unicodedata

from rich.cells import cell_len

# What moves the cursor, sets colours or titles, or writes to the clipboard: CSI, then strings such
# as OSC with their ends, then all other escapes. A string has no beginning of another in it, so
# that each character is read once.
_SEQUENCES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x90\x98\x9c-\x9f]*(?:\x07|\x1b\\|\x9c)"
    r"|\x1b[ -/]*[0-~]"
)
_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"
    "\u202a-\u202e\u2066-\u2069]"  # embeddings and overrides, which reorder what stands beside
)
_UNPAIRED = re.compile("[\ud800-\udfff]")  # surrogates, which no encoding has
_JOINER = "\u200d"


def printable(text: str) -> str:
    """The text without control characters and escape sequences; a tab is a space."""
    text = _SEQUENCES.sub("", text.replace("\t", " ").replace("\r\n", "\n"))
    return _UNPAIRED.sub("\ufffd", _CONTROLS.sub("", text))


def shortened(text: str, cells: int) -> tuple[str, bool]:
    """The text on one line, cut to about so many columns of a terminal; whether it was cut.

    A cut text ends in how many words were cut, or how many characters in scripts without spaces.
    """
    words = printable(text).split()
    line = " ".join(words)
    if cell_len(line) <= cells:
        return line, False
    used, kept = 0, 0
    for word in words:
        if used + (width := cell_len(word)) > cells:
            break
        used, kept = used + width + 1, kept + 1
    if kept == len(words):  # they are measured differently alone
        return line, False
    if kept and width <= max(cells // 2, 30):  # an ordinary word
        return f"{' '.join(words[:kept])} … {_counted(len(words) - kept, 'word')}", True
    begin = sum(len(word) + 1 for word in words[:kept])
    end = begin + _fitting(line[begin:], cells - used)
    return f"{line[:end]}… {_counted(len(line) - end, 'character')}", True


def _counted(number: int, unit: str) -> str:
    return f"{number:,} more {unit}{'s' if number > 1 else ''}"


def _fitting(text: str, cells: int) -> int:
    """How many characters fit, without taking what is drawn as one character apart."""
    used, end = 0, 0
    for end, character in enumerate(text):  # noqa: B007
        used += cell_len(character)
        if used > cells:
            break
    while end and (_continues(text[end]) or text[end - 1] == _JOINER):
        end -= 1
    return end


def _continues(character: str) -> bool:
    """Whether a character is drawn together with the one before it."""
    return (
        character == _JOINER
        or unicodedata.category(character) in ("Mn", "Mc", "Me")
        or "\U0001f3fb" <= character <= "\U0001f3ff"  # skin tones
    )
