"""Kernels for whole sequences agree with the plain form on ragged, packed and windowed inputs, gradients too; rotary
frequencies are stretched as the formulas say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfrag_jax.models import attention
from selfrag_jax.models.attention import RopeScaling

B, T, N, K, H = 2, 256, 4, 2, 128


@pytest.fixture(scope="module")
def qkv():
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(B, T, n, H)), jnp.float32) for n in (N, K, K))


DOCS = {
    "whole": np.ones((B, T), np.int32),
    "packed": np.stack(
        [np.repeat([1, 2, 3, 0], [100, 3, 120, 33]), np.repeat([1, 2, 3, 4], [1, 127, 64, 64])]
    ).astype(np.int32),
    "ragged": np.stack([np.repeat([1, 0], [200, 56]), np.repeat([1, 0], [17, 239])]).astype(
        np.int32
    ),
}


def plain(q, k, v, docs, window):
    """Softmax over a loop of queries, one head at a time."""
    out = np.zeros(q.shape)
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    for b in range(B):
        for t in range(T):
            seen = [
                s
                for s in range(t + 1)
                if docs[b, s] == docs[b, t] and (window is None or t - s < window)
            ]
            for n in range(N):
                scores = k[b, seen, n // (N // K)] @ q[b, t, n] / np.sqrt(H)
                weights = np.exp(scores - scores.max())
                out[b, t, n] = weights / weights.sum() @ v[b, seen, n // (N // K)]
    return out


@pytest.mark.parametrize("window", (None, 37))
@pytest.mark.parametrize("docs", DOCS)
def test_all_kernels_agree_with_a_loop(qkv, docs, window):
    ids = DOCS[docs]
    real = ids > 0
    expected = plain(*qkv, ids, window)
    forms = {
        "xla": attention.attend_sequences(*qkv, ids, window, "xla"),
        # cuDNN itself needs its hardware; jax's own implementation of the same call is what it has to agree with.
        "cudnn's call": attention._dot_product(*qkv, ids, window, "xla"),
        "splash": attention.attend_sequences(
            *qkv, jnp.asarray(ids), window, "splash", interpret=True
        ),
    }
    if docs != "packed":  # without ids: one document in each row, its padding at the end
        forms["xla, no ids"] = attention.attend_sequences(*qkv, None, window, "xla")
        forms["cudnn's call, no ids"] = attention._dot_product(*qkv, None, window, "xla")
        forms["splash, no ids"] = attention.attend_sequences(
            *qkv, None, window, "splash", interpret=True
        )
    for name, got in forms.items():
        np.testing.assert_allclose(np.asarray(got)[real], expected[real], atol=2e-5, err_msg=name)


@pytest.mark.parametrize("window", (None, 37, 200))
@pytest.mark.parametrize("docs", DOCS)
def test_gradients_block_by_block_agree_with_autodiff(qkv, docs, window, monkeypatch):
    """Of the plain form over the whole mask; also where the last block is short."""
    ids = jnp.asarray(DOCS[docs])
    real = (ids > 0)[..., None, None]
    loss = lambda f: lambda *qkv: (jnp.sin(f(*qkv)) * real).sum()  # noqa: E731
    mask = attention.document_mask(ids, window)
    expected = jax.grad(loss(lambda q, k, v: attention.attend(q, k, v, mask)), argnums=(0, 1, 2))(
        *qkv
    )
    for block in (128, 96):
        monkeypatch.setattr(attention, "BLOCK", block)
        got = jax.grad(
            loss(lambda q, k, v: attention.attend_blocks(q, k, v, ids, window)), argnums=(0, 1, 2)
        )(*qkv)
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)


def test_gradients_of_the_splash_kernel_agree(qkv):
    ids = jnp.asarray(DOCS["packed"])
    real = (ids > 0)[..., None, None]

    def loss(kernel, **more):
        return lambda *qkv: (
            jnp.sin(attention.attend_sequences(*qkv, ids, 37, kernel, **more)) * real
        ).sum()

    expected = jax.grad(loss("xla"), argnums=(0, 1, 2))(*qkv)
    got = jax.grad(loss("splash", interpret=True), argnums=(0, 1, 2))(*qkv)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_a_kernel_is_chosen_by_platform_and_shape(monkeypatch):
    chosen = {}
    for platform in ("cpu", "tpu", "gpu"):
        monkeypatch.setattr(jax, "default_backend", lambda p=platform: p)
        shapes = (
            (2048, 128, "bfloat16"),
            (2048, 128, "float32"),
            (192, 32, "float16"),
            (100, 128, "bfloat16"),
        )
        chosen[platform] = [attention.choose_kernel("auto", *shape) for shape in shapes]
    assert chosen["cpu"] == ["xla"] * 4 and chosen["tpu"] == ["splash", "splash", "xla", "xla"]
    assert chosen["gpu"] == ["cudnn", "xla", "cudnn", "xla"]  # cuDNN has no f32
    assert attention.choose_kernel("xla", 2048, 128, "float32") == "xla"
    with pytest.raises(ValueError, match="needs bfloat16 or float16"):
        attention.choose_kernel("cudnn", 2048, 128, "float32")
    with pytest.raises(ValueError, match="multiples of 128; they are 192 and 32"):
        attention.choose_kernel("splash", 192, 32, "float32")
    with pytest.raises(
        ValueError, match="attention='flash': must be one of auto, xla, splash, cudnn"
    ):
        attention.choose_kernel("flash", 128, 128, "float32")


def test_rope_scaling_by_hand():
    """Llama 3.1's: of frequencies that turn less than once in 8,192 tokens the eighth; of those above four turns the whole."""
    plain = attention.rope_frequencies(128, 5e5, None)
    scaled = attention.rope_frequencies(128, 5e5, RopeScaling("llama3", 8.0, 1.0, 4.0, 8192))
    turns = 8192 * plain / (2 * np.pi)
    np.testing.assert_allclose(scaled[turns > 4], plain[turns > 4])
    np.testing.assert_allclose(scaled[turns < 1], plain[turns < 1] / 8, rtol=1e-6)
    between = (turns >= 1) & (turns <= 4)
    share = (turns[between] - 1) / 3
    assert between.sum() > 2
    np.testing.assert_allclose(
        scaled[between], plain[between] * (share + (1 - share) / 8), rtol=1e-5
    )
    linear = attention.rope_frequencies(128, 1e4, RopeScaling("linear", 4.0, 0.0, 0.0, 0))
    np.testing.assert_allclose(linear, attention.rope_frequencies(128, 1e4, None) / 4)
    with pytest.raises(ValueError, match="yarn"):
        RopeScaling("yarn", 2.0, 1.0, 4.0, 8192)
    with pytest.raises(ValueError, match="low_freq_factor=4.0 must be below high_freq_factor=4.0"):
        RopeScaling("llama3", 2.0, 4.0, 4.0, 8192)
