"""Ahead-of-time compilation: what is counted, by hand; and the TPU compiler itself on a small training."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from selfrag_jax import cli
from selfrag_jax import config as configs
from selfrag_jax.compilation import collectives, compile, decode
from selfrag_jax.errors import UserError
from selfrag_jax.models import roofline
from selfrag_jax.models.architectures import ARCHITECTURES, architecture
from selfrag_jax.models.llama import Model
from selfrag_jax.models.lora import LoraConfig
from selfrag_jax.models.params import flatten
from selfrag_jax.training import optimizer, step
from selfrag_jax.training.config import MeshConfig, TrainConfig
from selfrag_jax.training.optimizer import OptimizerConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "launch"))
import compile_table

SHIPPED = ("critic_7b", "generator_7b", "generator_13b", "lora_7b")

PROGRAM = """HloModule jit_train_step, num_partitions=16
%inner (p: (bf16[8,4], u32[])) -> (bf16[8,4], u32[]) {
  %two = u32[] constant(2)
  %p = (bf16[8,4], u32[]) parameter(0)
  %x = bf16[8,4] get-tuple-element(%p), index=0
  %collective-permute-start = (bf16[8,4], bf16[8,4], u32[], u32[]) collective-permute-start(%x), channel_id=1, source_target_pairs={{0,1},{1,0}}
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
  ROOT %all-gather.1 = bf16[8,4] all-gather(%g), channel_id=2, replica_groups=mesh['fsdp'=8,'tensor'=2] {'fsdp'}, dimensions={0}
}

%gathering.done (g.1: bf16[1,4]) -> bf16[8,4] {
  ROOT %all-gather.2 = bf16[8,4] all-gather(%g.1), channel_id=2, replica_groups=mesh['fsdp'=8,'tensor'=2] {'fsdp'}, dimensions={0}
}

