"""Published vocabularies: the ids equal those of transformers 4.31.

The released generator was trained and served with that version.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfrag_jax.checkpoints.loading import read_tokenizer
from selfrag_jax.data.batches import build_example
from selfrag_jax.errors import UserError
from selfrag_jax.records import Passage
from selfrag_jax.text import prompts, reflection
from selfrag_jax.text.tokenizer import EOS, MODES, Control, Tokenizer

FOLDER = Path(__file__).parent / "data" / "llama_tokenizer"
CASES = [
    json.loads(line)
    for line in (Path(__file__).parent / "data" / "llama_tokenizer_ids.jsonl").open()
]
TIKTOKEN = b"IQ== 0\nIg== 1\nIw== 2\n"
CONTROLS = (*reflection.ALL, "<s>", "</s>", "<unk>", "[PAD]")
SPLIT = re.compile("(" + "|".join(map(re.escape, CONTROLS)) + ")")
LLAMA_MODES = (("llama_slow", "slow"), ("llama_fast", "fast"))


def parts(text):
    """Splits training data, which spells out control tokens, into parts."""
    return [Control(t) if t in CONTROLS else t for t in SPLIT.split(text) if t]


@pytest.fixture(scope="module", params=["tokenizer.model", "export", "tokenizer.json"])
def folder(request, tmp_path_factory):
    """The same tokenizer as published, exported, and exported without its sentencepiece file."""
    if request.param == "tokenizer.model":
        return FOLDER
    out = tmp_path_factory.mktemp("export")
    Tokenizer.load(FOLDER, "llama_slow").save(out)
    if request.param == "tokenizer.json":
        (out / "tokenizer.model").unlink()
    return out


@pytest.mark.parametrize(("mode", "stored"), LLAMA_MODES)
def test_ids_are_those_of_transformers_4_31(folder, mode, stored):
    tokenizer = Tokenizer.load(folder, mode)
    assert len(CASES) >= 200 and tokenizer.vocab_size == 1416 and tokenizer.mode == mode
    found = [[tokenizer.bos_id, *tokenizer.encode(parts(c["text"]))] for c in CASES]
    assert [c["text"] for c, ids in zip(CASES, found, strict=True) if ids != c[stored]] == []


def test_the_two_modes_differ_next_to_control_tokens():
    row = next(c for c in CASES if "Response:\n[Retrieval]" in c["text"])
    newline = Tokenizer.load(FOLDER).encode("\n")[-1]
    at = [c.index(1401) for c in (row["slow"], row["fast"])]
    assert row["slow"][at[0] - 1] != newline and row["fast"][at[1] - 1] == newline


@pytest.mark.parametrize("mode", ["llama_slow", "llama_fast"])
@given(text=st.text(alphabet=st.characters(codec="utf-8"), max_size=50), data=st.data())
@settings(max_examples=150, deadline=None)
def test_user_text_never_becomes_a_control_token(mode, text, data):
    tokenizer = _loaded(mode)
    for name in data.draw(st.lists(st.sampled_from(CONTROLS), max_size=3)):
        at = data.draw(st.integers(0, len(text)))
        text = text[:at] + name + text[at:]
    controls = {tokenizer.id(name) for name in CONTROLS}
    ids = tokenizer.encode(text)
    assert not controls & set(ids)
    # Sentencepiece treats U+2581 as a space.
    assert tokenizer.decode(ids) == text.replace("\u2581", " ")


_CACHE = {}


def _loaded(mode):
    return _CACHE.setdefault(mode, Tokenizer.load(FOLDER, mode))


def test_decoding_restores_the_text(folder):
    tokenizer = Tokenizer.load(folder, "llama_fast")
    for case in CASES:
        if "\u2581" not in case["text"]:
            assert tokenizer.decode(tokenizer.encode(parts(case["text"]))) == case["text"]


def test_adjacent_text_parts_are_encoded_as_one():
    """This vocabulary has no headings, so they are text; a passage has a title, newline, text."""
    tokenizer = Tokenizer.load(FOLDER)
    prompt = [
        *prompts.instruction("Say it.", "Here."),
        Control("[Retrieval]"),
        *prompts.passage(Passage("1", "Title", "Text.")),
    ]
    text = (
        "### Instruction:\nSay it.\n\n### Input:\nHere.\n\n### Response:\n"
        "[Retrieval]<paragraph>Title\nText.</paragraph>"
    )
    assert tokenizer.encode(prompt) == tokenizer.encode(parts(text))
    assert tokenizer.decode(tokenizer.encode(prompt)) == text


@pytest.mark.parametrize("mode", ["llama_slow", "llama_fast"])
def test_a_training_example_is_encoded_as_one_text(mode):
    """Prompt and output are encoded together; prompt and passage have no loss."""
    tokenizer = Tokenizer.load(FOLDER, mode)
    weights = dict.fromkeys(reflection.GROUPS, 1.0)
    output = "[Relevant]It is so. [Fully supported][Utility:5]"
    passage = "[Retrieval]<paragraph>T\nP</paragraph>"
    segments = [
        (prompts.instruction("Say it."), 0.0),
        ([Control("[Retrieval]")], 1.0),
        (parts(passage)[1:], 0.0),
        (parts(output), 1.0),
        ([Control(EOS)], 1.0),
    ]
    example = build_example(tokenizer, segments, weights)
    text = f"### Instruction:\nSay it.\n\n### Response:\n{passage}{output}</s>"
    assert example.tokens.tolist() == [tokenizer.bos_id, *tokenizer.encode(parts(text))]
    learned = [int(t) for t, w in zip(example.tokens, example.weight, strict=True) if w]
    space = "" if mode == "llama_slow" else " "
    expected = f"[Retrieval][Relevant]It is so.{space}[Fully supported][Utility:5]</s>"
    assert tokenizer.decode(learned) == expected
    prompt = tokenizer.encode(prompts.instruction("Say it."), before_control=True)
    prompt = [tokenizer.bos_id, *prompt]
    assert example.tokens[: len(prompt)].tolist() == prompt  # where decoding starts


def test_reflection_tokens_are_added_in_the_released_order(tmp_path):
    shutil.copy(FOLDER / "tokenizer.model", tmp_path / "tokenizer.model")
    plain = Tokenizer.load(tmp_path)
    assert plain.vocab_size == 1400 and plain.pad_id == plain.eos_id
    with pytest.raises(reflection.MissingReflectionTokens, match=r"\[Retrieval\]"):
        plain.reflection_ids()
    grown, released = plain.with_reflection_tokens(), Tokenizer.load(FOLDER)
    assert [grown.id(t) for t in CONTROLS] == [released.id(t) for t in CONTROLS]
    assert grown.pad_id == 1415
    assert grown.with_reflection_tokens().vocab_size == grown.vocab_size == 1416


def test_missing_and_duplicate_reflection_tokens_are_named():
    ids = {token: 100 + i for i, token in enumerate(reflection.ALL)}
    assert reflection.missing_tokens(ids.get) == []
    assert reflection.missing_tokens({}.get) == list(reflection.ALL)
    only_opening = reflection.missing_tokens({"<paragraph>": 3}.get)
    assert only_opening == [t for t in reflection.ALL if t != "<paragraph>"]
    message = r"some reflection tokens, but not \[Relevant\];"
    with pytest.raises(reflection.MissingReflectionTokens, match=message):
        reflection.missing_tokens({t: i for t, i in ids.items() if t != "[Relevant]"}.get)
    with pytest.raises(UserError, match=r"\[Irrelevant\] and \[Relevant\] have the same id, 103"):
        reflection.lookup((ids | {"[Relevant]": ids["[Irrelevant]"]}).get)


@pytest.mark.parametrize("mode", ["llama_slow", "llama_fast"])
def test_the_mode_is_saved(tmp_path, mode):
    Tokenizer.load(FOLDER, mode).save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.mode == mode
    assert loaded.reflection_ids() == Tokenizer.load(FOLDER).reflection_ids()


def test_an_export_has_the_same_ids_in_transformers(tmp_path):
    from transformers import AutoTokenizer

    Tokenizer.load(FOLDER).save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 1415)
    wrong = [c["text"] for c in CASES if theirs(c["text"])["input_ids"] != c["fast"]]
    assert wrong == []


def test_another_vocabulary_keeps_its_own_rules(tmp_path):
    """Byte-level byte pairs with other names for beginning and end of text, like Llama-3's.

    The authors' own tokenizer.model, of tiktoken, may lie beside it.
    """
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = ["The cat sat on the mat.", "A dog is in the fog."] * 3
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    text = "The cat is on the fog.\n\nÄ 😀"
    plain = backend.encode(text).ids
    bos, eos = "<|begin_of_text|>", "<|end_of_text|>"
    backend.add_special_tokens([AddedToken(t, special=True) for t in (bos, eos)])
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": bos, "eos_token": {"content": eos}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.model").write_bytes(TIKTOKEN)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.mode == "json"
    assert tokenizer.encode(text) == plain and tokenizer.decode(plain) == text
    assert tokenizer.eos_id == backend.token_to_id(eos)
    assert tokenizer.encode(Control(EOS)) == [tokenizer.eos_id]
    assert tokenizer.eos_id not in tokenizer.encode(eos)
    grown = tokenizer.with_reflection_tokens()
    assert grown.id("[No Retrieval]") == tokenizer.vocab_size
    grown.save(tmp_path / "saved")
    loaded = Tokenizer.load(tmp_path / "saved")
    sample = [Control("[Retrieval]"), text, Control(EOS)]
    assert loaded.encode(sample) == grown.encode(sample) and loaded.bos_id == tokenizer.bos_id


def test_new_tokens_come_after_the_highest_id(tmp_path):
    """Also if the pieces of the vocabulary do not start at 0."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    specials = {"<s>": 0, "</s>": 1, "<pad>": 2}
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    spec = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": t, "special": True} | flags for t, i in specials.items()
        ],
        "pre_tokenizer": byte_level | {"add_prefix_space": False},
        "decoder": byte_level | {"add_prefix_space": True},
        "model": {"type": "BPE", "vocab": {c: 3 + i for i, c in enumerate("abcdef")}, "merges": []},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("abf") == [3, 4, 8] and tokenizer.vocab_size == 9
    assert tokenizer.with_reflection_tokens().id("[No Retrieval]") == 9


