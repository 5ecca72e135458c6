"""Weight-only int8: each column of a layer's kernel is stored in 8 bits with its own scale.

Products are computed in the activations' type. A 7B model takes 7 GB instead of 13.5 (bf16), and a
decoding step, which is bound by reading the weights, half the time. The embedding, the norms and
the output head are not quantized: they are a twentieth of the weights, and logits are sensitive to
them.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from selfrag_jax.models.llama import Model
from selfrag_jax.models.params import Params, flatten, unflatten

KERNEL, SCALE = "kernel", "kernel_scale"


def quantize(model: Model, params: Params, dtype: str | None = None) -> tuple[Model, Params]:
    """Returns the model with int8 kernels, and its parameters in host memory.

    Rounds to nearest, symmetrically: scale = max |column| / 127. A kernel [L, inputs, outputs] gets
    f32 scales [L, outputs]. dtype: of all other parameters; None keeps theirs.
    """
    out = []
    for path, leaf in flatten(params):
        if path[0] == "layers" and path[-1] == KERNEL:
            kernel, scales = _quantize_kernel(leaf)
            out += [(path, kernel), ((*path[:-1], SCALE), scales)]
        else:
            leaf = np.asarray(leaf)
            out.append((path, leaf if dtype is None else leaf.astype(dtype)))
    return Model(replace(model.config, quantized=True)), unflatten(out)


def _quantize_kernel(leaf) -> tuple[np.ndarray, np.ndarray]:
    kernel = np.empty(leaf.shape, np.int8)
    scales = np.empty((leaf.shape[0], leaf.shape[2]), np.float32)
    for i in range(leaf.shape[0]):  # layer by layer, to avoid a second copy of all layers in f32
        layer = np.asarray(leaf[i], np.float32)
        scales[i] = np.maximum(np.abs(layer).max(0), 1e-30) / 127.0
        kernel[i] = np.rint(layer / scales[i]).astype(np.int8)
    return kernel, scales
