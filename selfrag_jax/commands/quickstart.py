"""`selfrag quickstart`: every stage of the flow, in order, in the world that the config names.

Calls the functions of the other commands; an interrupted run continues where it was.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
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
from selfrag_jax.commands.train import train_model
from selfrag_jax.commands.world import make_world
from selfrag_jax.commands.worlds import WorldKind, kind_of_config, kind_of_file
from selfrag_jax.critic.collecting import CollectConfig, critique_queries
from selfrag_jax.critic.teachers.rule import RuleTeacher
from selfrag_jax.data.questions import read_questions
from selfrag_jax.errors import UserError
from selfrag_jax.evaluation.systems import BY_NAME, EACH_PASSAGE, System
from selfrag_jax.files import read_json, read_object, write_json
from selfrag_jax.processes.group import current
from selfrag_jax.progress import Progress, progress
from selfrag_jax.records import Question, instruction_from, read_records, read_rows, write_jsonl
from selfrag_jax.retrieval.encoders import EncoderConfig
from selfrag_jax.retrieval.plan import IndexConfig

if TYPE_CHECKING:
    from selfrag_jax.evaluation.answerers import Answerers

Row = dict[str, Any]
TEACHER = "world/teacher.jsonl"


@dataclass(frozen=True)
class WorldRun:
    """A system of the results table: the folder of its model in the workdir, and its tasks."""

    system: System
    folder: str
    tasks: tuple[str, ...]


# The models of systems that are no search, and how many passages they read where systems.py leaves
# it open or has another number.
_PLAIN_RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "no_retrieval": ("closed", {}),
    "rag_top1": ("rag", {}),
    "rag_topk": ("rag", {"passages": 5}),
    "train_no_critic": ("rag", {"passages": EACH_PASSAGE}),
    "train_no_retriever": ("closed", {"passages": 1}),
}


def systems(kind: WorldKind) -> tuple[WorldRun, ...]:
    """The rows of a world's results table."""

    def listed(name: str, tasks: tuple[str, ...]) -> WorldRun:
        system = BY_NAME[name]
        folder, other = _PLAIN_RUNS.get(name, ("generator", {}))
        if name.startswith("ablation_"):
            changes = {"mode": "always_retrieve", **dict(system.changes)}
            other = {"changes": tuple(changes.items())}
        elif name == "selfrag_adaptive":  # the config's mode
            other = {"changes": ()}
        return WorldRun(replace(system, **other), folder, tasks)

    return tuple(listed(*item) for item in kind.systems.items())


def run_quickstart(c: ConfigDict, workdir: str | Path) -> list[Row]:
    """Runs all stages; returns the rows of results.json."""
    from selfrag_jax.critic.labelling import LabelConfig
    from selfrag_jax.evaluation import report
    from selfrag_jax.evaluation.page.questions import PageLimits

    kind = kind_of_config(c)
    w, started = Path(workdir), time.monotonic()

    _announce(f"1/9  world: {kind.about}")
    in_main("world", lambda: make_world(c, w / "world"))

    _announce("2/9  retriever: embed the passages, index them, retrieve for the instructions")
    encoder = configs.build(EncoderConfig, c.encoder, "encoder")
    embed_corpus(w / "world" / "passages.tsv", encoder, w / "embeddings")
    in_main("index", lambda: index_and_retrieve(c, w, kind))
    instructions = w / "retrieved" / "instructions.jsonl"

    _announce("3/9  collect: the teacher's critiques")
    collecting, teacher = configs.build(CollectConfig, c.collect, "collect"), w / TEACHER
    data = w / "critic_data.jsonl"
    in_main("critiques", lambda: collect_critiques(instructions, teacher, collecting, data))

    _announce("4/9  critic: learns to criticise like the teacher")
    train_model(c, "critic", data, w / "critic", "critic")

    _announce("5/9  label: the critic labels the generator's training data")
    labelling = configs.build(LabelConfig, c.label, "label")
    label_file(w / "critic", instructions, labelling, w / "generator_data.jsonl")

    _announce("6/9  generator: learns to retrieve, answer and criticise itself")
    train_model(c, "generator", w / "generator_data.jsonl", w / "generator", "generator")

    _announce("7/9  baselines: the same data without reflection tokens, the same base and steps")
    for name in ("rag", "closed"):
        made = partial(baseline_data, instructions, name, c.seed, w / f"{name}_data.jsonl")
        in_main(name, made)
        train_model(c, "generator", w / f"{name}_data.jsonl", w / name, name)

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
    build_index(w / "embeddings", configs.build(IndexConfig, c.index, "index"), w / "index")
    files = ["instructions.jsonl", *(f"eval/{task}.jsonl" for task in (*kind.tasks, "critic"))]
    for file in files:
        retrieve_file(w / "index", w / "world" / file, w / "retrieved" / file, c.retrieve_k)


