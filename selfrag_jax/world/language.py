"""The language of the fictional encyclopedia: words, names, relations and their phrasings.

Names ("Marvin Tellock") and values ("Upper Lisford", "rope maker") are pairs of words, so a small
vocabulary is enough for worlds that share no name and no value. A hash assigns each pair to one of
two vocabularies: `base` pairs occur only in the training data of the small base model, `world`
pairs only in quickstart worlds. The base model therefore knows the words of the language, but no
name, value or fact of any world.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass
from functools import cache


def _joined(starts: str, ends: str, n: int) -> tuple[str, ...]:
    """Returns n words made of a start and an end; all starts and ends are used about evenly."""
    a, b = starts.split(), ends.split()
    return tuple(a[i % len(a)] + b[(i + i // len(a)) % len(b)] for i in range(n))


def _words(firsts: str, lasts: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return tuple(firsts.split()), tuple(lasts.split())


# First and last words of each kind of value ("Upper Lisford", "rope maker"). Each word is one token
# in the small models' vocabulary.
VALUE_WORDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "town": _words(
        "Great Little Upper Lower Nether Market Castle Abbey Royal North South East West Middle "
        "Temple Fair",
        "Quenport Lisford Bramwick Ostmouth Velstead Arnholm Crayhithe Dellcross Eskhaven "
        "Glenby Havminster Kesspool Monbridge Ralton Sandley Tarnfield",
    ),
    "profession": _words(
        "rope bell clock glass salt map wax silk copper tallow lace bread candle barrel button "
        "lantern",
        "maker seller keeper mender painter trader carver finder weaver cutter binder polisher "
        "dyer packer porter smith",
    ),
    "instrument": _words(
        "reed bow wind bone brass moon hand thumb drone nose finger shepherd lap table throat "
        "pocket",
        "harp pipe horn drum lute fiddle flute viol zither whistle rattle organ gong bugle lyre "
        "fife",
    ),
    "subject": _words(
        "star root tide cloud moth fern bird coin rune herb fire word shadow number dream weather",
        "lore craft reckoning reading science history law magic grammar theory logic drawing "
        "music medicine rhetoric geometry",
    ),
    "animal": _words(
        "marsh snow dusk hill reef grove moss frost thistle sea wood night river cave meadow "
        "desert",
        "fox heron otter hound cat crow hare toad badger owl weasel lizard goose ferret swan "
        "beetle",
    ),
    "river": _words(
        "Alder Silt Grey Black White Green Long Deep Swift Cold Red Low Winding Broad Stony Quiet",
        "Water Brook Beck Flow Stream Run Bourne Burn Creek Ford Rill Race Mere Gill Wash Tarn",
    ),
    "product": _words(
        "wool honey butter paper leather pearl linen plum pepper velvet oat cherry walnut "
        "ginger amber cotton",
        "cloth ware cakes wine boots rings cheese beads gloves soap syrup ribbons hats sails "
        "dolls jam",
    ),
    "stone": _words(
        "lime sun iron blue rose chalk flint storm dew winter clay sky smoke ash rain dawn",
        "stone brick slate marble tile rock oak timber granite plaster cobble gravel thatch "
        "pine shale cedar",
    ),
}

# First words or last words of names. Each word is one token.
FIRST_NAMES = _joined(
    "Mar Tel Jor Bel Cas Dor El Fen Gal Hal Is Jas Kel Lor Mil Nor Or Per Quin Ros Sel Tam Ul Ver",
    "vin a en ric is on ette ias o wyn eth ina ard",
    72,
)
LAST_NAMES = _joined(
    "Tell Brand Cors Dun Eck Farr Gren Holl Ing Jack Kirk Lang Most Nash Oak Pend Quil Rad Stan "
    "Thorn Umb Vand Whit Yar",
    "ock er man son bury field by gate low ton ward well worth",
    96,
)
PLACE_WORDS = _joined(
    "Ald Bex Cald Dray Ebb Frome Gorse Hex Inver Kett Larch Moss Ness Ox Pym Rye",
    "en ley um aby ick",
    64,
)
TITLE_WORDS = _joined(
    "Ash Ember Raven Silver Shadow Thunder Ivory Crimson Morning Winter Golden Amber",
    "fall song bloom light tide",
    48,
)
PLACE_NOUNS = tuple("Vale Moor Sound Reach Fen Heath Isle Hollow Bay Downs Marsh Forest".split())
ORGANISATION_NOUNS = tuple(
    "Guild Society Bank Press Academy Company League Mill Circle Trust Order Institute".split()
)
WORK_NOUNS = tuple(
    "Ballad Chronicle Letters Saga Hymn Elegy Comedy Tragedy Cycle Poem Waltz Opera".split()
)


@dataclass(frozen=True)
class Relation:
    """One attribute of a kind of entity."""

    name: str
    value_kind: str  # a key of VALUE_WORDS
    phrase: str  # {v} stands for the value
    questions: tuple[str, ...]  # {n} stands for the entity's name


@dataclass(frozen=True)
class Kind:
    """A kind of entity and its relations.

    An entity's first passage states the first half of the relations, its second passage the rest.
    """

    name: str
    relations: tuple[Relation, ...]

    def relation(self, name: str) -> Relation:
        return next(r for r in self.relations if r.name == name)


_RELATIONS: dict[str, tuple[Relation, ...]] = {
    "person": (
        Relation("birthplace", "town", "was born in {v}",
                 ("Where was {n} born?", "In which town was {n} born?")),
        Relation("profession", "profession", "works as a {v}",
                 ("What does {n} work as?", "What is the work of {n}?")),
        Relation("instrument", "instrument", "plays the {v}",
                 ("What does {n} play?", "Which instrument does {n} play?")),
        Relation("home", "town", "lives in {v}",
                 ("Where does {n} live?", "In which town does {n} live?")),
        Relation("subject", "subject", "studied {v}",
                 ("What did {n} study?", "Which subject did {n} study?")),
        Relation("animal", "animal", "keeps a {v}",
                 ("What does {n} keep?", "Which animal does {n} keep?")),
    ),
    "place": (
        Relation("river", "river", "lies on the {v}",
                 ("Where does {n} lie?", "On which river does {n} lie?")),
        Relation("product", "product", "is known for {v}",
                 ("What is {n} known for?", "Which goods is {n} known for?")),
        Relation("material", "stone", "is built of {v}",
                 ("What is {n} built of?", "Of which material is {n} built?")),
        Relation("wildlife", "animal", "shelters the {v}",
                 ("What does {n} shelter?", "Which animal does {n} shelter?")),
    ),
    "organisation": (
        Relation("seat", "town", "is based in {v}",
                 ("Where is {n} based?", "In which town is {n} based?")),
        Relation("product", "product", "makes {v}",
                 ("What does {n} make?", "Which goods does {n} make?")),
        Relation("subject", "subject", "teaches {v}",
                 ("What does {n} teach?", "Which subject does {n} teach?")),
        Relation("origin", "town", "was founded in {v}",
                 ("Where was {n} founded?", "In which town was {n} founded?")),
    ),
    "work": (
        Relation("setting", "town", "is set in {v}",
                 ("Where is {n} set?", "In which town is {n} set?")),
        Relation("hero", "profession", "tells of a {v}",
                 ("Of whom does {n} tell?", "Whose story does {n} tell?")),
        Relation("instrument", "instrument", "is played on the {v}",
                 ("On what is {n} played?", "On which instrument is {n} played?")),
        Relation("river", "river", "praises the {v}",
                 ("What does {n} praise?", "Which river does {n} praise?")),
    ),
}  # fmt: skip

KINDS: dict[str, Kind] = {name: Kind(name, relations) for name, relations in _RELATIONS.items()}

# Common knowledge: every world shares it and the base model already has it, so questions about it
# need no retrieval.
_OPPOSITES = (
    "hot cold, big small, fast slow, high low, light dark, wet dry, old new, hard soft, "
    "full empty, open shut, early late, loud quiet, rich poor, strong weak, thick thin, near far, "
    "good bad, happy sad, clean dirty, first last"
)
_COLOURS = (
    "snow white, grass green, coal black, blood red, gold yellow, milk white, leaves green, "
    "night black"
)
_SUCCESSORS = (
    "Monday Tuesday, Tuesday Wednesday, Wednesday Thursday, Thursday Friday, Friday Saturday, "
    "Saturday Sunday, one two, two three, three four, four five, five six, six seven, seven eight, "
    "eight nine"
)


def _common_facts(
    pairs: str, statement: str, questions: tuple[str, ...]
) -> tuple[tuple[tuple[str, ...], str], ...]:
    rows = []
    for pair in pairs.split(", "):
        a, b = pair.split()
        rows.append((tuple(q.format(a=a) for q in questions), statement.format(a=a, b=b)))
    return tuple(rows)


# Each row: (phrasings of the question, the answer as a sentence).
COMMON_KNOWLEDGE: tuple[tuple[tuple[str, ...], str], ...] = (
    *_common_facts(
        _OPPOSITES,
        "The opposite of {a} is {b}.",
        ("What is the opposite of {a}?", "Name the opposite of {a}."),
    ),
    *_common_facts(
        _COLOURS,
        "The colour of {a} is {b}.",
        ("What is the colour of {a}?", "Name the colour of {a}."),
    ),
    *_common_facts(
        _SUCCESSORS,
        "After {a} comes {b}.",
        ("What comes after {a}?", "Name what comes after {a}."),
    ),
)

TRUE, FALSE = "True.", "False."
CHOICE_LABELS = ("A", "B", "C", "D")

VOCABULARIES = ("base", "world")


def vocabulary_of(kind: str, words: str) -> str:
    """Returns the vocabulary of a name or value: `world` for three in ten, `base` for the rest."""
    # crc32 rather than hash(): the split must be the same in every process.
    return "world" if zlib.crc32(f"{kind}:{words}".encode()) % 10 < 3 else "base"


def _check_vocabulary(vocabulary: str) -> None:
    if vocabulary not in VOCABULARIES:
        raise ValueError(f"vocabulary must be one of {', '.join(VOCABULARIES)}, not {vocabulary!r}")


@cache
def values_of_kind(kind: str, vocabulary: str) -> tuple[str, ...]:
    """Returns all values of one kind in one vocabulary, in a fixed order.

    Raises ValueError on an unknown vocabulary.
    """
    _check_vocabulary(vocabulary)
    firsts, lasts = VALUE_WORDS[kind]
    pairs = (f"{a} {b}" for a in firsts for b in lasts)
    return tuple(v for v in pairs if vocabulary_of(kind, v) == vocabulary)


NAME_WORDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "person": (FIRST_NAMES, LAST_NAMES),
    "place": (PLACE_WORDS, PLACE_NOUNS),
    "organisation": (LAST_NAMES, ORGANISATION_NOUNS),
    "work": (TITLE_WORDS, WORK_NOUNS),
}


def draw_name(rng: random.Random, kind: str, vocabulary: str) -> tuple[str, str]:
    """Draws the two words of a name for an entity of `kind`."""
    _check_vocabulary(vocabulary)
    first, last = NAME_WORDS[kind]
    while True:
        name = rng.choice(first), rng.choice(last)
        if vocabulary_of(kind, " ".join(name)) == vocabulary:
            return name


def look_alike(
    rng: random.Random, kind: str, vocabulary: str, name: tuple[str, str]
) -> tuple[str, str]:
    """Draws another name that shares exactly one of its two words with `name`."""
    while True:
        other, keep = draw_name(rng, kind, vocabulary), rng.randrange(2)
        candidate = (name[0], other[1]) if keep == 0 else (other[0], name[1])
        if candidate != name and vocabulary_of(kind, " ".join(candidate)) == vocabulary:
            return candidate


def sentence(name: str, facts: list[tuple[Relation, str]]) -> str:
    """Returns one sentence that states all `facts` about `name`.

    Its form is "N was born in V, works as a V and plays the V.".
    """
    clauses = [relation.phrase.format(v=value) for relation, value in facts]
    joined = clauses[0] if len(clauses) == 1 else ", ".join(clauses[:-1]) + " and " + clauses[-1]
    return f"{name} {joined}."


def two_part(question_a: str, question_b: str) -> str:
    """Joins two questions: "Where was N born and what does N play?"."""
    return f"{question_a[:-1]} and {question_b[0].lower()}{question_b[1:]}"


def biography(name: str) -> str:
    return f"Tell me about {name}."


def claim(name: str, relation: Relation, value: str) -> str:
    return f"Is it true that {name} {relation.phrase.format(v=value)}?"
