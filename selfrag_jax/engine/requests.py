"""What a search asks the engine for.

A search is a generator: it yields a request, and is sent the result.

    ReadTokens       tokens into prefixes           -> Retrieve distributions, log-probabilities
    FindPassages     texts of the segments so far   -> passages of each query
    Generate         branches on the prefixes       -> their segments
    KeepBranches     branches as the new prefixes   -> None
    SegmentsFinal    segments that cannot change    -> None; passed on to the caller

A question has one slot with `beam_width` prefixes; a beam is named by its index in the slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class ReadTokens:
    """Reads tokens of each beam after the prefix of its parent beam."""

    tokens: Sequence[Sequence[int]]
    start: Sequence[int]  # position of each beam's first token
    parents: Sequence[int] | None = None  # None: after nothing


@dataclass(frozen=True)
class FindPassages:
    """Looks for passages, for each beam that retrieves."""

    previous: Sequence[list[str]]  # for each beam that retrieves, the texts of its segments so far


@dataclass(frozen=True)
class Generate:
    """Generates branches of each beam, given the tokens to feed them; a beam may have none."""

    branches: Sequence[Sequence[Sequence[int]]]  # [beam][passage][token]
    start: Sequence[int]  # position of each beam's first token
    limit: int  # maximum number of tokens to generate
    keys: np.ndarray | None = None  # [beams, num_passages, 2] uint32, for sampling


@dataclass(frozen=True)
class KeepBranches:
    """Beam i continues beam parents[i] with branch branches[i]; [beam_width] each.

    A branch's index in the slot is beam * num_passages + passage.
    """

    parents: Sequence[int]
    branches: Sequence[int]


@dataclass(frozen=True)
class SegmentsFinal:
    """Segments that no later step can change; passed on to the caller."""

    segments: Any
