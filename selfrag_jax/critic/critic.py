"""The critic's forward pass: critique queries in, distributions over reflection tokens out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from selfrag_jax.checkpoints import loading
from selfrag_jax.engine.segments import group_distribution
from selfrag_jax.text import prompts, reflection
from selfrag_jax.text.prompts import CritiqueQuery


@dataclass(frozen=True)
class CriticConfig:
    batch: int  # queries judged together
    length_bucket: int  # prompts are padded to a multiple of it
    brief: bool  # the prompt's wording; must match the critic's training data


class Critic:
    """A trained critic. `judge` returns distributions over the tokens of a query's group."""

    def __init__(self, loaded: loading.LoadedModel, config: CriticConfig):
        self.loaded, self.config = loaded, config
        self.params = jax.device_put(loaded.params)  # once, not on every call
        self.ids = loaded.tokenizer.reflection_ids()
        self._forward = jax.jit(partial(self._distributions, loaded.model, self.ids))

    @staticmethod
    def _distributions(
        model,
        ids: reflection.ReflectionIds,
        params,
        tokens: Int[Array, "B T"],
        valid: Bool[Array, "B T"],
    ) -> dict[str, Float[Array, "B n"]]:
        """For each group, the distribution over its tokens after the last valid position."""
        positions = jnp.maximum(jnp.cumsum(valid, 1) - 1, 0)
        hidden, _ = model.hidden(params, tokens, positions, valid.astype(jnp.int32))
        last = jnp.take_along_axis(hidden, (valid.sum(1) - 1)[:, None, None], axis=1)[:, 0]
        logits = model.logits(params, last)
        return {group: group_distribution(logits, ids.group(group)) for group in reflection.GROUPS}

    def judge(self, queries: Sequence[CritiqueQuery]) -> list[Float[np.ndarray, " n"]]:
        """Returns, for each query, the distribution over its group in reflection.GROUPS' order."""
        batch = self.config.batch
        prompt_ids = [self._encode(query) for query in queries]
        by_length = sorted(range(len(queries)), key=lambda i: len(prompt_ids[i]))
        out: list[np.ndarray] = [np.empty(0)] * len(queries)
        for start in range(0, len(queries), batch):
            chosen = by_length[start : start + batch]
            tokens, valid = self._pad([prompt_ids[i] for i in chosen])
            result = self._forward(self.params, tokens, valid)
            distributions = {group: np.asarray(p) for group, p in result.items()}
            for row, i in enumerate(chosen):
                out[i] = distributions[queries[i].group][row]
        return out

    def _encode(self, query: CritiqueQuery) -> list[int]:
        tokenizer, parts = self.loaded.tokenizer, prompts.critique(query, self.config.brief)
        return [tokenizer.bos_id, *tokenizer.encode(parts, before_control=True)]

    def _pad(
        self, rows: Sequence[list[int]]
    ) -> tuple[Int[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
        """Pads prompts to a full batch and to a multiple of the length bucket."""
        bucket = self.config.length_bucket
        length = -(-max(map(len, rows)) // bucket) * bucket
        shape = (self.config.batch, length)
        tokens = np.full(shape, self.loaded.tokenizer.pad_id, np.int32)
        valid = np.zeros(shape, bool)
        valid[:, 0] = True  # unused rows too: each needs a last position
        for row, ids in enumerate(rows):
            tokens[row, : len(ids)], valid[row, : len(ids)] = ids, True
        return tokens, valid
