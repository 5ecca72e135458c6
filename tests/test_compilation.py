"""Ahead-of-time compilation: hand-worked counts, and small programs through the real compilers."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from repetitions import some

from selfrag_jax import cli
from selfrag_jax import config as configs
from selfrag_jax.compilation.collectives import count_collectives
from selfrag_jax.compilation.compile import _chip
from selfrag_jax.compilation.topology import topology_devices
from selfrag_jax.compilation.train import updated_bytes_per_chip
from selfrag_jax.engine.shapes import Shapes
from selfrag_jax.errors import UserError
from selfrag_jax.models import roofline
from selfrag_jax.models.architectures import ARCHITECTURES, architecture
from selfrag_jax.models.encoder import BertConfig, Encoder
from selfrag_jax.models.llama import LlamaConfig, Model
from selfrag_jax.models.lora import LoraConfig
from selfrag_jax.models.params import flatten
from selfrag_jax.retrieval.device_search import padded_rows
from selfrag_jax.training import optimizer, step
from selfrag_jax.training.config import MeshConfig, TrainConfig
from selfrag_jax.training.optimizer import OptimizerConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "launch"))
import compile_table

ROOT = Path(__file__).parents[1]
SHIPPED = ("critic_7b", "generator_7b", "generator_13b", "lora_7b")

PROGRAM = """HloModule jit_train_step, num_partitions=16
%inner (p: (bf16[8,4], u32[])) -> (bf16[8,4], u32[]) {
  %two = u32[] constant(2)
  %p = (bf16[8,4], u32[]) parameter(0)
  %x = bf16[8,4] get-tuple-element(%p), index=0
  %collective-permute-start = (bf16[8,4], bf16[8,4], u32[], u32[]) collective-permute-start(%x), \
channel_id=1, source_target_pairs={{0,1},{1,0}}
  %i = u32[] get-tuple-element(%p), index=1
  %next = u32[] add(%i, %two)
  ROOT %out = (bf16[8,4], u32[]) tuple(%x, %next)
}

%inner_condition (p.1: (bf16[8,4], u32[])) -> pred[] {
  %end = u32[] constant(8)
  %p.1 = (bf16[8,4], u32[]) parameter(0)
  %i.1 = u32[] get-tuple-element(%p.1), index=1
  ROOT %less = pred[] compare(%i.1, %end), direction=LT
}

%layer (q: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %q = (s32[], bf16[8,4]) parameter(0)
  %kernel = bf16[8,4] custom-call(%q), custom_call_target="tpu_custom_call", metadata={"a":"
}}, metadata={}
  %while.1 = (bf16[8,4], u32[]) while(%q), condition=%inner_condition, body=%inner
  %fused = bf16[8,4] fusion(%kernel), kind=kCustom, calls=%gathering
  %fused.done = bf16[8,4] fusion(%kernel), kind=kCustom, calls=%gathering.done
  ROOT %t = (s32[], bf16[8,4]) tuple(%q, %fused)
}

%layer_condition (q.1: (s32[], bf16[8,4])) -> pred[] {
  %layers = s32[] constant(3)
  %j = s32[] get-tuple-element(%q.1), index=0
  ROOT %less.1 = pred[] compare(%j, %layers), direction=LT
}

%gathering (g: bf16[1,4]) -> bf16[8,4] {
  ROOT %all-gather.1 = bf16[8,4] all-gather(%g), channel_id=2, \
replica_groups=mesh['fsdp'=8,'tensor'=2] {'fsdp'}, dimensions={0}
}

%gathering.done (g.1: bf16[1,4]) -> bf16[8,4] {
  ROOT %all-gather.2 = bf16[8,4] all-gather(%g.1), channel_id=2, \
replica_groups=mesh['fsdp'=8,'tensor'=2] {'fsdp'}, dimensions={0}
}

