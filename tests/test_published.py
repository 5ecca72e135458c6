"""What a researcher does: takes a published Llama folder, trains it by a shipped recipe (in small),
and exports a folder that `transformers` loads."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from selfrag_jax import cli
from selfrag_jax.answering.selfrag import SelfRAG
from selfrag_jax.checkpoints import loading
from selfrag_jax.errors import UserError
from selfrag_jax.huggingface import weights
from selfrag_jax.records import GeneratorExample, write_jsonl
from selfrag_jax.text.tokenizer import Control, Tokenizer

TOKENIZER = Path(__file__).parent / "data" / "llama_tokenizer" / "tokenizer.model"
CONFIG = """
from selfrag_jax import config

def get_config(which):
    c = config.load(which)
    c.base, c.tokenizer = {base!r}, "llama_slow"
    g = c.generator
    g.epochs, g.rows, g.rows_per_device = 4.0, 4, 2
    g.length, g.loss_chunk, g.dtype = 128, 64, "float32"
    g.optimizer.learning_rate, g.log_every, g.save_every = 1e-2, 2, 4
    return c
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder as Llama-2 is published: weights of transformers, a sentencepiece file, no
    reflection tokens."""
    folder = tmp_path_factory.mktemp("llama")
    fields = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    config = transformers.LlamaConfig(**fields, vocab_size=1400)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    shutil.copy(TOKENIZER, folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    passage = "[Retrieval]<paragraph>Town\nIt lies by a river.</paragraph>"
    output = f"{passage}[Relevant]By a river.[Fully supported][Utility:5]"
    file = tmp_path_factory.mktemp("data") / "data.jsonl"
    questions = [f"Where does town {i} lie?" for i in range(16)]
    write_jsonl(file, [GeneratorExample(str(i), q, output) for i, q in enumerate(questions)])
    return file


def train(config, data, workdir, *flags):
    command = ["train", f"--config={config}", "--role=generator"]
    return cli.main([*command, f"--data={data}", f"--workdir={workdir}", *flags])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ("generator_7b", "lora_7b"))
def test_a_published_folder_is_trained_and_exported(base, data, tmp_path, capsys, recipe):
    (tmp_path / "c.py").write_text(CONFIG.format(base=str(base)))
    config, workdir, exported = f"{tmp_path}/c.py:{recipe}", tmp_path / "w", tmp_path / "hf"
    assert train(config, data, workdir) == 0
    err = capsys.readouterr().err
    assert "16/16" in err or "16 steps" in err  # 4 epochs of 16 rows, 4 rows per update
    assert train(config, data, workdir) == 0
    assert "steps" not in capsys.readouterr().err  # finished: nothing to do
    flags = [f"--from={workdir}", f"--to={exported}", "--format=huggingface"]
    assert cli.main(["convert", *flags]) == 0

    ours = loading.load(workdir)
    assert ours.model.config.vocab_size == 1416 and ours.tokenizer.mode == "llama_slow"
    assert Tokenizer.load(exported).mode == "llama_slow"
    text = ["Where is it?", Control("[Retrieval]"), "Here."]
    prompt = np.array([[ours.tokenizer.bos_id, *ours.tokenizer.encode(text)]])
    positions = np.arange(prompt.shape[1])[None]
    hidden, _ = ours.model.hidden(ours.params, prompt, positions, None)
    logits = jnp.asarray(ours.model.logits(ours.params, hidden))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(prompt)).logits.numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    theirs_tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    retrieval_id = theirs_tokenizer.convert_tokens_to_ids("[Retrieval]")
    assert retrieval_id == ours.tokenizer.id("[Retrieval]") == 1401


@pytest.mark.parametrize("kind", ("published", "synthetic world"))
def test_the_default_search_depends_on_the_kind_of_model(
    base, tiny_model, tmp_path, monkeypatch, kind
):
    """Without --config, a published model gets the paper's search, not that of the small models."""
    folder, expected = base, ("sum", 0.2, 100, 7)
    if kind != "published":
        folder, expected = tmp_path, ("mean", 0.1, 24, 4)
        params = jax.device_get(tiny_model.params)
        weights.save_folder(folder, tiny_model.model.config, params, tiny_model.tokenizer)
    configs = []

    def record_and_stop(model, index, config, passages=None):
        configs.append(config)
        raise UserError("stopped here")

    monkeypatch.setattr(SelfRAG, "load", record_and_stop)
    assert cli.main(["ask", f"--model={folder}", "--ndocs=3", "Where?"]) == 2
    config, search = configs[0], configs[0].search
    limits = (search.max_new_tokens, search.max_depth)
    assert (search.accumulate, search.threshold, *limits) == expected
    assert config.quantization is None and config.dtype is None and config.tensor == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--config.generator.rows=6"],
            "rows=6 is not divisible by mesh data x fsdp = 1 x rows_per_device=4",
        ),
        (
            ["--config.generator.rows_per_device=none", "--config.generator.mesh.fsdp=3"],
            "needs 3 devices",
        ),
        (["--config.generator.mesh.data=-1"], "one of them may be -1"),
        (["--config.generator.steps=5"], "give one of them, the other as none"),
        (["--config.generator.length=none"], "config generator: length must not be none"),
        (
            ["--config.generator.lora.rank=0"],
            "config generator.lora: lora: rank=0 must be at least 1",
        ),
        (["--config.tokenizer=json"], "cannot be read as 'json', but as llama_slow or llama_fast"),
        (["--config.base=none/such/folder"], "no such folder"),
        (["--distributed=10.0.0.1,2"], "expected auto, or HOST:PORT,PROCESSES,INDEX"),
        (["--distributed=10.0.0.1:99,2,2"], "expected auto, or HOST:PORT,PROCESSES,INDEX"),
    ],
)
def test_bad_recipes_are_refused_and_leave_nothing(base, data, tmp_path, capsys, flags, message):
    (tmp_path / "c.py").write_text(CONFIG.format(base=str(base)).replace("4.0, 4, 2", "4.0, 4, 4"))
    assert train(f"{tmp_path}/c.py:lora_7b", data, tmp_path / "w", *flags) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err
    assert not (tmp_path / "w").exists()
