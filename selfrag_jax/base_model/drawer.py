"""Draws what the documents of the base model are made of: entities, wrong values, statements with their verdicts.

Every document is a world of its own. Verdicts are plain words (yes, partly, no).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from selfrag_jax.text.tokenizer import Part
from selfrag_jax.world import language
from selfrag_jax.world.encyclopedia import Entity, draw_entity
from selfrag_jax.world.language import KINDS, Relation

YES, PARTLY, NO = "yes", "partly", "no"
Segments = list[tuple[list[Part], float]]


@dataclass(frozen=True)
class BaseDataConfig:
    seed: int
    vocabulary: str  # "base"; the gate reads "world" words to measure how the skills carry over
    family_weights: tuple[tuple[str, float], ...]  # see documents.FAMILIES
    verdict_weight: float  # loss weight of verdicts
    copy_weight: float  # loss weight of answers in sentences and of ends, which else drown the verdicts' signal
    passages: int  # per document
    statements: int  # checked statements per passage
    tempting: float  # of the quizzes' questions, those that a passage has a tempting wrong value for (see `lendable`);
    # the higher, the more answers give in


@dataclass(frozen=True)
class Drawer:
    """Draws the pieces of a document; `values` are the words of each kind that may occur."""

    config: BaseDataConfig
    values: dict[str, tuple[str, ...]]

    def entity(self, rng: random.Random, kind: str, words: tuple[str, str] | None = None) -> Entity:
        words = words or language.draw_name(rng, kind, self.config.vocabulary)
        return draw_entity(rng, kind, words, self.values, "")

    def verdict(self, word: str) -> tuple[list[Part], float]:
        return [word], self.config.verdict_weight

    def wrong_value(self, rng: random.Random, entity: Entity, relation: Relation) -> str:
        """A value that the entity's attribute does not have; often one of its other attributes has it, or half of it is
        right."""
        right, possible, draw = (
            entity.value(relation.name),
            self.values[relation.value],
            rng.random(),
        )
        if draw < 0.3 and (near := self.near_values(relation.value, right)):
            return rng.choice(near)
        tempting = [v for _, v in entity.facts if v != right and v in possible]
        return rng.choice(
            tempting if tempting and draw < 0.6 else [v for v in possible if v != right]
        )

    def near_values(self, kind: str, value: str) -> list[str]:
        """The values of a kind that share one of their two words with `value`: the hardest to tell from it."""
        words = set(value.split())
        return [v for v in self.values[kind] if len(words & set(v.split())) == 1]

    def statements(
        self,
        rng: random.Random,
        entity: Entity,
        stated: list[tuple[Relation, str]],
        n: int,
        skip: Sequence[Relation] = (),
    ) -> Segments:
        """Up to n statements about `entity`, each with its verdict: is it supported by a passage with the `stated` facts?

        No relation occurs twice (nor `skip`, of which the document told already), or an earlier wrong statement could
        be taken for the evidence of a later one.
        """
        told = [r for r, _ in stated]
        missing = [r for r in KINDS[entity.kind].relations if r not in told and r not in skip]
        order = [r for r in rng.sample(told, len(told)) if r not in skip]
        for r in rng.sample(missing, min(len(missing), 1 + n // 3)):
            order.insert(rng.randrange(len(order) + 1), r)
        out: Segments = []
        while order and n:
            pair = [order.pop() for _ in range(min(len(order), 2 if rng.random() < 0.2 else 1))]
            text, verdict = self.statement(rng, entity, stated, pair)
            out += [(text, 0.0), self.verdict(verdict)]
            n -= 1
        return out

    def statement(
        self,
        rng: random.Random,
        entity: Entity,
        stated: list[tuple[Relation, str]],
        relations: list[Relation],
    ) -> tuple[list[str], str]:
        """One statement about the given relations and its verdict.

        Half of the values are wrong; of an attribute that the passage lacks, where it could lend a value, four in five.
        """
        facts, right, known = [], 0, {r.name: v for r, v in stated}
        for relation in relations:
            value, lent = entity.value(relation.name), lendable(stated, relation)
            if lent and rng.random() < 0.6:
                value = lent
            elif rng.random() < 0.5:
                value = self.wrong_value(rng, entity, relation)
            facts.append((relation, value))
            right += known.get(relation.name) == value
        verdict = YES if right == len(facts) else PARTLY if right else NO
        return [language.sentence(entity.name, facts)], verdict


def lendable(stated: list[tuple[Relation, str]], relation: Relation) -> str | None:
    """The value that a passage with the `stated` facts holds for another attribute, and that would do for this one, which
    it lacks (lives in a town, was born in a town): only a reader who ties values to attributes is not taken in."""
    if any(r is relation for r, _ in stated):
        return None
    return next((v for r, v in stated if r.value == relation.value), None)


def draw_kind(rng: random.Random) -> str:
    return "person" if rng.random() < 0.6 else rng.choice(("place", "organisation", "work"))
