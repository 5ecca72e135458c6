"""PEFT adapters: merged while loading, with the logits of PEFT's own model; what is not supported
is refused by name."""

import json
import os
import shutil
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_huggingface import torch_model

from selfrag_jax import artifacts, cli
from selfrag_jax.checkpoints import loading
from selfrag_jax.commands.default_config import config_for_base
from selfrag_jax.errors import UserError
from selfrag_jax.huggingface import weights
from selfrag_jax.models.llama import Model
from selfrag_jax.models.params import flatten
from selfrag_jax.training.architecture import model_architecture

TOLERANCE = 1e-4  # of f32 logits
FILE = "adapter_model.safetensors"
ALL = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
KINDS = {
    "attention": dict(target_modules=["q_proj", "v_proj"]),
    "all, rslora": dict(target_modules=ALL, use_rslora=True, lora_alpha=3),
    "patterns": dict(
        target_modules=ALL,
        rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 3},
        alpha_pattern={r"layers\.[01].*down_proj": 5, "v_proj": 1},
    ),
    "whole modules": dict(target_modules=["q_proj"], modules_to_save=["lm_head", "norm"]),
    "whole tables": dict(target_modules=ALL, modules_to_save=["embed_tokens", "lm_head"]),
    "table adapted": dict(target_modules=["q_proj", "embed_tokens", "lm_head"]),
    "rows of tokens": dict(target_modules=ALL, trainable_token_indices=[3, 77, 198]),
    "rows of both tables": dict(
        target_modules=["v_proj"],
        trainable_token_indices={"embed_tokens": [5, 2], "lm_head": [5, 2]},
    ),
}


def adapt(base, folder, fields, rows=None):
    """An adapter of the base's folder with random weights, as PEFT saves it; returns its model.

    rows: of the vocabulary, which is enlarged first.
    """
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    if rows:
        theirs.resize_token_embeddings(rows)
    torch.manual_seed(1)
    config = peft.LoraConfig(**dict(r=4, lora_alpha=8, task_type="CAUSAL_LM") | fields)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(theirs, config).eval()
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p += 0.1 * torch.randn(p.shape)
        model.save_pretrained(folder)
    return model


def their_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def our_logits(folder, tokens):
    config, params = weights.load_folder(folder)
    model = Model(config)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = model.hidden(params, tokens, positions, None)
    return np.asarray(model.logits(params, hidden))


TOKENS = np.random.default_rng(0).integers(0, 199, (1, 24))


@pytest.fixture(scope="module", params=(False, True), ids=("untied", "tied"))
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch_model(dict(tie_word_embeddings=request.param)).save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(tmp_path):
    """(the folder of an adapter, that of its base beside it), for tests that change them."""
    torch_model({}).save_pretrained(tmp_path / "base")
    adapt(tmp_path / "base", tmp_path / "adapter", KINDS["attention"])
    edit(tmp_path / "adapter", base_model_name_or_path="../base")
    return tmp_path / "adapter", tmp_path / "base"


def edit(folder, **fields):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


# ---- parity ----------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_those_of_peft(base, tmp_path, kind):
    model = adapt(base, tmp_path / "a", KINDS[kind])
    actual = our_logits(tmp_path / "a", TOKENS)
    np.testing.assert_allclose(actual, their_logits(model, TOKENS), atol=TOLERANCE, rtol=0)
    assert abs(actual - our_logits(base, TOKENS)).max() > 0.1


@pytest.mark.parametrize(
    "kind",
    ("attention", "whole tables", "whole embedding", "table adapted", "rows of both tables"),
)
def test_an_enlarged_vocabulary_is_read(base, tmp_path, kind):
    """From modules that were trained whole, or from those that PEFT saves because they grew."""
    kinds = KINDS | {"whole embedding": dict(target_modules=ALL, modules_to_save=["embed_tokens"])}
    model = adapt(base, tmp_path / "a", kinds[kind], rows=207)
    tokens = np.concatenate([TOKENS, np.arange(199, 207)[None]], axis=1)
    actual = our_logits(tmp_path / "a", tokens)
    assert actual.shape[-1] == 207
    np.testing.assert_allclose(actual, their_logits(model, tokens), atol=TOLERANCE, rtol=0)


def test_a_tied_table_may_be_saved_as_the_head_alone(tmp_path):
    """As programs do that save one of two tensors which share their memory."""
    torch_model(dict(tie_word_embeddings=True)).save_pretrained(tmp_path / "base")
    model = adapt(tmp_path / "base", tmp_path / "a", KINDS["attention"], rows=207)
    tensors = load_file(tmp_path / "a" / FILE)
    del tensors["base_model.model.model.embed_tokens.weight"]
    save_file(tensors, tmp_path / "a" / FILE)
    actual = our_logits(tmp_path / "a", TOKENS)
    np.testing.assert_allclose(actual, their_logits(model, TOKENS), atol=TOLERANCE, rtol=0)


