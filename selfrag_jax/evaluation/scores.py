"""Scores predictions against gold answers: metrics per question, means with intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from selfrag_jax.errors import UserError
from selfrag_jax.evaluation import alce, metrics
from selfrag_jax.evaluation.answer_rows import Row, cited_passages, pair, retrieved_passages
from selfrag_jax.evaluation.fact_precision import FactVerifier
from selfrag_jax.evaluation.judges import EntailmentJudge
from selfrag_jax.evaluation.metrics import FactReader, SupportJudge
from selfrag_jax.records import RANKS, Question
from selfrag_jax.search import scoring
from selfrag_jax.text import reflection
from selfrag_jax.text.sentences import split_sentences

# What `score` returns, and the quickstart reports.
MAIN_METRICS = (
    "accuracy",
    "retrieval_rate",
    "all_parts",
    "fact_precision",
    "citation_precision",
    "citation_recall",
)
SECONDS = "seconds_per_question"
# Counts, times and mean critiques; all other metrics are shares, shown in per cent.
AMOUNTS = (
    "num_tokens",
    "num_answer_tokens",
    "num_passages",
    "num_facts",
    SECONDS,
    "mean_isrel",
    "mean_issup",
    "mean_isuse",
)
CRITIQUES = {
    "isrel": (reflection.ISREL, scoring.s_rel),
    "issup": (reflection.ISSUP, scoring.s_sup),
    "isuse": (reflection.ISUSE, scoring.s_use),
}


# ---- scores -------------------------------------------------------------------------------------
def score_questions(
    questions: Sequence[Question],
    predictions: Sequence[Row],
    judge: SupportJudge | EntailmentJudge | None = None,
    facts_of: FactReader | FactVerifier | None = None,
) -> list[Row]:
    """Returns one row of scores.jsonl for each question.

    A metric that has no value for a question is not in its row: without gold answers, those that
    need them are left out (`gold_notice` says so). judge: of citations; facts_of: reads the facts
    that an answer states, to compare them with those of the question, or verifies them by passages.
    Without them, their metrics are left out.

    Raises UserError as `pair` does, and if a metric is not a number.
    """
    pairs = pair(questions, predictions)
    cited: Iterable[tuple[float | None, float | None]]
    claim_recalls: dict[str, float] = {}
    if judge is None:
        cited = [(None, None)] * len(pairs)
    elif callable(judge):
        cited = [
            metrics.citation_scores(q, row, judge) if row["segments"] else (None, None)
            for q, row in pairs
        ]
    else:
        found = alce.citation_scores([_cited_answer(row) for _, row in pairs], judge)
        cited = [scores or (None, None) for scores in found]
        claim_recalls = _claim_recalls(pairs, judge)
    verified: list[dict[str, float]] = [{}] * len(pairs)
    if isinstance(facts_of, FactVerifier):
        verified = facts_of.scores(pairs)
    elif facts_of:
        verified = [_true_facts(q, facts_of(row["answer"])) for q, row in pairs]
    rows = []
    for (q, row), (precision, recall), facts in zip(pairs, cited, verified, strict=True):
        values: dict[str, float | None] = {
            **(metrics.gold_metrics(q, row["answer"]) if metrics.has_gold(q) else {}),
            "claim_recall": claim_recalls.get(q.id),
            "citation_precision": precision,
            "citation_recall": recall,
            **_search_metrics(row),
            **facts,
        }
        rows.append(_score_row(q, row, values))
    return rows


def _score_row(q: Question, row: Row, values: dict[str, float | None]) -> Row:
    known = {name: float(v) for name, v in values.items() if v is not None}
    for name, value in known.items():
        if not math.isfinite(value):
            raise UserError(f"question {q.id}: {name} is {value}; its prediction is damaged")
    scored = {
        "id": q.id,
        "question": q.question,
        "gold": gold_texts(q),
        "answer": row["answer"],
        "retrieved": bool(row["retrieved"]),
        "metrics": known,
    }
    return scored | {name: q.extra[name] for name in RANKS if name in q.extra}


def gold_texts(q: Question) -> list[str]:
    """Returns the right answers of a question, for a reader."""
    if q.choices:
        return [f"{label}: {text}" for label, text in q.choices if label in q.answers]
    if q.extra.get("qa_pairs"):
        return [" / ".join(parts) for parts in metrics.gold_parts(q)]
    if groups := q.extra.get("answer_groups"):
        return [" / ".join(map(str, group)) for group in groups]
    if q.answers:
        return list(q.answers)
    return [str(value) for _, value in q.extra.get("facts") or ()]


def _cited_answer(row: Row) -> alce.CitedSentences:
    """A prediction as ALCE reads it: its own marks; those of its citations if it has segments.

    A segment's citations belong to its last sentence.
    """
    documents = tuple(cited_passages(row, str(row["id"])))
    if not row["segments"]:
        return alce.CitedSentences(alce.cited_sentences(row["answer"]), documents)
    sentences = []
    for i, segment in enumerate(row["segments"]):
        marks = tuple(c["passage"] + 1 for c in row["citations"] if c["segment"] == i)
        texts = [s.strip() for s in split_sentences(segment["text"])]
        sentences += [alce.CitedSentence(text, ()) for text in texts[:-1]]
        sentences += [alce.CitedSentence(text, marks) for text in texts[-1:]]
    return alce.CitedSentences(tuple(sentences), documents)


def _claim_recalls(
    pairs: Sequence[tuple[Question, Row]], judge: EntailmentJudge
) -> dict[str, float]:
    having = [(q, row) for q, row in pairs if q.extra.get("claims")]
    answers, claims = [row["answer"] for _, row in having], [q.extra["claims"] for q, _ in having]
    found = alce.claim_recalls(answers, claims, judge)
    return {q.id: value for (q, _), value in zip(having, found, strict=True)}


def _search_metrics(row: Row) -> dict[str, float]:
    """What the search did: retrieval, what was read, the mean critiques of the chosen segments.

    Tokens are counted as in answering/records.py. num_passages: different passages that the model
    read, in any branch. Failed answers, which count as wrong, say nothing of the cost. isrel and
    issup are in [0, 1], isuse in [-1, 1] (search/scoring.py).
    """
    values = {"retrieval_rate": float(row["retrieved"])}
    if not row.get("error"):
        for name in ("num_tokens", "num_answer_tokens", "num_passages"):
            if isinstance(row.get(name), (int, float)):
                values[name] = float(row[name])
        if "tree" in row:
            values["num_passages"] = float(len(retrieved_passages(row)))
    for group, (tokens, equation) in CRITIQUES.items():
        said = [s[group] for s in row["segments"] if s.get(group)]
        if said:
            p = np.array([[distribution[token] for token in tokens] for distribution in said])
            # Rounded to four digits in the file, a distribution may be all zeros.
            p = p[p.sum(1) > 0]
            if len(p):
                values[f"mean_{group}"] = float(np.mean(equation(p)))
    return values


def _true_facts(q: Question, stated: list[tuple[str, str, str]]) -> dict[str, float]:
    """The share of stated facts that are among those of the question's topic; {} without any."""
    if not stated or not q.extra.get("facts"):
        return {}
    gold = {tuple(f) for f in q.extra["facts"]}
    is_true = [name == q.extra.get("topic") and (r, value) in gold for name, r, value in stated]
    return {"fact_precision": float(np.mean(is_true))}


