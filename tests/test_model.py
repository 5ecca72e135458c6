"""The Llama: cache, prefix sharing and packing agree with full forward passes."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from selfrag_jax.checkpoints import vocabulary_rows
from selfrag_jax.errors import UserError
from selfrag_jax.models.cache import Cache
from selfrag_jax.models.llama import Linear, Llama, LlamaConfig, Model, _matmul

TOLERANCE = 2e-5


def full_forward(loaded, tokens):
    """Final hidden states of whole sequences, without a cache."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    doc_ids = jnp.ones(tokens.shape, jnp.int32)
    return loaded.model.hidden(loaded.params, tokens, positions, doc_ids)[0]


def pad(rows, length):
    """(tokens, valid) of rows of different lengths."""
    tokens, valid = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], valid[i, : len(row)] = row, True
    return tokens, valid


def test_prefix_and_ragged_branches_match_full_forwards(tiny_model):
    """Two prefixes of different lengths, three branches each of different lengths, then two more
    tokens each."""
    rng = np.random.default_rng(0)
    model, params, V = tiny_model.model, tiny_model.params, tiny_model.model.config.vocab_size
    prefixes = [rng.integers(10, V, n) for n in (5, 8)]
    branches = [rng.integers(10, V, n) for n in (3, 6, 1, 4, 4, 2)]
    last_tokens = rng.integers(10, V, (6, 2))

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
        tokens, positions = last_tokens[:, t : t + 1], (start + lengths + t)[:, None]
        valid = np.ones((6, 1), bool)
        out, cache = model.hidden(params, tokens, positions, valid, cache, prefix)
        outs.append(out[:, 0])

    for i in range(6):
        sequence = np.concatenate([prefixes[i // 3], branches[i], last_tokens[i]])
        expected = full_forward(tiny_model, sequence[None])[0]
        n, length = len(prefixes[i // 3]), lengths[i]
        np.testing.assert_allclose(hidden[i, :length], expected[n : n + length], atol=TOLERANCE)
        np.testing.assert_allclose(outs[0][i], expected[-2], atol=TOLERANCE)
        np.testing.assert_allclose(outs[1][i], expected[-1], atol=TOLERANCE)


def test_packed_documents_do_not_see_each_other(tiny_model):
    rng = np.random.default_rng(1)
    a, b = rng.integers(10, 900, 7), rng.integers(10, 900, 9)
    tokens = np.concatenate([a, b])[None]
    positions = np.concatenate([np.arange(7), np.arange(9)])[None]
    doc_ids = np.array([[1] * 7 + [2] * 9])
    packed, _ = tiny_model.model.hidden(tiny_model.params, tokens, positions, doc_ids)
    np.testing.assert_allclose(packed[0, :7], full_forward(tiny_model, a[None])[0], atol=TOLERANCE)
    np.testing.assert_allclose(packed[0, 7:], full_forward(tiny_model, b[None])[0], atol=TOLERANCE)


def test_query_heads_must_be_a_multiple_of_kv_heads():
    with pytest.raises(ValueError, match="num_kv_heads"):
        LlamaConfig(10, 8, 8, 1, 3, 2, 4, 16, 1e4, 1e-5, True, "float32", "none", 1)


def test_a_prefix_without_a_cache_is_refused(tiny_model):
    prefix = Cache.empty(tiny_model.model.config, 1, 8)
    with pytest.raises(ValueError, match="together with a cache"):
        tiny_model.model.hidden(
            tiny_model.params, np.zeros((1, 4), int), np.zeros((1, 4), int), None, None, prefix
        )


# ---- rows of the vocabulary ----------------------------------------------------------------------
def test_new_rows_start_at_the_mean(tiny_model):
    config, params = tiny_model.model.config, tiny_model.params
    grown_config, grown = vocabulary_rows.grow_vocabulary(
        config, params, config.vocab_size, config.vocab_size + 3
    )
    table, old = (np.asarray(p["embed"]["embedding"]) for p in (grown, params))
    assert table.shape[0] == grown_config.vocab_size
    np.testing.assert_allclose(table[-1], old.mean(0), atol=1e-6)


def test_new_rows_may_start_at_the_mean_of_given_tokens(tiny_model):
    config, old = tiny_model.model.config, np.asarray(tiny_model.params["embed"]["embedding"])
    like = {config.vocab_size + 1: [5, 7], 3: [5]}  # 3 is not a new token: it keeps its row
    _, grown = vocabulary_rows.grow_vocabulary(
        config, tiny_model.params, config.vocab_size, config.vocab_size + 2, like
    )
    table = np.asarray(grown["embed"]["embedding"])
    np.testing.assert_array_equal(table[: config.vocab_size], old)
    expected = [old.mean(0), old[[5, 7]].mean(0)]
    np.testing.assert_allclose(table[config.vocab_size :], expected, atol=1e-6)


def test_the_mean_of_many_half_precision_rows_is_exact(tiny_model):
    config = tiny_model.model.config
    rng = np.random.default_rng(0)
    table = rng.normal(1.0, 0.1, (config.vocab_size, config.embed_dim)).astype("bfloat16")
    params = {**tiny_model.params, "embed": {"embedding": table}}
    _, grown = vocabulary_rows.grow_vocabulary(
        config, params, config.vocab_size, config.vocab_size + 1
    )
    new = np.asarray(grown["embed"]["embedding"])[-1]
    assert new.dtype == table.dtype
    np.testing.assert_allclose(new.astype(np.float32), table.astype(np.float64).mean(0), rtol=2**-8)


def test_new_tokens_take_the_unused_rows_of_a_padded_table(tiny_model):
    config, old = tiny_model.model.config, np.asarray(tiny_model.params["embed"]["embedding"])
    V = config.vocab_size - 5  # the last five rows are unused
    same, grown = vocabulary_rows.grow_vocabulary(config, tiny_model.params, V, V + 3)
    table = np.asarray(grown["embed"]["embedding"])
    assert same == config and table.shape == old.shape
    np.testing.assert_allclose(table[V : V + 3], np.tile(old[:V].mean(0), (3, 1)), atol=1e-6)
    np.testing.assert_array_equal(table[V + 3 :], old[V + 3 :])
    with pytest.raises(UserError, match="do not belong together"):
        vocabulary_rows.grow_vocabulary(
            config, tiny_model.params, config.vocab_size + 1, config.vocab_size + 2
        )


def test_vocabulary_padding_changes_no_probability(tiny_model):
    config, tokens = tiny_model.model.config, np.arange(10)[None]
    padded = Model(replace(config, vocab_padding=-config.vocab_size % 128))
    params = vocabulary_rows.pad_vocabulary(tiny_model.params, padded.config)
    assert params["embed"]["embedding"].shape[0] % 128 == 0

    def probabilities(model, params):
        hidden, _ = model.hidden(params, tokens, tokens, None)
        return np.asarray(jax.nn.softmax(model.logits(params, hidden)))

    found = probabilities(padded, params)
    expected = probabilities(tiny_model.model, tiny_model.params)
    np.testing.assert_allclose(found[..., : config.vocab_size], expected, atol=1e-7)
    assert not found[..., config.vocab_size :].any()
    unpadded = vocabulary_rows.unpad_vocabulary(params, padded.config)
    np.testing.assert_array_equal(
        unpadded["embed"]["embedding"], tiny_model.params["embed"]["embedding"]
    )


# ---- rounded products ----------------------------------------------------------------------------
def test_product_dtype_rounds_factors_and_sums_in_f32(tiny_model):
    """A layer's product and its gradients, against float64 products of the rounded factors."""
    c = replace(tiny_model.model.config, product_dtype="bfloat16")
    rng = np.random.default_rng(0)
    x, d_out = (rng.normal(size=(6, 5, n)).astype(np.float32) for n in (32, 48))
    linear = Linear(c, 32, 48, nnx.Rngs(0))
    kernel = np.asarray(linear.kernel[...])
    out, vjp = jax.vjp(lambda x, k: _matmul(x, k, linear.rounded), x, kernel)
    np.testing.assert_array_equal(out, linear(x))

    def rounded(a):
        return np.asarray(a).astype("bfloat16").astype(np.float64)

    r_x, r_k, r_d = map(rounded, (x, kernel, d_out))
    assert np.abs(r_k - kernel).max() > 1e-4  # rounding does something
    expected = r_x @ r_k, r_d @ r_k.T, np.einsum("bti,bto->io", r_x, r_d)
    for found, value in zip((out, *vjp(d_out)), expected, strict=True):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, value, atol=2e-5)


def test_rounded_kernels_change_nothing(tiny_model):
    model = Model(replace(tiny_model.model.config, product_dtype="bfloat16"))
    params = model.rounded(tiny_model.params)
    assert params["layers"]["q"]["kernel"].dtype == "bfloat16"
    assert params["embed"]["embedding"].dtype == "float32"
    tokens = np.arange(24).reshape(2, 12)
    positions = np.tile(np.arange(12), (2, 1))
    found, expected = (
        model.hidden(p, tokens, positions, None)[0] for p in (params, tiny_model.params)
    )
    np.testing.assert_array_equal(found, expected)
    assert tiny_model.model.rounded(tiny_model.params) is tiny_model.params


# ---- recomputation and unrolling -----------------------------------------------------------------
@pytest.mark.parametrize("remat", ("none", "dots", "full"))
def test_remat_changes_no_gradient(tiny_model, remat, monkeypatch):
    """Layers in a scan with remat, against unrolled layers that recompute nothing."""
    tokens = np.arange(24).reshape(2, 12)
    positions = np.tile(np.arange(12), (2, 1))

    def gradients(model):
        def loss(params):
            return (model.hidden(params, tokens, positions, None)[0] ** 2).sum()

        return jax.grad(loss)(tiny_model.params)

    found = gradients(Model(replace(tiny_model.model.config, remat=remat)))
    monkeypatch.setattr(Llama, "_unroll_layers", lambda self: True)
    expected = gradients(tiny_model.model)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), found, expected
    )


def test_layers_are_unrolled_on_a_cpu_unless_remat_saves_memory(tiny_model):
    """A scan clears and copies its stacked residuals; but only in a scan does remat save memory."""
    wide = replace(tiny_model.model.config, num_layers=8, embed_dim=512, mlp_dim=1024)
    tokens = np.ones((4, 128), np.int32)

    def has_loop_and_temporary_bytes(remat):
        model = Model(replace(wide, remat=remat))

        def loss(params):
            return (model.hidden(params, tokens, tokens, None)[0] ** 2).sum()

        program = jax.jit(jax.grad(loss)).lower(model.shapes())
        return "while" in program.as_text(), program.compile().memory_analysis().temp_size_in_bytes

    none_loops, none_bytes = has_loop_and_temporary_bytes("none")
    full_loops, full_bytes = has_loop_and_temporary_bytes("full")
    assert (none_loops, full_loops) == (False, True) and full_bytes < 0.4 * none_bytes
