"""`selfrag quickstart`: every stage of the flow, in order, in the world that the config names.

Calls the functions of the other commands; an interrupted run continues where it was.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from selfrag_jax import artifacts
from selfrag_jax import config as configs
from selfrag_jax.commands.collect import collect_critiques
from selfrag_jax.commands.command import DISTRIBUTED, Command, Flag, config_flag, load_config
from selfrag_jax.commands.embed import embed_corpus
from selfrag_jax.commands.index import build_index
from selfrag_jax.commands.label import label_file
from selfrag_jax.commands.plain_data import baseline_data
from selfrag_jax.commands.plotted_answers import plotted_curves, scored_fields
from selfrag_jax.commands.retrieve import retrieve_file
from selfrag_jax.commands.retrieve_labels import self_needs
from selfrag_jax.commands.train import train_model
from selfrag_jax.commands.world import make_world
from selfrag_jax.commands.world_evaluation import (
    INSTRUCTIONS,
    TEACHER,
    evaluate_critic,
    evaluate_systems,
    predictions_file,
)
from selfrag_jax.commands.worlds import WorldKind, kind_of_config, kind_of_file
from selfrag_jax.critic.collecting import CollectConfig
from selfrag_jax.data.instructions import read_instructions
from selfrag_jax.data.questions import read_questions
from selfrag_jax.errors import UserError
from selfrag_jax.files import read_json, read_object, write_json
from selfrag_jax.processes.group import current
from selfrag_jax.records import read_rows
from selfrag_jax.retrieval.encoders import EncoderConfig
from selfrag_jax.retrieval.plan import IndexConfig

if TYPE_CHECKING:
    from selfrag_jax.critic.labelling import LabelConfig

Row = dict[str, Any]


def run_quickstart(c: ConfigDict, workdir: str | Path) -> list[Row]:
    """Runs all stages; returns the rows of results.json."""
    from selfrag_jax.critic.labelling import LabelConfig
    from selfrag_jax.evaluation import report
    from selfrag_jax.evaluation.page.questions import PageLimits

    kind = kind_of_config(c)
    configs.require(c, "baseline_steps.rag", "baseline_steps.closed", "rescore")
    w, started = Path(workdir), time.monotonic()

    _announce(f"1/9  world: {kind.about}")
    in_main("world", lambda: make_world(c, w / "world"))

    _announce("2/9  retriever: embed the passages, index them, retrieve for the instructions")
    encoder = configs.build(EncoderConfig, c.encoder, "encoder")
    embed_corpus(w / "world" / "passages.tsv", encoder, w / "embeddings")
    in_main("index", lambda: index_and_retrieve(c, w, kind))
    instructions = w / INSTRUCTIONS

    _announce("3/9  collect: the teacher's critiques")
    collecting, teacher = configs.build(CollectConfig, c.collect, "collect"), w / TEACHER
    data = w / "critic_data.jsonl"
    in_main("critiques", lambda: collect_critiques(instructions, teacher, collecting, data))

    _announce("4/9  critic: learns to criticise like the teacher")
    train_model(c, "critic", data, w / "critic", "critic")

    _announce("5/9  label: the critic labels the generator's training data")
    labelling = configs.build(LabelConfig, c.label, "label")
    needs = retrieval_needs(c, w, labelling)
    label_file(w / "critic", instructions, labelling, w / "generator_data.jsonl", needs=needs)

    _announce("6/9  generator: learns to retrieve, answer and criticise itself")
    train_model(c, "generator", w / "generator_data.jsonl", w / "generator", "generator")

    _announce("7/9  baselines: the same data without reflection tokens, the same base and steps")
    for name in ("rag", "closed"):
        made = partial(baseline_data, instructions, name, c.seed, w / f"{name}_data.jsonl")
        in_main(name, made)
        settings = with_steps(c, "generator", c.baseline_steps[name])
        train_model(settings, "generator", w / f"{name}_data.jsonl", w / name, name)

    _announce("8/9  evaluate: every system on every task")
    rows = evaluate_systems(c, w, kind)
    if not current().is_main:
        current().barrier("report")
        return []
    rows += evaluate_critic(c, w, kind)

    _announce("9/9  report")
    write_json(w / "report" / "results.json", {"rows": rows})
    report.write_report(
        rows,
        shown_answers(w, kind),
        w / "report",
        kind.title,
        paired_differences([w], kind, c.report.seed),
        plots=training_plots(w),
        curves=plotted_curves(w),
        limits=PageLimits(c.report.examples),
    )
    _announce(f"     {round((time.monotonic() - started) / 60, 2)} minutes in this run")
    inputs, counts = {"predictions": w / "predictions"}, {"rows": len(rows)}
    artifacts.write_manifest(w / "report", "report", c.report.to_dict(), inputs, counts)
    current().barrier("report")
    return rows


def in_main(what: str, make: Callable[[], object]) -> None:
    """Makes an artifact; of several processes, process 0 does and the others wait."""
    if current().is_main:
        make()
    current().barrier(what)


def index_and_retrieve(c: ConfigDict, w: Path, kind: WorldKind) -> None:
    """The index, and the passages of all instructions and questions."""
    from selfrag_jax.retrieval.retriever import IndexRetriever

    build_index(w / "embeddings", configs.build(IndexConfig, c.index, "index"), w / "index")
    files = ["instructions.jsonl", *(f"eval/{task}.jsonl" for task in (*kind.tasks, "critic"))]
    opened = cache(lambda: IndexRetriever(w / "index"))  # once for all files that need it
    for file in files:
        source, out = w / "world" / file, w / "retrieved" / file
        retrieve_file(w / "index", source, out, c.retrieve_k, open_index=opened)


def retrieval_needs(c: ConfigDict, w: Path, config: LabelConfig) -> dict[str, str] | None:
    """[Retrieval] or [No Retrieval] by the instruction's id, as label.retrieve_labels asks.

    None: the critic decides. Raises UserError as `teacher_needs` and `self_needs` do, and for a
    base from scratch, which knows nothing.
    """
    from selfrag_jax.critic.needs import CRITIC, SELF, teacher_needs

    if config.retrieve_labels == CRITIC:
        return None
    rows = partial(read_instructions, w / INSTRUCTIONS)
    if config.retrieve_labels != SELF:
        return teacher_needs(w / "critic_data.jsonl", rows())
    if c.base == "scratch":
        raise UserError("config label.retrieve_labels=self: a base from scratch knows nothing")
    return self_needs(c.base, rows, config, w / "needs.jsonl", {"input": w / INSTRUCTIONS})


def with_steps(c: ConfigDict, role: str, steps: int | None) -> ConfigDict:
    """Returns the config with another number of updates of `role`; None: as it is."""
    if steps is None:
        return c
    changed = c.copy_and_resolve_references()
    changed[role].update(steps=steps)
    return changed


def _announce(text: str) -> None:
    if current().is_main:
        print(text, file=sys.stderr, flush=True)


def paired_differences(workdirs: Sequence[Path], kind: WorldKind, seed: int) -> list[Row]:
    """Paired differences in accuracy over the questions of all workdirs, one for each comparison.

    Their intervals resample by the entity that a question asks about.
    """
    from selfrag_jax.evaluation import metrics

    out, truths = [], [kind.read_truth(w / TEACHER) for w in workdirs]
    for one, other, task in kind.compared:
        values: list[float] = []
        entities: list[tuple[int, str]] = []
        for i, (w, truth) in enumerate(zip(workdirs, truths, strict=True)):
            asked = read_questions(w / "retrieved" / "eval" / f"{task}.jsonl", task)
            a, b = (_accuracies(w, system, task, asked) for system in (one, other))
            values += [x - y for x, y in zip(a, b, strict=True)]
            entities += [(i, truth.entity_of(q.question) or q.id) for q in asked]
        value, low, high = metrics.paired_interval(values, entities, seed)
        row = {"system": one, "over": other, "task": task}
        out.append(row | {"value": value, "low": low, "high": high, "n": len(values)})
    return out


def _accuracies(w: Path, system: str, task: str, asked) -> list[float]:
    from selfrag_jax.evaluation import scores

    rows = [row for _, row in read_rows(predictions_file(w, system, task))]
    return scores.score(asked, rows, judge=None, facts_of=None)["accuracy"]


# The systems whose answers the report shows; the ablations differ from the first in little.
SHOWN_SYSTEMS = ("selfrag_adaptive", "rag_top1", "no_retrieval")


def shown_answers(w: Path, kind: WorldKind) -> list[Row]:
    """The answers of SHOWN_SYSTEMS to all questions, with gold and accuracy, for the report."""
    from selfrag_jax.evaluation import scores

    shown = []
    for system in SHOWN_SYSTEMS:
        for task in kind.tasks:
            asked = read_questions(w / "retrieved" / "eval" / f"{task}.jsonl", task)
            answers = [row for _, row in read_rows(predictions_file(w, system, task))]
            scored = {row["id"]: row for row in scores.score_questions(asked, answers)}
            for row in answers:
                one = scored[str(row["id"])]
                added = {"system": system, "task": task, "gold": one["gold"]}
                only_accuracy = {"metrics": {"accuracy": one["metrics"]["accuracy"]}}
                shown.append(row | added | scored_fields(one) | only_accuracy)
    return shown


def training_plots(w: Path):
    """Plots of the critic: its reliability, where it is kept; and of all models' losses."""
    from selfrag_jax.evaluation.page import plots_of_results
    from selfrag_jax.training.event_files import read_scalars

    file = w / "report" / "reliability.json"
    bins = read_json(file) if file.is_file() else {}
    scalars = {name: read_scalars(w / name) for name in ("critic", "generator", "rag", "closed")}
    return [*plots_of_results.reliability(bins), *plots_of_results.training_losses(scalars)]


