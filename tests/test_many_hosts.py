"""The processes of one job: what they exchange, how they share questions and chunks, and that one
which is gone, told to stop or other than the rest ends all."""

import json
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from test_answer_command import rounded
from test_corpus import contents
from test_label_command import critic, rows_file  # noqa: F401 (fixtures)
from test_sharding import free_port

from selfrag_jax import cli
from selfrag_jax.commands import label_chunks
from selfrag_jax.commands.answer_parts import AnswerParts
from selfrag_jax.commands.label_chunks import Chunks
from selfrag_jax.errors import UserError
from selfrag_jax.processes import about
from selfrag_jax.processes.group import Group
from selfrag_jax.processes.watch import SECONDS_SILENT, Watch
from selfrag_jax.records import read_rows, write_jsonl


class Store:
    """The calls of JAX's key-value store, for threads in place of processes."""

    def __init__(self):
        self.values, self.changed = {}, threading.Condition()

    def key_value_set(self, key, value, allow_overwrite=False):
        with self.changed:
            assert allow_overwrite or key not in self.values, key
            self.values[key] = value
            self.changed.notify_all()

    def blocking_key_value_get(self, key, timeout_in_ms):
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, timeout_in_ms / 1000):
                raise RuntimeError("DEADLINE_EXCEEDED")
            return self.values[key]

    def key_value_delete(self, key):
        del self.values[key]

    key_value_set_bytes, blocking_key_value_get_bytes = key_value_set, blocking_key_value_get


def in_processes(n, work):
    """The results of `work(group)` in n processes; an error is a result."""
    store = Store()

    def one(i):
        group = Group(i, n, store)
        group.hosts = [f"host-{j}" for j in range(n)]
        try:
            return work(group)
        except UserError as e:
            return str(e)

    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(one, range(n)))


def test_what_processes_exchange_arrives_in_order_and_whole():
    large = "中" + random.Random(0).randbytes(1_500_000).hex()  # two parts, compressed

    def work(group):
        all_of_them = group.gather("a", {"index": group.index})
        main = group.from_main("b", lambda: large if group.is_main else pytest.fail("not main"))
        sent = group.to_main("c", [large, group.index])
        group.barrier("d")
        return all_of_them, main == large, [(text == large, i) for text, i in sent]

    results = in_processes(3, work)
    assert [r[:2] for r in results] == [([{"index": i} for i in range(3)], True)] * 3
    assert [r[2] for r in results] == [[(True, i) for i in range(3)], [], []]
    assert Group().gather("a", 1) == Group().to_main("a", 1) == [1]  # alone


def test_a_process_that_differs_is_named():
    def same_files(group):
        group.require_same("other files", "x" if group.index != 1 else "y", "copy them")

    expected = (
        "--distributed: process 1 (host-1) has other files than process 0 (host-0); copy them"
    )
    assert in_processes(3, same_files) == [expected] * 3

    def same_config(group):
        about.require_same(group, {"config": {"a": {"rows": 8 if group.index < 2 else 4}}})

    [message] = set(in_processes(4, same_config))
    assert message.startswith(
        "--distributed: processes 2, 3 (host-2, ...) and process 0 (host-0) differ in "
        "config.a.rows: 4 and 8; "
    )
    assert about.code()["versions"]["jax"] and len(about.code()["sources"]) == 12


