"""Training instructions and evaluation files about a world, in the published formats.

Some outputs are wrong on purpose. Real instruction data contains errors, and a critic that never
sees a wrong output learns that fluent means supported. Most wrong answers to single questions state
a wrong value, often the value of another attribute of the same entity (lives in a town, was born in
a town), so only the passage reveals the error. The others state a true fact that the question did
not ask for, about another attribute or another entity. Questions with such a tempting value are
over-represented among the wrong answers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from selfrag_jax.files import write_json
from selfrag_jax.progress import progress
from selfrag_jax.records import Instruction, write_jsonl
from selfrag_jax.retrieval.corpus import write_tsv
from selfrag_jax.world import language
from selfrag_jax.world.encyclopedia import Entity, World
from selfrag_jax.world.language import KINDS, Relation

# Share of each form among the training instructions.
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

# Share of each type of error among the wrong answers to single questions.
WRONG_ANSWERS: dict[str, float] = {
    "value": 0.6,  # a wrong value
    "attribute": 0.2,  # a true fact about another attribute of the entity
    "entity": 0.2,  # a true fact about another entity
}
# Share of wrong values for which a question with a tempting value is chosen, if there is one.
TEMPTING = 0.6


def _draw_relation(rng: random.Random, entity: Entity) -> Relation:
    return rng.choice(KINDS[entity.kind].relations)


def _tempting_values(entity: Entity, relation: Relation) -> list[str]:
    """Returns the values of the entity's other attributes that are of the same kind."""
    return [
        entity.value(r.name)
        for r in KINDS[entity.kind].relations
        if r.value_kind == relation.value_kind and r != relation
    ]


def wrong_value(rng: random.Random, world: World, entity: Entity, relation: Relation) -> str:
    """Draws a wrong value of the right kind, mostly a tempting one where there is one."""
    right = entity.value(relation.name)
    tempting = _tempting_values(entity, relation)
    if tempting and rng.random() < 0.9:
        return rng.choice(tempting)
    return rng.choice([v for v in world.values[relation.value_kind] if v != right])


def _similar_entity(rng: random.Random, world: World, entity: Entity) -> Entity | None:
    """Draws another entity of the same group and kind, or returns None if there is no other.

    Prefers entities whose name shares a word.
    """
    same = [e for e in world.group(entity.group) if e.kind == entity.kind and e is not entity]
    similar = [e for e in same if set(e.words) & set(entity.words)] or same
    return rng.choice(similar) if similar else None


def choice_text(question: str, choices: list[tuple[str, str]]) -> str:
    return question + " " + " ".join(f"{label}: {text}" for label, text in choices)


def _choices(
    rng: random.Random, world: World, entity: Entity, relation: Relation
) -> tuple[list[tuple[str, str]], str]:
    """Returns four labelled options and the label of the right one."""
    right = entity.value(relation.name)
    options = rng.sample([v for v in world.values[relation.value_kind] if v != right], 3) + [right]
    rng.shuffle(options)
    choices = list(zip(language.CHOICE_LABELS, options, strict=True))
    return choices, next(label for label, text in choices if text == right)