def test_tensors_equal_those_of_merge_and_unload(tmp_path):
    """An adapter in bf16, in torch's format, of a base in bf16: merged in f32."""
    torch_model({}).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    model = adapt(tmp_path / "base", tmp_path / "a", KINDS["all, rslora"])
    torch.save(load_file(tmp_path / "a" / FILE), tmp_path / "a" / "adapter_model.bin")
    (tmp_path / "a" / FILE).unlink()
    files = weights.open_folder(tmp_path / "a")[1]
    merged = model.to(torch.float32).merge_and_unload().state_dict()
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"):
        expected = merged[name].numpy()
        np.testing.assert_allclose(files.tensor(name, expected.shape), expected, atol=1e-6)
    assert files.dtype(["lm_head.weight"]) == "float32"


# ---- the folder ------------------------------------------------------------------------------
def test_the_commands_read_an_adapter(tiny_model, tmp_path, monkeypatch):
    """`convert` and training take it; the base may lie beside it or where the command runs."""
    parts = (tiny_model.model.config, tiny_model.params, tiny_model.tokenizer)
    weights.save_folder(tmp_path / "base", *parts)
    adapt(tmp_path / "base", tmp_path / "a", KINDS["attention"])
    edit(tmp_path / "a", base_model_name_or_path="../base")
    loaded = loading.load(tmp_path / "a")
    assert loaded.tokenizer.reflection_ids() == tiny_model.tokenizer.reflection_ids()
    edit(tmp_path / "a", base_model_name_or_path="base")
    monkeypatch.chdir(tmp_path)
    flags = ["--from=a", f"--to={tmp_path / 'merged'}", "--format=huggingface"]
    assert cli.main(["convert", *flags]) == 0
    for (_, actual), (_, expected) in zip(
        flatten(loading.load(tmp_path / "merged").params), flatten(loaded.params), strict=True
    ):
        np.testing.assert_array_equal(actual, expected)
    before = artifacts.fingerprint("a")
    (tmp_path / "base" / "config.json").write_text("{}")
    assert artifacts.fingerprint("a") != before


def test_an_adapter_is_a_base_with_and_without_a_config(base, tmp_path, tokenizer, capsys):
    model = adapt(base, tmp_path / "a", KINDS["whole tables"], rows=207)
    del model
    edit(tmp_path / "a", base_model_name_or_path=str(base))
    tokenizer.save(tmp_path / "a")
    assert model_architecture(tmp_path / "a").vocab_size == 207
    assert config_for_base("generator", [f"base={tmp_path / 'a'}"]) == "tiny"  # by its tokenizer
    command = ["label", f"--critic={tmp_path / 'a'}", "--index=i", "--input=x", "--out=y"]
    assert cli.main(command) == 2
    assert "or an adapter; expected a critic made by `selfrag train`" in capsys.readouterr().err


def test_an_adapters_own_tokenizer_is_taken(adapter, tiny_model, tokenizer):
    folder, base = adapter
    tokenizer.save(base)
    assert loading.read_tokenizer(folder).source.startswith(str(folder.parent / "adapter/../base"))
    tokenizer.save(folder)
    assert loading.read_tokenizer(folder).source == str(folder / "tokenizer.json")


