"""One system on one task's file (task_plans.py): its answers, scores and metrics.

Runs of one model share it: only one model is in memory at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfrag_jax import artifacts
from selfrag_jax.commands.answer import answer_file, answering_time
from selfrag_jax.commands.model_flags import load_from
from selfrag_jax.commands.task_plans import SystemRun
from selfrag_jax.errors import StageFailed, UserError
from selfrag_jax.evaluation import mauve_score, reproduction, scores
from selfrag_jax.evaluation.answer_rows import pair
from selfrag_jax.evaluation.fact_precision import FactVerifier, verified_by
from selfrag_jax.evaluation.judges import EntailmentJudge
from selfrag_jax.evaluation.metrics import FactReader, SupportJudge
from selfrag_jax.evaluation.systems import FULL
from selfrag_jax.files import link_or_copy, read_json, read_object, write_json
from selfrag_jax.processes.group import current
from selfrag_jax.records import Question, read_rows, write_jsonl

if TYPE_CHECKING:
    from selfrag_jax.answering.answerer import Answerer
    from selfrag_jax.checkpoints.loading import LoadedModel
    from selfrag_jax.retrieval.retriever import Retriever

Row = dict[str, Any]
ANSWERS, SCORES, METRICS = "answers.jsonl", "scores.jsonl", "metrics.json"


@dataclass(frozen=True)
class Scoring:
    """Who judges citations and reads facts, the model of MAUVE, and the seed of the bootstrap."""

    judge_name: str
    judge: SupportJudge | EntailmentJudge | None
    facts_of: FactReader | FactVerifier | None
    mauve_model: str  # the folder of a language model; "" for none
    seed: int


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

        Of several processes all answer, and process 0 alone gets the rows.

        Two systems with the same settings (always retrieving, where the task does) are answered
        once.
        """
        file = run.folder / ANSWERS
        identity, inputs = run.identity(), {"input": run.where.input, **run.sources}
        key = artifacts.identity("answer", identity, inputs)

        def is_done() -> bool:
            if not artifacts.is_finished(file, "answer", identity, inputs):
                if key not in self._answered:
                    return False
                file.parent.mkdir(parents=True, exist_ok=True)
                link_or_copy(self._answered[key], file)
                counts = read_json(artifacts.manifest_path(self._answered[key]))["counts"]
                artifacts.write_manifest(file, "answer", identity, inputs, counts)
            return not any(row["error"] for _, row in read_rows(file))

        if not current().from_main("answers are there", is_done):
            answerer = self._answerer(run)
            task = run.where.task
            answer_file(
                answerer, run.where.input, file, task.name, run.changes, task, list(questions)
            )
        if not current().is_main:
            return []
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
    from selfrag_jax.answering import generator
    from selfrag_jax.answering.loading import prepare_model
    from selfrag_jax.checkpoints import loading
    from selfrag_jax.engine.engine import place_params

    generator.print_notice(generator.unfinished_notice(run.model))
    loaded = prepare_model(loading.load(run.model), run.config)
    return replace(loaded, params=place_params(loaded.model, loaded.params))


def run_system(
    run: SystemRun, questions: Sequence[Question], models: Models, how: Scoring
) -> list[Row]:
    """Answers and scores; returns the rows of the folder's metrics.json.

    Of several processes all answer; process 0 alone scores and writes, and has rows.

    Raises StageFailed if no question could be answered.
    """
    out, task, name = run.folder, run.where.task, run.system.name
    answers = models.answers(run, questions)
    if not current().is_main:
        return []
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
