"""A training can be made longer; SIGTERM ends one after a micro-batch, or at once."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from test_training import assert_same_arrays, config, number_rows, source  # noqa: F401 (a fixture)

from selfrag_jax import artifacts
from selfrag_jax import config as configs
from selfrag_jax.checkpoints import workdirs
from selfrag_jax.commands.train import train_model
from selfrag_jax.errors import UserError
from selfrag_jax.records import write_jsonl
from selfrag_jax.training import length, optimizer, programs
from selfrag_jax.training.train import train


# ---- another length ------------------------------------------------------------------------------
@pytest.fixture
def small(tmp_path):
    """Returns a config of a model of one layer, and a function that trains it for some steps."""
    c = configs.load("tiny:smoke")
    c.base = "scratch"
    c.scratch.update(embed_dim=16, mlp_dim=16, num_layers=1, num_heads=2, num_kv_heads=2)
    c.scratch.head_dim = 8
    c.generator.update(rows=2, length=48, max_targets=64, save_every=2)
    c.generator.optimizer.update(name="adamw", schedule="cosine")
    write_jsonl(tmp_path / "data.jsonl", number_rows(12))

    def run(steps, **changes):
        c.generator.steps = steps
        c.generator.update(changes)
        train_model(c, "generator", tmp_path / "data.jsonl", tmp_path / "w", "generator")

    return c, run


def manifest(workdir):
    file = artifacts.manifest_path(workdir)
    return json.loads(file.read_text()) if file.is_file() else None


def test_a_finished_training_is_made_longer(small, tmp_path, capsys):
    """It goes on from its last step, says at which rate, and is then finished again."""
    c, run = small
    run(3)
    first = manifest(tmp_path / "w")
    assert first["config"]["train"]["steps"] == 3 and "lengthened" not in first["config"]
    capsys.readouterr()
    run(5)
    err = capsys.readouterr().err
    rates = [
        float(
            optimizer.schedule(
                "cosine", c.generator.optimizer.learning_rate, 0.05, n
            )(3)
        )
        for n in (5, 3)
    ]  # fmt: skip
    assert rates[1] == 0 < rates[0]
    assert (
        f"step 3 of 3 becomes step 3 of 5; the learning rate goes on at {rates[0]:.1e} "
        "(it was 0.0e+00), as the cosine schedule is now over 5 steps" in err
    )
    assert "5 steps of 2 x 48 tokens, from step 3 on" in err
    assert workdirs.saved_steps(tmp_path / "w")[-1] == 5
    longer = manifest(tmp_path / "w")
    assert longer["counts"]["steps"] == 5 and longer["config"]["lengthened"] == [3]
    # Not what a training of 5 steps from the start has made.
    assert artifacts.fingerprint(tmp_path / "w") != first
    run(5)  # finished: does nothing
    assert manifest(tmp_path / "w") == longer
    with pytest.raises(UserError, match=r"steps=4: .*w has been trained for 5 steps, more than"):
        run(4)
    with pytest.raises(UserError, match="train.rows: 2 there, 4 asked for"):
        run(5, rows=4)
    with pytest.raises(UserError, match="train.rows: 2 there, 4 asked for"):
        run(9, rows=4)  # another length, and something else
    assert manifest(tmp_path / "w") == longer


def test_what_is_asked_is_compared_in_steps(small, tmp_path, source):  # noqa: F811
    """Epochs instead of steps are another length of the same training, too."""
    workdir, data = tmp_path / "v", tmp_path / "data.jsonl"
    made = {"role": "generator", "train": {"steps": 7, "epochs": None, "rows": 2}}
    artifacts.claim_workdir(workdir, "train", made, {"data": data})
    assert length.asked_length(workdir, made, {"data": data}) is None
    asked = {"role": "generator", "train": {"steps": None, "epochs": 2.0, "rows": 2}}
    change = length.asked_length(workdir, asked, {"data": data})
    assert change == length.NewLength(7, None)
    (workdir / "checkpoints" / "30").mkdir(parents=True)
    in_epochs = config(steps=None, epochs=2.0, max_targets=None)
    with pytest.raises(UserError, match=r"generator.epochs=2.0: .*v has been trained for 30 steps"):
        length.check_length("generator", change, in_epochs, source, workdir)
    data.write_text(data.read_text() + "\n")
    assert length.asked_length(workdir, asked, {"data": data}) is None  # other data as well


# ---- SIGTERM -------------------------------------------------------------------------------------
@pytest.mark.slow
def test_sigterm_waits_for_one_micro_batch(tiny_model, source, tmp_path, monkeypatch):  # noqa: F811
    """It comes in the second of four. The step is dropped, and the one before it is saved."""
    c = config(steps=4, name="adamw", rows=8, rows_per_device=2, max_targets=None, save_every=3)

    def run(workdir):
        arguments = c, tiny_model.model, tiny_model.params, source, tiny_model.tokenizer, workdir
        return train(*arguments)["params"]

    whole = run(tmp_path / "whole")
    put, micro_batches = programs.step.put_batch, []

    def terminated(*arguments):
        micro_batches.append(1)
        if len(micro_batches) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return put(*arguments)

    monkeypatch.setattr(programs.step, "put_batch", terminated)
    with pytest.raises(SystemExit, match="143"):
        run(tmp_path / "parts")
    assert len(micro_batches) == 6 and workdirs.saved_steps(tmp_path / "parts") == [1]
    assert_same_arrays(run(tmp_path / "parts"), whole)
    assert len(micro_batches) == 6 + 3 * 4


STUCK = """
import ctypes, sys
from selfrag_jax.training.stop_signal import StopSignal
with StopSignal():
    print("compiling", flush=True)
    ctypes.CDLL(None).sleep(60)  # as XLA does: Python handles no signal
"""


@pytest.mark.slow
def test_sigterm_ends_a_compilation_at_once():
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", STUCK], stdout=pipe, stderr=pipe, text=True)
    assert process.stdout.readline() == "compiling\n"
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143 and time.monotonic() - start < 10
    assert "SIGTERM: no step was done yet" in err
