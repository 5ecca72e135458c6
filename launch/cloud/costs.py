"""Which slices a training fits, and the least time of a step on them."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

import selfrag_jax
from cloud.tables import GENERATIONS, Slice, num_chips
from selfrag_jax import config as configs
from selfrag_jax.compilation import gpu, train
from selfrag_jax.compilation.decode import bytes_per_chip
from selfrag_jax.errors import StageFailed, UserError
from selfrag_jax.files import read_json
from selfrag_jax.models import roofline, sharding
from selfrag_jax.models.llama import LlamaConfig
from selfrag_jax.training import optimizer, step
from selfrag_jax.training.architecture import config_architecture
from selfrag_jax.training.config import ROLES, TrainConfig

_GPUS_OF_A_HOST = (1, 2, 4, 8)
_CHIPS = {c.name.lower(): c for c in roofline.CHIPS.values()}


@dataclass(frozen=True)
class Fit:
    """A training on one slice. Memory in bytes of one chip; times in seconds."""

    topology: str  # "v5e:4x4", "h100:8"
    memory: float | None  # needed; a lower bound if it is estimated. None: the compiler did not say
    hbm: float
    fits: bool
    step_seconds: float = 0.0  # the least that peak rates allow
    mfu: float = 0.0  # at that speed
    tokens_per_step: int = 0
    reason: str = ""  # why it cannot be laid over this slice at all

    @property
    def chips(self) -> int:
        return chips_of(self.topology)


def chips_of(topology: str) -> int:
    return num_chips(topology.partition(":")[2])


def hosts_of(topology: str) -> int:
    name, _, size = topology.partition(":")
    return Slice(GENERATIONS[name], size).hosts if name in GENERATIONS else 1


def topologies(chip: str, max_chips: int) -> list[str]:
    """Returns the slices of a chip, or the cards of a host, ascending. Raises UserError."""
    if chip in GENERATIONS and chip not in _CHIPS:  # peak rates are missing
        raise UserError(f"--chips={chip}: is not planned here; launch/gke.py runs it")
    if chip not in _CHIPS:
        close = difflib.get_close_matches(chip, _CHIPS, 1, 0.4)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"--chips={chip}: {hint}known are {', '.join(sorted(_CHIPS))}")
    if chip not in GENERATIONS:
        return [f"{chip}:{n}" for n in _GPUS_OF_A_HOST if n <= max_chips]
    sizes = GENERATIONS[chip].topologies
    return [f"{chip}:{size}" for size in sizes if num_chips(size) <= max_chips]


def hbm_of(topology: str) -> float:
    """Returns the bytes of one chip that programs may take."""
    chip = _CHIPS[topology.partition(":")[0]]
    share = 1.0 if chip.name.lower() in GENERATIONS else gpu.memory_fraction()
    return chip.memory * share


def training_section(c: ConfigDict) -> TrainConfig:
    """Returns the settings of a config's training. Raises UserError if it has none."""
    role = next((name for name in reversed(ROLES) if name in c), None)
    if role is None or "architecture" not in c:
        raise UserError(
            "this config has no architecture to plan for; critic_7b, generator_7b, generator_13b, "
            "lora_7b and small have"
        )
    return configs.build(TrainConfig, c[role], role)


# ---- without a compiler --------------------------------------------------------------------------
def estimate(c: ConfigDict, topology: str) -> Fit:
    """Returns lower bounds of memory and time, without a compiler.

    Memory: parameters and optimizer state as they are sharded, one gradient of each trained
    parameter, and the residuals that each layer keeps for the backward pass. The compiler needs
    more, often twice as much in temporaries. Time: the roofline without traffic between chips.
    """
    section = training_section(c)
    base = config_architecture(c, section.dtype)
    chip, hbm = _CHIPS[topology.partition(":")[0]], hbm_of(topology)
    try:
        mesh = _mesh(section, chips_of(topology))
        num_parts = section.micro_batches(mesh)
        if base.num_heads % mesh.shape["tensor"]:
            raise UserError(f"tensor={mesh.shape['tensor']} does not divide the heads")
    except UserError as e:
        return Fit(topology, None, hbm, False, reason=str(e))
    state_bytes, gradient_bytes = _state_bytes(c.to_json(), section, base, mesh)
    rows = section.rows / num_parts / (mesh.shape["data"] * mesh.shape["fsdp"])
    residuals = base.num_layers * rows * section.length * base.embed_dim * 2
    memory = state_bytes + gradient_bytes + residuals
    times = train.roofline_times(section, base, mesh, chip, 0.0)
    return Fit(
        topology,
        memory,
        hbm,
        memory <= hbm,
        times["roofline_seconds"]["step"],
        times["roofline_mfu"],
        times["tokens_per_step"],
    )


