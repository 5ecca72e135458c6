"""`selfrag convert`: there and back every tensor is the same, new rows are means, nothing half-written stays, and the whole
model is never in memory."""

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
from selfrag_jax.models.attention import RopeScaling
from selfrag_jax.models.llama import LlamaConfig, Model
from selfrag_jax.models.params import flatten
from selfrag_jax.records import GeneratorExample
from selfrag_jax.training.config import MeshConfig, TrainConfig
from selfrag_jax.training.optimizer import OptimizerConfig
from selfrag_jax.training.train import train


@pytest.fixture(scope="module", params=("float32", "bfloat16", "float16"))
def folder(request, tiny_model, tmp_path_factory):
    """A Hugging Face folder in each type."""
    path = tmp_path_factory.mktemp(request.param)
    params = jax.tree.map(lambda x: np.asarray(x).astype(request.param), tiny_model.params)
    weights.save_folder(path, tiny_model.model.config, params, tiny_model.tokenizer, request.param)
    return path, request.param, params


def run(*argv):
    return cli.main(["convert", *argv])


def test_there_and_back_every_tensor_is_the_same(folder, tmp_path, capsys):
    source, dtype, params = folder
    assert run(f"--from={source}", f"--to={tmp_path}/w", "--format=orbax") == 0
    assert "0.1M parameters" in capsys.readouterr().out
    loaded = loading.load(tmp_path / "w")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    assert {x.dtype.name for x in jax.tree.leaves(loaded.params)} == {dtype}
    assert loaded.model.config.dtype == ("float32" if dtype == "float32" else "bfloat16")
    assert run(f"--from={tmp_path}/w", f"--to={tmp_path}/hf", "--format=huggingface") == 0
    before, after = (
        load_file(source / weights.WEIGHTS),
        load_file(tmp_path / "hf" / weights.WEIGHTS),
    )
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype and value.tobytes() == after[name].tobytes(), name
    assert read_json(source / "config.json") == read_json(tmp_path / "hf" / "config.json")
    assert (source / "tokenizer.json").read_bytes() == (
        tmp_path / "hf" / "tokenizer.json"
    ).read_bytes()


@pytest.mark.parametrize(
    "fields",
    [
        dict(rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 32), rope_theta=5e5),
        dict(sliding_window=7),
        dict(mlp_bias=True),
    ],
    ids=lambda f: next(iter(f)),
)
def test_what_a_config_says_survives(tiny_model, tmp_path, fields):
    model = Model(replace(tiny_model.model.config, **fields))
    weights.save_folder(
        tmp_path / "in",
        model.config,
        jax.device_get(model.init(jax.random.key(2))),
        tiny_model.tokenizer,
    )
    assert run(f"--from={tmp_path}/in", f"--to={tmp_path}/w", "--format=orbax") == 0
    assert loading.load(tmp_path / "w").model.config == model.config
    assert run(f"--from={tmp_path}/w", f"--to={tmp_path}/out", "--format=huggingface") == 0
    assert loading.load(tmp_path / "out").model.config == model.config


def test_another_type_rounds_each_value(folder, tmp_path):
    source, _, params = folder
    assert run(f"--from={source}", f"--to={tmp_path}/w", "--format=orbax", "--dtype=bfloat16") == 0
    wanted = jax.tree.map(lambda x: x.astype("bfloat16"), params)
    jax.tree.map(np.testing.assert_array_equal, loading.load(tmp_path / "w").params, wanted)