def _announce(text: str) -> None:
    if current().is_main:
        print(text, file=sys.stderr, flush=True)


def evaluate_systems(c: ConfigDict, w: Path, kind: WorldKind) -> list[Row]:
    """Metrics of every system on every task.

    Predictions are kept as files, so that an interrupted evaluation continues. Of several
    processes, each answers every n-th file, and process 0 alone scores them.
    """
    from selfrag_jax.answering.config import AnswerConfig
    from selfrag_jax.answering.plain import PlainConfig
    from selfrag_jax.evaluation import scores
    from selfrag_jax.evaluation.answerers import Answerers

    answerers = Answerers(
        w,
        configs.build(AnswerConfig, c.answer, "answer"),
        configs.build(PlainConfig, c.plain, "plain"),
    )
    files = {t: w / "retrieved" / "eval" / f"{t}.jsonl" for t in kind.tasks}
    tasks = {t: read_questions(file, t) for t, file in files.items()}
    group, pairs = current(), [(run, task) for run in systems(kind) for task in run.tasks]
    mine = pairs[group.index :: group.count]
    with progress("evaluate", sum(len(tasks[t]) for _, t in mine), "answers") as bar:
        for run, task in mine:
            one_step = task not in kind.long_form
            answer_task(c, w, answerers, run, (task, files[task], tasks[task]), one_step, bar)
    group.barrier("predictions")
    if not group.is_main:
        return []
    rows: list[Row] = []
    truth = kind.read_truth(w / TEACHER)
    for run, task in pairs:
        predictions = [row for _, row in read_rows(predictions_file(w, run.system.name, task))]
        values = scores.score(tasks[task], predictions, truth.supports, truth.stated_facts)
        rows += scores.result_rows(run.system.name, task, values, c.report.seed)
    return rows


def predictions_file(w: Path, system: str, task: str) -> Path:
    return w / "predictions" / system / f"{task}.jsonl"


def answer_task(
    c: ConfigDict,
    w: Path,
    answerers: Answerers,
    run: WorldRun,
    asked: tuple[str, Path, list[Question]],
    one_step: bool,
    bar: Progress,
) -> None:
    """Writes a system's answers to a task, if they are not there.

    asked: the task, its file and its questions; one_step: a search makes one segment.
    """
    task, file, rows = asked
    system, out = run.system, predictions_file(w, run.system.name, task)
    made: dict[str, Any] = {
        "system": system.name,
        "changes": dict(system.changes),
        "passages": system.passages or 0,
    }
    section = "answer" if system.is_search else "plain"
    made[section] = c[section].to_dict()
    inputs = {"model": w / run.folder, "questions": file}
    if artifacts.is_finished(out, "answer", made, inputs):
        bar.skip(len(rows))
        return
    changes = {"max_depth": 1, "beam_width": 1} if one_step else {}
    predictions = answerers.answer(system, run.folder, rows, changes, bar.advance)
    n = write_jsonl(out, predictions)
    artifacts.write_manifest(out, "answer", made, inputs, {"answers": n})


def evaluate_critic(c: ConfigDict, w: Path, kind: WorldKind) -> list[Row]:
    """The critic against the world's truth, on the questions of eval/critic.jsonl.

    In the encyclopedia they are about held-out entities, and about well-known ones and common
    knowledge in held-out phrasings.
    """
    from selfrag_jax.checkpoints import loading
    from selfrag_jax.critic.critic import Critic
    from selfrag_jax.critic.labelling import LabelConfig
    from selfrag_jax.evaluation import critic_evaluation, critic_scores
    from selfrag_jax.evaluation.critic_scores import BINS

    config = configs.build(CollectConfig, c.collect, "collect")
    teacher = RuleTeacher(kind.read_truth(w / TEACHER).judge, 0.0, config.seed)
    asked, kinds = [], []
    for row in read_records(w / "retrieved" / "eval" / "critic.jsonl", instruction_from):
        for q in critique_queries(row, config, random.Random(f"critic-{row.id}")):
            asked.append(q)
            kinds.append(row.dataset_name)
    labelling = configs.build(LabelConfig, c.label, "label")
    critic = Critic(loading.load(w / "critic"), labelling.critic)
    judged = [q.group for q in asked], [teacher.truth(q) for q in asked], critic.judge(asked)
    verdicts, seed = critic_evaluation.by_group(*judged), c.report.seed
    bins = {
        v.group: critic_scores.reliability_bins(v.confidence, v.correct, BINS).to_rows()
        for v in verdicts.values()
    }
    write_json(w / "report" / "reliability.json", bins)
    return [
        *critic_evaluation.accuracy_by_kind(*judged, kinds, seed),
        *critic_evaluation.calibration_rows(verdicts, "critic", seed, BINS),
    ]


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
    print(f'Ask: selfrag ask --workdir={w} "{sample_question(Path(w))}"')


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
