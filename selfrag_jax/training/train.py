"""One linear trainer for every model of the project: base model, critic, generator, baselines.

A jitted step over a mesh, gradients by jax.value_and_grad, updates by optax, checkpoints by Orbax. Killed and started
again it continues from the last checkpoint, with the batches it would have seen.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from selfrag_jax.data.batches import Batch, Packer, Source
from selfrag_jax.models import checkpoints, sharding
from selfrag_jax.models.llama import Model, Params
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
    max_targets: int | None  # positions of a batch whose loss is computed, gathered from all rows; None: all positions
    optimizer: OptimizerConfig
    mesh: MeshConfig
    save_every: int  # steps between checkpoints
    log_every: int
    accumulate: int = 1  # batches per update
    packed: bool = True  # several documents in a row; else one
    loss_chunk: int | None = None  # positions (of each row, or of max_targets) whose logits exist at a time; None: all
    dtype: str | None = None  # of activations; None: the model's
    remat: bool = False  # recompute layers in the backward pass: less memory, a third more work

    def __post_init__(self):
        if self.rows % (self.mesh.data * self.mesh.fsdp):
            raise BadInput(f"rows={self.rows} is not divisible by mesh data x fsdp = {self.mesh.data * self.mesh.fsdp}")
        positions, name = (self.length, "length") if self.max_targets is None else (self.max_targets, "max_targets")
        if self.loss_chunk is not None and (self.loss_chunk < 1 or positions % self.loss_chunk):
            raise BadInput(f"loss_chunk={self.loss_chunk} does not divide {name}={positions}")
        if self.accumulate < 1:
            raise BadInput(f"accumulate={self.accumulate}: must be at least 1")


def loss_fn(
    params: Params, model: Model, batch: dict[str, jax.Array], chunk: int | None = None, total: jax.Array | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted sum of next-token losses over `total` (the sum of the weights, if not given); also sums per loss group.

    batch: tokens, positions [B, T], doc_ids [B, T] or none; targets, weights, groups [B, T], or [M] with loss_index [M]
    (see data.batches.Batch). chunk: how many positions have logits at a time; they are computed again for the gradient.
    """
    hidden, _ = model.hidden(params, batch["tokens"], batch["positions"], batch.get("doc_ids"))
    if "loss_index" in batch:
        hidden = hidden.reshape(-1, hidden.shape[-1])[batch["loss_index"]]
    targets, weights, groups = batch["targets"], batch["weights"], batch["groups"]
    total = jnp.maximum(weights.sum(), 1.0) if total is None else total

    def part(hidden, targets, weights, groups):
        logits = model.logits(params, hidden)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        correct = (logits.argmax(-1) == targets).astype(jnp.float32)
        return (losses * weights).sum() / total, metrics.by_group(*(x.ravel() for x in (losses, correct, weights, groups)))

    if chunk is None or chunk == targets.shape[-1]:
        return part(hidden, targets, weights, groups)
    at = targets.ndim - 1  # the axis of positions
    split = lambda x: jnp.moveaxis(x.reshape(*x.shape[:at], -1, chunk, *x.shape[at + 1 :]), at, 0)  # noqa: E731
    chunks = jax.tree.map(split, (hidden, targets, weights, groups))
    add = lambda sums, xs: (jax.tree.map(jnp.add, sums, jax.checkpoint(part)(*xs)), None)  # noqa: E731
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(part, *(x[0] for x in chunks)))
    return jax.lax.scan(add, zero, chunks)[0]


def gradients(params: Params, model: Model, batch: dict[str, jax.Array], chunk: int | None):
    """Loss, sums per group and gradients of a batch, or of several that are stacked in front ([A, B, T]) as one."""
    if batch["tokens"].ndim == 2:
        return jax.value_and_grad(loss_fn, has_aux=True)(params, model, batch, chunk)
    total = jnp.maximum(batch["weights"].sum(), 1.0)  # of all, so that a target counts alike in whichever batch it is

    def add(sums, one):
        return jax.tree.map(jnp.add, sums, jax.value_and_grad(loss_fn, has_aux=True)(params, model, one, chunk, total)), None

    first = jax.tree.map(lambda x: x[0], batch)
    shapes = jax.eval_shape(lambda: jax.value_and_grad(loss_fn, has_aux=True)(params, model, first, chunk, total))
    return jax.lax.scan(add, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), batch)[0]


