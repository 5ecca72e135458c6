"""Predictions against gold answers: metrics per question, means with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from selfrag_jax import artifacts
from selfrag_jax.critic.labelling import Critic
from selfrag_jax.data.questions import read_questions
from selfrag_jax.evaluation import metrics
from selfrag_jax.evaluation.metrics import SupportJudge
from selfrag_jax.records import BadInput, Question, read_rows, write_json
from selfrag_jax.text import reflection
from selfrag_jax.text.prompts import CritiqueQuery

Row = dict[str, Any]


def world_judge(instruction: str, passage, segment: str) -> bool:
    """Support by the synthetic world's truth."""
    from selfrag_jax.world import truth

    return truth.support(instruction, passage, segment) == reflection.FULLY


def world_facts(text: str) -> list[tuple[str, str, str]]:
    """(name, relation, value) of each fact that a text states in the synthetic world's language."""
    from selfrag_jax.world import truth

    return [(f.name, f.relation, f.value) for f in truth.facts_of(text)]


JUDGES: dict[str, SupportJudge | None] = {"none": None, "world": world_judge}


def score(questions: Sequence[Question], predictions: Sequence[Row], judge: SupportJudge | None) -> dict[str, list[float]]:
    """Values per question of each metric; a question where a metric is undefined is left out of it.

    Raises BadInput naming questions that were not answered.
    """
    by_id = {str(row["id"]): row for row in predictions}
    missing = [q.id for q in questions if q.id not in by_id]
    if missing:
        raise BadInput(f"{len(missing)} of {len(questions)} questions have no prediction, e.g. id {missing[0]!r}")
    out: dict[str, list[float]] = {"accuracy": [], "retrieval_rate": []}
    for q in questions:
        row = by_id[q.id]
        out["accuracy"].append(metrics.accuracy(q, row["answer"]))
        out["retrieval_rate"].append(float(row["retrieved"]))
        if "qa_pairs" in q.extra:
            out.setdefault("all_parts", []).append(float(out["accuracy"][-1] == 1))
        if "facts" in q.extra and (told := world_facts(row["answer"])):
            gold = {tuple(f) for f in q.extra["facts"]}
            true = [name == q.extra.get("topic") and (relation, value) in gold for name, relation, value in told]
            out.setdefault("fact_precision", []).append(float(np.mean(true)))
        if judge is not None and row["segments"]:
            for name, value in zip(
                ("citation_precision", "citation_recall"), metrics.citation_scores(q, row, judge), strict=True
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
                {"system": system, "task": task, "metric": metric, "value": value, "low": low, "high": high, "n": len(v)}
            )
    return rows


def evaluate_file(task_file: str | Path, predictions: str | Path, judge: str, out: str | Path, seed: int) -> list[Row]:
    """Evaluates a predictions file of `selfrag answer` and writes metrics.json. Raises BadInput on an unknown judge."""
    if judge not in JUDGES:
        raise BadInput(f"--judge={judge!r}: must be one of {', '.join(JUDGES)}")
    if Path(task_file).exists() and Path(predictions).exists() and Path(task_file).samefile(predictions):
        raise BadInput(f"{predictions}: is both the task and the predictions; --task is the question file with gold answers")
    questions = read_questions(task_file)
    rows = []
    for where, row in read_rows(predictions):
        for name in ("id", "answer", "retrieved", "segments", "citations", "passages"):
            if name not in row:
                raise BadInput(f"{where}: missing field {name!r}; expected a row of `selfrag answer`")
        rows.append(row)
    results = result_rows("selfrag", Path(task_file).stem, score(questions, rows, JUDGES[judge]), seed)
    write_json(out, {"rows": results})
    artifacts.finish(out, "evaluate", {"judge": judge, "seed": seed}, {"task": task_file, "predictions": predictions}, {})
    return results


def critic_accuracy(
    critic: Critic, queries: Sequence[CritiqueQuery], truth: Sequence[str], kinds: Sequence[str], seed: int
) -> list[Row]:
    """Agreement of a critic with true labels, per group: rows of results.json, over all queries (task `critic`) and over
    those of each kind of question."""
    values: dict[str, dict[str, list[float]]] = {"critic": {}}
    for query, label, kind, p in zip(queries, truth, kinds, critic.judge(queries), strict=True):
        right = float(reflection.GROUPS[query.group][int(np.argmax(p))] == label)
        for task in ("critic", kind):
            values.setdefault(task, {}).setdefault(f"{query.group}_accuracy", []).append(right)
    return [row for task, v in values.items() for row in result_rows("critic", task, v, seed)]
