"""Ahead-of-time compilation of answering: the engine's device programs at their largest shapes.

The search itself runs on the host (search/), so the programs of engine/programs.py are all that a
chip runs. engine/shapes.py says how large their calls can become.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from selfrag_jax.answering.config import AnswerConfig
from selfrag_jax.engine import programs
from selfrag_jax.engine.engine import unstack_layers
from selfrag_jax.engine.segments import TokenRules
from selfrag_jax.engine.shapes import Call, Shapes
from selfrag_jax.errors import UserError
from selfrag_jax.models import roofline, sharding
from selfrag_jax.models.llama import Cache, LlamaConfig, Model
from selfrag_jax.models.params import Params
from selfrag_jax.text import reflection


def answering_shapes(c: AnswerConfig) -> Shapes:
    """Returns the shapes with all slots taken and prompts of the greatest length."""
    return c.search.shapes(c.batch, c.max_length)


def lower_programs(
    c: AnswerConfig, base: LlamaConfig, mesh: Mesh
) -> dict[str, tuple[jax.stages.Lowered, int]]:
    """Lowers the largest calls of the engine's programs.

    Returns by label the lowered program, and the bytes on a chip of what the engine holds beside
    the program's arguments. base: the model with the dtype and quantization that it will run in.
    Raises UserError if the mesh does not divide the heads, and for the released scorer.
    """
    num_chips = mesh.shape["tensor"]
    if base.num_kv_heads % num_chips:
        raise UserError(
            f"{num_chips} chips do not divide the model's {base.num_kv_heads} key-value heads"
        )
    if c.search.scorer == "released":
        raise UserError(
            "search.scorer=released: compile with paper; the released scripts' search has one "
            "beam, and needs less memory"
        )
    shapes = answering_shapes(c)
    calls = shapes.largest_calls(c.max_length, c.search.max_depth, c.search.keep_passages)
    engine = _DescribedEngine.create(c, base, mesh)
    lowered = {}
    with jax.set_mesh(mesh):
        for call in calls:
            args, beside = engine.arguments(call)
            program = getattr(programs, call.program).lower(*args)
            lowered[call.label] = program, bytes_per_chip(beside)
    return lowered


@dataclass(frozen=True)
class _DescribedEngine:
    """What the engine holds, with jax.ShapeDtypeStructs in place of arrays."""

    model: Model
    rules: TokenRules
    shapes: Shapes
    per_layer: bool
    samples: bool
    mesh: Mesh
    params: Params
    prefixes: Cache  # at their largest capacity
    branches: programs.Branches  # at their largest capacities

    @classmethod
    def create(cls, c: AnswerConfig, base: LlamaConfig, mesh: Mesh) -> _DescribedEngine:
        model, shapes, rules = Model(base), answering_shapes(c), _token_rules(base)
        per_layer = unstack_layers(mesh.devices.flat[0].platform, mesh.size)
        num_beams = shapes.num_slots * shapes.beam_width
        prefix_capacity = shapes.longest_prefix(c.max_length, c.search.max_depth)

        def empty_branches() -> programs.Branches:
            return programs.empty_branches(
                model,
                rules,
                shapes.num_slots,
                shapes.beam_width,
                shapes.num_passages,
                fed=shapes.first_fed_capacity(c.max_length),
                generated=shapes.max_new_tokens,
                max_new_tokens=shapes.max_new_tokens,
                per_layer=per_layer,
            )

        return cls(
            model=model,
            rules=rules,
            shapes=shapes,
            per_layer=per_layer,
            samples=c.search.sampling is not None,
            mesh=mesh,
            params=_described_params(model, mesh, per_layer),
            prefixes=_described_cache(model, mesh, per_layer, num_beams, prefix_capacity),
            branches=_with_split_heads(jax.eval_shape(empty_branches), mesh),
        )

    def arguments(self, call: Call) -> tuple[tuple[Any, ...], Any]:
        """Returns the arguments of a call, and what the engine holds beside them."""
        n, T, s = call.num_slots, call.length, self.shapes
        W, P, M = s.beam_width, s.num_passages, s.max_new_tokens
        model = self.model, self.params, self.rules
        params, prefixes, branches = self.params, self.prefixes, self.branches
        slots = self._int32(n)
        match call.label.removesuffix("_together"):
            case "prompt":
                rows = self._int32(n)
                tokens = self._int32(n, T), self._array(bool, n, T)
                args = *model, prefixes, slots, rows, *tokens, rows, W, True
                return args, branches.cache
            case "read_again":  # segments without their passages, after their parents' prefixes
                rows = self._int32(n * W)
                tokens = self._int32(n * W, T), self._array(bool, n * W, T)
                args = *model, prefixes, slots, rows, *tokens, rows, W, False
                return args, branches.cache
            case "passages":
                B = n * W * P
                rows, keys = self._int32(B), self._array(jnp.uint32, B, 2)
                tokens = self._int32(B, T), self._array(bool, B, T)
                return (*model, prefixes, branches, slots, *tokens, rows, rows, keys), ()
            case "segment":
                scalar = self._array(jnp.float32)
                sampling = (scalar, scalar) if self.samples else None
                return (*model, prefixes, branches, self._int32(), sampling), ()
            case "keep":
                rows = self._int32(n * W)
                cache = self._cache(s.num_slots * W * P, T + M)
                return (prefixes, cache, slots, rows, rows), params
            case "grow_branches":
                fed, generated = call.before
                cache = self._cache(s.num_slots * W * P, fed + generated)
                return (cache, fed, T, M), (params, prefixes)
            case "grow_prefixes":
                cache = self._cache(s.num_slots * W, call.before[0])
                return (cache, T), (params, branches.cache)
        raise ValueError(f"unknown call {call.label!r}")

    def _int32(self, *shape: int) -> jax.ShapeDtypeStruct:
        return self._array(jnp.int32, *shape)

    def _array(self, dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        replicated = NamedSharding(self.mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated)

    def _cache(self, rows: int, length: int) -> Cache:
        return _described_cache(self.model, self.mesh, self.per_layer, rows, length)


def _token_rules(base: LlamaConfig) -> TokenRules:
    """Returns rules for a vocabulary that ends with the reflection tokens and [PAD]."""
    first, pad = base.vocab_size - 1 - len(reflection.ALL), base.vocab_size - 1
    ids = reflection.lookup(lambda token: first + reflection.ALL.index(token))
    return TokenRules(eos=2, pad=pad, reflection=ids)


def _described_params(model: Model, mesh: Mesh, per_layer: bool) -> Params:
    def stored(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return x if x.dtype == jnp.int8 else x.update(dtype=model.config.dtype)

    params = jax.tree.map(stored, model.shapes())
    if per_layer:
        params = jax.eval_shape(model.per_layer, params)
    return jax.tree.map(_placed, params, sharding.shardings(mesh, params))


def _described_cache(model: Model, mesh: Mesh, per_layer: bool, rows: int, length: int) -> Cache:
    def empty() -> Cache:
        cache = Cache.empty(model.config, rows, length)
        return cache.per_layer() if per_layer else cache

    return _with_split_heads(jax.eval_shape(empty), mesh)


def _with_split_heads(tree: Any, mesh: Mesh) -> Any:
    """Shards keys and values over their heads, and replicates everything else.

    Keys and values are [L, B, K, ...], or [B, K, ...] if held per layer; no other array has that
    many axes.
    """

    def place(x):
        axes = (*[None] * (x.ndim - 3), "tensor", None, None) if x.ndim > 3 else ()
        return _placed(x, NamedSharding(mesh, PartitionSpec(*axes)))

    return jax.tree.map(place, tree)


def _placed(x, where: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def bytes_per_chip(tree: Any) -> int:
    """Returns the bytes that one chip holds of described arrays."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


