"""Baselines without reflection tokens: a fine-tuned model, with or without passages."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

from selfrag_jax.checkpoints.loading import LoadedModel
from selfrag_jax.engine.engine import Engine, place_params, run_searches
from selfrag_jax.engine.requests import Generate, ReadTokens
from selfrag_jax.engine.segments import GeneratedSegments, TokenRules
from selfrag_jax.engine.shapes import Shapes
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
    rules = TokenRules(tokenizer.eos_id, tokenizer.pad_id, None)
    ids = [_prompt(loaded, q, p, config) for q, p in zip(questions, passages, strict=True)]
    shapes = Shapes(
        num_slots=config.batch,
        beam_width=1,
        num_passages=1,
        max_new_tokens=config.max_new_tokens,
        length_bucket=config.length_bucket,
        longest_prompt=max(map(len, ids), default=1),
        prefix_grows=False,
    )
    engine = Engine(loaded.model, place_params(loaded.model, loaded.params), rules, shapes)
    searches = ((i, _continue(p, config.max_new_tokens)) for i, p in enumerate(ids))
    rows: dict[int, dict[str, Any]] = {}
    for i, segment in run_searches(engine, searches, lambda _: []):
        if isinstance(segment, Exception):
            raise segment
        text = tokenizer.decode([t for t in segment.token_ids() if t != tokenizer.eos_id]).strip()
        q = questions[i]
        rows[i] = {
            "id": q.id,
            "question": q.question,
            "task": q.task,
            "answer": text,
            "segments": [],
            "citations": [],
            "passages": [],
            "retrieved": bool(passages[i]),
            "p_sequence": segment.mean_probability(),
        }
        if on_answer:
            on_answer()
    return [rows[i] for i in range(len(questions))]


def _continue(prompt: list[int], limit: int) -> Generator[Any, Any, GeneratedSegments]:
    """What the model generates after a prompt, as requests to the engine."""
    yield ReadTokens([prompt[:-1]], [0])
    segments = yield Generate([[[prompt[-1]]]], [len(prompt) - 1], limit)
    return segments.at((0, 0))


def _prompt(
    loaded: LoadedModel, q: Question, passages: Sequence[Passage], config: PlainConfig
) -> list[int]:
    """The prompt and as many of its passages, in order, as fit."""
    t = loaded.tokenizer
    ids = [t.bos_id, *t.encode(prompts.instruction(prompts.question_text(q)))]
    for p in passages:
        more = t.encode(prompts.passage(p))
        if len(ids) + len(more) > config.max_length:
            break
        ids += more
    return ids


def best_of(per_passage: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The most probable of a question's answers, one per passage: all one has without critiques."""
    return [max(rows, key=lambda r: r["p_sequence"]) for rows in zip(*per_passage, strict=True)]
