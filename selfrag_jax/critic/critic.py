"""The critic's forward pass: critique queries in, distributions over reflection tokens out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from selfrag_jax.checkpoints import loading
from selfrag_jax.engine.segments import group_distribution
from selfrag_jax.text import prompts, reflection
from selfrag_jax.text.prompts import CritiqueQuery


@dataclass(frozen=True)
class CriticConfig:
    batch: int  # queries judged together
    length_bucket: int  # prompts are padded to a multiple of it
    brief: bool  # the prompts' wording, as the critic was trained


class Critic:
    """A trained critic: distributions over a group's tokens for critique queries."""

    def __init__(self, loaded: loading.LoadedModel, config: CriticConfig):
        self.loaded, self.config = loaded, config
        self.params = jax.device_put(loaded.params)  # once, not at every call
        self.ids = loaded.tokenizer.reflection_ids()
        self._forward = jax.jit(partial(self._logits, loaded.model, self.ids))

    @staticmethod
    def _logits(model, ids, params, tokens, valid):
        positions = jnp.maximum(jnp.cumsum(valid, 1) - 1, 0)
        hidden, _ = model.hidden(params, tokens, positions, valid.astype(jnp.int32))
        last = jnp.take_along_axis(hidden, (valid.sum(1) - 1)[:, None, None], axis=1)[:, 0]
        logits = model.logits(params, last)
        return {group: group_distribution(logits, ids.group(group)) for group in reflection.GROUPS}

    def judge(self, queries: Sequence[CritiqueQuery]) -> list[np.ndarray]:
        """For each query the distribution over its group's tokens, in the order of reflection.GROUPS."""
        tokenizer, c = self.loaded.tokenizer, self.config
        ids = [
            [tokenizer.bos_id, *tokenizer.encode(prompts.critique(q, c.brief), before_control=True)]
            for q in queries
        ]
        out: list[np.ndarray] = [np.empty(0)] * len(queries)
        order = sorted(range(len(queries)), key=lambda i: len(ids[i]))
        for at in range(0, len(order), c.batch):
            chunk = order[at : at + c.batch]
            length = -(-max(len(ids[i]) for i in chunk) // c.length_bucket) * c.length_bucket
            tokens = np.full((c.batch, length), tokenizer.pad_id, np.int32)
            valid = np.zeros((c.batch, length), bool)
            valid[:, 0] = True
            for row, i in enumerate(chunk):
                tokens[row, : len(ids[i])], valid[row, : len(ids[i])] = ids[i], True
            groups = {
                g: np.asarray(p) for g, p in self._forward(self.params, tokens, valid).items()
            }
            for row, i in enumerate(chunk):
                out[i] = groups[queries[i].group][row]
        return out
