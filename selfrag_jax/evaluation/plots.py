"""Plots as SVG files. The same numbers give the same file, byte for byte."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from selfrag_jax.evaluation.critic_scores import ReliabilityBins
from selfrag_jax.files import atomic_write
from selfrag_jax.text import reflection

Interval = tuple[float, float, float]  # value, low, high
_BAR, _LINE, _MUTED = "#3b7dd8", "#1c2733", "#c9d3de"


def reliability_diagram(path: str | Path, group: str, bins: ReliabilityBins, error: float) -> None:
    """Draws accuracy against confidence in bins, and below it how many queries each bin has.

    error: the expected calibration error. On the diagonal, a critic is as often right as it says.
    """
    centres, width = (bins.edges[:-1] + bins.edges[1:]) / 2, bins.edges[1]
    filled = bins.count > 0
    with _figure(path, (4.2, 4.8)) as figure:
        top, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        top.bar(centres[filled], bins.accuracy[filled], 0.92 * width, color=_BAR, label="accuracy")
        top.plot([0, 1], [0, 1], "--", color=_LINE, linewidth=1, label="perfectly calibrated")
        top.plot(
            bins.confidence[filled], bins.accuracy[filled], "o", color=_LINE, markersize=3,
            label="at the bin's mean confidence",
        )  # fmt: skip
        top.set(ylim=(0, 1), ylabel="accuracy")
        top.set_title(f"{group}: expected calibration error {100 * error:.1f}%", fontsize=10)
        top.legend(fontsize=7, loc="upper left", frameon=False)
        below.bar(centres, bins.count, 0.92 * width, color=_MUTED)
        below.set(xlim=(0, 1), xlabel="confidence", ylabel="queries")


def confusion_plot(
    path: str | Path, group: str, table: Int[np.ndarray, "n n"], rows: str, columns: str
) -> None:
    """Draws a confusion matrix: counts, shaded by their share of the row.

    rows, columns: whose labels they are.
    """
    tokens, ticks = [t.strip("[]") for t in reflection.GROUPS[group]], range(len(table))
    share = table / np.maximum(table.sum(1, keepdims=True), 1)
    with _figure(path, (2.6 + 0.7 * len(tokens), 2.2 + 0.6 * len(tokens))) as figure:
        axes = figure.subplots()
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(ticks, tokens, rotation=30, ha="right", fontsize=8)
        axes.set_yticks(ticks, tokens, fontsize=8)
        axes.set(xlabel=columns, ylabel=rows, title=group)
        for i in ticks:
            for j in ticks:
                colour = "white" if share[i, j] > 0.5 else _LINE
                axes.text(j, i, f"{table[i, j]:,}", ha="center", va="center", color=colour)


def curves(
    path: str | Path,
    x_label: str,
    x: Sequence[float],
    lines: Mapping[str, Sequence[Interval]],
    are_shares: bool = True,
) -> None:
    """Draws metrics against a setting, each with its 95% interval.

    lines: (value, low, high) for each x, by name. NaN leaves a gap. are_shares: y ends at 1.
    """
    with _figure(path, (5.2, 3.6)) as figure:
        axes = figure.subplots()
        for name, points in lines.items():
            value, low, high = np.array(points, np.float64).T
            [line] = axes.plot(x, value, "o-", markersize=3, label=name.replace("_", " "))
            axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axes.set(xlabel=x_label, ylim=(0, 1.02 if are_shares else None))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, frameon=False)


@contextmanager
def _figure(path: str | Path, size: tuple[float, float]) -> Iterator[Any]:
    """Yields a figure of `size` inches and writes it to `path`, a .svg file.

    Element ids are hashed with a fixed salt and no date is written, so files can be compared. Text
    stays text. pyplot and its global state are not touched.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "selfrag", "svg.fonttype": "none"}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        with atomic_write(path, "wb") as f:
            figure.savefig(f, format="svg", metadata={"Date": None, "Creator": None})
