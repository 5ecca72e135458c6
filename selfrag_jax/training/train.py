"""One linear trainer for every model of the project: base model, critic, generator, baselines.

A jitted step over a mesh, gradients by jax.value_and_grad, updates by optax, checkpoints by Orbax. Killed and started
again it continues from the last checkpoint, with the batches it would have seen.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from selfrag_jax.checkpoints import saving as checkpoints
from selfrag_jax.data.batches import Batch, Packer, Source
from selfrag_jax.models import lora, roofline, sharding
from selfrag_jax.models.attention import KERNELS, choose
from selfrag_jax.models.llama import DTYPES, REMAT, LlamaConfig, Model
from selfrag_jax.models.lora import LoraConfig
from selfrag_jax.models.params import Params, build, leaves
from selfrag_jax.progress import progress
from selfrag_jax.records import BadInput
from selfrag_jax.text.tokenizer import Tokenizer
from selfrag_jax.training import log as metrics
from selfrag_jax.training import optimizer
from selfrag_jax.training.optimizer import OptimizerConfig


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh's axes (see models/sharding.py); one may be -1, for all devices that the others leave."""

    data: int
    fsdp: int
    tensor: int


@dataclass(frozen=True)
class TrainConfig:
    seed: int
    rows: int  # rows of an update
    length: int  # tokens of a row
    max_targets: int | None  # positions of a batch whose loss is computed, gathered from all rows; None: all positions
    optimizer: OptimizerConfig
    mesh: MeshConfig
    save_every: int  # steps between checkpoints
    log_every: int
    steps: int | None = None  # updates; or else epochs
    epochs: float | None = None  # passes over the data
    rows_per_device: int | None = None  # computed at a time, gradients are added up; None: all
    packed: bool = True  # several documents in a row; else one
    loss_chunk: int | None = None  # positions (of each row, or of max_targets) whose logits exist at a time; None: all
    dtype: str | None = None  # of activations; None: the model's
    remat: str = "none"  # what the backward pass computes again, to save memory: "none", "dots" or "full"
    attention: str = "auto"  # kernel, see models/attention.py
    pad_vocabulary: int = 1  # inside, the vocabulary is padded to a multiple of this
    lora: LoraConfig | None = None  # train low-rank adapters and the embeddings only
    keep_last: int = 2  # checkpoints
    keep_best: int = 1  # further ones, of the lowest training loss since the one before (`selfrag convert --step=best`)

    def __post_init__(self):
        if (self.steps is None) == (self.epochs is None):
            raise BadInput(f"steps={self.steps}, epochs={self.epochs}: give one of them")
        if self.steps is not None and self.steps < 0:
            raise BadInput(f"steps={self.steps}: must not be below 0")
        for name in ("epochs", "rows", "length", "save_every", "log_every", "pad_vocabulary", "keep_last", "max_targets"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, (str, bool)) or not 0 < value < float("inf")):
                raise BadInput(f"{name}={value}: must be a number above 0")
        if self.keep_best < 0:
            raise BadInput(f"keep_best={self.keep_best}: must not be below 0")
        if self.dtype not in (None, *DTYPES):
            raise BadInput(f"dtype={self.dtype!r}: must be one of {', '.join(DTYPES)}")
        if self.dtype == "float16":
            raise BadInput("dtype='float16': small gradients would be lost (losses are not scaled); bfloat16 has their range")
        positions, name = (self.length, "length") if self.max_targets is None else (self.max_targets, "max_targets")
        if self.loss_chunk is not None and (self.loss_chunk < 1 or positions % self.loss_chunk):
            raise BadInput(f"loss_chunk={self.loss_chunk} does not divide {name}={positions}")
        if self.rows_per_device is not None and (self.rows_per_device < 1 or self.max_targets is not None):
            raise BadInput(f"rows_per_device={self.rows_per_device}: must be at least 1, and needs max_targets=None")
        if self.remat not in REMAT:
            raise BadInput(f"remat={self.remat!r}: must be one of {', '.join(REMAT)}")
        if self.attention not in KERNELS:
            raise BadInput(f"attention={self.attention!r}: must be one of {', '.join(KERNELS)}")

    def make_mesh(self, devices=None) -> Mesh:
        """Raises BadInput when the devices that there are do not make it, or it does not divide the rows."""
        mesh = sharding.make_mesh(self.mesh.data, self.mesh.fsdp, self.mesh.tensor, devices)
        self.micro_batches(mesh)
        return mesh

    def micro_batches(self, mesh: Mesh) -> int:
        """How many parts an update's rows are computed in. Raises BadInput when the mesh does not divide them."""
        devices = mesh.shape["data"] * mesh.shape["fsdp"]
        at_a_time = self.rows if self.rows_per_device is None else devices * self.rows_per_device
        if self.rows % devices or self.rows % at_a_time:
            what = "" if self.rows_per_device is None else f" x rows_per_device={self.rows_per_device}"
            raise BadInput(f"rows={self.rows} is not divisible by mesh data x fsdp = {devices}{what}")
        return self.rows // at_a_time

    def check(self, c: LlamaConfig, mesh: Mesh) -> None:
        """Raises BadInput where this training cannot run that model on this mesh."""
        if self.length > c.max_length:
            raise BadInput(
                f"length={self.length}: the model attends over {c.max_length} tokens at most (max_position_embeddings)"
            )
        if c.num_heads % mesh.shape["tensor"]:
            raise BadInput(f"mesh tensor={mesh.shape['tensor']} does not divide the model's {c.num_heads} attention heads")
        try:
            with jax.set_mesh(mesh):
                choose(self.attention, self.length, c.head_dim, self.dtype or c.dtype)
        except ValueError as e:
            raise BadInput(str(e)) from None

    def model(self, c: LlamaConfig) -> Model:
        """The model as this training runs it."""
        padding = -c.vocab_size % self.pad_vocabulary
        changes = dict(remat=self.remat, attention=self.attention, lora=self.lora, vocab_padding=padding)
        return Model(replace(c, dtype=self.dtype or c.dtype, **changes))


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
    params = params if frozen is None else lora.join(params, frozen)
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
        return (losses * weights).sum() / total, metrics.by_group(*(x.ravel() for x in (losses, correct, weights, groups)))

    if chunk is None or chunk == targets.shape[-1]:
        return part(hidden, targets, weights, groups)
    at = targets.ndim - 1  # the axis of positions
    split = lambda x: jnp.moveaxis(x.reshape(*x.shape[:at], -1, chunk, *x.shape[at + 1 :]), at, 0)  # noqa: E731
    chunks = jax.tree.map(split, (hidden, targets, weights, groups))
    add = lambda sums, xs: (jax.tree.map(jnp.add, sums, jax.checkpoint(part)(*xs)), None)  # noqa: E731
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(part, *(x[0] for x in chunks)))
    return jax.lax.scan(add, zero, chunks)[0]


