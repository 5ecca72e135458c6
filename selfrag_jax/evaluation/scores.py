"""Scores predictions against gold answers: metrics per question, means with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from selfrag_jax.errors import UserError
from selfrag_jax.evaluation import metrics
from selfrag_jax.evaluation.metrics import FactReader, SupportJudge
from selfrag_jax.records import Question
from selfrag_jax.text import reflection
from selfrag_jax.text.prompts import CritiqueQuery

if TYPE_CHECKING:
    from selfrag_jax.critic.critic import Critic

Row = dict[str, Any]


def score(
    questions: Sequence[Question],
    predictions: Sequence[Row],
    judge: SupportJudge | None,
    facts_of: FactReader | None,
) -> dict[str, list[float]]:
    """Returns each metric's values, one per question for which it is defined.

    `judge` judges citations and `facts_of` reads the facts that an answer states; without them,
    their metrics are left out. Raises UserError naming a question that has no prediction.
    """
    by_id = {str(row["id"]): row for row in predictions}
    missing = [q.id for q in questions if q.id not in by_id]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(questions)} questions have no prediction, "
            f"e.g. id {missing[0]!r}"
        )
    values: dict[str, list[float]] = {"accuracy": [], "retrieval_rate": []}

    def add(metric: str, value: float | None) -> None:
        if value is not None:
            values.setdefault(metric, []).append(value)

    for q in questions:
        row = by_id[q.id]
        accuracy = metrics.accuracy(q, row["answer"])
        add("accuracy", accuracy)
        add("retrieval_rate", float(row["retrieved"]))
        if "qa_pairs" in q.extra:
            add("all_parts", float(accuracy == 1))
        if "facts" in q.extra and facts_of:
            add("fact_precision", _fact_precision(q, facts_of(row["answer"])))
        if judge is not None and row["segments"]:
            precision, recall = metrics.citation_scores(q, row, judge)
            add("citation_precision", precision)
            add("citation_recall", recall)
    return values


def _fact_precision(q: Question, stated: list[tuple[str, str, str]]) -> float | None:
    """Returns the share of stated facts that are true of the question's topic; None without any."""
    if not stated:
        return None
    gold = {tuple(f) for f in q.extra["facts"]}
    is_true = [name == q.extra.get("topic") and (r, value) in gold for name, r, value in stated]
    return float(np.mean(is_true))


def result_rows(system: str, task: str, values: dict[str, list[float]], seed: int) -> list[Row]:
    """Returns rows of results.json: mean, 95% bootstrap interval and count of each metric."""
    rows = []
    for metric, v in values.items():
        if v:
            row = {"system": system, "task": task, "metric": metric}
            value, low, high = metrics.interval(v, seed)
            rows.append(row | {"value": value, "low": low, "high": high, "n": len(v)})
    return rows


def critic_accuracy(
    critic: Critic,
    queries: Sequence[CritiqueQuery],
    truth: Sequence[str],
    kinds: Sequence[str],
    seed: int,
) -> list[Row]:
    """Returns rows of results.json: a critic's accuracy on the true tokens, per critique group.

    There are rows for all queries (task `critic`) and for each kind of question in `kinds`.
    """
    values: dict[str, dict[str, list[float]]] = {"critic": {}}
    for query, token, kind, p in zip(queries, truth, kinds, critic.judge(queries), strict=True):
        right = float(reflection.GROUPS[query.group][int(np.argmax(p))] == token)
        for task in ("critic", kind):
            values.setdefault(task, {}).setdefault(f"{query.group}_accuracy", []).append(right)
    return [row for task, v in values.items() for row in result_rows("critic", task, v, seed)]
