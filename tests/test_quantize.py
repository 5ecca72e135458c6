"""Answering in other types, with weights in int8, and split over devices."""

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

from selfrag_jax import cli, config
from selfrag_jax.answering.config import DEFAULT, AnswerConfig
from selfrag_jax.answering.selfrag import SelfRAG, prepare
from selfrag_jax.config import build
from selfrag_jax.errors import UserError
from selfrag_jax.huggingface import weights
from selfrag_jax.models import quantize
from selfrag_jax.models.architectures import architecture
from selfrag_jax.models.llama import Model
from selfrag_jax.models.params import flatten, leaf_at
from selfrag_jax.records import Question


def logits(model, params, tokens):
    hidden, _ = model.hidden(
        params, tokens, np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape), None
    )
    return np.asarray(model.logits(params, hidden))


def test_a_kernel_is_rounded_to_its_columns_scale(tiny_model):
    model, params = quantize.quantize(tiny_model.model, tiny_model.params)
    assert {p for p, _ in flatten(params)} == {p for p, _ in flatten(model.shapes())}
    for path, leaf in flatten(tiny_model.params):
        mine = leaf_at(params, path)
        if path[0] != "layers" or path[-1] != "kernel":
            np.testing.assert_array_equal(mine, leaf)
            continue
        scale = leaf_at(params, (*path[:-1], quantize.SCALE))
        assert mine.dtype == np.int8 and scale.shape == (leaf.shape[0], leaf.shape[2])
        np.testing.assert_allclose(scale, np.abs(leaf).max(1) / 127, rtol=1e-6)
        assert np.abs(mine * scale[:, None] - np.asarray(leaf)).max() <= scale.max() / 2 * 1.001
        assert (np.abs(mine).max(1) == 127).all()  # all of the range is used


def test_logits_hardly_change(tiny_model):
    """The same function as the product with the rounded kernels; and close to the one before."""
    tokens = np.random.default_rng(0).integers(5, 900, (3, 20))
    model, params = quantize.quantize(tiny_model.model, tiny_model.params)
    back = {
        path: np.asarray(leaf, np.float32) * leaf_at(params, (*path[:-1], quantize.SCALE))[:, None]
        if path[-1] == "kernel" and path[0] == "layers" else leaf
        for path, leaf in flatten(params) if path[-1] != quantize.SCALE
    }  # fmt: skip
    from selfrag_jax.models.params import build as nested

    expected = logits(tiny_model.model, nested(back.items()), tokens)
    np.testing.assert_allclose(logits(model, params, tokens), expected, atol=2e-5)
    original = logits(tiny_model.model, tiny_model.params, tokens)
    assert np.abs(expected - original).max() < 0.05 * original.std()


