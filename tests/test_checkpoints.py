"""Checkpoints: which are kept, and that a damaged one is noticed and passed over."""

import asyncio
import gc
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfrag_jax import locks
from selfrag_jax.checkpoints import fingerprints, integrity, loading, orbax_errors, saving, workdirs
from selfrag_jax.checkpoints.converting import convert
from selfrag_jax.data.generator_examples import GeneratorSource
from selfrag_jax.errors import UserError
from selfrag_jax.huggingface import weights
from selfrag_jax.records import GeneratorExample, write_jsonl
from selfrag_jax.training import optimizer
from selfrag_jax.training.config import MeshConfig, TrainConfig
from selfrag_jax.training.optimizer import OptimizerConfig
from selfrag_jax.training.step import abstract_state
from selfrag_jax.training.train import train


# ---- fingerprints ----------------------------------------------------------------------------
@given(st.integers(0, 2**32 - 1), st.sampled_from(["float32", "bfloat16", "int32"]), st.data())
@settings(max_examples=60, deadline=None)
def test_one_flipped_bit_changes_the_fingerprint(seed, dtype, data):
    x = np.asarray(jnp.asarray(np.random.default_rng(seed).normal(size=(3, 5)) * 100).astype(dtype))
    before = fingerprints.part_fingerprint(x)
    assert fingerprints.tree_fingerprints({"x": jnp.asarray(x)}) == {"['x']": before}
    flipped = x.copy()
    bits = flipped.reshape(-1).view(f"uint{8 * x.itemsize}")
    index, bit = data.draw(st.integers(0, 14)), data.draw(st.integers(0, 8 * x.itemsize - 1))
    bits[index] ^= bits.dtype.type(1 << bit)
    assert fingerprints.part_fingerprint(flipped) != before
    swapped = x[[1, 0, 2]]
    assert (x == swapped).all() or fingerprints.part_fingerprint(swapped) != before


@pytest.mark.parametrize(
    "change", [lambda x: -x, lambda x: x[::-1], lambda x: np.roll(x, 1), lambda x: x * 2]
)
def test_changes_of_many_elements_do_not_cancel(change):
    x = np.random.default_rng(0).normal(size=64).astype(np.float32)
    assert fingerprints.part_fingerprint(change(x)) != fingerprints.part_fingerprint(x)


def test_a_fingerprint_is_the_sum_of_its_parts():
    x = np.random.default_rng(0).normal(size=(4, 6, 7)).astype(np.float32)
    parts = [fingerprints.part_fingerprint(layer, i * layer.size) for i, layer in enumerate(x)]
    whole = fingerprints.part_fingerprint(x)
    on_device = fingerprints.tree_fingerprints({"x": jnp.asarray(x)})["['x']"]
    running = fingerprints.RunningFingerprint()
    for layer in x:
        running.update(layer)
    assert sum(parts) % 2**32 == running.value == whole == on_device


# ---- trainings and damage to their checkpoints -----------------------------------------------
def config(**changes):
    learner = OptimizerConfig("adamw", 0.01, 0.01, "constant", 0.1, 1e-8, 0.0, 1.0)
    fields = dict(seed=0, steps=8, rows=2, length=32, max_targets=48, save_every=2, log_every=4)
    return TrainConfig(**(fields | changes), optimizer=learner, mesh=MeshConfig(1, 1, 1))


def examples(n):
    return [
        GeneratorExample(str(i), f"Say {i}.", f"[No Retrieval]Number {i}.[Utility:5]")
        for i in range(n)
    ]


@pytest.fixture
def source(tokenizer):
    group_weights = dict.fromkeys(("retrieve", "isrel", "issup", "isuse"), 1.0)
    return GeneratorSource(examples(12), tokenizer, group_weights)


@pytest.fixture
def run(tiny_model, source, tmp_path):
    """Trains in a workdir and returns the parameters."""

    def run_training(workdir=tmp_path / "w", **changes):
        model, params = tiny_model.model, tiny_model.params
        trained = train(config(**changes), model, params, source, tiny_model.tokenizer, workdir)
        return jax.device_get(trained["params"])

    return run_training


@pytest.fixture
def like(tiny_model):
    """The shapes and shardings of the state of a training."""
    c = config()
    tx = optimizer.make_optimizer(c.optimizer, c.steps)
    return abstract_state(c, c.model(tiny_model.model.config), tx, c.make_mesh())


def save_folder(folder, loaded):
    params = jax.device_get(loaded.params)
    weights.save_folder(folder, loaded.model.config, params, loaded.tokenizer)


