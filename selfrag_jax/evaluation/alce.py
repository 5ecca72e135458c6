"""ALCE's automatic scores (Gao et al., 2023; princeton-nlp/ALCE, eval.py), one value per answer.

Only the first line of an answer counts. Sentences are split by text/sentences.py, where ALCE asks
nltk, whose models are a download; the two differ on few texts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from selfrag_jax.errors import library
from selfrag_jax.evaluation.judges import EntailmentJudge, Verdicts
from selfrag_jax.records import Passage
from selfrag_jax.text.normalising import normalise
from selfrag_jax.text.sentences import split_sentences

MAX_CITATIONS = 3  # of a sentence; later marks are ignored


def first_line(text: str) -> str:
    """Returns the line of an answer that ALCE reads."""
    return text.strip().split("\n")[0]


def without_marks(text: str) -> str:
    """Removes citation marks and what is left of their brackets, as ALCE does."""
    return re.sub(r" ?\[\d+", "", text).replace(" |", "").replace("]", "")


def premise(p: Passage) -> str:
    """Returns a passage as a judge reads it."""
    return f"Title: {p.title}\n{p.text}"


# ---- correctness --------------------------------------------------------------------------------
def str_em(answer: str, parts: Sequence[Sequence[str]]) -> float:
    """Returns the share of parts (ASQA's qa_pairs) that the answer covers.

    A part is covered if one of its short answers is a substring, both normalised. One that is
    nothing once normalised ("The The") is a substring of everything, there as here.
    """
    text = normalise(without_marks(first_line(answer)))
    covered = [any(normalise(short) in text for short in shorts) for shorts in parts]
    return sum(covered) / len(covered)


def str_hit(answer: str, parts: Sequence[Sequence[str]]) -> float:
    """Returns 1 if the answer covers all parts, as `str_em` counts them, else 0."""
    return float(str_em(answer, parts) == 1)


def rouge(answer: str, references: Sequence[str]) -> dict[str, float]:
    """Returns rouge_l and rouge_lsum: F with the better of the references (two, in ASQA).

    rouge-score with its stemmer, on lower-cased text with a sentence a line. ALCE reports Lsum. The
    library's tokenizer knows ASCII letters and digits only.
    """
    text = _sentence_lines(without_marks(first_line(answer)))
    scores = [_rouge_scorer().score(_sentence_lines(r), text) for r in references]
    names = {"rouge_l": "rougeL", "rouge_lsum": "rougeLsum"}
    return {name: max(s[theirs].fmeasure for s in scores) for name, theirs in names.items()}


def _sentence_lines(text: str) -> str:
    return "\n".join(s.strip() for s in split_sentences(text.lower()))


@cache
def _rouge_scorer() -> Any:
    rouge_scorer = library("rouge_score.rouge_scorer", "ROUGE (of long references)", "eval")
    return rouge_scorer.RougeScorer(["rougeL", "rougeLsum"], use_stemmer=True)


def list_scores(answer: str, groups: Sequence[Sequence[str]]) -> dict[str, float]:
    """Returns QAMPARI's scores of a list with commas; each group holds one answer's aliases.

    Items count if they equal an alias, both normalised. recall_5 is full with five right answers.
    """
    listed = without_marks(first_line(answer)).rstrip().rstrip(".").rstrip(",").split(",")
    items = [text for item in listed if (text := normalise(item))]
    gold = [{normalise(alias) for alias in group} for group in groups]
    found = sum(not group.isdisjoint(items) for group in gold)
    precision = sum(any(i in group for group in gold) for i in items) / len(items) if items else 0.0
    recall, recall_5 = found / len(gold), min(5, found) / min(5, len(gold))
    return {
        "list_precision": precision,
        "list_recall": recall,
        "list_recall_5": recall_5,
        "list_f1": _harmonic_mean(precision, recall),
        "list_f1_5": _harmonic_mean(precision, recall_5),
    }


def _harmonic_mean(a: float, b: float) -> float:
    return 2 * a * b / (a + b) if a + b else 0.0


def claim_recalls(
    answers: Sequence[str], claims: Sequence[Sequence[str]], judge: EntailmentJudge
) -> list[float]:
    """Returns the share of each question's claims (ELI5) that its answer entails."""
    lines = [without_marks(first_line(answer)) for answer in answers]
    verdicts = Verdicts(judge)
    verdicts.ask((text, claim) for text, own in zip(lines, claims, strict=True) for claim in own)
    return [
        sum(verdicts[text, claim] for claim in own) / len(own)
        for text, own in zip(lines, claims, strict=True)
    ]


# ---- citations ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class CitedSentence:
    text: str  # without marks
    marks: tuple[int, ...]  # 1-based, into the answer's documents


@dataclass(frozen=True)
class CitedSentences:
    sentences: tuple[CitedSentence, ...]
    documents: tuple[Passage, ...]


def cited_sentences(answer: str) -> tuple[CitedSentence, ...]:
    """Reads the marks `[n]` of an answer; they stand inside their sentence, before its full stop.

    A mark after the full stop belongs to the next sentence.
    """
    return tuple(
        CitedSentence(
            without_marks(sentence).strip(), tuple(map(int, re.findall(r"\[(\d+)", sentence)))
        )
        for sentence in split_sentences(first_line(answer))
    )


def citation_scores(
    answers: Sequence[CitedSentences], judge: EntailmentJudge
) -> list[tuple[float, float] | None]:
    """Returns citation precision and recall of each answer; None for one without sentences.

    Recall: the share of sentences that their cited documents, together, support. A sentence without
    a mark, or with a mark beyond the documents, is not supported, and its marks do not count.
    Precision: the share of marks that count. A single mark counts if it supports its sentence. One
    of several counts if they support it together, unless it does not alone and the others do.

    The judge is asked three times, each time about the sentences of all answers. A mark [0], which
    ALCE silently takes for the last document, is beyond the documents here.
    """
    cited = [[_Support.of(s, a.documents) for s in a.sentences] for a in answers]
    every = [s for sentences in cited for s in sentences]
    verdicts = Verdicts(judge)
    verdicts.ask(s.together for s in every if s.documents)
    several = [s for s in every if len(s.documents) > 1 and verdicts[s.together]]
    verdicts.ask(s.alone(i) for s in several for i in range(len(s.documents)))
    verdicts.ask(
        s.others(i) for s in several for i in range(len(s.documents)) if not verdicts[s.alone(i)]
    )
    return [
        _precision_and_recall(sentences, verdicts) if sentences else None for sentences in cited
    ]


@dataclass(frozen=True)
class _Support:
    """A sentence and the documents that it cites; none if a mark is beyond them."""

    text: str
    documents: tuple[str, ...]

    @classmethod
    def of(cls, sentence: CitedSentence, documents: Sequence[Passage]) -> _Support:
        if not all(1 <= mark <= len(documents) for mark in sentence.marks):
            return cls(sentence.text, ())
        cited = (documents[mark - 1] for mark in sentence.marks[:MAX_CITATIONS])
        return cls(sentence.text, tuple(map(premise, cited)))

    @property
    def together(self) -> tuple[str, str]:
        return "\n".join(self.documents), self.text

    def alone(self, i: int) -> tuple[str, str]:
        return self.documents[i], self.text

    def others(self, i: int) -> tuple[str, str]:
        return "\n".join(self.documents[:i] + self.documents[i + 1 :]), self.text


def _precision_and_recall(sentences: Sequence[_Support], verdicts: Verdicts) -> tuple[float, float]:
    supported, counting, marks = 0, 0, 0
    for s in sentences:
        marks += len(s.documents)
        if not s.documents or not verdicts[s.together]:
            continue
        supported += 1
        if len(s.documents) == 1:
            counting += 1
            continue
        for i in range(len(s.documents)):
            counting += verdicts[s.alone(i)] or not verdicts[s.others(i)]
    return (counting / marks if marks else 0.0), supported / len(sentences)
