"""SelfRAG, the public object: questions in, answers with citations and critiques out.

rag = SelfRAG.load("W/generator", index="W/index")
for answer in rag.answer(["What does Silverlight Waltz praise?"], threshold=0.2):
    print(answer.answer, answer.citations)
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import jax
import numpy as np

from selfrag_jax.answering import generator
from selfrag_jax.answering.config import DEFAULT, AnswerConfig
from selfrag_jax.answering.loading import (
    check_retrieval,
    describe,
    open_retriever,
    prepare_model,
)
from selfrag_jax.answering.records import (
    Answer,
    SegmentDone,
    answer_segment,
    failed_answer,
    make_answer,
)
from selfrag_jax.checkpoints import loading
from selfrag_jax.config import check_type
from selfrag_jax.data.questions import question_from
from selfrag_jax.engine.engine import place_params
from selfrag_jax.errors import UserError
from selfrag_jax.records import Passage, Question
from selfrag_jax.retrieval.instant_index import PassageSource
from selfrag_jax.retrieval.retriever import IndexRetriever, Retriever, search_passages
from selfrag_jax.search.algorithms import ALGORITHMS
from selfrag_jax.search.config import SearchConfig
from selfrag_jax.search.paper import PaperSearch
from selfrag_jax.search.scoring import Weights
from selfrag_jax.search.search import SegmentSearch
from selfrag_jax.search.tree import SearchTree
from selfrag_jax.text import prompts

# A dict is a row of a question file, {"instruction", "input"} or {"question", "ctxs"}, say.
AnyQuestion = str | dict[str, Any] | Question
Questions = AnyQuestion | Sequence[AnyQuestion]


@dataclass
class SelfRAG:
    """A generator with its tokenizer and, for questions without passages of their own, an index."""

    loaded: loading.LoadedModel
    retriever: Retriever | None
    config: AnswerConfig
    sources: dict[str, Path] = field(default_factory=dict)  # paths of model and index

    def __post_init__(self):
        params = place_params(self.loaded.model, self.loaded.params)
        self.loaded = replace(self.loaded, params=params)

    def __repr__(self) -> str:
        return describe("SelfRAG", self.loaded, self.retriever, self.config.search.mode)

    @classmethod
    def load(
        cls,
        model: str | Path,
        index: str | Path | None = None,
        config: AnswerConfig | None = None,
        retriever: Retriever | None = None,
        passages: str | Path | PassageSource | None = None,
    ) -> SelfRAG:
        """Loads a training workdir, a Hugging Face folder or a hub name.

        index: a folder made by `selfrag index`. In its place: retriever, your own, any object with
        `search(queries, k)` (retrieval/retriever.py); or passages, a file or folder of texts that
        is small enough to be embedded now (retrieval/instant_index.py). config: default: DEFAULT
        (answering/config.py). Notices go to stderr: of a training that is unfinished, whose last
        checkpoint is taken, and of a model of the synthetic world that meets another corpus.
        Raises UserError if model or index is missing or something else, if the index is unfinished
        or the tokenizer has no reflection tokens, if the passages cannot be read or are too many,
        and if more than one of index, retriever and passages is given.
        """
        check_retrieval(index, retriever, passages)
        folder = generator.find_generator(model)
        generator.require_reflection_tokens(folder)
        retriever = open_retriever(index, retriever, passages)  # before the model is in memory
        loaded = loading.load(folder)
        config = config or DEFAULT
        sources = {"model": folder}
        if isinstance(retriever, IndexRetriever):
            sources["index"] = retriever.index.folder
        generator.print_notices(folder, loaded.tokenizer, retriever)
        return cls(prepare_model(loaded, config), retriever, config, sources)

    def answer(
        self,
        questions: Questions,
        on_answer: Callable[[Answer], None] | None = None,
        total: int | None = None,
        **changes: Any,
    ) -> list[Answer]:
        """Returns the answers in the order of the questions; for one question, a list of one.

        on_answer: called with each answer as soon as it is there, in any order. total: how many
        questions there are in all, if these are only the remaining ones; it sets the number of
        slots. changes: fields of SearchConfig or its weights that differ for this call, e.g.
        mode="always_retrieve", threshold=0.5, w_sup=2.0. Raises UserError for an unknown field or
        a value of the wrong type. A question that fails has its error in its answer.
        """
        if "of" in changes:
            warnings.warn("`of` is now `total`", DeprecationWarning, stacklevel=2)
            total = changes.pop("of")
        rows = _as_questions(questions)
        answers: dict[int, Answer] = {}
        for i, event in self._events(rows, changes, total):
            if isinstance(event, Answer):
                answers[i] = event
                if on_answer:
                    on_answer(event)
        return [answers[i] for i in range(len(rows))]

    def stream(self, questions: Questions, **changes: Any) -> Iterator[SegmentDone | Answer]:
        """Yields segments as soon as nothing can change them, and then each question's answer.

        Events of several questions come as they are ready. changes: as in `answer`.
        """
        for _, event in self._events(_as_questions(questions), changes):
            yield event

    def check(self, changes: dict[str, Any]) -> None:
        """Raises UserError if `changes`, as in `answer`, are wrong."""
        self._search(changes)

    def search_config(self, changes: dict[str, Any]) -> SearchConfig:
        """The settings of a search with `changes`; takes and raises what `check` does."""
        return self._search(changes).config

    # ---- running the search ----------------------------------------------------------------------
    def _events(
        self, questions: list[Question], changes: dict[str, Any], total: int | None = None
    ) -> Iterator[tuple[int, SegmentDone | Answer]]:
        """(index of the question, event). A question that fails does not affect the others."""
        search = self._search(changes)
        notices: list[list[str]] = [[] for _ in questions]
        prompt_ids: dict[int, list[int]] = {}
        for i, q in enumerate(questions):
            try:
                prompt_ids[i] = self._prompt(q, search.max_prompt, notices[i])
            except Exception as e:
                yield i, failed_answer(q, e)
        asked = list(prompt_ids)  # what the search's indices refer to

        def find_passages(queries: list[tuple[int, list[str]]]):
            pairs = [(questions[asked[j]], texts) for j, texts in queries]
            return self._find_passages(pairs, search.config.ndocs)

        events = search.stream(
            [prompt_ids[i] for i in asked],
            find_passages,
            self._num_slots(total or len(questions), search),
            seed_texts=[questions[i].full_question for i in asked],
            overlap=self.retriever is not None and not all(q.ctxs for q in questions),
        )
        while True:
            mesh = self.loaded.mesh
            with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
                item = next(events, None)
            if item is None:
                return
            j, event = item
            i = asked[j]
            q = questions[i]
            if isinstance(event, Exception):
                yield i, failed_answer(q, event)
            elif isinstance(event, SearchTree):
                yield i, self._answer(search, event, q, notices[i])
            elif not self._votes(search, q):  # a vote may still choose another segment
                for node in event.segments:
                    yield i, SegmentDone(q.id, answer_segment(search, node))

    def _search(self, changes: dict[str, Any]) -> SegmentSearch:
        """The search with changed settings. Raises UserError if they are wrong."""
        weight_names = {f.name for f in fields(Weights)}
        search_names = {f.name for f in fields(SearchConfig)} - {"weights"}
        if unknown := [k for k in changes if k not in weight_names | search_names]:
            known = ", ".join(sorted(weight_names | search_names))
            raise UserError(f"unknown field {unknown[0]!r}; known: {known}")
        weights = _checked(Weights, {k: v for k, v in changes.items() if k in weight_names})
        changes = _checked(SearchConfig, {k: v for k, v in changes.items() if k in search_names})
        base = self.config.search
        # An unknown scorer is refused by SearchConfig.
        algorithm = ALGORITHMS.get(changes.get("scorer", base.scorer), PaperSearch)
        config = algorithm.configure(base, changes, weights)
        m = self.loaded
        return algorithm(m.model, m.params, m.tokenizer, config, self.config.max_length)

    def _num_slots(self, num_questions: int, search: SegmentSearch) -> int:
        """Questions to search at once.

        The configured number; for fewer questions the next power of two, so that few sizes are
        compiled; and fewer where this search has more branches than the configured one retrieves,
        since branches are what takes memory.
        """
        c = self.config.search
        budget = self.config.batch * c.ndocs * c.num_beams
        fitting = budget // (search.num_beams * search.config.num_branches)
        power_of_two = 1 << (num_questions - 1).bit_length()
        return max(1, min(self.config.batch, fitting, power_of_two))

    def _prompt(self, q: Question, limit: int, notices: list[str]) -> list[int]:
        """Tokens up to the response heading; cut to `limit` of them, with a notice."""

        def encode(parts: list[prompts.Part]) -> list[int]:
            return self.loaded.tokenizer.encode(parts, before_control=True)

        tokens = [self.loaded.tokenizer.bos_id, *encode(prompts.question_prompt(q))]
        if len(tokens) <= limit:
            return tokens
        why = ""
        if limit < self.config.max_length:
            why = f": the model's context has {self.loaded.model.config.max_length}"
        notices.append(f"the question was cut from {len(tokens)} to {limit} tokens{why}")
        # Keep the response heading: one token or, in published vocabularies, several.
        heading = _common_suffix_length(tokens, encode(prompts.instruction("")))
        return [*tokens[: limit - heading], *tokens[len(tokens) - heading :]]

    def _find_passages(
        self, queries: list[tuple[Question, list[str]]], ndocs: int
    ) -> Sequence[Sequence[Passage] | Exception]:
        """Passages for (question, texts of the segments so far) pairs.

        If the batch fails, each query is retried alone; one that fails yields its exception.
        """
        try:
            return self._retrieve(queries, ndocs)
        except Exception as e:
            if len(queries) == 1:
                return [e]
            return [found for q in queries for found in self._find_passages([q], ndocs)]

    def _retrieve(
        self, queries: list[tuple[Question, list[str]]], ndocs: int
    ) -> list[list[Passage]]:
        """The question's own passages; for questions without any, the index's."""
        passages = [list(q.ctxs[:ndocs]) for q, _ in queries]
        if self.retriever is None:
            return passages
        texts = [prompts.retrieval_query(q.full_question, previous) for q, previous in queries]
        missing = [i for i, own in enumerate(passages) if not own]
        found = search_passages(self.retriever, [texts[i] for i in missing], ndocs)
        for i, one in zip(missing, found, strict=True):
            passages[i] = one
        return passages

    # ---- answers ---------------------------------------------------------------------------------
    def _votes(self, search: SegmentSearch, q: Question) -> bool:
        """Whether the passages vote on the question's options."""
        return self.config.closed_set and bool(q.options) and search.can_vote

    def _answer(
        self, search: SegmentSearch, tree: SearchTree, q: Question, notices: list[str]
    ) -> Answer:
        try:
            votes = self._votes(search, q)
            best = (search.elect(tree, q) if votes else None) or tree.best()
            return make_answer(search, tree, best, q, votes, notices)
        except Exception as e:
            return failed_answer(q, e)


