"""Scores and gate of the authors' released scripts."""

from __future__ import annotations

import numpy as np

from selfrag_jax.search.scoring import UNKNOWN, Weights, s_rel, s_sup, s_use


# ---- what the released scripts compute -------------------------------------------------------------------------------
def released_gate(log_probs) -> float:
    """The short-form script's quotient of log-probabilities [3], in the order of reflection.RETRIEVE. Logarithms are negative,
    so that the less likely retrieval is, the larger it gets."""
    return float(log_probs[1] / (log_probs[1] + log_probs[0]))


def released_score(p_sequence, isrel, issup, isuse, weights: Weights):
    """f of the short-form script. Distributions as in `segment_score`, all zeros for a group that was never said, which then
    counts 0. p_sequence is over all tokens, the reflection tokens and the end of text among them."""
    said = lambda p: float(p.sum()) > 0  # noqa: E731
    evidence = weights.w_rel * s_rel(isrel) + (weights.w_sup * s_sup(issup) if said(issup) else 0.0)
    return (
        weights.w_seq * p_sequence
        + evidence
        + (weights.w_use * s_use(isuse) if said(isuse) else 0.0)
    )


def released_score_long(rel_log_probs, issup) -> float:
    """f of the long-form script: without the sequence, without IsUse (whose values it looks up by IsSup's names), and with
    weights of 1 whatever the command line says.

    rel_log_probs: [2] in the order of reflection.ISREL. One that is not known is given as -100, which the script here takes for
    the probability, so that s_rel leaves 0 to 1.
    """
    rel = np.where(rel_log_probs == UNKNOWN, UNKNOWN, np.exp(rel_log_probs.astype(np.float64)))
    return float(s_rel(rel) + (s_sup(issup) if float(issup.sum()) > 0 else 0.0))
