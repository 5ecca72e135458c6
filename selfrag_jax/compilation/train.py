"""Ahead-of-time compilation of training: the trainer's step, and its best possible time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from selfrag_jax.compilation.decode import bytes_per_chip
from selfrag_jax.models import roofline, sharding
from selfrag_jax.models.llama import LlamaConfig, Model
from selfrag_jax.training import optimizer, step
from selfrag_jax.training.config import TrainConfig


def lower_training_step(c: TrainConfig, base: LlamaConfig, mesh: Mesh) -> jax.stages.Lowered:
    """Lowers the trainer's jitted step, with jax.ShapeDtypeStructs in place of arrays."""
    num_parts, model = c.micro_batches(mesh), c.model(base)
    tx = optimizer.make_optimizer(c.optimizer, c.steps or 1000, 0, model.config.vocab_padding)
    state = step.abstract_state(c, model, tx, mesh)

    shape: tuple[int, ...] = (c.rows, c.length)
    axes = sharding.BATCH
    if num_parts > 1:
        shape = (num_parts, c.rows // num_parts, c.length)
        axes = PartitionSpec(None, *axes)
    dtypes = dict.fromkeys(("tokens", "positions", "targets", "groups"), jnp.int32)
    dtypes |= {"weights": jnp.float32}
    if c.packed:
        dtypes |= {"doc_ids": jnp.int32}
    where = NamedSharding(mesh, axes)
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=where) for name, dtype in dtypes.items()
    }
    if c.max_targets is not None:  # on one device: the positions with a loss are gathered
        dtypes = dict.fromkeys(("loss_index", "targets", "groups"), jnp.int32)
        dtypes |= {"weights": jnp.float32}
        everywhere = NamedSharding(mesh, PartitionSpec())
        batch |= {
            name: jax.ShapeDtypeStruct((c.max_targets,), dtype, sharding=everywhere)
            for name, dtype in dtypes.items()
        }
    with jax.set_mesh(mesh):
        return step.train_step.lower(state, batch, model, tx, c.loss_chunk)


# ---- what the slice can do at best ---------------------------------------------------------------
def roofline_times(
    section: TrainConfig, base: LlamaConfig, mesh: Mesh, chip: roofline.Chip, bytes_sent: float
) -> dict[str, Any]:
    """Returns the model FLOPs of a step, and the least seconds that it takes.

    Arithmetic, memory and links each have a least time; the step's is the largest of them.
    Arithmetic includes what the backward pass recomputes, at the chip's bf16 rate (f32 is slower).
    Memory is what cannot be avoided: trained weights and optimizer state are read and written once,
    and the weights are read in every pass of every part of the batch. bytes_sent: to other chips,
    by each chip.
    """
    model = section.model(base)
    c, num_chips = model.config, mesh.size
    tokens = section.rows * section.length
    share = 1.0 if section.max_targets is None else section.max_targets / tokens
    flops = roofline.train_flops_per_token(c, section.length, share)
    recomputed = roofline.recomputed_flops_per_token(
        c, section.length, section.loss_chunk is not None
    )
    num_parts = section.micro_batches(mesh)
    num_passes = 3 if section.remat == "full" else 2
    weight_bytes = jnp.dtype(c.dtype).itemsize * roofline.num_weights(c)
    weights_read = num_parts * num_passes * weight_bytes / mesh.shape["tensor"]
    updated = updated_bytes_per_chip(section, model, mesh)
    seconds = {
        "arithmetic": tokens * (flops + recomputed) / (num_chips * chip.bf16_flops),
        "memory": (2 * updated + weights_read) / chip.memory_bandwidth,
        "links": bytes_sent / chip.link_bandwidth,
    }
    step_seconds = max(seconds.values())
    return {
        "model_flops": tokens * flops,
        "roofline_seconds": seconds | {"step": step_seconds},
        "roofline_mfu": tokens * flops / (step_seconds * num_chips * chip.bf16_flops),
        "tokens_per_step": tokens,
    }


def updated_bytes_per_chip(c: TrainConfig, model: Model, mesh: Mesh) -> int:
    """Returns the bytes that one chip holds of trained weights and optimizer state."""
    tx = optimizer.make_optimizer(c.optimizer, c.steps or 1000)
    state = step.abstract_state(c, model, tx, mesh)
    return bytes_per_chip({name: x for name, x in state.items() if name != "frozen"})
