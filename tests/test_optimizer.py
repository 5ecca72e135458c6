"""Optimizers and learning-rate schedules, against optax, transformers and hand-made values."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from selfrag_jax import config
from selfrag_jax.errors import UserError
from selfrag_jax.training import optimizer
from selfrag_jax.training.config import TrainConfig
from selfrag_jax.training.optimizer import OptimizerConfig, schedule


@pytest.mark.parametrize("name", ("muon", "adamw"))
def test_new_rows_move_faster(name):
    """Adam's first step has the size of the rate, for any gradient."""
    params = {
        "embed": {"embedding": jnp.ones((6, 3))},
        "head": {"kernel": jnp.ones((3, 6))},
        "norm": {"scale": jnp.ones(3)},
    }
    c = OptimizerConfig(name, 0.01, 0.01, "constant", 0.0, 1e-8, 0.0, 100.0, new_rows_factor=4.0)
    tx = optimizer.make_optimizer(c, 10, 2)
    state = tx.init(params)
    _, state = tx.update(params, state, params)  # the warm-up's first step has rate 0
    updates, _ = tx.update(params, state, params)
    norm = -float(updates["norm"]["scale"][0])
    expected = np.array([1, 1, 1, 1, 4, 4]) * -norm
    assert norm > 0.005
    np.testing.assert_allclose(updates["embed"]["embedding"][:, 0], expected, rtol=1e-5)
    np.testing.assert_allclose(updates["head"]["kernel"][0], expected, rtol=1e-5)


@pytest.mark.parametrize("name", ("muon", "adamw", "adafactor"))
def test_rows_of_the_base_may_rest(name):
    """With any optimizer, and in spite of weight decay, their updates are 0; the others learn."""
    params = {"embed": {"w": jnp.ones((6, 3))}, "norm": {"w": jnp.ones(3)}}
    c = OptimizerConfig(name, 0.01, 0.01, "constant", 0.0, 1e-8, 0.1, 1.0, old_rows_factor=0.0)
    tx = optimizer.make_optimizer(c, 10, 2, 1)  # three old rows, two new ones, one of padding
    updates, _ = tx.update(params, tx.init(params), params)
    assert not updates["embed"]["w"][:3].any() and updates["embed"]["w"][3:].all()
    tx = optimizer.make_optimizer(c, 10)  # the base had the reflection tokens
    updates, _ = tx.update(params, tx.init(params), params)
    assert not updates["embed"]["w"].any() and updates["norm"]["w"].all()
    with pytest.raises(UserError, match="optimizer.old_rows_factor=-1: must be 0 or above"):
        replace(c, old_rows_factor=-1)


def test_the_default_rate_of_old_rows_is_no_field_of_manifests():
    c = config.load("small")
    section = config.build(TrainConfig, c.generator, "generator")
    assert "old_rows_factor" not in section.manifest_fields()["optimizer"]
    section = replace(section, optimizer=replace(section.optimizer, old_rows_factor=0.0))
    assert section.manifest_fields()["optimizer"]["old_rows_factor"] == 0.0


@pytest.mark.parametrize("name", ("muon", "adamw", "adafactor"))
def test_the_embedding_has_a_rate_of_its_own(name):
    """As if the other parameters were trained with one rate, and the embedding with another."""
    rng = np.random.default_rng(0)
    shapes = {"embed": (8, 3), "head": (3, 8), "layers": (2, 3, 4), "norm": (3,)}
    params = {k: {"w": jnp.asarray(rng.normal(size=s), jnp.float32)} for k, s in shapes.items()}
    c = OptimizerConfig(name, 0.01, 0.02, "linear", 0.1, 1e-8, 0.1, 1.0, new_rows_factor=10.0)
    slow = replace(c, embedding_learning_rate=0.002)

    def updates(config):
        tx, found = optimizer.make_optimizer(config, 10, 2, 1), []
        state, update = tx.init(params), jax.jit(tx.update)
        for i in range(2):  # the first one has a rate of 0
            gradients = jax.tree.map(lambda x, i=i: jnp.sin(x + i), params)
            new, state = update(gradients, state, params)
            found.append(new)
        return found[-1]

    fast, slowed = updates(c), updates(slow)
    factor = 0.002 / (0.02 if name == "muon" else 0.01)
    for key in shapes:
        expected = fast[key]["w"] * (factor if key in ("embed", "head") else 1.0)
        np.testing.assert_allclose(slowed[key]["w"], expected, rtol=1e-5, atol=1e-9)
    alone = updates(replace(c, learning_rate=0.002, adam_learning_rate=0.002))
    np.testing.assert_allclose(slowed["embed"]["w"], alone["embed"]["w"], rtol=1e-4, atol=1e-9)
    assert float(jnp.abs(slowed["embed"]["w"]).max()) > 1e-4


