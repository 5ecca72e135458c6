"""Voting."""

from __future__ import annotations

from selfrag_jax.records import Question
from selfrag_jax.search.paper import BeamSearch
from selfrag_jax.search.tree import Beam, Node, Search


def _vote(search: BeamSearch, outcome: Search, q: Question) -> Beam | None:
    """Closed-set voting (paper, Section 3.3): the option whose passages' scores sum highest, and its best node.

    None when no passage led to an option. The released script takes every text for an option of its own.
    """
    if search.config.scorer == "released":
        said: dict[str, list[Node]] = {}
        for node in (n for n in outcome.nodes if n.action == "retrieve" and n.depth == 0):
            said.setdefault(search.option(node.tokens), []).append(node)
        return _most_voted(outcome, list(said.values()))
    bare = lambda text: text.strip().rstrip(".").lower()  # noqa: E731
    said = {bare(option): [] for option in q.options}
    first = [n for n in outcome.nodes if n.depth == 0]
    for node in [n for n in first if n.allowed] or first:  # as the search keeps them
        option = bare(search.text(node.tokens))
        if option in said:
            said[option].append(node)
    return _most_voted(outcome, [nodes for nodes in said.values() if nodes])


def _most_voted(outcome: Search, voted: list[list[Node]]) -> Beam | None:
    """voted: the nodes of each option."""
    if not voted:
        return None
    best = max(voted, key=lambda nodes: sum(n.score for n in nodes))
    return Beam(max(best, key=lambda n: n.score), outcome.beams[0].retrieve, 0)
