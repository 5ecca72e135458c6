"""Predictions against gold answers: metrics per question, means with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from selfrag_jax.critic.critic import Critic
from selfrag_jax.errors import UserError
from selfrag_jax.evaluation import metrics
from selfrag_jax.evaluation.metrics import FactReader, SupportJudge
from selfrag_jax.records import Question
from selfrag_jax.text import reflection
from selfrag_jax.text.prompts import CritiqueQuery

Row = dict[str, Any]


def score(
    questions: Sequence[Question],
    predictions: Sequence[Row],
    judge: SupportJudge | None,
    facts_of: FactReader | None,
) -> dict[str, list[float]]:
    """Values of each metric, one per question; a question for which it is undefined is left out.

    judge: of citations; facts_of: reads the facts that an answer states. Raises UserError naming a
    question that was not answered.
    """
    by_id = {str(row["id"]): row for row in predictions}
    missing = [q.id for q in questions if q.id not in by_id]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(questions)} questions have no prediction, e.g. id {missing[0]!r}"
        )
    out: dict[str, list[float]] = {"accuracy": [], "retrieval_rate": []}
    for q in questions:
        row = by_id[q.id]
        out["accuracy"].append(metrics.accuracy(q, row["answer"]))
        out["retrieval_rate"].append(float(row["retrieved"]))
        if "qa_pairs" in q.extra:
            out.setdefault("all_parts", []).append(float(out["accuracy"][-1] == 1))
        if "facts" in q.extra and facts_of and (stated := facts_of(row["answer"])):
            gold = {tuple(f) for f in q.extra["facts"]}
            true = [
                name == q.extra.get("topic") and (relation, value) in gold
                for name, relation, value in stated
            ]
            out.setdefault("fact_precision", []).append(float(np.mean(true)))
        if judge is not None and row["segments"]:
            for name, value in zip(
                ("citation_precision", "citation_recall"),
                metrics.citation_scores(q, row, judge),
                strict=True,
            ):
                if value is not None:
                    out.setdefault(name, []).append(value)
    return out


def result_rows(system: str, task: str, values: dict[str, list[float]], seed: int) -> list[Row]:
    """Rows of results.json: mean, 95% bootstrap interval and count of each metric."""
    rows = []
    for metric, v in values.items():
        if v:
            value, low, high = metrics.interval(v, seed)
            rows.append(
                {
                    "system": system,
                    "task": task,
                    "metric": metric,
                    "value": value,
                    "low": low,
                    "high": high,
                    "n": len(v),
                }
            )
    return rows


def critic_accuracy(
    critic: Critic,
    queries: Sequence[CritiqueQuery],
    truth: Sequence[str],
    kinds: Sequence[str],
    seed: int,
) -> list[Row]:
    """Agreement of a critic with true labels, per group: rows of results.json, over all queries (task `critic`) and over
    those of each kind of question."""
    values: dict[str, dict[str, list[float]]] = {"critic": {}}
    for query, label, kind, p in zip(queries, truth, kinds, critic.judge(queries), strict=True):
        right = float(reflection.GROUPS[query.group][int(np.argmax(p))] == label)
        for task in ("critic", kind):
            values.setdefault(task, {}).setdefault(f"{query.group}_accuracy", []).append(right)
    return [row for task, v in values.items() for row in result_rows("critic", task, v, seed)]