ENTRY %main (a: f32[16]) -> f32[4] {
  %while.2 = (s32[], bf16[8,4]) while(%a), condition=%layer_condition, body=%layer
  %turned = bf16[8,4] all-to-all(%c), channel_id=5, replica_groups=mesh['a'=2,'b'=4], \
device_ids=([2,4]T(1,0)) {'b'}, dimensions={0}
  %everyone = f32[8] all-reduce(%a), channel_id=6, replica_groups={}, to_apply=%add
  %sum = (f32[10], f32[6]) all-reduce(%a, %b), channel_id=3, replica_groups=[2,4]<=[8], \
to_apply=%add
  ROOT %reduce-scatter = f32[4] reduce-scatter(%a), channel_id=4, \
replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
}
"""


def test_collectives_count_as_often_as_their_loops_run():
    """3 layers, each with a loop to 8 by twos, and a gather spelt in its start and its end."""
    assert count_collectives(PROGRAM) == {
        "collective-permute": (3 * 4, 3 * 4 * 8 * 4 * 2),
        "all-gather": (3, 3 * 8 * 4 * 2 * 7 // 8),
        "all-reduce": (2, 2 * 16 * 4 * 3 // 4 + 2 * 8 * 4 * 15 // 16),
        "all-to-all": (1, 8 * 4 * 2 * 3 // 4),
        "reduce-scatter": (1, 4 * 4 * 4 * 3 // 4),
    }


def test_the_loop_over_generated_tokens_counts_once():
    loop = "condition=%layer_condition, body=%layer"
    marked = PROGRAM.replace(loop, loop + ', metadata={op_name="jit(decode)/while"}')
    once = count_collectives(marked)
    assert once["all-gather"] == (1, 8 * 4 * 2 * 7 // 8) and once["collective-permute"][0] == 4


def test_collectives_of_shard_map_share_a_channel_and_all_count():
    gather = "all-gather(%a), channel_id=1, replica_groups={}, dimensions={0}"
    hlo = f"""HloModule jit_search, num_partitions=4
