"""Segment-level beam search (paper, Section 3.3, Algorithm 1).

A step extends every live beam of a question by one segment. The beam's Retrieve distribution
decides between retrieving (one branch for each passage), continuing with the evidence at hand, and
no retrieval (one branch each). All branches are generated together on the prefix that they share;
the best `beam_width` candidates stay. Finished beams stay too, and compete with the others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np

from selfrag_jax.engine.requests import (
    FindPassages,
    Generate,
    KeepBranches,
    ReadTokens,
    SegmentsFinal,
)
from selfrag_jax.engine.segments import GeneratedSegments
from selfrag_jax.records import Passage, Question
from selfrag_jax.search import scoring
from selfrag_jax.search.search import Requests, SegmentSearch
from selfrag_jax.search.tree import Beam, Node, SearchTree
from selfrag_jax.text import reflection


@dataclass
class _Extension:
    """A live beam and its next segments: one branch for each passage, or one without."""

    beam: Beam
    action: str  # "retrieve", "continue" or "no_retrieval"
    p_retrieve: float
    passages: list[Passage | None]


@dataclass
class _Candidate:
    """A beam that may stay. parent, branch: which prefix and branch it continues; 0 if finished."""

    beam: Beam
    parent: int = 0
    branch: int = 0


class PaperSearch(SegmentSearch):
    """The paper's Algorithm 1."""

    def search(self, prompt: list[int], seed_text: str) -> Requests:
        c = self.config
        distributions, _ = yield ReadTokens([prompt], [0])
        tree = SearchTree([Beam(None, distributions[0], len(prompt), beam_index=0)])
        for depth in range(c.max_depth):
            is_last = depth + 1 == c.max_depth
            # 1. Retrieve, continue or neither, for each beam.
            extensions = [self._extension(b) for b in tree.beams if not b.finished]
            if not extensions:
                break
            yield from self._find_passages(tree, extensions)

            # 2. Generate all branches, and score them.
            segments = yield self._branches(tree, extensions, seed_text)
            candidates = [_Candidate(b) for b in tree.beams if b.finished]
            for e in extensions:
                for i, passage in enumerate(e.passages):
                    candidates.append(self._candidate(tree, e, i, passage, segments, is_last))

            # 3. Keep the best.
            kept = self._keep_best(tree, candidates)
            if is_last or all(b.finished for b in tree.beams):
                break
            if final := tree.newly_final():
                yield SegmentsFinal(final)
            yield self._next_prefixes(tree, kept)
        return tree

    # ---- 1. retrieve, continue or neither --------------------------------------------------------
    def _extension(self, beam: Beam) -> _Extension:
        action, p = self._action(beam), self._p_retrieve(beam)
        return _Extension(beam, action, p, [None])

    def _p_retrieve(self, beam: Beam) -> float:
        return float(scoring.p_retrieve(beam.retrieve, self.config.normalise))

    def _action(self, beam: Beam) -> str:
        """What precedes the beam's next segment."""
        c, p = self.config, beam.retrieve
        has_evidence = c.keep_passages and beam.node and beam.node.action != "no_retrieval"
        if c.mode == "no_retrieval":
            return "no_retrieval"
        if c.mode == "always_retrieve":
            return "retrieve"
        most_likely = reflection.RETRIEVE[p.argmax()]
        if has_evidence and most_likely == reflection.CONTINUE:
            return "continue"
        if c.threshold is None:
            return "retrieve" if most_likely == reflection.RETRIEVAL else "no_retrieval"
        return "retrieve" if self._p_retrieve(beam) > c.threshold else "no_retrieval"

    def _find_passages(
        self, tree: SearchTree, extensions: list[_Extension]
    ) -> Generator[Any, Any, None]:
        """Fills in the passages of the beams that retrieve."""
        retrieving = [e for e in extensions if e.action == "retrieve"]
        if not retrieving:
            return
        previous = [[self.text(n.tokens) for n in tree.path(e.beam)] for e in retrieving]
        for e, found in zip(retrieving, (yield FindPassages(previous)), strict=True):
            if found:
                e.passages = list(found[: self.config.ndocs])
            else:
                notice = "no passage was found; answered without one"
                tree.notice_segment(notice, e.beam.node, None)
                e.action = "no_retrieval"

    # ---- 2. generate and score -------------------------------------------------------------------
    def _branches(self, tree: SearchTree, extensions: list[_Extension], seed_text: str) -> Generate:
        only_first = all(e.beam.beam_index == 0 for e in extensions)
        num_beams = 1 if only_first else self.num_beams  # two shapes only
        branches: list[list[list[int]]] = [[] for _ in range(num_beams)]
        start = [0] * num_beams
        keys = np.zeros((num_beams, self.config.num_branches, 2), np.uint32)
        for e in extensions:
            i, position = e.beam.beam_index, e.beam.next_position
            branches[i] = [self._branch_input(tree, e, p, position) for p in e.passages]
            start[i] = position
            if self.config.temperature:
                node = e.beam.node.id if e.beam.node else -1
                for j in range(len(e.passages)):
                    keys[i, j] = _random_key(self.config.seed, seed_text, node, j)
        return Generate(branches, start, self.config.max_new_tokens, keys)

    def _branch_input(
        self, tree: SearchTree, e: _Extension, passage: Passage | None, position: int
    ) -> list[int]:
        """The tokens that a branch is fed: a Retrieve token, and its passage."""
        if passage is not None:
            return self.passage_input(tree, e.beam.node, passage, position)
        token = reflection.CONTINUE if e.action == "continue" else reflection.NO_RETRIEVAL
        return [self.retrieve_id[token]]

    def _candidate(
        self,
        tree: SearchTree,
        e: _Extension,
        i: int,
        passage: Passage | None,
        segments: GeneratedSegments,
        is_last: bool,
    ) -> _Candidate:
        """Branch i of an extension. segments: of the slot, [W, P]."""
        parent = e.beam.beam_index
        segment = segments.at((parent, i))
        node = self._node(tree, e, passage, segment)
        if self.config.keep_passages:
            position = int(segment.next_position)
        else:
            position = node.fed_position + len(self._without_passage(node))
        beam = Beam(node, np.asarray(segment.retrieve), position)
        beam.full = not node.finished and not is_last and self.is_full(tree, node, position)
        return _Candidate(beam, parent, parent * self.config.num_branches + i)

    def _node(
        self, tree: SearchTree, e: _Extension, passage: Passage | None, segment: GeneratedSegments
    ) -> Node:
        parent, isrel = e.beam.node, np.asarray(segment.isrel)
        if e.action == "continue" and parent is not None:
            # The same evidence, which was judged when it was retrieved.
            passage, isrel = parent.passage, np.asarray(parent.isrel)
        score = scoring.finite(
            scoring.segment_score(
                segment.mean_probability(),
                isrel,
                segment.issup,
                segment.isuse,
                float(passage is not None),
                self.config.weights,
            )
        )
        return tree.add(
            parent,
            segment,
            action=e.action,
            p_retrieve=e.p_retrieve,
            retrieve=e.beam.retrieve,
            passage=passage,
            isrel=isrel,
            score=score,
            total=self._total(parent, score),
            allowed=not self.refused & {*segment.token_ids()},
            fed_position=e.beam.next_position,
        )

    def _total(self, parent: Node | None, score: float) -> float:
        if self.config.accumulate == "product":  # two bad segments do not make a good one
            return max(score, 0.0) * (1.0 if parent is None else parent.total)
        return score if parent is None else parent.total + score

    # ---- 3. keep the best ------------------------------------------------------------------------
    def _keep_best(self, tree: SearchTree, candidates: list[_Candidate]) -> list[_Candidate]:
        """Makes the best candidates the tree's beams; ties go to the earlier one."""
        allowed = [c for c in candidates if c.beam.last_node.allowed]
        if not allowed:
            tree.notice("every segment was refused by the constraints; the best of them are kept")
        accumulate = self.config.accumulate
        ranked = sorted(allowed or candidates, key=lambda c: -c.beam.score(accumulate))
        kept = ranked[: self.config.beam_width]
        tree.beams = [c.beam for c in kept]
        for i, beam in enumerate(tree.beams):
            beam.beam_index = i
        return kept

    def _next_prefixes(self, tree: SearchTree, kept: list[_Candidate]) -> Any:
        """The request that turns the kept branches into the new prefixes."""
        unused = [0] * (self.config.beam_width - len(kept))
        parents = [c.parent for c in kept] + unused
        if self.config.keep_passages:
            return KeepBranches(parents, [c.branch for c in kept] + unused)
        # Without its passage, a segment has to be read again.
        tokens: list[list[int]] = [[] for _ in parents]
        start = [0] * len(parents)
        for beam in tree.beams:
            if not beam.finished:
                tokens[beam.beam_index] = self._without_passage(beam.last_node)
                start[beam.beam_index] = beam.last_node.fed_position
        return ReadTokens(tokens, start, parents)

    def _without_passage(self, node: Node) -> list[int]:
        """What later segments see of a segment whose passage is dropped."""
        if node.action == "retrieve":
            return [*node.tokens]
        return [self.retrieve_id[reflection.NO_RETRIEVAL], *node.tokens]

    # ---- the answer ------------------------------------------------------------------------------
    def elect(self, tree: SearchTree, question: Question) -> Beam | None:
        first = [n for n in tree.nodes if n.depth == 0]
        votes: dict[str, list[Node]] = {bare_option(option): [] for option in question.options}
        for node in [n for n in first if n.allowed] or first:  # as the search keeps them
            option = bare_option(self.text(node.tokens))
            if option in votes:
                votes[option].append(node)
        return tree.vote_winner([nodes for nodes in votes.values() if nodes])

    def render(
        self, tree: SearchTree, beam: Beam, task: str, by_vote: bool
    ) -> tuple[Beam, list[Node], str]:
        path = tree.path(beam)
        texts = [self.text(n.tokens) for n in path]
        return beam, path, " ".join(t for t in texts if t)


def bare_option(option: str) -> str:
    """What answers and options are compared by in a vote."""
    return option.strip().rstrip(".").lower()


def _random_key(seed: int, seed_text: str, node: int, branch: int) -> np.ndarray:
    """[2] uint32: the same for a branch of a question's tree, whatever else is generated."""
    text = f"{seed}/{node}/{branch}/{seed_text}".encode("utf-8", "surrogatepass")
    return np.frombuffer(hashlib.sha256(text).digest()[:8], "<u4")
