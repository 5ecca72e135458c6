"""The trainer: it learns, it resumes to bit-identical parameters, and a loss that is not finite stops it."""

import json
import os
import re
import signal

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh

from selfrag_jax import artifacts, cli
from selfrag_jax import config as configs
from selfrag_jax.checkpoints import loading, saving, workdirs
from selfrag_jax.commands.train import train_model
from selfrag_jax.data.generator_examples import GeneratorSource
from selfrag_jax.errors import UserError
from selfrag_jax.records import GeneratorExample, write_jsonl
from selfrag_jax.training import optimizer
from selfrag_jax.training import train as trainer
from selfrag_jax.training.config import MeshConfig, TrainConfig
from selfrag_jax.training.loss import gradients, loss_fn
from selfrag_jax.training.optimizer import OptimizerConfig, schedule
from selfrag_jax.training.starting_model import starting_model
from selfrag_jax.training.step import batch_arrays, batch_on_mesh, train_step
from selfrag_jax.training.train import train

WEIGHTS = {"retrieve": 1.0, "isrel": 1.0, "issup": 1.0, "isuse": 1.0}


def config(steps=12, rate=0.01, name="muon", eps=1e-8, **changes):
    learner = OptimizerConfig(name, rate, 0.01, "linear", 0.1, eps, 0.0, 1.0, 4.0)
    fields = dict(seed=0, steps=steps, rows=2, length=32, max_targets=48, save_every=4, log_every=4)
    return TrainConfig(**(fields | changes), optimizer=learner, mesh=MeshConfig(1, 1, 1))


@pytest.fixture(scope="module")
def source(tokenizer):
    rows = [
        GeneratorExample(str(i), f"Say {i}.", f"[No Retrieval]Number {i}.[Utility:5]")
        for i in range(12)
    ]
    return GeneratorSource(rows, tokenizer, WEIGHTS)


def run(tiny_model, source, workdir, **kwargs):
    return train(
        config(**kwargs), tiny_model.model, tiny_model.params, source, tiny_model.tokenizer, workdir
    )


def test_reflection_tokens_start_as_the_words_of_the_config():
    c = configs.load("tiny")
    start, new = starting_model(c)
    table, tokenizer = np.asarray(start.params["embed"]["embedding"]), start.tokenizer
    assert (
        new == 13 and table.shape[0] == tokenizer.vocab_size
    )  # all reflection tokens; the base has the markup
    for token, word in c.new_rows:
        np.testing.assert_array_equal(table[tokenizer.id(token)], table[tokenizer.encode(word)[0]])
    np.testing.assert_allclose(table[tokenizer.id("[Retrieval]")], table[:-new].mean(0), atol=1e-6)
    c.new_rows = (("[Relevent]", "yes"),)
    with pytest.raises(UserError, match=r"new_rows: '\[Relevent\]' is no reflection token"):
        starting_model(c)


@pytest.mark.parametrize("name", ("muon", "adamw"))
def test_new_rows_move_faster(name):
    """Adam's first step has the size of the rate, whatever the gradient."""
    params = {
        "embed": {"embedding": jnp.ones((6, 3))},
        "head": {"kernel": jnp.ones((3, 6))},
        "norm": {"scale": jnp.ones(3)},
    }
    learner = OptimizerConfig(
        name, 0.01, 0.01, "constant", 0.0, 1e-8, 0.0, 100.0, new_rows_factor=4.0
    )
    tx = optimizer.make_optimizer(learner, 10, 2)
    state = tx.init(params)
    _, state = tx.update(params, state, params)  # the warm-up's first step has rate 0
    updates, _ = tx.update(params, state, params)
    norm = -float(updates["norm"]["scale"][0])
    expected = np.array([1, 1, 1, 1, 4, 4]) * -norm
    assert norm > 0.005
    np.testing.assert_allclose(updates["embed"]["embedding"][:, 0], expected, rtol=1e-5)
    np.testing.assert_allclose(updates["head"]["kernel"][0], expected, rtol=1e-5)


