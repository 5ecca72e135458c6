"""Metrics of answers, one value per question, and bootstrap intervals of their means."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from selfrag_jax.errors import UserError
from selfrag_jax.evaluation import alce, text_metrics
from selfrag_jax.records import Passage, Question
from selfrag_jax.text.prompts import question_text

# judge(instruction, passage, segment) -> does the passage fully support the segment?
SupportJudge = Callable[[str, Passage, str], bool]
# facts_of(text) -> (name, relation, value) of each fact that the text states
FactReader = Callable[[str], list[tuple[str, str, str]]]

_GOLD_FIELDS = ("qa_pairs", "facts", "answer_groups")
_OF_ANSWERS = (
    text_metrics.match,
    text_metrics.word_match,
    text_metrics.released_match,
    text_metrics.exact_match,
    text_metrics.f1,
)


def accuracy(q: Question, answer: str) -> float:
    """Returns the task's main metric for one answer, in [0, 1].

    - a released variant (SCRIPT_GOLD): text_metrics.released_match
    - choices and options: text_metrics.option_accuracy
    - qa_pairs: alce.str_em
    - facts: the share of the topic's facts whose value the answer has as whole words
    - answer_groups (QAMPARI): F1 of the list, full recall with five answers
    - otherwise: text_metrics.match

    Raises UserError if the question has no gold answer.
    """
    if not has_gold(q):
        raise UserError(
            f"question {q.id}: has no gold answer (answers, answer, output or answerKey)"
        )
    if gold := q.extra.get(text_metrics.SCRIPT_GOLD):
        return text_metrics.released_match(answer, gold)
    if q.choices or q.options:
        return text_metrics.option_accuracy(q, answer)
    if q.extra.get("qa_pairs"):
        return alce.str_em(answer, gold_parts(q))
    if facts := q.extra.get("facts"):
        return float(np.mean([text_metrics.word_match(answer, [value]) for _, value in facts]))
    if groups := q.extra.get("answer_groups"):
        return alce.list_scores(answer, groups)["list_f1_5"]
    return text_metrics.match(answer, q.answers)


def has_gold(q: Question) -> bool:
    """Whether a question has anything that its answer can be compared with."""
    if q.choices or q.options:
        return bool(q.answers)
    return bool(q.answers) or any(q.extra.get(name) for name in _GOLD_FIELDS)


def gold_parts(q: Question) -> list[list[str]]:
    """Returns the short answers of each part of a question with qa_pairs (ASQA)."""
    return [list(map(str, pair["short_answers"])) for pair in q.extra["qa_pairs"]]


def gold_metrics(q: Question, answer: str) -> dict[str, float]:
    """Returns accuracy, and every other metric that the question's gold answers allow, by name.

    ELI5 has no accuracy: its gold is a long text, for ROUGE, and claims, for a judge.
    """
    if q.extra.get("claims"):
        return alce.rouge(answer, long_references(q))
    values = {"accuracy": accuracy(q, answer)}
    if q.choices or q.options:
        values["option_accuracy"] = text_metrics.option_accuracy(q, answer)
    # Beside parts or a list of answers, `answers` holds a long text, which no answer repeats.
    if q.answers and not any(q.extra.get(name) for name in _GOLD_FIELDS):
        for metric in _OF_ANSWERS:
            values[metric.__name__] = metric(answer, q.answers)
    if gold := q.extra.get(text_metrics.SCRIPT_GOLD):
        values["released_match"] = text_metrics.released_match(answer, gold)
    if q.extra.get("qa_pairs"):
        parts = gold_parts(q)
        values |= {"str_em": alce.str_em(answer, parts), "str_hit": alce.str_hit(answer, parts)}
        values["all_parts"] = values["str_hit"]
    if groups := q.extra.get("answer_groups"):
        values |= alce.list_scores(answer, groups)
    if references := long_references(q):
        values |= alce.rouge(answer, references)
    return values


def long_annotations(q: Question) -> list[str]:
    """Returns the long answers that annotators wrote (ASQA)."""
    annotations = q.extra.get("annotations") or []
    texts = (a.get("long_answer") for a in annotations if isinstance(a, dict))
    return [str(text) for text in texts if text]


def long_references(q: Question) -> list[str]:
    """Returns the long answers that ROUGE compares with: ASQA's two, or ELI5's one."""
    texts = long_annotations(q)
    if not texts and q.extra.get("claims"):
        texts = list(q.answers[:1])
    return texts[:2]


def long_answer(q: Question) -> str:
    """Returns the long gold answer that MAUVE compares with; "" if there is none.

    ALCE's field `answer`; without it, or with a single annotation, which ALCE's eval.py cannot
    read, the first annotation.
    """
    long = long_annotations(q)
    has_long = q.extra.get("qa_pairs") or q.extra.get("claims")
    if q.answers and has_long and len(long) != 1:
        return q.answers[0]
    return next(iter(long), "")


def citation_scores(
    q: Question, row: dict[str, Any], judge: SupportJudge
) -> tuple[float | None, float | None]:
    """Returns citation precision and recall of one answer, by segments (the synthetic world's).

    ALCE's own rules, with several passages a sentence and an NLI judge, are alce.citation_scores.

    Precision is the share of citations whose passage fully supports the citing segment; None
    without citations. Recall is the share of segments that have such a citation; None without
    segments.
    """
    instruction = question_text(q)
    passages = [Passage(p["id"], p.get("title", ""), p["text"]) for p in row["passages"]]
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
