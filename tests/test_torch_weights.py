"""Weights in torch's own format: the same bits as from safetensors, nothing in them is run, and
what is damaged is refused in one line that names the file."""

import collections
import io
import json
import os
import re
import shutil
import struct
import subprocess
import zipfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_huggingface import torch_model

from selfrag_jax import artifacts, cli
from selfrag_jax.checkpoints import loading
from selfrag_jax.errors import UserError
from selfrag_jax.huggingface import hub, weights
from selfrag_jax.huggingface.tensor_pickle import read_tensor_pickle
from selfrag_jax.huggingface.weight_files import TORCH_INDEX, TORCH_WEIGHTS
from selfrag_jax.models.llama import Model

UP = "model.layers.1.mlp.up_proj.weight"


def to_torch_format(folder, num_shards=1, change=lambda tensors: tensors):
    """Replaces the safetensors of a folder by what transformers of 2023 wrote."""
    tensors = {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    tensors = change(collections.OrderedDict(tensors))
    tensors._metadata = {"": {"version": 1}}  # as of a state dict
    if num_shards == 1:
        torch.save(tensors, folder / TORCH_WEIGHTS)
        return
    names, weight_map = list(tensors), {}
    for i in range(num_shards):
        shard = f"pytorch_model-{i + 1:05}-of-{num_shards:05}.bin"
        part = {name: tensors[name] for name in names[i::num_shards]}
        torch.save(part, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    row = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / TORCH_INDEX).write_text(json.dumps(row))


@pytest.fixture(scope="module", params=("float32", "bfloat16", "float16"))
def saved(request, tmp_path_factory):
    """(a folder that transformers saved, with a tied table or not, its dtype)."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = torch_model(dict(tie_word_embeddings=request.param == "bfloat16"))
    theirs.to(getattr(torch, request.param)).save_pretrained(folder)
    return folder, request.param


@pytest.fixture
def folder(tmp_path):
    """A folder whose weights are in torch's format, and its parameters."""
    torch_model({}).save_pretrained(tmp_path)
    params = weights.load_folder(tmp_path)[1]
    to_torch_format(tmp_path)
    return tmp_path, params


def logits(folder):
    config, params = weights.load_folder(folder)
    tokens = np.random.default_rng(0).integers(0, 199, (2, 20))
    model = Model(config)
    hidden, _ = model.hidden(params, tokens, jnp.broadcast_to(jnp.arange(20), (2, 20)), None)
    return np.asarray(model.logits(params, hidden))


def assert_same(actual, expected):
    import jax

    jax.tree.map(np.testing.assert_array_equal, actual, expected)


# ---- what is read ----------------------------------------------------------------------------
def test_logits_equal_those_of_safetensors_bit_for_bit(saved, tmp_path):
    source, dtype = saved
    shutil.copytree(source, tmp_path / "bin")
    to_torch_format(tmp_path / "bin", num_shards=3)
    np.testing.assert_array_equal(logits(tmp_path / "bin"), logits(source))
    files = weights.open_folder(tmp_path / "bin")[1]
    assert files.dtype([UP]) == dtype


def test_shared_storages_views_parameters_and_other_buffers_are_read(folder):
    path, params = folder

    def change(tensors):
        queries = [name for name in tensors if "q_proj" in name]
        joined = torch.cat([tensors[name] for name in queries])
        tensors |= dict(zip(queries, joined.chunk(len(queries)), strict=True))  # one storage
        tensors[UP] = tensors[UP].T.contiguous().T  # strides of a transposed tensor
        tensors["model.norm.weight"] = torch.nn.Parameter(tensors["model.norm.weight"])
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.arange(9)
        return tensors

    tensors = change(torch.load(path / TORCH_WEIGHTS, weights_only=True))
    torch.save(tensors, path / TORCH_WEIGHTS)
    assert_same(weights.load_folder(path)[1], params)
    torch.save(tensors, path / TORCH_WEIGHTS, pickle_protocol=4)
    assert_same(weights.load_folder(path)[1], params)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensors, path / TORCH_WEIGHTS)
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(weights.load_folder(path)[1], params)


