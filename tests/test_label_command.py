"""`selfrag label`: shards, interruptions, rows that fail, and what is written beside the labels.

Run as a program, this file is a labelling that is killed.
"""

import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import jax
import numpy as np
import pytest
from repetitions import some

from selfrag_jax import artifacts
from selfrag_jax.commands import label as label_module
from selfrag_jax.commands.label import label_file
from selfrag_jax.critic.critic import Critic, CriticConfig
from selfrag_jax.critic.judgements import critic_digest
from selfrag_jax.critic.labelling import LabelConfig
from selfrag_jax.errors import StageFailed, UserError
from selfrag_jax.files import write_json
from selfrag_jax.huggingface import weights
from selfrag_jax.records import read_rows, write_jsonl

CONFIG = LabelConfig(
    seed=0, critic=CriticConfig(8, 128, True), passages=3, variants=2, best_rate=0.5, chunk=3
)
# The small model's weights are random: what needs retrieval is decided here.
NEEDS = {f"r{i}": "[No Retrieval]" if i % 4 == 2 else "[Retrieval]" for i in range(40)}
CTXS = [{"id": str(i), "title": f"Title {i}", "text": f"It is in place {i}."} for i in range(4)]


def make_rows(n=11):
    outputs = ("It is there. It stays.", "中文。第二句。", "One line.\nAnother [Relevant] line.")
    return [
        {"id": f"r{i}", "instruction": f"Where is {i}?", "output": outputs[i % 3], "ctxs": CTXS}
        for i in range(n)
    ]


@pytest.fixture
def critic(tiny_model, tmp_path):
    folder = tmp_path / "critic"
    model = tiny_model.model
    weights.save_folder(folder, model.config, tiny_model.params, tiny_model.tokenizer)
    write_json(folder / "manifest.json", {"stage": "convert", "config": {"role": "critic"}})
    return folder


