"""`selfrag convert`: a round trip changes no tensor, new rows are means, nothing half-written
stays, and the whole model is never in memory."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from fnmatch import fnmatch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from selfrag_jax import artifacts, cli
from selfrag_jax.answering.selfrag import SelfRAG
from selfrag_jax.checkpoints import converting, loading, saving
from selfrag_jax.data.generator_examples import GeneratorSource
from selfrag_jax.errors import UserError
from selfrag_jax.files import read_json
from selfrag_jax.huggingface import hub, weights
from selfrag_jax.models.llama import LlamaConfig, Model
from selfrag_jax.models.params import flatten
from selfrag_jax.models.rope import RopeScaling
from selfrag_jax.records import GeneratorExample
from selfrag_jax.training.config import MeshConfig, TrainConfig
from selfrag_jax.training.optimizer import OptimizerConfig
from selfrag_jax.training.train import train

NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"

FORMATS = ("orbax", "huggingface")  # peft: tests/test_adapters.py


@pytest.fixture(scope="module", params=("float32", "bfloat16", "float16"))
def folder(request, tiny_model, tmp_path_factory):
    """(a Hugging Face folder, its dtype, its parameters), in each dtype."""
    path = tmp_path_factory.mktemp(request.param)
    params = jax.tree.map(lambda x: np.asarray(x).astype(request.param), tiny_model.params)
    weights.save_folder(path, tiny_model.model.config, params, tiny_model.tokenizer, request.param)
    return path, request.param, params


@pytest.fixture
def source(tiny_model, tmp_path):
    """A Hugging Face folder that a test may change."""
    save_folder(tmp_path / "in", tiny_model)
    return tmp_path / "in"


def save_folder(path, loaded, model=None, params=None, tokenizer=None):
    """Saves `loaded`, or what is given instead of its parts."""
    config = (model or loaded.model).config
    params = jax.device_get(loaded.params if params is None else params)
    weights.save_folder(path, config, params, tokenizer or loaded.tokenizer)


def run(source, out, form, *flags):
    return cli.main(["convert", f"--from={source}", f"--to={out}", f"--format={form}", *flags])


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


# ---- what is kept ----------------------------------------------------------------------------
def test_a_round_trip_changes_no_tensor(folder, tmp_path, capsys):
    source, dtype, params = folder
    assert run(source, tmp_path / "w", "orbax") == 0
    assert "0.1M parameters" in capsys.readouterr().out
    loaded = loading.load(tmp_path / "w")
    assert_equal(loaded.params, params)
    assert {x.dtype.name for x in jax.tree.leaves(loaded.params)} == {dtype}
    assert loaded.model.config.dtype == ("float32" if dtype == "float32" else "bfloat16")
    assert run(tmp_path / "w", tmp_path / "hf", "huggingface") == 0
    before = load_file(source / weights.WEIGHTS)
    after = load_file(tmp_path / "hf" / weights.WEIGHTS)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype and value.tobytes() == after[name].tobytes(), name
    assert read_json(source / "config.json") == read_json(tmp_path / "hf" / "config.json")
    tokenizers = [(path / "tokenizer.json").read_bytes() for path in (source, tmp_path / "hf")]
    assert tokenizers[0] == tokenizers[1]


@pytest.mark.parametrize(
    "fields",
    [
        dict(rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 32), rope_theta=5e5),
        dict(sliding_window=7),
        dict(mlp_bias=True),
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_round_trip_keeps_the_config(tiny_model, tmp_path, fields):
    model = Model(replace(tiny_model.model.config, **fields))
    save_folder(tmp_path / "in", tiny_model, model, model.init(jax.random.key(2)))
    assert run(tmp_path / "in", tmp_path / "w", "orbax") == 0
    assert loading.load(tmp_path / "w").model.config == model.config
    assert run(tmp_path / "w", tmp_path / "out", "huggingface") == 0
    assert loading.load(tmp_path / "out").model.config == model.config


def test_each_array_keeps_its_dtype(tiny_model, tmp_path):
    """Some folders have norms in f32 beside matrices in bf16."""
    source, config = tmp_path / "in", tiny_model.model.config
    params = jax.tree.map(lambda x: np.asarray(x).astype("bfloat16"), tiny_model.params)
    weights.save_folder(source, config, params, tiny_model.tokenizer, "bfloat16")
    change_tensors(source, lambda t: t | {NORM: np.full(t[NORM].shape, 1.00098, np.float32)})
    assert run(source, tmp_path / "w", "orbax") == 0
    norm = loading.load(tmp_path / "w").params["norm"]["scale"]
    assert norm.dtype == np.float32 and norm[0] == np.float32(1.00098)


def test_another_dtype_rounds_each_value(folder, tmp_path):
    source, _, params = folder
    assert run(source, tmp_path / "w", "orbax", "--dtype=bfloat16") == 0
    expected = jax.tree.map(lambda x: x.astype("bfloat16"), params)
    assert_equal(loading.load(tmp_path / "w").params, expected)


def test_a_converted_model_gives_the_same_answers(source, tmp_path):
    assert run(source, tmp_path / "w", "orbax") == 0

    def answer(folder):
        limits = dict(max_depth=1, max_new_tokens=4)
        return SelfRAG.load(folder).answer(["Where?"], mode="no_retrieval", **limits)[0].to_row()

    assert answer(tmp_path / "w") == answer(source)


def test_a_trained_model_is_exported(tiny_model, tmp_path):
    rows = [
        GeneratorExample(str(i), f"Say {i}.", f"[No Retrieval]Number {i}.[Utility:5]")
        for i in range(12)
    ]
    group_weights = dict.fromkeys(("retrieve", "isrel", "issup", "isuse"), 1.0)
    source = GeneratorSource(rows, tiny_model.tokenizer, group_weights)
    fields = dict(seed=0, steps=4, rows=2, length=32, max_targets=48, save_every=2, log_every=4)
    learner = OptimizerConfig("adamw", 0.01, 0.01, "linear", 0.1, 1e-8, 0.0, 1.0, 1.0)
    config = TrainConfig(**fields, mesh=MeshConfig(1, 1, 1), optimizer=learner)
    model, params, tokenizer = tiny_model.model, tiny_model.params, tiny_model.tokenizer
    trained = train(config, model, params, source, tokenizer, tmp_path / "w")["params"]
    assert run(tmp_path / "w", tmp_path / "hf", "huggingface") == 0
    exported = loading.load(tmp_path / "hf")
    assert_equal(exported.params, jax.device_get(trained))
    assert exported.model.config == tiny_model.model.config


# ---- new reflection tokens -------------------------------------------------------------------
@pytest.mark.parametrize("tied", (True, False))
def test_new_reflection_tokens_start_at_the_mean(tiny_model, tmp_path, tied):
    from selfrag_jax.base_model.source import make_tokenizer

    plain = make_tokenizer(4000)  # without reflection tokens
    fields = dict(vocab_size=plain.vocab_size, tie_embeddings=tied)
    model = Model(replace(tiny_model.model.config, **fields))
    params = jax.device_get(model.init(jax.random.key(1), 0.5))
    save_folder(tmp_path / "in", tiny_model, model, params, plain)
    assert run(tmp_path / "in", tmp_path / "w", "orbax", "--reflection_tokens") == 0
    loaded = loading.load(tmp_path / "w")
    new = loaded.tokenizer.vocab_size - plain.vocab_size
    assert new == 13 and loaded.model.config.vocab_size == loaded.tokenizer.vocab_size
    tables = [(loaded.params["embed"]["embedding"], params["embed"]["embedding"])]
    if not tied:
        tables.append((loaded.params["head"]["kernel"].T, params["head"]["kernel"].T))
    for grown, old in tables:
        np.testing.assert_array_equal(grown[:-new], old)
        means = np.repeat(old.mean(0, keepdims=True), new, 0)
        np.testing.assert_allclose(grown[-new:], means, atol=1e-6)


def test_new_reflection_tokens_take_the_padding_of_a_table(tiny_model, tmp_path):
    from selfrag_jax.base_model.source import make_tokenizer

    plain = make_tokenizer(4000)
    old, padding = plain.vocab_size, 5  # fewer spare rows than there are new tokens
    model = Model(replace(tiny_model.model.config, vocab_size=old + padding))
    save_folder(tmp_path / "in", tiny_model, model, model.init(jax.random.key(1), 0.5), plain)
    assert run(tmp_path / "in", tmp_path / "w", "orbax", "--reflection_tokens") == 0
    table = loading.load(tmp_path / "w").params["embed"]["embedding"]
    assert len(table) == old + 13
    means = np.repeat(table[:old].mean(0, keepdims=True), 13, 0)
    np.testing.assert_allclose(table[old:], means, atol=1e-6)


# ---- manifests -------------------------------------------------------------------------------
def test_other_weights_are_another_input(tiny_model, tmp_path):
    """What was made from one model must not pass for made from another at the same path."""
    inputs = []
    for factor in (1.0, 2.0):
        shutil.rmtree(tmp_path / "w", ignore_errors=True)
        params = jax.tree.map(lambda x, f=factor: np.asarray(x) * np.float32(f), tiny_model.params)
        save_folder(tmp_path / "in", tiny_model, params=params)
        assert run(tmp_path / "in", tmp_path / "w", "orbax") == 0
        inputs.append(artifacts.fingerprint(tmp_path / "w"))
    assert inputs[0] != inputs[1]


def test_an_export_with_changed_weights_is_another_input(source, tmp_path):
    """Whoever trains on an export and saves over it leaves our manifest as it is."""
    out = tmp_path / "out"
    converting.convert(source, out, "huggingface", None, False)
    before = artifacts.fingerprint(out)
    change_tensors(out, lambda tensors: {name: 2 * value for name, value in tensors.items()})
    assert (out / "manifest.json").is_file() and artifacts.fingerprint(out) != before


# ---- what is refused -------------------------------------------------------------------------
def change_tensors(folder, change):
    tensors = load_file(folder / weights.WEIGHTS)
    save_file(change(tensors), folder / weights.WEIGHTS)


def overflow_float16(tensors):
    return tensors | {NORM: tensors[NORM] * np.float32(1e6)}


def store_one_layer_as_float16(tensors):
    return tensors | {UP: tensors[UP].astype(np.float16)}


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        (
            overflow_float16,
            ["--dtype=float16"],
            "norm/scale: holds values .* too large for float16",
        ),
        (store_one_layer_as_float16, [], f"layers of several types .*{UP}' is F16"),
    ],
    ids=("overflow", "mixed"),
)
def test_values_that_would_be_lost_are_named(source, tmp_path, capsys, change, flags, message):
    change_tensors(source, change)
    assert run(source, tmp_path / "w", "orbax", *flags) == 2
    assert re.search(message, capsys.readouterr().err) and not (tmp_path / "w").exists()


def test_a_tokenizer_larger_than_the_table_is_refused(tiny_model, tmp_path, capsys):
    model = Model(replace(tiny_model.model.config, vocab_size=100))
    save_folder(tmp_path / "in", tiny_model, model, model.init(jax.random.key(0)))
    assert run(tmp_path / "in", tmp_path / "w", "orbax") == 2
    assert "its model 100 rows" in capsys.readouterr().err


def test_a_tokenizer_larger_than_the_table_is_refused_when_answering(tiny_model, tmp_path):
    num_rows = tiny_model.tokenizer.vocab_size - 2
    model = Model(replace(tiny_model.model.config, vocab_size=num_rows))
    table = jax.device_get(tiny_model.params["embed"]["embedding"])[:num_rows]
    params = tiny_model.params | {"embed": {"embedding": table}}
    save_folder(tmp_path / "hf", tiny_model, model, params)
    message = f"its tokenizer has {num_rows + 2} tokens, its model {num_rows} rows"
    with pytest.raises(UserError, match=message):
        SelfRAG.load(tmp_path / "hf")


def test_a_workdir_that_does_not_fit_its_architecture_is_refused(source, tmp_path, capsys):
    assert run(source, tmp_path / "w", "orbax") == 0
    file = tmp_path / "w" / "model.json"
    row = json.loads(file.read_text())
    for change, message in (
        ({"tie_embeddings": False}, "head/kernel has shape None in the checkpoint"),
        ({"num_layers": 3}, r"has shape \(2, .* and \(3, "),
        ({"layers": 3}, "model.json: not an architecture of this version"),
    ):
        file.write_text(json.dumps(row | change))
        assert run(tmp_path / "w", tmp_path / "out", "huggingface") == 2
        assert re.search(message, capsys.readouterr().err) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--format=orbx"], "--format='orbx': must be one of orbax, huggingface"),
        (["--dtype=int8"], "--dtype='int8': must be one of float32, float16, bfloat16"),
        (["--from=nowhere"], "nowhere: no such folder"),
        (["--from=../missing"], "../missing: no such folder"),
        ([f"--from={__file__}"], "is a file; expected the folder of a model"),
        (
            ["--from=owner/model"],
            "owner/model: no such folder, and as a model of the Hugging Face hub",
        ),
    ],
)
def test_wrong_flags_write_nothing(folder, tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.setattr(hub, "hub_is_reachable", lambda: False)
    monkeypatch.setenv("HF_HOME", str(tmp_path.parent))
    assert run(folder[0], tmp_path / "out", "orbax", *flags) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_an_existing_folder_is_not_overwritten(folder, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("x")
    assert run(folder[0], tmp_path, "orbax") == 2
    assert "already exists" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def truncate(folder):
    file = folder / weights.WEIGHTS
    os.truncate(file, file.stat().st_size // 2)


def lose_a_shard(folder):
    tensors = load_file(folder / weights.WEIGHTS)
    (folder / weights.WEIGHTS).unlink()
    weights.write_tensors(folder, tensors.items(), shard_bytes=50_000)
    sorted(folder.glob("model-*"))[1].unlink()


def change_text(folder, file, old, new):
    (folder / file).write_text((folder / file).read_text().replace(old, new))


def lose_a_reflection_token(folder):
    change_text(folder, "tokenizer.json", "[Relevant]", "[Pertinent]")


def use_another_activation(folder):
    change_text(folder, "config.json", "silu", "gelu")


def make_nan(folder):
    change_tensors(folder, lambda t: t | {UP: t[UP] * np.nan})


def make_infinite(folder):
    change_tensors(folder, lambda t: t | {NORM: t[NORM] + np.inf})


def lose_a_tensor(folder):
    change_tensors(folder, lambda t: {name: value for name, value in t.items() if name != UP})


def change_a_shape(folder):
    change_tensors(folder, lambda t: t | {NORM: t[NORM][:-1]})


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        (make_nan, [], f"model.safetensors: tensor '{UP}' holds NaN"),
        (make_infinite, [], f"model.safetensors: tensor '{NORM}' holds NaN or inf"),
        (lose_a_tensor, [], f"tensor '{UP}' is missing"),
        (change_a_shape, [], "has shape (31,); by config.json it should be (32,)"),
        (truncate, [], "model.safetensors: not readable as safetensors"),
        (lose_a_shard, [], "shard model-00002-of-"),
        (
            lose_a_reflection_token,
            ["--reflection_tokens"],
            "has some reflection tokens, but not [Relevant]",
        ),
        (use_another_activation, [], "config.json: hidden_act='gelu'"),
    ],
    ids=lambda x: x.__name__ if callable(x) else "",
)
@pytest.mark.parametrize("form", FORMATS)
def test_a_spoilt_source_is_one_line_and_leaves_nothing(
    tiny_model, tmp_path, capsys, form, change, flags, message
):
    source = tmp_path / "spoilt"
    save_folder(source, tiny_model)
    change(source)
    assert run(source, tmp_path / "out", form, *flags) == 2
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.strip() and not line.startswith("convert ")]
    assert len(errors) == 1 and errors[0].startswith("selfrag convert: ")
    assert message in errors[0] and str(source) in errors[0]
    assert [p.name for p in tmp_path.iterdir()] == ["spoilt"]


# ---- the hub ---------------------------------------------------------------------------------
def test_a_model_of_the_hub_is_downloaded(folder, tmp_path, monkeypatch):
    """Tests have no network: a copy replaces the download."""
    calls = []

    def copy(name, allow_patterns, local_files_only):
        calls.append((name, allow_patterns, local_files_only))
        return str(shutil.copytree(folder[0], tmp_path / "cache", dirs_exist_ok=True))

    monkeypatch.setattr("huggingface_hub.snapshot_download", copy)
    monkeypatch.setattr(hub, "hub_is_reachable", lambda: True)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.chdir(tmp_path)
    assert run("owner/model", tmp_path / "w", "orbax") == 0
    [(name, patterns, offline)] = calls
    assert name == "owner/model" and not offline
    needed = (
        "model.safetensors model-00001-of-00002.safetensors config.json generation_config.json "
        "tokenizer.model model.safetensors.index.json"
    )

    def is_downloaded(file):
        return any(fnmatch(file, pattern) for pattern in patterns)

    assert all(map(is_downloaded, needed.split()))
    assert not any(map(is_downloaded, ("consolidated.safetensors", "pytorch_model.bin")))
    assert_equal(loading.load(tmp_path / "w").params, folder[2])


# ---- failures and signals --------------------------------------------------------------------
@pytest.mark.parametrize("form", FORMATS)
def test_a_failed_conversion_leaves_nothing(folder, tmp_path, monkeypatch, form):
    read, calls = weights.WeightFiles.tensor, []

    def fail_at_fifth(self, name, shape):
        calls.append(name)
        if len(calls) == 5:
            raise UserError("tensor spoiled")
        return read(self, name, shape)

    monkeypatch.setattr(weights.WeightFiles, "tensor", fail_at_fifth)
    with pytest.raises(UserError, match="tensor spoiled"):
        converting.convert(folder[0], tmp_path / "out", form, None, False)
    assert not list(tmp_path.iterdir())


SIGNALLED = """
import os, shutil, signal, sys, time
from selfrag_jax import cli
from selfrag_jax.huggingface import weights
read, remove, calls = weights.WeightFiles.tensor, shutil.rmtree, []
def tensor(self, name, shape):
    calls.append(name)
    if len(calls) == 5:
        os.kill(os.getpid(), signal.NUMBER)
    time.sleep(0.05)
    return read(self, name, shape)
