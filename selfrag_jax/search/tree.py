"""The tree of segments that a search builds, and the beams that end in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from selfrag_jax.engine.segments import GeneratedSegments
from selfrag_jax.records import Passage


@dataclass(frozen=True)
class Node:
    """A segment, with what the model said about it."""

    id: int
    parent: int  # -1 for a first segment
    depth: int
    action: str  # "retrieve", "continue" or "no_retrieval": the Retrieve token that was fed
    p_retrieve: float
    retrieve: tuple[float, ...]  # the distribution that decided, in the order of RETRIEVE
    passage: Passage | None
    tokens: tuple[int, ...]  # generated ones, reflection tokens included
    num_tokens: int  # that were generated; the released search rewrites some of them
    p_segment: float
    isrel: tuple[float, ...]
    issup: tuple[float, ...]
    isuse: tuple[float, ...]
    score: float  # f of this segment
    total: float  # sum or product over the path
    allowed: bool  # by the hard constraints
    fed_position: int  # of the Retrieve token that was fed; 0 if the search does not use it
    finished: bool  # the answer ends with it
    complete: bool  # False if the length limit cut it


@dataclass(frozen=True)
class SearchNotice:
    """What a search has to say about itself, or about one segment, which may not be in the answer.

    A segment is told by the id of the one before it (-1: there is none) and by its passage.
    """

    text: str
    parent: int | None  # None: about the search
    passage: Passage | None

    def is_about(self, node: Node) -> bool:
        return node.parent == self.parent and node.passage == self.passage


@dataclass
class Beam:
    """A path in the tree, ending in `node` (None: before the first segment)."""

    node: Node | None
    retrieve: np.ndarray  # [3] distribution before its next segment
    next_position: int
    beam_index: int = -1  # of its prefix in the question's slot
    full: bool = False  # the model's context has no room for another segment

    @property
    def finished(self) -> bool:
        return self.full or (self.node is not None and self.node.finished)

    def score(self, accumulate: str) -> float:
        """What paths are compared by: the sum, mean or product of their segments' scores."""
        node = self.last_node
        return node.total / (node.depth + 1 if accumulate == "mean" else 1)

    @property
    def last_node(self) -> Node:
        """`node` of a beam that has one. Raises ValueError before the first segment."""
        if self.node is None:
            raise ValueError("this beam has no segment yet")
        return self.node


@dataclass
class SearchTree:
    """The state of one question's search, and its outcome."""

    beams: list[Beam]  # best first
    nodes: list[Node] = field(default_factory=list)
    notices: list[SearchNotice] = field(default_factory=list)
    num_final: int = 0  # segments that all beams share, which nothing can change any more
    num_tokens: int = 0  # generated in all, kept or not

    def add(self, parent: Node | None, segment: GeneratedSegments, **fields: Any) -> Node:
        """Adds a branch's segment as a child of `parent`.

        `fields` supplies or overrides Node attributes.
        """
        values: dict[str, Any] = dict(
            id=len(self.nodes),
            parent=parent.id if parent else -1,
            depth=parent.depth + 1 if parent else 0,
            tokens=segment.token_ids(),
            num_tokens=int(segment.length),
            p_segment=segment.mean_probability(),
            finished=bool(segment.finished),
            complete=bool(segment.complete),
        )
        groups = dict(isrel=segment.isrel, issup=segment.issup, isuse=segment.isuse)
        values |= groups | fields
        for name in (*groups, "retrieve"):
            values[name] = tuple(map(float, values[name]))
        values["tokens"] = tuple(values["tokens"])
        node = Node(**values)
        self.nodes.append(node)
        self.num_tokens += node.num_tokens
        return node

    def notice(self, text: str) -> None:
        """Adds a notice about the search."""
        self.notices.append(SearchNotice(text, None, None))

    def notice_segment(self, text: str, before: Node | None, passage: Passage | None) -> None:
        """Adds a notice about the segment that follows `before` and was given a passage."""
        self.notices.append(SearchNotice(text, before.id if before else -1, passage))

    def notices_of(self, node: Node) -> list[str]:
        """The notices about one segment."""
        return list(dict.fromkeys(n.text for n in self.notices if n.is_about(node)))

    def best(self) -> Beam:
        return self.beams[0]

    def path(self, beam: Beam) -> list[Node]:
        """The nodes from the first segment to the beam's last."""
        path, node = [], beam.node
        while node is not None:
            path.append(node)
            node = self.nodes[node.parent] if node.parent >= 0 else None
        return path[::-1]

    def newly_final(self) -> list[Node]:
        """The segments that have become final since the last call."""
        paths = [self.path(b) for b in self.beams]
        shared = 0
        while all(len(p) > shared and p[shared] is paths[0][shared] for p in paths):
            shared += 1
        new = paths[0][self.num_final : shared]
        self.num_final = max(self.num_final, shared)
        return new

    def vote_winner(self, groups: Sequence[Sequence[Node]]) -> Beam | None:
        """The best node of the group whose scores sum highest (closed-set voting).

        None without groups; no group may be empty.
        """
        if not groups:
            return None
        winner = max(groups, key=lambda nodes: sum(n.score for n in nodes))
        return Beam(max(winner, key=lambda n: n.score), self.beams[0].retrieve, 0)
