"""The plots that the results, the questions and the logs of a run give."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from selfrag_jax.evaluation.page.figures import Curve, Plot, Point
from selfrag_jax.evaluation.page.plots_of_answers import (
    AnswerCurves,
    answer_curves,
    plots_of_answers,
)
from selfrag_jax.evaluation.scores import AMOUNTS
from selfrag_jax.evaluation.tables import (
    Row,
    metric_table,
    metrics_of,
    system_title,
)

_BINS = 10  # of confidence
_FEWEST = 5  # answers in a bin that is drawn; fewer say nothing


def accuracy_against_retrieval(rows: Sequence[Row]) -> list[Plot]:
    """Returns a plot of each task with two systems or more: retrieval rate against accuracy.

    A single system has one plot, of its tasks, if they are several.
    """
    systems, tasks, accuracy = metric_table(rows, "accuracy")
    _, _, rate = metric_table(rows, "retrieval_rate")
    x, y = "retrieval rate (%)", "accuracy (%)"
    both = [cell for cell in accuracy if cell in rate]
    if len(systems) == 1 and len(both) > 1:
        curves = tuple(
            Curve(t.replace("_", " "), (_point(rate[s, t]["value"], accuracy[s, t]),))
            for s, t in both
        )
        return [Plot("Retrieval rate and accuracy by task", x, y, curves, False, share_x=True)]
    plots = []
    for task in tasks:
        found = [s for s in systems if (s, task) in accuracy and (s, task) in rate]
        # The ablations all retrieve always: they would lie on top of each other.
        found = [s for s in found if not s.startswith("ablation_")]
        if len(found) > 1:
            curves = tuple(
                Curve(system_title(s), (_point(rate[s, task]["value"], accuracy[s, task]),))
                for s in found
            )
            title = f"Retrieval rate and accuracy: {task.replace('_', ' ')}"
            plots.append(Plot(title, x, y, curves, False, share_x=True))
    return plots


def _point(x: float, row: Row) -> Point:
    return x, row["value"], row["low"], row["high"]


def _mean_point(x: float, values: Sequence[float]) -> Point:
    low, high = wilson_interval(sum(values) / len(values), len(values))
    return x, sum(values) / len(values), low, high


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """Returns the 95% score interval of a share of n (Wilson, JASA 22, 1927)."""
    z = 1.959963984540054
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def accuracy_by_support(questions: Iterable[Row]) -> list[Plot]:
    """Returns a plot of accuracy against p(fully supported) of the answer's first passage.

    It shows what the model's own critique is worth on this task.
    """
    bins: dict[str, list[list[float]]] = {}
    for q in questions:
        accuracy = q.get("metrics", {}).get("accuracy")
        first = next((n for n in q.get("tree", ()) if n["chosen"] and n["passage"]), None)
        if accuracy is None or first is None or not math.isfinite(first["issup"][0]):
            continue
        place = min(int(first["issup"][0] * _BINS), _BINS - 1)
        bins.setdefault(q.get("task", ""), [[] for _ in range(_BINS)])[place].append(accuracy)
    curves = []
    for task, of_task in bins.items():
        points = [
            _mean_point((i + 0.5) / _BINS, v) for i, v in enumerate(of_task) if len(v) >= _FEWEST
        ]
        if points:
            curves.append(Curve(task.replace("_", " ") or "accuracy", tuple(points)))
    if not curves:
        return []
    title, x = "Accuracy by the answer's own critique", "p(fully supported) (%)"
    note = f"Bins of {_FEWEST} answers or more; the bars are 95% Wilson intervals."
    return [Plot(title, x, "accuracy (%)", tuple(curves), share_x=True, note=note)]


def reliability(bins: Mapping[str, Sequence[Mapping[str, float]]]) -> list[Plot]:
    """Returns the critic's reliability diagram.

    bins: of each group, rows with n, confidence and accuracy (ReliabilityBins.to_rows).
    """
    curves = tuple(
        Curve(group, tuple((b["confidence"], b["accuracy"], None, None) for b in of_group))
        for group, of_group in bins.items()
    )
    if not curves:
        return []
    title = "Reliability of the critic"
    return [Plot(title, "confidence (%)", "accuracy (%)", curves, share_x=True, diagonal=True)]


def training_losses(scalars: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]) -> list[Plot]:
    """Returns one plot of each model's losses over its steps.

    scalars: of each model, the points of each tag in its logs (training.event_files).
    """
    plots = []
    for model, tags in scalars.items():
        curves = tuple(
            Curve(tag.removeprefix("loss/"), tuple((s, v, None, None) for s, v in points))
            for tag, points in tags.items()
            if tag.startswith("loss/")
        )
        if curves:
            plots.append(Plot(f"Training loss: {model}", "step", "loss", curves, share_y=False))
    return plots


def sweep_curves(points: Sequence[Row]) -> list[Plot]:
    """Returns plots for each setting of a sweep with several values: metrics against the setting.

    Shares stand in one plot, amounts (tokens, passages) in one each.
    points: {"settings", "rows"} of each combination. The other settings have their first value.
    """
    plots = []
    first = points[0]["settings"] if points else {}
    for setting in first:
        along = [
            p
            for p in points
            if all(p["settings"][k] == v for k, v in first.items() if k != setting)
        ]
        along.sort(key=lambda p: p["settings"][setting])
        if len(along) < 2:
            continue
        others = ", ".join(f"{k}={v:g}" for k, v in first.items() if k != setting)
        note = f"With {others}." if others else ""
        curves = {m: _along(along, setting, m) for m in metrics_of(along[0]["rows"])}
        shares = tuple(c for m, c in curves.items() if m not in AMOUNTS)
        plots.append(Plot(f"Sweep of {setting}", setting, "%", shares, note=note))
        for metric in [m for m in curves if m in AMOUNTS]:
            name, of_one = curves[metric].name, (curves[metric],)
            title = f"Sweep of {setting}: {name}"
            plots.append(Plot(title, setting, name, of_one, share_y=False, note=note))
    return plots


def _along(points: Sequence[Row], setting: str, metric: str) -> Curve:
    """A metric against a setting."""
    found = [
        _point(p["settings"][setting], r)
        for p in points
        for r in p["rows"]
        if r["metric"] == metric
    ]
    return Curve(metric.replace("_", " "), tuple(found))


def plots_of(
    rows: Sequence[Row], questions: Sequence[Row], curves: AnswerCurves | None = None
) -> list[Plot]:
    """Returns the plots that need nothing but the results and the questions.

    curves: of more answers than `questions`. A task's curve of all thresholds stands in the place
    of its systems' points.
    """
    curves = curves or answer_curves(questions)
    return [
        *plots_of_answers(curves, rows),
        *accuracy_against_retrieval([r for r in rows if r["task"] not in curves.modes]),
        *accuracy_by_support(questions),
    ]
