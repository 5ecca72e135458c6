"""LoRA: new adapters change nothing, only they and the tables learn, merging keeps the model, and
PEFT reads what is exported."""

import shutil
from dataclasses import replace

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from selfrag_jax.checkpoints import loading, shipping
from selfrag_jax.checkpoints.converting import convert
from selfrag_jax.data.generator_examples import GeneratorSource
from selfrag_jax.errors import UserError
from selfrag_jax.files import read_json, write_json
from selfrag_jax.huggingface import hub, shipped, weights
from selfrag_jax.models import lora
from selfrag_jax.models.llama import Model
from selfrag_jax.models.lora import LoraConfig
from selfrag_jax.models.params import flatten, leaf_at, unflatten
from selfrag_jax.records import GeneratorExample
from selfrag_jax.training.config import MeshConfig, TrainConfig
from selfrag_jax.training.optimizer import OptimizerConfig
from selfrag_jax.training.train import train

WEIGHTS = dict.fromkeys(("retrieve", "isrel", "issup", "isuse"), 1.0)
TOKENS = np.arange(3, 15)[None]


def logits(model, params):
    hidden, _ = model.hidden(params, TOKENS, np.arange(12)[None], None)
    return np.asarray(model.logits(params, hidden))


@pytest.fixture(scope="module")
def config():
    return TrainConfig(
        seed=0, steps=20, rows=4, length=32, max_targets=None, save_every=6, log_every=4,
        pad_vocabulary=128, mesh=MeshConfig(1, 1, 1), lora=LoraConfig(rank=3, alpha=6.0),
        optimizer=OptimizerConfig("adamw", 0.02, 0.02, "constant", 0.1, 1e-8, 0.0, 1.0),
    )  # fmt: skip


@pytest.fixture(scope="module")
def source(tokenizer):
    rows = [
        GeneratorExample(str(i), f"Say {i}.", f"[No Retrieval]Number {i}.[Utility:5]")
        for i in range(12)
    ]
    return GeneratorSource(rows, tokenizer, WEIGHTS)