@pytest.mark.parametrize("tied", (True, False))
def test_new_reflection_tokens_start_at_the_mean(tiny_model, tmp_path, tied):
    from selfrag_jax.base_model.source import make_tokenizer

    plain = make_tokenizer(4000)  # without reflection tokens
    model = Model(
        replace(tiny_model.model.config, vocab_size=plain.vocab_size, tie_embeddings=tied)
    )
    params = jax.device_get(model.init(jax.random.key(1), 0.5))
    weights.save_folder(tmp_path / "in", model.config, params, plain)
    assert (
        run(f"--from={tmp_path}/in", f"--to={tmp_path}/w", "--format=orbax", "--reflection_tokens")
        == 0
    )
    loaded = loading.load(tmp_path / "w")
    new = loaded.tokenizer.vocab_size - plain.vocab_size
    assert new == 13 and loaded.model.config.vocab_size == loaded.tokenizer.vocab_size
    tables = [(loaded.params["embed"]["embedding"], params["embed"]["embedding"])]
    if not tied:
        tables.append((loaded.params["head"]["kernel"].T, params["head"]["kernel"].T))
    for grown, old in tables:
        np.testing.assert_array_equal(grown[:-new], old)
        np.testing.assert_allclose(
            grown[-new:], np.repeat(old.mean(0, keepdims=True), new, 0), atol=1e-6
        )


def test_reflection_tokens_take_the_padding_of_a_table(tiny_model, tmp_path):
    from selfrag_jax.base_model.source import make_tokenizer

    plain = make_tokenizer(4000)
    old, padding = plain.vocab_size, 5  # fewer spare rows than there are new tokens
    model = Model(replace(tiny_model.model.config, vocab_size=old + padding))
    weights.save_folder(
        tmp_path / "in", model.config, jax.device_get(model.init(jax.random.key(1), 0.5)), plain
    )
    assert (
        run(f"--from={tmp_path}/in", f"--to={tmp_path}/w", "--format=orbax", "--reflection_tokens")
        == 0
    )
    table = loading.load(tmp_path / "w").params["embed"]["embedding"]
    assert len(table) == old + 13
    np.testing.assert_allclose(
        table[old:], np.repeat(table[:old].mean(0, keepdims=True), 13, 0), atol=1e-6
    )


def spoil(folder, change):
    tensors = load_file(folder / weights.WEIGHTS)
    save_file(change(tensors), folder / weights.WEIGHTS)


NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        (
            lambda t: t | {NORM: t[NORM] * np.float32(1e6)},
            ["--dtype=float16"],
            "norm/scale: holds values .* too large for float16",
        ),
        (
            lambda t: t | {UP: t[UP].astype(np.float16)},
            [],
            f"layers of several types .*{UP}' is F16",
        ),
    ],
    ids=("overflow", "mixed"),
)
def test_values_that_would_be_lost_are_named(tiny_model, tmp_path, capsys, change, flags, message):
    weights.save_folder(
        tmp_path / "in", tiny_model.model.config, tiny_model.params, tiny_model.tokenizer
    )
    spoil(tmp_path / "in", change)
    assert run(f"--from={tmp_path}/in", f"--to={tmp_path}/w", "--format=orbax", *flags) == 2
    assert re.search(message, capsys.readouterr().err) and not (tmp_path / "w").exists()


def test_each_array_keeps_its_type(tiny_model, tmp_path):
    """As some folders have norms in f32 beside matrices in bf16."""
    params = jax.tree.map(lambda x: np.asarray(x).astype("bfloat16"), tiny_model.params)
    weights.save_folder(
        tmp_path / "in", tiny_model.model.config, params, tiny_model.tokenizer, "bfloat16"
    )
    spoil(tmp_path / "in", lambda t: t | {NORM: np.full(t[NORM].shape, 1.00098, np.float32)})
    assert run(f"--from={tmp_path}/in", f"--to={tmp_path}/w", "--format=orbax") == 0
    norm = loading.load(tmp_path / "w").params["norm"]["scale"]
    assert norm.dtype == np.float32 and norm[0] == np.float32(1.00098)


def test_a_tokenizer_larger_than_the_table_is_refused(tiny_model, tmp_path, capsys):
    model = Model(replace(tiny_model.model.config, vocab_size=100))
    weights.save_folder(
        tmp_path / "in",
        model.config,
        jax.device_get(model.init(jax.random.key(0))),
        tiny_model.tokenizer,
    )
    assert run(f"--from={tmp_path}/in", f"--to={tmp_path}/w", "--format=orbax") == 2
    assert "its model 100 rows" in capsys.readouterr().err


