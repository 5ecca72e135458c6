"""The devices of TPU slices and GPU hosts, described for their compilers."""

from __future__ import annotations

import os
import re
from typing import Any

from selfrag_jax.compilation import gpu
from selfrag_jax.errors import UserError

_TPU_TOPOLOGY = re.compile(r"(?:(v5e|v6e):(\d+)x(\d+)|(v4|v5p):(\d+)x(\d+)x(\d+))")
# libtpu asks what its machine is part of. These answers keep it from waiting for a metadata server.
_LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_ID": "0",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is taken, so several processes may compile
}


def topology_devices(topology: str, slices: int = 1) -> list:
    """Returns descriptions of the devices of a topology such as `v5e:4x4` or `h100:8`.

    slices: of TPUs, joined by a network. Raises UserError if the topology is unknown, or its
    compiler is not installed.
    """
    if slices < 1:
        raise UserError(f"--slices={slices}: must be at least 1")
    if gpu.TOPOLOGY.fullmatch(topology):
        if slices > 1:
            raise UserError(f"--slices={slices}: is for TPUs; {topology} is one host")
        return gpu.topology_devices(topology)
    if not _TPU_TOPOLOGY.fullmatch(topology):
        raise UserError(
            f"--topology={topology}: expected a TPU and its slice, like v5e:4x4 or v6e:8x8 (two "
            "sizes), v4:2x2x4 or v5p:2x2x4 (three), or GPUs of a host, like h100:8 (a100, h100, "
            "h200; 1 to 8)"
        )
    for name, value in _LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if set(re.findall(r"\d+", topology.split(":")[1])) == {"1"}:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if topology.startswith("v4:"):
        options["chip_config_name"] = "megacore"  # JAX sees a chip's two cores as one device
    try:
        return list(topologies.get_topology_desc(topology, platform="tpu", **options).devices)
    except (RuntimeError, ModuleNotFoundError) as e:
        if "not installed" in str(e) or isinstance(e, ModuleNotFoundError):
            raise UserError(
                f"the TPU compiler is missing ({e}): pip install 'selfrag-jax[tpu]'"
            ) from None
        reason = str(e).splitlines()[0]
        raise UserError(
            f"--topology={topology}: the TPU compiler knows no such slice: {reason}"
        ) from None