def test_answers_are_shared_and_continued_by_another_number_of_processes(tmp_path):
    """Each process has a disk of its own. An answer from before is asked of nobody again."""
    ids = [f"q{i}" for i in range(11)]

    def parts_of(group):
        folder = tmp_path / str(group.index)
        return AnswerParts(folder / "out.jsonl", "1234", group)

    def answer(group, stop_after):
        parts = parts_of(group)
        with parts.open() as f:
            done = parts.read_others()
            left = parts.left(ids, done)
            for i in sorted(left)[:stop_after]:
                done[i] = {"id": i, "by": group.index, "error": "", "seconds": 0.5}
                f.write(json.dumps(done[i]) + "\n")
            f.flush()
            if stop_after == 2:
                return left
            return left, *parts.collect(done, left)

    first = in_processes(2, lambda group: answer(group, 2))
    assert first == [set(ids[::2]), set(ids[1::2])]
    with parts_of(Group(1, 2)).own.open("a") as f:
        f.write('{"id": "q5", "by"')  # killed in the middle of a line
    second = in_processes(3, lambda group: answer(group, 99))
    kept = {"q0", "q10", "q1", "q3"}
    shares = [left for left, _, _ in second]
    assert set().union(*shares) == set(ids) - kept
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    rows, (seconds, timed) = second[0][1:]
    assert sorted(row["id"] for row in rows) == sorted(ids) and second[1][1] == []
    # Processes 0 and 1 find the files of before, process 1 counts its own time only.
    assert (seconds, timed) == (0.5 * (len(ids) - 2), len(ids) - 2)
    assert not any("seconds" in row for row in rows)
    in_processes(3, lambda group: parts_of(group).remove())
    assert not list(tmp_path.rglob("*.partial"))


def test_chunks_come_to_process_0_from_other_disks(tmp_path):
    config = SimpleNamespace(chunk=3)

    def label(group):
        chunks = Chunks(tmp_path / str(group.index), tmp_path / "rows.jsonl", config, 14)
        mine = label_chunks.share_of(chunks, group)
        for c in mine:
            chunks.record(c).parent.mkdir(exist_ok=True)
            chunks.record(c).write_text(f"record {c}")
            chunks.file(c).write_text(f"中 {c} of {group.index}")
        label_chunks.send_to_main(chunks, group)
        return chunks.missing(), [chunks.file(c).read_text() for c in mine]

    results = in_processes(2, label)
    assert results[0] == ([], [f"中 {c} of 0" for c in (0, 2, 4)])
    there = [(tmp_path / "0" / f"{3 * c:08d}.jsonl").read_text() for c in range(5)]
    assert there == [f"中 {c} of {c % 2}" for c in range(5)]
    assert in_processes(3, label)[0] == ([], [])  # nothing is done twice


def test_the_watch_tells_silence_from_failure_and_from_a_saved_stop(monkeypatch):
    group = Group(0, 3, None)
    group.hosts = ["a", "b", "c"]
    now = [100.0]
    monkeypatch.setattr("selfrag_jax.processes.watch.time.monotonic", lambda: now[0])

    def state(beat, status=None, message=""):
        return {"beat": beat, "status": status, "message": message}

    watch = Watch(group, None, "train", "a:1", saves_on_sigterm=True)
    assert watch._fault({0: {}, 1: state(1), 2: state(1)}) is None
    now[0] += SECONDS_SILENT + 1
    why, status = watch._fault({0: {}, 1: state(2), 2: state(1)})
    assert status == 1 and why.startswith("process 2 (c) is gone: nothing was heard of it for 31 s")
    assert watch._fault({0: {}, 1: state(3, 143), 2: state(2, 0)}) is None  # a checkpoint is saved
    found = watch._fault({0: {}, 1: state(3, 2, "x.jsonl: no such file"), 2: state(2)})
    assert found == ("process 1 (b): x.jsonl: no such file", 2)
    other = Watch(group, None, "answer", "a:1", saves_on_sigterm=False)
    assert other._fault({0: {}, 1: state(3, 143), 2: state(2)})[1] == 143


def test_shards_are_for_a_shared_disk(capsys):
    flags = ["--critic=c", "--input=i.jsonl", "--out=gs://bucket/out.jsonl", "--shard=0/2"]
    assert cli.main(["label", *flags]) == 2
    printed = capsys.readouterr().err
    assert "--shard=0/2: is for machines that share a disk" in printed
    assert "give --distributed instead" in printed


# ---- real processes ------------------------------------------------------------------------------
def start(folder, command, n, *, changed=()):
    """Starts n processes of a command, each in a folder of its own, as on hosts without a disk in
    common. changed: an argument that the last of them has beside."""
    port, processes = free_port(), []
    for i in range(n):
        (folder / str(i)).mkdir(parents=True, exist_ok=True)
        arguments = [*command, f"--distributed=127.0.0.1:{port},{n},{i}"]
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "selfrag_jax", *arguments, *(changed if i == n - 1 else ())],
                cwd=folder / str(i), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    return processes


