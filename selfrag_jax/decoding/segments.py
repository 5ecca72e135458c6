"""Jitted generation of one segment for a batch of branches.

A branch continues a prefix with given tokens (a Retrieve token and a passage, or a whole prompt) and then generates
greedily until its segment ends: before a Retrieve token, at [Utility:k] or end of text, or at the length limit. At
each position only the group distributions leave the loop, never the vocabulary's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from selfrag_jax.models.attention import platform
from selfrag_jax.models.llama import Cache, Model
from selfrag_jax.models.params import Params
from selfrag_jax.reflection import ReflectionIds


@dataclass(frozen=True)
class TokenRules:
    """Token ids that steer generation; static for jit. Without `reflection`, only end of text ends a segment."""

    eos: int
    pad: int
    reflection: ReflectionIds | None
    whole: bool = False  # as the released scripts generate: on to the end of text, each group read where it is said first


@jax.tree_util.register_dataclass
@dataclass
class Segment:
    """What a batch of B branches generated; M is the length limit."""

    tokens: jax.Array  # [B, M] int32: generated tokens, the pad id behind the end
    length: jax.Array  # [B] int32
    log_prob: jax.Array  # [B] f32: sum over text tokens
    text_tokens: jax.Array  # [B] int32: how many of the tokens are text
    isrel: jax.Array  # [B, 2] f32: distribution within the group at the first generated position
    issup: jax.Array  # [B, 3] f32: where an IsSup token was generated, else at the end
    isuse: jax.Array  # [B, 5] f32: at the end of the segment
    retrieve: jax.Array  # [B, 3] f32: at the end of the segment
    finished: jax.Array  # [B] bool: the answer is complete (Utility token or end of text)
    complete: jax.Array  # [B] bool: ended by a token, not by the length limit
    next_position: jax.Array  # [B] int32: position of the token that would follow
    retrieve_at: jax.Array | None = None  # [B, M, 3] f32: at every position (TokenRules.whole only)


def group_distribution(logits: jax.Array, ids: tuple[int, ...]) -> jax.Array:
    """Softmax within a group of token ids. logits: [B, V] -> [B, len(ids)]."""
    return jax.nn.softmax(logits[:, jnp.array(ids)], axis=-1)


def _member(token: jax.Array, ids: tuple[int, ...]) -> jax.Array:
    return (token[:, None] == jnp.array(ids)).any(1)


def _roles(token: jax.Array, rules: TokenRules) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of each token [B]: does the segment end before it, does the answer end with it, is it no text?"""
    r, is_eos = rules.reflection, token == rules.eos
    if r is None:
        return jnp.zeros_like(is_eos), is_eos, is_eos
    if rules.whole:
        return jnp.zeros_like(is_eos), is_eos, jnp.zeros_like(is_eos)
    return _member(token, r.retrieve), is_eos | _member(token, r.isuse), is_eos | _member(token, r.all)


def _read_groups(s, logits, token, live, ending, r: ReflectionIds, max_new: int):
    """The group distributions after a step of `generate`, each kept from the position where it is read, and whether an
    IsSup token was seen. s: the loop's state; live, ending: [B] bool."""
    is_sup = _member(token, r.issup)
    new = [group_distribution(logits, ids) for ids in (r.isrel, r.issup, r.isuse, r.retrieve)]
    # IsSup without its token: the distribution where the segment ends.
    when = (s["step"] == 0, is_sup | (ending & ~s["sup_seen"]), ending | (s["step"] == max_new - 1), ending)
    groups = tuple(jnp.where((live & w)[:, None], n, g) for n, g, w in zip(new, s["groups"], when, strict=True))
    return groups, s["sup_seen"] | (live & is_sup)


