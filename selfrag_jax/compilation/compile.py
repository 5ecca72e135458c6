"""Ahead-of-time compilation for TPU slices and GPUs that you need not have.

It answers three questions before you rent them: does training, answering or retrieval fit, how much
is sent between chips, how fast can it be at best?

The compilers are the real ones (libtpu, extra `.[tpu]`; XLA's for GPUs, extra `.[gpu]`), run on a
CPU host for a described topology such as `v5e:4x4` or `h100:8`. The memory that they report is what
a chip of that slice will need. On a GPU, libraries such as NCCL and cuDNN need more while they run;
that comes out of the quarter of the memory that JAX leaves (XLA_PYTHON_CLIENT_MEM_FRACTION). Times
are not measured: they are the least that the chip's published peak rates allow (its roofline).
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from selfrag_jax import config as configs
from selfrag_jax.answering.config import AnswerConfig
from selfrag_jax.compilation import decode, gpu, retrieval, train
from selfrag_jax.compilation.collectives import count_collectives, count_dcn_transfers
from selfrag_jax.compilation.topology import topology_devices
from selfrag_jax.errors import UserError
from selfrag_jax.models import roofline, sharding
from selfrag_jax.models.encoder import BertConfig
from selfrag_jax.training.architecture import config_architecture
from selfrag_jax.training.config import ROLES, TrainConfig

PROGRAMS = ("train", "decode", "search", "embed")
_GPUS = tuple(name.upper() for name in gpu.CARDS)  # as roofline.CHIPS names them
_ATTENTION_KERNEL = re.compile(r'custom_call_target="(?:tpu_custom_call|__cudnn\$fmha\w*)"')
_BINARY_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def compile_program(c: ConfigDict, topology: str, program: str, slices: int = 1) -> dict[str, Any]:
    """Compiles a config's program for a topology; returns what `selfrag compile` prints as JSON.

    program: "train" for the trainer's step; "decode" for what answering runs: reading prompts and
    passages, generating segments; "search" for search on the devices; "embed" for the encoder of
    passages. slices: of this topology, for training. "fits" tells whether the memory is enough.
    Raises UserError for an unknown program or topology, a config without the sizes that the program
    needs, and a missing compiler.
    """
    if program not in PROGRAMS:
        raise UserError(f"--program={program}: must be one of {', '.join(PROGRAMS)}")
    if slices != 1 and program != "train":
        raise UserError(f"--slices={slices}: only --program=train spans slices")
    if program == "search":
        return _compile_search(c, topology)
    if program == "embed":
        return _compile_embedding(c, topology)
    # A config for both roles trains them alike, as far as memory goes.
    sections = reversed(ROLES) if program == "train" else ("answer",)
    section = next((name for name in sections if name in c), None)
    if section is None or "architecture" not in c:
        suitable = "critic_7b, generator_7b, generator_13b, lora_7b and small"
        if program == "decode":
            suitable = "short_form, long_form and small"
        raise UserError(
            f"this config has no architecture to compile for --program={program}; {suitable} have"
        )
    if program == "train":
        return _compile_training(c, section, topology, slices)
    return _compile_answering(c, section, topology)


def _compile_training(c: ConfigDict, role: str, topology: str, slices: int) -> dict[str, Any]:
    # 1. What is trained, and on which devices.
    section = configs.build(TrainConfig, c[role], role)
    base = config_architecture(c, section.dtype)
    devices = topology_devices(topology, slices)
    mesh, chip = section.make_mesh(devices), _chip(devices)
    section.check(base, mesh)
    if section.max_targets is not None and mesh.size > 1:
        raise UserError(
            f"config {role}: max_targets={section.max_targets} is for one device; a slice computes "
            f"all positions: --config.{role}.max_targets=none"
        )

    # 2. Compile the step.
    lowered = train.lower_training_step(section, base, mesh)
    header = _header(c, "train", topology, mesh) | ({"slices": slices} if slices > 1 else {})
    result = header | _compile(lowered, chip)
    if "compiler" in result:  # it ran out of memory
        return result

    # 3. How fast can it be at best?
    bytes_sent = sum(kind["bytes_per_chip"] for kind in result["collectives"].values())
    fits = result.pop("fits")  # comes last
    times = train.roofline_times(section, base, mesh, chip, bytes_sent)
    return result | times | {"fits": fits}


def _compile_answering(c: ConfigDict, name: str, topology: str) -> dict[str, Any]:
    # 1. What answers, and on which devices.
    section = configs.build(AnswerConfig, c[name], name)
    base = replace(config_architecture(c, section.dtype), quantized=section.quantization == "int8")
    devices = topology_devices(topology)
    if section.tensor != len(devices):
        raise UserError(
            f"config {name}: tensor={section.tensor}, but {topology} has {len(devices)} chips: "
            f"--config.{name}.tensor"
        )
    mesh, chip = sharding.make_mesh(tensor=-1, devices=devices), _chip(devices)

    # 2. Compile each program. What the engine holds beside its arguments needs memory too.
    programs = {}
    for label, (lowered, held_beside) in decode.lower_programs(section, base, mesh).items():
        programs[label] = program = _compile(lowered, chip)
        memory = program["memory_per_chip"]
        if "total" in memory:
            memory |= {"held_beside": held_beside, "total": memory["total"] + held_beside}
            program["fits"] = memory["total"] <= memory["hbm"]

    # 3. Report the program that needs most memory, and all of them.
    shapes = decode.answering_shapes(section)
    sizes = {
        "questions": section.batch,
        "passages": shapes.num_passages,
        # Capacity for the tokens before the last segment.
        "history": shapes.longest_prefix(section.max_length, section.search.max_depth),
    }
    return (
        _header(c, "decode", topology, mesh)
        | sizes
        | max(programs.values(), key=_total_memory)
        | {"programs": programs}
        | decode.roofline_times(section, base, mesh, chip)
        | {"fits": all(program["fits"] for program in programs.values())}
    )


def _compile_search(c: ConfigDict, topology: str) -> dict[str, Any]:
    # 1. What is searched, and on which devices.
    corpus = _corpus_size(c, "search")
    devices = topology_devices(topology)
    mesh, chip = sharding.make_mesh(data=-1, devices=devices), _chip(devices)

    # 2. Compile exact and approximate search; report the one that needs more memory, and both.
    lowered = retrieval.lower_search(corpus, mesh)
    programs = {label: _compile(program, chip) for label, program in lowered.items()}
    return (
        _header(c, "search", topology, mesh)
        | {"passages": corpus.passages, "queries": retrieval.QUERIES, "k": retrieval.K}
        | max(programs.values(), key=_total_memory)
        | {"programs": programs}
        | retrieval.search_roofline_times(corpus, mesh, chip)
        | {"fits": all(program["fits"] for program in programs.values())}
    )


def _compile_embedding(c: ConfigDict, topology: str) -> dict[str, Any]:
    # 1. What embeds, and on which devices.
    corpus = _corpus_size(c, "embed")
    fields = dict(c.encoder_architecture.items()) | {"dtype": c.encoder.dtype}
    base = configs.build(BertConfig, fields, "encoder_architecture")
    if base.embed_dim != corpus.dim:
        raise UserError(
            f"config: corpus.dim={corpus.dim} differs from "
            f"encoder_architecture.embed_dim={base.embed_dim}"
        )
    devices = topology_devices(topology)
    mesh, chip = sharding.make_mesh(data=-1, devices=devices), _chip(devices)

    # 2. Compile one batch. How fast can it be at best?
    result = _header(c, "embed", topology, mesh)
    result |= {
        "passages": corpus.passages,
        "batch": [retrieval.batch_rows(mesh), retrieval.ROW_TOKENS],
    }
    result |= _compile(retrieval.lower_embed(base, mesh), chip)
    fits = result.pop("fits")  # comes last
    return result | retrieval.embed_roofline_times(corpus, base, mesh, chip) | {"fits": fits}


def _corpus_size(c: ConfigDict, program: str) -> retrieval.CorpusSize:
    """Returns the corpus of a config. Raises UserError if the config lacks what is compiled."""
    if "corpus" not in c or "encoder_architecture" not in c:
        raise UserError(
            f"this config has no corpus and encoder to compile for --program={program}; "
            "index:wikipedia has"
        )
    return configs.build(retrieval.CorpusSize, c.corpus, "corpus")


def _chip(devices: list) -> roofline.Chip:
    """Returns what is known about the devices' chip. Raises UserError if nothing is."""
    kind = devices[0].device_kind
    if (chip := roofline.chip(kind)) is None:
        raise UserError(
            f"the peak rates of {kind!r} are unknown; the chips with known rates are "
            f"{', '.join(sorted({c.name for c in roofline.CHIPS.values()}))}"
        )
    return chip


