"""A world of real facts: its files, its tasks, and the truth about it.

This is what the commands import. README.md describes the files.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from itertools import cycle
from pathlib import Path
from typing import Any

from selfrag_jax.facts import everyday, language
from selfrag_jax.facts.corpus import FactsWorld, Subject, build_world
from selfrag_jax.facts.questions import Drawn, QuestionDrawer, instructions
from selfrag_jax.facts.settings import LONG_FORM, TASKS, FactsConfig
from selfrag_jax.facts.table import to_row
from selfrag_jax.facts.truth import WORLD, Truth, passage_key, read_truth
from selfrag_jax.files import write_json
from selfrag_jax.progress import progress
from selfrag_jax.records import write_jsonl
from selfrag_jax.retrieval.corpus import write_tsv

__all__ = ["LONG_FORM", "TASKS", "FactsConfig", "Truth", "read_truth", "write_world"]

Row = dict[str, Any]
ATTEMPTS = 20  # draws per question before a file is left shorter: the entities ran out of questions


def write_world(config: FactsConfig, out: Path) -> dict[str, int]:
    """Writes passages.tsv, instructions.jsonl, teacher.jsonl, eval/*.jsonl and world.json to `out`.

    Returns the number of rows of each file.
    """
    out, world = Path(out), build_world(config)
    files: dict[str, Iterable[Any]] = {
        "instructions": instructions(world, "train", config.instructions),
        "teacher": teacher_rows(world),
        # Measures the critic on entities and phrasings that it was not trained on.
        "eval/critic": instructions(world, "test", config.critic_questions),
        **{f"eval/{task}": rows for task, rows in evaluation_rows(world).items()},
    }
    counts = {}
    with progress("world", 1 + len(files), "files") as bar:
        counts["passages"] = write_tsv(out / "passages.tsv", (p.passage for p in world.passages))
        bar.advance()
        for name, rows in files.items():
            counts[name] = write_jsonl(out / f"{name}.jsonl", rows)
            bar.advance()
    write_json(out / "world.json", asdict(config))
    return counts


def teacher_rows(world: FactsWorld) -> Iterator[Row]:
    """Yields what the truth needs: the entities, then what each passage states."""
    for s in world.subjects:
        row = {"world": WORLD, **to_row(s.entity), "decile": s.entity.decile, "group": s.group}
        yield row | {"is_known": s.is_known, "withheld": list(s.withheld), "absent": s.is_absent}
    for p in world.passages:
        row = {"world": WORLD, "passage": p.passage.id, "key": passage_key(p.passage)}
        yield row | {"about": list(p.about), "states": [list(pair) for pair in p.states]}


def evaluation_rows(world: FactsWorld) -> dict[str, list[Row]]:
    """Returns the rows of each evaluation task, about test entities in the test's phrasings."""
    rng = random.Random(f"evaluation-{world.config.seed}")
    drawer, config = QuestionDrawer(world, "test", rng), world.config
    makers: dict[str, tuple[list[Subject], Callable[[Subject], Row]]] = {
        "facts": (drawer.answerable, lambda s: _fact_row(drawer.fact(s, False))),
        "unanswerable": (drawer.unanswerable, lambda s: _refused_row(drawer.unanswered(s, False))),
        "claims": (drawer.answerable, lambda s: _claim_row(drawer.claim(s, False))),
        "multiple_choice": (drawer.answerable, lambda s: _choice_row(drawer.choice(s, False))),
        "description": (drawer.described, lambda s: _described_row(drawer.description(s, False))),
        "comparison": (
            drawer.answerable if drawer.pairs else [],
            lambda _: _compared_row(drawer.comparison(False)),
        ),
        "no_need": (drawer.subjects, lambda _: _everyday_row(everyday.draw(rng, True))),
    }
    asked = dict.fromkeys(TASKS, config.test_questions) | {"facts": config.fact_questions}
    return {task: _rows(rng, task, *makers[task], asked[task]) for task in TASKS}


def _rows(
    rng: random.Random, task: str, subjects: list[Subject], make: Callable[[Subject], Row], n: int
) -> list[Row]:
    """Returns up to n different questions, about every entity once before any is asked again."""
    rows: list[Row] = []
    seen: set[str] = set()
    order = cycle(rng.sample(subjects, len(subjects)))
    for _ in range(ATTEMPTS * n if subjects else 0):
        if len(rows) == n:
            break
        row = make(next(order))
        text = row.get("question") or row["input"]
        if text not in seen:
            seen.add(text)
            rows.append({"id": f"{task}-{len(rows)}", **row})
    return rows


def _about(drawn: Drawn) -> Row:
    e = drawn.subjects[0].entity
    named = {"relation": drawn.relation.name, "entity": e.name}
    return named | {"popularity": e.popularity, "decile": e.decile}


def _fact_row(drawn: Drawn) -> Row:
    answers = drawn.subjects[0].entity.values(drawn.relation.attribute)
    return {"question": drawn.question, "answers": list(answers), **_about(drawn)}


def _refused_row(drawn: Drawn) -> Row:
    return {"question": drawn.question, "answers": list(language.REFUSED), **_about(drawn)}


def _claim_row(drawn: Drawn) -> Row:
    options = [language.TRUE, language.FALSE]
    row: Row = {"question": drawn.question, "answers": [drawn.right], "options": options}
    return row | _about(drawn)


def _choice_row(drawn: Drawn) -> Row:
    labels, texts = zip(*drawn.choices, strict=True)
    question = drawn.question.split(f" {labels[0]}: {texts[0]}")[0]
    choices = {"label": list(labels), "text": list(texts)}
    return {"question": question, "choices": choices, "answerKey": drawn.right, **_about(drawn)}


def _compared_row(drawn: Drawn) -> Row:
    values = [list(s.entity.values(drawn.relation.attribute)) for s in drawn.subjects]
    pairs = [
        {"question": s.entity.name, "short_answers": v}
        for s, v in zip(drawn.subjects, values, strict=True)
    ]
    pairs.append({"question": "conclusion", "short_answers": [drawn.right]})
    return {"question": drawn.question, "qa_pairs": pairs}


def _described_row(drawn: Drawn) -> Row:
    s = drawn.subjects[0]
    facts = [[f"{s.entity.kind}_{a}", s.entity.value(a)] for a in s.told]
    row: Row = {"input": drawn.question, "topic": s.entity.name, "cat": [s.entity.kind]}
    return row | {"facts": facts, "popularity": s.entity.popularity, "decile": s.entity.decile}


def _everyday_row(row: everyday.EverydayRow) -> Row:
    return {"question": row.question, "answers": list(row.answers)}
