"""The state that training begins with: that of the last checkpoint, or of the starting model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from selfrag_jax.allocator import return_freed_memory
from selfrag_jax.checkpoints import saving, vocabulary_rows, workdirs
from selfrag_jax.models import lora, sharding
from selfrag_jax.models.llama import Model
from selfrag_jax.models.params import Params, flatten, unflatten
from selfrag_jax.storage.paths import as_path
from selfrag_jax.training.config import TrainConfig
from selfrag_jax.training.step import TrainState, abstract_state, initial_state

if TYPE_CHECKING:
    import orbax.checkpoint as ocp


def begin_or_resume(
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
    del params
    return_freed_memory()  # of copies on the way
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
    on_mesh = dict(flatten(sharding.shardings(mesh, params)))
    leaves = list(flatten(params))[::-1]
    del params, initial  # the arrays are in `leaves` alone, where nobody else has them

    def dtype(path: tuple[str, ...]):
        trained = config.lora is None or lora.is_trained(path)
        return np.float32 if trained else model.config.dtype

    def moved():
        # Array by array, each in its final type, and the host's copy is freed. Always a copy, as
        # the step donates its state.
        while leaves:
            path, x = leaves.pop()
            x = np.array(x, dtype(path))
            yield path, sharding.put_on_mesh(mesh, x, on_mesh[path].spec)

    return unflatten(moved())
