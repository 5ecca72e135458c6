"""Demonstrations for an untrained base: training questions of a task, with right answers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from selfrag_jax.commands.worlds import Truth
from selfrag_jax.errors import UserError
from selfrag_jax.records import Instruction, Passage, Question
from selfrag_jax.text import plain_prompts, reflection
from selfrag_jax.text.plain_prompts import Demonstration, PlainPrompt
from selfrag_jax.text.prompts import CritiqueQuery


@dataclass(frozen=True)
class FewShotConfig:
    seed: int
    shots: int  # demonstrations before each question

    def __post_init__(self):
        if self.shots < 1:
            raise UserError(f"shots={self.shots}: must be at least 1")


def few_shot_prompt(
    task: str, rows: Sequence[Instruction], truth: Truth, config: FewShotConfig
) -> PlainPrompt:
    """Returns the prompt of a task: `shots` training rows of it, drawn by the seed.

    rows: with passages. Their outputs may be wrong; those shown are right by the world's truth, and
    supported by the passage shown, but where no row of the task is. Without rows of the task, those
    of all tasks serve. Raises UserError if no output of `rows` is right.
    """
    found = _useful([r for r in rows if r.dataset_name == task], truth) or _useful(rows, truth)
    if not found:
        raise UserError(f"few_shot: no training row with a right output to show for {task!r}")
    rng = random.Random(f"few-shot-{config.seed}-{task}")
    drawn = rng.sample(found, min(config.shots, len(found)))
    return replace(plain_prompts.FEW_SHOT, demonstrations=tuple(drawn))


def _useful(rows: Sequence[Instruction], truth: Truth) -> list[Demonstration]:
    supported: list[Demonstration] = []
    others: list[Demonstration] = []
    for row in rows:
        query = CritiqueQuery("isuse", row.full_instruction, output=row.output)
        if truth.judge(query) != reflection.ISUSE[-1]:
            continue
        evidence = _supporting(row, truth)
        q = Question(row.id, row.instruction, input=row.input)
        shown = Demonstration(q, evidence or row.ctxs[:1], row.output.strip())
        (supported if evidence else others).append(shown)
    return supported or others


def _supporting(row: Instruction, truth: Truth) -> tuple[Passage, ...]:
    """The first of the row's passages that supports its output; () if none does."""
    instruction = row.full_instruction
    good = (p for p in row.ctxs if truth.supports(instruction, p, row.output))
    return tuple(p for p in [next(good, None)] if p is not None)
