"""A world of facts: which entities are asked about, and the passages that state their facts.

Each entity has a group: `train` and `test` are asked about, `distractor` never is. Distractors are
look-alikes first (remakes, cities of the same name, titles that share a word), then others of the
same kinds. Some entities are asked what the corpus does not tell: it lacks one of their facts, or
has no passage about them at all.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from selfrag_jax.facts import language
from selfrag_jax.facts import passage_language as sentences
from selfrag_jax.facts.settings import FactsConfig
from selfrag_jax.facts.table import TableEntity, read_table
from selfrag_jax.records import Passage
from selfrag_jax.text.normalising import normalise

MIN_WORDS, MAX_WORDS = 20, 80  # of a passage
DETAILS = 2  # sentences about details in a passage, beside those that fill a short one
COMMON = 30  # a word in more names than that makes no look-alike
LISTED = 4  # entities in a passage about several
# Of a kind's entities, at most these shares are asked about: the others are its look-alikes.
MAX_TEST, MAX_TRAIN = 0.3, 0.5


@dataclass(frozen=True)
class Subject:
    """An entity of a world."""

    entity: TableEntity
    group: str  # train, test or distractor
    withheld: tuple[str, ...] = ()  # attributes that no passage states
    is_absent: bool = False  # no passage is about it
    is_known: bool = False  # so popular that its facts need no retrieval

    @property
    def told(self) -> tuple[str, ...]:
        """The attributes that the corpus states."""
        if self.is_absent:
            return ()
        return tuple(a for a in self.entity.attributes if a not in self.withheld)


@dataclass(frozen=True)
class StatedPassage:
    """A passage and what it states: (name of the entity, attribute) pairs."""

    passage: Passage
    about: tuple[str, ...]
    states: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class FactsWorld:
    config: FactsConfig
    subjects: tuple[Subject, ...]
    passages: tuple[StatedPassage, ...]

    def group(self, name: str) -> list[Subject]:
        return [s for s in self.subjects if s.group == name]

    @cached_property
    def values(self) -> dict[str, list[str]]:
        """Relation -> the values of the world's entities, the one to show."""
        return values_by_relation(s.entity for s in self.subjects)


def values_by_relation(entities: Iterable[TableEntity]) -> dict[str, list[str]]:
    """Returns relation -> its values, the one to show of each entity, sorted."""
    found: dict[str, set[str]] = defaultdict(set)
    for e in entities:
        for attribute in e.attributes:
            found[f"{e.kind}_{attribute}"].add(e.value(attribute))
    return {name: sorted(values) for name, values in found.items()}


def build_world(config: FactsConfig) -> FactsWorld:
    """Draws the world of a config; equal configs give equal worlds."""
    rng = random.Random(f"facts-{config.seed}")
    table = read_table()
    asked = _asked(rng, config, table)
    taken = {s.entity.name for s in asked}
    pool = [e for e in table if e.name not in taken]
    others = [Subject(e, "distractor") for e in _look_alikes(rng, config, asked, pool)]
    subjects = (*asked, *others)
    made = [p for s in subjects for p in entity_passages(rng, s, config.second_passage_rate)]
    made += list_passages(rng, subjects, config.list_passages)
    rng.shuffle(made)
    numbered = tuple(
        StatedPassage(Passage(str(i + 1), p.passage.title, p.passage.text), p.about, p.states)
        for i, p in enumerate(made)
    )
    return FactsWorld(config, subjects, numbered)


# ---- entities ------------------------------------------------------------------------------------
def _asked(rng: random.Random, config: FactsConfig, table: Sequence[TableEntity]) -> list[Subject]:
    """Draws train and test entities, evenly over the deciles of each kind."""
    shares, out = dict(config.kinds), []
    total = sum(shares.values())
    for kind, share in sorted(shares.items()):
        fit = [e for e in table if e.kind == kind and e.is_asked]
        n_test = min(round(config.test * share / total), int(MAX_TEST * len(fit)))
        n_train = min(round(config.train * share / total), int(MAX_TRAIN * len(fit)))
        drawn = _evenly(rng, fit, n_test + n_train)
        # Both groups take every decile: test takes one of so many that are drawn in order.
        test = set(rng.sample(range(len(drawn)), n_test)) if n_train else set(range(len(drawn)))
        for i, e in enumerate(drawn):
            out.append(_subject(rng, config, e, "test" if i in test else "train"))
    return out


