"""Joins the processes of a multi-host training (`selfrag train --distributed`)."""

from __future__ import annotations

import re

import jax

from selfrag_jax.errors import UserError


def join_processes(spec: str) -> None:
    """Makes this process one of several that train together.

    spec: "auto" where JAX can find the others (TPU slices, Slurm, MPI, Kubernetes), else
    "HOST:PORT,PROCESSES,INDEX". Raises UserError for any other form.
    """
    if spec == "auto":
        try:
            jax.distributed.initialize()
        except (ValueError, RuntimeError) as e:
            raise UserError(
                f"--distributed=auto: JAX finds no other processes here ({e}); "
                "give HOST:PORT,PROCESSES,INDEX"
            ) from None
        return
    match = re.fullmatch(r"([^,]+:\d+),(\d+),(\d+)", spec)
    if not match or int(match.group(3)) >= int(match.group(2)):
        raise UserError(
            f"--distributed={spec}: expected auto, or HOST:PORT,PROCESSES,INDEX "
            "such as 10.0.0.1:9000,4,0"
        )
    jax.distributed.initialize(
        coordinator_address=match.group(1),
        num_processes=int(match.group(2)),
        process_id=int(match.group(3)),
        # Detection would leave each process only one GPU under Slurm or Open MPI.
        cluster_detection_method="deactivate",
    )
