"""What the generator's base model knows: its answers without passages, and likelihoods of outputs.

The prompts are the generator's own (text/prompts.py): a base without the passage markup reads it as
text. Axis letters: B rows, T positions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from selfrag_jax.checkpoints.loading import LoadedModel
from selfrag_jax.critic.needs import NeedsConfig
from selfrag_jax.engine.engine import place_params
from selfrag_jax.engine.greedy import generate_greedily, text_of
from selfrag_jax.engine.shapes import bucket, padded
from selfrag_jax.models.llama import Model
from selfrag_jax.models.params import Params
from selfrag_jax.records import Instruction, Passage
from selfrag_jax.text import prompts
from selfrag_jax.text.tokenizer import NEWLINE, Control, Part

_TOKEN_CHARACTERS = 32  # more than tokens have on average, in any text

Row = tuple[list[int], list[int]]  # the tokens before an output, and those of the output

# A base model that was not taught to stop often continues with another heading.
_END_OF_ANSWER = re.compile(r"\n\s*\n|### ")


class SelfModel:
    """The generator's base. Answers without passages, and tells how likely outputs are."""

    def __init__(self, loaded: LoadedModel, config: NeedsConfig):
        self.loaded, self.config = loaded, config
        self.max_length = min(config.max_length, loaded.model.config.max_length)
        self._placed: Params | None = None  # as generating needs them
        self._stacked: Params | None = None  # as likelihoods need them
        self._forward = jax.jit(partial(mean_log_likelihoods, loaded.model, config.length_bucket))

    def num_tokens(self, text: str) -> int:
        return len(self.loaded.tokenizer.encode(text))

    # ---- answers -----------------------------------------------------------------------------
    def answer(
        self, rows: Sequence[Instruction], demonstrations: Sequence[Sequence[Instruction]]
    ) -> list[tuple[str, float]]:
        """Returns the greedy answer of each row and its probability (mean over its tokens).

        An answer ends at the end of text, at an empty line, or at the next heading.
        """
        c, tokenizer = self.config, self.loaded.tokenizer
        if self._placed is None:
            self._placed, self._stacked = place_params(self.loaded.model, self.loaded.params), None
        ids = [self._question(r, d) for r, d in zip(rows, demonstrations, strict=True)]
        found: list[tuple[str, float]] = [("", 0.0)] * len(rows)
        for i, segment in generate_greedily(
            self.loaded.model,
            self._placed,
            tokenizer,
            ids,
            c.max_new_tokens,
            c.batch,
            c.length_bucket,
        ):
            text = _END_OF_ANSWER.split(text_of(segment, tokenizer), maxsplit=1)[0].strip()
            found[i] = (text, segment.mean_probability())
        return found

    def _question(self, row: Instruction, demonstrations: Sequence[Instruction]) -> list[int]:
        """The prompt, with as many demonstrations in front as fit."""
        room = self.max_length - self.config.max_new_tokens
        question = prompts.instruction(row.instruction, row.input)
        shown = list(demonstrations)
        while shown:
            parts: list[Part] = []
            for d in shown:
                parts += [*prompts.instruction(d.instruction, d.input), d.output]
                parts += [Control(NEWLINE), Control(NEWLINE)]
            ids = self._with_bos([*parts, *question])
            if len(ids) <= room:
                return ids
            shown.pop()
        return _keep_end(self._with_bos(question), room)

    def _with_bos(self, parts: Sequence[Part]) -> list[int]:
        tokenizer = self.loaded.tokenizer
        return [tokenizer.bos_id, *tokenizer.encode(parts)]

    # ---- likelihoods -------------------------------------------------------------------------
    def gains(self, rows: Sequence[Instruction]) -> list[float]:
        """Returns what the best passage adds to each output's mean log-likelihood per token."""
        passages = [[None, *r.ctxs[: self.config.passages]] for r in rows]
        pairs = [(r, p) for r, of_row in zip(rows, passages, strict=True) for p in of_row]
        values = iter(self.log_likelihoods(pairs))
        per_row = [[next(values) for _ in of_row] for of_row in passages]
        return [max(with_passage) - without for without, *with_passage in per_row]

    def log_likelihoods(self, pairs: Sequence[tuple[Instruction, Passage | None]]) -> list[float]:
        """Returns the mean log-likelihood per token of outputs, after a passage or without one."""
        if self._stacked is None:
            params = self.loaded.model.rounded(self.loaded.params)
            self._stacked, self._placed = jax.device_put(params), None
        rows = [self._with_output(*pair) for pair in pairs]
        by_length = sorted(range(len(rows)), key=lambda i: sum(map(len, rows[i])))
        out, batch = [0.0] * len(rows), self.config.batch
        for start in range(0, len(rows), batch):
            chosen = by_length[start : start + batch]
            tokens, valid, is_output = self._pad([rows[i] for i in chosen])
            values = np.asarray(self._forward(self._stacked, tokens, valid, is_output))
            for i, value in zip(chosen, values, strict=False):  # the batch may have unused rows
                out[i] = float(value)
        return out

    def _with_output(
        self, row: Instruction, passage: Passage | None
    ) -> tuple[list[int], list[int]]:
        """The tokens before the output, and those of the output.

        An output may take half of the length. The instruction is cut the same with and without a
        passage; a passage is cut to what is left.
        """
        tokenizer = self.loaded.tokenizer
        most = _TOKEN_CHARACTERS * self.max_length  # an output of megabytes is not tokenized
        output = tokenizer.encode(row.output[:most])[: self.max_length // 2]
        room = self.max_length - len(output)
        front = self._with_bos(prompts.instruction(row.instruction, row.input))
        front = _keep_end(front, room)
        if passage is not None and room > len(front) + 1:
            evidence, left = tokenizer.encode(prompts.passage(passage)), room - len(front)
            if len(evidence) > left:
                evidence = [*evidence[: left - 1], evidence[-1]]  # still closed
            front += evidence
        return front, output

    def _pad(
        self, rows: Sequence[Row]
    ) -> tuple[Int[np.ndarray, "B T"], Bool[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
        """(tokens, which are no padding, which are the output) of a full batch."""
        longest = max(len(front) + len(output) for front, output in rows)
        least = self.config.length_bucket
        shape = (self.config.batch, max(bucket(longest, least), least))
        whole = [[*front, *output] for front, output in rows]
        tokens, valid = padded(whole, shape, self.loaded.tokenizer.pad_id)
        is_output = valid.copy()
        for i, (front, _) in enumerate(rows):
            is_output[i, : len(front)] = False
        return tokens, valid, is_output


def mean_log_likelihoods(
    model: Model,
    chunk: int,
    params: Params,
    tokens: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    is_output: Bool[Array, "B T"],
) -> Float[Array, " B"]:
    """Returns the mean log-likelihood of each row's output tokens; 0 for a row without any.

    chunk: number of positions whose logits exist at a time; it divides T.
    """
    positions = jnp.maximum(jnp.cumsum(valid, 1) - 1, 0)
    hidden, _ = model.hidden(params, tokens, positions, valid.astype(jnp.int32))
    # Position t predicts token t + 1; the last one predicts nothing.
    targets = jnp.roll(tokens, -1, axis=1)
    weights = jnp.roll(is_output, -1, axis=1).at[:, -1].set(False).astype(jnp.float32)

    def split(x):
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    def of_chunk(xs):
        hidden, targets, weights = xs
        log_probs = jax.nn.log_softmax(model.logits(params, hidden))
        chosen = jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
        return (chosen * weights).sum(1)

    sums = jax.lax.map(of_chunk, (split(hidden), split(targets), split(weights))).sum(0)
    return sums / jnp.maximum(weights.sum(1), 1.0)


def _keep_end(ids: list[int], room: int) -> list[int]:
    """Cuts a prompt to `room` tokens: its beginning of text, and its end with the heading."""
    return ids if len(ids) <= room else [ids[0], *ids[len(ids) - room + 1 :]]
