"""The loss on held-out rows: the exact mean of each group, whatever the batches are."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from selfrag_jax.data.batches import Packer, Source
from selfrag_jax.training import step
from selfrag_jax.training.config import TrainConfig
from selfrag_jax.training.programs import Programs, held_out_config
from selfrag_jax.training.step import TrainState

# Of loss, correct predictions and targets, per loss group [G], over all held-out rows.
HeldOutSums = dict[str, np.ndarray]


def evaluate(
    state: TrainState,
    source: Source,
    c: TrainConfig,
    programs: Programs,
    mesh: Mesh,
    is_interrupted: Callable[[], bool],
) -> HeldOutSums | None:
    """Returns the sums over all rows of `source`, each of which counts once; None if interrupted.

    Rows are packed and cut as training's are. The last batch is filled with rows without targets.
    """
    assert programs.evaluate is not None
    shape = held_out_config(c, mesh)
    packer = Packer(source, shape.rows, c.length, None, c.seed, 0, c.packed, source.size)
    totals: HeldOutSums = {}
    pending = None  # of the batch that the device may still be computing
    while pending is not None or packer.state < source.size:
        arrays = None
        if packer.state < source.size:
            arrays = step.put_batch(mesh, step.batch_arrays(packer.next(), c.packed))
        if pending is not None:
            for name, value in jax.device_get(pending).items():  # in f64, over many batches
                totals[name] = totals.get(name, 0.0) + np.asarray(value, np.float64)
            programs.kept_block.hold()
        if is_interrupted():
            return None
        pending = None
        if arrays is not None:
            with programs.kept_block:
                pending = programs.evaluate(state["params"], state.get("frozen"), arrays)
    return totals


def mean_loss(sums: HeldOutSums) -> float:
    """Returns the mean loss per target of all groups, by which checkpoints compete."""
    return float(sums["loss"].sum() / max(sums["count"].sum(), 1))