def test_a_converted_model_answers(tiny_model, tmp_path):
    weights.save_folder(
        tmp_path / "in", tiny_model.model.config, tiny_model.params, tiny_model.tokenizer
    )
    assert run(f"--from={tmp_path}/in", f"--to={tmp_path}/w", "--format=orbax") == 0
    ask = lambda folder: SelfRAG.load(folder).answer(
        ["Where?"], mode="no_retrieval", max_depth=1, max_new_tokens=4
    )  # noqa: E731
    assert ask(tmp_path / "w")[0].to_row() == ask(tmp_path / "in")[0].to_row()


def test_other_weights_are_another_model(tiny_model, tmp_path):
    """A stage that was made from one must not be taken for made from the other."""
    prints = []
    for factor in (1.0, 2.0):
        shutil.rmtree(tmp_path / "w", ignore_errors=True)
        params = jax.tree.map(lambda x, f=factor: np.asarray(x) * np.float32(f), tiny_model.params)
        weights.save_folder(tmp_path / "in", tiny_model.model.config, params, tiny_model.tokenizer)
        assert run(f"--from={tmp_path}/in", f"--to={tmp_path}/w", "--format=orbax") == 0
        prints.append(artifacts.fingerprint(tmp_path / "w"))
    assert prints[0] != prints[1]


def test_a_workdir_that_does_not_fit_its_architecture_is_refused(tiny_model, tmp_path, capsys):
    weights.save_folder(
        tmp_path / "in", tiny_model.model.config, tiny_model.params, tiny_model.tokenizer
    )
    assert run(f"--from={tmp_path}/in", f"--to={tmp_path}/w", "--format=orbax") == 0
    file = tmp_path / "w" / "model.json"
    row = json.loads(file.read_text())
    for change, message in (
        ({"tie_embeddings": False}, "head/kernel has shape None in the checkpoint"),
        ({"num_layers": 3}, r"has shape \(2, .* and \(3, "),
        ({"layers": 3}, "model.json: is no architecture of this version"),
    ):
        file.write_text(json.dumps(row | change))
        assert run(f"--from={tmp_path}/w", f"--to={tmp_path}/out", "--format=huggingface") == 2
        assert re.search(message, capsys.readouterr().err) and not (tmp_path / "out").exists()