def test_a_training_without_a_rate_for_the_embedding_is_known_as_before():
    c = config.override(
        config.load("lora_7b"), ["generator.optimizer.embedding_learning_rate=1e-5"]
    )
    section = config.build(TrainConfig, c.generator, "generator")
    assert section.optimizer.embedding_factor == pytest.approx(0.05)
    c = config.load("lora_7b")
    fields = config.build(TrainConfig, c.generator, "generator").manifest_fields()
    assert "embedding_learning_rate" not in fields["optimizer"]
    c = config.load("generator_7b")
    fields = config.build(TrainConfig, c.generator, "generator").manifest_fields()
    assert set(fields["optimizer"]) == {*c.generator.optimizer, "new_rows_factor"}
    with c.unlocked():
        c.generator.optimizer.embedding_learning_rate = 1e-5
    fields = config.build(TrainConfig, c.generator, "generator").manifest_fields()
    assert fields["optimizer"]["embedding_learning_rate"] == 1e-5


@pytest.mark.parametrize("size", (0.0, 0.3, 30.0))
def test_clipping_equals_that_of_optax(size):
    """Below the limit nothing changes; above it the norm becomes the limit."""
    grads = {"a": jnp.full((3, 4), size), "b": jnp.full(5, -size, jnp.bfloat16)}
    expected = optax.clip_by_global_norm(2.0).update(grads, optax.EmptyState())[0]
    found = optimizer._clip_by_global_norm(2.0).update(grads, optax.EmptyState())[0]
    for name in grads:
        a, b = found[name], expected[name]
        assert a.dtype == grads[name].dtype
        np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), rtol=1e-2)
    np.testing.assert_allclose(found["a"], expected["a"], rtol=1e-6)
    assert size < 1 or optax.tree.norm(found) == pytest.approx(2.0, rel=1e-2)


@pytest.mark.parametrize("field", ("adam_eps", "new_rows_factor", "embedding_learning_rate"))
def test_a_rate_of_zero_is_refused(field):
    c = OptimizerConfig("muon", 0.1, 0.1, "linear", 0, 1e-8, 0, 1, 1.0)
    with pytest.raises(UserError, match=f"optimizer.{field}=0"):
        replace(c, **{field: 0})


@pytest.mark.parametrize("name", ("adamw", "adafactor"))
def test_weight_decay_is_scaled_by_the_rate(name):
    c = OptimizerConfig(name, 0.01, 0.01, "constant", 0.0, 1e-8, 0.1, 1.0)
    params = {"w": jnp.ones((4, 4))}
    tx = optimizer.make_optimizer(c, 60)
    state, zero = tx.init(params), {"w": jnp.zeros((4, 4))}
    for _ in range(50):
        updates, state = tx.update(zero, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    np.testing.assert_allclose(params["w"], (1 - 0.01 * 0.1) ** 50, atol=1e-5)


def test_adafactor_treats_each_layer_as_optax_does():
    """With its clipping, after a gradient a hundred times the others."""
    c = OptimizerConfig("adafactor", 0.01, 0.01, "constant", 0.0, 1e-8, 0.0, 1e9, 1.0)
    tx = optimizer.make_optimizer(c, 60)
    theirs = optax.adafactor(0.01, multiply_by_parameter_scale=False)
    rng = np.random.default_rng(0)
    layers = [{"head": jnp.asarray(rng.normal(size=(256, 160)), jnp.float32)} for _ in range(2)]
    ours = {"layers": jnp.stack([x["head"] for x in layers]), "head": layers[0]["head"]}
    state, their_states = tx.init(ours), [theirs.init(x) for x in layers]
    for step in range(6):
        scale = np.array([100.0 if step == 4 else 1.0, 1.0])
        gradients = [
            {"head": jnp.asarray(rng.normal(size=(256, 160)) * s, jnp.float32)} for s in scale
        ]
        stack = jnp.stack([g["head"] for g in gradients])
        got, state = tx.update({"layers": stack, "head": gradients[0]["head"]}, state, ours)
        for i, g in enumerate(gradients):
            expected, their_states[i] = theirs.update(g, their_states[i], layers[i])
            np.testing.assert_allclose(got["layers"][i], expected["head"], rtol=1e-4)
            if i == 0:
                np.testing.assert_allclose(got["head"], expected["head"], rtol=1e-4)


def test_schedule_warms_up_and_decays():
    rate = schedule("linear", 2e-5, 0.1, 100)
    assert float(rate(0)) == 0.0
    assert float(rate(10)) == pytest.approx(2e-5)
    assert float(rate(100)) == pytest.approx(0.0)
    without_warmup, only_step = schedule("linear", 2e-5, 0.0, 100), schedule("linear", 2e-5, 0.1, 1)
    assert float(without_warmup(0)) == pytest.approx(2e-5)
    assert float(only_step(0)) == pytest.approx(2e-5)


@pytest.mark.parametrize("name", ("linear", "cosine"))
def test_schedules_equal_those_of_transformers(name):
    """The released generator (linear) and critic (cosine) were trained with them."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-5)
    theirs, ours = transformers.get_scheduler(name, sgd, 3, 100), schedule(name, 2e-5, 0.03, 100)
    for step in range(100):
        assert float(ours(step)) == pytest.approx(theirs.get_last_lr()[0], rel=1e-5, abs=1e-12)
        sgd.step()
        theirs.step()
