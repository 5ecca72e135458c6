"""Demonstrations for an untrained base: training questions of a task, with right answers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from selfrag_jax.commands.worlds import WorldKind, WorldTruth, is_useful
from selfrag_jax.errors import UserError
from selfrag_jax.records import Instruction, Question
from selfrag_jax.text import plain_prompts
from selfrag_jax.text.plain_prompts import Demonstration, PlainPrompt


@dataclass(frozen=True)
class FewShotConfig:
    seed: int
    shots: int  # demonstrations before each question

    def __post_init__(self):
        if self.shots < 1:
            raise UserError(f"shots={self.shots}: must be at least 1")


def few_shot_prompt(
    task: str,
    rows: Sequence[Instruction],
    kind: WorldKind,
    truth: WorldTruth,
    config: FewShotConfig,
) -> PlainPrompt:
    """Returns the prompt of a task: `shots` training rows of it, drawn by the seed.

    rows: with passages. Their outputs may be wrong; those shown are right by the world's truth, and
    unlike each other, as a small base repeats what all of them say. Each is shown with the passage
    that supports it or, in tasks of kind.right_rows, with its first one. Raises UserError if no
    output of the task is right.
    """
    found = [shown for r in rows if r.dataset_name == task if (shown := _shown(r, kind, truth))]
    if not found:
        raise UserError(f"few_shot: no training row with a right output to show for {task!r}")
    rng = random.Random(f"few-shot-{config.seed}-{task}")
    drawn = _unlike(rng.sample(found, len(found)), config.shots)
    return replace(plain_prompts.FEW_SHOT, demonstrations=tuple(drawn))


def _unlike(shown: list[Demonstration], n: int) -> list[Demonstration]:
    """The first, then again and again the one that shares the fewest words with those chosen."""
    words = [set(f"{d.question.question} {d.answer}".lower().split()) for d in shown]
    chosen = [0]
    while len(chosen) < min(n, len(shown)):
        seen = set().union(*(words[i] for i in chosen))
        rest = [i for i in range(len(shown)) if i not in chosen]
        chosen.append(min(rest, key=lambda i: (len(words[i] & seen) / len(words[i]), i)))
    return [shown[i] for i in chosen]


def _shown(row: Instruction, kind: WorldKind, truth: WorldTruth) -> Demonstration | None:
    """The row as a demonstration; None if its output is wrong."""
    if is_right := kind.right_rows.get(row.dataset_name):
        passages = row.ctxs[:1] if is_right(truth, row) else None
    elif not is_useful(truth, row):  # a passage may support what does not answer
        return None
    else:
        instruction = row.full_instruction
        good = (p for p in row.ctxs if truth.supports(instruction, p, row.output))
        passages = next(((p,) for p in good), None)
    if passages is None:
        return None
    q = Question(row.id, row.instruction, input=row.input)
    return Demonstration(q, passages, row.output.strip())