def sample_question(w: Path) -> str:
    """A question that the finished quickstart can be asked."""
    task = kind_of_file(w / TEACHER).sample_task
    return read_questions(w / "world" / "eval" / f"{task}.jsonl")[0].question


def _require_own(workdir: Path) -> None:
    """Raises UserError for a file, and for a folder that is the artifact of one command."""
    if workdir.is_file():
        raise UserError(f"{workdir}: is a file; `selfrag quickstart` writes a folder")
    artifacts.require_folders_above(workdir, "--workdir")
    for name in ("manifest.json", artifacts.STARTED, "config.json"):
        if (workdir / name).is_file():
            made = read_object(workdir / name, ()).get("stage", "another program")
            raise UserError(f"{workdir}: was made by {made!r}; choose another --workdir")


def run(values: dict[str, Any], _: list[str]) -> None:
    from selfrag_jax.evaluation import tables

    w = values["workdir"]
    _require_own(Path(w))
    rows = run_quickstart(configs.reseed(load_config(values), values["seed"]), w)
    if not current().is_main:
        return
    print(tables.markdown(rows))
    print(f"Results: {w}/report/results.json and {w}/report/index.html")
    config = "" if values["config"].startswith("tiny") else f" --config={values['config']}"
    print(f'Ask: selfrag ask --workdir={w}{config} "{sample_question(Path(w))}"')


COMMAND = Command(
    example="selfrag quickstart --workdir=W",
    flags=(
        Flag(
            "workdir",
            "where everything is written; run again, it continues",
            required=True,
            writes=True,
        ),
        DISTRIBUTED,
        Flag("seed", "added to every seed: another world, another training", 0, type=int),
        config_flag(),
    ),
    run=run,
    saves_on_sigterm=True,
)
