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
from selfrag_jax.errors import UserError
from selfrag_jax.huggingface import weights
from selfrag_jax.models.llama import Model

TOLERANCE = 1e-4  # of f32 logits
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
}


def adapt(base, folder, fields, rows=None, change=lambda model: None, **options):
    """An adapter of the base's folder with random weights, as PEFT saves it; returns its model.

    rows: of the vocabulary, which is enlarged first. options: of save_pretrained.
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
            for name, p in model.named_parameters():
                if p.requires_grad:
                    p += 0.1 * torch.randn(p.shape)
        change(model)
        model.save_pretrained(folder, **options)
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
    "kind", ("attention", "whole tables", "whole embedding", "table adapted")
)
def test_an_enlarged_vocabulary_is_read(base, tmp_path, kind):
    """From modules that were trained whole, or from those that PEFT saves because they grew."""
    kinds = KINDS | {"whole embedding": dict(target_modules=ALL, modules_to_save=["embed_tokens"])}
    model = adapt(base, tmp_path / "a", kinds[kind], rows=207)
    tokens = np.concatenate([TOKENS, np.arange(199, 207)[None]], axis=1)
    actual = our_logits(tmp_path / "a", tokens)
    assert actual.shape[-1] == 207
    np.testing.assert_allclose(actual, their_logits(model, tokens), atol=TOLERANCE, rtol=0)


def test_tensors_equal_those_of_merge_and_unload(tmp_path):
    """An adapter in bf16, in torch's format, of a base in bf16: merged in f32."""
    torch_model({}).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    options = dict(safe_serialization=False)
    try:
        model = adapt(tmp_path / "base", tmp_path / "a", KINDS["all, rslora"], **options)
    except (TypeError, ValueError):
        model = adapt(tmp_path / "base", tmp_path / "a", KINDS["all, rslora"])
    files = weights.open_folder(tmp_path / "a")[1]
    merged = model.to(torch.float32).merge_and_unload().state_dict()
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"):
        expected = merged[name].numpy()
        np.testing.assert_allclose(files.tensor(name, expected.shape), expected, atol=1e-6)
    assert files.dtype(["lm_head.weight"]) == "float32"