def _read_groups_whole(s, logits, token, live, r: ReflectionIds):
    """As `_read_groups`, each group where one of its tokens is said first; one that never is stays zero."""
    says = [_member(token, ids) for ids in (r.issup, r.isuse)]
    new = [group_distribution(logits, ids) for ids in (r.isrel, r.issup, r.isuse, r.retrieve)]
    sup, use = (said & ~s[seen] for said, seen in zip(says, ("sup_seen", "use_seen"), strict=True))
    when = (s["step"] == 0, sup, use, s["step"] == 0)
    groups = tuple(jnp.where((live & w)[:, None], n, g) for n, g, w in zip(new, s["groups"], when, strict=True))
    return groups, s["sup_seen"] | (live & says[0]), s["use_seen"] | (live & says[1]), new[3]


@partial(jax.jit, static_argnames=("model", "length"))
def prefill(model: Model, params: Params, tokens: jax.Array, valid: jax.Array, length: int):
    """Runs prompts into a fresh cache of `length` slots.

    tokens: [B, T] int32, padded on the right; valid: [B, T] bool. Returns the cache and the logits [B, V] at each
    row's last real token.
    """
    cache = Cache.empty(model.config, tokens.shape[0], length)
    positions = jnp.maximum(jnp.cumsum(valid, 1) - 1, 0)
    hidden, cache = model.hidden(params, tokens, positions, valid, cache)
    last = jnp.take_along_axis(hidden, (valid.sum(1) - 1)[:, None, None], axis=1)[:, 0]
    return cache, model.logits(params, last)


@partial(jax.jit, static_argnames=("model", "rules", "max_new"))
def generate(
    model: Model,
    params: Params,
    rules: TokenRules,
    prefix: Cache | None,
    start: jax.Array,
    tokens: jax.Array,
    valid: jax.Array,
    max_new: int,
) -> tuple[Segment, Cache]:
    """Feeds `tokens` after the prefix and generates up to `max_new` tokens.

    prefix: R rows, shared by the B / R branches of each; start: [B] position of the first fed token; tokens: [B, T],
    padded on the right; valid: [B, T]. Returns the segment and the branch's own cache of T + max_new slots, in which
    the fed and the generated tokens are written (not the Retrieve token before which a segment ended).
    """
    B, T = tokens.shape
    cache = Cache.empty(model.config, B, T)
    positions = start[:, None] + jnp.maximum(jnp.cumsum(valid, 1) - 1, 0)
    hidden, cache = model.hidden(params, tokens, positions, valid, cache, prefix)
    cache = cache.longer(max_new)  # only now: what is fed need not look at slots that nothing stands in
    fed = valid.sum(1)
    last = jnp.take_along_axis(hidden, jnp.maximum(fed - 1, 0)[:, None, None], axis=1)[:, 0]

    if platform() == "cpu":
        params, cache, prefix = model.by_layers(params), cache.by_layers(), prefix and prefix.by_layers()

    sizes = (2, 3, 5, 3)  # of IsRel, IsSup, IsUse, Retrieve
    state = {
        "step": jnp.int32(0),
        "hidden": last,
        "cache": cache,
        "done": fed == 0,  # branches without input are not used
        "tokens": jnp.full((B, max_new), rules.pad, jnp.int32),
        "length": jnp.zeros(B, jnp.int32),
        "log_prob": jnp.zeros(B, jnp.float32),
        "text_tokens": jnp.zeros(B, jnp.int32),
        "groups": tuple(jnp.full((B, n), 0.0 if rules.whole else 1.0 / n, jnp.float32) for n in sizes),
        "sup_seen": jnp.zeros(B, bool),
        "use_seen": jnp.zeros(B, bool),
        "retrieve_at": jnp.zeros((B, max_new, 3), jnp.float32) if rules.whole else None,
        "finished": jnp.zeros(B, bool),
        "complete": jnp.zeros(B, bool),
    }

    def body(s):
        logits = model.logits(params, s["hidden"])
        logits = logits.at[:, rules.pad].set(-1e30)
        token = logits.argmax(-1).astype(jnp.int32)
        log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]
        live = ~s["done"]
        ends_before, last_token, is_control = _roles(token, rules)
        groups, sup_seen, use_seen, retrieve_at = s["groups"], s["sup_seen"], s["use_seen"], s["retrieve_at"]
        if rules.whole:
            groups, sup_seen, use_seen, now = _read_groups_whole(s, logits, token, live, rules.reflection)
            retrieve_at = jnp.where((jnp.arange(max_new) == s["step"])[None, :, None], now[:, None], retrieve_at)
        elif rules.reflection is not None:
            groups, sup_seen = _read_groups(s, logits, token, live, ends_before | last_token, rules.reflection, max_new)
        writes = live & ~ends_before
        column = jnp.arange(max_new) == s["length"][:, None]
        tokens_out = jnp.where(column & writes[:, None], token[:, None], s["tokens"])
        is_text = writes & ~is_control
        next_position = start + fed + s["length"]
        hidden, cache = model.hidden(params, token[:, None], next_position[:, None], writes[:, None], s["cache"], prefix)
        return {
            "step": s["step"] + 1,
            "hidden": hidden[:, 0],
            "cache": cache,
            "done": s["done"] | ends_before | last_token,
            "tokens": tokens_out,
            "length": s["length"] + writes,
            "log_prob": s["log_prob"] + jnp.where(is_text, log_prob, 0.0),
            "text_tokens": s["text_tokens"] + is_text,
            "groups": groups,
            "sup_seen": sup_seen,
            "use_seen": use_seen,
            "retrieve_at": retrieve_at,
            "finished": s["finished"] | (live & last_token),
            "complete": s["complete"] | (live & (last_token | ends_before)),
        }

    s = jax.lax.while_loop(lambda s: (s["step"] < max_new) & ~s["done"].all(), body, state)
    isrel, issup, isuse, retrieve = s["groups"]
    segment = Segment(
        s["tokens"], s["length"], s["log_prob"], s["text_tokens"], isrel, issup, isuse, retrieve, s["finished"],
        s["complete"], start + fed + s["length"], s["retrieve_at"],
    )  # fmt: skip
    return segment, s["cache"].stacked()


