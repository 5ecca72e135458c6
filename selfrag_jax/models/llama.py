"""The Llama family as one function for training and decoding (Touvron et al., 2023; grouped-query attention as in
Llama-2 70B, stretched rotary frequencies as in Llama 3.1, biases and a sliding window as in its relatives).

Axis letters, used the same everywhere:
  B batch   T query length   S cache length   R prefixes (B = R * P)   P branches of one prefix
  N query heads   K kv heads   G = N / K   H head dim   D embed   F mlp   V vocabulary   L layers

`Model.hidden` maps tokens to final hidden states, `Model.logits` maps hidden states to the vocabulary, so that a
caller computes logits only where it needs them. The key-value cache is explicit. A cache may stand on a `prefix`: a
second, read-only cache of R rows that the P consecutive branch rows r*P .. r*P+P-1 share, so that all passages of a
question read one copy of their common history.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import nnx

from selfrag_jax.models.attention import (
    BLOCK,
    KERNELS,
    MASKED,
    OUTPUT,
    RopeScaling,
    attend,
    attend_cached,
    attend_sequences,
    choose_kernel,
    document_mask,
    platform,
    rope,
    rope_frequencies,
    rope_sin_cos,
)
from selfrag_jax.models.lora import LoraConfig
from selfrag_jax.models.params import Params
from selfrag_jax.models.sharding import constrain

# What the forward pass keeps of a layer for the backward pass; the rest is computed again.
REMAT = {
    "none": None,  # everything is kept
    "dots": jax.checkpoint_policies.save_from_both_policies(  # the products with weights, and what attention gives
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(OUTPUT),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,  # its input only
}


@dataclass(frozen=True)
class LlamaConfig:
    vocab_size: int
    embed_dim: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_length: int  # tokens the model was trained to attend over
    rope_theta: float
    norm_eps: float
    tie_embeddings: bool
    dtype: str  # of activations, e.g. "bfloat16"
    remat: str  # what the backward pass computes again: "none", "dots" (all but products with weights) or "full"
    scan_unroll: int  # layers unrolled per scan step: 1 compiles fastest
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False  # of the q, k, v and o projections
    mlp_bias: bool = False
    sliding_window: int | None = None  # tokens a query sees, itself among them
    attention: str = "auto"  # kernel for whole sequences, see attention.py
    vocab_padding: int = (
        0  # rows behind the vocabulary that no token has, so that a mesh divides the table
    )
    lora: LoraConfig | None = None
    quantized: bool = False  # kernels of the layers in int8, see quantize.py; for inference

    def __post_init__(self):
        if isinstance(self.lora, dict):
            object.__setattr__(self, "lora", LoraConfig(**self.lora))
        if self.remat not in REMAT:
            raise ValueError(f"remat={self.remat!r}: must be one of {', '.join(REMAT)}")
        if isinstance(self.rope_scaling, dict):  # as read from a file
            object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
        if self.attention not in KERNELS:
            raise ValueError(f"attention={self.attention!r}: must be one of {', '.join(KERNELS)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even for rotary embeddings")


@jax.tree_util.register_dataclass
@dataclass
class Cache:
    """Keys and values of past tokens. Where they stand says nothing of their order; their positions do."""

    k: (
        jax.Array | tuple[jax.Array, ...]
    )  # [L, B, K, H, S]: by channels, as products with many of them read keys
    v: (
        jax.Array | tuple[jax.Array, ...]
    )  # [L, B, K, S, H]; or both by layers, L times [B, K, H, S] and [B, K, S, H]
    valid: jax.Array  # [B, S] bool: False for padding and for slots not yet written
    positions: jax.Array  # [B, S] int32: of the tokens in the slots
    cursor: jax.Array  # [] int32: the next slot to write, shared by all rows

    @classmethod
    def empty(cls, config: LlamaConfig, batch: int, length: int) -> Cache:
        rows, dtype = (config.num_layers, batch, config.num_kv_heads), jnp.dtype(config.dtype)
        k, v = (
            jnp.zeros((*rows, config.head_dim, length), dtype),
            jnp.zeros((*rows, length, config.head_dim), dtype),
        )
        valid, positions = jnp.zeros((batch, length), bool), jnp.zeros((batch, length), jnp.int32)
        return cls(k, v, valid, positions, jnp.int32(0))

    def over_tokens(self, change: Callable[..., jax.Array], *others: Cache) -> Cache:
        """With `change(array, axis of the tokens, the others' arrays)` in place of each array; the cursor stays."""
        one = lambda behind: lambda x, *more: change(x, x.ndim - behind, *more)  # noqa: E731
        fields = (
            ("k", 1),
            ("v", 2),
            ("valid", 1),
            ("positions", 1),
        )  # the tokens' axis, from behind
        new = {
            n: jax.tree.map(one(behind), getattr(self, n), *(getattr(o, n) for o in others))
            for n, behind in fields
        }
        return replace(self, **new)

    def longer(self, more: int) -> Cache:
        """With `more` empty slots at the end."""
        return self.over_tokens(
            lambda x, axis: jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)])
        )

    def per_layer(self) -> Cache:
        """For many small steps on a CPU or a GPU: there XLA copies a layer of a stack to read it, more bytes than all weights have."""
        return replace(self, k=tuple(self.k), v=tuple(self.v))


@jax.custom_vjp
def _product(x, kernel):
    """x: [..., inputs]; kernel: [inputs, outputs]."""
    return x @ kernel


def _product_forward(x, kernel):
    return x @ kernel, (x, kernel)


def _product_backward(saved, d):
    """JAX itself would compute the kernel's gradient the other way around and turn it, for which XLA on a CPU copies `d`: a
    tenth of a whole training step."""
    x, kernel = saved
    rows = lambda a: a.reshape(-1, a.shape[-1])  # noqa: E731
    return d @ kernel.T, rows(x).T @ rows(d)


_product.defvjp(_product_forward, _product_backward)


class Linear(nnx.Linear):
    """y = x W, with LoRA y = x W + (x A) B * scale; quantized, W is int8 times a scale for each output."""

    def __init__(
        self,
        c: LlamaConfig,
        inputs: int,
        outputs: int,
        rngs,
        bias: bool = False,
        adapted: bool = True,
    ):
        normal = nnx.initializers.lecun_normal()
        super().__init__(
            inputs, outputs, use_bias=bias, rngs=rngs, dtype=jnp.dtype(c.dtype), kernel_init=normal
        )
        self.quantized = c.quantized and adapted
        if self.quantized:
            self.kernel = nnx.Param(jnp.zeros((inputs, outputs), jnp.int8))
            self.kernel_scale = nnx.Param(jnp.ones(outputs))
        self.lora = c.lora if adapted else None
        if self.lora is not None:
            self.lora_a = nnx.Param(normal(rngs.params(), (inputs, self.lora.rank)))
            self.lora_b = nnx.Param(jnp.zeros((self.lora.rank, outputs)))

    def __call__(self, x):
        cast = lambda p: p[...].astype(self.dtype)  # noqa: E731
        x = x.astype(self.dtype)
        out = _product(x, cast(self.kernel))
        if self.quantized:
            out = (out * self.kernel_scale[...]).astype(self.dtype)
        if self.lora is not None:
            out = (
                out + _product(_product(x, cast(self.lora_a)), cast(self.lora_b)) * self.lora.scale
            )
        return out if self.bias is None else out + cast(self.bias)


def _norm(c: LlamaConfig, rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(c.embed_dim, epsilon=c.norm_eps, rngs=rngs, dtype=jnp.dtype(c.dtype))


class Block(nnx.Module):
    def __init__(self, c: LlamaConfig, rngs: nnx.Rngs):
        self.c = c
        self.attention_norm, self.mlp_norm = _norm(c, rngs), _norm(c, rngs)
        self.q = Linear(c, c.embed_dim, c.num_heads * c.head_dim, rngs, c.attention_bias)
        self.k = Linear(c, c.embed_dim, c.num_kv_heads * c.head_dim, rngs, c.attention_bias)
        self.v = Linear(c, c.embed_dim, c.num_kv_heads * c.head_dim, rngs, c.attention_bias)
        self.o = Linear(c, c.num_heads * c.head_dim, c.embed_dim, rngs, c.attention_bias)
        self.gate = Linear(c, c.embed_dim, c.mlp_dim, rngs, c.mlp_bias)
        self.up = Linear(c, c.embed_dim, c.mlp_dim, rngs, c.mlp_bias)
        self.down = Linear(c, c.mlp_dim, c.embed_dim, rngs, c.mlp_bias)

    def __call__(self, x, turned, attention, write=None):
        """x: [B, T, D]; turned: from `rotation`; attention: (q, k, v) -> [B, T, N, H] over all keys; write: (k, v) of the new
        tokens -> those of all, and what the caller keeps of them. Returns x and that, or None."""
        c, (B, T, _) = self.c, x.shape
        h = self.attention_norm(x)
        q = rope(self.q(h).reshape(B, T, c.num_heads, c.head_dim), turned)
        k = rope(self.k(h).reshape(B, T, c.num_kv_heads, c.head_dim), turned)
        v = self.v(h).reshape(B, T, c.num_kv_heads, c.head_dim)
        k, v, kept = (k, v, None) if write is None else write(k, v)
        x = x + self.o(attention(q, k, v).reshape(B, T, -1))
        h = self.mlp_norm(x)
        x = x + self.down(jax.nn.silu(self.gate(h)) * self.up(h))
        return x, kept


class Llama(nnx.Module):
    def __init__(self, c: LlamaConfig, rngs: nnx.Rngs):
        self.c, rows = c, c.vocab_size + c.vocab_padding
        self.embed = nnx.Embed(
            rows,
            c.embed_dim,
            rngs=rngs,
            dtype=jnp.dtype(c.dtype),
            embedding_init=nnx.initializers.normal(0.02),
        )
        make = nnx.split_rngs(splits=c.num_layers)(
            nnx.vmap(lambda r: Block(c, r), in_axes=0, out_axes=0)
        )
        self.layers = make(rngs)
        self.norm = _norm(c, rngs)
        if not c.tie_embeddings:
            self.head = Linear(c, c.embed_dim, rows, rngs, adapted=False)

    def hidden(
        self,
        tokens,
        positions,
        attention,
        cache: Cache | None,
        prefix: Cache | None,
        per_layer=None,
    ):
        """attention: (q, k, v, *prefix) -> [B, T, N, H], prefix being the layer's own keys and values, if there is one.
        by_layers: the parameters of each layer, where they are not stacked; then nor are cache and prefix."""
        c = self.c
        graph, layers = nnx.split(self.layers)
        turned = rope_sin_cos(positions, rope_frequencies(c.head_dim, c.rope_theta, c.rope_scaling))

        def layer(x, state):
            return nnx.merge(graph, state)(x, turned, attention)

        def cached_layer(carry, per_layer):
            """The whole cache is carried through the layers, each of which writes its own part in place: were it handed out and
            collected by layers, every step of decoding would copy it."""
            (x, *slots), (i, state, prefix_kv) = carry, per_layer

            def write(k, v):
                new = (
                    (k.transpose(0, 2, 3, 1), (0, 0, 0, cache.cursor)),
                    (v.swapaxes(1, 2), (0, 0, cache.cursor, 0)),
                )
                if i is None:
                    whole = [
                        jax.lax.dynamic_update_slice(s, n, at)
                        for s, (n, at) in zip(slots, new, strict=True)
                    ]
                    return *whole, whole
                whole = [
                    jax.lax.dynamic_update_slice(s, n[None], (i, *at))
                    for s, (n, at) in zip(slots, new, strict=True)
                ]
                return *(jax.lax.dynamic_index_in_dim(s, i, keepdims=False) for s in whole), whole

            attend_all = lambda q, k, v: attention(q, k, v, *(prefix_kv or ()))  # noqa: E731
            x, whole = nnx.merge(graph, state)(x, turned, attend_all, write)
            return (x, *whole), None

        if c.remat != "none":
            layer = jax.checkpoint(
                layer, prevent_cse=False, policy=REMAT[c.remat]
            )  # in a scan there is nothing to merge
        # Looked up in a table that is split by vocabulary; from here on the rows are split, the embedding is whole.
        x = constrain(self.embed(tokens), ("data", "fsdp"), None, None)
        if cache is None:
            x, _ = jax.lax.scan(
                layer, x, layers, unroll=c.num_layers if self._written_out() else c.scan_unroll
            )
            return self.norm(x), None
        if per_layer is not None:
            new = []
            for j, slots in enumerate(zip(cache.k, cache.v, strict=True)):
                state = jax.tree.map(lambda p: p, layers)
                nnx.replace_by_pure_dict(state, per_layer[j])
                (x, *whole), _ = cached_layer(
                    (x, *slots), (None, state, prefix and (prefix.k[j], prefix.v[j]))
                )
                new.append(whole)
            return self.norm(x), tuple(zip(*new, strict=True))
        per_layer = (
            jnp.arange(c.num_layers),
            layers,
            None if prefix is None else (prefix.k, prefix.v),
        )
        (x, *new), _ = jax.lax.scan(
            cached_layer, (x, cache.k, cache.v), per_layer, unroll=c.scan_unroll
        )
        return self.norm(x), new

    def _written_out(self) -> bool:
        """Whether whole sequences go through layers that are written out one by one in the program: on a CPU, where XLA clears the
        stacks that a loop collects what the backward pass needs in, and copies to and from them (4% of a step of 0.1B parameters).
        Small models would rather compile fast, and many layers too; and outside a loop nothing is saved by computing it again."""
        c = self.c
        return (
            platform() == "cpu"
            and c.embed_dim * c.mlp_dim >= 2**19
            and c.num_layers <= 16
            and c.remat == "none"
        )

    def logits(self, hidden):
        out = (self.embed.attend(hidden) if self.c.tie_embeddings else self.head(hidden)).astype(
            jnp.float32
        )
        if not self.c.vocab_padding:
            return out
        return jnp.where(jnp.arange(out.shape[-1]) < self.c.vocab_size, out, MASKED)


@dataclass(frozen=True)
class Model:
    """The model as pure functions of its parameters; hashable, so a jitted function can take it as a static argument."""

    config: LlamaConfig

    def init(self, key: jax.Array, embed_std: float = 0.02) -> Params:
        """Random parameters (f32) as a nested dict.

        What is written into the residual stream starts at 1 / sqrt(2 L) of its usual scale (Radford et al., 2019), and
        a narrow model wants embeddings of a standard deviation near 0.5 rather than Llama's 0.02: else the first
        layers drown the embeddings, and copying takes many times longer to learn. With tied embeddings the last norm
        starts at 1 / (embed_std * sqrt(D)), so that the first logits have unit scale.
        """
        params = nnx.to_pure_dict(nnx.state(Llama(self.config, nnx.Rngs(params=key)), nnx.Param))
        if self.config.quantized:  # of which only the shapes are asked for
            return params
        for module in ("o", "down"):
            params["layers"][module]["kernel"] *= (2 * self.config.num_layers) ** -0.5
        params["embed"]["embedding"] *= embed_std / 0.02
        if self.config.tie_embeddings:
            params["norm"]["scale"] *= min(1.0, 1 / (embed_std * self.config.embed_dim**0.5))
        return params

    def shapes(self) -> Params:
        """The parameters as jax.ShapeDtypeStructs, without allocating them."""
        return jax.eval_shape(lambda: self.init(jax.random.key(0)))

    def per_layer(self, params: Params) -> Params:
        """The same parameters with a tuple of layers in place of their stack, for `hidden` with a cache (see Cache.by_layers)."""
        layers = tuple(
            jax.tree.map(lambda x, i=i: x[i], params["layers"])
            for i in range(self.config.num_layers)
        )
        return {**params, "layers": layers}

    def _merge(self, params: Params) -> Llama:
        graph, state = nnx.split(
            nnx.eval_shape(lambda: Llama(self.config, nnx.Rngs(params=jax.random.key(0))))
        )
        stacked = not isinstance(params["layers"], tuple)  # else the layers are given one by one
        nnx.replace_by_pure_dict(
            state, params if stacked else {k: v for k, v in params.items() if k != "layers"}
        )
        return nnx.merge(graph, state)

    def hidden(
        self,
        params: Params,
        tokens: jax.Array,
        positions: jax.Array,
        doc_ids: jax.Array | None,
        cache: Cache | None = None,
        prefix: Cache | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Final hidden states of `tokens`.

        tokens, positions: [B, T] int32. doc_ids: [B, T], 0 for padding. Without a cache a token sees itself and what
        stands before it in its document; None means that every row is one document with its padding at the end. With a
        cache, real tokens are written at `cache.cursor` and see all valid slots of earlier positions and themselves. prefix: a cache
        of R rows shared by B / R branches each; it is read, not written.
        Returns hidden [B, T, D] and the updated cache (None without one).
        """
        c, module = self.config, self._merge(params)
        if cache is None:
            if prefix is not None:
                raise ValueError("a prefix is read together with a cache; there is none")
            kernel = choose_kernel(c.attention, tokens.shape[1], c.head_dim, c.dtype)
            if (
                kernel == "xla" and tokens.shape[1] < 2 * BLOCK
            ):  # the mask is the same in all layers
                mask = document_mask(
                    jnp.ones_like(tokens) if doc_ids is None else doc_ids, c.sliding_window
                )
                attention = lambda q, k, v: attend(q, k, v, mask)  # noqa: E731
            else:
                attention = lambda q, k, v: attend_sequences(
                    q, k, v, doc_ids, c.sliding_window, kernel
                )  # noqa: E731
            return module.hidden(tokens, positions, attention, None, None)[0], None
        T, S = tokens.shape[1], cache.valid.shape[1]
        doc_ids = jnp.ones_like(tokens) if doc_ids is None else doc_ids
        write = lambda slots, new: jax.lax.dynamic_update_slice_in_dim(
            slots, new, cache.cursor, axis=1
        )  # noqa: E731
        valid, slots = (
            write(cache.valid, jnp.asarray(doc_ids) > 0),
            write(cache.positions, jnp.asarray(positions, jnp.int32)),
        )
        own = (
            jnp.arange(S) == cache.cursor + jnp.arange(T)[:, None]
        )  # padding sees itself, so that no row is empty
        causal = slots[:, None, :] <= positions[..., None]
        mask = (valid[:, None, :] & causal & self._near(positions, slots)) | own
        prefix_mask = None if prefix is None else self._prefix_mask(positions, prefix)
        attention = lambda q, *kv: attend_cached(
            q, *kv[:2], mask, *kv[2:], *([prefix_mask] if kv[2:] else [])
        )  # noqa: E731
        per_layer = params["layers"] if isinstance(params["layers"], tuple) else None
        hidden, (k, v) = module.hidden(tokens, positions, attention, cache, prefix, per_layer)
        return hidden, Cache(k, v, valid, slots, cache.cursor + T)

    def _near(self, positions: jax.Array, slots: jax.Array) -> jax.Array:
        """Which keys a sliding window leaves in sight. positions: [B, T], slots: [B, S] -> [B, T, S] (or [] for all)."""
        if self.config.sliding_window is None:
            return jnp.array(True)
        return positions[..., None] - slots[:, None, :] < self.config.sliding_window

    def _prefix_mask(self, positions: jax.Array, prefix: Cache) -> jax.Array:
        """Broadcasts to [R, P, T, S']."""
        valid = prefix.valid[:, None, None, :]
        if self.config.sliding_window is None:
            return valid
        R = prefix.valid.shape[0]
        back = (
            positions.reshape(R, -1, positions.shape[1])[..., None]
            - prefix.positions[:, None, None, :]
        )
        return valid & (back < self.config.sliding_window)

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """[..., D] -> [..., V] in f32; padding rows of the vocabulary, if there are any, have no probability."""
        return self._merge(params).logits(hidden)
