"""The gate and the scores of the released scripts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from selfrag_jax.search.scoring import Weights, s_rel, s_sup, s_use

if TYPE_CHECKING:
    from selfrag_jax.search.scoring import AnyArray

# What the scripts take as the log-probability of a token that vLLM did not return.
UNKNOWN = -100.0


def released_gate(log_probs: Float[AnyArray, " 3"]) -> float:
    """The short form's quotient of log-probabilities, in the order of reflection.RETRIEVE.

    Logarithms are negative, so it grows as retrieval becomes less likely.
    """
    return float(log_probs[1] / (log_probs[1] + log_probs[0]))


def released_score(
    p_sequence: float,
    isrel: Float[AnyArray, " 2"],
    issup: Float[AnyArray, " 3"],
    isuse: Float[AnyArray, " 5"],
    weights: Weights,
) -> float:
    """f of the short form.

    p_sequence covers all tokens, reflection tokens and the end of text included. The distributions
    are as in scoring.segment_score; all zeros for a group that was never generated, which counts 0.
    """
    evidence = weights.w_rel * s_rel(isrel)
    evidence = evidence + (weights.w_sup * s_sup(issup) if _was_read(issup) else 0.0)
    use = weights.w_use * s_use(isuse) if _was_read(isuse) else 0.0
    return weights.w_seq * p_sequence + evidence + use


def released_score_long(
    rel_log_probs: Float[AnyArray, " 2"], issup: Float[AnyArray, " 3"]
) -> float:
    """f of the long form.

    Leaves out the sequence and IsUse (the script looks its values up by IsSup's names), and weights
    both other terms by 1, whatever the command line says. rel_log_probs: in the order of
    reflection.ISREL. The script takes an unknown one, -100, for the probability itself, so s_rel
    can leave the interval from 0 to 1.
    """
    known = rel_log_probs != UNKNOWN
    rel = np.where(known, np.exp(rel_log_probs.astype(np.float64)), UNKNOWN)
    return float(s_rel(rel) + (s_sup(issup) if _was_read(issup) else 0.0))


def _was_read(distribution: Float[AnyArray, " n"]) -> bool:
    return float(distribution.sum()) > 0