def test_a_trained_model_is_exported(tiny_model, tmp_path):
    rows = [
        GeneratorExample(str(i), f"Say {i}.", f"[No Retrieval]Number {i}.[Utility:5]")
        for i in range(12)
    ]
    source = GeneratorSource(
        rows, tiny_model.tokenizer, dict.fromkeys(("retrieve", "isrel", "issup", "isuse"), 1.0)
    )
    config = TrainConfig(
        seed=0, steps=4, rows=2, length=32, max_targets=48, save_every=2, log_every=4, mesh=MeshConfig(1, 1, 1),
        optimizer=OptimizerConfig("adamw", 0.01, 0.01, "linear", 0.1, 1e-8, 0.0, 1.0, 1.0),
    )  # fmt: skip
    trained = train(
        config, tiny_model.model, tiny_model.params, source, tiny_model.tokenizer, tmp_path / "w"
    )["params"]
    assert run(f"--from={tmp_path}/w", f"--to={tmp_path}/hf", "--format=huggingface") == 0
    exported = loading.load(tmp_path / "hf")
    jax.tree.map(np.testing.assert_array_equal, exported.params, jax.device_get(trained))
    assert exported.model.config == tiny_model.model.config


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--format=orbx"], "--format='orbx': must be one of orbax, huggingface"),
        (
            ["--format=orbax", "--dtype=int8"],
            "--dtype='int8': must be one of float32, float16, bfloat16",
        ),
        (["--format=orbax", "--from=nowhere"], "nowhere: no such folder"),
        (["--format=orbax", "--from=../missing"], "../missing: no such folder"),
        (["--format=orbax", f"--from={__file__}"], "is a file; expected the folder of a model"),
        (
            ["--format=orbax", "--from=owner/model"],
            "owner/model: no such folder, and as a model of the Hugging Face hub",
        ),
    ],
)
def test_wrong_flags_write_nothing(folder, tmp_path, capsys, monkeypatch, argv, message):
    monkeypatch.setattr(hub, "_hub_answers", lambda: False)
    monkeypatch.setenv("HF_HOME", str(tmp_path.parent))
    assert run(f"--from={folder[0]}", f"--to={tmp_path}/out", *argv) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_what_is_there_is_not_overwritten(folder, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("x")
    assert run(f"--from={folder[0]}", f"--to={tmp_path}", "--format=orbax") == 2
    assert "is already there" in capsys.readouterr().err and [
        p.name for p in tmp_path.iterdir()
    ] == ["mine.txt"]


@pytest.mark.parametrize("form", converting.FORMATS)
def test_a_conversion_that_fails_leaves_nothing(folder, tmp_path, monkeypatch, form):
    read, calls = weights.WeightFiles.tensor, []

    def broken(self, name, shape):
        calls.append(name)
        if len(calls) == 5:
            raise UserError("tensor spoiled")
        return read(self, name, shape)

    monkeypatch.setattr(weights.WeightFiles, "tensor", broken)
    with pytest.raises(UserError, match="tensor spoiled"):
        converting.convert(folder[0], tmp_path / "out", form, None, False)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "number", "status"),
    [("orbax", "SIGTERM", 143), ("orbax", "SIGINT", 130), ("huggingface", "SIGTERM", 143)],
)
def test_a_conversion_that_is_told_to_stop_leaves_nothing(folder, tmp_path, form, number, status):
    """Told so while the fifth tensor is read. What is half-written is removed, and nothing is written any more then."""
    program = f"""if True:
        import os, shutil, signal, sys, time
        from selfrag_jax import cli
        from selfrag_jax.huggingface import weights
        read, remove, calls = weights.WeightFiles.tensor, shutil.rmtree, []
        def tensor(self, name, shape):
            calls.append(name)
            if len(calls) == 5:
                os.kill(os.getpid(), signal.{number})
            time.sleep(0.05)
            return read(self, name, shape)
        def rmtree(*args, **kwargs):
            before = len(calls)
            time.sleep(0.5)
            if len(calls) > before:
                print("still being written")
            remove(*args, **kwargs)
        weights.WeightFiles.tensor, shutil.rmtree = tensor, rmtree
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in the background without
        sys.exit(cli.main())
    """
    command = [
        sys.executable,
        "-c",
        program,
        "convert",
        f"--from={folder[0]}",
        f"--to={tmp_path}/new/out",
        f"--format={form}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
    assert not done.stdout and not list(tmp_path.iterdir())


def truncate(folder):
    file = folder / weights.WEIGHTS
    os.truncate(file, file.stat().st_size // 2)


def lose_a_shard(folder):
    tensors = load_file(folder / weights.WEIGHTS)
    (folder / weights.WEIGHTS).unlink()
    weights.write_tensors(folder, tensors.items(), shard_bytes=50_000)
    sorted(folder.glob("model-*"))[1].unlink()


def rewrite(folder, file, change):
    (folder / file).write_text(change((folder / file).read_text()))


def lose_a_reflection_token(folder):
    rewrite(folder, "tokenizer.json", lambda text: text.replace("[Relevant]", "[Pertinent]"))


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        (
            lambda f: spoil(f, lambda t: t | {UP: t[UP] * np.nan}),
            [],
            f"model.safetensors: tensor '{UP}' holds NaN",
        ),
        (
            lambda f: spoil(f, lambda t: t | {NORM: t[NORM] + np.inf}),
            [],
            f"model.safetensors: tensor '{NORM}' holds NaN or inf",
        ),
        (
            lambda f: spoil(f, lambda t: {k: v for k, v in t.items() if k != UP}),
            [],
            f"tensor '{UP}' is missing",
        ),
        (
            lambda f: spoil(f, lambda t: t | {NORM: t[NORM][:-1]}),
            [],
            "has shape (31,); by config.json it should be (32,)",
        ),
        (truncate, [], "model.safetensors: not readable as safetensors"),
        (lose_a_shard, [], "shard model-00002-of-"),
        (
            lose_a_reflection_token,
            ["--reflection_tokens"],
            "has some reflection tokens, but not [Relevant]",
        ),
        (
            lambda f: rewrite(f, "config.json", lambda t: t.replace("silu", "gelu")),
            [],
            "config.json: hidden_act='gelu'",
        ),
    ],
    ids=(
        "nan",
        "inf",
        "missing tensor",
        "shape",
        "truncated",
        "missing shard",
        "reflection token",
        "config",
    ),
)
@pytest.mark.parametrize("form", converting.FORMATS)
def test_a_spoilt_source_is_one_line_and_leaves_nothing(
    tiny_model, tmp_path, capsys, form, change, flags, message
):
    source = tmp_path / "spoilt"
    weights.save_folder(
        source, tiny_model.model.config, jax.device_get(tiny_model.params), tiny_model.tokenizer
    )
    change(source)
    assert run(f"--from={source}", f"--to={tmp_path}/out", f"--format={form}", *flags) == 2
    said = [
        line
        for line in capsys.readouterr().err.splitlines()
        if line.strip() and not line.startswith("convert ")
    ]
    assert (
        len(said) == 1
        and said[0].startswith("selfrag convert: ")
        and message in said[0]
        and str(source) in said[0]
    )
    assert [p.name for p in tmp_path.iterdir()] == ["spoilt"]


