"""`selfrag report`: finished quickstarts in, their tables and page out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from selfrag_jax.commands.command import Command, Flag
from selfrag_jax.commands.model_flags import require_quickstart
from selfrag_jax.errors import UserError
from selfrag_jax.files import write_json


def run(values: dict[str, Any], _: list[str]) -> None:
    from selfrag_jax.commands.quickstart import example_answers, paired_differences
    from selfrag_jax.evaluation import report, tables

    workdirs = [Path(w) for w in values["workdir"].split(",")]
    for w in workdirs:
        require_quickstart(w, w / "report" / "results.json")
    if len({w.resolve() for w in workdirs}) < len(workdirs):
        raise UserError(f"--workdir={values['workdir']}: names a workdir twice")
    if len(workdirs) > 1 and not values["out"]:
        raise UserError("several workdirs: --out says where to write their mean")
    out = Path(values["out"]) if values["out"] else workdirs[0] / "report"
    runs = [tables.read_results(w / "report" / "results.json") for w in workdirs]
    rows, title = runs[0], tables.TITLE
    if len(runs) > 1:
        rows, title = tables.mean_over_seeds(runs), f"{tables.TITLE}: mean of {len(runs)} runs"
        write_json(out / "results.json", {"rows": rows})
    differences = paired_differences(workdirs, seed=0)
    examples = example_answers(workdirs[0], values["examples"])
    report.write_report(rows, examples, out, title, differences)
    print(tables.markdown(rows, differences))
    print(f"{out}/index.html")


COMMAND = Command(
    example="selfrag report --workdir=W0,W1,W2 --out=mean",
    flags=(
        Flag("workdir", "of a finished quickstart; several with commas", required=True),
        Flag("out", "folder to write; default: the workdir's report"),
        Flag("examples", "questions to show", 6, type=int),
    ),
    run=run,
)
