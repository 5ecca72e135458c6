"""The quickstart on real facts, in small: every stage, its resumption, and what is told of it."""

import json
import signal
import subprocess
import sys
import time

import pytest
import smollm2

from selfrag_jax import cli, config
from selfrag_jax.answering.config import DEFAULT
from selfrag_jax.answering.plain import PlainConfig
from selfrag_jax.commands import quickstart as flow
from selfrag_jax.commands import worlds
from selfrag_jax.commands.few_shot import FewShotConfig, few_shot_prompt
from selfrag_jax.data.instructions import read_instructions
from selfrag_jax.evaluation.answerers import Answerers
from selfrag_jax.evaluation.scores import score
from selfrag_jax.evaluation.systems import BASE, FEW_SHOT
from selfrag_jax.huggingface import hub
from selfrag_jax.records import Question, read_rows
from selfrag_jax.text.prompts import CritiqueQuery

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("facts")]
SMOKE = "--config=facts:smoke"


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """A finished smoke run: its workdir, and the rows of its results.json."""
    workdir = tmp_path_factory.mktemp("facts")
    return workdir, flow.run_quickstart(config.load("facts:smoke"), workdir)


def test_the_table_has_the_base_itself_and_rag_with_equal_steps(facts):
    workdir, rows = facts
    kind = worlds.kind_of_file(workdir / flow.TEACHER)
    assert kind.name == "facts"
    found = {(r["system"], r["task"]) for r in rows if r["system"] != "critic"}
    assert found == {(system, task) for system, tasks in kind.systems.items() for task in tasks}
    assert {"base_few_shot", "base_few_shot_rag", "rag_top1", "rag_topk"} <= set(kind.systems)
    assert all(0 <= r["low"] <= r["value"] <= r["high"] <= 1 and r["n"] > 0 for r in rows)
    steps = {
        name: json.loads((workdir / name / "manifest.json").read_text())["counts"]["steps"]
        for name in ("rag", "generator")
    }
    assert steps["rag"] == steps["generator"]
    page = (workdir / "report" / "index.html").read_text()
    assert "Self-RAG on real facts" in page and "Base with the top passage, few-shot" in page


def test_a_finished_run_does_nothing_and_other_commands_know_its_world(facts, capsys):
    workdir, rows = facts
    assert flow.run_quickstart(config.load("facts:smoke"), workdir) == rows
    assert cli.main(["report", f"--workdir={workdir}", f"--out={workdir}/again"]) == 0
    assert "Base, few-shot" in capsys.readouterr().out
    task, answers = "retrieved/eval/facts.jsonl", "predictions/selfrag_always/facts.jsonl"
    flags = [f"--task={workdir / task}", f"--predictions={workdir / answers}", "--judge=world"]
    flags += [f"--truth={workdir / flow.TEACHER}", f"--out={workdir}/metrics.json"]
    assert cli.main(["evaluate", *flags]) == 0
    metrics = json.loads((workdir / "metrics.json").read_text())["rows"]
    made = {r["metric"]: r["value"] for r in metrics}
    cell = ("selfrag_always", "facts")
    expected = {r["metric"]: r["value"] for r in rows if (r["system"], r["task"]) == cell}
    assert expected.items() <= made.items()
    question = flow.sample_question(workdir)
    assert cli.main(["ask", f"--workdir={workdir}", SMOKE, question]) == 0
    assert "p(retrieve) = " in capsys.readouterr().out


def test_the_teacher_errs_at_about_the_rate_that_the_config_states(facts):
    workdir, _ = facts
    truth = worlds.read_truth(workdir / flow.TEACHER)
    rows = [row for _, row in read_rows(workdir / "critic_data.jsonl") if row["task"] == "isuse"]
    asked = [CritiqueQuery("isuse", row["instruction"], output=row["segment"]) for row in rows]
    wrong = sum(truth.judge(q) != row["output"] for q, row in zip(asked, rows, strict=True))
    assert len(rows) > 10 and wrong <= 0.2 * len(rows)  # 2% are, of few


def test_killed_in_the_middle_it_ends_with_the_same_results(facts, tmp_path):
    workdir = tmp_path / "W"
    command = [sys.executable, "-m", "selfrag_jax", "quickstart", f"--workdir={workdir}", SMOKE]
    for pattern in ("generator/checkpoints/1", "predictions/rag_top1/claims.jsonl"):
        with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
            while not list(workdir.glob(pattern)):
                if process.poll() is not None:
                    pytest.fail(f"ended before {pattern}: {process.stderr.read().decode()}")
                time.sleep(0.005)
            process.kill()
            process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, pattern
    assert not (workdir / "report").exists()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert json.loads((workdir / "report" / "results.json").read_text())["rows"] == facts[1]
    assert f"Ask: selfrag ask --workdir={workdir} {SMOKE}" in done.stdout


def test_the_pretrained_base_reads_answers_from_passages_after_some_demonstrations(
    facts, monkeypatch
):
    """SmolLM2 itself. Without the passages it states few of the facts."""
    workdir, _ = facts
    monkeypatch.chdir(smollm2.wheel().parent)  # where a downloaded wheel is looked for
    kind, truth = worlds.KINDS["facts"](), worlds.read_truth(workdir / flow.TEACHER)
    rows = read_instructions(workdir / flow.INSTRUCTIONS)
    prompt = few_shot_prompt("facts", rows, kind, truth, FewShotConfig(seed=0, shots=3))
    shown = {d.question.id for d in prompt.demonstrations}
    questions = [
        Question(r.id, r.instruction, (truth.stated_facts(r.output)[0][2],), (p,))
        for r in rows
        if r.dataset_name == "facts" and r.id not in shown
        for p in r.ctxs[:1]
        if truth.supports(r.instruction, p, r.output)
    ][:8]
    assert len(questions) >= 5
    settings = PlainConfig(batch=8, max_new_tokens=16, length_bucket=512, max_length=512)
    answerers = Answerers(workdir, DEFAULT, settings, hub.model_folder("smollm2"))
    right = {}
    for system in FEW_SHOT:
        answers = answerers.answer(system, BASE, questions, {}, lambda: None, prompt)
        right[system.name] = sum(score(questions, answers, None, None)["accuracy"])
    assert right["base_few_shot_rag"] >= 0.6 * len(questions) > right["base_few_shot"]
