"""Optimizers and schedules: AdamW for the paper's recipes, Muon for small models trained from scratch.

Muon (Jordan et al., 2024) orthogonalises the update of each weight matrix. The layers of a stack share one array
[L, inputs, outputs], of which every layer is orthogonalised on its own; embeddings and norms take Adam.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import jax
import optax

from selfrag_jax.records import BadInput


@dataclass(frozen=True)
class OptimizerConfig:
    name: str  # "adamw" or "muon"
    learning_rate: float  # peak; with muon, of the matrices
    adam_learning_rate: float  # with muon, of everything else
    schedule: str  # after the warm-up: "linear", "cosine" or "constant"
    warmup_fraction: float  # of the steps
    adam_warmup_fraction: float  # with muon, of everything else
    weight_decay: float
    clip: float  # global gradient norm

    def __post_init__(self):
        for field, known in (("name", ("adamw", "muon")), ("schedule", ("linear", "cosine", "constant"))):
            if getattr(self, field) not in known:
                raise BadInput(f"optimizer.{field}={getattr(self, field)!r}: must be one of {', '.join(known)}")


def schedule(name: str, peak: float, warmup_fraction: float, steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then the named decay to 0 at `steps`."""
    warmup = max(1, round(warmup_fraction * steps))
    decay = {
        "linear": optax.linear_schedule(peak, 0.0, max(1, steps - warmup)),
        "cosine": optax.cosine_decay_schedule(peak, max(1, steps - warmup)),
        "constant": optax.constant_schedule(peak),
    }[name]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup])


@lru_cache
def make(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The same object for the same arguments, so that fine-tunes of equal shape share one compiled step."""
    rate = schedule(config.schedule, config.learning_rate, config.warmup_fraction, steps)
    if config.name == "adamw":
        inner = optax.adamw(rate, b1=0.9, b2=0.999, weight_decay=config.weight_decay)
    else:

        def dimensions(params):
            return jax.tree.map(
                lambda x: optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2) if x.ndim == 3 else None,
                params,
            )

        inner = optax.contrib.muon(
            rate,
            adam_learning_rate=schedule(config.schedule, config.adam_learning_rate, config.adam_warmup_fraction, steps),
            weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=dimensions,
        )
    return optax.chain(optax.clip_by_global_norm(config.clip), inner)
