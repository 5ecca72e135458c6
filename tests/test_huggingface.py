"""Hugging Face folders: logits and greedy text equal those of transformers' Llama and Mistral, a
round trip changes no tensor, and what is not supported is refused by name."""

import copy
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from selfrag_jax import cli
from selfrag_jax.checkpoints import loading
from selfrag_jax.errors import UserError
from selfrag_jax.huggingface import weight_files, weights
from selfrag_jax.models.llama import Cache, Model

TOKENIZER = Path(__file__).parent / "data" / "llama_tokenizer"
TOLERANCE = 1e-4  # of f32 logits
PROJECTION = "model.layers.1.mlp.up_proj.weight"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FAMILY = {
    "mha": dict(),
    "gqa": dict(num_key_value_heads=2),
    "tied": dict(tie_word_embeddings=True),
    "biases": dict(attention_bias=True, mlp_bias=True),
    "wide heads": dict(head_dim=24, num_key_value_heads=1),
    # An original context of 32 tokens, so that 80 tokens meet all three kinds of frequencies.
    "llama3 rope": dict(
        rope_parameters=LLAMA3 | {"rope_theta": 5e5, "original_max_position_embeddings": 32}
    ),
    "linear rope": dict(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}),
    "sliding window": dict(model_type="mistral", sliding_window=7, num_key_value_heads=2),
}


def torch_model(fields, seed=0):
    """A random model of transformers."""
    defaults = dict(
        vocab_size=199,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        initializer_range=0.1,
    )
    fields = defaults | fields
    config_class, model_class = transformers.LlamaConfig, transformers.LlamaForCausalLM
    if fields.pop("model_type", "llama") == "mistral":
        config_class, model_class = transformers.MistralConfig, transformers.MistralForCausalLM
    config = config_class(**fields, attn_implementation="eager")
    torch.manual_seed(seed)
    model = model_class(config).eval()
    # Norms and biases start at ones and zeros, which would hide that one is mapped wrongly.
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p += 0.3 * torch.randn(p.shape) * (1 if "norm" in name else 0.3)
    return model


@pytest.fixture(scope="module", params=FAMILY, ids=str)
def pair(request, tmp_path_factory):
    """(a random torch model, the folder it was saved to, our model, its parameters)."""
    theirs = torch_model(dict(FAMILY[request.param]))
    folder = tmp_path_factory.mktemp("hf")
    theirs.save_pretrained(folder)
    config, params = weights.load_folder(folder)
    return theirs, folder, Model(config), params


def assert_same_bytes(before, after):
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype and value.tobytes() == after[name].tobytes(), name


def test_logits_equal_those_of_transformers(pair):
    theirs, _, model, params = pair
    tokens = np.random.default_rng(0).integers(0, 199, (2, 80))
    positions = jnp.broadcast_to(jnp.arange(80), tokens.shape)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    hidden, _ = model.hidden(params, tokens, positions, None)
    np.testing.assert_allclose(model.logits(params, hidden), expected, atol=TOLERANCE, rtol=0)


def test_greedy_text_equals_that_of_transformers(pair):
    """64 tokens after two prompts of different lengths: ours as one batch, through the cache;
    theirs one prompt at a time."""
    theirs, _, model, params = pair
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, 199, n) for n in (5, 9)]
    tokens, valid = np.zeros((2, 9), np.int32), np.zeros((2, 9), np.int32)
    for i, prompt in enumerate(prompts):
        tokens[i, : len(prompt)], valid[i, : len(prompt)] = prompt, 1

    @jax.jit
    def step(params, tokens, positions, valid, cache):
        hidden, cache = model.hidden(params, tokens, positions, valid, cache)
        last_index = (jnp.maximum(valid.sum(1), 1) - 1)[:, None, None]
        last = jnp.take_along_axis(hidden, last_index, axis=1)[:, 0]
        return model.logits(params, last).argmax(-1).astype(jnp.int32), cache

    cache = Cache.empty(model.config, 2, 9 + 64)
    token, cache = step(params, tokens, np.maximum(valid.cumsum(1) - 1, 0), valid, cache)
    generated, position, one = [token], valid.sum(1), np.ones((2, 1), np.int32)
    for _ in range(63):
        token, cache = step(params, token[:, None], position[:, None], one, cache)
        generated.append(token)
        position = position + 1
    generated = np.stack(generated, 1)
    limits = dict(max_new_tokens=64, min_new_tokens=64, do_sample=False)
    for i, prompt in enumerate(prompts):
        ids = torch.tensor(prompt)[None]
        with torch.no_grad():
            expected = theirs.generate(ids, **limits, eos_token_id=None, pad_token_id=0)
        assert generated[i].tolist() == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16"))