@partial(jax.jit, static_argnames=("rules",))
def retrieve_distribution(logits: jax.Array, rules: TokenRules) -> jax.Array:
    """[B, V] -> [B, 3] over the Retrieve tokens."""
    return group_distribution(logits, rules.reflection.retrieve)


@partial(jax.jit, static_argnames=("rules",))
def retrieve_log_probs(logits: jax.Array, rules: TokenRules) -> jax.Array:
    """[B, V] -> [B, 3]: log-probabilities of the Retrieve tokens among all tokens."""
    return jax.nn.log_softmax(logits)[:, jnp.array(rules.reflection.retrieve)]


@partial(jax.jit, static_argnames=("model",))
def append_tokens(
    model: Model, params: Params, prefix: Cache, parent: jax.Array, start: jax.Array, tokens: jax.Array, valid: jax.Array
) -> Cache:
    """The prefix of each new beam: its parent's, followed by `tokens`, which are read for that.

    parent: [R'] row indices; start: [R'] position of the first token; tokens, valid: [R', T], padded on the right.
    """
    rows = Cache(prefix.k[:, parent], prefix.v[:, parent], prefix.valid[parent], prefix.positions[parent], prefix.cursor)
    cache = Cache.empty(model.config, *tokens.shape)
    positions = start[:, None] + jnp.maximum(jnp.cumsum(valid, 1) - 1, 0)
    _, cache = model.hidden(params, tokens, positions, valid, cache, rows)
    return append_branches(rows, cache, jnp.arange(len(parent)), jnp.arange(len(parent)))


@jax.jit
def append_branches(prefix: Cache, branches: Cache, parent: jax.Array, branch: jax.Array) -> Cache:
    """The prefix of each new beam: its parent's, followed by the branch that won. parent, branch: [R'] row indices."""
    return Cache(
        k=jnp.concatenate([prefix.k[:, parent], branches.k[:, branch]], axis=3),
        v=jnp.concatenate([prefix.v[:, parent], branches.v[:, branch]], axis=3),
        valid=jnp.concatenate([prefix.valid[parent], branches.valid[branch]], axis=1),
        positions=jnp.concatenate([prefix.positions[parent], branches.positions[branch]], axis=1),
        cursor=prefix.cursor + branches.cursor,
    )
