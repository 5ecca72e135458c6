"""Builds the page of the report: one HTML file with its style, script and data, no network."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Sequence
from pathlib import Path
from string import Template

from selfrag_jax.evaluation.page.figures import Plot, figure
from selfrag_jax.evaluation.page.questions import PageLimits, question_data, script_json
from selfrag_jax.evaluation.tables import (
    CRITIC_HEADER,
    DIFFERENCE_HEADER,
    NOT_95,
    Row,
    critic_rows,
    difference_rows,
    interval_text,
    metric_heading,
    metric_table,
    metrics_of,
    percent,
    system_title,
)

_FOLDER = Path(__file__).parent


def build_page(
    title: str,
    rows: Sequence[Row],
    questions: Sequence[Row],
    differences: Sequence[Row] = (),
    paper: Sequence[Row] = (),
    plots: Sequence[Plot] = (),
    limits: PageLimits | None = None,
) -> str:
    """Returns the page. For the arguments, see `report.write_report`."""
    data = question_data(questions, limits or PageLimits())
    style, script = (_file(name) for name in ("style.css", "page.js"))
    figures = [f for i, plot in enumerate(plots) if (f := figure(plot, i))]
    return Template(_file("template.html")).substitute(
        title=html.escape(title),
        policy=(
            "default-src 'none'; base-uri 'none'; form-action 'none'; "
            f"style-src '{_hash(style)}'; script-src '{_hash(script)}'"
        ),
        style=style,
        script=script,
        tables=_tables(rows, differences, paper),
        plots="".join(figures) or "<p>These results have no plots.</p>",
        embedded=_embedded(data),
        data=script_json(data),
    )


def _file(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _embedded(data: Row) -> str:
    """Returns a sentence that says which questions are in the page."""
    if not data["total"]:
        return "This report holds no questions."
    if data["shown"] == data["total"]:
        return f"All {data['total']:,} answers are here."
    return (
        f"{data['shown']:,} of {data['total']:,} answers are here: {data['wrong_shown']:,} of the "
        f"{data['wrong']:,} that are not fully right, which come first, and others up to the limit."
    )


def _tables(rows: Sequence[Row], differences: Sequence[Row], paper: Sequence[Row]) -> str:
    parts = []
    for metric in metrics_of(rows):
        parts.append(_metric_table(rows, metric, [r for r in paper if r["metric"] == metric]))
    if differences:
        parts.append(_table("Differences", DIFFERENCE_HEADER, difference_rows(differences)))
    if critic := critic_rows(rows):
        parts.append(_table("Critic accuracy (%)", CRITIC_HEADER, critic))
    return "".join(parts)


def _metric_table(rows: Sequence[Row], metric: str, paper: Sequence[Row]) -> str:
    """Returns a table of systems and tasks with 95% intervals, and below it the paper's figures."""
    systems, tasks, found = metric_table(rows, metric)
    body = [
        (
            html.escape(system_title(s)),
            *(_cell(found.get((s, t))) for t in tasks),
        )
        for s in systems
    ]
    published = {(r["system"], r["task"]): r for r in paper if r["task"] in tasks}
    for s in dict.fromkeys(s for s, _ in published):
        name = f"{html.escape(s)} <span class='paper'>paper</span>"
        body.append((name, *(percent(published.get((s, t))) for t in tasks)))
    header = ("system", *(t.replace("_", " ") for t in tasks))
    return _html_table(metric_heading(metric), header, body)


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if not interval_text(row):
        return f"<span title='n = {row['n']}'>{percent(row)}</span>"
    ends = interval_text(row)
    kind = "" if row["metric"] in NOT_95 else "95% interval "
    tooltip = f"{kind}{ends}, n = {row['n']}"
    return f"<span title='{tooltip}'>{percent(row)}</span> <span class='ci'>{ends}</span>"


def _table(title: str, header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    return _html_table(title, header, [[html.escape(cell) for cell in row] for row in body])


def _html_table(title: str, header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Returns a table in a box that scrolls. The cells of `body` are HTML."""
    head = "".join(f"<th scope='col'>{html.escape(cell)}</th>" for cell in header)
    lines = "".join(
        f"<tr><th scope='row'>{row[0]}</th>{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>"
        for row in body
    )
    name = html.escape(title)
    return (
        f"<h3>{name}</h3><div class='scroll' tabindex='0' role='region' aria-label='{name}'>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>"
    )
