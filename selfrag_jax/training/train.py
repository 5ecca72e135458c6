"""One linear trainer for every model of the project: base model, critic, generator, baselines.

A jitted step over a mesh, gradients by jax.value_and_grad, updates by optax, checkpoints by Orbax. Killed and started
again it continues from the last checkpoint, with the batches it would have seen.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from selfrag_jax.checkpoints import saving, vocabulary_rows, workdirs
from selfrag_jax.data.batches import Packer, Source
from selfrag_jax.errors import UserError
from selfrag_jax.models import lora, roofline, sharding
from selfrag_jax.models.llama import Model
from selfrag_jax.models.params import Params, flatten, unflatten
from selfrag_jax.progress import progress
from selfrag_jax.text.tokenizer import Tokenizer
from selfrag_jax.training import optimizer
from selfrag_jax.training.config import TrainConfig
from selfrag_jax.training.log import TrainingLog
from selfrag_jax.training.step import batch_on_mesh, fresh_state, state_like, train_step
from selfrag_jax.training.stop_signal import StopSignal


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
    tx = optimizer.make_optimizer(config.optimizer, steps, new_rows, model.config.vocab_padding)
    Path(workdir).mkdir(parents=True, exist_ok=True)
    is_main_process = (
        jax.process_index() == 0
    )  # of several processes, the one that writes and reports
    saved = saving.checkpoint_manager(workdir, config.keep_last, config.keep_best)
    state, position = _begin_or_resume(config, model, tx, mesh, initial, saved, workdir)
    if is_main_process:
        workdirs.write_architecture(
            workdir, replace(model.config, remat="none", attention="auto"), tokenizer
        )
    packer = Packer(
        source,
        config.rows,
        config.length,
        config.max_targets,
        config.seed,
        position["example"],
        packed=config.packed,
    )
    truncated = position["truncated"]

    peak = roofline.chip(mesh.devices.flat[0].device_kind)
    targets = (
        1.0 if config.max_targets is None else config.max_targets / (config.rows * config.length)
    )
    cost = roofline.train_flops_per_token(model.config, config.length, targets)
    log = TrainingLog(
        workdir,
        cost / (peak.bf16_flops * mesh.size) if peak else None,
        position.get("loss", (0.0, 0.0)),
    )
    first, stop = int(state["step"]), StopSignal(saved)
    # A signal is caught until the last checkpoint is written.
    with (
        jax.set_mesh(mesh),
        stop,
        saving.writing_checkpoints(saved, workdir),
        progress(name, steps, "steps", first, is_main_process) as bar,
    ):
        unseen = None  # the last step's metrics: looked at when the next one is on its way, so that the device never waits
        for step in range(first, steps):
            at = packer.state
            batch = packer.next()
            truncated += batch.truncated
            state, step_metrics = train_step(
                state,
                batch_on_mesh(mesh, batch, parts, config.packed),
                model,
                tx,
                config.loss_chunk,
            )
            if unseen is not None:
                log.add(*_finite(workdir, *unseen))
            unseen = (
                step,
                packer.rows_of(at, packer.state),
                step_metrics,
                int((batch.doc_ids > 0).sum()),
            )
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
                loss = (
                    workdirs.NO_LOSS
                    if stopping and done % config.save_every and done != steps
                    else log.loss_since_save()
                )
                saving.save_checkpoint(
                    saved, done, state, position | {"loss": log.since_save}, loss
                )
            if stopping:
                break
    log.close()
    if stop.noted:
        raise SystemExit(143)
    if is_main_process and truncated:
        print(
            f"{name}: {truncated} of {packer.state} examples were longer than there was room for, and were cut",
            file=sys.stderr,
        )
    params = (
        state["params"]
        if config.lora is None
        else lora.join_trained(state["params"], state["frozen"])
    )
    return {"params": params, "steps": steps, "examples": packer.state, "truncated": truncated}


def _begin_or_resume(
    config: TrainConfig,
    model: Model,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    initial,
    saved,
    workdir,
) -> tuple[dict[str, Any], dict[str, int]]:
    """The state on the mesh, and the position in the data: of the last checkpoint, or of the beginning."""
    like = state_like(config, model, tx, mesh)
    trained = {k: v for k, v in like.items() if k != "frozen"}
    found = saving.restore_last(saved, workdir, trained)
    if found is not None and config.lora is None:
        return found
    start = vocabulary_rows.pad_vocabulary(
        initial() if callable(initial) else initial, model.config
    )
    if config.lora is not None:
        start = lora.add_adapters(start, model.shapes(), jax.random.key(config.seed))
    # Each array goes to its devices on its own, in the type that it keeps; a copy, for the step donates its state.
    kept = lambda path: (
        np.float32 if config.lora is None or lora.is_trained(path) else model.config.dtype
    )  # noqa: E731
    on_mesh = dict(flatten(sharding.shardings(mesh, start)))
    params = unflatten(
        (path, sharding.put_on_mesh(mesh, np.array(x, kept(path)), on_mesh[path].spec))
        for path, x in flatten(start)
    )
    del start
    begin = partial(fresh_state, tx=tx, c=config, dtype=model.config.dtype)
    state = jax.jit(
        begin, out_shardings=jax.tree.map(lambda x: x.sharding, like), donate_argnums=0
    )(params)
    if config.lora is not None and not (Path(workdir) / workdirs.FROZEN).is_dir():
        saving.save_frozen(workdir, state["frozen"])
    if found is None:
        return state, {"example": 0, "truncated": 0}
    restored, position = found
    saving.check_frozen(workdir, int(restored["step"]), state["frozen"])
    return state | restored, position  # what is frozen comes from the base each time


def _steps(config: TrainConfig, source: Source) -> int:
    """The updates of `epochs`. How many examples fill an update is counted on a thousand or so when rows are packed."""
    if not source.size:
        raise UserError(f"epochs={config.epochs}: the data has no end; give steps")
    each = config.rows
    if config.packed:
        packer, updates = (
            Packer(source, config.rows, config.length, config.max_targets, config.seed),
            0,
        )
        while packer.state < min(1000, source.size):
            packer.next()
            updates += 1
        each = packer.state / updates
    return max(1, round(config.epochs * source.size / each))


def _finite(
    workdir, step: int, rows: list[int], step_metrics: dict, tokens: int
) -> tuple[dict, int]:
    """The metrics of a step for the log. Raises FloatingPointError when they are not finite."""
    seen = jax.device_get(step_metrics)
    for what, name in (("loss", "total"), ("gradient norm", "gradient_norm")):
        if not np.isfinite(seen[name]):
            raise FloatingPointError(
                f"{workdir}: the {what} of step {step} is {float(seen[name])}; its batch holds the rows {', '.join(map(str, rows))} "
                "of the data, counted from 0. Earlier checkpoints are kept. Mend the rows or lower the learning rate, in another workdir."
            )
    return {k: v for k, v in seen.items() if k != "total"}, tokens
