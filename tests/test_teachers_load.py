"""Many requests at an endpoint that fails in every way, and a run that is killed many times."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
from mock_endpoint import MockEndpoint, prompt_of, serve
from repetitions import some

from selfrag_jax.records import read_rows, write_jsonl

FAULTS = (
    "429", "429 reset", "500", "502", "hang", "cut", "no choices", "not json", "no label",
    "two labels", "another group",
)  # fmt: skip
BOUND = 64
KILLS = some(4, 12)


def instructions(n):
    return [
        {
            "id": f"q{i}",
            "instruction": f"Who founded town {i}?",
            "output": f"Ada founded town {i}.",
            "ctxs": [{"title": f"Town {i}", "text": f"Ada founded it in {i}."}],
        }
        for i in range(n)
    ]


def one_in_ten(n, body):
    """A fault for one request in ten, of all kinds in turn."""
    if n % 10:
        return ""
    return FAULTS[n // 10 % len(FAULTS)]


def start(mock, folder, log):
    command = [
        sys.executable, "-m", "selfrag_jax", "collect", "--teacher=openai", "--teacher_model=m",
        f"--base_url={mock.url}", f"--input={folder}/in.jsonl", f"--out={folder}/out.jsonl",
        f"--cache={folder}/cache.sqlite3", f"--concurrency={BOUND}",
        "--config.collect.balance=none", "--config.collect.dev_share=0",
        "--config.collect.endpoint.backoff=0.05", "--config.collect.endpoint.timeout=6",
    ]  # fmt: skip
    env = os.environ | {"OPENAI_API_KEY": "k", "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, env=env, stderr=log, stdout=log)


def check_rows(folder, n):
    """Every row has a label or a reason, once."""
    labelled = [row for _, row in read_rows(folder / "out.jsonl")]
    file = folder / "out.failed.jsonl"
    failed = [row for _, row in read_rows(file)] if file.exists() else []
    found = Counter((row["id"], row["task"]) for row in labelled + failed)
    tasks = ("retrieve", "isrel", "issup", "isuse")
    assert found == Counter((f"q{i}", task) for i in range(n) for task in tasks)
    return labelled, failed


@pytest.mark.slow
def test_two_thousand_requests_with_one_fault_in_ten(tmp_path):
    write_jsonl(tmp_path / "in.jsonl", instructions(500))
    with serve(MockEndpoint(one_in_ten, delay=0.02, hang=12)) as mock:
        began = time.monotonic()
        with open(tmp_path / "log", "w") as log:
            assert start(mock, tmp_path, log).wait(300) == 0, (tmp_path / "log").read_text()
        print(f"{time.monotonic() - began:.1f} s, {len(mock.requests)} requests")
        print(f"at most {mock.most_active} at once; faults: {dict(mock.faults)}")
    labelled, failed = check_rows(tmp_path, 500)
    assert len(labelled) == len(mock.answered) >= 1990 and len(labelled) + len(failed) == 2000
    assert set(mock.answered.values()) == {1}  # none paid twice
    assert BOUND // 2 < mock.most_active <= BOUND
    assert all(mock.faults[fault] for fault in FAULTS)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_told_to_stop_it_waits_for_what_is_paid(tmp_path, number, status):
    write_jsonl(tmp_path / "in.jsonl", instructions(40))
    with serve(MockEndpoint(delay=0.3)) as mock, open(tmp_path / "log", "w") as log:
        process = start(mock, tmp_path, log)
        while process.poll() is None and not mock.active:
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(60) == status, (tmp_path / "log").read_text()
        assert 0 < len(mock.answered) < 160
        assert start(mock, tmp_path, log).wait(60) == 0
    check_rows(tmp_path, 40)
    assert set(mock.answered.values()) == {1} and len(mock.answered) == 160


@pytest.mark.slow
def test_killed_at_random_moments_nothing_is_lost_or_asked_again(tmp_path):
    rng, n = random.Random(0), 300
    write_jsonl(tmp_path / "in.jsonl", instructions(n))
    under_way = 0
    with serve(MockEndpoint(delay=0.15)) as mock, open(tmp_path / "log", "w") as log:
        for _ in range(KILLS):
            process, before = start(mock, tmp_path, log), len(mock.requests)
            while process.poll() is None and len(mock.requests) == before:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.5))
            under_way += mock.active
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            time.sleep(0.3)  # what was under way is answered, to nobody
        assert 0 < len(mock.answered) < 4 * n and not (tmp_path / "out.jsonl").exists()
        assert start(mock, tmp_path, log).wait(300) == 0, (tmp_path / "log").read_text()
    _, failed = check_rows(tmp_path, n)
    twice = sum(times - 1 for times in mock.answered.values())
    print(f"{KILLS} kills, {under_way} requests under way then, {twice} answered again")
    # Answers may have left the server and not have reached the cache: at most a bound's worth.
    assert not failed and len(mock.answered) == 4 * n and twice <= KILLS * BOUND
    assert len(mock.requests) == 4 * n + twice
    assert len({prompt_of(body) for body in mock.requests}) == 4 * n