def test_a_vocabulary_without_a_leading_space_keeps_its_own_rules(tmp_path):
    Tokenizer.load(FOLDER).save(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    (tmp_path / "tokenizer_mode.json").unlink()
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    without, llama = Tokenizer.load(tmp_path), Tokenizer.load(FOLDER)
    assert without.mode == "json" and without.encode("The town") != llama.encode("The town")
    assert without.encode(" The town") == llama.encode("The town")


# ---- errors --------------------------------------------------------------------------------------
def write_files(folder, files):
    """Writes {name: content} to a folder and returns it."""
    for name, content in files.items():
        data = content if isinstance(content, bytes) else content.encode()
        (folder / name).write_bytes(data)
    return folder


LLAMA = (FOLDER / "tokenizer.model").read_bytes()
NOT_BPE = '{"model": {"type": "WordPiece", "vocab": {}}}'
NO_CONTROLS = '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}'
UNKNOWN_MODE = '{"mode": "fast"}'
WRONG_MODE = '{"mode": "json", "added": {}, "names": {}}'


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no model here; expected a training workdir"),
        (
            {"tokenizer.model": LLAMA[:5000]},
            "tokenizer.model: not readable as a sentencepiece model",
        ),
        (
            {"tokenizer.model": TIKTOKEN},
            "tokenizer.model: is tiktoken's, as Llama 3 is published by its authors; put the "
            "tokenizer.json of the same model beside it",
        ),
        ({"tokenizer.json": "{"}, "tokenizer.json: not readable as a tokenizer"),
        ({"tokenizer.json": NOT_BPE}, "type 'WordPiece'; only BPE"),
        ({"tokenizer.json": NO_CONTROLS}, "has no token '<s>'"),
        (
            {"tokenizer.model": LLAMA, "added_tokens.json": "[1"},
            "added_tokens.json: not valid JSON",
        ),
        (
            {"tokenizer.model": LLAMA, "tokenizer_mode.json": UNKNOWN_MODE},
            f"known modes: {', '.join(MODES)}",
        ),
        (
            {"tokenizer.model": LLAMA, "tokenizer_mode.json": WRONG_MODE},
            "cannot be read as 'json'",
        ),
        (
            {"tokenizer.model": LLAMA, "tokenizer_mode.json": "[]"},
            "tokenizer_mode.json: not readable as the record",
        ),
    ],
)
def test_errors_name_the_bad_file(tmp_path, files, message):
    with pytest.raises(UserError, match=re.escape(message)):
        read_tokenizer(write_files(tmp_path, files))
