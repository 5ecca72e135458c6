"""A seeded fictional encyclopedia: entities with facts, passages that state them, and questions about them.

Entities fall into groups:

  known        a few, asked about often in training: the generator can learn them by heart, so no retrieval is needed
  train        asked about in training
  test         held out: no instruction in training mentions them
  distractor   never asked about; their names look like those of test entities, their passages hold other values of the
               same attributes, or lack the one that is asked about

Every entity has two passages, each with half of its facts, so that a passage about the right entity often lacks the
asked attribute; two attributes of a kind may hold the same sort of value (born in a town, lives in a town), so that a
passage can hold a tempting wrong one. Names come in families that differ in one word.
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
    vocabulary: str  # which words: "world", or "base" for the world of the base model
    known: int  # entities of each group
    train: int
    test: int
    distractors: int
    values_per_kind: int  # distinct values of each kind of word, e.g. 16 towns
    person_share: (
        float  # of the entities that are persons; places, organisations and works share the rest
    )
    look_alike_rate: float  # of the train entities whose name is derived from another's
    known_look_alike_rate: float  # of those, whose name is derived from a known entity's
    instructions: int  # rows of instructions.jsonl
    wrong_output_rate: float  # of the rows about train entities, those with a wrong output
    questions_per_test_entity: int

    def __post_init__(self):
        for name in ("known", "train", "test", "instructions", "questions_per_test_entity"):
            if getattr(self, name) < 1:
                raise UserError(f"config world: {name}={getattr(self, name)}: must be at least 1")
        for name in (
            "person_share",
            "look_alike_rate",
            "known_look_alike_rate",
            "wrong_output_rate",
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(
                    f"config world: {name}={getattr(self, name)}: must be between 0 and 1"
                )
        if self.distractors < 0:
            raise UserError(f"config world: distractors={self.distractors}: must not be negative")
        if self.values_per_kind < 4:
            raise UserError(
                f"config world: values_per_kind={self.values_per_kind}: multiple choice needs at least 4"
            )
        if self.vocabulary not in language.VOCABULARIES:
            raise UserError(
                f"config world: vocabulary={self.vocabulary!r}: must be {' or '.join(language.VOCABULARIES)}"
            )


@dataclass(frozen=True)
class Entity:
    kind: str
    name: str
    words: tuple[str, str]
    facts: tuple[
        tuple[str, str], ...
    ]  # (relation name, value), in the order of the kind's relations
    group: str

    def value(self, relation: str) -> str:
        return dict(self.facts)[relation]

    def halves(self) -> tuple[list[tuple[Relation, str]], list[tuple[Relation, str]]]:
        """The facts of the first and of the second passage."""
        kind = KINDS[self.kind]
        pairs = [(kind.relation(name), value) for name, value in self.facts]
        return pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]


@dataclass(frozen=True)
class World:
    config: WorldConfig
    entities: tuple[Entity, ...]
    passages: tuple[Passage, ...]
    values: dict[str, tuple[str, ...]]  # kind of word -> the values in use

    def group(self, name: str) -> list[Entity]:
        return [e for e in self.entities if e.group == name]


def draw_entity(
    rng: random.Random,
    kind: str,
    words: tuple[str, str],
    values: dict[str, tuple[str, ...]],
    group: str,
) -> Entity:
    facts = []
    for relation in KINDS[kind].relations:
        taken = {v for _, v in facts}
        facts.append(
            (relation.name, rng.choice([v for v in values[relation.value] if v not in taken]))
        )
    return Entity(kind, " ".join(words), words, tuple(facts), group)


def entity_passages(rng: random.Random, entity: Entity) -> list[Passage]:
    """Two passages; ids are assigned by the caller. The order of the facts within a passage is random."""
    out = []
    for half in entity.halves():
        facts = rng.sample(half, len(half))
        out.append(Passage(id="", title=entity.name, text=language.sentence(entity.name, facts)))
    return out


def build_world(config: WorldConfig) -> World:
    """Draws the world. Deterministic in the config. Raises BadInput when names or values run out."""
    rng = random.Random(f"encyclopedia-{config.seed}")
    fewest = min(len(language.words(kind, config.vocabulary)) for kind in language.VALUES)
    if config.values_per_kind > fewest:
        raise UserError(
            f"config world: values_per_kind={config.values_per_kind}: at most {fewest} values of a kind exist"
        )
    values = {
        kind: tuple(
            sorted(rng.sample(language.words(kind, config.vocabulary), config.values_per_kind))
        )
        for kind in sorted({r.value for k in KINDS.values() for r in k.relations})
    }
    taken: set[tuple[str, str]] = set()
    entities: list[Entity] = []

    def add(group: str, like: Entity | None = None, kind: str | None = None) -> Entity:
        kind = kind or (like.kind if like else _draw_kind(rng, config.person_share))
        for attempt in range(1000):
            if like and attempt < 100:  # when all look-alikes are taken, any free name will do
                words = language.look_alike(rng, kind, config.vocabulary, like.words)
            else:
                words = language.draw_name(rng, kind, config.vocabulary)
            if words not in taken:
                taken.add(words)
                entities.append(draw_entity(rng, kind, words, values, group))
                return entities[-1]
        raise UserError(
            f"config world: no free name left for another {kind}; lower known, train, test or distractors"
        )

    for i in range(config.known):
        # In pairs of a kind, so that what is held out of one is asked of the other (see questions.phrasings).
        add("known", kind=tuple(KINDS)[i // 2 % len(KINDS)])
    for _ in range(config.train):
        # Some look like a well-known one, which must not make them known.
        group = "known" if rng.random() < config.known_look_alike_rate else "train"
        models = [e for e in entities if e.group == group]
        add(
            "train",
            rng.choice(models) if models and rng.random() < config.look_alike_rate else None,
        )
    test = [add("test") for _ in range(config.test)]
    for i in range(config.distractors):
        add("distractor", test[i % len(test)] if test else None)

    passages = [p for e in entities for p in entity_passages(rng, e)]
    rng.shuffle(passages)
    passages = [Passage(id=str(i + 1), title=p.title, text=p.text) for i, p in enumerate(passages)]
    return World(config, tuple(entities), tuple(passages), values)


def _draw_kind(rng: random.Random, person_share: float) -> str:
    if rng.random() < person_share:
        return "person"
    return rng.choices(("place", "organisation", "work"), (2, 2, 1))[
        0
    ]  # there are fewest names for works
