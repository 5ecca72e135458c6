"""The JobSet that runs a stage on TPU slices of GKE.

API: kubernetes-sigs/jobset, v1alpha2. Labels and ports: cloud.google.com/kubernetes-engine/docs,
"Deploy TPU Multislices in GKE".
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cloud.tables import Slice
from selfrag_jax.errors import UserError

_WRONG_INPUT = 2  # the exit status of `selfrag` that a restart cannot change
# A TPU's own ports, and that of the coordinator between slices.
_PORTS = (8471, 8080)


@dataclass(frozen=True)
class Workload:
    """What one JobSet is made from."""

    name: str
    slice: Slice
    slices: int
    image: str
    arguments: tuple[str, ...]  # of `selfrag`
    max_restarts: int
    namespace: str = "default"
    queue: str | None = None  # a LocalQueue of Kueue
    service_account: str | None = None
    spot: bool = False
    secrets: tuple[str, ...] = ()  # Secrets whose keys become environment variables

    def __post_init__(self) -> None:
        # The name of a pod, NAME-slice-J-I-xxxxx, is a DNS label.
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", self.name):
            raise UserError(
                f"--name={self.name}: small letters, digits and -, a letter first, at most 40"
            )
        if self.slices > 1 and self.slice.gke_hosts == 1:
            raise UserError(
                f"--slices={self.slices}: GKE joins slices of several hosts only; "
                f"{self.slice.topology} is one host"
            )


def manifest(w: Workload) -> dict[str, Any]:
    """Returns the JobSet as it is sent to Kubernetes.

    Each slice is a Job with one pod for each host. When a pod fails, as on pre-emption, all slices
    start again, at most max_restarts times; the stage goes on from its last checkpoint. A stage
    that refuses its input (exit status 2) is not started again.
    """
    hosts = w.slice.gke_hosts
    labels = {"kueue.x-k8s.io/queue-name": w.queue} if w.queue else {}
    metadata: dict[str, Any] = {"name": w.name, "namespace": w.namespace}
    if labels:
        metadata["labels"] = labels
    # One slice is one node pool: its pods must not be spread over two.
    metadata["annotations"] = {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    job = {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {
                        "containerName": "selfrag", "operator": "In", "values": [_WRONG_INPUT],
                    },
                }
            ]
        },
        "template": {"spec": _pod(w)},
    }  # fmt: skip
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {
                "maxRestarts": w.max_restarts,
                "rules": [
                    {
                        "name": "wrongInput",
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "replicatedJobs": [
                {"name": "slice", "replicas": w.slices, "template": {"spec": job}},
            ],
        },
    }


def _pod(w: Workload) -> dict[str, Any]:
    chips = w.slice.gke_chips_per_host
    selector = {
        "cloud.google.com/gke-tpu-accelerator": w.slice.generation.gke_accelerator,
        "cloud.google.com/gke-tpu-topology": w.slice.topology,
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "hostNetwork": True,
        "dnsPolicy": "ClusterFirstWithHostNet",
        "terminationGracePeriodSeconds": 120,  # the stage saves on SIGTERM; spot gives it less
        "nodeSelector": selector,
        "containers": [_container(w, chips)],
        "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}],
    }
    if w.spot:
        selector["cloud.google.com/gke-spot"] = "true"
        pod["tolerations"] = [
            {
                "key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true",
                "effect": "NoSchedule",
            }
        ]  # fmt: skip
    if w.service_account:
        pod["serviceAccountName"] = w.service_account
    return pod


def _container(w: Workload, chips: int) -> dict[str, Any]:
    container: dict[str, Any] = {
        "name": "selfrag",
        "image": w.image,
        "command": ["selfrag", *w.arguments],
        "env": [
            # A pod that finds no TPU fails instead of training on its CPU. GKE itself sets
            # TPU_WORKER_ID, TPU_WORKER_HOSTNAMES and MEGASCALE_*, by which JAX finds the others.
            {"name": "JAX_PLATFORMS", "value": "tpu,cpu"},
            {"name": "PYTHONUNBUFFERED", "value": "1"},
        ],
        "ports": [{"containerPort": port} for port in _PORTS],
        "securityContext": {"privileged": True},
        "resources": {
            "requests": {"google.com/tpu": chips},
            "limits": {"google.com/tpu": chips},
        },
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }
    if w.secrets:
        container["envFrom"] = [{"secretRef": {"name": name}} for name in w.secrets]
    return container


def xpk_command(w: Workload, cluster: str) -> list[str]:
    """Returns the command of XPK that runs the same; it makes the JobSet itself."""
    size = w.slice.topology if w.slice.generation.name == "tpu7x" else ""
    tpu_type = f"tpu7x-{size}" if size else w.slice.accelerator_type
    return [
        "xpk", "workload", "create", f"--cluster={cluster}", f"--workload={w.name}",
        f"--tpu-type={tpu_type}", f"--num-slices={w.slices}", f"--docker-image={w.image}",
        f"--max-restarts={w.max_restarts}", f"--command={selfrag_line(w.arguments)}",
    ]  # fmt: skip


def selfrag_line(arguments: Sequence[str]) -> str:
    return shlex.join(["selfrag", *arguments])