ENTRY %main (a: f32[2,8]) -> f32[8,8] {{
  %scores = f32[8,8]{{1,0:T(8,128)S(1)}} {gather}
  %rows = s32[8,8]{{1,0:T(8,128)S(1)}} {gather}
  ROOT %scores.done = f32[8,8]{{1,0:T(8,128)}} {gather}
}}
"""
    assert count_collectives(hlo) == {"all-gather": (2, 2 * 8 * 8 * 4 * 3 // 4)}


def test_notation_of_groups_that_is_unknown_raises():
    with pytest.raises(ValueError, match="cannot read the groups"):
        count_collectives(PROGRAM.replace("replica_groups={}", "replica_groups=odd"))


def largest_calls(label: str, num_slots: int, length: int, beam_width: int = 1, passages: int = 1):
    """The calls under a label, as {the rest of the label: (slots, tokens of a row)}."""
    shapes = Shapes(
        num_slots=num_slots,
        beam_width=beam_width,
        num_passages=passages,
        max_new_tokens=100,
        length_bucket=64,
        longest_prompt=length,
        prefix_grows=True,
    )
    calls = shapes.largest_calls(length, max_segments=2, keep_passages=True)
    return {
        call.label.removeprefix(label): (call.num_slots, call.length)
        for call in calls
        if call.label.startswith(label)
    }


def test_largest_calls_are_the_longest_and_the_widest():
    """At most 4,096 tokens in one call, in buckets of 64 (beyond 512, of 128)."""
    assert largest_calls("prompt", 16, 320) == {"": (12, 320), "_together": (16, 256)}
    assert largest_calls("prompt", 16, 256) == {"": (16, 256)}
    assert largest_calls("prompt", 4, 320) == {"": (1, 320)}  # too few slots for a batch
    # 8 slots x 10 passages x 64 tokens are too many.
    assert largest_calls("passages", 8, 320, passages=10) == {"": (1, 320), "_together": (8, 1)}
    assert largest_calls("passages", 8, 640, 2, 2) == {"": (1, 640), "_together": (8, 128)}
    # Branches have room for 256 tokens from the start, so none is as short as 128.
    assert largest_calls("keep", 8, 640, 4, 2) == {"": (1, 640)}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_roofline_counts_the_weights_of_the_model(name):
    c = architecture(name, 16, "bfloat16")
    matrices = sum(leaf.size for path, leaf in flatten(Model(c).shapes()) if path[-1] != "scale")
    assert roofline.num_weights(c) == matrices
    adapted = replace(c, lora=LoraConfig(4, 8.0))
    more = sum(
        leaf.size for path, leaf in flatten(Model(adapted).shapes()) if path[-1].startswith("lora")
    )
    assert roofline.num_weights(adapted) == matrices + more


@pytest.mark.parametrize(
    "changes", [dict(), dict(name="adafactor"), dict(name="muon"), dict(lora=True)], ids=str
)
def test_updated_bytes_are_those_of_the_training_state(tiny_model, changes):
    lora = LoraConfig(4, 8.0) if changes.pop("lora", False) else None
    recipe = dict(
        name="adamw",
        learning_rate=1e-3,
        adam_learning_rate=1e-3,
        schedule="linear",
        warmup_fraction=0.1,
        adam_eps=1e-8,
        weight_decay=0.0,
        clip=1.0,
    )
    section = TrainConfig(
        seed=0,
        rows=4,
        length=32,
        max_targets=None,
        optimizer=OptimizerConfig(**recipe | changes),
        mesh=MeshConfig(1, 1, 1),
        save_every=1,
        log_every=1,
        steps=4,
        lora=lora,
    )
    model = section.model(tiny_model.model.config)
    tx = optimizer.make_optimizer(section.optimizer, 4)
    state = step.initial_state(model.init(jax.random.key(0)), tx, section, "float32")
    updated = {name: x for name, x in state.items() if name != "frozen"}
    num_bytes = sum(x.nbytes for x in jax.tree.leaves(updated))
    mesh = section.make_mesh(jax.devices()[:1])
    assert updated_bytes_per_chip(section, model, mesh) == num_bytes


def test_published_models_have_their_number_of_parameters():
    millions = {
        "llama2_7b": 6738,
        "llama2_13b": 13016,
        "llama2_70b": 68977,
        "llama31_8b": 8030,
        "mistral_7b": 7242,
    }
    for name, expected in millions.items():
        shapes = Model(architecture(name, 0, "bfloat16")).shapes()
        count = sum(leaf.size for _, leaf in flatten(shapes))
        assert count / 1e6 == pytest.approx(expected, abs=0.6)


def layer_weights(c: LlamaConfig) -> int:
    """Parameters in the matrices of one layer, without adapters."""
    tables = 2 * c.vocab_size * c.embed_dim
    return (roofline.num_weights(replace(c, lora=None)) - tables) // c.num_layers


def test_model_flops_of_llama2_7b():
    """6 x 6,607M weights that multiply; half of 12 x 32 layers x 4,096 x 2,048 for attention."""
    c = architecture("llama2_7b", 0, "bfloat16")
    flops = roofline.train_flops_per_token
    attention = 32 * 4096 * 2048
    assert flops(c, 2048) == pytest.approx(6 * 6607e6 + 6 * attention, rel=1e-4)
    # The first 256 tokens of a row see less than the window.
    window = 32 * 4096 * (256 - 16)
    windowed = replace(c, sliding_window=256)
    assert flops(windowed, 2048) == pytest.approx(6 * 6607e6 + 12 * window, rel=1e-4)


def test_recomputed_flops_of_llama2_7b_with_lora():
    """Forward, once more, and backward without the gradients of the frozen kernels."""
    c = architecture("llama2_7b", 0, "bfloat16")
    adapted = replace(c, lora=LoraConfig(16, 32.0), remat="full")
    frozen, head, attention = 32 * layer_weights(c), 32000 * 4096, 2 * 32 * 4096 * 2048
    adapters = roofline.num_weights(adapted) - roofline.num_weights(c)
    flops = roofline.train_flops_per_token(adapted, 2048)
    flops += roofline.recomputed_flops_per_token(adapted, 2048, True)
    assert flops == pytest.approx(6 * frozen + 8 * adapters + 8 * head + 4 * attention, rel=1e-9)


def multiply_adds(jaxpr) -> int:
    """Counts the multiply-adds of matrix products; those in a scan with its trip count."""
    total = 0
    for eqn in jaxpr.eqns:
        inner = [p.jaxpr for p in eqn.params.values() if hasattr(p, "jaxpr")]
        total += eqn.params.get("length", 1) * sum(map(multiply_adds, inner))
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            sizes = [eqn.invars[0].aval.shape[axis] for axis in contracted]
            total += eqn.outvars[0].aval.size * math.prod(sizes)
    return total


def test_flops_of_an_encoder_are_its_counted_multiply_adds():
    """Bert's layers do nothing else with matrices: 2 FLOPs for each multiply-add."""
    c = BertConfig(
        vocab_size=50,
        embed_dim=16,
        mlp_dim=40,
        num_layers=3,
        num_heads=4,
        max_length=24,
        num_types=2,
        norm_eps=1e-12,
        activation="gelu",
        dtype="bfloat16",
    )
    encoder, (B, T) = Encoder(c), (5, 24)
    tokens, lengths = (jax.ShapeDtypeStruct(shape, "int32") for shape in ((B, T), (B,)))
    embed = partial(encoder.embed, pooling="mean", normalize=False)
    counted = multiply_adds(jax.make_jaxpr(embed)(encoder.shapes(), tokens, lengths).jaxpr)
    assert roofline.encoder_flops_per_token(c, T) == 2 * counted / (B * T)


