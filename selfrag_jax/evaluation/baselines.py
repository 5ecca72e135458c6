"""Baselines without reflection tokens: a fine-tuned model alone, or with passages in its prompt (standard RAG)."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from selfrag_jax.checkpoints.loading import LoadedModel
from selfrag_jax.engine.engine import Engine, drive, on_device
from selfrag_jax.engine.requests import Generate, Read
from selfrag_jax.engine.segments import Segment, TokenRules
from selfrag_jax.records import Passage, Question
from selfrag_jax.text import prompts
from selfrag_jax.text.prompts import question_text


@dataclass(frozen=True)
class PlainConfig:
    batch: int
    max_length: int  # tokens of the prompt with its passages
    max_new_tokens: int
    length_bucket: int


def answer_plain(
    loaded: LoadedModel,
    questions: Sequence[Question],
    passages: Sequence[Sequence[Passage]],
    config: PlainConfig,
    on_answer: Callable[[], None] | None = None,
) -> list[dict[str, Any]]:
    """Greedy answers to questions, each with its passages in front of the answer (none: from memory alone).

    Returns rows of the `answer` format, with `p_sequence`, the exponential of the mean token log-probability.
    """
    tokenizer = loaded.tokenizer
    rules = TokenRules(tokenizer.eos_id, tokenizer.pad_id, None)
    ids = [
        _prompt(loaded, q, p, config.max_length) for q, p in zip(questions, passages, strict=True)
    ]
    engine = Engine(
        loaded.model, on_device(loaded.model, loaded.params), rules, config.batch, 1, 1, config.max_new_tokens,
        config.length_bucket, max(map(len, ids), default=1), grows=False,
    )  # fmt: skip
    rows: dict[int, dict[str, Any]] = {}
    for i, out in drive(
        engine,
        ((i, _continue(row, config.max_new_tokens)) for i, row in enumerate(ids)),
        lambda _: [],
    ):
        if isinstance(out, Exception):
            raise out
        text = tokenizer.decode([t for t in out.said() if t != tokenizer.eos_id]).strip()
        words, q = int(out.text_tokens), questions[i]
        rows[i] = {
            "id": q.id, "question": q.question, "task": q.task, "answer": text, "segments": [], "citations": [],
            "passages": [], "retrieved": bool(passages[i]), "p_sequence": float(np.exp(out.log_prob / words)) if words else 0.0,
        }  # fmt: skip
        if on_answer:
            on_answer()
    return [rows[i] for i in range(len(questions))]


def _continue(prompt: list[int], new: int) -> Generator[Any, Any, Segment]:
    """What the model says after a prompt."""
    yield Read([prompt[:-1]], [0])
    out = yield Generate([[[prompt[-1]]]], [len(prompt) - 1], new)
    return out.at((0, 0))


def _prompt(
    loaded: LoadedModel, q: Question, passages: Sequence[Passage], max_length: int
) -> list[int]:
    """The prompt and its passages; the last passages are left out where they don't fit."""
    t = loaded.tokenizer
    ids = [t.bos_id, *t.encode(prompts.instruction(question_text(q)))]
    for p in passages:
        more = t.encode(prompts.passage(p))
        if len(ids) + len(more) > max_length:
            break
        ids += more
    return ids


def best_of(per_passage: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Of the answers to a question, one per passage, the most probable: what is left without critiques."""
    return [max(rows, key=lambda r: r["p_sequence"]) for rows in zip(*per_passage, strict=True)]
