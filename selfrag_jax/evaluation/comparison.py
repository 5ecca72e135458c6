"""Two runs on the same questions: paired differences, their intervals and p-values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from selfrag_jax.errors import UserError
from selfrag_jax.evaluation import metrics
from selfrag_jax.evaluation.scores import AMOUNTS, Row

FLIPS, FLIPS_AT_ONCE, MAX_EXACT = 10_000, 500, 12
NUM_EXAMPLES = 3


@dataclass(frozen=True)
class Difference:
    """One metric of two runs, over the questions for which both have it."""

    metric: str
    first: float  # mean
    second: float
    value: float  # first - second
    low: float  # of the 95% bootstrap interval
    high: float
    p: float  # two-sided, that the runs are alike (sign_flip_p)
    n: int
    only_first: tuple[str, ...]  # ids of questions with a full score in the first run alone
    only_second: tuple[str, ...]


def compare(first: Sequence[Row], second: Sequence[Row], seed: int) -> list[Difference]:
    """Returns the differences of all metrics that both runs have; rows are those of scores.jsonl.

    Raises UserError if the runs are of different questions, or have no metric in common.
    """
    others = _by_id(second, "second")
    mine = _by_id(first, "first")
    _require_same_questions(mine, others)
    names = dict.fromkeys(name for row in first for name in row["metrics"])
    found = []
    for name in names:
        ids = [i for i in mine if name in mine[i]["metrics"] and name in others[i]["metrics"]]
        if not ids:
            continue
        a, b = (np.array([rows[i]["metrics"][name] for i in ids], float) for rows in (mine, others))
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise UserError(f"{name} is not a number for some question; evaluate again")
        value, low, high = metrics.paired_interval(list(a - b), range(len(ids)), seed)
        is_share = name not in AMOUNTS
        only_a = tuple(i for i, x, y in zip(ids, a, b, strict=True) if is_share and x == 1 > y)
        only_b = tuple(i for i, x, y in zip(ids, a, b, strict=True) if is_share and y == 1 > x)
        p = sign_flip_p(a - b, seed)
        means = float(a.mean()), float(b.mean())
        found.append(Difference(name, *means, value, low, high, p, len(ids), only_a, only_b))
    if not found:
        raise UserError("the runs have no metric in common")
    return found


def sign_flip_p(differences: Float[np.ndarray, " n"], seed: int) -> float:
    """Returns the two-sided p-value of a paired permutation test.

    If the runs are alike, each difference may as well have the other sign: p is the share of sign
    assignments with a mean at least as far from 0. All are enumerated where few differences are not
    0; else 10,000 are drawn, and the observed one counts among them, so that p is never 0.
    """
    nonzero = differences[differences != 0]
    if not len(nonzero):
        return 1.0
    observed = abs(nonzero.sum()) * (1 - 1e-12)  # equal sums may differ in their last bits
    if len(nonzero) <= MAX_EXACT:
        signs = 1 - 2 * (np.arange(2 ** len(nonzero))[:, None] >> np.arange(len(nonzero)) & 1)
        return float(np.mean(abs(signs @ nonzero) >= observed))
    rng, extreme = np.random.default_rng(seed), 0
    for _ in range(FLIPS // FLIPS_AT_ONCE):
        signs = 1 - 2 * rng.integers(0, 2, (FLIPS_AT_ONCE, len(nonzero)), dtype=np.int8)
        extreme += int(np.sum(abs(signs @ nonzero) >= observed))
    return (extreme + 1) / (FLIPS + 1)


def text(differences: Sequence[Difference]) -> str:
    """Returns the differences as a table, and a few ids of each metric's questions that differ."""
    lines = [
        f"{'metric':<20} {'first':>7} {'second':>7} {'diff':>7}  {'95% interval':>16} {'p':>7} "
        f"{'n':>6}  only first, only second right"
    ]
    for d in differences:
        by = 1 if d.metric in AMOUNTS else 100
        first, second, value, low, high = (
            f"{by * v:.2f}" for v in (d.first, d.second, d.value, d.low, d.high)
        )
        lines.append(
            f"{d.metric:<20} {first:>7} {second:>7} {value:>7}  {low + ' to ' + high:>16} "
            f"{d.p:>7.4f} {d.n:>6}  {len(d.only_first)}, {len(d.only_second)}"
        )
    main = differences[0]
    for which, ids in (("first", main.only_first), ("second", main.only_second)):
        if ids:
            shown = ", ".join(ids[:NUM_EXAMPLES]) + (" …" if len(ids) > NUM_EXAMPLES else "")
            lines.append(f"{main.metric}: right in the {which} only: {shown}")
    return "\n".join(lines)


def _by_id(rows: Sequence[Row], which: str) -> dict[str, Row]:
    found = {str(row["id"]): row for row in rows}
    if len(found) < len(rows):
        raise UserError(f"the {which} run has {len(rows)} rows and only {len(found)} ids")
    return found


def _require_same_questions(first: dict[str, Row], second: dict[str, Row]) -> None:
    for mine, theirs, names in ((first, second, "first"), (second, first, "second")):
        if only := [i for i in mine if i not in theirs]:
            raise UserError(
                f"the runs are of different questions: {len(only)} of {len(mine)} ids are in the "
                f"{names} only, e.g. {only[0]!r}"
            )
    for i, row in first.items():
        asked = [str(r.get("question") or "").split() for r in (row, second[i])]
        if all(asked) and asked[0] != asked[1]:
            raise UserError(
                f"the runs are of different questions: id {i!r} asks {row['question'][:80]!r} in "
                f"the first and {second[i]['question'][:80]!r} in the second"
            )