def test_a_round_trip_changes_no_tensor(pair, tokenizer, tmp_path, dtype):
    theirs, _, model, _ = pair
    copy.deepcopy(theirs).to(getattr(torch, dtype)).save_pretrained(tmp_path / "in")
    config = weights.config_from_json(tmp_path / "in" / "config.json")
    files = weight_files.WeightFiles(tmp_path / "in")
    params = weights.read_params(files, config, model.shapes(), dtype)
    weights.save_folder(tmp_path / "out", config, params, tokenizer, dtype)
    assert_same_bytes(*(load_file(tmp_path / d / weights.WEIGHTS) for d in ("in", "out")))


def test_exported_folders_load_in_transformers(pair, tokenizer, tmp_path):
    theirs, _, model, params = pair
    weights.save_folder(tmp_path, model.config, params, tokenizer)
    exported, info = type(theirs).from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokens = torch.tensor(np.random.default_rng(0).integers(0, 199, (1, 60)))
    with torch.no_grad():
        actual, expected = exported.eval()(tokens).logits, theirs(tokens).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_shards_with_an_index_are_written_and_read(pair, tmp_path):
    theirs, folder, _, params = pair
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    assert (tmp_path / "theirs" / weights.INDEX).is_file()
    read = weights.load_folder(tmp_path / "theirs")[1]
    jax.tree.map(np.testing.assert_array_equal, read, params)

    ours, overwritten = tmp_path / "ours", tmp_path / "overwritten"
    ours.mkdir()
    overwritten.mkdir()
    tensors = load_file(folder / weights.WEIGHTS)
    weights.write_tensors(ours, tensors.items(), shard_bytes=100_000)
    index = json.loads((ours / weights.INDEX).read_text())
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    num_shards = len(set(index["weight_map"].values()))
    assert len(list(ours.iterdir())) == 1 + num_shards > 2
    shutil.copy(folder / weights.CONFIG, ours)
    doubled = {name: 2 * value for name, value in tensors.items()}
    weights.write_tensors(overwritten, doubled.items(), shard_bytes=100_000)
    weights.write_tensors(overwritten, tensors.items())  # a single file replaces the shards
    shutil.copy(folder / weights.CONFIG, overwritten)
    for written in (ours, overwritten):
        read = weights.load_folder(written)[1]
        jax.tree.map(np.testing.assert_array_equal, read, params)
    assert type(theirs).from_pretrained(ours).config.hidden_size == 64


@pytest.mark.parametrize("kind", FAMILY)
def test_a_round_trip_through_orbax_loses_nothing(kind, tmp_path):
    """No bit of the tensors, read from shards, and nothing that other programs read: several
    end-of-text tokens, no padding token, generation settings, a chat template."""
    theirs = torch_model(dict(FAMILY[kind], vocab_size=1416)).to(torch.bfloat16)
    theirs.config.eos_token_id, theirs.config.pad_token_id = [2, 5], None
    theirs.generation_config = transformers.GenerationConfig(
        bos_token_id=1, eos_token_id=[2, 5], do_sample=True, temperature=0.6, top_p=0.9
    )
    theirs.save_pretrained(tmp_path / "in", max_shard_size="100KB")
    shutil.copytree(TOKENIZER, tmp_path / "in", dirs_exist_ok=True)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (tmp_path / "in" / "chat_template.jinja").write_text(template)
    for source, out, form in (("in", "w", "orbax"), ("w", "out", "huggingface")):
        flags = [f"--from={tmp_path / source}", f"--to={tmp_path / out}", f"--format={form}"]
        assert cli.main(["convert", *flags]) == 0
    before, after = (
        {k: v for f in (tmp_path / d).glob("*.safetensors") for k, v in load_file(f).items()}
        for d in ("in", "out")
    )
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 1
    assert_same_bytes(before, after)
    exported = type(theirs).from_pretrained(tmp_path / "out")
    token_ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    for name in (*token_ids, "head_dim", "num_key_value_heads", "rope_parameters"):
        assert getattr(exported.config, name) == getattr(theirs.config, name), name
    settings = exported.generation_config.to_diff_dict()
    assert settings == theirs.generation_config.to_diff_dict()
    assert exported.generation_config.eos_token_id == [2, 5]
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == template


