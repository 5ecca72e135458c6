"""Quantization, and answering in other types, with int8 weights, and on several devices."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_search import make_passages
from repetitions import some

from selfrag_jax import cli, config
from selfrag_jax.answering.config import DEFAULT, AnswerConfig
from selfrag_jax.answering.loading import prepare_model
from selfrag_jax.answering.selfrag import SelfRAG
from selfrag_jax.config import build
from selfrag_jax.errors import UserError
from selfrag_jax.huggingface import weights
from selfrag_jax.models import quantize
from selfrag_jax.models.architectures import architecture
from selfrag_jax.models.llama import Model
from selfrag_jax.models.params import flatten, leaf_at, unflatten
from selfrag_jax.records import Question


def logits(model, params, tokens):
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = model.hidden(params, tokens, positions, None)
    return np.asarray(model.logits(params, hidden))


def test_kernels_are_rounded_to_the_scale_of_their_columns(tiny_model):
    model, params = quantize.quantize(tiny_model.model, tiny_model.params)
    assert {p for p, _ in flatten(params)} == {p for p, _ in flatten(model.shapes())}
    for path, leaf in flatten(tiny_model.params):
        found = leaf_at(params, path)
        if path[0] != "layers" or path[-1] != "kernel":
            np.testing.assert_array_equal(found, leaf)
            continue
        scale = leaf_at(params, (*path[:-1], quantize.SCALE))
        assert found.dtype == np.int8 and scale.shape == (leaf.shape[0], leaf.shape[2])
        np.testing.assert_allclose(scale, np.abs(leaf).max(1) / 127, rtol=1e-6)
        assert np.abs(found * scale[:, None] - np.asarray(leaf)).max() <= scale.max() / 2 * 1.001
        assert (np.abs(found).max(1) == 127).all()  # the whole range is used


def test_quantization_hardly_changes_logits(tiny_model):
    """Logits equal those of the dequantized kernels, and are close to the original ones."""
    tokens = np.random.default_rng(0).integers(5, 900, (3, 20))
    model, params = quantize.quantize(tiny_model.model, tiny_model.params)
    dequantized = {}
    for path, leaf in flatten(params):
        if path[0] == "layers" and path[-1] == "kernel":
            scale = leaf_at(params, (*path[:-1], quantize.SCALE))
            leaf = np.asarray(leaf, np.float32) * scale[:, None]
        if path[-1] != quantize.SCALE:
            dequantized[path] = leaf
    expected = logits(tiny_model.model, unflatten(dequantized.items()), tokens)
    np.testing.assert_allclose(logits(model, params, tokens), expected, atol=2e-5)
    original = logits(tiny_model.model, tiny_model.params, tokens)
    assert np.abs(expected - original).max() < 0.05 * original.std()


@pytest.fixture(scope="module")
def folder(talkative, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    weights.save_folder(path, talkative.model.config, talkative.params, talkative.tokenizer)
    return path


def answers(folder, second_search=None, **changes):
    """Answers two questions, and again with the options `second_search`, if given."""
    search = replace(DEFAULT.search, max_new_tokens=6, length_bucket=32, max_depth=2, ndocs=3)
    answer_config = replace(DEFAULT, search=search, batch=2, max_length=64, **changes)
    rag = SelfRAG.load(folder, config=answer_config)
    rng = np.random.default_rng(5)
    rows = [
        Question(str(i), f"Where {i}?", ctxs=tuple(make_passages(rng, rag.loaded.tokenizer, 3)))
        for i in range(2)
    ]
    found = rag.answer(rows, mode="always_retrieve")
    if second_search:
        found += rag.answer(rows, mode="always_retrieve", **second_search)
    return rag, found


@pytest.mark.slow
def test_answers_in_other_types(folder):
    _, plain = answers(folder)
    rag, half = answers(folder, dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(rag.loaded.params)} == {jnp.dtype("bfloat16")}
    rag, small = answers(folder, dtype="bfloat16", quantization="int8")
    dtypes = {x.dtype for x in jax.tree.leaves(rag.loaded.params)}
    assert dtypes == {jnp.dtype(t) for t in ("int8", "bfloat16", "float32")}
    assert rag.loaded.model.config.quantized
    for found in (half, small):
        assert all(a.segments and not a.error for a in found)
    # The first critique comes before the texts can differ.
    rag, exact = answers(folder, quantization="int8")
    assert np.abs(np.array(exact[0].tree[0]["isrel"]) - plain[0].tree[0]["isrel"]).max() < 0.05


def test_invalid_settings_are_refused(tiny_model, capsys):
    for changes, message in (
        (dict(dtype="bf16"), "--dtype='bf16': must be one of float32, bfloat16, float16"),
        (dict(quantization="int4"), "--quantization='int4': must be int8"),
        (dict(tensor=0), "--tensor=0: must be at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            replace(DEFAULT, **changes)
    with pytest.raises(UserError, match="--tensor=3 does not divide the model's 2 key-value heads"):
        prepare_model(tiny_model, replace(DEFAULT, tensor=3))
    with pytest.raises(UserError, match="--tensor=2: needs 2 devices; there are 1"):
        prepare_model(tiny_model, replace(DEFAULT, tensor=2))
    assert cli.main(["compile", "--config=tiny", "--program=decode", "--topology=v5e:1x1"]) == 2
    assert "short_form, long_form and small have" in capsys.readouterr().err


@pytest.mark.parametrize("name", ("short_form", "short_form:7b", "short_form:13b", "long_form"))
def test_shipped_answer_configs_are_complete(name):
    c = config.load(name)
    assert build(AnswerConfig, c.answer, "answer").search.scorer == "paper" and c.kind == "answer"


# Arguments: model folder, folder of this file, devices, "per layer" or "stacked", quantization.
PROGRAM = """
import json, sys
model, tests, devices, layers, quantization = sys.argv[1:]
sys.path.insert(0, tests)
from test_quantize import answers
from selfrag_jax.answering import loading
from selfrag_jax.search.released import search as released
released.NUM_KNOWN_LONG = 800  # half of the vocabulary, which is split over the devices
if layers == "per layer":
    loading.unstack_layers = lambda *_: True