def test_a_model_of_the_hub_is_downloaded(folder, tmp_path, monkeypatch):
    """With a network, which is not here: in place of the download stands a copy."""
    asked = []

    def download(name, allow_patterns, local_files_only):
        asked.append((name, allow_patterns, local_files_only))
        return str(shutil.copytree(folder[0], tmp_path / "cache", dirs_exist_ok=True))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr(hub, "_hub_answers", lambda: True)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.chdir(tmp_path)
    assert run("--from=owner/model", f"--to={tmp_path}/w", "--format=orbax") == 0
    [(name, patterns, offline)] = asked
    assert name == "owner/model" and not offline
    wanted = ("model.safetensors", "model-00001-of-00002.safetensors", "config.json", "generation_config.json", "tokenizer.model",
              "model.safetensors.index.json")  # fmt: skip
    matched = lambda file: any(fnmatch(file, p) for p in patterns)  # noqa: E731
    assert all(map(matched, wanted)) and not any(
        map(matched, ("consolidated.safetensors", "pytorch_model.bin"))
    )
    jax.tree.map(np.testing.assert_array_equal, loading.load(tmp_path / "w").params, folder[2])


WIDE = LlamaConfig(
    1000, 1024, 4096, 24, 8, 8, 128, 64, 1e4, 1e-5, False, "bfloat16", "none", 1
)  # 0.4B: 0.8 GB in bf16
MEASURE = """
import re, sys, threading
from pathlib import Path
import jax
from selfrag_jax.checkpoints import converting
from selfrag_jax.huggingface import weights
weights.SHARD_BYTES = 2**25
# Anonymous memory: mapped pages of the files that are read are the system's to take back.
now = lambda: int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
jax.devices()  # a GPU's plug-in takes 0.1 GB, with no GPU too: it belongs to the program
before, most, done = now(), 0, threading.Event()
def watch():
    global most
    while not done.wait(0.01):
        most = max(most, now())
thread = threading.Thread(target=watch)
thread.start()
converting.convert(sys.argv[1], Path(sys.argv[2]), sys.argv[3], None, False)
done.set()
thread.join()
print(most - before)
"""


@pytest.mark.slow
def test_the_model_is_never_in_memory(tokenizer, tmp_path):
    """Its largest array has 0.2 GB, its layers 8 MB in each; what is held beside the program stays below a third of it all
    (shards of 0.03 GB, which are held whole)."""
    config = replace(WIDE, vocab_size=tokenizer.vocab_size)
    rng = np.random.default_rng(0)
    layer = {
        path: rng.normal(size=leaf.shape[1:]).astype("bfloat16") for path, leaf in stacks(config)
    }

    def tensors():
        for path, leaf in flatten(Model(config).shapes()):
            parts = (
                [layer[path]] * leaf.shape[0]
                if path[0] == "layers"
                else [np.ones(leaf.shape, "bfloat16")]
            )
            yield from weights.tensors_of(path, config, parts)

    (tmp_path / "in").mkdir()
    weights.write_tensors(tmp_path / "in", tensors(), shard_bytes=2**25)
    weights.write_config_and_tokenizer(tmp_path / "in", config, tokenizer, "bfloat16")
    size = sum(f.stat().st_size for f in (tmp_path / "in").glob("*.safetensors"))
    assert size > 7e8
    for source, out, form in (("in", "w", "orbax"), ("w", "out", "huggingface")):
        command = [sys.executable, "-c", MEASURE, str(tmp_path / source), str(tmp_path / out), form]
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}
        )
        assert done.returncode == 0, done.stderr
        assert 0 < int(done.stdout.split()[-1]) < size / 3