def steps(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def largest_file(workdir, step):
    folder = workdir / "checkpoints" / str(step) / "state"
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def damage(workdir, step):
    """Flips bits all over a checkpoint, so that every array has some."""
    for file in largest_file(workdir, step).parent.rglob("*"):
        content = bytearray(file.read_bytes())
        content[997::997] = bytes(c ^ 4 for c in content[997::997])
        file.write_bytes(content)


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


# ---- saving ----------------------------------------------------------------------------------
def test_a_checkpoint_holds_the_position_at_the_time_of_the_call(tmp_path, monkeypatch):
    """It is written in the background, while training continues."""
    import orbax.checkpoint as ocp

    init, losses = ocp.args.JsonSave.__init__, [1.5, 2]

    def late_init(self, item):
        losses[:] = 9.0, 9  # training is a step further before a byte is written
        init(self, item)

    monkeypatch.setattr(ocp.args.JsonSave, "__init__", late_init)
    state, position = {"params": {"w": jnp.ones(3)}}, {"example": 3, "loss": losses}
    with saving.checkpoint_manager(tmp_path, 1, 0) as manager:
        saving.save_checkpoint(manager, 1, state, position, 1.0)
    assert integrity.read_record(tmp_path, 1)[0] == {"example": 3, "loss": [1.5, 2]}


def test_a_checkpoint_without_a_loss_is_never_the_best(tmp_path):
    for step, loss in ((3, workdirs.NO_LOSS), (6, 2.0), (9, workdirs.NO_LOSS)):
        folder = tmp_path / "checkpoints" / str(step) / "metrics"
        folder.mkdir(parents=True)
        (folder / "metrics").write_text(f'{{"loss": {loss}}}')
    assert workdirs.candidate_steps(tmp_path, "best") == [6]
    shutil.rmtree(tmp_path / "checkpoints" / "6")
    message = "no checkpoint has a loss to choose the best by; there are 3, 9"
    with pytest.raises(UserError, match=message):
        workdirs.candidate_steps(tmp_path, "best")


def test_the_last_checkpoints_and_the_best_are_kept(run, tmp_path, monkeypatch):
    losses = iter([3.0, 1.0, 4.0, 5.0])
    save = saving.save_checkpoint

    def save_with_given_loss(manager, step, state, position, loss):
        save(manager, step, state, position, next(losses))

    monkeypatch.setattr(saving, "save_checkpoint", save_with_given_loss)
    w = tmp_path / "w"
    run()
    assert steps(w) == [4, 6, 8]
    embedding_of = {}
    for step in steps(w):
        convert(w, tmp_path / f"of{step}", "huggingface", None, False, step=str(step))
        embedding_of[step] = loading.load(tmp_path / f"of{step}").params["embed"]["embedding"]
    convert(w, tmp_path / "best", "huggingface", None, False, step="best")
    best = loading.load(tmp_path / "best").params["embed"]["embedding"]
    assert (best == embedding_of[4]).all() and not (best == embedding_of[8]).all()
    with pytest.raises(UserError, match="--step=5: must be last, best, or one of 4, 6, 8"):
        convert(w, tmp_path / "five", "huggingface", None, False, step="5")
    with pytest.raises(UserError, match="no training workdir"):
        convert(tmp_path / "best", tmp_path / "five", "orbax", None, False, step="best")
    losses = iter([4.0, 3.0, 2.0, 1.0])
    run(tmp_path / "falling")  # the best of those before the last two
    assert steps(tmp_path / "falling") == [4, 6, 8]
    losses = iter([3.0, 1.0, 4.0, 5.0])
    run(tmp_path / "none", keep_best=0, keep_last=1)
    assert steps(tmp_path / "none") == [8]


def test_a_second_start_does_not_read_the_base(run, tiny_model, source, tmp_path):
    run(steps=6)

    def read_base():
        raise AssertionError("the checkpoint has everything")

    train(config(), tiny_model.model, read_base, source, tiny_model.tokenizer, tmp_path / "w")
    assert steps(tmp_path / "w")[-1] == 8


# ---- damage ----------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_damaged_record_is_passed_over(run, tmp_path, capsys):
    """The position of the data iterator, or the loss that Orbax reads of every checkpoint."""
    uninterrupted, w = run(tmp_path / "uninterrupted"), tmp_path / "w"
    run(steps=6)
    record = w / "checkpoints" / "6" / "data" / "metadata"
    changed = re.sub(
        r'"example": (\d+)', lambda m: f'"example": {int(m.group(1)) ^ 1}', record.read_text()
    )
    assert changed != record.read_text()
    record.write_text(changed)
    (w / "checkpoints" / "4" / "metrics" / "metrics").write_text('{"loss": 1.2')
    assert_equal(run(), uninterrupted)
    err = capsys.readouterr().err
    assert "metadata is not what was written; step 4 is taken instead" in err
    assert "the loss cannot be read" in err


def test_a_damaged_converted_model_is_refused(tiny_model, tmp_path):
    source, w = tmp_path / "hf", tmp_path / "w"
    save_folder(source, tiny_model)
    convert(source, w, "orbax", None, False)
    assert_equal(loading.load(w).params, jax.device_get(tiny_model.params))
    damage(w, 0)
    message = "no checkpoint can be read, all seem damaged: .*checkpoints/0: "
    with pytest.raises(UserError, match=message):
        loading.load(w)


def test_a_failing_disk_is_not_taken_for_damage(run, tmp_path, monkeypatch):
    run(steps=6)

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(saving, "read_record", fail)
    with pytest.raises(OSError, match="Input/output error"):
        run()
    assert steps(tmp_path / "w") == [2, 4, 6] or steps(tmp_path / "w") == [4, 6]
    assert not (tmp_path / "w" / "damaged").exists()


def test_a_flipped_bit_is_noticed_or_changes_nothing(run, like, tmp_path):
    """One bit at a time, all over the largest file."""
    run()
    w = tmp_path / "w"
    saved, _ = saving.restore_checkpoint(w, 8, like)
    file = largest_file(w, 8)
    content, noticed = file.read_bytes(), 0
    for i in range(7, len(content), len(content) // 16):
        changed = bytearray(content)
        changed[i] ^= 1 << (i % 8)
        file.write_bytes(changed)
        try:
            restored, _ = saving.restore_checkpoint(w, 8, like)
        except Exception:
            noticed += 1
        else:  # the bit is between the arrays
            assert_equal(restored, saved)
    assert noticed > 8


@pytest.mark.slow
def test_a_damaged_file_is_damage_to_every_reader_or_to_none(run, like, tmp_path):
    """Each file of a checkpoint in turn. Training, answering and converting all pass the checkpoint
    over, or all read what was saved. Only training reads the optimizer's state: it may pass over a
    checkpoint that the others read."""
    run(steps=2)
    w, out = tmp_path / "w", tmp_path / "out"

    def read_converted():
        convert(w, out, "huggingface", None, False)
        return loading.load(out).params

    readers = (
        lambda: saving.restore_checkpoint(w, 2, like)[0]["params"],
        lambda: loading.load(w).params,
        read_converted,
    )
    saved = readers[0]()
    files = [p for p in (w / "checkpoints" / "2").rglob("*") if p.is_file() and p.name != "metrics"]
    assert {"_sharding", "_METADATA"} <= {p.name for p in files}
    for file in files:
        intact = file.read_bytes()
        truncated = intact[: len(intact) // 2]
        first_byte_changed = bytes([intact[0] ^ 1]) + intact[1:]
        all_bytes_changed = bytes(c ^ 4 for c in intact)
        for damaged in (truncated, first_byte_changed, all_bytes_changed):
            file.write_bytes(damaged)
            accepted = []
            for read in readers:
                try:
                    params = read()
                except Exception:
                    accepted.append(False)
                else:
                    assert_equal(params, saved)
                    accepted.append(True)
            shutil.rmtree(out, ignore_errors=True)
            assert accepted in ([True] * 3, [False] * 3, [False, True, True]), (file, accepted)
        file.write_bytes(intact)


def test_training_passes_over_a_damaged_checkpoint(run, tmp_path, capsys):
    uninterrupted, w = run(tmp_path / "uninterrupted"), tmp_path / "w"
    run(steps=6)
    damage(w, 6)
    resumed = run()  # from step 4
    err = capsys.readouterr().err
    assert "checkpoints/6: " in err and "step 4 is taken instead" in err
    assert (w / "damaged" / "6.0").is_dir() and steps(w)[-1] == 8
    assert_equal(resumed, uninterrupted)


def test_reading_a_model_passes_over_a_damaged_checkpoint(run, tmp_path, capsys):
    w = tmp_path / "w"
    last = run()
    assert_equal(loading.load(w).params, last)
    damage(w, 8)
    before = loading.load(w).params
    assert "step 6 is taken instead" in capsys.readouterr().err and steps(w)[-1] == 8
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(last), strict=True)
    assert any((a != b).any() for a, b in pairs)
    convert(w, tmp_path / "out", "huggingface", None, False)
    assert "step 6 is taken instead" in capsys.readouterr().err
    assert_equal(loading.load(tmp_path / "out").params, before)
    message = "no checkpoint can be read, all seem damaged: .*checkpoints/8: "
    with pytest.raises(UserError, match=message):
        convert(w, tmp_path / "8", "huggingface", None, False, step="8")
    assert not (tmp_path / "8").exists() and not list(tmp_path.glob(".8*"))
    for step in steps(w):
        if step != 8:
            damage(w, step)
    with pytest.raises(UserError, match="no checkpoint can be read, .*checkpoints/8: "):
        loading.load(w)
    with pytest.raises(UserError, match="all seem damaged"):
        run(steps=10)


def test_reading_a_model_does_not_read_the_optimizer_state(run, tmp_path, monkeypatch):
    run()
    read, trees = loading._read_tree, []

    def record_tree(*args):
        trees.append(read(*args))
        return trees[-1]

    monkeypatch.setattr(loading, "_read_tree", record_tree)
    loading.load(tmp_path / "w")
    assert [set(tree) for tree in trees] == [{"params"}]


# ---- errors ----------------------------------------------------------------------------------
@pytest.mark.parametrize("package, logged", [("orbax", False), ("mine", True)])
def test_only_failed_tasks_of_others_are_logged(package, logged, caplog):
    """Whether asyncio logs a task of Orbax that failed, and nobody awaited, depends on timing. Here
    such a task fails for certain, and one of another package as well."""
    namespace = {}
    code = "async def write(): raise ValueError('File too large')"
    file = f"{os.sep}packages{os.sep}{package}{os.sep}serialization.py"
    exec(compile(code, file, "exec"), namespace)

    async def forget_a_task():
        task = asyncio.ensure_future(namespace["write"]())
        await asyncio.sleep(0)
        assert task.done()

    orbax_errors.silence_secondary_errors()
    asyncio.run(forget_a_task())
    gc.collect()
    assert ("Task exception was never retrieved" in caplog.text) == logged


def test_what_nobody_awaited_after_a_failed_write_is_silent(caplog, recwarn, monkeypatch):
    """Futures of tensorstore fail without a traceback; some coroutines of Orbax never run."""

    async def forget_a_future():
        asyncio.get_running_loop().create_future().set_exception(ValueError("File too large"))

    async def never_run():
        pass

    monkeypatch.setattr(logging.getLogger("asyncio"), "filters", [])
    asyncio.run(forget_a_future())
    gc.collect()
    assert "Future exception was never retrieved" in caplog.text
    caplog.clear()
    with warnings.catch_warnings():
        orbax_errors.silence_secondary_errors()
        asyncio.run(forget_a_future())
        never_run()
        gc.collect()
    assert not caplog.text and not recwarn.list


def test_a_full_disk_ends_the_log_with_an_error(tmp_path, monkeypatch):
    """tensorboardX's own writer would wait forever."""
    from selfrag_jax.training.log import TrainingLog

    log = TrainingLog(tmp_path)

    def add():
        sums = {"loss": np.ones(5), "correct": np.ones(5), "count": np.ones(5)}
        log.add(sums | {"gradient_norm": 1.0}, 8)

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


@pytest.mark.slow
def test_a_full_disk_is_one_error_and_the_same_command_continues(tmp_path):
    """Files may have at most 0.6 MB; the embedding alone, which no checkpoint divides, has 0.8."""
    write_jsonl(tmp_path / "data.jsonl", examples(40))
    command = [sys.executable, "-m", "selfrag_jax", "train", "--role=generator"]
    command += [f"--data={tmp_path}/data.jsonl", f"--workdir={tmp_path}/w", "--config=tiny:smoke"]
    limited = ["bash", "-c", 'ulimit -f 586 && exec "$@"', "bash", *command]  # KiB
    # A cache of its own, to which no killed process has written half a program.
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    full = subprocess.run(limited, capture_output=True, text=True, env=env)
    assert full.returncode == 1, full.stderr
    assert "a checkpoint could not be written (File too large)" in full.stderr.splitlines()[-1]
    assert "Traceback" not in full.stderr and "Error" not in full.stderr
    assert steps(tmp_path / "w") == []
    with locks.exclusive_workdir(tmp_path / "w"):  # like a process that has not quite ended
        other = subprocess.run(command, capture_output=True, text=True, env=env)
    assert other.returncode == 2 and "another process is writing it" in other.stderr, other.stderr
    again = subprocess.run(command, capture_output=True, text=True, env=env)
    assert again.returncode == 0 and steps(tmp_path / "w")[-1] == 6, again.stderr
