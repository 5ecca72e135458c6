"""Plans an index before it is built: its structure, memory, disk and time, for a memory budget.

Three structures, from small corpora to large memory:

    exact   all vectors in memory as float32; every query is compared with all of them
    int8    ScaNN codes, and int8 vectors in memory that rescore the candidates
    codes   ScaNN codes; candidates are rescored exactly from the float vectors on disk

Codes are ScaNN's asymmetric hashing: 4 bits for each block of 2 dimensions, or of 4 where memory is
short. The constants below were measured (launch/benchmarks/README.md).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from selfrag_jax.config import setting
from selfrag_jax.errors import UserError

_LEAST_ROWS, _LEAST_PART = 1000, 500  # passages that codes are trained on
CODED_AT_ONCE = 4096  # vectors, on each thread
EXACT, INT8, CODES = "exact", "int8", "codes"
STRUCTURES = (EXACT, INT8, CODES)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}

# ---- measured: bytes ----
_PROCESS = 600e6  # Python with JAX and ScaNN, before an index is opened
_CODE_OVERHEAD = 40  # a vector, beside its code: its leaf, its row, and room to grow
_TRAINING_COPIES = 4  # of the sample as float32
_CODING = 13  # an element of the vectors that all threads are coding
# ---- measured: seconds on one core ----
_SECONDS_TRAINING = 3.0e-10  # a vector of the sample, dimension and leaf
_SECONDS_CODEBOOK = 1.3e-7  # a vector of the sample and dimension
_SECONDS_ADDING = 6e-8  # a vector and dimension
_SECONDS_EXACT = 1 / 40e9  # a multiplication and addition of exact search


@dataclass(frozen=True)
class IndexConfig:
    """Section `index` of a config."""

    structure: str = setting(
        "auto, exact, int8 or codes", choices=("auto", *STRUCTURES), default="auto"
    )
    memory: str = setting(
        "budget for the open index and for building it, like 8GB (default: half of what is free)",
        default="",
    )
    exact_below: int = 20_000  # passages; smaller corpora are searched exhaustively
    part_size: int = 4_000_000  # passages in a part at most
    leaves: int = 2000  # of a part at most; it has the square root of its passages, if fewer
    leaves_search_fraction: float = 0.05  # of a part's leaves that a query visits
    candidates: int = 200  # rescored for each query
    sample: int = 100_000  # vectors that train a part
    recall_queries: int = 200  # on which recall is measured
    seed: int = 0

    def __post_init__(self):
        if not 0 < self.leaves_search_fraction <= 1:
            raise UserError(
                f"leaves_search_fraction={self.leaves_search_fraction}: must be in (0, 1]"
            )
        if self.structure not in ("auto", *STRUCTURES):
            raise UserError(f"structure={self.structure!r}: must be auto, {', '.join(STRUCTURES)}")
        for name in ("part_size", "leaves", "candidates", "sample"):
            if getattr(self, name) < 1:
                raise UserError(f"index {name}={getattr(self, name)}: must be at least 1")
        if self.memory:
            parse_bytes(self.memory)


@dataclass(frozen=True)
class Plan:
    """What will be built. Sizes are in bytes, of the open index with its process."""

    structure: str
    rows: int
    dim: int
    dims_per_block: int  # 0 for exact
    parts: tuple[tuple[int, int], ...]  # first row, row after the last
    leaves: int  # of a part
    sample: int  # vectors that train a part
    resident: float
    building: float  # at its peak
    disk: float  # beside the vectors and passages, which are linked
    seconds: float  # on one core

    def describe(self) -> str:
        """One line for the screen."""
        what = {
            EXACT: "exact search of all vectors in memory",
            INT8: f"ScaNN codes of {self.dims_per_block} dimensions, int8 rescoring in memory",
            CODES: f"ScaNN codes of {self.dims_per_block} dimensions, exact rescoring from disk",
        }[self.structure]
        parts = f", {_count(len(self.parts), 'part')} of {self.leaves} leaves" if self.parts else ""
        return (
            f"plan: {self.rows:,} passages x {self.dim}: {what}{parts}; about "
            f"{show_bytes(self.resident)} in memory, {show_bytes(self.building)} while building, "
            f"{show_bytes(self.disk)} on disk beside the vectors, "
            f"{_minutes(self.seconds)} of one core"
        )


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _minutes(seconds: float) -> str:
    if seconds < 60:
        return _count(max(1, round(seconds)), "second")
    return (
        _count(round(seconds / 60), "minute") if seconds < 7200 else f"{seconds / 3600:.1f} hours"
    )


def parse_bytes(text: str) -> int:
    """Returns the bytes that a size like 8GB, 500MB or 1.5T means (powers of ten)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)I?B?", text.strip().upper())
    if not match or not float(match.group(1)):
        raise UserError(f"memory={text!r}: expected a size like 8GB or 500MB")
    return int(float(match.group(1)) * _UNITS[match.group(2)])