def _header(c: ConfigDict, program: str, topology: str, mesh: Mesh) -> dict[str, Any]:
    return {
        "config": c.name,
        "program": program,
        "topology": topology,
        "chips": mesh.size,
        "mesh": dict(mesh.shape),
    }


# ---- compiling one program -----------------------------------------------------------------------
def _compile(lowered: jax.stages.Lowered, chip: roofline.Chip) -> dict[str, Any]:
    """Compiles a program; returns its memory, attention kernels and collectives.

    If the compiler gives up because the chip's memory is too small, returns its message as
    "compiler" instead, and the memory that it names.
    """
    hbm = _usable_memory(chip)
    try:
        compiled = lowered.compile(gpu.COMPILER_OPTIONS if chip.name in _GPUS else None)
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        return {
            "memory_per_chip": {"hbm": hbm} | _memory_in_message(str(e)),
            "fits": False,
            "compiler": " ".join(str(e).split())[:400],
        }
    memory, hlo = compiled.memory_analysis(), compiled.as_text()
    if memory is None or hlo is None:
        raise RuntimeError("the compiler reports no memory, or no text of the program")
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    # Most outputs take the place of a donated argument.
    outputs = max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes)
    total = arguments + temporaries + outputs
    return {
        "memory_per_chip": {
            "arguments": arguments,
            "temporaries": temporaries,
            "total": total,
            "hbm": hbm,
        },
        "custom_kernels": len(_ATTENTION_KERNEL.findall(hlo)),  # forward and backward
        "collectives": _as_rows(count_collectives(hlo)),
        **({"dcn": _as_rows(dcn)} if (dcn := count_dcn_transfers(hlo)) else {}),
        "fits": total <= hbm,
    }


