"""Ahead-of-time compilation for TPU slices and GPUs that are not here: does a training or answering fit, what is sent between
chips, how fast can it be at best?

The compiler is the real one (libtpu, extra `.[tpu]`; XLA's for GPUs, extra `.[gpu]`), run on a CPU host for a described topology
such as `v5e:4x4` or `h100:8`. What it says of memory is what a chip of that slice will need; of a GPU, but for what its libraries
take while they run (NCCL, cuDNN), beside the three quarters of its memory that JAX takes (XLA_PYTHON_CLIENT_MEM_FRACTION). Times are
not measured: they are the least that the chip's public peak rates allow (its roofline).
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from selfrag_jax import config as configs
from selfrag_jax.answering.config import AnswerConfig
from selfrag_jax.compilation import decode, gpu
from selfrag_jax.compilation.collectives import collectives
from selfrag_jax.errors import UserError
from selfrag_jax.models import roofline, sharding
from selfrag_jax.models.architectures import architecture
from selfrag_jax.models.llama import LlamaConfig, Model
from selfrag_jax.text import reflection
from selfrag_jax.training import optimizer, step
from selfrag_jax.training.config import ROLES, TrainConfig

PROGRAMS = ("train", "decode")
GPUS = tuple(name.upper() for name in gpu.CARDS)
_KERNEL = re.compile(r'custom_call_target="(?:tpu_custom_call|__cudnn\$fmha\w*)"')
_TOPOLOGY = re.compile(r"(?:(v5e|v6e):(\d+)x(\d+)|(v4|v5p):(\d+)x(\d+)x(\d+))")


def compile_program(c: ConfigDict, topology: str, program: str) -> dict[str, Any]:
    """Compiles a program of a config for a slice; returns what is printed as JSON ("fits" says whether it fits).

    program: "train", the trainer's step, or "decode", what answering runs: reading prompts and passages, generating segments.
    Raises BadInput for an unknown program or topology, a config without an architecture, or when the compiler is missing.
    """
    if program not in PROGRAMS:
        raise UserError(f"--program={program}: must be one of {', '.join(PROGRAMS)}")
    needed = ROLES if program == "train" else ("answer",)
    section = next((r for r in needed if r in c), None)
    if section is None or "architecture" not in c:
        known = (
            "critic_7b, generator_7b, generator_13b and lora_7b"
            if program == "train"
            else "short_form and long_form"
        )
        raise UserError(
            f"this config has no architecture to compile a {program} program of; {known} have"
        )
    return (_train if program == "train" else _decode)(c, section, topology)


def _train(c: ConfigDict, role: str, topology: str) -> dict[str, Any]:
    section = configs.build(TrainConfig, c[role], role)
    base = architecture(
        c.architecture, len(reflection.ALL) + 1, section.dtype or "float32"
    )  # and [PAD]
    devices = topology_devices(topology)
    mesh = section.make_mesh(devices)
    chip = roofline.chip(devices[0].device_kind)
    section.check(base, mesh)
    if section.max_targets is not None:
        raise UserError(
            f"config {role}: max_targets={section.max_targets} is for one device; a slice computes all positions (none)"
        )
    out = _head(c, "train", topology, mesh)
    found, compiled = _compiled(lower_training_step(section, base, mesh), chip)
    out |= found
    if compiled is not None:
        sent = sum(kind["bytes_per_chip"] for kind in out["collectives"].values())
        fits = out.pop("fits")
        out |= roofline_times(section, base, mesh, chip, sent) | {"fits": fits}
    return out


def _decode(c: ConfigDict, name: str, topology: str) -> dict[str, Any]:
    section = configs.build(AnswerConfig, c[name], name)
    base = architecture(c.architecture, len(reflection.ALL) + 1, section.dtype or "float32")
    base = replace(base, quantized=section.quantization == "int8")
    devices = topology_devices(topology)
    if section.tensor != len(devices):
        raise UserError(
            f"config {name}: tensor={section.tensor}, but {topology} has {len(devices)} chips: --config.{name}.tensor"
        )
    mesh, chip = (
        sharding.make_mesh(tensor=-1, devices=devices),
        roofline.chip(devices[0].device_kind),
    )
    out = _head(c, "decode", topology, mesh) | {
        "questions": section.batch,
        "passages": section.search.ndocs,
    }
    out["history"] = decode.longest_history(section)  # tokens that the last segment can stand on
    programs = {}
    for what, (lowered, beside) in decode.lower(section, base, mesh).items():
        programs[what] = found = _compiled(lowered, chip)[0]
        memory = found["memory_per_chip"]
        if "total" in memory:
            memory |= {"held_beside": beside, "total": memory["total"] + beside}
            found["fits"] = memory["total"] <= memory["hbm"]
    largest = max(programs.values(), key=lambda p: p["memory_per_chip"].get("total", float("inf")))
    return (
        out
        | largest
        | {"programs": programs}
        | decode.decode_times(section, base, mesh, chip)
        | {"fits": all(p["fits"] for p in programs.values())}
    )


def _head(c: ConfigDict, program: str, topology: str, mesh: Mesh) -> dict[str, Any]:
    return {
        "config": c.name,
        "program": program,
        "topology": topology,
        "chips": mesh.size,
        "mesh": dict(mesh.shape),
    }


def _compiled(lowered, chip: roofline.Chip) -> tuple[dict[str, Any], Any]:
    """What the compiler says of a program, and the program; None where the compiler itself runs out of the chip's memory."""
    try:
        compiled = lowered.compile(gpu.OPTIONS if chip.name in GPUS else None)
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        said = " ".join(str(e).split())[:400]
        return {
            "memory_per_chip": _memory_named(str(e), chip),
            "fits": False,
            "compiler": said,
        }, None
    memory = compiled.memory_analysis()
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    used += max(
        0, memory.output_size_in_bytes - memory.alias_size_in_bytes
    )  # most outputs take their argument's place
    hlo = compiled.as_text()
    return {
        "memory_per_chip": {
            "arguments": memory.argument_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "total": used,
            "hbm": _room(chip),
        },
        "custom_kernels": len(_KERNEL.findall(hlo)),  # attention's, forward and back
        "collectives": {
            k: {"count": n, "bytes_per_chip": b} for k, (n, b) in sorted(collectives(hlo).items())
        },
        "fits": used <= _room(chip),
    }, compiled


