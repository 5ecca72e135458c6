"""People for make_table.py, from the glosses of WordNet."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from pathlib import Path

from selfrag_jax.facts.table import TableEntity


class WordNet:
    """The nouns of WordNet: synsets with their lemmas, glosses and pointers."""

    def __init__(self, folder: Path):
        self.people: list[tuple[list[str], str, int]] = []  # lemmas, gloss, pointers
        self.mentions: Counter[str] = Counter()  # word, or two words -> glosses that hold it
        self.other: set[str] = set()  # lemmas, in lower case, of what is no person
        for line in (folder / "data.noun").read_text(encoding="utf-8").splitlines():
            if line.startswith("  "):
                continue
            head, gloss = line.split(" | ", 1)
            parts = head.split()
            n = int(parts[3], 16)
            lemmas = [parts[4 + 2 * i].replace("_", " ") for i in range(n)]
            pointers = parts[5 + 2 * n :]
            found = re.findall(r"[A-Za-z]+", gloss)
            self.mentions.update({*found, *map(" ".join, itertools.pairwise(found))})
            if parts[1] == "18" and "@i" in pointers:
                self.people.append((lemmas, gloss.strip(), len(pointers) // 4))
            else:
                self.other.update(x.lower() for x in lemmas)


NATIONS = {
    "United States": ("American", "United States"), "American": ("American",),
    "English": ("English", "British"), "British": ("British",), "Scottish": ("Scottish", "British"),
    "Welsh": ("Welsh", "British"), "Soviet": ("Soviet", "Russian"), "French": ("French",),
    "German": ("German",), "Italian": ("Italian",), "Russian": ("Russian",),
    "Spanish": ("Spanish",), "Austrian": ("Austrian",), "Dutch": ("Dutch",), "Irish": ("Irish",),
    "Swiss": ("Swiss",), "Danish": ("Danish",), "Swedish": ("Swedish",), "Greek": ("Greek",),
    "Canadian": ("Canadian",), "Norwegian": ("Norwegian",), "Australian": ("Australian",),
    "Belgian": ("Belgian",), "Indian": ("Indian",), "Polish": ("Polish",),
    "Japanese": ("Japanese",), "Hungarian": ("Hungarian",), "Israeli": ("Israeli",),
    "Czech": ("Czech",), "Mexican": ("Mexican",), "South African": ("South African",),
    "Chinese": ("Chinese",), "Flemish": ("Flemish",), "New Zealand": ("New Zealander",),
    "Finnish": ("Finnish",), "Cuban": ("Cuban",), "Portuguese": ("Portuguese",),
    "Romanian": ("Romanian",), "Brazilian": ("Brazilian",), "Turkish": ("Turkish",),
    "Argentine": ("Argentine", "Argentinian"), "Chilean": ("Chilean",), "Egyptian": ("Egyptian",),
}  # fmt: skip
# Last words of a gloss's head that are no occupation.
NO_OCCUPATION = {
    "son", "daughter", "wife", "one", "leader", "chief", "heroine", "member", "founder", "king",
    "queen", "emperor", "grandson", "pioneer", "patriot", "stage", "portrait", "man", "woman",
    "author", "star", "saint", "genius", "head", "president", "master", "person", "family",
}  # fmt: skip
_YEARS = re.compile(r"\((\d{4})-(\d{4})\)$|\(born (?:in )?(\d{4})\)$")
_HEAD_END = re.compile(
    r"\(| who | whose | noted | known | best | born | of | in | with | for | during |,|;"
    r"| remembered | considered | that | from | at | on | to | when | by | as "
)


def people(words: WordNet) -> list[TableEntity]:
    """People with nationality, occupation, and years of birth and death, read from the glosses.

    The popularity counts the glosses that mention the last two words of the name, or its last one,
    shared among those of the name, if nothing else is called so.
    """
    named = Counter(_person_name(lemmas) for lemmas, _, _ in words.people)
    last_names = Counter(_person_name(lemmas).split()[-1] for lemmas, _, _ in words.people)
    first_names = {_person_name(lemmas).split()[0] for lemmas, _, _ in words.people}
    heads = Counter(h for _, gloss, _ in words.people for h in _occupations(gloss))
    out = []
    for lemmas, gloss, pointers in words.people:
        name, years = _person_name(lemmas), _YEARS.search(gloss)
        if " " not in name or named[name] > 1 or not years or not name.isascii():
            continue
        facts: dict[str, tuple[str, ...]] = {}
        nation = next((n for n in NATIONS if gloss.startswith(f"{n} ")), None)
        if nation:
            facts["nationality"] = NATIONS[nation]
        if found := tuple(h for h in _occupations(gloss) if heads[h] > 1):
            facts["occupation"] = tuple(dict.fromkeys((*found, *(h.split()[-1] for h in found))))
        birth, death, only = years.groups()
        if only or 15 < int(death) - int(birth) < 105:
            facts["birth_year"] = (only or birth,)
            if death:
                facts["death_year"] = (death,)
        if len(facts) < 3:
            continue
        last = name.split()[-1]
        is_clear = last.lower() not in words.other and last not in first_names
        popularity: float = words.mentions[" ".join(name.split()[-2:])] + pointers
        if is_clear:
            popularity += round(words.mentions[last] / last_names[last], 2)
        aliases = tuple(x for x in lemmas if " " in x and x != name and x.isascii())
        details = _person_details(gloss)
        out.append(
            TableEntity("person", name, name, aliases, popularity, 0, True, tuple(facts.items()),
                        tuple(details.items()))
        )  # fmt: skip
    return out


def _person_name(lemmas: list[str]) -> str:
    """The name a text would use: the first one of several words that is no title."""
    full = [x for x in lemmas if " " in x and not re.match(r"(Sir|Lord|Saint|St\.|Duke|Dame) ", x)]
    return next((x for x in full if x.split()[-1] == lemmas[0]), full[0] if full else lemmas[0])


def _occupations(gloss: str) -> list[str]:
    """The occupations that the beginning of a gloss lists, e.g. "geologist", "explorer"."""
    nation = next((n for n in NATIONS if gloss.startswith(f"{n} ")), None)
    if nation is None:
        return []
    head = _HEAD_END.split(gloss.removeprefix(nation) + " (")[0].strip()
    found = []
    for part in re.split(r" and (?:the |an? )?", head):
        words = part.split()
        kept = words[-2:] if words[-2:-1] in (["film"], ["tennis"], ["baseball"], ["jazz"]) else []
        text = " ".join(kept or words[-1:])
        if re.fullmatch(r"[a-z ]{4,}", text) and text.split()[-1] not in NO_OCCUPATION:
            found.append(text)
    return found


def _person_details(gloss: str) -> dict[str, str]:
    if m := re.search(r"\b(?:noted|known|remembered) for ([^(;]{8,90}) \(", gloss):
        return {"fame": m[1].strip(" ,")}
    if m := re.search(r" (who [^(;]{8,90}) \(\d{4}", gloss):
        return {"deed": m[1].strip(" ,")}
    return {}
