"""Published vocabularies: ids equal to those of transformers 4.31, by which the released generator was trained and served."""

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
CONTROLS = (*reflection.ALL, "<s>", "</s>", "<unk>", "[PAD]")
SPLIT = re.compile("(" + "|".join(map(re.escape, CONTROLS)) + ")")
LLAMA_MODES = (("llama_slow", "slow"), ("llama_fast", "fast"))


def parts(text):
    """Training data, in which control tokens are spelled."""
    return [Control(t) if t in CONTROLS else t for t in SPLIT.split(text) if t]


@pytest.fixture(scope="module", params=["tokenizer.model", "export", "tokenizer.json"])
def folder(request, tmp_path_factory):
    """The same tokenizer as a published folder, as an export of ours, and as an export that lost the sentencepiece file."""
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
    wrong = [
        c["text"]
        for c in CASES
        if [tokenizer.bos_id, *tokenizer.encode(parts(c["text"]))] != c[stored]
    ]
    assert wrong == []


def test_the_two_modes_differ_beside_control_tokens():
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
    assert tokenizer.decode(ids) == text.replace(
        "\u2581", " "
    )  # which sentencepiece takes for a space


_CACHE = {}


def _loaded(mode):
    return _CACHE.setdefault(mode, Tokenizer.load(FOLDER, mode))


def test_decoding_restores_the_text(folder):
    tokenizer = Tokenizer.load(folder, "llama_fast")
    for case in CASES:
        if "\u2581" not in case["text"]:
            assert tokenizer.decode(tokenizer.encode(parts(case["text"]))) == case["text"]


def test_parts_of_a_text_are_encoded_as_one():
    """Headings are text here, and a passage is a title, a newline and a text."""
    tokenizer = Tokenizer.load(FOLDER)
    said = [
        *prompts.instruction("Say it.", "Here."),
        Control("[Retrieval]"),
        *prompts.passage(Passage("1", "Title", "Text.")),
    ]
    spelled = "### Instruction:\nSay it.\n\n### Input:\nHere.\n\n### Response:\n[Retrieval]<paragraph>Title\nText.</paragraph>"
    assert (
        tokenizer.encode(said) == tokenizer.encode(parts(spelled))
        and tokenizer.decode(tokenizer.encode(said)) == spelled
    )


@pytest.mark.parametrize("mode", ["llama_slow", "llama_fast"])
def test_training_examples_are_the_joined_text_with_its_masks(mode):
    """Prompt and output are encoded as one text would be; the prompt and the passage are not learned."""
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
    assert (
        tokenizer.decode(learned)
        == f"[Retrieval][Relevant]It is so.{space}[Fully supported][Utility:5]</s>"
    )
    prompt = [
        tokenizer.bos_id,
        *tokenizer.encode(prompts.instruction("Say it."), before_control=True),
    ]
    assert example.tokens[: len(prompt)].tolist() == prompt  # what decoding starts from


def test_reflection_tokens_are_added_in_the_released_order(tmp_path):
    for name in ("tokenizer.model",):
        shutil.copy(FOLDER / name, tmp_path / name)
    plain = Tokenizer.load(tmp_path)
    assert plain.vocab_size == 1400 and plain.pad_id == plain.eos_id
    with pytest.raises(reflection.MissingReflectionTokens, match=r"\[Retrieval\]"):
        plain.reflection_ids()
    grown, released = plain.with_reflection_tokens(), Tokenizer.load(FOLDER)
    assert [grown.id(t) for t in CONTROLS] == [released.id(t) for t in CONTROLS]
    assert (
        grown.pad_id == 1415
        and grown.with_reflection_tokens().vocab_size == grown.vocab_size == 1416
    )


def test_lost_and_doubled_reflection_tokens_are_named():
    ids = {token: 100 + i for i, token in enumerate(reflection.ALL)}
    assert reflection.lacking(ids.get) == [] and reflection.lacking({}.get) == list(reflection.ALL)
    assert reflection.lacking({"<paragraph>": 3}.get) == [
        t for t in reflection.ALL if t != "<paragraph>"
    ]
    with pytest.raises(
        reflection.MissingReflectionTokens, match=r"some reflection tokens, but not \[Relevant\];"
    ):
        reflection.lacking({t: i for t, i in ids.items() if t != "[Relevant]"}.get)
    with pytest.raises(UserError, match=r"\[Irrelevant\] and \[Relevant\] have the same id, 103"):
        reflection.lookup((ids | {"[Relevant]": ids["[Irrelevant]"]}).get)


