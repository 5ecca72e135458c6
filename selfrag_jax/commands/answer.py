"""`selfrag answer`: a file of questions in, a file of answers out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfrag_jax import artifacts
from selfrag_jax.commands.answer_parts import PARTIAL_FILES, AnswerParts, answer_rest
from selfrag_jax.commands.command import DISTRIBUTED, INPUT, Command, Flag
from selfrag_jax.commands.model_flags import (
    ANSWER_CONFIG_FLAG,
    DEFAULT_CONFIG,
    LOADING_FLAGS,
    MODEL_FLAGS,
    SEARCH_FLAGS,
    load_from,
    model_and_config,
    search_changes,
)
from selfrag_jax.commands.passages_flags import PASSAGES_FLAGS, passage_source
from selfrag_jax.data.questions import read_questions
from selfrag_jax.errors import UserError
from selfrag_jax.evaluation import tasks
from selfrag_jax.evaluation.tasks import Task
from selfrag_jax.files import read_object
from selfrag_jax.processes.group import current
from selfrag_jax.profiling import Profile, check_steps
from selfrag_jax.records import Question, read_rows, write_jsonl
from selfrag_jax.search.config import NEVER

if TYPE_CHECKING:
    from selfrag_jax.answering.answerer import Answerer
    from selfrag_jax.answering.config import AnswerConfig
    from selfrag_jax.answering.plain import PlainConfig

Row = dict[str, Any]
_LOOKED_AT = 20  # questions whose passages are compared with what the model knows
INSTRUCTIONS_FLAG = Flag(
    "instructions",
    "the tasks' instructions, in place of our wording: a JSON file of task and instruction, or the "
    "released repository's retrieval_lm/utils.py, which is parsed and never run",
    group=INPUT,
)


def answer_file(
    rag: Answerer,
    input_path: str | Path,
    out: str | Path,
    task: str | None,
    changes: dict[str, Any],
    prompt: Task | None = None,
    questions: list[Question] | None = None,
    profile: int = 0,
) -> int:
    """Answers all questions of a file; returns their number.

    changes: as rag.answer takes them. prompt: the task that words the questions. questions: the
    file's, if they were read already (`read_checked`). profile: number of questions to trace into
    `{out}.profile`, after the first are answered. The manifest's counts have the seconds that
    answering took, without compiling, and of how many questions (`answering_time`).

    Answers are kept in `.{out}.*.partial` as they come; an interrupted run answers the remaining
    questions only. Of several processes, each answers every n-th of these, and process 0 alone
    writes `out`. Raises UserError for a file without questions, for ids that occur twice, for
    questions without passages if there is no index, and while another process answers the same into
    the same file.
    """
    from selfrag_jax.engine import engine

    rag.check(changes)  # before anything is written
    mode = rag.search_config(changes).mode
    if questions is None:
        questions = read_checked(input_path, prompt or task, rag.retriever is not None, mode)
    config = answer_identity(rag.config, task, changes, prompt)
    inputs = {"input": input_path, **rag.sources}
    identity = artifacts.identity("answer", config, inputs)
    group = current()
    group.require_same("other files", identity, "copy the input, the model and the index to all")

    # 1. What earlier runs have answered, in any number of processes.
    done: dict[str, Row] = {}
    seconds, timed = 0.0, 0
    if group.is_main and artifacts.is_finished(out, "answer", config, inputs):
        done = {row["id"]: row for _, row in read_rows(out) if not row["error"]}
        seconds, timed = answering_time(out)
    if group.from_main("answers that are there", lambda: len(done)) == len(questions):
        return len(questions)
    parts = AnswerParts(Path(out), identity, group)
    compiled_before = len(engine.compiled)
    with parts.open() as f, Profile(f"{out}.profile", profile if group.is_main else 0) as traced:
        done |= parts.read_others()  # questions that failed are tried again
        left = parts.left([q.id for q in questions], done)

        # 2. Answer this process's share of the rest.
        rest = [q for q in questions if q.id in left]
        if mode != NEVER:
            _notice_of_passages(rag, rest)
        answer_rest(f, rag, rest, done, changes, len(questions), traced)

        # 3. Process 0 writes them, in the order of the questions.
        rows, measured = parts.collect(done, left)
    if group.is_main:
        by_id = {row["id"]: row for row in rows}
        rows = [by_id[q.id] for q in questions]
        seconds, timed = seconds + measured[0], timed + measured[1]
        _report(rows, engine.compiled[compiled_before:], seconds, timed)
        write_jsonl(out, rows)
        counts = {"answers": len(rows), "retrieved": sum(row["retrieved"] for row in rows)}
        counts |= {"seconds": round(seconds, 3), "timed": timed}
        artifacts.write_manifest(out, "answer", config, inputs, counts)
    group.barrier("answers are written")
    parts.remove()
    return len(questions)


def read_checked(
    input_path: str | Path, task: Task | str | None, has_retriever: bool, mode: str
) -> list[Question]:
    """The questions of a file, worded by `task` if it is a Task.

    Raises UserError for ids that occur twice, for questions without passages where nothing
    retrieves them, and as reading and Task.ask do.
    """
    if isinstance(task, Task):
        questions = task.ask_all(read_questions(input_path, task.name), str(input_path))
    else:
        questions = read_questions(input_path, task or "")
    seen: set[str] = set()
    for q in questions:
        if q.id in seen:
            raise UserError(f"{input_path}: id {q.id!r} occurs more than once")
        seen.add(q.id)
    needs_passages = not has_retriever and mode != "no_retrieval"
    if needs_passages and (without := [q.id for q in questions if not q.ctxs]):
        raise UserError(
            f"{input_path}: question {without[0]!r} has no passages (ctxs); "
            "give --index, or --mode=no_retrieval"
        )
    return questions


def _notice_of_passages(rag: Answerer, questions: list[Question]) -> None:
    """Says so if a model of the synthetic world is asked with other passages than the world's."""
    from selfrag_jax.answering import generator

    some = [p for q in questions[:_LOOKED_AT] for p in q.ctxs]
    model = rag.sources.get("model", "the model")
    if some:
        generator.print_notice(generator.corpus_notice(rag.loaded.tokenizer, some, model))


