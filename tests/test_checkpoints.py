"""Checkpoints: which are kept, and one that is damaged is noticed and passed over."""

import asyncio
import gc
import os
import re
import resource
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfrag_jax import artifacts
from selfrag_jax.checkpoints import fingerprints, integrity, loading, orbax_errors, saving, workdirs
from selfrag_jax.checkpoints.converting import convert
from selfrag_jax.data.generator_examples import GeneratorSource
from selfrag_jax.errors import UserError
from selfrag_jax.huggingface import weights
from selfrag_jax.records import GeneratorExample, write_jsonl
from selfrag_jax.training import optimizer
from selfrag_jax.training.config import MeshConfig, TrainConfig
from selfrag_jax.training.optimizer import OptimizerConfig
from selfrag_jax.training.step import state_like
from selfrag_jax.training.train import train


@given(st.integers(0, 2**32 - 1), st.sampled_from(["float32", "bfloat16", "int32"]), st.data())
@settings(max_examples=60, deadline=None)
def test_one_flipped_bit_changes_the_fingerprint(seed, dtype, data):
    x = np.asarray(jnp.asarray(np.random.default_rng(seed).normal(size=(3, 5)) * 100).astype(dtype))
    before = fingerprints.part_fingerprint(x)
    assert fingerprints.tree_fingerprints({"x": jnp.asarray(x)}) == {"['x']": before}
    flipped = x.copy()
    bits = flipped.reshape(-1).view(f"uint{8 * x.itemsize}")
    at, bit = data.draw(st.integers(0, 14)), data.draw(st.integers(0, 8 * x.itemsize - 1))
    bits[at] ^= bits.dtype.type(1 << bit)
    assert fingerprints.part_fingerprint(flipped) != before
    swapped = x[[1, 0, 2]]
    assert (x == swapped).all() or fingerprints.part_fingerprint(swapped) != before


@pytest.mark.parametrize(
    "change", [lambda x: -x, lambda x: x[::-1], lambda x: np.roll(x, 1), lambda x: x * 2]
)
def test_many_changes_do_not_cancel(change):
    x = np.random.default_rng(0).normal(size=64).astype(np.float32)
    assert fingerprints.part_fingerprint(change(x)) != fingerprints.part_fingerprint(x)


def test_a_fingerprint_is_the_sum_of_its_parts():
    x = np.random.default_rng(0).normal(size=(4, 6, 7)).astype(np.float32)
    parts = (
        sum(fingerprints.part_fingerprint(layer, i * layer.size) for i, layer in enumerate(x))
        % 2**32
    )
    assert (
        parts
        == fingerprints.part_fingerprint(x)
        == fingerprints.tree_fingerprints({"x": jnp.asarray(x)})["['x']"]
    )


def config(**changes):
    learner = OptimizerConfig("adamw", 0.01, 0.01, "constant", 0.1, 1e-8, 0.0, 1.0)
    fields = dict(seed=0, steps=8, rows=2, length=32, max_targets=48, save_every=2, log_every=4)
    return TrainConfig(**(fields | changes), optimizer=learner, mesh=MeshConfig(1, 1, 1))


@pytest.fixture
def run(tiny_model, tokenizer, tmp_path):
    rows = [
        GeneratorExample(str(i), f"Say {i}.", f"[No Retrieval]Number {i}.[Utility:5]")
        for i in range(12)
    ]
    source = GeneratorSource(
        rows, tokenizer, dict.fromkeys(("retrieve", "isrel", "issup", "isuse"), 1.0)
    )

    def go(workdir=tmp_path / "w", **changes):
        made = train(
            config(**changes),
            tiny_model.model,
            tiny_model.params,
            source,
            tiny_model.tokenizer,
            workdir,
        )
        return jax.device_get(made["params"])

    return go


