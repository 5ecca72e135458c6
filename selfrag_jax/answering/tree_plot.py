"""Draws an answer's search tree: decisions, passages, critiques, scores, and the chosen path.

figure = draw_tree(answer)
figure.savefig("tree.png")

The table of the terminal (terminal.py), with bars. Lengths are in inches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from selfrag_jax.answering.records import Answer
from selfrag_jax.answering.sheet import SMALL, Sheet, fit
from selfrag_jax.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TreeRow = dict[str, Any]  # a segment, as records.py writes it

# Okabe and Ito's palette, which colour-blind people can tell apart. Weaker verdicts are paler.
_ISREL = ("#0072B2",)  # Relevant
_ISSUP = ("#D55E00", "#F2B58A")  # fully supported, partially
_ISUSE = ("#00795C", "#6CC0A8", "#C4E5DB")  # utility 5, 4, 3
_TEXT, _MUTED, _LINE, _TRACK, _CHOSEN = "#1c2733", "#5b6875", "#b4bfca", "#eceff2", "#FFF6D6"

_WIDTH, _MARGIN, _GAP = 12.6, 0.2, 0.16
_STEP = 0.26  # a level of the tree to the right
_PASSAGE, _SEGMENT, _BAR, _NUMBER = 3.3, 2.9, 0.85, 0.46  # columns
_ROW, _DECISION, _LINE_HEIGHT, _PAD = 0.42, 0.34, 0.155, 0.12  # heights
_BODY, _HEADLINE = 10.0, 13.0  # font sizes in points
_MAX_SOURCES = 6


@dataclass(frozen=True)
class _Group:
    """The segments that one decision led to: those without a parent, or with the same one."""

    depth: int
    parent: int  # id of a segment, or -1
    shown: tuple[TreeRow, ...]
    hidden: tuple[TreeRow, ...]


def draw_tree(answer: Answer | Mapping[str, Any], passages: int | None = None) -> Figure:
    """Returns a matplotlib figure of the search for an answer.

    answer: from SelfRAG.answer, or a record of `selfrag answer`. passages: draw at most so many
    segments of each step, the best and those that the search went on from; the rest is counted.
    Raises UserError if there is no tree to draw, because the question failed or by the record.
    """
    row = answer.to_row() if isinstance(answer, Answer) else answer
    if row.get("error"):
        raise UserError(f"question {row['id']!r} has no answer to draw: {row['error']}")
    if not row.get("tree"):
        raise UserError("the record has no search tree; expected one that `selfrag answer` wrote")
    if passages is not None and passages < 1:
        raise UserError(f"passages={passages}: must be at least 1")
    groups = {group.parent: group for group in _groups(row["tree"], passages)}
    sheet = _TreeSheet(1 + max(group.depth for group in groups.values()))
    sheet.header(row)
    sheet.column_titles()
    sheet.group(groups[-1], groups)
    sheet.legend(any(not node["allowed"] for node in row["tree"]))
    return sheet.finish()


def _groups(tree: Sequence[TreeRow], limit: int | None) -> Iterator[_Group]:
    """The decisions of a tree, from the root to the leaves."""
    children: dict[int, list[TreeRow]] = {}
    for node in tree:
        children.setdefault(node["parent"], []).append(node)

    def group(parent: int, depth: int) -> _Group:
        nodes = children[parent]
        # Those that matter first: the chosen one, those that were continued, then by score.
        ranked = sorted(
            nodes, key=lambda n: (not n["chosen"], n["id"] not in children, -n["score"])
        )
        keep = {n["id"] for n in ranked[:limit]} | {n["id"] for n in nodes if n["id"] in children}
        hidden = tuple(n for n in nodes if n["id"] not in keep)
        return _Group(depth, parent, tuple(n for n in nodes if n["id"] in keep), hidden)

    def walk(parent: int, depth: int) -> Iterator[_Group]:
        yield (found := group(parent, depth))
        for n in found.shown:
            if n["id"] in children:
                yield from walk(n["id"], depth + 1)

    return walk(-1, 0)


def _decision(group: _Group) -> str:
    nodes = (*group.shown, *group.hidden)
    first = nodes[0]
    if first["action"] == "retrieve":
        what = f"retrieved {len(nodes)} passage{'s' if len(nodes) > 1 else ''}"
    elif first["action"] == "continue":
        what = "went on with the passage at hand"
    else:
        what = "wrote without a passage"
    return f"Segment {group.depth + 1}: p(retrieve) = {first['p_retrieve']:.2f}, {what}"


class _TreeSheet(Sheet):
    """The picture of a tree: a header, a row for each decision and segment, a legend."""

    def __init__(self, depth: int):
        super().__init__(_WIDTH, _MARGIN, _TEXT)
        x = _MARGIN + _STEP * depth + 0.3
        spare = x + _PASSAGE + _SEGMENT + 3 * (_BAR + _NUMBER) + 2 * _NUMBER + 6 * _GAP + _MARGIN
        narrower = max(0.0, spare - _WIDTH) / 2  # a deep tree takes its room from the texts
        self.passage = x, max(1.2, _PASSAGE - narrower)
        self.segment = x + self.passage[1] + _GAP, max(1.2, _SEGMENT - narrower)
        bars = self.segment[0] + self.segment[1] + _GAP
        self.bars = [bars + i * (_BAR + _NUMBER + _GAP) for i in range(3)]
        self.p_segment = self.bars[2] + _BAR + _NUMBER + _GAP + _NUMBER  # right edges
        self.score = self.p_segment + _GAP + _NUMBER
        self.right = self.score + 0.04

    def header(self, row: Mapping[str, Any]) -> None:
        """Question, answer with its citations, sources, notices, and the score of the path."""
        marks = {c["segment"]: f" [{c['passage'] + 1}]" for c in row["citations"]}
        segments = [s["text"] + marks.get(i, "") for i, s in enumerate(row["segments"])]
        self.paragraph(row["question"], 2, _HEADLINE, weight="bold")
        self.y += 0.04
        self.paragraph(" ".join(segments) or "(an empty answer)", 6, _BODY)
        for i, passage in enumerate(row["passages"][:_MAX_SOURCES], 1):
            source = f"[{i}] {passage.get('title') or ''}: {passage['text']}".replace(" : ", " ")
            self.paragraph(source, 1, SMALL, color=_MUTED)
        if (more := len(row["passages"]) - _MAX_SOURCES) > 0:
            self.paragraph(f"and {more} more passages", 1, SMALL, color=_MUTED)
        for notice in row.get("notices", ()):
            self.paragraph(f"Note: {notice}", 2, SMALL, style="italic")
        count = f"{len(segments)} segment{'s' if len(segments) != 1 else ''}"
        self.paragraph(f"{count}, score {row['score']:.2f}", 1, SMALL, color=_MUTED)
        self.y += 0.14

    def column_titles(self) -> None:
        y = self.y + _LINE_HEIGHT / 2
        for x, title in (
            (self.passage[0], "passage"), (self.segment[0], "segment"),
            *zip(self.bars, ("IsRel", "IsSup", "IsUse"), strict=True),
        ):  # fmt: skip
            self.text(x, y, title, weight="bold")
        for x, title in ((self.p_segment, "p(seg)"), (self.score, "score")):
            self.text(x, y, title, weight="bold", ha="right")
        self.y += _LINE_HEIGHT + 0.06
        self.line([_MARGIN, self.right], [self.y, self.y], _LINE, 0.8)

    def group(self, group: _Group, by_parent: Mapping[int, _Group]) -> None:
        """A decision and its segments, each followed by the group that continues it."""
        x, on_path = _MARGIN + 0.1 + group.depth * _STEP, any(n["chosen"] for n in group.shown)
        top = self.y + _DECISION / 2
        self.text(x + 0.16, top, _decision(group), color=_MUTED, style="italic")
        ends: list[tuple[float, bool]] = []  # of the branches: their heights, whether chosen
        self.y += _DECISION
        for node in group.shown:
            ends.append((self.y + _ROW / 2, node["chosen"]))
            self.segment_row(node, x + _STEP)
            if node["id"] in by_parent:
                height = self.y + _DECISION / 2
                below = by_parent[node["id"]]
                is_chosen = node["chosen"] and any(n["chosen"] for n in below.shown)
                self.branch([x + _STEP] * 2, [ends[-1][0], height], is_chosen)
                self.group(below, by_parent)
        for y, is_chosen in sorted(ends, key=lambda end: end[1]):  # the chosen one on top
            self.branch([x, x, x + _STEP], [top, y, y], is_chosen)
        self.axes.plot([x], [top], "D", color=_TEXT if on_path else _LINE, markersize=5, zorder=4)
        if group.hidden:
            best = max(n["score"] for n in group.hidden)
            count = f"and {len(group.hidden)} more, with scores up to {best:.2f}"
            at = x + _STEP + 0.16
            self.text(at, self.y + _DECISION / 2, count, color=_MUTED, style="italic")
            self.y += _DECISION

    def segment_row(self, node: TreeRow, x: float) -> None:
        """One segment: its mark in the tree, texts, bars and score."""
        y, is_chosen = self.y + _ROW / 2, node["chosen"]
        if is_chosen:
            self.box(x + 0.12, self.y + 0.02, self.right - x - 0.12, _ROW - 0.04, _CHOSEN, zorder=0)
        marker = "o" if node["allowed"] else "X"
        colour = _TEXT if is_chosen else "white" if node["allowed"] else _LINE
        edge = _TEXT if is_chosen else _MUTED
        self.mark(x, y, marker, colour, edge)

        weight = "bold" if is_chosen else "normal"
        passage = node["passage"] or {"title": "", "text": "(none)"}
        self.cell(self.passage, y, passage["text"], passage["title"])
        self.cell(self.segment, y, node["text"] or "(no text)", weight=weight)
        if node["passage"]:
            self.bar(self.bars[0], y, node["isrel"][1:], _ISREL)
            self.bar(self.bars[1], y, node["issup"][:2], _ISSUP)
        self.bar(self.bars[2], y, node["isuse"][:1:-1], _ISUSE)
        self.text(self.p_segment, y, f"{node['p_segment']:.2f}", ha="right")
        self.text(self.score, y, f"{node['score']:.2f}", ha="right", weight=weight)
        self.y += _ROW

    def cell(
        self, column: tuple[float, float], y: float, text: str, title: str = "", **style: Any
    ) -> None:
        """Two lines in a column: the text, or a title that it does not begin with, and one line."""
        x, width = column
        lines: list[tuple[str, dict[str, Any]]] = []
        has_title = bool(title) and not text.startswith(title)
        if has_title:
            [first] = fit(title, width, 1, self.measure(SMALL, weight="bold"))
            lines.append((first, {"weight": "bold"}))
        for line in fit(text, width, 2 - len(lines), self.measure(SMALL, **style)):
            lines.append((line, style | ({"color": _MUTED} if has_title else {})))
        for i, (line, look) in enumerate(lines):
            self.text(x, y + (i - (len(lines) - 1) / 2) * _LINE_HEIGHT, line, **look)

    def bar(self, x: float, y: float, shares: Sequence[float], colours: Sequence[str]) -> None:
        """Probabilities end to end on a track of length 1, and the first of them in numbers."""
        self.box(x, y - 0.07, _BAR, 0.14, _TRACK)
        start = x
        for share, colour in zip(shares, colours, strict=True):
            self.box(start, y - 0.07, share * _BAR, 0.14, colour, zorder=2)
            start += share * _BAR
        self.text(x + _BAR + _NUMBER - 0.04, y, f"{shares[0]:.2f}", ha="right")

    def legend(self, any_dropped: bool) -> None:
        """What marks and colours mean."""
        self.y += 0.08
        self.line([_MARGIN, self.right], [self.y, self.y], _LINE, 0.8)
        self.y += 0.18
        x = _MARGIN + 0.06
        marks = [("o", _TEXT, "in the answer"), ("o", "white", "not chosen")]
        marks += [("X", _LINE, "dropped by a constraint")] if any_dropped else []
        for marker, colour, text in marks:
            self.mark(x, self.y, marker, colour, _MUTED)
            x = self.label(x + 0.12, text)
        x += 0.1
        for name, colours, meanings in (
            ("IsRel:", _ISREL, ("Relevant",)),
            ("IsSup:", _ISSUP, ("fully supported", "partially")),
            ("IsUse:", _ISUSE, ("utility 5", "4", "3")),
        ):
            x = self.label(x, name, 0.07, weight="bold")
            for colour, meaning in zip(colours, meanings, strict=True):
                self.box(x, self.y - 0.06, 0.16, 0.12, colour)
                x = self.label(x + 0.21, meaning)
        self.y += 0.12

    def label(self, x: float, text: str, gap: float = 0.2, **style: Any) -> float:
        """Writes at the current height; returns where the next label begins."""
        self.text(x, self.y, text, **style)
        return x + self.measure(SMALL, **style)(text) + gap

    def mark(self, x: float, y: float, marker: str, colour: str, edge: str) -> None:
        look: dict[str, Any] = dict(color=colour, markeredgecolor=edge, markersize=7, zorder=5)
        self.axes.plot([x], [y], marker, **look)

    def branch(self, x: Sequence[float], y: Sequence[float], is_chosen: bool) -> None:
        colour, width = (_TEXT, 2.2) if is_chosen else (_LINE, 1.0)
        self.line(x, y, colour, width, zorder=3 if is_chosen else 1)