def answering_time(answers: str | Path) -> tuple[float, int]:
    """Returns the seconds that a finished file of answers took, and of how many questions.

    Compiling the search's programs is left out, and so is what was lost when a run was killed.
    (0.0, 0) where nothing was measured.
    """
    manifest = artifacts.manifest_path(answers)
    counts = read_object(manifest, ()).get("counts", {}) if manifest.is_file() else {}
    return float(counts.get("seconds", 0.0)), int(counts.get("timed", 0))


def answers_in_folder(
    rag: Answerer, input_path: str | Path, folder: str | Path, changes: dict[str, Any]
) -> list[Row]:
    """Returns the answers with these settings, from a file in `folder` named after its inputs.

    Answers what is not there yet. Raises UserError if a question failed, and as answer_file does.
    """
    inputs = {"input": input_path, **rag.sources}
    name = artifacts.identity("answer", answer_identity(rag.config, None, changes), inputs)
    file = Path(folder) / f"{name}.jsonl"
    answer_file(rag, input_path, file, None, changes)
    rows = [row for _, row in read_rows(file)]
    if failed := [row for row in rows if row["error"]]:
        raise UserError(
            f"{file}: question {failed[0]['id']!r} failed ({failed[0]['error']}); "
            "run the same command again to retry it"
        )
    return rows


def answer_identity(
    config: AnswerConfig | PlainConfig,
    task: str | None,
    changes: dict[str, Any],
    prompt: Task | None = None,
) -> dict[str, Any]:
    """What identifies an answer file besides its inputs.

    Leaves out what changes memory and speed only: with less of it, a run that was too large for
    the device can continue.
    """
    settings = json.loads(json.dumps(config, default=vars))
    for name in ("batch", "tensor", "length_bucket"):
        settings.pop(name, None)
        settings.get("search", {}).pop(name, None)
    changes = {k: v for k, v in changes.items() if k != "length_bucket"}
    identity = {"changes": changes, "task": task, "answer": settings}
    return identity | ({"prompt": prompt.prompt_identity()} if prompt else {})