def steps(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def largest(workdir, step):
    folder = workdir / "checkpoints" / str(step) / "state"
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def damage(workdir, step):
    """Flips bits all over a checkpoint, so that every array has some."""
    for file in largest(workdir, step).parent.rglob("*"):
        content = bytearray(file.read_bytes())
        content[997::997] = bytes(c ^ 4 for c in content[997::997])
        file.write_bytes(content)


def test_a_checkpoint_holds_what_was_when_it_was_asked_for(tmp_path, monkeypatch):
    """It is written in the background, beside a training that goes on."""
    import orbax.checkpoint as ocp

    begin, seen = ocp.args.JsonSave.__init__, [1.5, 2]

    def late(self, item):
        seen[:] = 9.0, 9  # the training is a step further before a byte is written
        begin(self, item)

    monkeypatch.setattr(ocp.args.JsonSave, "__init__", late)
    with saving.checkpoint_manager(tmp_path, 1, 0) as saved:
        saving.save_checkpoint(
            saved, 1, {"params": {"w": jnp.ones(3)}}, {"example": 3, "loss": seen}, 1.0
        )
    assert integrity.read_record(tmp_path, 1)[0] == {"example": 3, "loss": [1.5, 2]}


def test_a_checkpoint_without_a_loss_is_none_of_the_best(tmp_path):
    for step, loss in ((3, workdirs.NO_LOSS), (6, 2.0), (9, workdirs.NO_LOSS)):
        (tmp_path / "checkpoints" / str(step) / "metrics").mkdir(parents=True)
        (tmp_path / "checkpoints" / str(step) / "metrics" / "metrics").write_text(
            f'{{"loss": {loss}}}'
        )
    assert workdirs.candidate_steps(tmp_path, "best") == [6]
    shutil.rmtree(tmp_path / "checkpoints" / "6")
    with pytest.raises(
        UserError, match="no checkpoint has a loss to choose the best by; there are 3, 9"
    ):
        workdirs.candidate_steps(tmp_path, "best")


@pytest.mark.slow
def test_a_damaged_record_is_passed_over(run, tmp_path, capsys):
    """The position of the data iterator, or the loss that Orbax reads of every checkpoint."""
    whole, w = run(tmp_path / "whole"), tmp_path / "w"
    run(steps=6)
    record = w / "checkpoints" / "6" / "data" / "metadata"
    changed = re.sub(
        r'"example": (\d+)', lambda m: f'"example": {int(m.group(1)) ^ 1}', record.read_text()
    )
    assert changed != record.read_text()
    record.write_text(changed)
    (w / "checkpoints" / "4" / "metrics" / "metrics").write_text('{"loss": 1.2')
    jax.tree.map(np.testing.assert_array_equal, run(), whole)
    said = capsys.readouterr().err
    assert (
        "metadata is not what was written; step 4 is taken instead" in said
        and "the loss cannot be read" in said
    )


def test_a_converted_model_that_is_damaged_is_refused(tiny_model, tmp_path):
    source, w = tmp_path / "hf", tmp_path / "w"
    weights.save_folder(
        source, tiny_model.model.config, jax.device_get(tiny_model.params), tiny_model.tokenizer
    )
    convert(source, w, "orbax", None, False)
    jax.tree.map(
        np.testing.assert_array_equal, loading.load(w).params, jax.device_get(tiny_model.params)
    )
    damage(w, 0)
    with pytest.raises(
        UserError, match="no checkpoint can be read, all seem damaged: .*checkpoints/0: "
    ):
        loading.load(w)


def test_a_disk_that_fails_is_no_damage(run, tmp_path, monkeypatch):
    run(steps=6)
    monkeypatch.setattr(
        saving,
        "read_record",
        lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")),
    )
    with pytest.raises(OSError, match="Input/output error"):
        run()
    assert steps(tmp_path / "w") == [2, 4, 6] or steps(tmp_path / "w") == [4, 6]
    assert not (tmp_path / "w" / "damaged").exists()


def test_no_flipped_bit_is_read_in_silence(run, tiny_model, tmp_path):
    """One bit at a time, anywhere in the largest file: it is noticed, or it changes nothing."""
    run()
    c, w = config(), tmp_path / "w"
    like = state_like(
        c,
        c.model(tiny_model.model.config),
        optimizer.make_optimizer(c.optimizer, c.steps),
        c.make_mesh(),
    )
    right, _ = saving._restore(w, 8, like)
    file = largest(w, 8)
    content, noticed = file.read_bytes(), 0
    for at in range(7, len(content), len(content) // 16):
        changed = bytearray(content)
        changed[at] ^= 1 << (at % 8)
        file.write_bytes(changed)
        try:
            found, _ = saving._restore(w, 8, like)
        except Exception:
            noticed += 1
        else:  # between the arrays
            jax.tree.map(np.testing.assert_array_equal, found, right)
    assert noticed > 8


@pytest.mark.slow
def test_a_damaged_file_is_damage_to_every_reader_or_to_none(run, tiny_model, tmp_path):
    """Each file of a checkpoint in turn: training, answering and converting all pass it over, or all read what was saved. Training
    alone reads the optimizer's state, and passes over what the others take."""
    run(steps=2)
    c, w = config(), tmp_path / "w"
    like = state_like(
        c,
        c.model(tiny_model.model.config),
        optimizer.make_optimizer(c.optimizer, c.steps),
        c.make_mesh(),
    )
    right, _ = saving._restore(w, 2, like)
    files = [p for p in (w / "checkpoints" / "2").rglob("*") if p.is_file() and p.name != "metrics"]
    assert {"_sharding", "_METADATA"} <= {p.name for p in files}
    for file in files:
        whole = file.read_bytes()
        for spoilt in (
            whole[: len(whole) // 2],
            bytes([whole[0] ^ 1]) + whole[1:],
            bytes(c ^ 4 for c in whole),
        ):
            file.write_bytes(spoilt)
            took = []
            for read in (
                lambda: saving._restore(w, 2, like)[0]["params"],
                lambda: loading.load(w).params,
                lambda: (
                    convert(w, tmp_path / "out", "huggingface", None, False)
                    and loading.load(tmp_path / "out").params
                ),
            ):
                try:
                    found = read()
                except Exception:
                    took.append(False)
                else:
                    jax.tree.map(np.testing.assert_array_equal, found, right["params"])
                    took.append(True)
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            assert took in ([True] * 3, [False] * 3, [False, True, True]), (file, took)
        file.write_bytes(whole)


def test_the_last_ones_and_the_best_are_kept(run, tmp_path, monkeypatch):
    losses = iter([3.0, 1.0, 4.0, 5.0])
    save = saving.save_checkpoint
    monkeypatch.setattr(
        saving,
        "save_checkpoint",
        lambda saved, step, state, data, loss: save(saved, step, state, data, next(losses)),
    )
    run()
    assert steps(tmp_path / "w") == [4, 6, 8]
    w = tmp_path / "w"
    of_step = {}
    for step in steps(w):
        convert(w, tmp_path / f"of{step}", "huggingface", None, False, step=str(step))
        of_step[step] = loading.load(tmp_path / f"of{step}").params["embed"]["embedding"]
    convert(w, tmp_path / "best", "huggingface", None, False, step="best")
    best = loading.load(tmp_path / "best").params["embed"]["embedding"]
    assert (best == of_step[4]).all() and not (best == of_step[8]).all()
    with pytest.raises(UserError, match="--step=5: must be last, best, or one of 4, 6, 8"):
        convert(w, tmp_path / "five", "huggingface", None, False, step="5")
    with pytest.raises(UserError, match="no training workdir"):
        convert(tmp_path / "best", tmp_path / "five", "orbax", None, False, step="best")
    losses = iter([4.0, 3.0, 2.0, 1.0])
    run(tmp_path / "falling")  # the best beside the last two
    assert steps(tmp_path / "falling") == [4, 6, 8]
    losses = iter([3.0, 1.0, 4.0, 5.0])
    run(tmp_path / "none", keep_best=0, keep_last=1)
    assert steps(tmp_path / "none") == [8]


def test_reading_a_model_leaves_the_optimizer_alone(run, tmp_path, monkeypatch):
    run()
    read = loading._on_host
    seen = []
    monkeypatch.setattr(loading, "_on_host", lambda *a: seen.append(read(*a)) or seen[-1])
    loading.load(tmp_path / "w")
    assert [set(tree) for tree in seen] == [{"params"}]


def test_a_second_start_does_not_read_the_base(run, tiny_model, tokenizer, tmp_path):
    run(steps=6)

    def base():
        raise AssertionError("the checkpoint has everything")

    rows = [
        GeneratorExample(str(i), f"Say {i}.", f"[No Retrieval]Number {i}.[Utility:5]")
        for i in range(12)
    ]
    source = GeneratorSource(
        rows, tokenizer, dict.fromkeys(("retrieve", "isrel", "issup", "isuse"), 1.0)
    )
    train(config(), tiny_model.model, base, source, tokenizer, tmp_path / "w")
    assert steps(tmp_path / "w")[-1] == 8


def test_a_full_disk_ends_the_log_with_an_error(tmp_path, monkeypatch):
    """tensorboardX's own writer would wait for ever."""
    from selfrag_jax.training.log import TrainingLog

    log = TrainingLog(tmp_path)
    add = lambda: log.add(
        {"loss": np.ones(5), "correct": np.ones(5), "count": np.ones(5), "gradient_norm": 1.0}, 8
    )  # noqa: E731
    add()
    log.report(1)
    [file] = (tmp_path / "logs").iterdir()
    assert file.stat().st_size > 300
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 20, limits[1]))
    try:
        add()
        with pytest.raises(OSError, match="File too large"):
            log.report(2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_damaged_checkpoint_is_passed_over(run, tmp_path, capsys):
    whole, w = run(tmp_path / "whole"), tmp_path / "w"
    run(steps=6)
    damage(w, 6)
    resumed = run()  # from step 4
    said = capsys.readouterr().err
    assert "checkpoints/6: " in said and "step 4 is taken instead" in said
    assert (w / "damaged" / "6.0").is_dir() and steps(w)[-1] == 8
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)


def test_reading_a_model_passes_a_damaged_checkpoint_over(run, tmp_path, capsys):
    w = tmp_path / "w"
    last = run()
    jax.tree.map(np.testing.assert_array_equal, loading.load(w).params, last)
    damage(w, 8)
    before = loading.load(w).params
    assert "step 6 is taken instead" in capsys.readouterr().err and steps(w)[-1] == 8
    assert any(
        (a != b).any() for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(last), strict=True)
    )
    convert(w, tmp_path / "out", "huggingface", None, False)
    assert "step 6 is taken instead" in capsys.readouterr().err
    jax.tree.map(np.testing.assert_array_equal, loading.load(tmp_path / "out").params, before)
    with pytest.raises(
        UserError, match="no checkpoint can be read, all seem damaged: .*checkpoints/8: "
    ):
        convert(w, tmp_path / "8", "huggingface", None, False, step="8")
    assert not (tmp_path / "8").exists() and not list(tmp_path.glob(".8*"))
    for step in steps(w):
        damage(w, step) if step != 8 else None
    with pytest.raises(UserError, match="no checkpoint can be read, .*checkpoints/8: "):
        loading.load(w)
    with pytest.raises(UserError, match="all seem damaged"):
        run(steps=10)


