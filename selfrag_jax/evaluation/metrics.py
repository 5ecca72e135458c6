"""Metrics of answers, one value per question, and bootstrap intervals of their means."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from selfrag_jax.errors import UserError
from selfrag_jax.records import Passage, Question
from selfrag_jax.text.prompts import question_text

# judge(instruction, passage, segment) -> does the passage fully support the segment?
SupportJudge = Callable[[str, Passage, str], bool]
# facts_of(text) -> (name, relation, value) of each fact that the text states
FactReader = Callable[[str], list[tuple[str, str, str]]]


def normalise(text: str) -> str:
    """Lower-cases text and drops punctuation, articles and extra spaces, as SQuAD's evaluation."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def contains(answer: str, gold: Sequence[str]) -> float:
    """Returns 1 if the output contains a gold answer as whole words, else 0.

    This is the paper's accuracy for PopQA and TriviaQA.
    """
    text = f" {normalise(answer)} "
    return float(any(f" {normalise(g)} " in text for g in gold if normalise(g)))


def accuracy(q: Question, answer: str) -> float:
    """Returns the task's accuracy for one answer, in [0, 1].

    - choices: 1 if the label is right
    - options: 1 if the answer equals a gold answer
    - qa_pairs: the share of parts answered (ALCE's str-em), ignoring citation marks
    - facts: the share of the topic's facts that the answer states
    - otherwise: 1 if the answer contains a gold answer

    Raises UserError if the question has no gold answer.
    """
    if q.choices:
        label = answer.strip().rstrip(".").split(" ")[0].strip("():.")
        return float(label == _gold_answers(q)[0])
    if q.options:
        return float(normalise(answer) in map(normalise, _gold_answers(q)))
    if "qa_pairs" in q.extra:
        text = re.sub(r" ?\[\d+\]", "", answer)
        parts = [contains(text, pair["short_answers"]) for pair in q.extra["qa_pairs"]]
        return float(np.mean(parts))
    if "facts" in q.extra:
        return float(np.mean([contains(answer, [value]) for _, value in q.extra["facts"]]))
    return contains(answer, _gold_answers(q))


def _gold_answers(q: Question) -> tuple[str, ...]:
    if not q.answers:
        raise UserError(
            f"question {q.id}: has no gold answer (answers, answer, output or answerKey)"
        )
    return q.answers


def citation_scores(
    q: Question, row: dict[str, Any], judge: SupportJudge
) -> tuple[float | None, float | None]:
    """Returns citation precision and recall of one answer (after ALCE, Gao et al., 2023).

    Precision is the share of citations whose passage fully supports the citing segment; None
    without citations. Recall is the share of segments that have such a citation; None without
    segments.
    """
    instruction = question_text(q)
    passages = [Passage(p["id"], p["title"], p["text"]) for p in row["passages"]]
    supported: set[int] = set()
    for c in row["citations"]:
        if judge(instruction, passages[c["passage"]], row["segments"][c["segment"]]["text"]):
            supported.add(c["segment"])
    num_citations = len(row["citations"])
    num_segments = sum(bool(s["text"]) for s in row["segments"])
    precision = len(supported) / num_citations if num_citations else None
    return precision, (len(supported) / num_segments if num_segments else None)


def paired_interval(
    differences: Sequence[float], clusters: Sequence[Hashable], seed: int, resamples: int = 5000
) -> tuple[float, float, float]:
    """Returns the mean difference of two systems and its 95% bootstrap interval, (mean, low, high).

    `differences` holds one value per question. Questions of one cluster (about the same entity) are
    resampled together, because their answers tend to be right or wrong together.
    """
    index = {c: i for i, c in enumerate(dict.fromkeys(clusters))}
    cluster = np.array([index[c] for c in clusters])
    sums, sizes = np.bincount(cluster, np.asarray(differences, np.float64)), np.bincount(cluster)
    drawn = np.random.default_rng(seed).integers(0, len(sums), (resamples, len(sums)))
    low, high = np.percentile(sums[drawn].sum(1) / sizes[drawn].sum(1), [2.5, 97.5])
    return float(sums.sum() / sizes.sum()), float(low), float(high)


def interval(
    values: Sequence[float], seed: int, resamples: int = 1000
) -> tuple[float, float, float]:
    """Returns the mean and its 95% bootstrap interval over questions, (mean, low, high)."""
    a = np.asarray(values, np.float64)
    rng = np.random.default_rng(seed)
    means = a[rng.integers(0, len(a), (resamples, len(a)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(a.mean()), float(low), float(high)
