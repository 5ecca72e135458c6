"""The trainer: it learns, it resumes to bit-identical parameters, and a loss that is not finite stops it."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfrag_jax import config as configs
from selfrag_jax.data.generator import GeneratorSource
from selfrag_jax.models import checkpoints
from selfrag_jax.records import BadInput, GeneratorExample, write_jsonl
from selfrag_jax.training import optimizer
from selfrag_jax.training import train as trainer
from selfrag_jax.training.optimizer import OptimizerConfig, schedule
from selfrag_jax.training.stage import starting_model, train_stage
from selfrag_jax.training.train import MeshConfig, TrainConfig, train

WEIGHTS = {"retrieve": 1.0, "isrel": 1.0, "issup": 1.0, "isuse": 1.0}


def config(steps=12, rate=0.01, name="muon", eps=1e-8, **changes):
    learner = OptimizerConfig(name, rate, 0.01, "linear", 0.1, eps, 0.0, 1.0, 4.0)
    fields = dict(seed=0, steps=steps, rows=2, length=32, max_targets=48, save_every=4, log_every=4)
    return TrainConfig(**(fields | changes), optimizer=learner, mesh=MeshConfig(1, 1, 1))


@pytest.fixture(scope="module")
def source(tokenizer):
    rows = [GeneratorExample(str(i), f"Say {i}.", f"[No Retrieval]Number {i}.[Utility:5]") for i in range(12)]
    return GeneratorSource(rows, tokenizer, WEIGHTS)


def run(tiny_model, source, workdir, **kwargs):
    return train(config(**kwargs), tiny_model.model, tiny_model.params, source, tiny_model.tokenizer, workdir)


def test_reflection_tokens_start_as_the_words_of_the_config():
    c = configs.load("tiny")
    start, new = starting_model(c)
    table, tokenizer = np.asarray(start.params["embed"]["embedding"]), start.tokenizer
    assert new == 13 and table.shape[0] == tokenizer.vocab_size  # all reflection tokens; the base has the markup
    for token, word in c.new_rows:
        np.testing.assert_array_equal(table[tokenizer.id(token)], table[tokenizer.encode(word)[0]])
    np.testing.assert_allclose(table[tokenizer.id("[Retrieval]")], table[:-new].mean(0), atol=1e-6)
    c.new_rows = (("[Relevent]", "yes"),)
    with pytest.raises(BadInput, match=r"new_rows: '\[Relevent\]' is no reflection token"):
        starting_model(c)


@pytest.mark.parametrize("name", ("muon", "adamw"))
def test_new_rows_move_faster(name):
    """Adam's first step has the size of the rate, whatever the gradient."""
    params = {"embed": {"embedding": jnp.ones((6, 3))}, "head": {"kernel": jnp.ones((3, 6))}, "norm": {"scale": jnp.ones(3)}}
    learner = OptimizerConfig(name, 0.01, 0.01, "constant", 0.0, 1e-8, 0.0, 100.0, new_rows_factor=4.0)
    tx = optimizer.make(learner, 10, 2)
    state = tx.init(params)
    _, state = tx.update(params, state, params)  # the warm-up's first step has rate 0
    updates, _ = tx.update(params, state, params)
    norm = -float(updates["norm"]["scale"][0])
    expected = np.array([1, 1, 1, 1, 4, 4]) * -norm
    assert norm > 0.005
    np.testing.assert_allclose(updates["embed"]["embedding"][:, 0], expected, rtol=1e-5)
    np.testing.assert_allclose(updates["head"]["kernel"][0], expected, rtol=1e-5)


def test_other_new_rows_are_another_training(tmp_path):
    data = [GeneratorExample(str(i), f"Say {i}.", f"[No Retrieval]Number {i}.[Utility:5]") for i in range(12)]
    write_jsonl(tmp_path / "data.jsonl", data)
    c = configs.load("tiny:smoke")
    c.generator.steps = 1
    train_stage(c, "generator", tmp_path / "data.jsonl", tmp_path / "w", "generator")
    c.new_rows = c.new_rows[:-1]
    with pytest.raises(BadInput, match="new_rows"):
        train_stage(c, "generator", tmp_path / "data.jsonl", tmp_path / "w", "generator")
    with c.unlocked():
        del c.new_rows
    with pytest.raises(BadInput, match="lacks new_rows"):
        train_stage(c, "generator", tmp_path / "data.jsonl", tmp_path / "v", "generator")


