"""`selfrag sweep`: questions and lists of settings in, the scores of every combination out.

Where only scores or the threshold change and no token does (answers of one segment, the paper's
scorer), nothing is generated again: see answering/rescoring.py.
"""

from __future__ import annotations

import csv
import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfrag_jax import artifacts, locks
from selfrag_jax.commands.answer import answers_in_folder
from selfrag_jax.commands.command import Command, Flag
from selfrag_jax.commands.judging import JUDGE_FLAG, TRUTH_FLAG, open_judge
from selfrag_jax.commands.model_flags import (
    ANSWER_CONFIG_FLAG,
    DEFAULT_CONFIG,
    LOADING_FLAGS,
    MODEL_FLAGS,
    SEARCH_FLAGS,
    load_selfrag,
    search_changes,
)
from selfrag_jax.data.questions import read_questions
from selfrag_jax.errors import UserError
from selfrag_jax.evaluation.judges import EntailmentJudge, RememberingJudge
from selfrag_jax.evaluation.metrics import SupportJudge
from selfrag_jax.evaluation.scores import (
    AMOUNTS,
    MAIN_METRICS,
    columns,
    gold_notice,
    result_rows,
    score_questions,
)
from selfrag_jax.evaluation.tables import percent
from selfrag_jax.files import atomic_write, write_json
from selfrag_jax.records import Question
from selfrag_jax.search.config import ADAPTIVE, ALWAYS, NEVER
from selfrag_jax.search.scoring import Weights

if TYPE_CHECKING:
    from selfrag_jax.answering.selfrag import SelfRAG

Row = dict[str, Any]
WEIGHTS = tuple(f.name for f in fields(Weights))
SWEPT: dict[str, type] = {
    **dict.fromkeys(WEIGHTS, float),
    "threshold": float,
    "ndocs": int,
    "beam_width": int,
    "max_depth": int,
}
METRICS = (*MAIN_METRICS, "num_passages", "num_answer_tokens")


def sweep(
    rag: SelfRAG,
    input_path: str | Path,
    out: str | Path,
    grid: Mapping[str, Sequence[Any]],
    changes: Mapping[str, Any],
    seed: int,
    judge: SupportJudge | EntailmentJudge | None = None,
    judge_name: str = "none",
) -> list[Row]:
    """Scores every combination of the settings in `grid`; writes sweep.json, sweep.csv and plots.

    changes: other settings, for all of them. judge: of citations. Answers are kept in
    `out`/answers: an interrupted sweep continues, and a larger one in the same folder generates
    only what is new. Returns one {"settings", "rows"} a combination. Raises UserError before
    anything is generated if a setting is wrong.
    """
    out = Path(out)
    points = [dict(zip(grid, v, strict=True)) for v in itertools.product(*grid.values())]
    for point in points:
        rag.check({**changes, **point})
    artifacts.require_own_or_empty(out, "sweep")
    questions = read_questions(input_path)
    if notice := gold_notice(questions):
        print(f"{input_path}: {notice}", file=sys.stderr)
    if judge is not None and not callable(judge):
        judge = RememberingJudge(judge)  # many combinations choose the same answers
    read: dict[str, list[Row]] = {}

    def answer(settings: dict[str, Any]) -> list[Row]:
        """The answers of a search with these settings; a file is read once for all points."""
        key = json.dumps(settings, sort_keys=True)
        if key not in read:
            read[key] = answers_in_folder(rag, input_path, out / "answers", settings)
        return read[key]

    found = []
    with locks.exclusive_workdir(out):
        artifacts.claim_workdir(out, "sweep", {}, {"input": input_path, **rag.sources})
        for point in points:
            answers = _answers(rag, questions, {**changes, **point}, answer)
            every = columns(score_questions(questions, answers, judge))
            values = {name: every[name] for name in METRICS if name in every}
            name = ", ".join(f"{k}={v:g}" for k, v in point.items())
            found.append({"settings": point, "rows": result_rows(name, "sweep", values, seed)})
        made = {"points": found, "changes": dict(changes), "seed": seed, "judge": judge_name}
        write_json(out / "sweep.json", made)
        _write_csv(out / "sweep.csv", found)
        _plot(out, grid, found)
    counts = {"points": len(points), "questions": len(questions)}
    artifacts.write_manifest(out, "sweep", {}, {}, counts)
    return found


def _answers(
    rag: SelfRAG,
    questions: Sequence[Question],
    settings: dict[str, Any],
    answer: Callable[[dict[str, Any]], list[Row]],
) -> list[Row]:
    """The answers with these settings: those of a search, or other ones scored again."""
    from selfrag_jax.answering.rescoring import at_threshold, rescored

    config = rag.search_config(settings)
    if config.max_depth > 1 or config.scorer != "paper" or config.temperature:
        return answer(settings)
    free = {k: v for k, v in settings.items() if k not in (*WEIGHTS, "threshold", "mode")}
    modes = {ADAPTIVE: (ALWAYS, NEVER)}.get(config.mode, (config.mode,))
    options = [q.options if rag.config.closed_set else () for q in questions]
    scored = [
        [rescored(row, config.weights, o) for row, o in zip(rows, options, strict=True)]
        for rows in (answer({**free, "mode": mode}) for mode in modes)
    ]
    if config.mode != ADAPTIVE:
        return scored[0]
    return [at_threshold(a, n, config.threshold) for a, n in zip(*scored, strict=True)]


