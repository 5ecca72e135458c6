"""Accuracy, confusion, calibration and chance-corrected agreement of two sets of labels.

Pure functions of numpy arrays. A label is its index in the group's tokens. With n queries, y_i the
reference's label, a_i the answer and p_i the probability of the answer (its confidence):

  accuracy        acc = (1/n) Σ_i [a_i = y_i]
  confusion       C[j, k] = number of queries with y_i = j and a_i = k
  reliability     bins I_m = ((m-1)/M, m/M] of the confidence; acc(m) and conf(m) are the means of
                  [a_i = y_i] and of p_i over the queries in I_m
  ECE             Σ_m (n_m / n) |acc(m) - conf(m)|   (Guo et al., ICML 2017, eq. 3)
  Cohen's kappa   κ = (p_o - p_e) / (1 - p_e), with p_o the share of equal labels and
                  p_e = Σ_k (C[k, ·] / n) (C[·, k] / n) that share by chance
                  (Cohen, Educational and Psychological Measurement 20, 1960)

Intervals are 95% bootstrap intervals over queries. Axes: N queries, K labels, M bins, R resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

BINS = 15  # of confidence, as Guo et al. take


def accuracy(labels: Int[np.ndarray, " N"], answers: Int[np.ndarray, " N"]) -> float:
    """Returns the share of answers that equal the label."""
    return float(np.mean(labels == answers))


def confusion_matrix(
    labels: Int[np.ndarray, " N"], answers: Int[np.ndarray, " N"], k: int
) -> Int[np.ndarray, "K K"]:
    """Returns C[j, k]: how many queries with label j were answered with k."""
    return np.bincount(np.asarray(labels) * k + answers, minlength=k * k).reshape(k, k)


# ---- calibration ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class ReliabilityBins:
    """What a reliability diagram shows: confidence against accuracy in bins of equal width."""

    edges: Float[np.ndarray, " M+1"]
    count: Int[np.ndarray, " M"]
    confidence: Float[np.ndarray, " M"]  # mean in the bin; NaN in an empty one
    accuracy: Float[np.ndarray, " M"]

    def to_rows(self) -> list[dict[str, float]]:
        """Returns the bins that have queries, as JSON data."""
        columns = (self.edges[:-1], self.edges[1:], self.count, self.confidence, self.accuracy)
        names = ("above", "up_to", "n", "confidence", "accuracy")
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return [dict(zip(names, row, strict=True)) for row in rows if row[2]]


def reliability_bins(
    confidence: Float[np.ndarray, " N"], correct: Bool[np.ndarray, " N"], bins: int
) -> ReliabilityBins:
    """Returns the mean confidence and accuracy in `bins` bins of equal width."""
    which = _bin_of(confidence, bins)
    count = np.bincount(which, minlength=bins)
    with np.errstate(invalid="ignore"):  # 0 / 0 in an empty bin is the NaN that it should be
        mean_confidence = np.bincount(which, confidence, bins) / count
        mean_accuracy = np.bincount(which, correct, bins) / count
    return ReliabilityBins(np.linspace(0, 1, bins + 1), count, mean_confidence, mean_accuracy)


def calibration_error(
    confidence: Float[np.ndarray, " N"], correct: Bool[np.ndarray, " N"], bins: int
) -> float:
    """Returns the expected calibration error (Guo et al., 2017, eq. 3)."""
    gap = np.asarray(correct, np.float64) - confidence
    return _error_of(_bin_of(confidence, bins), gap, bins)


def calibration_interval(
    confidence: Float[np.ndarray, " N"],
    correct: Bool[np.ndarray, " N"],
    bins: int,
    seed: int,
    resamples: int = 1000,
) -> tuple[float, float, float]:
    """Returns the expected calibration error and its interval, (value, low, high).

    Resampling adds noise to every bin, and its absolute value only grows: the resampled errors are
    too large on average. The interval is therefore their spread about their mean, put around the
    value.
    """
    which, gap = _bin_of(confidence, bins), np.asarray(correct, np.float64) - confidence
    value, rng, n = _error_of(which, gap, bins), np.random.default_rng(seed), len(gap)
    drawn = (rng.integers(0, n, n) for _ in range(resamples))
    errors = np.array([_error_of(which[i], gap[i], bins) for i in drawn])
    low, high = np.clip(value + np.percentile(errors, [2.5, 97.5]) - errors.mean(), 0, 1)
    return value, min(float(low), value), max(float(high), value)


def _bin_of(confidence: Float[np.ndarray, " N"], bins: int) -> Int[np.ndarray, " N"]:
    """The bin of each confidence; bins are closed on the right, and 0 is in the first."""
    return np.digitize(confidence, np.linspace(0, 1, bins + 1)[1:-1], right=True)


def _error_of(which: Int[np.ndarray, " N"], gap: Float[np.ndarray, " N"], bins: int) -> float:
    # n_m |acc(m) - conf(m)| is the absolute sum of the bin's gaps.
    return float(np.abs(np.bincount(which, gap, bins)).sum() / len(gap))


# ---- agreement -----------------------------------------------------------------------------------
def cohens_kappa(table: Int[np.ndarray, "K K"]) -> float:
    """Returns Cohen's kappa of a confusion matrix.

    It is NaN where it has no value: both sides gave one and the same label to every query, so
    that chance alone agrees as well.
    """
    return float(_kappas(np.asarray(table)[None])[0])


def kappa_interval(
    table: Int[np.ndarray, "K K"], seed: int, resamples: int = 1000
) -> tuple[float, float, float]:
    """Returns Cohen's kappa and its bootstrap interval, (value, low, high); all NaN without one.

    To resample queries is to draw from the multinomial distribution of the table's cells. Resamples
    in which kappa has no value are left out.
    """
    table = np.asarray(table)
    value = cohens_kappa(table)
    if np.isnan(value):
        return value, value, value
    n, cells = int(table.sum()), table.ravel()
    drawn = np.random.default_rng(seed).multinomial(n, cells / n, resamples)
    kappas = _kappas(drawn.reshape(resamples, *table.shape))
    if np.isnan(kappas).all():  # a table of one or two queries
        return value, value, value
    low, high = np.nanpercentile(kappas, [2.5, 97.5])
    return value, min(float(low), value), max(float(high), value)


def _kappas(tables: Int[np.ndarray, "R K K"]) -> Float[np.ndarray, " R"]:
    # In whole numbers until the division, so that equal labels give exactly 1.
    n = tables.sum((1, 2))
    observed = n * np.trace(tables, axis1=1, axis2=2)
    by_chance = (tables.sum(1) * tables.sum(2)).sum(1)
    with np.errstate(invalid="ignore"):
        return (observed - by_chance) / (n * n - by_chance)
