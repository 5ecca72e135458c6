"""The public object: questions in, answers with citations and critiques out.

rag = SelfRAG.load("W/generator", index="W/index")
for answer in rag.answer(["Where was Marvin Tellock born?"], threshold=0.2):
    print(answer.answer, answer.citations)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_type_hints

import jax
import numpy as np

from selfrag_jax import artifacts
from selfrag_jax.answering.citations import cite
from selfrag_jax.answering.config import DEFAULT, AnswerConfig
from selfrag_jax.answering.records import (
    Answer,
    SegmentDone,
    _doubts,
    _failed,
    _segment,
    _tree_node,
)
from selfrag_jax.answering.voting import _vote
from selfrag_jax.checkpoints import loading, workdirs
from selfrag_jax.config import check_type
from selfrag_jax.engine.engine import on_device, unstack_layers
from selfrag_jax.errors import UserError
from selfrag_jax.huggingface import hub
from selfrag_jax.models import quantize, sharding
from selfrag_jax.models.llama import Model
from selfrag_jax.records import Passage, Question
from selfrag_jax.retrieval.retriever import OnlineRetriever, Retriever, StaticRetriever
from selfrag_jax.search import scoring
from selfrag_jax.search.config import SearchConfig
from selfrag_jax.search.paper import BeamSearch
from selfrag_jax.search.released.search import ReleasedSearch
from selfrag_jax.search.tree import Search
from selfrag_jax.text import prompts
from selfrag_jax.text.prompts import question_text

Questions = str | Question | Sequence[str | Question]


def _questions(questions: Questions) -> list[Question]:
    questions = [questions] if isinstance(questions, (str, Question)) else questions
    if not isinstance(questions, Sequence):
        raise UserError(f"expected questions, text or a list of texts, not {questions!r}")
    if wrong := [q for q in questions if not isinstance(q, (str, Question))]:
        raise UserError(
            f"question {questions.index(wrong[0])} is {wrong[0]!r}; expected text or a Question"
        )
    rows = [
        q if isinstance(q, Question) else Question(id=str(i), question=q)
        for i, q in enumerate(questions)
    ]
    if empty := [q.id for q in rows if not q.question.strip()]:
        raise UserError(f"question {empty[0]!r} is empty")
    return rows


def _of_right_kinds(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """Values for fields of a config, numpy's numbers as Python's. Raises BadInput naming one of the wrong type."""
    hints = get_type_hints(cls)
    values = {
        name: value.item() if isinstance(value, np.generic) else value
        for name, value in values.items()
    }
    for name, value in values.items():
        check_type(name, value, hints[name])
    if isinstance(values.get("constraints"), str):
        raise UserError(
            f"constraints={values['constraints']!r}: expected several tokens, like ({values['constraints']!r},)"
        )
    return values


def prepare(loaded: loading.LoadedModel, config: AnswerConfig) -> loading.LoadedModel:
    """The model in the type, the bits and over the devices that `config` says.

    Raises BadInput when there are not that many devices, or they do not divide the heads.
    """
    model, params, dtype = loaded.model, loaded.params, config.dtype
    if dtype is not None:
        model = Model(replace(model.config, dtype=dtype))
    if config.quantization == "int8":
        model, params = quantize.quantize(model, params, dtype)
    elif dtype is not None:
        params = jax.tree.map(lambda x: np.asarray(x).astype(dtype), params)
    mesh = None
    if config.tensor > 1:
        if model.config.num_kv_heads % config.tensor:
            raise UserError(
                f"--tensor={config.tensor} does not divide the model's {model.config.num_kv_heads} key-value heads"
            )
        mesh = sharding.make_mesh(tensor=config.tensor)
        if unstack_layers(mesh.devices.flat[0].platform, mesh.size):
            params = model.per_layer(params)
        params = jax.device_put(params, sharding.shardings(mesh, params))
    return replace(loaded, model=model, params=params, mesh=mesh)


@dataclass
class SelfRAG:
    """A generator with its tokenizer and, for questions without passages of their own, an index."""

    loaded: loading.LoadedModel
    retriever: Retriever | None
    config: AnswerConfig
    sources: dict[str, Path] = field(default_factory=dict)  # where model and index came from

    def __post_init__(self):
        self.loaded = replace(self.loaded, params=on_device(self.loaded.model, self.loaded.params))

    @classmethod
    def load(
        cls, model: str | Path, index: str | Path | None = None, config: AnswerConfig | None = None
    ) -> SelfRAG:
        """model: a training workdir or a Hugging Face folder; index: a folder made by `selfrag index`.

        Raises BadInput when either is missing, unfinished, or the tokenizer has no reflection tokens.
        """
        model = hub.model_folder(model)
        if (model / workdirs.MODEL_FILE).is_file():
            artifacts.require_finished(model, "train", "generator")
        loaded = loading.load(model)
        loaded.tokenizer.reflection_ids()  # refused before weights are put anywhere
        sources = {"model": model} | ({"index": Path(index)} if index else {})
        config = config or DEFAULT
        return cls(
            prepare(loaded, config), OnlineRetriever(index) if index else None, config, sources
        )

    def answer(
        self,
        questions: Questions,
        on_answer: Callable[[Answer], None] | None = None,
        of: int | None = None,
        **changes: Any,
    ) -> list[Answer]:
        """Answers in the order of the questions; of one question, a list of one.

        changes: fields of SearchConfig or of its weights that differ for this call, e.g. mode="always_retrieve",
        threshold=0.5, w_sup=2.0. on_answer is called with each answer as soon as there is one, whatever their order. of: how many
        questions there are in all, where these are what is left of them: they are then computed in as many slots. Raises
        BadInput on an unknown field or a value of the wrong type.
        """
        rows = _questions(questions)
        out: dict[int, Answer] = {}
        for i, event in self._events(rows, changes, of):
            if isinstance(event, Answer):
                out[i] = event
                if on_answer:
                    on_answer(event)
        return [out[i] for i in range(len(rows))]

    def stream(self, questions: Questions, **changes: Any) -> Iterator[SegmentDone | Answer]:
        """Segments as soon as nothing can change them any more, and each question's whole answer after them; of several
        questions as they come. changes: as of `answer`."""
        for _, event in self._events(_questions(questions), changes):
            yield event

    def _events(
        self, rows: list[Question], changes: dict[str, Any], of: int | None = None
    ) -> Iterator[tuple[int, SegmentDone | Answer]]:
        search = self._search(dict(changes))
        notices: list[list[str]] = [[] for _ in rows]
        ids: dict[int, list[int]] = {}
        for i, q in enumerate(rows):
            try:
                ids[i] = self._prompt(q, notices[i], search.longest_prompt)
            except Exception as e:  # one question that fails does not take the others along
                yield i, _failed(q, e)
        asked = list(ids)

        def retrieve(queries):
            try:
                return self._retrieve(
                    rows, [(asked[j], texts) for j, texts in queries], search.config.ndocs
                )
            except Exception as e:
                if len(queries) > 1:
                    return [found for one in queries for found in retrieve([one])]
                return [e]

        slow = self.retriever is not None and not all(q.ctxs for q in rows)
        events = search.stream(
            [ids[i] for i in asked],
            retrieve,
            self._slots(of or len(rows), search.width * search.branches),
            [rows[i].question for i in asked],
            slow,
        )
        while True:
            with (
                contextlib.nullcontext()
                if self.loaded.mesh is None
                else jax.set_mesh(self.loaded.mesh)
            ):
                j, event = next(events, (None, None))
            if j is None:
                return
            i = asked[j]
            if isinstance(event, Exception):
                yield i, _failed(rows[i], event)
            elif isinstance(event, Search):
                yield i, self._answer_or_why_not(search, rows[i], event, notices[i])
            elif not self._votes(search.config, rows[i]):  # a vote may still take another segment
                for node in event.segments:
                    yield i, SegmentDone(rows[i].id, _segment(search, node))

    def _slots(self, questions: int, each: int) -> int:
        """Questions at once: the configured number, or for fewer questions the next power of two, so that their number leads to few
        compilations; fewer where each has more branches, which are what takes memory."""
        c = self.config.search
        branches = self.config.batch * c.ndocs * (c.beam_width if c.max_depth > 1 else 1)
        return max(1, min(self.config.batch, branches // each, 1 << (questions - 1).bit_length()))

    def check(self, changes: dict[str, Any]) -> None:
        """Raises BadInput where `changes`, as of `answer`, are wrong."""
        self._search(dict(changes))

    def _search(self, changes: dict[str, Any]) -> BeamSearch:
        base = self.config.search
        weights = {
            k: changes.pop(k) for k in list(changes) if k in scoring.Weights.__dataclass_fields__
        }
        unknown = [
            k for k in changes if k not in SearchConfig.__dataclass_fields__ or k == "weights"
        ]
        if unknown:
            known = sorted(
                {*SearchConfig.__dataclass_fields__, *scoring.Weights.__dataclass_fields__}
                - {"weights"}
            )
            raise UserError(f"unknown field {unknown[0]!r}; known: {', '.join(known)}")
        weights, changes = (
            _of_right_kinds(scoring.Weights, weights),
            _of_right_kinds(SearchConfig, changes),
        )
        if changes.get("scorer") == "released":  # comes with the scripts' own defaults
            changes = {"accumulate": "sum"} | changes
            if changes.get("max_depth", base.max_depth) == 1:
                weights = {"w_use": 1.0} | weights
        config = replace(base, weights=replace(base.weights, **weights), **changes)
        if config.scorer == "released" and changes.get("keep_passages"):
            raise UserError(
                "--keep_passages: the released scripts keep no passage of an earlier segment; use --scorer=paper"
            )
        loaded, kind = self.loaded, ReleasedSearch if config.scorer == "released" else BeamSearch
        return kind(loaded.model, loaded.params, loaded.tokenizer, config, self.config.max_length)

    def _prompt(self, q: Question, notice: list[str], most: int) -> list[int]:
        """Tokens up to the response heading, `most` of them, with a notice where they are cut."""
        encode = lambda text: self.loaded.tokenizer.encode(
            prompts.instruction(text), before_control=True
        )  # noqa: E731
        tokens = [self.loaded.tokenizer.bos_id, *encode(question_text(q))]
        if len(tokens) > most:
            why = (
                ""
                if most == self.config.max_length
                else f": the model's context has {self.loaded.model.config.max_length}"
            )
            notice.append(f"the question was cut from {len(tokens)} to {most} tokens{why}")
            same = [a == b for a, b in zip(reversed(tokens), reversed(encode("")), strict=False)]
            heading = [*same, False].index(
                False
            )  # of the response: one token or, in published vocabularies, several
            tokens = [*tokens[: most - heading], *tokens[len(tokens) - heading :]]
        return tokens

    def _retrieve(self, rows: list[Question], queries, ndocs: int) -> list[list[Passage]]:
        """Passages for (question, previous segments) pairs: the question's own, or else the index's."""
        static = [rows[q].ctxs for q, _ in queries]
        texts = [prompts.query_for(rows[q].question, previous) for q, previous in queries]
        with_own = StaticRetriever().passages(static, texts, ndocs)
        if self.retriever is None:
            return with_own
        missing = [i for i, own in enumerate(with_own) if not own]
        found = self.retriever.passages([()] * len(missing), [texts[i] for i in missing], ndocs)
        for i, passages in zip(missing, found, strict=True):
            with_own[i] = passages
        return with_own

    def _votes(self, config: SearchConfig, q: Question) -> bool:
        """Whether the answer is the option that the passages' scores elect; the released long form has no votes."""
        return (
            self.config.closed_set
            and bool(q.options)
            and (config.scorer == "paper" or config.max_depth == 1)
        )

    def _answer_or_why_not(
        self, search: BeamSearch, q: Question, outcome: Search, notices: list[str]
    ) -> Answer:
        try:
            return self._answer(search, q, outcome, notices)
        except Exception as e:
            return _failed(q, e)

    def _answer(
        self, search: BeamSearch, q: Question, outcome: Search, notices: list[str]
    ) -> Answer:
        votes = self._votes(search.config, q)
        best = (votes and _vote(search, outcome, q)) or outcome.best()
        best, path, text = search.told(outcome, best, q.task, votes)
        whole = outcome.path(best)
        passages, citations = cite(
            [n if search.text(n.tokens) else replace(n, passage=None) for n in path]
        )
        return Answer(
            id=q.id,
            question=q.question,
            answer=text,
            segments=tuple(_segment(search, n) for n in path),
            citations=tuple(citations),
            passages=tuple(passages),
            retrieved=any(n.action == "retrieve" for n in whole),
            p_retrieve=whole[0].p_retrieve,
            score=best.rank(search.config.accumulate),
            tree=tuple(_tree_node(search, n, path) for n in outcome.nodes),
            notices=(*notices, *dict.fromkeys(outcome.notices), *_doubts(path, citations)),
            task=q.task,
        )
