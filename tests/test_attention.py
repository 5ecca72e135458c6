"""Attention kernels agree with a plain loop on ragged, packed and windowed rows, gradients too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfrag_jax.models import attention, attention_kernels
from selfrag_jax.models.attention_kernels import causal_attention, choose_kernel
from selfrag_jax.models.rope import RopeScaling, rope_frequencies

B, T, N, K, H = 2, 256, 4, 2, 128
DOC_IDS = {
    "whole": np.ones((B, T), np.int32),
    "packed": np.stack(
        [np.repeat([1, 2, 3, 0], [100, 3, 120, 33]), np.repeat([1, 2, 3, 4], [1, 127, 64, 64])]
    ).astype(np.int32),
    "ragged": np.stack(
        [np.repeat([1, 0], [200, 56]), np.repeat([1, 0], [17, 239])],
    ).astype(np.int32),
}


@pytest.fixture(scope="module")
def qkv():
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(B, T, n, H)), jnp.float32) for n in (N, K, K))


def loop_attention(q, k, v, doc_ids, window):
    """Softmax attention, one query and one head at a time."""
    out = np.zeros(q.shape)
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))

    def sees(b, t, s):
        return doc_ids[b, s] == doc_ids[b, t] and (window is None or t - s < window)

    for b in range(B):
        for t in range(T):
            keys = [s for s in range(t + 1) if sees(b, t, s)]
            for n in range(N):
                scores = k[b, keys, n // (N // K)] @ q[b, t, n] / np.sqrt(H)
                weights = np.exp(scores - scores.max())
                out[b, t, n] = weights / weights.sum() @ v[b, keys, n // (N // K)]
    return out


@pytest.mark.parametrize("window", (None, 37))
@pytest.mark.parametrize("docs", DOC_IDS)
def test_all_kernels_agree_with_a_loop(qkv, docs, window):
    ids = DOC_IDS[docs]
    real = ids > 0
    expected = loop_attention(*qkv, ids, window)

    def splash(ids):
        return causal_attention(*qkv, ids, window, "splash", interpret=True)

    # cuDNN needs its hardware. JAX's own implementation of the same call is its reference.
    def cudnn_call(ids):
        return attention_kernels._jax_nn_attention(*qkv, ids, window, "xla")

    results = {
        "xla": causal_attention(*qkv, ids, window, "xla"),
        "cudnn's call": cudnn_call(ids),
        "splash": splash(jnp.asarray(ids)),
    }
    if docs != "packed":  # without ids: one document per row, with its padding at the end
        results["xla, no ids"] = causal_attention(*qkv, None, window, "xla")
        results["cudnn's call, no ids"] = cudnn_call(None)
        results["splash, no ids"] = splash(None)
    for name, got in results.items():
        np.testing.assert_allclose(np.asarray(got)[real], expected[real], atol=2e-5, err_msg=name)


@pytest.mark.parametrize("window", (None, 37, 200))
@pytest.mark.parametrize("docs", DOC_IDS)
def test_blockwise_gradients_agree_with_autodiff(qkv, docs, window, monkeypatch):
    """The reference is dense attention; with blocks of 96 the last block is short."""
    ids = jnp.asarray(DOC_IDS[docs])
    real = (ids > 0)[..., None, None]
    mask = attention.document_mask(ids, window)

    def dense_loss(q, k, v):
        return (jnp.sin(attention.dense_attention(q, k, v, mask)) * real).sum()

    def blockwise_loss(q, k, v):
        return (jnp.sin(attention.blockwise_attention(q, k, v, ids, window)) * real).sum()

    expected = jax.grad(dense_loss, argnums=(0, 1, 2))(*qkv)
    for block_size in (128, 96):
        monkeypatch.setattr(attention, "BLOCK_SIZE", block_size)
        got = jax.grad(blockwise_loss, argnums=(0, 1, 2))(*qkv)
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)


def test_splash_gradients_agree_with_xla(qkv):
    ids = jnp.asarray(DOC_IDS["packed"])
    real = (ids > 0)[..., None, None]

    def gradients(kernel, **options):
        def loss(q, k, v):
            return (jnp.sin(causal_attention(q, k, v, ids, 37, kernel, **options)) * real).sum()

        return jax.grad(loss, argnums=(0, 1, 2))(*qkv)

    for a, b in zip(gradients("splash", interpret=True), gradients("xla"), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_kernel_is_chosen_by_platform_and_shape(monkeypatch):
    shapes = (
        (2048, 128, "bfloat16"),
        (2048, 128, "float32"),
        (192, 32, "float16"),
        (100, 128, "bfloat16"),
    )
    chosen = {}
    for platform in ("cpu", "tpu", "gpu"):
        monkeypatch.setattr(jax, "default_backend", lambda p=platform: p)
        chosen[platform] = [choose_kernel("auto", *shape) for shape in shapes]
    assert chosen["cpu"] == ["xla"] * 4 and chosen["tpu"] == ["splash", "splash", "xla", "xla"]
    assert chosen["gpu"] == ["cudnn", "xla", "cudnn", "xla"]  # cuDNN has no f32
    assert choose_kernel("xla", 2048, 128, "float32") == "xla"
    with pytest.raises(ValueError, match="needs bfloat16 or float16"):
        choose_kernel("cudnn", 2048, 128, "float32")
    with pytest.raises(ValueError, match="multiples of 128; they are 192 and 32"):
        choose_kernel("splash", 192, 32, "float32")
    with pytest.raises(ValueError, match="'flash': must be one of auto, xla, splash, cudnn"):
        choose_kernel("flash", 128, 128, "float32")


def test_rope_scaling_follows_its_formulas():
    """Llama 3.1 divides frequencies below one rotation in 8,192 tokens by 8, keeps those above four
    rotations, and interpolates between."""
    unscaled = rope_frequencies(128, 5e5, None)
    scaled = rope_frequencies(128, 5e5, RopeScaling("llama3", 8.0, 1.0, 4.0, 8192))
    rotations = 8192 * unscaled / (2 * np.pi)
    np.testing.assert_allclose(scaled[rotations > 4], unscaled[rotations > 4])
    np.testing.assert_allclose(scaled[rotations < 1], unscaled[rotations < 1] / 8, rtol=1e-6)
    between = (rotations >= 1) & (rotations <= 4)
    share = (rotations[between] - 1) / 3
    assert between.sum() > 2
    interpolated = unscaled[between] * (share + (1 - share) / 8)
    np.testing.assert_allclose(scaled[between], interpolated, rtol=1e-5)
    linear = rope_frequencies(128, 1e4, RopeScaling("linear", 4.0, 0.0, 0.0, 0))
    np.testing.assert_allclose(linear, rope_frequencies(128, 1e4, None) / 4)
    with pytest.raises(ValueError, match="yarn"):
        RopeScaling("yarn", 2.0, 1.0, 4.0, 8192)
    with pytest.raises(ValueError, match="low_freq_factor=4.0 must be below high_freq_factor=4.0"):
        RopeScaling("llama3", 2.0, 4.0, 4.0, 8192)
