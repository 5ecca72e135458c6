"""Reads PEFT adapters: the weights of the model that was adapted, merged tensor by tensor.

An adapter's folder has adapter_config.json, which names the model, and adapter_model.safetensors
(or .bin) with

    base_model.model.<module>.lora_A.weight            [rank, inputs]
    base_model.model.<module>.lora_B.weight            [outputs, rank]
    base_model.model.<module>.lora_embedding_A, _B     [rank, rows], [columns, rank]
    base_model.model.<module>.weight                   of a module that was trained whole
    base_model.model.<module>.token_adapter.trainable_tokens_delta   [n, columns]: new values of
                                                       some rows of a table of the vocabulary

The merged weight is W + B A * scale, in f32: most of an update is smaller than the spacing of
bfloat16 numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from selfrag_jax.artifacts import ADAPTER_CONFIG
from selfrag_jax.errors import UserError
from selfrag_jax.huggingface.adapter_config import (
    ADAPTER_FILES,
    base_folder,
    is_adapter,
    read_adapter_config,
)
from selfrag_jax.huggingface.hub import torch_conversion_hint
from selfrag_jax.huggingface.weight_files import (
    EMBEDDING,
    HEAD,
    ModelWeights,
    TensorFile,
    open_tensors,
    read_tensor,
)
from selfrag_jax.models.llama import LlamaConfig

TOKENIZER_FILES = ("tokenizer_mode.json", "tokenizer.json", "tokenizer.model")
PREFIX = "base_model.model."
_ROWS = 4096  # of a weight, merged at a time


def tokenizer_folder(folder: Path) -> Path:
    """Where a model's tokenizer is: an adapter without one has that of the adapted model."""
    if not is_adapter(folder) or any((folder / n).is_file() for n in TOKENIZER_FILES):
        return folder
    return base_folder(read_adapter_config(folder / ADAPTER_CONFIG))


@dataclass
class _Pair:
    """The stored names of the factors of one module's update: left @ right.

    left is [rows, rank], right [rank, columns]; both are stored transposed for an embedding.
    """

    left: str = ""
    right: str = ""
    transposed: bool = False


# suffix of a stored name -> (which factor, transposed)
_FACTORS = {
    ".lora_A.weight": ("right", False),
    ".lora_B.weight": ("left", False),
    ".lora_embedding_A": ("left", True),
    ".lora_embedding_B": ("right", True),
}
# Suffixes of a module that PEFT has wrapped; what the module was, and what it is now.
_BEFORE, _NOW = (".base_layer.weight", ".original_module.weight"), ".modules_to_save.weight"
TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"
_TOKEN_ADAPTER = ".token_adapter.base_layer.weight"