def _evenly(rng: random.Random, entities: list[TableEntity], n: int) -> list[TableEntity]:
    strata: dict[int, list[TableEntity]] = defaultdict(list)
    for e in rng.sample(entities, len(entities)):
        strata[e.decile].append(e)
    out: list[TableEntity] = []
    while len(out) < min(n, len(entities)):
        for decile in sorted(strata):
            if strata[decile] and len(out) < n:
                out.append(strata[decile].pop())
    return out


def _subject(rng: random.Random, config: FactsConfig, e: TableEntity, group: str) -> Subject:
    draw = rng.random()
    withheld: tuple[str, ...] = ()
    is_absent = draw < config.absent_rate
    if not is_absent and draw < config.absent_rate + config.lacking_rate:
        withheld = _withheld(rng, e)
    return Subject(e, group, withheld, is_absent, e.decile >= config.known_from)


def _withheld(rng: random.Random, e: TableEntity) -> tuple[str, ...]:
    """Draws one attribute of several whose value nothing else about the entity gives away."""

    def is_hidden(attribute: str) -> bool:
        other = [v for a, values in e.facts if a != attribute for v in values]
        text = " ".join(map(normalise, (*e.names, *other, *dict(e.details).values())))
        return not any(f" {normalise(v)} " in f" {text} " for v in e.values(attribute))

    fit = [a for a in e.attributes if is_hidden(a)] if len(e.attributes) > 1 else []
    return (rng.choice(fit),) if fit else ()


def _words(e: TableEntity) -> list[str]:
    return [w for w in normalise(e.short).split() if len(w) > 3]


def _look_alikes(
    rng: random.Random, config: FactsConfig, asked: list[Subject], pool: list[TableEntity]
) -> list[TableEntity]:
    """Draws distractors: for each asked entity in turn a namesake or one that shares a word."""
    by_word: dict[str, list[TableEntity]] = defaultdict(list)
    for e in pool:
        for word in {*_words(e), normalise(e.short)}:
            by_word[word].append(e)
    kinds = {kind for kind, share in config.kinds if share > 0}
    chosen: dict[str, TableEntity] = {}
    for s in rng.sample(asked, len(asked)):
        near = [*by_word[normalise(s.entity.short)]]
        for word in _words(s.entity):
            if len(by_word[word]) <= COMMON:
                near += [e for e in by_word[word] if e.kind in kinds]
        fresh = [e for e in near if e.name not in chosen]
        for e in fresh[:2]:
            chosen[e.name] = e
    rest = [e for e in pool if e.name not in chosen and e.kind in kinds]
    wanted = Counter(s.entity.kind for s in asked)
    weights = {e.name: wanted[e.kind] for e in rest}
    # The kinds in the shares in which they are asked about.
    rest.sort(key=lambda e: rng.random() ** (1 / max(1, weights[e.name])), reverse=True)
    return [*chosen.values(), *rest][: config.distractors]


# ---- passages ------------------------------------------------------------------------------------
def entity_passages(rng: random.Random, s: Subject, second_rate: float) -> list[StatedPassage]:
    """Returns an entity's passages, with empty ids: one with all it tells, or two that share it."""
    if s.is_absent:
        return []
    facts = rng.sample(s.told, len(s.told))
    if rng.random() >= second_rate:
        return [_compose(rng, s, facts)]
    cut = rng.randint(0, len(facts))
    return [_compose(rng, s, facts[:cut]), _compose(rng, s, facts[cut:])]


