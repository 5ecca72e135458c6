"""Weight-only int8: each column of a layer's kernel in 8 bits with a scale of its own, multiplied in the activations' type.

A 7B model then takes 7 GB instead of 13.5 (bf16), and a step of decoding, whose time is the reading of the weights, half as
long. Embedding, norms and output head stay as they are: they are a twentieth of the weights, and logits are sensitive to
their rows.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from selfrag_jax.models.llama import Model
from selfrag_jax.models.params import Params, flatten, unflatten

KERNEL, SCALE = "kernel", "kernel_scale"


def quantize(model: Model, params: Params, dtype: str | None = None) -> tuple[Model, Params]:
    """The model with int8 kernels, in host memory. Round to nearest, symmetric: scale = max |column| / 127.

    dtype: of all that is not quantized; None keeps it. A kernel [L, inputs, outputs] gets scales [L, outputs] in f32.
    """
    out = []
    for path, leaf in flatten(params):
        if path[0] != "layers" or path[-1] != KERNEL:
            out.append(
                (path, np.asarray(leaf) if dtype is None else np.asarray(leaf).astype(dtype))
            )
            continue
        whole = np.empty(leaf.shape, np.int8)
        scales = np.empty((leaf.shape[0], leaf.shape[2]), np.float32)
        for i in range(leaf.shape[0]):  # a layer at a time: no second copy in f32
            layer = np.asarray(leaf[i], np.float32)
            scales[i] = np.maximum(np.abs(layer).max(0), 1e-30) / 127.0
            whole[i] = np.rint(layer / scales[i]).astype(np.int8)
        out += [(path, whole), ((*path[:-1], SCALE), scales)]
    return Model(replace(model.config, quantized=True)), unflatten(out)
