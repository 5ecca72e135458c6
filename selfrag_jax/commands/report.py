"""`selfrag report`: finished quickstarts or evaluations in, their tables and page out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfrag_jax.commands.command import INPUT, OUTPUT, Command, Flag
from selfrag_jax.commands.model_flags import require_quickstart
from selfrag_jax.errors import UserError
from selfrag_jax.files import write_json

if TYPE_CHECKING:
    from selfrag_jax.evaluation.page.figures import Plot

QUESTIONS = 2000
PLOT_FLAGS = ("sweep", "critic_scores", "losses")


def run(values: dict[str, Any], _: list[str]) -> None:
    if (values["workdir"] is None) == (values["run"] is None):
        raise UserError("give --workdir, of a quickstart, or --run, the folder of an evaluation")
    if given := [flag for flag in PLOT_FLAGS if values[flag] and values["workdir"]]:
        raise UserError(f"--{given[0]} goes with --run")
    if values["examples"] < 0:
        raise UserError(f"--examples={values['examples']}: must be 0 or more")
    out = _report_runs(values) if values["run"] else _report_quickstarts(values)
    print(f"{out}/index.html")


def _folders(values: dict[str, Any], flag: str) -> list[Path]:
    folders = [Path(w.strip()) for w in values[flag].split(",") if w.strip()]
    if not folders:
        raise UserError(f"--{flag}={values[flag]}: names no folder")
    if len({w.resolve() for w in folders}) < len(folders):
        raise UserError(f"--{flag}={values[flag]}: names a folder twice")
    if len(folders) > 1 and flag != "losses" and not values["out"]:
        raise UserError(f"several {flag}s: --out says where to write")
    return folders


def _report_quickstarts(values: dict[str, Any]) -> Path:
    from selfrag_jax.commands.plotted_answers import plotted_curves
    from selfrag_jax.commands.quickstart import (
        TEACHER,
        paired_differences,
        shown_answers,
        training_plots,
    )
    from selfrag_jax.commands.worlds import common_kind
    from selfrag_jax.evaluation import report, tables
    from selfrag_jax.evaluation.page.questions import PageLimits

    workdirs = _folders(values, "workdir")
    for w in workdirs:
        require_quickstart(w, w / "report" / "results.json", w / TEACHER)
    out = Path(values["out"]) if values["out"] else workdirs[0] / "report"
    report.require_own(out)
    runs = [tables.read_results(w / "report" / "results.json") for w in workdirs]
    kind = common_kind([w / TEACHER for w in workdirs])
    rows, title = runs[0], kind.title
    if len(runs) > 1:
        rows, title = tables.mean_over_seeds(runs), f"{kind.title}: mean of {len(runs)} runs"
        write_json(out / "results.json", {"rows": rows})
    differences = paired_differences(workdirs, kind, seed=0)
    report.write_report(
        rows,
        shown_answers(workdirs[0], kind),
        out,
        title,
        differences,
        plots=training_plots(workdirs[0]),
        curves=plotted_curves(workdirs[0]),
        limits=PageLimits(values["examples"]),
    )
    print(tables.markdown(rows, differences))
    return out


def _report_runs(values: dict[str, Any]) -> Path:
    from selfrag_jax.evaluation import report, tables
    from selfrag_jax.evaluation.page.questions import PageLimits
    from selfrag_jax.evaluation.page.runs import named, read_run

    folders = _folders(values, "run")
    out = Path(values["out"]) if values["out"] else folders[0] / "report"
    report.require_own(out)
    runs = [read_run(folder) for folder in folders]
    cells = [(r["system"], r["task"], r["metric"]) for run in runs for r in run.rows]
    if len(set(cells)) < len(cells):  # two runs of one system: the folder tells them apart
        names = [str(f) for f in folders]
        runs = [named(run, name) for run, name in zip(runs, names, strict=True)]
    rows = [row for run in runs for row in run.rows]
    paper = list({repr(row): row for run in runs for row in run.paper}.values())
    report.write_report(
        rows,
        [q for run in runs for q in run.questions],
        out,
        f"Evaluation: {', '.join(dict.fromkeys(row['task'] for row in rows))}",
        paper=paper,
        plots=_plots(values),
        limits=PageLimits(values["examples"]),
    )
    print(tables.markdown(rows))
    return out


def _plots(values: dict[str, Any]) -> list[Plot]:
    """What the report of --run draws besides its results."""
    from selfrag_jax.evaluation.page import plots_of_results, runs

    plots: list[Plot] = []
    if values["sweep"]:
        plots += plots_of_results.sweep_curves(runs.read_sweep(values["sweep"]))
    if values["critic_scores"]:
        plots += plots_of_results.reliability(runs.read_reliability(values["critic_scores"]))
    if values["losses"]:
        losses = runs.read_losses(_folders(values, "losses"))
        plots += plots_of_results.training_losses(losses)
    return plots


COMMAND = Command(
    example=(
        "selfrag report --workdir=W0,W1,W2 --out=mean\n"
        "selfrag report --run=popqa-adaptive,popqa-always --out=popqa"
    ),
    flags=(
        Flag(
            "workdir",
            "folder of a finished quickstart; several with commas",
            group=INPUT,
            is_folder=True,
        ),
        Flag(
            "run",
            "folder of a finished `selfrag evaluate --task`; several with commas",
            group=INPUT,
            is_folder=True,
        ),
        Flag(
            "sweep",
            "folder of a `selfrag sweep`, whose curves the report of --run shows too",
            group=INPUT,
            is_folder=True,
        ),
        Flag(
            "critic_scores",
            "folder of a `selfrag evaluate --task=critic`: its reliability, too",
            group=INPUT,
            is_folder=True,
        ),
        Flag(
            "losses",
            "workdirs of `selfrag train`, with commas: their losses, too",
            group=INPUT,
            is_folder=True,
        ),
        Flag(
            "out",
            "folder to write; default: `report` in the first workdir or run",
            writes=True,
            default_beside=("workdir", "run"),
        ),
        Flag(
            "examples",
            "answers in the page at most, the wrong ones first",
            QUESTIONS,
            type=int,
            group=OUTPUT,
        ),
    ),
    run=run,
)
