"""The device mesh and where each array lives on it.

Axes: `data` (batch), `fsdp` (batch, and parameters over their embed axis), `tensor` (heads, mlp, vocabulary). One
table maps parameter paths to axes; parameters carry no metadata, so the same code runs with and without a mesh.
"""

from __future__ import annotations

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from selfrag_jax.records import BadInput

AXES = ("data", "fsdp", "tensor")

# last part of the module path -> axes of its kernel; stacked layers add an unsharded leading axis
RULES: dict[str, PartitionSpec] = {
    "q": PartitionSpec(None, "fsdp", "tensor"),
    "k": PartitionSpec(None, "fsdp", "tensor"),
    "v": PartitionSpec(None, "fsdp", "tensor"),
    "gate": PartitionSpec(None, "fsdp", "tensor"),
    "up": PartitionSpec(None, "fsdp", "tensor"),
    "o": PartitionSpec(None, "tensor", "fsdp"),
    "down": PartitionSpec(None, "tensor", "fsdp"),
    "embed": PartitionSpec("tensor", None),
    "head": PartitionSpec("fsdp", "tensor"),
}
BATCH = PartitionSpec(("data", "fsdp"))


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh over `data * fsdp * tensor` devices. Raises BadInput when there are not that many."""
    devices = jax.devices() if devices is None else devices
    n = data * fsdp * tensor
    if n > len(devices):
        raise BadInput(f"mesh ({data}, {fsdp}, {tensor}) needs {n} devices; there are {len(devices)}")
    auto = (jax.sharding.AxisType.Auto,) * 3
    return jax.make_mesh((data, fsdp, tensor), AXES, devices=devices[:n], axis_types=auto)


def spec(path: tuple, x) -> PartitionSpec:
    """The partition of one leaf of the parameters, or of an optimizer state that mirrors them; others are replicated."""
    names = [str(getattr(k, "key", getattr(k, "name", k))) for k in path]
    for name in reversed(names):
        if name in RULES and len(RULES[name]) == getattr(x, "ndim", 0):
            return RULES[name]
    return PartitionSpec()


def shardings(mesh: Mesh, tree):
    """The NamedSharding of each leaf of parameters or optimizer state."""
    return jax.tree_util.tree_map_with_path(lambda path, x: NamedSharding(mesh, spec(path, x)), tree)
