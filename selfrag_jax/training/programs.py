"""The compiled programs of a training, made before its first step.

On accelerators an update is one program (step.train_step), which adds up the gradients of its
micro-batches. On a CPU, where a micro-batch takes seconds, each is a call of its own, so that
SIGTERM waits for one micro-batch and not for all of an update; that costs no measurable time
(docs/training.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from selfrag_jax.allocator import KeptBlock
from selfrag_jax.models import sharding
from selfrag_jax.models.llama import Model
from selfrag_jax.training import step
from selfrag_jax.training.config import TrainConfig
from selfrag_jax.training.step import TrainState

_LEAST_KEPT_BLOCK = 2**26  # bytes; smaller temporaries find room anywhere


@dataclass(frozen=True, eq=False)
class Programs:
    """Compiled for one shape of batches, one optimizer and one mesh."""

    update: Callable[..., Any]  # of all micro-batches at once, or of gradients that were added up
    add_gradients: Callable[..., Any] | None  # of one micro-batch; None: `update` does it all
    zeros: Callable[..., Any] | None  # for `add_gradients` to begin with
    evaluate: Callable[..., Any] | None  # the sums of a held-out batch; None: nothing is held out
    is_cpu: bool
    state_bytes: int  # weights and optimizer's state, per device
    saved_bytes: int  # of them, in a checkpoint
    largest_saved: int  # of one array of it
    temp_bytes: int  # the most that a program needs beside them, per device; 0 where not known
    kept_block: KeptBlock  # where the temporaries of a program on a CPU lie


def compile_programs(
    c: TrainConfig, model: Model, tx: optax.GradientTransformation, mesh: Mesh, evaluates: bool
) -> Programs:
    """Returns the programs of a training; those of an equal one in this process are shared."""
    c = replace(c, seed=0, steps=1, epochs=None, save_every=1, log_every=1, mask="each")
    return _compile(replace(c, keep_last=1, keep_best=0), model, tx, mesh, evaluates)


def runs_micro_batches_apart(mesh: Mesh) -> bool:
    """Whether each micro-batch is a call of its own."""
    return mesh.devices.flat[0].platform == "cpu"


@lru_cache(maxsize=8)  # jit's own cache has no programs that were compiled ahead
def _compile(
    c: TrainConfig, model: Model, tx: optax.GradientTransformation, mesh: Mesh, evaluates: bool
) -> Programs:
    is_cpu = mesh.devices.flat[0].platform == "cpu"
    micro_batches = c.micro_batches(mesh)
    state = step.abstract_state(c, model, tx, mesh)
    trained = {k: v for k, v in state.items() if k != "frozen"}
    parts: list[tuple[Any, int]] = []  # programs, and bytes that are there beside the state

    def compiled(function, *arguments, beside: int = 0, **static):
        program = function.lower(*arguments, **static).compile()
        parts.append((program, beside))
        return program

    add_gradients = zeros = None
    with jax.set_mesh(mesh):
        if micro_batches > 1 and runs_micro_batches_apart(mesh):
            sums = _abstract_sums(state, c, model, mesh)
            batch = abstract_batch(replace(c, rows=c.rows // micro_batches), mesh)
            total = jax.ShapeDtypeStruct((), jnp.float32, sharding=_replicated(mesh))
            size, frozen = _bytes(sums), state.get("frozen")
            add_gradients = compiled(
                step.add_gradients, sums, state["params"], frozen, batch, total,
                model=model, chunk=c.loss_chunk, beside=size,
            )  # fmt: skip
            zeros = jax.jit(
                lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums),
                out_shardings=jax.tree.map(lambda x: x.sharding, sums),
            )
            update = compiled(step.apply_gradients, trained, sums, tx=tx, beside=size)
        else:
            batch = abstract_batch(c, mesh, micro_batches)
            update = compiled(step.train_step, state, batch, model, tx, c.loss_chunk)
        evaluate = None
        if evaluates:
            batch = abstract_batch(held_out_config(c, mesh), mesh)
            chunk = held_out_chunk(c, mesh)
            arguments = (state["params"], state.get("frozen"), batch)
            evaluate = compiled(step.evaluate, *arguments, model=model, chunk=chunk)
    temporary = max(_temporary_bytes(program) for program, _ in parts)
    return Programs(
        update, add_gradients, zeros, evaluate, is_cpu, _bytes(state), _bytes(trained),
        max(_bytes(x) for x in jax.tree.leaves(trained)),
        max(_temporary_bytes(program) + beside for program, beside in parts),
        KeptBlock(temporary if is_cpu and temporary >= _LEAST_KEPT_BLOCK else 0),
    )  # fmt: skip


def run_step(
    state: TrainState,
    arrays: dict[str, np.ndarray],
    programs: Programs,
    mesh: Mesh,
    should_stop: Callable[[int], bool],
) -> tuple[TrainState, dict[str, jax.Array] | None]:
    """Returns the state after one update, and the step's metrics, as `step.train_step` does.

    arrays: of the batch, [B, ...], or [A, B / A, ...] with micro-batches (step.split_batch).
    should_stop: called before each micro-batch after the first, with its number. If it returns
        True, the state is returned as it was, and None.
    """
    with programs.kept_block:
        if programs.add_gradients is None or programs.zeros is None:
            return programs.update(state, step.put_batch(mesh, arrays))
        total = np.array(max(arrays["weights"].sum(), 1.0), np.float32)
        on_mesh = sharding.put_on_mesh(mesh, total, PartitionSpec())
        sums, frozen = programs.zeros(), state.get("frozen")
        for i in range(len(arrays["tokens"])):
            if i and should_stop(i):
                return state, None
            part = step.put_batch(mesh, {name: x[i] for name, x in arrays.items()})
            sums = programs.add_gradients(sums, state["params"], frozen, part, on_mesh)
            jax.block_until_ready(sums)
        trained = {k: v for k, v in state.items() if k != "frozen"}
        new, metrics = programs.update(trained, sums)
        return state | new, metrics


# ---- shapes --------------------------------------------------------------------------------------
def held_out_config(c: TrainConfig, mesh: Mesh) -> TrainConfig:
    """Returns the shape of held-out batches: one micro-batch, with a target at every position.

    With `max_targets` a long example could lose targets, and the loss would depend on the batch.
    """
    rows = c.rows // c.micro_batches(mesh)
    return replace(c, rows=rows, rows_per_device=None, max_targets=None, loss_chunk=None)


def held_out_chunk(c: TrainConfig, mesh: Mesh) -> int | None:
    """Returns how many positions of a held-out row have logits at a time: no more than training."""
    if c.max_targets is None:
        return c.loss_chunk
    rows = c.rows // c.micro_batches(mesh)
    most = max(1, (c.loss_chunk or c.max_targets) // rows)
    return next(n for n in range(min(most, c.length), 0, -1) if c.length % n == 0)


def abstract_batch(
    c: TrainConfig, mesh: Mesh, micro_batches: int = 1
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the arrays of a batch as jax.ShapeDtypeStructs, as `step.put_batch` places them."""
    shapes: dict[str, tuple[tuple[int, ...], Any]]
    shapes = dict.fromkeys(("tokens", "positions"), ((c.rows, c.length), np.int32))
    if c.packed:
        shapes["doc_ids"] = (c.rows, c.length), np.int32
    targets = (c.rows, c.length) if c.max_targets is None else (c.max_targets,)
    if c.max_targets is not None:
        shapes["loss_index"] = targets, np.int32
    types = {"targets": np.int32, "weights": np.float32, "groups": np.int8}
    shapes |= {name: (targets, dtype) for name, dtype in types.items()}
    out = {}
    for name, (shape, dtype) in shapes.items():
        axes = step.batch_axes(len(shape))
        if micro_batches > 1:
            shape = micro_batches, shape[0] // micro_batches, *shape[1:]
            axes = PartitionSpec(None, *axes)
        out[name] = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, axes))
    return out


def _abstract_sums(state: TrainState, c: TrainConfig, model: Model, mesh: Mesh):
    """Returns what `step.add_gradients` adds up: the loss, the sums per group, the gradients."""
    shapes = jax.eval_shape(step.no_sums)
    sums = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_replicated(mesh)), shapes
    )
    return sums, state["params"]


def _replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


# ---- memory --------------------------------------------------------------------------------------
def _bytes(tree: Any) -> int:
    """Returns the bytes of abstract arrays that one device holds."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def _temporary_bytes(program: Any) -> int:
    """Returns the bytes of a program beside its arguments; 0 if the backend does not tell."""
    memory = program.memory_analysis()
    if memory is None:
        return 0
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.temp_size_in_bytes + max(0, outputs)