def _room(chip: roofline.Chip) -> int:
    """Bytes that programs may take."""
    return int(chip.memory * (gpu.usable() if chip.name in GPUS else 1))


def why_not(found: dict[str, Any]) -> str:
    """One line on a program that does not fit."""
    memory = {k: v / 1e9 for k, v in found["memory_per_chip"].items()}
    if "compiler" in found:
        needed = ", ".join(
            f"{memory[k]:.1f} GB ({k})" for k in ("total", "temporaries") if k in memory
        )
        return f"does not fit {found['topology']}: {needed} a chip, which has {memory['hbm']:.1f}: {found['compiler']}"
    beside = (
        f" beside {memory['held_beside']:.1f} GB that are not theirs"
        if memory.get("held_beside")
        else ""
    )
    return (
        f"does not fit {found['topology']}: {memory['arguments']:.1f} GB of arguments and {memory['temporaries']:.1f} GB of "
        f"temporaries{beside} a chip are {memory['total']:.1f} GB; it has {memory['hbm']:.1f}"
    )


def _memory_named(message: str, chip: roofline.Chip) -> dict[str, int]:
    """The bytes that the compiler names where it gives up: "Used 17.25G of 15.75G hbm", or "temporaries (40.61G) exceeds"."""
    unit = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
    out = {"hbm": _room(chip)}
    for name, pattern in (
        ("total", r"[Uu]sed ([\d.]+)([KMG]?) of"),
        ("temporaries", r"temporaries \(([\d.]+)([KMG]?)\) exceed"),
    ):
        if found := re.search(pattern, message):
            out[name] = int(float(found.group(1)) * unit[found.group(2)])
    return out