def gradients(params: Params, model: Model, batch: dict[str, jax.Array], chunk: int | None, frozen: Params | None = None):
    """Loss, sums per group and gradients of a batch, or of several that are stacked in front ([A, B, T]) as one."""
    compute = jax.value_and_grad(loss_fn, has_aux=True)
    if batch["tokens"].ndim == 2:
        return compute(params, model, batch, chunk, None, frozen)
    total = jnp.maximum(batch["weights"].sum(), 1.0)  # of all, so that a target counts alike in whichever batch it is

    def add(sums, one):
        return jax.tree.map(jnp.add, sums, compute(params, model, one, chunk, total, frozen)), None

    shapes = jax.eval_shape(lambda: compute(params, model, jax.tree.map(lambda x: x[0], batch), chunk, total, frozen))
    return jax.lax.scan(add, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), batch)[0]


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
    new = sharding.pin({**state, "params": params, "opt_state": opt_state, "step": state["step"] + 1})
    return new, {**sums, "total": loss, "gradient_norm": optax.tree.norm(grads)}


def fresh_state(params: Params, tx: optax.GradientTransformation, c: TrainConfig, dtype: str) -> dict[str, Any]:
    """What a training begins with: f32 parameters and the optimizer's state; with LoRA what is frozen too, in `dtype`."""
    trained, frozen = (params, None) if c.lora is None else lora.split(params)
    trained = jax.tree.map(lambda x: x.astype(jnp.float32), trained)
    state = {"params": trained, "opt_state": tx.init(trained), "step": jnp.zeros((), jnp.int32)}
    return state if frozen is None else state | {"frozen": jax.tree.map(lambda x: x.astype(dtype), frozen)}


def state_like(c: TrainConfig, model: Model, tx: optax.GradientTransformation, mesh: Mesh) -> dict[str, Any]:
    """The state as jax.ShapeDtypeStructs with their places on the mesh, without allocating it."""
    shapes = jax.eval_shape(partial(fresh_state, tx=tx, c=c, dtype=model.config.dtype), model.shapes())
    place = lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p)  # noqa: E731
    return jax.tree.map(place, shapes, sharding.shardings(mesh, shapes))


