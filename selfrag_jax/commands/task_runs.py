"""One system on one task's file: a run with its answers, scores and metrics, and what it costs.

Runs of one model share it: only one model is in memory at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfrag_jax import artifacts
from selfrag_jax.commands.answer import answer_file, answer_identity, answering_time
from selfrag_jax.commands.model_flags import load_from, model_and_config, search_changes
from selfrag_jax.errors import StageFailed, UserError
from selfrag_jax.evaluation import mauve_score, reproduction, scores
from selfrag_jax.evaluation.answer_rows import pair
from selfrag_jax.evaluation.fact_precision import FactVerifier, verified_by
from selfrag_jax.evaluation.judges import EntailmentJudge
from selfrag_jax.evaluation.metrics import FactReader, SupportJudge
from selfrag_jax.evaluation.systems import FULL, MODEL, NDOCS, PLAIN, System
from selfrag_jax.evaluation.tasks import Task
from selfrag_jax.files import link_or_copy, read_json, read_object, write_json
from selfrag_jax.records import Question, read_rows, write_jsonl
from selfrag_jax.search.config import NEVER
from selfrag_jax.text import plain_prompts

if TYPE_CHECKING:
    from selfrag_jax.answering.answerer import Answerer
    from selfrag_jax.answering.config import AnswerConfig
    from selfrag_jax.answering.plain import PlainConfig
    from selfrag_jax.checkpoints.loading import LoadedModel
    from selfrag_jax.retrieval.retriever import Retriever

Row = dict[str, Any]
ANSWERS, SCORES, METRICS = "answers.jsonl", "scores.jsonl", "metrics.json"
SYSTEMS_FOLDER = "systems"  # in the task's folder, for all systems but full Self-RAG


@dataclass(frozen=True)
class Scoring:
    """Who judges citations and reads facts, the model of MAUVE, and the seed of the bootstrap."""

    judge_name: str
    judge: SupportJudge | EntailmentJudge | None
    facts_of: FactReader | FactVerifier | None
    mauve_model: str  # the folder of a language model; "" for none
    seed: int


# ---- what is run ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class TaskFile:
    """A task, the file of its questions, the folder of its results, and files not taken."""

    task: Task
    input: Path
    out: Path
    others: tuple[str, ...] = ()  # names of other files that look like the task's


@dataclass(frozen=True)
class SystemRun:
    """A system on a task's file. model: its folder; changes: as its Answerer takes them."""

    where: TaskFile
    system: System
    model: Path
    index: Path | None
    config: AnswerConfig
    plain: PlainConfig | None  # of systems that are no search
    changes: dict[str, Any]
    with_mauve: bool = True  # where --mauve asks for it

    @property
    def folder(self) -> Path:
        out = self.where.out
        return out if self.system.name == FULL else out / SYSTEMS_FOLDER / self.system.name

    @property
    def reads_passages(self) -> bool:
        if self.plain is not None:
            return bool(self.changes["passages"])
        return self.changes.get("mode", self.config.search.mode) != NEVER

    @property
    def sources(self) -> dict[str, Path]:
        """The model and the index, whose hashes identify the answers."""
        uses_index = self.index is not None and (self.plain is None or self.reads_passages)
        return {"model": self.model} | ({"index": self.index} if uses_index and self.index else {})

    def identity(self) -> dict[str, Any]:
        task, config = self.where.task, self.plain or self.config
        return answer_identity(config, task.name, self.changes, task)


