"""What `selfrag check` prints: a report, and some rows as the model will see them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

_LONGEST_RUN = 1200  # characters of a run of text that are shown
_OPEN, _CLOSE = "⟦", "⟧"  # around what is not learned, where there is no colour
_CUT = {  # what becomes of rows that are longer
    "critic": "lose their middle",
    "generator": "lose their end",
    "instructions": "lose their end",
    "questions": "are cut",
    "corpus": "are cut",
}


@dataclass(frozen=True)
class ShownRow:
    """A row as a model reads it."""

    where: str
    num_tokens: int
    runs: list[tuple[str, bool]]  # text, and whether it is learned


def show(
    report: dict[str, Any],
    told_by: str,
    rows: Sequence[ShownRow],
    console: Console | None = None,
) -> None:
    """Prints a report and some rows.

    told_by: what told the kind of the file; "" if the user said it.
    """
    console = console or Console(highlight=False)
    for line in _lines(report, told_by):
        console.print(Text(printable(line)), soft_wrap=True)
    if rows:
        _show_rows(console, rows, report["for"])


def printable(text: str) -> str:
    """Text of a file with control characters spelled out: a terminal would obey them."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def _lines(r: dict[str, Any], told_by: str) -> list[str]:
    guess = f" (told by {told_by}; --for= says otherwise)" if told_by else ""
    lines = [f"{r['file']}: {r['for']}{guess}"]
    bad = r["problems"]["count"]
    what = "left out" if r["format"] == "released" else "with problems"
    lines.append(
        f"{r['rows']:,} rows: {r['good']:,} good"
        + (f", {bad:,} {what}" if bad else "")
        + (f", {r['left_out']:,} left out" if r["left_out"] else "")
    )
    lines += [f"  {problem}" for problem in r["problems"]["first"]]
    if (more := bad - len(r["problems"]["first"])) > 0:
        lines.append(f"  and {more:,} more")
    if r["stopped"]:
        lines.append(f"  reading stopped: {r['stopped']}")
    if r["ids"]["distinct"]:
        repeated = r["ids"]["repeated"]
        times = f" (rows with the id of an earlier one: {repeated:,})" if repeated else ""
        lines.append(f"different ids: {r['ids']['distinct']:,}{times}")
    lines += [f"{note}: {count:,}" for note, count in r["notes"].items()]
    if tokens := r["tokens"]:
        lines += _lengths(tokens, r)
    for group, counts in r["labels"].items():
        told = "  ".join(f"{token} {count:,}" for token, count in counts.items())
        lines.append(f"{group}: {told}")
    return lines


def _lengths(tokens: dict[str, Any], r: dict[str, Any]) -> list[str]:
    learned = f", of which {tokens['learned']:,} are learned" if tokens["learned"] else ""
    lines = [
        f"tokens: {tokens['total']:,}{learned} (tokenizer: {r['tokenizer']})",
        f"tokens of a row: half have at most {tokens['p50']:,}, 95% at most {tokens['p95']:,}; "
        f"the longest has {tokens['max']:,} ({tokens['longest']})",
    ]
    if tokens["limit"]:
        fate = f"; they {_CUT[r['for']]}" if tokens["longer"] else ""
        lines.append(f"rows longer than {tokens['limit']:,} tokens: {tokens['longer']:,}{fate}")
    return lines


def _show_rows(console: Console, rows: Sequence[ShownRow], kind: str) -> None:
    coloured = console.is_terminal and not console.no_color
    learns = kind in ("critic", "generator", "instructions")
    how = "dim" if coloured else f"between {_OPEN} and {_CLOSE}"
    legend = f" (what is read but not learned is {how})" if learns else ""
    console.print(Text(f"\nas the model sees them{legend}:"), soft_wrap=True)
    for row in rows:
        heading = f"\n{printable(row.where)}, {row.num_tokens:,} tokens"
        console.print(Text(heading), style="bold", soft_wrap=True)
        line = Text()
        for text, learned in row.runs:
            text = _shortened(printable(text))
            masked = learns and not learned
            if masked and not coloured:
                text = f"{_OPEN}{text}{_CLOSE}"
            line.append(text, "dim" if masked else "")
        console.print(line, soft_wrap=True)


def _shortened(text: str) -> str:
    """Text without its middle, if it is long."""
    if len(text) <= _LONGEST_RUN:
        return text
    half = _LONGEST_RUN // 2
    return f"{text[:half]} ... {len(text) - 2 * half:,} characters ... {text[-half:]}"
