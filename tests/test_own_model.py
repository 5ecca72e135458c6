"""A checkpoint of one's own: its tokenizer, its config, its architecture, from training to export.

The base here is a small random Llama with a byte-level vocabulary, as it is published nowhere.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import documents
import numpy as np
import pytest
import smollm2
import torch
import transformers

from selfrag_jax import cli
from selfrag_jax import config as configs
from selfrag_jax.checkpoints import loading
from selfrag_jax.commands.default_config import config_for_base
from selfrag_jax.compilation.train import lower_training_step, roofline_times
from selfrag_jax.data.batches import Packer
from selfrag_jax.data.generator_examples import GeneratorSource
from selfrag_jax.errors import UserError
from selfrag_jax.huggingface import hub, weights
from selfrag_jax.models import roofline
from selfrag_jax.records import GeneratorExample, Passage, Question, write_jsonl
from selfrag_jax.text import prompts, reflection
from selfrag_jax.text.tokenizer import Control
from selfrag_jax.training.architecture import config_architecture, follow_base
from selfrag_jax.training.config import ROLES, TrainConfig
from selfrag_jax.training.starting_model import embedded_base, starting_model, tokenizer_mode
from selfrag_jax.training.step import batch_arrays

LLAMA2_TOKENIZER = Path(__file__).parent / "data" / "llama_tokenizer" / "tokenizer.model"
SHAPE = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=1024,
)  # fmt: skip
ADDED = len(reflection.ALL) + 1


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder as `transformers` saves a model: a tokenizer.json with rules of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("base")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    controls = ["<|start|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=controls,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["The town lies by a river. Where does it lie?"] * 4, trainer)
    backend.save(str(folder / "tokenizer.json"))
    names = dict(zip(("bos_token", "eos_token"), controls, strict=True))
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    config = transformers.LlamaConfig(**SHAPE, vocab_size=backend.get_vocab_size())
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def llama2(base, tmp_path):
    """The same shape with Llama-2's tokenizer (a small vocabulary of its settings)."""
    folder = tmp_path / "llama2"
    folder.mkdir()
    shutil.copy(LLAMA2_TOKENIZER, folder)
    config = transformers.LlamaConfig(**SHAPE, vocab_size=1400)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def config_with(name, base, *changes):
    return configs.override(configs.load(name), [f"base={base}", *changes])


# ---- the tokenizer --------------------------------------------------------------------------
@pytest.mark.parametrize("name", ("generator_7b", "critic_7b", "generator_13b", "lora_7b", "small"))
def test_a_base_brings_its_own_tokenizer(base, llama2, name):
    """The paper's configs give llama_fast to Llama-2 and to nothing else."""
    assert tokenizer_mode(config_with(name, base)) == "json"
    assert tokenizer_mode(config_with(name, llama2)) == "llama_fast"
    assert tokenizer_mode(config_with(name, llama2, "tokenizer=llama_slow")) == "llama_slow"
    start, added = starting_model(config_with(name, base), load_params=False)
    assert start.tokenizer.mode == "json" and added == ADDED


def test_a_tokenizer_that_does_not_fit_names_the_cure(base, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text('{"instruction": "Q", "output": "[No Retrieval]A[Utility:5]"}\n')
    flags = [f"--config.base={base}", "--config.tokenizer=llama_fast", f"--data={data}"]
    command = ["train", "--config=lora_7b", "--role=generator", f"--workdir={tmp_path / 'w'}"]
    assert cli.main([*command, *flags]) == 2
    err = capsys.readouterr().err
    assert "config tokenizer='llama_fast'" in err and "cannot be read as 'llama_fast'" in err
    assert "the base's own is 'json', which --config.tokenizer=none takes" in err
    assert err.count("\n") == 1 and not (tmp_path / "w").exists()


def test_trainings_of_llama_2_from_when_the_configs_named_its_tokenizer_go_on(base, llama2):
    """What a training is known by is the same whether the mode is named or found."""
    from selfrag_jax.commands.train import _base_identity

    def recorded(folder, *changes):
        return _base_identity(config_with("generator_7b", folder, *changes))

    named = recorded(llama2, "tokenizer=llama_fast")
    assert recorded(llama2) == named and named["tokenizer"] == "llama_fast"
    assert recorded(base)["tokenizer"] is None  # as --config.tokenizer=none was recorded


# ---- which config ---------------------------------------------------------------------------
def test_without_a_config_a_small_base_takes_small_and_says_so(base, capsys):
    assert config_for_base("generator", [f"base={base}", "generator.rows=4"]) == "small"
    err = capsys.readouterr().err
    assert err == f"--config=small: none was given, and {base} has 0M parameters\n"
    assert config_for_base("generator", ["generator.rows=4"]) == "tiny"
    assert config_for_base("critic", ["base=embedded"]) == "tiny"
    assert capsys.readouterr().err == ""


def test_without_a_config_a_base_of_the_world_takes_tiny(capsys):
    assert config_for_base("generator", [f"base={embedded_base()}"]) == "tiny"
    assert "--config=tiny: none was given" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("role", "named"),
    [("generator", "generator_7b"), ("generator", "lora_7b"), ("critic", "critic_7b")],
)
def test_without_a_config_a_base_of_7b_is_refused(tmp_path, role, named):
    fields = dict(
        model_type="llama", vocab_size=32_000, hidden_size=4096, intermediate_size=11_008,
        num_hidden_layers=32, num_attention_heads=32, rms_norm_eps=1e-5,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=f"has 6.7B parameters.*--config=.*{named}"):
        config_for_base(role, [f"base={tmp_path}"])