# ---- what the chips can do at best ---------------------------------------------------------------
def roofline_times(
    c: AnswerConfig, base: LlamaConfig, mesh: Mesh, chip: roofline.Chip
) -> dict[str, Any]:
    """Returns the least seconds that the first segments of a full batch of questions take.

    They are what the chips' peak rates allow: for reading prompts and passages (arithmetic), and
    for a generated token of every branch (reading weights and caches).
    """
    Q, T, M = c.batch, c.max_length, c.search.max_new_tokens
    B = Q * answering_shapes(c).num_passages
    flops, bandwidth = mesh.size * chip.bf16_flops, mesh.size * chip.memory_bandwidth
    itemsize = jnp.dtype(base.dtype).itemsize

    prompt_flops = Q * T * roofline.decode_flops_per_token(base, T / 2)
    passage_flops = B * T * roofline.decode_flops_per_token(base, 1.5 * T)
    reading = (prompt_flops + passage_flops) / flops

    # Every step reads the whole output head, but only a few rows of the embedding.
    head_weights = base.vocab_size * base.embed_dim
    layer_weights = roofline.num_weights(base) - 2 * head_weights
    weight_bytes = layer_weights * (1 if base.quantized else itemsize) + head_weights * itemsize
    token_bytes = 2 * base.num_layers * base.num_kv_heads * base.head_dim * itemsize
    cache_bytes = token_bytes * (Q * T + B * (T + M / 2))
    step_flops = B * (roofline.decode_flops_per_token(base, 2 * T) + 2.0 * head_weights)
    step = max((weight_bytes + cache_bytes) / bandwidth, step_flops / flops)

    segment = reading + M * step
    return {
        "roofline_seconds": {
            "prompts_and_passages": reading,
            "generated_token": step,
            "segment": segment,
        },
        "roofline_questions_per_second": Q / segment,
    }