@pytest.mark.parametrize("size", (0.0, 0.3, 30.0))
def test_gradients_are_clipped_as_by_optax(size):
    """Below the limit nothing changes, above it the norm is the limit."""
    grads = {"a": jnp.full((3, 4), size), "b": jnp.full(5, -size, jnp.bfloat16)}
    expected = optax.clip_by_global_norm(2.0).update(grads, optax.EmptyState())[0]
    found = optimizer._clip(2.0).update(grads, optax.EmptyState())[0]
    assert jax.tree.map(lambda x: x.dtype, found) == jax.tree.map(lambda x: x.dtype, grads)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a.astype(np.float32), b.astype(np.float32), rtol=1e-2
        ),
        found,
        expected,
    )
    np.testing.assert_allclose(found["a"], expected["a"], rtol=1e-6)
    assert size < 1 or optax.tree.norm(found) == pytest.approx(2.0, rel=1e-2)


def test_other_new_rows_are_another_training(tmp_path):
    data = [
        GeneratorExample(str(i), f"Say {i}.", f"[No Retrieval]Number {i}.[Utility:5]")
        for i in range(12)
    ]
    write_jsonl(tmp_path / "data.jsonl", data)
    c = configs.load("tiny:smoke")
    c.generator.steps = 1
    train_model(c, "generator", tmp_path / "data.jsonl", tmp_path / "w", "generator")
    c.new_rows = c.new_rows[:-1]
    with pytest.raises(UserError, match="new_rows"):
        train_model(c, "generator", tmp_path / "data.jsonl", tmp_path / "w", "generator")
    with c.unlocked():
        del c.new_rows
    with pytest.raises(UserError, match="lacks new_rows"):
        train_model(c, "generator", tmp_path / "data.jsonl", tmp_path / "v", "generator")


def test_other_weights_from_scratch_are_another_training(tmp_path):
    data = [
        GeneratorExample(str(i), f"Say {i}.", f"[No Retrieval]Number {i}.[Utility:5]")
        for i in range(12)
    ]
    write_jsonl(tmp_path / "data.jsonl", data)
    c = configs.load("tiny:smoke")
    c.base, c.generator.steps = "scratch", 1
    train_model(c, "generator", tmp_path / "data.jsonl", tmp_path / "w", "generator")
    c.seed += 1  # of the weights
    with pytest.raises(UserError, match="scratch.seed: 0 there, 1 asked for"):
        train_model(c, "generator", tmp_path / "data.jsonl", tmp_path / "w", "generator")


def test_a_workdir_in_use_is_not_claimed(tmp_path):
    """Two processes begin at the same moment: the second changes nothing, not even what the workdir says it was begun with."""
    write_jsonl(
        tmp_path / "data.jsonl",
        [GeneratorExample("0", "Say 0.", "[No Retrieval]Number 0.[Utility:5]")],
    )
    with (
        artifacts.exclusive_workdir(tmp_path / "w"),
        pytest.raises(UserError, match="w: another process is writing it"),
    ):
        train_model(
            configs.load("tiny:smoke"),
            "generator",
            tmp_path / "data.jsonl",
            tmp_path / "w",
            "generator",
        )
    assert [p.name for p in (tmp_path / "w").iterdir()] == [artifacts.LOCK]


def test_bad_data_leaves_nothing_behind(tmp_path):
    """A second try with the right data must not meet the first one's workdir."""
    c = configs.load("tiny:smoke")
    row = dict(instruction="Say 1.", output="[Relevant]", task="isrel", preceding="", segment="")
    write_jsonl(tmp_path / "critic.jsonl", [row])
    with pytest.raises(UserError, match=r"critic.jsonl:1: field 'task': this is critic data"):
        train_model(c, "generator", tmp_path / "critic.jsonl", tmp_path / "w", "generator")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no rows"):
        train_model(c, "critic", tmp_path / "empty.jsonl", tmp_path / "w", "critic")
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("field", ("adam_eps", "new_rows_factor"))
def test_a_rate_of_zero_is_refused(field):
    fields = dict(
        zip(
            OptimizerConfig.__dataclass_fields__,
            ("muon", 0.1, 0.1, "linear", 0, 1e-8, 0, 1, 1.0),
            strict=True,
        )
    )
    with pytest.raises(UserError, match=f"optimizer.{field}=0"):
        OptimizerConfig(**fields | {field: 0})


