"""A seeded fictional encyclopedia: entities with facts, and the passages that state them.

Entities fall into four groups:

  known        a few entities that training asks about often. The generator can memorise their
               facts, so questions about them need no retrieval.
  train        entities that training asks about
  test         held-out entities, which no training instruction mentions
  distractor   entities that nobody asks about. Their names resemble those of test entities. Their
               passages state other values of the same attributes, or lack the requested one.

Each entity has two passages with half of its facts each, so a passage about the right entity often
lacks the requested attribute. Two attributes can take the same kind of value (born in a town,
lives in a town), so such a passage can hold a tempting wrong value. Many names are look-alikes:
they share one of their two words.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from selfrag_jax.errors import UserError
from selfrag_jax.records import Passage
from selfrag_jax.world import language
from selfrag_jax.world.language import KINDS, Relation


@dataclass(frozen=True)
class WorldConfig:
    seed: int
    vocabulary: str  # "world", or "base" for the words of the base model's training data
    known: int  # entities in each group
    train: int
    test: int
    distractors: int
    values_per_kind: int  # distinct values of each kind, e.g. 16 towns
    person_share: float  # share of persons among entities; the other kinds divide the rest
    look_alike_rate: float  # share of train entities named after another entity
    known_look_alike_rate: float  # share of those named after a known entity
    instructions: int  # rows of instructions.jsonl
    wrong_output_rate: float  # share of wrong outputs among rows about train entities
    questions_per_test_entity: int

    def __post_init__(self):
        for name in ("known", "train", "test", "instructions", "questions_per_test_entity"):
            if getattr(self, name) < 1:
                raise self._error(name, "must be at least 1")
        rates = ("person_share", "look_alike_rate", "known_look_alike_rate", "wrong_output_rate")
        for name in rates:
            if not 0 <= getattr(self, name) <= 1:
                raise self._error(name, "must be between 0 and 1")
        if self.distractors < 0:
            raise self._error("distractors", "must not be negative")
        if self.values_per_kind < 4:
            raise self._error("values_per_kind", "multiple choice needs at least 4")
        if self.vocabulary not in language.VOCABULARIES:
            raise self._error("vocabulary", f"must be {' or '.join(language.VOCABULARIES)}")

    def _error(self, field: str, remedy: str) -> UserError:
        return UserError(f"config world: {field}={getattr(self, field)!r}: {remedy}")


@dataclass(frozen=True)
class Entity:
    kind: str
    name: str
    words: tuple[str, str]
    facts: tuple[tuple[str, str], ...]  # (relation name, value), in the order of Kind.relations
    group: str

    def value(self, relation: str) -> str:
        return dict(self.facts)[relation]

    def halves(self) -> tuple[list[tuple[Relation, str]], list[tuple[Relation, str]]]:
        """Returns the facts of the first passage and those of the second."""
        kind = KINDS[self.kind]
        pairs = [(kind.relation(name), value) for name, value in self.facts]
        return pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]


@dataclass(frozen=True)
class World:
    config: WorldConfig
    entities: tuple[Entity, ...]
    passages: tuple[Passage, ...]
    values: dict[str, tuple[str, ...]]  # kind of value -> the values in use

    def group(self, name: str) -> list[Entity]:
        return [e for e in self.entities if e.group == name]


def draw_entity(
    rng: random.Random,
    kind: str,
    words: tuple[str, str],
    values: dict[str, tuple[str, ...]],
    group: str,
) -> Entity:
    """Draws an entity named `words`; all its values differ."""
    facts: list[tuple[str, str]] = []
    for relation in KINDS[kind].relations:
        used = {v for _, v in facts}
        free = [v for v in values[relation.value_kind] if v not in used]
        facts.append((relation.name, rng.choice(free)))
    return Entity(kind, " ".join(words), words, tuple(facts), group)


def entity_passages(rng: random.Random, entity: Entity) -> list[Passage]:
    """Returns an entity's two passages, each with its facts in random order and an empty id."""
    out = []
    for half in entity.halves():
        facts = rng.sample(half, len(half))
        out.append(Passage(id="", title=entity.name, text=language.sentence(entity.name, facts)))
    return out


def build_world(config: WorldConfig) -> World:
    """Draws the world of a config; equal configs give equal worlds.

    Raises UserError when names or values run out.
    """
    rng = random.Random(f"encyclopedia-{config.seed}")
    values = _draw_values(rng, config)
    entities = _draw_entities(rng, config, values)
    passages = [p for e in entities for p in entity_passages(rng, e)]
    rng.shuffle(passages)
    passages = [Passage(id=str(i + 1), title=p.title, text=p.text) for i, p in enumerate(passages)]
    return World(config, tuple(entities), tuple(passages), values)


def _draw_values(rng: random.Random, config: WorldConfig) -> dict[str, tuple[str, ...]]:
    n, vocabulary = config.values_per_kind, config.vocabulary
    available = {kind: language.values_of_kind(kind, vocabulary) for kind in language.VALUE_WORDS}
    fewest = min(map(len, available.values()))
    if n > fewest:
        raise UserError(
            f"config world: values_per_kind={n}: at most {fewest} values of a kind exist"
        )
    kinds = sorted({r.value_kind for k in KINDS.values() for r in k.relations})
    return {kind: tuple(sorted(rng.sample(available[kind], n))) for kind in kinds}


def _draw_entities(
    rng: random.Random, config: WorldConfig, values: dict[str, tuple[str, ...]]
) -> list[Entity]:
    taken: set[tuple[str, str]] = set()
    entities: list[Entity] = []

    def add(group: str, kind: str, original: Entity | None = None) -> None:
        """Adds an entity with a free name, preferably a look-alike of `original`."""
        for attempt in range(1000):
            if original and attempt < 100:
                words = language.look_alike(rng, kind, config.vocabulary, original.words)
            else:  # all look-alikes of the original may be taken
                words = language.draw_name(rng, kind, config.vocabulary)
            if words not in taken:
                taken.add(words)
                entities.append(draw_entity(rng, kind, words, values, group))
                return
        raise UserError(
            f"config world: no free name left for another {kind}; "
            "lower known, train, test or distractors"
        )

    def in_group(group: str) -> list[Entity]:
        return [e for e in entities if e.group == group]

    for i in range(config.known):
        # Pairs of a kind: a phrasing held out for one entity is trained on the other (see
        # questions.phrasings).
        add("known", tuple(KINDS)[i // 2 % len(KINDS)])
    for _ in range(config.train):
        # Some names resemble those of known entities, so a familiar word does not imply "known".
        group = "known" if rng.random() < config.known_look_alike_rate else "train"
        candidates = in_group(group)
        original = None
        if candidates and rng.random() < config.look_alike_rate:
            original = rng.choice(candidates)
        add("train", original.kind if original else _draw_kind(rng, config.person_share), original)
    for _ in range(config.test):
        add("test", _draw_kind(rng, config.person_share))
    test = in_group("test")
    for i in range(config.distractors):
        original = test[i % len(test)]
        add("distractor", original.kind, original)
    return entities


def _draw_kind(rng: random.Random, person_share: float) -> str:
    if rng.random() < person_share:
        return "person"
    # Works get half the weight: they have the fewest names.
    return rng.choices(("place", "organisation", "work"), (2, 2, 1))[0]