@pytest.mark.parametrize("kept", ("both", "embedding", "head"))
@pytest.mark.parametrize("form", ("torch", "safetensors"))
def test_a_tied_table_may_be_stored_under_either_name(tmp_path, kept, form):
    """`safetensors.torch.save_model` leaves only the head; torch leaves both, in one storage."""
    from safetensors.torch import save_model

    theirs = torch_model(dict(tie_word_embeddings=True))
    theirs.save_pretrained(tmp_path)
    config, expected = weights.load_folder(tmp_path)
    names = {"embedding": "lm_head.weight", "head": "model.embed_tokens.weight", "both": ""}
    if form == "torch":
        (tmp_path / "model.safetensors").unlink()
        tensors = theirs.state_dict()
        tensors.pop(names[kept], None)
        torch.save(tensors, tmp_path / TORCH_WEIGHTS)
    elif kept == "head":
        save_model(theirs, tmp_path / "model.safetensors")
        assert "lm_head.weight" in load_file(tmp_path / "model.safetensors")
    assert config.tie_embeddings
    assert_same(weights.load_folder(tmp_path)[1], expected)


def test_safetensors_are_preferred(folder, tmp_path_factory):
    path, _ = folder
    other = torch_model({}, seed=1)
    other.save_pretrained(path)
    files = weights.open_folder(path)[1]
    assert set(files.file_of.values()) == {"model.safetensors"}
    np.testing.assert_array_equal(
        files.tensor(UP, (96, 64)), other.state_dict()[UP].detach().numpy()
    )


def test_a_tensor_that_two_shards_have_must_be_the_same(folder):
    path, params = folder
    tensors = torch.load(path / TORCH_WEIGHTS, weights_only=True)
    (path / TORCH_WEIGHTS).unlink()
    shards = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    index = dict.fromkeys(tensors, shards[0])
    (path / TORCH_INDEX).write_text(
        json.dumps({"weight_map": index | {"lm_head.weight": shards[1]}})
    )
    torch.save(tensors, path / shards[0])  # has the head, too; the index says which one counts
    other = {"lm_head.weight": tensors["lm_head.weight"], "x.rotary_emb.inv_freq": torch.ones(3)}
    torch.save(other, path / shards[1])
    assert_same(weights.load_folder(path)[1], params)
    del index["lm_head.weight"]
    (path / TORCH_INDEX).write_text(json.dumps({"weight_map": index | {UP: shards[0],
                                    "x.rotary_emb.inv_freq": shards[1]}}))  # fmt: skip
    assert_same(weights.load_folder(path)[1], params)
    torch.save(other | {"lm_head.weight": tensors["lm_head.weight"] * 2}, path / shards[1])
    with pytest.raises(UserError, match="have different tensors 'lm_head.weight'"):
        weights.load_folder(path)


