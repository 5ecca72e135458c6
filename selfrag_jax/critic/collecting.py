"""Critic data from a teacher: critiques asked about instructions and their retrieved passages (paper, Section 3.2.1).

The rule teacher judges by the synthetic world's truth and errs at a stated rate; a language-model teacher answers the
same queries over an API.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from selfrag_jax import artifacts
from selfrag_jax.progress import progress
from selfrag_jax.records import BadInput, CriticExample, Instruction, instruction_from, read_records, read_rows, write_jsonl
from selfrag_jax.text import reflection
from selfrag_jax.text.prompts import CritiqueQuery
from selfrag_jax.text.sentences import split


class Teacher(Protocol):
    def judge(self, query: CritiqueQuery, row_id: str) -> str:
        """The reflection token of the query's group; row_id: the instruction that it is asked about."""
        ...


class RuleTeacher:
    """Knows the world's truth; a share of its labels is another token of the group (see `judge`)."""

    def __init__(self, truth_file: str | Path, error_rate: float, seed: int):
        rows = list(read_rows(truth_file))
        if not rows:
            raise BadInput(f"{truth_file}: holds no entities")
        for where, row in rows:
            if "entity" not in row or "group" not in row:
                raise BadInput(f"{where}: expected the fields entity and group, as `selfrag world` writes them")
        self.known = frozenset(row["entity"] for _, row in rows if row["group"] == "known")
        self.error_rate, self.seed = error_rate, seed

    def truth(self, query: CritiqueQuery) -> str:
        from selfrag_jax.world import truth

        return truth.judge(query, self.known)

    def judge(self, query: CritiqueQuery, row_id: str) -> str:
        """The teacher's label. Whether it errs depends on the query and the row that it is asked for, and on nothing that
        was asked before: a question that occurs in many rows is not wrong in all of them."""
        label = self.truth(query)
        rng = random.Random(f"{self.seed}-{row_id}-{query}")
        if rng.random() < self.error_rate:
            return rng.choice([t for t in reflection.GROUPS[query.group] if t != label])
        return label


@dataclass(frozen=True)
class CollectConfig:
    seed: int
    teacher: str  # "rule"
    teacher_error_rate: float
    share: tuple[tuple[str, float], ...]  # of the instructions that are asked about, per critique group
    passages: int  # of each instruction's retrieved ones

    def __post_init__(self):
        if self.teacher != "rule":
            raise BadInput(f"--teacher={self.teacher!r}: unknown; available: rule")


def queries(row: Instruction, config: CollectConfig, rng: random.Random) -> Iterator[CritiqueQuery]:
    """The critiques that are asked about one instruction."""
    share = dict(config.share)
    text = row.asked
    sentences = split(row.output) or [""]
    if rng.random() < share["retrieve"]:
        yield CritiqueQuery("retrieve", text)
        if row.ctxs:
            for k in range(1, len(sentences)):
                yield CritiqueQuery("retrieve", text, " ".join(sentences[:k]), rng.choice(row.ctxs[:2]))
    # The first two are mostly about the right entity, the others look like it.
    passages = list(row.ctxs[: config.passages])
    for passage in passages:
        if rng.random() < share["isrel"]:
            yield CritiqueQuery("isrel", text, evidence=passage)
    for passage in passages[:2] + ([rng.choice(passages[2:])] if len(passages) > 2 else []):
        if rng.random() < share["issup"]:
            yield CritiqueQuery("issup", text, evidence=passage, output=rng.choice(sentences))
    if rng.random() < share["isuse"]:
        yield CritiqueQuery("isuse", text, output=row.output)


def collect(input_path: str | Path, truth: str | Path, config: CollectConfig, out: str | Path, limit: int | None = None) -> int:
    """Labels critiques of the input's rows and writes critic data; returns how many. Finished already, it does nothing.

    input_path: instructions with `ctxs`, as `selfrag retrieve` writes them; truth: the world's teacher.jsonl.
    """
    inputs = {"input": input_path, "truth": truth}
    if artifacts.is_finished(out, "collect", {**vars(config), "limit": limit}, inputs):
        return 0
    rows = read_records(input_path, instruction_from)[:limit]
    if not any(row.ctxs for row in rows):
        raise BadInput(f"{input_path}: no row has passages (ctxs); run `selfrag retrieve` on it first")
    teacher = RuleTeacher(truth, config.teacher_error_rate, config.seed)
    examples: list[CriticExample] = []
    with progress("collect", len(rows), "instructions") as bar:
        for row in rows:
            rng = random.Random(f"collect-{config.seed}-{row.id}")
            examples += [_example(q, teacher.judge(q, row.id)) for q in queries(row, config, rng)]
            bar.advance()
    n = write_jsonl(out, examples)
    artifacts.finish(out, "collect", {**vars(config), "limit": limit}, inputs, {"examples": n, **_counts(examples)})
    return n


def _example(q: CritiqueQuery, label: str) -> CriticExample:
    return CriticExample(q.group, q.instruction, label, q.preceding, q.evidence, q.output)


def _counts(examples: Sequence[CriticExample]) -> dict[str, int]:
    out: dict[str, int] = {}
    for e in examples:
        out[e.output] = out.get(e.output, 0) + 1
    return out
