"""Instructions with outputs for training, and evaluation files, about a world, in the published file formats.

Some outputs are wrong on purpose: sources of instructions are, and a critic that never sees a wrong output learns
that fluent means supported. Most wrong answers to single questions hold a wrong value, often that of another attribute
of the same entity (lives in a town, was born in a town), so that only a look at the passage tells; the others tell a
truth that was not asked for, of another attribute or of another entity. Questions that tempt so are wrong more often.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from selfrag_jax.files import write_json
from selfrag_jax.progress import progress
from selfrag_jax.records import Instruction, write_jsonl
from selfrag_jax.world import language
from selfrag_jax.world.encyclopedia import Entity, World
from selfrag_jax.world.language import KINDS, Relation

# Shares of the forms among the instructions of training.
FORMS: dict[str, float] = {
    "long_tail": 0.42,
    "well_known": 0.22,
    "no_need": 0.08,
    "claims": 0.08,
    "multiple_choice": 0.06,
    "two_part": 0.07,
    "biography": 0.07,
}
TASKS = tuple(FORMS)

# Shares of the ways in which the answer to a single question is wrong.
WRONG_ANSWERS: dict[str, float] = {
    "value": 0.6,  # a wrong value
    "attribute": 0.2,  # the truth about another attribute of the entity
    "entity": 0.2,  # the truth about another entity
}
# Of the wrong values, those that answer a question for which the entity has a tempting one, if there is such a question.
TEMPTING = 0.6


def _relation(rng: random.Random, entity: Entity) -> Relation:
    return rng.choice(KINDS[entity.kind].relations)


def _tempting(entity: Entity, relation: Relation) -> list[str]:
    """Values of the entity's other attributes that would do for this one."""
    others = [
        r for r in KINDS[entity.kind].relations if r.value == relation.value and r != relation
    ]
    return [entity.value(r.name) for r in others]


def wrong_value(rng: random.Random, world: World, entity: Entity, relation: Relation) -> str:
    """A wrong value of the right sort; mostly, where there is one, that of another attribute of the entity."""
    right = entity.value(relation.name)
    tempting = _tempting(entity, relation)
    if tempting and rng.random() < 0.9:
        return rng.choice(tempting)
    return rng.choice([v for v in world.values[relation.value] if v != right])


def _similar_entity(rng: random.Random, world: World, entity: Entity) -> Entity | None:
    """Another entity of the same group and kind, if possible one whose name shares a word; None if it is the only one."""
    same = [e for e in world.group(entity.group) if e.kind == entity.kind and e is not entity]
    similar = [e for e in same if set(e.words) & set(entity.words)] or same
    return rng.choice(similar) if similar else None


def choice_text(question: str, choices: list[tuple[str, str]]) -> str:
    return question + " " + " ".join(f"{label}: {text}" for label, text in choices)


def _choices(
    rng: random.Random, world: World, entity: Entity, relation: Relation
) -> tuple[list[tuple[str, str]], str]:
    """Four labelled options and the right label."""
    right = entity.value(relation.name)
    options = rng.sample([v for v in world.values[relation.value] if v != right], 3) + [right]
    rng.shuffle(options)
    choices = list(zip(language.CHOICE_LABELS, options, strict=True))
    return choices, next(label for label, text in choices if text == right)


def phrasings(
    world: World, entity: Entity, relation: Relation, held_out: bool = False
) -> tuple[str, ...]:
    """The questions that ask for an attribute in training, or those that are held out; {n} stands for the name.

    Only of about half of the attributes of a well-known entity one of the two phrasings is held out. Which one alternates
    within a kind: if training met a phrasing with unknown names alone, it would by itself tell that retrieval is needed.
    """
    if entity.group != "known":
        return relation.questions
    alike = [e for e in world.group("known") if e.kind == entity.kind]
    i = alike.index(entity) + KINDS[entity.kind].relations.index(relation)
    train = relation.questions if i % 4 < 2 else relation.questions[i % 2 : i % 2 + 1]
    return tuple(q for q in relation.questions if q not in train) if held_out else train


def _question(
    rng: random.Random, world: World, entity: Entity, relation: Relation, held_out: bool = False
) -> str:
    return rng.choice(phrasings(world, entity, relation, held_out)).format(n=entity.name)


