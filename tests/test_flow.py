"""The whole flow, in small: every stage once, its files, its resumption, and asking the result."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import jax
import numpy as np
import pytest

from selfrag_jax import artifacts, cli, config
from selfrag_jax.checkpoints import loading
from selfrag_jax.commands import quickstart as flow
from selfrag_jax.errors import UserError
from selfrag_jax.evaluation import tables
from selfrag_jax.records import read_rows
from selfrag_jax.retrieval import corpus
from selfrag_jax.search import scoring
from selfrag_jax.search.released import scores


def test_every_system_has_its_results(quickstart):
    workdir, rows = quickstart
    assert {r["system"] for r in rows} == {*tables.SYSTEMS, "critic"}
    assert {r["task"] for r in rows} == {*tables.TASKS, "critic"}
    assert all(0 <= r["low"] <= r["value"] <= r["high"] <= 1 and r["n"] > 0 for r in rows)
    assert json.loads((workdir / "report" / "results.json").read_text())["rows"] == rows
    assert "Critic accuracy" in (workdir / "report" / "index.html").read_text()


def test_a_finished_run_does_nothing_and_says_the_same(quickstart):
    workdir, rows = quickstart
    stamps = {
        p: p.stat().st_mtime_ns
        for p in workdir.rglob("*")
        if p.is_file() and "report" not in p.parts
    }
    assert flow.run_quickstart(config.load("tiny:smoke"), workdir) == rows
    assert stamps == {
        p: p.stat().st_mtime_ns
        for p in workdir.rglob("*")
        if p.is_file() and "report" not in p.parts
    }


@pytest.mark.slow
def test_lost_artifacts_are_made_again_alike(quickstart, tmp_path):
    """As after a kill: without predictions, labels and a trained model, the run ends with the same results."""
    workdir, rows = quickstart
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    shutil.rmtree(copy / "predictions" / "selfrag_adaptive")
    (copy / "generator" / "manifest.json").unlink()
    (copy / "generator_data.jsonl.manifest.json").unlink()
    assert flow.run_quickstart(config.load("tiny:smoke"), copy) == rows


# What is there when the quickstart is killed: before the first step of training, in the midst of labelling, of training, of
# evaluating.
KILLS = (
    "critic/started.json",
    "generator_data.jsonl.parts/*/00000040.jsonl",
    "generator/checkpoints/2",
    "predictions/rag_topk/two_part.jsonl",
)


@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_the_same_results(quickstart, tmp_path):
    command = [
        sys.executable,
        "-m",
        "selfrag_jax",
        "quickstart",
        f"--workdir={tmp_path}/W",
        "--config=tiny:smoke",
    ]
    for pattern in KILLS:
        with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
            while not list((tmp_path / "W").glob(pattern)):
                assert process.poll() is None, (
                    f"ended before {pattern}: {process.stderr.read().decode()}"
                )
                time.sleep(0.005)
            process.kill()
            process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, pattern
    assert (tmp_path / "W" / "critic" / "manifest.json").is_file() and not (
        tmp_path / "W" / "report"
    ).exists()
    subprocess.run(command, check=True)
    assert (
        json.loads((tmp_path / "W" / "report" / "results.json").read_text())["rows"]
        == quickstart[1]
    )


@pytest.mark.slow
def test_answers_that_are_killed_go_on(quickstart, tmp_path):
    """kill -9 as soon as an answer is written, three times: no question is answered twice, and none is missing."""
    made, _ = quickstart
    questions, out = made / "world" / "eval" / "long_tail.jsonl", tmp_path / "a.jsonl"
    flags = [
        f"--workdir={made}",
        "--config=tiny:smoke",
        f"--input={questions}",
        "--config.answer.batch=2",
    ]
    command = [sys.executable, "-m", "selfrag_jax", "answer", *flags, f"--out={out}"]
    rows = lambda: sum(f.read_bytes().count(b"\n") for f in tmp_path.glob(".a.jsonl.*.partial"))  # noqa: E731
    for _ in range(3):
        before = rows()
        with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
            while rows() == before:
                assert process.poll() is None, process.stderr.read().decode()
                time.sleep(0.002)
            process.kill()
            process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL and not out.exists()
    [partial] = tmp_path.glob(".a.jsonl.*.partial")
    kept = [
        json.loads(line)
        for line in partial.read_text().splitlines(keepends=True)
        if line.endswith("\n")
    ]
    subprocess.run(command, check=True)
    answers = [row for _, row in read_rows(out)]
    assert [a["id"] for a in answers] == [
        q["id"] for _, q in read_rows(questions)
    ] and not partial.exists()
    assert len(answers) > len(kept) >= 3 and all(row in answers for row in kept)


@pytest.mark.slow
def test_the_commands_make_what_the_quickstart_makes(quickstart, tmp_path, capsys):
    """Every stage from the command line, by the flags of its help: the same files, the same parameters, the same results."""
    made, rows = quickstart

    def run(*argv):
        assert (
            cli.main(
                [*argv, "--config=tiny:smoke"]
                if argv[0] not in ("retrieve", "evaluate", "report")
                else argv
            )
            == 0
        )
        return capsys.readouterr().out

    w = tmp_path
    assert "passages.tsv" in run("world", f"--out={w}/world")
    run("embed", f"--passages={w}/world/passages.tsv", f"--out={w}/embeddings")
    run("index", f"--embeddings={w}/embeddings", f"--out={w}/index")
    for name in ("instructions", "eval/long_tail"):
        run(
            "retrieve",
            f"--index={w}/index",
            f"--input={w}/world/{name}.jsonl",
            f"--out={w}/retrieved/{name}.jsonl",
            "--k=5",
        )
    instructions = f"--input={w}/retrieved/instructions.jsonl"
    run("collect", instructions, f"--truth={w}/world/teacher.jsonl", f"--out={w}/critic_data.jsonl")
    run("train", "--role=critic", f"--data={w}/critic_data.jsonl", f"--workdir={w}/critic")
    run("label", f"--critic={w}/critic", instructions, f"--out={w}/generator_data.jsonl")
    plain = f"--input={w}/world/instructions.jsonl"  # as they are, with the index
    run(
        "label",
        f"--critic={w}/critic",
        plain,
        f"--index={w}/index",
        "--k=5",
        f"--out={w}/generator_data_2.jsonl",
    )
    assert (w / "generator_data_2.jsonl").read_bytes() == (w / "generator_data.jsonl").read_bytes()
    assert (
        cli.main(
            ["label", f"--critic={w}/critic", plain, f"--out={w}/no.jsonl", "--config=tiny:smoke"]
        )
        == 2
    )
    assert "give --index" in capsys.readouterr().err
    run("train", "--role=generator", f"--data={w}/generator_data.jsonl", f"--workdir={w}/generator")
    questions, answers = (
        f"{w}/world/eval/long_tail.jsonl",
        "predictions/selfrag_adaptive/long_tail.jsonl",
    )
    run(
        "answer",
        f"--workdir={w}",
        f"--input={questions}",
        f"--out={w}/{answers}",
        "--max_depth=1",
        "--beam_width=1",
    )
    for name in (
        "world/passages.tsv",
        "retrieved/instructions.jsonl",
        "critic_data.jsonl",
        "generator_data.jsonl",
        answers,
    ):
        assert (w / name).read_bytes() == (made / name).read_bytes(), name
    for model in ("critic", "generator"):
        one, other = (loading.load(folder / model).params for folder in (w, made))
        jax.tree.map(np.testing.assert_array_equal, one, other)

    said = run("evaluate", f"--task={questions}", f"--predictions={w}/{answers}", "--judge=world")
    assert "accuracy" in said
    metrics = json.loads((w / answers).with_suffix(".metrics.json").read_text())["rows"]
    expected = {
        r["metric"]: r["value"]
        for r in rows
        if (r["system"], r["task"]) == ("selfrag_adaptive", "long_tail")
    }
    assert {r["metric"]: r["value"] for r in metrics} == expected

    shutil.copytree(made, w / "finished")
    assert "Self-RAG, always" in run(
        "report", f"--workdir={w}/finished", f"--out={w}/report", "--examples=2"
    )
    assert (w / "report" / "index.html").read_text().count("class='card'") == 2


def test_generator_data_is_in_the_published_format(quickstart):
    from selfrag_jax.text import prompts, reflection
    from selfrag_jax.text.tokenizer import Control

    for _, row in read_rows(quickstart[0] / "generator_data.jsonl"):
        controls = [p.token for p in prompts.parse_output(row["output"]) if isinstance(p, Control)]
        assert controls[0] in reflection.RETRIEVE and controls[-1] in reflection.ISUSE
        assert (
            controls.count("<paragraph>")
            == controls.count("</paragraph>")
            == controls.count("[Retrieval]")
        )


def test_another_config_in_the_same_workdir_is_refused(quickstart):
    changed = config.override(config.load("tiny:smoke"), ["world.seed=9"])
    with pytest.raises(UserError, match="seed: 0 there, 9 asked for"):
        flow.run_quickstart(changed, quickstart[0])


def test_ask_prints_passages_critiques_and_the_decision(quickstart, capsys):
    workdir, _ = quickstart
    flags = [f"--workdir={workdir}", "--config=tiny:smoke", "--mode=always_retrieve"]
    assert cli.main(["ask", *flags, flow.sample_question(workdir)]) == 0
    shown = capsys.readouterr().out
    assert cli.main(["ask", *flags, "--json", flow.sample_question(workdir)]) == 0
    row = json.loads(capsys.readouterr().out)
    assert {
        "id",
        "question",
        "answer",
        "segments",
        "citations",
        "retrieved",
        "scores",
        "tree",
    } <= set(row)
    assert f"p(retrieve) = {row['p_retrieve']:.2f}: retrieved" in shown and shown.count("►") == len(
        row["segments"]
    )
    for node in row["tree"]:
        judged = (
            node["isrel"][1],
            node["issup"][0],
            node["isuse"][4],
            node["p_segment"],
            node["score"],
        )
        line = next(x for x in shown.splitlines() if x.split()[-5:] == [f"{v:.2f}" for v in judged])
        assert ("►" in line) == node["chosen"] and node["passage"]["title"].split()[0] in line


def test_ask_by_the_released_scripts_needs_no_other_flag(quickstart, capsys):
    """The config ranks by means, which the scripts know nothing of."""
    workdir, _ = quickstart
    flags = [
        f"--workdir={workdir}",
        "--config=tiny:smoke",
        "--scorer=released",
        "--mode=always_retrieve",
        "--max_depth=1",
        "--json",
    ]
    assert cli.main(["ask", *flags, flow.sample_question(workdir)]) == 0
    [first, *_] = json.loads(capsys.readouterr().out)["tree"]
    groups = (np.array(first[name]) for name in ("isrel", "issup", "isuse"))
    weights = scoring.Weights(w_use=1.0)  # the scripts' own; 0.5 in the config
    assert first["score"] == pytest.approx(
        scores.released_score(first["p_segment"], *groups, weights), abs=1e-3
    )
    assert cli.main(["ask", *flags, "--accumulate=mean", "Where?"]) == 2
    assert "--accumulate=mean: the released scripts multiply" in capsys.readouterr().err


def test_ask_about_an_unknown_name_is_answered_with_a_doubt_or_without_citation(quickstart, capsys):
    workdir, _ = quickstart
    for name in ("Zyx Qwertson", "日本 😀", "Marvin"):
        flags = [f"--workdir={workdir}", "--config=tiny:smoke", "--mode=always_retrieve", "--json"]
        assert cli.main(["ask", *flags, f"Where was {name} born?"]) == 0
        row = json.loads(capsys.readouterr().out)
        relevant = [
            s
            for s in row["segments"]
            if s["passage"] and s["isrel"]["[Relevant]"] >= s["isrel"]["[Irrelevant]"]
        ]
        assert relevant or (not row["citations"] and any("was found" in n for n in row["notices"]))


def test_own_corpus_and_questions(quickstart, tmp_path, capsys):
    """index, answer and evaluate on hand-written files with awkward text."""
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
    (tmp_path / "q.jsonl").write_text(
        "\n".join(json.dumps(q, ensure_ascii=False) for q in questions), encoding="utf-8"
    )
    run = lambda *argv: cli.main([argv[0], *argv[1:], "--config=tiny:smoke"])  # noqa: E731
    assert run("index", f"--passages={tmp_path}/corpus.tsv", f"--out={tmp_path}/index") == 0
    passages = [asdict(p) for p in corpus.read_corpus(tmp_path / "corpus.tsv")]
    (tmp_path / "corpus.jsonl").write_text(
        "\n".join(json.dumps(p) for p in passages), encoding="utf-8"
    )
    assert run("index", f"--passages={tmp_path}/corpus.jsonl", f"--out={tmp_path}/index_jsonl") == 0
    for name in ("index", "index_jsonl"):
        found = (
            f"--index={tmp_path}/{name}",
            f"--input={tmp_path}/q.jsonl",
            f"--out={tmp_path}/{name}.found.jsonl",
            "--k=2",
        )
        assert cli.main(["retrieve", *found]) == 0
    assert (tmp_path / "index.found.jsonl").read_bytes() == (
        tmp_path / "index_jsonl.found.jsonl"
    ).read_bytes()
    answer = (
        "answer",
        f"--model={workdir}/generator",
        f"--index={tmp_path}/index",
        f"--input={tmp_path}/q.jsonl",
    )
    assert run(*answer, f"--out={tmp_path}/a.jsonl", "--mode=always_retrieve") == 0
    rows = [row for _, row in read_rows(tmp_path / "a.jsonl")]
    assert [r["id"] for r in rows] == ["x", "y"]
    assert {n["passage"]["id"] for n in rows[0]["tree"]} == {"1", "2", "3"}
    assert (
        cli.main(["evaluate", f"--task={tmp_path}/q.jsonl", f"--predictions={tmp_path}/a.jsonl"])
        == 0
    )
    assert "accuracy" in capsys.readouterr().out
    assert artifacts.manifest_path(tmp_path / "a.jsonl").is_file()