@partial(jax.jit, static_argnames=("model", "tx", "chunk"), donate_argnames=("state",))
def train_step(
    state: dict[str, Any],
    batch: dict[str, jax.Array],
    model: Model,
    tx: optax.GradientTransformation,
    chunk: int | None = None,
):
    """One update. state: {"params", "opt_state", "step"}. Returns the new state and the step's metrics."""
    (loss, sums), grads = gradients(state["params"], model, batch, chunk)
    updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    # Where it came from, or the next step would be compiled again for where XLA had put it.
    new = sharding.pin({"params": params, "opt_state": opt_state, "step": state["step"] + 1})
    return new, {**sums, "total": loss, "gradient_norm": optax.tree.norm(grads)}


def arrays(batch: Batch, packed: bool = True) -> dict[str, np.ndarray]:
    """What a step reads of a batch. Rows of one document need no `doc_ids`: causality is enough."""
    names = ("tokens", "positions", "doc_ids", "loss_index", "targets", "weights", "groups")
    found = {name: getattr(batch, name) for name in names if packed or name != "doc_ids"}
    return {name: x for name, x in found.items() if x is not None}


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
    model = Model(replace(model.config, dtype=config.dtype or model.config.dtype, remat=config.remat))

    def fresh(params: Params) -> dict[str, Any]:
        return {"params": params, "opt_state": tx.init(params), "step": jnp.zeros((), jnp.int32)}

    shapes = jax.eval_shape(fresh, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), initial))
    placement = sharding.shardings(mesh, shapes)

    # ---- resume ----------------------------------------------------------------------------------------------------
    Path(workdir).mkdir(parents=True, exist_ok=True)
    leads = jax.process_index() == 0  # of several processes, the one that writes and reports
    if leads:
        checkpoints.write_architecture(workdir, replace(model.config, remat=False), tokenizer)
    saved = checkpoints.manager(workdir)
    last = saved.latest_step()
    packer = Packer(source, config.rows, config.length, config.max_targets, config.seed, packed=config.packed)
    if last is None:
        # Each array goes to its devices on its own; a copy, for the step donates its state.
        place = lambda x, p: sharding.put(mesh, np.array(x, np.float32), p.spec)  # noqa: E731
        params = jax.tree.map(place, initial, placement["params"])
        state, truncated = jax.jit(fresh, out_shardings=placement, donate_argnums=0)(params), 0
    else:
        like = jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, placement)
        state, position = checkpoints.restore(saved, last, like)
        packer.state, truncated = position["example"], position["truncated"]

    # ---- steps -----------------------------------------------------------------------------------------------------
    log, stop = metrics.Log(workdir), _StopSignal()
    first = int(state["step"])
    # Leaving the block in whatever way waits for a save that is under way.
    with jax.set_mesh(mesh), saved, progress(name, config.steps, "steps", first, leads) as bar, stop:
        for step in range(first, config.steps):
            begin = packer.state
            batches = [packer.next() for _ in range(config.accumulate)]
            truncated += sum(b.truncated for b in batches)
            state, step_metrics = train_step(state, _place(mesh, batches, config.packed), model, tx, config.loss_chunk)
            for what, name_ in (("loss", "total"), ("gradient norm", "gradient_norm")):
                if not np.isfinite(step_metrics[name_]):
                    raise FloatingPointError(
                        f"{workdir}: the {what} of step {step} is {float(step_metrics[name_])}; its batch holds examples {begin} "
                        f"to {packer.state - 1} in training order. Earlier checkpoints are kept; lower the learning rate."
                    )
            log.add({k: v for k, v in step_metrics.items() if k != "total"}, sum(int((b.doc_ids > 0).sum()) for b in batches))
            done = step + 1
            note = log.report(done) if done % config.log_every == 0 or done == config.steps else ""
            bar.advance(note=note)
            if done % config.save_every == 0 or done == config.steps or stop.caught:
                checkpoints.save(saved, done, state, {"example": packer.state, "truncated": truncated})
            if stop.caught:
                raise SystemExit(143)
    log.close()
    return {"params": state["params"], "steps": config.steps, "examples": packer.state, "truncated": truncated}


def _place(mesh, batches: list[Batch], packed: bool) -> dict[str, jax.Array]:
    """The batches of one update on the mesh: [B, ...], or stacked in front where there are several."""
    each = [arrays(b, packed) for b in batches]
    out = {}
    for name in each[0]:
        x = np.stack([a[name] for a in each]) if len(each) > 1 else each[0][name]
        lead = (None,) if len(each) > 1 else ()
        by_row = each[0][name].shape[:1] == batches[0].tokens.shape[:1] and each[0][name].ndim == 2
        out[name] = sharding.put(mesh, x, PartitionSpec(*lead, *(sharding.BATCH if by_row else ())))
    return out


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
