"""The language of the fictional encyclopedia: words, names, relations and their phrasings.

Every name and every value is a compound of two morphemes ("Marvin Tellock", "Quenport", "ropemaker"), so that a small
vocabulary of word pieces covers worlds that share no whole word. A word belongs to one of two vocabularies by a hash
of its morphemes: `base` words appear only where the small base model is trained, `world` words only in quickstart
worlds. The base model thus knows the language and its word pieces, and none of the names, values or facts.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass
from functools import cache

# Morphemes: (beginnings, endings) for each kind of word.
MORPHEMES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "first": (
        tuple("Mar Tel Jor Bel Cas Dor El Fen Gal Hal Is Jas Kel Lor Mil Nor Or Per Quin Ros Sel Tam Ul Ver".split()),
        tuple("vin a en ric is on ette ias o wyn eth ina ard ius ley sa".split()),
    ),
    "last": (
        tuple(
            "Tell Brand Cors Dun Eck Farr Gren Holl Ing Jack Kirk Lang Most Nash Oak Pend Quil Rad Stan Thorn Umb Vand "
            "Whit Yar".split()
        ),
        tuple("ock er man son bury field by gate low ton ward well worth den ham ridge more over sley stock ".split()),
    ),
    "town": (
        tuple("Quen Lis Bram Ost Vel Arn Cray Dell Esk Glen Hav Kess Mon Ral Sand Tarn".split()),
        tuple("port ford wick mouth stead holm hithe cross haven bridge minster pool".split()),
    ),
    "profession": (
        tuple("rope bell clock glass salt map wax silk copper tallow lace bread candle barrel".split()),
        tuple("maker seller keeper mender painter trader carver finder".split()),
    ),
    "instrument": (
        tuple("reed bow wind bone brass moon river hand thumb drone nose finger".split()),
        tuple("harp pipe horn drum lute fiddle flute viol".split()),
    ),
    "subject": (
        tuple("star root tide cloud moth fern bird coin rune herb fire word".split()),
        tuple("lore craft reckoning reading science history law magic".split()),
    ),
    "animal": (
        tuple("marsh snow dusk hill reef grove moss frost thistle sea wood night".split()),
        tuple("fox heron otter hound cat crow hare toad".split()),
    ),
    "river": (
        tuple("Alder Silt Grey Black White Green Long Deep Swift Cold Red Low".split()),
        tuple("water brook beck flow stream run bourne burn".split()),
    ),
    "product": (
        tuple("wool honey butter paper leather pearl linen wax plum pepper velvet oat".split()),
        tuple("cloth ware cakes wine boots rings cheese beads".split()),
    ),
    "stone": (
        tuple("lime sun iron blue rose chalk flint storm dew winter clay sky".split()),
        tuple("stone brick slate marble tile rock oak timber".split()),
    ),
    "title": (
        tuple("Ash Ember Hollow Raven Silver Shadow Thunder Ivory Crimson Morning Winter Golden".split()),
        tuple("fall song bloom light tide wing shore thorn heart veil crown step".split()),
    ),
}
PLACE_NOUNS = tuple("Vale Moor Sound Reach Fen Heath Isle Hollow Bay Downs Marsh Forest".split())
ORGANISATION_NOUNS = tuple("Guild Society Bank Press Academy Company League Mill Circle Trust Order Institute".split())
WORK_NOUNS = tuple("Ballad Chronicle Letters Saga Hymn Elegy Comedy Tragedy Cycle Poem Waltz Opera".split())


@dataclass(frozen=True)
class Relation:
    """One attribute of a kind of entity. `phrase` and `questions` hold {v} for the value, {n} for the entity's name."""

    name: str
    value: str  # the kind of word that fills {v}: a key of MORPHEMES
    phrase: str
    questions: tuple[str, ...]


@dataclass(frozen=True)
class Kind:
    """A kind of entity with its relations; the first half stands in its first passage, the rest in the second."""

    name: str
    relations: tuple[Relation, ...]

    def relation(self, name: str) -> Relation:
        return next(r for r in self.relations if r.name == name)


KINDS: dict[str, Kind] = {
    k.name: k
    for k in (
        Kind(
            "person",
            (
                Relation("birthplace", "town", "was born in {v}", ("Where was {n} born?", "In which town was {n} born?")),
                Relation("profession", "profession", "works as a {v}", ("What does {n} work as?", "What is the work of {n}?")),
                Relation("instrument", "instrument", "plays the {v}", ("What does {n} play?", "Which instrument does {n} play?")),
                Relation("home", "town", "lives in {v}", ("Where does {n} live?", "In which town does {n} live?")),
                Relation("subject", "subject", "studied {v}", ("What did {n} study?", "Which subject did {n} study?")),
                Relation("animal", "animal", "keeps a {v}", ("What does {n} keep?", "Which animal does {n} keep?")),
            ),
        ),
        Kind(
            "place",
            (
                Relation("river", "river", "lies on the {v}", ("Where does {n} lie?", "On which river does {n} lie?")),
                Relation("product", "product", "is known for {v}", ("What is {n} known for?", "Which goods is {n} known for?")),
                Relation("material", "stone", "is built of {v}", ("What is {n} built of?", "Of which material is {n} built?")),
                Relation("wildlife", "animal", "shelters the {v}", ("What does {n} shelter?", "Which animal does {n} shelter?")),
            ),
        ),
        Kind(
            "organisation",
            (
                Relation("seat", "town", "is based in {v}", ("Where is {n} based?", "In which town is {n} based?")),
                Relation("product", "product", "makes {v}", ("What does {n} make?", "Which goods does {n} make?")),
                Relation("subject", "subject", "teaches {v}", ("What does {n} teach?", "Which subject does {n} teach?")),
                Relation("origin", "town", "was founded in {v}", ("Where was {n} founded?", "In which town was {n} founded?")),
            ),
        ),
        Kind(
            "work",
            (
                Relation("setting", "town", "is set in {v}", ("Where is {n} set?", "In which town is {n} set?")),
                Relation("hero", "profession", "tells of a {v}", ("Of whom does {n} tell?", "Whose story does {n} tell?")),
                Relation("instrument", "instrument", "is played on the {v}", ("On what is {n} played?", "On which instrument is {n} played?")),
                Relation("river", "river", "praises the {v}", ("What does {n} praise?", "Which river does {n} praise?")),
            ),
        ),
    )
}  # fmt: skip

