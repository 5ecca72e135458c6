"""Metrics of answers, one number per question, and bootstrap intervals of their means."""

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
# facts_of(text) -> (subject, relation, value) of each fact that the text states
FactReader = Callable[[str], list[tuple[str, str, str]]]


def normalise(text: str) -> str:
    """Lower case without punctuation, articles and extra space (as in SQuAD's evaluation)."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def contains(answer: str, gold: Sequence[str]) -> float:
    """1 when a gold answer stands in the output (the paper's accuracy for PopQA and TriviaQA), as whole words."""
    text = f" {normalise(answer)} "
    return float(any(f" {normalise(g)} " in text for g in gold if normalise(g)))


def accuracy(q: Question, answer: str) -> float:
    """The task's accuracy of one answer, in [0, 1].

    Choices: the label is right. Options: the answer is exactly the right one. qa_pairs: the share of parts answered (ALCE's
    str-em, without marks of citations). facts: the share of the topic's facts that are told. Otherwise: a gold answer is
    contained. Raises BadInput when the question has no gold answer.
    """
    if q.choices:
        said = answer.strip().rstrip(".").split(" ")[0].strip("():.")
        return float(said == _require(q)[0])
    if q.options:
        return float(normalise(answer) in map(normalise, _require(q)))
    if "qa_pairs" in q.extra:
        text = re.sub(r" ?\[\d+\]", "", answer)
        return float(
            np.mean([contains(text, pair["short_answers"]) for pair in q.extra["qa_pairs"]])
        )
    if "facts" in q.extra:
        return float(np.mean([contains(answer, [value]) for _, value in q.extra["facts"]]))
    return contains(answer, _require(q))


def _require(q: Question) -> tuple[str, ...]:
    if not q.answers:
        raise UserError(
            f"question {q.id}: has no gold answer (answers, answer, output or answerKey)"
        )
    return q.answers


def citation_scores(
    q: Question, row: dict[str, Any], judge: SupportJudge
) -> tuple[float | None, float | None]:
    """Citation precision and recall of one answer (after ALCE, Gao et al., 2023); None where undefined.

    precision: of its citations, the share whose passage fully supports the cited segment (None without citations).
    recall: of its segments, the share with a citation that fully supports it (None without segments).
    """
    instruction = question_text(q)
    passages = [Passage(p["id"], p["title"], p["text"]) for p in row["passages"]]
    good: set[int] = set()
    for c in row["citations"]:
        if judge(instruction, passages[c["passage"]], row["segments"][c["segment"]]["text"]):
            good.add(c["segment"])
    segments = [i for i, s in enumerate(row["segments"]) if s["text"]]
    precision = len(good) / len(row["citations"]) if row["citations"] else None
    return precision, (len(good) / len(segments) if segments else None)


def paired_interval(
    differences: Sequence[float], clusters: Sequence[Hashable], seed: int, resamples: int = 5000
) -> tuple[float, float, float]:
    """Mean difference of two systems on the same questions, and its 95% bootstrap interval over clusters.

    differences: of each question; clusters: questions of one cluster (about the same entity) are drawn together, for they
    are right or wrong together.
    """
    order = {c: i for i, c in enumerate(dict.fromkeys(clusters))}
    of = np.array([order[c] for c in clusters])
    sums, sizes = np.bincount(of, np.asarray(differences, np.float64)), np.bincount(of)
    drawn = np.random.default_rng(seed).integers(0, len(sums), (resamples, len(sums)))
    low, high = np.percentile(sums[drawn].sum(1) / sizes[drawn].sum(1), [2.5, 97.5])
    return float(sums.sum() / sizes.sum()), float(low), float(high)


def interval(
    values: Sequence[float], seed: int, resamples: int = 1000
) -> tuple[float, float, float]:
    """Mean and its 95% bootstrap interval over questions."""
    a = np.asarray(values, np.float64)
    rng = np.random.default_rng(seed)
    means = a[rng.integers(0, len(a), (resamples, len(a)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(a.mean()), float(low), float(high)
