"""Plots of what answers say of retrieval: accuracy by popularity, and at every threshold.

Both are those of Mallen et al. (arXiv 2212.10511).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from selfrag_jax.evaluation import popularity, retrieval_rates
from selfrag_jax.evaluation.page.figures import Curve, Plot
from selfrag_jax.evaluation.popularity import PopularityTable
from selfrag_jax.evaluation.retrieval_rates import (
    ALWAYS_SYSTEM,
    NEVER_SYSTEM,
    ORACLE,
    P_RETRIEVE,
    RANDOM,
    BothModes,
    RatePoint,
)
from selfrag_jax.evaluation.tables import (
    Row,
    metric_table,
    system_title,
    systems_in_order,
    tasks_in_order,
)

POPULARITY_FILE, RATES_FILE = NUMBER_FILES = ("popularity.json", "retrieval_rates.json")
BY_POPULARITY, BY_RATE = "Accuracy by popularity", "Accuracy against retrieval rate"
_MOST_POINTS = 200  # of a drawn curve; its file has all
_SEED = 0  # of the intervals: the same answers have the same page
# No points beside the curve of all thresholds: its ends, and one for which no colour is left.
_NO_POINTS = (ALWAYS_SYSTEM, NEVER_SYSTEM, "rag_topk")


@dataclass(frozen=True)
class AnswerCurves:
    """What the plots of answers show."""

    popularity: PopularityTable
    modes: dict[str, BothModes]  # of each task that was answered in both modes

    def files(self) -> dict[str, Any]:
        """Returns the numbers of the plots, by the name of their file; {} of a plot without any."""
        return {
            POPULARITY_FILE: self.popularity.to_json() if self.popularity.rows else {},
            RATES_FILE: retrieval_rates.to_json(self.modes, _SEED) if self.modes else {},
        }


def answer_curves(answers: Sequence[Row]) -> AnswerCurves:
    """Returns the curves of scored answers: rows as the questions of `report.write_report`."""
    bins = popularity.BINS, popularity.FEWEST
    return AnswerCurves(
        popularity.accuracy_by_popularity(answers, *bins, _SEED),
        retrieval_rates.modes_by_task(answers),
    )


def plots_of_answers(curves: AnswerCurves, results: Sequence[Row]) -> list[Plot]:
    """Returns the plots. results: rows of results.json, whose systems stand beside the curves."""
    by_popularity = popularity_plots(curves.popularity)
    tasks = tasks_in_order(list(curves.modes))
    return [*by_popularity, *(rate_plot(task, curves.modes[task], results) for task in tasks)]


def titled(title: str, task: str) -> str:
    """Returns a plot's title with its task, if that has a name."""
    return f"{title}: {task.replace('_', ' ')}" if task else title


def popularity_plots(table: PopularityTable) -> list[Plot]:
    """Returns a plot of each task: accuracy from rare to popular, a curve for each system."""
    plots = []
    for task in tasks_in_order([row["task"] for row in table.rows]):
        rows = [row for row in table.rows if row["task"] == task]
        curves = tuple(
            Curve(
                system_title(system) or "accuracy",
                tuple(
                    (r["at"], r["value"], r["low"], r["high"])
                    for r in rows
                    if r["system"] == system
                ),
            )
            for system in systems_in_order([row["system"] for row in rows])
        )
        note = (
            f"Bins of {popularity.FEWEST} questions or more, from rare to popular; the bars are "
            "95% bootstrap intervals."
        )
        if left_out := table.left_out[task]:
            note += f" Left out, without popularity: {left_out:,}."
        by_decile = rows[0]["by"] == "decile"
        # Popularity below 1 (a share of all page views, say) has no place on the axis of powers.
        log_x = not by_decile and min(row["at"] for row in rows) >= 1
        x = "decile of popularity" if by_decile else "popularity"
        title = titled(BY_POPULARITY, task)
        axes = x, "accuracy (%)"
        plots.append(Plot(title, *axes, curves, log_x=log_x, side_by_side=True, note=note))
    return plots


def rate_plot(task: str, modes: BothModes, results: Sequence[Row]) -> Plot:
    """Returns a task's plot of all thresholds between random order and the oracle.

    The systems of `results` with an accuracy and a retrieval rate are points, but for ablations.
    """
    systems, _, accuracy = metric_table(results, "accuracy")
    _, _, rate = metric_table(results, "retrieval_rate")
    points = []
    for s in systems:
        if s in _NO_POINTS or s.startswith(("ablation_", "train_")) or (s, task) not in rate:
            continue
        if row := accuracy.get((s, task)):
            at = rate[s, task]["value"], row["value"], row["low"], row["high"]
            points.append(Curve(system_title(s), (at,)))
    name = "Self-RAG, every threshold"
    return rate_curves_plot(titled(BY_RATE, task), {name: modes}, name, points)


def rate_curves_plot(
    title: str, curves: Mapping[str, BothModes], reference: str, points: Sequence[Curve] = ()
) -> Plot:
    """Returns a plot of curves by name, with the random order and the oracle of one of them.

    reference: its name. Other models have other answers, so they may exceed its oracle.
    """
    of, whose = curves[reference], f" ({reference})" if len(curves) > 1 else ""

    def drawn(name: str, modes: BothModes, order: str) -> Curve:
        found = _thinned(modes.curve(order))
        shown = tuple((p.retrieval_rate, p.accuracy, None, None) for p in found)
        return Curve(name, shown, dashed=order != P_RETRIEVE)

    every = [drawn(name, modes, P_RETRIEVE) for name, modes in curves.items()]
    every += [drawn(f"{order} order{whose}", of, order) for order in (RANDOM, ORACLE)]
    areas = [f"{name} {100 * modes.area(P_RETRIEVE):.1f}" for name, modes in curves.items()]
    areas += [f"{order} order{whose} {100 * of.area(order):.1f}" for order in (RANDOM, ORACLE)]
    note = f"{len(of.p):,} questions. Mean accuracy over all rates: {', '.join(areas)}."
    if of.left_out:
        note += f" Left out, without both answers: {of.left_out:,}."
    axes = "retrieval rate (%)", "accuracy (%)"
    return Plot(title, *axes, (*every, *points), share_x=True, note=note)


def _thinned(points: Sequence[RatePoint]) -> list[RatePoint]:
    """At most _MOST_POINTS of a curve, evenly spaced, its ends among them."""
    places = np.linspace(0, len(points) - 1, min(len(points), _MOST_POINTS)).round()
    return [points[int(i)] for i in places]
