"""The report: results.json as Markdown tables and as one self-contained HTML page.

The page has tables, bars, and the critique tree of a few answers.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from selfrag_jax.evaluation.tables import (
    DIFFERENCE_HEADER,
    METRIC_TITLES,
    SYSTEM_TITLES,
    Row,
    critic_rows,
    difference_rows,
    markdown,
    metric_table,
    percent,
)
from selfrag_jax.files import atomic_write

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;\
color:#1c2733}
table{border-collapse:collapse;margin:1rem 0}\
td,th{padding:.3rem .7rem;text-align:right;border-bottom:1px solid #dde3ea}
td:first-child,th:first-child{text-align:left}th{font-weight:600;background:#f4f7fa}
.bar{display:inline-block;height:.8rem;background:#3b7dd8;border-radius:2px;vertical-align:middle}
.card{border:1px solid #dde3ea;border-radius:8px;padding:1rem 1.2rem;margin:1rem 0}
.chosen td{background:#eaf5ea}.muted{color:#667}.q{font-weight:600}
"""


def write_report(
    rows: Sequence[Row],
    examples: Sequence[Row],
    out: str | Path,
    title: str,
    differences: Sequence[Row] = (),
) -> None:
    """Writes results.md and index.html to the folder `out`.

    `examples` holds rows of `selfrag answer` to show with their critiques; for `differences`, see
    `markdown`.
    """
    out = Path(out)
    with atomic_write(out / "results.md") as f:
        f.write(f"# {title}\n\n{markdown(rows, differences)}")
    page = _page(rows, examples, title, differences)
    with atomic_write(out / "index.html") as f:
        f.write(page)


def _page(
    rows: Sequence[Row], examples: Sequence[Row], title: str, differences: Sequence[Row]
) -> str:
    sections = [
        f"<h1>{html.escape(title)}</h1>"
        f"<h2>Accuracy on questions about rare entities (%)</h2>{_long_tail_bars(rows)}"
    ]
    for metric in METRIC_TITLES:
        if metric_table(rows, metric)[0]:
            heading = metric.replace("_", " ").capitalize()
            sections.append(f"<h2>{heading} (%)</h2>{_metric_table(rows, metric)}")
    if differences:
        table = _table(DIFFERENCE_HEADER, difference_rows(differences))
        sections.append(f"<h2>Differences</h2>{table}")
    if critic := critic_rows(rows):
        table = _table(("group", "accuracy", "n"), critic)
        sections.append(f"<h2>Critic accuracy (%)</h2>{table}")
    if examples:
        cards = "".join(map(_answer_card, examples))
        sections.append(f"<h2>Some questions, with the critique of each passage</h2>{cards}")
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<style>{_STYLE}</style><body>{''.join(sections)}</body></html>\n"
    )


def _table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    lines = ""
    for row in body:
        lines += f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>"
    return f"<table><tr>{head}</tr>{lines}</table>"


def _metric_table(rows: Sequence[Row], metric: str) -> str:
    """Returns a table of systems and tasks; the tooltip of a cell is its 95% interval."""
    systems, tasks, found = metric_table(rows, metric)
    head = "".join(f"<th>{html.escape(t.replace('_', ' '))}</th>" for t in tasks)
    lines = ""
    for s in systems:
        cells = ""
        for t in tasks:
            row, tooltip = found.get((s, t)), ""
            if row:
                low, high = 100 * row["low"], 100 * row["high"]
                tooltip = f"95% interval {low:.1f} to {high:.1f}, n = {row['n']}"
            cells += f'<td title="{tooltip}">{percent(row)}</td>'
        lines += f"<tr><td>{html.escape(SYSTEM_TITLES[s])}</td>{cells}</tr>"
    return f"<table><tr><th>system</th>{head}</tr>{lines}</table>"


def _long_tail_bars(rows: Sequence[Row]) -> str:
    """Returns the long-tail accuracy of every system as bars."""
    systems, _, found = metric_table(rows, "accuracy")
    lines = ""
    for s in systems:
        if row := found.get((s, "long_tail")):
            bar = f'<span class="bar" style="width:{24 * row["value"]:.1f}rem"></span>'
            lines += (
                f"<tr><td>{html.escape(SYSTEM_TITLES[s])}</td>"
                f"<td style='text-align:left'>{bar} {percent(row)}</td></tr>"
            )
    return f"<table>{lines}</table>"


def _answer_card(row: Row) -> str:
    """Returns one question and its answer, with the critique of each passage."""
    lines = ""
    for node in row["tree"]:
        passage = node["passage"]["text"] if node["passage"] else "(no passage)"
        relevant, supported = "", ""
        if node["passage"]:
            relevant, supported = f"{node['isrel'][1]:.2f}", f"{node['issup'][0]:.2f}"
        others = (node["isuse"][4], node["p_segment"], node["score"])
        numbers = (relevant, supported, *(f"{x:.2f}" for x in others))
        mark = ' class="chosen"' if node["chosen"] else ""
        lines += (
            f"<tr{mark}><td>{html.escape(passage)}</td>"
            f"<td style='text-align:left'>{html.escape(node['text'])}</td>"
            f"{''.join(f'<td>{number}</td>' for number in numbers)}</tr>"
        )
    head = (
        "<th>passage</th><th style='text-align:left'>segment</th><th>Relevant</th>"
        "<th>Fully supported</th><th>Utility 5</th><th>p(segment)</th><th>score</th>"
    )
    decision = "retrieved" if row["retrieved"] else "no retrieval"
    return (
        f"<div class='card'><div class='q'>{html.escape(row['question'])}</div>"
        f"<div>{html.escape(row['answer'])}</div>"
        f"<div class='muted'>p(retrieve) {row['p_retrieve']:.2f}: {decision}</div>"
        f"<table><tr>{head}</tr>{lines}</table></div>"
    )
