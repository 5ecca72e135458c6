"""Optimizers and schedules: AdamW for the paper's recipes, Muon for small models trained from scratch.

Muon (Jordan et al., 2024) orthogonalises the update of each weight matrix. The layers of a stack share one array
[L, inputs, outputs], of which every layer is orthogonalised on its own; embeddings and norms take Adam.

Adam divides by the size of the gradient, so that a word which a batch does not hold moves as fast as the others, driven
by the noise of its softmax gradient. A small pretrained model survives a short fine-tune only with an `adam_eps` above
that noise, and with a low rate for everything but the rows of new tokens, which have far to go (`new_rows_factor`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
import optax

from selfrag_jax.errors import UserError


@dataclass(frozen=True)
class OptimizerConfig:
    name: str  # "adamw", "adafactor" or "muon"
    learning_rate: float  # peak; with muon, of the matrices
    adam_learning_rate: float  # with muon, of everything else
    schedule: str  # after the warm-up: "linear", "cosine" or "constant"
    warmup_fraction: float  # of the steps
    adam_eps: float  # entries whose gradient is far below it hardly move (with muon: under the root, squared)
    weight_decay: float
    clip: float  # global gradient norm
    new_rows_factor: float = (
        1.0  # on the rate of the rows that the embedding was grown by; they have the farthest to go
    )

    def __post_init__(self):
        for field, known in (
            ("name", ("adamw", "adafactor", "muon")),
            ("schedule", ("linear", "cosine", "constant")),
        ):
            if getattr(self, field) not in known:
                raise UserError(
                    f"optimizer.{field}={getattr(self, field)!r}: must be one of {', '.join(known)}"
                )
        for field in ("learning_rate", "adam_learning_rate", "adam_eps", "new_rows_factor", "clip"):
            if not 0 < getattr(self, field) < float("inf"):
                raise UserError(f"optimizer.{field}={getattr(self, field)!r}: must be above 0")
        if not 0 <= self.warmup_fraction < 1:
            raise UserError(
                f"optimizer.warmup_fraction={self.warmup_fraction!r}: must be from 0 up to 1, of the steps"
            )
        if not 0 <= self.weight_decay < float("inf"):
            raise UserError(f"optimizer.weight_decay={self.weight_decay!r}: must be 0 or above")


def schedule(name: str, peak: float, warmup_fraction: float, steps: int) -> optax.Schedule:
    """Linear warm-up from 0, if there is any, then the named decay to 0 at `steps`."""
    warmup = min(steps - 1, max(1, round(warmup_fraction * steps))) if warmup_fraction > 0 else 0
    decay = {
        "linear": optax.linear_schedule(peak, 0.0, max(1, steps - warmup)),
        "cosine": optax.cosine_decay_schedule(peak, max(1, steps - warmup)),
        "constant": optax.constant_schedule(peak),
    }[name]
    if warmup <= 0:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup])


def _clip(limit: float) -> optax.GradientTransformation:
    """Scales gradients to a global norm of `limit` at most. By one factor, which every reader multiplies by: optax's own chooses
    between two arrays, for which XLA writes all gradients once more."""

    def scale(updates, _):
        factor = jnp.minimum(1.0, limit / optax.tree.norm(updates))
        return jax.tree.map(lambda x: (x * factor).astype(x.dtype), updates)

    return optax.stateless(scale)


def _faster_rows(factor: float, new: int, padding: int) -> optax.GradientTransformation:
    """Multiplies the updates of the last `new` rows of the vocabulary, behind which there are `padding` more."""

    def scale(path, update):
        axis = {"embed": 0, "head": 1}.get(path[0].key)
        if axis is None or not new:
            return update
        size = update.shape[axis]
        rates = jnp.where(jnp.arange(size) < size - padding - new, 1.0, factor).astype(update.dtype)
        return update * (rates[:, None] if axis == 0 else rates)

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scale, updates))


def _clip_rms(most: float) -> optax.GradientTransformation:
    """Scales down each kernel's update whose root mean square is above `most` (Shazeer and Stern, 2018, Section 6); of a stack,
    each layer by itself."""

    def clip(path, update):
        axes = tuple(range(path[0].key == "layers", update.ndim))
        return update / jnp.maximum(
            1.0, jnp.sqrt(jnp.mean(jnp.square(update), axes, keepdims=True)) / most
        )

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(clip, updates))


@lru_cache
def make_optimizer(
    config: OptimizerConfig, steps: int, new_rows: int = 0, padding: int = 0
) -> optax.GradientTransformation:
    """The same object for the same arguments, so that fine-tunes of equal shape share one compiled step.

    new_rows: how many tokens, at the end of the vocabulary, the model was given before this training; padding: how many
    rows stand behind them that no token has.
    """
    rate = schedule(config.schedule, config.learning_rate, config.warmup_fraction, steps)
    if config.name == "adamw":
        inner = optax.adamw(
            rate, b1=0.9, b2=0.999, eps=config.adam_eps, weight_decay=config.weight_decay
        )
    elif config.name == "adafactor":
        # Without optax.adafactor's own weight decay, which the rate does not scale.
        decay, follow = (
            optax.add_decayed_weights(config.weight_decay),
            optax.scale_by_learning_rate(rate),
        )
        inner = optax.chain(optax.scale_by_factored_rms(), _clip_rms(1.0), decay, follow)
    else:

        def dimensions(params):
            return jax.tree.map(
                lambda x: (
                    optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
                    if x.ndim == 3
                    else None
                ),
                params,
            )

        inner = optax.contrib.muon(
            rate,
            adam_learning_rate=schedule(
                config.schedule, config.adam_learning_rate, config.warmup_fraction, steps
            ),
            adam_eps_root=config.adam_eps**2,  # optax has one `eps` for Muon and Adam
            weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=dimensions,
        )
    return optax.chain(
        _clip(config.clip), inner, _faster_rows(config.new_rows_factor, new_rows, padding)
    )