# ---- what is written -----------------------------------------------------------------------------
def _write_csv(path: Path, found: Sequence[Row]) -> None:
    """One line a combination and metric."""
    swept = list(found[0]["settings"])
    with atomic_write(path) as f:
        lines = csv.writer(f, lineterminator="\n")
        lines.writerow([*swept, "metric", "value", "low", "high", "n"])
        for point in found:
            for row in point["rows"]:
                numbers = [row[k] for k in ("metric", "value", "low", "high", "n")]
                lines.writerow([*point["settings"].values(), *numbers])


def _plot(out: Path, grid: Mapping[str, Sequence[Any]], found: Sequence[Row]) -> None:
    """A plot for each setting with several values; the others have their first one.

    SETTING.svg has the shares, SETTING.METRIC.svg an amount.
    """
    from selfrag_jax.evaluation import plots

    nothing = (float("nan"),) * 3
    for name, x in grid.items():
        if len(x) < 2:
            continue
        first = {k: v[0] for k, v in grid.items() if k != name}
        along = [p for p in found if first.items() <= p["settings"].items()]
        metrics = dict.fromkeys(row["metric"] for p in along for row in p["rows"])
        lines: dict[str, list[tuple[float, float, float]]] = {}
        for metric in metrics:
            rows = [next((r for r in p["rows"] if r["metric"] == metric), None) for p in along]
            lines[metric] = [
                (r["value"], r["low"], r["high"]) if r is not None else nothing for r in rows
            ]
        shares = {m: points for m, points in lines.items() if m not in AMOUNTS}
        plots.curves(out / f"{name}.svg", name, x, shares)
        for metric in lines.keys() - shares.keys():
            file = out / f"{name}.{metric}.svg"
            plots.curves(file, name, x, {metric: lines[metric]}, are_shares=False)


def table(found: Sequence[Row]) -> str:
    """All combinations as text; shares in per cent."""
    metrics = list(dict.fromkeys(row["metric"] for p in found for row in p["rows"]))
    swept = list(found[0]["settings"])
    lines = [[*swept, *(m.replace("_", " ") for m in metrics)]]
    for point in found:
        values = {row["metric"]: percent(row) for row in point["rows"]}
        settings = [f"{v:g}" for v in point["settings"].values()]
        lines.append([*settings, *(values.get(m, "") for m in metrics)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(x, widths, strict=True)) for x in lines)


# ---- the command ---------------------------------------------------------------------------------
def parse_grid(values: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The lists of the swept flags. Raises UserError for what is no number, and for repetitions."""
    grid: dict[str, list[Any]] = {}
    for name, kind in SWEPT.items():
        if not (texts := values[name]):
            continue
        try:
            grid[name] = sorted(kind(text) for text in texts)
        except ValueError:
            expected = "whole numbers" if kind is int else "numbers"
            raise UserError(
                f"--{name}={','.join(texts)}: expected {expected} with commas"
            ) from None
        if len({*grid[name]}) < len(grid[name]):
            raise UserError(f"--{name}={','.join(texts)}: names a value twice")
    if not any(len(values) > 1 for values in grid.values()):
        flags = ", ".join(f"--{name}" for name in SWEPT)
        raise UserError(f"nothing to sweep: give a list to one of {flags}; e.g. --w_sup=0,0.5,1,2")
    return grid


def run(values: dict[str, Any], _: list[str]) -> None:
    grid = parse_grid(values)
    judge_name = values["judge"] or "none"
    judge = open_judge(judge_name, values["truth"] or "")  # before the model is loaded
    single = {**values, **dict.fromkeys(SWEPT)}
    rag = load_selfrag(single, calibrated="threshold" not in grid)
    changes = json.loads(json.dumps(search_changes(single)))
    changes |= {name: v for name, (v, *more) in grid.items() if not more}
    grid = {name: v for name, v in grid.items() if len(v) > 1}
    files, seed = (values["input"], values["out"]), values["bootstrap_seed"]
    found = sweep(rag, *files, grid, changes, seed, judge, judge_name)
    print(table(found))
    print(f"{values['out']}: sweep.csv, sweep.json and a plot for each setting")


COMMAND = Command(
    example="selfrag sweep --model=W/generator --index=W/index --input=questions.jsonl "
    "--out=sweep --max_depth=1 --w_sup=0,0.5,1,2 --threshold=0.1,0.2,0.5",
    flags=(
        *MODEL_FLAGS,
        Flag("input", "questions with gold answers", required=True),
        Flag(
            "out",
            "folder to write: sweep.csv, sweep.json, plots, answers",
            required=True,
            writes=True,
        ),
        *(
            replace(f, help=f"values with commas; {f.help}", type=tuple) if f.name in SWEPT else f
            for f in SEARCH_FLAGS
        ),
        JUDGE_FLAG,
        TRUTH_FLAG,
        *LOADING_FLAGS,
        Flag("bootstrap_seed", "seed of the intervals", 0, type=int),
        ANSWER_CONFIG_FLAG,
    ),
    run=run,
    default_config=DEFAULT_CONFIG,
)
