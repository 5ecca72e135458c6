"""The Llama family as one function for training and decoding (Touvron et al., 2023).

Covers its relatives too: grouped-query attention (Llama-2 70B), scaled rotary frequencies (Llama
3.1), projection biases, and a sliding window (Mistral).

Axis letters, used the same everywhere:
  B batch   T query length   S cache length   R prefixes   P branches per prefix (B = R * P)
  N query heads   K kv heads   G query heads per kv head (N / K)   H head dim   Sp prefix length
  D embed   F mlp   V vocabulary   L layers

`Model.hidden` maps tokens to final hidden states and `Model.logits` maps those to the vocabulary,
so a caller computes logits only where it needs them. The key-value cache (cache.py) is explicit.
It may extend a `prefix`: a second, read-only cache of R rows. The P consecutive rows r*P ..
r*P+P-1 of the batch are branches of prefix r, so all passages of a question read one copy of their
common history.

Read in this order:
  1. LlamaConfig            the hyperparameters
  2. Linear, Block, Llama   the network, as flax.nnx modules
  3. Model                  what other modules use: pure functions of the parameters
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from selfrag_jax.models.attention import (
    ATTENTION_OUTPUT,
    BLOCK_SIZE,
    MASKED_SCORE,
    cached_attention,
    dense_attention,
    document_mask,
)
from selfrag_jax.models.attention_kernels import KERNELS, causal_attention, choose_kernel
from selfrag_jax.models.cache import Cache, Keys, Values, write_to_cache
from selfrag_jax.models.lora import LoraConfig
from selfrag_jax.models.params import DTYPES, Params, flatten, unflatten
from selfrag_jax.models.rope import RopeScaling, SinCos, apply_rope, rope_frequencies, rope_sin_cos
from selfrag_jax.models.sharding import constrain, platform

# ---- 1. hyperparameters --------------------------------------------------------------------------
# What a layer's forward pass saves for the backward pass; the rest is recomputed.
REMAT: dict[str, Callable[..., bool] | None] = {
    "none": None,  # saves everything
    "dots": jax.checkpoint_policies.save_from_both_policies(  # weight products, attention output
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(ATTENTION_OUTPUT),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,  # only the layer's input
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
    max_length: int  # context length in tokens that the model was trained for
    rope_theta: float
    norm_eps: float
    tie_embeddings: bool
    dtype: str  # of activations, e.g. "bfloat16"
    remat: str  # what the backward pass recomputes: a key of REMAT
    scan_unroll: int  # layers unrolled per scan step; 1 compiles fastest
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False  # of the q, k, v and o projections
    mlp_bias: bool = False
    sliding_window: int | None = None  # tokens that a query sees, itself included
    attention: str = "auto"  # kernel for whole sequences, see attention_kernels.py
    vocab_padding: int = 0  # unused rows after the vocabulary, so that a mesh divides the table
    lora: LoraConfig | None = None
    quantized: bool = False  # int8 kernels in the layers (inference only), see quantize.py
    # Factors of the layers' products are rounded to this type; sums stay in `dtype`. None: neither.
    product_dtype: str | None = None

    def __post_init__(self):
        # Nested configs are dicts when read from a file.
        if isinstance(self.lora, dict):
            object.__setattr__(self, "lora", LoraConfig(**self.lora))
        if self.remat not in REMAT:
            raise ValueError(f"remat={self.remat!r}: must be one of {', '.join(REMAT)}")
        if isinstance(self.rope_scaling, dict):
            object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
        if self.attention not in KERNELS:
            raise ValueError(f"attention={self.attention!r}: must be one of {', '.join(KERNELS)}")
        if self.product_dtype not in (None, *DTYPES):
            raise ValueError(
                f"product_dtype={self.product_dtype!r}: must be one of {', '.join(DTYPES)}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even for rotary embeddings")


# ---- 2. the network ------------------------------------------------------------------------------
# (q, k, v, *prefix keys and values) -> attention output.
Attention = Callable[..., Float[Array, "B T N H"]]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(
    x: Float[Array, "... inputs"],
    kernel: Float[Array, "inputs outputs"],
    rounded: jnp.dtype | None = None,
) -> Float[Array, "... outputs"]:
    """x @ kernel with a faster gradient of the kernel.

    JAX would compute its transpose and transpose that, for which XLA on a CPU copies the incoming
    gradient: a tenth of a training step.

    rounded: the type to round both factors to, here and in the gradients; sums stay in x's type.
    """
    return _product(x, kernel, rounded)


def _product(a, b, rounded):
    if rounded is None:
        return a @ b
    return jnp.matmul(a.astype(rounded), b.astype(rounded), preferred_element_type=a.dtype)


def _matmul_forward(x, kernel, rounded):
    return _product(x, kernel, rounded), (x, kernel)


def _matmul_backward(rounded, residuals, d_out):
    def rows(a):
        return a.reshape(-1, a.shape[-1])

    x, kernel = residuals
    d_x = _product(d_out, kernel.T, rounded)
    return d_x, _product(rows(x).T, rows(d_out), rounded).astype(kernel.dtype)


_matmul.defvjp(_matmul_forward, _matmul_backward)


class Linear(nnx.Linear):
    """y = x W. LoRA adds (x A) B * scale; quantized, W is int8 times a scale per output."""

    def __init__(
        self,
        c: LlamaConfig,
        inputs: int,
        outputs: int,
        rngs: nnx.Rngs,
        bias: bool = False,
        in_layer: bool = True,  # LoRA and int8 are for the layers only
    ):
        normal = nnx.initializers.lecun_normal()
        super().__init__(
            inputs, outputs, use_bias=bias, rngs=rngs, dtype=jnp.dtype(c.dtype), kernel_init=normal
        )
        self.quantized = c.quantized and in_layer
        if self.quantized:
            self.kernel = nnx.Param(jnp.zeros((inputs, outputs), jnp.int8))
            self.kernel_scale = nnx.Param(jnp.ones(outputs))
        self.rounded = jnp.dtype(c.product_dtype) if c.product_dtype and in_layer else None
        self.lora = c.lora if in_layer else None
        if self.lora is not None:
            self.lora_a = nnx.Param(normal(rngs.params(), (inputs, self.lora.rank)))
            self.lora_b = nnx.Param(jnp.zeros((self.lora.rank, outputs)))

    def __call__(self, inputs: Float[Array, "... i"], out_sharding=None) -> Float[Array, "... o"]:
        """out_sharding is part of nnx.Linear's interface and is not used."""

        def cast(param):
            return param[...].astype(self.dtype)

        x = inputs.astype(self.dtype)
        out = _matmul(x, cast(self.kernel), self.rounded)
        if self.quantized:
            out = (out * self.kernel_scale[...]).astype(self.dtype)
        if self.lora is not None:
            a, b = cast(self.lora_a), cast(self.lora_b)
            update = _matmul(_matmul(x, a, self.rounded), b, self.rounded)
            out = out + update * self.lora.scale
        return out if self.bias is None else out + cast(self.bias)


