"""Shows an answer on the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from selfrag_jax.answering.citations import citation_notices
from selfrag_jax.answering.printable import printable, shortened
from selfrag_jax.answering.records import Answer, cited_text

_LEGEND = "IsRel: p(Relevant)  IsSup: p(Fully supported)  IsUse: p(Utility:5)  p(seg): text"
_CITED_LINES, _TABLE_LINES = 10, 6  # of a passage at most
_NUMBERS = ("IsRel", "IsSup", "IsUse", "p(seg)", "score")
_PASSAGE, _SEGMENT = 3, 2  # how the rest of the table's width is shared


def show(
    answer: Answer,
    console: Console | None = None,
    full: bool = False,
    how_to_see_all: str = "--full",
) -> None:
    """Prints an answer that has no `error`: text, citations, and the critique of each passage.

    full: whole passages, however long; else the last line names `how_to_see_all`. Control
    characters in texts are never printed.
    """
    console = console or Console()
    cell = _Cells(full)
    console.print()
    of_citations = citation_notices(answer.citations)
    for notice in answer.notices:  # first: a guess should not be read as an answer
        if notice not in of_citations:
            console.print(_note(notice))
    console.print(Text(printable(cited_text(answer)), "bold"))
    if answer.passages:
        console.print(_cited(answer, console.width, cell))
    for notice in of_citations:
        console.print(_note(notice))
    decision = "retrieved" if answer.retrieved else "answered from memory"
    console.print(Text(f"p(retrieve) = {answer.p_retrieve:.2f}: {decision}", "dim"))
    console.print(_critiques(answer.tree, console.width, cell))
    if cell.any_cut:
        console.print(Text(f"Long texts are cut; {how_to_see_all} shows them whole.", "dim"))


def _note(notice: str) -> Text:
    return Text(f"note: {printable(notice)}", "yellow")


class _Cells:
    """Texts for the screen, in which rich reads no markup, cut unless all of them are wanted."""

    def __init__(self, full: bool):
        self.full, self.any_cut = full, False

    def __call__(self, text: str, cells: int) -> Text:
        if self.full:
            return Text(printable(text))
        shown, was_cut = shortened(text, cells)
        self.any_cut |= was_cut
        return Text(shown)


def _cited(answer: Answer, width: int, cell: _Cells) -> Table:
    """The passages that citations point to."""
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for i, p in enumerate(answer.passages, 1):
        text = f"{p.title}: {p.text}" if p.title else p.text
        mark = f"  [{i}]"
        table.add_row(Text(mark), cell(text, _CITED_LINES * (width - len(mark) - 1)))
    return table


def _critiques(tree: Sequence[dict[str, Any]], width: int, cell: _Cells) -> Table:
    """A row for each segment in the search tree."""
    rows = list(_in_tree_order(tree))
    places = [place + ("►" if n["chosen"] else "") for place, n in rows]
    table = Table(
        box=SIMPLE_HEAD,
        header_style="bold",
        expand=True,
        padding=(0, 1, 0, 0),
        caption=_LEGEND,
        caption_justify="left",
    )
    table.add_column("", no_wrap=True)
    table.add_column("passage", ratio=_PASSAGE, overflow="fold")
    table.add_column("segment", ratio=_SEGMENT, overflow="fold")
    for name in _NUMBERS:
        table.add_column(name, justify="right", no_wrap=True, min_width=len(name))
    fixed = max(map(len, places), default=0) + sum(len(name) + 1 for name in _NUMBERS) + 6
    share = max(width - fixed, 20) // (_PASSAGE + _SEGMENT)
    for place, (_, n) in zip(places, rows, strict=True):
        passage = n["passage"]
        evidence = (f"{n['isrel'][1]:.2f}", f"{n['issup'][0]:.2f}") if passage else ("", "")
        text = _passage_text(passage) if passage else "(none)"
        table.add_row(
            place,
            cell(text, _TABLE_LINES * share * _PASSAGE),
            cell(n["text"], _TABLE_LINES * share * _SEGMENT),
            *evidence,
            f"{n['isuse'][4]:.2f}",
            f"{n['p_segment']:.2f}",
            f"{n['score']:.2f}",
        )
    return table


def _in_tree_order(tree: Sequence[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Segments from the root to the leaves, with their places.

    "2.1" is the first continuation of the second of the first segments. A tree of depth 1 has no
    places.
    """
    children: dict[int, list[dict[str, Any]]] = {}
    for n in tree:
        children.setdefault(n["parent"], []).append(n)
    is_deep = any(n["parent"] >= 0 for n in tree)

    def walk(parent: int, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for i, n in enumerate(children.get(parent, ()), 1):
            yield f"{place}{i}" if is_deep else "", n
            yield from walk(n["id"], f"{place}{i}.")

    return walk(-1, "")


def _passage_text(p: dict[str, Any]) -> str:
    if not p["title"] or p["text"].startswith(p["title"]):
        return p["text"]
    return f"{p['title']}: {p['text']}"
