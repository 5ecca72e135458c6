"""The rows of the vocabulary in the embedding and the head: checking, padding and growing them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from selfrag_jax.errors import UserError
from selfrag_jax.models.llama import LlamaConfig
from selfrag_jax.models.params import Params

# First key of a table's path -> the axis of the vocabulary: embedding [V, D], head [D, V].
VOCABULARY_AXIS = {"embed": 0, "head": 1}


def check_vocabulary_fits(source: str | Path, num_tokens: int, config: LlamaConfig) -> None:
    """Raises UserError when the tokenizer has more tokens than the model has rows.

    Such a tokenizer belongs to another model. JAX would read ids past the table as its last row.
    """
    if num_tokens > config.vocab_size:
        raise UserError(
            f"{source}: its tokenizer has {num_tokens} tokens, its model {config.vocab_size} rows: "
            "they do not belong together; use the tokenizer that came with the model "
            "(`selfrag convert --reflection_tokens` adds rows for reflection tokens)"
        )


def pad_vocabulary(params: Params, config: LlamaConfig) -> Params:
    """Adds `config.vocab_padding` zero rows, which no token uses."""
    padding = config.vocab_padding
    if not padding:
        return params

    def pad(table: np.ndarray, axis: int) -> np.ndarray:
        return np.pad(table, [(0, padding if i == axis else 0) for i in range(2)])

    return _map_tables(params, pad)


def unpad_vocabulary(params: Params, config: LlamaConfig) -> Params:
    """Removes the rows that `pad_vocabulary` adds."""
    if not config.vocab_padding:
        return params
    return _map_tables(params, lambda table, axis: np.take(table, range(config.vocab_size), axis))


def _map_tables(params: Params, change: Callable[[np.ndarray, int], np.ndarray]) -> Params:
    """Applies change(table, axis of the vocabulary) to the embedding and to the head, if any."""
    embedding = np.asarray(params["embed"]["embedding"])
    out = {**params, "embed": {"embedding": change(embedding, VOCABULARY_AXIS["embed"])}}
    if "head" in params:
        kernel = np.asarray(params["head"]["kernel"])
        out["head"] = {"kernel": change(kernel, VOCABULARY_AXIS["head"])}
    return out


def grow_vocabulary(
    config: LlamaConfig,
    params: Params | None,
    old_tokens: int,
    new_tokens: int,
    init_from: Mapping[int, Sequence[int]] | None = None,
) -> tuple[LlamaConfig, Params | None]:
    """Grows the vocabulary from `old_tokens` to `new_tokens` tokens, at the mean of the old rows.

    init_from: for some of the new ids, the old ids whose mean row they start from instead. Without
    params, only the config is grown. Raises UserError when there are more old tokens than rows.
    """
    check_vocabulary_fits("the model to be grown", old_tokens, config)
    num_rows = max(config.vocab_size, new_tokens)

    def grow(table: np.ndarray, axis: int) -> np.ndarray:
        grown = grow_table(table, axis, old_tokens, new_tokens, num_rows)
        rows = np.moveaxis(grown, axis, 0)  # a view: writing to it changes `grown`
        for token, words in (init_from or {}).items():
            if token >= old_tokens:
                rows[token] = rows[list(words)].mean(0, dtype=np.float32)
        return grown

    grown = None if params is None else _map_tables(params, grow)
    return replace(config, vocab_size=num_rows), grown


def grow_table(
    table: np.ndarray, axis: int, old_tokens: int, new_tokens: int, num_rows: int
) -> np.ndarray:
    """Grows one table to `num_rows` rows along `axis`. New tokens get the mean of the old rows.

    A table may have more rows than the tokenizer has tokens: new tokens take those rows first.
    """
    rows = np.moveaxis(table, axis, 0)
    # Summed in f32: a sum of many rows in bf16 would lose most of them.
    mean = rows[:old_tokens].mean(0, dtype=np.float32, keepdims=True).astype(rows.dtype)
    rows = np.concatenate([rows, np.repeat(mean, num_rows - len(rows), 0)])
    rows[old_tokens:new_tokens] = mean
    return np.moveaxis(rows, 0, axis)
