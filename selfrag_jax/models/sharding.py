"""The device mesh and the placement of every array on it.

Mesh axes: `data` (batch), `fsdp` (batch, and parameters over their embed axis), `tensor` (heads,
mlp, vocabulary). Over several TPU slices `data` is split first: gradients are summed over the
network between the slices once a step, and everything else stays within a slice. One table maps
parameter paths to mesh axes. Parameters carry no metadata, so the same code runs with and without a
mesh.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from selfrag_jax.errors import UserError
from selfrag_jax.models import lora
from selfrag_jax.models.params import Params

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))

# Module name -> axes of its kernel. Kernels of layers are stacked: their first axis is the layer.
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
# The same for unstacked layers (see Model.per_layer), which have no layer axis.
_RULES_PER_LAYER = {name: spec[1:] for name, spec in RULES.items()}


# ---- the mesh ------------------------------------------------------------------------------------
def make_mesh(
    data: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
    slices: int | None = None,
) -> Mesh:
    """Returns a mesh over `data * fsdp * tensor` devices of each of `slices` slices.

    One of the sizes may be -1: all remaining devices of a slice. The mesh's `data` axis has
    `slices * data` devices, slice by slice. slices: None for those that the devices are in, on
    TPUs; other devices count as one slice, unless told to be several.

    On TPUs the axes follow the links of a slice. Other devices keep their order, which is that of
    their processes, so that `tensor` stays within a host. Raises UserError if the sizes do not fit
    the devices.
    """
    devices = jax.devices() if devices is None else devices
    groups = _slices(devices, slices)
    size = len(groups[0])
    data, fsdp, tensor = _fill_in((data, fsdp, tensor), size)
    mesh, n = f"mesh ({data}, {fsdp}, {tensor})", data * fsdp * tensor
    if n > size:
        if len(groups) > 1:
            raise UserError(
                f"{mesh} needs {n} devices of each slice; a slice has {size}, and of the {size} "
                f"x {len(groups)} devices only the batch is split over slices"
            )
        raise UserError(f"{mesh} needs {n} devices; there are {size}")
    # An unused process would hang the others.
    if n < size and len({getattr(d, "process_index", 0) for d in devices}) > 1:
        raise UserError(
            f"{mesh} uses {n * len(groups)} of {len(devices)} devices; several processes must use "
            "all"
        )
    blocks = [_block(group[:n], (data, fsdp, tensor)) for group in groups]
    auto = (jax.sharding.AxisType.Auto,) * 3
    return Mesh(np.concatenate(blocks), AXES, axis_types=auto)


def _slices(devices: Sequence[Any], wanted: int | None) -> list[Sequence[Any]]:
    """Returns the devices of each slice. Raises UserError if they are not `wanted` of one size."""
    by_index: dict[int, list[Any]] = {}
    # On GPUs each host counts as a slice.
    for d in devices if devices[0].platform == "tpu" else ():
        by_index.setdefault(getattr(d, "slice_index", 0), []).append(d)
    if by_index:
        groups: list[Sequence[Any]] = [by_index[i] for i in sorted(by_index)]
        if wanted not in (None, len(groups)):
            raise UserError(f"mesh slices={wanted}: the devices are in {len(groups)} slices")
        if len({len(group) for group in groups}) > 1:
            sizes = ", ".join(str(len(group)) for group in groups)
            raise UserError(f"mesh: the slices have {sizes} devices; they must be of one size")
        return groups
    wanted = wanted or 1
    if wanted < 1 or len(devices) % wanted:
        raise UserError(f"mesh slices={wanted}: does not divide the {len(devices)} devices")
    size = len(devices) // wanted
    return [devices[i * size : (i + 1) * size] for i in range(wanted)]


def _block(devices: Sequence[Any], sizes: tuple[int, int, int]) -> np.ndarray:
    """Returns the devices of one slice as an array of (data, fsdp, tensor)."""
    mesh = f"mesh ({', '.join(map(str, sizes))})"
    if devices[0].platform != "tpu":  # their coordinates carry no information
        return np.array(devices, object).reshape(sizes)
    if not _is_block(devices):
        raise UserError(
            f"{mesh} cannot be laid over {len(devices)} devices of this slice; use all of them"
        )
    try:
        return jax.make_mesh(sizes, AXES, devices=devices).devices
    except NotImplementedError as e:  # no way to lay these axes along the links of the slice
        raise UserError(
            f"{mesh} cannot be laid over this slice: "
            "each size must be the product of some of its sides"
        ) from e


def _fill_in(sizes: tuple[int, int, int], num_devices: int) -> tuple[int, int, int]:
    """Returns the sizes with -1 replaced by what the others leave."""
    mesh = f"mesh ({', '.join(map(str, sizes))})"
    given = [n for n in sizes if n != -1]
    if len(given) < 2 or min(given) < 1:
        raise UserError(f"{mesh}: sizes are at least 1, and one of them may be -1 (the rest)")
    if len(given) == 3:
        return sizes
    rest, remainder = divmod(num_devices, math.prod(given))
    if remainder or not rest:
        raise UserError(f"{mesh}: {num_devices} devices are not a multiple of {math.prod(given)}")
    data, fsdp, tensor = (rest if n == -1 else n for n in sizes)
    return data, fsdp, tensor


def _is_block(devices: Sequence[Any]) -> bool:
    """Whether the chips fill a cuboid of their slice, which jax.make_mesh asserts."""
    coords = [(*d.coords, d.core_on_chip) for d in devices]
    sides = [max(axis) - min(axis) + 1 for axis in zip(*coords, strict=True)]
    return math.prod(sides) == len(devices)


def hosts_per_tensor_group(mesh: Mesh) -> int:
    """Returns how many hosts (processes) a group of devices along `tensor` spans at most.

    More than one is slow if a network joins the hosts: activations are summed over `tensor` twice
    per layer, forward and backward.
    """
    groups = mesh.devices.reshape(-1, mesh.shape["tensor"])
    return max(len({d.process_index for d in group}) for group in groups)


def platform() -> str:
    """Returns the platform that is traced for: that of the current mesh, else the default backend.

    In ahead-of-time compilation the mesh's devices are not attached, so the two differ.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() if mesh.empty else mesh.abstract_device.platform