def gold_notice(questions: Sequence[Question]) -> str:
    """Says how many questions have no gold answer; "" if all have one."""
    without = [q for q in questions if not metrics.has_gold(q)]
    if not without:
        return ""
    if len(without) == len(questions):
        return "no question has a gold answer: accuracy and all that needs gold is left out"
    return (
        f"{len(without):,} of {len(questions):,} questions have no gold answer and are left out "
        f"of accuracy and all that needs gold, e.g. id {without[0].id!r}"
    )


# ---- means --------------------------------------------------------------------------------------
def score(
    questions: Sequence[Question],
    predictions: Sequence[Row],
    judge: SupportJudge | EntailmentJudge | None,
    facts_of: FactReader | FactVerifier | None,
) -> dict[str, list[float]]:
    """Returns the values of MAIN_METRICS, one per question for which a metric is defined.

    Arguments and errors: see `score_questions`.
    """
    values = columns(score_questions(questions, predictions, judge, facts_of))
    return {name: values[name] for name in MAIN_METRICS if name in values}


def columns(rows: Sequence[Row]) -> dict[str, list[float]]:
    """Returns each metric's values in rows of scores.jsonl, in the order of the rows."""
    values: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row["metrics"].items():
            values.setdefault(name, []).append(value)
    return values


def seconds_row(system: str, task: str, seconds: float, timed: int) -> Row:
    """Returns the row of results.json for the time of `timed` questions; it has no interval.

    Questions are answered together, so this is the time of all divided by their number.
    """
    row = {"system": system, "task": task, "metric": SECONDS, "value": seconds / timed}
    return row | {"low": None, "high": None, "n": timed}


def result_rows(system: str, task: str, values: dict[str, list[float]], seed: int) -> list[Row]:
    """Returns rows of results.json: mean, 95% bootstrap interval and count of each metric."""
    rows = []
    for metric, v in values.items():
        if v:
            row = {"system": system, "task": task, "metric": metric}
            value, low, high = metrics.interval(v, seed)
            rows.append(row | {"value": value, "low": low, "high": high, "n": len(v)})
    return rows