@pytest.fixture(scope="module")
def folder(talkative, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    weights.save_folder(path, talkative.model.config, talkative.params, talkative.tokenizer)
    return path


def answers(folder, also=None, **changes):
    """also: changes of a search that is run besides."""
    search = replace(DEFAULT.search, max_new_tokens=6, length_bucket=32, max_depth=2, ndocs=3)
    rag = SelfRAG.load(
        folder, config=replace(DEFAULT, search=search, batch=2, max_length=64, **changes)
    )
    rng = np.random.default_rng(5)
    rows = [
        Question(str(i), f"Where {i}?", ctxs=tuple(make_passages(rng, rag.loaded.tokenizer, 3)))
        for i in range(2)
    ]
    found = rag.answer(rows, mode="always_retrieve")
    return rag, found + (rag.answer(rows, mode="always_retrieve", **also) if also else [])


@pytest.mark.slow
def test_answers_in_other_types(folder):
    _, plain = answers(folder)
    rag, half = answers(folder, dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(rag.loaded.params)} == {jnp.dtype("bfloat16")}
    rag, small = answers(folder, dtype="bfloat16", quantization="int8")
    kinds = {x.dtype for x in jax.tree.leaves(rag.loaded.params)}
    assert (
        kinds == {jnp.dtype(t) for t in ("int8", "bfloat16", "float32")}
        and rag.loaded.model.config.quantized
    )
    for found in (half, small):
        assert all(a.segments and not a.error for a in found)
    rag, exact = answers(
        folder, quantization="int8"
    )  # the first critique, before the texts can part
    assert np.abs(np.array(exact[0].tree[0]["isrel"]) - plain[0].tree[0]["isrel"]).max() < 0.05


def test_wrong_settings_are_refused(tiny_model, capsys):
    for changes, message in (
        (dict(dtype="bf16"), "--dtype='bf16': must be one of float32, bfloat16, float16"),
        (dict(quantization="int4"), "--quantization='int4': must be int8"),
        (dict(tensor=0), "--tensor=0: must be at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            replace(DEFAULT, **changes)
    with pytest.raises(UserError, match="--tensor=3 does not divide the model's 2 key-value heads"):
        prepare(tiny_model, replace(DEFAULT, tensor=3))
    with pytest.raises(UserError, match="needs 2 devices"):
        prepare(tiny_model, replace(DEFAULT, tensor=2))
    assert cli.main(["compile", "--config=tiny", "--program=decode", "--topology=v5e:1x1"]) == 2
    assert "short_form and long_form have" in capsys.readouterr().err


@pytest.mark.parametrize("name", ("short_form", "short_form:7b", "short_form:13b", "long_form"))
def test_shipped_configs_of_answering_are_whole(name):
    c = config.load(name)
    assert build(AnswerConfig, c.answer, "answer").search.scorer == "paper" and c.kind == "answer"


PROGRAM = """
import json, sys
sys.path.insert(0, sys.argv[2])
from test_quantize import answers
from selfrag_jax.decoding import answer, released
released.KNOWN_LONG = 800  # half of the vocabulary, which lies over the devices
if sys.argv[4] == "one by one":
    answer.one_by_one = lambda *_: True
also = dict(scorer="released", max_depth=3, threshold=0.2)
rag, found = answers(sys.argv[1], also, tensor=int(sys.argv[3]), quantization=sys.argv[5] or None)
assert isinstance(rag.loaded.params["layers"], tuple) == (sys.argv[4] == "one by one")
print(json.dumps([[a.answer, a.score, [n["score"] for n in a.tree]] for a in found]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("bits", ("", "int8"))
def test_two_devices_answer_as_one(folder, bits):
    """With layers stacked, as on TPUs, and one by one, as on GPUs; by the paper's search and the released one."""
    found = []
    for devices, layers in ((1, "one by one"), (2, "stacked"), (2, "one by one")):
        env = os.environ | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_PLATFORMS": "cpu",
        }
        command = [
            sys.executable,
            "-c",
            PROGRAM,
            str(folder),
            os.path.dirname(__file__),
            str(devices),
            layers,
            bits,
        ]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads(done.stdout.splitlines()[-1]))
    for others in found[1:]:
        for (text, score, tree), (other, other_score, other_tree) in zip(
            found[0], others, strict=True
        ):
            assert text == other and score == pytest.approx(other_score, abs=1e-4)
            np.testing.assert_allclose(tree, other_tree, atol=1e-4)


@pytest.mark.slow
def test_answering_compiles_for_a_tpu(tmp_path):
    """A small model in int8 on one v5e chip, and in bf16 over four; and 7B in bf16, which one chip cannot hold."""
    (tmp_path / "c.py").write_text(
        "from selfrag_jax import config\nfrom selfrag_jax.models.architectures import ARCHITECTURES\n"
        "ARCHITECTURES['small'] = dict(vocab_size=992, head_dim=128, max_length=512, rope_theta=1e4, norm_eps=1e-5,\n"
        "    num_layers=2, embed_dim=512, mlp_dim=1024, num_heads=4, num_kv_heads=4)\n"
        "def get_config(which):\n    c = config.load('short_form:' + which)\n    c.architecture = 'small'\n    return c\n"
    )

    def run(name, topology, *more):
        command = [
            sys.executable,
            "-m",
            "selfrag_jax",
            "compile",
            f"--config={name}",
            "--program=decode",
            *more,
        ]
        done = subprocess.run([*command, f"--topology={topology}"], capture_output=True, text=True)
        return done, json.loads(done.stdout)

    done, one = run(f"{tmp_path}/c.py:7b_int8", "v5e:1x1")
    assert (
        done.returncode == 0
        and one["fits"]
        and set(one["programs"]) == {"prompt", "passages", "segment", "grow_branches"}
    )
    c = Model(replace(MODEL, quantized=True))
    stored = sum(x.size * (1 if x.dtype == np.int8 else 2) for x in jax.tree.leaves(c.shapes()))
    # Two layers, keys and values: 320 tokens of a prompt; 320 of a passage and 100 new ones in ten branches.
    caches = 2 * 2 * (320 + 10 * (320 + 100)) * 4 * 128 * 2
    assert (
        stored
        < one["programs"]["segment"]["memory_per_chip"]["arguments"] - caches
        < 1.2 * stored + 1e5
    )
    prompt = one["programs"]["prompt"][
        "memory_per_chip"
    ]  # the branches' own caches are held beside it
    assert prompt["held_beside"] >= 2 * 2 * 10 * (320 + 100) * 4 * 128 * 2
    assert prompt["total"] >= prompt["held_beside"] + prompt["arguments"]
    done, four = run(f"{tmp_path}/c.py:7b", "v5e:2x2")
    assert done.returncode == 0 and four["fits"] and four["mesh"]["tensor"] == 4
    assert four["programs"]["segment"]["collectives"]["all-reduce"]["count"]
    deep = ("--config.answer.search.max_depth=2", "--config.answer.batch=8")
    done, again = run(
        f"{tmp_path}/c.py:7b", "v5e:2x2", *deep, "--config.answer.search.keep_passages=false"
    )
    assert done.returncode == 0
    assert {"passages_together", "read_again", "grow_prefixes"} < {
        *again["programs"]
    } and "keep" not in again["programs"]
    done, large = run("short_form:7b", "v5e:1x1", "--config.answer.tensor=1")
    assert done.returncode == 1 and not large["fits"] and "does not fit v5e:1x1" in done.stderr


MODEL = replace(
    architecture("llama2_7b", 0, "bfloat16"),
    vocab_size=1008, embed_dim=512, mlp_dim=1024, num_layers=2, num_heads=4, num_kv_heads=4,
)  # fmt: skip