def _report(rows: list[Row], compiled: list[tuple[str, float]], seconds: float, timed: int) -> None:
    """Says on the screen how the questions were answered, and whether some failed."""
    note = f"; {seconds / timed:.3g} s a question" if timed else ""
    print(_summary(rows, compiled) + note, file=sys.stderr)
    if doubtful := [row["id"] for row in rows if any(c.get("notice") for c in row["citations"])]:
        print(
            f"{len(doubtful)} of {len(rows)} answers cite a passage that does not mention what was "
            f"asked about, {doubtful[0]!r} first; see the field `notice` of their citations",
            file=sys.stderr,
        )
    if failed := [row["id"] for row in rows if row["error"]]:
        print(
            f"{len(failed)} of {len(rows)} questions failed, {failed[0]!r} first; "
            "the field `error` of their rows says why",
            file=sys.stderr,
        )


def _summary(rows: list[Row], compiled: list[tuple[str, float]]) -> str:
    """How often the model retrieved, and what was compiled on the way."""
    rows = [row for row in rows if not row["error"]]
    retrieved = sum(row["retrieved"] for row in rows)
    share = retrieved / max(len(rows), 1)
    text = f"retrieved for {retrieved} of {len(rows)} questions ({share:.1%})"
    actions = [s["action"] for row in rows for s in row["segments"]]
    if len(actions) > len(rows):
        text += f", for {actions.count('retrieve')} of their {len(actions)} segments"
    if compiled:
        text += f"; {len(compiled)} programs compiled in {sum(s for _, s in compiled):.0f} s"
    return text


def _prompt(values: dict[str, Any]) -> tuple[Task | None, str]:
    """The task that --task names, which words the questions, and a notice that says who does.

    A file's name never does, even if it is a task's.
    """
    given = values["task"] or ""
    if tasks.is_known(given):
        task = tasks.with_instruction(tasks.load(given), values["instructions"])
        return task, task.describe(values["instructions"])
    if values["instructions"]:
        raise UserError(
            f"--instructions: goes with --task=NAME{tasks.did_you_mean(given)}, which it words"
        )
    note = ""
    if given:
        note = f"; --task={given} is a name only{tasks.did_you_mean(given)}"
    elif (stem := Path(values["input"]).name.partition(".")[0]) and tasks.is_known(stem):
        note = f"; --task={stem} would ask as that task does"
    return None, f"prompt: the questions as they are{note}"


def run(values: dict[str, Any], _: list[str]) -> None:
    prompt, notice = _prompt(values)
    task = prompt.name if prompt else values["task"]
    profile = check_steps(values["profile"])
    given_input, out = values["input"], values["out"]
    artifacts.check_output(out, "answer", {"input": given_input})
    # The questions are checked before a model is loaded.
    passages = passage_source(values)
    model, index, config = model_and_config(values)
    changes = search_changes(values)
    mode = changes.get("mode", config.search.mode)
    has_retriever = index is not None or passages is not None
    questions = read_checked(given_input, prompt or task, has_retriever, mode)
    rag = load_from(model, index, config, passages)
    rag.check(changes)
    print(notice, file=sys.stderr)
    n = answer_file(rag, given_input, out, task, changes, prompt, questions, profile)
    if current().is_main:
        print(f"{values['out']}: {n} answers")


COMMAND = Command(
    example="selfrag answer --model=W/generator --index=W/index --input=questions.jsonl "
    "--out=answers.jsonl",
    flags=(
        *MODEL_FLAGS,
        *PASSAGES_FLAGS,
        Flag("input", "questions in a published format", required=True),
        Flag("out", "answers (JSON lines)", required=True, writes=True, each_sends=PARTIAL_FILES),
        Flag(
            "task",
            "popqa, arc_challenge, ...: asks as that task does (its search settings come with "
            "`selfrag evaluate`); another name only labels the answers; default: the input file's "
            "name, as a label. With --scorer=released, asqa and eli5 get citation marks",
            group=INPUT,
        ),
        INSTRUCTIONS_FLAG,
        Flag(
            "profile",
            "questions to trace after the first are answered, into OUT.profile, for xprof or "
            "TensorBoard",
            0,
            type=int,
        ),
        *SEARCH_FLAGS,
        *LOADING_FLAGS,
        DISTRIBUTED,
        ANSWER_CONFIG_FLAG,
    ),
    run=run,
    default_config=DEFAULT_CONFIG,
)
