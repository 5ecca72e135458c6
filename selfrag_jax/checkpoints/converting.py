"""Converts models between Hugging Face's format and training workdirs, layer by layer.

GGUF files are read, too. What LoRA trained can be written as a PEFT adapter (peft_export.py).

Our arrays stack the layers of a model, so one array may be larger than the free memory (13B: 11 GB
in f32). Neither direction holds a whole stack. To write, Orbax is given arrays that produce one
layer at a time; to read, it opens arrays of which one layer at a time is read.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from selfrag_jax import artifacts
from selfrag_jax.checkpoints import (
    fingerprints,
    integrity,
    loading,
    orbax_streaming,
    peft_export,
    workdirs,
)
from selfrag_jax.checkpoints.integrity import DamagedCheckpoint
from selfrag_jax.checkpoints.vocabulary_rows import (
    VOCABULARY_AXIS,
    check_vocabulary_fits,
    grow_table,
)
from selfrag_jax.errors import UserError
from selfrag_jax.huggingface import hub, weights
from selfrag_jax.huggingface.weight_files import DTYPES
from selfrag_jax.models import lora
from selfrag_jax.models.llama import LlamaConfig, Model
from selfrag_jax.models.params import Params, flatten, leaf_at, unflatten
from selfrag_jax.progress import Progress, progress
from selfrag_jax.storage.paths import is_remote
from selfrag_jax.text.tokenizer import Tokenizer

FORMATS = ("orbax", "huggingface", "peft")
EMBEDDING = ("embed", "embedding")


def convert(
    source: str | Path,
    out: str | Path,
    form: str,
    dtype: str | None,
    reflection_tokens: bool,
    mode: str | None = None,
    step: str = "last",
    base: str = "",
) -> int:
    """Writes the model of `source` to `out` in the format `form`; returns its number of parameters.

    dtype: of the written parameters; None keeps each array's own, and every value bit by bit.
    reflection_tokens: adds those that the vocabulary lacks; their rows start at the mean of the old
    rows (paper, Section 3.2). mode: of the tokenizer, for a source that does not record it. step:
    the checkpoint of a workdir: "last" (damaged ones are passed over with a warning), "best" or a
    number. base: what an adapter calls the model that it adapts, if not as PEFT can read it.

    The model is written under a temporary name and renamed at the end. Raises UserError naming what
    is wrong with the source, and when `out` already exists.
    """
    source, out = _check_arguments(source, out, form, dtype, step)
    if form == "peft" and reflection_tokens:
        raise UserError("--reflection_tokens: an adapter has those that it was trained with")
    tokenizer = loading.read_tokenizer(source, mode)
    temporary = out.with_name(f".{out.name}.tmp")
    new_parents = [p for p in out.parents if not p.exists()]  # innermost first

    def write(model: StoredModel) -> int:
        if reflection_tokens:
            model = _with_reflection_tokens(model)
        check_vocabulary_fits(source, model.tokenizer.vocab_size, model.config)
        model = _with_activation_dtype(model)
        shutil.rmtree(temporary, ignore_errors=True)  # left by a kill or a damaged step
        temporary.mkdir(parents=True)
        _write_model(model, temporary, form)
        flags = {"format": form, "dtype": dtype, "reflection_tokens": reflection_tokens}
        _write_manifest(model, temporary, flags | {"from": str(source)})
        return model.num_parameters

    try:
        if form == "peft":
            _, num_parameters = integrity.latest_intact(
                workdirs.candidate_steps(source, step),
                source,
                lambda step: write(_open_adapter(source, step, tokenizer, dtype, base)),
            )
        elif _is_workdir(source):
            _, num_parameters = integrity.latest_intact(
                workdirs.candidate_steps(source, step),
                source,
                lambda step: write(_open_workdir(source, step, tokenizer, dtype)),
            )
        else:
            num_parameters = write(_open_folder(source, tokenizer, dtype))
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    except UserError:
        raise
    except ValueError as e:  # from tensorstore, when the disk is full
        raise OSError(f"{source} to {out}: {str(e).splitlines()[0]}") from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):  # not empty: they hold the model, for example
            for parent in new_parents:
                parent.rmdir()
    return num_parameters


def _check_arguments(
    source: str | Path, out: str | Path, form: str, dtype: str | None, step: str
) -> tuple[Path, Path]:
    """The absolute paths of `source` and `out`; a model of the hub is downloaded."""
    if form not in FORMATS:
        raise UserError(f"--format={form!r}: must be one of {', '.join(FORMATS)}")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype={dtype!r}: must be one of {', '.join(DTYPES)}")
    source, out = hub.model_folder(source), Path(out).resolve()
    source = source if is_remote(source) else source.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: already exists; choose another --to, or remove it")
    artifacts.require_folders_above(out, "--to")
    if source in (out, *out.parents):
        raise UserError(f"{out}: is inside --from={source}; choose another --to")
    if form == "peft" and not (_is_workdir(source) and workdirs.read_architecture(source).lora):
        raise UserError(
            f"--format=peft: {source} is no training workdir with LoRA, whose adapter is written; "
            "use --format=huggingface"
        )
    if not _is_workdir(source) and step != "last":
        raise UserError(f"--step={step}: {source} is no training workdir; it holds one model only")
    return source, out


def _is_workdir(folder: Path) -> bool:
    return (folder / workdirs.MODEL_FILE).is_file()


def _write_model(model: StoredModel, out: Path, form: str) -> None:
    write = {"orbax": _write_workdir, "huggingface": _write_folder, "peft": _write_adapter}[form]
    with progress("convert", sum(1 for _ in flatten(model.shapes)), "arrays") as bar:
        write(model, out, bar)


def _write_manifest(model: StoredModel, out: Path, flags: dict[str, Any]) -> None:
    # Paths are no identity: the hash differs if another model was converted from the same path.
    content = model.content_hash.hexdigest()
    config = flags | {"tokenizer": model.tokenizer.mode, "content": content}
    counts = {"parameters": model.num_parameters}
    artifacts.write_manifest(out, "convert", config, {}, counts)


# ---- models on disk --------------------------------------------------------------------------
@dataclass(frozen=True)
class StoredModel:
    """A model on disk. It is read one array at a time, and a stack of layers one layer at a time.

    Arrays are named by their path in the parameter tree. The parts of a stack are its layers; any
    other array is its own only part.
    """

    config: LlamaConfig
    shapes: Params
    stored_parts: Callable[[tuple[str, ...]], Iterator[np.ndarray]]  # as they are stored
    stored_dtype: Callable[[tuple[str, ...]], str]
    tokenizer: Tokenizer
    target_dtype: str | None  # to convert to; None: each array keeps its own
    base: str = ""  # of an adapter: the model that it adapts
    content_hash: hashlib._Hash = field(default_factory=hashlib.sha256)  # of all parts read so far

    @property
    def num_parameters(self) -> int:
        return sum(int(np.prod(leaf.shape)) for _, leaf in flatten(self.shapes))

    def dtype(self, path: tuple[str, ...]) -> str:
        return self.target_dtype or self.stored_dtype(path)

    def read_parts(self, path: tuple[str, ...]) -> Iterator[np.ndarray]:
        """The parts of an array in the dtype to be written.

        Raises UserError for values that are not finite, or too large for that dtype.
        """
        stored_parts = self.stored_parts(path)
        for stored in stored_parts:
            self.content_hash.update(np.ascontiguousarray(stored).view(np.uint8).data)
            with np.errstate(over="ignore"):
                part = np.asarray(stored).astype(self.dtype(path), copy=False)
            if not np.isfinite(part).all():
                for _ in stored_parts:
                    pass  # if the checkpoint is damaged, reading to the end raises that instead
                raise UserError(
                    f"{'/'.join(path)}: holds values that are NaN, infinite, or too large for "
                    f"{part.dtype}"
                )
            yield part


def _with_activation_dtype(model: StoredModel) -> StoredModel:
    """Sets the dtype of activations: f32 if the embedding is written in f32, else bf16."""
    dtype = "float32" if model.dtype(EMBEDDING) == "float32" else "bfloat16"
    return replace(model, config=replace(model.config, dtype=dtype))


def _with_reflection_tokens(model: StoredModel) -> StoredModel:
    """Adds the reflection tokens that the vocabulary lacks, at the mean of the old rows."""
    old_tokens = model.tokenizer.vocab_size
    tokenizer = model.tokenizer.with_reflection_tokens()
    # A padded table may have room for them already.
    num_rows = max(model.config.vocab_size, tokenizer.vocab_size)
    config = replace(model.config, vocab_size=num_rows)

    def stored_parts(path: tuple[str, ...]) -> Iterator[np.ndarray]:
        axis = VOCABULARY_AXIS.get(path[0])
        for part in model.stored_parts(path):
            if axis is None:
                yield part
            else:
                yield grow_table(part, axis, old_tokens, tokenizer.vocab_size, num_rows)

    return replace(
        model,
        config=config,
        tokenizer=tokenizer,
        shapes=Model(config).shapes(),
        stored_parts=stored_parts,
    )


# ---- Hugging Face folders, GGUF files ----------------------------------------------------------
def _open_folder(folder: Path, tokenizer: Tokenizer, target_dtype: str | None) -> StoredModel:
    config, files = weights.open_folder(folder)
    shapes = Model(config).shapes()
    weights.check_names(files, [path for path, _ in flatten(shapes)], config)

    def stored_parts(path: tuple[str, ...]) -> Iterator[np.ndarray]:
        return weights.read_leaf(files, path, config, leaf_at(shapes, path).shape)

    def stored_dtype(path: tuple[str, ...]) -> str:
        return files.dtype(weights.stored_names(files, path, config))

    return StoredModel(config, shapes, stored_parts, stored_dtype, tokenizer, target_dtype)


def _write_folder(model: StoredModel, out: Path, bar: Progress) -> None:
    def tensors():
        for path, _ in flatten(model.shapes):
            yield from weights.tensors_of(path, model.config, model.read_parts(path))
            bar.advance(note="/".join(path))

    weights.write_tensors(out, tensors())
    weights.write_config_and_tokenizer(out, model.config, model.tokenizer, model.dtype(EMBEDDING))


# ---- training workdirs -----------------------------------------------------------------------
@dataclass(frozen=True)
class OpenedParams:
    """The parameters of a checkpoint, opened but not read."""

    arrays: Params  # of tensorstore arrays
    fingerprints: dict[tuple[str, ...], int]  # expected, by path
    frozen: set[tuple[str, ...]]  # the paths that LoRA froze


def open_params(workdir: Path, step: int) -> OpenedParams:
    """Opens the parameters of a checkpoint, with those that LoRA froze. Reads only the record."""
    _, recorded = integrity.read_record(workdir, step)
    state = orbax_streaming.open_tree(workdirs.checkpoint_folder(workdir, step) / "state")
    arrays = state["params"]
    saved_paths = {path: ("params", *path) for path, _ in flatten(arrays)}
    frozen = set()
    if (workdir / workdirs.FROZEN).is_dir():
        try:
            frozen_arrays = orbax_streaming.open_tree(workdir / workdirs.FROZEN)
        except Exception as e:  # Orbax and tensorstore raise many types
            raise loading.frozen_weights_damaged(workdir, e) from e
        frozen = {path for path, _ in flatten(frozen_arrays)}
        saved_paths |= {path: (workdirs.FROZEN, *path) for path in frozen}
        arrays = lora.join_trained(arrays, frozen_arrays)
    expected = {
        path: recorded[fingerprints.path_name(saved_path)]
        for path, saved_path in saved_paths.items()
    }
    return OpenedParams(arrays, expected, frozen)


class _WorkdirReader:
    """Reads a checkpoint as a plain model has it: LoRA merged, padding of the vocabulary removed.

    Its methods raise DamagedCheckpoint where the checkpoint is not what was saved.
    """

    def __init__(self, workdir: Path, step: int):
        self.workdir = workdir
        self.trained = workdirs.read_architecture(workdir)
        self.config = replace(self.trained, lora=None, vocab_padding=0)
        self.opened = open_params(workdir, step)
        self._check_shapes()

    def _check_shapes(self) -> None:
        """Raises UserError when the checkpoint does not fit model.json."""
        actual = {path: tuple(array.shape) for path, array in flatten(self.opened.arrays)}
        expected = {path: leaf.shape for path, leaf in flatten(Model(self.trained).shapes())}
        for path in sorted(actual.keys() | expected.keys()):
            if actual.get(path) != expected.get(path):
                raise UserError(
                    f"{self.workdir}: {'/'.join(path)} has shape {actual.get(path)} in the "
                    f"checkpoint and {expected.get(path)} by {workdirs.MODEL_FILE}"
                )

    def dtype(self, path: tuple[str, ...]) -> str:
        if self.trained.lora:
            # Merged in f32: the dtype of the frozen weights would lose most of a small update.
            return "float32"
        return str(leaf_at(self.opened.arrays, path).dtype.numpy_dtype)

    def parts(self, path: tuple[str, ...]) -> Iterator[np.ndarray]:
        axis = VOCABULARY_AXIS.get(path[0])
        if axis is not None and self.trained.vocab_padding:
            for table in self.saved_parts(path):
                yield np.take(table, range(self.config.vocab_size), axis)
        elif self.trained.lora is not None and self._has_adapter(path):
            names = ("kernel", lora.LORA_A, lora.LORA_B)
            saved = (self.saved_parts((*path[:-1], name)) for name in names)
            for kernel, a, b in zip(*saved, strict=True):
                yield lora.merged_kernel(kernel, a, b, self.trained.lora)
        else:
            yield from self.saved_parts(path)

    def _has_adapter(self, path: tuple[str, ...]) -> bool:
        return path[-1] == "kernel" and (*path[:-1], lora.LORA_A) in self.opened.fingerprints

    def saved_parts(self, path: tuple[str, ...]) -> Iterator[np.ndarray]:
        """The parts of an array as saved; compares their fingerprint when all have been read."""
        array = leaf_at(self.opened.arrays, path)
        parts = [array[i] for i in range(array.shape[0])] if path[0] == "layers" else [array]
        fingerprint = fingerprints.RunningFingerprint()
        try:
            for part in parts:
                value = self._read(path, part)
                fingerprint.update(value)
                yield value
            if fingerprint.value != self.opened.fingerprints[path]:
                raise DamagedCheckpoint(
                    f"the bits of {'/'.join(path)} are not those that were saved"
                )
        except DamagedCheckpoint as e:
            if path in self.opened.frozen:
                raise loading.frozen_weights_damaged(self.workdir, e) from None
            raise

    def _read(self, path: tuple[str, ...], part: Any) -> np.ndarray:
        try:
            return part.read().result()
        except ValueError as e:  # from tensorstore
            reason = integrity.first_line(e)
            raise DamagedCheckpoint(f"{'/'.join(path)} cannot be read ({reason})") from e


def _open_workdir(
    workdir: Path, step: int, tokenizer: Tokenizer, target_dtype: str | None
) -> StoredModel:
    reader = _WorkdirReader(workdir, step)
    shapes = Model(reader.config).shapes()
    return StoredModel(reader.config, shapes, reader.parts, reader.dtype, tokenizer, target_dtype)


# ---- PEFT adapters -----------------------------------------------------------------------------
def _open_adapter(
    workdir: Path, step: int, tokenizer: Tokenizer, target_dtype: str | None, base: str
) -> StoredModel:
    """What LoRA trained, not merged; its config is that of the model with LoRA."""
    reader = _WorkdirReader(workdir, step)
    config = replace(reader.trained, vocab_padding=0)
    shapes = lora.split_trained(Model(config).shapes())[0]

    def stored_parts(path: tuple[str, ...]) -> Iterator[np.ndarray]:
        return reader.saved_parts(path) if path[0] == "layers" else reader.parts(path)

    def stored_dtype(path: tuple[str, ...]) -> str:
        return str(leaf_at(reader.opened.arrays, path).dtype.numpy_dtype)

    base = base or peft_export.base_name(workdir)
    return StoredModel(config, shapes, stored_parts, stored_dtype, tokenizer, target_dtype, base)


def _write_adapter(model: StoredModel, out: Path, bar: Progress) -> None:
    tables = peft_export.BaseTables(model.base)

    def tensors():
        for path, _ in flatten(model.shapes):
            parts = model.read_parts(path)
            yield from peft_export.adapter_tensors(path, model.config, parts, tables)
            bar.advance(note="/".join(path))

    model.tokenizer.save(out)
    peft_export.write_adapter(out, model.config, model.base, tables, tensors())


# ---- training workdirs, written ----------------------------------------------------------------
def _write_workdir(model: StoredModel, out: Path, bar: Progress) -> None:
    """Writes a training workdir whose checkpoint of step 0 holds the parameters."""
    written: dict[str, int] = {}  # fingerprints by name

    def streamed(path: tuple[str, ...], shape: tuple[int, ...]) -> orbax_streaming.StreamedArray:
        def read_parts() -> Iterator[np.ndarray]:
            fingerprint = fingerprints.RunningFingerprint()
            for part in model.read_parts(path):
                fingerprint.update(part)
                yield part
            written[fingerprints.path_name(("params", *path))] = fingerprint.value

        def on_written() -> None:
            bar.advance(note="/".join(path))

        return orbax_streaming.StreamedArray(
            shape, np.dtype(model.dtype(path)), path[0] == "layers", read_parts, on_written
        )

    params = unflatten((path, streamed(path, leaf.shape)) for path, leaf in flatten(model.shapes))
    orbax_streaming.save_streamed(out.absolute() / workdirs.CHECKPOINTS, params)
    integrity.write_record(out, 0, {}, written)
    workdirs.write_architecture(out, model.config, model.tokenizer)
