"""Reads the folder of an evaluation for its report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from selfrag_jax import artifacts
from selfrag_jax.errors import UserError
from selfrag_jax.evaluation.answer_checks import (
    check_answer,
    is_finite,
    is_number,
    require_number,
    require_text,
)
from selfrag_jax.evaluation.systems import BY_NAME, FULL
from selfrag_jax.evaluation.tables import INTERVAL, Row, read_results, system_title
from selfrag_jax.files import read_object
from selfrag_jax.records import RANKS, read_rows

_NODE_FIELDS = frozenset({"passage", "text", "p_segment", "isuse", "score", "chosen"})
# The critiques of a node, and how many probabilities each has; all but isuse need a passage.
_CRITIQUES = {"isuse": 5, "isrel": 2, "issup": 3}


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
    missing = [
        n for n in ("metrics.json", "answers.jsonl", "scores.jsonl") if not (folder / n).is_file()
    ]
    if missing:
        raise UserError(
            f"{folder}: holds no finished evaluation ({', '.join(missing)} missing); "
            f"run `selfrag evaluate --task=TASK --input=FILE --model=M --out={folder}` first"
        )
    rows = read_results(folder / "metrics.json")
    systems, tasks = ({r[name] for r in rows} for name in ("system", "task"))
    common = {
        "system": next(iter(systems)) if len(systems) == 1 else "",
        "task": next(iter(tasks)) if len(tasks) == 1 else "",
        "scorer": _scorer(folder / "answers.jsonl"),
    }
    scores: dict[str, tuple[str, Row]] = {}
    for where, row in read_rows(folder / "scores.jsonl"):
        _add_once(scores, where, row)
    answers: dict[str, tuple[str, Row]] = {}
    for where, row in read_rows(folder / "answers.jsonl"):
        _add_once(answers, where, row)
    questions = [_question(where, row, scores, common) for where, row in answers.values()]
    if not questions or len(questions) != len(scores):
        raise UserError(
            f"{folder}: answers.jsonl has {len(questions)} rows and scores.jsonl {len(scores)}; "
            f"they are not of one evaluation"
        )
    return EvaluatedRun(rows, questions, _published(rows))


def _scorer(answers: Path) -> str:
    """The scorer of a file of answers, by its manifest; the paper's for those of other programs."""
    manifest = artifacts.manifest_path(answers)
    made = read_object(manifest, ()).get("config") if manifest.is_file() else None
    settings = made if isinstance(made, dict) else {}
    for name in ("answer", "search"):
        settings = settings | (settings.get("changes") or {})
        if "scorer" in settings:
            break
        settings = settings.get(name) or {}
    return str(settings.get("scorer", "paper"))


def _published(rows: list[Row]) -> list[Row]:
    """The paper's figures that stand beside ours, as rows of the systems by their models' size.

    Those of baselines and ablations carry their titles; all others are of Self-RAG itself.
    """
    found = []
    for r in rows:
        listed = BY_NAME.get(r["system"], BY_NAME[FULL])
        is_other = listed.name != FULL and (listed.table2 or listed.table3)
        title = system_title(listed.name) if is_other else "Self-RAG"
        for size, value in r.get("paper", {}).items():
            row = {"system": f"{title} {size.upper()}", "task": r["task"], "metric": r["metric"]}
            found.append(row | {"value": value})
    return found


def read_sweep(folder: str | Path) -> list[Row]:
    """Returns the points of a sweep, {"settings", "rows"}, from sweep.json in `folder`."""
    file = Path(folder) / "sweep.json"
    if not file.is_file():
        raise UserError(f"{folder}: holds no finished sweep; run `selfrag sweep --out={folder}`")
    points = read_object(file, ("points",))["points"]
    if not isinstance(points, list) or not all(map(_is_point, points)):
        raise UserError(f"{file}: is damaged; make it again with `selfrag sweep`")
    return points


def read_reliability(folder: str | Path) -> dict[str, list[Row]]:
    """Returns the bins of each group's reliability, from metrics.json of a critic's evaluation."""
    file = Path(folder) / "metrics.json"
    bins = read_object(file, ()).get("reliability") if file.is_file() else None
    if bins is None:
        raise UserError(
            f"{folder}: holds no evaluation of a critic; run `selfrag evaluate --task=critic "
            f"--critic=C --data=FILE --out={folder}` first"
        )
    if not isinstance(bins, dict) or not all(map(_are_bins, bins.values())):
        raise UserError(f"{file}: field 'reliability' is damaged; evaluate the critic again")
    return bins


