"""What every search has in common: its model, its limits on lengths, how it runs.

A search yields the requests of engine/requests.py. A subclass defines three methods:

    search    the search of one question, as a generator of requests
    elect     the beam that wins the passages' vote, for questions with options
    render    the segments and the text of the answer

Subclasses are PaperSearch (paper.py) and ReleasedSearch (released/); algorithms.py lists them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any

from selfrag_jax.engine.engine import Engine, place_params, run_searches
from selfrag_jax.engine.requests import SegmentsFinal
from selfrag_jax.engine.segments import TokenRules
from selfrag_jax.engine.shapes import Shapes
from selfrag_jax.errors import UserError
from selfrag_jax.models.llama import Model
from selfrag_jax.models.params import Params
from selfrag_jax.records import Passage, Question
from selfrag_jax.search.config import SearchConfig
from selfrag_jax.search.tree import Beam, Node, SearchTree
from selfrag_jax.text import prompts, reflection
from selfrag_jax.text.tokenizer import Control, Tokenizer

MIN_PASSAGE = 32  # tokens of the context that a passage needs; with less left, a path ends

# (question index, texts of the segments so far) for each query -> passages for each, best first
FindPassagesFn = Callable[[list[tuple[int, list[str]]]], Sequence[Sequence[Passage] | Exception]]
Requests = Generator[Any, Any, SearchTree]


class SegmentSearch(ABC):
    """A search over segments, for one model and one set of settings.

    Nothing goes beyond the model's context: passages are cut to what is left of it, and a path ends
    when there is no room for another segment; each with a notice. max_length: of a prompt and of a
    passage, in tokens. Raises UserError if there is no room for even a first segment.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        tokenizer: Tokenizer,
        config: SearchConfig,
        max_length: int,
    ):
        self.model, self.params = model, place_params(model, params)  # no-op if already placed
        self.tokenizer, self.config = tokenizer, config
        self.max_length, self.context = max_length, model.config.max_length
        if self.max_prompt < MIN_PASSAGE:
            limit = self.context - 2 * MIN_PASSAGE
            raise UserError(
                f"max_new_tokens={config.max_new_tokens} leaves no room for questions in the "
                f"model's context of {self.context} tokens; at most {limit} fits"
            )
        self.reflection = tokenizer.reflection_ids()
        self.retrieve_id = {t: tokenizer.id(t) for t in reflection.RETRIEVE}
        self.refused = {tokenizer.id(t) for t in config.constraints}

    # ---- what a subclass defines -----------------------------------------------------------------
    @abstractmethod
    def search(self, prompt: list[int], seed_text: str) -> Requests:
        """Searches one question. prompt: its tokens; seed_text: seeds the sampling."""

    @abstractmethod
    def elect(self, tree: SearchTree, question: Question) -> Beam | None:
        """The beam with the option that wins the passages' vote (paper, Section 3.3).

        None if no passage led to an option.
        """

    @abstractmethod
    def render(
        self, tree: SearchTree, beam: Beam, task: str, by_vote: bool
    ) -> tuple[Beam, list[Node], str]:
        """Returns the beam that answers, the segments to show, and the answer text.

        by_vote: whether the question was put to a vote (see elect).
        """

    @property
    def rules(self) -> TokenRules:
        """How generation ends, and where critiques are read."""
        return TokenRules(self.tokenizer.eos_id, self.tokenizer.pad_id, self.reflection)

    def shapes(self, num_slots: int, longest_prompt: int) -> Shapes:
        shapes = self.config.shapes(num_slots, longest_prompt)
        return replace(shapes, beam_width=self.num_beams)

    @property
    def num_beams(self) -> int:
        """Beams of a question that are live at once."""
        return self.config.num_beams

    @property
    def can_vote(self) -> bool:
        """Whether questions with options are decided by a vote."""
        return True

    @classmethod
    def configure(
        cls, base: SearchConfig, changes: dict[str, Any], weights: dict[str, Any]
    ) -> SearchConfig:
        """`base` with changes. Raises UserError for what this search cannot do."""
        return replace(base, weights=replace(base.weights, **weights), **changes)

    # ---- running searches ------------------------------------------------------------------------
    def run(
        self,
        prompt_ids: Sequence[list[int]],
        find_passages: FindPassagesFn,
        num_slots: int | None = None,
    ) -> list[SearchTree]:
        """Searches questions, `num_slots` (default: all) at once; raises what a search raises.

        prompt_ids: the tokens of each prompt, up to the response heading.
        """
        trees: dict[int, SearchTree] = {}
        for i, event in self.stream(prompt_ids, find_passages, num_slots or len(prompt_ids)):
            if isinstance(event, Exception):
                raise event
            if isinstance(event, SearchTree):
                trees[i] = event
        return [trees[i] for i in range(len(prompt_ids))]

    def stream(
        self,
        prompt_ids: Sequence[list[int]],
        find_passages: FindPassagesFn,
        num_slots: int,
        seed_texts: Sequence[str] | None = None,
        overlap: bool = False,
    ) -> Iterator[tuple[int, SegmentsFinal | SearchTree | Exception]]:
        """(index of the question, event) as they come: final segments, then the outcome.

        seed_texts: seed the sampling of each question (default: its index). overlap: see
        engine.run_searches.
        """
        if not prompt_ids:
            return
        seed_texts = seed_texts or [str(i) for i in range(len(prompt_ids))]
        shapes = self.shapes(num_slots, max(map(len, prompt_ids)))
        engine = Engine(self.model, self.params, self.rules, shapes, self.config.sampling)
        searches = ((i, self.search(list(p), seed_texts[i])) for i, p in enumerate(prompt_ids))
        yield from run_searches(engine, searches, find_passages, overlap)

    # ---- room in the model's context -------------------------------------------------------------
    @property
    def max_prompt(self) -> int:
        """Maximum number of tokens in a prompt."""
        room = self.context - self.config.max_new_tokens - MIN_PASSAGE
        return min(self.max_length, room)

    def is_full(self, tree: SearchTree, node: Node | None, position: int) -> bool:
        """Whether no other segment can follow a node, at a position; adds a notice if so."""
        if position <= self.context - self.config.max_new_tokens - MIN_PASSAGE:
            return False
        notice = f"the model's context of {self.context} tokens is full; the answer ended there"
        if node is None:
            tree.notice(notice)
        else:
            before = tree.nodes[node.parent] if node.parent >= 0 else None
            tree.notice_segment(notice, before, node.passage)
        return True

    def passage_input(
        self, tree: SearchTree, before: Node | None, passage: Passage, position: int
    ) -> list[int]:
        """The tokens that feed a retrieved passage to a branch, from a position on.

        Cut to what is allowed, with a notice. before: the segment before the branch.
        """
        ids = self.tokenizer.encode([Control(reflection.RETRIEVAL), *prompts.passage(passage)])
        limit = min(self.max_length, self.context - self.config.max_new_tokens - position)
        if len(ids) <= limit:
            return ids
        why = "" if limit == self.max_length else f": the model's context has {self.context}"
        notice = f"passage {passage.id} was cut from {len(ids)} to {limit} tokens{why}"
        tree.notice_segment(notice, before, passage)
        return [*ids[: limit - 1], ids[-1]]  # cut the text, keep </paragraph>

    # ---- tokens as text --------------------------------------------------------------------------
    def text(self, tokens: Sequence[int]) -> str:
        """The text of a segment, without control tokens."""
        control = {*self.reflection.all, self.tokenizer.eos_id, self.tokenizer.pad_id}
        return self.tokenizer.decode([t for t in tokens if t not in control]).strip()

    def critiques(self, tokens: Sequence[int]) -> list[str]:
        """The critique tokens in a segment, by name."""
        r = self.reflection
        critiques = {*r.isrel, *r.issup, *r.isuse}
        return [self.tokenizer.token(t) for t in tokens if t in critiques]
