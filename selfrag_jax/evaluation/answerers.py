"""Answers with the models of a quickstart's workdir, each loaded when it is first needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from selfrag_jax.answering.config import AnswerConfig
from selfrag_jax.answering.plain import PlainConfig, PlainModel
from selfrag_jax.answering.records import Answer
from selfrag_jax.answering.selfrag import SelfRAG
from selfrag_jax.checkpoints import loading
from selfrag_jax.evaluation.systems import BASE, EACH_PASSAGE, System
from selfrag_jax.records import Question
from selfrag_jax.text.plain_prompts import PlainPrompt

Row = dict[str, Any]
GENERATOR = "generator"


class Answerers:
    """The models of a workdir, and their untrained base."""

    def __init__(
        self, workdir: Path, search: AnswerConfig, plain: PlainConfig, base: Path | None = None
    ):
        """base: the folder of the model that systems.BASE names."""
        self.workdir, self.search_config, self.plain_config = workdir, search, plain
        self.base = base
        self._rag: SelfRAG | None = None
        self._plain: tuple[str, PlainModel] | None = None  # the last one: more may not fit

    def answer(
        self,
        system: System,
        folder: str,
        questions: Sequence[Question],
        changes: dict[str, Any],
        advance: Callable[[], None],
        prompt: PlainPrompt | None = None,
    ) -> list[Row]:
        """Rows of the `answer` format. changes: of the task's search, on top of the system's own.

        folder: of the model, in the workdir. prompt: of a baseline (default: the config's). Calls
        `advance` after each question. Self-RAG retrieves from the index; baselines are given the
        questions' own passages. Raises RuntimeError if a baseline fails on a question.
        """
        if system.is_search:
            asked = [replace(q, ctxs=()) for q in questions]
            settings = dict(system.changes) | changes
            return [
                a.to_row()
                for a in self._selfrag().answer(asked, on_answer=lambda _: advance(), **settings)
            ]
        model = self._baseline(folder)
        if isinstance(system.passages, int):
            how: dict[str, Any] = {} if prompt is None else {"prompt": prompt}
            how["passages"] = system.passages
            return _rows(model.answer(questions, lambda _: advance(), **how))
        assert system.passages == EACH_PASSAGE
        per_passage = []
        for i in range(max(len(q.ctxs) for q in questions)):
            single = [replace(q, ctxs=q.ctxs[i : i + 1]) for q in questions]
            on_answer = (lambda _: advance()) if i == 0 else None
            per_passage.append(_rows(model.answer(single, on_answer, passages=1)))
        return _most_probable(per_passage)

    def _selfrag(self) -> SelfRAG:
        if self._rag is None:
            self._rag = SelfRAG.load(
                self.workdir / GENERATOR, self.workdir / "index", self.search_config
            )
        return self._rag

    def _baseline(self, name: str) -> PlainModel:
        if self._plain is None or self._plain[0] != name:
            self._plain = None
            folder = self.base if name == BASE else self.workdir / name
            assert folder is not None
            self._plain = name, PlainModel(loading.load(folder), None, self.plain_config)
        return self._plain[1]


def _most_probable(per_passage: Sequence[Sequence[Row]]) -> list[Row]:
    """The most probable of a question's answers: all one has without critiques.

    Its `num_tokens` counts those of all of them.
    """
    best = []
    for rows in zip(*per_passage, strict=True):
        num_tokens = sum(row["num_tokens"] for row in rows)
        best.append(max(rows, key=lambda r: r["score"]) | {"num_tokens": num_tokens})
    return best


def _rows(answers: Sequence[Answer]) -> list[Row]:
    """Raises RuntimeError if an answer failed."""
    for a in answers:
        if a.error:
            raise RuntimeError(f"question {a.id}: {a.error}")
    return [a.to_row() | {"p_sequence": a.score} for a in answers]
