"""The trainer learns, resumes bit-identically, and stops when a loss is not finite."""

import json
import os
import re
import signal

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from selfrag_jax import cli, locks
from selfrag_jax import config as configs
from selfrag_jax.checkpoints import loading, saving, workdirs
from selfrag_jax.commands.train import train_model
from selfrag_jax.data.batches import Packer
from selfrag_jax.data.generator_examples import GeneratorSource
from selfrag_jax.errors import UserError
from selfrag_jax.records import GeneratorExample, write_jsonl
from selfrag_jax.training import length, optimizer
from selfrag_jax.training import train as trainer
from selfrag_jax.training.config import MeshConfig, TrainConfig
from selfrag_jax.training.loss import gradients, loss_fn
from selfrag_jax.training.optimizer import OptimizerConfig, schedule
from selfrag_jax.training.starting_model import starting_model
from selfrag_jax.training.step import batch_arrays, batch_on_mesh, train_step
from selfrag_jax.training.train import train

WEIGHTS = {"retrieve": 1.0, "isrel": 1.0, "issup": 1.0, "isuse": 1.0}


def config(steps=12, rate=0.01, name="muon", eps=1e-8, **changes):
    optimizer_config = OptimizerConfig(name, rate, 0.01, "linear", 0.1, eps, 0.0, 1.0, 4.0)
    fields = dict(seed=0, steps=steps, rows=2, length=32, max_targets=48, save_every=4, log_every=4)
    fields |= dict(optimizer=optimizer_config, mesh=MeshConfig(1, 1, 1))
    return TrainConfig(**(fields | changes))


