"""Rotary position embeddings and their scaling to longer contexts. Axis letters as in llama.py."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

SinCos = tuple[Float[Array, "B T 1 H//2"], Float[Array, "B T 1 H//2"]]


@dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies of a model are scaled to a longer context.

    linear: all frequencies are divided by `factor` (Chen et al., 2023).
    llama3: low frequencies are divided by `factor`, high ones are kept, and those between are
    interpolated. Low and high are measured in rotations per `original_length` (Llama 3.1).
    """

    kind: str  # "linear" or "llama3"
    factor: float
    low_frequency: float  # llama3: at most this many rotations per original_length is low
    high_frequency: float  # llama3: at least this many is high
    original_length: int  # context length in tokens before scaling

    def __post_init__(self):
        if self.kind not in ("linear", "llama3"):
            raise ValueError(f"rope scaling {self.kind!r} is not supported; linear and llama3 are")
        if not self.factor > 0:
            raise ValueError(f"rope scaling: factor={self.factor} must be above 0")
        if self.kind == "llama3" and not (
            0 < self.low_frequency < self.high_frequency and self.original_length > 0
        ):
            raise ValueError(
                f"rope scaling: low_freq_factor={self.low_frequency} must be below "
                f"high_freq_factor={self.high_frequency}, and both and "
                f"original_max_position_embeddings={self.original_length} above 0"
            )


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Returns [H / 2] f32: the rotation of each pair of channels per position, in radians."""
    frequency = theta ** (-np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    if scaling is None:
        return frequency.astype(np.float32)
    if scaling.kind == "linear":
        return (frequency / scaling.factor).astype(np.float32)
    rotations = scaling.original_length * frequency / (2 * np.pi)
    high = (rotations - scaling.low_frequency) / (scaling.high_frequency - scaling.low_frequency)
    high = np.clip(high, 0.0, 1.0)  # 0: low frequency, 1: high frequency
    return (high * frequency + (1 - high) * frequency / scaling.factor).astype(np.float32)


def rope_sin_cos(positions: Int[Array, "B T"], frequencies: np.ndarray) -> SinCos:
    """Returns the sines and cosines of the rotation angles; all layers share them."""
    angle = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.sin(angle), jnp.cos(angle)


def apply_rope(x: Float[Array, "B T N H"], sin_cos: SinCos) -> Float[Array, "B T N H"]:
    """Rotates channel h together with channel h + H / 2 (the "rotate half" convention)."""
    sin, cos = sin_cos
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