def show_bytes(n: float) -> str:
    """A size as a person reads it."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if n >= size:
            return f"{n / size:.1f} {unit}" if n < 100 * size else f"{n / size:.0f} {unit}"
    return f"{n / 1e3:.0f} kB"


def free_memory() -> int:
    """Bytes of memory that the system can give to a new process."""
    try:
        with open("/proc/meminfo") as f:
            fields: dict[str, Any] = dict(line.split(":", 1) for line in f)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 8 * 10**9


def budget_of(config: IndexConfig) -> int:
    """Bytes that an index may take."""
    return parse_bytes(config.memory) if config.memory else free_memory() // 2


def plan(rows: int, dim: int, config: IndexConfig) -> Plan:
    """Chooses the fastest structure that fits the budget.

    Raises UserError with the least budget that works if none does.
    """
    budget = budget_of(config)
    options = list(_options(rows, dim, config))
    for option in options:
        if max(option.resident, option.building) <= budget:
            return option
    least = min(options, key=lambda o: max(o.resident, o.building))
    needed = max(least.resident, least.building)
    kind = "" if config.structure == "auto" else f" with structure={config.structure}"
    raise UserError(
        f"memory={config.memory or show_bytes(budget)}: {rows:,} passages of {dim} dimensions need "
        f"at least {math.ceil(needed / 1e7) / 100}GB{kind} "
        f"({least.describe().removeprefix('plan: ')})"
    )


def _options(rows: int, dim: int, config: IndexConfig) -> Iterator[Plan]:
    """Plans from the fastest to the smallest."""
    asked, automatic = config.structure, config.structure == "auto"
    if asked == EXACT or (automatic and rows <= config.exact_below):
        yield Plan(EXACT, rows, dim, 0, (), 0, 0, *_sizes_exact(rows, dim))
    if rows < _LEAST_ROWS:  # too few to train codes on
        if automatic:
            yield Plan(EXACT, rows, dim, 0, (), 0, 0, *_sizes_exact(rows, dim))
            return
        if asked != EXACT:
            raise UserError(
                f"structure={asked}: needs at least {_LEAST_ROWS:,} passages, and there are "
                f"{rows:,}; use structure=exact"
            )
    if asked == EXACT:
        return
    if automatic or asked == INT8:
        yield from _builds_by_size(rows, dim, config, INT8, 2)
    if automatic or asked == CODES:
        for dims_per_block in (2, 4):
            yield from _builds_by_size(rows, dim, config, CODES, dims_per_block)


def _sizes_exact(rows: int, dim: int) -> tuple[float, float, float, float]:
    """(resident, building, disk, seconds) of exact search."""
    resident = _PROCESS + 4.0 * rows * dim
    return resident, resident, 0.0, 0.0


def _builds_by_size(
    rows: int, dim: int, config: IndexConfig, structure: str, dims_per_block: int
) -> Iterator[Plan]:
    """One structure, built with less and less memory: smaller parts, leaves and samples."""
    for shrink in (1, 2, 4, 8):
        num_parts = -(-rows // max(_LEAST_PART, config.part_size // shrink))
        bounds = [rows * i // num_parts for i in range(num_parts + 1)]  # parts of equal size
        parts = tuple(pairwise(bounds))
        size = rows // num_parts
        leaves = max(1, min(config.leaves // shrink, int(size**0.5)))
        sample = min(size, max(config.sample // shrink, 10 * leaves))
        yield _sized(
            Plan(structure, rows, dim, dims_per_block, parts, leaves, sample, 0, 0, 0, 0), config
        )


def coding_threads() -> int:
    """Threads that code vectors, each `CODED_AT_ONCE` of them: no more, for the memory's sake."""
    return min(num_cores(), 16)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _sized(p: Plan, config: IndexConfig) -> Plan:
    """The plan with its sizes and time filled in."""
    code = -(-p.dim // p.dims_per_block)  # 4 bits in memory, a byte on disk and while loading
    exact = p.dim if p.structure == INT8 else 0  # int8
    num_parts, size = len(p.parts), max(stop - start for start, stop in p.parts)
    centers = num_parts * p.leaves * p.dim * 4.0
    resident = _PROCESS + p.rows * (code / 2 + _CODE_OVERHEAD + exact) + centers
    loading = resident + size * code  # the last part is loaded when the others are open
    training = p.sample * p.dim * 4.0 * _TRAINING_COPIES
    coding = coding_threads() * CODED_AT_ONCE * p.dim * _CODING
    disk = p.rows * (code + exact + 8.0) + centers
    seconds = num_parts * p.sample * p.dim * (_SECONDS_TRAINING * p.leaves + _SECONDS_CODEBOOK)
    seconds += p.rows * p.dim * (_SECONDS_ADDING + _SECONDS_EXACT * config.recall_queries)
    resident = max(resident, loading)
    building = _PROCESS + max(training, coding)
    if config.recall_queries:
        building = max(building, resident)  # the finished index is opened, to measure its recall
    return replace(p, resident=resident, building=building, disk=disk, seconds=seconds)
