"""Reads the folder of an evaluation for its report."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from selfrag_jax.errors import UserError
from selfrag_jax.evaluation.tables import Row, read_results
from selfrag_jax.files import read_object
from selfrag_jax.records import read_rows

_NODE_FIELDS = frozenset({"passage", "text", "p_segment", "isuse", "score", "chosen"})
_CRITIQUES = frozenset({"isrel", "issup"})  # of a node with a passage


@dataclass(frozen=True)
class EvaluatedRun:
    """An evaluation: its results, and its answers with gold and metrics."""

    rows: list[Row]
    questions: list[Row]
    paper: list[Row]


def read_run(folder: str | Path) -> EvaluatedRun:
    """Returns an evaluation from metrics.json, answers.jsonl and scores.jsonl in `folder`.

    Raises UserError naming file and line if one is missing, if the ids differ, or if a metric is no
    finite number.
    """
    folder = Path(folder)
    missing = [n for n in ("metrics.json", "answers.jsonl", "scores.jsonl") if not _file(folder, n)]
    if missing:
        raise UserError(
            f"{folder}: holds no finished evaluation ({', '.join(missing)} missing); "
            f"run `selfrag evaluate --task=TASK --input=FILE --model=M --out={folder}` first"
        )
    rows = read_results(folder / "metrics.json")
    for i, row in enumerate(rows):
        # A time has no interval: low and high are null.
        ends = () if row["low"] is None and row["high"] is None else ("low", "high")
        for field in ("value", *ends):
            if not _finite(row[field]):
                raise UserError(
                    f"{folder / 'metrics.json'}: row {i + 1}: {field} must be a finite number, "
                    f"found {row[field]!r}"
                )
    systems, tasks = ({r[name] for r in rows} for name in ("system", "task"))
    common = {
        "system": next(iter(systems)) if len(systems) == 1 else "",
        "task": next(iter(tasks)) if len(tasks) == 1 else "",
    }
    scores = {
        str(_field(where, row, "id")): (where, row)
        for where, row in read_rows(folder / "scores.jsonl")
    }
    questions = [
        _question(where, row, scores, common) for where, row in read_rows(folder / "answers.jsonl")
    ]
    if len(questions) != len(scores):
        raise UserError(
            f"{folder}: answers.jsonl has {len(questions)} rows and scores.jsonl {len(scores)}; "
            f"they are not of one evaluation"
        )
    return EvaluatedRun(rows, questions, _published(rows))


def _published(rows: list[Row]) -> list[Row]:
    """The paper's figures that stand beside ours, as rows of the models by their size."""
    return [
        {"system": f"Self-RAG {size.upper()}", "task": r["task"], "metric": r["metric"], "value": v}
        for r in rows
        for size, v in r.get("paper", {}).items()
    ]


def read_sweep(folder: str | Path) -> list[Row]:
    """Returns the points of a sweep, {"settings", "rows"}, from sweep.json in `folder`."""
    file = Path(folder) / "sweep.json"
    if not file.is_file():
        raise UserError(f"{folder}: holds no finished sweep; run `selfrag sweep --out={folder}`")
    return read_object(file, ("points",))["points"]


def named(run: EvaluatedRun, system: str) -> EvaluatedRun:
    """Returns the run with the name `system` for its system, to stand beside other runs."""
    return replace(
        run,
        rows=[row | {"system": system} for row in run.rows],
        questions=[q | {"system": system} for q in run.questions],
    )


def _file(folder: Path, name: str) -> bool:
    return (folder / name).is_file()


def _question(
    where: str, row: Row, scores: dict[str, tuple[str, Row]], common: dict[str, str]
) -> Row:
    """Returns an answer with its scores. Raises UserError where it has none."""
    key = str(_field(where, row, "id"))
    if key not in scores:
        raise UserError(f"{where}: id {key!r} is not in scores.jsonl; evaluate the answers again")
    for name in ("question", "answer"):
        _field(where, row, name)
    _check_tree(where, row)
    at, scored = scores[key]
    metrics = scored.get("metrics", {})
    for name, value in metrics.items():
        if not _finite(value):
            raise UserError(f"{at}: metric {name} must be a finite number, found {value!r}")
    popularity = scored.get("popularity")
    if popularity is not None and not _finite(popularity):
        raise UserError(f"{at}: popularity must be a finite number, found {popularity!r}")
    both = {
        "system": scored.get("system") or common["system"],
        "task": scored.get("task") or common["task"] or row.get("task", ""),
    }
    added = {"gold": scored.get("gold") or (), "metrics": metrics, "popularity": popularity}
    return row | both | added


def _check_tree(where: str, row: Row) -> None:
    """Raises UserError if a node of the tree lacks a field, or a citation its passage."""
    for i, n in enumerate(row.get("tree", ())):
        needed = _NODE_FIELDS | (_CRITIQUES if n.get("passage") else frozenset())
        if lacking := needed - set(n):
            raise UserError(f"{where}: tree node {i + 1} lacks {', '.join(sorted(lacking))}")
    count = len(row.get("passages", ()))
    for c in row.get("citations", ()):
        if not 0 <= c["passage"] < count:
            raise UserError(f"{where}: a citation names passage {c['passage']} of {count}")


def _field(where: str, row: Row, name: str) -> Any:
    if name not in row:
        raise UserError(f"{where}: missing field {name!r}")
    return row[name]


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