def topology_devices(topology: str) -> list:
    """The devices of a slice, as descriptions. Raises BadInput when it is unknown, or the compiler for it is not installed."""
    if gpu.TOPOLOGY.fullmatch(topology):
        return gpu.devices(topology)
    if not _TOPOLOGY.fullmatch(topology):
        raise UserError(
            f"--topology={topology}: expected a TPU and its slice, like v5e:4x4 or v6e:8x8 (two sizes), v4:2x2x4 or v5p:2x2x4 "
            "(three), or GPUs of a host, like h100:8 (a100, h100, h200; 1 to 8)"
        )
    # libtpu asks the machine what it is part of; these answers keep it from waiting for a metadata server.
    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_ACCELERATOR_TYPE", "v5litepod-16"),
        ("TPU_WORKER_ID", "0"),
    ):
        os.environ.setdefault(name, value)
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault(
        "ALLOW_MULTIPLE_LIBTPU_LOAD", "1"
    )  # no chip is taken: several may compile at a time
    from jax.experimental import topologies

    options = (
        {"chips_per_host_bounds": (1, 1, 1)}
        if set(re.findall(r"\d+", topology.split(":")[1])) == {"1"}
        else {}
    )
    if topology.startswith("v4:"):
        options["chip_config_name"] = (
            "megacore"  # a chip's two cores as one device, as JAX has them
        )
    try:
        return list(topologies.get_topology_desc(topology, platform="tpu", **options).devices)
    except (RuntimeError, ModuleNotFoundError) as e:
        if "not installed" in str(e) or isinstance(e, ModuleNotFoundError):
            raise UserError(
                f"the TPU compiler is missing ({e}): pip install 'selfrag-jax[tpu]'"
            ) from None
        raise UserError(
            f"--topology={topology}: the TPU compiler knows no such slice: {str(e).splitlines()[0]}"
        ) from None


def lower_training_step(section: TrainConfig, base: LlamaConfig, mesh: Mesh):
    """The trainer's own jitted step, for arrays that are described instead of held."""
    parts, model = section.micro_batches(mesh), section.model(base)
    tx = optimizer.make_optimizer(
        section.optimizer, section.steps or 1000, 0, model.config.vocab_padding
    )
    state = step.state_like(section, model, tx, mesh)
    shape, axes = (section.rows, section.length), sharding.BATCH
    if parts > 1:
        shape, axes = (parts, section.rows // parts, section.length), PartitionSpec(None, *axes)
    at = NamedSharding(mesh, axes)
    kinds = dict.fromkeys(("tokens", "positions", "targets", "groups"), jnp.int32) | {
        "weights": jnp.float32
    }
    kinds |= {"doc_ids": jnp.int32} if section.packed else {}
    batch = {name: jax.ShapeDtypeStruct(shape, kind, sharding=at) for name, kind in kinds.items()}
    with jax.set_mesh(mesh):
        return step.train_step.lower(state, batch, model, tx, section.loss_chunk)


# ---- what the slice can do at best -----------------------------------------------------------------------------------
def roofline_times(
    section: TrainConfig, base: LlamaConfig, mesh: Mesh, chip: roofline.Chip, sent: float
) -> dict[str, Any]:
    """Model FLOPs of a step, and the least seconds that arithmetic, memory and links need for it; the step's is the largest.

    sent: bytes between chips, per chip. Arithmetic includes what is computed again in the backward pass, at the chip's rate in bf16
    (in f32 it is slower). Memory is what cannot be avoided: the trained weights and the optimizer's state read and written once,
    and the weights read in every pass of every part of the batch.
    """
    model = section.model(base)
    c = model.config
    tokens = section.rows * section.length
    per_token = roofline.train_flops_per_token(c, section.length)
    again = roofline.recomputed_flops_per_token(c, section.length, section.loss_chunk is not None)
    parts, chips = section.micro_batches(mesh), mesh.size
    passes, width = 3 if section.remat == "full" else 2, jnp.dtype(c.dtype).itemsize
    gathered = parts * passes * width * roofline.weights(c) / mesh.shape["tensor"]
    seconds = {
        "arithmetic": tokens * (per_token + again) / (chips * chip.bf16_flops),
        "memory": (2 * _updated(section, model, mesh) + gathered) / chip.memory_bandwidth,
        "links": sent / chip.link_bandwidth,
    }
    step = max(seconds.values())
    return {
        "model_flops": tokens * per_token,
        "roofline_seconds": seconds | {"step": step},
        "roofline_mfu": tokens * per_token / (step * chips * chip.bf16_flops),
        "tokens_per_step": tokens,
    }


def _updated(section: TrainConfig, model: Model, mesh: Mesh) -> int:
    """Bytes of trained weights and optimizer state that one chip holds."""
    state = step.state_like(
        section, model, optimizer.make_optimizer(section.optimizer, section.steps or 1000), mesh
    )
    held = jax.tree.leaves({k: v for k, v in state.items() if k != "frozen"})
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in held)
