"""What the device holds while questions are answered, and the four programs that change it.

A slot is one question's place. It has W lanes, one for each beam: a lane's prefix (the prompt and the segments so far) is
stored once and read by its P branches, each of which generates one segment for one passage. Questions come and go on their
own: `read` puts a prompt into a slot, `feed` begins its branches, `decode` generates for all slots together until one of them
has ended all of its branches, `keep` makes the best branches the new prefixes, whereupon the slot is fed again or taken by the
next question.

Letters: Q slots, R = Q * W lanes, B = R * P branches, S tokens that a prefix has room for, T that are fed to a branch at most,
M that are generated at most, C of them that a branch has room for by now, n slots that one call changes. The rows of slot q are
q * W + lane and (q * W + lane) * P + branch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

import jax
import jax.numpy as jnp

from selfrag_jax.engine.segments import Segment, TokenRules, next_token, read_groups, roles
from selfrag_jax.models.llama import Cache, Model
from selfrag_jax.models.params import Params
from selfrag_jax.models.sharding import constrain


@jax.tree_util.register_dataclass
@dataclass
class Slots:
    prefix: Cache  # R rows of S: tokens stand close together from the first place on
    own: Cache  # B rows of T + C: what was fed, then a ring of C places that all branches write in step
    hidden: jax.Array  # [B, D]: of each branch's last token
    segment: Segment  # B rows
    age: jax.Array  # [B] int32: tokens chosen since the branch was fed
    limit: jax.Array  # [B] int32: at most as many
    done: jax.Array  # [B] bool: ended, or never fed
    sup_seen: jax.Array  # [B] bool: an IsSup token was said
    use_seen: jax.Array  # [B] bool
    key: jax.Array  # [B, 2] uint32: for sampling
    width: int = field(metadata=dict(static=True))  # W
    branches: int = field(metadata=dict(static=True))  # P
    fed_space: int = field(metadata=dict(static=True))  # T
    new: int = field(metadata=dict(static=True))  # M


def _pin(cache: Cache) -> Cache:
    """Heads are split over the mesh, if there is one."""
    over = lambda x: constrain(x, *[None] * (x.ndim - 3), "tensor", None, None)  # noqa: E731
    k, v = (jax.tree.map(over, x) for x in (cache.k, cache.v))
    return replace(cache, k=k, v=v, valid=constrain(cache.valid), positions=constrain(cache.positions))


def _empty_cache(model: Model, rows: int, length: int, by_layers: bool) -> Cache:
    cache = Cache.empty(model.config, rows, length)
    return _pin(cache.by_layers() if by_layers else cache)


@partial(jax.jit, static_argnames=("model", "lanes", "length", "by_layers"))
def empty_prefix(model: Model, lanes: int, length: int, by_layers: bool) -> Cache:
    return _empty_cache(model, lanes, length, by_layers)


@partial(
    jax.jit,
    static_argnames=("model", "rules", "branches", "fed", "ring", "new", "width", "by_layers"),
    donate_argnames=("prefix",),
)
def empty(
    model: Model, rules: TokenRules, prefix: Cache, branches: int, fed: int, ring: int, new: int, width: int, by_layers: bool
) -> Slots:
    """Slots of which none is in use, on prefixes that may be."""
    B = prefix.valid.shape[0] * branches
    own = replace(_empty_cache(model, B, fed + ring, by_layers), cursor=jnp.int32(fed))
    dtype = jnp.dtype(model.config.dtype)
    zeros, no = jnp.zeros(B, jnp.int32), jnp.zeros(B, bool)
    hidden, key = jnp.zeros((B, model.config.embed_dim), dtype), jnp.zeros((B, 2), jnp.uint32)
    segment = Segment.empty(B, new, rules)
    return Slots(prefix, own, hidden, segment, zeros, zeros, ~no, no, no, key, width, branches, fed, new)


@partial(jax.jit, static_argnames=("length",))
def longer_prefix(prefix: Cache, length: int) -> Cache:
    """With room for `length` tokens."""
    return _pin(prefix.longer(length - prefix.valid.shape[1]))


@partial(jax.jit, static_argnames=("before", "fed", "ring"))
def resize(own: Cache, before: int, fed: int, ring: int) -> Cache:
    """With room for `fed` tokens, where there was room for `before`, and a ring of `ring` places that holds the last tokens."""
    old = own.valid.shape[1] - before
    back = ring - jnp.arange(ring)  # how many steps ago a place of the new ring was written
    source = before + (own.cursor - before - back) % old

    def change(x, axis):
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, fed - before)
        first = jnp.pad(jax.lax.slice_in_dim(x, 0, before, axis=axis), widths)
        return jnp.concatenate([first, jnp.take(x, source, axis, mode="clip")], axis)

    new = own.over_tokens(change)
    valid = new.valid & jnp.concatenate([jnp.ones(fed, bool), back <= old])
    return _pin(replace(new, valid=valid, cursor=jnp.full_like(own.cursor, fed)))


# ---- pieces ----------------------------------------------------------------------------------------------------------
def _rows(cache: Cache, rows: jax.Array) -> Cache:
    pick = lambda x: x[rows] if isinstance(cache.k, tuple) else x[:, rows]  # noqa: E731
    k, v = (jax.tree.map(pick, x) for x in (cache.k, cache.v))
    return Cache(k, v, cache.valid[rows], cache.positions[rows], cache.cursor)


def _put(cache: Cache, where: jax.Array, new: Cache, stride: int) -> Cache:
    """`new` has n blocks of rows, of which block i begins at row where[i] * stride; columns from the first on, of each array as
    many as it has. In place, if the caller gives `cache` away."""
    n = where.shape[0]
    block = new.valid.shape[0] // n

    def put(x, y, rows):  # rows: the axis of them
        for i in range(n):
            at = [0] * x.ndim
            at[rows] = where[i] * stride
            x = jax.lax.dynamic_update_slice(x, jax.lax.slice_in_dim(y, i * block, (i + 1) * block, axis=rows), at)
        return x

    axis = 0 if isinstance(cache.k, tuple) else 1
    k, v = (jax.tree.map(lambda x, y: put(x, y, axis), *pair) for pair in ((cache.k, new.k), (cache.v, new.v)))
    return _pin(Cache(k, v, put(cache.valid, new.valid, 0), put(cache.positions, new.positions, 0), cache.cursor))


def _append(prefix: Cache, own: Cache) -> Cache:
    """Rows of a prefix followed by the valid tokens of `own`, close together; what there is no room for is lost."""
    length = prefix.valid.sum(1)[:, None]
    order = jnp.argsort(~own.valid, axis=1, stable=True)  # valid ones first
    at = jnp.arange(prefix.valid.shape[1]) - length
    source = jnp.take_along_axis(order, jnp.clip(at, 0, own.valid.shape[1] - 1), 1)

    def join(a, axis, b):
        rows = max(a.ndim - 4, 0)  # which axis they are
        pick = jax.vmap(lambda x, i: jnp.take(x, i, axis=axis - 1, mode="clip"), in_axes=(rows, 0), out_axes=rows)
        shape = [n if i in (rows, axis) else 1 for i, n in enumerate(a.shape)]
        return jnp.where((at < 0).reshape(shape), a, pick(b, source))

    return replace(prefix.over_tokens(join, own), valid=at < own.valid.sum(1)[:, None])


def _read_tokens(model: Model, params: Params, prefix: Cache | None, tokens, valid, start):
    """(hidden [rows, D] of each row's last token, its cache [rows, T]): tokens that follow a prefix, padded on the right."""
    own = _empty_cache(model, *tokens.shape, isinstance(params["layers"], tuple))
    positions = start[:, None] + jnp.maximum(jnp.cumsum(valid, 1) - 1, 0)
    hidden, own = model.hidden(params, tokens, positions, valid, own, prefix)
    last = jnp.maximum(valid.sum(1) - 1, 0)[:, None, None]
    return jnp.take_along_axis(hidden, last, axis=1)[:, 0], own


# ---- the four programs -----------------------------------------------------------------------------------------------
@partial(jax.jit, static_argnames=("model", "rules", "width", "fresh"), donate_argnames=("prefix",))
def read(
    model: Model, params: Params, rules: TokenRules, prefix: Cache, where, parent, tokens, valid, start, width: int, fresh: bool
):
    """Reads tokens into the first w = rows / n lanes of n slots, behind the prefix of the lanes' parents (fresh: behind nothing).

    where: [n] slots; parent: [n * w] lanes of the same slot; tokens, valid: [n * w, T]; start: [n * w] position of the first
    token. Returns the prefix and, after each row's last token, the distribution over the Retrieve tokens and their
    log-probabilities among all tokens, [n * w, 3] each (None without reflection tokens).
    """
    w = tokens.shape[0] // where.shape[0]
    rows = _rows(prefix, jnp.repeat(where, w) * width + parent)
    if fresh:
        rows = replace(rows, valid=jnp.zeros_like(rows.valid))
    hidden, own = _read_tokens(model, params, None if fresh else rows, tokens, valid, start)
    prefix = _put(prefix, where, _append(rows, own), width)
    if rules.reflection is None:
        return prefix, None
    logits, ids = model.logits(params, hidden), jnp.array(rules.reflection.retrieve)
    return prefix, (jax.nn.softmax(logits[:, ids]), jax.nn.log_softmax(logits)[:, ids])


@partial(jax.jit, static_argnames=("model", "rules"), donate_argnames=("slots",))
def feed(model: Model, params: Params, rules: TokenRules, slots: Slots, where, tokens, valid, start, limit, key) -> Slots:
    """Begins the branches of the first w lanes of n slots.

    where: [n] slots; tokens, valid: [n * w * P, T'], T' <= T, padded on the right (no tokens: the branch is not used); start:
    [n * w * P] position of the first token; limit: tokens to generate at most; key: [n * w * P, 2] uint32.
    """
    n, P = where.shape[0], slots.branches
    w, stride = tokens.shape[0] // (n * P), slots.width * P
    lanes = (where[:, None] * slots.width + jnp.arange(w)).reshape(-1)
    hidden, own = _read_tokens(model, params, _rows(slots.prefix, lanes), tokens, valid, start)
    behind = slots.own.valid.shape[1] - valid.shape[1]  # what stood there before is no longer valid
    own_cache = _put(slots.own, where, replace(own, valid=jnp.pad(own.valid, [(0, 0), (0, behind)])), stride)
    rows = (where[:, None] * stride + jnp.arange(w * P)).reshape(-1)
    fed = valid.sum(1)
    begin = Segment.empty(tokens.shape[0], slots.new, rules)
    begin = replace(begin, next_position=start + fed)
    put = lambda x, y: x.at[rows].set(y)  # noqa: E731
    no = jnp.zeros_like(fed, bool)
    return replace(
        slots, own=own_cache, hidden=put(slots.hidden, hidden), segment=jax.tree.map(put, slots.segment, begin),
        age=put(slots.age, 0), limit=put(slots.limit, limit), done=put(slots.done, fed == 0),
        sup_seen=put(slots.sup_seen, no), use_seen=put(slots.use_seen, no), key=put(slots.key, key),
    )  # fmt: skip


@partial(jax.jit, static_argnames=("model", "rules"), donate_argnames=("slots",))
def decode(model: Model, params: Params, rules: TokenRules, slots: Slots, steps, sampling) -> Slots:
    """Generates for all branches, until all of one slot have ended, the ring has no more room for one, or `steps` are done.

    sampling: (temperature, top_p), or None for the most likely token. What ended in an earlier call does not count.
    """
    ended = lambda done: done.reshape(-1, slots.width * slots.branches).all(1)  # noqa: E731
    before = ended(slots.done)
    room = slots.own.valid.shape[1] - slots.fed_space

    def going(state):
        step, s = state
        return (step < steps) & ~s.done.all() & ~(ended(s.done) & ~before).any() & (s.done | (s.age < room)).all()

    def body(state):
        step, s = state
        seg, live = s.segment, ~s.done
        logits = model.logits(params, s.hidden)
        if rules.pad != rules.eos:  # many published tokenizers pad with the end of text
            logits = logits.at[:, rules.pad].set(-1e30)
        token, log_prob = next_token(logits, s.key, s.age, sampling)
        ends_before, last_token, is_control = roles(token, rules)
        at_limit = s.age + 1 >= s.limit
        seg, sup_seen, use_seen = read_groups(s, logits, token, ends_before | last_token, at_limit, rules)
        writes = live & ~ends_before
        is_text = writes & ~is_control
        column = (jnp.arange(slots.new) == seg.length[:, None]) & writes[:, None]
        hidden, own = model.hidden(params, token[:, None], seg.next_position[:, None], writes[:, None], s.own, slots.prefix)
        seg = replace(
            seg,
            tokens=jnp.where(column, token[:, None], seg.tokens),
            length=seg.length + writes,
            log_prob=seg.log_prob + jnp.where(is_text, log_prob, 0.0),
            text_tokens=seg.text_tokens + is_text,
            finished=seg.finished | (live & last_token),
            complete=seg.complete | (live & (last_token | ends_before)),
            next_position=seg.next_position + writes,
        )
        done = s.done | ends_before | last_token | at_limit
        own = replace(own, cursor=jnp.where(own.cursor == own.valid.shape[1], slots.fed_space, own.cursor))
        return step + 1, replace(
            s, own=own, hidden=hidden[:, 0], segment=seg, age=s.age + 1, done=done, sup_seen=sup_seen, use_seen=use_seen
        )

    after = jax.lax.while_loop(going, body, (jnp.int32(0), replace(slots, prefix=None)))[1]
    return replace(after, prefix=slots.prefix, own=_pin(after.own))


@partial(jax.jit, donate_argnames=("prefix",))
def keep(prefix: Cache, own: Cache, where, parent, branch) -> Cache:
    """Makes branches the prefixes of n slots: lane i continues lane parent[i] with what branch[i] was fed and has generated.

    where: [n]; parent: [n * W] lanes, branch: [n * W] branches of the same slot, counted through its lanes.
    """
    n = where.shape[0]
    W = parent.shape[0] // n
    per_slot = own.valid.shape[0] // (prefix.valid.shape[0] // W)
    slot = jnp.repeat(where, W)
    new = _append(_rows(prefix, slot * W + parent), _rows(own, slot * per_slot + branch))
    return _put(prefix, where, new, W)
