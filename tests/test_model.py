"""The Llama: cache, prefix sharing and packing agree with plain full forwards; so does transformers' Llama."""

import jax.numpy as jnp
import numpy as np
import pytest

from selfrag_jax.models import checkpoints
from selfrag_jax.models.llama import Cache, LlamaConfig

TOLERANCE = 2e-5


def full(loaded, tokens):
    T = tokens.shape[1]
    positions = jnp.broadcast_to(jnp.arange(T), tokens.shape)
    return loaded.model.hidden(loaded.params, tokens, positions, jnp.ones(tokens.shape, jnp.int32))[0]


def test_prefix_and_ragged_branches_match_full_forwards(tiny_model):
    """Two prefixes of different length, three branches each of different length, then two more tokens each."""
    rng = np.random.default_rng(0)
    model, params, V = tiny_model.model, tiny_model.params, tiny_model.model.config.vocab_size
    prefixes = [rng.integers(10, V, n) for n in (5, 8)]
    branches = [rng.integers(10, V, n) for n in (3, 6, 1, 4, 4, 2)]
    after = rng.integers(10, V, (6, 2))

    def pad(rows, length):
        tokens, valid = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
        for i, r in enumerate(rows):
            tokens[i, : len(r)], valid[i, : len(r)] = r, True
        return tokens, valid

    tokens, valid = pad(prefixes, 8)
    positions = np.maximum(valid.cumsum(1) - 1, 0)
    _, prefix = model.hidden(params, tokens, positions, valid, Cache.empty(model.config, 2, 8))
    start = np.repeat([5, 8], 3)
    tokens, valid = pad(branches, 6)
    positions = start[:, None] + np.maximum(valid.cumsum(1) - 1, 0)
    cache = Cache.empty(model.config, 6, 8)
    hidden, cache = model.hidden(params, tokens, positions, valid, cache, prefix)
    lengths = np.array([len(b) for b in branches])
    outs = []
    for t in range(2):
        out, cache = model.hidden(
            params, after[:, t : t + 1], (start + lengths + t)[:, None], np.ones((6, 1), bool), cache, prefix
        )
        outs.append(out[:, 0])
    for i in range(6):
        whole = np.concatenate([prefixes[i // 3], branches[i], after[i]])
        expected = full(tiny_model, whole[None])[0]
        n = len(prefixes[i // 3])
        np.testing.assert_allclose(hidden[i, : lengths[i]], expected[n : n + lengths[i]], atol=TOLERANCE)
        np.testing.assert_allclose(outs[0][i], expected[-2], atol=TOLERANCE)
        np.testing.assert_allclose(outs[1][i], expected[-1], atol=TOLERANCE)


def test_packed_documents_do_not_see_each_other(tiny_model):
    rng = np.random.default_rng(1)
    a, b = rng.integers(10, 900, 7), rng.integers(10, 900, 9)
    tokens = np.concatenate([a, b])[None]
    positions = np.concatenate([np.arange(7), np.arange(9)])[None]
    doc_ids = np.array([[1] * 7 + [2] * 9])
    packed, _ = tiny_model.model.hidden(tiny_model.params, tokens, positions, doc_ids)
    np.testing.assert_allclose(packed[0, :7], full(tiny_model, a[None])[0], atol=TOLERANCE)
    np.testing.assert_allclose(packed[0, 7:], full(tiny_model, b[None])[0], atol=TOLERANCE)


def test_grouped_heads_must_divide():
    with pytest.raises(ValueError, match="num_kv_heads"):
        LlamaConfig(10, 8, 8, 1, 3, 2, 4, 16, 1e4, 1e-5, True, "float32", False, 1)


def test_new_rows_start_at_the_mean(tiny_model):
    config, params = tiny_model.model.config, tiny_model.params
    grown_config, grown = checkpoints.with_vocabulary(config, params, config.vocab_size + 3)
    table = np.asarray(grown["embed"]["embedding"])
    assert table.shape[0] == grown_config.vocab_size
    np.testing.assert_allclose(table[-1], np.asarray(params["embed"]["embedding"]).mean(0), atol=1e-6)


def test_new_rows_may_start_as_words(tiny_model):
    config, old = tiny_model.model.config, np.asarray(tiny_model.params["embed"]["embedding"])
    like = {config.vocab_size + 1: [5, 7], 3: [5]}  # 3 is no new token: it keeps its row
    _, grown = checkpoints.with_vocabulary(config, tiny_model.params, config.vocab_size + 2, like)
    table = np.asarray(grown["embed"]["embedding"])
    np.testing.assert_array_equal(table[: config.vocab_size], old)
    np.testing.assert_allclose(table[config.vocab_size :], [old.mean(0), old[[5, 7]].mean(0)], atol=1e-6)
