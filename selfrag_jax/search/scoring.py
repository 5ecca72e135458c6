"""Critique scores of a segment (paper, Section 3.3 and Appendix A.3), as pure functions.

    f = w_seq * p(y_t | x, d, y_<t) + w_rel * s_rel + w_sup * s_sup + w_use * s_use

    s_rel = p(Relevant) / (p(Relevant) + p(Irrelevant))
    s_sup = (p(Fully) + 0.5 p(Partially)) / (p(Fully) + p(Partially) + p(No support))
    s_use = sum_i w_i p(Utility:i) / sum_j p(Utility:j),  w = (-1, -0.5, 0, 0.5, 1)

p(y_t | ...) is exp of the mean log-probability of the segment's text tokens: reflection tokens
count only through their own scores. The functions take numpy and JAX arrays alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from selfrag_jax.config import setting
from selfrag_jax.errors import UserError

if TYPE_CHECKING:
    import jax

    AnyArray = np.ndarray | jax.Array

MAX_WEIGHT = 1e6  # far above it, rounding would swallow the other terms
UTILITY_WEIGHTS = (-1.0, -0.5, 0.0, 0.5, 1.0)


@dataclass(frozen=True)
class Weights:
    """Weights of the terms of f. The paper's f has no w_seq: its 1 is implicit."""

    w_rel: float = setting("weight of IsRel", default=1.0)
    w_sup: float = setting("weight of IsSup", default=1.0)
    w_use: float = setting("weight of IsUse", default=0.5)
    w_seq: float = setting("weight of the segment's own probability", default=1.0)

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if not 0 <= value <= MAX_WEIGHT:
                raise UserError(
                    f"--{f.name}={value}: a weight is a number from 0 to {MAX_WEIGHT:,.0f}; "
                    "0 switches the term off"
                )


def s_rel(p: Float[AnyArray, "... 2"]) -> Any:
    """p: in the order of reflection.ISREL (Irrelevant, Relevant). Returns [...]."""
    return p[..., 1] / (p[..., 0] + p[..., 1])


def s_sup(p: Float[AnyArray, "... 3"]) -> Any:
    """p: in the order of reflection.ISSUP (Fully, Partially, No support). Returns [...]."""
    return (p[..., 0] + 0.5 * p[..., 1]) / (p[..., 0] + p[..., 1] + p[..., 2])


def s_use(p: Float[AnyArray, "... 5"]) -> Any:
    """p: in the order of reflection.ISUSE (1 to 5). Returns [...]."""
    weighted = sum(w * p[..., i] for i, w in enumerate(UTILITY_WEIGHTS))
    return weighted / sum(p[..., i] for i in range(5))


def p_retrieve(p: Float[AnyArray, "... 3"], normalise: str) -> Any:
    """Probability that retrieval is needed; p: in the order of reflection.RETRIEVE.

    normalise: "yes_no" divides by p(yes) + p(no), "all" by all three (both occur in the paper).
    Returns [...].
    """
    return p[..., 1] / (p[..., 0] + p[..., 1] + (p[..., 2] if normalise == "all" else 0.0))


def segment_score(
    p_segment: Any,
    isrel: Float[AnyArray, "... 2"],
    issup: Float[AnyArray, "... 3"],
    isuse: Float[AnyArray, "... 5"],
    has_passage: Any,
    weights: Weights,
) -> Any:
    """f of each segment, [...]. p_segment, has_passage (0 or 1): [...].

    Without a passage, s_rel and s_sup do not exist, and count 0.
    """
    evidence = weights.w_rel * s_rel(isrel) + weights.w_sup * s_sup(issup)
    return weights.w_seq * p_segment + has_passage * evidence + weights.w_use * s_use(isuse)


def finite(score: float) -> float:
    """The score of a segment. Raises FloatingPointError if it is NaN or infinite."""
    if not math.isfinite(score):
        raise FloatingPointError(
            "the model's probabilities are not finite: are its weights intact, and is its dtype "
            "wide enough?"
        )
    return float(score)