def _as_questions(questions: Questions) -> list[Question]:
    """Questions as records; one without an id gets its number. Raises UserError for all else."""
    if isinstance(questions, (str, dict, Question)):
        questions = [questions]
    if not isinstance(questions, Sequence):
        raise UserError(f"expected questions, text or a list of texts, not {questions!r}")
    rows = [_as_question(i, q) for i, q in enumerate(questions)]
    if empty := [q.id for q in rows if not q.question.strip()]:
        raise UserError(f"question {empty[0]!r} is empty")
    return rows


def _as_question(i: int, q: Any) -> Question:
    if isinstance(q, Question):
        return q
    if isinstance(q, str):
        return Question(id=str(i), question=q)
    if isinstance(q, dict):
        return question_from(f"question {i}", q, "", i)[0]
    raise UserError(f"question {i} is {q!r}; expected text, a dict or a Question")


def _common_suffix_length(a: list[int], b: list[int]) -> int:
    same = [x == y for x, y in zip(reversed(a), reversed(b), strict=False)]
    return [*same, False].index(False)


def _checked(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """Values for fields of a config; numpy's numbers become Python's.

    Raises UserError naming a value of the wrong type.
    """
    hints = get_type_hints(cls)
    out = {k: v.item() if isinstance(v, np.generic) else v for k, v in values.items()}
    for name, value in out.items():
        check_type(name, value, hints[name])
    if isinstance(constraints := out.get("constraints"), str):
        raise UserError(
            f"constraints={constraints!r}: expected several tokens, like ({constraints!r},)"
        )
    return out
