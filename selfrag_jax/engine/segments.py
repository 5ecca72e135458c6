"""Segments as they come out of the model, token by token.

Which token is next, what it ends, and what the model thinks of itself. At each position only the
distributions within the groups of reflection tokens are kept, never the vocabulary's. Axes: B
branches, M maximum tokens of a segment, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from selfrag_jax.text.reflection import ReflectionIds


@jax.tree_util.register_dataclass
@dataclass
class GeneratedSegments:
    """What B branches have generated so far."""

    tokens: jax.Array  # [B, M] int32: generated tokens, then the pad id
    length: jax.Array  # [B] int32
    log_prob: jax.Array  # [B] f32: sum over the tokens that TokenRules.roles counts as text
    num_text_tokens: jax.Array  # [B] int32
    isrel: jax.Array  # [B, 2] f32: distribution within the group at the first generated position
    issup: jax.Array  # [B, 3] f32: where an IsSup token was generated, else at the segment's end
    isuse: jax.Array  # [B, 5] f32: at the segment's end
    retrieve: jax.Array  # [B, 3] f32: at the segment's end
    finished: jax.Array  # [B] bool: the answer ended with it (Utility token or end of text)
    complete: jax.Array  # [B] bool: ended by a token, not by the length limit
    next_position: jax.Array  # [B] int32: position of the token that would follow
    extras: Any  # what other rules read besides (TokenRules.initial_extras), or None

    def at(self, index: Any) -> GeneratedSegments:
        """The branches that `index` picks."""
        return jax.tree.map(lambda x: x[index], self)

    def token_ids(self) -> list[int]:
        """The tokens of a single branch, on the host."""
        return [int(t) for t in self.tokens[: self.length]]

    def mean_probability(self) -> float:
        """exp of the mean log-probability of a single branch's text; 0 for no text."""
        if not self.num_text_tokens:
            return 0.0
        return float(np.exp(self.log_prob / int(self.num_text_tokens)))

    @classmethod
    def empty(cls, B: int, M: int, rules: TokenRules) -> GeneratedSegments:
        def unread(n: int) -> jax.Array:
            return jnp.full((B, n), rules.unread_value(n), jnp.float32)

        zeros, false = jnp.zeros(B, jnp.int32), jnp.zeros(B, bool)
        return cls(
            tokens=jnp.full((B, M), rules.pad, jnp.int32),
            length=zeros,
            log_prob=jnp.zeros(B, jnp.float32),
            num_text_tokens=zeros,
            isrel=unread(2),
            issup=unread(3),
            isuse=unread(5),
            retrieve=unread(3),
            finished=false,
            complete=false,
            next_position=zeros,
            extras=rules.initial_extras(B, M),
        )


@dataclass(frozen=True)
class Step:
    """A decoding step of B branches, as TokenRules sees it: the chosen token and what it ends."""

    logits: Float[Array, "B V"]
    token: Int[Array, " B"]
    steps_since_fed: Int[Array, " B"]  # tokens chosen before this one
    live: Bool[Array, " B"]
    ends: Bool[Array, " B"]  # the segment ends with this token, or before it
    at_limit: Bool[Array, " B"]  # it may have no more tokens after this one


@dataclass(frozen=True)
class TokenRules:
    """Which tokens end a segment, and where critiques are read (paper, Section 3.3).

    A segment ends before a Retrieve token, at [Utility:k] or end of text, or at its length limit.
    Static for jit. Without `reflection`, only end of text ends a segment. Subclasses may read
    differently (search/released).
    """

    eos: int
    pad: int
    reflection: ReflectionIds | None

    def roles(
        self, token: Int[Array, " B"]
    ) -> tuple[Bool[Array, " B"], Bool[Array, " B"], Bool[Array, " B"]]:
        """(ends_before, ends_answer, is_control) of each token.

        Whether the segment ends before it, whether the answer ends with it, whether it is no text.
        """
        r, is_eos = self.reflection, token == self.eos
        if r is None:
            return jnp.zeros_like(is_eos), is_eos, is_eos
        ends_answer = is_eos | is_member(token, r.isuse)
        return is_member(token, r.retrieve), ends_answer, is_eos | is_member(token, r.all)

    def read_critiques(
        self, seg: GeneratedSegments, step: Step, issup_seen: Bool[Array, " B"]
    ) -> tuple[GeneratedSegments, Bool[Array, " B"]]:
        """`seg` with the group distributions of this step, each from the position where it counts.

        issup_seen: whether an IsSup token was generated before this step; returned updated. The
        first one counts, as in the released scripts. If none is generated, IsSup is read where the
        segment ends, or at its last token if it is cut.
        """
        r = self.reflection
        if r is None:
            return seg, issup_seen
        says_issup = step.live & is_member(step.token, r.issup)
        ends = step.live & (step.ends | step.at_limit)
        seg = replace(
            seg,
            isrel=_read(seg.isrel, step.live & (step.steps_since_fed == 0), step.logits, r.isrel),
            issup=_read(seg.issup, (says_issup | ends) & ~issup_seen, step.logits, r.issup),
            isuse=_read(seg.isuse, ends, step.logits, r.isuse),
            retrieve=_read(seg.retrieve, ends, step.logits, r.retrieve),
        )
        return seg, issup_seen | says_issup

    def unread_value(self, size: int) -> float:
        """What a group of `size` tokens holds before it is read."""
        return 1.0 / size

    def initial_extras(self, B: int, M: int) -> Any:
        """The first value of GeneratedSegments.extras."""
        return None


