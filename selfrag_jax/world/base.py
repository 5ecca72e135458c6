"""Training data of the small base model: reading skills on worlds that last for one document.

The paper starts from Llama-2; the quickstart starts from a small Llama of ours. It learns to read, to match names that
look alike, to copy a value out of a passage and to check a statement against a passage, without any reflection token
and without any fact to memorise: every document draws its own entities, with names and values of the `base` vocabulary.
Those of quickstart worlds are other pairs of the same words. Verdicts are plain words (yes, partly, no), and a document
holds many of them, because a single verdict per document teaches checking far too slowly.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from selfrag_jax import prompts, reflection
from selfrag_jax.data.batches import Example, build_example
from selfrag_jax.tokenizer import INSTRUCTION, NEWLINE, RESPONSE, Control, Part, Tokenizer, train
from selfrag_jax.world import language, questions
from selfrag_jax.world.encyclopedia import Entity, draw_entity, entity_passages
from selfrag_jax.world.language import KINDS, Relation

YES, PARTLY, NO = "yes", "partly", "no"
Segments = list[tuple[list[Part], float]]


@dataclass(frozen=True)
class BaseDataConfig:
    seed: int
    vocabulary: str  # "base"; tests read "world" words to measure how the skills carry over
    family_weights: tuple[tuple[str, float], ...]  # see _FAMILIES
    verdict_weight: float  # loss weight of verdicts
    copy_weight: float  # loss weight of answers in sentences, which else drown the verdicts' signal
    passages: int  # per document
    statements: int  # checked statements per passage


def make_tokenizer(vocab_size: int) -> Tokenizer:
    """The vocabulary of the language: its words, the markup of passages, bytes for everything else."""
    words = [w for lists in (*language.VALUES.values(), *language.NAME_WORDS.values()) for ws in lists for w in ws]
    texts = [t for k in KINDS.values() for r in k.relations for t in (r.phrase, *r.questions)]
    texts += [t for qs, answer in language.COMMON_KNOWLEDGE for t in (*qs, answer)]
    texts += ["Is it true that True False and Tell me about yes partly no A B C D"]
    texts += ["retrieval relevant supported useful same", *language.VALUES]
    for text in texts:
        words += re.findall(r"[A-Za-z]+", re.sub(r"\{.\}", " ", text))
    return train([".", "?", ",", ":"], words, vocab_size, reflection.MARKUP)


class BaseSource:
    """An unbounded source of documents; document i depends on the seed and i alone."""

    size = 0

    def __init__(self, config: BaseDataConfig, tokenizer: Tokenizer):
        self.config, self.tokenizer = config, tokenizer
        self.families = [_FAMILIES[name] for name, _ in config.family_weights]
        self.weights = [w for _, w in config.family_weights]
        self.drawer = Drawer(config, {kind: language.words(kind, config.vocabulary) for kind in language.VALUES})

    def segments(self, i: int) -> Segments:
        rng = random.Random(f"base-{self.config.seed}-{i}")
        return rng.choices(self.families, self.weights)[0](self.drawer, rng)

    def example(self, i: int) -> Example:
        return build_example(self.tokenizer, self.segments(i), {})


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
        """A value that the entity's attribute does not have; often one of its other attributes has it."""
        right, possible = entity.value(relation.name), self.values[relation.value]
        tempting = [v for _, v in entity.facts if v != right and v in possible]
        return rng.choice(tempting if tempting and rng.random() < 0.4 else [v for v in possible if v != right])

    def statements(
        self, rng: random.Random, entity: Entity, stated: list[tuple[Relation, str]], n: int, skip: Relation | None = None
    ) -> Segments:
        """Up to n statements about `entity`, each with its verdict: is it supported by a passage with the `stated` facts?

        No relation occurs twice (nor `skip`, of which the document told already), or an earlier wrong statement could
        be taken for the evidence of a later one.
        """
        told = [r for r, _ in stated]
        missing = [r for r in KINDS[entity.kind].relations if r not in told and r != skip]
        order = [r for r in rng.sample(told, len(told)) if r != skip]
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
        self, rng: random.Random, entity: Entity, stated: list[tuple[Relation, str]], relations: list[Relation]
    ) -> tuple[list[str], str]:
        """One statement about the given relations and its verdict; half of the values are wrong."""
        facts, right, known = [], 0, {r.name: v for r, v in stated}
        for relation in relations:
            value = entity.value(relation.name)
            if rng.random() < 0.5:
                value = self.wrong_value(rng, entity, relation)
            facts.append((relation, value))
            right += known.get(relation.name) == value
        verdict = YES if right == len(facts) else PARTLY if right else NO
        return [language.sentence(entity.name, facts)], verdict


