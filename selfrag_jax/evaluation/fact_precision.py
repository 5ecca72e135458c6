"""Fact precision of answers about a topic, by a verifier that reads passages.

An answer's facts are its sentences, or the atomic facts of a file. A fact is supported if a passage
of the topic entails it.

It is built like FActScore (Min et al., EMNLP 2023), and is not FActScore's number. There, a model
splits the answer into atomic facts, and ChatGPT decides on each with passages of the topic's
Wikipedia page. Here a sentence may state several facts, and all of it has to be entailed; the
verifier is an NLI model, which reads one passage at a time; and the passages are those of the
question or of the search, which may lack what Wikipedia says. So the verifier's name stands beside
the number, and numbers of different verifiers are not compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from selfrag_jax.errors import UserError
from selfrag_jax.evaluation.alce import premise
from selfrag_jax.evaluation.answer_rows import Row, retrieved_passages
from selfrag_jax.evaluation.citation_marks import remove_marks
from selfrag_jax.evaluation.judges import EntailmentJudge, Verdicts
from selfrag_jax.evaluation.metrics import FactReader
from selfrag_jax.records import Passage, Question, read_rows, text_field
from selfrag_jax.text.normalising import normalise
from selfrag_jax.text.sentences import split_sentences

Pairs = Sequence[tuple[Question, Row]]
GAMMA = 10  # facts; an answer with fewer is penalised


@dataclass(frozen=True)
class FactVerifier:
    """Verifies the facts of answers about a topic.

    facts: those of each answer by id (`read_facts`); None takes the answer's sentences.
    """

    judge: EntailmentJudge
    facts: Mapping[str, Sequence[str]] | None = None

    def scores(self, pairs: Pairs) -> list[dict[str, float]]:
        """Returns the metrics of each question's answer; the judge is asked once for all of them.

        fact_precision: supported facts / facts. fact_precision_penalised: that times
        `length_penalty`. num_facts: how many there are. {} for an answer that abstains (no text, no
        facts), for a question without a topic, and where there are no passages to verify with.

        Raises UserError if the facts are of other answers.
        """
        self._check(pairs)
        asked = [self._facts_and_premises(q, row) for q, row in pairs]
        verdicts = Verdicts(self.judge)
        verdicts.ask((text, f) for facts, premises in asked for f in facts for text in premises)
        found: list[dict[str, float]] = []
        for facts, premises in asked:
            if not facts or not premises:
                found.append({})
                continue
            supported = sum(any(verdicts[text, f] for text in premises) for f in facts)
            precision = supported / len(facts)
            found.append(
                {
                    "fact_precision": precision,
                    "fact_precision_penalised": precision * length_penalty(len(facts)),
                    "num_facts": float(len(facts)),
                }
            )
        return found

    def notice(self, pairs: Pairs) -> str:
        """Says which answers have facts and cannot be verified; "" if all can."""
        if not any(_topic(q) for q, _ in pairs):
            return "no question has a topic: fact_precision is left out"
        asked = [(q.id, *self._facts_and_premises(q, row)) for q, row in pairs]
        without = [i for i, facts, premises in asked if facts and not premises]
        if not without:
            return ""
        return (
            f"{len(without):,} of {len(asked):,} answers have no passages to verify their facts "
            f"with and are left out of fact_precision, e.g. id {without[0]!r}"
        )

    def _facts_and_premises(self, q: Question, row: Row) -> tuple[Sequence[str], list[str]]:
        if not _topic(q) or row.get("error") or not row["answer"].strip():
            return (), []
        facts = sentences(row["answer"]) if self.facts is None else self.facts.get(q.id, ())
        return facts, [premise(p) for p in topic_passages(q, row)]

    def _check(self, pairs: Pairs) -> None:
        if self.facts is None:
            return
        if foreign := self.facts.keys() - {q.id for q, _ in pairs}:
            raise UserError(
                f"--facts: id {min(foreign)!r} is not in the question file ({len(foreign)} of "
                f"{len(self.facts)} rows); give the facts of these answers"
            )
        told = [q.id for q, row in pairs if _topic(q) and row["answer"].strip()]
        if missing := [i for i in told if i not in self.facts]:
            raise UserError(
                f"--facts: has no row for {len(missing)} of {len(told)} answers, e.g. id "
                f"{missing[0]!r}; give the facts of these answers"
            )


def verified_by(
    verifier: FactReader | FactVerifier | None, results: Sequence[Row]
) -> dict[str, str]:
    """Returns {"verifier": its name}, to stand beside the fact precision among `results`, or {}."""
    if not any(row["metric"] == "fact_precision" for row in results):
        return {}
    return {"verifier": verifier.judge.name if isinstance(verifier, FactVerifier) else "world"}


def _topic(q: Question) -> str:
    return str(q.extra.get("topic") or "")


def sentences(answer: str) -> list[str]:
    """Returns an answer's sentences without citation marks."""
    found = (s.strip() for s in split_sentences(remove_marks(answer)))
    return [s for s in found if any(map(str.isalnum, s))]


def topic_passages(q: Question, row: Row) -> list[Passage]:
    """Returns the passages that facts about a question's topic are verified with.

    The question's own, or else those of the search; of these, only the ones that are titled like
    the topic, if there are any.
    """
    found = list(q.ctxs) or retrieved_passages(row)
    titled = [p for p in found if normalise(p.title) == normalise(_topic(q))]
    return titled or found


def length_penalty(num_facts: int) -> float:
    """Returns FActScore's factor for short answers: 1 above 10 facts, else exp(1 - 10 / facts)."""
    return 1.0 if num_facts > GAMMA else math.exp(1 - GAMMA / num_facts)


def read_facts(path: str | Path) -> dict[str, list[str]]:
    """Returns the facts of each answer from rows {"id", "facts": [text]}; null is no facts.

    Raises UserError with file and line if a row is malformed, and if there are none.
    """
    found: dict[str, list[str]] = {}
    for where, row in read_rows(path):
        key = text_field(where, row, "id")
        if key in found:
            raise UserError(f"{where}: id {key!r} occurs more than once")
        if "facts" not in row:
            raise UserError(f"{where}: missing field 'facts', the list of an answer's facts")
        facts = [] if row["facts"] is None else row["facts"]
        if not isinstance(facts, list) or not all(isinstance(f, str) and f.strip() for f in facts):
            raise UserError(f"{where}: field 'facts' must be a list of texts")
        found[key] = facts
    if not found:
        raise UserError(f"{path}: holds no facts; expected rows of id and facts")
    return found
