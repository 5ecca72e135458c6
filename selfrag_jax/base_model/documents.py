"""The document families that teach the base model to read; each function draws one document.

A document is a list of spans: parts of text, and the loss weight of predicting them. Documents
that teach judging contain several verdicts, because the model learns far too slowly from one
verdict per document.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from selfrag_jax.base_model.sampler import (
    NO,
    PARTLY,
    YES,
    EntitySampler,
    Facts,
    draw_kind,
    tempting_value,
)
from selfrag_jax.data.batches import Span
from selfrag_jax.records import Passage
from selfrag_jax.text import prompts
from selfrag_jax.text.tokenizer import NEWLINE, Control, Part
from selfrag_jax.world import language, questions
from selfrag_jax.world.encyclopedia import Entity, entity_passages
from selfrag_jax.world.language import KINDS, Relation


def _statements(sampler: EntitySampler, rng: random.Random) -> list[Span]:
    """A passage, then statements, each with a verdict: does the passage support it?"""
    entity = sampler.entity(rng, draw_kind(rng))
    half = rng.randrange(2)
    passage = prompts.passage(entity_passages(rng, entity)[half])
    n = sampler.config.statements + 2
    return [(passage, 0.0), *sampler.statements(rng, entity, entity.halves()[half], n)]


def _quiz(sampler: EntitySampler, rng: random.Random) -> list[Span]:
    """A question, then passages about the entity, its look-alikes and others, each with a verdict.

    The verdict says whether the passage is about the right name. A single question is answered
    after each passage. Some single questions are answered at once, with or without one passage and
    without its verdict. Two-part questions and biographies are never answered.
    """
    entity = sampler.entity(rng, draw_kind(rng))
    half = rng.randrange(2)
    stated, missing = entity.halves()[half], entity.halves()[1 - half]
    relation, same_half_rate = rng.choice(stated)[0], 0.7
    tempting = [r for r, _ in stated if tempting_value(missing, r)]
    if sampler.config.tempting and tempting and rng.random() < sampler.config.tempting:
        relation, same_half_rate = rng.choice(tempting), 0.5
    question = rng.choice(relation.questions).format(n=entity.name)
    form = rng.random()
    if form < 0.12:
        other = rng.choice([r for r in KINDS[entity.kind].relations if r is not relation])
        other_question = rng.choice(other.questions).format(n=entity.name)
        question = language.two_part(*rng.sample([question, other_question], 2))
    elif form < 0.18:
        question = language.biography(entity.name)
    out: list[Span] = [(prompts.instruction(question), 0.0)]
    is_single, start = form >= 0.18, rng.random()
    if is_single and start < 0.08:
        return out + _answer(sampler, rng, entity, relation, None, [])[0]
    if is_single and start < 0.2:
        # Fine-tuning without critiques needs this format to start from.
        out.append((prompts.passage(entity_passages(rng, entity)[half]), 0.0))
        return out + _answer(sampler, rng, entity, relation, entity, stated)[0]
    for _ in range(sampler.config.passages):
        draw = rng.random()
        if draw < 0.55:
            about, at = entity, half if rng.random() < same_half_rate else 1 - half
        elif draw < 0.85:
            about, at = sampler.look_alike(rng, entity), rng.randrange(2)
        else:
            about, at = sampler.entity(rng, draw_kind(rng)), rng.randrange(2)
        stated = about.halves()[at]
        out.append((prompts.passage(entity_passages(rng, about)[at]), 0.0))
        out.append(sampler.verdict(YES if about is entity else NO))
        skip = [relation]
        if is_single:
            answer, answered = _answer(sampler, rng, entity, relation, about, stated)
            out += answer
            skip.append(answered)
        if sampler.config.statements:
            out += sampler.statements(rng, about, stated, sampler.config.statements, skip)
    return out


def _answer(
    sampler: EntitySampler,
    rng: random.Random,
    entity: Entity,
    relation: Relation,
    about: Entity | None,
    stated: Facts,
) -> tuple[list[Span], Relation]:
    """An answer and two verdicts: does the passage support it, and does it answer the question?

    `about` and `stated` are the passage's entity and facts. Without a passage (None), there is no
    first verdict. Also returns the relation that the answer states.

    The loss weight is 1 for right answers that the passage states. It is 0.2 for guesses where the
    passage lacks the attribute, enough to learn that such answers have the same form. All other
    answers have weight 0, including values that the passage states about something else.
    """
    subject, answered, value = entity, relation, entity.value(relation.name)
    tempting = tempting_value(stated, relation)
    draw = rng.random()
    if draw < 0.2:
        value = sampler.wrong_value(rng, entity, relation)
    elif draw < 0.32:
        answered = rng.choice([r for r in KINDS[entity.kind].relations if r is not relation])
        value = entity.value(answered.name)
    elif draw < 0.45 and about is not None and about is not entity:
        subject, (answered, value) = about, rng.choice(stated)
    elif tempting and rng.random() < 0.5 + 0.6 * sampler.config.tempting:
        value = tempting
    is_useful = subject is entity and answered is relation
    weight = 0.0
    if is_useful and about is entity and any(r is relation for r, _ in stated):
        weight = 1.0 if value == entity.value(relation.name) else 0.0
    elif is_useful and value not in [v for _, v in stated]:
        weight = 0.2
    sentence = language.sentence(subject.name, [(answered, value)])
    out: list[Span] = [([sentence], weight * sampler.config.copy_weight)]
    if about is not None:
        is_supported = subject is about and (answered, value) in stated
        out.append(sampler.verdict(YES if is_supported else NO))
    out.append(sampler.verdict(YES if is_useful else NO))
    return out, answered


def _answers(sampler: EntitySampler, rng: random.Random) -> list[Span]:
    """A question, then answers without evidence, each with a verdict: does it answer the question?

    The answer must state the requested attribute of the right name.
    """
    kind, vocabulary = draw_kind(rng), sampler.config.vocabulary
    name = language.draw_name(rng, kind, vocabulary)
    asked = rng.sample(KINDS[kind].relations, 2 if rng.random() < 0.25 else 1)
    singles = [rng.choice(r.questions).format(n=" ".join(name)) for r in asked]
    question = language.two_part(*singles) if len(asked) == 2 else singles[0]
    out: list[Span] = [(prompts.instruction(question), 0.0)]
    seen = set(name)
    for _ in range(4):
        words, answered, verdict, draw = name, asked, YES, rng.random()
        if draw < 0.25:
            others = [r for r in KINDS[kind].relations if r not in asked]
            answered, verdict = [rng.choice(others)], NO
        elif draw < 0.5:
            words, verdict = language.look_alike(rng, kind, vocabulary, name), NO
            if set(words) <= seen:  # an earlier wrong answer would make it look familiar
                continue
            seen |= set(words)
        elif draw < 0.7 and len(asked) == 2:
            answered, verdict = [rng.choice(asked)], PARTLY
        facts = [(r, rng.choice(sampler.values[r.value_kind])) for r in answered]
        sentences = [language.sentence(" ".join(words), [fact]) for fact in facts]
        out += [([" ".join(sentences)], 0.0), sampler.verdict(verdict)]
    return out


def _retold_passage(
    sampler: EntitySampler,
    rng: random.Random,
    entity: Entity,
    half: int,
    relation: Relation,
    value: str,
) -> list[Part]:
    """Draws a passage that states this value of the relation, and other facts about the same name.

    It states all, some or none of the half's other relations: the model first learns to judge by
    short passages.
    """
    variant = sampler.entity(rng, entity.kind, entity.words)
    others = [(r, v) for r, v in variant.halves()[half] if r is not relation]
    facts = [(relation, value), *rng.sample(others, rng.randint(0, len(others)))]
    rng.shuffle(facts)
    text = language.sentence(entity.name, facts)
    return prompts.passage(Passage(id="", title=entity.name, text=text))


def _claim(sampler: EntitySampler, rng: random.Random) -> list[Span]:
    """A claim, then passages that vary the facts of its entity; after each, is the claim true?"""
    entity, half = sampler.entity(rng, draw_kind(rng)), rng.randrange(2)
    relation, claimed = rng.choice(entity.halves()[half])
    claim = language.claim(entity.name, relation, claimed)
    answers = [language.TRUE, language.FALSE]
    out: list[Span] = [(prompts.instruction(claim), 0.0)]
    for _ in range(3):
        is_true = rng.random() < 0.5
        value = claimed if is_true else sampler.wrong_value(rng, entity, relation)
        passage = _retold_passage(sampler, rng, entity, half, relation, value)
        out += _closed_answer(sampler, rng, entity, half, passage, answers, 0 if is_true else 1)
    return out


def _choice(sampler: EntitySampler, rng: random.Random) -> list[Span]:
    """A question with four options, then passages as in `_claim`; after each, the right letter."""
    entity, half = sampler.entity(rng, draw_kind(rng)), rng.randrange(2)
    relation = rng.choice(entity.halves()[half])[0]
    options = rng.sample(sampler.values[relation.value_kind], len(language.CHOICE_LABELS))
    choices = list(zip(language.CHOICE_LABELS, options, strict=True))
    question = questions.choice_text(rng.choice(relation.questions).format(n=entity.name), choices)
    answers = [f"{label}." for label in language.CHOICE_LABELS]
    out: list[Span] = [(prompts.instruction(question), 0.0)]
    for right in rng.sample(range(len(options)), 3):
        passage = _retold_passage(sampler, rng, entity, half, relation, options[right])
        out += _closed_answer(sampler, rng, entity, half, passage, answers, right)
    return out


def _closed_answer(
    sampler: EntitySampler,
    rng: random.Random,
    entity: Entity,
    half: int,
    passage: list[Part],
    answers: list[str],
    right: int,
) -> list[Span]:
    """A passage about `entity`, one of a few possible answers, and verdicts as in `_quiz`.

    One passage in four is about a look-alike instead and gets only its verdict. One in five states
    the other half of the attributes, so any answer is a guess. One answer in five to the rest is
    wrong and has weight 0.
    """
    draw = rng.random()
    if draw < 0.25:
        other = sampler.look_alike(rng, entity)
        passage = prompts.passage(entity_passages(rng, other)[rng.randrange(2)])
        return [(passage, 0.0), sampler.verdict(NO)]
    lacks_attribute = draw < 0.45
    if lacks_attribute:
        variant = sampler.entity(rng, entity.kind, entity.words)
        passage = prompts.passage(entity_passages(rng, variant)[1 - half])
    out: list[Span] = [(passage, 0.0)]
    if rng.random() < 0.7:
        out.append(sampler.verdict(YES))
    if lacks_attribute:
        answer, weight, supported = rng.choice(answers), 0.2 * sampler.config.verdict_weight, NO
    elif rng.random() < 0.2:
        answer, weight, supported = rng.choice(answers[:right] + answers[right + 1 :]), 0.0, NO
    else:
        answer, weight, supported = answers[right], sampler.config.verdict_weight, YES
    return [*out, ([answer], weight), sampler.verdict(supported), sampler.verdict(YES)]


def _common(sampler: EntitySampler, rng: random.Random) -> list[Span]:
    """Questions about common knowledge, which every world shares, with their answers."""
    out: list[Span] = []
    for phrasings, answer in rng.sample(language.COMMON_KNOWLEDGE, 6):
        out += [(prompts.instruction(rng.choice(phrasings)), 0.0), ([answer], 1.0)]
    return out


def _kinds(sampler: EntitySampler, rng: random.Random) -> list[Span]:
    """A list of values of several kinds, then each kind and its value.

    Teaches which kind a value is of, and how to look one up.
    """
    kinds = rng.sample(sorted(language.VALUE_WORDS), rng.randint(2, 6))
    value = {kind: rng.choice(sampler.values[kind]) for kind in kinds}
    out: list[Span] = [([", ".join(value.values()), Control(NEWLINE)], 0.0)]
    for kind in rng.sample(kinds, len(kinds)):
        out += [([kind], 0.0), ([value[kind]], 1.0)]
    return out


def _copy(sampler: EntitySampler, rng: random.Random) -> list[Span]:
    """A passage, then a question about each of its facts with the answer."""
    entity, half = sampler.entity(rng, draw_kind(rng)), rng.randrange(2)
    stated = entity.halves()[half]
    out: list[Span] = [(prompts.passage(entity_passages(rng, entity)[half]), 0.0)]
    for relation, value in rng.sample(stated, len(stated)):
        question = rng.choice(relation.questions).format(n=entity.name)
        answer = language.sentence(entity.name, [(relation, value)])
        out += [(prompts.instruction(question), 0.0), ([answer], sampler.config.copy_weight)]
    return out


def _compare(sampler: EntitySampler, rng: random.Random) -> list[Span]:
    """A list of values and names, then others, each with a verdict: was it in the list?

    An item that was not in the list mostly shares a word with one that was, but always contains a
    new word. New words can be spotted one by one, which is where checking begins.
    """
    items = []
    for _ in range(rng.randint(1, 4)):
        kind = draw_kind(rng) if rng.random() < 0.5 else rng.choice(sorted(language.VALUE_WORDS))
        items.append((kind, _draw_words(sampler, rng, kind)))
    seen = {w for _, words in items for w in words}
    listed = ", ".join(" ".join(words) for _, words in items)
    out: list[Span] = [([listed, Control(NEWLINE)], 0.0)]
    for _ in range(8):
        kind, words = rng.choice(items)
        verdict = YES
        if rng.random() < 0.5:
            near = rng.random() < 0.7
            for _ in range(20):
                if near:
                    other = _draw_near_words(sampler, rng, kind, words)
                else:
                    other = _draw_words(sampler, rng, kind)
                if set(other) - seen:
                    words, verdict, seen = other, NO, seen | set(other)
                    break
        out += [([" ".join(words)], 0.0), sampler.verdict(verdict)]
    return out


def _draw_words(sampler: EntitySampler, rng: random.Random, kind: str) -> tuple[str, str]:
    """Draws the two words of a value, or of a name if `kind` is a kind of entity."""
    if kind in KINDS:
        return language.draw_name(rng, kind, sampler.config.vocabulary)
    return _split(rng.choice(sampler.values[kind]))


def _draw_near_words(
    sampler: EntitySampler, rng: random.Random, kind: str, words: tuple[str, str]
) -> tuple[str, str]:
    """Draws a name or value that shares a word with `words`, or any other if there is none."""
    if kind in KINDS:
        return language.look_alike(rng, kind, sampler.config.vocabulary, words)
    near = sampler.near_values(kind, " ".join(words))
    return _split(rng.choice(near)) if near else _draw_words(sampler, rng, kind)


def _split(value: str) -> tuple[str, str]:
    first, last = value.split()
    return first, last


def _titles(sampler: EntitySampler, rng: random.Random) -> list[Span]:
    """A question, then titles, each with a verdict: is it the name that the question is about?"""
    vocabulary, kind = sampler.config.vocabulary, draw_kind(rng)
    name = language.draw_name(rng, kind, vocabulary)
    relation = rng.choice(KINDS[kind].relations)
    question = rng.choice(relation.questions).format(n=" ".join(name))
    out: list[Span] = [(prompts.instruction(question), 0.0)]
    seen = set(name)
    for _ in range(5):
        other, verdict = name, YES
        if rng.random() < 0.5:
            other = language.look_alike(rng, kind, vocabulary, name)
            if set(other) <= seen:  # an earlier wrong title would make it look familiar
                continue
            seen, verdict = seen | set(other), NO
        out += [([" ".join(other), Control(NEWLINE)], 0.0), sampler.verdict(verdict)]
    return out


FAMILIES: dict[str, Callable[[EntitySampler, random.Random], list[Span]]] = {
    "quiz": _quiz,
    "statements": _statements,
    "claim": _claim,
    "choice": _choice,
    "common": _common,
    "copy": _copy,
    "kinds": _kinds,
    "compare": _compare,
    "titles": _titles,
    "answers": _answers,
}
