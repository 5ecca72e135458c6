"""The whole flow, in small: every stage once, its files, its resumption, and asking the result."""

import json
import shutil

import pytest

from selfrag_jax import artifacts, cli, config
from selfrag_jax.evaluation import report
from selfrag_jax.records import BadInput, read_rows
from selfrag_jax.world import quickstart as flow

pytestmark = pytest.mark.slow


def test_every_system_has_its_results(quickstart):
    workdir, rows = quickstart
    assert {r["system"] for r in rows} == {*report.SYSTEMS, "critic"}
    assert {r["task"] for r in rows} == {*report.TASKS, "critic"}
    assert all(0 <= r["low"] <= r["value"] <= r["high"] <= 1 and r["n"] > 0 for r in rows)
    assert json.loads((workdir / "report" / "results.json").read_text())["rows"] == rows
    assert "Critic accuracy" in (workdir / "report" / "index.html").read_text()


def test_a_finished_run_does_nothing_and_says_the_same(quickstart):
    workdir, rows = quickstart
    stamps = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file() and "report" not in p.parts}
    assert flow.run(config.load("tiny:smoke"), workdir) == rows
    assert stamps == {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file() and "report" not in p.parts}


def test_lost_artifacts_are_made_again_alike(quickstart, tmp_path):
    """As after a kill: without predictions, labels and a trained model, the run ends with the same results."""
    workdir, rows = quickstart
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    shutil.rmtree(copy / "predictions" / "selfrag_adaptive")
    (copy / "generator" / "manifest.json").unlink()
    (copy / "generator_data.jsonl.manifest.json").unlink()
    assert flow.run(config.load("tiny:smoke"), copy) == rows


def test_generator_data_is_in_the_published_format(quickstart):
    from selfrag_jax import prompts, reflection
    from selfrag_jax.tokenizer import Control

    for _, row in read_rows(quickstart[0] / "generator_data.jsonl"):
        controls = [p.token for p in prompts.parse_output(row["output"]) if isinstance(p, Control)]
        assert controls[0] in reflection.RETRIEVE and controls[-1] in reflection.ISUSE
        assert controls.count("<paragraph>") == controls.count("</paragraph>") == controls.count("[Retrieval]")


def test_another_config_in_the_same_workdir_is_refused(quickstart):
    changed = config.override(config.load("tiny:smoke"), ["world.seed=9"])
    with pytest.raises(BadInput, match="seed: 0 there, 9 asked for"):
        flow.run(changed, quickstart[0])


def test_ask_prints_passages_critiques_and_the_decision(quickstart, capsys):
    workdir, _ = quickstart
    flags = [f"--workdir={workdir}", "--config=tiny:smoke", "--mode=always_retrieve"]
    assert cli.main(["ask", *flags, flow.sample_question(workdir)]) == 0
    out = capsys.readouterr().out
    assert "p(retrieve)" in out and "Relevant" in out
    assert cli.main(["ask", *flags, "--json", "Where was Zyx Qwertson born?"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert {"id", "question", "answer", "segments", "citations", "retrieved", "scores", "tree"} <= set(row)


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
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps(q, ensure_ascii=False) for q in questions), encoding="utf-8")
    run = lambda *argv: cli.main([argv[0], *argv[1:], "--config=tiny:smoke"])  # noqa: E731
    assert run("index", f"--passages={tmp_path}/corpus.tsv", f"--out={tmp_path}/index") == 0
    answer = ("answer", f"--model={workdir}/generator", f"--index={tmp_path}/index", f"--input={tmp_path}/q.jsonl")
    assert run(*answer, f"--out={tmp_path}/a.jsonl", "--mode=always_retrieve") == 0
    rows = [row for _, row in read_rows(tmp_path / "a.jsonl")]
    assert [r["id"] for r in rows] == ["x", "y"]
    assert {n["passage"]["id"] for n in rows[0]["tree"]} == {"1", "2", "3"}
    assert cli.main(["evaluate", f"--task={tmp_path}/q.jsonl", f"--predictions={tmp_path}/a.jsonl"]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert artifacts.manifest_path(tmp_path / "a.jsonl").is_file()
