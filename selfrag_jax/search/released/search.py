"""The released scripts' search. The package's docstring lists what it does differently."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from selfrag_jax.engine.requests import FindPassages, Generate, ReadTokens
from selfrag_jax.engine.segments import GeneratedSegments
from selfrag_jax.engine.shapes import Shapes
from selfrag_jax.errors import UserError
from selfrag_jax.models.llama import Model
from selfrag_jax.models.params import Params
from selfrag_jax.records import Passage, Question
from selfrag_jax.search import scoring
from selfrag_jax.search.config import SearchConfig
from selfrag_jax.search.released import scores
from selfrag_jax.search.released.rules import ReleasedRules
from selfrag_jax.search.released.text import ScriptText
from selfrag_jax.search.search import Requests, SegmentSearch
from selfrag_jax.search.tree import Beam, Node, SearchTree
from selfrag_jax.text import reflection
from selfrag_jax.text.tokenizer import Tokenizer

# How many most likely tokens the scripts ask vLLM for the log-probabilities of.
NUM_KNOWN_SHORT, NUM_KNOWN_LONG = 5_000, 32_000
GATE_TOKENS = 25  # that the long form looks through for [Retrieval]
CITED_TASKS = ("asqa", "eli5")  # the long form puts citation marks into their answers


@dataclass
class _OpenNode:
    """A node that may be extended. node: None for the root."""

    node: Node | None
    history: list[int]  # the tokens before its own text
    text: list[int]
    says_retrieval: bool
    total: float = 1.0  # product of the scores up to here


@dataclass
class _ReleasedTree(SearchTree):
    in_prefix: list[int] = field(default_factory=list)  # the tokens in the question's prefix


class ReleasedSearch(SegmentSearch):
    """The search of the authors' scripts: the short form for max_depth=1, else the long form."""

    def __init__(
        self,
        model: Model,
        params: Params,
        tokenizer: Tokenizer,
        config: SearchConfig,
        max_length: int,
    ):
        super().__init__(model, params, tokenizer, config, max_length)
        _check(config)
        self.is_long_form = config.max_depth > 1
        self.script_text = ScriptText(tokenizer)
        self.retrieval = self.retrieve_id[reflection.RETRIEVAL]
        self.no_retrieval = self.retrieve_id[reflection.NO_RETRIEVAL]

    @classmethod
    def configure(
        cls, base: SearchConfig, changes: dict[str, Any], weights: dict[str, Any]
    ) -> SearchConfig:
        if "scorer" in changes:  # asked for in this call: comes with the scripts' own defaults
            changes = {"accumulate": "sum"} | changes
            if changes.get("max_depth", base.max_depth) == 1:
                weights = {"w_use": 1.0} | weights
        if changes.get("keep_passages"):
            raise UserError(
                "--keep_passages: the released scripts keep no passage of an earlier segment; "
                "use --scorer=paper"
            )
        return super().configure(base, changes, weights)

    @property
    def rules(self) -> ReleasedRules:
        known = NUM_KNOWN_LONG if self.is_long_form else NUM_KNOWN_SHORT
        return ReleasedRules(
            self.tokenizer.eos_id, self.tokenizer.pad_id, self.reflection, num_known=known
        )

    @property
    def num_beams(self) -> int:
        return 1  # open nodes are extended one after the other

    def shapes(self, num_slots: int, longest_prompt: int) -> Shapes:
        shapes = super().shapes(num_slots, longest_prompt)
        if self.is_long_form:  # its gate generates too
            shapes = replace(shapes, max_new_tokens=max(shapes.max_new_tokens, GATE_TOKENS))
        return shapes

    @property
    def can_vote(self) -> bool:
        return not self.is_long_form

    # ---- the search of one question --------------------------------------------------------------
    def search(self, prompt: list[int], seed_text: str) -> Requests:
        """Searches one question. No segment is final before the end.

        Every history but the prompt is read from its beginning: none extends the previous one.
        """
        distributions, all_log_probs = yield ReadTokens([prompt], [0])
        p, log_probs = distributions[0], all_log_probs[0]
        tree = _ReleasedTree([Beam(None, p, len(prompt))], in_prefix=prompt)
        if self.is_long_form and self.config.weights != scoring.Weights():
            tree.notice("the released long form scores without weights: yours have no effect")
        passages: list[Passage] = []
        if (yield from self._gate(tree, prompt, p, log_probs)):
            [passages] = yield FindPassages([[]])
            if not passages:
                tree.notice("no passage was found; answered without one")
        if not passages:
            yield from self._answer_without_passage(tree, prompt)
            return tree
        level = [_OpenNode(None, prompt, [], True)]
        for _ in range(self.config.max_depth - 1 if self.is_long_form else 1):
            open_nodes = [
                o
                for o in level
                if o.says_retrieval and not self.is_full(tree, o.node, len(o.history) + len(o.text))
            ]
            if not open_nodes:
                break
            level = yield from self._extend(tree, open_nodes, passages[: self.config.ndocs])
            if level:  # the deepest level so far
                tree.beams = [Beam(o.node, p, 0) for o in level]
        return tree

    def _gate(
        self, tree: _ReleasedTree, prompt: list[int], p: np.ndarray, log_probs: np.ndarray
    ) -> Generator[Any, Any, bool]:
        """Whether to retrieve. p, log_probs: [3] of the Retrieve tokens after the prompt."""
        c = self.config
        if c.mode != "adaptive_retrieval":
            return c.mode == "always_retrieve"
        assert c.threshold is not None  # see _check
        if not self.is_long_form:
            return scores.released_gate(log_probs.astype(np.float64)) > c.threshold
        [segment] = yield from self._generate(tree, prompt, [[]], GATE_TOKENS)
        tree.num_tokens += int(segment.length)
        looked_at = self.script_text.up_to_blank_line(segment.token_ids())
        says_retrieval = self.retrieval in looked_at
        return says_retrieval and scoring.p_retrieve(p, "yes_no") > c.threshold

    def _answer_without_passage(
        self, tree: _ReleasedTree, prompt: list[int]
    ) -> Generator[Any, Any, None]:
        limit = self.config.max_new_tokens
        [segment] = yield from self._generate(tree, prompt, [[self.no_retrieval]], limit)
        tokens = segment.token_ids()
        if self.is_long_form:
            tokens = self.script_text.up_to_blank_line(tokens)
        node = self._add(tree, None, "no_retrieval", None, tokens, segment, 0.0, 0.0)
        tree.beams = [Beam(node, tree.beams[0].retrieve, 0)]

    def _extend(
        self, tree: _ReleasedTree, open_nodes: list[_OpenNode], passages: list[Passage]
    ) -> Generator[Any, Any, list[_OpenNode]]:
        """The best children of the open nodes, one for each passage."""
        children = []
        for o in open_nodes:
            prefix = o.history + o.text
            branches = [self.passage_input(tree, o.node, p, len(prefix)) for p in passages]
            segments = yield from self._generate(tree, prefix, branches, self.config.max_new_tokens)
            previous = o.text
            for passage, segment in zip(passages, segments, strict=True):
                node, text = self._child(tree, o, passage, segment)
                says_retrieval = self.retrieval in self._remapped(segment)
                history = o.history + previous
                children.append(_OpenNode(node, history, text, says_retrieval, node.total))
                previous = text  # in the next sibling's history
        ranked = sorted(children, key=lambda o: -o.total)
        return ranked[: self.config.beam_width] if self.is_long_form else ranked

    def _child(
        self, tree: SearchTree, o: _OpenNode, passage: Passage, segment: GeneratedSegments
    ) -> tuple[Node, list[int]]:
        """The node of a branch, and its text as later segments see it."""
        if self.is_long_form:
            tokens = self._remapped(segment)
            if self.retrieval in tokens:
                tokens = tokens[: tokens.index(self.retrieval)]
            score = scores.released_score_long(segment.extras.rel_log_probs, segment.issup)
        else:
            tokens = segment.token_ids()
            score = scores.released_score(
                segment.mean_probability(),
                segment.isrel,
                segment.issup,
                segment.isuse,
                self.config.weights,
            )
        score = scoring.finite(score)
        total = score if o.node is None else o.total * score
        node = self._add(tree, o.node, "retrieve", passage, tokens, segment, score, total)
        return node, [t for t in tokens if t != self.tokenizer.eos_id]

    def _remapped(self, segment: GeneratedSegments) -> list[int]:
        """The long form decides again at every [No Retrieval], and appends one if there was any."""
        tokens = segment.token_ids()
        positions = [i for i, t in enumerate(tokens) if t == self.no_retrieval]
        if not positions:
            return tokens
        threshold = self.config.threshold or 0.0
        for i in positions:
            no, yes, again = segment.extras.retrieve_at[i]
            # The script compares the result of the comparison once more.
            if float((yes + again) / (yes + no) > threshold) > threshold:
                tokens[i] = self.retrieval
        return [t for t in tokens if t != self.tokenizer.eos_id] + [self.no_retrieval]

    def _generate(
        self, tree: _ReleasedTree, history: list[int], branches: list[list[int]], limit: int
    ) -> Generator[Any, Any, list[GeneratedSegments]]:
        """The segment of each branch on a history, which is read unless it is in the prefix."""
        is_read = tree.in_prefix == history and all(branches)
        # Otherwise the history's last token is fed to each branch, so that none is empty.
        lead = [] if is_read else history[-1:]
        prefix = history[: len(history) - len(lead)]
        if tree.in_prefix != prefix:
            yield ReadTokens([prefix], [0])
            tree.in_prefix = prefix
        segments = yield Generate([[[*lead, *b] for b in branches]], [len(prefix)], limit)
        return [segments.at((0, i)) for i in range(len(branches))]

    def _add(
        self,
        tree: SearchTree,
        parent: Node | None,
        action: str,
        passage: Passage | None,
        tokens: Sequence[int],
        segment: GeneratedSegments,
        score: float,
        total: float,
    ) -> Node:
        return tree.add(
            parent,
            segment,
            tokens=tokens,
            action=action,
            p_retrieve=float(scoring.p_retrieve(tree.beams[0].retrieve, self.config.normalise)),
            retrieve=tree.beams[0].retrieve,
            passage=passage,
            score=score,
            total=total,
            allowed=True,
            fed_position=0,
        )

    # ---- the answer ------------------------------------------------------------------------------
    def elect(self, tree: SearchTree, question: Question) -> Beam | None:
        """Each distinct text counts as an option, as in the script."""
        votes: dict[str, list[Node]] = {}
        for node in tree.nodes:
            if node.action == "retrieve" and node.depth == 0:
                votes.setdefault(self.script_text.option(node.tokens), []).append(node)
        return tree.vote_winner(list(votes.values()))

    def render(
        self, tree: SearchTree, beam: Beam, task: str, by_vote: bool
    ) -> tuple[Beam, list[Node], str]:
        path, script = tree.path(beam), self.script_text
        first = path[0]
        if not self.is_long_form:
            if by_vote or first.action == "no_retrieval":
                return beam, path, script.short_answer(first.tokens)
            text = script.short_answer_from_passage(first.tokens, self.text(first.tokens))
            return beam, path, text
        if first.action == "no_retrieval":
            return beam, path, script.first_paragraph(first.tokens)
        path = self._not_refused(path)
        if task not in CITED_TASKS:
            return beam, path, script.joined(path)
        # With two segments without text, the space between them is text enough for the script.
        has_text = len(path) > 1 or any(script.cleaned(n.tokens) for n in path)
        if not has_text and len(tree.beams) > 1:
            beam = tree.beams[1]
            path = self._not_refused(tree.path(beam))
        return beam, *script.with_marks(path)

    def _not_refused(self, path: Sequence[Node]) -> list[Node]:
        return [n for n in path if not self.refused & {*n.tokens}]


def _check(config: SearchConfig) -> None:
    """Raises UserError for settings that the scripts do not have."""
    is_long_form = config.max_depth > 1
    if config.constraints and (
        [*config.constraints] != [reflection.NO_SUPPORT] or not is_long_form
    ):
        raise UserError(
            "--constraints: the released scripts' searches have none, but "
            f"{reflection.NO_SUPPORT} in the long form; use --scorer=paper"
        )
    if config.mode == "adaptive_retrieval" and config.threshold is None:
        raise UserError(
            "--scorer=released needs a --threshold in adaptive mode: without one the short form's "
            "script fails and the long form's does not retrieve (--mode=no_retrieval)"
        )
    if config.accumulate != "sum":
        raise UserError(
            f"--accumulate={config.accumulate}: the released scripts multiply, whatever is asked; "
            "use --scorer=paper"
        )
    if config.temperature:
        raise UserError(
            "--temperature: the released scripts take the most likely token; use --scorer=paper"
        )
