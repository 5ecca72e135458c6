"""The report of a run: Markdown tables, the figures as CSV, and one self-contained HTML page."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from selfrag_jax.evaluation.page.figures import Plot
from selfrag_jax.evaluation.page.page import build_page
from selfrag_jax.evaluation.page.plots_of_results import plots_of
from selfrag_jax.evaluation.page.questions import PageLimits
from selfrag_jax.evaluation.tables import Row, markdown
from selfrag_jax.files import atomic_write, write_text

_COLUMNS = ("system", "task", "metric", "value", "low", "high", "n")


def write_report(
    rows: Sequence[Row],
    questions: Sequence[Row],
    out: str | Path,
    title: str,
    differences: Sequence[Row] = (),
    paper: Sequence[Row] = (),
    plots: Sequence[Plot] = (),
    limits: PageLimits | None = None,
) -> None:
    """Writes results.md, results.csv and index.html to the folder `out`.

    rows: of results.json.
    questions: rows of `selfrag answer` for the page to show, with `system` and `task` added and,
        where they are known, `gold` (texts), `metrics` ({name: number}) and `popularity`.
    differences: see `tables.markdown`.
    paper: published figures, with system, task, metric and value, to stand below ours.
    plots: drawn besides those that `rows` and `questions` give.
    limits: how many questions go into the page.
    """
    out = Path(out)
    write_text(out / "results.md", f"# {title}\n\n{markdown(rows, differences)}")
    with atomic_write(out / "results.csv") as f:
        table = csv.DictWriter(f, _COLUMNS, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    every = [*plots_of(rows, questions), *plots]
    page = build_page(title, rows, questions, differences, paper, every, limits)
    write_text(out / "index.html", page)
