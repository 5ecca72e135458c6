"""The jitted training step, the state that it updates, and its batches on the mesh."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from selfrag_jax.data.batches import Batch
from selfrag_jax.models import lora, sharding
from selfrag_jax.models.llama import Model
from selfrag_jax.models.params import Params
from selfrag_jax.training.config import TrainConfig
from selfrag_jax.training.loss import gradients


@partial(jax.jit, static_argnames=("model", "tx", "chunk"), donate_argnames=("state",))
def train_step(
    state: dict[str, Any],
    batch: dict[str, jax.Array],
    model: Model,
    tx: optax.GradientTransformation,
    chunk: int | None = None,
):
    """One update. state: {"params", "opt_state", "step"} and, with LoRA, "frozen". Returns it and the step's metrics."""
    (loss, sums), grads = gradients(state["params"], model, batch, chunk, state.get("frozen"))
    updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    # Where it came from, or the next step would be compiled again for where XLA had put it.
    new = sharding.pin_to_mesh(
        {**state, "params": params, "opt_state": opt_state, "step": state["step"] + 1}
    )
    return new, {**sums, "total": loss, "gradient_norm": optax.tree.norm(grads)}


def fresh_state(
    params: Params, tx: optax.GradientTransformation, c: TrainConfig, dtype: str
) -> dict[str, Any]:
    """What a training begins with: f32 parameters and the optimizer's state; with LoRA what is frozen too, in `dtype`."""
    trained, frozen = (params, None) if c.lora is None else lora.split_trained(params)
    trained = jax.tree.map(lambda x: x.astype(jnp.float32), trained)
    state = {"params": trained, "opt_state": tx.init(trained), "step": jnp.zeros((), jnp.int32)}
    return (
        state
        if frozen is None
        else state | {"frozen": jax.tree.map(lambda x: x.astype(dtype), frozen)}
    )


def state_like(
    c: TrainConfig, model: Model, tx: optax.GradientTransformation, mesh: Mesh
) -> dict[str, Any]:
    """The state as jax.ShapeDtypeStructs with their places on the mesh, without allocating it."""
    shapes = jax.eval_shape(
        partial(fresh_state, tx=tx, c=c, dtype=model.config.dtype), model.shapes()
    )
    place = lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p)  # noqa: E731
    return jax.tree.map(place, shapes, sharding.shardings(mesh, shapes))


def batch_arrays(batch: Batch, packed: bool = True) -> dict[str, np.ndarray]:
    """What a step reads of a batch. Rows of one document need no `doc_ids`: causality is enough."""
    names = ("tokens", "positions", "doc_ids", "loss_index", "targets", "weights", "groups")
    found = {name: getattr(batch, name) for name in names if packed or name != "doc_ids"}
    return {name: x for name, x in found.items() if x is not None}


def batch_on_mesh(mesh, batch: Batch, parts: int, packed: bool) -> dict[str, jax.Array]:
    """The batch of an update on the mesh: [B, ...], or in `parts` that are stacked in front, [A, B / A, ...]."""
    out = {}
    for name, x in batch_arrays(batch, packed).items():
        axes = PartitionSpec() if x.ndim == 1 else sharding.BATCH
        if parts > 1:  # every device keeps rows of every part, so row i goes to part i % parts
            x, axes = x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), PartitionSpec(None, *axes)
        out[name] = sharding.put_on_mesh(mesh, x, axes)
    return out
