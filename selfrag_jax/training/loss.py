"""The training loss: weighted next-token cross-entropy, its sums per loss group, its gradients.

Axis letters: B rows, T positions, M gathered targets (data/batches.py), A accumulated
micro-batches, D embed, G loss groups.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from selfrag_jax.data.batches import LOSS_GROUPS
from selfrag_jax.models import lora
from selfrag_jax.models.llama import Model
from selfrag_jax.models.params import Params


def group_sums(
    losses: jax.Array, correct: jax.Array, weights: jax.Array, groups: jax.Array
) -> dict[str, jax.Array]:
    """Sums per loss group. losses, correct, weights, groups: [M]. Returns [G] arrays: loss, correct, count."""
    used = (weights > 0).astype(jnp.float32)
    member = jax.nn.one_hot(groups, len(LOSS_GROUPS)) * used[:, None]
    return {"loss": losses @ member, "correct": correct @ member, "count": member.sum(0)}


def loss_fn(
    params: Params,
    model: Model,
    batch: dict[str, jax.Array],
    chunk: int | None = None,
    total: jax.Array | None = None,
    frozen: Params | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted sum of next-token losses over `total` (the sum of the weights, if not given); also sums per loss group.

    batch: tokens, positions [B, T], doc_ids [B, T] or none; targets, weights, groups [B, T], or [M] with loss_index [M]
    (see data.batches.Batch). chunk: how many positions have logits at a time; they are computed again for the gradient.
    frozen: parameters that are not trained, beside `params`.
    """
    params = params if frozen is None else lora.join_trained(params, frozen)
    hidden, _ = model.hidden(params, batch["tokens"], batch["positions"], batch.get("doc_ids"))
    if "loss_index" in batch:
        hidden = hidden.reshape(-1, hidden.shape[-1])[batch["loss_index"]]
    targets, weights, groups = batch["targets"], batch["weights"], batch["groups"]
    total = jnp.maximum(weights.sum(), 1.0) if total is None else total

    def part(hidden, targets, weights, groups):
        logits = model.logits(params, hidden)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        # No token is more probable: cheaper than the argmax, as the loss needs the maximum anyway.
        chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        correct = (chosen >= logits.max(-1)).astype(jnp.float32)
        return (losses * weights).sum() / total, group_sums(
            *(x.ravel() for x in (losses, correct, weights, groups))
        )

    if chunk is None or chunk == targets.shape[-1]:
        return part(hidden, targets, weights, groups)
    at = targets.ndim - 1  # the axis of positions
    split = lambda x: jnp.moveaxis(x.reshape(*x.shape[:at], -1, chunk, *x.shape[at + 1 :]), at, 0)  # noqa: E731
    chunks = jax.tree.map(split, (hidden, targets, weights, groups))
    add = lambda sums, xs: (jax.tree.map(jnp.add, sums, jax.checkpoint(part)(*xs)), None)  # noqa: E731
    zero = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(part, *(x[0] for x in chunks))
    )
    return jax.lax.scan(add, zero, chunks)[0]


def gradients(
    params: Params,
    model: Model,
    batch: dict[str, jax.Array],
    chunk: int | None,
    frozen: Params | None = None,
):
    """Loss, sums per group and gradients of a batch, or of several that are stacked in front ([A, B, T]) as one."""
    compute = jax.value_and_grad(loss_fn, has_aux=True)
    if batch["tokens"].ndim == 2:
        return compute(params, model, batch, chunk, None, frozen)
    total = jnp.maximum(
        batch["weights"].sum(), 1.0
    )  # of all, so that a target counts alike in whichever batch it is

    def add(sums, one):
        return jax.tree.map(jnp.add, sums, compute(params, model, one, chunk, total, frozen)), None

    shapes = jax.eval_shape(
        lambda: compute(params, model, jax.tree.map(lambda x: x[0], batch), chunk, total, frozen)
    )
    return jax.lax.scan(add, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), batch)[0]
