"""Optimizers and schedules: AdamW for the paper's recipes, Muon for small models from scratch.

Muon (Jordan et al., 2024) orthogonalises the update of each weight matrix. Stacked layers share one
array [L, inputs, outputs], and each layer is orthogonalised by itself. Embeddings and norms take
Adam.

Adam divides by the size of the gradient. A word that is absent from a batch therefore moves as fast
as the others, driven by the noise of its softmax gradient. A small pretrained model survives a
short fine-tune only with an `adam_eps` above that noise, and with a low rate for everything but the
rows of new tokens, which have the farthest to go (`new_rows_factor`); the others may rest
(`old_rows_factor`). Low-rank adapters want a
higher rate than the embedding and the head, which are trained in full beside them
(`embedding_learning_rate`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
import optax

from selfrag_jax.errors import UserError

OPTIMIZERS = ("adamw", "adafactor", "muon")
SCHEDULES = ("linear", "cosine", "constant")
_ABOVE_ZERO = (
    "learning_rate", "adam_learning_rate", "embedding_learning_rate", "adam_eps",
    "new_rows_factor", "clip",
)  # fmt: skip


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, its learning rates and their schedule."""

    name: str  # one of OPTIMIZERS
    learning_rate: float  # peak; with muon, that of the matrices
    adam_learning_rate: float  # with muon, peak rate of everything else
    schedule: str  # after the warm-up, one of SCHEDULES
    warmup_fraction: float  # of the steps
    # Entries whose gradient is far below this barely move. With muon its square is added under the
    # root, which amounts to the same.
    adam_eps: float
    weight_decay: float
    clip: float  # global norm of the gradients
    new_rows_factor: float = 1.0  # on the rate of the vocabulary rows that were added for training
    # Peak rate of the embedding and the head. None: that of everything else, with muon
    # adam_learning_rate. Their weight decay follows it.
    embedding_learning_rate: float | None = None
    # On the rate of the rows of the base's tokens. 0 leaves them as they are, so that an adapter
    # needs to hold the new rows alone (`selfrag convert --format=peft`).
    old_rows_factor: float = 1.0

    def __post_init__(self) -> None:
        for field, known in (("name", OPTIMIZERS), ("schedule", SCHEDULES)):
            value = getattr(self, field)
            if value not in known:
                raise UserError(f"optimizer.{field}={value!r}: must be one of {', '.join(known)}")
        for field in _ABOVE_ZERO:
            value = getattr(self, field)
            if value is not None and not 0 < value < float("inf"):
                raise UserError(f"optimizer.{field}={value!r}: must be above 0")
        if not 0 <= self.warmup_fraction < 1:
            raise UserError(
                f"optimizer.warmup_fraction={self.warmup_fraction!r}: must be a fraction of the "
                "steps, at least 0 and below 1"
            )
        for field in ("weight_decay", "old_rows_factor"):
            value = getattr(self, field)
            if not 0 <= value < float("inf"):
                raise UserError(f"optimizer.{field}={value!r}: must be 0 or above")

    @property
    def embedding_factor(self) -> float:
        """The rate of the embedding and the head, relative to what the optimizer gives them."""
        if self.embedding_learning_rate is None:
            return 1.0
        given = self.adam_learning_rate if self.name == "muon" else self.learning_rate
        return self.embedding_learning_rate / given


def schedule(name: str, peak: float, warmup_fraction: float, steps: int) -> optax.Schedule:
    """Returns a linear warm-up from 0 (if any), then the named decay to 0 at `steps`."""
    warmup = min(steps - 1, max(1, round(warmup_fraction * steps))) if warmup_fraction > 0 else 0
    decay = {
        "linear": optax.linear_schedule(peak, 0.0, max(1, steps - warmup)),
        "cosine": optax.cosine_decay_schedule(peak, max(1, steps - warmup)),
        "constant": optax.constant_schedule(peak),
    }[name]
    if warmup <= 0:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup])


@lru_cache
def make_optimizer(
    config: OptimizerConfig, steps: int, new_rows: int = 0, padding: int = 0
) -> optax.GradientTransformation:
    """Returns the optimizer; the same object for the same arguments.

    Fine-tunes of equal shape thus share one compiled step.

    new_rows: number of tokens at the end of the vocabulary that were added for this training.
    padding: number of rows behind them that belong to no token.
    """
    rate = schedule(config.schedule, config.learning_rate, config.warmup_fraction, steps)
    if config.name == "adamw":
        inner = optax.adamw(
            rate, b1=0.9, b2=0.999, eps=config.adam_eps, weight_decay=config.weight_decay
        )
    elif config.name == "adafactor":
        # optax.adafactor does not scale its weight decay by the rate; this chain does.
        inner = optax.chain(
            optax.scale_by_factored_rms(),
            _clip_rms(1.0),
            optax.add_decayed_weights(config.weight_decay),
            optax.scale_by_learning_rate(rate),
        )
    else:
        assert config.name == "muon", config.name  # OptimizerConfig admits no other
        inner = optax.contrib.muon(
            rate,
            adam_learning_rate=schedule(
                config.schedule, config.adam_learning_rate, config.warmup_fraction, steps
            ),
            adam_eps_root=config.adam_eps**2,  # optax has one `eps` for both Muon and Adam
            weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=_muon_dimensions,
        )
    return optax.chain(
        _clip_by_global_norm(config.clip),
        inner,
        _scale_vocabulary(config, new_rows, padding),
    )


def _muon_dimensions(params):
    """Returns the input and output axes of stacked matrices; None for what Adam updates."""
    matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    return jax.tree.map(lambda x: matrix if x.ndim == 3 else None, params)


def _clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """Scales gradients to a global norm of at most `limit`.

    All are multiplied by one factor, which XLA fuses into their readers. optax's version selects
    between two arrays, for which XLA writes all gradients once more.
    """

    def scale(updates, _):
        factor = jnp.minimum(1.0, limit / optax.tree.norm(updates))
        return jax.tree.map(lambda x: (x * factor).astype(x.dtype), updates)

    return optax.stateless(scale)


def _scale_vocabulary(c: OptimizerConfig, new: int, padding: int) -> optax.GradientTransformation:
    """Multiplies the updates of the embedding and the head.

    All rows by `embedding_factor`; the last `new` ones before `padding` by `new_rows_factor`
    besides, those before them by `old_rows_factor`.
    """
    new_rate = c.embedding_factor * c.new_rows_factor
    old_rate = c.embedding_factor * c.old_rows_factor

    def scale(path, update):
        axis = {"embed": 0, "head": 1}.get(path[0].key)
        if axis is None or (old_rate == 1.0 and not new):
            return update
        size = update.shape[axis]
        old = jnp.arange(size) < size - padding - new
        rates = jnp.where(old, old_rate, new_rate).astype(update.dtype)
        return update * (rates[:, None] if axis == 0 else rates)

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scale, updates))


def _clip_rms(limit: float) -> optax.GradientTransformation:
    """Scales each kernel's update to a root mean square of at most `limit`.

    See Shazeer and Stern (2018), Section 6. Stacked layers are scaled each by itself.
    """

    def clip(path, update):
        axes = tuple(range(path[0].key == "layers", update.ndim))
        rms = jnp.sqrt(jnp.mean(jnp.square(update), axes, keepdims=True))
        return update / jnp.maximum(1.0, rms / limit)

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(clip, updates))
