"""Answers as the files that other projects' judges read.

alce        princeton-nlp/ALCE, eval.py: {"data": [item]}, citations as marks in the text
factscore   shmsw25/FActScore: JSON lines of topic and output
kilt        facebookresearch/KILT: JSON lines of id and output with provenance
ragchecker  amazon-science/RAGChecker: {"results": [row]} with the retrieved context
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from selfrag_jax.errors import UserError
from selfrag_jax.evaluation.citation_marks import marked_text, one_line, remove_marks
from selfrag_jax.evaluation.cited_answers import CitedAnswer
from selfrag_jax.evaluation.export_checks import (
    Item,
    Placed,
    check_alce,
    check_factscore,
    check_kilt,
    check_ragchecker,
    require_alce,
    require_factscore,
    require_kilt,
    require_ragchecker,
)
from selfrag_jax.evaluation.metrics import long_annotations, long_answer
from selfrag_jax.files import write_json
from selfrag_jax.records import Question, write_jsonl


# ---- rows ----------------------------------------------------------------------------------------
def alce_item(a: CitedAnswer) -> Item:
    """An item of ALCE's file; marks count its `docs` from 1."""
    q = a.question
    item: Item = {"id": q.id, "question": q.question}
    # Short answers of several parts are no long text, so these questions have none.
    if answer := long_answer(q) or (_gold_text(q) if q.answers else ""):
        item["answer"] = answer
    if len(long_annotations(q)) > 1:  # with a single one eval.py fails; it reads `answer` then
        item["annotations"] = q.extra["annotations"]
    for name in ("qa_pairs", "claims"):
        if q.extra.get(name):
            item[name] = q.extra[name]
    if q.extra.get("answer_groups"):
        item["answers"] = q.extra["answer_groups"]
    elif q.answers and "qa_pairs" not in item and "claims" not in item:
        item["answers"] = [list(q.answers)]
    marks = [[i + 1 for i in cited] for cited in a.cited]
    item["output"] = marked_text(a.text, a.segments, marks)
    item["docs"] = [{"title": p.title, "text": p.text} for p in a.passages]
    return item


def factscore_row(a: CitedAnswer) -> Item:
    """A row of FActScore's input. An empty output abstains."""
    topic = a.question.extra.get("topic")
    if not isinstance(topic, str) or not topic.strip():
        raise UserError(
            f"{a.where}: question {a.question.id!r} has no field 'topic', the title of a Wikipedia "
            "page; FActScore needs it in the question file"
        )
    return {"topic": topic, "output": remove_marks(a.text)}


def kilt_row(a: CitedAnswer) -> Item:
    """A row of KILT's predictions. The pages of the cited passages come first."""
    if without := [p for p in a.passages if not p.id.strip()]:
        raise UserError(
            f"{a.where}: passage {without[0].title!r} has no id; KILT needs the id of its "
            "Wikipedia page"
        )
    pages = dict.fromkeys(p.id for p in a.passages)
    output = {"answer": one_line(a.text), "provenance": [{"wikipedia_id": i} for i in pages]}
    return {"id": a.question.id, "output": [output]}


def ragchecker_row(a: CitedAnswer) -> Item:
    """A row of RAGChecker's results."""
    q = a.question
    gold = _gold_text(q)
    if not gold:
        raise UserError(
            f"{a.where}: question {q.id!r} has no gold answer in the question file; RAGChecker "
            "needs one"
        )
    return {
        "query_id": q.id,
        "query": q.question,
        "gt_answer": gold,
        "response": remove_marks(a.text),
        "retrieved_context": [{"doc_id": p.id, "text": p.text} for p in a.retrieved],
    }


def _gold_text(q: Question) -> str:
    """The gold answer as one text: a choice's text, all answers of a list, parts one by one."""
    if groups := q.extra.get("answer_groups"):
        return ", ".join(str(group[0]) for group in groups if group)  # as QAMPARI's own `answer`
    if q.choices and q.answers:
        return dict(q.choices).get(q.answers[0], q.answers[0])
    if q.answers:
        return q.answers[0]
    if long := long_annotations(q):
        return long[0]
    parts = [pair["short_answers"] for pair in q.extra.get("qa_pairs") or []]
    return "; ".join(str(part[0]) for part in parts if part) or " ".join(
        map(str, q.extra.get("claims") or [])
    )


# ---- writing -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Format:
    """One judge's format. `list_name`: of the JSON object that holds the rows, or JSON lines."""

    row: Callable[[CitedAnswer], Item]
    require: Callable[[Placed], int]
    check: Callable[[str | Path], int]
    list_name: str = ""
    needs_questions: bool = False

    def rows(self, answers: Sequence[CitedAnswer]) -> list[Item]:
        """Returns the rows of the file. Raises UserError if the judge would not take them."""
        rows = [self.row(a) for a in answers]
        self.require([(a.where, row) for a, row in zip(answers, rows, strict=True)])
        return rows

    def write(self, path: str | Path, rows: Sequence[Item]) -> None:
        if self.list_name:
            write_json(path, {self.list_name: list(rows)})
        else:
            write_jsonl(path, rows)


FORMATS = {
    "alce": Format(alce_item, require_alce, check_alce, "data"),
    "factscore": Format(factscore_row, require_factscore, check_factscore, needs_questions=True),
    "kilt": Format(kilt_row, require_kilt, check_kilt),
    "ragchecker": Format(
        ragchecker_row, require_ragchecker, check_ragchecker, "results", needs_questions=True
    ),
}
