"""The families of documents that teach the base model to read: each draws one document.

Those that teach to judge hold several verdicts, because a single one per document teaches checking far too slowly. Each
family is a function of a Drawer and a random generator; its result lists parts of text with their loss weights.
"""

from __future__ import annotations

import random

from selfrag_jax.base_model.drawer import NO, PARTLY, YES, Drawer, Segments, draw_kind, lendable
from selfrag_jax.records import Passage
from selfrag_jax.text import prompts
from selfrag_jax.text.tokenizer import INSTRUCTION, NEWLINE, RESPONSE, Control, Part
from selfrag_jax.world import language, questions
from selfrag_jax.world.encyclopedia import Entity, entity_passages
from selfrag_jax.world.language import KINDS, Relation


def _statements(source: Drawer, rng: random.Random) -> Segments:
    """A passage, then statements, each with its verdict."""
    entity = source.entity(rng, draw_kind(rng))
    half = rng.randrange(2)
    out: Segments = [(prompts.passage(entity_passages(rng, entity)[half]), 0.0)]
    return out + source.statements(rng, entity, entity.halves()[half], source.config.statements + 2)


def _quiz(source: Drawer, rng: random.Random) -> Segments:
    """A question, then passages about it, its look-alikes and others: is it about the same name, and what does it say?

    Some questions have two parts or ask for a biography; these get no answer. Some get one at once, or without a passage.
    """
    entity = source.entity(rng, draw_kind(rng))
    half = rng.randrange(2)
    relation, holds_rate = rng.choice(entity.halves()[half])[0], 0.7
    tempting = [r for r, _ in entity.halves()[half] if lendable(entity.halves()[1 - half], r)]
    if source.config.tempting and tempting and rng.random() < source.config.tempting:
        relation, holds_rate = rng.choice(tempting), 0.5
    question = rng.choice(relation.questions).format(n=entity.name)
    form = rng.random()
    if form < 0.12:
        other = rng.choice(
            rng.choice([r for r in KINDS[entity.kind].relations if r is not relation]).questions
        )
        question = language.two_part(*rng.sample([question, other.format(n=entity.name)], 2))
    elif form < 0.18:
        question = language.biography(entity.name)
    out: Segments = [([Control(INSTRUCTION), question, Control(RESPONSE)], 0.0)]
    single, start = form >= 0.18, rng.random()
    if single and start < 0.08:
        return out + _answer(source, rng, entity, relation, None, [])[0]
    if (
        single and start < 0.2
    ):  # answered at once: a model that is fine-tuned without critiques needs a start as well
        out.append((prompts.passage(entity_passages(rng, entity)[half]), 0.0))
        return out + _answer(source, rng, entity, relation, entity, entity.halves()[half])[0]
    for _ in range(source.config.passages):
        draw = rng.random()
        if draw < 0.55:
            about, at = entity, half if rng.random() < holds_rate else 1 - half
        elif draw < 0.85:
            words = language.look_alike(rng, entity.kind, source.config.vocabulary, entity.words)
            about, at = source.entity(rng, entity.kind, words), rng.randrange(2)
        else:
            about, at = source.entity(rng, draw_kind(rng)), rng.randrange(2)
        stated = about.halves()[at]
        out.append((prompts.passage(entity_passages(rng, about)[at]), 0.0))
        out.append(source.verdict(YES if about is entity else NO))
        told = [relation]
        if single:
            answer, also = _answer(source, rng, entity, relation, about, stated)
            out += answer
            told.append(also)
        if source.config.statements:
            out += source.statements(rng, about, stated, source.config.statements, skip=told)
    return out