def ended(processes, timeout=300):
    """The exit statuses, and what each process has printed on stderr."""
    printed = [p.communicate(timeout=timeout)[1] for p in processes]
    return [p.returncode for p in processes], printed


def wait_for(pattern, folder, processes):
    while not any(f.stat().st_size for f in folder.glob(pattern)):
        assert all(p.poll() is None for p in processes), [p.communicate() for p in processes]
        time.sleep(0.02)


@pytest.mark.slow
def test_answers_of_two_and_four_processes_are_those_of_one(quickstart, tmp_path, capsys):
    """Of two one is killed, and the other names it. Four go on; of four, one with other flags is
    refused before anything is answered."""
    workdir, _ = quickstart
    questions = tmp_path / "q.jsonl"
    rows = [
        row
        for task in ("long_tail", "two_part")
        for _, row in read_rows(workdir / "world" / "eval" / f"{task}.jsonl")
    ]
    write_jsonl(questions, rows)
    command = ["answer", f"--workdir={workdir}", "--config=tiny:smoke", f"--input={questions}"]
    assert cli.main([*command, f"--out={tmp_path}/whole.jsonl"]) == 0
    command += ["--out=a.jsonl"]

    two = start(tmp_path, command, 2)
    wait_for(".a.jsonl.*.1-of-2.partial", tmp_path / "1", two)
    two[1].kill()
    killed = time.monotonic()
    statuses, printed = ended(two)
    assert statuses == [1, -signal.SIGKILL] and time.monotonic() - killed < 60
    assert "selfrag answer: stops: process 1 (" in printed[0].splitlines()[-1]
    assert ") is gone: nothing was heard of it for " in printed[0].splitlines()[-1]

    statuses, printed = ended(start(tmp_path, command, 4, changed=["--ndocs=2"]))
    assert statuses == [2] * 4
    assert all("differ in flags.--ndocs: 2 and None;" in text for text in printed)

    kept = {row["id"] for f in tmp_path.glob("*/.a*.partial") for _, row in read_rows(f)}
    statuses, printed = ended(start(tmp_path, command, 4))
    assert statuses == [0] * 4, printed
    assert kept and f" {len(rows) - len(kept)} of" not in printed[0]
    found = [row for _, row in read_rows(tmp_path / "0" / "a.jsonl")]
    # As for any other grouping of the questions, sums in another order show in the last digits.
    assert found == [rounded(row) for _, row in read_rows(tmp_path / "whole.jsonl")]
    assert sorted(f.name for f in tmp_path.glob("[0-3]/*")) == [
        "a.jsonl", "a.jsonl.manifest.json"
    ]  # fmt: skip
    assert not list(tmp_path.glob("*/.a*.partial"))


@pytest.mark.slow
def test_a_signal_to_one_process_stops_labelling_which_continues(critic, rows_file, tmp_path):  # noqa: F811
    command = ["label", "--config=tiny:smoke", f"--critic={critic}", f"--input={rows_file}"]
    command += ["--config.label.chunk=1", "--out=out.jsonl"]
    two = start(tmp_path / "two", command, 2)
    wait_for("out.jsonl.parts/*/*.jsonl", tmp_path / "two" / "1", two)
    two[1].terminate()
    statuses, printed = ended(two)
    assert statuses == [143, 143], printed
    assert "stops: process 1 (" in printed[0] and "it was told to stop (SIGTERM)" in printed[0]
    assert ended(start(tmp_path / "two", command, 2))[0] == [0, 0]
    [one] = start(tmp_path / "one", command, 1)
    assert ended([one])[0] == [0]
    written = contents(tmp_path / "two" / "0")
    names = ("out.jsonl", "out.jsonl.stats.json", "out.jsonl.stats.svg")
    assert all(written[n] == contents(tmp_path / "one" / "0")[n] for n in names)
    assert [f.name for f in (tmp_path / "two" / "1").iterdir()] == ["judgements"]
