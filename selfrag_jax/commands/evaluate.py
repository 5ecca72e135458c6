"""`selfrag evaluate`: answers beside gold answers, or a critic beside labels; metrics out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfrag_jax import artifacts
from selfrag_jax.commands.answer import INSTRUCTIONS_FLAG
from selfrag_jax.commands.answer_parts import PARTIAL_FILES
from selfrag_jax.commands.asking_critic import AXES, CRITIC, evaluate_critic
from selfrag_jax.commands.command import (
    DISTRIBUTED,
    INPUT,
    MODEL,
    Command,
    Flag,
    config_flag,
    load_config,
)
from selfrag_jax.commands.judging import JUDGING_FLAGS, VERIFIERS, open_judge, open_verifier
from selfrag_jax.commands.model_flags import (
    LOADING_FLAGS,
    MODEL_FLAGS,
    SEARCH_FLAGS,
    SYSTEM_FLAGS,
    config_for,
)
from selfrag_jax.commands.train import FORMATS, is_released
from selfrag_jax.data.questions import read_questions
from selfrag_jax.errors import UserError
from selfrag_jax.evaluation import tasks
from selfrag_jax.evaluation.answer_rows import pair, read_predictions
from selfrag_jax.evaluation.critic_scores import BINS
from selfrag_jax.evaluation.fact_precision import FactVerifier, verified_by
from selfrag_jax.evaluation.metrics import FactReader
from selfrag_jax.evaluation.scores import (
    Row,
    columns,
    gold_notice,
    result_rows,
    score_questions,
)
from selfrag_jax.evaluation.tables import interval_text, percent
from selfrag_jax.files import read_json, write_json
from selfrag_jax.records import write_jsonl

if TYPE_CHECKING:
    from selfrag_jax.commands.task_runs import Scoring
    from selfrag_jax.critic.critic import CriticConfig

SCORES = ".scores"  # the folder of a critic's evaluation
TASK_EXAMPLE = "selfrag evaluate --task=popqa --input=popqa.jsonl --model=M --index=I"
SYSTEMS_EXAMPLE = f"{TASK_EXAMPLE} --systems=selfrag,ablations"
ANSWERS_EXAMPLE = "selfrag evaluate --task=questions.jsonl --predictions=answers.jsonl"
CRITIC_EXAMPLE = "selfrag evaluate --task=critic --critic=W/critic --data=critic_data.dev.jsonl"

# --seed is the bootstrap's; the sampling's is --config.answer.search.seed.
TASK_SEARCH_FLAGS = tuple(f for f in SEARCH_FLAGS if f.name != "seed")
ANSWERING = tuple(
    f.name
    for f in (
        INSTRUCTIONS_FLAG,
        *SYSTEM_FLAGS,
        *MODEL_FLAGS,
        *TASK_SEARCH_FLAGS,
        *LOADING_FLAGS,
        DISTRIBUTED,
    )
)


# ---- answers -------------------------------------------------------------------------------------
def evaluate_file(
    task_file: str | Path,
    predictions: str | Path,
    judge: str,
    out: str | Path,
    seed: int,
    mauve_model: str = "",
    verifier: FactReader | FactVerifier | None = VERIFIERS["world"],
    teacher: str = "",
) -> list[Row]:
    """Scores a predictions file of `selfrag answer`; returns the rows of metrics.json.

    Writes them to `out`, and each question's scores beside it (`scores_path`). judge: a name in
    JUDGES, or the folder of an NLI model; mauve_model: the folder of a language model, "" for none;
    verifier: see `open_verifier`. teacher: the world's teacher.jsonl, of the judge "world".

    Raises UserError on an unknown judge, and on predictions that lack a field or a question, or are
    of another file.
    """
    task_file, predictions = Path(task_file), Path(predictions)
    if task_file.exists() and predictions.exists() and task_file.samefile(predictions):
        raise UserError(
            f"{predictions}: is both the task and the predictions; "
            "--task is the question file with gold answers"
        )
    for path in (task_file, predictions):
        if Path(out).exists() and path.exists() and path.samefile(out):
            raise UserError(f"{out}: would be overwritten by its own scores; choose another --out")
    if Path(out).is_dir():
        raise UserError(f"{out}: is a folder; --out is a file, {out}/metrics.json for example")
    inputs: dict[str, str | Path] = {"task": task_file, "predictions": predictions}
    if teacher:
        inputs["truth"] = teacher
    artifacts.check_output(out, "evaluate", inputs, [scores_path(out)])
    questions, answered = read_questions(task_file), read_predictions(predictions)
    try:
        pairs = pair(questions, answered)  # before a judge is loaded
    except UserError as e:
        raise UserError(f"{predictions}: {e}") from None
    asked = open_judge(judge, teacher)
    if notice := gold_notice(questions):
        print(f"{task_file}: {notice}", file=sys.stderr)
    if isinstance(verifier, FactVerifier) and (notice := verifier.notice(pairs)):
        print(f"{task_file}: {notice}", file=sys.stderr)
    try:
        rows = score_questions(questions, answered, asked, verifier)
    except UserError as e:
        raise UserError(f"{predictions}: {e}") from None
    results = result_rows("selfrag", task_file.stem, columns(rows), seed)
    if mauve_model:
        from selfrag_jax.evaluation.mauve_score import mauve_of_answers

        mauve = mauve_of_answers(questions, answered, mauve_model, seed)
        results.append({"system": "selfrag", "task": task_file.stem, **mauve})
    if not artifacts.manifest_path(out).is_file():
        artifacts.claim_rewritten(scores_path(out), "evaluate")
    artifacts.claim_rewritten(out, "evaluate")
    write_jsonl(scores_path(out), rows)
    named = {} if judge == "none" else {"judge": Path(judge).name}
    named |= verified_by(verifier, results)
    write_json(out, {"rows": results, "seed": seed, **named})
    artifacts.write_manifest(out, "evaluate", {"seed": seed, **named, "judge": judge}, inputs, {})
    return results


def scores_path(out: str | Path) -> Path:
    """Where the scores of each question are written, beside the metrics `out`."""
    out = Path(out)
    if out.name == "metrics.json":
        return out.with_name("scores.jsonl")
    stem = out.name.removesuffix(".json").removesuffix(".metrics")
    return out.with_name(f"{stem}.scores.jsonl")


# ---- the command ---------------------------------------------------------------------------------
def run(values: dict[str, Any], _: list[str]) -> None:
    if values["all"]:
        _run_tasks(values)
    elif not values["task"]:
        raise UserError(f"missing --task; for example: {TASK_EXAMPLE}")
    elif values["task"] == CRITIC:
        _run_critic(values)
    elif not values["predictions"] and not _is_file(values["task"]):
        _run_tasks(values)
    else:
        _run_answers(values)


def _is_file(task: str) -> bool:
    """Whether --task is the path of a question file, and not a task's name."""
    return not tasks.is_known(task) and (
        Path(task).name != task or "." in task or Path(task).is_file()
    )