def _answer(
    source: Drawer,
    rng: random.Random,
    entity: Entity,
    relation: Relation,
    about: Entity | None,
    stated: list[tuple[Relation, str]],
) -> tuple[Segments, Relation]:
    """An answer to the question and two verdicts: is it supported by the passage, and does it answer what was asked?

    about, stated: whom the passage is about and what it states; without a passage (None) there is no first verdict.
    Right answers that the passage holds are learned. A guess, where it holds none, has a small weight: enough to know
    that such answers are as well-formed as others. All others are only read, and so are values that the passage tells of
    something else. Returns also the relation told.
    """
    who, told, value, draw = entity, relation, entity.value(relation.name), rng.random()
    lent = lendable(stated, relation)
    if draw < 0.2:
        value = source.wrong_value(rng, entity, relation)
    elif draw < 0.32:
        told = rng.choice([r for r in KINDS[entity.kind].relations if r is not relation])
        value = entity.value(told.name)
    elif draw < 0.45 and about is not None and about is not entity:
        who, (told, value) = about, rng.choice(stated)
    elif lent and rng.random() < 0.5 + 0.6 * source.config.tempting:
        value = lent
    holds = about is entity and any(r is relation for r, _ in stated)
    useful = who is entity and told is relation
    if holds:
        weight = 1.0 if value == entity.value(relation.name) else 0.0
    else:
        weight = 0.0 if value in (v for _, v in stated) else 0.2
    out: Segments = [
        (
            [language.sentence(who.name, [(told, value)])],
            weight * useful * source.config.copy_weight,
        )
    ]
    if about is not None:
        out.append(source.verdict(YES if who is about and (told, value) in stated else NO))
    return [*out, source.verdict(YES if useful else NO)], told


def _answers(source: Drawer, rng: random.Random) -> Segments:
    """A question, then answers without evidence, each with its verdict: does it tell what was asked, of the right name?"""
    kind, vocabulary = draw_kind(rng), source.config.vocabulary
    name = language.draw_name(rng, kind, vocabulary)
    asked = rng.sample(KINDS[kind].relations, 2 if rng.random() < 0.25 else 1)
    singles = [rng.choice(r.questions).format(n=" ".join(name)) for r in asked]
    question = language.two_part(*singles) if len(asked) == 2 else singles[0]
    out: Segments = [([Control(INSTRUCTION), question, Control(RESPONSE)], 0.0)]
    seen = set(name)
    for _ in range(4):
        words, told, verdict, draw = name, asked, YES, rng.random()
        if draw < 0.25:
            told, verdict = [rng.choice([r for r in KINDS[kind].relations if r not in asked])], NO
        elif draw < 0.5:
            words, verdict = language.look_alike(rng, kind, vocabulary, name), NO
            if set(words) <= seen:  # an earlier wrong answer would make it look familiar
                continue
            seen |= set(words)
        elif draw < 0.7 and len(asked) == 2:
            told, verdict = [rng.choice(asked)], PARTLY
        sentences = [
            language.sentence(" ".join(words), [(r, rng.choice(source.values[r.value]))])
            for r in told
        ]
        out += [([" ".join(sentences)], 0.0), source.verdict(verdict)]
    return out


def _retold(
    source: Drawer, rng: random.Random, entity: Entity, half: int, relation: Relation, value: str
) -> list[Part]:
    """A passage about the same name with other facts, but with this value of this relation.

    Of the half's other facts it holds all, some or none: to judge by a passage is first learned where it is short.
    """
    told = source.entity(rng, entity.kind, entity.words)
    others = [(r, v) for r, v in told.halves()[half] if r is not relation]
    facts = [(relation, value), *rng.sample(others, rng.randint(0, len(others)))]
    rng.shuffle(facts)
    return prompts.passage(
        Passage(id="", title=entity.name, text=language.sentence(entity.name, facts))
    )


def _claim(source: Drawer, rng: random.Random) -> Segments:
    """A claim, then passages that tell differently of the same name; after each: is the claim true by it?"""
    entity, half = source.entity(rng, draw_kind(rng)), rng.randrange(2)
    relation, claimed = rng.choice(entity.halves()[half])
    out: Segments = [
        (
            [
                Control(INSTRUCTION),
                language.claim(entity.name, relation, claimed),
                Control(RESPONSE),
            ],
            0.0,
        )
    ]
    for _ in range(3):
        holds = rng.random() < 0.5
        value = claimed if holds else source.wrong_value(rng, entity, relation)
        passage = _retold(source, rng, entity, half, relation, value)
        answers = [language.TRUE, language.FALSE]
        out += _closed_answer(source, rng, entity, half, passage, answers, 0 if holds else 1)
    return out


def _choice(source: Drawer, rng: random.Random) -> Segments:
    """A question with four options, then passages that tell differently of the same name; after each: its letter."""
    entity, half = source.entity(rng, draw_kind(rng)), rng.randrange(2)
    relation = rng.choice(entity.halves()[half])[0]
    options = rng.sample(source.values[relation.value], len(language.CHOICE_LABELS))
    choices = list(zip(language.CHOICE_LABELS, options, strict=True))
    question = questions.choice_text(rng.choice(relation.questions).format(n=entity.name), choices)
    out: Segments = [([Control(INSTRUCTION), question, Control(RESPONSE)], 0.0)]
    for right in rng.sample(range(len(options)), 3):
        passage = _retold(source, rng, entity, half, relation, options[right])
        answers = [f"{label}." for label in language.CHOICE_LABELS]
        out += _closed_answer(source, rng, entity, half, passage, answers, right)
    return out


