"""The report of a run: Markdown tables, the figures as CSV, and one self-contained HTML page.

The numbers of two plots stand beside it as JSON."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from selfrag_jax import artifacts
from selfrag_jax.errors import UserError
from selfrag_jax.evaluation.page.figures import Plot
from selfrag_jax.evaluation.page.page import build_page
from selfrag_jax.evaluation.page.plots_of_answers import (
    NUMBER_FILES,
    AnswerCurves,
    answer_curves,
)
from selfrag_jax.evaluation.page.plots_of_results import plots_of
from selfrag_jax.evaluation.page.questions import PageLimits
from selfrag_jax.evaluation.tables import Row, markdown
from selfrag_jax.files import atomic_write, write_json, write_text

PAGE, TABLES, FIGURES = FILES = ("index.html", "results.md", "results.csv")
_COLUMNS = ("system", "task", "metric", "value", "low", "high", "n")
_OURS = '<meta name="generator" content="selfrag_jax">'  # in the page's template


def require_own(out: str | Path) -> None:
    """Raises UserError if a report cannot be written to `out`, or would replace others' files.

    A folder with results.json is a quickstart's, or the mean of several.
    """
    out = Path(out)
    written = (*FILES, *NUMBER_FILES)
    artifacts.check_output(out, "report", {}, [out / name for name in written])
    if not any((out / name).exists() for name in written) or (out / "results.json").is_file():
        return
    page = out / PAGE
    if not page.is_file() or _OURS not in page.read_text(encoding="utf-8", errors="replace"):
        found = next(out / name for name in written if (out / name).exists())
        raise UserError(f"{found}: was not made by `selfrag report`; choose another --out")


def write_report(
    rows: Sequence[Row],
    questions: Sequence[Row],
    out: str | Path,
    title: str,
    differences: Sequence[Row] = (),
    paper: Sequence[Row] = (),
    plots: Sequence[Plot] = (),
    limits: PageLimits | None = None,
    curves: AnswerCurves | None = None,
) -> None:
    """Writes index.html, results.md and results.csv to the folder `out`; see `require_own`.

    Beside them come the numbers of the plots of answers, NUMBER_FILES, where there are such plots.

    rows: of results.json.
    questions: rows of `selfrag answer` for the page to show, with `system` and `task` added and,
        where they are known, `gold` (texts), `metrics` ({name: number}) and `popularity`.
    differences: see `tables.markdown`.
    paper: published figures, with system, task, metric and value, to stand below ours.
    plots: drawn besides those that `rows` and `questions` give.
    limits: how many questions go into the page.
    curves: of popularity and retrieval rate, drawn first; None: those of the questions.
    """
    out = Path(out)
    require_own(out)
    curves = answer_curves(questions) if curves is None else curves
    every = [*plots_of(rows, questions, curves), *plots]
    page = build_page(title, rows, questions, differences, paper, every, limits)
    write_text(out / PAGE, page)  # first: it says that the folder is ours
    write_text(out / TABLES, f"# {title}\n\n{markdown(rows, differences)}")
    for name, numbers in curves.files().items():
        if numbers:
            write_json(out / name, numbers)
        else:  # of an earlier report
            (out / name).unlink(missing_ok=True)
    with atomic_write(out / FIGURES) as f:
        table = csv.DictWriter(f, _COLUMNS, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