@pytest.mark.parametrize("mode", ["llama_slow", "llama_fast"])
def test_the_mode_is_kept(tmp_path, mode):
    Tokenizer.load(FOLDER, mode).save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.mode == mode and again.reflection_ids() == Tokenizer.load(FOLDER).reflection_ids()


def test_an_export_has_the_same_ids_in_transformers(tmp_path):
    from transformers import AutoTokenizer

    Tokenizer.load(FOLDER).save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 1415)
    wrong = [c["text"] for c in CASES if theirs(c["text"])["input_ids"] != c["fast"]]
    assert wrong == []


def test_another_vocabulary_keeps_its_own_rules(tmp_path):
    """Byte-level byte pairs with names of their own for beginning and end, as Llama-3 has them."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.BPE())
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = ["The cat sat on the mat.", "A dog is in the fog."] * 3
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    text = "The cat is on the fog.\n\nÄ 😀"
    plain = backend.encode(text).ids
    backend.add_special_tokens(
        [AddedToken(t, special=True) for t in ("<|begin_of_text|>", "<|end_of_text|>")]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": "<|begin_of_text|>", "eos_token": {"content": "<|end_of_text|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path)
    assert (
        tokenizer.mode == "json"
        and tokenizer.encode(text) == plain
        and tokenizer.decode(plain) == text
    )
    assert (
        tokenizer.encode(Control(EOS))
        == [tokenizer.eos_id]
        == [backend.token_to_id("<|end_of_text|>")]
    )
    assert tokenizer.eos_id not in tokenizer.encode("<|end_of_text|>")
    grown = tokenizer.with_reflection_tokens()
    assert grown.id("[No Retrieval]") == tokenizer.vocab_size
    grown.save(tmp_path / "again")
    again = Tokenizer.load(tmp_path / "again")
    said = [Control("[Retrieval]"), text, Control(EOS)]
    assert again.encode(said) == grown.encode(said) and again.bos_id == tokenizer.bos_id


def test_new_tokens_stand_behind_the_highest_id(tmp_path):
    """Of a vocabulary whose pieces do not begin at 0."""
    specials = {"<s>": 0, "</s>": 1, "<pad>": 2}
    spec = {
        "version": "1.0",
        "added_tokens": [dict(id=i, content=t, special=True, single_word=False, lstrip=False, rstrip=False, normalized=False)
                         for t, i in specials.items()],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": {c: 3 + i for i, c in enumerate("abcdef")}, "merges": []},
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("abf") == [3, 4, 8] and tokenizer.vocab_size == 9
    assert tokenizer.with_reflection_tokens().id("[No Retrieval]") == 9


def test_a_vocabulary_that_puts_no_space_in_front_keeps_its_own_rules(tmp_path):
    Tokenizer.load(FOLDER).save(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    (tmp_path / "tokenizer_mode.json").unlink()
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    bare = Tokenizer.load(tmp_path)
    spaced = Tokenizer.load(FOLDER)
    assert bare.mode == "json" and bare.encode("The town") != spaced.encode("The town")
    assert bare.encode(" The town") == spaced.encode("The town")


# ---- bad input -------------------------------------------------------------------------------------------------------
def broken(tmp_path, **files):
    for name, content in files.items():
        (tmp_path / name.replace("__", ".")).write_bytes(
            content if isinstance(content, bytes) else content.encode()
        )
    return tmp_path


MODEL = (FOLDER / "tokenizer.model").read_bytes()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "expected tokenizer.model or tokenizer.json"),
        (dict(tokenizer__model=MODEL[:5000]), "tokenizer.model: not readable as a sentencepiece model"),
        (dict(tokenizer__json="{"), "tokenizer.json: not readable as a tokenizer"),
        (dict(tokenizer__json='{"model": {"type": "WordPiece", "vocab": {}}}'), "type 'WordPiece'; only BPE"),
        (dict(tokenizer__json='{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}'), "has no token '<s>'"),
        (dict(tokenizer__model=MODEL, added_tokens__json="[1"), "added_tokens.json: not valid JSON"),
        (dict(tokenizer__model=MODEL, tokenizer_mode__json='{"mode": "fast"}'), f"known modes: {', '.join(MODES)}"),
        (dict(tokenizer__model=MODEL, tokenizer_mode__json='{"mode": "json", "added": {}, "names": {}}'), "cannot be read as 'json'"),
        (dict(tokenizer__model=MODEL, tokenizer_mode__json="[]"), "tokenizer_mode.json: not readable as the record"),
    ],
)  # fmt: skip
def test_bad_files_are_named(tmp_path, files, message):
    with pytest.raises(UserError, match=re.escape(message)):
        read_tokenizer(broken(tmp_path, **files))
