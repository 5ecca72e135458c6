"""A start for tiny models that already looks back: previous-token heads, and induction heads on top of them.

Large models find these two attention patterns by themselves early in training (Olsson et al., 2022); a model of a
million parameters spends most of its training on it. Here they are written into the random weights of the first two
layers, and training goes on from there: a plain Llama, only its first values are chosen.

  layer 0, head i  attends i + 1 tokens back. Embedding dimension 0 is the same for every token; queries and keys of
                   these heads read it alone, so that only the rotary phase, the distance, decides.
  layer 1, head i  attends to where the last i + 1 tokens stood before, right behind them: its queries read the tokens
                   that layer 0 wrote here, its keys those that it wrote there.
"""

from __future__ import annotations

import numpy as np

from selfrag_jax.models.llama import LlamaConfig, Params

OFFSETS = 3


def write_induction_heads(c: LlamaConfig, params: Params, seed: int, strength: float = 1.1, sharpness: float = 5.0) -> Params:
    """`params` with the two patterns written in. Needs at least two layers and four heads, not grouped.

    strength: of the induction heads' queries and keys; sharpness: of the previous-token heads' attention.
    """
    if c.num_layers < 2 or c.num_heads <= OFFSETS or c.num_kv_heads != c.num_heads:
        raise ValueError("induction heads need two layers and more than three heads that share no keys")
    rng = np.random.default_rng(seed)
    D, H = c.embed_dim, c.head_dim
    orthogonal = lambda n: np.linalg.qr(rng.standard_normal((n, n)))[0]  # noqa: E731
    embedding = np.array(params["embed"]["embedding"])
    constant = 3.0
    embedding[:, 0] = constant * embedding.std()
    layers = {m: {leaf: np.array(v) for leaf, v in values.items()} for m, values in params["layers"].items()}
    q, k, v, o = (layers[m]["kernel"] for m in "qkvo")

    # Layer 0: a key turned by s * w meets a query turned by t * w best where t - s is the offset.
    frequency = c.rope_theta ** (-np.arange(H // 2) / (H // 2))
    read = orthogonal(D)[:, :H]  # what the heads read of a token's embedding
    read[0] = 0
    write = orthogonal(D)  # where each head writes it
    write[0] = 0
    spaces = [write[:, i * H : (i + 1) * H] for i in range(OFFSETS)]
    for i in range(OFFSETS):
        head = slice(i * H, (i + 1) * H)
        q[0, :, head] *= 0.25
        k[0, :, head] *= 0.25
        phase = (i + 1) * frequency
        q[0, 0, head] = sharpness / constant * np.concatenate([np.cos(phase), -np.sin(phase)])
        k[0, 0, head] = sharpness / constant * np.concatenate([np.ones(H // 2), np.zeros(H // 2)])
        v[0, :, head] = read
        o[0, head, :] = 0.5 * spaces[i].T

    # Layer 1: token j back of the query against token j + 1 back of the key, each pair under its own rotation.
    sources = [read, *spaces]
    turns = [np.eye(H), *(orthogonal(H) for _ in range(OFFSETS))]
    for i in range(OFFSETS):
        head = slice(i * H, (i + 1) * H)
        query = sum(sources[j] @ turns[j] for j in range(i + 1))
        key = sum(sources[j + 1] @ turns[j] for j in range(i + 1))
        q[1, :, head] = 0.3 * q[1, :, head] + strength * query
        k[1, :, head] = 0.3 * k[1, :, head] + strength * key
    return {**params, "embed": {"embedding": embedding}, "layers": layers}