def number_rows(n):
    """Returns n short rows of generator data."""
    return [
        GeneratorExample(str(i), f"Say {i}.", f"[No Retrieval]Number {i}.[Utility:5]")
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def source(tokenizer):
    return GeneratorSource(number_rows(12), tokenizer, WEIGHTS)


@pytest.fixture
def data(tmp_path):
    """Returns a file of generator data."""
    write_jsonl(tmp_path / "data.jsonl", number_rows(12))
    return tmp_path / "data.jsonl"


def run_training(tiny_model, source, workdir, **changes):
    model, params, tokenizer = tiny_model.model, tiny_model.params, tiny_model.tokenizer
    return train(config(**changes), model, params, source, tokenizer, workdir)


def assert_same_arrays(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def test_reflection_tokens_start_as_the_words_of_the_config():
    c = configs.load("tiny")
    start, new = starting_model(c)
    table, tokenizer = np.asarray(start.params["embed"]["embedding"]), start.tokenizer
    assert new == 13  # all reflection tokens; the base has the markup
    assert table.shape[0] == tokenizer.vocab_size
    for token, word in c.new_rows:
        np.testing.assert_array_equal(table[tokenizer.id(token)], table[tokenizer.encode(word)[0]])
    np.testing.assert_allclose(table[tokenizer.id("[Retrieval]")], table[:-new].mean(0), atol=1e-6)
    c.new_rows = (("[Relevent]", "yes"),)
    with pytest.raises(UserError, match=r"new_rows: '\[Relevent\]' is no reflection token"):
        starting_model(c)


def test_other_new_rows_make_another_training(data, tmp_path):
    c = configs.load("tiny:smoke")
    c.generator.steps = 1
    train_model(c, "generator", data, tmp_path / "w", "generator")
    c.new_rows = c.new_rows[:-1]
    with pytest.raises(UserError, match="new_rows"):
        train_model(c, "generator", data, tmp_path / "w", "generator")
    with c.unlocked():
        del c.new_rows
    with pytest.raises(UserError, match="lacks new_rows"):
        train_model(c, "generator", data, tmp_path / "v", "generator")


def test_other_weights_from_scratch_make_another_training(data, tmp_path):
    c = configs.load("tiny:smoke")
    c.base, c.generator.steps = "scratch", 1
    train_model(c, "generator", data, tmp_path / "w", "generator")
    c.seed += 1  # of the weights
    with pytest.raises(UserError, match="scratch.seed: 0 there, 1 asked for"):
        train_model(c, "generator", data, tmp_path / "w", "generator")


def test_a_workdir_in_use_is_not_claimed(data, tmp_path):
    """If two processes start at once, the second changes nothing, not even the workdir's record."""
    c, w = configs.load("tiny:smoke"), tmp_path / "w"
    with (
        locks.exclusive_workdir(w),
        pytest.raises(UserError, match="w: another process is writing it"),
    ):
        train_model(c, "generator", data, w, "generator")
    assert [p.name for p in w.iterdir()] == [locks.LOCK]


def test_bad_data_leaves_nothing_behind(tmp_path):
    """A second attempt with the right data must not find the workdir of the first."""
    c = configs.load("tiny:smoke")
    row = dict(instruction="Say 1.", output="[Relevant]", task="isrel", preceding="", segment="")
    write_jsonl(tmp_path / "critic.jsonl", [row])
    with pytest.raises(UserError, match=r"critic.jsonl:1: field 'task': this is critic data"):
        train_model(c, "generator", tmp_path / "critic.jsonl", tmp_path / "w", "generator")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no rows"):
        train_model(c, "critic", tmp_path / "empty.jsonl", tmp_path / "w", "critic")
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ("muon", "adamw"))
def test_adam_eps_keeps_unused_words_in_place(tiny_model, source, tmp_path, name):
    """Adam moves every row of a tied embedding at full rate, however small its gradient.

    `adam_eps` stops that.
    """
    start = np.asarray(tiny_model.params["embed"]["embedding"])
    batch = Packer(source, 2, 32, 48, 0).next()
    moved = {}
    for eps in (1e-8, 1e-2):
        result = run_training(tiny_model, source, tmp_path / f"{eps}", name=name, eps=eps)
        params = result["params"]
        moved[eps] = np.abs(np.asarray(params["embed"]["embedding"]) - start).max(1)
    in_source = np.concatenate([source.example(i).tokens for i in range(source.size)])
    unused = np.setdiff1d(np.arange(len(start)), in_source)
    used = np.setdiff1d(batch.targets, unused)
    assert np.median(moved[1e-8][unused]) > 0.01
    assert np.median(moved[1e-2][unused]) < 0.1 * np.median(moved[1e-2][used])


def test_an_interrupted_training_ends_with_the_same_parameters(
    tiny_model, source, tmp_path, monkeypatch
):
    whole = run_training(tiny_model, source, tmp_path / "whole")["params"]
    calls, step = [], trainer.run_step

    def interrupted_step(*args):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(trainer, "run_step", interrupted_step)
    with pytest.raises(KeyboardInterrupt):
        run_training(tiny_model, source, tmp_path / "parts")
    monkeypatch.setattr(trainer, "run_step", step)
    parts = run_training(tiny_model, source, tmp_path / "parts")["params"]
    assert_same_arrays(whole, parts)
    assert_same_arrays(loading.load(tmp_path / "parts").params, parts)


def test_sigterm_saves_a_checkpoint_and_the_next_run_continues(
    tiny_model, source, tmp_path, monkeypatch
):
    whole = run_training(tiny_model, source, tmp_path / "whole")["params"]
    handler, calls, step = signal.getsignal(signal.SIGTERM), [], trainer.run_step

    def terminated_step(*args):
        calls.append(1)
        if len(calls) == 6:  # between the checkpoints of steps 4 and 8
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)

    monkeypatch.setattr(trainer, "run_step", terminated_step)
    with pytest.raises(SystemExit) as exit_info:
        run_training(tiny_model, source, tmp_path / "parts")
    assert exit_info.value.code == 143 and signal.getsignal(signal.SIGTERM) is handler
    with saving.checkpoint_manager(tmp_path / "parts", 2, 1) as saved:
        assert saved.latest_step() == 6

    def saved_loss(workdir, step):
        file = tmp_path / workdir / "checkpoints" / str(step) / "metrics" / "metrics"
        return json.loads(file.read_text())["loss"]

    assert saved_loss("parts", 6) == workdirs.NO_LOSS  # two steps are too few to compare
    calls.append(1)  # so that the next call is not number 6 again
    parts = run_training(tiny_model, source, tmp_path / "parts")["params"]
    assert len(calls) == 13  # the six remaining steps
    assert_same_arrays(whole, parts)
    assert saved_loss("parts", 8) == saved_loss("whole", 8)  # over the whole interval