class Planner:
    """Turns the command's flags into runs; reads each model's config once, and no weights."""

    def __init__(self, values: dict[str, Any]):
        self.values = values
        self.prompt = plain_prompts.load(values["plain_prompt"] or plain_prompts.SELFRAG.name)
        self._settings: dict[str, tuple[Path, Path | None, AnswerConfig]] = {}
        self._searchable: set[Path] = set()  # models that have the reflection tokens

    def refusal(self, where: TaskFile, system: System) -> str:
        """Why the system cannot be run on this task as it was asked for; "" if it can.

        Raises UserError if its model is missing.
        """
        if system.model not in (MODEL, PLAIN) and not self.values[system.model]:
            return f"needs a model of its own; give --{system.model}"
        search, settings = self._model(system)[2].search, task_changes(where.task, self.values)
        scorer = settings.get("scorer", search.scorer)
        return system.refusal(scorer, settings.get("max_depth", search.max_depth))

    def run(self, where: TaskFile, system: System) -> SystemRun:
        """Raises UserError if the model is missing, or has no reflection tokens for a search."""
        model, index, config = self._model(system)
        changes, plain = task_changes(where.task, self.values), None
        if system.is_search:
            self._require_reflection_tokens(system, model)
            changes |= dict(system.changes)
        else:
            plain, changes = self._plain(where.task, system, config, changes)
        return SystemRun(where, system, model, index, config, plain, changes)

    def _model(self, system: System) -> tuple[Path, Path | None, AnswerConfig]:
        flag = system.model
        if flag == PLAIN and not self.values[PLAIN]:
            flag = MODEL
        if flag not in self._settings:
            values = self.values | {"model": self.values[flag]}
            self._settings[flag] = model_and_config(values, calibrated=False)
        return self._settings[flag]

    def _require_reflection_tokens(self, system: System, model: Path) -> None:
        from selfrag_jax.checkpoints import loading
        from selfrag_jax.text.reflection import MissingReflectionTokens

        if model not in self._searchable:
            try:
                loading.read_tokenizer(model).reflection_ids()
            except MissingReflectionTokens as e:
                raise UserError(f"{e} (--systems={system.name}; baselines need none)") from None
            self._searchable.add(model)

    def _plain(
        self, task: Task, system: System, config: AnswerConfig, settings: dict[str, Any]
    ) -> tuple[PlainConfig, dict[str, Any]]:
        """A trained ablation is asked as it was trained, whatever --plain_prompt says."""
        from selfrag_jax.answering.plain import PlainConfig

        limit = settings.get("max_new_tokens", config.search.max_new_tokens)
        if "max_new_tokens" in settings and "max_new_tokens" not in search_changes(self.values):
            limit = task.answer_tokens
        passages = system.passages
        if passages == NDOCS:
            passages = settings.get("ndocs", config.search.ndocs)
        plain = PlainConfig(
            batch=config.batch,
            max_new_tokens=limit,
            length_bucket=config.search.length_bucket,
            prompt=self.prompt if system.model == PLAIN else plain_prompts.SELFRAG,
            dtype=config.dtype,
            quantization=config.quantization,
        )
        return plain, {"passages": passages, "max_new_tokens": limit}


def task_changes(task: Task, values: dict[str, Any]) -> dict[str, Any]:
    """The search's settings: the task's, then --config.answer.search.x=, then the search's flags.

    A setting that the user changed in the config is left to it.
    """
    given = {k: v for k, v in search_changes(values).items() if k != "seed"}  # the bootstrap's
    in_config = {
        assignment.partition("=")[0].rpartition(".")[2]
        for assignment in values["overrides"]
        if assignment.startswith("answer.search.")
    }
    settings = task.settings(given.get("scorer", ""))
    return {k: v for k, v in settings.items() if k not in in_config} | given