def test_the_commands_read_it(tiny_model, tmp_path, capsys):
    """`convert` streams it, a fine-tune starts from it, and its content is its identity."""
    weights.save_folder(
        tmp_path / "in", tiny_model.model.config, tiny_model.params, tiny_model.tokenizer
    )
    expected = loading.load(tmp_path / "in").params
    to_torch_format(tmp_path / "in", num_shards=3)
    flags = [f"--from={tmp_path / 'in'}", f"--to={tmp_path / 'w'}", "--format=orbax"]
    assert cli.main(["convert", *flags]) == 0
    assert_same(loading.load(tmp_path / "w").params, expected)
    before = artifacts.fingerprint(tmp_path / "in")
    shard = next((tmp_path / "in").glob("pytorch_model-00001*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert artifacts.fingerprint(tmp_path / "in") != before
    shutil.rmtree(tmp_path / "w")
    capsys.readouterr()
    assert cli.main(["convert", *flags]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "pytorch_model-00001-of-00003.bin: is damaged, or of before torch 1.6" in line


# ---- what is refused -------------------------------------------------------------------------
class Calls:
    """Pickled as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda ran: {"a": Calls(os.system, f"touch {ran}")}, r"asks for posix\.system, and only"),
        (lambda ran: {"a": Calls(eval, f"open({ran!r}, 'w')")}, r"asks for \w+\.eval"),
        (lambda ran: Calls(subprocess.call, ["touch", ran]), r"asks for \w+\.call"),
        (
            lambda ran: {"a": [({"b": Calls(exec, f"open({ran!r}, 'w')")},)]},
            r"asks for \w+\.exec",
        ),
        (lambda ran: {"a": Calls(torch.load, ran)}, r"asks for torch\.serialization\.load"),
        (lambda ran: {"a": Calls(getattr, "os", "system")}, r"asks for \w+\.getattr"),
        (lambda ran: {"a": torch.nn.Linear(1, 1)}, r"asks for torch\.nn\.modules\.linear\.Linear"),
        (lambda ran: {"a": np.float64(1)}, r"asks for numpy"),
        (lambda ran: [torch.ones(2)], "holds something beside a dict of tensors"),
        (lambda ran: {"model": {"a": torch.ones(2)}}, "holds something beside a dict of tensors"),
        (lambda ran: {1: torch.ones(2)}, "holds something beside a dict of tensors"),
        (lambda ran: {"a": torch.ones(2)}, "tensor '.*' is missing|'a' has no place"),
    ],
    ids="system eval call nested load getattr module numpy list nested_dict key few".split(),
)
def test_a_pickle_that_asks_for_more_is_refused_and_nothing_runs(folder, tmp_path, make, message):
    path, _ = folder
    ran = path / "ran"
    torch.save(make(str(ran)), path / TORCH_WEIGHTS)
    with pytest.raises(UserError, match=message) as e:
        weights.load_folder(path)
    assert "\n" not in str(e.value) and str(path) in str(e.value)
    assert not ran.exists()


def _deep_tuple():
    """Doubles a tuple 60 times: printing or hashing it would never end."""
    return b"\x80\x02)q\x00" + b"h\x00h\x00\x86q\x00" * 60


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_deep_tuple() + b"}h\x00K\x01s.", "beside a dict of tensors"),
        (_deep_tuple() + b"Q.", "refers to something beside a storage"),
        (b"\x80\x02cos\nsystem\n(U\x02id\x85R.", r"asks for os\.system"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", r"asks for os\.system"),
        (b"\x80\x04\x8c\x02os\x8c\x08a\x1b[2Jb\nc\x93.", r"asks for os\.a\\x1b\[2Jb\\nc, and"),
        (b"(S'touch ran'\nios\nsystem\n.", "asks for the operation STRING"),
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "calls something that is no function"),
        (b"\x80\x02ccollections\nOrderedDict\nK\x01\x85R.", "dict of an unknown kind"),
        (b"\x80\x02K\x01}b.", "changes something that is no dict"),
        (b"\x80\x02u.", "is damaged"),
        (b"\x80\x02h\x07.", "is damaged"),
        (b"\x80\x02}", "exhausted"),
        (b"", "exhausted"),
        (b"\x80\x02X\xff\xff\xff\x7fabc.", "expected"),
        (b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"abc.", "expected|operation"),
        (b"0" * (9 * 2**20), "more than they need"),
    ],
)
def test_hand_made_pickles_end_at_once(data, message):
    with pytest.raises(ValueError, match=message):
        read_tensor_pickle(data)


def test_random_changes_of_a_pickle_are_never_another_error():
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(2, 3), "b": torch.nn.Parameter(torch.ones(1))}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        [name] = [n for n in archive.namelist() if n.endswith("data.pkl")]
        data = archive.read(name)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(500):
        changed = bytearray(data)
        for i in rng.integers(0, len(data), rng.integers(1, 4)):
            changed[i] = rng.integers(256)
        try:
            read_tensor_pickle(bytes(changed))
        except ValueError:
            refused += 1
    assert refused > 200


def test_numbers_that_no_tensor_has_are_refused():
    """Strides of axes of length 1 are of no account, but numpy must be able to hold them."""
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(1, 7)}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        [name] = [n for n in archive.namelist() if n.endswith("data.pkl")]
        data = archive.read(name)
    strides = b"K\x07K\x01\x86"
    assert data.count(strides) == 1
    huge = b"\x8a\x0d" + (10**30).to_bytes(13, "little") + b"K\x01\x86"
    assert read_tensor_pickle(data)["a"].strides == (7, 1)
    with pytest.raises(ValueError, match="a tensor without a shape"):
        read_tensor_pickle(data.replace(strides, huge))


def rewrite(file, change):
    """Writes an archive anew; change: (name, content) -> content, or None to leave it out."""
    with zipfile.ZipFile(file) as archive:
        parts = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in parts:
            if (content := change(name, content)) is not None:
                archive.writestr(name, content)


def flip_a_bit(file):
    with zipfile.ZipFile(file) as archive:
        largest = max(archive.infolist(), key=lambda part: part.file_size)
    content = bytearray(file.read_bytes())
    content[largest.header_offset + 200] ^= 1
    file.write_bytes(content)


def compress(file):
    with zipfile.ZipFile(file) as archive:
        parts = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts:
            archive.writestr(name, content)


def negated():
    """A view whose storage has the other signs: torch notes it beside the tensor."""
    view = torch.complex(torch.zeros(96, 64), torch.ones(96, 64)).conj().imag
    assert view.is_neg()
    return view


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: f.write_bytes(f.read_bytes()[: 10**5]), "is damaged, or of before torch 1.6"),
        (lambda f: f.write_bytes(b""), "is damaged, or of before torch 1.6.*AutoModelForCausalLM"),
        (
            lambda f: torch.save({}, f, _use_new_zipfile_serialization=False),
            "of before torch 1.6.*AutoModelForCausalLM",
        ),
        (flip_a_bit, "the bits of '.*data/\\d+' are not those that were saved"),
        (compress, "is compressed or encrypted"),
        (
            lambda f: rewrite(f, lambda n, c: None if n.endswith("/data/3") else c),
            "is damaged: the archive has no '.*/data/3'",
        ),
        (
            lambda f: rewrite(f, lambda n, c: c[:-4] if n.endswith("/data/3") else c),
            "is damaged: its storage has [0-9,]+ bytes",
        ),
        (
            lambda f: rewrite(f, lambda n, c: None if n.endswith("data.pkl") else c),
            "has 0 lists of tensors",
        ),
        (
            lambda f: rewrite(f, lambda n, c: b"big" if n.endswith("byteorder") else c),
            "another byte order",
        ),
        (
            lambda f: torch.save(
                torch.load(f, weights_only=True) | {UP: torch.ones(1).expand(96, 64)}, f
            ),
            "ends after its storage",
        ),
        (
            lambda f: torch.save(torch.load(f, weights_only=True) | {UP: negated()}, f),
            "holds a tensor of an unknown kind",
        ),
        (
            lambda f: torch.save(
                torch.load(f, weights_only=True) | {UP: torch.ones(96, 64, dtype=torch.int8)}, f
            ),
            "is of type I8; F32, F16, BF16 are supported",
        ),
        (
            lambda f: torch.save(
                torch.load(f, weights_only=True) | {UP: torch.full((96, 64), torch.nan)}, f
            ),
            "holds NaN or infinite values",
        ),
    ],
    ids="cut empty legacy bit zip part short listing order expanded negated int8 nan".split(),
)
def test_damage_is_named(folder, spoil, message):
    path, _ = folder
    spoil(path / TORCH_WEIGHTS)
    with pytest.raises(UserError, match=f"{re.escape(str(path))}.*{message}") as e:
        weights.load_folder(path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: next(p.glob("*-00002-of*")).unlink(), "shard .*-00002-of-00003.bin is missing"),
        (
            lambda p: edit_map(p, lambda m: m | {"model.extra": m[UP]}),
            "tensor 'model.extra' is missing, though pytorch_model.bin.index.json says it is here",
        ),
        (lambda p: edit_map(p, lambda m: m | {UP: "../x.bin"}), "'../x.bin', which is no file"),
        (lambda p: edit_map(p, lambda m: {}), "has no weight_map"),
        (lambda p: (p / TORCH_INDEX).unlink(), r"no weights here.*\(there is pytorch_model-00001"),
        (
            lambda p: torch.save({}, p / TORCH_WEIGHTS),
            "holds both pytorch_model.bin and pytorch_mo",
        ),
    ],
    ids="shard tensor outside map index both".split(),
)
def test_an_index_that_does_not_fit_is_named(folder, spoil, message):
    path, _ = folder
    tensors = torch.load(path / TORCH_WEIGHTS, weights_only=True)
    (path / TORCH_WEIGHTS).unlink()
    from safetensors.torch import save_file

    save_file(tensors, path / "model.safetensors")
    to_torch_format(path, num_shards=3)
    spoil(path)
    with pytest.raises(UserError, match=message):
        weights.load_folder(path)


def edit_map(folder, change):
    row = json.loads((folder / TORCH_INDEX).read_text())
    (folder / TORCH_INDEX).write_text(json.dumps(row | {"weight_map": change(row["weight_map"])}))


def test_shards_beside_safetensors_are_no_part_of_a_models_identity(folder):
    """They are not read; and trainings from such bases, of before they were, go on."""
    path, _ = folder
    (path / TORCH_WEIGHTS).rename(path / "pytorch_model-00001-of-00001.bin")
    only_shards = artifacts.fingerprint(path)
    (path / TORCH_INDEX).write_text("{}")
    assert artifacts.fingerprint(path) != only_shards
    torch_model({}).save_pretrained(path)
    with_both = artifacts.fingerprint(path)
    (path / TORCH_INDEX).unlink()
    (path / "pytorch_model-00001-of-00001.bin").unlink()
    assert artifacts.fingerprint(path) == with_both


# ---- the hub ---------------------------------------------------------------------------------
def test_the_hub_is_asked_for_torchs_format_only_without_safetensors(tmp_path, monkeypatch):
    asked = []

    def download(name, allow_patterns, local_files_only):
        asked.append(allow_patterns)
        return tmp_path

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="an earlier download has no weights of it, and .* network"):
        hub.model_folder("owner/model")
    asked.clear()
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(hub, "hub_is_reachable", lambda: True)
    with pytest.raises(UserError, match="owner/model: the hub has no weights of it"):
        hub.model_folder("owner/model")
    first, second = asked
    assert "pytorch_model*.bin" not in first and "pytorch_model*.bin" in second
    (tmp_path / "pytorch_model-00001-of-00002.bin").touch()
    assert hub.model_folder("owner/model") == tmp_path
    asked.clear()
    hub.forget_found()
    (tmp_path / "model.safetensors").touch()
    assert hub.model_folder("owner/model") == tmp_path and asked == [first]


def test_the_hub_is_asked_once_for_each_set_of_files_and_for_one_commit(tmp_path, monkeypatch):
    asked = []
    commits = [tmp_path / (digit * 40) for digit in "ab"]
    for folder in commits:
        folder.mkdir()
        (folder / "model.safetensors").touch()

    def download(name, allow_patterns, local_files_only, revision=None):
        asked.append((name, revision))  # somebody pushes a commit after the first answer
        return commits[len(asked) > 1] if revision is None else tmp_path / revision

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr(hub, "hub_is_reachable", lambda: True)
    assert hub.config_folder("owner/model") == commits[0]
    for _ in range(3):
        assert hub.model_folder("owner/model") == commits[0]
    assert asked == [("owner/model", None), ("owner/model", "a" * 40)]
    assert hub.model_folder("owner/other") == commits[1]
    assert asked[2:] == [("owner/other", None)]
