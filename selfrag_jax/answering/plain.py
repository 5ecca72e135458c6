"""Baselines in the engine: a model's most likely text after a prompt, with or without passages.

The model may or may not have reflection tokens; none of them has a meaning here.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax

from selfrag_jax.answering.loading import describe
from selfrag_jax.answering.records import Answer, failed_answer
from selfrag_jax.checkpoints.loading import LoadedModel
from selfrag_jax.config import check_type
from selfrag_jax.engine.engine import place_params
from selfrag_jax.engine.greedy import continue_prompts
from selfrag_jax.engine.segments import GeneratedSegments
from selfrag_jax.errors import UserError
from selfrag_jax.records import Passage, Question
from selfrag_jax.retrieval.retriever import Retriever, search_passages
from selfrag_jax.search.config import ALWAYS, MAX_NDOCS, NEVER
from selfrag_jax.text.plain_prompts import SELFRAG, PlainPrompt
from selfrag_jax.text.reflection import MissingReflectionTokens

MIN_PROMPT = 32  # tokens
_CHANGEABLE = {"passages": int, "max_new_tokens": int, "prompt": PlainPrompt}


@dataclass(frozen=True, kw_only=True)
class PlainConfig:
    batch: int  # questions answered at once
    max_new_tokens: int  # of an answer
    length_bucket: int  # see SearchConfig
    max_length: int | None = None  # tokens of a prompt with its passages; None: the model's context
    passages: int = 0  # in the prompt; 0: none
    prompt: PlainPrompt = SELFRAG
    dtype: str | None = None  # how the model was loaded (AnswerConfig)
    quantization: str | None = None

    def __post_init__(self):
        for name in ("batch", "max_new_tokens", "length_bucket"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must be at least 1")
        if not 0 <= self.passages <= MAX_NDOCS:
            raise UserError(f"passages={self.passages}: must be from 0 to {MAX_NDOCS}")

    @property
    def mode(self) -> str:
        return ALWAYS if self.passages else NEVER


@dataclass
class PlainModel:
    """A model with its tokenizer and, for questions without passages of their own, an index."""

    loaded: LoadedModel
    retriever: Retriever | None
    config: PlainConfig
    sources: dict[str, Path] = field(default_factory=dict)  # paths of model and index

    def __post_init__(self):
        params = place_params(self.loaded.model, self.loaded.params)
        self.loaded = replace(self.loaded, params=params)
        self._controls = _controls(self.loaded)

    def __repr__(self) -> str:
        return describe("PlainModel", self.loaded, self.retriever, self.config.mode)

    def check(self, changes: dict[str, Any]) -> None:
        """Raises UserError if `changes`, as in `answer`, are wrong."""
        self._limit(self.search_config(changes))

    def search_config(self, changes: dict[str, Any]) -> PlainConfig:
        """The settings with `changes`. Raises UserError if they are wrong."""
        for name, value in changes.items():
            if name not in _CHANGEABLE:
                raise UserError(f"unknown field {name!r}; known: {', '.join(_CHANGEABLE)}")
            check_type(name, value, _CHANGEABLE[name])
        return replace(self.config, **changes)

    def answer(
        self,
        questions: Sequence[Question],
        on_answer: Callable[[Answer], None] | None = None,
        total: int | None = None,
        **changes: Any,
    ) -> list[Answer]:
        """Returns the answers in the order of the questions.

        on_answer: as in SelfRAG.answer. total: unused, since all slots are used for any number.
        changes: `passages`, `max_new_tokens` and `prompt`. A question that fails has its error in
        its answer.
        """
        config = self.search_config(changes)
        answers: dict[int, Answer] = {}

        def keep(i: int, answer: Answer) -> None:
            answers[i] = answer
            if on_answer:
                on_answer(answer)

        asked: list[_Asked] = []
        for i, found in enumerate(self._find_all(questions, config)):
            try:
                if isinstance(found, Exception):
                    raise found
                asked.append(self._ask(i, questions[i], found, config))
            except Exception as e:
                keep(i, failed_answer(questions[i], e))
        events = continue_prompts(
            self.loaded.model,
            self.loaded.params,
            self.loaded.tokenizer,
            [a.prompt for a in asked],
            config.max_new_tokens,
            config.batch,
            config.length_bucket,
        )
        while True:
            mesh = self.loaded.mesh
            with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
                event = next(events, None)
            if event is None:
                return [answers[i] for i in range(len(questions))]
            a, segment = asked[event[0]], event[1]
            if isinstance(segment, Exception):
                keep(a.index, failed_answer(a.question, segment))
            else:
                keep(a.index, self._answer(a, segment, config))

    # ---- passages --------------------------------------------------------------------------------
    def _find_all(
        self, questions: Sequence[Question], config: PlainConfig
    ) -> list[list[Passage] | Exception]:
        """Each question's own passages; for questions without any, the index's."""
        if not config.passages:
            return [[] for _ in questions]
        found: list[list[Passage] | Exception] = [
            list(q.ctxs[: config.passages]) for q in questions
        ]
        missing = [i for i, own in enumerate(found) if not own]
        if self.retriever is not None:
            for start in range(0, len(missing), config.batch):
                some = missing[start : start + config.batch]
                for i, one in zip(some, self._search(questions, some, config), strict=True):
                    found[i] = one
        return found

    def _search(
        self, questions: Sequence[Question], some: Sequence[int], config: PlainConfig
    ) -> list[list[Passage] | Exception]:
        """The index's passages. If the batch fails, each question is searched alone."""
        assert self.retriever is not None
        texts = [questions[i].full_question for i in some]
        try:
            return [*search_passages(self.retriever, texts, config.passages)]
        except Exception as e:
            if len(some) == 1:
                return [e]
            return [found for i in some for found in self._search(questions, [i], config)]

    # ---- prompts ---------------------------------------------------------------------------------
    def _ask(self, index: int, q: Question, found: list[Passage], config: PlainConfig) -> _Asked:
        """The prompt with as many of its passages, in order, as fit."""
        limit, notices = self._limit(config), list[str]()
        for n in range(len(found), -1, -1):
            tokens = self._encode(q, found[:n], config)
            if len(tokens) <= limit:
                break
        if n < len(found):
            notices.append(
                f"{len(found) - n} of {len(found)} passages were left out: the prompt has room for "
                f"{limit} tokens"
            )
        if len(tokens) > limit:
            notices.append(f"the question was cut from {len(tokens)} to {limit} tokens")
            blank = replace(q, question="", prompt="", choices=(), input="")
            empty = self._encode(blank, (), config)
            end = len(os.path.commonprefix([tokens[::-1], empty[::-1]]))  # the response heading
            tokens = [*tokens[: limit - end], *tokens[len(tokens) - end :]]
        return _Asked(index, q, tokens, tuple(found[:n]), bool(found), tuple(notices))

    def _encode(self, q: Question, passages: Sequence[Passage], config: PlainConfig) -> list[int]:
        t = self.loaded.tokenizer
        return [t.bos_id, *t.encode(config.prompt.parts(q, passages))]

    def _limit(self, config: PlainConfig) -> int:
        """Maximum number of tokens in a prompt. Raises UserError if the context has no room."""
        context = self.loaded.model.config.max_length
        room = context - config.max_new_tokens
        if room < MIN_PROMPT:
            raise UserError(
                f"max_new_tokens={config.max_new_tokens} leaves no room for questions in the "
                f"model's context of {context} tokens; at most {context - MIN_PROMPT} fits"
            )
        return room if config.max_length is None else min(config.max_length, room)

    # ---- answers ---------------------------------------------------------------------------------
    def _answer(self, a: _Asked, segment: GeneratedSegments, config: PlainConfig) -> Answer:
        """`passages` are those in the prompt; `score` is exp of the mean token log-probability."""
        tokens = [t for t in segment.token_ids() if t not in self._controls]
        text = self.loaded.tokenizer.decode(tokens)
        return Answer(
            id=a.question.id,
            question=a.question.question,
            answer=config.prompt.cut(text),
            segments=(),
            citations=(),
            passages=a.passages,
            retrieved=a.retrieved,
            p_retrieve=float(a.retrieved),
            score=segment.mean_probability(),
            tree=(),
            notices=a.notices,
            task=a.question.task,
            num_tokens=int(segment.length),
            num_answer_tokens=int(segment.length),
        )


@dataclass(frozen=True)
class _Asked:
    """A question's prompt, and what is in it."""

    index: int
    question: Question
    prompt: list[int]
    passages: tuple[Passage, ...]
    retrieved: bool
    notices: tuple[str, ...]


def _controls(loaded: LoadedModel) -> set[int]:
    """The ids that are no text: the end of text and, where there are some, reflection tokens."""
    t = loaded.tokenizer
    try:
        return {t.eos_id, *t.reflection_ids().all}
    except MissingReflectionTokens:
        return {t.eos_id}
