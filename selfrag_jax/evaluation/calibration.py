"""Picks the threshold of retrieval from answers that always and that never retrieve.

Models differ in how readily they say [Retrieval]: with the paper's 0.2 some retrieve for every
question. A threshold is chosen on questions with gold answers, for a wanted retrieval rate or for
the best accuracy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from selfrag_jax.errors import UserError

Interval = tuple[float, float, float]  # value, low, high (95%, bootstrap over questions)
RESAMPLES = 1000


@dataclass(frozen=True)
class ThresholdChoice:
    threshold: Interval
    accuracy: Interval  # at the threshold
    retrieval_rate: Interval


def calibrate(
    p: Float[np.ndarray, " N"],
    always: Float[np.ndarray, " N"],
    never: Float[np.ndarray, " N"],
    rate: float | None,
    seed: int,
) -> ThresholdChoice:
    """Returns the threshold whose retrieval rate is closest to `rate`, or that is most accurate.

    p: p(retrieve) of each question; always, never: the accuracy of its answer with and without
    retrieval. rate: from 0 to 1, or None for the best accuracy; of equals, the one that retrieves
    least. Raises UserError for a rate that is none, and if all p are equal, since then no threshold
    divides the questions.
    """
    check_rate(rate)
    if len(p) == 0 or (p == p[0]).all():
        raise UserError(
            f"p(retrieve) is the same for all {len(p)} questions; no threshold divides them"
        )
    chosen = choose_threshold(p, always, never, rate)
    retrieved = p > chosen
    accuracy = np.where(retrieved, always, never)
    rng = np.random.default_rng(seed)
    thresholds, accuracies, rates = [], [], []
    for _ in range(RESAMPLES):
        i = rng.integers(0, len(p), len(p))
        thresholds.append(choose_threshold(p[i], always[i], never[i], rate))
        accuracies.append(accuracy[i].mean())
        rates.append(retrieved[i].mean())
    return ThresholdChoice(
        _interval(chosen, thresholds),
        _interval(float(accuracy.mean()), accuracies),
        _interval(float(retrieved.mean()), rates),
    )


def check_rate(rate: float | None) -> None:
    """Raises UserError for a rate that is no share."""
    if rate is not None and not 0 <= rate <= 1:
        raise UserError(f"--rate={rate}: must be a share of the questions, from 0 to 1")


def choose_threshold(
    p: Float[np.ndarray, " N"],
    always: Float[np.ndarray, " N"],
    never: Float[np.ndarray, " N"],
    rate: float | None,
) -> float:
    """The threshold alone; arguments as in `calibrate`."""
    order = np.argsort(-p, kind="stable")
    p, gain = p[order], (always - never)[order]
    # num_retrieved: the most likely k questions retrieve, where a threshold can part them.
    can_cut = np.concatenate([[True], p[:-1] > p[1:], [True]])
    num_retrieved = np.flatnonzero(can_cut)
    if rate is None:
        total = np.concatenate([[0.0], np.cumsum(gain)])[num_retrieved]
        k = int(num_retrieved[np.argmax(total > total.max() - 1e-9)])  # the first of equals
    else:
        distance = np.abs(num_retrieved / len(p) - rate).round(9)  # 3/7 and 4/7 are as far from 1/2
        k = int(num_retrieved[distance.argmin()])
    if k == 0:
        return float((1 + p[0]) / 2)
    return float((p[k - 1] + (p[k] if k < len(p) else 0.0)) / 2)


def _interval(value: float, samples: list[float]) -> Interval:
    low, high = np.percentile(samples, [2.5, 97.5])
    return value, float(low), float(high)
