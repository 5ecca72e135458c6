"""Measures what a base model must be able to do before anything is built on it: copy, match, check, refuse, judge.

  copy    the answer to a question, every token of it, out of the passage that holds it
  match   whether a passage is about the asked name or about one that looks alike (half and half)
  check   whether a passage supports a statement about an attribute that it holds (half are wrong: a value that
          shares a word with the right one, that of another attribute of the same entity, or any other)
  missing whether a statement about an attribute that the passage does not hold is refused
  lent    whether an answer is refused that lends a value of the passage to the attribute asked about, which the passage
          lacks (lives in a town, was born in a town), and accepted where the value belongs (half and half)
  useful  whether an answer, without evidence, tells what was asked of the name asked about (half tell another attribute,
          or of a name that looks alike)

All on the `world` vocabulary and unseen seeds: no entity of the training documents had one of the names or one of the
values.
"""

from __future__ import annotations

import random

import jax
import numpy as np

from selfrag_jax.base_model.drawer import NO, YES, BaseDataConfig, Drawer, Segments, draw_kind
from selfrag_jax.base_model.source import BaseSource
from selfrag_jax.checkpoints.loading import LoadedModel
from selfrag_jax.data.batches import Example, build_example
from selfrag_jax.text import prompts
from selfrag_jax.text.tokenizer import INSTRUCTION, RESPONSE, Control, Part
from selfrag_jax.world import language
from selfrag_jax.world.encyclopedia import Entity, entity_passages
from selfrag_jax.world.language import KINDS, Relation

SKILLS = ("copy", "match", "check", "missing", "lent", "useful")


def cases(source: Drawer, rng: random.Random, skill: str) -> Segments:
    """One document whose only learned segment is what the skill must predict."""
    entity = source.entity(
        rng, rng.choice(("person", "organisation")) if skill == "lent" else draw_kind(rng)
    )
    half = rng.randrange(2)
    stated = entity.halves()[half]
    passage = prompts.passage(entity_passages(rng, entity)[half])
    relation, value = rng.choice(stated)
    question = [
        Control(INSTRUCTION),
        rng.choice(relation.questions).format(n=entity.name),
        Control(RESPONSE),
    ]
    answer = [language.sentence(entity.name, [(relation, value)])]
    if skill == "copy":
        return [([*question, *passage], 0.0), ([YES], 0.0), (answer, 1.0)]
    if skill == "match":
        if rng.random() < 0.5:
            return [([*question, *passage], 0.0), ([YES], 1.0)]
        other = source.entity(
            rng,
            entity.kind,
            language.look_alike(rng, entity.kind, source.config.vocabulary, entity.words),
        )
        return [
            ([*question, *prompts.passage(entity_passages(rng, other)[half])], 0.0),
            ([NO], 1.0),
        ]
    if skill == "useful":
        return _useful(source, rng, entity, relation, question)
    if skill == "lent":
        return _lent(rng, entity, half, passage)
    if skill == "missing":
        relation, value = rng.choice(entity.halves()[1 - half])
        return [
            (passage, 0.0),
            ([language.sentence(entity.name, [(relation, value)])], 0.0),
            ([NO], 1.0),
        ]
    if rng.random() < 0.5:
        return [(passage, 0.0), (answer, 0.0), ([YES], 1.0)]
    wrong = _wrong_value(source, rng, entity, relation)
    return [
        (passage, 0.0),
        ([language.sentence(entity.name, [(relation, wrong)])], 0.0),
        ([NO], 1.0),
    ]


def _lent(rng: random.Random, entity: Entity, half: int, passage: list[Part]) -> Segments:
    stated, lacking = entity.halves()[half], entity.halves()[1 - half]
    [(lender, borrower, value)] = [
        (r, b, v) for r, v in stated for b, _ in lacking if b.value == r.value
    ]
    told, verdict = rng.choice([(lender, YES), (borrower, NO)])
    question = [
        Control(INSTRUCTION),
        rng.choice(told.questions).format(n=entity.name),
        Control(RESPONSE),
    ]
    answer = [language.sentence(entity.name, [(told, value)])]
    return [([*question, *passage], 0.0), ([YES], 0.0), (answer, 0.0), ([verdict], 1.0)]


def _useful(
    source: Drawer, rng: random.Random, entity: Entity, relation: Relation, question: list[Part]
) -> Segments:
    name, told, verdict = entity.name, relation, YES
    if rng.random() < 0.5:
        verdict = NO
        if rng.random() < 0.5:
            told = rng.choice([r for r in KINDS[entity.kind].relations if r is not relation])
        else:
            name = " ".join(
                language.look_alike(rng, entity.kind, source.config.vocabulary, entity.words)
            )
    answer = language.sentence(name, [(told, rng.choice(source.values[told.value]))])
    return [(question, 0.0), ([answer], 0.0), ([verdict], 1.0)]


def _wrong_value(source: Drawer, rng: random.Random, entity: Entity, relation: Relation) -> str:
    """In two of three cases a value that shares a word with the right one: the hardest to tell from it."""
    near = source.near_values(relation.value, entity.value(relation.name))
    return (
        rng.choice(near)
        if near and rng.random() < 0.5
        else source.wrong_value(rng, entity, relation)
    )


def measure(loaded: LoadedModel, seed: int, n: int) -> dict[str, float]:
    """The share of `n` cases of each skill in which the model's first choice is right at every learned token."""
    source = BaseSource(BaseDataConfig(seed, "world", (), 1.0, 1.0, 0, 0, 0.0), loaded.tokenizer)

    @jax.jit
    def right(params, tokens, doc_ids, positions):
        hidden, _ = loaded.model.hidden(params, tokens, positions, doc_ids)
        return loaded.model.logits(params, hidden[:, :-1]).argmax(-1) == tokens[:, 1:]

    scores = {}
    for skill in SKILLS:
        rng = random.Random(f"gate-{skill}-{seed}")
        examples = [
            build_example(loaded.tokenizer, cases(source.drawer, rng, skill), {}) for _ in range(n)
        ]
        length = max(96, *(len(e.tokens) for e in examples))
        tokens, learned = np.zeros((n, length), np.int32), np.zeros((n, length), bool)
        doc_ids = np.zeros((n, length), np.int32)
        for i, e in enumerate(examples):
            _fill(i, e, tokens, learned, doc_ids)
        positions = np.broadcast_to(np.arange(length, dtype=np.int32), (n, length))
        hits = np.concatenate(
            [np.asarray(right(loaded.params, tokens[i : i + 100], doc_ids[i : i + 100], positions[i : i + 100]))
             for i in range(0, n, 100)]
        )  # fmt: skip
        scores[skill] = float((hits | ~learned[:, 1:]).all(1).mean())
    return scores


def _fill(i: int, e: Example, tokens: np.ndarray, learned: np.ndarray, doc_ids: np.ndarray) -> None:
    k = len(e.tokens)
    tokens[i, :k], learned[i, :k], doc_ids[i, :k] = e.tokens, e.weight > 0, 1
