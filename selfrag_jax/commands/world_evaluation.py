"""The evaluation of a quickstart: every system on every task of its world, and the critic."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from selfrag_jax import artifacts
from selfrag_jax import config as configs
from selfrag_jax.commands.few_shot import FewShotConfig, few_shot_prompt
from selfrag_jax.commands.worlds import WorldKind
from selfrag_jax.critic.collecting import CollectConfig, critique_queries
from selfrag_jax.critic.teachers.rule import RuleTeacher
from selfrag_jax.data.instructions import read_instructions
from selfrag_jax.data.questions import read_questions
from selfrag_jax.errors import UserError
from selfrag_jax.evaluation.systems import BASE, BY_NAME, EACH_PASSAGE, FEW_SHOT, WEIGHTS, System
from selfrag_jax.files import write_json
from selfrag_jax.processes.group import current
from selfrag_jax.progress import Progress, progress
from selfrag_jax.records import Question, instruction_from, read_records, read_rows, write_jsonl
from selfrag_jax.text.plain_prompts import PlainPrompt

if TYPE_CHECKING:
    from selfrag_jax.evaluation.answerers import Answerers

Row = dict[str, Any]
TEACHER = "world/teacher.jsonl"  # in the workdir
INSTRUCTIONS = "retrieved/instructions.jsonl"
ALWAYS, NEVER, ADAPTIVE = "selfrag_always", "selfrag_never", "selfrag_adaptive"


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
    "base_few_shot": (BASE, {}),
    "base_few_shot_rag": (BASE, {}),
}
_SYSTEMS = BY_NAME | {s.name: s for s in FEW_SHOT}


def systems(kind: WorldKind) -> tuple[WorldRun, ...]:
    """The rows of a world's results table."""

    def listed(name: str, tasks: tuple[str, ...]) -> WorldRun:
        system = _SYSTEMS[name]
        folder, other = _PLAIN_RUNS.get(name, ("generator", {}))
        if name.startswith("ablation_"):
            changes = {"mode": "always_retrieve", **dict(system.changes)}
            other = {"changes": tuple(changes.items())}
        elif name == "selfrag_adaptive":  # the config's mode
            other = {"changes": ()}
        return WorldRun(replace(system, **other), folder, tasks)

    return tuple(listed(*item) for item in kind.systems.items())


@dataclass(frozen=True)
class TaskQuestions:
    """A task: its file, its questions, and whether a search makes one segment of an answer."""

    task: str
    file: Path
    questions: list[Question]
    one_step: bool


def evaluate_systems(c: ConfigDict, w: Path, kind: WorldKind) -> list[Row]:
    """Metrics of every system on every task.

    Predictions are kept as files, so that an interrupted evaluation continues. Of several
    processes, each answers every n-th file, and process 0 alone makes those that need no model, and
    scores all.
    """
    from selfrag_jax.evaluation import scores

    tasks = {}
    for task in kind.tasks:
        file = w / "retrieved" / "eval" / f"{task}.jsonl"
        tasks[task] = TaskQuestions(
            task, file, read_questions(file, task), task not in kind.long_form
        )
    group, pairs = current(), [(r, tasks[task]) for r in systems(kind) for task in r.tasks]
    answered = [pair for pair in pairs if not is_rescored(c, *pair)]
    mine = answered[group.index :: group.count]
    runner = Runner(c, w, kind)
    with progress("evaluate", sum(len(asked.questions) for _, asked in mine), "answers") as bar:
        for pair in mine:
            runner.answer(*pair, bar)
    group.barrier("predictions")
    if not group.is_main:
        return []
    for pair in pairs:
        if pair not in answered:
            rescore(c, w, *pair)
    rows: list[Row] = []
    truth = kind.read_truth(w / TEACHER)
    for run, asked in pairs:
        file = predictions_file(w, run.system.name, asked.task)
        predictions = [row for _, row in read_rows(file)]
        values = scores.score(asked.questions, predictions, truth.supports, truth.stated_facts)
        rows += scores.result_rows(run.system.name, asked.task, values, c.report.seed)
    return rows


def predictions_file(w: Path, system: str, task: str) -> Path:
    return w / "predictions" / system / f"{task}.jsonl"


