"""The tree of segments that a search builds, and the beams that end in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from selfrag_jax.engine.segments import Segment
from selfrag_jax.records import Passage


@dataclass(frozen=True)
class Node:
    """One segment in the search tree of a question, with what the model said about it."""

    id: int
    parent: int  # -1 for a first segment
    depth: int
    action: str  # the Retrieve token that was fed: "retrieve", "continue" or "no_retrieval"
    p_retrieve: float
    passage: Passage | None
    tokens: tuple[int, ...]  # generated, reflection tokens included
    p_segment: float
    isrel: tuple[float, ...]
    issup: tuple[float, ...]
    isuse: tuple[float, ...]
    score: float  # f of this segment
    total: float  # sum or product over the path
    allowed: bool  # by the hard constraints
    start: int  # position of its first token, the Retrieve token
    finished: bool
    complete: bool  # False where the length limit cut the segment


@dataclass
class Beam:
    """A path in the tree. `row` is its lane in the question's slot."""

    node: Node | None
    retrieve: np.ndarray  # [3] distribution before its next segment
    next_position: int
    row: int = -1
    full: bool = False  # the model's context has no room for another segment

    def rank(self, accumulate: str) -> float:
        """What paths are compared by."""
        return self.node.total / (self.node.depth + 1 if accumulate == "mean" else 1)

    @property
    def finished(self) -> bool:
        return self.full or (self.node is not None and self.node.finished)


@dataclass
class Search:
    """The state of one question's search and its outcome."""

    beams: list[Beam]
    nodes: list[Node] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    settled: int = 0  # segments that all beams share, so that nothing changes them any more

    def add(self, parent: Node | None, out: Segment, **fields: Any) -> Node:
        """A node below `parent` of the segment of one branch. fields: those of Node that the segment does not tell, or tells otherwise."""
        told = dict(
            tokens=out.said(),
            p_segment=out.mean_probability(),
            finished=bool(out.finished),
            complete=bool(out.complete),
        )
        told |= dict(isrel=out.isrel, issup=out.issup, isuse=out.isuse) | fields
        told |= {name: tuple(map(float, told[name])) for name in ("isrel", "issup", "isuse")} | {
            "tokens": tuple(told["tokens"])
        }
        node = Node(
            id=len(self.nodes),
            parent=parent.id if parent else -1,
            depth=parent.depth + 1 if parent else 0,
            **told,
        )
        self.nodes.append(node)
        return node

    def settle(self) -> list[Node]:
        """The segments that have settled since the last call."""
        paths = [self.path(b) for b in self.beams]
        common = 0
        while all(len(p) > common and p[common] is paths[0][common] for p in paths):
            common += 1
        new, self.settled = paths[0][self.settled : common], max(self.settled, common)
        return new

    def path(self, beam: Beam) -> list[Node]:
        """The nodes from the first segment to the beam's last."""
        out, node = [], beam.node
        while node is not None:
            out.append(node)
            node = self.nodes[node.parent] if node.parent >= 0 else None
        return out[::-1]

    def best(self) -> Beam:
        return self.beams[0]  # kept in order
