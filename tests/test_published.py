"""A researcher's way: a published Llama folder, the shipped recipe in small, an export that `transformers` loads."""

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
    g.epochs, g.rows, g.rows_per_device, g.length, g.loss_chunk, g.dtype = 4.0, 4, 2, 128, 64, "float32"
    g.optimizer.learning_rate, g.log_every, g.save_every = 1e-2, 2, 4
    return c
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """As Llama-2 is published: weights by transformers, a sentencepiece file, no reflection tokens."""
    folder = tmp_path_factory.mktemp("llama")
    fields = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=1400,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).save_pretrained(folder)
    shutil.copy(TOKENIZER, folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    passage = "[Retrieval]<paragraph>Town\nIt lies by a river.</paragraph>"
    output = f"{passage}[Relevant]By a river.[Fully supported][Utility:5]"
    file = tmp_path_factory.mktemp("data") / "data.jsonl"
    write_jsonl(
        file, [GeneratorExample(str(i), f"Where does town {i} lie?", output) for i in range(16)]
    )
    return file


@pytest.mark.slow
@pytest.mark.parametrize("which", ("generator_7b", "lora_7b"))
def test_from_a_published_folder_and_back(base, data, tmp_path, capsys, which):
    (tmp_path / "c.py").write_text(CONFIG.format(base=str(base)))
    command = [
        "train",
        f"--config={tmp_path}/c.py:{which}",
        "--role=generator",
        f"--data={data}",
        f"--workdir={tmp_path}/w",
    ]
    assert cli.main(command) == 0
    assert (
        "16/16" in (said := capsys.readouterr().err) or "16 steps" in said
    )  # 4 passes over 16 rows, 4 an update
    assert (
        cli.main(command) == 0 and "steps" not in capsys.readouterr().err
    )  # finished: nothing to do
    assert (
        cli.main(["convert", f"--from={tmp_path}/w", f"--to={tmp_path}/hf", "--format=huggingface"])
        == 0
    )

    ours = loading.load(tmp_path / "w")
    assert ours.model.config.vocab_size == 1416 and ours.tokenizer.mode == "llama_slow"
    assert Tokenizer.load(tmp_path / "hf").mode == "llama_slow"
    prompt = [
        ours.tokenizer.bos_id,
        *ours.tokenizer.encode(["Where is it?", Control("[Retrieval]"), "Here."]),
    ]
    hidden, _ = ours.model.hidden(
        ours.params, np.array([prompt]), np.arange(len(prompt))[None], None
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor([prompt])).logits.numpy()
    np.testing.assert_allclose(
        jnp.asarray(ours.model.logits(ours.params, hidden)), expected, atol=1e-4
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (
        tokenizer.convert_tokens_to_ids("[Retrieval]") == ours.tokenizer.id("[Retrieval]") == 1401
    )


@pytest.mark.parametrize("which", ("published", "synthetic world"))
def test_a_model_is_asked_as_its_kind_wants(base, tiny_model, tmp_path, monkeypatch, which):
    """Without --config: the paper's search, not that of the synthetic world's small models."""
    folder, expected = base, ("sum", 0.2, 100, 7)
    if which != "published":
        folder, expected = tmp_path, ("mean", 0.1, 24, 4)
        weights.save_folder(
            folder, tiny_model.model.config, jax.device_get(tiny_model.params), tiny_model.tokenizer
        )
    seen = []
    monkeypatch.setattr(SelfRAG, "load", lambda model, index, config: seen.append(config) or stop())
    assert cli.main(["ask", f"--model={folder}", "--ndocs=3", "Where?"]) == 2
    search = seen[0].search
    assert (
        search.accumulate,
        search.threshold,
        search.max_new_tokens,
        search.max_depth,
    ) == expected
    assert seen[0].quantization is None and seen[0].dtype is None and seen[0].tensor == 1


def stop():
    raise UserError("far enough")


@pytest.mark.parametrize(
    ("changes", "message"),
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
        (["--config.generator.steps=5"], "give one of them"),
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
def test_bad_recipes_are_refused_and_leave_nothing(base, data, tmp_path, capsys, changes, message):
    (tmp_path / "c.py").write_text(CONFIG.format(base=str(base)).replace("4.0, 4, 2", "4.0, 4, 4"))
    command = [
        "train",
        f"--config={tmp_path}/c.py:lora_7b",
        "--role=generator",
        f"--data={data}",
        f"--workdir={tmp_path}/w",
    ]
    assert cli.main([*command, *changes]) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err
    assert not (tmp_path / "w").exists()