def test_bad_data_leaves_nothing_behind(tmp_path):
    """A second try with the right data must not meet the first one's workdir."""
    c = configs.load("tiny:smoke")
    row = dict(instruction="Say 1.", output="[Relevant]", task="isrel", preceding="", segment="")
    write_jsonl(tmp_path / "critic.jsonl", [row])
    with pytest.raises(BadInput, match=r"critic.jsonl:1: field 'task': this is critic data"):
        train_stage(c, "generator", tmp_path / "critic.jsonl", tmp_path / "w", "generator")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(BadInput, match="holds no rows"):
        train_stage(c, "critic", tmp_path / "empty.jsonl", tmp_path / "w", "critic")
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("field", ("adam_eps", "new_rows_factor"))
def test_a_rate_of_zero_is_refused(field):
    fields = dict(zip(OptimizerConfig.__dataclass_fields__, ("muon", 0.1, 0.1, "linear", 0, 1e-8, 0, 1, 1.0), strict=True))
    with pytest.raises(BadInput, match=f"optimizer.{field}=0"):
        OptimizerConfig(**fields | {field: 0})


@pytest.mark.parametrize("name", ("muon", "adamw"))
def test_adam_eps_keeps_words_still_that_no_batch_holds(tiny_model, source, tmp_path, name):
    """Adam moves every row of a tied embedding at full rate, whatever the size of its gradient; `adam_eps` stops that."""
    start = np.asarray(tiny_model.params["embed"]["embedding"])
    batch = trainer.Packer(source, 2, 32, 48, 0).next()
    moved = {}
    for eps in (1e-8, 1e-2):
        params = run(tiny_model, source, tmp_path / f"{eps}", name=name, eps=eps)["params"]
        moved[eps] = np.abs(np.asarray(params["embed"]["embedding"]) - start).max(1)
    unused = np.setdiff1d(np.arange(len(start)), np.concatenate([source.example(i).tokens for i in range(source.size)]))
    used = np.setdiff1d(batch.targets, unused)
    assert np.median(moved[1e-8][unused]) > 0.01
    assert np.median(moved[1e-2][unused]) < 0.1 * np.median(moved[1e-2][used])


def test_interrupted_training_ends_with_the_same_parameters(tiny_model, source, tmp_path, monkeypatch):
    whole = run(tiny_model, source, tmp_path / "whole")["params"]

    calls, step = [], trainer.train_step

    def dies(*args):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(trainer, "train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model, source, tmp_path / "parts")
    monkeypatch.setattr(trainer, "train_step", step)
    parts = run(tiny_model, source, tmp_path / "parts")["params"]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(whole), jax.device_get(parts))
    loaded = checkpoints.load(tmp_path / "parts")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, jax.device_get(parts))


def test_sigterm_saves_a_checkpoint_and_the_next_run_goes_on(tiny_model, source, tmp_path, monkeypatch):
    whole = run(tiny_model, source, tmp_path / "whole")["params"]
    before, calls, step = signal.getsignal(signal.SIGTERM), [], trainer.train_step

    def told_to_stop(*args):
        calls.append(1)
        if len(calls) == 6:  # between the checkpoints of steps 4 and 8
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)

    monkeypatch.setattr(trainer, "train_step", told_to_stop)
    with pytest.raises(SystemExit) as leaving:
        run(tiny_model, source, tmp_path / "parts")
    assert leaving.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
    with checkpoints.manager(tmp_path / "parts") as saved:
        assert saved.latest_step() == 6
    calls.append(1)
    parts = run(tiny_model, source, tmp_path / "parts")["params"]
    assert len(calls) == 13  # the six steps that were left
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(whole), jax.device_get(parts))


def test_training_lowers_the_loss(tiny_model, source, tmp_path):
    from selfrag_jax.data.batches import Packer

    after = run(tiny_model, source, tmp_path, steps=40, rate=0.02)["params"]
    batch = trainer._arrays(Packer(source, 2, 32, 48, seed=9).next())
    before_loss = trainer.loss_fn(tiny_model.params, tiny_model.model, batch)[0]
    after_loss = trainer.loss_fn(after, tiny_model.model, batch)[0]
    assert after_loss < 0.6 * before_loss


def test_a_loss_that_is_not_finite_stops_and_names_the_step(tiny_model, source, tmp_path):
    broken = jax.tree.map(lambda x: x * np.nan, tiny_model.params)
    with pytest.raises(FloatingPointError, match="step 0 is nan"):
        train(config(), tiny_model.model, broken, source, tiny_model.tokenizer, tmp_path)


def test_schedule_warms_up_and_decays():
    rate = schedule("linear", 2e-5, 0.1, 100)
    assert float(rate(0)) == 0.0 and float(rate(10)) == pytest.approx(2e-5) and float(rate(100)) == pytest.approx(0.0)


def test_configs_that_cannot_run_are_refused():
    with pytest.raises(BadInput, match="optimizer.name"):
        config(name="sgdd")
    with pytest.raises(BadInput, match="not divisible"):
        TrainConfig(**(vars(config()) | {"mesh": MeshConfig(2, 2, 1), "rows": 6}))
