"""Ahead-of-time compilation of answering: what reading prompts and passages, and generating segments for all of them, need on a
TPU slice or GPUs that are not here. The search itself runs on the host (decoding/beam_search.py)."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from selfrag_jax.answering.config import AnswerConfig
from selfrag_jax.engine import programs
from selfrag_jax.engine.engine import unstack_layers
from selfrag_jax.engine.segments import TokenRules
from selfrag_jax.engine.shapes import bucket, first_feed, first_room, group_size, ring
from selfrag_jax.errors import UserError
from selfrag_jax.models import roofline, sharding
from selfrag_jax.models.llama import Cache, LlamaConfig, Model
from selfrag_jax.text import reflection


def lower(c: AnswerConfig, base: LlamaConfig, mesh: Mesh) -> dict[str, tuple[Any, int]]:
    """The engine's own jitted programs (decoding/slots.py), lowered, at the greatest lengths of prompt and passage and on the
    longest history of `max_depth` segments. By name: the program, and the bytes on a chip of what the engine holds beside its
    arguments.

    base: the model, its type and bits as they will run. Raises BadInput where the mesh does not divide its heads.
    """
    if base.num_kv_heads % mesh.shape["tensor"]:
        raise UserError(
            f"{mesh.shape['tensor']} chips do not divide the model's {base.num_kv_heads} key-value heads"
        )
    if c.search.scorer == "released":
        raise UserError(
            "search.scorer=released: compile with paper; the released scripts' search has one lane, and needs less"
        )
    model, search, Q, T = Model(base), c.search, c.batch, c.max_length
    W, P, M = 1 if search.max_depth == 1 else search.beam_width, search.ndocs, search.max_new_tokens
    first = len(reflection.ALL)
    ids = reflection.lookup(lambda token: base.vocab_size - 1 - first + reflection.ALL.index(token))
    rules = TokenRules(2, base.vocab_size - 1, ids)
    whole = NamedSharding(mesh, PartitionSpec())
    # Of a cache: [L, B, K, ...], or of one layer [B, K, ...].
    heads = lambda n: NamedSharding(mesh, PartitionSpec(*[None] * (n - 3), "tensor", None, None))  # noqa: E731
    shape = lambda s, p=whole: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p)  # noqa: E731
    rows = lambda kind, *size: jax.ShapeDtypeStruct(size, kind, sharding=whole)  # noqa: E731
    stored = jax.tree.map(
        lambda s: (
            s if s.dtype == jnp.int8 or base.dtype == "float32" else s.update(dtype=base.dtype)
        ),
        model.shapes(),
    )
    layered = unstack_layers(mesh.devices.flat[0].platform, mesh.size)
    cache = lambda *size: (
        Cache.empty(base, *size).per_layer() if layered else Cache.empty(base, *size)
    )  # noqa: E731
    stored = jax.eval_shape(model.per_layer, stored) if layered else stored
    params = jax.tree.map(shape, stored, sharding.shardings(mesh, stored))
    sharded = lambda tree: jax.tree.map(
        lambda s: shape(s, heads(s.ndim) if s.ndim > 3 else whole), tree
    )  # noqa: E731
    history, fed = longest_history(c), first_feed(T, P, search.length_bucket)
    empty = lambda: programs.empty(model, rules, cache(Q * W, history), P, fed, M, M, W, layered)  # noqa: E731
    state = sharded(jax.eval_shape(empty))
    ints, flags, n = partial(rows, jnp.int32), partial(rows, bool), W * P  # branches of a question
    least, room = search.length_bucket, bucket(T, search.length_bucket)
    changes = partial(largest_changes, Q, least=least)
    with jax.set_mesh(mesh):
        out: dict[str, tuple[Any, int]] = {}
        for which, (some, t) in changes(1, 1, room).items():
            prompts = (ints(some), ints(some), ints(some, t), flags(some, t), ints(some), W, True)
            out["prompt" + which] = (
                programs.read.lower(model, params, rules, state.prefix, *prompts),
                bytes_per_chip(state.own),
            )
        for which, (some, t) in changes(n, 1, room).items():
            branches = (
                ints(some * n, t),
                flags(some * n, t),
                ints(some * n),
                ints(some * n),
                rows(jnp.uint32, some * n, 2),
            )
            out["passages" + which] = (
                programs.feed.lower(model, params, rules, state, ints(some), *branches),
                0,
            )
        sampling = (rows(jnp.float32), rows(jnp.float32)) if search.temperature else None
        out["segment"] = programs.decode.lower(model, params, rules, state, ints(), sampling), 0
        if grown := largest_growth(fed, P, M, least):
            (before, places), beside = grown, bytes_per_chip((params, state.prefix))
            own = sharded(jax.eval_shape(lambda: cache(Q * W * P, before + places)))
            out["grow_branches"] = (programs.resize.lower(own, before, fed, M), beside)
        if search.max_depth > 1:
            lengths = (
                (first_feed(1, P, least), fed)
                if search.keep_passages
                else (1, bucket(M + 1, least))
            )
            for which, (some, t) in changes(W, *lengths).items():
                lanes = ints(some * W)
                if search.keep_passages:
                    own = sharded(jax.eval_shape(lambda t=t: cache(Q * n, t + M)))
                    lowered = programs.keep.lower(state.prefix, own, ints(some), lanes, lanes)
                    out["keep" + which] = lowered, bytes_per_chip(params)
                else:  # what a segment said is read once more, behind its parent's prefix
                    texts = (
                        ints(some),
                        lanes,
                        ints(some * W, t),
                        flags(some * W, t),
                        lanes,
                        W,
                        False,
                    )
                    lowered = programs.read.lower(model, params, rules, state.prefix, *texts)
                    out["read_again" + which] = lowered, bytes_per_chip(state.own)
            before = sharded(jax.eval_shape(lambda: cache(Q * W, smaller(history, least))))
            out["grow_prefixes"] = (
                programs.longer_prefix.lower(before, history),
                bytes_per_chip((params, state.own)),
            )
        return out


def largest_changes(
    questions: int, rows: int, shortest: int, longest: int, least: int
) -> dict[str, tuple[int, int]]:
    """(how many slots one program changes, tokens of each of a slot's rows) where that needs most memory: with rows of `longest`
    tokens; and, "_together", with as many slots at once as there ever are, and the longest rows that so many are changed with."""
    lengths = {bucket(t, least) for t in range(shortest, longest + 1)}
    sizes = {length: group_size(questions, rows * length) for length in lengths}
    out, most = {"": (sizes[longest], longest)}, max(sizes.values())
    if most > sizes[longest]:
        out["_together"] = most, max(length for length, size in sizes.items() if size == most)
    return out


def smaller(length: int, least: int) -> int:
    """The bucket before that of `length`, which is one itself."""
    return next((n for n in range(length - 1, 0, -1) if bucket(n, least) < length), 0)


def largest_growth(fed: int, branches: int, new: int, least: int) -> tuple[int, int] | None:
    """Of what branches have room for before it grows to `fed` + `new` tokens, the most: fed tokens, and places of the ring."""
    less = smaller(fed, least)
    fewer = max((places for n in range(new) if (places := ring(n, new)) < new), default=0)
    ways = [(less, new)] if less >= first_feed(1, branches, least) else []
    return max(ways + ([(fed, fewer)] if fewer else []), key=sum, default=None)


def bytes_per_chip(tree: Any) -> int:
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def longest_history(c: AnswerConfig) -> int:
    """Tokens of the prefix of the last segment: prompt, and passage and text of all before."""
    s = c.search
    first = first_room(c.max_length, s.max_new_tokens, s.max_depth > 1, s.length_bucket)
    return max(
        first,
        bucket(
            c.max_length + (s.max_depth - 1) * (c.max_length + s.max_new_tokens), s.length_bucket
        )
        if s.max_depth > 1
        else 0,
    )


def decode_times(
    c: AnswerConfig, base: LlamaConfig, mesh: Mesh, chip: roofline.Chip
) -> dict[str, Any]:
    """The least seconds of the first segments of as many questions as there are slots, as the chips' peak rates allow: reading
    prompts and passages (arithmetic), and a generated token of every branch (reading weights and caches)."""
    Q, B, T, new = c.batch, c.batch * c.search.ndocs, c.max_length, c.search.max_new_tokens
    read = Q * T * roofline.decode_flops_per_token(
        base, T / 2
    ) + B * T * roofline.decode_flops_per_token(base, 1.5 * T)
    layer = 1 if base.quantized else jnp.dtype(base.dtype).itemsize
    tables = (
        base.vocab_size * base.embed_dim
    )  # the head is read in every step, of the embedding a few rows
    matrices = roofline.weights(base) - 2 * tables
    token = 2 * base.num_layers * base.num_kv_heads * base.head_dim * jnp.dtype(base.dtype).itemsize
    cached = token * (Q * T + B * (T + new / 2))
    step = (matrices * layer + tables * jnp.dtype(base.dtype).itemsize + cached) / (
        mesh.size * chip.memory_bandwidth
    )
    work = (
        B
        * (roofline.decode_flops_per_token(base, 2 * T) + 2.0 * tables)
        / (mesh.size * chip.bf16_flops)
    )
    reading = read / (mesh.size * chip.bf16_flops)
    total = reading + new * max(step, work)
    seconds = {
        "prompts_and_passages": reading,
        "generated_token": max(step, work),
        "segment": total,
    }
    return {"roofline_seconds": seconds, "roofline_questions_per_second": Q / total}
