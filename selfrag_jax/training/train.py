"""One straight-line training loop for every model: base model, critic, generator, baselines.

Jitted steps over a mesh, gradients by jax.value_and_grad, updates by optax, checkpoints by Orbax. A
training that was killed continues from its last checkpoint, with the batches that it would have
seen. `train` reads from top to bottom, in numbered steps.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh

from selfrag_jax.allocator import return_freed_memory
from selfrag_jax.checkpoints import saving, workdirs
from selfrag_jax.data.batches import Packer, Source
from selfrag_jax.models import lora, roofline
from selfrag_jax.models.llama import LlamaConfig, Model
from selfrag_jax.models.params import Params
from selfrag_jax.profiling import Profile
from selfrag_jax.progress import Progress, progress, say, waiting
from selfrag_jax.storage.paths import as_path, is_remote
from selfrag_jax.text.tokenizer import Tokenizer
from selfrag_jax.training import held_out, length, memory, optimizer
from selfrag_jax.training.beginning import begin_or_resume
from selfrag_jax.training.config import TrainConfig
from selfrag_jax.training.log import TrainingLog
from selfrag_jax.training.pending import PendingMetrics
from selfrag_jax.training.programs import Programs, compile_programs, run_step
from selfrag_jax.training.step import TrainState, batch_arrays, split_batch
from selfrag_jax.training.stop_signal import StopSignal

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

_SMALL_CHECKPOINT = 2**26  # bytes that a copy of may always exist
_UNMEASURED = {"unmeasured": True}  # the held-out loss is to be measured on resuming


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
    held_out_source: Source | None = None,
) -> dict[str, Any]:
    """Trains from `initial`, or from the last checkpoint in `workdir`; returns params and counts.

    initial: parameters of `base`, or a function that returns them. It is called only if no
    checkpoint has everything, and the caller need not hold the parameters.
    new_rows: number of tokens that were just added to the vocabulary.
    profile: number of steps to trace into `workdir/profile`; the main process does.
    held_out_source: rows to measure the model on whenever a checkpoint is saved; their loss then
    decides which checkpoint is the best.

    SIGTERM saves a checkpoint and exits with status 143. Raises FloatingPointError with step and
    examples if the loss or a gradient is not finite; earlier checkpoints are kept.
    """
    # ---- 1. Mesh ---------------------------------------------------------------------------------
    mesh = config.make_mesh()
    is_main_process = jax.process_index() == 0  # the one that writes and reports

    # ---- 2. Model and optimizer ------------------------------------------------------------------
    model = config.model(base.config)
    steps = length.num_steps(config, source)
    tx = optimizer.make_optimizer(config.optimizer, steps, new_rows, model.config.vocab_padding)

    with StopSignal() as stop:  # catches SIGTERM until the last checkpoint is written
        # ---- 3. Programs -------------------------------------------------------------------------
        with waiting(name, "compiles the training step", is_main_process):
            programs = compile_programs(config, model, tx, mesh, held_out_source is not None)
        resumes_all = config.lora is None and bool(workdirs.saved_steps(workdir))
        # On a CPU a large checkpoint is written before training goes on: no copy of it is needed,
        # and writing takes the same cores.
        waits = programs.is_cpu and programs.saved_bytes > _SMALL_CHECKPOINT
        waits = waits and not is_remote(workdir)
        copied = 0 if waits else programs.saved_bytes
        freed = 0 if resumes_all else 4 * roofline.num_weights(base.config)  # the base, in f32
        memory.report(name, programs, copied, freed, is_main_process)

        # ---- 4. State: begin or resume -----------------------------------------------------------
        in_turn = programs.largest_saved if waits else None
        manager = saving.checkpoint_manager(workdir, config.keep_last, config.keep_best, in_turn)
        with waiting(name, "puts the model in place", is_main_process):
            state, position = begin_or_resume(config, model, tx, mesh, initial, manager, workdir)
        _write_architecture(workdir, model.config, tokenizer)

        # ---- 5. Data and log ---------------------------------------------------------------------
        packer = length.make_packer(config, source, position["example"])
        log = _make_log(config, model.config, mesh, workdir, position)
        run = _Run(config, mesh, programs, manager, workdir, log, stop, held_out_source, waits)
        say(name, length.describe(config, source, steps, int(state["step"])), is_main_process)

        # ---- 6. Loop -----------------------------------------------------------------------------
        with (
            jax.set_mesh(mesh),
            saving.writing_checkpoints(manager, workdir),
            progress(name, steps, "steps", int(state["step"]), is_main_process) as bar,
            Profile(as_path(workdir) / "profile", profile if is_main_process else 0) as traced,
        ):
            state, position = _loop(run, packer, state, position, steps, bar, traced)

    # ---- 7. Finish -------------------------------------------------------------------------------
    log.close()
    programs.kept_block.give_up()
    if stop.received:
        raise SystemExit(143)
    run.say_which_is_best(name)
    return _result(name, state, steps, position["example"], position["truncated"])


def _loop(
    run: _Run,
    packer: Packer,
    state: TrainState,
    position: dict[str, Any],
    steps: int,
    bar: Progress,
    traced: Profile,
) -> tuple[TrainState, dict[str, Any]]:
    """Returns the state after `steps` steps, or where SIGTERM came, and the position in the data.

    Either way a checkpoint of it was saved.
    """
    c, log, stop, programs = run.config, run.log, run.stop, run.programs
    micro_batches = c.micro_batches(run.mesh)
    pending = PendingMetrics(log, run.workdir, programs.kept_block)
    done = saved = int(state["step"])
    return_freed_memory()  # what compiling and saving the frozen weights took
    run.measure_late(position, done, state)
    stop.begin()
    for step in range(done, steps):
        batch = packer.next()
        arrays = split_batch(batch_arrays(batch, c.packed), micro_batches)
        if programs.is_cpu:  # two steps at once would need the memory of two
            pending.flush()
        with traced.step(step, state):
            should_stop = run.stops_in(step * micro_batches)
            state, metrics = run_step(state, arrays, programs, run.mesh, should_stop)
        if metrics is None:  # stopped between micro-batches: this step was not done
            break
        rows = packer.source_rows(position["example"], packer.state)
        pending.put(step, rows, int((batch.doc_ids > 0).sum()), metrics)
        truncated = position["truncated"] + batch.truncated
        done, position = step + 1, {"example": packer.state, "truncated": truncated}

        stopping = stop.should_stop(done * micro_batches)
        interval_ends = done % c.save_every == 0 or done == steps
        reports = done % c.log_every == 0 or done == steps
        if interval_ends or stopping or reports:
            pending.flush()
        loss = run.measure(done, state) if interval_ends else None
        bar.advance(note=log.report(done) if reports else "")
        if interval_ends:
            _save(run, done, state, position | ({} if loss is not None else _UNMEASURED), loss)
            saved = done
        if stop.received:
            break
    if stop.received and saved < done:
        pending.flush()
        # It covers too few steps for its loss to compete for "best"; the interval continues when
        # training resumes.
        _save(run, done, state, position, None)
    return state, position


@dataclass(frozen=True)
class _Run:
    """What the loop needs beside the state."""

    config: TrainConfig
    mesh: Mesh
    programs: Programs
    manager: ocp.CheckpointManager
    workdir: str | Path
    log: TrainingLog
    stop: StopSignal
    held_out: Source | None
    waits: bool  # until a checkpoint is written

    def stops_in(self, count: int) -> Callable[[int], bool]:
        """Returns what `run_step` asks between micro-batches, the first of which has `count`."""
        return lambda i: self.stop.should_stop(count + i)

    def measure(self, done: int, state: TrainState) -> float | None:
        """Returns the loss by which the checkpoint at the end of an interval competes.

        It is that of the held-out rows, if there are any, and None if SIGTERM interrupted it; else
        training's since the last call.
        """
        loss = self.log.loss_since_save()
        if self.held_out is None:
            return loss
        start = time.monotonic()
        sums = held_out.evaluate(
            state, self.held_out, self.config, self.programs, self.mesh, lambda: self.stop.received
        )
        if sums is None:
            return None
        self.log.add_held_out(done, sums)
        self.log.pause(time.monotonic() - start)
        return held_out.mean_loss(sums)

    def measure_late(self, position: dict[str, Any], done: int, state: TrainState) -> None:
        """Measures the checkpoint to resume from, if SIGTERM had come before that was done."""
        if not position.get("unmeasured") or self.held_out is None:
            return
        since_save = self.log.since_save
        loss = self.measure(done, state)
        self.log.since_save = since_save
        if loss is not None:
            saving.set_loss(self.manager, self.workdir, done, loss)

    def say_which_is_best(self, name: str) -> None:
        if self.held_out is None or jax.process_index() != 0:
            return
        [best] = workdirs.candidate_steps(self.workdir, "best")
        file = workdirs.checkpoint_folder(self.workdir, best) / "metrics" / "metrics"
        loss = workdirs.read_loss(file)
        say(name, f"lowest held-out loss: {loss:.4f} at step {best} (--step=best)")


def _save(
    run: _Run, done: int, state: TrainState, position: dict[str, Any], loss: float | None
) -> None:
    """Saves a checkpoint. loss: what it competes by for "best"; None: it cannot be the best."""
    if run.waits:
        run.programs.kept_block.give_up()  # writing takes memory, too
    saved = position | {"loss": run.log.since_save}
    loss = workdirs.NO_LOSS if loss is None else loss
    saving.save_checkpoint(run.manager, done, state, saved, loss)
    if run.waits:
        return_freed_memory()


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