# ---- parameters ----------------------------------------------------------------------------------
def partition_spec(path: tuple[Any, ...], x: Any) -> PartitionSpec:
    """Returns the partition of one leaf of the parameters or of an optimizer state like them.

    A leaf that no rule matches is replicated.
    """
    names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
    rules = RULES
    if "layers" in names:
        below_layers = path[names.index("layers") + 1]
        if isinstance(below_layers, jax.tree_util.SequenceKey):
            rules = _RULES_PER_LAYER
    for name in reversed(names):
        if name not in rules or len(rules[name]) != getattr(x, "ndim", 0):
            continue
        *layer, inputs, outputs = rules[name]
        # The rank of LoRA is never split.
        if names[-1] == lora.LORA_A:
            return PartitionSpec(*layer, inputs, None)
        if names[-1] == lora.LORA_B:
            return PartitionSpec(*layer, None, outputs)
        return PartitionSpec(*rules[name])
    return PartitionSpec()


def shardings(mesh: Mesh, tree: Params) -> Params:
    """Returns the NamedSharding of each leaf of parameters or optimizer state.

    A dimension that its mesh axis does not divide, like a vocabulary of 32,003, is not split.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, _divisible_spec(mesh, path, x)), tree
    )


def _divisible_spec(
    mesh: Mesh | jax.sharding.AbstractMesh, path: tuple[Any, ...], x: Any
) -> PartitionSpec:
    axes = partition_spec(path, x)
    return PartitionSpec(
        *(a if a and x.shape[i] % mesh.shape[a] == 0 else None for i, a in enumerate(axes))
    )


def pin_to_mesh(tree: Params) -> Params:
    """Constrains parameters or optimizer state to their `shardings` on the current mesh, if any."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree

    def pin(path, x):
        return jax.lax.with_sharding_constraint(x, _divisible_spec(mesh, path, x))

    return jax.tree_util.tree_map_with_path(pin, tree)


# ---- other arrays --------------------------------------------------------------------------------
def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """Constrains an activation's sharding on the current mesh (jax.set_mesh), if any."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


def put_on_mesh(mesh: Mesh, x: np.ndarray, axes: PartitionSpec) -> jax.Array:
    """Places a host array on the mesh. Every process holds all of it and places its own part."""
    sharding = NamedSharding(mesh, axes)
    if jax.process_count() == 1:
        return jax.device_put(x, sharding)
    return jax.make_array_from_callback(x.shape, sharding, lambda part: x[part])