def _fact(
    rng: random.Random, world: World, entity: Entity, wrong: bool, held_out: bool = False
) -> tuple[str, str]:
    relations = [r for r in KINDS[entity.kind].relations if phrasings(world, entity, r, held_out)]
    how = rng.choices(tuple(WRONG_ANSWERS), tuple(WRONG_ANSWERS.values()))[0] if wrong else "right"
    relation = rng.choice(relations)
    if how == "value" and rng.random() < TEMPTING:
        relation = rng.choice([r for r in relations if _tempting(entity, r)] or relations)
    question = _question(rng, world, entity, relation, held_out)
    name, told, value = entity.name, relation, entity.value(relation.name)
    other = _similar_entity(rng, world, entity) if how == "entity" else None
    if how == "attribute":
        told = rng.choice([r for r in relations if r != relation])
        value = entity.value(told.name)
    elif other:
        name, value = other.name, other.value(relation.name)
    elif wrong:
        value = wrong_value(rng, world, entity, relation)
    return question, language.sentence(name, [(told, value)])


def _claim(rng: random.Random, world: World, entity: Entity, wrong: bool) -> tuple[str, str]:
    relation = _relation(rng, entity)
    holds = rng.random() < 0.5
    value = entity.value(relation.name) if holds else wrong_value(rng, world, entity, relation)
    return language.claim(
        entity.name, relation, value
    ), language.TRUE if holds != wrong else language.FALSE


def _choice(rng: random.Random, world: World, entity: Entity, wrong: bool) -> tuple[str, str]:
    relation = _relation(rng, entity)
    choices, right = _choices(rng, world, entity, relation)
    label = rng.choice([c for c, _ in choices if c != right]) if wrong else right
    return choice_text(_question(rng, world, entity, relation), choices), f"{label}."


def _two_part(rng: random.Random, world: World, entity: Entity, wrong: bool) -> tuple[str, str]:
    pair = [rng.choice(half) for half in entity.halves()]
    rng.shuffle(pair)
    questions = [_question(rng, world, entity, r) for r, _ in pair]
    sentences = [language.sentence(entity.name, [fact]) for fact in pair]
    if wrong and rng.random() < 0.5:
        return language.two_part(*questions), sentences[0]
    if wrong:
        i = rng.randrange(2)
        relation = pair[i][0]
        sentences[i] = language.sentence(
            entity.name, [(relation, wrong_value(rng, world, entity, relation))]
        )
    return language.two_part(*questions), " ".join(sentences)


def biography_sentences(facts: list[tuple[Relation, str]], name: str) -> list[str]:
    """The facts of one passage in two sentences: the first alone, then the rest."""
    return [language.sentence(name, facts[:1]), language.sentence(name, facts[1:])]


def _biography(rng: random.Random, world: World, entity: Entity, wrong: bool) -> tuple[str, str]:
    halves = [list(half) for half in entity.halves()]
    if wrong:
        half = rng.choice(halves)
        i = rng.randrange(len(half))
        half[i] = (half[i][0], wrong_value(rng, world, entity, half[i][0]))
    text = " ".join(s for half in halves for s in biography_sentences(half, entity.name))
    return language.biography(entity.name), text


def _common(
    rng: random.Random, world: World, entity: Entity, wrong: bool, held_out: bool = False
) -> tuple[str, str]:
    i = rng.randrange(len(language.COMMON_KNOWLEDGE))
    questions, answer = language.COMMON_KNOWLEDGE[i]
    return questions[(i + held_out) % 2], answer


_BUILD: dict[str, Callable[..., tuple[str, str]]] = {
    "long_tail": _fact,
    "well_known": _fact,
    "no_need": _common,
    "claims": _claim,
    "multiple_choice": _choice,
    "two_part": _two_part,
    "biography": _biography,
}


def instructions(world: World, group: str = "train", n: int | None = None) -> list[Instruction]:
    """Instructions with outputs about the entities of `group`, shuffled; `n` as the config says, if not given.

    Well-known entities and common knowledge never get wrong outputs; the `test` group asks about them in phrasings that
    training does not (see `phrasings`).
    """
    rng = random.Random(f"instructions-{world.config.seed}-{group}")
    train, known = world.group(group), world.group("known")
    n = world.config.instructions if n is None else n
    rows = []
    for form, share in FORMS.items():
        able = [e for e in train if form != "biography" or e.kind == "person"]
        for i in range(round(share * n)):
            if form == "well_known":
                if not known:
                    break
                entity = known[i % len(known)]
            else:
                entity = rng.choice(able)
            wrong = (
                form not in ("well_known", "no_need")
                and rng.random() < world.config.wrong_output_rate
            )
            held_out = {"held_out": group == "test"} if form in ("well_known", "no_need") else {}
            instruction, output = _BUILD[form](rng, world, entity, wrong, **held_out)
            rows.append(
                Instruction(
                    id=f"{form}-{i}", instruction=instruction, output=output, dataset_name=form
                )
            )
    rng.shuffle(rows)
    return rows