def arrays(batch: Batch, packed: bool = True) -> dict[str, np.ndarray]:
    """What a step reads of a batch. Rows of one document need no `doc_ids`: causality is enough."""
    names = ("tokens", "positions", "doc_ids", "loss_index", "targets", "weights", "groups")
    found = {name: getattr(batch, name) for name in names if packed or name != "doc_ids"}
    return {name: x for name, x in found.items() if x is not None}


def train(
    config: TrainConfig,
    base: Model,
    initial: Params | Callable[[], Params],
    source: Source,
    tokenizer: Tokenizer,
    workdir: str | Path,
    name: str = "train",
    new_rows: int = 0,
) -> dict[str, Any]:
    """Trains from `initial` (or from the last checkpoint of `workdir`) and returns {"params", "examples", ...}.

    base: the model of `initial`, which is called for the parameters where it is a function (so that nobody holds them
    longer than needed), and not at all where a checkpoint has everything. new_rows: how many tokens at the end of its vocabulary it has just been given.
    SIGTERM saves a checkpoint and exits with status 143. Raises FloatingPointError naming step and examples when the
    loss is not finite; the checkpoints before it stay.
    """
    mesh = config.make_mesh()
    parts, model = config.micro_batches(mesh), config.model(base.config)
    steps = _steps(config, source) if config.steps is None else config.steps
    tx = optimizer.make(config.optimizer, steps, new_rows, model.config.vocab_padding)
    Path(workdir).mkdir(parents=True, exist_ok=True)
    leads = jax.process_index() == 0  # of several processes, the one that writes and reports
    saved = checkpoints.manager(workdir, config.keep_last, config.keep_best)
    state, position = _begin_or_resume(config, model, tx, mesh, initial, saved, workdir)
    if leads:
        checkpoints.write_architecture(workdir, replace(model.config, remat="none", attention="auto"), tokenizer)
    packer = Packer(
        source, config.rows, config.length, config.max_targets, config.seed, position["example"], packed=config.packed
    )
    truncated = position["truncated"]

    peak = roofline.chip(mesh.devices.flat[0].device_kind)
    targets = 1.0 if config.max_targets is None else config.max_targets / (config.rows * config.length)
    cost = roofline.train_flops_per_token(model.config, config.length, targets)
    log = metrics.Log(workdir, cost / (peak.bf16_flops * mesh.size) if peak else None, position.get("loss", (0.0, 0.0)))
    first, stop = int(state["step"]), _StopSignal(saved)
    # A signal is caught until the last checkpoint is written.
    with jax.set_mesh(mesh), stop, checkpoints.writing(saved, workdir), progress(name, steps, "steps", first, leads) as bar:
        unseen = None  # the last step's metrics: looked at when the next one is on its way, so that the device never waits
        for step in range(first, steps):
            at = packer.state
            batch = packer.next()
            truncated += batch.truncated
            state, step_metrics = train_step(state, _place(mesh, batch, parts, config.packed), model, tx, config.loss_chunk)
            if unseen is not None:
                log.add(*_finite(workdir, *unseen))
            unseen = step, packer.rows_of(at, packer.state), step_metrics, int((batch.doc_ids > 0).sum())
            done = step + 1
            stopping = stop.caught(done)
            saves = done % config.save_every == 0 or done == steps or stopping
            if saves or done % config.log_every == 0:
                log.add(*_finite(workdir, *unseen))
                unseen = None
            note = log.report(done) if done % config.log_every == 0 or done == steps else ""
            bar.advance(note=note)
            if saves:
                position = {"example": packer.state, "truncated": truncated}
                # After a signal the interval goes on when training does: the loss of a batch or two is no reason to be the best.
                loss = checkpoints.NO_LOSS if stopping and done % config.save_every and done != steps else log.loss_since_save()
                checkpoints.save(saved, done, state, position | {"loss": log.since_save}, loss)
            if stopping:
                break
    log.close()
    if stop.noted:
        raise SystemExit(143)
    if leads and truncated:
        print(
            f"{name}: {truncated} of {packer.state} examples were longer than there was room for, and were cut", file=sys.stderr
        )
    params = state["params"] if config.lora is None else lora.join(state["params"], state["frozen"])
    return {"params": params, "steps": steps, "examples": packer.state, "truncated": truncated}


