"""The training loss: weighted next-token cross-entropy, its sums per loss group, its gradients.

Axis letters: B rows, T positions, M gathered targets (data/batches.py), A accumulated
micro-batches, D embed, G loss groups.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from selfrag_jax.data.batches import LOSS_GROUPS
from selfrag_jax.models import lora
from selfrag_jax.models.llama import Model
from selfrag_jax.models.params import Params

GroupSums = dict[str, Float[Array, " G"]]  # of loss, correct and count


def group_sums(
    losses: Float[Array, " M"],
    correct: Float[Array, " M"],
    weights: Float[Array, " M"],
    groups: Int[Array, " M"],
) -> GroupSums:
    """Returns the sums per loss group of losses, correct predictions and targets (weight > 0)."""
    used = (weights > 0).astype(jnp.float32)
    member = jax.nn.one_hot(groups, len(LOSS_GROUPS)) * used[:, None]
    return {"loss": losses @ member, "correct": correct @ member, "count": member.sum(0)}


def loss_fn(
    params: Params,
    model: Model,
    batch: dict[str, Array],
    chunk: int | None = None,
    total: Float[Array, ""] | None = None,
    frozen: Params | None = None,
) -> tuple[Float[Array, ""], GroupSums]:
    """Returns the weighted sum of next-token losses divided by `total`, and the sums per group.

    batch: tokens and positions [B, T]; doc_ids [B, T], or absent; targets, weights and groups
        [B, T], or [M] with loss_index [M] (see data.batches.Batch).
    chunk: number of positions whose logits exist at a time; the backward pass recomputes them.
    total: None for the sum of the batch's weights.
    frozen: parameters that are not trained, to be joined with `params`.
    """
    params = params if frozen is None else lora.join_trained(params, frozen)
    hidden, _ = model.hidden(params, batch["tokens"], batch["positions"], batch.get("doc_ids"))
    if "loss_index" in batch:
        hidden = hidden.reshape(-1, hidden.shape[-1])[batch["loss_index"]]
    targets, weights, groups = batch["targets"], batch["weights"], batch["groups"]
    total = jnp.maximum(weights.sum(), 1.0) if total is None else total

    @jax.named_scope("loss")
    def chunk_loss(hidden, targets, weights, groups):
        logits = model.logits(params, hidden)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        # A target is predicted if no token is more probable. This is cheaper than an argmax: the
        # loss needs the maximum anyway.
        chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        correct = (chosen >= logits.max(-1)).astype(jnp.float32)
        loss = (losses * weights).sum() / total
        return loss, group_sums(*(x.ravel() for x in (losses, correct, weights, groups)))

    inputs = (hidden, targets, weights, groups)
    axis = targets.ndim - 1  # of positions
    n = targets.shape[axis]
    if chunk is None or chunk >= n:
        return chunk_loss(*inputs)

    def split(x):
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, -n % chunk)  # without weight
        x = jnp.pad(x, padding)
        chunks = x.reshape(*x.shape[:axis], -1, chunk, *x.shape[axis + 1 :])
        return jnp.moveaxis(chunks, axis, 0)

    def add(sums, xs):
        return jax.tree.map(jnp.add, sums, jax.checkpoint(chunk_loss)(*xs)), None

    chunks = jax.tree.map(split, inputs)
    zeros = _zeros_like(jax.eval_shape(chunk_loss, *(x[0] for x in chunks)))
    return jax.lax.scan(add, zeros, chunks)[0]


def gradients(
    params: Params,
    model: Model,
    batch: dict[str, Array],
    chunk: int | None,
    frozen: Params | None = None,
) -> tuple[tuple[Float[Array, ""], GroupSums], Params]:
    """Returns ((loss, sums per group), gradients) of a batch, as jax.value_and_grad does.

    The arrays of the batch may have a leading axis of micro-batches (tokens: [A, B, T]); their
    losses and gradients are added up, to those of one batch of A * B rows.
    """
    compute = jax.value_and_grad(loss_fn, has_aux=True)
    if batch["tokens"].ndim == 2:
        return compute(params, model, batch, chunk, None, frozen)
    # Over all micro-batches, so that a target counts the same in whichever it is.
    total = jnp.maximum(batch["weights"].sum(), 1.0)

    def compute_one(micro_batch):
        return compute(params, model, micro_batch, chunk, total, frozen)

    def add(sums, micro_batch):
        return jax.tree.map(jnp.add, sums, compute_one(micro_batch)), None

    shapes = jax.eval_shape(lambda: compute_one(jax.tree.map(lambda x: x[0], batch)))
    return jax.lax.scan(add, _zeros_like(shapes), batch)[0]


def _zeros_like(shapes):
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
