"""The device mesh and where each array lives on it.

Axes: `data` (batch), `fsdp` (batch, and parameters over their embed axis), `tensor` (heads, mlp, vocabulary). One
table maps parameter paths to axes; parameters carry no metadata, so the same code runs with and without a mesh.
"""

from __future__ import annotations

import math

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from selfrag_jax.errors import UserError
from selfrag_jax.models import lora

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
    # Over fsdp too: at 7B the table and its two moments would take 1.6 GB on every chip.
    "embed": PartitionSpec("tensor", "fsdp"),
    "head": PartitionSpec("fsdp", "tensor"),
}
BATCH = PartitionSpec(("data", "fsdp"))


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh over `data * fsdp * tensor` devices; one of the three may be -1, for all devices that the others leave.

    On TPUs the axes follow the links of one slice; other devices stand in their order, which is that of their processes, so that
    `tensor` stays within a host. Raises BadInput when there are not that many, or they cannot be shared out.
    """
    devices = jax.devices() if devices is None else devices
    given = [n for n in (data, fsdp, tensor) if n != -1]
    if len(given) < 2 or min(given) < 1:
        raise UserError(
            f"mesh ({data}, {fsdp}, {tensor}): sizes are at least 1, and one of them may be -1 (the rest)"
        )
    if len(given) == 2:
        rest, over = divmod(len(devices), given[0] * given[1])
        if over or not rest:
            raise UserError(
                f"mesh ({data}, {fsdp}, {tensor}): {len(devices)} devices are not a multiple of {given[0] * given[1]}"
            )
        data, fsdp, tensor = (rest if n == -1 else n for n in (data, fsdp, tensor))
    n = data * fsdp * tensor
    if n > len(devices):
        raise UserError(
            f"mesh ({data}, {fsdp}, {tensor}) needs {n} devices; there are {len(devices)}"
        )
    if (
        n < len(devices) and jax.process_count() > 1
    ):  # a process without a part would leave the others waiting
        raise UserError(
            f"mesh ({data}, {fsdp}, {tensor}) uses {n} of {len(devices)} devices; several processes must use all"
        )
    devices = devices[:n]
    auto = (jax.sharding.AxisType.Auto,) * 3
    if (
        devices[0].platform != "tpu"
    ):  # each host of GPUs calls itself a slice, and has coordinates that say nothing
        return Mesh(np.array(devices, object).reshape(data, fsdp, tensor), AXES, axis_types=auto)
    if len(slices := {getattr(d, "slice_index", 0) for d in devices}) > 1:
        raise UserError(
            f"mesh ({data}, {fsdp}, {tensor}) would lie over {len(slices)} slices; it is laid over one"
        )
    if not _is_block(devices):
        raise UserError(
            f"mesh ({data}, {fsdp}, {tensor}) cannot be laid over {n} devices of this slice; use all of them"
        )
    try:
        return jax.make_mesh((data, fsdp, tensor), AXES, devices=devices, axis_types=auto)
    except NotImplementedError as e:  # what jax says of chips whose links do not make such axes
        raise UserError(
            f"mesh ({data}, {fsdp}, {tensor}) cannot be laid over this slice: each size must be the product of some of its sides"
        ) from e


def hosts_of_tensor(mesh: Mesh) -> int:
    """How many processes' devices the parts of one split head or kernel lie on, at most. More than one is slow where processes
    are joined by a network: activations are summed over `tensor` twice a layer, forward and back."""
    return max(
        len({d.process_index for d in group})
        for group in mesh.devices.reshape(-1, mesh.shape["tensor"])
    )


def _is_block(devices) -> bool:
    """Whether chips fill a cuboid of their slice, as jax.make_mesh takes for granted (it asserts so)."""
    places = [(*d.coords, d.core_on_chip) for d in devices]
    return math.prod(max(axis) - min(axis) + 1 for axis in zip(*places, strict=True)) == len(
        devices
    )


def partition_spec(path: tuple, x) -> PartitionSpec:
    """The partition of one leaf of the parameters, or of an optimizer state that mirrors them; others are replicated."""
    names = [str(getattr(k, "key", getattr(k, "name", k))) for k in path]
    under = path[names.index("layers") + 1] if "layers" in names else None
    rules = (
        {n: r[1:] for n, r in RULES.items()}
        if isinstance(under, jax.tree_util.SequenceKey)
        else RULES
    )  # a layer by itself
    for name in reversed(names):
        if name in rules and len(rules[name]) == getattr(x, "ndim", 0):
            layer, inputs, outputs = rules[name] if x.ndim == 3 else (None, *rules[name])
            if names[-1] == lora.LORA_A:  # the rank is never split
                return PartitionSpec(layer, inputs, None)
            return (
                PartitionSpec(layer, None, outputs)
                if names[-1] == lora.LORA_B
                else PartitionSpec(*rules[name])
            )
    return PartitionSpec()


def shardings(mesh: Mesh, tree):
    """The NamedSharding of each leaf of parameters or optimizer state. A dimension that its axis does not divide, like a
    vocabulary of 32,003, is not split."""

    return jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, _fitting(mesh, path, x)), tree
    )


def _fitting(mesh, path: tuple, x) -> PartitionSpec:
    axes = partition_spec(path, x)
    return PartitionSpec(
        *(a if a and x.shape[i] % mesh.shape[a] == 0 else None for i, a in enumerate(axes))
    )


def pin_to_mesh(tree):
    """Keeps parameters and optimizer state where `shardings` puts them, on the mesh that is set; nothing without one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    hold = lambda path, x: jax.lax.with_sharding_constraint(x, _fitting(mesh, path, x))  # noqa: E731
    return jax.tree_util.tree_map_with_path(hold, tree)


def constrain(x: jax.Array, *axes) -> jax.Array:
    """Says how an activation is split over the mesh that is set (jax.set_mesh); nothing where there is none."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


def put_on_mesh(mesh: Mesh, x: np.ndarray, axes: PartitionSpec) -> jax.Array:
    """A host array on the mesh. Every process holds the whole array and places the part of its own devices."""
    sharding = NamedSharding(mesh, axes)
    if jax.process_count() == 1:
        return jax.device_put(x, sharding)
    return jax.make_array_from_callback(x.shape, sharding, lambda part: x[part])