class AdaptedWeights:
    """The weights of an adapted model by tensor name, as WeightFiles has them."""

    def __init__(self, folder: Path, open_base: Callable[[Path], tuple[LlamaConfig, ModelWeights]]):
        """open_base: opens the adapted model, a folder or a GGUF file.

        Raises UserError if the adapter or the adapted model is missing or not supported.
        """
        self.folder = folder
        self._adapter = read_adapter_config(folder / ADAPTER_CONFIG)
        base = base_folder(self._adapter)
        names = [n for n in ADAPTER_FILES if (folder / n).is_file()]
        if not names:
            raise UserError(f"{folder}: lacks the adapter's weights, {ADAPTER_FILES[0]}")
        adapted, self._base = open_base(base)
        self._path = folder / names[0]
        self._file: TensorFile = open_tensors(self._path, torch_conversion_hint(folder))
        self._pairs: dict[str, _Pair] = {}  # module -> factors
        self._before: dict[str, str] = {}  # tensor of the model -> of the adapter: before adapting
        self._now: dict[str, str] = {}  # the same of modules that were trained whole
        self._rows: dict[str, str] = {}  # the same of tables of which rows are replaced
        for stored in self._file.names():
            self._sort(stored)
        where = self._base.folder.absolute()
        self.file_of = {n: str(where / file) for n, file in self._base.file_of.items()}
        self.file_of |= dict.fromkeys({**self._before, **self._now}, names[0])
        self._base_rows, self._tied = adapted.vocab_size, adapted.tie_embeddings
        self._row_ids = self._checked_rows()
        self.config = self._adapted_config(adapted)
        self._check_pairs()

    def _sort(self, stored: str) -> None:
        """Notes what a tensor of the adapter is for."""
        if not self._file.shape(stored):
            raise UserError(f"{self._path}: tensor {stored!r} is a single number")
        if 0 in self._file.shape(stored):
            raise UserError(f"{self._path}: tensor {stored!r} is empty")
        name = stored.removeprefix(PREFIX)
        if name.endswith(TOKEN_ROWS):
            self._rows[name.removesuffix(TOKEN_ROWS) + ".weight"] = stored
            return
        if name.endswith(_TOKEN_ADAPTER):
            self._before[name.removesuffix(_TOKEN_ADAPTER) + ".weight"] = stored
            return
        for suffix, (factor, transposed) in _FACTORS.items():
            if name.endswith(suffix):
                pair = self._pairs.setdefault(name.removesuffix(suffix), _Pair())
                setattr(pair, factor, stored)
                pair.transposed = transposed
                return
        for suffix in _BEFORE:
            if name.endswith(suffix):
                self._before[name.removesuffix(suffix) + ".weight"] = stored
                return
        name = name.removesuffix(_NOW) + ".weight" if name.endswith(_NOW) else name
        self._now[name] = stored

    def _check_pairs(self) -> None:
        for module, pair in self._pairs.items():
            if f"{module}.weight" not in self.file_of:
                raise UserError(f"{self._path}: adapts {module!r}, which the model does not have")
            if not (pair.left and pair.right):
                raise UserError(f"{self._path}: has only one of the two factors of {module!r}")

    # ---- the vocabulary --------------------------------------------------------------------------
    def _checked_rows(self) -> dict[str, tuple[int, ...]]:
        """The rows of each table that are replaced. Raises UserError if the weights differ."""
        given, ids_of = self._adapter.token_rows, {}
        for name, stored in self._rows.items():
            module = name.removesuffix(".weight")
            if name not in (EMBEDDING, HEAD) or name in self._now or module in self._pairs:
                raise UserError(f"{self._path}: tensor {stored!r} has no place in the model")
            tables = (module.rpartition(".")[2], "embed_tokens")  # of a tied model, one for both
            ids = next((given[table] for table in tables if table in given), ())
            if self._file.shape(stored)[0] != len(ids):
                raise UserError(
                    f"{self._path}: tensor {stored!r} has {self._file.shape(stored)[0]} rows; "
                    f"trainable_token_indices in {ADAPTER_CONFIG} names {len(ids)}"
                )
            ids_of[name] = ids
        known = {name.removesuffix(".weight").rpartition(".")[2] for name in ids_of}
        if self._tied and EMBEDDING in ids_of:
            known.add("lm_head")
        if self._tied and ids_of and EMBEDDING not in ids_of:
            raise UserError(f"{self._path}: replaces rows of the head alone, of a tied table")
        if lacking := sorted(set(given) - known):
            raise UserError(
                f"{self._path}: lacks the rows of {lacking[0]!r} that trainable_token_indices in "
                f"{ADAPTER_CONFIG} names"
            )
        return ids_of

    def _with_rows(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A table of which some rows are replaced or new."""
        stored, ids = self._rows[name], self._row_ids[name]
        before = self._before.get(name)
        old = self._file.shape(before)[0] if before else self._base_rows
        table = np.empty(shape, np.float32)
        table[:old] = self._unadapted(name, (old, *shape[1:]))
        table[list(ids)] = self._stored(stored, (len(ids), *shape[1:]))
        if missing := set(range(old, shape[0])).difference(ids):
            raise UserError(f"{self._path}: {stored!r} lacks the new row {min(missing)}")
        return table

    def _adapted_config(self, c: LlamaConfig) -> LlamaConfig:
        """The model's config: the adapter may have another vocabulary, or untie its two tables."""
        tables = [self._now.get(n) or self._before.get(n) for n in (EMBEDDING, HEAD)]
        rows = [self._file.shape(stored)[0] for stored in tables if stored][:1] or [c.vocab_size]
        rows += [i + 1 for ids in self._row_ids.values() for i in ids]  # tokens that are new
        c = replace(c, vocab_size=max(rows))
        if not c.tie_embeddings:
            return c
        if EMBEDDING not in self.file_of and HEAD in self.file_of:
            self.file_of[EMBEDDING] = self.file_of[HEAD]
        if self._stays_tied(c):
            if HEAD in self._now:  # one table, which the adapter may have under this name alone
                self._now.setdefault(EMBEDDING, self._now[HEAD])
            self.file_of.pop(HEAD, None)
            return c
        self.file_of.setdefault(HEAD, self.file_of.get(EMBEDDING, ""))
        return replace(c, tie_embeddings=False)

    def _stays_tied(self, c: LlamaConfig) -> bool:
        """Whether the embedding and the head of a tied model are still one table.

        PEFT wraps the modules of the two apart from each other, so that they differ once one of
        them is adapted. A table that it only saves, because it has new rows, remains shared.
        """
        modules = [name.removesuffix(".weight") for name in (EMBEDDING, HEAD)]
        if any(module in self._pairs for module in modules):
            return False
        if EMBEDDING in self._now and HEAD in self._now:
            shape = (c.vocab_size, c.embed_dim)
            embedding, head = (self._stored(self._now[name], shape) for name in (EMBEDDING, HEAD))
            return np.array_equal(embedding, head)
        saved = self._adapter.modules_to_save
        return not any(m in saved or m.rpartition(".")[2] in saved for m in modules)

    # ---- tensors ---------------------------------------------------------------------------------
    def dtype(self, names: Sequence[str]) -> str:
        """Always f32, the type in which weights are merged."""
        return "float32"

    def tensor(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """One tensor, merged. Raises UserError as WeightFiles.tensor does."""
        if name in self._rows:
            return self._with_rows(name, shape)
        if name in self._now:
            return self._stored(self._now[name], shape)
        pair = self._pairs.get(name.removesuffix(".weight"))
        value = self._unadapted(name, shape)
        return value if pair is None else self._merge(name, value, pair)

    def _unadapted(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A tensor before adapting. Either table of a tied model may stand for the other."""
        other = {EMBEDDING: HEAD, HEAD: EMBEDDING}.get(name) if self._tied else None
        for candidate in (name, other):
            if candidate in self._before:
                return self._stored(self._before[candidate], shape)
        if other is not None and name not in self._base.file_of:
            name = other
        return self._base.tensor(name, shape)

    def _merge(self, name: str, value: np.ndarray, pair: _Pair) -> np.ndarray:
        if value.ndim != 2:
            raise UserError(f"{self._path}: adapts {name!r}, which is no matrix")
        rows, columns = value.shape
        rank = self._file.shape(pair.right)[-1 if pair.transposed else 0]
        scale = np.float32(self._adapter.scale(name.removesuffix(".weight"), rank))
        left, right = (
            self._stored(stored, shape[::-1] if pair.transposed else shape).astype(np.float32)
            for stored, shape in ((pair.left, (rows, rank)), (pair.right, (rank, columns)))
        )
        if pair.transposed:
            left, right = left.T, right.T
        merged = np.array(value, np.float32)
        for start in range(0, rows, _ROWS):
            merged[start : start + _ROWS] += left[start : start + _ROWS] @ right * scale
        if not np.isfinite(merged).all():
            raise UserError(f"{self._path}: merged into {name!r}, gives NaN or infinite values")
        return merged

    def _stored(self, stored: str, shape: tuple[int, ...]) -> np.ndarray:
        return read_tensor(self._file, self._path, stored, shape)