@pytest.fixture
def rows_file(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", make_rows())
    return tmp_path / "rows.jsonl"


@pytest.fixture
def judged(monkeypatch):
    """All prompts that the critic judges."""
    prompts, judge = [], Critic.judge_prompts

    def record(self, queries):
        prompts.extend(queries)
        return judge(self, queries)

    monkeypatch.setattr(Critic, "judge_prompts", record)
    return prompts


def test_shards_make_the_same_file_and_judge_nothing_twice(critic, rows_file, tmp_path, judged,
                                                           capsys):  # fmt: skip
    whole, out = tmp_path / "whole.jsonl", tmp_path / "shards" / "out.jsonl"
    assert label_file(critic, rows_file, CONFIG, whole, needs=NEEDS) == 22
    num_judged = len(judged)
    assert len(set(judged)) == num_judged > 30
    assert label_file(critic, rows_file, CONFIG, tmp_path / "again.jsonl", needs=NEEDS) == 22
    assert len(judged) == num_judged  # another --out, the same judgements
    assert label_file(critic, rows_file, CONFIG, whole, needs=NEEDS) == 0  # finished

    assert label_file(critic, rows_file, CONFIG, out, needs=NEEDS, shard=(1, 3)) == 0
    assert "shard 1/3 is finished; 3 of 4 chunks are missing" in capsys.readouterr().out
    assert not out.exists()
    assert label_file(critic, rows_file, CONFIG, out, needs=NEEDS, shard=(2, 3)) == 0
    assert label_file(critic, rows_file, CONFIG, out, needs=NEEDS, shard=(0, 3)) == 22
    assert label_file(critic, rows_file, CONFIG, out, needs=NEEDS, shard=(2, 3)) == 0
    assert len(judged) == 2 * num_judged
    assert out.read_bytes() == whole.read_bytes() == (tmp_path / "again.jsonl").read_bytes()
    for suffix in (".stats.json", ".stats.svg"):
        files = [path.with_name(path.name + suffix) for path in (out, whole)]
        assert files[0].read_bytes() == files[1].read_bytes()
    left = {path.name for path in out.parent.iterdir()}
    names = ("", ".manifest.json", ".stats.json", ".stats.svg")
    assert left == {"judgements", *(f"out.jsonl{name}" for name in names)}


def test_an_interrupted_run_continues(critic, rows_file, tmp_path, judged, monkeypatch):
    whole, out = tmp_path / "a" / "whole.jsonl", tmp_path / "b" / "out.jsonl"
    label_file(critic, rows_file, CONFIG, whole, needs=NEEDS)
    num_judged, record = len(judged), Critic.judge_prompts

    def interrupted(self, queries):
        if len(judged) > 1.5 * num_judged:
            raise KeyboardInterrupt
        return record(self, queries)

    with monkeypatch.context() as patch:
        patch.setattr(Critic, "judge_prompts", interrupted)
        with pytest.raises(KeyboardInterrupt):
            label_file(critic, rows_file, CONFIG, out, needs=NEEDS)
    assert not out.exists()
    assert label_file(critic, rows_file, CONFIG, out, needs=NEEDS) == 22
    assert len(judged) == 2 * num_judged  # none of the second run twice
    assert out.read_bytes() == whole.read_bytes()


def test_rows_that_fail_are_recorded_with_file_line_and_reason(critic, tmp_path, capsys):
    rows = make_rows(5)
    rows[1]["output"] = " \n"
    rows[3]["output"] = "It is so. " * 2000  # more than the critic reads
    rows[4]["ctxs"] = [{"title": "T", "text": "long " * 2000}] * 2
    file, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    write_jsonl(file, rows)
    assert label_file(critic, file, CONFIG, out, needs=NEEDS) == 6
    failed = [row for _, row in read_rows(tmp_path / "out.jsonl.failed.jsonl")]
    assert [(row["id"], row["where"]) for row in failed] == [
        ("r1", f"{file}:2"),
        ("r3", f"{file}:4"),
    ]
    assert failed[0]["reason"] == "its output is empty"
    assert "the model reads 512" in failed[1]["reason"]
    counts = json.loads(artifacts.manifest_path(out).read_text())["counts"]
    assert (counts["examples"], counts["failed"]) == (6, 2)
    err = capsys.readouterr().err
    assert f"2 of 5 rows could not be labelled; the first, {file}:2: its output is empty" in err
    assert counts["evidence_cut"] > 0
    assert f"evidence was cut to the critic's context in {counts['evidence_cut']} prompts" in err

    write_jsonl(file, [rows[1]])
    with pytest.raises(StageFailed, match="no row could be labelled"):
        label_file(critic, file, CONFIG, tmp_path / "none.jsonl")
    assert not (tmp_path / "none.jsonl").exists()


def test_rows_without_the_passages_that_they_need_are_counted(critic, tmp_path, capsys):
    rows = make_rows(3)
    rows[1]["ctxs"] = []
    write_jsonl(tmp_path / "rows.jsonl", rows)
    out = tmp_path / "out.jsonl"
    label_file(critic, tmp_path / "rows.jsonl", CONFIG, out, needs=NEEDS)
    assert json.loads(artifacts.manifest_path(out).read_text())["counts"]["nothing_found"] == 1
    assert "1 rows need retrieval, but no passage was there" in capsys.readouterr().err


def test_a_critic_is_asked_in_the_wording_of_its_training(critic, rows_file, tmp_path):
    made = {"stage": "convert", "config": {"role": "critic", "brief": False}}
    write_json(critic / "manifest.json", made)
    with pytest.raises(UserError, match="other prompts; give --config.label.critic.brief=false"):
        label_file(critic, rows_file, CONFIG, tmp_path / "out.jsonl")


def test_files_of_others_are_kept(critic, rows_file, tmp_path):
    (tmp_path / "out.jsonl.stats.json").write_text("mine")
    assert label_file(critic, rows_file, CONFIG, tmp_path / "out.jsonl", needs=NEEDS) == 22
    assert (tmp_path / "out.jsonl.stats.json.old-1").read_text() == "mine"
    rows_file.rename(tmp_path / "b.jsonl.failed.jsonl")
    with pytest.raises(UserError, match="both a file beside the output and the input"):
        label_file(critic, tmp_path / "b.jsonl.failed.jsonl", CONFIG, tmp_path / "b.jsonl")
    labelled = tmp_path / "out.jsonl"
    with pytest.raises(UserError, match="out.jsonl:1: field 'output' is labelled already"):
        label_file(critic, labelled, CONFIG, tmp_path / "c.jsonl")


def test_another_checkpoint_has_judgements_of_its_own(tiny_model):
    params = jax.tree.map(np.array, tiny_model.params)
    same = critic_digest(replace(tiny_model, params=params))
    params["norm"]["scale"][-1] += 1
    assert critic_digest(tiny_model) == same != critic_digest(replace(tiny_model, params=params))


def test_two_runs_of_one_shard_exclude_each_other(critic, rows_file, tmp_path, judged, monkeypatch):
    out, label = tmp_path / "out.jsonl", label_module._label_chunks

    def label_twice(*args):
        with pytest.raises(UserError, match="another process is writing it"):
            label_file(critic, rows_file, CONFIG, out, needs=NEEDS)
        label(*args)

    monkeypatch.setattr(label_module, "_label_chunks", label_twice)
    assert label_file(critic, rows_file, CONFIG, out, needs=NEEDS) == 22
    assert len(set(judged)) == len(judged)


def test_bad_input_is_refused_with_its_place(critic, rows_file, tmp_path):
    out = tmp_path / "out.jsonl"
    rows = make_rows(4)
    rows[3]["id"] = "r1"
    file = tmp_path / "bad.jsonl"
    write_jsonl(file, rows)
    with pytest.raises(UserError, match=r"bad\.jsonl:4: id 'r1' is also the id of .*bad\.jsonl:2"):
        label_file(critic, file, CONFIG, out)
    del rows[3]["output"]
    write_jsonl(file, rows)
    with pytest.raises(UserError, match=r"bad\.jsonl:4: missing field 'output'"):
        label_file(critic, file, CONFIG, out)
    write_jsonl(file, [row | {"ctxs": []} for row in rows[:3]])
    with pytest.raises(UserError, match="no row has passages"):
        label_file(critic, file, CONFIG, out)
    with pytest.raises(UserError, match="needs: 'maybe' of row 'r1' must be"):
        label_file(critic, rows_file, CONFIG, out, needs={"r1": "maybe"})
    with pytest.raises(UserError, match="passages=0 must be at least 1"):
        replace(CONFIG, passages=0)
    assert not list(tmp_path.glob("out.jsonl*"))


def test_given_needs_identify_the_labels(critic, rows_file, tmp_path):
    out = tmp_path / "out.jsonl"
    needs = {f"r{i}": "[No Retrieval]" for i in range(11)}
    assert label_file(critic, rows_file, CONFIG, out, needs=needs) == 22
    outputs = [row["output"] for _, row in read_rows(out)]
    assert all(o.startswith("[No Retrieval]") and "<paragraph>" not in o for o in outputs)
    assert label_file(critic, rows_file, CONFIG, out, needs=needs) == 0
    with pytest.raises(UserError, match="made with another config"):
        label_file(critic, rows_file, CONFIG, out)


@pytest.mark.slow
def test_kills_at_random_moments_lose_and_double_nothing(critic, tmp_path):
    file, out = tmp_path / "rows.jsonl", tmp_path / "killed" / "out.jsonl"
    write_jsonl(file, make_rows(40))
    label_file(critic, file, CONFIG, tmp_path / "whole.jsonl", needs=NEEDS)
    command, rng = [sys.executable, __file__, critic, file, out], random.Random(0)

    def num_chunks():
        return len(list(tmp_path.glob("killed/out.jsonl.parts/*/*.jsonl")))

    for _ in range(some(3, 6)):  # of 14 chunks, each takes a tenth of a second at least
        before = num_chunks()
        process = subprocess.Popen(command)
        while num_chunks() == before and process.poll() is None:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        assert process.wait() == -signal.SIGKILL and not out.exists()
    subprocess.run(command, check=True)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


if __name__ == "__main__":
    label_rows = label_module._label_rows

    def slowly(*args):
        time.sleep(0.1)
        return label_rows(*args)

    label_module._label_rows = slowly
    label_file(*sys.argv[1:3], CONFIG, sys.argv[3], needs=NEEDS)