@pytest.fixture(scope="module")
def trained(tiny_model, source, config, tmp_path_factory):
    """(workdir, trained parameters) of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("lora")
    done = train(config, tiny_model.model, tiny_model.params, source, tiny_model.tokenizer, workdir)
    return workdir, jax.device_get(done["params"])


def test_new_adapters_change_nothing(tiny_model, config):
    model = Model(replace(tiny_model.model.config, lora=config.lora))
    params = lora.add_adapters(tiny_model.params, model.shapes(), jax.random.key(0))
    expected = logits(tiny_model.model, tiny_model.params)
    np.testing.assert_allclose(logits(model, params), expected, atol=1e-6)
    assert {p[-1] for p, _ in flatten(params)} >= {"lora_a", "lora_b"}
    a = leaf_at(params, ("layers", "down", "lora_a"))
    assert a.shape == (2, 48, 3) and 0.05 < a.std() < 0.3  # 1 / sqrt(48) is 0.14


def test_only_adapters_and_tables_learn(tiny_model, trained):
    start = dict(flatten(tiny_model.params))
    for path, leaf in flatten(trained[1]):
        if path[-1] == "lora_b":
            assert np.abs(leaf).max() > 1e-3
        elif path in start and path[0] != "embed":
            np.testing.assert_array_equal(leaf, start[path])
    V = tiny_model.model.config.vocab_size
    assert np.abs(trained[1]["embed"]["embedding"][:V] - start["embed", "embedding"]).max() > 1e-2


def test_merging_adapters_keeps_the_model(tiny_model, config, trained, tmp_path):
    workdir, params = trained
    V = tiny_model.model.config.vocab_size
    adapted = logits(config.model(tiny_model.model.config), params)[..., :V]
    assert np.abs(adapted - logits(tiny_model.model, tiny_model.params)).max() > 0.5
    loaded = loading.load(workdir)
    assert loaded.model.config == tiny_model.model.config  # neither adapters nor padding
    np.testing.assert_allclose(logits(loaded.model, loaded.params), adapted, atol=1e-4)
    convert(workdir, tmp_path / "hf", "huggingface", None, False)
    exported = loading.load(tmp_path / "hf")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(loaded.params), exported.params)


def test_a_training_is_exported_as_a_peft_adapter(tiny_model, config, trained, tmp_path):
    """PEFT computes with it what we compute, and we read it as the same model. As with a real base,
    the vocabulary has grown in training."""
    import peft
    import torch
    import transformers

    base, workdir = tmp_path / "base", tmp_path / "w"
    shutil.copytree(trained[0], workdir)
    with pytest.raises(UserError, match="does not say which model was trained"):
        convert(workdir, tmp_path / "adapter", "peft", None, False)
    V = tiny_model.model.config.vocab_size
    table = tiny_model.params["embed"]["embedding"][: V - 5]
    small = replace(tiny_model.model.config, vocab_size=V - 5)
    params = {**tiny_model.params, "embed": {"embedding": table}}
    weights.save_folder(base, small, params, tiny_model.tokenizer)
    write_json(workdir / "manifest.json", {"stage": "train", "config": {"base": str(base)}})
    for name, kind in (("model.json", "a training workdir"), ("adapter_config.json", "an adapter")):
        (base / name).touch()
        with pytest.raises(UserError, match=f"its base .* is {kind}, which PEFT reads no base"):
            convert(workdir, tmp_path / "adapter", "peft", None, False)
        (base / name).unlink()
    convert(workdir, tmp_path / "adapter", "peft", None, False)
    modes = {file.stat().st_mode for file in (tmp_path / "adapter").glob("adapter_*")}
    assert len(modes) == 1  # safetensors' own would be the owner's alone
    ours, again = loading.load(workdir), loading.load(tmp_path / "adapter")
    assert again.model.config == ours.model.config  # the tied tables are still one
    for (_, actual), (_, expected) in zip(flatten(again.params), flatten(ours.params), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-6)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    theirs.resize_token_embeddings(V)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(logits(ours.model, ours.params), expected, atol=1e-4)
    for source, flags, message in (
        (base, {}, "is no training workdir with LoRA, whose adapter"),
        (workdir, {"reflection_tokens": True}, "an adapter has those that it was trained with"),
    ):
        with pytest.raises(UserError, match=message):
            given = {"dtype": None, "reflection_tokens": False} | flags
            convert(source, tmp_path / "other", "peft", **given)
        assert not (tmp_path / "other").exists()


@pytest.mark.slow  # a training, and torch beside it
@pytest.mark.parametrize("tied", (True, False), ids=("tied", "untied"))
def test_rows_that_rest_are_not_exported(tiny_model, config, source, tied, tmp_path, monkeypatch):
    """The base's rows stay as they are, bit for bit, and the adapter has the new ones alone."""
    import peft
    import torch
    import transformers
    from safetensors.numpy import load_file

    V, new = tiny_model.model.config.vocab_size, 5
    small = Model(replace(tiny_model.model.config, vocab_size=V - new, tie_embeddings=tied))
    grown = Model(replace(small.config, vocab_size=V))
    base, workdir = tmp_path / "base", tmp_path / "w"
    weights.save_folder(base, small.config, small.init(jax.random.key(0), 0.5), source.tokenizer)
    start = loading.weights.load_folder(base)[1]
    rng = np.random.default_rng(0)
    tables = {("embed", "embedding"): 0} | ({} if tied else {("head", "kernel"): 1})
    initial = dict(flatten(start))
    for path, axis in tables.items():
        rows = rng.normal(size=(new, 32)).astype(np.float32)
        initial[path] = np.concatenate([initial[path], rows if axis == 0 else rows.T], axis)
    optimizer = replace(config.optimizer, weight_decay=0.1, old_rows_factor=0.0)
    config = replace(config, steps=3, optimizer=optimizer)
    train(config, grown, unflatten(initial.items()), source, source.tokenizer, workdir,
          new_rows=new)  # fmt: skip
    write_json(workdir / "manifest.json", {"stage": "train", "config": {"base": str(base)}})
    convert(workdir, tmp_path / "adapter", "peft", None, False)
    ours, again = loading.load(workdir), loading.load(tmp_path / "adapter")
    assert again.model.config == ours.model.config
    for (path, actual), (_, expected) in zip(
        flatten(again.params), flatten(ours.params), strict=True
    ):
        np.testing.assert_allclose(actual, expected, atol=1e-6)
        if path in tables:
            rows = np.moveaxis(expected, tables[path], 0)
            before = np.moveaxis(initial[path], tables[path], 0)
            np.testing.assert_array_equal(rows[:-new], before[:-new])
            assert np.abs(rows[-new:] - before[-new:]).max() > 1e-3
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    shapes = {k: v.shape for k, v in tensors.items() if "layers" not in k}
    assert list(shapes.values()) == [(new, 32)] * len(tables), shapes
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    theirs.resize_token_embeddings(V)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    tokens = np.array([[3, 4, 5, 6, 7, 8, 9, *range(V - new, V)]])
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    hidden, _ = ours.model.hidden(ours.params, tokens, np.arange(12)[None], None)
    np.testing.assert_allclose(ours.model.logits(ours.params, hidden), expected, atol=1e-4)
    ship_it(workdir, base, tmp_path / "demo", monkeypatch)


