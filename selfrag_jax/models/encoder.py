"""BERT as a sentence encoder: tokens to hidden states, and to one vector per text.

The layers are post-norm, as in Devlin et al. (2018). A text is one segment, so every token has type
0. Rows are padded on the right.

Axis letters: B batch   T tokens   N heads   H head dim   D embed   F mlp   L layers

Read in this order:
  1. BertConfig          the hyperparameters
  2. BertLayer, Bert     the network, as flax.nnx modules
  3. Encoder             what other modules use: pure functions of the parameters
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int

from selfrag_jax.models.attention import MASKED_SCORE
from selfrag_jax.models.params import DTYPES, Params

POOLINGS = ("mean", "cls")  # over the tokens of a text; the first token
_MIN_NORM = 1e-12  # of a vector that is normalized, as in torch.nn.functional.normalize


# ---- 1. hyperparameters --------------------------------------------------------------------------
def _gelu(x: Array) -> Array:
    """jax.nn.gelu computes the same with erfc, which is slower on a CPU."""
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": _gelu,
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


@dataclass(frozen=True)
class BertConfig:
    vocab_size: int
    embed_dim: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    max_length: int  # positions that have an embedding
    num_types: int  # token types; only type 0 is used
    norm_eps: float
    activation: str  # a key of ACTIVATIONS
    dtype: str  # of activations, e.g. "bfloat16"

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation={self.activation!r}: must be one of {', '.join(ACTIVATIONS)}"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r}: must be one of {', '.join(DTYPES)}")
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim={self.embed_dim} is not a multiple of num_heads={self.num_heads}"
            )

    @property
    def precision(self) -> jax.lax.Precision:
        """Of matrix products: float32 means float32 on accelerators, too."""
        is_full = self.dtype == "float32"
        return jax.lax.Precision.HIGHEST if is_full else jax.lax.Precision.DEFAULT


# ---- 2. the network ------------------------------------------------------------------------------
class BertLayer(nnx.Module):
    """One transformer layer."""

    def __init__(self, c: BertConfig, rngs: nnx.Rngs):
        self.c = c
        dtype = jnp.dtype(c.dtype)
        linear = partial(nnx.Linear, rngs=rngs, dtype=dtype, precision=c.precision)
        self.q, self.k, self.v, self.o = (linear(c.embed_dim, c.embed_dim) for _ in range(4))
        self.up = linear(c.embed_dim, c.mlp_dim)
        self.down = linear(c.mlp_dim, c.embed_dim)
        self.attention_norm, self.mlp_norm = _norm(c, rngs), _norm(c, rngs)

    def __call__(self, x: Float[Array, "B T D"], mask: Bool[Array, "B T"]) -> Float[Array, "B T D"]:
        """mask: tokens that are not padding."""
        x = self.attention_norm(x + self.o(self._attend(x, mask)))
        return self.mlp_norm(x + self.down(ACTIVATIONS[self.c.activation](self.up(x))))

    def _attend(self, x: Float[Array, "B T D"], mask: Bool[Array, "B T"]) -> Float[Array, "B T D"]:
        """Heads come before tokens, and weights are normalized last: the fastest on a CPU."""
        c, (B, T, D) = self.c, x.shape
        H = D // c.num_heads

        def heads_first(a):
            return a.reshape(B, T, c.num_heads, H).swapaxes(1, 2)

        product = partial(jnp.einsum, precision=c.precision, preferred_element_type=jnp.float32)
        q, k, v = heads_first(self.q(x) * H**-0.5), heads_first(self.k(x)), heads_first(self.v(x))
        scores = product("BNTH,BNSH->BNTS", q, k)
        scores = scores + jnp.where(mask, 0.0, MASKED_SCORE)[:, None, None, :]
        weights = jnp.exp(scores - scores.max(-1, keepdims=True))
        attended = product("BNTS,BNSH->BNTH", weights.astype(v.dtype), v)
        attended = attended / weights.sum(-1, keepdims=True)
        return attended.astype(x.dtype).swapaxes(1, 2).reshape(B, T, D)


class Bert(nnx.Module):
    def __init__(self, c: BertConfig, rngs: nnx.Rngs):
        self.c = c
        embed = partial(
            nnx.Embed,
            features=c.embed_dim,
            rngs=rngs,
            dtype=jnp.dtype(c.dtype),
            embedding_init=nnx.initializers.normal(0.02),
        )
        self.words, self.positions = embed(c.vocab_size), embed(c.max_length)
        self.types = embed(c.num_types)
        self.embed_norm = _norm(c, rngs)
        make_layer = nnx.vmap(lambda r: BertLayer(c, r), in_axes=0, out_axes=0)
        self.layers = nnx.split_rngs(splits=c.num_layers)(make_layer)(rngs)

    def hidden(self, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B T D"]:
        """mask: tokens that are not padding."""
        graph, layers = nnx.split(self.layers)
        x = self.words(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        x = self.embed_norm(x + self.types(jnp.zeros(1, jnp.int32)))
        # On a CPU, too: there, layers that are written out one by one are no faster.
        x, _ = jax.lax.scan(lambda x, layer: (nnx.merge(graph, layer)(x, mask), None), x, layers)
        return x


def _norm(c: BertConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Computes in float32 whatever the dtype; the fast variance would lose digits."""
    return nnx.LayerNorm(
        c.embed_dim,
        epsilon=c.norm_eps,
        rngs=rngs,
        dtype=jnp.dtype(c.dtype),
        use_fast_variance=False,
    )