def test_training_lowers_the_loss(tiny_model, source, tmp_path):
    after = run_training(tiny_model, source, tmp_path, steps=40, rate=0.02)["params"]
    batch = batch_arrays(Packer(source, 2, 32, 48, seed=9).next())
    before_loss = loss_fn(tiny_model.params, tiny_model.model, batch)[0]
    after_loss = loss_fn(after, tiny_model.model, batch)[0]
    assert after_loss < 0.6 * before_loss


def test_a_loss_that_is_not_finite_stops_training_and_names_the_step(tiny_model, source, tmp_path):
    broken = jax.tree.map(lambda x: x * np.nan, tiny_model.params)
    packer = Packer(source, 2, 32, 48, seed=0)
    packer.next()
    rows = ", ".join(map(str, packer.source_rows(0, packer.state)))
    message = f"step 0 is nan; its batch holds the rows {rows} of the data, counted from 0"
    with pytest.raises(FloatingPointError, match=message):
        train(config(), tiny_model.model, broken, source, tiny_model.tokenizer, tmp_path)


@pytest.mark.slow
def test_a_command_whose_loss_is_not_finite_fails_in_one_line(tmp_path, capsys):
    """The rate is so high that the second step ruins everything; the first checkpoint is kept."""
    write_jsonl(tmp_path / "data.jsonl", number_rows(40))
    generator = {
        "optimizer.learning_rate": 1e38,
        "optimizer.adam_learning_rate": 1e38,
        "optimizer.warmup_fraction": 0.5,
        "save_every": 1,
    }
    command = ["train", "--role=generator", f"--data={tmp_path}/data.jsonl"]
    command += [f"--workdir={tmp_path}/w", "--config=tiny:smoke"]
    command += [f"--config.generator.{name}={value}" for name, value in generator.items()]
    assert cli.main(command) == 1
    lines = capsys.readouterr().err.splitlines()
    [error] = [line for line in lines if line.startswith("selfrag train: ")]
    pattern = r"of step (\d+) is (?:nan|inf); its batch holds the rows \d+"
    step = int(re.search(pattern, error).group(1))
    saved = workdirs.saved_steps(tmp_path / "w")
    assert saved and saved[-1] <= step and loading.load(tmp_path / "w") is not None


def test_a_gradient_that_is_not_finite_is_never_saved(tiny_model, source, tmp_path, monkeypatch):
    """The loss of such a step is finite; its update would ruin parameters and next checkpoint."""
    step, calls = trainer.run_step, []

    def step_with_bad_gradient(*args):
        state, metrics = step(*args)
        calls.append(1)
        return state, metrics | ({"gradient_norm": jnp.inf} if len(calls) == 3 else {})

    monkeypatch.setattr(trainer, "run_step", step_with_bad_gradient)
    with pytest.raises(FloatingPointError, match="gradient norm of step 2 is inf"):
        run_training(tiny_model, source, tmp_path, save_every=1)
    with saving.checkpoint_manager(tmp_path, 2, 1) as saved:
        assert saved.latest_step() == 2  # after two good steps


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
        (dict(product_dtype="int8"), "product_dtype='int8'"),
        (dict(attention="flash"), "attention='flash'"),
    ):
        with pytest.raises(UserError, match=message):
            config(**changes)


@pytest.mark.parametrize("packed", (True, False))
def test_epochs_are_passes_over_the_data(source, packed):
    c = config(steps=None, epochs=5.0, rows=4, max_targets=None, packed=packed)
    packer = Packer(source, c.rows, c.length, None, c.seed, packed=packed)
    for _ in range(length.num_steps(c, source)):
        packer.next()
    assert abs(packer.state - 5 * source.size) <= (0.1 * 5 * source.size if packed else 0)


# ---- the loss in all its layouts -----------------------------------------------------------------
def dense_batch(source, rows=4, length=32):
    return batch_arrays(Packer(source, rows, length, None, 0).next())


def assert_close(a, b, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=1e-6), a, b)


