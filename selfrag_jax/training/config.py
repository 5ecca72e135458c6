"""What a training needs to know: one section of a config as a checked dataclass."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
from jax.sharding import Mesh

from selfrag_jax.errors import UserError
from selfrag_jax.models import sharding
from selfrag_jax.models.attention import KERNELS, choose_kernel
from selfrag_jax.models.params import DTYPES
from selfrag_jax.models.llama import REMAT, LlamaConfig, Model
from selfrag_jax.models.lora import LoraConfig
from selfrag_jax.training.optimizer import OptimizerConfig


ROLES = ("critic", "generator")  # what `selfrag train` trains


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh's axes (see models/sharding.py); one may be -1, for all devices that the others leave."""

    data: int
    fsdp: int
    tensor: int


@dataclass(frozen=True)
class TrainConfig:
    seed: int
    rows: int  # rows of an update
    length: int  # tokens of a row
    max_targets: (
        int | None
    )  # positions of a batch whose loss is computed, gathered from all rows; None: all positions
    optimizer: OptimizerConfig
    mesh: MeshConfig
    save_every: int  # steps between checkpoints
    log_every: int
    steps: int | None = None  # updates; or else epochs
    epochs: float | None = None  # passes over the data
    rows_per_device: int | None = None  # computed at a time, gradients are added up; None: all
    packed: bool = True  # several documents in a row; else one
    loss_chunk: int | None = (
        None  # positions (of each row, or of max_targets) whose logits exist at a time; None: all
    )
    dtype: str | None = None  # of activations; None: the model's
    remat: str = (
        "none"  # what the backward pass computes again, to save memory: "none", "dots" or "full"
    )
    attention: str = "auto"  # kernel, see models/attention.py
    pad_vocabulary: int = 1  # inside, the vocabulary is padded to a multiple of this
    lora: LoraConfig | None = None  # train low-rank adapters and the embeddings only
    keep_last: int = 2  # checkpoints
    keep_best: int = 1  # further ones, of the lowest training loss since the one before (`selfrag convert --step=best`)

    def __post_init__(self):
        if (self.steps is None) == (self.epochs is None):
            raise UserError(f"steps={self.steps}, epochs={self.epochs}: give one of them")
        if self.steps is not None and self.steps < 0:
            raise UserError(f"steps={self.steps}: must not be below 0")
        for name in (
            "epochs",
            "rows",
            "length",
            "save_every",
            "log_every",
            "pad_vocabulary",
            "keep_last",
            "max_targets",
        ):
            value = getattr(self, name)
            if value is not None and (
                isinstance(value, (str, bool)) or not 0 < value < float("inf")
            ):
                raise UserError(f"{name}={value}: must be a number above 0")
        if self.keep_best < 0:
            raise UserError(f"keep_best={self.keep_best}: must not be below 0")
        if self.dtype not in (None, *DTYPES):
            raise UserError(f"dtype={self.dtype!r}: must be one of {', '.join(DTYPES)}")
        if self.dtype == "float16":
            raise UserError(
                "dtype='float16': small gradients would be lost (losses are not scaled); bfloat16 has their range"
            )
        positions, name = (
            (self.length, "length")
            if self.max_targets is None
            else (self.max_targets, "max_targets")
        )
        if self.loss_chunk is not None and (self.loss_chunk < 1 or positions % self.loss_chunk):
            raise UserError(f"loss_chunk={self.loss_chunk} does not divide {name}={positions}")
        if self.rows_per_device is not None and (
            self.rows_per_device < 1 or self.max_targets is not None
        ):
            raise UserError(
                f"rows_per_device={self.rows_per_device}: must be at least 1, and needs max_targets=None"
            )
        if self.remat not in REMAT:
            raise UserError(f"remat={self.remat!r}: must be one of {', '.join(REMAT)}")
        if self.attention not in KERNELS:
            raise UserError(f"attention={self.attention!r}: must be one of {', '.join(KERNELS)}")

    def make_mesh(self, devices=None) -> Mesh:
        """Raises BadInput when the devices that there are do not make it, or it does not divide the rows."""
        mesh = sharding.make_mesh(self.mesh.data, self.mesh.fsdp, self.mesh.tensor, devices)
        self.micro_batches(mesh)
        return mesh

    def micro_batches(self, mesh: Mesh) -> int:
        """How many parts an update's rows are computed in. Raises BadInput when the mesh does not divide them."""
        devices = mesh.shape["data"] * mesh.shape["fsdp"]
        at_a_time = self.rows if self.rows_per_device is None else devices * self.rows_per_device
        if self.rows % devices or self.rows % at_a_time:
            what = (
                "" if self.rows_per_device is None else f" x rows_per_device={self.rows_per_device}"
            )
            raise UserError(
                f"rows={self.rows} is not divisible by mesh data x fsdp = {devices}{what}"
            )
        return self.rows // at_a_time

    def check(self, c: LlamaConfig, mesh: Mesh) -> None:
        """Raises BadInput where this training cannot run that model on this mesh."""
        if self.length > c.max_length:
            raise UserError(
                f"length={self.length}: the model attends over {c.max_length} tokens at most (max_position_embeddings)"
            )
        if c.num_heads % mesh.shape["tensor"]:
            raise UserError(
                f"mesh tensor={mesh.shape['tensor']} does not divide the model's {c.num_heads} attention heads"
            )
        try:
            with jax.set_mesh(mesh):
                choose_kernel(self.attention, self.length, c.head_dim, self.dtype or c.dtype)
        except ValueError as e:
            raise UserError(str(e)) from None

    def model(self, c: LlamaConfig) -> Model:
        """The model as this training runs it."""
        padding = -c.vocab_size % self.pad_vocabulary
        changes = dict(
            remat=self.remat, attention=self.attention, lora=self.lora, vocab_padding=padding
        )
        return Model(replace(c, dtype=self.dtype or c.dtype, **changes))
