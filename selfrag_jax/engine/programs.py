"""What the device holds while questions are answered, and the programs that change it.

A slot holds one question. Each of its beams has a prefix, the prompt and the segments so far, which
is stored once; the beam's branches, one for each passage, read it and generate a segment each.

    read            reads tokens after a beam's prefix: a prompt, or a segment without its passage
    start_branches  feeds the branches of a slot their passages
    decode          generates for all slots, until one has finished all of its branches
    keep            appends the best branches to their prefixes; then the slot is fed again, or
                    taken by the next question

Prefixes and branches are two values, passed and returned. Axes:
  Q slots   W beams of a slot   P branches of a beam   R prefixes (Q * W)   B branches (R * P)
  n slots that a call changes   w their first beams (w <= W)   D embed
  S prefix capacity   F fed capacity   G generated capacity   M maximum generated tokens
  T length of a padded input
The rows of slot q are q * W + beam, and (q * W + beam) * P + branch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from selfrag_jax.engine.segments import GeneratedSegments, Step, TokenRules, next_token
from selfrag_jax.models.llama import Cache, Model
from selfrag_jax.models.params import Params
from selfrag_jax.models.sharding import constrain

# Prefixes are a Cache of R rows, each closely packed from the first place on.


@jax.tree_util.register_dataclass
@dataclass
class Branches:
    """The branches of all slots."""

    cache: Cache  # B rows of F + G: fed tokens, then a ring of G places that all rows write in step
    hidden: jax.Array  # [B, D]: of each branch's last token
    segments: GeneratedSegments  # B rows
    steps_since_fed: jax.Array  # [B] int32: tokens chosen
    limit: jax.Array  # [B] int32: maximum number of tokens to choose
    done: jax.Array  # [B] bool: ended, or never fed
    issup_seen: jax.Array  # [B] bool: an IsSup token was generated
    key: jax.Array  # [B, 2] uint32: for sampling
    beam_width: int = field(metadata=dict(static=True))  # W
    num_passages: int = field(metadata=dict(static=True))  # P
    fed_capacity: int = field(metadata=dict(static=True))  # F
    max_new_tokens: int = field(metadata=dict(static=True))  # M


def split_heads(cache: Cache) -> Cache:
    """Keeps the heads of a cache split over the mesh, if there is one."""

    def over_heads(x):
        return constrain(x, *[None] * (x.ndim - 3), "tensor", None, None)

    k, v = (jax.tree.map(over_heads, x) for x in (cache.k, cache.v))
    valid, positions = constrain(cache.valid), constrain(cache.positions)
    return replace(cache, k=k, v=v, valid=valid, positions=positions)


# ---- allocating and growing ----------------------------------------------------------------------
def _empty_cache(model: Model, rows: int, length: int, per_layer: bool) -> Cache:
    cache = Cache.empty(model.config, rows, length)
    return split_heads(cache.per_layer() if per_layer else cache)


@partial(jax.jit, static_argnames=("model", "rows", "capacity", "per_layer"))
def empty_prefixes(model: Model, rows: int, capacity: int, per_layer: bool) -> Cache:
    return _empty_cache(model, rows, capacity, per_layer)


@partial(
    jax.jit,
    static_argnames=(
        "model", "rules", "num_slots", "beam_width", "num_passages", "fed", "generated",
        "max_new_tokens", "per_layer",
    ),
)  # fmt: skip
def empty_branches(
    model: Model,
    rules: TokenRules,
    num_slots: int,
    beam_width: int,
    num_passages: int,
    fed: int,
    generated: int,
    max_new_tokens: int,
    per_layer: bool,
) -> Branches:
    """Allocates branches, all unused. fed, generated: their capacities."""
    B = num_slots * beam_width * num_passages
    cache = _empty_cache(model, B, fed + generated, per_layer)
    zeros, false = jnp.zeros(B, jnp.int32), jnp.zeros(B, bool)
    return Branches(
        cache=replace(cache, cursor=jnp.int32(fed)),
        hidden=jnp.zeros((B, model.config.embed_dim), jnp.dtype(model.config.dtype)),
        segments=GeneratedSegments.empty(B, max_new_tokens, rules),
        steps_since_fed=zeros,
        limit=zeros,
        done=~false,
        issup_seen=false,
        key=jnp.zeros((B, 2), jnp.uint32),
        beam_width=beam_width,
        num_passages=num_passages,
        fed_capacity=fed,
        max_new_tokens=max_new_tokens,
    )


@partial(jax.jit, static_argnames=("capacity",))
def grow_prefixes(prefixes: Cache, capacity: int) -> Cache:
    return split_heads(prefixes.extended(capacity - prefixes.valid.shape[1]))


@partial(jax.jit, static_argnames=("fed_before", "fed", "generated"))
def resize_branches(cache: Cache, fed_before: int, fed: int, generated: int) -> Cache:
    """The branches' cache with capacities `fed` and `generated`; the last tokens stay.

    The new ring begins at its first place: of tokens 5 6 3 4 in a ring of 4 whose cursor is at 3, a
    ring of 6 holds - - 3 4 5 6, where - is invalid.
    """
    generated_before = cache.valid.shape[1] - fed_before
    # How many steps ago each place of the new ring was written.
    steps_ago = generated - jnp.arange(generated)
    source = fed_before + (cache.cursor - fed_before - steps_ago) % generated_before

    def change(x, axis):
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, fed - fed_before)
        first = jnp.pad(jax.lax.slice_in_dim(x, 0, fed_before, axis=axis), widths)
        return jnp.concatenate([first, jnp.take(x, source, axis, mode="clip")], axis)

    new = cache.map_arrays(change)
    was_held = jnp.concatenate([jnp.ones(fed, bool), steps_ago <= generated_before])
    cursor = jnp.full_like(cache.cursor, fed)
    return split_heads(replace(new, valid=new.valid & was_held, cursor=cursor))


# ---- pieces --------------------------------------------------------------------------------------
def _rows(cache: Cache, rows: Int[Array, " r"]) -> Cache:
    def pick(x):
        return x[rows] if isinstance(cache.k, tuple) else x[:, rows]

    k, v = (jax.tree.map(pick, x) for x in (cache.k, cache.v))
    return Cache(k, v, cache.valid[rows], cache.positions[rows], cache.cursor)


def _put_rows(cache: Cache, slots: Int[Array, " n"], new: Cache, stride: int) -> Cache:
    """Writes n equal blocks of rows, block i from row slots[i] * stride on.

    Writes as many columns as `new` has, from the first on. In place, if the caller donates `cache`.
    """
    n = slots.shape[0]
    block = new.valid.shape[0] // n

    def put(x, y, row_axis):
        for i in range(n):
            at = [0] * x.ndim
            at[row_axis] = slots[i] * stride
            rows = jax.lax.slice_in_dim(y, i * block, (i + 1) * block, axis=row_axis)
            x = jax.lax.dynamic_update_slice(x, rows, at)
        return x

    axis = 0 if isinstance(cache.k, tuple) else 1
    k, v = (
        jax.tree.map(lambda x, y: put(x, y, axis), *pair)
        for pair in ((cache.k, new.k), (cache.v, new.v))
    )
    valid, positions = put(cache.valid, new.valid, 0), put(cache.positions, new.positions, 0)
    return split_heads(Cache(k, v, valid, positions, cache.cursor))


@jax.named_scope("append_to_prefix")
def _append(prefix: Cache, other: Cache) -> Cache:
    """Rows of a prefix followed by the valid tokens of `other`, closely packed.

    Tokens beyond the prefix's capacity are lost; the engine grows it before.
    """
    length = prefix.valid.sum(1)[:, None]
    order = jnp.argsort(~other.valid, axis=1, stable=True)  # valid ones first
    at = jnp.arange(prefix.valid.shape[1]) - length
    source = jnp.take_along_axis(order, jnp.clip(at, 0, other.valid.shape[1] - 1), 1)

    def join(a, axis, b):
        rows = max(a.ndim - 4, 0)  # the axis of the rows

        def take(x, i):
            return jnp.take(x, i, axis=axis - 1, mode="clip")

        picked = jax.vmap(take, in_axes=(rows, 0), out_axes=rows)(b, source)
        shape = [n if i in (rows, axis) else 1 for i, n in enumerate(a.shape)]
        return jnp.where((at < 0).reshape(shape), a, picked)

    new = prefix.map_arrays(join, other)
    return replace(new, valid=at < other.valid.sum(1)[:, None])


@jax.named_scope("read_tokens")
def read_tokens(
    model: Model,
    params: Params,
    prefix: Cache | None,
    tokens: Int[Array, "r T"],
    valid: Bool[Array, "r T"],
    start: Int[Array, " r"],
) -> tuple[Float[Array, "r D"], Cache]:
    """Each row's last hidden state, and the cache of its tokens; they follow a prefix.

    Tokens are padded on the right.
    """
    rows, length = tokens.shape
    empty = _empty_cache(model, rows, length, isinstance(params["layers"], tuple))
    positions = start[:, None] + jnp.maximum(jnp.cumsum(valid, 1) - 1, 0)
    hidden, cache = model.hidden(params, tokens, positions, valid, empty, prefix)
    assert cache is not None  # as there was one before
    last = jnp.maximum(valid.sum(1) - 1, 0)[:, None, None]
    return jnp.take_along_axis(hidden, last, axis=1)[:, 0], cache


# ---- the four programs of a search ---------------------------------------------------------------
@partial(
    jax.jit,
    static_argnames=("model", "rules", "beam_width", "after_nothing"),
    donate_argnames=("prefixes",),
)
def read(
    model: Model,
    params: Params,
    rules: TokenRules,
    prefixes: Cache,
    slots: Int[Array, " n"],
    parents: Int[Array, " n*w"],
    tokens: Int[Array, "n*w T"],
    valid: Bool[Array, "n*w T"],
    start: Int[Array, " n*w"],
    beam_width: int,
    after_nothing: bool,
) -> tuple[Cache, tuple[Float[Array, "n*w 3"], Float[Array, "n*w 3"]] | None]:
    """Reads tokens into the first w beams of n slots, each after the prefix of its parent beam.

    start: position of each row's first token; after_nothing: instead of after the parents' prefix.
    Returns the prefixes and, after each row's last token, the distribution over the Retrieve tokens
    and their log-probabilities among all tokens (None without reflection tokens).
    """
    w = tokens.shape[0] // slots.shape[0]
    rows = _rows(prefixes, jnp.repeat(slots, w) * beam_width + parents)
    if after_nothing:
        rows = replace(rows, valid=jnp.zeros_like(rows.valid))
    prefix = None if after_nothing else rows
    hidden, cache = read_tokens(model, params, prefix, tokens, valid, start)
    prefixes = _put_rows(prefixes, slots, _append(rows, cache), beam_width)
    if rules.reflection is None:
        return prefixes, None
    logits, ids = model.logits(params, hidden), jnp.array(rules.reflection.retrieve)
    return prefixes, (jax.nn.softmax(logits[:, ids]), jax.nn.log_softmax(logits)[:, ids])


@partial(jax.jit, static_argnames=("model", "rules"), donate_argnames=("branches",))
def start_branches(
    model: Model,
    params: Params,
    rules: TokenRules,
    prefixes: Cache,
    branches: Branches,
    slots: Int[Array, " n"],
    tokens: Int[Array, "n*w*P T"],
    valid: Bool[Array, "n*w*P T"],
    start: Int[Array, " n*w*P"],
    limit: Int[Array, " n*w*P"],
    key: UInt32[Array, "n*w*P 2"],
) -> Branches:
    """Feeds the branches of the first w beams of n slots; a row without tokens is not used.

    start: position of each row's first token; limit: maximum number of tokens to generate.
    Tokens are padded on the right; their width may be below the fed capacity.
    """
    n, P = slots.shape[0], branches.num_passages
    w, stride = tokens.shape[0] // (n * P), branches.beam_width * P
    beams = (slots[:, None] * branches.beam_width + jnp.arange(w)).reshape(-1)
    prefix = _rows(prefixes, beams)
    hidden, fed = read_tokens(model, params, prefix, tokens, valid, start)
    # The columns after the fed ones become invalid: they are of the slot's last question.
    rest = branches.cache.valid.shape[1] - valid.shape[1]
    fed = replace(fed, valid=jnp.pad(fed.valid, [(0, 0), (0, rest)]))
    rows = (slots[:, None] * stride + jnp.arange(w * P)).reshape(-1)
    num_fed = valid.sum(1)
    empty = GeneratedSegments.empty(tokens.shape[0], branches.max_new_tokens, rules)
    empty = replace(empty, next_position=start + num_fed)

    def put(x, y):
        return x.at[rows].set(y)

    return replace(
        branches,
        cache=_put_rows(branches.cache, slots, fed, stride),
        hidden=put(branches.hidden, hidden),
        segments=jax.tree.map(put, branches.segments, empty),
        steps_since_fed=put(branches.steps_since_fed, 0),
        limit=put(branches.limit, limit),
        done=put(branches.done, num_fed == 0),
        issup_seen=put(branches.issup_seen, jnp.zeros_like(num_fed, bool)),
        key=put(branches.key, key),
    )


@partial(jax.jit, static_argnames=("model", "rules"), donate_argnames=("branches",))
def decode(
    model: Model,
    params: Params,
    rules: TokenRules,
    prefixes: Cache,
    branches: Branches,
    steps: Int[Array, ""],
    sampling: tuple[Any, Any] | None,
) -> Branches:
    """Generates for all branches, for `steps` tokens at most.

    Stops earlier when all branches of a slot have ended (slots that had ended before the call do
    not count), and when a branch has filled its buffer. sampling: (temperature, top_p), or None for
    the most likely token.
    """

    def ended_slots(done):
        return done.reshape(-1, branches.beam_width * branches.num_passages).all(1)

    before = ended_slots(branches.done)
    capacity = branches.cache.valid.shape[1] - branches.fed_capacity

    def goes_on(state):
        step, s = state
        newly_ended = (ended_slots(s.done) & ~before).any()
        has_room = (s.done | (s.steps_since_fed < capacity)).all()
        return (step < steps) & ~s.done.all() & ~newly_ended & has_room

    def body(state):
        step, s = state
        return step + 1, _decode_one(model, params, rules, prefixes, s, sampling)

    _, branches = jax.lax.while_loop(goes_on, body, (jnp.int32(0), branches))
    return replace(branches, cache=split_heads(branches.cache))


def _decode_one(model, params, rules, prefixes, s: Branches, sampling) -> Branches:
    """One token for every branch that has not ended."""
    # 1. Choose the next token.
    seg, live = s.segments, ~s.done
    with jax.named_scope("choose_token"):
        logits = model.logits(params, s.hidden)
        if rules.pad != rules.eos:  # many published tokenizers pad with the end of text
            logits = logits.at[:, rules.pad].set(-1e30)
        token, log_prob = next_token(logits, s.key, s.steps_since_fed, sampling)

    # 2. What does it end, and what does the model think here?
    ends_before, ends_answer, is_control = rules.roles(token)
    at_limit = s.steps_since_fed + 1 >= s.limit
    ends = ends_before | ends_answer
    step = Step(logits, token, s.steps_since_fed, live, ends, at_limit)
    with jax.named_scope("read_critiques"):
        seg, issup_seen = rules.read_critiques(seg, step, s.issup_seen)

    # 3. Append it, and read it into the branch's cache. If the segment ends before it, neither
    #    happens.
    writes = live & ~ends_before
    is_text = writes & ~is_control
    column = (jnp.arange(s.max_new_tokens) == seg.length[:, None]) & writes[:, None]
    with jax.named_scope("read_token"):
        hidden, cache = model.hidden(
            params, token[:, None], seg.next_position[:, None], writes[:, None], s.cache, prefixes
        )
    seg = replace(
        seg,
        tokens=jnp.where(column, token[:, None], seg.tokens),
        length=seg.length + writes,
        log_prob=seg.log_prob + jnp.where(is_text, log_prob, 0.0),
        num_text_tokens=seg.num_text_tokens + is_text,
        finished=seg.finished | (live & ends_answer),
        complete=seg.complete | (live & ends),
        next_position=seg.next_position + writes,
    )
    at_end = cache.cursor == cache.valid.shape[1]
    cache = replace(cache, cursor=jnp.where(at_end, s.fed_capacity, cache.cursor))
    return replace(
        s,
        cache=cache,
        hidden=hidden[:, 0],
        segments=seg,
        steps_since_fed=s.steps_since_fed + 1,
        done=s.done | ends | at_limit,
        issup_seen=issup_seen,
    )


@partial(jax.jit, donate_argnames=("prefixes",))
def keep(
    prefixes: Cache,
    branch_cache: Cache,
    slots: Int[Array, " n"],
    parents: Int[Array, " n*W"],
    branch: Int[Array, " n*W"],
) -> Cache:
    """Makes branches the prefixes of n slots: what they were fed and generated is appended.

    Beam i continues beam parents[i] of its slot with branch[i], counted through the slot.
    """
    W = parents.shape[0] // slots.shape[0]
    branches_per_slot = branch_cache.valid.shape[0] // (prefixes.valid.shape[0] // W)
    slot = jnp.repeat(slots, W)
    kept = _rows(branch_cache, slot * branches_per_slot + branch)
    return _put_rows(prefixes, slots, _append(_rows(prefixes, slot * W + parents), kept), W)
