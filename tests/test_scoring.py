"""Critique scores against tables that were worked out by hand."""

import numpy as np
import pytest

from selfrag_jax.errors import UserError
from selfrag_jax.search import scoring


def test_scores_by_hand():
    # s_rel = .6/.8; s_sup = (.5 + .5*.2)/1; s_use = (-.1 - .05 + 0 + .1 + .5)/1
    isrel, issup = np.array([0.2, 0.6]), np.array([0.5, 0.2, 0.3])
    isuse = np.array([0.1, 0.1, 0.1, 0.2, 0.5])
    assert scoring.s_rel(isrel) == pytest.approx(0.75)
    assert scoring.s_sup(issup) == pytest.approx(0.6)
    assert scoring.s_use(isuse) == pytest.approx(0.45)

    weights = scoring.Weights(w_rel=1.0, w_sup=2.0, w_use=0.5, w_seq=1.0)
    with_passage = scoring.segment_score(0.4, isrel, issup, isuse, 1.0, weights)
    without_passage = scoring.segment_score(0.4, isrel, issup, isuse, 0.0, weights)
    assert with_passage == pytest.approx(0.4 + 0.75 + 1.2 + 0.225)
    assert without_passage == pytest.approx(0.4 + 0.225)

    p = np.array([0.3, 0.1, 0.6])
    assert scoring.p_retrieve(p, "yes_no") == pytest.approx(0.25)
    assert scoring.p_retrieve(p, "all") == pytest.approx(0.1)

    with pytest.raises(UserError, match="w_sup"):
        scoring.Weights(w_sup=-1)