@pytest.mark.slow
def test_gathered_dense_chunked_and_accumulated_losses_and_gradients_are_equal(tiny_model, source):
    model, params = tiny_model.model, tiny_model.params
    gathered = batch_arrays(Packer(source, 4, 32, 128, 0).next())
    dense = dense_batch(source)
    assert "loss_index" in gathered and dense["targets"].shape == (4, 32)
    whole = gradients(params, model, dense, None)
    assert_close(gradients(params, model, gathered, None), whole, 1e-5)
    assert_close(gradients(params, model, gathered, 32), whole, 1e-5)
    assert_close(gradients(params, model, dense, 8), whole, 1e-5)
    # Chunks that do not divide the positions: the last one is padded.
    assert_close(gradients(params, model, gathered, 36), whole, 1e-5)
    assert_close(gradients(params, model, dense, 12), whole, 1e-5)
    # Micro-batches of unequal weight: a target counts the same in either.
    parts = jax.tree.map(
        lambda x: np.stack([x[:3], np.concatenate([x[3:], np.zeros_like(x[:2])])]), dense
    )
    assert parts["weights"][0].sum() != parts["weights"][1].sum()
    assert_close(gradients(params, model, parts, 16), whole, 1e-5)


def test_chunked_logits_of_a_batch_never_exist_at_once(tiny_model, source):
    batch, model = dense_batch(source), tiny_model.model
    positions, V = 4 * 32, model.config.vocab_size

    def largest_logits(chunk):
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

    assert largest_logits(None) == positions * V and largest_logits(8) == 4 * 8 * V


def test_rows_of_one_document_need_no_mask(tiny_model, source):
    packer = Packer(source, 4, 32, None, 0, packed=False)
    batch = packer.next()
    assert packer.state == 4 and batch.doc_ids.max() == 1  # one example in each row
    with_mask = loss_fn(tiny_model.params, tiny_model.model, batch_arrays(batch))
    without = loss_fn(tiny_model.params, tiny_model.model, batch_arrays(batch, packed=False))
    assert_close(without, with_mask, 1e-6)


@pytest.mark.parametrize(
    ("output", "learned"),
    [
        ("[No Retrieval]A b.[Utility:5]", "[No Retrieval] A b. [Utility:5] </s>"),
        (
            "[Retrieval]<paragraph>T\nP</paragraph>[Relevant]A b.[Fully supported][Utility:5]",
            "[Retrieval] [Relevant] A b. [Fully supported] [Utility:5] </s>",
        ),
        (  # several passages: each is masked by itself, the text between them is learned
            "[Retrieval]<paragraph>T\nP</paragraph>[Relevant]A.[Fully supported]"
            "[Continue to Use Evidence]B.[No support / Contradictory]"
            "[Retrieval]<paragraph>U\nQ</paragraph>[Irrelevant]C.[Partially supported][Utility:2]",
            "[Retrieval] [Relevant] A. [Fully supported] "
            "[Continue to Use Evidence] B. [No support / Contradictory] "
            "[Retrieval] [Irrelevant] C. [Partially supported] [Utility:2] </s>",
        ),
        (  # several for one segment
            "A.[Retrieval]<paragraph>T\nP</paragraph><paragraph>U\nQ</paragraph>"
            "[Relevant]B.[Utility:3]",
            "A. [Retrieval] [Relevant] B. [Utility:3] </s>",
        ),
        (  # reflection tokens inside a passage belong to it
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
def test_loss_masks_equal_those_made_by_hand(tokenizer, output, learned):
    row = GeneratorExample("0", "Say it.", output)
    example = GeneratorSource([row], tokenizer, WEIGHTS).example(0)
    ids = [int(t) for t, w in zip(example.tokens, example.weight, strict=True) if w > 0]
    assert tokenizer.decode(ids).replace(" ", "") == learned.replace(" ", "")


@pytest.mark.slow
def test_bf16_activations_learn_as_f32_does(tiny_model, source, tmp_path):
    """bf16 has 8 bits: after 20 updates the losses differ by at most 3%. Parameters stay f32."""
    losses = {}
    for dtype in ("float32", "bfloat16"):
        changes = dict(name="adamw", steps=20, rate=1e-3, dtype=dtype, log_every=1)
        params = run_training(tiny_model, source, tmp_path / dtype, **changes)["params"]
        assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}
        losses[dtype] = float(loss_fn(params, tiny_model.model, dense_batch(source))[0])
    before = float(loss_fn(tiny_model.params, tiny_model.model, dense_batch(source))[0])
    assert losses["float32"] < 0.9 * before
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("name", ("adamw", "adafactor"))
def test_the_other_optimizers_learn(tiny_model, source, tmp_path, name):
    batch = dense_batch(source)
    before = loss_fn(tiny_model.params, tiny_model.model, batch)[0]
    changes = dict(max_targets=None, rows=8, rows_per_device=4, loss_chunk=16, packed=False)
    changes |= dict(remat="full", name=name, steps=30, rate=0.02)
    after = run_training(tiny_model, source, tmp_path, **changes)["params"]
    assert loss_fn(after, tiny_model.model, batch)[0] < 0.6 * before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(loss_chunk=0), "loss_chunk=0: must be at least 1, or none"),
        (dict(rows_per_device=0, max_targets=None), "rows_per_device=0"),
    ],
)
def test_batches_that_cannot_be_split_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        config(**changes)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ("rows", "packed"))
def test_fifty_steps_equal_those_of_torch(tokenizer, tmp_path, layout):
    """Every loss is within 1e-3 of torch's AdamW, from the same weights and batches in f32.

    rows: ragged, partly masked, with the loss in chunks. packed: the trainer's batches, in two
    micro-batches; torch sees each document by itself.
    """
    torch = pytest.importorskip("torch")
    from test_huggingface import torch_model

    from selfrag_jax.huggingface import weights
    from selfrag_jax.models.llama import Model

    steps, rate = 50, 1e-3
    V = 199 if layout == "rows" else tokenizer.vocab_size
    theirs = torch_model(dict(num_key_value_heads=2, vocab_size=V)).train()
    theirs.save_pretrained(tmp_path)
    c, params = weights.load_folder(tmp_path)
    model = Model(c)
    batches = list(ragged_rows(steps) if layout == "rows" else packed_rows(tokenizer, steps))
    optimizer_config = OptimizerConfig("adamw", rate, rate, "linear", 0.1, 1e-8, 0.01, 1.0)
    tx = optimizer.make_optimizer(optimizer_config, steps)
    state = {"params": jax.tree.map(jnp.asarray, params), "step": jnp.int32(0)}
    state["opt_state"] = tx.init(state["params"])
    ours, mesh = [], config().make_mesh()
    for batch, _ in batches:
        placed = batch if isinstance(batch, dict) else batch_on_mesh(mesh, batch, 2, True)
        state, metrics = train_step(state, placed, model, tx, 8)
        ours.append(float(metrics["total"]))

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


