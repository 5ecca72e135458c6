"""The stages of the command line: what each reads, and the table of their flags. Each imports what it needs when it runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from selfrag_jax.records import BadInput, write_json

_CONFIG = "tiny"


@dataclass(frozen=True)
class Flag:
    name: str
    help: str
    default: str | int | bool | None = None  # None: may be left out, or `required`
    required: bool = False
    type: Callable = str


@dataclass(frozen=True)
class Stage:
    summary: str
    example: str
    flags: tuple[Flag, ...]
    run: Callable[[dict, list[str]], None]
    positional: str = ""  # what a positional argument is, if one is taken


class Failed(RuntimeError):
    """The stage did what it should and came to no good end. Printed without a traceback; the exit status is 1."""


def _config_flag(default: str = _CONFIG) -> Flag:
    return Flag(
        "config",
        "an installed config, e.g. tiny or tiny:smoke, or a path; change a field with --config.section.field=value",
        default,
    )


_answer_config_flag = Flag(
    "config",
    "as for the other stages; left out: tiny for models of the synthetic world, any_model (the paper's settings) for others",
)


def _load(values: dict):
    from selfrag_jax import config

    return config.override(config.load(values["config"]), values["overrides"])


def _section(values: dict, cls, name: str):
    from selfrag_jax import config

    loaded = _load(values)
    if name not in loaded:
        raise BadInput(f"--config={values['config']}: has no section {name!r}; sections: {', '.join(sorted(loaded))}")
    return config.build(cls, loaded[name], name)


# ---- what they do ----------------------------------------------------------------------------------------------------
def _quickstart(v: dict, _) -> None:
    from selfrag_jax import config
    from selfrag_jax.commands import quickstart
    from selfrag_jax.evaluation import report

    rows = quickstart.run(config.reseed(_load(v), v["seed"]), v["workdir"])
    print(report.markdown(rows))
    w = v["workdir"]
    print(f"Results: {w}/report/results.json and {w}/report/index.html")
    print(f'Ask: selfrag ask --workdir={w} "{quickstart.sample_question(Path(w))}"')


def _base(v: dict, _) -> None:
    from selfrag_jax.base_model.make import make

    for skill, score in make(_load(v), v["workdir"], v["out"]).items():
        print(f"{skill:<10} {100 * score:.1f}")
    print(v["out"])


def _world(v: dict, _) -> None:
    from selfrag_jax.commands import quickstart

    config = _load(v)
    if v["seed"] is not None:
        config.world.seed = v["seed"]
    quickstart.make_world(config, Path(v["out"]))
    print(f"{v['out']}: passages.tsv, instructions.jsonl, teacher.jsonl, eval/")


def _collect(v: dict, _) -> None:
    from selfrag_jax.critic import collecting as collect

    config = replace(_section(v, collect.CollectConfig, "collect"), teacher=v["teacher"])
    collect.collect(v["input"], v["truth"], config, v["out"])
    print(v["out"])


def _train(v: dict, _) -> None:
    from selfrag_jax.commands.train import join_processes, train_stage

    if v["distributed"]:
        join_processes(v["distributed"])
    train_stage(_load(v), v["role"], v["data"], v["workdir"], v["role"])
    print(v["workdir"])


def _embed(v: dict, _) -> None:
    from selfrag_jax.retrieval import encoders as embed

    encoder = replace(_section(v, embed.EncoderConfig, "encoder"), name=v["encoder"])
    n = embed.embed_corpus(v["passages"], encoder, v["out"])
    print(f"{v['out']}: {n} passages")


def _index(v: dict, _) -> None:
    from selfrag_jax.retrieval import encoders as embed
    from selfrag_jax.retrieval import index

    embeddings = v["embeddings"]
    if bool(embeddings) == bool(v["passages"]):
        raise BadInput("give either --embeddings, made by `selfrag embed`, or --passages to do both steps in one")
    if v["passages"]:
        embeddings = Path(v["out"]).with_name(Path(v["out"]).name + "_embeddings")
        embed.embed_corpus(v["passages"], _section(v, embed.EncoderConfig, "encoder"), embeddings)
    n = index.build(embeddings, _section(v, index.IndexConfig, "index"), v["out"])
    print(f"{v['out']}: {n} passages")


def _retrieve(v: dict, _) -> None:
    from selfrag_jax.retrieval.retriever import retrieve_file

    retrieve_file(v["index"], v["input"], v["out"], v["k"])
    print(v["out"])


def _label(v: dict, _) -> None:
    from selfrag_jax.critic import labelling as label

    label.label(v["critic"], v["input"], _section(v, label.LabelConfig, "label"), v["out"], v["index"], v["k"])
    print(v["out"])


_SEARCH_FLAGS = (
    Flag("mode", "adaptive_retrieval (the model may go on with the passage it has), always_retrieve or no_retrieval"),
    Flag("scorer", "paper: the equations; released: what the authors' scripts compute, quirks included, with --w_use=1"),
    Flag("threshold", "retrieve when p(retrieve) exceeds it, unless the model would rather go on with its passage", type=float),
    Flag("w_rel", "weight of IsRel", type=float),
    Flag("w_sup", "weight of IsSup", type=float),
    Flag("w_use", "weight of IsUse", type=float),
    Flag("w_seq", "weight of the segment's own probability", type=float),
    Flag("normalise", "p(retrieve) is a share of: yes_no, [Retrieval] and [No Retrieval]; all, [Continue to Use Evidence] too"),
    Flag("beam_width", "segments kept at each step", type=int),
    Flag("max_depth", "segments of an answer at most", type=int),
    Flag("ndocs", "passages per retrieval", type=int),
    Flag("accumulate", "how a path's segments are ranked: by the sum (paper), mean or product of their scores"),
    Flag(
        "constraints",
        "drop segments that say one of these critique tokens, e.g. '[No support / Contradictory]'; with commas. --scorer=released "
        "takes this one only, in the long form",
    ),
    Flag("keep_passages", "true or false: keep the passages of earlier segments in the history", type=bool),
    Flag("max_new_tokens", "tokens of a segment at most", type=int),
    Flag("temperature", "0 takes the most likely token; above, tokens are drawn, the more evenly the higher it is", type=float),
    Flag("top_p", "with --temperature: draw from the most likely tokens that make up this much of the probability", type=float),
    Flag("seed", "with --temperature: of the draws; the same question draws the same, whatever else is asked", type=int),
)


_HOW_FLAGS = (
    Flag("dtype", "float32, bfloat16 or float16; default: the model's"),
    Flag("quantization", "int8: weights in 8 bits"),
    Flag("tensor", "devices over which the model is split", type=int),
)


def _changes(v: dict) -> dict:
    changes = {f.name: v[f.name] for f in _SEARCH_FLAGS if v[f.name] is not None}
    if "constraints" in changes:
        changes["constraints"] = tuple(t.strip() for t in changes["constraints"].split(",") if t.strip())
    return changes


def _convert(v: dict, _) -> None:
    from selfrag_jax.checkpoints.converting import convert

    n = convert(v["from"], v["to"], v["format"], v["dtype"], v["reflection_tokens"], v["tokenizer"], v["step"])
    print(f"{v['to']}: {n / 1e6:,.1f}M parameters")


def _compile(v: dict, _) -> None:
    import json

    os.environ["JAX_PLATFORMS"] = "cpu"  # the slice is described, not looked for
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    from selfrag_jax.compilation import compile as aot

    found = aot.compile_program(_load(v), v["topology"], v["program"])
    print(json.dumps(found, indent=2))
    if v["out"]:
        write_json(v["out"], found)
    if not found["fits"]:
        raise Failed(aot.why_not(found))


def _require_quickstart(workdir: str | Path, *files: Path) -> None:
    """Raises BadInput when a file is missing that a finished quickstart leaves in its workdir."""
    if not all(f.is_file() for f in files):
        raise BadInput(f"{workdir}: holds no finished quickstart; run `selfrag quickstart --workdir={workdir}` first")


def _rag(v: dict):
    from selfrag_jax import artifacts
    from selfrag_jax.answering.selfrag import AnswerConfig, SelfRAG
    from selfrag_jax.checkpoints import saving as checkpoints
    from selfrag_jax.huggingface import weights as huggingface

    model, index = v["model"], v["index"]
    if v["workdir"]:
        own = [Path(v["workdir"]) / name for name, given in (("generator", model), ("index", index)) if not given]
        _require_quickstart(v["workdir"], *map(artifacts.manifest_path, own))
        model, index = model or Path(v["workdir"]) / "generator", index or Path(v["workdir"]) / "index"
    if not model:
        raise BadInput("give --model (a training workdir or a Hugging Face folder) or --workdir of a finished quickstart")
    changes = {f.name: v[f.name] for f in _HOW_FLAGS if v[f.name] is not None}
    if v["config"] is None:
        model = huggingface.local(model)
        v = v | {"config": _CONFIG if checkpoints.read_tokenizer(model).mode == "words" else "any_model"}
    return SelfRAG.load(model, index, replace(_section(v, AnswerConfig, "answer"), **changes))


def _ask(v: dict, positional: list[str]) -> None:
    import json

    from selfrag_jax.answering.selfrag import Answer
    from selfrag_jax.answering.terminal import show

    question = " ".join(positional).strip()
    if not question:
        raise BadInput('ask what? For example: selfrag ask --workdir=W "Where was Marvin Tellock born?"')
    rag = _rag(v)
    if rag.retriever is None and (v["mode"] or rag.config.search.mode) != "no_retrieval":
        raise BadInput("give --index, made by `selfrag index`, or --mode=no_retrieval")
    for event in rag.stream([question], **_changes(v)):
        if not isinstance(event, Answer):
            if sys.stderr.isatty() and event.segment.text:  # a long answer is read while it is written
                print(f"... {event.segment.text}", file=sys.stderr, flush=True)
            continue
        if v["json"]:
            print(json.dumps(event.to_row(), ensure_ascii=False))
        if event.error:
            raise Failed(f"no answer: {event.error}")
        if not v["json"]:
            show(event)


def _answer(v: dict, _) -> None:
    from selfrag_jax.commands.answer import answer_file

    n = answer_file(_rag(v), v["input"], v["out"], v["task"], _changes(v))
    print(f"{v['out']}: {n} answers")


def _evaluate(v: dict, _) -> None:
    from selfrag_jax.evaluation.scores import evaluate_file

    out = v["out"] or str(Path(v["predictions"]).with_suffix(".metrics.json"))
    for row in evaluate_file(v["task"], v["predictions"], v["judge"], out, v["seed"]):
        print(f"{row['metric']:<20} {100 * row['value']:.1f}  ({100 * row['low']:.1f}–{100 * row['high']:.1f}, n = {row['n']})")
    print(out)


def _report(v: dict, _) -> None:
    from selfrag_jax.commands import quickstart
    from selfrag_jax.evaluation import report

    workdirs = [Path(w) for w in v["workdir"].split(",")]
    for w in workdirs:
        _require_quickstart(w, w / "report" / "results.json")
    if len({w.resolve() for w in workdirs}) < len(workdirs):
        raise BadInput(f"--workdir={v['workdir']}: names a workdir twice")
    runs = [report.read_results(w / "report" / "results.json") for w in workdirs]
    out = Path(v["out"]) if v["out"] else workdirs[0] / "report"
    if len(runs) == 1:
        rows, title = runs[0], report.TITLE
    elif not v["out"]:
        raise BadInput("several workdirs: --out says where their mean is written")
    else:
        rows, title = report.mean_over_seeds(runs), f"{report.TITLE}: mean of {len(runs)} runs"
        write_json(out / "results.json", {"rows": rows})
    differences = quickstart.differences(workdirs, 0)
    report.write(rows, quickstart.examples(workdirs[0], v["examples"]), out, title, differences)
    print(report.markdown(rows, differences))
    print(f"{out}/index.html")


# ---- the table -------------------------------------------------------------------------------------------------------
_MODEL_FLAGS = (
    Flag("workdir", "of a finished quickstart: stands for --model=W/generator --index=W/index"),
    Flag("model", "a training workdir or a Hugging Face folder"),
    Flag("index", "made by `selfrag index`; without one, the passages (ctxs) of the questions are used"),
)

STAGES: dict[str, Stage] = {
    "quickstart": Stage(
        "Makes Self-RAG from nothing in a small synthetic world and measures it.",
        "selfrag quickstart --workdir=W",
        (
            Flag("workdir", "where everything is written; started again, it continues", required=True),
            Flag("seed", "added to every seed of the config: another world, another training", 0, type=int),
            _config_flag(),
        ),
        _quickstart,
    ),
    "base": Stage(
        "Makes the small base model that the quickstart starts from (it is shipped; this takes about an hour).",
        "selfrag base --workdir=W/base --out=my_base",
        (
            Flag("workdir", "for checkpoints; started again, it continues", required=True),
            Flag("out", "folder to write, in Hugging Face's format", required=True),
            _config_flag("base"),
        ),
        _base,
    ),
    "world": Stage(
        "Writes the synthetic world: passages, instructions, the teacher's truth, evaluation files.",
        "selfrag world --out=W/world",
        (Flag("out", "folder to write", required=True), Flag("seed", "of the world", type=int), _config_flag()),
        _world,
    ),
    "collect": Stage(
        "Collects a teacher's critiques of instructions and passages: training data for the critic.",
        "selfrag collect --input=W/retrieved/instructions.jsonl --truth=W/world/teacher.jsonl --out=W/critic_data.jsonl",
        (
            Flag("input", "instructions with ctxs, as `selfrag retrieve` writes them", required=True),
            Flag("teacher", "rule: judges by the synthetic world's truth", "rule"),
            Flag("truth", "the world's teacher.jsonl", required=True),
            Flag("out", "critic data (JSON lines)", required=True),
            _config_flag(),
        ),
        _collect,
    ),
    "train": Stage(
        "Trains a critic or a generator; killed and started again, it continues.",
        "selfrag train --role=critic --data=W/critic_data.jsonl --workdir=W/critic",
        (
            Flag("role", "critic or generator", required=True),
            Flag("data", "critic or generator data (JSON lines)", required=True),
            Flag("workdir", "for checkpoints and logs; of several processes, one that all of them see", required=True),
            Flag("distributed", "auto (TPU slice, Slurm, MPI), or HOST:PORT,PROCESSES,INDEX: the same command on every host"),
            _config_flag(),
        ),
        _train,
    ),
    "embed": Stage(
        "Embeds a corpus of passages.",
        "selfrag embed --passages=passages.tsv --out=W/embeddings",
        (
            Flag("passages", ".tsv (columns id, text, title) or .jsonl (id, title, text)", required=True),
            Flag("encoder", "hashed: words and trigrams, no training", "hashed"),
            Flag("out", "folder to write", required=True),
            _config_flag(),
        ),
        _embed,
    ),
    "index": Stage(
        "Builds a ScaNN index over embeddings, or straight from passages.",
        "selfrag index --passages=passages.tsv --out=W/index",
        (
            Flag("embeddings", "made by `selfrag embed`"),
            Flag("passages", "a corpus to embed and index in one step"),
            Flag("out", "folder to write", required=True),
            _config_flag(),
        ),
        _index,
    ),
    "retrieve": Stage(
        "Adds the best passages (ctxs) to each row of a question or instruction file.",
        "selfrag retrieve --index=W/index --input=questions.jsonl --out=with_passages.jsonl --k=5",
        (
            Flag("index", "made by `selfrag index`", required=True),
            Flag("input", "JSON lines with question or instruction", required=True),
            Flag("out", "JSON lines", required=True),
            Flag("k", "passages per row", 5, type=int),
        ),
        _retrieve,
    ),
    "label": Stage(
        "Lets the critic label instructions with passages and reflection tokens: training data for the generator.",
        "selfrag label --critic=W/critic --input=W/retrieved/instructions.jsonl --out=W/generator_data.jsonl",
        (
            Flag("critic", "workdir of a trained critic", required=True),
            Flag("input", "instructions with outputs, and ctxs unless there is an --index", required=True),
            Flag("index", "made by `selfrag index`: where the passages of rows without ctxs are looked for"),
            Flag("k", "passages per row, from the index", 5, type=int),
            Flag("out", "generator data in the published format (JSON lines)", required=True),
            _config_flag(),
        ),
        _label,
    ),
    "ask": Stage(
        "Answers one question, with its passages, their critiques and citations.",
        'selfrag ask --workdir=W "Where was Marvin Tellock born?"',
        (
            *_MODEL_FLAGS,
            *_SEARCH_FLAGS,
            *_HOW_FLAGS,
            Flag("json", "print the record instead", False, type=bool),
            _answer_config_flag,
        ),
        _ask,
        "question",
    ),
    "answer": Stage(
        "Answers a file of questions; interrupted, it continues without answering a row twice.",
        "selfrag answer --model=W/generator --index=W/index --input=questions.jsonl --out=answers.jsonl",
        (
            *_MODEL_FLAGS,
            Flag("input", "questions in a published format", required=True),
            Flag("out", "answers (JSON lines)", required=True),
            Flag(
                "task",
                "name of the task; default: the input file's name. With --scorer=released, answers to asqa and eli5 "
                "have marks of citations in the text",
            ),
            *_SEARCH_FLAGS,
            *_HOW_FLAGS,
            _answer_config_flag,
        ),
        _answer,
    ),
    "evaluate": Stage(
        "Scores answers against the gold of a question file.",
        "selfrag evaluate --task=questions.jsonl --predictions=answers.jsonl",
        (
            Flag("task", "the question file with gold answers", required=True),
            Flag("predictions", "written by `selfrag answer`", required=True),
            Flag("judge", "of citations: none, or world (the synthetic world's truth)", "none"),
            Flag("seed", "of the bootstrap", 0, type=int),
            Flag("out", "default: beside the predictions, as .metrics.json"),
        ),
        _evaluate,
    ),
    "convert": Stage(
        "Converts a model between Hugging Face's format and a training workdir, layer by layer.",
        "selfrag convert --from=W/generator --to=my_model --format=huggingface --dtype=bfloat16",
        (
            Flag("from", "a Hugging Face folder, a hub name (owner/model), or a training workdir", required=True),
            Flag("to", "folder to write", required=True),
            Flag("format", "orbax (a training workdir) or huggingface", required=True),
            Flag("step", "which checkpoint of a workdir: last, best (the lowest training loss), or its number", "last"),
            Flag("dtype", "of the parameters: float32, bfloat16 or float16; default: as they are"),
            Flag(
                "tokenizer", "how text is cut: llama_slow (as the released model was trained) or llama_fast (as it was served)"
            ),
            Flag("reflection_tokens", "add those that the vocabulary lacks", False, type=bool),
        ),
        _convert,
    ),
    "compile": Stage(
        "Compiles training or answering for TPUs or GPUs that are not here: memory, traffic between chips, best step time. Needs `.[tpu]` or `.[gpu]`.",
        "selfrag compile --config=generator_7b --topology=v5e:4x4",
        (
            Flag(
                "topology",
                "a TPU and its slice (v4:2x2x4, v5e:4x4, v5p:2x2x4, v6e:8x8), or GPUs of a host (h100:8)",
                required=True,
            ),
            Flag("program", "train, or decode: answering (configs short_form and long_form)", "train"),
            Flag("out", "JSON file to write, beside the screen"),
            _config_flag("generator_7b"),
        ),
        _compile,
    ),
    "report": Stage(
        "Writes the report of a quickstart again (Markdown, HTML), or the mean of several, with its interval over seeds.",
        "selfrag report --workdir=W0,W1,W2 --out=mean",
        (
            Flag("workdir", "of a finished quickstart; several with commas", required=True),
            Flag("out", "folder to write; default: the workdir's report"),
            Flag("examples", "questions to show", 6, type=int),
        ),
        _report,
    ),
}
