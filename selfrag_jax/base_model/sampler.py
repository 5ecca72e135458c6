"""Samples the contents of the base model's documents: entities, wrong values, statements.

Each document draws its own entities. Verdicts are plain words (yes, partly, no).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from selfrag_jax.data.batches import Span
from selfrag_jax.world import language
from selfrag_jax.world.encyclopedia import Entity, draw_entity
from selfrag_jax.world.language import KINDS, Relation

YES, PARTLY, NO = "yes", "partly", "no"
Facts = list[tuple[Relation, str]]


@dataclass(frozen=True)
class BaseDataConfig:
    seed: int
    vocabulary: str  # "base"; the gate uses "world" to measure how the skills transfer
    family_weights: tuple[tuple[str, float], ...]  # see documents.FAMILIES
    verdict_weight: float  # loss weight of verdicts
    # Loss weight of copied sentences and end tokens. At full weight they drown out the verdicts.
    copy_weight: float
    passages: int  # per document
    statements: int  # statements to verify per passage
    # Share of quiz questions for which a passage holds a tempting wrong value (see
    # `tempting_value`). Also raises the share of answers that state it.
    tempting: float


@dataclass(frozen=True)
class EntitySampler:
    """Draws entities, and what a document states about them."""

    config: BaseDataConfig
    values: dict[str, tuple[str, ...]]  # kind of value -> the values to draw from

    def entity(self, rng: random.Random, kind: str, words: tuple[str, str] | None = None) -> Entity:
        words = words or language.draw_name(rng, kind, self.config.vocabulary)
        return draw_entity(rng, kind, words, self.values, "")

    def look_alike(self, rng: random.Random, entity: Entity) -> Entity:
        """Draws an entity of the same kind whose name differs in one word."""
        vocabulary = self.config.vocabulary
        return self.entity(
            rng, entity.kind, language.look_alike(rng, entity.kind, vocabulary, entity.words)
        )

    def verdict(self, word: str) -> Span:
        return [word], self.config.verdict_weight

    def wrong_value(self, rng: random.Random, entity: Entity, relation: Relation) -> str:
        """Draws a value that the entity's attribute does not have.

        Often it shares a word with the right value or is the value of another attribute.
        """
        right, possible = entity.value(relation.name), self.values[relation.value_kind]
        draw = rng.random()
        if draw < 0.3 and (near := self.near_values(relation.value_kind, right)):
            return rng.choice(near)
        tempting = [v for _, v in entity.facts if v != right and v in possible]
        if tempting and draw < 0.6:
            return rng.choice(tempting)
        return rng.choice([v for v in possible if v != right])

    def near_values(self, kind: str, value: str) -> list[str]:
        """Returns the values that share one of their two words with `value`.

        They are the hardest to tell from it.
        """
        words = set(value.split())
        return [v for v in self.values[kind] if len(words & set(v.split())) == 1]

    def statements(
        self,
        rng: random.Random,
        entity: Entity,
        stated: Facts,
        n: int,
        skip: Sequence[Relation] = (),
    ) -> list[Span]:
        """Draws up to n statements about `entity`, each followed by its verdict.

        The verdict says whether a passage with the facts `stated` supports the statement. No
        relation occurs twice, and none of `skip`, the relations that the document already stated:
        an earlier wrong statement could be mistaken for evidence about a later one.
        """
        present = [r for r, _ in stated]
        missing = [r for r in KINDS[entity.kind].relations if r not in present and r not in skip]
        order = [r for r in rng.sample(present, len(present)) if r not in skip]
        for r in rng.sample(missing, min(len(missing), 1 + n // 3)):
            order.insert(rng.randrange(len(order) + 1), r)
        out: list[Span] = []
        while order and n:
            pair = [order.pop() for _ in range(min(len(order), 2 if rng.random() < 0.2 else 1))]
            text, verdict = self.statement(rng, entity, stated, pair)
            out += [([text], 0.0), self.verdict(verdict)]
            n -= 1
        return out

    def statement(
        self, rng: random.Random, entity: Entity, stated: Facts, relations: list[Relation]
    ) -> tuple[str, str]:
        """Draws one statement about the given relations, and its verdict.

        Half of the values are wrong; four in five if the passage holds a tempting value instead.
        """
        known = {r.name: v for r, v in stated}
        facts, num_right = [], 0
        for relation in relations:
            value, tempting = entity.value(relation.name), tempting_value(stated, relation)
            if tempting and rng.random() < 0.6:
                value = tempting
            elif rng.random() < 0.5:
                value = self.wrong_value(rng, entity, relation)
            facts.append((relation, value))
            num_right += known.get(relation.name) == value
        verdict = PARTLY if num_right else NO
        if num_right == len(facts):
            verdict = YES
        return language.sentence(entity.name, facts), verdict


def tempting_value(stated: Facts, relation: Relation) -> str | None:
    """Returns a stated value that is easily misattributed to `relation`, or None.

    Only a relation that `stated` lacks has one: the value of another attribute that takes the same
    kind of value (lives in a town, was born in a town).
    """
    if any(r is relation for r, _ in stated):
        return None
    return next((v for r, v in stated if r.value_kind == relation.value_kind), None)


def draw_kind(rng: random.Random) -> str:
    return "person" if rng.random() < 0.6 else rng.choice(("place", "organisation", "work"))