# ---- configs ---------------------------------------------------------------------------------
@pytest.mark.parametrize("cls", (transformers.LlamaConfig, transformers.MistralConfig))
def test_every_field_that_transformers_writes_is_known(cls, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(cls().to_dict()))
    c = weights.config_from_json(path)
    assert c.head_dim == 128 and c.rope_theta == 10_000.0
    assert c.sliding_window == (4096 if cls is transformers.MistralConfig else None)


def test_a_config_of_2023_is_read(tmp_path):
    """Llama-2's folders have torch_dtype, but neither rope_theta nor head_dim."""
    row = dict(
        architectures=["LlamaForCausalLM"],
        bos_token_id=1,
        eos_token_id=2,
        hidden_act="silu",
        hidden_size=5120,
        initializer_range=0.02,
        intermediate_size=13824,
        max_position_embeddings=4096,
        model_type="llama",
        num_attention_heads=40,
        num_hidden_layers=40,
        num_key_value_heads=40,
        pad_token_id=0,
        pretraining_tp=1,
        rms_norm_eps=1e-05,
        rope_scaling=None,
        tie_word_embeddings=False,
        torch_dtype="float16",
        transformers_version="4.31.0",
        use_cache=True,
        vocab_size=32016,
    )
    (tmp_path / "config.json").write_text(json.dumps(row))
    c = weights.config_from_json(tmp_path / "config.json")
    assert (c.head_dim, c.rope_theta, c.num_kv_heads, c.vocab_size) == (128, 10_000.0, 40, 32016)
    shapes = Model(c).shapes()
    assert shapes["layers"]["down"]["kernel"].shape == (40, 13824, 5120)
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 13_016_028_160  # 13B and 16 more rows


@pytest.mark.parametrize("model_type", ("llama", "mistral"))
def test_neutral_fields_are_ignored(tiny_model, tmp_path, model_type):
    c = replace(tiny_model.model.config, sliding_window=7 if model_type == "mistral" else None)
    file = tmp_path / "config.json"
    row = weights.config_to_json(c, {})
    row |= dict.fromkeys(("quantization_config", "attn_logit_softcapping", "hidden_act"))
    row |= dict(gradient_checkpointing=False, max_length=20, max_sequence_length=2048)
    row |= dict(_attn_implementation_autoset=True, use_sliding_window=model_type == "mistral")
    # Of SmolLM2, of unsloth's copies, of early transformers, and of Llama-2's fine-tunes.
    row |= {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"a": 1}}
    row |= dict(unsloth_fixed=True, unsloth_version="2026.4.2", tokenizer_class="LlamaTokenizer")
    row |= dict(_flash_attn_2_enabled=True, _attn_implementation="sdpa", do_sample=True, top_k=50)
    row |= dict(is_decoder=False, add_cross_attention=False, pruned_heads={}, tie_encoder_decoder=0)
    row |= dict(temperature=0.9, top_p=0.6, model_max_length=2048, _model_name_or_path="x")
    row |= dict(task_specific_params=None, tf_legacy_loss=False, use_bfloat16=False, min_length=0)
    file.write_text(json.dumps(row))
    assert weights.config_from_json(file) == c
    file.write_text(json.dumps(row | dict(use_sliding_window=model_type == "llama")))
    with pytest.raises(UserError, match="use_sliding_window=.* contradicts sliding_window"):
        weights.config_from_json(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"attn_logit_softcapping": 50}, "attn_logit_softcapping=50"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "'yarn'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling lacks factor"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2, "beta_fast": 1}},
            "rope_scaling.beta_fast=1",
        ),
        ({"sliding_window": 7}, "sliding_window=7"),
        ({"layer_types": ["sliding_attention"]}, "layer_types"),
        ({"model_type": "mistral"}, "lacks sliding_window"),
        (
            {"model_type": "mistral", "sliding_window": 7, "attention_bias": True},
            "attention_bias=true",
        ),
        ({"num_key_value_heads": 3}, "num_kv_heads=3"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": "32"}, "hidden_size='32': must be a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads=0: must be a whole number above 0"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers=2.0: must be a whole number"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps='small'"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear': expected an object"),
        (
            {"rope_scaling": {"type": "linear", "factor": 0}},
            "rope_scaling.factor=0: must be a number above 0",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": float("nan")}},
            "rope_scaling.factor=nan: must be a number above 0",
        ),
        (
            {"rope_parameters": {"rope_theta": -5.0}, "rope_theta": None},
            "rope_theta=-5.0: must be a number above 0",
        ),
        (
            {"rope_parameters": {"rope_theta": "abc"}, "rope_theta": None},
            "rope_theta='abc': must be a number above 0",
        ),
        (
            {"rope_parameters": {"rope_theta": 5e5}},
            "says both rope_theta=10000.0 and rope_theta=500000.0",
        ),
        ({"rope_scaling": {"rope_type": ["linear"]}}, "type .*linear"),
        ({"layer_types": 5}, "layer_types=5"),
        ({"layer_types": ["full_attention"] * 3}, "all 2 must be 'full_attention'"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false': must be true or false"),
        ({"rms_norm_eps": True}, "rms_norm_eps=True: must be a number"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder=True is not supported"),
        ({"rope_interleaved": True}, "rope_interleaved=True is not supported; only False"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads="),
        ({"add_cross_attention": True}, "add_cross_attention=True"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}, "auto_map="),
        (
            {"model_type": "mistral", "sliding_window": 0},
            "sliding_window=0: must be a whole number above 0",
        ),
    ],
)
def test_unsupported_fields_are_named(tiny_model, tmp_path, change, message):
    row = weights.config_to_json(tiny_model.model.config, {}) | change
    path = tmp_path / "config.json"
    path.write_text(json.dumps({k: v for k, v in row.items() if v is not None}))
    with pytest.raises(UserError, match="config.json: .*" + message):
        weights.config_from_json(path)


