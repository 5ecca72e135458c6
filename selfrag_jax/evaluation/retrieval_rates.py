"""The accuracy of adaptive retrieval at every threshold, from answers that were made once.

In an answer of one segment, adaptive retrieval with a threshold gives the answer of always
retrieving where p(retrieve) is above the threshold, and that of never retrieving elsewhere
(answering/rescoring.py). So the answers of both modes hold those of all thresholds, and the
thresholds between two neighbouring values of p(retrieve) are one point. Points are exact; the lines
that a plot draws between them are not reached by any threshold, but by tossing a coin.

Two orders of the questions are the references. In random order accuracy goes straight from that of
never to that of always retrieving. The oracle knows both answers: it retrieves first where that
helps, and last where it harms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from selfrag_jax.evaluation.calibration import RESAMPLES, Interval

Row = dict[str, Any]
ALWAYS_SYSTEM, NEVER_SYSTEM = "selfrag_always", "selfrag_never"
P_RETRIEVE, ORACLE, RANDOM = ORDERS = ("p_retrieve", "oracle", "random")
_ENDS = ("threshold_from", "threshold_below")


@dataclass(frozen=True)
class RatePoint:
    """Adaptive retrieval with any threshold from `threshold_from` up to, not at, `threshold_below`.

    None: without an end. retrieval_rate: the share of questions whose p(retrieve) is above it.
    """

    threshold_from: float | None
    threshold_below: float | None
    retrieval_rate: float
    accuracy: float


@dataclass(frozen=True)
class BothModes:
    """The questions that were answered with and without retrieval.

    p: p(retrieve). always, never: accuracy of the answer with retrieval, and without.
    left_out: number of questions without both answers, because one failed or has no accuracy.
    """

    ids: tuple[str, ...]
    p: Float[np.ndarray, " N"]
    always: Float[np.ndarray, " N"]
    never: Float[np.ndarray, " N"]
    left_out: int

    def keys(self, order: str) -> Float[np.ndarray, " N"]:
        """What an order of ORDERS retrieves by, the greatest first."""
        return {
            P_RETRIEVE: self.p,
            ORACLE: self.always - self.never,  # what retrieval gains
            RANDOM: np.zeros(len(self.p)),  # all equal: the straight line
        }[order]

    def curve(self, order: str) -> list[RatePoint]:
        """The points from no retrieval to always; their thresholds are of `keys`."""
        return rate_curve(self.keys(order), self.always, self.never)

    def area(self, order: str) -> float:
        return curve_area(self.keys(order), self.always, self.never)


def rate_curve(
    p: Float[np.ndarray, " N"], always: Float[np.ndarray, " N"], never: Float[np.ndarray, " N"]
) -> list[RatePoint]:
    """Returns the points of all thresholds, from retrieving for none to retrieving for all.

    Questions with equal p are on the same side of any threshold.
    """
    ends, rates, accuracies = _points(p, always, never)
    return [
        RatePoint(start, end, float(rate), float(accuracy))
        for start, end, rate, accuracy in zip(
            [*ends, None], [None, *ends], rates, accuracies, strict=True
        )
    ]


def _points(
    p: Float[np.ndarray, " N"], always: Float[np.ndarray, " N"], never: Float[np.ndarray, " N"]
) -> tuple[list[float], Float[np.ndarray, " K+1"], Float[np.ndarray, " K+1"]]:
    """The K distinct values of p, falling; retrieval rate and accuracy before, between, after."""
    order = np.argsort(-p, kind="stable")
    p, gain = p[order], (always - never)[order]
    # retrieved[j]: how many questions retrieve at point j.
    retrieved = np.concatenate([[0], np.flatnonzero(p[:-1] > p[1:]) + 1, [len(p)]])
    total = never.sum() + np.concatenate([[0.0], np.cumsum(gain)])[retrieved]
    return p[retrieved[1:] - 1].tolist(), retrieved / len(p), total / len(p)


def curve_area(
    p: Float[np.ndarray, " N"], always: Float[np.ndarray, " N"], never: Float[np.ndarray, " N"]
) -> float:
    """Returns the area under the curve: the mean accuracy over all retrieval rates."""
    _, rates, accuracies = _points(p, always, never)
    return float(np.trapezoid(accuracies, rates))


def share_of_oracle(modes: BothModes) -> float | None:
    """Returns the area above random order as a share of the oracle's.

    1 is the oracle, 0 as good as random, below 0 worse. None if no order can matter.
    """
    own, best, random = (modes.area(order) for order in ORDERS)
    return None if best - random < 1e-9 else (own - random) / (best - random)


def area_interval(modes: BothModes, seed: int) -> Interval:
    """Returns the area under the curve with its 95% bootstrap interval over questions."""
    rng, n = np.random.default_rng(seed), len(modes.p)
    drawn = (rng.integers(0, n, n) for _ in range(RESAMPLES))
    areas = [curve_area(modes.p[i], modes.always[i], modes.never[i]) for i in drawn]
    low, high = np.percentile(areas, [2.5, 97.5])
    return modes.area(P_RETRIEVE), float(low), float(high)


# ---- from answers --------------------------------------------------------------------------------
def both_modes(always: Sequence[Row], never: Sequence[Row]) -> BothModes | None:
    """Returns what the scored answers of both modes say of each question.

    The rows have id, metrics, p_retrieve and tree; those of one mode may be fewer. None if no
    question has both answers, and if an answer has several segments: a threshold then decides
    again before each of them.
    """
    nodes = (n for row in (*always, *never) for n in row.get("tree", ()))
    if any(n.get("parent", -1) != -1 for n in nodes):
        return None
    without = {str(row["id"]): row for row in never}
    pairs = [(row, without[str(row["id"])]) for row in always if str(row["id"]) in without]
    asked = len({str(row["id"]) for row in (*always, *never)})
    pairs = [
        (a, n) for a, n in pairs if _counts(a) and _counts(n) and a.get("p_retrieve") is not None
    ]
    if not pairs:
        return None
    columns = ([_accuracy(row) for row in mode] for mode in zip(*pairs, strict=True))
    with_, without_ = (np.array(column, np.float64) for column in columns)
    p = np.array([a["p_retrieve"] for a, _ in pairs], np.float64)
    ids = tuple(str(a["id"]) for a, _ in pairs)
    return BothModes(ids, p, with_, without_, asked - len(pairs))


def _counts(row: Row) -> bool:
    return not row.get("error") and _accuracy(row) is not None


def _accuracy(row: Row) -> float | None:
    return row.get("metrics", {}).get("accuracy")


def modes_by_task(answers: Sequence[Row]) -> dict[str, BothModes]:
    """Returns both modes of each task for which they are among the answers.

    They are the systems selfrag_always and selfrag_never. Without these, they are the one system
    that has retrieved for every question and the one that has for none, if there is one of each.
    Answers without a search, and those of the released scorer, whose gate is no probability, do not
    count.
    """
    by_task: dict[str, dict[str, list[Row]]] = {}
    for row in answers:
        if (row.get("tree") or row.get("error")) and row.get("scorer", "paper") == "paper":
            of_task = by_task.setdefault(row.get("task", ""), {})
            of_task.setdefault(row.get("system", ""), []).append(row)
    found = {}
    for task, systems in by_task.items():
        always = _mode(systems, ALWAYS_SYSTEM, True)
        never = _mode(systems, NEVER_SYSTEM, False)
        if always and never and (modes := both_modes(always, never)):
            found[task] = modes
    return found


def _mode(systems: dict[str, list[Row]], name: str, retrieves: bool) -> list[Row]:
    """The answers of a mode; [] if none or several systems could be it."""
    if name in systems:
        return systems[name]
    found = [
        rows
        for rows in systems.values()
        if all(bool(row.get("retrieved")) == retrieves for row in rows if not row.get("error"))
    ]
    return found[0] if len(found) == 1 else []


def to_json(tasks: dict[str, BothModes], seed: int) -> Row:
    """Returns the curves of all tasks as rows, and the areas below them with their intervals."""
    rows, areas = [], []
    for task, modes in tasks.items():
        for order in ORDERS:
            # Only p(retrieve) has a threshold.
            ends = {} if order == P_RETRIEVE else dict.fromkeys(_ENDS)
            points = modes.curve(order)
            rows += [{"task": task, "order": order} | asdict(p) | ends for p in points]
        value, low, high = area_interval(modes, seed)
        areas.append({
            "task": task,
            "area": value,
            "low": low,
            "high": high,
            ORACLE: modes.area(ORACLE),
            RANDOM: modes.area(RANDOM),
            "share_of_oracle": share_of_oracle(modes),
            "n": len(modes.p),
            "left_out": modes.left_out,
        })  # fmt: skip
    return {"rows": rows, "areas": areas}