def ship_it(workdir, base, out, monkeypatch):
    """The same as a model that the package ships: in f16, its base by a short name."""
    made = {"stage": "train", "config": {"base": str(base), "seed": 7}, "inputs": {"data": "ab"}}
    write_json(workdir / "manifest.json", made | {"counts": {"steps": 3}, "versions": {"jax": "1"}})
    monkeypatch.setattr(hub, "_find_short", lambda name, *_: base)
    about = dict(
        base="smollm2", about="quotes", answer_config="small", command="c", scores={"a": 1}
    )
    size = shipping.ship(workdir, out, **about)
    assert size == sum(f.stat().st_size for f in out.iterdir())
    record = read_json(out / "made.json")
    assert (
        record["config"]["seed"] == 7 and record["scores"] == {"a": 1} and record["step"] == "last"
    )
    count = sum(leaf.size for _, leaf in flatten(loading.load(workdir).params))
    assert shipped.read_made(out).parameters == count == record["parameters"]
    assert read_json(out / "adapter_config.json")["base_model_name_or_path"] == "smollm2"
    for (_, actual), (_, expected) in zip(
        flatten(loading.load(out).params), flatten(loading.load(workdir).params), strict=True
    ):
        np.testing.assert_allclose(actual, expected, atol=2e-3)
    with pytest.raises(UserError, match="demo: already exists; remove it"):
        shipping.ship(workdir, out, **about)
    monkeypatch.setattr(shipping, "MOST_BYTES", 100)
    with pytest.raises(UserError, match="MB, of which .* has .*; at most 0 MB are shipped: train"):
        shipping.ship(workdir, out.with_name("large"), **about)
    other = out.with_name("other base")
    shutil.copytree(base, other)
    c, params = weights.load_folder(base)
    params["layers"]["q"]["kernel"] = params["layers"]["q"]["kernel"] * 1.1
    weights.save_folder(other, c, params, loading.read_tokenizer(base))
    monkeypatch.setattr(hub, "_find_short", lambda name, *_: other)
    with pytest.raises(UserError, match="smollm2 as it is found here, layers/q/kernel is not what"):
        shipping.ship(workdir, out.with_name("other"), **about)
    assert sorted(p.name for p in out.parent.iterdir()) == [
        "adapter", "base", "demo", "other base", "w",
    ]  # fmt: skip


def test_without_its_base_whole_tables_are_exported(trained, tmp_path, capsys):
    shutil.copytree(trained[0], workdir := tmp_path / "w")
    write_json(workdir / "manifest.json", {"stage": "train", "config": {"base": "gone/"}})
    convert(workdir, tmp_path / "adapter", "peft", None, False)
    assert "so whole tables of the vocabulary are written" in capsys.readouterr().err


def test_merging_into_half_precision_weights_keeps_small_updates(tmp_path):
    """Frozen weights are bfloat16, whose spacing is larger than most of what adapters learn."""
    rng = np.random.default_rng(0)
    kernel = (rng.normal(size=(64, 64)) * 0.02).astype("bfloat16")
    a = rng.normal(size=(64, 4)).astype(np.float32)
    b = (rng.normal(size=(4, 64)) * 2e-5).astype(np.float32)
    update = lora.merged_kernel(kernel, a, b, LoraConfig(4, 8.0)) - kernel.astype(np.float32)
    np.testing.assert_allclose(update, 2.0 * a @ b, atol=1e-8)


def test_a_resumed_run_is_identical_and_checkpoints_hold_only_trained_weights(
    tiny_model, source, config, trained, tmp_path, monkeypatch
):
    from selfrag_jax.training import train as trainer

    step, calls = trainer.run_step, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 14:  # after the checkpoint of step 12
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(trainer, "run_step", interrupted)
    arguments = (tiny_model.model, tiny_model.params, source, tiny_model.tokenizer, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train(config, *arguments)
    monkeypatch.setattr(trainer, "run_step", step)
    again = jax.device_get(train(config, *arguments)["params"])
    jax.tree.map(np.testing.assert_array_equal, again, trained[1])
    with ocp.PyTreeCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(tmp_path / "checkpoints" / "20" / "state")
        shapes = metadata.item_metadata.tree["params"]
    assert "kernel" not in shapes["layers"]["q"] and "lora_a" in shapes["layers"]["q"]


def test_other_frozen_weights_are_refused(tiny_model, source, config, trained, tmp_path):
    w = tmp_path / "w"
    shutil.copytree(trained[0], w)
    other = {**tiny_model.params, "norm": {"scale": tiny_model.params["norm"]["scale"] * 1.5}}
    with pytest.raises(
        UserError, match="the base is not the one that this training began with .*norm"
    ):
        train(replace(config, steps=24), tiny_model.model, other, source, tiny_model.tokenizer, w)


def test_damaged_frozen_weights_are_reported_and_can_be_restored(
    tiny_model, source, config, trained, tmp_path
):
    w = tmp_path / "w"
    shutil.copytree(trained[0], w)
    for file in (w / "frozen").rglob("*"):
        if file.is_file():
            content = bytearray(file.read_bytes())
            content[299::299] = bytes(c ^ 4 for c in content[299::299])
            file.write_bytes(content)
    message = "frozen: the weights that LoRA does not train are damaged .*Remove frozen/"
    with pytest.raises(UserError, match=message):
        loading.load(w)
    with pytest.raises(UserError, match=message):
        convert(w, tmp_path / "out", "huggingface", None, False)
    shutil.rmtree(w / "frozen")
    train(config, tiny_model.model, tiny_model.params, source, tiny_model.tokenizer, w)
    jax.tree.map(
        np.testing.assert_array_equal, loading.load(w).params, loading.load(trained[0]).params
    )


def test_a_rank_below_one_is_refused():
    with pytest.raises(ValueError, match="rank=0"):
        LoraConfig(0, 1.0)
