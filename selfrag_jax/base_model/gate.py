"""Measures the skills that a base model must have before anything is built on it.

  copy           copies the whole answer to a question out of the passage that states it
  match          tells whether a passage is about the requested name or about a look-alike (half
                 each)
  check          verifies a statement about an attribute that the passage states. Half are wrong: a
                 value that shares a word with the right one, the value of another attribute of the
                 entity, or any other.
  missing        rejects statements about attributes that the passage lacks
  misattributed  rejects answers that give the requested attribute, which the passage lacks, the
                 value of another one (lives in a town, was born in a town); accepts the value where
                 it belongs (half each)
  useful         tells, without evidence, whether an answer states what was asked about the right
                 name. Half state another attribute or are about a look-alike.

Skills that are measured but need not be there, as the shipped model lacks most of them (LACKING):

  claim          answers whether a claim is true by the passage (half are)
  verdict        judges such an answer (half are right)
  letter         gives the letter of the option that the passage states, of four
  part           answers the second part of a question, after the first, from a new passage

All cases use the `world` vocabulary and unseen seeds, so no training document contained any of the
names or values.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import jax
import numpy as np

from selfrag_jax.base_model.sampler import (
    NO,
    PARTLY,
    YES,
    BaseDataConfig,
    EntitySampler,
    draw_kind,
)
from selfrag_jax.base_model.source import BaseSource
from selfrag_jax.checkpoints.loading import LoadedModel
from selfrag_jax.data.batches import Span, build_example
from selfrag_jax.text import prompts
from selfrag_jax.text.tokenizer import Part
from selfrag_jax.world import language, questions
from selfrag_jax.world.encyclopedia import Entity, entity_passages
from selfrag_jax.world.language import KINDS, Relation

SKILLS = ("copy", "match", "check", "missing", "misattributed", "useful")
LACKING = ("claim", "verdict", "letter", "part")
# Records of earlier models use these names. They also still seed the cases, so that scores stay
# comparable.
FORMER_NAMES = {"misattributed": "lent"}
BATCH = 100  # cases per call of the model


def draw_case(sampler: EntitySampler, rng: random.Random, skill: str) -> list[Span]:
    """Draws a document whose only segment with a loss weight is what the skill must predict."""
    # Only persons and organisations have two attributes that take the same kind of value.
    two_alike = skill == "misattributed"
    kind = rng.choice(("person", "organisation")) if two_alike else draw_kind(rng)
    entity = sampler.entity(rng, kind)
    half = rng.randrange(2)
    stated, missing = entity.halves()[half], entity.halves()[1 - half]
    passage = prompts.passage(entity_passages(rng, entity)[half])
    relation, value = rng.choice(stated)
    question = prompts.instruction(rng.choice(relation.questions).format(n=entity.name))
    if skill == "copy":
        answer = language.sentence(entity.name, [(relation, value)])
        return [([*question, *passage], 0.0), ([YES], 0.0), ([answer], 1.0)]
    if skill == "match":
        verdict = YES
        if rng.random() >= 0.5:
            other = sampler.look_alike(rng, entity)
            passage, verdict = prompts.passage(entity_passages(rng, other)[half]), NO
        return [([*question, *passage], 0.0), ([verdict], 1.0)]
    if skill == "useful":
        return _useful_case(sampler, rng, entity, relation, question)
    if skill == "misattributed":
        return _misattributed_case(rng, entity, half, passage)
    if skill in ("claim", "verdict", "letter"):
        return _closed_case(sampler, rng, skill, entity, relation, passage)
    if skill == "part":
        return _part_case(rng, entity, half)
    # check or missing
    verdict = NO
    if skill == "missing":
        relation, value = rng.choice(missing)
    elif rng.random() < 0.5:
        verdict = YES
    else:
        value = _wrong_value(sampler, rng, entity, relation)
    statement = language.sentence(entity.name, [(relation, value)])
    return [(passage, 0.0), ([statement], 0.0), ([verdict], 1.0)]


def _misattributed_case(
    rng: random.Random, entity: Entity, half: int, passage: list[Part]
) -> list[Span]:
    stated, missing = entity.halves()[half], entity.halves()[1 - half]
    [(right, wrong, value)] = [
        (r, m, v) for r, v in stated for m, _ in missing if m.value_kind == r.value_kind
    ]
    relation, verdict = rng.choice([(right, YES), (wrong, NO)])
    question = prompts.instruction(rng.choice(relation.questions).format(n=entity.name))
    answer = language.sentence(entity.name, [(relation, value)])
    return [([*question, *passage], 0.0), ([YES], 0.0), ([answer], 0.0), ([verdict], 1.0)]


def _useful_case(
    sampler: EntitySampler,
    rng: random.Random,
    entity: Entity,
    relation: Relation,
    question: list[Part],
) -> list[Span]:
    name, verdict = entity.name, YES
    if rng.random() < 0.5:
        verdict = NO
        if rng.random() < 0.5:
            relation = rng.choice([r for r in KINDS[entity.kind].relations if r is not relation])
        else:
            vocabulary = sampler.config.vocabulary
            name = " ".join(language.look_alike(rng, entity.kind, vocabulary, entity.words))
    value = rng.choice(sampler.values[relation.value_kind])
    answer = language.sentence(name, [(relation, value)])
    return [(question, 0.0), ([answer], 0.0), ([verdict], 1.0)]


def _closed_case(
    sampler: EntitySampler,
    rng: random.Random,
    skill: str,
    entity: Entity,
    relation: Relation,
    passage: list[Part],
) -> list[Span]:
    value = entity.value(relation.name)
    answers = [language.TRUE, language.FALSE]
    if skill in ("claim", "verdict"):
        answer = rng.choice(answers)
        claimed = value if answer == language.TRUE else _wrong_value(sampler, rng, entity, relation)
        asked = language.claim(entity.name, relation, claimed)
    else:
        possible = [v for v in sampler.values[relation.value_kind] if v != value]
        options = rng.sample(possible, len(language.CHOICE_LABELS) - 1)
        options.insert(rng.randrange(len(language.CHOICE_LABELS)), value)
        answer = f"{language.CHOICE_LABELS[options.index(value)]}."
        choices = list(zip(language.CHOICE_LABELS, options, strict=True))
        asked = questions.choice_text(rng.choice(relation.questions).format(n=entity.name), choices)
    out: list[Span] = [([*prompts.instruction(asked), *passage], 0.0), ([YES], 0.0)]
    if skill == "verdict":
        shown = rng.choice(answers)
        return [*out, ([shown], 0.0), ([YES if shown == answer else NO], 1.0)]
    return [*out, ([answer], 1.0)]


def _part_case(rng: random.Random, entity: Entity, half: int) -> list[Span]:
    """The part about the passage `half` comes second."""
    halves, passages = entity.halves(), entity_passages(rng, entity)
    order = (1 - half, half)
    pair = [rng.choice(halves[h]) for h in order]
    singles = [rng.choice(relation.questions).format(n=entity.name) for relation, _ in pair]
    out: list[Span] = [(prompts.instruction(language.two_part(*singles)), 0.0)]
    for i, (h, fact) in enumerate(zip(order, pair, strict=True)):
        out += [(prompts.passage(passages[h]), 0.0), ([YES], 0.0)]
        out.append(([language.sentence(entity.name, [fact])], float(i)))
        if i == 0:
            out.append(([YES, PARTLY], 0.0))
    return out


def _wrong_value(
    sampler: EntitySampler, rng: random.Random, entity: Entity, relation: Relation
) -> str:
    """Draws a wrong value; two in three share a word with the right one, the hardest to detect."""
    near = sampler.near_values(relation.value_kind, entity.value(relation.name))
    if near and rng.random() < 0.5:
        return rng.choice(near)
    return sampler.wrong_value(rng, entity, relation)


def measure(
    loaded: LoadedModel, seed: int, n: int, skills: Sequence[str] = SKILLS
) -> dict[str, float]:
    """Returns the accuracy on `n` cases of each skill.

    A case is right if the model's first choice is right at every token with a loss weight.
    """
    source = BaseSource(BaseDataConfig(seed, "world", (), 1.0, 1.0, 0, 0, 0.0), loaded.tokenizer)

    @jax.jit
    def is_right(params, tokens, doc_ids, positions):
        hidden, _ = loaded.model.hidden(params, tokens, positions, doc_ids)
        return loaded.model.logits(params, hidden[:, :-1]).argmax(-1) == tokens[:, 1:]

    scores = {}
    for skill in skills:
        rng = random.Random(f"gate-{FORMER_NAMES.get(skill, skill)}-{seed}")
        cases = [draw_case(source.sampler, rng, skill) for _ in range(n)]
        examples = [build_example(loaded.tokenizer, case, {}) for case in cases]
        length = max(96, *(len(e.tokens) for e in examples))
        tokens, doc_ids = np.zeros((n, length), np.int32), np.zeros((n, length), np.int32)
        learned = np.zeros((n, length), bool)
        for i, e in enumerate(examples):
            end = len(e.tokens)
            tokens[i, :end], learned[i, :end], doc_ids[i, :end] = e.tokens, e.weight > 0, 1
        positions = np.broadcast_to(np.arange(length, dtype=np.int32), (n, length))
        batches = [slice(i, i + BATCH) for i in range(0, n, BATCH)]
        right = np.concatenate(
            [is_right(loaded.params, tokens[b], doc_ids[b], positions[b]) for b in batches]
        )
        scores[skill] = float((right | ~learned[:, 1:]).all(1).mean())
    return scores