class Runner:
    """Answers with the models of a workdir, and the untrained base."""

    def __init__(self, c: ConfigDict, w: Path, kind: WorldKind):
        """Raises UserError if the world's systems need a config section or base that is missing."""
        from selfrag_jax.training.starting_model import base_folder

        self.c, self.w, self.kind = c, w, kind
        self.base: Path | None = None
        if any(run.folder == BASE for run in systems(kind)):
            configs.require(c, "few_shot")
            if c.base == "scratch":
                raise UserError(
                    f"config base=scratch: the world {kind.name!r} has systems of the untrained "
                    "base, which needs a pretrained model"
                )
            self.base = base_folder(c)
        self._prompts: dict[str, PlainPrompt] = {}  # of the base, by task
        self._answerers: Answerers | None = None

    def answer(self, run: WorldRun, asked: TaskQuestions, bar: Progress) -> None:
        """Writes a system's answers to a task, if they are not there."""
        c, w, system = self.c, self.w, run.system
        out = predictions_file(w, system.name, asked.task)
        made: dict[str, Any] = {
            "system": system.name,
            "changes": dict(system.changes),
            "passages": system.passages or 0,
        }
        section = "answer" if system.is_search else "plain"
        made[section] = c[section].to_dict()
        inputs: dict[str, str | Path] = {"model": w / run.folder, "questions": asked.file}
        if run.folder == BASE:
            assert self.base is not None
            made["few_shot"] = c.few_shot.to_dict()
            inputs |= {"model": self.base, "shown": w / INSTRUCTIONS, "truth": w / TEACHER}
        if artifacts.is_finished(out, "answer", made, inputs):
            bar.skip(len(asked.questions))
            return
        changes = {"max_depth": 1, "beam_width": 1} if asked.one_step else {}
        prompt = self._prompt(asked.task) if run.folder == BASE else None
        predictions = self._models().answer(
            system, run.folder, asked.questions, changes, bar.advance, prompt
        )
        n = write_jsonl(out, predictions)
        artifacts.write_manifest(out, "answer", made, inputs, {"answers": n})

    def _models(self) -> Answerers:
        from selfrag_jax.answering.config import AnswerConfig
        from selfrag_jax.answering.plain import PlainConfig
        from selfrag_jax.evaluation.answerers import Answerers

        if self._answerers is None:
            search = configs.build(AnswerConfig, self.c.answer, "answer")
            plain = configs.build(PlainConfig, self.c.plain, "plain")
            self._answerers = Answerers(self.w, search, plain, self.base)
        return self._answerers

    def _prompt(self, task: str) -> PlainPrompt:
        if task not in self._prompts:
            rows = read_instructions(self.w / INSTRUCTIONS)
            truth = self.kind.read_truth(self.w / TEACHER)
            config = configs.build(FewShotConfig, self.c.few_shot, "few_shot")
            self._prompts[task] = few_shot_prompt(task, rows, self.kind, truth, config)
        return self._prompts[task]


# ---- answers that need no model ------------------------------------------------------------------
def is_rescored(c: ConfigDict, run: WorldRun, asked: TaskQuestions) -> bool:
    """Whether a system's answers are made from those of others (answering/rescoring.py).

    With c.rescore: other weights, and adaptive retrieval, of answers of one segment.
    """
    search = c.answer.search
    is_plain_search = search.scorer == "paper" and not search.temperature
    if not (c.rescore and asked.one_step and run.system.is_search and is_plain_search):
        return False
    changes = dict(run.system.changes)
    if run.system.name == ADAPTIVE:
        return search.mode == "adaptive_retrieval"
    is_always = changes.pop("mode", "") == "always_retrieve"
    return is_always and bool(changes) and changes.keys() <= {*WEIGHTS}


def rescore(c: ConfigDict, w: Path, run: WorldRun, asked: TaskQuestions) -> None:
    """Writes a system's answers to a task, if they are not there, from those of other systems."""
    from selfrag_jax.answering.rescoring import at_threshold, rescored
    from selfrag_jax.search.scoring import Weights

    system, search = run.system, c.answer.search
    out = predictions_file(w, system.name, asked.task)
    is_adaptive = system.name == ADAPTIVE
    sources = (ALWAYS, NEVER) if is_adaptive else (ALWAYS,)
    files = [predictions_file(w, name, asked.task) for name in sources]
    inputs: dict[str, str | Path] = dict(zip(sources, files, strict=True))
    weights = {k: v for k, v in system.changes if k in WEIGHTS}
    made = {"system": system.name, "changes": weights, "threshold": search.threshold}
    made["closed_set"] = c.answer.closed_set
    if artifacts.is_finished(out, "answer", made, inputs):
        return
    rows = [[row for _, row in read_rows(file)] for file in files]
    if is_adaptive:
        found = [at_threshold(a, n, search.threshold) for a, n in zip(*rows, strict=True)]
    else:
        changed = Weights(**(search.weights.to_dict() | weights))
        options = [q.options if c.answer.closed_set else () for q in asked.questions]
        found = [rescored(r, changed, o) for r, o in zip(rows[0], options, strict=True)]
    n = write_jsonl(out, found)
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
