"""One straight-line training loop for every model: base model, critic, generator, baselines.

A jitted step over a mesh, gradients by jax.value_and_grad, updates by optax, checkpoints by Orbax.
A training that was killed continues from its last checkpoint, with the batches that it would have
seen. `train` reads from top to bottom, in numbered steps.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from selfrag_jax.checkpoints import saving, vocabulary_rows, workdirs
from selfrag_jax.data.batches import Packer, Source
from selfrag_jax.errors import UserError
from selfrag_jax.models import lora, roofline, sharding
from selfrag_jax.models.llama import LlamaConfig, Model
from selfrag_jax.models.params import Params, flatten, unflatten
from selfrag_jax.profiling import Profile
from selfrag_jax.progress import progress
from selfrag_jax.storage.paths import as_path
from selfrag_jax.text.tokenizer import Tokenizer
from selfrag_jax.training import optimizer
from selfrag_jax.training.config import TrainConfig
from selfrag_jax.training.log import TrainingLog
from selfrag_jax.training.step import (
    TrainState,
    abstract_state,
    batch_on_mesh,
    initial_state,
    train_step,
)
from selfrag_jax.training.stop_signal import StopSignal

if TYPE_CHECKING:
    import orbax.checkpoint as ocp


def train(
    config: TrainConfig,
    base: Model,
    initial: Params | Callable[[], Params],
    source: Source,
    tokenizer: Tokenizer,
    workdir: str | Path,
    name: str = "train",
    new_rows: int = 0,
    profile: int = 0,
) -> dict[str, Any]:
    """Trains from `initial`, or from the last checkpoint in `workdir`; returns params and counts.

    initial: parameters of `base`, or a function that returns them. It is called only if no
    checkpoint has everything, and the caller need not hold the parameters.
    new_rows: number of tokens that were just added to the vocabulary.
    profile: number of steps to trace into `workdir/profile`; the main process does.

    SIGTERM saves a checkpoint and exits with status 143. Raises FloatingPointError with step and
    examples if the loss or a gradient is not finite; earlier checkpoints are kept.
    """
    # ---- 1. Mesh ---------------------------------------------------------------------------------
    mesh = config.make_mesh()
    micro_batches = config.micro_batches(mesh)
    is_main_process = jax.process_index() == 0  # the one that writes and reports

    # ---- 2. Model and optimizer ------------------------------------------------------------------
    model = config.model(base.config)
    steps = _num_steps(config, source)
    tx = optimizer.make_optimizer(config.optimizer, steps, new_rows, model.config.vocab_padding)

    # ---- 3. State: begin or resume ---------------------------------------------------------------
    manager = saving.checkpoint_manager(workdir, config.keep_last, config.keep_best)
    state, position = _begin_or_resume(config, model, tx, mesh, initial, manager, workdir)
    _write_architecture(workdir, model.config, tokenizer)

    # ---- 4. Data and log -------------------------------------------------------------------------
    packer = _make_packer(config, source, position["example"])
    truncated = position["truncated"]
    log = _make_log(config, model.config, mesh, workdir, position)

    # ---- 5. Loop ---------------------------------------------------------------------------------
    # A step's metrics are read when the next step has been dispatched, so the device never waits.
    pending_metrics: _PendingMetrics | None = None
    first = int(state["step"])
    with (
        jax.set_mesh(mesh),
        StopSignal(manager) as stop,  # catches SIGTERM until the last checkpoint is written
        saving.writing_checkpoints(manager, workdir),
        progress(name, steps, "steps", first, is_main_process) as bar,
        Profile(as_path(workdir) / "profile", profile if is_main_process else 0) as traced,
    ):
        for step in range(first, steps):
            example = packer.state
            batch = packer.next()
            truncated += batch.truncated
            arrays = batch_on_mesh(mesh, batch, micro_batches, config.packed)
            with traced.step(step, state):
                state, metrics = train_step(state, arrays, model, tx, config.loss_chunk)
            _log_finite(log, pending_metrics, workdir)
            rows, tokens = packer.source_rows(example, packer.state), int((batch.doc_ids > 0).sum())
            pending_metrics = _PendingMetrics(step, rows, tokens, metrics)

            done = step + 1
            stopping = stop.should_stop(done)
            interval_ends = done % config.save_every == 0 or done == steps
            reports = done % config.log_every == 0 or done == steps
            if interval_ends or stopping or reports:
                _log_finite(log, pending_metrics, workdir)
                pending_metrics = None
            bar.advance(note=log.report(done) if reports else "")
            if interval_ends or stopping:
                _save(manager, done, state, (packer.state, truncated), log, interval_ends)
            if stopping:
                break

    # ---- 6. Finish -------------------------------------------------------------------------------
    log.close()
    if stop.received:
        raise SystemExit(143)
    return _result(name, state, steps, packer.state, truncated)


def _save(
    manager: ocp.CheckpointManager,
    done: int,
    state: dict[str, Any],
    position: tuple[int, int],
    log: TrainingLog,
    interval_ends: bool,
) -> None:
    """Saves a checkpoint. position: the next example, and how many were truncated so far."""
    # A SIGTERM checkpoint covers too few steps for its loss to compete for "best"; the interval
    # continues when training resumes.
    loss = log.loss_since_save() if interval_ends else workdirs.NO_LOSS
    # Read after `loss_since_save`, which begins a new interval.
    example, truncated = position
    saved = {"example": example, "truncated": truncated, "loss": log.since_save}
    saving.save_checkpoint(manager, done, state, saved, loss)


def _num_steps(config: TrainConfig, source: Source) -> int:
    """Returns the number of updates, `steps` or those of `epochs`.

    With packing, the examples per update are measured on the first thousand or so.
    """
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None  # TrainConfig has checked this
    if not source.size:
        raise UserError(f"epochs={config.epochs}: the data has no end; give steps")
    examples_per_update: float = config.rows
    if config.packed:
        packer, updates = _make_packer(config, source), 0
        while packer.state < min(1000, source.size):
            packer.next()
            updates += 1
        examples_per_update = packer.state / updates
    return max(1, round(config.epochs * source.size / examples_per_update))


def _make_packer(c: TrainConfig, source: Source, state: int = 0) -> Packer:
    return Packer(source, c.rows, c.length, c.max_targets, c.seed, state, c.packed)


def _begin_or_resume(
    config: TrainConfig,
    model: Model,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    initial: Params | Callable[[], Params],
    manager: ocp.CheckpointManager,
    workdir: str | Path,
) -> tuple[TrainState, dict[str, Any]]:
    """Returns the state on the mesh and the position in the data.

    Both are those of the last checkpoint if there is one, else those of the beginning. With LoRA a
    checkpoint has no frozen parameters: they come from `initial` each time.
    """
    abstract = abstract_state(config, model, tx, mesh)
    saved_part = {k: v for k, v in abstract.items() if k != "frozen"}
    restored = saving.restore_last(manager, workdir, saved_part)
    if restored is not None and config.lora is None:
        return restored
    params = _initial_params(config, model, mesh, initial)
    make = partial(initial_state, tx=tx, c=config, dtype=model.config.dtype)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    state = jax.jit(make, out_shardings=shardings, donate_argnums=0)(params)
    if config.lora is not None and not (as_path(workdir) / workdirs.FROZEN).is_dir():
        saving.save_frozen(workdir, state["frozen"])
    if restored is None:
        return state, {"example": 0, "truncated": 0}
    trained, position = restored
    saving.check_frozen(workdir, int(trained["step"]), state["frozen"])
    return state | trained, position


def _initial_params(
    config: TrainConfig, model: Model, mesh: Mesh, initial: Params | Callable[[], Params]
) -> Params:
    """Returns the initial parameters on the mesh: padded and, with LoRA, with adapters."""
    params = initial() if callable(initial) else initial
    params = vocabulary_rows.pad_vocabulary(params, model.config)
    if config.lora is not None:
        params = lora.add_adapters(params, model.shapes(), jax.random.key(config.seed))

    def dtype(path: tuple[str, ...]):
        trained = config.lora is None or lora.is_trained(path)
        return np.float32 if trained else model.config.dtype

    # Array by array, each in its final type. Always a copy, as the step donates its state.
    on_mesh = dict(flatten(sharding.shardings(mesh, params)))
    return unflatten(
        (path, sharding.put_on_mesh(mesh, np.array(x, dtype(path)), on_mesh[path].spec))
        for path, x in flatten(params)
    )


def _peak_seconds_per_token(config: TrainConfig, c: LlamaConfig, mesh: Mesh) -> float | None:
    """Returns the time that a token would take at the devices' peak rate; None if it is unknown."""
    peak = roofline.chip(mesh.devices.flat[0].device_kind)
    if not peak:
        return None
    targets = 1.0
    if config.max_targets is not None:
        targets = config.max_targets / (config.rows * config.length)
    flops = roofline.train_flops_per_token(c, config.length, targets)
    return flops / (peak.bf16_flops * mesh.size)


