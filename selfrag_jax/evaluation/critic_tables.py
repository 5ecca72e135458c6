"""A critic's scores, and the agreement of two teachers, as text for the screen."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from selfrag_jax.evaluation.agreement import GroupAgreement
from selfrag_jax.evaluation.scores import Row
from selfrag_jax.text import reflection

# The paper's Llama-2-7B critic and GPT-4: share of equal labels in per cent (its appendix).
PAPER_AGREEMENT = {"retrieve": 93.8, "isrel": 80.2, "issup": 93.5, "isuse": 73.5}
PAPER_NOTE = (
    "paper: how often the paper's critic (Llama-2-7B) agrees with GPT-4, on the paper's data"
)


def score_text(rows: Sequence[Row]) -> str:
    """Returns accuracy, calibration error and kappa of each group, beside the paper's accuracy."""
    header = ("group", "accuracy %", "95% interval", "n", "ECE %", "kappa", "paper %")
    return "\n".join([*_columns(header, [_scores(rows, g) for g in _groups(rows)]), PAPER_NOTE])


def agreement_text(rows: Sequence[Row], groups: Sequence[GroupAgreement]) -> str:
    """Returns accuracy and kappa of each group, and how many queries only one file has."""
    header = (
        "group", "accuracy %", "95% interval", "kappa", "95% interval", "n", "only first",
        "only second",
    )  # fmt: skip
    found = {row["metric"]: row for row in rows}
    body = []
    for g in groups:
        share, kappa = found.get(f"{g.group}_accuracy"), found.get(f"{g.group}_kappa")
        kappa_cells = ("–", "–") if kappa is None else (_number(kappa), _interval(kappa))
        cells = (_per_cent(share), _interval(share, 100), *kappa_cells)
        body.append((g.group, *cells, f"{g.n:,}", f"{g.only_first:,}", f"{g.only_second:,}"))
    return "\n".join(_columns(header, body))


def confusion_text(group: str, table: Int[np.ndarray, "n n"], rows: str, columns: str) -> str:
    """Returns a confusion matrix with its tokens. rows, columns: whose labels they are."""
    tokens = reflection.GROUPS[group]
    numbers = [str(i + 1) for i in range(len(tokens))]
    lines = [(f"{n} {token}", *map(str, counts)) for n, token, counts in zip(
        numbers, tokens, table.tolist(), strict=True
    )]  # fmt: skip
    title = f"{group} (rows: {rows}; columns: {columns})"
    return "\n".join([title, *_columns(("", *numbers), lines)])


def _groups(rows: Sequence[Row]) -> list[str]:
    names = {row["metric"].rpartition("_")[0] for row in rows}
    return [group for group in reflection.GROUPS if group in names]


def _scores(rows: Sequence[Row], group: str) -> tuple[str, ...]:
    found = {row["metric"]: row for row in rows}
    share, error = found[f"{group}_accuracy"], found[f"{group}_ece"]
    return (
        group,
        _per_cent(share),
        _interval(share, 100),
        f"{share['n']:,}",
        _per_cent(error),
        _number(found.get(f"{group}_kappa")),
        f"{PAPER_AGREEMENT[group]:.1f}",
    )


def _per_cent(row: Row | None) -> str:
    return "–" if row is None else f"{100 * row['value']:.1f}"


def _number(row: Row | None) -> str:
    return "–" if row is None else f"{row['value']:.3f}"


def _interval(row: Row | None, scale: int = 1) -> str:
    if row is None:
        return "–"
    digits = 1 if scale == 100 else 3
    return f"{scale * row['low']:.{digits}f}–{scale * row['high']:.{digits}f}"


def _columns(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    rows = [header, *body]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    return [
        "  ".join(
            f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}"
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