def _compose(rng: random.Random, s: Subject, wanted: Iterable[str]) -> StatedPassage:
    e = s.entity
    left, states = set(wanted), []
    values = {a: v[0] for a, v in e.facts} | dict(e.details)
    attributes, hidden = set(e.attributes), [v for a in s.withheld for v in e.values(a)]
    parts: list[str] = []
    unused = list(sentences.FURTHER[e.kind])

    def usable(template: str, needs_fact: bool) -> bool:
        told = sentences.fields(template)
        facts = told & attributes
        if facts != told - set(dict(e.details)) or not facts <= left or needs_fact != bool(facts):
            return False
        return not any(normalise(v) in normalise(_fill(template, e, values)) for v in hidden)

    def add(template: str) -> None:
        facts = sentences.fields(template) & attributes
        states.extend(sorted(facts))
        left.difference_update(facts)
        parts.append(_fill(template, e, values))

    openings = sentences.OPENINGS[e.kind]
    fit = [t for t in openings if usable(t, bool(left))] or [
        t for t in openings if usable(t, False)
    ]
    opening = rng.choice(fit)
    add(opening)
    while left:
        template = rng.choice([t for t in unused if usable(t, True)])
        unused.remove(template)
        add(template)
    extra = [t for t in rng.sample(unused, len(unused)) if usable(t, False)]
    extra.sort(key=lambda t: not sentences.fields(t))  # details before sentences without any
    told = set(sentences.fields(opening))
    for i, template in enumerate(extra):
        words = len(" ".join(parts).split())
        if words >= MIN_WORDS and (i >= DETAILS or not sentences.fields(template)):
            break
        if words + len(template.split()) + 12 > MAX_WORDS or sentences.fields(template) & told:
            continue
        told |= sentences.fields(template)
        parts.append(_fill(template, e, values))
    first, rest = parts[0], parts[1:]
    rng.shuffle(rest)
    pairs = tuple((e.name, a) for a in states)
    return StatedPassage(Passage("", e.name, " ".join([first, *rest])), (e.name,), pairs)


def _fill(template: str, e: TableEntity, values: dict[str, str], name: str = "") -> str:
    articles = {f"a_{k}": language.with_article(v) for k, v in values.items()}
    text = template.format(n=name or e.short, **values, **articles)
    return language.capitalised(text.replace("..", "."))


def list_passages(rng: random.Random, subjects: Sequence[Subject], n: int) -> list[StatedPassage]:
    """Returns up to n passages that say something about several entities with a shared value."""
    groups: dict[tuple[str, int, str], list[Subject]] = defaultdict(list)
    for s in subjects:
        for i, (attribute, _, item) in enumerate(sentences.LISTS[s.entity.kind]):
            needed = {attribute, *sentences.fields(item) & set(s.entity.attributes)}
            has_all = sentences.fields(item) <= {*s.told, *dict(s.entity.details)}
            if needed <= set(s.told) and has_all:
                groups[s.entity.kind, i, s.entity.value(attribute)].append(s)
    keys = [k for k, members in sorted(groups.items()) if len(members) >= LISTED]
    out = []
    for kind, i, shared in (rng.choice(keys) for _ in range(n if keys else 0)):
        attribute, beginning, item = sentences.LISTS[kind][i]
        members = [s.entity for s in rng.sample(groups[kind, i, shared], LISTED)]
        names = language.listed(e.name for e in members)
        parts = [language.capitalised(beginning.format(shared=shared)), f"Among them are {names}."]
        states = [(e.name, attribute) for e in members]
        for e in members:
            values = {a: v[0] for a, v in e.facts} | dict(e.details)
            parts.append(_fill(item, e, values, e.name))
            states += [(e.name, a) for a in sentences.fields(item) & set(e.attributes)]
        text = " ".join(parts).replace("..", ".")
        title = f"List: {beginning.format(shared=shared).removesuffix('.')}"
        about = tuple(e.name for e in members)
        if len(text.split()) <= MAX_WORDS:
            out.append(StatedPassage(Passage("", title, text), about, tuple(sorted(set(states)))))
    return out
