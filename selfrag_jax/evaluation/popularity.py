"""Accuracy by popularity of what is asked about, as Mallen et al. plot it (arXiv 2212.10511).

The questions of a task are parted into ten bins from rare to popular, of about equally many
questions. Questions of equal popularity are always in one bin, whatever their order in the file, so
ties make bins uneven or fewer. Bins with too few questions join their neighbours.

Where rows name their `decile`, that is the bin: popularity in different units (votes of films,
inhabitants of cities) can only be ranked among its like, which the file's author has done.

Questions without popularity are left out, and counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from selfrag_jax.evaluation.metrics import interval

Row = dict[str, Any]
BINS = 10
FEWEST = 10  # questions in a bin; fewer say nothing


@dataclass(frozen=True)
class PopularityBin:
    """Questions of similar popularity.

    at: where the bin is drawn: its median popularity, or the mean of its file's deciles.
    low, high: the least and the greatest popularity in it.
    members: positions of its questions in what was given.
    """

    at: float
    low: float
    high: float
    members: tuple[int, ...]


@dataclass(frozen=True)
class PopularityTable:
    """Accuracy of each system in each bin of each task.

    rows: task, system, by ("popularity" or "decile"), at, popularity_low, popularity_high, and the
        mean accuracy as value, low, high and n; from rare to popular.
    left_out: of each task in `rows`, the number of questions without popularity.
    """

    rows: list[Row]
    left_out: dict[str, int]

    def to_json(self) -> Row:
        return {"rows": self.rows, "left_out": self.left_out}


def popularity_bins(
    popularity: Sequence[float], deciles: Sequence[float] | None, bins: int, fewest: int
) -> list[PopularityBin]:
    """Returns at most `bins` bins from rare to popular, each with `fewest` questions or more.

    deciles: the file's own, which then are the bins. There may be a single bin, of all questions,
    even if they are fewer than `fewest`; there is none without questions.
    """
    if not popularity:
        return []
    values = popularity if deciles is None else deciles
    keys = _bin_numbers(popularity, bins) if deciles is None else deciles
    groups: dict[float, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    merged: list[list[int]] = []
    for key in sorted(groups):
        if merged and len(merged[-1]) < fewest:  # a bin that is too small takes the next one in
            merged[-1] += groups[key]
        else:
            merged.append(groups[key])
    if len(merged) > 1 and len(merged[-1]) < fewest:
        merged[-2:] = [merged[-2] + merged[-1]]
    middle = median if deciles is None else fmean
    return [
        PopularityBin(
            float(middle([values[i] for i in group])),
            min(popularity[i] for i in group),
            max(popularity[i] for i in group),
            tuple(sorted(group)),
        )
        for group in merged
    ]


def _bin_numbers(values: Sequence[float], bins: int) -> list[int]:
    """The quantile of each value, from 0 to bins - 1, by the middle of its ties' ranks."""
    counts: dict[float, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    number, below = {}, 0
    for value in sorted(counts):
        # floor(bins * (below + count / 2) / n), in whole numbers
        number[value] = bins * (2 * below + counts[value]) // (2 * len(values))
        below += counts[value]
    return [number[value] for value in values]


def accuracy_by_popularity(
    answers: Sequence[Row], bins: int, fewest: int, seed: int
) -> PopularityTable:
    """Returns the accuracy of each system in each bin, with 95% bootstrap intervals.

    answers: rows with system, task, id, metrics and, where they are known, popularity and decile.
        Rows without accuracy do not count. A task's bins are made of all its questions, and are the
        same for all systems; a system that has answered fewer than `fewest` of a bin has no row
        there.

    Tasks with a single bin have no rows: it says nothing of popularity.
    """
    by_task: dict[str, dict[str, dict[str, Row]]] = {}
    for row in answers:
        if row.get("metrics", {}).get("accuracy") is not None:
            of_task = by_task.setdefault(row.get("task", ""), {})
            of_task.setdefault(row.get("system", ""), {})[str(row["id"])] = row
    rows: list[Row] = []
    left_out: dict[str, int] = {}
    for task, systems in by_task.items():
        asked = {key: row for of_system in systems.values() for key, row in of_system.items()}
        if found := _of_task(task, systems, asked, bins, fewest, seed):
            rows += found
            left_out[task] = sum(row.get("popularity") is None for row in asked.values())
    return PopularityTable(rows, left_out)


def _of_task(
    task: str,
    systems: Mapping[str, Mapping[str, Row]],
    asked: Mapping[str, Row],
    bins: int,
    fewest: int,
    seed: int,
) -> list[Row]:
    """The rows of a task. asked: all its questions, by id."""
    ids = [key for key, row in asked.items() if row.get("popularity") is not None]
    popularity = [float(asked[key]["popularity"]) for key in ids]
    given = [d for key in ids if (d := asked[key].get("decile")) is not None]
    deciles = given if len(given) == len(ids) else None
    parts = popularity_bins(popularity, deciles, bins, fewest)
    rows: list[Row] = []
    for system, of_system in systems.items() if len(parts) > 1 else ():
        for part in parts:
            members = [of_system[ids[i]] for i in part.members if ids[i] in of_system]
            if len(members) < fewest:
                continue
            value, low, high = interval([m["metrics"]["accuracy"] for m in members], seed)
            row = {"task": task, "system": system, "at": part.at, "value": value}
            row |= {"by": "popularity" if deciles is None else "decile"}
            row |= {"popularity_low": part.low, "popularity_high": part.high}
            rows.append(row | {"low": low, "high": high, "n": len(members)})
    return rows
