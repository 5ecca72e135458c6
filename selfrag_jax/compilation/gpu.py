"""Descriptions of GPUs for XLA's compiler.

The compiler comes with the extra `.[gpu]` and needs neither a GPU nor a driver.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

from selfrag_jax.errors import UserError

TOPOLOGY = re.compile(r"(a100|h100|h200):([1-8])")  # the GPUs of one host


@dataclass(frozen=True)
class Card:
    """What the compiler needs to know about a card.

    The numbers are those of XLA's own descriptions (openxla/xla, gpu_specs), which agree with
    NVIDIA's CUDA C++ programming guide (technical specifications per compute capability).
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    clock_ghz: float
    memory: int  # bytes
    bandwidth: int  # bytes per second
    l2_cache: int  # bytes
    shared_memory: int  # bytes of a multiprocessor; a block may use one KiB less


CARDS = {
    "a100": Card(
        name="NVIDIA A100-SXM4-80GB", capability=(8, 0), multiprocessors=108, clock_ghz=1.41,
        memory=85_100_068_864, bandwidth=2_039 * 10**9,
        l2_cache=40 * 2**20, shared_memory=164 * 2**10,
    ),
    "h100": Card(
        name="NVIDIA H100 80GB HBM3", capability=(9, 0), multiprocessors=132, clock_ghz=1.98,
        memory=84_942_979_072, bandwidth=3_352 * 10**9,
        l2_cache=50 * 2**20, shared_memory=228 * 2**10,
    ),
    "h200": Card(
        name="NVIDIA H200", capability=(9, 0), multiprocessors=132, clock_ghz=1.98,
        memory=151_397_597_184, bandwidth=4_800 * 10**9,
        l2_cache=50 * 2**20, shared_memory=228 * 2**10,
    ),
}  # fmt: skip

# Autotuning runs kernels on a card to choose the fastest. Without a card XLA must not try.
COMPILER_OPTIONS: dict[str, Any] = {"xla_gpu_autotune_level": 0}


def topology_devices(topology: str) -> list:
    """Returns descriptions of the GPUs of a topology such as `h100:8`.

    Raises UserError if the topology is unknown or the compiler is not installed.
    """
    from jax.experimental import topologies

    match = TOPOLOGY.fullmatch(topology)
    if match is None:
        raise UserError(f"--topology={topology}: expected GPUs of a host, like h100:8")
    card, num_gpus = match.groups()
    try:
        found = topologies.get_topology_desc(
            platform="cuda",
            topology=f"1x1x{num_gpus}",  # groups of linked hosts, hosts, GPUs of each host
            target_config=_target_config(CARDS[card]),
        )
    except NotImplementedError:  # raised by jax if the plugin is missing
        raise UserError("the GPU compiler is missing: pip install 'selfrag-jax[gpu]'") from None
    except RuntimeError as e:
        reason = str(e).splitlines()[0]
        raise UserError(f"--topology={topology}: the GPU compiler rejects it: {reason}") from None
    return list(found.devices)


def memory_fraction() -> float:
    """Returns the share of a card's memory that JAX takes."""
    return float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION") or 0.75)


def _target_config(card: Card) -> str:
    """Returns a card as XLA's stream_executor.GpuTargetConfigProto, in text format."""
    major, minor = card.capability
    return f"""
        platform_name: "CUDA"
        device_description_str: "{card.name}"
        gpu_device_info {{
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          core_count: {card.multiprocessors}
          clock_rate_ghz: {card.clock_ghz}
          device_memory_size: {card.memory}
          memory_bandwidth: {card.bandwidth}
          l2_cache_size: {card.l2_cache}
          shared_memory_per_core: {card.shared_memory}
          shared_memory_per_block_optin: {card.shared_memory - 2**10}
          shared_memory_per_block: {48 * 2**10}
          fpus_per_core: {64 if card.capability == (8, 0) else 128}
          threads_per_core_limit: 2048
          threads_per_block_limit: 1024
          threads_per_warp: 32
          registers_per_core_limit: 65536
          registers_per_block_limit: 65536
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535
          block_dim_limit_z: 65535
        }}
        dnn_version_info {{ major: 9 minor: 10 }}
        runtime_version {{ major: 13 minor: 0 }}
    """