# Knowledge that every world shares and the base model already has: questions that need no retrieval.
_OPPOSITES = (
    "hot cold, big small, fast slow, high low, light dark, wet dry, old new, hard soft, full empty, open shut, early late, "
    "loud quiet, rich poor, strong weak, thick thin, near far, good bad, happy sad, clean dirty, first last"
)
_COLOURS = "snow white, grass green, coal black, blood red, gold yellow, milk white, leaves green, night black"
_AFTER = (
    "Monday Tuesday, Tuesday Wednesday, Wednesday Thursday, Thursday Friday, Friday Saturday, Saturday Sunday, one two, "
    "two three, three four, four five, five six, six seven, seven eight, eight nine"
)


def _facts(pairs: str, statement: str, questions: tuple[str, ...]) -> list[tuple[tuple[str, ...], str]]:
    rows = []
    for pair in pairs.split(", "):
        a, b = pair.split()
        rows.append((tuple(q.format(a=a) for q in questions), statement.format(a=a, b=b)))
    return rows


# Each row: (phrasings of the question, the answer as a sentence).
COMMON_KNOWLEDGE: tuple[tuple[tuple[str, ...], str], ...] = tuple(
    _facts(_OPPOSITES, "The opposite of {a} is {b}.", ("What is the opposite of {a}?", "Name the opposite of {a}."))
    + _facts(_COLOURS, "The colour of {a} is {b}.", ("What is the colour of {a}?", "Name the colour of {a}."))
    + _facts(_AFTER, "After {a} comes {b}.", ("What comes after {a}?", "Name what comes after {a}."))
)

TRUE, FALSE = "True.", "False."
CHOICE_LABELS = ("A", "B", "C", "D")


@cache
def words(kind: str, vocabulary: str) -> tuple[str, ...]:
    """All words of one kind in one vocabulary (`base` or `world`), in a fixed order; three in ten are `world` words.

    Raises ValueError on an unknown vocabulary.
    """
    if vocabulary not in ("base", "world"):
        raise ValueError(f"vocabulary must be 'base' or 'world', not {vocabulary!r}")
    starts, ends = MORPHEMES[kind]
    # crc32 rather than hash(): the split must be the same in every process.
    is_world = lambda w: zlib.crc32(f"{kind}:{w}".encode()) % 10 < 3  # noqa: E731
    return tuple(w for s in starts for e in ends if is_world(w := s + e) == (vocabulary == "world"))


def draw_name(rng: random.Random, kind: str, vocabulary: str) -> tuple[str, str]:
    """A name of two words for an entity of `kind`."""
    if kind == "person":
        return rng.choice(words("first", vocabulary)), rng.choice(words("last", vocabulary))
    if kind == "place":
        return rng.choice(words("town", vocabulary)), rng.choice(PLACE_NOUNS)
    if kind == "organisation":
        return rng.choice(words("last", vocabulary)), rng.choice(ORGANISATION_NOUNS)
    return rng.choice(words("title", vocabulary)), rng.choice(WORK_NOUNS)


def look_alike(rng: random.Random, kind: str, vocabulary: str, name: tuple[str, str]) -> tuple[str, str]:
    """A name that shares one of the two words with `name` (and often the beginning of the other)."""
    for _ in range(64):
        other = draw_name(rng, kind, vocabulary)
        keep = rng.randrange(2)
        candidate = (name[0], other[1]) if keep == 0 else (other[0], name[1])
        if candidate != name and (rng.random() < 0.5 or candidate[1 - keep][:2] == name[1 - keep][:2]):
            return candidate
    return candidate if candidate != name else look_alike(rng, kind, vocabulary, name)


def sentence(name: str, facts: list[tuple[Relation, str]]) -> str:
    """One sentence with all `facts` about `name`: "N was born in V, works as a V and plays the V."."""
    clauses = [relation.phrase.format(v=value) for relation, value in facts]
    joined = clauses[0] if len(clauses) == 1 else ", ".join(clauses[:-1]) + " and " + clauses[-1]
    return f"{name} {joined}."


def two_part(question_a: str, question_b: str) -> str:
    """ "Where was N born?" and "What does N play?" as one question."""
    return f"{question_a[:-1]} and {question_b[0].lower()}{question_b[1:]}"


def claim(name: str, relation: Relation, value: str) -> str:
    return f"Is it true that {name} {relation.phrase.format(v=value)}?"