_known_bytes: dict[tuple, tuple[int, int]] = {}  # tracing a model takes half a second


def _state_bytes(
    config_json: str, section: TrainConfig, base: LlamaConfig, mesh: Any
) -> tuple[int, int]:
    """Returns the bytes of one chip: of the whole training state, and of the trained parameters."""
    key = (config_json, *mesh.shape.items())
    if key not in _known_bytes:
        model = section.model(base)
        tx = optimizer.make_optimizer(section.optimizer, 1000, 0, model.config.vocab_padding)
        state = step.abstract_state(section, model, tx, mesh)
        _known_bytes[key] = bytes_per_chip(state), bytes_per_chip(state["params"])
    return _known_bytes[key]


def _mesh(section: TrainConfig, chips: int) -> Any:
    """Returns the shape of the training's mesh over so many chips. Raises UserError."""
    sizes = [section.mesh.data, section.mesh.fsdp, section.mesh.tensor]
    if -1 in sizes:
        others = -sizes[0] * sizes[1] * sizes[2]
        if chips % others:
            raise UserError(f"its mesh needs a multiple of {others} chips")
        sizes[sizes.index(-1)] = chips // others
    used = sizes[0] * sizes[1] * sizes[2]
    if used != chips:
        raise UserError(f"its mesh is of {used} chips")
    return AbstractMesh(tuple(sizes), sharding.AXES)


# ---- with the compiler ---------------------------------------------------------------------------
def compile_slice(
    spec: str, overrides: Sequence[str], c: ConfigDict, topology: str, tell: Callable[[str], None]
) -> Fit:
    """Returns what `selfrag compile` finds, which takes minutes the first time.

    Results are kept below ~/.cache, for this config, code and compiler.
    """
    file = _cache_folder() / f"{_identity(c, topology)}.json"
    if not file.is_file():
        tell(f"compiling {c.name} for {topology}; it takes minutes, once")
        file.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "selfrag_jax", "compile", f"--config={spec}"]
        command += [f"--config.{o}" for o in overrides]
        command += [f"--topology={topology}", f"--out={file}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if not file.is_file():  # a program that does not fit leaves its file too
            said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            said = said.removeprefix("selfrag compile: ")
            if done.returncode == 2 and "compiler is missing" not in said:
                return Fit(topology, None, hbm_of(topology), False, reason=said)
            raise StageFailed(f"compiling for {topology}: {said}")
    return fit_of(read_json(file))


def fit_of(result: dict[str, Any]) -> Fit:
    """Returns a Fit from the JSON of `selfrag compile`."""
    memory = result["memory_per_chip"]
    needed = memory.get("total")
    if needed is None and "temporaries" in memory:  # of a program that the compiler gave up
        needed = memory["temporaries"]
    if not result["fits"]:
        return Fit(result["topology"], needed, memory["hbm"], False)
    return Fit(
        result["topology"],
        needed,
        memory["hbm"],
        True,
        result["roofline_seconds"]["step"],
        result["roofline_mfu"],
        result["tokens_per_step"],
    )


def _cache_folder() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "selfrag_jax" / "plan"


def _identity(c: ConfigDict, topology: str) -> str:
    """Returns a name for what a compilation depends on: config, compiler and the code compiled."""
    parts = [c.to_json(sort_keys=True), topology, os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION")]
    for package in ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin"):
        try:
            parts.append(metadata.version(package))
        except metadata.PackageNotFoundError:
            parts.append(None)
    root = Path(selfrag_jax.__file__).parent
    for folder in ("compilation", "models", "training"):
        parts += [file.read_text() for file in sorted((root / folder).glob("*.py"))]
    name = re.sub(r"\W", "-", f"{c.name}-{topology}")
    return f"{name}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]}"