def _as_rows(counts: dict[str, tuple[int, int]]) -> dict[str, dict[str, int]]:
    return {
        kind: {"count": count, "bytes_per_chip": bytes_sent}
        for kind, (count, bytes_sent) in sorted(counts.items())
    }


def _total_memory(result: dict[str, Any]) -> float:
    """Returns the bytes that a program needs on a chip; infinity if the compiler did not say."""
    return result["memory_per_chip"].get("total", float("inf"))


def _usable_memory(chip: roofline.Chip) -> int:
    """Returns the bytes that programs may take."""
    return int(chip.memory * (gpu.memory_fraction() if chip.name in _GPUS else 1))


def _memory_in_message(message: str) -> dict[str, int]:
    """Returns the bytes that the compiler names when it gives up.

    For example "Used 17.25G of 15.75G hbm", or "temporaries (40.61G) exceeds".
    """
    patterns = {
        "total": r"[Uu]sed ([\d.]+)([KMG]?) of",
        "temporaries": r"temporaries \(([\d.]+)([KMG]?)\) exceed",
    }
    found = {name: re.search(pattern, message) for name, pattern in patterns.items()}
    return {
        name: int(float(match.group(1)) * _BINARY_UNITS[match.group(2)])
        for name, match in found.items()
        if match
    }


def misfit_message(result: dict[str, Any]) -> str:
    """Returns one line that says why a program does not fit."""
    gb = {name: size / 1e9 for name, size in result["memory_per_chip"].items()}
    head = f"does not fit {result['topology']}"
    if "compiler" in result:
        needed = ", ".join(
            f"{gb[name]:.1f} GB ({name})" for name in ("total", "temporaries") if name in gb
        )
        return f"{head}: {needed} per chip, which has {gb['hbm']:.1f}: {result['compiler']}"
    parts = f"{gb['arguments']:.1f} GB of arguments + {gb['temporaries']:.1f} GB of temporaries"
    if gb.get("held_beside"):
        parts += f" + {gb['held_beside']:.1f} GB held beside them"
    return f"{head}: {parts} per chip take {gb['total']:.1f} GB; it has {gb['hbm']:.1f} GB"