def _run_tasks(values: dict[str, Any]) -> None:
    """One task, or with --all every task whose file lies in --data."""
    from selfrag_jax.commands import task_evaluation

    _refuse(values, ("critic", "format", "bins", "predictions"), "does not go with a task's name")
    if values["all"]:
        _refuse(values, ("task", "input"), "does not go with --all, which takes --data")
        task_evaluation.evaluate_all(values, _scoring(values))
        return
    _refuse(values, ("data",), "goes with --all or --task=critic; a task's file is --input")
    if not tasks.is_known(values["task"]):
        hint = tasks.did_you_mean(values["task"])
        raise UserError(f"--task={values['task']}: no such file or task{hint}")
    if not values["input"]:
        raise UserError(f"missing --input, the task's file; for example: {TASK_EXAMPLE}")
    task_evaluation.evaluate_one(values, _scoring(values))


def _scoring(values: dict[str, Any]) -> Scoring:
    from selfrag_jax.commands.task_runs import Scoring

    name = values["judge"] or "none"
    mauve_model = values["mauve"] or ""
    judge = open_judge(name, values["truth"] or "")
    return Scoring(name, judge, _verifier(values), mauve_model, values["seed"])


def _verifier(values: dict[str, Any]) -> FactReader | FactVerifier | None:
    name, facts = values["verifier"] or "world", values["facts"] or ""
    return open_verifier(name, facts, values["truth"] or "")


def _run_answers(values: dict[str, Any]) -> None:
    _refuse(
        values,
        ("critic", "data", "format", "bins", "config", "overrides"),
        "goes with --task=critic",
    )
    _refuse(values, ("input", *ANSWERING), "goes with a task's name; --predictions are answered")
    if not values["predictions"]:
        raise UserError(
            "missing --predictions, written by `selfrag answer`; for example: "
            f"{ANSWERS_EXAMPLE}. A critic is evaluated by {CRITIC_EXAMPLE}"
        )
    out = values["out"] or Path(values["predictions"]).with_suffix(".metrics.json")
    judge = values["judge"] or "none"
    files, mauve = (values["task"], values["predictions"]), values["mauve"] or ""
    verifier, teacher = _verifier(values), values["truth"] or ""
    rows = evaluate_file(*files, judge, out, values["seed"], mauve, verifier, teacher)
    for row in rows:
        interval = interval_text(row, between="–")
        print(f"{row['metric']:<20} {percent(row)}  ({interval}, n = {row['n']})")
    print(out)