@pytest.mark.slow
@pytest.mark.parametrize("name", ("muon", "adamw"))
def test_adam_eps_keeps_words_still_that_no_batch_holds(tiny_model, source, tmp_path, name):
    """Adam moves every row of a tied embedding at full rate, whatever the size of its gradient; `adam_eps` stops that."""
    start = np.asarray(tiny_model.params["embed"]["embedding"])
    batch = trainer.Packer(source, 2, 32, 48, 0).next()
    moved = {}
    for eps in (1e-8, 1e-2):
        params = run(tiny_model, source, tmp_path / f"{eps}", name=name, eps=eps)["params"]
        moved[eps] = np.abs(np.asarray(params["embed"]["embedding"]) - start).max(1)
    unused = np.setdiff1d(
        np.arange(len(start)),
        np.concatenate([source.example(i).tokens for i in range(source.size)]),
    )
    used = np.setdiff1d(batch.targets, unused)
    assert np.median(moved[1e-8][unused]) > 0.01
    assert np.median(moved[1e-2][unused]) < 0.1 * np.median(moved[1e-2][used])


def test_interrupted_training_ends_with_the_same_parameters(
    tiny_model, source, tmp_path, monkeypatch
):
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
    loaded = loading.load(tmp_path / "parts")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, jax.device_get(parts))


def test_sigterm_saves_a_checkpoint_and_the_next_run_goes_on(
    tiny_model, source, tmp_path, monkeypatch
):
    whole = run(tiny_model, source, tmp_path / "whole")["params"]
    before, calls, step = signal.getsignal(signal.SIGTERM), [], train_step

    def told_to_stop(*args):
        calls.append(1)
        if len(calls) == 6:  # between the checkpoints of steps 4 and 8
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)

    monkeypatch.setattr(trainer, "train_step", told_to_stop)
    with pytest.raises(SystemExit) as leaving:
        run(tiny_model, source, tmp_path / "parts")
    assert leaving.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
    with saving.checkpoint_manager(tmp_path / "parts", 2, 1) as saved:
        assert saved.latest_step() == 6
    losses = lambda w: {
        int(f.parts[-3]): json.loads(f.read_text())["loss"]
        for f in w.glob("checkpoints/*/metrics/metrics")
    }  # noqa: E731
    assert losses(tmp_path / "parts")[6] == workdirs.NO_LOSS  # that of two steps would say little
    calls.append(1)
    parts = run(tiny_model, source, tmp_path / "parts")["params"]
    assert len(calls) == 13  # the six steps that were left
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(whole), jax.device_get(parts))
    assert losses(tmp_path / "parts")[8] == losses(tmp_path / "whole")[8]  # of the whole interval


def test_training_lowers_the_loss(tiny_model, source, tmp_path):
    from selfrag_jax.data.batches import Packer

    after = run(tiny_model, source, tmp_path, steps=40, rate=0.02)["params"]
    batch = batch_arrays(Packer(source, 2, 32, 48, seed=9).next())
    before_loss = loss_fn(tiny_model.params, tiny_model.model, batch)[0]
    after_loss = loss_fn(after, tiny_model.model, batch)[0]
    assert after_loss < 0.6 * before_loss


def test_a_loss_that_is_not_finite_stops_and_names_the_step(tiny_model, source, tmp_path):
    broken = jax.tree.map(lambda x: x * np.nan, tiny_model.params)
    packer = trainer.Packer(source, 2, 32, 48, seed=0)
    packer.next()
    rows = ", ".join(map(str, packer.rows_of(0, packer.state)))
    with pytest.raises(
        FloatingPointError,
        match=f"step 0 is nan; its batch holds the rows {rows} of the data, counted from 0",
    ):
        train(config(), tiny_model.model, broken, source, tiny_model.tokenizer, tmp_path)