def _are_bins(bins: Any) -> bool:
    return isinstance(bins, list) and all(
        isinstance(b, dict) and all(is_finite(b.get(k)) for k in ("n", "confidence", "accuracy"))
        for b in bins
    )


def read_losses(workdirs: Sequence[str | Path]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Returns the logged scalars of trainings, by the folder's name; by its path if two share it.

    Raises UserError for a folder without logged losses.
    """
    from selfrag_jax.training.event_files import read_scalars

    names = [Path(w).name for w in workdirs]
    found = {}
    for workdir, name in zip(workdirs, names, strict=True):
        scalars = read_scalars(workdir)
        if not any(tag.startswith("loss/") for tag in scalars):
            raise UserError(f"{workdir}: holds no losses; --losses are workdirs of `selfrag train`")
        found[name if names.count(name) == 1 else str(workdir)] = scalars
    return found


def _is_point(point: Any) -> bool:
    """Whether it is a combination of a sweep: numbers as settings, and rows of results."""
    if not isinstance(point, dict) or not isinstance(point.get("settings"), dict):
        return False
    rows = point.get("rows")
    return (
        all(map(is_finite, point["settings"].values()))
        and isinstance(rows, list)
        and all(
            isinstance(r, dict) and "metric" in r and all(is_finite(r.get(k)) for k in INTERVAL)
            for r in rows
        )
    )


def named(run: EvaluatedRun, system: str) -> EvaluatedRun:
    """Returns the run with the name `system` for its system, to stand beside other runs."""
    return replace(
        run,
        rows=[row | {"system": system} for row in run.rows],
        questions=[q | {"system": system} for q in run.questions],
    )


def _add_once(rows: dict[str, tuple[str, Row]], where: str, row: Row) -> None:
    if "id" not in row:
        raise UserError(f"{where}: missing field 'id'")
    if (key := str(row["id"])) in rows:
        raise UserError(f"{where}: id {key!r} stands twice")
    rows[key] = where, row


def _question(
    where: str, row: Row, scores: dict[str, tuple[str, Row]], common: dict[str, str]
) -> Row:
    """Returns an answer with its scores. Raises UserError where it has none."""
    key = str(row["id"])
    if key not in scores:
        raise UserError(f"{where}: id {key!r} is not in scores.jsonl; evaluate the answers again")
    for name in ("question", "answer"):
        if name not in row:
            raise UserError(f"{where}: missing field {name!r}")
    check_answer(where, row)
    for i, node in enumerate(row.get("tree", ())):
        _check_node(f"{where}: tree node {i + 1}", node)
    at, scored = scores[key]
    metrics, gold = scored.get("metrics", {}), scored.get("gold") or []
    if not isinstance(metrics, dict):
        raise UserError(f"{at}: field 'metrics' must be an object")
    if not isinstance(gold, list):
        raise UserError(f"{at}: field 'gold' must be a list")
    for name, value in metrics.items():
        if not is_finite(value):
            raise UserError(f"{at}: metric {name} must be a finite number, found {value!r}")
    ranks = {name: scored.get(name) for name in RANKS}
    for name, value in ranks.items():
        if value is not None and not is_finite(value):
            raise UserError(f"{at}: {name} must be a finite number, found {value!r}")
    both = {
        "system": scored.get("system") or common["system"],
        "task": scored.get("task") or common["task"] or row.get("task", ""),
        "scorer": common["scorer"],
    }
    return row | both | ranks | {"gold": gold, "metrics": metrics}


def _check_node(where: str, node: Row) -> None:
    """Raises UserError if a node of the tree lacks a field, or if one has another form."""
    critiques = {n: k for n, k in _CRITIQUES.items() if n == "isuse" or node.get("passage")}
    if lacking := (_NODE_FIELDS | set(critiques)) - set(node):
        raise UserError(f"{where} lacks {', '.join(sorted(lacking))}")
    require_text(where, node, "text")
    for name in ("p_segment", "score"):
        require_number(where, node, name)
    for name, count in critiques.items():
        values = node[name]
        if not isinstance(values, list) or len(values) != count or not all(map(is_number, values)):
            raise UserError(f"{where}: field {name!r} must be {count} numbers")