def stacks(config):
    return [(path, leaf) for path, leaf in flatten(Model(config).shapes()) if path[0] == "layers"]


def test_a_full_disk_is_said_and_leaves_nothing(tiny_model, tmp_path, caplog, capfd):
    """In both directions: files may have 20 kB at most."""
    params = jax.device_get(tiny_model.params)
    weights.save_folder(tmp_path / "hf", tiny_model.model.config, params, tiny_model.tokenizer)
    converting.convert(tmp_path / "hf", tmp_path / "w", "orbax", None, False)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for source, form in (("hf", "huggingface"), ("w", "huggingface"), ("hf", "orbax")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            with pytest.raises(OSError, match="File too large|os error 27"):
                converting.convert(
                    tmp_path / source, tmp_path / "new" / "and" / "out", form, None, False
                )
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert not (tmp_path / "new").exists()
    assert "Traceback" not in capfd.readouterr().err + caplog.text  # of Orbax's threads


def test_an_export_that_was_trained_on_is_another_input(tiny_model, tmp_path):
    """Whoever saves over it leaves our manifest as it is."""
    weights.save_folder(
        tmp_path / "hf",
        tiny_model.model.config,
        jax.device_get(tiny_model.params),
        tiny_model.tokenizer,
    )
    converting.convert(tmp_path / "hf", tmp_path / "out", "huggingface", None, False)
    before = artifacts.fingerprint(tmp_path / "out")
    tensors = load_file(tmp_path / "out" / weights.WEIGHTS)
    save_file(
        {name: 2 * value for name, value in tensors.items()}, tmp_path / "out" / weights.WEIGHTS
    )
    assert (tmp_path / "out" / "manifest.json").is_file() and artifacts.fingerprint(
        tmp_path / "out"
    ) != before


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(tiny_model, tmp_path):
    params = jax.device_get(tiny_model.params)
    rows = tiny_model.tokenizer.vocab_size - 2
    small = params | {"embed": {"embedding": params["embed"]["embedding"][:rows]}}
    weights.save_folder(
        tmp_path / "hf",
        replace(tiny_model.model.config, vocab_size=rows),
        small,
        tiny_model.tokenizer,
    )
    with pytest.raises(
        UserError, match=f"its tokenizer has {rows + 2} tokens, its model {rows} rows"
    ):
        SelfRAG.load(tmp_path / "hf")


def test_weights_in_torchs_format_are_named_with_what_to_do(tiny_model, tmp_path):
    weights.save_folder(
        tmp_path, tiny_model.model.config, jax.device_get(tiny_model.params), tiny_model.tokenizer
    )
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(
        UserError, match=r"there is pytorch_model.bin.*Torch's own format.*save_pretrained"
    ):
        weights.load_folder(tmp_path)


def test_a_trained_stack_is_stored_by_layers(tmp_path):
    """So that an export reads one layer without the others."""
    stack = jnp.arange(3 * 512 * 640, dtype=jnp.float32).reshape(3, 512, 640)
    with saving.writing_checkpoints(saving.checkpoint_manager(tmp_path, 1, 0), tmp_path) as saved:
        saving.save_checkpoint(saved, 3, {"params": {"layers": {"q": {"kernel": stack}}}}, {}, 1.0)
    arrays, _, _ = converting._lazy_params(tmp_path, 3)
    assert arrays["layers"]["q"]["kernel"].chunk_layout.read_chunk.shape == (1, 512, 640)