second = dict(scorer="released", max_depth=3, threshold=0.2)
rag, found = answers(model, second, tensor=int(devices), quantization=quantization or None)
assert isinstance(rag.loaded.params["layers"], tuple) == (layers == "per layer")
print(json.dumps([[a.answer, a.score, [n["score"] for n in a.tree]] for a in found]))
"""


@pytest.mark.slow
# int8 has everything that plain weights have, and scales.
@pytest.mark.parametrize("quantization", some(("int8",), ("", "int8")))
def test_two_devices_answer_as_one(folder, quantization):
    """With layers stacked, as on TPUs, and per layer, as on GPUs; by both searches."""
    found = []
    for devices, layers in ((1, "per layer"), (2, "stacked"), (2, "per layer")):
        env = os.environ | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_PLATFORMS": "cpu",
        }
        tests = os.path.dirname(__file__)
        arguments = (str(folder), tests, str(devices), layers, quantization)
        command = [sys.executable, "-c", PROGRAM, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads(done.stdout.splitlines()[-1]))
    for others in found[1:]:
        for one, two in zip(found[0], others, strict=True):
            (text, score, tree), (other, other_score, other_tree) = one, two
            assert text == other and score == pytest.approx(other_score, abs=1e-4)
            np.testing.assert_allclose(tree, other_tree, atol=1e-4)


SMALL = replace(
    architecture("llama2_7b", 0, "bfloat16"),
    vocab_size=1008, embed_dim=512, mlp_dim=1024, num_layers=2, num_heads=4, num_kv_heads=4,
)  # fmt: skip
SMALL_CONFIG = """
from selfrag_jax import config
from selfrag_jax.models.architectures import ARCHITECTURES

ARCHITECTURES["small"] = dict(
    vocab_size=992, head_dim=128, max_length=512, rope_theta=1e4, norm_eps=1e-5,
    num_layers=2, embed_dim=512, mlp_dim=1024, num_heads=4, num_kv_heads=4,
)


def get_config(which):
    c = config.load("short_form:" + which)
    c.architecture = "small"
    return c
"""


@pytest.mark.slow
def test_answering_compiles_for_a_tpu(tmp_path):
    """A small model fits in int8 on one v5e chip, and in bf16 over four; --full: 7B does not."""
    (tmp_path / "c.py").write_text(SMALL_CONFIG)

    def run(name, topology, *flags):
        arguments = (f"--config={name}", "--program=decode", *flags, f"--topology={topology}")
        command = [sys.executable, "-m", "selfrag_jax", "compile", *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        return done, json.loads(done.stdout)

    done, one = run(f"{tmp_path}/c.py:7b_int8", "v5e:1x1")
    assert done.returncode == 0 and one["fits"]
    assert set(one["programs"]) == {"prompt", "passages", "segment", "grow_branches"}
    shapes = Model(replace(SMALL, quantized=True)).shapes()
    stored = sum(x.size * (1 if x.dtype == np.int8 else 2) for x in jax.tree.leaves(shapes))
    # Two layers, keys and values: 320 tokens of a prompt; 320 of a passage and 100 new ones in each
    # of ten branches.
    caches = 2 * 2 * (320 + 10 * (320 + 100)) * 4 * 128 * 2
    arguments = one["programs"]["segment"]["memory_per_chip"]["arguments"]
    assert stored < arguments - caches < 1.2 * stored + 1e5
    # The caches of the branches are held beside the prompt's program.
    prompt = one["programs"]["prompt"]["memory_per_chip"]
    assert prompt["held_beside"] >= 2 * 2 * 10 * (320 + 100) * 4 * 128 * 2
    assert prompt["total"] >= prompt["held_beside"] + prompt["arguments"]
    deep = ("--config.answer.search.max_depth=2", "--config.answer.batch=8")
    rereads = "--config.answer.search.keep_passages=false"
    done, four = run(f"{tmp_path}/c.py:7b", "v5e:2x2", *deep, rereads)
    assert done.returncode == 0 and four["fits"] and four["mesh"]["tensor"] == 4
    assert four["programs"]["segment"]["collectives"]["all-reduce"]["count"]
    assert "keep" not in four["programs"]
    assert {"passages_together", "read_again", "grow_prefixes"} < {*four["programs"]}
    if not some(False, True):  # test_compilation.py has a training that does not fit
        return
    done, large = run("short_form:7b", "v5e:1x1", "--config.answer.tensor=1")
    assert done.returncode == 1 and not large["fits"] and "does not fit v5e:1x1" in done.stderr
