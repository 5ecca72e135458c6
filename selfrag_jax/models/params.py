"""Parameters as a nested dict of arrays: their paths and leaves. The layers of a stack share one array with a leading axis."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")

Params = Any
Path = tuple[str, ...]


def flatten(tree: Params, leaf_at: Path = ()) -> Iterator[tuple[Path, Any]]:
    """(path, leaf) of a nested dict, in a fixed order."""
    for key in sorted(tree):
        if isinstance(tree[key], dict):
            yield from flatten(tree[key], (*leaf_at, key))
        else:
            yield (*leaf_at, key), tree[key]


def leaf_at(tree: Params, path: Path) -> Any:
    """The leaf at a path."""
    for key in path:
        tree = tree[key]
    return tree


def unflatten(pairs: Iterable[tuple[Path, Any]]) -> Params:
    """The inverse of `leaves`."""
    out: Params = {}
    for path, leaf in pairs:
        node = out
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return out


def count_parameters(params: Params) -> int:
    return sum(int(leaf.size) for _, leaf in flatten(params))
