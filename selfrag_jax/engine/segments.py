"""Segments as they come out of the model, token by token: which token is next, what it ends, what the model thinks of itself.

A segment ends before a Retrieve token, at [Utility:k] or end of text, or at its length limit. At each position only the
distributions within the groups of reflection tokens are kept, never the vocabulary's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from selfrag_jax.search.scoring import UNKNOWN
from selfrag_jax.text.reflection import ReflectionIds


@dataclass(frozen=True)
class TokenRules:
    """Token ids that steer generation; static for jit. Without `reflection`, only end of text ends a segment."""

    eos: int
    pad: int
    reflection: ReflectionIds | None
    whole: bool = False  # as the released scripts generate: on to the end of text, each group read where it is said first
    known: int | None = None  # tokens, the most likely ones, whose probabilities are known (None: all); see `log_probs_of`


@jax.tree_util.register_dataclass
@dataclass
class Segment:
    """What B branches have generated so far; M is the length limit."""

    tokens: jax.Array  # [B, M] int32: generated tokens, the pad id behind the end
    length: jax.Array  # [B] int32
    log_prob: jax.Array  # [B] f32: sum over text tokens, by the model's own distribution however they were chosen
    text_tokens: jax.Array  # [B] int32: how many of the tokens are text
    isrel: jax.Array  # [B, 2] f32: distribution within the group at the first generated position
    issup: jax.Array  # [B, 3] f32: where an IsSup token was generated, else at the end, be it the length limit
    isuse: jax.Array  # [B, 5] f32: at the end of the segment
    retrieve: jax.Array  # [B, 3] f32: at the end of the segment
    finished: jax.Array  # [B] bool: the answer is complete (Utility token or end of text)
    complete: jax.Array  # [B] bool: ended by a token, not by the length limit
    next_position: jax.Array  # [B] int32: position of the token that would follow
    retrieve_at: jax.Array | None  # [B, M, 3] f32: at every position (TokenRules.whole only)
    rel_log_probs: jax.Array | None  # [B, 2] f32: at the first generated position (TokenRules.whole only)

    def at(self, index) -> Segment:
        """Those branches that `index` picks."""
        return jax.tree.map(lambda x: x[index], self)

    def said(self) -> list[int]:
        """The tokens of a single branch, on the host."""
        return [int(t) for t in self.tokens[: self.length]]

    def mean_probability(self) -> float:
        """The exponential of the mean log-probability of a single branch's text; saying nothing is not certain, so 0."""
        return float(np.exp(self.log_prob / int(self.text_tokens))) if self.text_tokens else 0.0

    @classmethod
    def empty(cls, B: int, M: int, rules: TokenRules) -> Segment:
        count, no = jnp.zeros(B, jnp.int32), jnp.zeros(B, bool)
        groups = (jnp.full((B, n), 0.0 if rules.whole else 1.0 / n, jnp.float32) for n in (2, 3, 5, 3))
        more = (jnp.zeros((B, M, 3), jnp.float32), jnp.zeros((B, 2), jnp.float32)) if rules.whole else (None, None)
        pad = jnp.full((B, M), rules.pad, jnp.int32)
        return cls(pad, count, jnp.zeros(B, jnp.float32), count, *groups, no, no, count, *more)


def group_distribution(logits: jax.Array, ids: tuple[int, ...]) -> jax.Array:
    """Softmax within a group of token ids. logits: [B, V] -> [B, len(ids)]."""
    return jax.nn.softmax(logits[:, jnp.array(ids)], axis=-1)


def log_probs_of(logits: jax.Array, ids: tuple[int, ...], known: int | None) -> jax.Array:
    """Log-probabilities of some tokens; UNKNOWN for one that is none of the `known` most likely. logits: [B, V] ->
    [B, len(ids)]."""
    mine = logits[:, jnp.array(ids)]
    log_probs = mine - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    if known is None or known >= logits.shape[-1]:
        return log_probs
    more_likely = jax.lax.map(lambda m: (logits > m[:, None]).sum(-1), mine.T).T  # faster on a CPU than all at once
    return jnp.where(more_likely < known, log_probs, UNKNOWN)


def _member(token: jax.Array, ids: tuple[int, ...]) -> jax.Array:
    return (token[:, None] == jnp.array(ids)).any(1)


