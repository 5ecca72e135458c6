"""Shows an answer on the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from selfrag_jax.answering.records import Answer

_LEGEND = "IsRel: p(Relevant)  IsSup: p(Fully supported)  IsUse: p(Utility:5)  p(seg): text"


def show(answer: Answer, console: Console | None = None) -> None:
    """Prints an answer that has no `error`: text, citations, and the critique of each passage."""
    console = console or Console()
    marks = {c.segment: c.passage + 1 for c in answer.citations}
    cited = [
        f"{s.text} [{marks[i]}]" if i in marks else s.text for i, s in enumerate(answer.segments)
    ]
    console.print()
    for notice in answer.notices:  # first: a guess should not be read as an answer
        console.print(f"note: {escape(notice)}", style="yellow")
    console.print(f"[bold]{escape(' '.join(cited))}[/bold]")
    for i, p in enumerate(answer.passages, 1):
        console.print(escape(f"  [{i}] {p.title}: {p.text}"))
    decision = "retrieved" if answer.retrieved else "answered from memory"
    console.print(f"p(retrieve) = {answer.p_retrieve:.2f}: {decision}", style="dim")
    console.print(_critiques(answer.tree))


def _critiques(tree: Sequence[dict[str, Any]]) -> Table:
    """A row for each segment in the search tree."""
    table = Table(
        box=SIMPLE_HEAD, header_style="bold", expand=True, caption=_LEGEND, caption_justify="left"
    )
    table.add_column("", no_wrap=True)
    table.add_column("passage", ratio=3)
    table.add_column("segment", ratio=2)
    for name in ("IsRel", "IsSup", "IsUse", "p(seg)", "score"):
        table.add_column(name, justify="right", no_wrap=True, min_width=len(name))
    for place, n in _in_tree_order(tree):
        passage = n["passage"]
        evidence = (f"{n['isrel'][1]:.2f}", f"{n['issup'][0]:.2f}") if passage else ("", "")
        table.add_row(
            place + ("►" if n["chosen"] else ""),
            escape(_passage_text(passage)) if passage else "(none)",
            escape(n["text"]),
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