@pytest.mark.slow
def test_a_command_whose_loss_is_not_finite_fails_in_one_line(tmp_path, capsys):
    """The rate is so high that the second step spoils everything; the first one's checkpoint stays."""
    rows = [
        GeneratorExample(str(i), f"Say {i}.", f"[No Retrieval]Number {i}.[Utility:5]")
        for i in range(40)
    ]
    write_jsonl(tmp_path / "data.jsonl", rows)
    command = [
        "train",
        "--role=generator",
        f"--data={tmp_path}/data.jsonl",
        f"--workdir={tmp_path}/w",
        "--config=tiny:smoke",
    ]
    command += [
        f"--config.generator.optimizer.{name}=1e38"
        for name in ("learning_rate", "adam_learning_rate")
    ]
    assert (
        cli.main(
            [
                *command,
                "--config.generator.save_every=1",
                "--config.generator.optimizer.warmup_fraction=0.5",
            ]
        )
        == 1
    )
    [said] = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("selfrag train: ")
    ]
    step = int(
        re.search(r"of step (\d+) is (?:nan|inf); its batch holds the rows \d+", said).group(1)
    )
    saved = workdirs.saved_steps(tmp_path / "w")
    assert saved and saved[-1] <= step and loading.load(tmp_path / "w") is not None


def test_a_gradient_that_is_not_finite_is_never_saved(tiny_model, source, tmp_path, monkeypatch):
    """The loss of such a step is finite; its update would spoil the parameters and the next checkpoint."""
    step, calls = train_step, []

    def spoiled(*args):
        state, seen = step(*args)
        calls.append(1)
        return state, seen | ({"gradient_norm": jnp.inf} if len(calls) == 3 else {})

    monkeypatch.setattr(trainer, "train_step", spoiled)
    with pytest.raises(FloatingPointError, match="gradient norm of step 2 is inf"):
        run(tiny_model, source, tmp_path, save_every=1)
    with saving.checkpoint_manager(tmp_path, 2, 1) as saved:
        assert saved.latest_step() == 2  # two whole steps


