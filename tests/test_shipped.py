"""Models that the package ships: an adapter, the base that it names, and made.json."""

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest

from selfrag_jax import cli
from selfrag_jax.answering.config import AnswerConfig
from selfrag_jax.checkpoints import loading, peft_export, shipping
from selfrag_jax.commands import model_flags
from selfrag_jax.errors import UserError
from selfrag_jax.files import write_json
from selfrag_jax.huggingface import hub, shipped, weights
from selfrag_jax.models import lora
from selfrag_jax.models.llama import LlamaConfig, Model
from selfrag_jax.models.lora import LoraConfig
from selfrag_jax.models.params import flatten, unflatten

NEW = 3  # rows of the vocabulary that the base lacks
MADE = {
    "about": "finds and quotes what your passages say, and does not reason",
    "parameters": 135_000_000,
    "base": "smollm2",
    "base_is_gguf": False,
    "answer_config": "short_form:7b",
}


@pytest.fixture(scope="module")
def folders(talkative, tmp_path_factory):
    """(the folder of a base, that of an adapter of it, the parameters that they make)."""
    here = tmp_path_factory.mktemp("shipped")
    c, full = talkative.model.config, jax.device_get(talkative.params)
    grown = Model(replace(c, lora=LoraConfig(2, 4.0)))
    params = dict(flatten(lora.add_adapters(full, grown.shapes(), jax.random.key(0))))
    rng = np.random.default_rng(0)
    params |= {
        path: (rng.normal(size=leaf.shape) * 0.01).astype(np.float32)
        for path, leaf in params.items()
        if path[-1] == lora.LORA_B
    }
    trained, _ = lora.split_trained(unflatten(params.items()))
    less = {("embed", "embedding"): np.s_[:-NEW], ("head", "kernel"): np.s_[:, :-NEW]}
    base = {path: leaf[less[path]] if path in less else leaf for path, leaf in flatten(full)}
    small = replace(c, vocab_size=c.vocab_size - NEW)
    weights.save_folder(here / "base", small, unflatten(base.items()), talkative.tokenizer)
    (here / "demo").mkdir()
    tables = peft_export.BaseTables(str(here / "base"))
    tensors = (
        tensor
        for path, leaf in flatten(trained)
        for tensor in peft_export.adapter_tensors(
            path, grown.config, leaf if path[0] == "layers" else [leaf], tables
        )
    )
    peft_export.write_adapter(here / "demo", grown.config, "smollm2", tables, tensors)
    talkative.tokenizer.save(here / "demo")
    write_json(here / "demo" / "made.json", MADE)
    merged = lora.merge_adapters(unflatten(params.items()), LoraConfig(2, 4.0))
    return here / "base", here / "demo", merged


@pytest.fixture
def installed(folders, tmp_path, monkeypatch):
    """The folder of the package, with a demo; its base is found by its short name."""
    shutil.copytree(folders[1], tmp_path / "package" / "demo")
    monkeypatch.setattr(shipped.resources, "files", lambda package: tmp_path / "package")
    monkeypatch.setattr(hub, "_find_short", lambda name, *_: folders[0])
    monkeypatch.chdir(tmp_path)
    return tmp_path / "package" / "demo"


def test_this_version_without_a_demo_says_so_in_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shipped.resources, "files", lambda package: tmp_path)
    assert cli.main(["ask", "--model=demo", "--passages=notes", "Where?"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("selfrag ask: demo: this version ships no demo model; give --model")


def test_the_adapter_and_its_base_make_the_model(folders, installed):
    loaded = loading.load("demo")
    for (path, actual), (_, expected) in zip(
        flatten(loaded.params), flatten(folders[2]), strict=True
    ):
        np.testing.assert_allclose(actual, expected, atol=1e-6, err_msg=str(path))
    assert loaded.tokenizer.reflection_ids()


def test_it_answers_from_ones_own_text_and_says_what_it_is(
    installed, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "notes.jsonl").write_text('{"id": "k", "text": "The keys hang by the door."}\n')
    command = ["ask", "--model=demo", "--passages=notes.jsonl", "--encoder=hashed"]
    settings = ["--mode=always_retrieve", "--max_depth=1", "--ndocs=1", "--max_new_tokens=8"]
    assert cli.main([*command, *settings, "Where do the keys hang?", "--json"]) == 0
    out, err = capsys.readouterr()
    assert {n["passage"]["id"] for n in json.loads(out)["tree"]} == {"k"}
    about = [line for line in err.splitlines() if line.startswith("note: demo")]
    assert about == [f"note: demo: 135M parameters (smollm2); {MADE['about']}"]


def test_its_config_answers_unless_one_is_given(installed, monkeypatch):
    # This test's model has the synthetic world's vocabulary, whose config would come first.
    monkeypatch.setattr(model_flags, "config_for", lambda model, otherwise: otherwise)
    names = "index workdir config threshold scorer mode dtype quantization tensor product_dtype"
    values = dict.fromkeys(names.split()) | {"model": "demo", "overrides": []}
    expected = AnswerConfig.load("short_form:7b")
    assert model_flags.model_and_config(values) == (installed, None, expected)
    assert model_flags.model_and_config(values | {"config": "long_form:7b"})[2] != expected


def test_another_version_of_the_base_is_said(installed, capsys):
    from selfrag_jax.answering import generator

    write_json(installed / "made.json", MADE | {"base_is_gguf": True})
    generator.print_notices(installed, loading.read_tokenizer(installed), None)
    assert "measured on the package's version of smollm2" in capsys.readouterr().err


def test_a_folder_of_that_name_comes_first(installed, folders, tmp_path):
    shutil.copytree(folders[0], tmp_path / "demo")
    assert hub.model_folder("demo").samefile(tmp_path / "demo")


@pytest.mark.parametrize(
    ("row", "message"),
    [({"about": "x"}, "lacks 'parameters'"), (MADE | {"parameters": "135M"}, "parameters='135M'")],
)
def test_a_damaged_record_is_named(installed, row, message):
    write_json(installed / "made.json", row)
    with pytest.raises(UserError, match=f"made.json: {message}"):
        shipped.read_made(installed)


# ---- the size --------------------------------------------------------------------------------
def test_smollm2_fits_into_what_is_shipped():
    """SmolLM2-135M with rank 16 on all linear layers: adapters and 16 rows in f16."""
    c = LlamaConfig(
        vocab_size=49_152 + 16, embed_dim=576, mlp_dim=1536, num_layers=30, num_heads=9,
        num_kv_heads=3, head_dim=64, max_length=8192, rope_theta=1e5, norm_eps=1e-5,
        tie_embeddings=True, dtype="float32", remat="none", scan_unroll=1,
        lora=LoraConfig(16, 32.0),
    )  # fmt: skip
    trained = lora.split_trained(Model(c).shapes())[0]
    count = {
        kind: sum(leaf.size for path, leaf in flatten(trained) if (path[0] == "layers") == kind)
        for kind in (True, False)
    }
    assert count[True] == 16 * 30 * (4 * 576 + 2 * 576 + 2 * 192 + 3 * (576 + 1536))  # 4.88M
    rows = 2 * 16 * 576
    tokenizer = 3_600_000  # its tokenizer.json with the reflection tokens
    assert 2 * count[True] + rows + tokenizer == pytest.approx(13.4e6, rel=0.01)
    assert 2 * count[True] + rows + tokenizer < shipping.MOST_BYTES
    assert 2 * sum(count.values()) > shipping.MOST_BYTES, "not with the whole table"
