"""The whole flow in small: every stage once, its files, its resumption, and asking the result."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import bucket as buckets
import jax
import numpy as np
import pytest

from selfrag_jax import artifacts, cli, config
from selfrag_jax.checkpoints import loading
from selfrag_jax.commands import quickstart as flow
from selfrag_jax.commands import world_evaluation, worlds
from selfrag_jax.commands.world_evaluation import predictions_file
from selfrag_jax.critic.labelling import LabelConfig
from selfrag_jax.data.instructions import read_instructions
from selfrag_jax.data.questions import read_questions
from selfrag_jax.errors import UserError
from selfrag_jax.evaluation import tables
from selfrag_jax.records import read_rows
from selfrag_jax.retrieval import corpus
from selfrag_jax.search import scoring
from selfrag_jax.search.released import scores
from selfrag_jax.storage.mirror import Mirror
from selfrag_jax.storage.paths import as_path
from selfrag_jax.text import prompts, reflection
from selfrag_jax.text.tokenizer import Control
from selfrag_jax.training import train as train_loop

SMOKE = "--config=tiny:smoke"


# ---- a finished run ------------------------------------------------------------------------------
def test_every_system_has_its_results(quickstart):
    workdir, rows = quickstart
    kind = worlds.kind_of_file(workdir / flow.TEACHER)
    assert {r["system"] for r in rows} == {*kind.systems, "critic"}
    assert {r["task"] for r in rows} == {*tables.TASKS, "critic"}
    assert all(0 <= r["low"] <= r["value"] <= r["high"] <= 1 and r["n"] > 0 for r in rows)
    assert json.loads((workdir / "report" / "results.json").read_text())["rows"] == rows
    assert "Critic accuracy" in (workdir / "report" / "index.html").read_text()


def test_generator_data_is_in_the_published_format(quickstart):
    workdir, _ = quickstart
    for _, row in read_rows(workdir / "generator_data.jsonl"):
        controls = [p.token for p in prompts.parse_output(row["output"]) if isinstance(p, Control)]
        assert controls[0] in reflection.RETRIEVE and controls[-1] in reflection.ISUSE
        num_passages = controls.count("<paragraph>")
        assert num_passages == controls.count("</paragraph>") == controls.count("[Retrieval]")


def test_a_finished_run_does_nothing_and_returns_the_same_rows(quickstart):
    workdir, rows = quickstart

    def modification_times():
        files = [p for p in workdir.rglob("*") if p.is_file() and "report" not in p.parts]
        return {p: p.stat().st_mtime_ns for p in files}

    before = modification_times()
    assert flow.run_quickstart(config.load("tiny:smoke"), workdir) == rows
    assert modification_times() == before


def test_another_config_in_the_same_workdir_is_refused(quickstart):
    changed = config.override(config.load("tiny:smoke"), ["world.seed=9"])
    with pytest.raises(UserError, match="seed: 0 there, 9 asked for"):
        flow.run_quickstart(changed, quickstart[0])


# ---- resuming ------------------------------------------------------------------------------------
@pytest.mark.slow
def test_lost_artifacts_are_made_again_and_are_the_same(quickstart, tmp_path):
    """As after a kill: predictions are missing, and so are two manifests."""
    workdir, rows = quickstart
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    shutil.rmtree(copy / "predictions" / "selfrag_adaptive")
    (copy / "generator" / "manifest.json").unlink()
    (copy / "generator_data.jsonl.manifest.json").unlink()
    assert flow.run_quickstart(config.load("tiny:smoke"), copy) == rows


# Files whose appearance triggers a kill: before the first training step, and in the middle of
# labelling, training and evaluating.
KILLS = (
    "critic/started.json",
    "generator_data.jsonl.parts/*/00000040.jsonl",
    "generator/checkpoints/2",
    "predictions/rag_topk/two_part.jsonl",
)


@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_the_same_results(quickstart, tmp_path):
    workdir = tmp_path / "W"
    command = [sys.executable, "-m", "selfrag_jax", "quickstart", f"--workdir={workdir}", SMOKE]
    for pattern in KILLS:
        with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
            while not list(workdir.glob(pattern)):
                if process.poll() is not None:
                    pytest.fail(f"ended before {pattern}: {process.stderr.read().decode()}")
                time.sleep(0.005)
            process.kill()
            process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, pattern
    assert (workdir / "critic" / "manifest.json").is_file()
    assert not (workdir / "report").exists()
    subprocess.run(command, check=True)
    results = json.loads((workdir / "report" / "results.json").read_text())
    assert results["rows"] == quickstart[1]


def equal_but_for_rounding(one, other):
    """Whether two values of JSON are the same, but for numbers that differ in the fourth digit.

    The sums of a search depend in their last bits on what is computed beside it.
    """
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(
            equal_but_for_rounding(one[k], other[k]) for k in one
        )
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal_but_for_rounding, one, other))
    return abs(one - other) < 2e-4 if isinstance(one, float) else one == other


@pytest.mark.slow
def test_a_killed_evaluation_ends_with_the_same_report(quickstart, tmp_path):
    """kill -9 three times as an answer is written, and once between scores and metrics.

    No answer is made twice or missing.
    """
    workdir, _ = quickstart
    questions, out = workdir / "world" / "eval" / "long_tail.jsonl", tmp_path / "killed"
    flags = [f"--workdir={workdir}", SMOKE, "--task=popqa", f"--input={questions}"]
    flags += ["--ndocs=3", "--max_depth=1", "--config.answer.batch=2"]
    command = [sys.executable, "-m", "selfrag_jax", "evaluate", *flags, f"--out={out}"]

    def num_written():
        partials = out.glob(".answers.jsonl.*.partial")
        return sum(f.read_bytes().count(b"\n") for f in partials)

    def kill_when(reached):
        with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
            while not reached():
                assert process.poll() is None, process.stderr.read().decode()
                time.sleep(0.0005)
            process.kill()
            process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL

    for _ in range(3):
        before = num_written()
        kill_when(lambda before=before: num_written() > before)
        assert not (out / "answers.jsonl").exists()
    [partial] = out.glob(".answers.jsonl.*.partial")
    lines = partial.read_text().splitlines(keepends=True)
    kept = [json.loads(line) for line in lines if line.endswith("\n")]
    for row in kept:
        del row["seconds"]  # since the answer before; no part of the answer
    kill_when((out / "scores.jsonl").exists)
    subprocess.run(command, check=True)
    answers = [row for _, row in read_rows(out / "answers.jsonl")]
    assert len(answers) > len(kept) >= 3 and all(row in answers for row in kept)
    assert not list(out.glob(".*"))

    whole = tmp_path / "whole"
    assert cli.main(["evaluate", *flags, f"--out={whole}"]) == 0
    for name in ("answers.jsonl", "scores.jsonl"):
        rows = [[row for _, row in read_rows(folder / name)] for folder in (out, whole)]
        assert equal_but_for_rounding(*rows)
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (out, whole)]
    for made in metrics:
        assert made["rows"].pop()["metric"] == "seconds_per_question"
    assert equal_but_for_rounding(*metrics)
    for folder in (out, whole):
        assert cli.main(["report", f"--run={folder}"]) == 0


def test_who_decides_on_retrieval_is_the_configs_choice(quickstart):
    workdir, _ = quickstart
    instructions = read_instructions(workdir / flow.INSTRUCTIONS)

    def needs(choice):
        c = config.override(config.load("tiny:smoke"), [f"label.retrieve_labels={choice}"])
        return flow.retrieval_needs(c, workdir, config.build(LabelConfig, c.label, "label"))

    assert needs("critic") is None
    by_teacher = needs("teacher")
    assert by_teacher.keys() == {r.id for r in instructions}
    assert set(by_teacher.values()) == {"[Retrieval]", "[No Retrieval]"}
    c = config.override(config.load("tiny:smoke"), ["label.retrieve_labels=self", "base=scratch"])
    with pytest.raises(UserError, match="a base from scratch knows nothing"):
        flow.retrieval_needs(c, workdir, config.build(LabelConfig, c.label, "label"))


@pytest.mark.slow
def test_the_base_itself_decides_on_retrieval(quickstart, tmp_path):
    workdir, _ = quickstart
    shutil.copytree(workdir / "retrieved", tmp_path / "retrieved")
    c = config.override(config.load("tiny:smoke"), ["label.retrieve_labels=self"])
    labelling = config.build(LabelConfig, c.label, "label")
    found = flow.retrieval_needs(c, tmp_path, labelling)
    rows = {row["id"]: row["token"] for _, row in read_rows(tmp_path / "needs.jsonl")}
    assert found == rows and set(rows.values()) <= {"[Retrieval]", "[No Retrieval]"}
    assert rows.keys() == {r.id for r in read_instructions(tmp_path / flow.INSTRUCTIONS)}


# ---- answers that need no model ------------------------------------------------------------------
def test_rescored_answers_are_those_of_searches(quickstart, tmp_path):
    """Adaptive retrieval and other weights, from what always and never retrieve generated."""
    workdir, _ = quickstart
    c = config.override(config.load("tiny:smoke"), ["rescore=true"])
    kind, made = worlds.kind_of_config(c), tmp_path / "W"
    for name in ("selfrag_always", "selfrag_never"):
        shutil.copytree(workdir / "predictions" / name, made / "predictions" / name)
    found = []
    for run in world_evaluation.systems(kind):
        for task in run.tasks:
            file = workdir / "retrieved" / "eval" / f"{task}.jsonl"
            one_step = task not in kind.long_form
            asked = world_evaluation.TaskQuestions(task, file, read_questions(file, task), one_step)
            if not world_evaluation.is_rescored(c, run, asked):
                continue
            world_evaluation.rescore(c, made, run, asked)
            found.append((run.system.name, task))
            own, searched = (
                [row for _, row in read_rows(predictions_file(w, run.system.name, task))]
                for w in (made, workdir)
            )
            for a, b in zip(own, searched, strict=True):
                same = ("id", "answer", "retrieved", "citations")
                assert {k: a[k] for k in same} == {k: b[k] for k in same}
                one, other = ([p["id"] for p in row["passages"]] for row in (a, b))
                assert one == other
    ablations = {f"ablation_no_{name}" for name in ("isrel", "issup", "isuse", "seqscore")}
    assert {name for name, _ in found} == {"selfrag_adaptive", *ablations}
    short = [task for task in kind.tasks if task not in kind.long_form]
    assert [task for name, task in found if name == "selfrag_adaptive"] == short


# ---- stage by stage ------------------------------------------------------------------------------
@pytest.mark.slow
def test_the_commands_make_what_the_quickstart_makes(quickstart, bucket, capsys, monkeypatch):
    """Every stage from the command line, in a bucket: the same files, parameters and results."""
    made, rows = quickstart
    w = as_path(f"gs://{buckets.NAME}/flow")

    def run(*argv):
        takes_config = argv[0] not in ("retrieve", "evaluate", "report", "convert")
        assert cli.main([*argv, SMOKE] if takes_config else argv) == 0
        return capsys.readouterr().out

    # 1. World and index.
    assert "passages.tsv" in run("world", f"--out={w}/world")
    run("embed", f"--passages={w}/world/passages.tsv", f"--out={w}/embeddings")
    run("index", f"--embeddings={w}/embeddings", f"--out={w}/index")
    for name in ("instructions", "eval/long_tail"):
        files = f"--input={w}/world/{name}.jsonl", f"--out={w}/retrieved/{name}.jsonl"
        run("retrieve", f"--index={w}/index", *files, "--k=5")

    # 2. Critic and generator.
    instructions = f"--input={w}/retrieved/instructions.jsonl"
    run("collect", instructions, f"--truth={w}/world/teacher.jsonl", f"--out={w}/critic_data.jsonl")
    run("train", "--role=critic", f"--data={w}/critic_data.jsonl", f"--workdir={w}/critic")
    critic = f"--critic={w}/critic"
    run("label", critic, instructions, f"--out={w}/generator_data.jsonl")
    without_passages = f"--input={w}/world/instructions.jsonl"
    again = f"--out={w}/generator_data_2.jsonl"
    run("label", critic, without_passages, f"--index={w}/index", "--k=5", again)
    # Searched for by segment: the first segments' passages are those that `retrieve` found.
    both = [list(read_rows(w / f"generator_data{name}.jsonl")) for name in ("", "_2")]
    pairs = [(a["output"], b["output"]) for (_, a), (_, b) in zip(*both, strict=True)]
    single = [a == b for a, b in pairs if a.count("etrieval]") == 1]
    assert len(single) > 100 and all(single)
    assert cli.main(["label", critic, without_passages, f"--out={w}/no.jsonl", SMOKE]) == 2
    assert "give `selfrag label` an --index" in capsys.readouterr().err
    training = "--role=generator", f"--data={w}/generator_data.jsonl", f"--workdir={w}/generator"
    with monkeypatch.context() as m:  # ends after its first checkpoint, and continues
        m.setattr("selfrag_jax.training.train._save", _interrupt_after(train_loop._save))
        assert cli.main(["train", *training, SMOKE]) == 130
    run("train", *training)

    # 3. Answers.
    questions = f"{w}/world/eval/long_tail.jsonl"
    answers = "predictions/selfrag_adaptive/long_tail.jsonl"
    files = f"--input={questions}", f"--out={w}/{answers}"
    run("answer", f"--workdir={w}", *files, "--max_depth=1", "--beam_width=1")
    for name in (
        "world/passages.tsv", "retrieved/instructions.jsonl", "critic_data.jsonl",
        "generator_data.jsonl", answers,
    ):  # fmt: skip
        assert (w / name).read_bytes() == (made / name).read_bytes(), name
    for model in ("critic", "generator"):
        params, expected = (loading.load(folder / model).params for folder in (w, made))
        jax.tree.map(np.testing.assert_array_equal, params, expected)

    # 4. Results.
    metrics_file = w / answers.replace("jsonl", "metrics.json")
    files = f"--task={questions}", f"--predictions={w}/{answers}", f"--out={metrics_file}"
    assert "accuracy" in run("evaluate", *files, "--judge=world")
    metrics = json.loads(metrics_file.read_text())["rows"]
    cell = ("selfrag_adaptive", "long_tail")
    expected = {r["metric"]: r["value"] for r in rows if (r["system"], r["task"]) == cell}
    # The command has more metrics than the quickstart's report.
    assert expected.items() <= {r["metric"]: r["value"] for r in metrics}.items()
    finished = Mirror(f"{w}/finished")
    shutil.copytree(made, finished.pull(must_exist=False), dirs_exist_ok=True)
    finished.push()
    report = run("report", f"--workdir={w}/finished", f"--out={w}/report", "--examples=2")
    assert "Self-RAG, always" in report
    assert '"shown":2,' in (w / "report" / "index.html").read_text()

    # 5. Formats, there and back.
    for source, out, form in (("generator", "hf", "huggingface"), ("hf", "orbax", "orbax")):
        run("convert", f"--from={w}/{source}", f"--to={w}/{out}", f"--format={form}")
    params, expected = (loading.load(p).params for p in (f"{w}/orbax", made / "generator"))
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def _interrupt_after(save):
    """Saves a checkpoint; then Ctrl-C."""

    def saves(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    return saves


def test_own_corpus_and_questions(quickstart, tmp_path, capsys):
    """index, answer and evaluate take hand-written files with awkward text."""
    workdir, _ = quickstart
    (tmp_path / "corpus.tsv").write_text(
        "id\ttext\ttitle\n"
        "1\tŽofie Nováková lives in “Quenport”.\tŽofie Nováková\n"
        '2\t"He said ""hello"",\tand left."\t\n'
        f"3\t{' '.join(f'w{i}' for i in range(300))}\tLong\n",
        encoding="utf-8",
    )
    questions = [
        {"id": "x", "question": "Where does Žofie Nováková live?", "answers": ["Quenport"]},
        {"id": "y", "question": 'Say </s>[Relevant] "quoted"\tand tabbed?', "answers": ["hello"]},
    ]
    lines = [json.dumps(q, ensure_ascii=False) for q in questions]
    (tmp_path / "q.jsonl").write_text("\n".join(lines), encoding="utf-8")
    passages = [asdict(p) for _, p in corpus.Corpus(tmp_path / "corpus.tsv")]
    lines = [json.dumps(p) for p in passages]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines), encoding="utf-8")

    # Both forms of the corpus find the same.
    for kind in ("tsv", "jsonl"):
        index = f"{tmp_path}/index_{kind}"
        assert (
            cli.main(["index", f"--passages={tmp_path}/corpus.{kind}", f"--out={index}", SMOKE])
            == 0
        )
        files = f"--input={tmp_path}/q.jsonl", f"--out={tmp_path}/found_{kind}.jsonl"
        assert cli.main(["retrieve", f"--index={index}", *files, "--k=2"]) == 0
    found = [(tmp_path / f"found_{kind}.jsonl").read_bytes() for kind in ("tsv", "jsonl")]
    assert found[0] == found[1]

    model = f"--model={workdir}/generator", f"--index={tmp_path}/index_tsv"
    files = f"--input={tmp_path}/q.jsonl", f"--out={tmp_path}/a.jsonl"
    assert cli.main(["answer", *model, *files, "--mode=always_retrieve", SMOKE]) == 0
    rows = [row for _, row in read_rows(tmp_path / "a.jsonl")]
    assert [r["id"] for r in rows] == ["x", "y"]
    assert {n["passage"]["id"] for n in rows[0]["tree"]} == {"1", "2", "3"}
    files = f"--task={tmp_path}/q.jsonl", f"--predictions={tmp_path}/a.jsonl"
    assert cli.main(["evaluate", *files]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert artifacts.manifest_path(tmp_path / "a.jsonl").is_file()


# ---- asking --------------------------------------------------------------------------------------
def test_ask_prints_passages_critiques_and_the_decision(quickstart, capsys):
    workdir, _ = quickstart
    flags = [f"--workdir={workdir}", SMOKE, "--mode=always_retrieve"]
    question = flow.sample_question(workdir)
    assert cli.main(["ask", *flags, question]) == 0
    shown = capsys.readouterr().out
    assert cli.main(["ask", *flags, "--json", question]) == 0
    row = json.loads(capsys.readouterr().out)
    assert {
        "id", "question", "answer", "segments", "citations", "retrieved", "scores", "tree"
    } <= set(row)  # fmt: skip
    assert f"p(retrieve) = {row['p_retrieve']:.2f}: retrieved" in shown
    assert shown.count("►") == len(row["segments"])
    for n in row["tree"]:
        numbers = (n["isrel"][1], n["issup"][0], n["isuse"][4], n["p_segment"], n["score"])
        cells = [f"{x:.2f}" for x in numbers]
        line = next(line for line in shown.splitlines() if line.split()[-5:] == cells)
        assert ("►" in line) == n["chosen"] and n["passage"]["title"].split()[0] in line


def test_ask_by_the_released_scripts_needs_no_other_flag(quickstart, capsys):
    """Although the config ranks by means, which the scripts do not know."""
    workdir, _ = quickstart
    flags = [
        f"--workdir={workdir}", SMOKE, "--scorer=released", "--mode=always_retrieve",
        "--max_depth=1", "--json",
    ]  # fmt: skip
    assert cli.main(["ask", *flags, flow.sample_question(workdir)]) == 0
    [first, *_] = json.loads(capsys.readouterr().out)["tree"]
    groups = (np.array(first[name]) for name in ("isrel", "issup", "isuse"))
    weights = scoring.Weights(w_use=1.0)  # the scripts' own; 0.5 in the config
    expected = scores.released_score(first["p_segment"], *groups, weights)
    assert first["score"] == pytest.approx(expected, abs=1e-3)
    given = "--config.answer.search.weights.w_use=0.25"  # counts as much as a flag
    assert cli.main(["ask", *flags, given, flow.sample_question(workdir)]) == 0
    [second, *_] = json.loads(capsys.readouterr().out)["tree"]
    less = 0.75 * scoring.s_use(np.array(second["isuse"]))
    assert second["score"] == pytest.approx(first["score"] - less, abs=1e-3)
    assert cli.main(["ask", *flags, "--accumulate=mean", "Where?"]) == 2
    assert "--accumulate=mean: the released scripts multiply" in capsys.readouterr().err


def test_an_answer_about_an_unknown_name_has_a_notice_or_no_citation(quickstart, capsys):
    workdir, _ = quickstart
    flags = [f"--workdir={workdir}", SMOKE, "--mode=always_retrieve", "--json"]
    for name in ("Zyx Qwertson", "日本 😀", "Marvin"):
        assert cli.main(["ask", *flags, f"Where was {name} born?"]) == 0
        row = json.loads(capsys.readouterr().out)
        judged = [s["isrel"] for s in row["segments"] if s["passage"]]
        has_relevant = any(isrel["[Relevant]"] >= isrel["[Irrelevant]"] for isrel in judged)
        has_notice = any("was found" in n for n in row["notices"])
        assert has_relevant or (not row["citations"] and has_notice)
