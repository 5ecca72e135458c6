"""The whole flow in the synthetic world: every stage of the real commands, in order, each continuing where it was."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from selfrag_jax import artifacts
from selfrag_jax import config as configs
from selfrag_jax.answering.selfrag import AnswerConfig, SelfRAG
from selfrag_jax.checkpoints import saving as checkpoints
from selfrag_jax.commands.train import train_stage
from selfrag_jax.critic import collecting as collect
from selfrag_jax.critic import labelling as label
from selfrag_jax.data.questions import read_questions
from selfrag_jax.evaluation import baselines, metrics, report
from selfrag_jax.evaluation import scores as evaluate
from selfrag_jax.progress import progress
from selfrag_jax.records import GeneratorExample, Question, instruction_from, read_records, read_rows, write_json, write_jsonl
from selfrag_jax.retrieval import encoders as embed
from selfrag_jax.retrieval import index
from selfrag_jax.retrieval.retriever import retrieve_file
from selfrag_jax.text.prompts import format_passage
from selfrag_jax.world import questions, truth
from selfrag_jax.world.encyclopedia import WorldConfig, build

ABLATION_TASKS = ("long_tail", "well_known")
LONG_FORM = ("two_part", "biography")  # several segments; the others take one step, as in the paper


@dataclass(frozen=True)
class System:
    """A row of the results: which model answers, and what differs from the config."""

    name: str
    model: str  # generator, rag or closed
    tasks: tuple[str, ...]
    changes: tuple[tuple[str, Any], ...] = ()  # of the search (generator)
    passages: int | str = 0  # in the prompt (baselines); "each": one answer per passage, the most probable taken


SYSTEMS = (
    System("no_retrieval", "closed", questions.TASKS),
    System("rag_top1", "rag", questions.TASKS, passages=1),
    System("rag_topk", "rag", questions.TASKS, passages=5),
    System("selfrag_always", "generator", questions.TASKS, (("mode", "always_retrieve"),)),
    System("selfrag_adaptive", "generator", questions.TASKS),
    System("selfrag_never", "generator", questions.TASKS, (("mode", "no_retrieval"),)),
    System("ablation_top1", "generator", ABLATION_TASKS, (("mode", "always_retrieve"), ("ndocs", 1))),
    System("ablation_no_isrel", "generator", ABLATION_TASKS, (("mode", "always_retrieve"), ("w_rel", 0.0))),
    System("ablation_no_issup", "generator", ABLATION_TASKS, (("mode", "always_retrieve"), ("w_sup", 0.0))),
    System("ablation_no_isuse", "generator", ABLATION_TASKS, (("mode", "always_retrieve"), ("w_use", 0.0))),
    System("ablation_no_seqscore", "generator", ABLATION_TASKS, (("mode", "always_retrieve"), ("w_seq", 0.0))),
    System("train_no_critic", "rag", ABLATION_TASKS, passages="each"),
    System("train_no_retriever", "closed", ABLATION_TASKS, passages=1),
)


def run(c: ConfigDict, workdir: str | Path) -> list[dict[str, Any]]:
    """Runs all stages and returns the rows of results.json."""
    configs.require_kind(c, "quickstart", "configs/tiny.py")
    w, started = Path(workdir), time.monotonic()
    say = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731

    say("1/9  world: a fictional encyclopedia, questions about it, a teacher that knows it")
    make_world(c, w / "world")
    say("2/9  retriever: embed the passages, index them (ScaNN), retrieve for the instructions")
    embed.embed_corpus(w / "world" / "passages.tsv", configs.build(embed.EncoderConfig, c.encoder, "encoder"), w / "embeddings")
    index.build(w / "embeddings", configs.build(index.IndexConfig, c.index, "index"), w / "index")
    retrieve_file(w / "index", w / "world" / "instructions.jsonl", w / "retrieved" / "instructions.jsonl", c.retrieve_k)
    for task in (*questions.TASKS, "critic"):
        retrieve_file(
            w / "index", w / "world" / "eval" / f"{task}.jsonl", w / "retrieved" / "eval" / f"{task}.jsonl", c.retrieve_k
        )
    say("3/9  collect: the teacher's critiques")
    collect_config = configs.build(collect.CollectConfig, c.collect, "collect")
    collect.collect(
        w / "retrieved" / "instructions.jsonl", w / "world" / "teacher.jsonl", collect_config, w / "critic_data.jsonl"
    )
    say("4/9  critic: learns to criticise like the teacher")
    train_stage(c, "critic", w / "critic_data.jsonl", w / "critic", "critic")
    say("5/9  label: the critic labels the generator's training data")
    label_config = configs.build(label.LabelConfig, c.label, "label")
    label.label(w / "critic", w / "retrieved" / "instructions.jsonl", label_config, w / "generator_data.jsonl")
    say("6/9  generator: learns to retrieve, answer and criticise itself")
    train_stage(c, "generator", w / "generator_data.jsonl", w / "generator", "generator")
    say("7/9  baselines: the same data without reflection tokens, the same base and steps")
    for name in ("rag", "closed"):
        baseline_data(w / "retrieved" / "instructions.jsonl", name, c.seed, w / f"{name}_data.jsonl")
        train_stage(c, "generator", w / f"{name}_data.jsonl", w / name, name)
    say("8/9  evaluate: every system on every task")
    rows = evaluate_all(c, w)
    say("9/9  report")
    results = w / "report" / "results.json"
    write_json(results, {"rows": rows})
    shown = examples(w, c.report.examples)
    report.write(rows, shown, w / "report", report.TITLE, differences([w], c.report.seed))
    minutes = round((time.monotonic() - started) / 60, 2)
    say(f"     {minutes} minutes in this run")
    inputs = {"predictions": w / "predictions"}
    artifacts.finish(w / "report", "report", c.report.to_dict(), inputs, {"rows": len(rows)})
    return rows


def make_world(c: ConfigDict, out: Path) -> None:
    configs.require_kind(c, "quickstart", "configs/tiny.py")
    config = configs.build(WorldConfig, c.world, "world")
    if not artifacts.is_finished(out, "world", config, {}):
        artifacts.finish(out, "world", config, {}, questions.write(build(config), out))


def baseline_data(input_path: Path, kind: str, seed: int, out: Path) -> None:
    """Rows for standard RAG (`rag`: passages in front of the output; four in five have the top one, the others all that
    were retrieved) or for a model alone (`closed`)."""
    config, inputs = {"kind": kind, "seed": seed}, {"input": input_path}
    if artifacts.is_finished(out, "baseline_data", config, inputs):
        return
    rows = []
    for row in read_records(input_path, instruction_from):
        rng = random.Random(f"{kind}-{seed}-{row.id}")
        ctxs = row.ctxs if kind == "rag" and rng.random() < 0.2 else row.ctxs[:1] if kind == "rag" else ()
        output = "".join(map(format_passage, ctxs)) + row.output
        rows.append(GeneratorExample(row.id, row.instruction, output, row.input, row.dataset_name))
    artifacts.finish(out, "baseline_data", config, inputs, {"rows": write_jsonl(out, rows)})


def evaluate_all(c: ConfigDict, w: Path) -> list[dict[str, Any]]:
    """Predictions of every system (kept as files, so that an interrupted evaluation continues) and their metrics."""
    answer_config = configs.build(AnswerConfig, c.answer, "answer")
    plain = configs.build(baselines.PlainConfig, c.plain, "plain")
    tasks = {t: read_questions(w / "retrieved" / "eval" / f"{t}.jsonl", t) for t in questions.TASKS}
    total = sum(len(tasks[t]) for s in SYSTEMS for t in s.tasks)
    rag: SelfRAG | None = None
    models: dict[str, checkpoints.LoadedModel] = {}
    rows: list[dict[str, Any]] = []
    with progress("evaluate", total, "answers") as bar:
        for system in SYSTEMS:
            for task in system.tasks:
                out = w / "predictions" / system.name / f"{task}.jsonl"
                made = {"system": system.name, "changes": dict(system.changes), "passages": system.passages}
                made |= {"answer": c.answer.to_dict()} if system.model == "generator" else {"plain": c.plain.to_dict()}
                inputs = {"model": w / system.model, "questions": w / "retrieved" / "eval" / f"{task}.jsonl"}
                if not artifacts.is_finished(out, "answer", made, inputs):
                    if system.model == "generator":
                        rag = rag or SelfRAG.load(w / "generator", w / "index", answer_config)
                        changes = dict(system.changes) | ({} if task in LONG_FORM else {"max_depth": 1, "beam_width": 1})
                        predictions = self_rag_rows(rag, tasks[task], changes, bar.advance)
                    else:
                        if system.model not in models:
                            models[system.model] = checkpoints.load(w / system.model)
                        predictions = _plain_rows(models[system.model], tasks[task], system.passages, plain, bar.advance)
                    write_jsonl(out, predictions)
                    artifacts.finish(out, "answer", made, inputs, {"answers": len(predictions)})
                else:
                    bar.first += len(tasks[task])
                    bar.advance(len(tasks[task]))
                predictions = [row for _, row in read_rows(out)]
                values = evaluate.score(tasks[task], predictions, evaluate.world_judge)
                rows += evaluate.result_rows(system.name, task, values, c.report.seed)
    return rows + _critic_rows(c, w)


def self_rag_rows(rag: SelfRAG, task: Sequence[Question], changes: dict[str, Any], advance) -> list[dict[str, Any]]:
    # The first retrieval is online here too: questions come without their ctxs.
    asked = [replace(q, ctxs=()) for q in task]
    return [a.to_row() for a in rag.answer(asked, on_answer=lambda _: advance(1), **changes)]


def _plain_rows(loaded, task, passages, plain: baselines.PlainConfig, advance) -> list[dict[str, Any]]:
    if passages == "each":
        k = max(len(q.ctxs) for q in task)
        per_passage = []
        for i in range(k):
            done = advance if i == 0 else None
            per_passage.append(baselines.answer_plain(loaded, task, [q.ctxs[i : i + 1] for q in task], plain, done))
        return baselines.best_of(per_passage)
    return baselines.answer_plain(loaded, task, [q.ctxs[:passages] for q in task], plain, advance)


def _critic_rows(c: ConfigDict, w: Path) -> list[dict[str, Any]]:
    """The critic against the world's truth, on instructions about held-out entities, and about well-known ones and common
    knowledge in held-out phrasings."""
    config = configs.build(collect.CollectConfig, c.collect, "collect")
    teacher = collect.RuleTeacher(w / "world" / "teacher.jsonl", 0.0, config.seed)
    rows = read_records(w / "retrieved" / "eval" / "critic.jsonl", instruction_from)
    pairs = [(q, r.dataset_name) for r in rows for q in collect.queries(r, config, random.Random(f"critic-{r.id}"))]
    asked, kinds = [q for q, _ in pairs], [kind for _, kind in pairs]
    label_config = configs.build(label.LabelConfig, c.label, "label")
    critic = label.Critic(checkpoints.load(w / "critic"), label_config.critic)
    return evaluate.critic_accuracy(critic, asked, [teacher.truth(q) for q in asked], kinds, c.report.seed)


# What the aims of the quickstart compare: one system, another, and the task.
COMPARED = (
    ("selfrag_always", "rag_top1", "long_tail"),
    ("selfrag_always", "ablation_top1", "long_tail"),
    ("selfrag_always", "no_retrieval", "long_tail"),
    ("selfrag_always", "ablation_no_isrel", "long_tail"),
    ("selfrag_always", "ablation_no_issup", "long_tail"),
    ("selfrag_always", "ablation_no_isuse", "long_tail"),
    ("selfrag_always", "ablation_no_seqscore", "long_tail"),
    ("selfrag_always", "selfrag_adaptive", "long_tail"),
    ("selfrag_always", "selfrag_adaptive", "well_known"),
    ("selfrag_never", "selfrag_adaptive", "no_need"),
)


def differences(workdirs: Sequence[Path], seed: int) -> list[dict[str, Any]]:
    """Paired differences in accuracy over the questions of all workdirs, resampled by the entity that is asked about."""
    out = []
    for one, other, task in COMPARED:
        values: list[float] = []
        entities: list[tuple[int, str]] = []
        for i, w in enumerate(workdirs):
            asked = read_questions(w / "retrieved" / "eval" / f"{task}.jsonl", task)
            a, b = (
                evaluate.score(asked, [row for _, row in read_rows(w / "predictions" / s / f"{task}.jsonl")], None)["accuracy"]
                for s in (one, other)
            )
            values += [x - y for x, y in zip(a, b, strict=True)]
            entities += [(i, truth.parse(q.question).name or q.id) for q in asked]
        value, low, high = metrics.paired_interval(values, entities, seed)
        out.append({"system": one, "over": other, "task": task, "value": value, "low": low, "high": high, "n": len(values)})
    return out


def examples(w: Path, n: int) -> list[dict[str, Any]]:
    """Some answers for the report: the first questions of several tasks."""
    out = []
    for task in ("long_tail", "two_part", "well_known", "no_need", "claims", "biography"):
        rows = [row for _, row in read_rows(w / "predictions" / "selfrag_adaptive" / f"{task}.jsonl")]
        out += rows[:1]
    return out[:n]


def sample_question(w: Path) -> str:
    """A question that the finished quickstart can be asked."""
    return read_questions(w / "world" / "eval" / "long_tail.jsonl")[0].question