def _begin_or_resume(
    config: TrainConfig, model: Model, tx: optax.GradientTransformation, mesh: Mesh, initial, saved, workdir
) -> tuple[dict[str, Any], dict[str, int]]:
    """The state on the mesh, and the position in the data: of the last checkpoint, or of the beginning."""
    like = state_like(config, model, tx, mesh)
    trained = {k: v for k, v in like.items() if k != "frozen"}
    found = checkpoints.restore_last(saved, workdir, trained)
    if found is not None and config.lora is None:
        return found
    start = checkpoints.pad_vocabulary(initial() if callable(initial) else initial, model.config)
    if config.lora is not None:
        start = lora.add(start, model.shapes(), jax.random.key(config.seed))
    # Each array goes to its devices on its own, in the type that it keeps; a copy, for the step donates its state.
    kept = lambda path: np.float32 if config.lora is None or lora.is_trained(path) else model.config.dtype  # noqa: E731
    on_mesh = dict(leaves(sharding.shardings(mesh, start)))
    params = build((path, sharding.put(mesh, np.array(x, kept(path)), on_mesh[path].spec)) for path, x in leaves(start))
    del start
    begin = partial(fresh_state, tx=tx, c=config, dtype=model.config.dtype)
    state = jax.jit(begin, out_shardings=jax.tree.map(lambda x: x.sharding, like), donate_argnums=0)(params)
    if config.lora is not None and not (Path(workdir) / checkpoints.FROZEN).is_dir():
        checkpoints.save_frozen(workdir, state["frozen"])
    if found is None:
        return state, {"example": 0, "truncated": 0}
    restored, position = found
    checkpoints.check_frozen(workdir, int(restored["step"]), state["frozen"])
    return state | restored, position  # what is frozen comes from the base each time


def _steps(config: TrainConfig, source: Source) -> int:
    """The updates of `epochs`. How many examples fill an update is counted on a thousand or so when rows are packed."""
    if not source.size:
        raise BadInput(f"epochs={config.epochs}: the data has no end; give steps")
    each = config.rows
    if config.packed:
        packer, updates = Packer(source, config.rows, config.length, config.max_targets, config.seed), 0
        while packer.state < min(1000, source.size):
            packer.next()
            updates += 1
        each = packer.state / updates
    return max(1, round(config.epochs * source.size / each))


def _finite(workdir, step: int, rows: list[int], step_metrics: dict, tokens: int) -> tuple[dict, int]:
    """The metrics of a step for the log. Raises FloatingPointError when they are not finite."""
    seen = jax.device_get(step_metrics)
    for what, name in (("loss", "total"), ("gradient norm", "gradient_norm")):
        if not np.isfinite(seen[name]):
            raise FloatingPointError(
                f"{workdir}: the {what} of step {step} is {float(seen[name])}; its batch holds the rows {', '.join(map(str, rows))} "
                "of the data, counted from 0. Earlier checkpoints are kept. Mend the rows or lower the learning rate, in another workdir."
            )
    return {k: v for k, v in seen.items() if k != "total"}, tokens


def _place(mesh, batch: Batch, parts: int, packed: bool) -> dict[str, jax.Array]:
    """The batch of an update on the mesh: [B, ...], or in `parts` that are stacked in front, [A, B / A, ...]."""
    out = {}
    for name, x in arrays(batch, packed).items():
        axes = PartitionSpec() if x.ndim == 1 else sharding.BATCH
        if parts > 1:  # every device keeps rows of every part, so row i goes to part i % parts
            x, axes = x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), PartitionSpec(None, *axes)
        out[name] = sharding.put(mesh, x, axes)
    return out


class _StopSignal:
    """Within the block, SIGTERM is noted instead of ending the process (main thread only).

    Of several processes one alone may get the signal: they agree on the step by JAX's preemption service.
    """

    def __init__(self, saved):
        self._saved, self.noted, self._several = saved, False, jax.process_count() > 1

    def caught(self, step: int) -> bool:
        """Whether this is the step to stop at."""
        if self._several:
            self.noted = self._saved.reached_preemption(step)
        return self.noted

    def __enter__(self):
        try:
            self._old = None if self._several else signal.signal(signal.SIGTERM, self._catch)
        except ValueError:  # not in the main thread
            self._old = None
        return self

    def _catch(self, *_):
        self.noted = True
        os.write(2, b"\nSIGTERM: saving a checkpoint before leaving\n")

    def __exit__(self, *_):
        if self._old is not None:
            signal.signal(signal.SIGTERM, self._old)