def _stated(entity: Entity, half: int) -> list[tuple[Relation, str]]:
    return entity.halves()[half]


def _kind(rng: random.Random) -> str:
    return "person" if rng.random() < 0.6 else rng.choice(("place", "organisation", "work"))


def _statements(source: Drawer, rng: random.Random) -> Segments:
    """A passage, then statements, each with its verdict."""
    entity = source.entity(rng, _kind(rng))
    half = rng.randrange(2)
    out: Segments = [(prompts.passage(entity_passages(rng, entity)[half]), 0.0)]
    return out + source.statements(rng, entity, _stated(entity, half), source.config.statements + 2)


def _quiz(source: Drawer, rng: random.Random) -> Segments:
    """A question, then passages about it, its look-alikes and others: is it about the same name, and what does it say?"""
    entity = source.entity(rng, _kind(rng))
    half = rng.randrange(2)
    relation = rng.choice(_stated(entity, half))[0]
    question = rng.choice(relation.questions).format(n=entity.name)
    out: Segments = [([Control(INSTRUCTION), question, Control(RESPONSE)], 0.0)]
    for _ in range(source.config.passages):
        draw = rng.random()
        if draw < 0.55:
            about, at = entity, half if rng.random() < 0.7 else 1 - half
        elif draw < 0.85:
            words = language.look_alike(rng, entity.kind, source.config.vocabulary, entity.words)
            about, at = source.entity(rng, entity.kind, words), rng.randrange(2)
        else:
            about, at = source.entity(rng, _kind(rng)), rng.randrange(2)
        stated = _stated(about, at)
        out.append((prompts.passage(entity_passages(rng, about)[at]), 0.0))
        out.append(source.verdict(YES if about is entity else NO))
        out += _answer(source, rng, entity, relation, stated if about is entity else [])
        if source.config.statements:
            out += source.statements(rng, about, stated, source.config.statements, skip=relation)
    return out


def _answer(source: Drawer, rng: random.Random, entity: Entity, relation: Relation, stated) -> Segments:
    """The answer to the question and its verdict. Right answers that the passage holds are learned, others only read."""
    value, holds = entity.value(relation.name), any(r is relation for r, _ in stated)
    right = rng.random() >= 0.3
    if not right:
        value = source.wrong_value(rng, entity, relation)
    text = [language.sentence(entity.name, [(relation, value)])]
    return [(text, source.config.copy_weight if right and holds else 0.0), source.verdict(YES if right and holds else NO)]


def _claim(source: Drawer, rng: random.Random) -> Segments:
    """Passage and claims, answered True. or False."""
    entity = source.entity(rng, _kind(rng))
    half = rng.randrange(2)
    out: Segments = []
    for i in range(2):
        relation, value = rng.choice(_stated(entity, half))
        holds = rng.random() < 0.5
        claimed = value if holds else source.wrong_value(rng, entity, relation)
        out.append(([Control(INSTRUCTION), language.claim(entity.name, relation, claimed), Control(RESPONSE)], 0.0))
        if i == 0:
            out.append((prompts.passage(entity_passages(rng, entity)[half]), 0.0))
        out.append(([language.TRUE if holds else language.FALSE], source.config.verdict_weight))
    return out


def _choice(source: Drawer, rng: random.Random) -> Segments:
    """A question with four options, a passage, and the letter."""
    entity = source.entity(rng, _kind(rng))
    half = rng.randrange(2)
    relation, right = rng.choice(_stated(entity, half))
    options = rng.sample([v for v in source.values[relation.value] if v != right], 3) + [right]
    rng.shuffle(options)
    choices = list(zip(language.CHOICE_LABELS, options, strict=True))
    question = questions.choice_text(rng.choice(relation.questions).format(n=entity.name), choices)
    letter = next(label for label, text in choices if text == right)
    return [
        ([Control(INSTRUCTION), question, Control(RESPONSE), *prompts.passage(entity_passages(rng, entity)[half])], 0.0),
        ([f"{letter}."], source.config.verdict_weight),
    ]