# ---- answering and scoring -----------------------------------------------------------------------
class Models:
    """The model that answers now. Another one takes its place in memory."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._loaded: LoadedModel | None = None
        self._rag: Answerer | None = None
        self._retriever: Retriever | None = None
        self._answered: dict[str, Path] = {}  # identity -> a finished file of answers

    def answers(self, run: SystemRun, questions: Sequence[Question]) -> list[Row]:
        """The rows of the run's answers to the questions of its file, made if they are missing.

        Two systems with the same settings (always retrieving, where the task does) are answered
        once.
        """
        file = run.folder / ANSWERS
        identity, inputs = run.identity(), {"input": run.where.input, **run.sources}
        key = artifacts.identity("answer", identity, inputs)
        is_done = artifacts.is_finished(file, "answer", identity, inputs)
        if not is_done and key in self._answered:
            file.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(self._answered[key], file)
            counts = read_json(artifacts.manifest_path(self._answered[key]))["counts"]
            artifacts.write_manifest(file, "answer", identity, inputs, counts)
            is_done = True
        if not is_done or any(row["error"] for _, row in read_rows(file)):
            answerer = self._answerer(run)
            task = run.where.task
            answer_file(
                answerer, run.where.input, file, task.name, run.changes, task, list(questions)
            )
        rows = [row for _, row in read_rows(file)]
        if not any(row["error"] for row in rows):
            self._answered[key] = file
        return rows

    def _answerer(self, run: SystemRun) -> Answerer:
        from selfrag_jax.answering.plain import PlainModel

        if self._folder != run.model:
            self._loaded = self._rag = None  # before the next one is read
            self._folder = run.model
        if run.plain is None:
            if self._rag is None:
                self._loaded = None  # a baseline's; SelfRAG reads its own, which baselines share
                rag = load_from(run.model, run.index, run.config)
                self._rag, self._loaded, self._retriever = rag, rag.loaded, rag.retriever
            return self._rag
        if self._loaded is None:
            self._loaded = _load(run)
        if run.reads_passages and run.index and self._retriever is None:
            from selfrag_jax.retrieval.retriever import IndexRetriever

            self._retriever = IndexRetriever(run.index)
        retriever = self._retriever if run.reads_passages else None
        return PlainModel(self._loaded, retriever, run.plain, run.sources)


def _load(run: SystemRun) -> LoadedModel:
    from selfrag_jax.answering.loading import prepare_model
    from selfrag_jax.checkpoints import loading
    from selfrag_jax.engine.engine import place_params

    loaded = prepare_model(loading.load(run.model), run.config)
    return replace(loaded, params=place_params(loaded.model, loaded.params))


def run_system(
    run: SystemRun, questions: Sequence[Question], models: Models, how: Scoring
) -> list[Row]:
    """Answers and scores; returns the rows of the folder's metrics.json.

    Raises StageFailed if no question could be answered.
    """
    out, task, name = run.folder, run.where.task, run.system.name
    answers = models.answers(run, questions)
    failed = _num_failed(run, answers)
    if isinstance(how.facts_of, FactVerifier) and (
        notice := how.facts_of.notice(pair(questions, answers))
    ):
        print(f"{run.where.input}: {notice}", file=sys.stderr)
    rows = scores.score_questions(questions, answers, how.judge, how.facts_of)
    write_jsonl(out / SCORES, rows)
    results = scores.result_rows(name, task.spec, scores.columns(rows), how.seed)
    seconds, timed = answering_time(out / ANSWERS)
    if timed:
        results.append(scores.seconds_row(name, task.spec, seconds, timed))
    if how.mauve_model and run.with_mauve:
        mauve = mauve_score.mauve_of_answers(questions, answers, how.mauve_model, how.seed)
        results.append({"system": name, "task": task.spec, **mauve})
    for row in results:
        if figures := reproduction.published(task, run.system, row["metric"]):
            row["paper"] = {size: percent / 100 for size, percent in figures.items()}
    judged = {} if how.judge is None else {"judge": how.judge_name}
    judged |= verified_by(how.facts_of, results)
    write_json(out / METRICS, {"rows": results, "seed": how.seed, **judged, "failed": failed})
    inputs: dict[str, str | Path] = {"input": run.where.input, "answers": out / ANSWERS}
    made = {"task": asdict(task), "judge": how.judge_name, "seed": how.seed}
    if name != FULL:
        made["system"] = asdict(run.system)
    artifacts.write_manifest(out, "evaluate", made, inputs, {"questions": len(rows)})
    artifacts.remove_temporary_files(out)
    return results


def _num_failed(run: SystemRun, answers: Sequence[Row]) -> int:
    failed = [row for row in answers if row["error"]]
    if len(failed) == len(answers):
        raise StageFailed(
            f"{run.where.input}: no question could be answered; the first, {failed[0]['id']!r}: "
            f"{failed[0]['error']}"
        )
    if failed:
        print(
            f"{len(failed)} of {len(answers)} answers are missing and count as wrong; the same "
            "command tries them again",
            file=sys.stderr,
        )
    return len(failed)


def check_folder(out: Path, model: Path, index: Path | None) -> None:
    """Raises UserError if an evaluation cannot be written to the folder `out`, or replaces others'.

    answers.jsonl is not looked at: what is no answer of ours is moved aside.
    """
    inputs = {"model": model} | ({"index": index} if index else {})
    scored = [out / SCORES, out / METRICS]
    artifacts.check_output(out, "evaluate", inputs, scored)
    if out.is_file():
        raise UserError(f"{out}: is a file; a task's --out is a folder")
    manifest = out / "manifest.json"
    for file in (manifest, out / artifacts.STARTED):
        if file.is_file() and (made := read_object(file, ()).get("stage")) != "evaluate":
            raise UserError(f"{out}: was made by `selfrag {made}`; choose another --out")
    # Killed before its manifest was written, an evaluation has left that of its answers.
    begun = manifest.is_file() or artifacts.manifest_path(out / ANSWERS).is_file()
    if not begun and (found := [p for p in scored if p.exists()]):
        raise UserError(f"{found[0]}: was not made by `selfrag evaluate`; choose another --out")
