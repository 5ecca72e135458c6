"""Baselines without reflection tokens: a fine-tuned model alone, or with passages in its prompt (standard RAG)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from selfrag_jax import prompts
from selfrag_jax.decoding.answer import question_text
from selfrag_jax.decoding.segments import TokenRules, generate
from selfrag_jax.models.checkpoints import LoadedModel
from selfrag_jax.records import Passage, Question


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
    on_batch: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """Greedy answers to questions, each with its passages in front of the answer (none: from memory alone).

    Returns rows of the `answer` format, with `p_sequence`, the exponential of the mean token log-probability.
    """
    tokenizer = loaded.tokenizer
    rules = TokenRules(tokenizer.eos_id, tokenizer.pad_id, None)
    params = jax.device_put(loaded.params)  # once, not for every batch
    rows: list[dict[str, Any]] = []
    for at in range(0, len(questions), config.batch):
        chunk, given = questions[at : at + config.batch], passages[at : at + config.batch]
        ids = [_prompt(loaded, q, p, config.max_length) for q, p in zip(chunk, given, strict=True)]
        length = -(-max(map(len, ids)) // config.length_bucket) * config.length_bucket
        tokens = np.full((config.batch, length), tokenizer.pad_id, np.int32)
        valid = np.zeros((config.batch, length), bool)
        for i, row in enumerate(ids):
            tokens[i, : len(row)], valid[i, : len(row)] = row, True
        start = np.zeros(config.batch, np.int32)
        out, _ = generate(loaded.model, params, rules, None, start, tokens, valid, config.max_new_tokens)
        texts, lengths, words = np.asarray(out.tokens), np.asarray(out.length), np.asarray(out.text_tokens)
        p_sequence = np.where(words > 0, np.exp(np.asarray(out.log_prob) / np.maximum(words, 1)), 0.0)
        for i, (q, p) in enumerate(zip(chunk, given, strict=True)):
            text = tokenizer.decode([t for t in texts[i, : lengths[i]] if t != tokenizer.eos_id]).strip()
            rows.append(
                {
                    "id": q.id, "question": q.question, "task": q.task, "answer": text, "segments": [], "citations": [],
                    "passages": [], "retrieved": bool(p), "p_sequence": float(p_sequence[i]),
                }
            )  # fmt: skip
        if on_batch:
            on_batch(len(chunk))
    return rows


def _prompt(loaded: LoadedModel, q: Question, passages: Sequence[Passage], max_length: int) -> list[int]:
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
