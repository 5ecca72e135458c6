"""Whether a passage is about what was asked: the names in a question, looked up in the passage.

A name is a run of capitalised words ("Marvin Tellock"), or quoted words. Aliases are unknown here,
so a passage is doubted only where its own text gives reason to:

  no name    no word of any name in the question stands in the passage, title included
  another    some words of a name stand there and some do not, and the title is another name:
             "Marvin Tellgate" for "Marvin Tellock"

One name of the question is enough, and so is a title that stands in the question. A word counts as
present if the passage has it with another ending ("Goethes", "Москве"). Left out are the first word
of a sentence, abbreviations (US), forms of address (President), what English capitalises besides
names (I'm, November), and questions in which every word is capitalised or none is. Where a
question's script has no capitals, and nothing is quoted, a passage is doubted if it has no two
neighbouring letters of the question.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

from selfrag_jax.records import Passage

_WORD = re.compile(r"[^\W_]+(?:['’][^\W\d_]+)*")
_QUOTED = re.compile(
    r"“([^“”]+)”|\"([^\"]+)\"|«([^«»]+)»|„([^„“”]+)[“”]|[「『《]([^「」『』《》]+)[」』》]"
)
_SENTENCE_END = re.compile(r"[.?!:;…。？！]\s*[\"“«„(\[]*\s*$")
_SAME_NAME = re.compile(r"[\s\-‐–.]*")  # what may stand between two words of a name
_MAX_QUESTION = 2000  # characters; a longer one is a document, with many names
_QUOTED_WORDS = 4  # longer quotations are no names, and only their absence counts
_ENDING = 2  # letters in which two forms of a word may differ
_STEM = 3  # letters in which they may not
_NOT_NAMES = frozenset(
    "a an and at by de der die el for from il in la le les of on or the to von van with "
    "mr mrs ms miss dr prof professor sir dame lord lady saint st king queen prince princess "
    "emperor president minister chancellor pope captain general judge".split()
)
_CAPITALISED = frozenset(
    "i'm i'd i'll i've what what's who who's whom whose which when where why how "
    "january february march april may june july august september october november december "
    "monday tuesday wednesday thursday friday saturday sunday".split()
)


def missing_names(question: str, passage: Passage) -> str:
    """The names of a question that a passage is not about, with commas; "" if it may well be.

    "what was asked" for a question without names in a script without capitals.
    """
    if len(question) > _MAX_QUESTION:
        return ""
    names = _names(question)
    text = f"{passage.title}\n{passage.text}"
    if not names:
        return "what was asked" if _has_nothing_of(question, text) else ""
    title, asked = _plain(passage.title), _plain(question)
    if title and f" {' '.join(title)} " in f" {' '.join(asked)} ":
        return ""
    words, asked_words = _by_start(_plain(text)), _by_start(asked)
    others = [w for w in _capitalised(passage.title) if not _is_in(w, asked_words, question)]
    for name in names:
        if not _same_script(name[0], text):
            return ""  # a name may be written otherwise there
        found = [_is_in(w, words, text) for w in name]
        if all(found) or (any(found) and not others):
            return ""
    return ", ".join(dict.fromkeys(" ".join(name) for name in _spelled(question)))


# ---- the names in a question ---------------------------------------------------------------------
def _names(question: str) -> list[tuple[str, ...]]:
    names = [tuple(w for word in name for w in _plain(word)) for name in _spelled(question)]
    return [name for name in names if name]


@lru_cache(maxsize=256)
def _spelled(question: str) -> tuple[tuple[str, ...], ...]:
    """The names as they are spelled, each as its words."""
    quoted = [next(filter(None, m.groups())) for m in _QUOTED.finditer(question)]
    found = [tuple(_name_words(_WORD.findall(q))) for q in quoted]
    found = [words for words in found if 0 < len(words) <= _QUOTED_WORDS]
    rest = _QUOTED.sub(" . ", question)
    words = list(_WORD.finditer(rest))
    cased = [m.group() for m in words if m.group().lower() != m.group().upper()]
    if any(w.islower() for w in cased):
        found += [tuple(_name_words(run)) for run in _runs(rest, words)]
    return tuple(name for name in found if name)


def _runs(text: str, words: Sequence[re.Match[str]]) -> Iterator[list[str]]:
    """Runs of capitalised words, without the first word of a sentence."""
    run: list[str] = []
    end, before = 0, ""
    for m in words:
        between, word = text[end : m.start()], m.group()
        if run and not _SAME_NAME.fullmatch(between):
            yield run
            run = []
        is_short = len(before) == 1 or before.casefold() in _NOT_NAMES  # "J. K.", "Mrs."
        begins = not end or (bool(_SENTENCE_END.search(between)) and not is_short)
        if word[0].isupper() and not begins:
            run.append(word)
        elif run:
            yield run
            run = []
        end, before = m.end(), word
    if run:
        yield run


def _name_words(words: Sequence[str]) -> list[str]:
    """Words that tell a name from others: no initials, abbreviations or forms of address."""
    kept = (w for w in words if len(w) > 1 and not (w.isupper() and w.isascii()))
    return [w for w in kept if w.casefold().replace("’", "'") not in _NOT_NAMES | _CAPITALISED]


def _capitalised(title: str) -> set[str]:
    words = _name_words(_WORD.findall(title))
    return {plain for w in words if w[0].isupper() for plain in _plain(w)}


# ---- words in a passage --------------------------------------------------------------------------
def _plain(text: str) -> list[str]:
    """The words of a text without case, accents and a genitive's 's."""
    decomposed = unicodedata.normalize("NFKD", text)
    bare = "".join(c for c in decomposed if not unicodedata.combining(c)).casefold()
    return [re.sub(r"['’]s?$", "", w).replace("’", "'") for w in _WORD.findall(bare)]


def _by_start(words: Sequence[str]) -> dict[str, set[str]]:
    """Words by their first two letters."""
    found: dict[str, set[str]] = {}
    for w in words:
        found.setdefault(w[:2], set()).add(w)
    return found


def _is_in(word: str, words: Mapping[str, set[str]], text: str) -> bool:
    """Whether a text has a word, or a form of it. words: the text's, by their start."""
    similar = words.get(word[:2], set())
    if word in similar:
        return True
    if not _has_case(word):  # scripts without spaces have no words to compare
        return word in unicodedata.normalize("NFKD", text).casefold()
    stem = word[: max(_STEM, len(word) - _ENDING)]
    return any(
        w.startswith(stem) and len(w) - len(os.path.commonprefix([word, w])) <= _ENDING
        for w in similar
    )


def _has_case(text: str) -> bool:
    return text.lower() != text.upper()


def _same_script(word: str, text: str) -> bool:
    """Whether a text has letters of a word's script."""
    script = _script(word[0])
    return any(c.isalpha() and _script(c) == script for c in text)


def _script(c: str) -> str:
    return unicodedata.name(c, "?").partition(" ")[0]


def _has_nothing_of(question: str, text: str) -> bool:
    """Whether a question in a script without capitals shares no two neighbouring letters."""
    pairs = {word[i : i + 2] for word in _plain(question) for i in range(len(word) - 1)}
    pairs = {p for p in pairs if p.isalpha() and not _has_case(p)}
    if not pairs or not _same_script(min(pairs), text):
        return False
    return not any(p in word for word in _plain(text) for p in pairs)