def _norm(c: LlamaConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(c.embed_dim, epsilon=c.norm_eps, rngs=rngs, dtype=jnp.dtype(c.dtype))


class Block(nnx.Module):
    """One transformer layer."""

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

    @jax.named_scope("qkv")
    def qkv(
        self, x: Float[Array, "B T D"], sin_cos: SinCos
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Returns the queries, keys and values of the new tokens, rotated to their positions."""
        c, (B, T, _) = self.c, x.shape
        h = self.attention_norm(x)
        q = apply_rope(self.q(h).reshape(B, T, c.num_heads, c.head_dim), sin_cos)
        k = apply_rope(self.k(h).reshape(B, T, c.num_kv_heads, c.head_dim), sin_cos)
        v = self.v(h).reshape(B, T, c.num_kv_heads, c.head_dim)
        return q, k, v

    def add_outputs(
        self, x: Float[Array, "B T D"], attended: Float[Array, "B T N H"]
    ) -> Float[Array, "B T D"]:
        """Adds the outputs of attention and of the MLP to the residual stream."""
        B, T, _ = x.shape
        with jax.named_scope("attention_output"):
            x = x + self.o(attended.reshape(B, T, -1))
        with jax.named_scope("mlp"):
            h = self.mlp_norm(x)
            return x + self.down(jax.nn.silu(self.gate(h)) * self.up(h))


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
        make_block = nnx.vmap(lambda r: Block(c, r), in_axes=0, out_axes=0)
        self.layers = nnx.split_rngs(splits=c.num_layers)(make_block)(rngs)
        self.norm = _norm(c, rngs)
        if not c.tie_embeddings:
            self.head = Linear(c, c.embed_dim, rows, rngs, in_layer=False)

    def hidden(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], attention: Attention
    ) -> Float[Array, "B T D"]:
        """Whole sequences, without a cache."""
        c = self.c
        graph, layers = nnx.split(self.layers)
        sin_cos = self._sin_cos(positions)

        def layer(x, state):
            block = nnx.merge(graph, state)
            return block.add_outputs(x, attention(*block.qkv(x, sin_cos))), None

        if c.remat != "none":
            # prevent_cse is for code outside of loops; CSE does not reach across scan steps.
            layer = jax.checkpoint(layer, prevent_cse=False, policy=REMAT[c.remat])
        unroll = c.num_layers if self._unroll_layers() else c.scan_unroll
        x, _ = jax.lax.scan(layer, self._embed(tokens), layers, unroll=unroll)
        return self.norm(x)

    def hidden_cached(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        attention: Attention,
        cache: Cache,
        prefix: Cache | None,
        layer_params: tuple[Params, ...] | None = None,
    ) -> tuple[Float[Array, "B T D"], Keys, Values]:
        """Returns hidden states, and the cache's keys and values with those of `tokens` written.

        layer_params: each layer's parameters if they are not stacked; then cache and prefix must be
        per layer, too.
        """
        graph, layers = nnx.split(self.layers)
        sin_cos = self._sin_cos(positions)

        def run_layer(x, k_cache, v_cache, state, prefix_kv, layer=None):
            block = nnx.merge(graph, state)
            q, k, v = block.qkv(x, sin_cos)
            k_cache, v_cache = write_to_cache(k_cache, v_cache, k, v, cache.cursor, layer)
            k, v = k_cache, v_cache
            if layer is not None:
                k, v = (jax.lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in (k, v))
            x = block.add_outputs(x, attention(q, k, v, *(prefix_kv or ())))
            return x, k_cache, v_cache

        x = self._embed(tokens)
        if layer_params is not None:
            new = []
            for i, params in enumerate(layer_params):
                state = jax.tree.map(lambda p: p, layers)
                nnx.replace_by_pure_dict(state, params)
                prefix_kv = None if prefix is None else (prefix.k[i], prefix.v[i])
                x, *kv = run_layer(x, cache.k[i], cache.v[i], state, prefix_kv)
                new.append(kv)
            new_k, new_v = zip(*new, strict=True)
            return self.norm(x), new_k, new_v

        # The scan carries the whole cache, and each layer updates its part in place. If the layers'
        # caches were scanned outputs, every decoding step would copy the cache.
        def scan_step(carry, xs):
            (x, k_cache, v_cache), (layer, state, prefix_kv) = carry, xs
            return run_layer(x, k_cache, v_cache, state, prefix_kv, layer), None

        prefixes = None if prefix is None else (prefix.k, prefix.v)
        xs = (jnp.arange(self.c.num_layers), layers, prefixes)
        (x, k, v), _ = jax.lax.scan(scan_step, (x, cache.k, cache.v), xs, unroll=self.c.scan_unroll)
        return self.norm(x), k, v

    @jax.named_scope("logits")
    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        out = self.embed.attend(hidden) if self.c.tie_embeddings else self.head(hidden)
        out = out.astype(jnp.float32)
        if not self.c.vocab_padding:
            return out
        return jnp.where(jnp.arange(out.shape[-1]) < self.c.vocab_size, out, MASKED_SCORE)

    @jax.named_scope("embed")
    def _embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        # The table is split by vocabulary; activations are split by batch only.
        return constrain(self.embed(tokens), ("data", "fsdp"), None, None)

    def _sin_cos(self, positions: Int[Array, "B T"]) -> SinCos:
        c = self.c
        return rope_sin_cos(positions, rope_frequencies(c.head_dim, c.rope_theta, c.rope_scaling))

    def _unroll_layers(self) -> bool:
        """Unroll layers when training on CPU: scan copies stacked residuals (4% of a step).

        Small models and deep ones stay in a scan to compile fast. So does remat: outside of a loop
        it saves no memory.
        """
        c = self.c
        large, shallow = c.embed_dim * c.mlp_dim >= 2**19, c.num_layers <= 16
        return platform() == "cpu" and large and shallow and c.remat == "none"


# ---- 3. the model as pure functions --------------------------------------------------------------
@dataclass(frozen=True)
class Model:
    """Pure functions of the parameters; hashable, so jitted functions take it as static."""

    config: LlamaConfig

    def init(self, key: jax.Array, embed_std: float = 0.02) -> Params:
        """Returns random parameters (f32) as a nested dict.

        Kernels that write to the residual stream start at 1 / sqrt(2 L) of their usual scale
        (Radford et al., 2019). A narrow model needs an `embed_std` near 0.5 instead of Llama's
        0.02: else the first layers drown the embeddings, and copying takes many times longer to
        learn. With tied embeddings the last norm starts at 1 / (embed_std * sqrt(D)), so that the
        first logits have unit scale.
        """
        params = nnx.to_pure_dict(nnx.state(Llama(self.config, nnx.Rngs(params=key)), nnx.Param))
        if self.config.quantized:  # only the shapes matter
            return params
        for module in ("o", "down"):
            params["layers"][module]["kernel"] *= (2 * self.config.num_layers) ** -0.5
        params["embed"]["embedding"] *= embed_std / 0.02
        if self.config.tie_embeddings:
            params["norm"]["scale"] *= min(1.0, 1 / (embed_std * self.config.embed_dim**0.5))
        return params

    def shapes(self) -> Params:
        """Returns the parameters as jax.ShapeDtypeStructs, without allocating them."""
        return jax.eval_shape(lambda: self.init(jax.random.key(0)))

    def per_layer(self, params: Params) -> Params:
        """Returns the parameters with a tuple of layers instead of their stack.

        `hidden` takes them together with a cache that is per layer (see Cache.per_layer).
        """
        layers = tuple(
            jax.tree.map(lambda x, i=i: x[i], params["layers"])
            for i in range(self.config.num_layers)
        )
        return {**params, "layers": layers}

    def rounded(self, params: Params) -> Params:
        """Returns the parameters with the layers' kernels in `product_dtype`, if there is one.

        Products round them to it anyway: the same results, without a cast in every call. For
        inference; a training keeps its parameters as they are.
        """
        dtype = self.config.product_dtype
        if dtype is None or self.config.quantized:
            return params
        kernels = {
            path: leaf.astype(dtype)
            for path, leaf in flatten(params["layers"])
            if path[-1] == "kernel"
        }
        layers = [(path, kernels.get(path, leaf)) for path, leaf in flatten(params["layers"])]
        return {**params, "layers": unflatten(layers)}

    def hidden(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        doc_ids: Int[Array, "B T"] | Bool[Array, "B T"] | None,
        cache: Cache | None = None,
        prefix: Cache | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Returns the final hidden states of `tokens`, and the updated cache (None without one).

        doc_ids: 0 for padding. Without a cache, a token sees itself and the tokens before it in its
        document; None means that every row is one document with its padding at the end. With a
        cache, tokens are written at `cache.cursor`, and see themselves and all valid entries of
        earlier positions.
        prefix: a cache of R rows, each shared by B / R branches; it is only read.
        """
        if cache is None:
            if prefix is not None:
                raise ValueError("a prefix is read together with a cache; there is none")
            return self._hidden_of_sequences(params, tokens, positions, doc_ids), None
        module = self._merge(params)
        T, S = tokens.shape[1], cache.valid.shape[1]
        doc_ids = jnp.ones_like(tokens) if doc_ids is None else doc_ids

        def write(old, new):
            return jax.lax.dynamic_update_slice_in_dim(old, new, cache.cursor, axis=1)

        valid = write(cache.valid, jnp.asarray(doc_ids) > 0)
        key_positions = write(cache.positions, jnp.asarray(positions, jnp.int32))
        # Padding sees itself, so that no query is without a key.
        is_self = jnp.arange(S) == cache.cursor + jnp.arange(T)[:, None]
        causal = key_positions[:, None, :] <= positions[..., None]
        visible = valid[:, None, :] & causal & self._in_window(positions, key_positions)
        mask = visible | is_self
        prefix_mask = None if prefix is None else self._prefix_mask(positions, prefix)

        @jax.named_scope("attention")
        def attention(q, k, v, prefix_k=None, prefix_v=None):
            return cached_attention(q, k, v, mask, prefix_k, prefix_v, prefix_mask)

        layer_params = params["layers"] if isinstance(params["layers"], tuple) else None
        hidden, k, v = module.hidden_cached(
            tokens, positions, attention, cache, prefix, layer_params
        )
        return hidden, Cache(k, v, valid, key_positions, cache.cursor + T)

    def logits(self, params: Params, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Returns f32 logits; padding rows of the vocabulary get no probability."""
        return self._merge(params).logits(hidden)

    def _hidden_of_sequences(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        doc_ids: Int[Array, "B T"] | Bool[Array, "B T"] | None,
    ) -> Float[Array, "B T D"]:
        c, module = self.config, self._merge(params)
        kernel = choose_kernel(c.attention, tokens.shape[1], c.head_dim, c.dtype)
        mask = None
        if kernel == "xla" and tokens.shape[1] < 2 * BLOCK_SIZE:  # one mask for all layers
            ids = jnp.ones_like(tokens) if doc_ids is None else doc_ids
            mask = document_mask(ids, c.sliding_window)

        @jax.named_scope("attention")
        def attention(q, k, v):
            if mask is not None:
                return dense_attention(q, k, v, mask)
            return causal_attention(q, k, v, doc_ids, c.sliding_window, kernel)

        return module.hidden(tokens, positions, attention)

    def _merge(self, params: Params) -> Llama:
        """Returns the module with these parameters; without layers if they are given per layer."""
        graph, state = nnx.split(
            nnx.eval_shape(lambda: Llama(self.config, nnx.Rngs(params=jax.random.key(0))))
        )
        if isinstance(params["layers"], tuple):
            params = {name: x for name, x in params.items() if name != "layers"}
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)

    def _in_window(
        self, positions: Int[Array, "B T"], key_positions: Int[Array, "B S"]
    ) -> Bool[Array, " ..."]:
        """Returns which keys the sliding window leaves visible: [B, T, S], or [] without one."""
        if self.config.sliding_window is None:
            return jnp.array(True)
        return positions[..., None] - key_positions[:, None, :] < self.config.sliding_window

    def _prefix_mask(
        self, positions: Int[Array, "B T"], prefix: Cache
    ) -> Bool[Array, " R #P #T Sp"]:
        valid = prefix.valid[:, None, None, :]
        if self.config.sliding_window is None:
            return valid
        R, T = prefix.valid.shape[0], positions.shape[1]
        query_positions = positions.reshape(R, -1, T)[..., None]
        distance = query_positions - prefix.positions[:, None, None, :]
        return valid & (distance < self.config.sliding_window)