ENTRY %main (a: f32[16]) -> f32[4] {
  %while.2 = (s32[], bf16[8,4]) while(%a), condition=%layer_condition, body=%layer
  %turned = bf16[8,4] all-to-all(%c), channel_id=5, replica_groups=mesh['a'=2,'b'=4], device_ids=([2,4]T(1,0)) {'b'}, dimensions={0}
  %everyone = f32[8] all-reduce(%a), channel_id=6, replica_groups={}, to_apply=%add
  %sum = (f32[10], f32[6]) all-reduce(%a, %b), channel_id=3, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %reduce-scatter = f32[4] reduce-scatter(%a), channel_id=4, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
}
"""


def test_collectives_by_hand():
    """3 layers; in each a loop to 8 by twos, and one gather whose beginning and end both spell it."""
    assert collectives.collectives(PROGRAM) == {
        "collective-permute": (3 * 4, 3 * 4 * 8 * 4 * 2),
        "all-gather": (3, 3 * 8 * 4 * 2 * 7 // 8),
        "all-reduce": (2, 2 * 16 * 4 * 3 // 4 + 2 * 8 * 4 * 15 // 16),
        "all-to-all": (1, 8 * 4 * 2 * 3 // 4),
        "reduce-scatter": (1, 4 * 4 * 4 * 3 // 4),
    }


def test_the_loop_over_generated_tokens_counts_once():
    loop = "condition=%layer_condition, body=%layer"
    once = collectives.collectives(
        PROGRAM.replace(loop, loop + ', metadata={op_name="jit(decode)/while"}')
    )
    assert once["all-gather"] == (1, 8 * 4 * 2 * 7 // 8) and once["collective-permute"][0] == 4


def test_the_largest_changes_by_hand():
    """At most 4,096 tokens at once, in buckets of 64 (beyond 512, of 128)."""
    changes = decode.largest_changes
    assert changes(16, 1, 1, 320, 64) == {"": (12, 320), "_together": (16, 256)}
    assert changes(16, 1, 1, 256, 64) == {"": (16, 256)}
    assert changes(8, 10, 1, 320, 64) == {
        "": (1, 320),
        "_together": (8, 1),
    }  # 8 x 10 x 64 are too many
    assert changes(8, 4, 1, 640, 64) == {"": (1, 640), "_together": (8, 128)}
    assert changes(8, 4, 256, 640, 64) == {"": (1, 640)}  # there are none so short
    assert changes(4, 1, 1, 320, 64) == {"": (1, 320)}  # too few slots


def test_groups_that_cannot_be_read_are_not_counted_as_nothing():
    with pytest.raises(ValueError, match="cannot be read"):
        collectives.collectives(PROGRAM.replace("replica_groups={}", "replica_groups=odd"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weights_are_those_of_the_model(name):
    c = architecture(name, 16, "bfloat16")
    matrices = sum(leaf.size for path, leaf in flatten(Model(c).shapes()) if path[-1] != "scale")
    assert roofline.weights(c) == matrices
    adapted = replace(c, lora=LoraConfig(4, 8.0))
    more = sum(
        leaf.size for path, leaf in flatten(Model(adapted).shapes()) if path[-1].startswith("lora")
    )
    assert roofline.weights(adapted) == matrices + more


@pytest.mark.parametrize(
    "changes", [dict(), dict(name="adafactor"), dict(name="muon"), dict(lora=True)], ids=str
)
def test_bytes_of_an_update_are_those_of_the_state(tiny_model, changes):
    lora = LoraConfig(4, 8.0) if changes.pop("lora", False) else None
    recipe = dict(name="adamw", learning_rate=1e-3, adam_learning_rate=1e-3, schedule="linear", warmup_fraction=0.1, adam_eps=1e-8,
                  weight_decay=0.0, clip=1.0)  # fmt: skip
    section = TrainConfig(
        seed=0, rows=4, length=32, max_targets=None, optimizer=OptimizerConfig(**recipe | changes), mesh=MeshConfig(1, 1, 1),
        save_every=1, log_every=1, steps=4, lora=lora,
    )  # fmt: skip
    model, tx = (
        section.model(tiny_model.model.config),
        optimizer.make_optimizer(section.optimizer, 4),
    )
    params = model.init(jax.random.key(0))
    state = step.fresh_state(params, tx, section, "float32")
    held = sum(x.nbytes for x in jax.tree.leaves({k: v for k, v in state.items() if k != "frozen"}))
    assert compile._updated(section, model, section.make_mesh(jax.devices()[:1])) == held


def test_parameters_of_published_models():
    millions = {
        "llama2_7b": 6738,
        "llama2_13b": 13016,
        "llama2_70b": 68977,
        "llama31_8b": 8030,
        "mistral_7b": 7242,
    }
    for name, count in millions.items():
        c = architecture(name, 0, "bfloat16")
        assert sum(leaf.size for _, leaf in flatten(Model(c).shapes())) / 1e6 == pytest.approx(
            count, abs=0.6
        )


def test_model_flops_of_llama2_7b():
    """6 x 6,607M weights that multiply, and half of 12 x 32 layers x 4,096 x 2,048 for causal attention."""
    c = architecture("llama2_7b", 0, "bfloat16")
    assert roofline.train_flops_per_token(c, 2048) == pytest.approx(
        6 * 6607e6 + 6 * 32 * 4096 * 2048, rel=1e-4
    )
    assert roofline.train_flops_per_token(replace(c, sliding_window=256), 2048) == pytest.approx(
        6 * 6607e6 + 12 * 32 * 4096 * (256 - 16),
        rel=1e-4,  # the first 256 tokens see less than the window
    )
    adapted = replace(
        c, lora=LoraConfig(16, 32.0), remat="full"
    )  # forward, again, and backward without kernels' gradients
    frozen, head, attention = 32 * roofline._layer_weights(c), 32000 * 4096, 2 * 32 * 4096 * 2048
    adapters = 32 * roofline._adapter_weights(adapted)
    work = roofline.train_flops_per_token(adapted, 2048) + roofline.recomputed_flops_per_token(
        adapted, 2048, True
    )
    assert work == pytest.approx(6 * frozen + 8 * adapters + 8 * head + 4 * attention, rel=1e-9)
    assert (
        roofline.chip("TPU v5 lite").name == "v5e" and roofline.chip("NVIDIA H200").memory == 141e9
    )
    others = (
        "cpu",
        "NVIDIA GH200 480GB",
        "NVIDIA H100 PCIe",
        "NVIDIA A100-SXM4-40GB",
        "NVIDIA H200 NVL",
    )
    assert not any(map(roofline.chip, others))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_are_whole_and_say_what_they_need(name):
    c = configs.load(name)
    role = "critic" if "critic" in c else "generator"
    section = configs.build(TrainConfig, c[role], role)
    assert c.name == name and c.architecture in ARCHITECTURES and section.dtype == "bfloat16"
    said = (configs._folder() / f"{name}.py").read_text().split('"""')[1]
    assert f"selfrag train --config={name} --role={role}" in said
    slices = re.findall(r"(v\w+:[\dx]+)  [\d.]+ h", said)  # those that it is said to fit
    assert slices and set(slices) <= set(compile_table.SLICES[name])
    table = (Path(__file__).parents[1] / "README.md").read_text()
    for s in slices:
        taken, more, there = re.search(
            rf"\| {name} \| {s} \| [^|]*\| ([\d.]+) \+ ([\d.]+) of (\d+) \|", table
        ).groups()
        assert float(taken) + float(more) <= float(there)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=v5e"], "expected a TPU and its slice, like v5e:4x4"),
        (["--topology=v5e:4x4x4"], "(two sizes)"),
        (["--topology=h100:16"], "GPUs of a host, like h100:8 (a100, h100, h200; 1 to 8)"),
        (["--topology=v5e:4x4", "--program=serve"], "--program=serve: must be one of train"),
        (["--topology=v5e:4x4", "--config=tiny"], "no architecture to compile"),
        (["--topology=v5e:4x4", "--config.architecture=llama2"], "must be one of llama2_7b"),
        (
            ["--topology=v5e:4x4", "--config.generator.mesh.fsdp=5"],
            "mesh (1, 5, 1) cannot be laid over 5 devices of this slice",
        ),
        (
            [
                "--topology=v4:4x4x4",
                "--config.generator.mesh.fsdp=2",
                "--config.generator.mesh.tensor=32",
            ],
            "mesh (1, 2, 32) cannot be laid over this slice: each size must be the product of some of its sides",
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
def test_bad_input(arguments, message, capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert cli.main(["compile", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_without_the_compiler_it_says_what_to_install(monkeypatch):
    from jax.experimental import topologies

    def missing(*args, **kwargs):
        raise RuntimeError("JAX TPU support not installed; cannot generate TPU topology")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(UserError, match=re.escape("pip install 'selfrag-jax[tpu]'")):
        compile.topology_devices("v5e:2x2")

    def no_plugin(*args, **kwargs):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(topologies, "get_topology_desc", no_plugin)
    with pytest.raises(UserError, match=re.escape("pip install 'selfrag-jax[gpu]'")):
        compile.topology_devices("h100:8")


CONFIG = """
from selfrag_jax import config
from selfrag_jax.models.architectures import ARCHITECTURES

fields = dict(vocab_size=992, head_dim=128, max_length=512, rope_theta=1e4, norm_eps=1e-5, num_layers=2)
ARCHITECTURES["small"] = dict(fields, embed_dim=256, mlp_dim=512, num_heads=4, num_kv_heads=4)
ARCHITECTURES["wide"] = dict(fields, embed_dim=8192, mlp_dim=28_672, num_heads=64, num_kv_heads=64)

def get_config(which):
    if which == "answer":
        c = config.load("short_form:7b")
        c.architecture, c.answer.tensor = "wide", 1
        return c
    c = config.load("generator_7b")
    c.architecture, c.generator.length, c.generator.loss_chunk, c.generator.rows = which, 256, 256, 16
    return c
"""


@pytest.mark.slow
def test_the_tpu_compiler(tmp_path):
    """A small model over four v5e chips; and one whose f32 parameters and moments alone take more than a chip has."""
    (tmp_path / "c.py").write_text(CONFIG)

    def run(which, topology):
        command = [
            sys.executable,
            "-m",
            "selfrag_jax",
            "compile",
            f"--config={tmp_path}/c.py:{which}",
        ]
        return subprocess.run([*command, f"--topology={topology}"], capture_output=True, text=True)

    small = run("small", "v5e:2x2")
    assert small.returncode == 0, small.stderr
    found = json.loads(small.stdout)
    assert found["custom_kernels"] > 0  # attention is the TPU's, though this is a CPU
    assert found["fits"] and found["chips"] == 4 and found["mesh"]["fsdp"] == 4
    c = architecture("llama2_7b", 0, "bfloat16")
    c = replace(
        c, vocab_size=1024, embed_dim=256, mlp_dim=512, num_layers=2, num_heads=4, num_kv_heads=4
    )
    state = 12 * sum(leaf.size for _, leaf in flatten(Model(c).shapes()))
    assert (
        state / 4 < found["memory_per_chip"]["arguments"] < 1.1 * state / 4 + 2e5
    )  # split over four, and the batch
    # In each of four parts of the batch and in both passes, weights are gathered: at least once forward and once backward.
    sent = sum(kind["bytes_per_chip"] for kind in found["collectives"].values())
    layers = 2 * roofline._layer_weights(c)
    assert 2 * 4 * 2 * layers * 3 / 4 < sent < 12 * 4 * 2 * layers
    tokens = 16 * 256
    assert found["model_flops"] == pytest.approx(
        tokens * roofline.train_flops_per_token(replace(c, vocab_size=1008), 256)
    )

    wide = run("wide", "v5e:1x1")
    assert (
        wide.returncode == 1
        and "does not fit" in wide.stderr
        and not json.loads(wide.stdout)["fits"]
    )
    memory = json.loads(wide.stdout)["memory_per_chip"]
    assert memory["temporaries"] > memory["hbm"] == 16e9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "topology", "most"),
    (
        ("short_form", "v5e:1x1", 14.5),
        ("short_form:7b", "v5e:2x2", 14.8),
        ("short_form:13b", "v5e:2x4", 12.7),
    ),
)
def test_answering_with_seven_and_thirteen_billion_fits(config, topology, most):
    """int8 on one chip of 16 GB with ten passages, bf16 on four and on eight; and the README says how nearly."""
    table = (Path(__file__).parents[1] / "README.md").read_text()
    assert re.search(rf"^\| {config} \(.*\) \| {topology} \| .*\| {most} \(", table, re.MULTILINE)
    command = [
        sys.executable,
        "-m",
        "selfrag_jax",
        "compile",
        f"--config={config}",
        f"--topology={topology}",
        "--program=decode",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["fits"] and found["passages"] == 10
    taken = [
        sum(p["memory_per_chip"][k] for k in ("arguments", "temporaries"))
        for p in found["programs"].values()
    ]
    assert max(taken) / 1e9 == pytest.approx(most, rel=0.05)


@pytest.mark.slow
def test_the_gpu_compiler(tmp_path):
    """A small model over two H100: its attention is cuDNN's, and loops count as often as they turn, though the compiler writes
    them otherwise. And answering on one: a step of decoding reads weights where they are, and copies none."""
    (tmp_path / "c.py").write_text(CONFIG)

    def run(which, *flags):
        command = [
            sys.executable,
            "-m",
            "selfrag_jax",
            "compile",
            f"--config={tmp_path}/c.py:{which}",
            *flags,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    small = run("small", "--topology=h100:2")
    assert small["custom_kernels"] >= 2 and small["chips"] == 2 and small["fits"]
    c = replace(
        architecture("llama2_7b", 0, "bfloat16"),
        vocab_size=1024,
        embed_dim=256,
        mlp_dim=512,
        num_layers=2,
    )
    layers = 2 * roofline._layer_weights(replace(c, num_heads=4, num_kv_heads=4))
    parts = (
        small["tokens_per_step"]
        // 256
        // 2
        // configs.load("generator_7b").generator.rows_per_device
    )
    sent = sum(kind["bytes_per_chip"] for kind in small["collectives"].values())
    assert 2 * parts * 2 * layers / 2 < sent < 12 * parts * 2 * layers

    wide = run("answer", "--topology=h100:1", "--program=decode")
    segment = wide["programs"]["segment"]["memory_per_chip"]
    assert segment["arguments"] > 2 * 2 * (4 * 8192**2 + 3 * 8192 * 28_672)  # both layers in bf16
    assert segment["temporaries"] < 2 * 8192**2 / 2  # half of the smallest kernel
