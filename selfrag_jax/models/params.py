"""Parameters as a nested dict of arrays: their paths and leaves. The layers of a stack share one array with a leading axis."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

Params = Any
Path = tuple[str, ...]


def leaves(tree: Params, at: Path = ()) -> Iterator[tuple[Path, Any]]:
    """(path, leaf) of a nested dict, in a fixed order."""
    for key in sorted(tree):
        if isinstance(tree[key], dict):
            yield from leaves(tree[key], (*at, key))
        else:
            yield (*at, key), tree[key]


def at(tree: Params, path: Path) -> Any:
    """The leaf at a path."""
    for key in path:
        tree = tree[key]
    return tree


def build(pairs: Iterable[tuple[Path, Any]]) -> Params:
    """The inverse of `leaves`."""
    out: Params = {}
    for path, leaf in pairs:
        node = out
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return out


def count(params: Params) -> int:
    return sum(int(leaf.size) for _, leaf in leaves(params))
