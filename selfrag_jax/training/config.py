"""What a training needs to know: one section of a config as a checked dataclass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
from jax.sharding import Mesh

from selfrag_jax.data.generator_examples import MASKS
from selfrag_jax.errors import UserError
from selfrag_jax.models import sharding
from selfrag_jax.models.attention_kernels import KERNELS, choose_kernel
from selfrag_jax.models.llama import REMAT, LlamaConfig, Model
from selfrag_jax.models.lora import LoraConfig
from selfrag_jax.models.params import DTYPES
from selfrag_jax.training.optimizer import OptimizerConfig

ROLES = ("critic", "generator")  # what `selfrag train` trains

_POSITIVE_FIELDS = (
    "epochs", "rows", "length", "save_every", "log_every", "pad_vocabulary", "keep_last",
    "max_targets",
)  # fmt: skip


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes within a slice (see models/sharding.py).

    One may be -1: all remaining devices of the slice. The batch is also split over the slices.
    """

    data: int
    fsdp: int
    tensor: int
    slices: int | None = None  # None: those that TPUs are in; other devices are one


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained: batches, optimizer, mesh, memory and checkpoints."""

    seed: int
    rows: int  # per update
    length: int  # tokens of a row
    # Positions per batch that have a loss, gathered from all rows. None: every position has one.
    max_targets: int | None
    optimizer: OptimizerConfig
    mesh: MeshConfig
    save_every: int  # steps between checkpoints
    log_every: int  # steps between reports
    steps: int | None = None  # updates; give either steps or epochs
    epochs: float | None = None  # passes over the data
    # Rows that a device computes at a time; gradients are accumulated. None: all rows at once.
    rows_per_device: int | None = None
    packed: bool = True  # several documents per row; False: one
    # Positions (of each row, or of max_targets) whose logits exist at a time, at most. None: all.
    loss_chunk: int | None = None
    dtype: str | None = None  # of activations; None: the model's
    # The factors of the layers' products are rounded to this type, and their sums kept in `dtype`.
    # "bfloat16" makes recent CPUs (AVX512-BF16, AMX) faster. None: no rounding.
    product_dtype: str | None = None
    # What the backward pass recomputes to save memory: "none", "dots" or "full" (models/llama.py).
    remat: str = "none"
    attention: str = "auto"  # kernel, see models/attention_kernels.py
    pad_vocabulary: int = 1  # the vocabulary is padded to a multiple of this inside the model
    lora: LoraConfig | None = None  # train only low-rank adapters, the embedding and the head
    keep_last: int = 2  # checkpoints
    # Further checkpoints (`selfrag convert --step=best`): those with the lowest loss on held-out
    # rows or, without any, the lowest training loss since the checkpoint before.
    keep_best: int = 1
    # What of a generator's output has no loss: "each" passage, or as the released script did,
    # everything between the first and the last (data/generator_examples.py).
    mask: str = "each"

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise UserError(
                f"steps={self.steps}, epochs={self.epochs}: give one of them, the other as none"
            )
        if self.steps is not None and self.steps < 0:
            raise UserError(f"steps={self.steps}: must not be below 0")
        for name in _POSITIVE_FIELDS:
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, (str, bool)) or not 0 < value < float("inf"):
                raise UserError(f"{name}={value}: must be a number above 0")
        if self.keep_best < 0:
            raise UserError(f"keep_best={self.keep_best}: must not be below 0")
        if self.dtype not in (None, *DTYPES):
            raise UserError(f"dtype={self.dtype!r}: must be one of {', '.join(DTYPES)}")
        if self.product_dtype not in (None, "bfloat16"):
            raise UserError(f"product_dtype={self.product_dtype!r}: must be bfloat16 or None")
        if self.dtype == "float16":
            raise UserError(
                "dtype='float16': small gradients would underflow, as losses are not scaled; "
                "use bfloat16, which has the range of float32"
            )
        if self.mask not in MASKS:
            raise UserError(f"mask={self.mask!r}: must be one of {', '.join(MASKS)}")
        self._check_split_of_batches()
        if self.remat not in REMAT:
            raise UserError(f"remat={self.remat!r}: must be one of {', '.join(REMAT)}")
        if self.attention not in KERNELS:
            raise UserError(f"attention={self.attention!r}: must be one of {', '.join(KERNELS)}")

    def _check_split_of_batches(self) -> None:
        if self.loss_chunk is not None and self.loss_chunk < 1:
            raise UserError(f"loss_chunk={self.loss_chunk}: must be at least 1, or none")
        if self.rows_per_device is None:
            return
        if self.rows_per_device < 1 or self.max_targets is not None:
            raise UserError(
                f"rows_per_device={self.rows_per_device}: must be at least 1, "
                "and needs max_targets=None"
            )

    def manifest_fields(self) -> dict[str, Any]:
        """Returns the fields as a manifest has them.

        Some are left out at their defaults: trainings from before there was a choice go on.
        """
        values = asdict(self)
        if self.optimizer.embedding_learning_rate is None:
            del values["optimizer"]["embedding_learning_rate"]
        if self.optimizer.old_rows_factor == 1.0:
            del values["optimizer"]["old_rows_factor"]
        if self.mesh.slices is None:
            del values["mesh"]["slices"]
        if self.product_dtype is None:
            del values["product_dtype"]
        if self.mask == MASKS[0]:
            del values["mask"]
        return values

    def make_mesh(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """Returns the mesh over `devices` (None: all).

        Raises UserError if the devices cannot form the mesh, or the mesh does not divide the rows.
        """
        m = self.mesh
        mesh = sharding.make_mesh(m.data, m.fsdp, m.tensor, devices, m.slices)
        self.micro_batches(mesh)
        return mesh

    def micro_batches(self, mesh: Mesh) -> int:
        """Returns the number of micro-batches per update.

        Raises UserError if the mesh does not divide the rows.
        """
        devices = mesh.shape["data"] * mesh.shape["fsdp"]
        at_a_time, factor = self.rows, ""
        if self.rows_per_device is not None:
            at_a_time = devices * self.rows_per_device
            factor = f" x rows_per_device={self.rows_per_device}"
        if self.rows % devices or self.rows % at_a_time:
            raise UserError(
                f"rows={self.rows} is not divisible by mesh data x fsdp = {devices}{factor}"
            )
        return self.rows // at_a_time

    def check(self, c: LlamaConfig, mesh: Mesh) -> None:
        """Raises UserError if this training cannot run the model `c` on the mesh."""
        if self.length > c.max_length:
            raise UserError(
                f"length={self.length}: the model attends over {c.max_length} tokens at most "
                "(max_position_embeddings)"
            )
        if c.num_heads % mesh.shape["tensor"]:
            raise UserError(
                f"mesh tensor={mesh.shape['tensor']} does not divide the model's {c.num_heads} "
                "attention heads"
            )
        try:
            with jax.set_mesh(mesh):
                choose_kernel(self.attention, self.length, c.head_dim, self.dtype or c.dtype)
        except ValueError as e:
            raise UserError(str(e)) from None

    def model(self, c: LlamaConfig) -> Model:
        """Returns the model `c` as this training runs it."""
        return Model(
            replace(
                c,
                dtype=self.dtype or c.dtype,
                product_dtype=self.product_dtype,
                remat=self.remat,
                attention=self.attention,
                lora=self.lora,
                vocab_padding=-c.vocab_size % self.pad_vocabulary,
            )
        )