def _read(
    old: Float[Array, "B n"],
    when: Bool[Array, " B"],
    logits: Float[Array, "B V"],
    ids: tuple[int, ...],
) -> Float[Array, "B n"]:
    return jnp.where(when[:, None], group_distribution(logits, ids), old)


def group_distribution(logits: Float[Array, "B V"], ids: tuple[int, ...]) -> Float[Array, "B n"]:
    """Softmax within a group of token ids."""
    return jax.nn.softmax(logits[:, jnp.array(ids)], axis=-1)


def is_member(token: Int[Array, " B"], ids: tuple[int, ...]) -> Bool[Array, " B"]:
    return (token[:, None] == jnp.array(ids)).any(1)


def next_token(
    logits: Float[Array, "B V"],
    key: UInt32[Array, "B 2"],
    step: Int[Array, " B"],
    sampling: tuple[Any, Any] | None,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """The next token of each branch, and its log-probability by the model's distribution.

    key and step determine a branch's random number. sampling: (temperature, top_p), or None for the
    most likely token.
    """
    token = most_likely(logits) if sampling is None else sample(logits, key, step, *sampling)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
    return token, chosen - jax.nn.logsumexp(logits, axis=-1)


def most_likely(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    """argmax over the last axis; the first of equals. Two plain reductions: XLA's argmax is slow
    on a CPU."""
    V = logits.shape[-1]
    best = logits == logits.max(-1, keepdims=True)
    return jnp.minimum(jnp.where(best, jnp.arange(V), V).min(-1), V - 1).astype(jnp.int32)


def sample(
    logits: Float[Array, "B V"],
    key: UInt32[Array, "B 2"],
    step: Int[Array, " B"],
    temperature,
    top_p,
) -> Int[Array, " B"]:
    """A token of each row from the nucleus of its distribution (Holtzman et al., 2020).

    The nucleus is the smallest set of most likely tokens whose mass reaches top_p, with all tokens
    as likely as its last. temperature > 0 and 0 < top_p <= 1 are scalars. Nothing is sorted: the
    probability of the nucleus's last token is found bit by bit.
    """
    p = jax.nn.softmax((logits - logits.max(-1, keepdims=True)) / temperature, axis=-1)
    bits = jax.lax.bitcast_convert_type(p, jnp.int32)  # ordered as p, which is never negative

    def narrow(i, low):  # the largest threshold that leaves enough mass
        higher = low | (1 << (30 - i))  # from the highest bit on; bit 31 is the sign
        enough = jnp.where(bits >= higher[:, None], p, 0.0).sum(-1) >= top_p
        return jnp.where(enough, higher, low)

    low = jax.lax.fori_loop(0, 31, narrow, jnp.zeros(p.shape[0], jnp.int32))
    kept = bits >= low[:, None]
    mass = jnp.cumsum(jnp.where(kept, p, 0.0), axis=-1)

    def draw(k, i):
        return jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(k), i))

    point = jax.vmap(draw)(key, step) * mass[:, -1]
    V = p.shape[1]
    # Sums are rounded; `kept` makes sure that no other token is drawn.
    token = jnp.where(kept & (mass > point[:, None]), jnp.arange(V), V).min(-1)
    return jnp.where(token < V, token, most_likely(logits)).astype(jnp.int32)