# ---- weights ---------------------------------------------------------------------------------
@pytest.fixture
def folder(tiny_model, tmp_path):
    weights.save_folder(tmp_path, tiny_model.model.config, tiny_model.params, tiny_model.tokenizer)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: {PROJECTION: x * np.float32(np.nan)}, f"{PROJECTION}' holds NaN or infinite"),
        (lambda x: {PROJECTION: x + np.float32(np.inf)}, f"{PROJECTION}' holds NaN or infinite"),
        (lambda x: {PROJECTION: None}, f"tensor '{PROJECTION}' is missing"),
        (
            lambda x: {PROJECTION: np.ascontiguousarray(x.T)},
            rf"{PROJECTION}' has shape \(32, 48\); .* should be \(48, 32\)",
        ),
        (lambda x: {PROJECTION: x.astype(np.int8)}, f"{PROJECTION}' is of type I8"),
        (lambda x: {"model.extra": x}, "'model.extra' has no place"),
    ],
    ids=("nan", "inf", "missing", "shape", "type", "extra"),
)
def test_tensors_at_fault_are_named(folder, change, message):
    tensors = load_file(folder / weights.WEIGHTS)
    tensors |= change(tensors[PROJECTION])
    kept = {name: value for name, value in tensors.items() if value is not None}
    save_file(kept, folder / weights.WEIGHTS)
    with pytest.raises(UserError, match=message):
        loading.load(folder)


def test_a_truncated_file_and_a_lost_shard_are_named(folder):
    file = folder / weights.WEIGHTS
    tensors = load_file(file)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"model\.safetensors: not readable.*truncated"):
        loading.load(folder)
    file.unlink()
    with pytest.raises(UserError, match="no weights here"):
        loading.load(folder)
    weights.write_tensors(folder, tensors.items(), shard_bytes=50_000)
    shards = sorted(folder.glob("model-*"))
    shards[1].unlink()
    with pytest.raises(UserError, match=f"shard {shards[1].name} is missing"):
        loading.load(folder)
    shutil.copy(shards[0], shards[1])
    message = r"model-0000\d-of-.*: tensor .* is missing, though model.safetensors.index.json"
    with pytest.raises(UserError, match=message):
        loading.load(folder)


def test_weights_have_the_permissions_of_the_config(folder):
    assert (folder / weights.WEIGHTS).stat().st_mode == (folder / weights.CONFIG).stat().st_mode


def test_a_failed_write_leaves_the_folder_as_it_was(folder, monkeypatch):
    """As on a full disk."""
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    tensors = load_file(folder / weights.WEIGHTS)
    calls = []

    def fail_at_second(tensors, path, metadata):
        calls.append(path)
        path.write_bytes(b"half")
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", fail_at_second)
    with pytest.raises(OSError, match="No space left"):
        weights.write_tensors(folder, tensors.items(), shard_bytes=50_000)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
