"""The systems that an evaluation compares: Self-RAG, its ablations, and baselines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from selfrag_jax.answering.config import AnswerConfig
from selfrag_jax.answering.selfrag import SelfRAG
from selfrag_jax.checkpoints import loading
from selfrag_jax.evaluation import baselines
from selfrag_jax.records import Question

Row = dict[str, Any]
EACH_PASSAGE = "each"  # a baseline answers from each passage; its most probable answer is taken


@dataclass(frozen=True)
class System:
    """A row of the results table: which model answers, and with which settings."""

    name: str
    model: str  # name of its folder in the workdir; GENERATOR is searched, others are baselines
    tasks: tuple[str, ...]
    changes: tuple[tuple[str, Any], ...] = ()  # fields of SearchConfig (generator only)
    passages: int | str = 0  # in the prompt (baselines only): a number, or EACH_PASSAGE


GENERATOR = "generator"


class Answerers:
    """The models of a workdir, each loaded when it is first needed."""

    def __init__(self, workdir: Path, search: AnswerConfig, plain: baselines.PlainConfig):
        self.workdir, self.search_config, self.plain_config = workdir, search, plain
        self._rag: SelfRAG | None = None
        self._plain: dict[str, loading.LoadedModel] = {}

    def answer(
        self,
        system: System,
        questions: Sequence[Question],
        changes: dict[str, Any],
        advance: Callable[[], None],
    ) -> list[Row]:
        """Rows of the `answer` format. changes: of the task, on top of the system's own.

        Calls `advance` after each question. Self-RAG retrieves from the index; baselines are given
        the questions' own passages.
        """
        if system.model == GENERATOR:
            asked = [replace(q, ctxs=()) for q in questions]
            settings = dict(system.changes) | changes
            return [
                a.to_row()
                for a in self._selfrag().answer(asked, on_answer=lambda _: advance(), **settings)
            ]
        model = self._baseline(system.model)
        if isinstance(system.passages, int):
            passages = [q.ctxs[: system.passages] for q in questions]
            return baselines.answer_plain(model, questions, passages, self.plain_config, advance)
        per_passage = []
        for i in range(max(len(q.ctxs) for q in questions)):
            on_answer = advance if i == 0 else None
            passages = [q.ctxs[i : i + 1] for q in questions]
            per_passage.append(
                baselines.answer_plain(model, questions, passages, self.plain_config, on_answer)
            )
        return baselines.best_of(per_passage)

    def _selfrag(self) -> SelfRAG:
        if self._rag is None:
            self._rag = SelfRAG.load(
                self.workdir / GENERATOR, self.workdir / "index", self.search_config
            )
        return self._rag

    def _baseline(self, name: str) -> loading.LoadedModel:
        if name not in self._plain:
            self._plain[name] = loading.load(self.workdir / name)
        return self._plain[name]
