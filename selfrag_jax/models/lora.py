"""Low-rank adaptation (Hu et al., 2022): layers compute with W + A B * alpha / rank.

W stays frozen; the small A and B are trained. The embedding and the output head are trained in
full, because the reflection tokens are new and their rows must be learned from scratch.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Float

from selfrag_jax.models.params import Params, Path, flatten, unflatten

LORA_A, LORA_B = "lora_a", "lora_b"  # [L, inputs, rank] and [L, rank, outputs], beside the kernel


@dataclass(frozen=True)
class LoraConfig:
    rank: int
    alpha: float

    def __post_init__(self):
        if not (self.rank >= 1 and self.alpha > 0):
            raise ValueError(
                f"lora: rank={self.rank} must be at least 1, and alpha={self.alpha} above 0"
            )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


# ---- training ------------------------------------------------------------------------------------
def is_trained(path: Path) -> bool:
    """Returns whether LoRA trains this parameter."""
    return path[-1] in (LORA_A, LORA_B) or path[0] in ("embed", "head")


def add_adapters(params: Params, shapes: Params, key: jax.Array) -> Params:
    """Returns `params` with new adapters: A is random and B zero, so the model computes the same.

    shapes: those of the model with LoRA.
    """
    out = dict(flatten(params))
    for i, (path, leaf) in enumerate(flatten(shapes)):
        if path[-1] == LORA_A:
            normal = jax.random.normal(jax.random.fold_in(key, i), leaf.shape)
            out[path] = np.asarray(normal * leaf.shape[-2] ** -0.5)
        elif path[-1] == LORA_B:
            out[path] = np.zeros(leaf.shape, np.float32)
    return unflatten(out.items())


def split_trained(params: Params) -> tuple[Params, Params]:
    """Returns the trained and the frozen parameters."""
    leaves = list(flatten(params))
    trained = unflatten((path, leaf) for path, leaf in leaves if is_trained(path))
    frozen = unflatten((path, leaf) for path, leaf in leaves if not is_trained(path))
    return trained, frozen


def join_trained(trained: Params, frozen: Params) -> Params:
    """The inverse of `split_trained`."""
    return unflatten([*flatten(trained), *flatten(frozen)])


# ---- merging -------------------------------------------------------------------------------------
def merged_kernel(
    kernel: Float[np.ndarray, "inputs outputs"],
    a: Float[np.ndarray, "inputs rank"],
    b: Float[np.ndarray, "rank outputs"],
    lora: LoraConfig,
) -> Float[np.ndarray, "inputs outputs"]:
    """Returns one layer's kernel with its adapter merged in.

    In f32: most of an update is smaller than the spacing of bfloat16 numbers.
    """
    kernel, a, b = (np.asarray(x, np.float32) for x in (kernel, a, b))
    return kernel + a @ b * np.float32(lora.scale)


def merge_adapters(params: Params, lora: LoraConfig) -> Params:
    """Returns the parameters of the same model without LoRA, in f32 and in host memory."""
    out = {path: np.asarray(leaf, np.float32) for path, leaf in flatten(params)}
    for path_a in [path for path in out if path[-1] == LORA_A]:
        module = path_a[:-1]
        a, b, kernel = out.pop(path_a), out.pop((*module, LORA_B)), (*module, "kernel")
        layers = zip(out[kernel], a, b, strict=True)
        out[kernel] = np.stack([merged_kernel(*layer, lora) for layer in layers])
    return unflatten(out.items())