def _make_log(
    config: TrainConfig,
    c: LlamaConfig,
    mesh: Mesh,
    workdir: str | Path,
    position: dict[str, Any],
) -> TrainingLog:
    peak = _peak_seconds_per_token(config, c, mesh)
    return TrainingLog(workdir, peak, position.get("loss", (0.0, 0.0)))


def _write_architecture(workdir: str | Path, c: LlamaConfig, tokenizer: Tokenizer) -> None:
    """Writes model.json and the tokenizer; of several processes, the main one does."""
    if jax.process_index() != 0:
        return
    # remat and attention concern this training alone.
    workdirs.write_architecture(workdir, replace(c, remat="none", attention="auto"), tokenizer)


def _all_params(state: TrainState) -> Params:
    if "frozen" not in state:
        return state["params"]
    return lora.join_trained(state["params"], state["frozen"])


def _result(
    name: str, state: TrainState, steps: int, examples: int, truncated: int
) -> dict[str, Any]:
    """Returns the parameters and the counts; says on stderr if examples were truncated."""
    if truncated and jax.process_index() == 0:
        print(
            f"{name}: {truncated} of {examples} examples did not fit and were truncated",
            file=sys.stderr,
        )
    counts = {"steps": steps, "examples": examples, "truncated": truncated}
    return {"params": _all_params(state), **counts}


@dataclass(frozen=True)
class _PendingMetrics:
    """The metrics of a step that the device may still be computing."""

    step: int
    rows: list[int]  # of the data, in the step's batch
    tokens: int  # in the batch, without padding
    metrics: dict[str, jax.Array]


def _log_finite(log: TrainingLog, pending: _PendingMetrics | None, workdir: str | Path) -> None:
    """Waits for the metrics of a step, if there are any, and logs them.

    Raises FloatingPointError if the loss or the gradient norm is not finite.
    """
    if pending is None:
        return
    metrics = jax.device_get(pending.metrics)
    for what, key in (("loss", "total"), ("gradient norm", "gradient_norm")):
        if not np.isfinite(metrics[key]):
            raise FloatingPointError(
                f"{workdir}: the {what} of step {pending.step} is {float(metrics[key])}; its batch "
                f"holds the rows {', '.join(map(str, pending.rows))} of the data, counted from 0. "
                "Earlier checkpoints are kept. Fix the rows or lower the learning rate, and train "
                "in another workdir."
            )
    log.add({k: v for k, v in metrics.items() if k != "total"}, pending.tokens)