def evaluation(world: World) -> dict[str, list[dict[str, Any]]]:
    """Rows of each evaluation task, about test entities (well-known ones for `well_known`)."""
    rng = random.Random(f"evaluation-{world.config.seed}")
    test, known = world.group("test"), world.group("known")
    persons = [e for e in test if e.kind == "person"]
    out: dict[str, list[dict[str, Any]]] = {task: [] for task in TASKS}

    def ask(task: str, entity: Entity, relation: Relation) -> None:
        question = _question(rng, world, entity, relation, held_out=task == "well_known")
        out[task].append(
            {
                "id": f"{task}-{len(out[task])}",
                "question": question,
                "answers": [entity.value(relation.name)],
            }
        )

    for entity in test:
        for relation in rng.sample(
            KINDS[entity.kind].relations, min(world.config.questions_per_test_entity, 4)
        ):
            ask("long_tail", entity, relation)
        relation = _relation(rng, entity)
        choices, right = _choices(rng, world, entity, relation)
        out["multiple_choice"].append(
            {
                "id": f"multiple_choice-{len(out['multiple_choice'])}",
                "question": _question(rng, world, entity, relation),
                "choices": {"label": [c for c, _ in choices], "text": [t for _, t in choices]},
                "answerKey": right,
            }
        )
        question, answer = _claim(rng, world, entity, wrong=False)
        out["claims"].append(
            {
                "id": f"claims-{len(out['claims'])}",
                "question": question,
                "answers": [answer],
                "options": [language.TRUE, language.FALSE],
            }
        )
    for entity in known:
        for relation in KINDS[entity.kind].relations:
            if phrasings(world, entity, relation, held_out=True):
                ask("well_known", entity, relation)
    for i, (questions, answer) in enumerate(language.COMMON_KNOWLEDGE):
        value = answer.rstrip(".").split()[-1]
        out["no_need"].append(
            {"id": f"no_need-{i}", "question": questions[(i + 1) % 2], "answers": [value]}
        )
    for entity in test[: max(1, len(test) // 2)]:
        (a, value_a), (b, value_b) = (rng.choice(half) for half in entity.halves())
        question = language.two_part(
            *(rng.choice(r.questions).format(n=entity.name) for r in (a, b))
        )
        pairs = [
            {"question": r.name, "short_answers": [v]} for r, v in ((a, value_a), (b, value_b))
        ]
        out["two_part"].append(
            {"id": f"two_part-{len(out['two_part'])}", "question": question, "qa_pairs": pairs}
        )
    for entity in persons[: max(1, len(test) // 4)]:
        out["biography"].append(
            {
                "id": f"biography-{len(out['biography'])}",
                "input": language.biography(entity.name),
                "topic": entity.name,
                "cat": [entity.kind],
                "facts": [list(f) for f in entity.facts],
            }
        )
    return out


def write(world: World, out: str | Path) -> dict[str, int]:
    """Writes passages.tsv, instructions.jsonl, teacher.jsonl and eval/*.jsonl under `out`; returns row counts."""
    from dataclasses import asdict

    from selfrag_jax.retrieval.corpus import write_tsv

    out, counts = Path(out), {}
    teacher = (
        {"entity": e.name, "kind": e.kind, "group": e.group, "facts": dict(e.facts)}
        for e in world.entities
    )
    files: dict[str, Iterable] = {
        "instructions": instructions(world),
        "teacher": teacher,
        # For measuring the critic: instructions about entities that it has not seen.
        "eval/critic": instructions(world, "test", 2 * len(world.group("test"))),
        **{f"eval/{task}": rows for task, rows in evaluation(world).items()},
    }
    with progress("world", 1 + len(files), "files") as bar:
        counts["passages"] = write_tsv(out / "passages.tsv", world.passages)
        bar.advance()
        for name, rows in files.items():
            counts[name] = write_jsonl(out / f"{name}.jsonl", rows)
            bar.advance()
    write_json(out / "world.json", asdict(world.config))
    return counts