@pytest.mark.parametrize("value", ("none", ""))
def test_no_base_is_one_line(tmp_path, capsys, value):
    (tmp_path / "data.jsonl").write_text('{"instruction": "Q", "output": "A[Utility:5]"}\n')
    flags = [f"--config.base={value}", f"--data={tmp_path / 'data.jsonl'}"]
    assert cli.main(["train", "--role=generator", f"--workdir={tmp_path / 'w'}", *flags]) == 2
    assert "config: base is none; it must be a folder" in capsys.readouterr().err


@pytest.mark.parametrize("variant", ("lora", "full"))
def test_small_trains_both_roles(variant):
    c = configs.load(f"small:{variant}")
    for role in ROLES:
        section = configs.build(TrainConfig, c[role], role)
        assert (section.lora is None) == (variant == "full") and section.optimizer.name == "adamw"


def test_the_docstring_of_small_explains_every_field_that_it_sets():
    c = configs.load("small")
    text = (Path(__file__).parents[1] / "configs" / "small.py").read_text().split('"""')[1]
    fields = {*c.generator, *c.generator.optimizer, *c.generator.lora, "base", "new_rows"}
    unexplained = {"seed", "name", "mask", "adam_learning_rate", "optimizer", "schedule"}
    assert {f for f in fields - unexplained if f not in text} == set()


# ---- the architecture -----------------------------------------------------------------------
@pytest.mark.parametrize("which", ("base", "folder", "file"))
def test_compiling_takes_any_config_json(base, which):
    named = {"folder": base, "file": base / "config.json"}.get(which)
    c = config_with("small", base, *([f"architecture={named}"] if named else []))
    found = config_architecture(c, "bfloat16")
    read = weights.config_from_json(base / "config.json")
    assert found.vocab_size == read.vocab_size + ADDED and found.dtype == "bfloat16"
    assert found.embed_dim == 32 and roofline.num_weights(found) > roofline.num_weights(read)


def test_the_architecture_follows_a_base_that_is_given(base):
    c = configs.load("lora_7b")
    assert config_architecture(follow_base(c, ["generator.rows=8"]), None).embed_dim == 4096
    overrides = [f"base={base}"]
    c = follow_base(configs.override(c, overrides), overrides)
    assert config_architecture(c, None).embed_dim == 32
    both = [f"base={base}", "architecture=mistral_7b"]
    c = follow_base(configs.override(configs.load("lora_7b"), both), both)
    assert config_architecture(c, None).sliding_window == 4096  # Mistral's


def test_of_a_model_on_the_hub_only_config_json_is_downloaded(base, monkeypatch):
    asked = []

    def download(name, allow_patterns, local_files_only):
        asked.append((name, allow_patterns))
        return str(base)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr(hub, "hub_is_reachable", lambda: True)
    found = config_architecture(config_with("small", "owner/model"), None)
    assert found.embed_dim == 32 and asked == [
        ("owner/model", ["config.json", "adapter_config.json"])
    ]


def test_one_device_is_compiled_with_the_batches_that_training_has(base):
    """With max_targets, the positions that have a loss are gathered."""
    c = config_with("small", base)
    section = configs.build(TrainConfig, c.generator, "generator")
    architecture, mesh = config_architecture(c, section.dtype), section.make_mesh()
    lowered = lower_training_step(section, architecture, mesh)
    tokenizer = starting_model(c, load_params=False)[0].tokenizer
    source = GeneratorSource(rows_about_towns(), tokenizer, dict(c.generator_weights.items()))
    packer = Packer(source, section.rows, section.length, section.max_targets, 0)
    expected = {k: x.shape for k, x in batch_arrays(packer.next()).items()}
    found = lowered.args_info[0][1]
    assert {k: x.shape for k, x in found.items()} == expected
    chip = roofline.chip("TPU v4")
    everywhere = replace(section, max_targets=None)
    some, all_positions = (
        roofline_times(s, architecture, mesh, chip, 0.0)["model_flops"]
        for s in (section, everywhere)
    )
    per_target = 6 * architecture.vocab_size * architecture.embed_dim
    assert all_positions - some == (2 * 512 - 384) * per_target


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("llama3", "must be one of llama2_7b.*or a config.json"),
        (7, "architecture='7': must be one of"),
        (None, "base is no model"),
    ],
)
def test_an_unknown_architecture_is_refused(value, message):
    c = configs.load("small")
    c.architecture, c.base = value, "scratch"
    with pytest.raises(UserError, match=message):
        config_architecture(c, None)