def roles(token: jax.Array, rules: TokenRules) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of each token [B]: does the segment end before it, does the answer end with it, is it no text?"""
    r, is_eos = rules.reflection, token == rules.eos
    if r is None:
        return jnp.zeros_like(is_eos), is_eos, is_eos
    if rules.whole:
        return jnp.zeros_like(is_eos), is_eos, jnp.zeros_like(is_eos)
    return _member(token, r.retrieve), is_eos | _member(token, r.isuse), is_eos | _member(token, r.all)


def read_groups(s: Any, logits: jax.Array, token: jax.Array, ending: jax.Array, at_limit: jax.Array, rules: TokenRules):
    """The segment with the group distributions of this step, each kept from the position where it is read, and whether an
    IsSup and an IsUse token have been said by now.

    s: the state before the token (slots.Slots); logits: [B, V]; token: [B]; ending: [B], the segment ends with this token or
    before it; at_limit: [B], this is the last one that it may have.
    """
    r, seg, live, first = rules.reflection, s.segment, ~s.done, s.age == 0
    if r is None:
        return seg, s.sup_seen, s.use_seen
    says_sup, says_use = live & _member(token, r.issup), live & _member(token, r.isuse)
    if rules.whole:  # one that is never said stays zero
        when = (first, says_sup & ~s.sup_seen, says_use & ~s.use_seen, first)
    else:  # IsSup without its token: the distribution where the segment ends; or is cut, at its last token
        ends = ending | at_limit
        when = (first, says_sup | (ends & ~s.sup_seen), ends, ends)
    names = ("isrel", "issup", "isuse", "retrieve")
    if rules.whole:
        log_probs = {name: log_probs_of(logits, getattr(r, name), rules.known) for name in names}
        new = {name: jax.nn.softmax(p, axis=-1) for name, p in log_probs.items()}
    else:
        new = {name: group_distribution(logits, getattr(r, name)) for name in names}
    kept = {k: jnp.where((live & w)[:, None], new[k], getattr(seg, k)) for k, w in zip(names, when, strict=True)}
    if rules.whole:
        now = (jnp.arange(seg.tokens.shape[1]) == s.age[:, None])[..., None] & live[:, None, None]
        kept["retrieve_at"] = jnp.where(now, new["retrieve"][:, None], seg.retrieve_at)
        kept["rel_log_probs"] = jnp.where((live & first)[:, None], log_probs["isrel"], seg.rel_log_probs)
    return replace(seg, **kept), s.sup_seen | says_sup, s.use_seen | says_use


def next_token(logits: jax.Array, key: jax.Array, age: jax.Array, sampling) -> tuple[jax.Array, jax.Array]:
    """The next token of each branch [B] and its log-probability [B] by the model's distribution.

    logits: [B, V]; key: [B, 2] uint32 and age: [B] make the branch's random number; sampling: (temperature, top_p) or None.
    """
    token = most_likely(logits) if sampling is None else sample(logits, key, age, *sampling)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
    return token, chosen - jax.nn.logsumexp(logits, axis=-1)


def most_likely(logits: jax.Array) -> jax.Array:
    """argmax over the last axis; the first of equals. In two plain reductions: XLA's own is slow on a CPU."""
    V = logits.shape[-1]
    best = logits == logits.max(-1, keepdims=True)
    return jnp.minimum(jnp.where(best, jnp.arange(V), V).min(-1), V - 1).astype(jnp.int32)


def sample(logits: jax.Array, key: jax.Array, age: jax.Array, temperature, top_p) -> jax.Array:
    """A token of each row from the nucleus of its distribution (Holtzman et al., 2020): the smallest set of the most likely
    tokens whose mass reaches top_p; tokens that are as likely as the last of it belong to it too.

    logits: [B, V]; key: [B, 2] uint32; age: [B]; temperature > 0 and 0 < top_p <= 1 scalars. Nothing is sorted: the probability
    of the nucleus's last token is found bit by bit.
    """
    p = jax.nn.softmax((logits - logits.max(-1, keepdims=True)) / temperature, axis=-1)
    bits = jax.lax.bitcast_convert_type(p, jnp.int32)  # in the order of p, for p is never negative

    def narrow(i, low):  # the largest threshold above which there still is enough
        higher = low | (1 << (30 - i))
        enough = jnp.where(bits >= higher[:, None], p, 0.0).sum(-1) >= top_p
        return jnp.where(enough, higher, low)

    low = jax.lax.fori_loop(0, 31, narrow, jnp.zeros(p.shape[0], jnp.int32))
    kept = bits >= low[:, None]
    mass = jnp.cumsum(jnp.where(kept, p, 0.0), axis=-1)
    draw = lambda k, i: jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(k), i))  # noqa: E731
    point = jax.vmap(draw)(key, age) * mass[:, -1]
    V = p.shape[1]
    token = jnp.where(kept & (mass > point[:, None]), jnp.arange(V), V).min(-1)  # sums are rounded, but nothing else is drawn
    return jnp.where(token < V, token, most_likely(logits)).astype(jnp.int32)
