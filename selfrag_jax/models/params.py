"""Parameters as a nested dict of arrays, addressed by path.

The layers of a model are stacked: each of their parameters is one array with a leading layer axis.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")

Params = Any  # a nested dict; its leaves are arrays of jax or numpy, shapes, or shardings
Path = tuple[str, ...]


def flatten(tree: Params, prefix: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yields (path, leaf) for each leaf, ordered by path."""
    for key in sorted(tree):
        if isinstance(tree[key], dict):
            yield from flatten(tree[key], (*prefix, key))
        else:
            yield (*prefix, key), tree[key]


def leaf_at(tree: Params, path: Path) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def unflatten(pairs: Iterable[tuple[Path, Any]]) -> Params:
    """The inverse of `flatten`."""
    out: Params = {}
    for path, leaf in pairs:
        node = out
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return out


def count_parameters(params: Params) -> int:
    return sum(int(leaf.size) for _, leaf in flatten(params))
