"""A figure that is written on from the top downwards, and lines that fit their columns.

Lengths are in inches, from the top left corner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 100
SMALL = 8.0  # points


class Sheet:
    """A figure of fixed width; `finish` sets its height. pyplot and its state are not touched."""

    def __init__(self, width: float, margin: float, colour: str):
        """margin: on all sides. colour: of text."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.width, self.margin, self.colour = width, margin, colour
        self.figure = Figure(figsize=(width, 1.0), dpi=_DPI, facecolor="white")
        self.renderer = FigureCanvasAgg(self.figure).get_renderer()
        self.axes: Axes = self.figure.add_axes((0, 0, 1, 1))
        self.y = margin  # of the next line
        self.measures: dict[tuple, Callable[[str], float]] = {}

    def finish(self) -> Figure:
        height = self.y + self.margin
        self.figure.set_size_inches(self.width, height)
        self.axes.set(xlim=(0, self.width), ylim=(height, 0))
        self.axes.set_axis_off()
        return self.figure

    # ---- text ------------------------------------------------------------------------------------
    def text(self, x: float, y: float, text: str, size: float = SMALL, **style: Any) -> None:
        """Writes one line, as it is: `$` begins no formula. y: its middle."""
        style = {"va": "center_baseline", "color": self.colour, **style}
        self.axes.text(x, y, text, fontsize=size, parse_math=False, **style)

    def paragraph(self, text: str, lines: int, size: float, **style: Any) -> None:
        """Writes across the sheet and moves down."""
        height = size / 72 * 1.35
        for line in fit(text, self.width - 2 * self.margin, lines, self.measure(size, **style)):
            self.text(self.margin, self.y + height / 2, line, size, **style)
            self.y += height

    def measure(self, size: float, **style: Any) -> Callable[[str], float]:
        """A function from a line of text to its width."""
        from matplotlib.font_manager import FontProperties

        known = {k: v for k, v in style.items() if k in ("weight", "style")}
        key = (size, *sorted(known.items()))
        if key not in self.measures:
            font, draw = FontProperties(size=size, **known), self.renderer
            self.measures[key] = cache(
                lambda text: draw.get_text_width_height_descent(text, font, False)[0] / _DPI
            )
        return self.measures[key]

    def line(
        self, x: Sequence[float], y: Sequence[float], colour: str, width: float, **style: Any
    ) -> None:
        self.axes.plot(x, y, "-", color=colour, linewidth=width, **style)

    def box(
        self, x: float, y: float, width: float, height: float, colour: str, **style: Any
    ) -> None:
        from matplotlib.patches import Rectangle

        style = {"zorder": 1, **style}
        self.axes.add_patch(Rectangle((x, y), width, height, color=colour, linewidth=0, **style))


def fit(text: str, width: float, lines: int, measure: Callable[[str], float]) -> list[str]:
    """Breaks a text into at most `lines` lines of `width`; what is left over becomes an ellipsis.

    measure: the width of a line. Words wider than a line are broken. A text without words gives one
    empty line.
    """
    shown = (c if c.isprintable() or c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text)
    words, space = "".join(shown).split(), measure(" ")
    out: list[str] = []
    while words and len(out) < lines:
        line = words.pop(0)
        used = measure(line)
        if used > width:
            length = 1
            while measure(line[: length + 1]) <= width:
                length += 1
            words.insert(0, line[length:])
            line = line[:length]
        while words and (used := used + space + measure(words[0])) <= width:
            line += f" {words.pop(0)}"
        out.append(line)
    if words:
        last = out[-1]
        while last and measure(f"{last}…") > width:
            last = last[:-1]
        out[-1] = f"{last.rstrip()}…"
    return out or [""]
