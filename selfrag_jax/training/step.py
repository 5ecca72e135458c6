"""The jitted training step, the state that it updates, and its batches on the mesh."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from selfrag_jax.data.batches import Batch
from selfrag_jax.models import lora, sharding
from selfrag_jax.models.llama import Model
from selfrag_jax.models.params import Params
from selfrag_jax.training.config import TrainConfig
from selfrag_jax.training.loss import gradients

# {"params", "opt_state", "step"} and, with LoRA, "frozen": the parameters that are not trained.
TrainState = dict[str, Any]


@partial(jax.jit, static_argnames=("model", "tx", "chunk"), donate_argnames=("state",))
def train_step(
    state: TrainState,
    batch: dict[str, Array],
    model: Model,
    tx: optax.GradientTransformation,
    chunk: int | None = None,
) -> tuple[TrainState, dict[str, Float[Array, ...]]]:
    """Returns the state after one update, and the step's metrics.

    batch: see `loss_fn`, with or without a leading axis of micro-batches. chunk: see `loss_fn`.
    The metrics are loss, correct and count per loss group [G], and total and gradient_norm [].
    """
    (loss, sums), grads = gradients(state["params"], model, batch, chunk, state.get("frozen"))
    with jax.named_scope("optimizer"):
        updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
    # Back to where the arrays came from. Wherever else XLA put them, the next step would be
    # compiled again for it.
    new = sharding.pin_to_mesh(
        {**state, "params": params, "opt_state": opt_state, "step": state["step"] + 1}
    )
    return new, {**sums, "total": loss, "gradient_norm": optax.tree.norm(grads)}


def initial_state(
    params: Params, tx: optax.GradientTransformation, c: TrainConfig, dtype: str
) -> TrainState:
    """Returns the state before the first step: parameters in f32, and the optimizer's state.

    With LoRA it also holds the frozen parameters, in `dtype`.
    """
    trained, frozen = (params, None) if c.lora is None else lora.split_trained(params)
    trained = jax.tree.map(lambda x: x.astype(jnp.float32), trained)
    state = {"params": trained, "opt_state": tx.init(trained), "step": jnp.zeros((), jnp.int32)}
    if frozen is not None:
        state["frozen"] = jax.tree.map(lambda x: x.astype(dtype), frozen)
    return state


def abstract_state(
    c: TrainConfig, model: Model, tx: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Returns the state as jax.ShapeDtypeStructs with shardings, without allocating it."""
    make = partial(initial_state, tx=tx, c=c, dtype=model.config.dtype)
    shapes = jax.eval_shape(make, model.shapes())

    def place(x, on_mesh):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_mesh)

    return jax.tree.map(place, shapes, sharding.shardings(mesh, shapes))


def batch_arrays(batch: Batch, packed: bool = True) -> dict[str, np.ndarray]:
    """Returns the arrays of a batch that a step reads.

    Without packing `doc_ids` is left out: in a row of one document causal masking is enough.
    """
    names = ("tokens", "positions", "doc_ids", "loss_index", "targets", "weights", "groups")
    arrays = {name: getattr(batch, name) for name in names if packed or name != "doc_ids"}
    return {name: x for name, x in arrays.items() if x is not None}


def batch_on_mesh(
    mesh: Mesh, batch: Batch, micro_batches: int, packed: bool
) -> dict[str, jax.Array]:
    """Returns the batch of an update on the mesh.

    Its arrays are [B, ...]; with several micro-batches [A, B / A, ...].
    """
    out = {}
    for name, x in batch_arrays(batch, packed).items():
        axes = PartitionSpec() if x.ndim == 1 else sharding.BATCH
        if micro_batches > 1:
            # Row i goes to micro-batch i % A, so that every device keeps rows of every one.
            x = x.reshape(-1, micro_batches, *x.shape[1:]).swapaxes(0, 1)
            axes = PartitionSpec(None, *axes)
        out[name] = sharding.put_on_mesh(mesh, x, axes)
    return out