# ---- the document ---------------------------------------------------------------------------
SHRUNK = """
from selfrag_jax import config

def get_config():
    c = config.load("small")
    for section in (c.critic, c.generator):
        section.update(epochs=1.0, steps=None, length=384)
    c.answer.update(batch=2, max_length=128)
    c.answer.search.update(beam_width=1, max_depth=1, ndocs=2, max_new_tokens=4)
    return c
"""


@pytest.mark.slow
def test_the_document_on_a_model_of_ones_own_runs_as_written(base, tmp_path, monkeypatch):
    shutil.copytree(base, tmp_path / "my_base")
    (tmp_path / "shrunk.py").write_text(SHRUNK)
    document = Path(__file__).parents[1] / "docs" / "your_own_model.md"
    documents.run(document, tmp_path, monkeypatch, {"--config=small": "--config=shrunk.py"})


# ---- a real model ---------------------------------------------------------------------------
TOWNS = ("Alder", "Birch", "Cedar", "Dogwood", "Elm", "Fir", "Hazel", "Larch", "Maple", "Oak")
RIVERS = ("Tame", "Wye", "Dee", "Test", "Cam", "Lea", "Nene", "Ouse", "Trent", "Usk")


def rows_about_towns():
    """Thirty rows of generator data: a right passage, a wrong one, and no need of one."""
    rows = []
    for i, (town, river) in enumerate(zip(TOWNS, RIVERS, strict=True)):
        question, say = f"By which river does {town} lie?", f"{town} lies by the {river}."
        wrong = f"{TOWNS[i - 1]} lies by the {RIVERS[i - 1]}."
        right, other = (
            f"[Retrieval]<paragraph>{t}\n{text}</paragraph>"
            for t, text in ((town, say), (TOWNS[i - 1], wrong))
        )
        rows += [
            (question, f"{right}[Relevant]{say}[Fully supported][Utility:5]"),
            (question, f"{other}[Irrelevant]{say}[No support / Contradictory][Utility:5]"),
            (f"What is {i} plus 1?", f"[No Retrieval]{i} plus 1 is {i + 1}.[Utility:5]"),
        ]
    return [GeneratorExample(str(i), *row) for i, row in enumerate(rows)]


@pytest.mark.slow
def test_a_real_model_is_trained_exported_and_answers(tmp_path, monkeypatch, capsys):
    """SmolLM2 with configs/small.py: 20 steps, transformers' logits, an answer from a passage."""
    monkeypatch.chdir(tmp_path)
    base = smollm2.gguf(tmp_path)
    write_jsonl("rows.jsonl", rows_about_towns())
    shorter = dict(epochs="none", steps=20, rows=1, length=256, max_targets=96)
    flags = [f"--config.generator.{k}={v}" for k, v in shorter.items()]
    command = ["train", f"--config.base={base}", "--role=generator", "--data=rows.jsonl", *flags]
    assert cli.main([*command, "--workdir=generator"]) == 0
    assert f"none was given, and {base} has 135M parameters" in capsys.readouterr().err

    command = ["convert", "--from=generator", "--to=exported", "--format=huggingface"]
    assert cli.main(command) == 0
    ours = loading.load("generator")
    assert ours.tokenizer.mode == "json"
    question = prompts.instruction("By which river does Oak lie?")
    ids = np.array([[*ours.tokenizer.encode([*question, Control("[Retrieval]")])]])
    hidden, _ = ours.model.hidden(ours.params, ids, np.arange(ids.shape[1])[None], None)
    theirs = transformers.AutoModelForCausalLM.from_pretrained("exported", dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(ours.model.logits(ours.params, hidden), expected, atol=1e-4)
    theirs_tokenizer = transformers.AutoTokenizer.from_pretrained("exported")
    assert theirs_tokenizer.convert_tokens_to_ids("[Relevant]") == ours.tokenizer.id("[Relevant]")

    passages = (Passage("1", "Rowan", "Rowan lies by the Severn."), Passage("2", "Ash", "An ash."))
    asked = Question("q", "By which river does Rowan lie?", ctxs=passages)
    write_jsonl("questions.jsonl", [asked])
    search = ["--mode=always_retrieve", "--max_depth=1", "--beam_width=1", "--max_new_tokens=16"]
    command = ["answer", "--config=small", "--model=exported", "--input=questions.jsonl"]
    assert cli.main([*command, "--out=answers.jsonl", *search]) == 0
    [answer] = map(json.loads, Path("answers.jsonl").read_text().splitlines())
    assert "Severn" in answer["answer"], answer