def rmtree(*args, **kwargs):
    before = len(calls)
    time.sleep(0.5)
    if len(calls) > before:
        print("still being written")
    remove(*args, **kwargs)
weights.WeightFiles.tensor, shutil.rmtree = tensor, rmtree
# A shell starts background processes with interrupts ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(cli.main())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "number", "status"),
    [("orbax", "SIGTERM", 143), ("orbax", "SIGINT", 130), ("huggingface", "SIGTERM", 143)],
)
def test_a_signal_leaves_nothing(folder, tmp_path, form, number, status):
    """It arrives while the fifth tensor is read. What is half-written is removed, and by then
    nothing is written any more."""
    command = [sys.executable, "-c", SIGNALLED.replace("NUMBER", number), "convert"]
    command += [f"--from={folder[0]}", f"--to={tmp_path}/new/out", f"--format={form}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
    assert not done.stdout and not list(tmp_path.iterdir())


def test_a_full_disk_is_one_error_and_leaves_nothing(source, tmp_path, caplog, capfd):
    """In both directions: files may have at most 20 kB."""
    converting.convert(source, tmp_path / "w", "orbax", None, False)
    out = tmp_path / "new" / "and" / "out"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for folder, form in (("in", "huggingface"), ("w", "huggingface"), ("in", "orbax")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            with pytest.raises(OSError, match="File too large|os error 27"):
                converting.convert(tmp_path / folder, out, form, None, False)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert not (tmp_path / "new").exists()
    assert "Traceback" not in capfd.readouterr().err + caplog.text  # from Orbax's threads


# ---- memory ----------------------------------------------------------------------------------
# 0.4B parameters, 0.8 GB in bf16.
WIDE = LlamaConfig(1000, 1024, 4096, 24, 8, 8, 128, 64, 1e4, 1e-5, False, "bfloat16", "none", 1)
MEASURE_PEAK = """
import re, sys, threading
from pathlib import Path
import jax
from selfrag_jax.checkpoints import converting
from selfrag_jax.huggingface import weights
weights.SHARD_BYTES = 2**25
def anonymous():  # the system may take back the mapped pages of files
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\\s+(\\d+)", status)[1]) * 1024
jax.devices()  # a GPU plug-in takes 0.1 GB even without a GPU: count it as the program's
before, peak, done = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.01):
        peak = max(peak, anonymous())
thread = threading.Thread(target=watch)
thread.start()
converting.convert(sys.argv[1], Path(sys.argv[2]), sys.argv[3], None, False)
done.set()
thread.join()
print(peak - before)
"""


@pytest.mark.slow
def test_the_model_is_never_in_memory(tokenizer, tmp_path):
    """Its largest array has 0.2 GB, each of its layers 8 MB. The program's memory grows by less
    than a third of the model, shards of 0.03 GB included, which are held whole."""
    config, source = replace(WIDE, vocab_size=tokenizer.vocab_size), tmp_path / "in"
    rng, shapes = np.random.default_rng(0), list(flatten(Model(config).shapes()))
    layers = {
        path: rng.normal(size=leaf.shape[1:]).astype("bfloat16")
        for path, leaf in shapes
        if path[0] == "layers"
    }

    def tensors():
        for path, leaf in shapes:
            if path[0] == "layers":
                parts = [layers[path]] * leaf.shape[0]
            else:
                parts = [np.ones(leaf.shape, "bfloat16")]
            yield from weights.tensors_of(path, config, parts)

    source.mkdir()
    weights.write_tensors(source, tensors(), shard_bytes=2**25)
    weights.write_config_and_tokenizer(source, config, tokenizer, "bfloat16")
    size = sum(f.stat().st_size for f in source.glob("*.safetensors"))
    assert size > 7e8
    from test_torch_weights import to_torch_format  # imports torch, which takes long

    shutil.copytree(source, tmp_path / "bin")
    to_torch_format(tmp_path / "bin", num_shards=8)
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    for folder, out, form in (
        ("in", "w", "orbax"), ("w", "out", "huggingface"), ("bin", "v", "orbax")
    ):  # fmt: skip
        arguments = [str(tmp_path / folder), str(tmp_path / out), form]
        command = [sys.executable, "-c", MEASURE_PEAK, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        assert 0 < int(done.stdout.split()[-1]) < size / 3


def test_a_trained_stack_is_chunked_by_layer(tmp_path):
    """So an export reads one layer without the others."""
    stack = jnp.arange(3 * 512 * 640, dtype=jnp.float32).reshape(3, 512, 640)
    manager = saving.checkpoint_manager(tmp_path, 1, 0)
    with saving.writing_checkpoints(manager, tmp_path):
        state = {"params": {"layers": {"q": {"kernel": stack}}}}
        saving.save_checkpoint(manager, 3, state, {}, 1.0)
    opened = converting.open_params(tmp_path, 3)
    kernel = opened.arrays["layers"]["q"]["kernel"]
    assert kernel.chunk_layout.read_chunk.shape == (1, 512, 640)