@pytest.mark.parametrize("package, said", [("orbax", False), ("mine", True)])
def test_tasks_that_no_one_waited_for_are_not_said_besides(package, said, caplog):
    """Whether asyncio gets to say it depends on timing: here a task of Orbax fails, and then one of somebody else."""
    space = {}
    code = "async def write(): raise ValueError('File too large')"
    exec(compile(code, f"{os.sep}packages{os.sep}{package}{os.sep}serialization.py", "exec"), space)

    async def forget():
        task = asyncio.ensure_future(space["write"]())
        await asyncio.sleep(0)
        assert task.done()

    orbax_errors.silence_secondary_errors()
    asyncio.run(forget())
    gc.collect()
    assert ("Task exception was never retrieved" in caplog.text) == said


@pytest.mark.slow
def test_a_full_disk_is_said_and_leaves_what_was_there(tmp_path):
    """Files may have 0.6 MB at most: the embedding alone, which no checkpoint divides, has 0.8."""
    rows = [
        GeneratorExample(str(i), f"Say {i}.", f"[No Retrieval]Number {i}.[Utility:5]")
        for i in range(40)
    ]
    write_jsonl(tmp_path / "data.jsonl", rows)
    command = [
        sys.executable,
        "-m",
        "selfrag_jax",
        "train",
        "--role=generator",
        f"--data={tmp_path}/data.jsonl",
    ]
    command += [f"--workdir={tmp_path}/w", "--config=tiny:smoke"]
    limited = ["bash", "-c", 'ulimit -f 586 && exec "$@"', "bash", *command]  # KiB
    env = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")
    }  # in which no killed process left half a program
    full = subprocess.run(limited, capture_output=True, text=True, env=env)
    assert full.returncode == 1, full.stderr
    assert "a checkpoint could not be written (File too large)" in full.stderr.splitlines()[-1]
    assert (
        "Traceback" not in full.stderr
        and "Error" not in full.stderr
        and steps(tmp_path / "w") == []
    )
    with artifacts.exclusive_workdir(tmp_path / "w"):  # as a process that is not quite gone
        other = subprocess.run(command, capture_output=True, text=True, env=env)
    assert other.returncode == 2 and "another process is writing it" in other.stderr, other.stderr
    again = subprocess.run(command, capture_output=True, text=True, env=env)
    assert again.returncode == 0 and steps(tmp_path / "w")[-1] == 6, again.stderr