def _run_critic(values: dict[str, Any]) -> None:
    from selfrag_jax.evaluation import critic_tables

    _refuse(values, ("input", *ANSWERING), "goes with a task's name")
    _refuse(
        values,
        ("predictions", "judge", "mauve", "verifier", "facts", "truth"),
        "is of answers; --task=critic asks the critic itself",
    )
    if missing := [f"--{name}" for name in ("critic", "data") if not values[name]]:
        raise UserError(f"missing {', '.join(missing)}; for example: {CRITIC_EXAMPLE}")
    bins = BINS if values["bins"] is None else values["bins"]
    if bins < 1:
        raise UserError(f"--bins={bins}: must be at least 1")
    data = Path(values["data"])
    out = Path(values["out"] or data.with_name(data.name.removesuffix(".gz")).with_suffix(SCORES))
    config = _critic_config(values)
    released = is_released(values["format"] or "own")
    verdicts = evaluate_critic(values["critic"], data, config, out, values["seed"], bins, released)
    print(critic_tables.score_text(read_json(out / "metrics.json")["rows"]))
    for group, v in verdicts.items():
        print("\n" + critic_tables.confusion_text(group, v.confusion, *AXES))
    print(f"\n{out}")


def _critic_config(values: dict[str, Any]) -> CriticConfig:
    """How the critic is asked: the section label.critic of the config."""
    from selfrag_jax import config as configs
    from selfrag_jax.critic.critic import CriticConfig

    if values["config"] is None:
        values = values | {"config": config_for(values["critic"], "critic_7b")}
    config = load_config(values)
    configs.require(config, "label.critic")
    return configs.build(CriticConfig, config.label.critic, "label.critic")


def _refuse(values: dict[str, Any], names: Sequence[str], why: str) -> None:
    """Raises UserError if one of these flags is given."""
    if given := [name for name in names if values[name] not in (None, [])]:
        flag = f"config.{values['overrides'][0]}" if given[0] == "overrides" else given[0]
        raise UserError(f"--{flag}: {why}")


COMMAND = Command(
    example=f"{TASK_EXAMPLE}\n{SYSTEMS_EXAMPLE}\n{ANSWERS_EXAMPLE}\n{CRITIC_EXAMPLE}",
    flags=(
        Flag(
            "task",
            "a task (popqa, arc_challenge:released, ...; configs/tasks), which is answered and "
            "scored; the question file with gold answers of --predictions; or critic",
            group=INPUT,
        ),
        Flag("input", "with a task: its questions, in a published format", group=INPUT),
        INSTRUCTIONS_FLAG,
        *SYSTEM_FLAGS,
        Flag(
            "all",
            "every task whose published file lies in the folder --data",
            False,
            type=bool,
            group=INPUT,
        ),
        Flag("predictions", "the answers, written by `selfrag answer`", group=INPUT),
        *JUDGING_FLAGS,
        Flag(
            "critic",
            "with --task=critic: a trained critic, a Hugging Face folder or a hub name",
            group=MODEL,
            is_folder=True,
            in_place=True,
        ),
        Flag(
            "data",
            "with --task=critic: critic data that it was not trained on; with --all: a folder",
            group=INPUT,
        ),
        Flag(
            "bins",
            f"with --task=critic: number of confidence bins of the calibration (default: {BINS})",
            type=int,
        ),
        Flag(
            "format",
            "format of --data: own (default); or released, for published files",
            group=INPUT,
            choices=FORMATS,
        ),
        Flag("seed", "seed of the bootstrap", 0, type=int),
        Flag(
            "out",
            "default: beside the predictions, as .metrics.json, with each question's scores in "
            ".scores.jsonl; of a critic, a folder beside the "
            f"data, as {SCORES}: metrics.json, predictions.jsonl, plots (.svg)",
            writes=True,
            default_beside=("input", "predictions", "data"),
            each_sends=PARTIAL_FILES,
        ),
        *MODEL_FLAGS,
        *TASK_SEARCH_FLAGS,
        *LOADING_FLAGS,
        DISTRIBUTED,
        config_flag(
            None,
            "; with a task, how it is answered, but for the search, which the task sets; "
            "with --task=critic, the section label.critic says how the critic is asked (default: "
            "tiny for critics of the synthetic world, else critic_7b)",
            "tiny, critic_7b",
        ),
    ),
    run=run,
)
