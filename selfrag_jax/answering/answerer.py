"""What answers questions for `selfrag answer` and `selfrag evaluate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from selfrag_jax.answering.records import Answer
from selfrag_jax.checkpoints.loading import LoadedModel
from selfrag_jax.records import Question
from selfrag_jax.retrieval.retriever import Retriever


class AnswerSettings(Protocol):
    @property
    def mode(self) -> str: ...  # one of search.config.MODES


class Answerer(Protocol):
    """SelfRAG, or a baseline (PlainModel)."""

    @property
    def loaded(self) -> LoadedModel: ...

    @property
    def retriever(self) -> Retriever | None: ...

    @property
    def config(self) -> Any: ...  # a dataclass, which identifies the answers

    @property
    def sources(self) -> dict[str, Path]: ...  # paths of model and index

    def check(self, changes: dict[str, Any]) -> None:
        """Raises UserError if `changes`, as in `answer`, are wrong."""

    def search_config(self, changes: dict[str, Any]) -> AnswerSettings:
        """The settings with `changes`; raises what `check` does."""

    def answer(
        self,
        questions: Sequence[Question],
        on_answer: Callable[[Answer], None] | None = None,
        total: int | None = None,
        **changes: Any,
    ) -> list[Answer]:
        """Returns the answers in the order of the questions. See SelfRAG.answer."""