@pytest.mark.parametrize("name", ("adamw", "adafactor"))
def test_weight_decay_goes_with_the_rate(name):
    learner = OptimizerConfig(name, 0.01, 0.01, "constant", 0.0, 1e-8, 0.1, 1.0)
    params = {"w": jnp.ones((4, 4))}
    tx = optimizer.make_optimizer(learner, 60)
    state, zero = tx.init(params), {"w": jnp.zeros((4, 4))}
    for _ in range(50):
        updates, state = tx.update(zero, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    np.testing.assert_allclose(params["w"], (1 - 0.01 * 0.1) ** 50, atol=1e-5)


def test_adafactor_is_that_of_optax_but_for_stacks():
    """With its clipping, after a gradient a hundred times the others: of a stack, each layer by itself."""
    tx = optimizer.make_optimizer(
        OptimizerConfig("adafactor", 0.01, 0.01, "constant", 0.0, 1e-8, 0.0, 1e9, 1.0), 60
    )
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
        got, state = tx.update(
            {"layers": jnp.stack([g["head"] for g in gradients]), "head": gradients[0]["head"]},
            state,
            ours,
        )
        for i, g in enumerate(gradients):
            expected, their_states[i] = theirs.update(g, their_states[i], layers[i])
            np.testing.assert_allclose(got["layers"][i], expected["head"], rtol=1e-4)
            if i == 0:
                np.testing.assert_allclose(got["head"], expected["head"], rtol=1e-4)


def test_schedule_warms_up_and_decays():
    rate = schedule("linear", 2e-5, 0.1, 100)
    assert (
        float(rate(0)) == 0.0
        and float(rate(10)) == pytest.approx(2e-5)
        and float(rate(100)) == pytest.approx(0.0)
    )
    assert float(schedule("linear", 2e-5, 0.0, 100)(0)) == pytest.approx(2e-5)  # without a warm-up
    assert float(schedule("linear", 2e-5, 0.1, 1)(0)) == pytest.approx(2e-5)  # the only step learns


@pytest.mark.parametrize("name", ("linear", "cosine"))
def test_schedules_are_those_of_transformers(name):
    """By which the released generator (linear) and critic (cosine) were trained."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-5)
    theirs, ours = transformers.get_scheduler(name, sgd, 3, 100), schedule(name, 2e-5, 0.03, 100)
    for step in range(100):
        assert float(ours(step)) == pytest.approx(theirs.get_last_lr()[0], rel=1e-5, abs=1e-12)
        sgd.step()
        theirs.step()


def test_configs_that_cannot_run_are_refused():
    with pytest.raises(UserError, match="optimizer.name"):
        config(name="sgdd")
    with pytest.raises(UserError, match="dtype='float16': small gradients"):
        config(dtype="float16")
    mesh = AbstractMesh((2, 2, 1), ("data", "fsdp", "tensor"))
    with pytest.raises(UserError, match="rows=6 is not divisible by mesh data x fsdp = 4"):
        config(rows=6).micro_batches(mesh)
    with pytest.raises(
        UserError, match="rows=8 is not divisible by mesh data x fsdp = 4 x rows_per_device=4"
    ):
        config(rows=8, rows_per_device=4, max_targets=None).micro_batches(mesh)
    assert config(rows=16, rows_per_device=2, max_targets=None).micro_batches(mesh) == 2
    for changes, message in (
        (dict(steps=None), "give one of them"),
        (dict(epochs=2.0), "give one of them"),
        (dict(length=0), "length=0"),
        (dict(remat="some"), "remat='some'"),
        (dict(attention="flash"), "attention='flash'"),
    ):
        with pytest.raises(UserError, match=message):
            config(**changes)


@pytest.mark.parametrize("packed", (True, False))
def test_epochs_are_passes_over_the_data(source, packed):
    c = config(steps=None, epochs=5.0, rows=4, max_targets=None, packed=packed)
    packer = trainer.Packer(source, c.rows, c.length, None, c.seed, packed=packed)
    for _ in range(trainer._steps(c, source)):
        packer.next()
    assert abs(packer.state - 5 * source.size) <= (0.1 * 5 * source.size if packed else 0)


# ---- the loss in all its forms ---------------------------------------------------------------------------------------
def dense(source, rows=4, length=32, **kwargs):
    return batch_arrays(trainer.Packer(source, rows, length, None, 0, **kwargs).next())


def close(a, b, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=1e-6), a, b)


@pytest.mark.slow
def test_gathered_dense_chunked_and_accumulated_losses_and_gradients_are_the_same(
    tiny_model, source
):
    model, params = tiny_model.model, tiny_model.params
    gathered = batch_arrays(trainer.Packer(source, 4, 32, 128, 0).next())
    plain = dense(source)
    assert "loss_index" in gathered and plain["targets"].shape == (4, 32)
    whole = gradients(params, model, plain, None)
    close(gradients(params, model, gathered, None), whole, 1e-5)
    close(gradients(params, model, gathered, 32), whole, 1e-5)
    close(gradients(params, model, plain, 8), whole, 1e-5)
    # Batches of unequal weight: each target counts alike, whichever batch it is in.
    halves = jax.tree.map(
        lambda x: np.stack([x[:3], np.concatenate([x[3:], np.zeros_like(x[:2])])]), plain
    )
    assert halves["weights"][0].sum() != halves["weights"][1].sum()
    close(gradients(params, model, halves, 16), whole, 1e-5)


def test_the_logits_of_a_batch_never_exist_at_once(tiny_model, source):
    batch, model = dense(source), tiny_model.model
    positions, V = 4 * 32, model.config.vocab_size

    def largest(chunk):
        jaxpr = jax.make_jaxpr(lambda p: gradients(p, model, batch, chunk))(tiny_model.params)
        sizes = []

        def walk(j):
            for eqn in j.eqns:
                sizes.extend(
                    int(np.prod(v.aval.shape))
                    for v in eqn.outvars
                    if V in v.aval.shape and v.aval.shape[0] != V
                )
                for sub in jax.extend.core.jaxprs_in_params(eqn.params):
                    walk(sub)

        walk(jaxpr.jaxpr)
        return max(sizes)

    assert largest(None) == positions * V and largest(8) == 4 * 8 * V


def test_rows_of_one_document_need_no_mask(tiny_model, source):
    packer = trainer.Packer(source, 4, 32, None, 0, packed=False)
    batch = packer.next()
    assert packer.state == 4 and batch.doc_ids.max() == 1  # one example in each row
    with_mask = loss_fn(tiny_model.params, tiny_model.model, batch_arrays(batch))
    without = loss_fn(tiny_model.params, tiny_model.model, batch_arrays(batch, packed=False))
    close(without, with_mask, 1e-6)


@pytest.mark.parametrize(
    ("output", "learned"),
    [
        ("[No Retrieval]A b.[Utility:5]", "[No Retrieval] A b. [Utility:5] </s>"),
        (
            "[Retrieval]<paragraph>T\nP</paragraph>[Relevant]A b.[Fully supported][Utility:5]",
            "[Retrieval] [Relevant] A b. [Fully supported] [Utility:5] </s>",
        ),
        (  # several passages: each is masked on its own, what stands between them is learned
            "[Retrieval]<paragraph>T\nP</paragraph>[Relevant]A.[Fully supported][Continue to Use Evidence]B.[No support / "
            "Contradictory][Retrieval]<paragraph>U\nQ</paragraph>[Irrelevant]C.[Partially supported][Utility:2]",
            "[Retrieval] [Relevant] A. [Fully supported] [Continue to Use Evidence] B. [No support / Contradictory] "
            "[Retrieval] [Irrelevant] C. [Partially supported] [Utility:2] </s>",
        ),
        (  # several for one segment
            "A.[Retrieval]<paragraph>T\nP</paragraph><paragraph>U\nQ</paragraph>[Relevant]B.[Utility:3]",
            "A. [Retrieval] [Relevant] B. [Utility:3] </s>",
        ),
        (  # reflection tokens within a passage are the passage's
            "[Retrieval]<paragraph>T\nSaid[Utility:5] twice.</paragraph>[Irrelevant][Utility:1]",
            "[Retrieval] [Irrelevant] [Utility:1] </s>",
        ),
        (
            "[Retrieval]<paragraph></paragraph>[Relevant]A.[Utility:4]",
            "[Retrieval] [Relevant] A. [Utility:4] </s>",
        ),
        ("A.[Retrieval]<paragraph>T\nP</paragraph>", "A. [Retrieval] </s>"),
        ("", "</s>"),
    ],
)
def test_label_masks_by_hand(tokenizer, output, learned):
    example = GeneratorSource(
        [GeneratorExample("0", "Say it.", output)], tokenizer, WEIGHTS
    ).example(0)
    said = tokenizer.decode(
        [int(t) for t, w in zip(example.tokens, example.weight, strict=True) if w > 0]
    )
    assert said.replace(" ", "") == learned.replace(" ", "")


@pytest.mark.slow
def test_bf16_activations_learn_as_f32_do(tiny_model, source, tmp_path):
    """bf16 has 8 bits: after 20 updates the losses are within 3 parts in 100, and parameters are f32 in both."""
    losses = {}
    for dtype in ("float32", "bfloat16"):
        seen = run(
            tiny_model,
            source,
            tmp_path / dtype,
            name="adamw",
            steps=20,
            rate=1e-3,
            dtype=dtype,
            log_every=1,
        )
        assert {x.dtype for x in jax.tree.leaves(seen["params"])} == {np.dtype("float32")}
        losses[dtype] = float(loss_fn(seen["params"], tiny_model.model, dense(source))[0])
    before = float(loss_fn(tiny_model.params, tiny_model.model, dense(source))[0])
    assert losses["float32"] < 0.9 * before
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("name", ("adamw", "adafactor"))
def test_the_other_optimizers_learn(tiny_model, source, tmp_path, name):
    before = loss_fn(tiny_model.params, tiny_model.model, dense(source))[0]
    changes = dict(
        max_targets=None, rows=8, rows_per_device=4, loss_chunk=16, packed=False, remat="full"
    )
    after = run(tiny_model, source, tmp_path, name=name, steps=30, rate=0.02, **changes)["params"]
    assert loss_fn(after, tiny_model.model, dense(source))[0] < 0.6 * before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(loss_chunk=7), "loss_chunk=7 does not divide max_targets=48"),
        (dict(loss_chunk=5, max_targets=None), "loss_chunk=5 does not divide length=32"),
        (dict(rows_per_device=0, max_targets=None), "rows_per_device=0"),
    ],
)
def test_batches_that_cannot_be_split_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        config(**changes)


@pytest.mark.slow
@pytest.mark.parametrize("form", ("rows", "packed"))
def test_fifty_steps_equal_those_of_torch(tokenizer, tmp_path, form):
    """The same weights and batches through torch's AdamW and through ours, in f32: every loss within 1e-3.

    rows: ragged, partly masked, the loss in chunks. packed: what the trainer packs, in two parts whose gradients are added; torch
    sees each document by itself.
    """
    torch = pytest.importorskip("torch")
    from test_huggingface import torch_model

    from selfrag_jax.huggingface import weights
    from selfrag_jax.models.llama import Model

    steps, rate = 50, 1e-3
    V = 199 if form == "rows" else tokenizer.vocab_size
    theirs = torch_model(dict(num_key_value_heads=2, vocab_size=V)).train()
    theirs.save_pretrained(tmp_path)
    c, params = weights.load_folder(tmp_path)
    model = Model(c)
    batches = list(_rows(steps) if form == "rows" else _packed(tokenizer, steps))
    learner = OptimizerConfig("adamw", rate, rate, "linear", 0.1, 1e-8, 0.01, 1.0)
    tx = optimizer.make_optimizer(learner, steps)
    state = {"params": jax.tree.map(jnp.asarray, params), "step": jnp.int32(0)}
    state["opt_state"] = tx.init(state["params"])
    ours, mesh = [], config().make_mesh()
    for batch, _ in batches:
        placed = batch if isinstance(batch, dict) else batch_on_mesh(mesh, batch, 2, True)
        state, seen = train_step(state, placed, model, tx, 8)
        ours.append(float(seen["total"]))

    rates = schedule("linear", rate, 0.1, steps)
    adamw = torch.optim.AdamW(
        theirs.parameters(), lr=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01
    )
    expected = []
    for step, (_, documents) in enumerate(batches):
        adamw.param_groups[0]["lr"] = float(rates(step))
        total = sum(learned.sum() for _, _, learned in documents)
        loss = 0.0
        for tokens, targets, learned in documents:
            labels = torch.tensor(np.where(learned, targets, -100))
            logits = theirs(torch.tensor(tokens)[None]).logits[0]
            loss = loss + torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / total
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        adamw.step()
        expected.append(loss.item())
    assert expected[-1] < 0.9 * expected[0]
    np.testing.assert_allclose(ours, expected, atol=1e-3, rtol=0)


def _rows(steps):
    """What a step reads, and its documents (tokens, targets, which of them are learned)."""
    rng = np.random.default_rng(0)
    for _ in range(steps):
        tokens = (
            np.cumsum(rng.integers(3, 6, (4, 24)), 1) % 199
        )  # something to learn: the next token is 3 to 5 ahead
        length = rng.integers(8, 25, 4)
        learned = np.pad(
            (np.arange(23) < length[:, None] - 1) & (rng.random((4, 23)) < 0.7), ((0, 0), (0, 1))
        )
        targets, positions = np.roll(tokens, -1, 1), np.broadcast_to(np.arange(24), tokens.shape)
        batch = dict(
            tokens=tokens, positions=positions, targets=targets, weights=learned.astype(np.float32)
        )
        yield (
            batch | {"groups": np.zeros_like(tokens)},
            list(zip(tokens, targets, learned, strict=True)),
        )


def _packed(tokenizer, steps):
    passage = "[Retrieval]<paragraph>T\nNumber {}.</paragraph>[Relevant]"
    said = [
        f"{passage.format(i) if i % 3 else '[No Retrieval]'}It is {i % 7}.[Utility:{1 + i % 5}]"
        for i in range(40)
    ]
    rows = [GeneratorExample(str(i), f"Say {i % 7}.", output) for i, output in enumerate(said)]
    packer = trainer.Packer(GeneratorSource(rows, tokenizer, WEIGHTS), 4, 96, None, seed=0)
    for _ in range(steps):
        b = packer.next()
        assert b.doc_ids.max() >= 2
        where = [
            (row, b.doc_ids[row] == d)
            for row in range(4)
            for d in range(1, b.doc_ids[row].max() + 1)
        ]
        yield (
            b,
            [
                (b.tokens[at].astype(np.int64), b.targets[at].astype(np.int64), b.weights[at] > 0)
                for at in where
            ],
        )
