"""Critique scores of a segment (paper, Section 3.3 and Appendix A.3), as pure functions of group distributions.

    f = w_seq * p(y_t | x, d, y_<t) + w_rel * s_rel + w_sup * s_sup + w_use * s_use

    s_rel = p(Relevant) / (p(Relevant) + p(Irrelevant))
    s_sup = (p(Fully) + 0.5 p(Partially)) / (p(Fully) + p(Partially) + p(No support))
    s_use = sum_i w_i p(Utility:i) / sum_j p(Utility:j),  w = (-1, -0.5, 0, 0.5, 1)

p(y_t | ...) is the exponential of the mean log-probability of the segment's text tokens: reflection tokens enter only
through their own scores. All functions work on numpy and JAX arrays alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from selfrag_jax.errors import UserError

MOST = 1e6  # as a weight; far above, sums of scores would be rounded to nothing
UNKNOWN = (
    -100.0
)  # what the released scripts take for the log-probability of a token that vLLM did not return
UTILITY_WEIGHTS = (-1.0, -0.5, 0.0, 0.5, 1.0)


@dataclass(frozen=True)
class Weights:
    """Weights of the terms; w_seq is the paper's implicit 1."""

    w_rel: float = 1.0
    w_sup: float = 1.0
    w_use: float = 0.5
    w_seq: float = 1.0

    def __post_init__(self):
        for name in ("w_rel", "w_sup", "w_use", "w_seq"):
            if not 0 <= getattr(self, name) <= MOST:
                raise UserError(
                    f"--{name}={getattr(self, name)}: a weight is a number from 0 to {MOST:,.0f}; 0 switches the term off"
                )


def s_rel(p):
    """p: [..., 2] in the order of reflection.ISREL (Irrelevant, Relevant)."""
    return p[..., 1] / (p[..., 0] + p[..., 1])


def s_sup(p):
    """p: [..., 3] in the order of reflection.ISSUP (Fully, Partially, No support)."""
    return (p[..., 0] + 0.5 * p[..., 1]) / (p[..., 0] + p[..., 1] + p[..., 2])


def s_use(p):
    """p: [..., 5] in the order of reflection.ISUSE (1 to 5)."""
    return sum(w * p[..., i] for i, w in enumerate(UTILITY_WEIGHTS)) / sum(
        p[..., i] for i in range(5)
    )


def p_retrieve(p, normalise: str):
    """Probability that retrieval is needed. p: [..., 3] in the order of reflection.RETRIEVE (No, Yes, Continue).

    normalise: "yes_no" divides by p(yes) + p(no), "all" by all three (both appear in the paper).
    """
    return p[..., 1] / (p[..., 0] + p[..., 1] + (p[..., 2] if normalise == "all" else 0.0))


def segment_score(p_segment, isrel, issup, isuse, has_passage, weights: Weights):
    """f of each segment. p_segment, has_passage: [...]; isrel [..., 2], issup [..., 3], isuse [..., 5] distributions.

    Without a passage s_rel and s_sup do not exist and count 0.
    """
    evidence = weights.w_rel * s_rel(isrel) + weights.w_sup * s_sup(issup)
    return weights.w_seq * p_segment + has_passage * evidence + weights.w_use * s_use(isuse)


def finite(score) -> float:
    """The score of one segment. Raises FloatingPointError where it is none."""
    if not math.isfinite(score):
        raise FloatingPointError(
            "the model's probabilities are not finite: are its weights whole, and is its dtype wide enough?"
        )
    return float(score)
