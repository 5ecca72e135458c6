"""A critic's answers beside the labels in the data: per group, and as rows of results.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from selfrag_jax.evaluation import critic_scores
from selfrag_jax.evaluation.critic_scores import ReliabilityBins
from selfrag_jax.evaluation.scores import Row, result_rows
from selfrag_jax.text import reflection


@dataclass(frozen=True)
class GroupVerdicts:
    """The labels of one group's queries, and the critic's distributions over its tokens."""

    group: str  # a key of reflection.GROUPS
    labels: Int[np.ndarray, " N"]  # indices in reflection.GROUPS[group]
    distributions: Float[np.ndarray, "N n"]

    @property
    def answers(self) -> Int[np.ndarray, " N"]:
        """The most probable token of each query."""
        return self.distributions.argmax(1)

    @property
    def confidence(self) -> Float[np.ndarray, " N"]:
        return self.distributions.max(1)

    @property
    def correct(self) -> Bool[np.ndarray, " N"]:
        return self.answers == self.labels

    @property
    def confusion(self) -> Int[np.ndarray, "n n"]:
        """Rows: the labels of the data; columns: the critic's answers."""
        k = len(reflection.GROUPS[self.group])
        return critic_scores.confusion_matrix(self.labels, self.answers, k)

    def reliability(self, bins: int) -> ReliabilityBins:
        return critic_scores.reliability_bins(self.confidence, self.correct, bins)

    def calibration_error(self, bins: int) -> float:
        return critic_scores.calibration_error(self.confidence, self.correct, bins)


def by_group(
    groups: Sequence[str], labels: Sequence[str], distributions: Sequence[Any]
) -> dict[str, GroupVerdicts]:
    """Returns the verdicts of each group that has queries, in order of appearance.

    One entry a query: its group, the label in the data, the distribution over the group's tokens.
    """
    chosen: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        chosen.setdefault(group, []).append(i)
    return {
        group: GroupVerdicts(
            group,
            np.array([reflection.GROUPS[group].index(labels[i]) for i in indices]),
            np.array([distributions[i] for i in indices], np.float64),
        )
        for group, indices in chosen.items()
    }


def accuracy_rows(verdicts: dict[str, GroupVerdicts], task: str, seed: int) -> list[Row]:
    """Returns rows of results.json: the accuracy in each group."""
    values = {
        f"{group}_accuracy": v.correct.astype(float).tolist() for group, v in verdicts.items()
    }
    return result_rows("critic", task, values, seed)


def accuracy_by_kind(
    groups: Sequence[str],
    labels: Sequence[str],
    distributions: Sequence[Any],
    kinds: Sequence[str],
    seed: int,
) -> list[Row]:
    """Returns accuracy rows for all queries (task `critic`) and for each kind of question."""
    chosen: dict[str, list[int]] = {"critic": list(range(len(groups)))}
    for i, kind in enumerate(kinds):
        chosen.setdefault(kind, []).append(i)
    rows = []
    for task, indices in chosen.items():
        columns = ([column[i] for i in indices] for column in (groups, labels, distributions))
        rows += accuracy_rows(by_group(*columns), task, seed)
    return rows


def calibration_rows(
    verdicts: dict[str, GroupVerdicts], task: str, seed: int, bins: int
) -> list[Row]:
    """Returns rows of results.json: the expected calibration error in each group."""
    return [
        _row(
            v, task, "ece", critic_scores.calibration_interval(v.confidence, v.correct, bins, seed)
        )
        for v in verdicts.values()
    ]


def kappa_rows(verdicts: dict[str, GroupVerdicts], task: str, seed: int) -> list[Row]:
    """Returns rows of results.json: Cohen's kappa of critic and labels, in each group.

    A group in which kappa has no value (critic_scores.cohens_kappa) has no row.
    """
    kappas = [(v, critic_scores.kappa_interval(v.confusion, seed)) for v in verdicts.values()]
    return [_row(v, task, "kappa", kappa) for v, kappa in kappas if not np.isnan(kappa[0])]


def _row(v: GroupVerdicts, task: str, name: str, interval: tuple[float, float, float]) -> Row:
    row = {"system": "critic", "task": task, "metric": f"{v.group}_{name}"}
    value, low, high = interval
    return row | {"value": value, "low": low, "high": high, "n": len(v.labels)}
