"""How the released scripts generate, and where they read critiques."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from selfrag_jax.engine.segments import GeneratedSegments, Step, TokenRules, is_member
from selfrag_jax.search.released.scores import UNKNOWN


@jax.tree_util.register_dataclass
@dataclass
class ReleasedReadings:
    """What the released search reads besides the group distributions."""

    retrieve_at: jax.Array  # [B, M, 3] f32: Retrieve distribution at every position
    rel_log_probs: jax.Array  # [B, 2] f32: of IsRel, at the first generated position
    isuse_seen: jax.Array  # [B] bool: an IsUse token was generated


@dataclass(frozen=True)
class ReleasedRules(TokenRules):
    """Generates to the end of text; reads IsSup and IsUse where they are first generated.

    IsRel and Retrieve are read at the first position. A group that is never generated stays zero.
    num_known: how many most likely tokens have a known probability; see `log_probs_of`.
    """

    num_known: int = 0

    def roles(
        self, token: Int[Array, " B"]
    ) -> tuple[Bool[Array, " B"], Bool[Array, " B"], Bool[Array, " B"]]:
        is_eos = token == self.eos
        return jnp.zeros_like(is_eos), is_eos, jnp.zeros_like(is_eos)

    def read_critiques(
        self, seg: GeneratedSegments, step: Step, issup_seen: Bool[Array, " B"]
    ) -> tuple[GeneratedSegments, Bool[Array, " B"]]:
        r, extras, live = self.reflection, seg.extras, step.live
        assert r is not None
        first = live & (step.steps_since_fed == 0)
        says_issup = live & is_member(step.token, r.issup)
        says_isuse = live & is_member(step.token, r.isuse)

        names = ("isrel", "issup", "isuse", "retrieve")
        log_probs = {n: log_probs_of(step.logits, r.group(n), self.num_known) for n in names}
        new = {n: jax.nn.softmax(p, axis=-1) for n, p in log_probs.items()}

        def read(name: str, when: Bool[Array, " B"]) -> Float[Array, "B n"]:
            return jnp.where(when[:, None], new[name], getattr(seg, name))

        here = (jnp.arange(seg.tokens.shape[1]) == step.steps_since_fed[:, None])[..., None]
        here = here & live[:, None, None]
        extras = ReleasedReadings(
            retrieve_at=jnp.where(here, new["retrieve"][:, None], extras.retrieve_at),
            rel_log_probs=jnp.where(first[:, None], log_probs["isrel"], extras.rel_log_probs),
            isuse_seen=extras.isuse_seen | says_isuse,
        )
        seg = replace(
            seg,
            isrel=read("isrel", first),
            issup=read("issup", says_issup & ~issup_seen),
            isuse=read("isuse", says_isuse & ~seg.extras.isuse_seen),
            retrieve=read("retrieve", first),
            extras=extras,
        )
        return seg, issup_seen | says_issup

    def unread_value(self, size: int) -> float:
        return 0.0

    def initial_extras(self, B: int, M: int) -> Any:
        return ReleasedReadings(
            retrieve_at=jnp.zeros((B, M, 3), jnp.float32),
            rel_log_probs=jnp.zeros((B, 2), jnp.float32),
            isuse_seen=jnp.zeros(B, bool),
        )


def log_probs_of(
    logits: Float[Array, "B V"], ids: tuple[int, ...], num_known: int
) -> Float[Array, "B n"]:
    """Log-probabilities of some tokens; UNKNOWN for one outside the `num_known` most likely."""
    own = logits[:, jnp.array(ids)]
    log_probs = own - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    if num_known >= logits.shape[-1]:
        return log_probs
    # One token at a time: faster on a CPU than all at once.
    rank = jax.lax.map(lambda x: (logits > x[:, None]).sum(-1), own.T).T
    return jnp.where(rank < num_known, log_probs, UNKNOWN)
