"""What generator data consists of: the tokens of each group, segments, how often it retrieves."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selfrag_jax.files import atomic_write
from selfrag_jax.records import GeneratorExample
from selfrag_jax.text import prompts, reflection
from selfrag_jax.text.tokenizer import Control

GROUP_TITLES = {"retrieve": "Retrieve", "isrel": "IsRel", "issup": "IsSup", "isuse": "IsUse"}
_UNNAMED = "(no name)"  # rows without dataset_name
_PLOTTED = 30  # datasets at most, the largest


@dataclass
class LabelStatistics:
    """Counts over rows of generator data. `add` each row, then take `to_json` or `plot`."""

    rows: int = 0
    tokens: Counter[str] = field(default_factory=Counter)
    segments: Counter[int] = field(default_factory=Counter)  # rows, by their number of segments
    rows_of: Counter[str] = field(default_factory=Counter)  # rows, by dataset_name
    retrieving: Counter[str] = field(default_factory=Counter)  # those of them that retrieve

    def add(self, row: GeneratorExample) -> None:
        parts = prompts.parse_output(row.output)
        found = Counter(part.token for part in parts if isinstance(part, Control))
        self.rows += 1
        self.tokens.update({t: n for t, n in found.items() if t in reflection.ALL})
        self.segments[sum(found[t] for t in reflection.RETRIEVE)] += 1
        name = row.dataset_name or _UNNAMED
        self.rows_of[name] += 1
        self.retrieving[name] += reflection.RETRIEVAL in found

    def to_json(self) -> dict[str, Any]:
        """Counts and shares; a token's share is that of its group."""
        segments = sum(n * rows for n, rows in self.segments.items())
        return {
            "rows": self.rows,
            "tokens": {group: self._group(names) for group, names in reflection.GROUPS.items()},
            "segments": {
                "mean": _share(segments, self.rows),
                "rows": {str(n): rows for n, rows in sorted(self.segments.items())},
            },
            "retrieval": {
                name: {
                    "rows": n,
                    "retrieving": self.retrieving[name],
                    "share": _share(self.retrieving[name], n),
                }
                for name, n in sorted(self.rows_of.items())
            },
        }

    def _group(self, names: tuple[str, ...]) -> dict[str, dict[str, float]]:
        total = sum(self.tokens[t] for t in names)
        return {t: {"count": self.tokens[t], "share": _share(self.tokens[t], total)} for t in names}


def _share(n: int, total: int) -> float:
    return round(n / total, 4) if total else 0.0


def table(statistics: dict[str, Any]) -> str:
    """What `LabelStatistics.to_json` returns, as Markdown."""
    lines = ["| group | token | count | share |", "|---|---|---:|---:|"]
    for group, tokens in statistics["tokens"].items():
        for token, row in tokens.items():
            lines.append(
                f"| {GROUP_TITLES[group]} | {token} | {row['count']:,} | {row['share']:.1%} |"
            )
    lines += ["", "| dataset | rows | retrieving | share |", "|---|---:|---:|---:|"]
    for name, row in statistics["retrieval"].items():
        cell = " ".join(name.split()).replace("|", "\\|")
        lines.append(f"| {cell} | {row['rows']:,} | {row['retrieving']:,} | {row['share']:.1%} |")
    mean = statistics["segments"]["mean"]
    return "\n".join([*lines, "", f"{statistics['rows']:,} rows of {mean:.2f} segments on average"])


# ---- the plot ------------------------------------------------------------------------------------
def write_plot(statistics: dict[str, Any], path: str | Path) -> None:
    """Draws what `LabelStatistics.to_json` returns as an SVG; equal statistics give equal bytes."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    largest = sorted(statistics["retrieval"].items(), key=lambda item: -item[1]["rows"])[:_PLOTTED]
    height = 3.2 + 0.3 * max(len(largest), 4)
    settings: Any = {"svg.hashsalt": "selfrag", "svg.fonttype": "none", "font.size": 9}
    with matplotlib.rc_context(settings), atomic_write(path, "wb") as f:
        figure = Figure(figsize=(11, height), layout="constrained")
        FigureCanvasSVG(figure)
        grid = figure.add_gridspec(2, 4, height_ratios=(3, height - 3))
        for column, (group, tokens) in enumerate(statistics["tokens"].items()):
            shares = [(token, row["share"]) for token, row in tokens.items()]
            _bars(figure.add_subplot(grid[0, column]), GROUP_TITLES[group], shares)
        rates = [(name, row["share"]) for name, row in largest]
        _bars(figure.add_subplot(grid[1, :2]), "Rows that retrieve, by dataset", rates)
        rows = statistics["segments"]["rows"]
        axes = figure.add_subplot(grid[1, 2:])
        axes.bar([int(n) for n in rows], list(rows.values()), color="#4878a8")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title("Rows by number of segments")
        figure.savefig(f, format="svg", metadata={"Date": None, "Creator": None})


def _bars(axes: Any, title: str, shares: list[tuple[str, float]]) -> None:
    """Horizontal bars of shares, the first at the top."""
    at = list(range(len(shares)))
    axes.barh(at, [share for _, share in shares], color="#4878a8")
    # Names are user text: a dollar sign in them is no formula.
    axes.set_yticks(at, [_short(name) for name, _ in shares], parse_math=False)
    axes.set_xlim(0, 1)
    axes.invert_yaxis()
    axes.set_title(title)


def _short(name: str) -> str:
    printable = "".join(c if c.isprintable() else " " for c in name)
    return printable if len(printable) <= 32 else printable[:31] + "…"
