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

from selfrag_jax.data.batches import LOSS_GROUPS, Batch
from selfrag_jax.models import lora, sharding
from selfrag_jax.models.llama import Model
from selfrag_jax.models.params import Params
from selfrag_jax.training.config import TrainConfig
from selfrag_jax.training.loss import GroupSums, gradients, loss_fn

# {"params", "opt_state", "step"} and, with LoRA, "frozen": the parameters that are not trained.
TrainState = dict[str, Any]
Sums = tuple[Float[Array, ""], GroupSums]  # the loss, and the sums per loss group


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
    sums, grads = gradients(state["params"], model, batch, chunk, state.get("frozen"))
    return _updated(state, sums, grads, tx)


def _updated(
    state: TrainState, sums: Sums, grads: Params, tx: optax.GradientTransformation
) -> tuple[TrainState, dict[str, Float[Array, ...]]]:
    with jax.named_scope("optimizer"):
        updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
    # Back to where the arrays came from. Wherever else XLA put them, the next step would be
    # compiled again for it.
    new = sharding.pin_to_mesh(
        {**state, "params": params, "opt_state": opt_state, "step": state["step"] + 1}
    )
    loss, group_sums = sums
    return new, {**group_sums, "total": loss, "gradient_norm": optax.tree.norm(grads)}


@partial(jax.jit, static_argnames=("model", "chunk"), donate_argnames=("sums",))
def add_gradients(
    sums: tuple[Sums, Params],
    params: Params,
    frozen: Params | None,
    micro_batch: dict[str, Array],
    total: Float[Array, ""],
    model: Model,
    chunk: int | None = None,
) -> tuple[Sums, Params]:
    """Returns `sums` with the loss, the sums per group and the gradients of a micro-batch added.

    total: sum of the weights of all micro-batches of the update.
    """
    compute = jax.value_and_grad(loss_fn, has_aux=True)
    added = jax.tree.map(jnp.add, sums, compute(params, model, micro_batch, chunk, total, frozen))
    return added[0], sharding.pin_to_mesh(added[1])


@partial(jax.jit, static_argnames=("tx",), donate_argnames=("state",))
def apply_gradients(
    state: TrainState, sums: tuple[Sums, Params], tx: optax.GradientTransformation
) -> tuple[TrainState, dict[str, Float[Array, ...]]]:
    """Returns the state after the update by the sums of `add_gradients`, and the step's metrics.

    state: without `frozen`.
    """
    return _updated(state, *sums, tx)


def no_sums() -> Sums:
    """Returns the loss and the sums per group of no micro-batch."""
    zeros = jnp.zeros(len(LOSS_GROUPS), jnp.float32)
    return jnp.zeros((), jnp.float32), {"loss": zeros, "correct": zeros, "count": zeros}


@partial(jax.jit, static_argnames=("model", "chunk"))
def evaluate(
    params: Params,
    frozen: Params | None,
    batch: dict[str, Array],
    model: Model,
    chunk: int | None = None,
) -> GroupSums:
    """Returns the sums per loss group of a batch, without gradients."""
    return loss_fn(params, model, batch, chunk, None, frozen)[1]


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


def batch_axes(ndim: int) -> PartitionSpec:
    """Returns how an array of a batch lies on the mesh; gathered targets are on every device."""
    return PartitionSpec() if ndim == 1 else sharding.BATCH


def split_batch(arrays: dict[str, np.ndarray], micro_batches: int) -> dict[str, np.ndarray]:
    """Returns the arrays [B, ...] of a batch as micro-batches [A, B / A, ...].

    Row i goes to micro-batch i % A, so that every device keeps rows of every one.
    """
    if micro_batches == 1:
        return arrays
    return {
        name: x.reshape(-1, micro_batches, *x.shape[1:]).swapaxes(0, 1)
        for name, x in arrays.items()
    }


def put_batch(mesh: Mesh, arrays: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Returns the arrays of a batch on the mesh, [B, ...] or, in micro-batches, [A, B / A, ...]."""
    is_split = arrays["tokens"].ndim == 3

    def axes(x: np.ndarray) -> PartitionSpec:
        return PartitionSpec(None, *batch_axes(x.ndim - 1)) if is_split else batch_axes(x.ndim)

    return {name: sharding.put_on_mesh(mesh, x, axes(x)) for name, x in arrays.items()}


def batch_on_mesh(
    mesh: Mesh, batch: Batch, micro_batches: int, packed: bool
) -> dict[str, jax.Array]:
    """Returns the batch of an update on the mesh.

    Its arrays are [B, ...]; with several micro-batches [A, B / A, ...].
    """
    return put_batch(mesh, split_batch(batch_arrays(batch, packed), micro_batches))