def phrasings(
    world: World, entity: Entity, relation: Relation, held_out: bool = False
) -> tuple[str, ...]:
    """Returns the question templates of an attribute for training, or the held-out ones.

    {n} stands for the name. Only known entities have held-out phrasings: one of two, for about half
    of the attributes. Which one alternates within a kind, because a phrasing that training combines
    with unknown names only would by itself signal that retrieval is needed.
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
    error = None
    if wrong:
        error = rng.choices(tuple(WRONG_ANSWERS), tuple(WRONG_ANSWERS.values()))[0]
    relation = rng.choice(relations)
    if error == "value" and rng.random() < TEMPTING:
        relation = rng.choice([r for r in relations if _tempting_values(entity, r)] or relations)
    question = _question(rng, world, entity, relation, held_out)
    name, stated, value = entity.name, relation, entity.value(relation.name)
    other = _similar_entity(rng, world, entity) if error == "entity" else None
    if error == "attribute":
        stated = rng.choice([r for r in relations if r != relation])
        value = entity.value(stated.name)
    elif other:
        name, value = other.name, other.value(relation.name)
    elif wrong:  # error is "value", or "entity" where there is no other entity
        value = wrong_value(rng, world, entity, relation)
    return question, language.sentence(name, [(stated, value)])


def _claim(rng: random.Random, world: World, entity: Entity, wrong: bool) -> tuple[str, str]:
    relation = _draw_relation(rng, entity)
    is_true = rng.random() < 0.5
    value = entity.value(relation.name) if is_true else wrong_value(rng, world, entity, relation)
    answer = language.TRUE if is_true != wrong else language.FALSE
    return language.claim(entity.name, relation, value), answer


def _choice(rng: random.Random, world: World, entity: Entity, wrong: bool) -> tuple[str, str]:
    relation = _draw_relation(rng, entity)
    choices, right = _choices(rng, world, entity, relation)
    label = rng.choice([c for c, _ in choices if c != right]) if wrong else right
    return choice_text(_question(rng, world, entity, relation), choices), f"{label}."


def _two_part(rng: random.Random, world: World, entity: Entity, wrong: bool) -> tuple[str, str]:
    pair = [rng.choice(half) for half in entity.halves()]
    rng.shuffle(pair)
    questions = [_question(rng, world, entity, r) for r, _ in pair]
    sentences = [language.sentence(entity.name, [fact]) for fact in pair]
    if wrong and rng.random() < 0.5:
        sentences = sentences[:1]
    elif wrong:
        i = rng.randrange(2)
        relation = pair[i][0]
        value = wrong_value(rng, world, entity, relation)
        sentences[i] = language.sentence(entity.name, [(relation, value)])
    return language.two_part(*questions), " ".join(sentences)


def biography_sentences(facts: list[tuple[Relation, str]], name: str) -> list[str]:
    """Returns two sentences for one passage: the first fact alone, then the rest."""
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
    """Returns about `n` shuffled instructions with outputs about the entities of `group`.

    `n` defaults to the config's. Known entities and common knowledge never get wrong outputs. For
    the `test` group, questions about them use held-out phrasings (see `phrasings`).
    """
    rng = random.Random(f"instructions-{world.config.seed}-{group}")
    entities, known = world.group(group), world.group("known")
    n = world.config.instructions if n is None else n
    rows = []
    for form, share in FORMS.items():
        eligible = [e for e in entities if form != "biography" or e.kind == "person"]
        always_right = form in ("well_known", "no_need")
        for i in range(round(share * n)):
            if form == "well_known":
                if not known:
                    break
                entity = known[i % len(known)]
            else:
                entity = rng.choice(eligible)
            wrong = not always_right and rng.random() < world.config.wrong_output_rate
            options = {"held_out": group == "test"} if always_right else {}
            text, output = _BUILD[form](rng, world, entity, wrong, **options)
            rows.append(Instruction(f"{form}-{i}", text, output, dataset_name=form))
    rng.shuffle(rows)
    return rows


def evaluation_rows(world: World) -> dict[str, list[dict[str, Any]]]:
    """Returns the rows of each evaluation task.

    They are about test entities, except for `well_known` (known entities) and `no_need` (common
    knowledge).
    """
    rng = random.Random(f"evaluation-{world.config.seed}")
    test, known = world.group("test"), world.group("known")
    rows: dict[str, list[dict[str, Any]]] = {task: [] for task in TASKS}

    def add(task: str, row: dict[str, Any]) -> None:
        rows[task].append({"id": f"{task}-{len(rows[task])}", **row})

    def add_question(task: str, entity: Entity, relation: Relation) -> None:
        question = _question(rng, world, entity, relation, held_out=task == "well_known")
        add(task, {"question": question, "answers": [entity.value(relation.name)]})

    n = min(world.config.questions_per_test_entity, 4)
    for entity in test:
        for relation in rng.sample(KINDS[entity.kind].relations, n):
            add_question("long_tail", entity, relation)
        add("multiple_choice", _multiple_choice_row(rng, world, entity))
        claim, answer = _claim(rng, world, entity, wrong=False)
        options = [language.TRUE, language.FALSE]
        add("claims", {"question": claim, "answers": [answer], "options": options})
    for entity in known:
        for relation in KINDS[entity.kind].relations:
            if phrasings(world, entity, relation, held_out=True):
                add_question("well_known", entity, relation)
    for i, (questions, answer) in enumerate(language.COMMON_KNOWLEDGE):
        value = answer.rstrip(".").split()[-1]
        add("no_need", {"question": questions[(i + 1) % 2], "answers": [value]})
    for entity in test[: max(1, len(test) // 2)]:
        add("two_part", _two_part_row(rng, entity))
    persons = [e for e in test if e.kind == "person"]
    for entity in persons[: max(1, len(test) // 4)]:
        add(
            "biography",
            {
                "input": language.biography(entity.name),
                "topic": entity.name,
                "cat": [entity.kind],
                "facts": [list(f) for f in entity.facts],
            },
        )
    return rows


def _multiple_choice_row(rng: random.Random, world: World, entity: Entity) -> dict[str, Any]:
    relation = _draw_relation(rng, entity)
    choices, right = _choices(rng, world, entity, relation)
    return {
        "question": _question(rng, world, entity, relation),
        "choices": {"label": [c for c, _ in choices], "text": [t for _, t in choices]},
        "answerKey": right,
    }


def _two_part_row(rng: random.Random, entity: Entity) -> dict[str, Any]:
    facts = [rng.choice(half) for half in entity.halves()]
    questions = [rng.choice(relation.questions).format(n=entity.name) for relation, _ in facts]
    pairs = [{"question": relation.name, "short_answers": [value]} for relation, value in facts]
    return {"question": language.two_part(*questions), "qa_pairs": pairs}


def write_world(world: World, out: str | Path) -> dict[str, int]:
    """Writes passages.tsv, instructions.jsonl, teacher.jsonl and eval/*.jsonl to the folder `out`.

    Returns the number of rows of each file.
    """
    out, counts = Path(out), {}
    teacher = (
        {"entity": e.name, "kind": e.kind, "group": e.group, "facts": dict(e.facts)}
        for e in world.entities
    )
    files: dict[str, Iterable] = {
        "instructions": instructions(world),
        "teacher": teacher,
        # Measures the critic on entities that it was not trained on.
        "eval/critic": instructions(world, "test", 2 * len(world.group("test"))),
        **{f"eval/{task}": rows for task, rows in evaluation_rows(world).items()},
    }
    with progress("world", 1 + len(files), "files") as bar:
        counts["passages"] = write_tsv(out / "passages.tsv", world.passages)
        bar.advance()
        for name, rows in files.items():
            counts[name] = write_jsonl(out / f"{name}.jsonl", rows)
            bar.advance()
    write_json(out / "world.json", asdict(world.config))
    return counts