def ragged_rows(steps):
    """Yields batches and their documents: (tokens, targets, which targets are learned)."""
    rng = np.random.default_rng(0)
    for _ in range(steps):
        # The next token is 3 to 5 ahead: something that can be learned.
        tokens = np.cumsum(rng.integers(3, 6, (4, 24)), 1) % 199
        length = rng.integers(8, 25, 4)
        in_document = np.arange(23) < length[:, None] - 1
        learned = np.pad(in_document & (rng.random((4, 23)) < 0.7), ((0, 0), (0, 1)))
        targets, positions = np.roll(tokens, -1, 1), np.broadcast_to(np.arange(24), tokens.shape)
        batch = dict(tokens=tokens, positions=positions, targets=targets)
        batch |= dict(weights=learned.astype(np.float32), groups=np.zeros_like(tokens))
        yield batch, list(zip(tokens, targets, learned, strict=True))


def packed_rows(tokenizer, steps):
    """As `ragged_rows`, of packed documents."""
    rows = []
    for i in range(40):
        passage = f"[Retrieval]<paragraph>T\nNumber {i}.</paragraph>[Relevant]"
        start = passage if i % 3 else "[No Retrieval]"
        output = f"{start}It is {i % 7}.[Utility:{1 + i % 5}]"
        rows.append(GeneratorExample(str(i), f"Say {i % 7}.", output))
    packer = Packer(GeneratorSource(rows, tokenizer, WEIGHTS), 4, 96, None, seed=0)
    for _ in range(steps):
        b = packer.next()
        assert b.doc_ids.max() >= 2
        documents = []
        for row in range(4):
            for doc_id in range(1, b.doc_ids[row].max() + 1):
                at = row, b.doc_ids[row] == doc_id
                tokens, targets = b.tokens[at].astype(np.int64), b.targets[at].astype(np.int64)
                documents.append((tokens, targets, b.weights[at] > 0))
        yield b, documents
