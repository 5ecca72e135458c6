"""The benchmark scripts run as their users call them, and print what they measured.

What they measure is not tested.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
def test_slow_retrieval_is_partly_hidden():
    out = run("answer.py", "--size=tiny", "--retrieval=20")
    assert len(re.findall(r"(others wait|others continue|found at once) +[\d.]+ s\n", out)) == 3
    assert re.search(r"-?\d+% of the waiting is hidden", out)


@pytest.mark.slow
def test_curves_cover_passages_batch_and_memory():
    out = run("answer.py", "--size=tiny", "--curves")
    assert re.findall(r"K=(\d+) +[\d.]+\n", out) == ["1", "2", "5", "10", "20"]
    assert re.findall(r"\n  (\d+) +[\d.]+", out) == ["1", "2", "4", "8", "16", "32"]
    gigabytes = dict(re.findall(r"prefix (shared|copied) +([\d.]+)", out))
    assert float(gigabytes["shared"]) < float(gigabytes["copied"])
