"""One linear trainer for every model of the project: base model, critic, generator, baselines.

A jitted step over a mesh, gradients by jax.value_and_grad, updates by optax, checkpoints by Orbax. Killed and started
again it continues from the last checkpoint, with the batches it would have seen.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from selfrag_jax.data.batches import Batch, Packer, Source
from selfrag_jax.models import checkpoints, sharding
from selfrag_jax.models.llama import Model, Params, causal_mask
from selfrag_jax.progress import progress
from selfrag_jax.records import BadInput
from selfrag_jax.tokenizer import Tokenizer
from selfrag_jax.training import metrics, optimizer
from selfrag_jax.training.optimizer import OptimizerConfig


@dataclass(frozen=True)
class MeshConfig:
    data: int
    fsdp: int
    tensor: int


@dataclass(frozen=True)
class TrainConfig:
    seed: int
    steps: int
    rows: int  # rows of a batch
    length: int  # tokens of a row
    max_targets: int  # positions of a batch that carry a loss
    optimizer: OptimizerConfig
    mesh: MeshConfig
    save_every: int  # steps between checkpoints
    log_every: int

    def __post_init__(self):
        if self.rows % (self.mesh.data * self.mesh.fsdp):
            raise BadInput(f"rows={self.rows} is not divisible by mesh data x fsdp = {self.mesh.data * self.mesh.fsdp}")


def loss_fn(params: Params, model: Model, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted mean next-token loss at the learned positions; also sums per loss group.

    batch: tokens, positions, doc_ids [B, T]; loss_index, targets, weights, groups [M] (see data.batches.Batch).
    """
    hidden, _ = model.hidden(params, batch["tokens"], batch["positions"], causal_mask(batch["doc_ids"]))
    learned = hidden.reshape(-1, hidden.shape[-1])[batch["loss_index"]]
    logits = model.logits(params, learned)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    weights = batch["weights"]
    correct = (logits.argmax(-1) == batch["targets"]).astype(jnp.float32)
    sums = metrics.by_group(losses, correct, weights, batch["groups"])
    return (losses * weights).sum() / jnp.maximum(weights.sum(), 1.0), sums


@partial(jax.jit, static_argnames=("model", "tx"), donate_argnames=("state",))
def train_step(state: dict[str, Any], batch: dict[str, jax.Array], model: Model, tx: optax.GradientTransformation):
    """One update. state: {"params", "opt_state", "step"}. Returns the new state and the step's metrics."""
    (loss, sums), grads = jax.value_and_grad(loss_fn, has_aux=True)(state["params"], model, batch)
    updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    new = {"params": params, "opt_state": opt_state, "step": state["step"] + 1}
    return new, {**sums, "total": loss, "gradient_norm": optax.tree.norm(grads)}


def _arrays(batch: Batch) -> dict[str, np.ndarray]:
    names = ("tokens", "positions", "doc_ids", "loss_index", "targets", "weights", "groups")
    return {name: getattr(batch, name) for name in names}


def train(
    config: TrainConfig,
    model: Model,
    initial: Params,
    source: Source,
    tokenizer: Tokenizer,
    workdir: str | Path,
    name: str = "train",
    new_rows: int = 0,
) -> dict[str, Any]:
    """Trains from `initial` (or from the last checkpoint of `workdir`) and returns {"params", "examples", ...}.

    new_rows: how many tokens at the end of the vocabulary `initial` has just been given.
    SIGTERM saves a checkpoint and exits with status 143. Raises FloatingPointError naming step and examples when the
    loss is not finite; the checkpoints before it stay.
    """
    # ---- mesh and state --------------------------------------------------------------------------------------------
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    tx = optimizer.make(config.optimizer, config.steps, new_rows)

    def fresh() -> dict[str, Any]:
        params = jax.tree.map(jnp.array, initial)  # a copy: the step donates its state
        return {"params": params, "opt_state": tx.init(params), "step": jnp.zeros((), jnp.int32)}

    shapes = jax.eval_shape(fresh)
    placement = sharding.shardings(mesh, shapes)
    batch_sharding = NamedSharding(mesh, sharding.BATCH)
    replicated = NamedSharding(mesh, PartitionSpec())

    # ---- resume ----------------------------------------------------------------------------------------------------
    Path(workdir).mkdir(parents=True, exist_ok=True)
    checkpoints.write_architecture(workdir, model.config, tokenizer)
    saved = checkpoints.manager(workdir)
    last = saved.latest_step()
    packer = Packer(source, config.rows, config.length, config.max_targets, config.seed)
    if last is None:
        state, truncated = jax.device_put(fresh(), placement), 0
    else:
        like = jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, placement)
        state, position = checkpoints.restore(saved, last, like)
        packer.state, truncated = position["example"], position["truncated"]

    # ---- steps -----------------------------------------------------------------------------------------------------
    log, stop = metrics.Log(workdir), _StopSignal()
    first = int(state["step"])
    # Leaving the block in whatever way waits for a save that is under way.
    with saved, progress(name, config.steps, "steps", done=first) as bar, stop:
        for step in range(first, config.steps):
            begin = packer.state
            batch = packer.next()
            truncated += batch.truncated
            arrays = _arrays(batch)
            placed = {k: jax.device_put(v, batch_sharding if v.ndim == 2 else replicated) for k, v in arrays.items()}
            state, step_metrics = train_step(state, placed, model, tx)
            if not np.isfinite(step_metrics["total"]):
                raise FloatingPointError(
                    f"{workdir}: the loss of step {step} is {float(step_metrics['total'])}; its batch holds examples "
                    f"{begin} to {packer.state - 1} in training order. Earlier checkpoints are kept; lower the learning rate."
                )
            log.add({k: v for k, v in step_metrics.items() if k != "total"}, int((batch.doc_ids > 0).sum()))
            done = step + 1
            note = log.report(done) if done % config.log_every == 0 or done == config.steps else ""
            bar.advance(note=note)
            if done % config.save_every == 0 or done == config.steps or stop.caught:
                checkpoints.save(saved, done, state, {"example": packer.state, "truncated": truncated})
            if stop.caught:
                raise SystemExit(143)
    log.close()
    return {"params": state["params"], "steps": config.steps, "examples": packer.state, "truncated": truncated}


class _StopSignal:
    """Within the block, SIGTERM sets `caught` instead of ending the process (main thread only)."""

    caught = False

    def __enter__(self):
        try:
            self._old = signal.signal(signal.SIGTERM, self._catch)
        except ValueError:  # not in the main thread
            self._old = None
        return self

    def _catch(self, *_):
        self.caught = True
        os.write(2, b"\nSIGTERM: saving a checkpoint before leaving\n")

    def __exit__(self, *_):
        if self._old is not None:
            signal.signal(signal.SIGTERM, self._old)
