"""Baselines without reflection tokens: a fine-tuned model, with or without passages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from selfrag_jax.checkpoints.loading import LoadedModel
from selfrag_jax.engine.engine import place_params
from selfrag_jax.engine.greedy import generate_greedily, text_of
from selfrag_jax.records import Passage, Question
from selfrag_jax.text import prompts


@dataclass(frozen=True)
class PlainConfig:
    batch: int  # questions answered at once
    max_length: int  # maximum number of tokens in a prompt with its passages
    max_new_tokens: int
    length_bucket: int  # see SearchConfig


def answer_plain(
    loaded: LoadedModel,
    questions: Sequence[Question],
    passages: Sequence[Sequence[Passage]],
    config: PlainConfig,
    on_answer: Callable[[], None] | None = None,
) -> list[dict[str, Any]]:
    """Greedy answers, each with the question's passages (or none) before the answer.

    Returns rows of the `answer` format, with `p_sequence`: exp of the mean token log-probability.
    """
    tokenizer = loaded.tokenizer
    ids = [_prompt(loaded, q, p, config) for q, p in zip(questions, passages, strict=True)]
    continuations = generate_greedily(
        loaded.model,
        place_params(loaded.model, loaded.params),
        tokenizer,
        ids,
        config.max_new_tokens,
        config.batch,
        config.length_bucket,
    )
    rows: dict[int, dict[str, Any]] = {}
    for i, segment in continuations:
        q = questions[i]
        rows[i] = {
            "id": q.id,
            "question": q.question,
            "task": q.task,
            "answer": text_of(segment, tokenizer),
            "segments": [],
            "citations": [],
            "passages": [],
            "retrieved": bool(passages[i]),
            "p_sequence": segment.mean_probability(),
            "num_tokens": int(segment.length),
            "num_answer_tokens": int(segment.length),
        }
        if on_answer:
            on_answer()
    return [rows[i] for i in range(len(questions))]


def _prompt(
    loaded: LoadedModel, q: Question, passages: Sequence[Passage], config: PlainConfig
) -> list[int]:
    """The prompt and as many of its passages, in order, as fit."""
    t = loaded.tokenizer
    ids = [t.bos_id, *t.encode(prompts.question_prompt(q))]
    for p in passages:
        more = t.encode(prompts.passage(p))
        if len(ids) + len(more) > config.max_length:
            break
        ids += more
    return ids


def best_of(per_passage: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The most probable of a question's answers, one per passage: all one has without critiques.

    Its `num_tokens` counts those of all of them.
    """
    best = []
    for rows in zip(*per_passage, strict=True):
        num_tokens = sum(row["num_tokens"] for row in rows)
        best.append(max(rows, key=lambda r: r["p_sequence"]) | {"num_tokens": num_tokens})
    return best