def test_the_base_may_be_a_model_of_the_hub(adapter, monkeypatch):
    folder, base = adapter
    expected = our_logits(folder, TOKENS)
    edit(folder, base_model_name_or_path="owner/model", revision="main")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(base))
    np.testing.assert_array_equal(our_logits(folder, TOKENS), expected)
    edit(folder, revision="v2")
    with pytest.raises(UserError, match="revision='v2' of owner/model is not supported; download"):
        weights.open_folder(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(peft_type="IA3"), "an adapter of the kind 'IA3' is not supported; only LORA is"),
        (dict(use_dora=True), "use_dora=True is not supported. Merge the adapter with PEFT"),
        (dict(bias="all"), "bias='all' is not supported"),
        (dict(lora_bias=True), "lora_bias=True is not supported"),
        (dict(fan_in_fan_out=True), "fan_in_fan_out=True is not supported"),
        (dict(init_lora_weights="pissa"), "init_lora_weights='pissa' is not supported"),
        (dict(layer_replication=[[0, 1]]), "layer_replication="),
        (dict(trainable_token_indices=[1]), "lacks the rows of 'embed_tokens' that trainable_tok"),
        (dict(trainable_token_indices=[1, 1]), "trainable_token_indices=.*expected different ids"),
        (dict(trainable_token_indices=["a"]), "trainable_token_indices=.*expected different ids"),
        (dict(target_parameters=["x"]), "target_parameters="),
        (dict(a_new_field=3), "a_new_field=3 is not supported"),
        (dict(base_model_name_or_path=None), "base_model_name_or_path=None: must name the model"),
        (dict(base_model_name_or_path="/nowhere/x"), "/nowhere/x: no such folder; expected"),
        (dict(r=8), "has rank 4 in the weights, 8 here"),
        (dict(r=0), "r=0: must be a whole number above 0"),
        (dict(lora_alpha="8"), "lora_alpha='8': must be a number above 0"),
        (dict(rank_pattern={"(": 4}), "is no pattern of names"),
        (dict(rank_pattern=[1]), "rank_pattern=.*expected an object"),
        (dict(modules_to_save="lm_head"), "modules_to_save='lm_head': expected a list"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_supported_is_named(adapter, fields, message):
    folder, _ = adapter
    edit(folder, **fields)
    with pytest.raises(UserError, match=message) as e:
        weights.load_folder(folder)
    assert "\n" not in str(e.value) and "adapter_config.json" in str(e.value)


Q = "base_model.model.model.layers.0.self_attn.q_proj."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {Q + "lora_magnitude_vector": t[Q + "lora_A.weight"]}, "has no place in"),
        (lambda t: t | {"x.lora_A.weight": torch.ones(4, 64)}, "adapts 'x', which the model does"),
        (lambda t: {k: v for k, v in t.items() if k != Q + "lora_B.weight"}, "only one of the two"),
        (lambda t: t | {Q + "lora_B.weight": torch.ones(9, 4)}, r"has shape \(9, 4\)"),
        (lambda t: t | {Q + "lora_B.weight": torch.full((64, 4), torch.nan)}, "NaN or infinite"),
        (lambda t: t | {"base_model.model.lm_head.weight": torch.ones(3)}, "has shape"),
        (lambda t: t | {"x": torch.ones(())}, "is a single number"),
        (
            lambda t: t | {"base_model.model.model.embed_tokens.weight": torch.ones(0, 64)},
            "'base_model.model.model.embed_tokens.weight' is empty",
        ),
        (
            lambda t: t | {f"model.norm.lora_{n}.weight": torch.ones(4, 4) for n in "AB"},
            "adapts 'model.norm.weight', which is no matrix",
        ),
    ],
    ids="dora unknown half shape nan head scalar empty norm".split(),
)
def test_tensors_at_fault_are_named(adapter, change, message):
    folder, _ = adapter
    tensors = load_file(folder / FILE)
    save_file({k: v.clone() for k, v in change(tensors).items()}, folder / FILE)
    with pytest.raises(UserError, match=message) as e:
        weights.load_folder(folder)
    assert "\n" not in str(e.value)


TABLE = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
HEAD = "base_model.model.lm_head.token_adapter.trainable_tokens_delta"


@pytest.mark.parametrize(
    ("ids", "name", "message"),
    [
        ([1, 2, 3], TABLE, "has 2 rows; trainable_token_indices in adapter_config.json names 3"),
        (None, TABLE, "has 2 rows; trainable_token_indices in adapter_config.json names 0"),
        ([1, 200], TABLE, "lacks the new row 199"),
        ({"norm": [1, 2]}, TABLE.replace("embed_tokens", "norm"), "has no place in the model"),
        ({"lm_head": [1, 2]}, HEAD, "replaces rows of the head alone, of a tied table"),
    ],
    ids="more none hole norm head".split(),
)
def test_rows_at_fault_are_named(tmp_path, ids, name, message):
    torch_model(dict(tie_word_embeddings=True)).save_pretrained(tmp_path / "base")
    adapt(tmp_path / "base", tmp_path / "a", KINDS["attention"])
    edit(tmp_path / "a", trainable_token_indices=ids)
    tensors = load_file(tmp_path / "a" / FILE)
    save_file(tensors | {name: torch.ones(2, 64)}, tmp_path / "a" / FILE)
    with pytest.raises(UserError, match=message) as e:
        weights.load_folder(tmp_path / "a")
    assert "\n" not in str(e.value)


def test_folders_that_do_not_fit_are_refused(adapter):
    folder, base = adapter
    shutil.copytree(folder, folder.parent / "chained")
    edit(folder.parent / "chained", base_model_name_or_path="../adapter")
    with pytest.raises(UserError, match="adapter is an adapter itself; merge that one first"):
        weights.open_folder(folder.parent / "chained")
    with pytest.raises(UserError, match="is an adapter itself"):  # before its tokenizer is missed
        loading.read_tokenizer(folder.parent / "chained")
    edit(folder.parent / "chained", base_model_name_or_path=".")
    with pytest.raises(UserError, match="is an adapter itself"):
        weights.open_folder(folder.parent / "chained")
    assert artifacts.fingerprint(folder.parent / "chained")  # comes to an end
    (base / "model.json").touch()
    with pytest.raises(UserError, match="is a training workdir; make a Hugging Face folder of it"):
        weights.open_folder(folder)
    (base / "model.json").unlink()
    shutil.copy(base / "model.safetensors", folder)
    with pytest.raises(UserError, match=f"holds both a model and an adapter .{FILE}.; move one"):
        weights.open_folder(folder)
    (folder / "model.safetensors").unlink()
    (folder / FILE).unlink()
    with pytest.raises(UserError, match=f"lacks the adapter's weights, {FILE}"):
        weights.open_folder(folder)