# ---- 3. the encoder as pure functions ------------------------------------------------------------
@dataclass(frozen=True)
class Encoder:
    """Pure functions of the parameters; hashable, so jitted functions take it as static."""

    config: BertConfig

    def init(self, key: jax.Array) -> Params:
        """Returns random parameters (f32) as a nested dict."""
        return nnx.to_pure_dict(nnx.state(Bert(self.config, nnx.Rngs(params=key)), nnx.Param))

    def shapes(self) -> Params:
        """Returns the parameters as jax.ShapeDtypeStructs, without allocating them."""
        return jax.eval_shape(lambda: self.init(jax.random.key(0)))

    def hidden(
        self, params: Params, tokens: Int[Array, "B T"], lengths: Int[Array, " B"]
    ) -> Float[Array, "B T D"]:
        """Returns the last layer's hidden states; those of padding are arbitrary, but finite.

        lengths: tokens per row; the rest of the row is padding, of any valid id. Raises ValueError
        for rows that are longer than the model's positions.
        """
        T, most = tokens.shape[1], self.config.max_length
        if most < T:
            raise ValueError(f"rows of {T} tokens: this encoder has {most} positions")
        mask = jnp.arange(T) < jnp.asarray(lengths)[:, None]
        return self._merge(params).hidden(jnp.asarray(tokens), mask)

    def embed(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        lengths: Int[Array, " B"],
        pooling: str,
        normalize: bool,
    ) -> Float32[Array, "B D"]:
        """Returns one vector per row; a row of length 0 gets zeros.

        On a CPU, batches of about 1,000 tokens are fastest: their activations stay in the cache.
        pooling: one of POOLINGS. normalize: to unit length. Raises ValueError for another pooling,
        or as `hidden` does.
        """
        if pooling not in POOLINGS:
            raise ValueError(f"pooling={pooling!r}: must be one of {', '.join(POOLINGS)}")
        lengths = jnp.asarray(lengths)
        x = self.hidden(params, tokens, lengths).astype(jnp.float32)
        if pooling == "cls":
            vectors = jnp.where(lengths[:, None] > 0, x[:, 0], 0.0)
        else:
            mask = jnp.arange(x.shape[1]) < lengths[:, None]
            vectors = jnp.where(mask[..., None], x, 0.0).sum(1) / jnp.maximum(lengths, 1)[:, None]
        if not normalize:
            return vectors
        norms = jnp.sqrt(jnp.square(vectors).sum(-1, keepdims=True))
        return vectors / jnp.maximum(norms, _MIN_NORM)

    def _merge(self, params: Params) -> Bert:
        graph, state = nnx.split(
            nnx.eval_shape(lambda: Bert(self.config, nnx.Rngs(params=jax.random.key(0))))
        )
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)