def test_chips_are_known_by_their_device_kind():
    assert roofline.chip("TPU v5 lite").name == "v5e"
    assert roofline.chip("NVIDIA H200").memory == 141e9


@pytest.mark.parametrize(
    "kind",
    ["cpu", "NVIDIA GH200 480GB", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-40GB", "NVIDIA H200 NVL"],
)
def test_chips_without_known_rates_are_refused_by_name(kind):
    assert roofline.chip(kind) is None
    with pytest.raises(UserError, match=re.escape(f"the peak rates of '{kind}' are unknown")):
        _chip([SimpleNamespace(device_kind=kind)])


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_name_slices_that_they_fit(name):
    c = configs.load(name)
    role = "critic" if "critic" in c else "generator"
    section = configs.build(TrainConfig, c[role], role)
    assert c.name == name and c.architecture in ARCHITECTURES and section.dtype == "bfloat16"
    docstring = (ROOT / "configs" / f"{name}.py").read_text().split('"""')[1]
    assert f"selfrag train --config={name} --role={role}" in docstring
    slices = re.findall(r"(v\w+:[\dx]+)  [\d.]+ h", docstring)
    assert slices and set(slices) <= set(compile_table.SLICES[name])
    readme = (ROOT / "configs" / "README.md").read_text()
    for topology in slices:
        row = rf"\| {name} \| {topology} \| [^|]*\| ([\d.]+) \+ ([\d.]+) of (\d+) \|"
        arguments, temporaries, memory = re.search(row, readme).groups()
        assert float(arguments) + float(temporaries) <= float(memory)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=v5e"], "expected a TPU and its slice, like v5e:4x4"),
        (["--topology=v5e:4x4x4"], "(two sizes)"),
        (["--topology=h100:16"], "GPUs of a host, like h100:8 (a100, h100, h200; 1 to 8)"),
        (["--topology=v5e:4x4", "--program=serve"], "--program=serve: must be one of train"),
        (["--topology=v5e:4x4", "--config=tiny"], "no architecture to compile"),
        (["--topology=v5e:4x4", "--program=search"], "no corpus and encoder to compile"),
        (["--topology=v5e:4x4", "--config.architecture=llama2"], "must be one of llama2_7b"),
        (
            ["--topology=v5e:4x4", "--config.generator.mesh.fsdp=5"],
            "mesh (1, 5, 1) uses 5 of 16 devices; several processes must use all",
        ),
        (
            ["--topology=v5e:2x2", "--config.generator.mesh.fsdp=3"],
            "mesh (1, 3, 1) cannot be laid over 3 devices of this slice",
        ),
        (
            [
                "--topology=v4:4x4x4",
                "--config.generator.mesh.fsdp=2",
                "--config.generator.mesh.tensor=32",
            ],
            "mesh (1, 2, 32) cannot be laid over this slice: each size must be the product of some "
            "of its sides",
        ),
        (
            ["--topology=v5e:4x4", "--config.generator.rows=24"],
            "rows=24 is not divisible by mesh data x fsdp = 16",
        ),
        (
            ["--topology=v5e:2x2", "--config.generator.mesh.fsdp=32"],
            "needs 32 devices; there are 4",
        ),
        ([], "missing --topology"),
    ],
)
@pytest.mark.slow
def test_wrong_flags_are_user_errors(arguments, message, capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert cli.main(["compile", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_missing_compiler_names_the_extra_to_install(monkeypatch):
    from jax.experimental import topologies

    def missing(*args, **kwargs):
        raise RuntimeError("JAX TPU support not installed; cannot generate TPU topology")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(UserError, match=re.escape("pip install 'selfrag-jax[tpu]'")):
        topology_devices("v5e:2x2")

    def no_plugin(*args, **kwargs):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(topologies, "get_topology_desc", no_plugin)
    with pytest.raises(UserError, match=re.escape("pip install 'selfrag-jax[gpu]'")):
        topology_devices("h100:8")


CONFIG = """
from selfrag_jax import config
from selfrag_jax.models.architectures import ARCHITECTURES

fields = dict(
    vocab_size=992, head_dim=128, max_length=512, rope_theta=1e4, norm_eps=1e-5, num_layers=2
)
ARCHITECTURES["small"] = dict(fields, embed_dim=256, mlp_dim=512, num_heads=4, num_kv_heads=4)
ARCHITECTURES["wide"] = dict(
    fields, embed_dim=8192, mlp_dim=28_672, num_heads=64, num_kv_heads=64
)

def get_config(which):
    if which == "answer":
        c = config.load("short_form:7b")
        c.architecture, c.answer.tensor = "wide", 1
        return c
    c = config.load("generator_7b")
    c.architecture = which
    c.generator.length, c.generator.loss_chunk, c.generator.rows = 256, 256, 16
    return c
"""


def run_compile(config: str, topology: str, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "selfrag_jax", "compile"]
    command += [f"--config={config}", f"--topology={topology}", *flags]
    return subprocess.run(command, capture_output=True, text=True)


def bytes_sent(result: dict) -> int:
    return sum(kind["bytes_per_chip"] for kind in result["collectives"].values())


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "c.py"
    path.write_text(CONFIG)
    return path


@pytest.mark.slow
def test_tpu_compiler_splits_a_small_model_over_four_chips(config_file):
    done = run_compile(f"{config_file}:small", "v5e:2x2")
    assert done.returncode == 0, done.stderr
    small = json.loads(done.stdout)
    assert small["custom_kernels"] > 0  # attention is the TPU's, though this is a CPU
    assert small["fits"] and small["chips"] == 4 and small["mesh"]["fsdp"] == 4
    c = architecture("llama2_7b", 0, "bfloat16")
    c = replace(
        c, vocab_size=1024, embed_dim=256, mlp_dim=512, num_layers=2, num_heads=4, num_kv_heads=4
    )
    # f32 parameters and two moments are split over four chips; the batch is small.
    state = 12 * sum(leaf.size for _, leaf in flatten(Model(c).shapes()))
    assert state / 4 < small["memory_per_chip"]["arguments"] < 1.1 * state / 4 + 2e5
    # Weights are gathered for each of four parts of the batch, at least once forward and once
    # backward.
    layers = 2 * layer_weights(c)
    assert 2 * 4 * 2 * layers * 3 / 4 < bytes_sent(small) < 12 * 4 * 2 * layers
    flops = roofline.train_flops_per_token(replace(c, vocab_size=1008), 256)
    assert small["model_flops"] == pytest.approx(16 * 256 * flops)


@pytest.mark.slow
def test_tpu_compiler_sums_gradients_between_two_slices(config_file):
    """Each chip hands its quarter of the f32 gradients to the network, and nothing else of size."""
    done = run_compile(f"{config_file}:small", "v5e:2x2", "--slices=2")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["slices"] == 2 and result["chips"] == 8
    assert result["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}
    c = architecture("llama2_7b", 0, "bfloat16")
    c = replace(
        c, vocab_size=1024, embed_dim=256, mlp_dim=512, num_layers=2, num_heads=4, num_kv_heads=4
    )
    gradients = 4 * sum(leaf.size for _, leaf in flatten(Model(c).shapes())) / 4
    assert result["dcn"].keys() == {"all-reduce"}
    assert gradients <= result["dcn"]["all-reduce"]["bytes_per_chip"] < 1.1 * gradients + 1e5
    assert bytes_sent(result) > 0  # within the slices
    done = run_compile(f"{config_file}:small", "v5e:2x2", "--slices=2", "--program=decode")
    assert done.returncode == 2 and "only --program=train spans slices" in done.stderr


@pytest.mark.slow
def test_tpu_compiler_refuses_a_state_larger_than_a_chip(config_file):
    """The f32 parameters and moments alone take more than a chip has."""
    done = run_compile(f"{config_file}:wide", "v5e:1x1")
    assert done.returncode == 1 and "does not fit" in done.stderr
    wide = json.loads(done.stdout)
    assert not wide["fits"]
    memory = wide["memory_per_chip"]
    assert memory["temporaries"] > memory["hbm"] == 16e9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "topology", "gigabytes"),
    (
        ("short_form", "v5e:1x1", 14.5),  # int8, on one chip of 16 GB
        ("short_form:7b", "v5e:2x2", 14.8),  # bf16
        ("short_form:13b", "v5e:2x4", 12.7),
    )[: some(1, 3)],  # the others with --full; test_quantize.py compiles a small model over chips
)
def test_answering_with_7b_and_13b_fits_as_the_readme_has_it(config, topology, gigabytes):
    readme = (ROOT / "configs" / "README.md").read_text()
    row = rf"^\| {config} \(.*\) \| {topology} \| .*\| {gigabytes} \("
    assert re.search(row, readme, re.MULTILINE)
    done = run_compile(config, topology, "--program=decode")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["fits"] and result["passages"] == 10
    memories = [program["memory_per_chip"] for program in result["programs"].values()]
    largest = max(memory["arguments"] + memory["temporaries"] for memory in memories)
    assert largest / 1e9 == pytest.approx(gigabytes, rel=0.05)


@pytest.mark.slow
def test_retrieval_over_four_chips_gathers_only_what_was_found():
    config = f"{ROOT / 'configs' / 'index.py'}:wikipedia"
    sizes = dict(embed_dim=256, mlp_dim=512, num_layers=2, num_heads=4, vocab_size=992)
    small = [f"--config.encoder_architecture.{name}={n}" for name, n in sizes.items()]
    small += ["--config.corpus.passages=1000000", "--config.corpus.dim=256"]
    done = run_compile(config, "v5e:2x2", "--program=search", *small)
    assert done.returncode == 0, done.stderr
    search = json.loads(done.stdout)
    vector_bytes = padded_rows(1_000_000, 4) // 4 * 256 * 2
    for program in search["programs"].values():
        memory = program["memory_per_chip"]
        assert vector_bytes < memory["arguments"] < vector_bytes + 1e6
        assert memory["temporaries"] < 64 * 65_536 * 4 * 1.5  # scores of a block, at most
        # Scores and rows of the 100 best of 64 queries, from the three other chips.
        found = 2 * 64 * 100 * 4
        assert program["collectives"] == {"all-gather": {"count": 2, "bytes_per_chip": 3 * found}}
    assert search["fits"] and search["roofline_seconds"]["batch"] >= vector_bytes / 819e9

    done = run_compile(config, "v5e:2x2", "--program=embed", *small)
    assert done.returncode == 0, done.stderr
    embed = json.loads(done.stdout)
    # f32 weights on every chip; a chip's 170 texts of 192 tokens are small, and stay there.
    layer = 4 * 256**2 + 2 * 256 * 512
    weights = 2 * layer + (992 + 512 + 2) * 256  # and the embeddings
    assert 4 * weights < embed["memory_per_chip"]["arguments"] < 1.01 * 4 * weights + 2e5
    assert embed["fits"] and embed["batch"] == [4 * 170, 192] and embed["collectives"] == {}
    flops = 2 * (2 * layer + 4 * 256 * 192)
    assert embed["model_flops_per_token"] == flops
    seconds = 1_000_000 * 140 * flops / (4 * 197e12)
    assert embed["roofline_hours_for_corpus"] * 3600 == pytest.approx(seconds)


@pytest.mark.slow
def test_gpu_compiler_uses_cudnn_and_loops_are_counted(config_file):
    """A small model over two H100; their compiler writes loops differently from the TPU's."""
    done = run_compile(f"{config_file}:small", "h100:2")
    assert done.returncode == 0, done.stderr
    small = json.loads(done.stdout)
    assert small["custom_kernels"] >= 2 and small["chips"] == 2 and small["fits"]
    c = architecture("llama2_7b", 0, "bfloat16")
    c = replace(
        c, vocab_size=1024, embed_dim=256, mlp_dim=512, num_layers=2, num_heads=4, num_kv_heads=4
    )
    layers = 2 * layer_weights(c)
    rows_of_a_part = 2 * configs.load("generator_7b").generator.rows_per_device
    parts = small["tokens_per_step"] // 256 // rows_of_a_part
    assert 2 * parts * 2 * layers / 2 < bytes_sent(small) < 12 * parts * 2 * layers


@pytest.mark.slow
def test_decoding_on_a_gpu_copies_no_weights(config_file):
    done = run_compile(f"{config_file}:answer", "h100:1", "--program=decode")
    assert done.returncode == 0, done.stderr
    segment = json.loads(done.stdout)["programs"]["segment"]["memory_per_chip"]
    assert segment["arguments"] > 2 * 2 * (4 * 8192**2 + 3 * 8192 * 28_672)  # both layers in bf16
    assert segment["temporaries"] < 2 * 8192**2 / 2  # half of the smallest kernel
