"""The rows of the vocabulary in the embedding and the head: checking, padding and growing them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from selfrag_jax.errors import UserError
from selfrag_jax.models.llama import LlamaConfig
from selfrag_jax.models.params import Params


# ---- the vocabulary's rows -------------------------------------------------------------------------------------------
def check_vocabulary_fits(what: str | Path, tokens: int, config: LlamaConfig) -> None:
    """Raises BadInput where there are more tokens than rows: another model's tokenizer. The ids beyond would be read as the last."""
    if tokens > config.vocab_size:
        raise UserError(
            f"{what}: its tokenizer has {tokens} tokens, its model {config.vocab_size} rows: they do not belong together; take the "
            "tokenizer that came with the model (`selfrag convert --reflection_tokens` adds rows for reflection tokens)"
        )


def pad_vocabulary(params: Params, config: LlamaConfig) -> Params:
    """Adds the rows that no token has."""
    pad = config.vocab_padding
    return (
        params
        if not pad
        else _each_table(
            params, lambda x, axis: np.pad(x, [(0, pad * (axis == i)) for i in (0, 1)])
        )
    )


def unpad_vocabulary(params: Params, config: LlamaConfig) -> Params:
    """Removes the rows that no token has."""
    pad, V = config.vocab_padding, config.vocab_size
    return params if not pad else _each_table(params, lambda x, axis: np.take(x, range(V), axis))


def _each_table(params: Params, change) -> Params:
    """change(table, axis of the vocabulary), applied to the embedding and the head, if there is one."""
    out = {**params, "embed": {"embedding": change(np.asarray(params["embed"]["embedding"]), 0)}}
    if "head" in params:
        out["head"] = {"kernel": change(np.asarray(params["head"]["kernel"]), 1)}
    return out


def grow_vocabulary(
    config: LlamaConfig,
    params: Params | None,
    old: int,
    vocab_size: int,
    like: Mapping[int, Sequence[int]] | None = None,
) -> tuple[LlamaConfig, Params | None]:
    """Gives the tokens from `old` on, up to `vocab_size`, their rows: the mean of the old ones (as for new reflection tokens).

    A table may have more rows than the tokenizer has tokens; new tokens take those first. like: for some of the new ids
    the old ids whose mean row they start from instead. Without params the config alone is grown. Raises BadInput when there are more tokens than rows already.
    """
    check_vocabulary_fits("the model to be grown", old, config)
    size = max(config.vocab_size, vocab_size)

    def grow(table, axis: int):
        rows = np.moveaxis(table, axis, 0)
        mean = (
            rows[:old].mean(0, dtype=np.float32, keepdims=True).astype(rows.dtype)
        )  # bf16 would be summed in bf16
        rows = np.concatenate([rows, np.repeat(mean, size - len(rows), 0)])
        rows[old:vocab_size] = mean
        for i, words in (like or {}).items():
            if i >= old:
                rows[i] = rows[list(words)].mean(0, dtype=np.float32)
        return np.moveaxis(rows, 0, axis)

    return replace(config, vocab_size=size), None if params is None else _each_table(params, grow)
