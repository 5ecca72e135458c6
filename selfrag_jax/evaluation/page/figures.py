"""Plots of the report as inline SVG, each with its numbers as a table."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# x, y, and the lower and upper end of y's interval where it has one
Point = tuple[float, float, float | None, float | None]

_WIDTH, _HEIGHT = 420, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 12, 44
_SHIFT = 3  # between curves that stand side by side
_COLOURS = 8  # classes c0 to c7 in style.css


@dataclass(frozen=True)
class Curve:
    """One line, or one set of points, of a plot. dashed: a reference, a line without points."""

    name: str
    points: tuple[Point, ...]
    dashed: bool = False


@dataclass(frozen=True)
class Plot:
    """What a plot shows.

    lines: connect the points of a curve.
    share_x, share_y: the axis holds shares, printed in per cent.
    diagonal: draw y = x, where a calibrated model lies.
    side_by_side: shift the curves a little, so that bars at the same x can be told apart.
    """

    title: str
    x: str
    y: str
    curves: tuple[Curve, ...]
    lines: bool = True
    log_x: bool = False
    share_x: bool = False
    share_y: bool = True
    diagonal: bool = False
    side_by_side: bool = False
    note: str = ""


def figure(plot: Plot, number: int) -> str:
    """Returns a <figure>: the SVG, its legend, and the numbers as a table that can be opened."""
    curves = [c for c in plot.curves if c.points]
    if not curves:
        return ""
    title = html.escape(plot.title)
    note = f"<p class='muted'>{html.escape(plot.note)}</p>" if plot.note else ""
    return (
        f"<figure aria-labelledby='fig{number}'><figcaption id='fig{number}'>{title}</figcaption>"
        f"{_svg(plot, curves)}{_legend(curves)}{note}"
        f"<details><summary>Numbers<span class='sr'> of the plot: {title}</span></summary>"
        f"{_numbers(plot, curves)}</details></figure>"
    )


def _legend(curves: Sequence[Curve]) -> str:
    if len(curves) == 1:
        return ""
    items = "".join(
        f"<li><svg class='key' aria-hidden='true' viewBox='0 0 10 10'>"
        f"<circle class='c{i % _COLOURS}' cx='5' cy='5' r='4'/></svg>{html.escape(c.name)}</li>"
        for i, c in enumerate(curves)
    )
    return f"<ul class='legend'>{items}</ul>"


def _numbers(plot: Plot, curves: Sequence[Curve]) -> str:
    rows = "".join(
        f"<tr><th scope='row'>{html.escape(c.name)}</th><td>{number(x, plot.share_x)}</td>"
        f"<td>{number(y, plot.share_y)}{_ends(low, high, plot.share_y)}</td></tr>"
        for c in curves
        for x, y, low, high in c.points
    )
    return (
        f"<div class='scroll' tabindex='0' role='region' aria-label='{_attribute(plot.title)}, "
        f"numbers'><table><thead><tr><th scope='col'>series</th>"
        f"<th scope='col'>{html.escape(plot.x)}</th><th scope='col'>{html.escape(plot.y)}</th></tr>"
        f"</thead><tbody>{rows}</tbody></table></div>"
    )


def _ends(low: float | None, high: float | None, share: bool) -> str:
    if low is None or high is None:
        return ""
    return f" <span class='ci'>{number(low, share)} to {number(high, share)}</span>"


def number(value: float, share: bool) -> str:
    """Returns a share in per cent, or another number with three digits."""
    return f"{100 * value:.1f}" if share else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _attribute(text: str) -> str:
    return html.escape(text, quote=True)


class _Axis:
    """Maps values to pixels; its ticks are round numbers, or powers of ten."""

    def __init__(self, values: Sequence[float], start: float, end: float, log: bool, share: bool):
        self.start, self.end, self.log = start, end, log
        if share:
            self.low, self.high = 0.0, 1.0
            self.ticks: list[float] = [0, 0.25, 0.5, 0.75, 1]
        elif log:
            self.low = math.floor(math.log10(max(min(values), 1)))
            self.high = max(math.ceil(math.log10(max(max(values), 1))), self.low + 1)
            self.ticks = [10.0**e for e in range(int(self.low), int(self.high) + 1)]
        else:
            whole = all(v == round(v) for v in values)
            step = _round_step(max(max(values) - min(0.0, *values), 1e-9) / 4, whole)
            self.low = step * math.floor(min(0.0, *values) / step)
            self.high = step * math.ceil(max(values) / step)
            count = round((self.high - self.low) / step)
            self.ticks = [self.low + i * step for i in range(count + 1)]
            self.high = max(self.high, self.low + step)

    def at(self, value: float) -> float:
        v = math.log10(max(value, 1)) if self.log else value
        return self.start + (v - self.low) / (self.high - self.low) * (self.end - self.start)


def _round_step(rough: float, whole: bool) -> float:
    """Returns the smallest of 1, 2, 2.5, 5 times a power of ten that is not below `rough`.

    whole: not 2.5, since the axis holds whole numbers.
    """
    power = 10 ** math.floor(math.log10(rough))
    factors = (1, 2, 5, 10) if whole and power == 1 else (1, 2, 2.5, 5, 10)
    return next(m * power for m in factors if m * power >= rough * (1 - 1e-9))


def _svg(plot: Plot, curves: Sequence[Curve]) -> str:
    points = [p for c in curves for p in c.points]
    x = _Axis([p[0] for p in points], _LEFT, _WIDTH - _RIGHT, plot.log_x, plot.share_x)
    y = _Axis([p[1] for p in points], _HEIGHT - _BOTTOM, _TOP, False, plot.share_y)
    parts = [*_axes(plot, x, y)]
    if plot.diagonal:
        parts.append(_line("diagonal", x.at(0), y.at(0), x.at(1), y.at(1)))
    for i, curve in enumerate(curves):
        drawn = "".join(_curve(plot, curve, f"c{i % _COLOURS}", x, y))
        shift = _SHIFT * (i - (len(curves) - 1) / 2) if plot.side_by_side else 0
        parts.append(f"<g transform='translate({shift:g} 0)'>{drawn}</g>" if shift else drawn)
    label = _attribute(f"{plot.title}: {plot.y} against {plot.x}; the numbers follow as a table")
    return (
        f"<svg class='plot' role='img' aria-label='{label}' viewBox='0 0 {_WIDTH} {_HEIGHT}'>"
        f"{''.join(parts)}</svg>"
    )


def _axes(plot: Plot, x: _Axis, y: _Axis) -> Iterator[str]:
    for tick in y.ticks:
        at = y.at(tick)
        yield _line("grid", _LEFT, at, _WIDTH - _RIGHT, at)
        text = _tick(tick, plot.share_y)
        yield f"<text class='end' x='{_LEFT - 6}' y='{at + 4:.1f}'>{text}</text>"
    for tick in x.ticks:
        text = _tick(tick, plot.share_x)
        yield f"<text class='mid' x='{x.at(tick):.1f}' y='{_HEIGHT - _BOTTOM + 16}'>{text}</text>"
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    yield f"<text class='mid' x='{middle}' y='{_HEIGHT - 8}'>{html.escape(plot.x)}</text>"
    centre = (_TOP + _HEIGHT - _BOTTOM) / 2
    yield (
        f"<text class='mid' x='12' y='{centre}' transform='rotate(-90 12 {centre})'>"
        f"{html.escape(plot.y)}</text>"
    )


def _tick(value: float, share: bool) -> str:
    if share:
        return f"{100 * value:.0f}"
    if value >= 1000:
        thousands = value / 1000
        return f"{thousands:g}k" if value < 1e6 else f"{thousands / 1000:g}M"
    return f"{value:.4g}"


def _curve(plot: Plot, curve: Curve, colour: str, x: _Axis, y: _Axis) -> Iterator[str]:
    if plot.lines and len(curve.points) > 1:
        path = " ".join(f"{x.at(p[0]):.1f},{y.at(p[1]):.1f}" for p in curve.points)
        dashed = " dashed" if curve.dashed else ""
        yield f"<polyline class='line{dashed} {colour}' points='{path}'/>"
    line_alone = curve.dashed or len(curve.points) > 40  # a training's losses
    for at, value, low, high in () if line_alone else curve.points:
        if low is not None and high is not None:
            yield _line(f"whisker {colour}", x.at(at), y.at(low), x.at(at), y.at(high))
        ends = "" if low is None or high is None else f", {_tip(low, high, plot.share_y)}"
        tip = f"{curve.name}: {number(at, plot.share_x)}, {number(value, plot.share_y)}{ends}"
        yield (
            f"<circle class='{colour}' cx='{x.at(at):.1f}' cy='{y.at(value):.1f}' r='4'>"
            f"<title>{html.escape(tip)}</title></circle>"
        )


def _tip(low: float, high: float, share: bool) -> str:
    return f"95% interval {number(low, share)} to {number(high, share)}"


def _line(name: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f"<line class='{name}' x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}'/>"