def _common(source: Drawer, rng: random.Random) -> Segments:
    """Common knowledge, which every world shares."""
    out: Segments = []
    for asked, answer in rng.sample(language.COMMON_KNOWLEDGE, 6):
        out += [([Control(INSTRUCTION), rng.choice(asked), Control(RESPONSE)], 0.0), ([answer], 1.0)]
    return out


def _kinds(source: Drawer, rng: random.Random) -> Segments:
    """Values of several kinds in a list, then each kind and its value: what kind a word is, and how to look one up."""
    kinds = rng.sample(sorted(language.VALUES), rng.randint(2, 6))
    word = {kind: rng.choice(source.values[kind]) for kind in kinds}
    out: Segments = [([", ".join(word.values()), Control(NEWLINE)], 0.0)]
    for kind in rng.sample(kinds, len(kinds)):
        out += [([kind], 0.0), ([word[kind]], 1.0)]
    return out


def _copy(source: Drawer, rng: random.Random) -> Segments:
    """A passage, then a question about each of its facts with the answer."""
    entity, half = source.entity(rng, _kind(rng)), rng.randrange(2)
    stated = _stated(entity, half)
    out: Segments = [(prompts.passage(entity_passages(rng, entity)[half]), 0.0)]
    for relation, value in rng.sample(stated, len(stated)):
        question = rng.choice(relation.questions).format(n=entity.name)
        out.append(([Control(INSTRUCTION), question, Control(RESPONSE)], 0.0))
        out.append(([language.sentence(entity.name, [(relation, value)])], source.config.copy_weight))
    return out


def _compare(source: Drawer, rng: random.Random) -> Segments:
    """Values and names listed, then others, each with a verdict: did it stand in the list?

    A name that did not stand there mostly shares a word with one that did, and always holds one that is new: what is new
    can be told word by word, which is where checking begins.
    """
    drawn = []
    for _ in range(rng.randint(1, 4)):
        kind = _kind(rng) if rng.random() < 0.5 else rng.choice(sorted(language.VALUES))
        drawn.append((kind, _draw(source, rng, kind)))
    seen = {w for _, words in drawn for w in words}
    out: Segments = [([", ".join(" ".join(words) for _, words in drawn), Control(NEWLINE)], 0.0)]
    for _ in range(8):
        kind, words = rng.choice(drawn)
        verdict = YES
        if rng.random() < 0.5:
            near = kind in KINDS and rng.random() < 0.7
            for _ in range(20):
                other = language.look_alike(rng, kind, source.config.vocabulary, words) if near else _draw(source, rng, kind)
                if set(other) - seen:
                    words, verdict, seen = other, NO, seen | set(other)
                    break
        out += [([" ".join(words)], 0.0), source.verdict(verdict)]
    return out


def _draw(source: Drawer, rng: random.Random, kind: str) -> tuple[str, ...]:
    """The two words of a name for a kind of entity, or of a value."""
    if kind in KINDS:
        return language.draw_name(rng, kind, source.config.vocabulary)
    return tuple(rng.choice(source.values[kind]).split())


def _titles(source: Drawer, rng: random.Random) -> Segments:
    """A question, then titles, each with its verdict: is it the name asked about?"""
    vocabulary, kind = source.config.vocabulary, _kind(rng)
    name = language.draw_name(rng, kind, vocabulary)
    relation = rng.choice(KINDS[kind].relations)
    question = rng.choice(relation.questions).format(n=" ".join(name))
    out: Segments = [([Control(INSTRUCTION), question, Control(RESPONSE)], 0.0)]
    seen = set(name)
    for _ in range(5):
        other, verdict = name, YES
        if rng.random() < 0.5:
            other = language.look_alike(rng, kind, vocabulary, name)
            if set(other) <= seen:  # an earlier wrong title would make it look familiar
                continue
            seen, verdict = seen | set(other), NO
        out += [([" ".join(other), Control(NEWLINE)], 0.0), source.verdict(verdict)]
    return out


_FAMILIES = {
    "quiz": _quiz,
    "statements": _statements,
    "claim": _claim,
    "choice": _choice,
    "common": _common,
    "copy": _copy,
    "kinds": _kinds,
    "compare": _compare,
    "titles": _titles,
}
