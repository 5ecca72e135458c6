"""GPUs that are not here, as XLA's compiler for them wants them described (extra `.[gpu]`, which needs no GPU and no driver)."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from selfrag_jax.errors import UserError

TOPOLOGY = re.compile(r"(a100|h100|h200):([1-8])")  # a host's GPUs


@dataclass(frozen=True)
class Card:
    """What the compiler asks of a card: as XLA's own descriptions of them have it (openxla/xla, gpu_specs), which agree with NVIDIA's
    CUDA C++ programming guide (technical specifications of each compute capability)."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    clock_ghz: float
    memory: int  # bytes
    bandwidth: int  # bytes per second
    l2_cache: int  # bytes
    shared_memory: int  # bytes of a multiprocessor; a block may ask for a KiB less


CARDS = {
    "a100": Card(
        "NVIDIA A100-SXM4-80GB",
        (8, 0),
        108,
        1.41,
        85_100_068_864,
        2_039 * 10**9,
        40 * 2**20,
        164 * 2**10,
    ),
    "h100": Card(
        "NVIDIA H100 80GB HBM3",
        (9, 0),
        132,
        1.98,
        84_942_979_072,
        3_352 * 10**9,
        50 * 2**20,
        228 * 2**10,
    ),
    "h200": Card(
        "NVIDIA H200", (9, 0), 132, 1.98, 151_397_597_184, 4_800 * 10**9, 50 * 2**20, 228 * 2**10
    ),
}
# Without a card nothing can be tried out: XLA takes its own kernels as they are, where it would choose the fastest.
OPTIONS = {"xla_gpu_autotune_level": 0}


def devices(topology: str) -> list:
    """The GPUs of `h100:8` as descriptions. Raises BadInput where the compiler is not installed."""
    from jax.experimental import topologies

    name, count = TOPOLOGY.fullmatch(topology).groups()
    try:
        shape = f"1x1x{count}"  # hosts that are linked, hosts, GPUs of each
        found = topologies.get_topology_desc(
            platform="cuda", topology=shape, target_config=_target(CARDS[name])
        )
    except NotImplementedError:  # of jax without the plugin
        raise UserError("the GPU compiler is missing: pip install 'selfrag-jax[gpu]'") from None
    except RuntimeError as e:
        raise UserError(
            f"--topology={topology}: the GPU compiler does not take it: {str(e).splitlines()[0]}"
        ) from None
    return list(found.devices)


def usable() -> float:
    """What JAX takes of a card's memory, as a share."""
    return float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION") or 0.75)


def _target(card: Card) -> str:
    """XLA's stream_executor.GpuTargetConfigProto, as text."""
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