def _closed_answer(
    source: Drawer,
    rng: random.Random,
    entity: Entity,
    half: int,
    passage: list[Part],
    answers: list[str],
    right: int,
) -> Segments:
    """A passage about `entity`, an answer out of a few (one in five is wrong, and only read), and verdicts as in _quiz.

    One passage in four is about a look-alike instead: it is only told from the others. One in five tells of the
    other half of the attributes: any answer is a guess.
    """
    draw = rng.random()
    if draw < 0.25:
        words = language.look_alike(rng, entity.kind, source.config.vocabulary, entity.words)
        other = source.entity(rng, entity.kind, words)
        return [
            (prompts.passage(entity_passages(rng, other)[rng.randrange(2)]), 0.0),
            source.verdict(NO),
        ]
    lacks = draw < 0.45
    if lacks:
        told = source.entity(rng, entity.kind, entity.words)
        passage = prompts.passage(entity_passages(rng, told)[1 - half])
    out: Segments = [(passage, 0.0)]
    if rng.random() < 0.7:
        out.append(source.verdict(YES))
    if lacks:
        return [
            *out,
            ([rng.choice(answers)], 0.2 * source.config.verdict_weight),
            source.verdict(NO),
            source.verdict(YES),
        ]
    if rng.random() < 0.2:
        wrong = rng.choice([a for i, a in enumerate(answers) if i != right])
        return [*out, ([wrong], 0.0), source.verdict(NO), source.verdict(YES)]
    return [
        *out,
        ([answers[right]], source.config.verdict_weight),
        source.verdict(YES),
        source.verdict(YES),
    ]


def _common(source: Drawer, rng: random.Random) -> Segments:
    """Common knowledge, which every world shares."""
    out: Segments = []
    for asked, answer in rng.sample(language.COMMON_KNOWLEDGE, 6):
        out += [
            ([Control(INSTRUCTION), rng.choice(asked), Control(RESPONSE)], 0.0),
            ([answer], 1.0),
        ]
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
    entity, half = source.entity(rng, draw_kind(rng)), rng.randrange(2)
    stated = entity.halves()[half]
    out: Segments = [(prompts.passage(entity_passages(rng, entity)[half]), 0.0)]
    for relation, value in rng.sample(stated, len(stated)):
        question = rng.choice(relation.questions).format(n=entity.name)
        out.append(([Control(INSTRUCTION), question, Control(RESPONSE)], 0.0))
        out.append(
            ([language.sentence(entity.name, [(relation, value)])], source.config.copy_weight)
        )
    return out


def _compare(source: Drawer, rng: random.Random) -> Segments:
    """Values and names listed, then others, each with a verdict: did it stand in the list?

    What did not stand there mostly shares a word with something that did, and always holds one that is new: what is new
    can be told word by word, which is where checking begins.
    """
    drawn = []
    for _ in range(rng.randint(1, 4)):
        kind = draw_kind(rng) if rng.random() < 0.5 else rng.choice(sorted(language.VALUES))
        drawn.append((kind, _draw(source, rng, kind)))
    seen = {w for _, words in drawn for w in words}
    out: Segments = [([", ".join(" ".join(words) for _, words in drawn), Control(NEWLINE)], 0.0)]
    for _ in range(8):
        kind, words = rng.choice(drawn)
        verdict = YES
        if rng.random() < 0.5:
            near = rng.random() < 0.7
            for _ in range(20):
                other = _near(source, rng, kind, words) if near else _draw(source, rng, kind)
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


def _near(source: Drawer, rng: random.Random, kind: str, words: tuple[str, ...]) -> tuple[str, ...]:
    """A name or value that shares a word with `words`; any other one where there is none."""
    if kind in KINDS:
        return language.look_alike(rng, kind, source.config.vocabulary, words)
    near = source.near_values(kind, " ".join(words))
    return tuple(rng.choice(near).split()) if near else _draw(source, rng, kind)


def _titles(source: Drawer, rng: random.Random) -> Segments:
    """A question, then titles, each with its verdict: is it the name asked about?"""
    vocabulary, kind = source.config.vocabulary, draw_kind(rng)
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


FAMILIES = {
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
