"""The answers of a quickstart that the report's plots by popularity and retrieval rate need.

They are found by the files in the workdir, whatever its world and its tasks are.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfrag_jax.data.questions import read_questions
from selfrag_jax.records import read_rows

if TYPE_CHECKING:
    from selfrag_jax.evaluation.page.plots_of_answers import AnswerCurves

Row = dict[str, Any]
# The others differ from these in little, or would fill the plots.
PLOTTED_SYSTEMS = (
    "base_few_shot",
    "no_retrieval",
    "rag_top1",
    "selfrag_always",
    "selfrag_adaptive",
    "selfrag_never",
)


def plotted_curves(w: Path) -> AnswerCurves:
    """Returns the curves of all tasks, for `report.write_report`."""
    from selfrag_jax.evaluation.page.plots_of_answers import answer_curves

    return answer_curves(plotted_answers(w))


def plotted_answers(w: Path) -> list[Row]:
    """Returns the scored answers of PLOTTED_SYSTEMS to all tasks."""
    from selfrag_jax.evaluation import scores

    found = []
    for system in PLOTTED_SYSTEMS:
        for file in sorted((w / "predictions" / system).glob("*.jsonl")):
            task = file.stem
            asked = read_questions(w / "retrieved" / "eval" / file.name, task)
            answers = [row for _, row in read_rows(file)]
            scored = {one["id"]: one for one in scores.score_questions(asked, answers)}
            of = {"system": system, "task": task}
            found += [row | scored_fields(scored[str(row["id"])]) | of for row in answers]
    return found


def scored_fields(one: Row) -> Row:
    """Returns what the plots read of a row of scores.jsonl."""
    return {name: one[name] for name in ("metrics", "popularity", "decile") if name in one}
