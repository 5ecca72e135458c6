"""Models from Hugging Face's format to a training workdir and back, layer by layer.

An array of ours stacks the layers of a model and may be larger than what is left of the memory (13B: 11 GB in f32). So
neither way holds one whole: Orbax is given arrays that produce their layers one at a time while they are written, and
gives back arrays of which one layer at a time is read.
"""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import future, type_handlers

from selfrag_jax import artifacts
from selfrag_jax.checkpoints import (
    fingerprints,
    integrity,
    loading,
    orbax_errors,
    orbax_streaming,
    workdirs,
)
from selfrag_jax.checkpoints.vocabulary_rows import check_vocabulary_fits
from selfrag_jax.errors import UserError
from selfrag_jax.huggingface import hub, weights
from selfrag_jax.models import lora
from selfrag_jax.models.llama import LlamaConfig, Model
from selfrag_jax.models.params import Params, flatten, leaf_at, unflatten
from selfrag_jax.progress import Progress, progress
from selfrag_jax.text.tokenizer import Tokenizer

FORMATS = ("orbax", "huggingface")
EMBEDDING = ("embed", "embedding")


def convert(
    source: str | Path,
    out: str | Path,
    form: str,
    dtype: str | None,
    reflection_tokens: bool,
    mode: str | None = None,
    step: str = "last",
) -> int:
    """Writes the model of `source` to `out` in the format `form`; returns the number of its parameters.

    dtype: of the written parameters; None keeps that of each array, and every value bit by bit. reflection_tokens: gives
    the vocabulary those it lacks, each at the mean of the old rows (paper, Section 3.2). mode: of the tokenizer, where the
    source records none. step: which checkpoint of a workdir: "last" (a damaged one is passed over, with a warning), "best" or
    a number. Written under a temporary name and renamed at the end. Raises BadInput naming what is wrong with the source, and
    when `out` is already there.
    """
    if form not in FORMATS:
        raise UserError(f"--format={form!r}: must be one of {', '.join(FORMATS)}")
    if dtype is not None and dtype not in weights.DTYPES:
        raise UserError(f"--dtype={dtype!r}: must be one of {', '.join(weights.DTYPES)}")
    source, out = hub.model_folder(source).resolve(), Path(out).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is already there; choose another --to, or remove it")
    if source in (out, *out.parents):
        raise UserError(f"{out}: lies in --from={source}; choose another --to")
    is_workdir = (source / workdirs.MODEL_FILE).is_file()
    if not is_workdir and step != "last":
        raise UserError(
            f"--step={step}: {source} is no training workdir; a Hugging Face folder holds one model only"
        )
    tokenizer = loading.read_tokenizer(source, mode)
    temporary = out.with_name(f".{out.name}.tmp")
    new_parents = [p for p in out.parents if not p.exists()]  # the innermost first

    def write(stored: Stored) -> int:
        stored = _as_written(
            source, replace(stored, tokenizer=tokenizer, cast=dtype), reflection_tokens
        )
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        with progress("convert", sum(1 for _ in flatten(stored.shapes)), "arrays") as bar:
            (_to_workdir if form == "orbax" else _to_folder)(stored, temporary, bar)
        # The hash of all that was read tells this model from another that was converted from the same path.
        made = {
            "format": form,
            "dtype": dtype,
            "reflection_tokens": reflection_tokens,
            "from": str(source),
        }
        made["tokenizer"] = stored.tokenizer.mode
        made["content"] = stored.content.hexdigest()
        artifacts.write_manifest(temporary, "convert", made, {}, {"parameters": stored.parameters})
        return stored.parameters

    try:
        if is_workdir:
            steps = workdirs.candidate_steps(source, step)
            _, parameters = integrity.latest_intact(
                steps, source, lambda s: write(_from_workdir(source, s))
            )
        else:
            parameters = write(_from_folder(source))
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    except UserError:
        raise
    except ValueError as e:  # tensorstore's, of a full disk
        raise OSError(f"{source} to {out}: {str(e).splitlines()[0]}") from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):  # there is something in them, the model for example
            for parent in new_parents:
                parent.rmdir()
    return parameters


def _as_written(source: Path, stored: Stored, reflection_tokens: bool) -> Stored:
    """The model with its new rows, if any, and the type of its activations. Raises BadInput for another model's tokenizer."""
    if reflection_tokens:
        stored = _with_reflection_tokens(stored)
    check_vocabulary_fits(source, stored.tokenizer.vocab_size, stored.config)
    half = stored.dtype(EMBEDDING) != "float32"
    return replace(stored, config=replace(stored.config, dtype="bfloat16" if half else "float32"))


# a path of the parameter tree -> that array's layers, or itself as the only part
Parts = Callable[[tuple[str, ...]], Iterator[np.ndarray]]


@dataclass(frozen=True)
class Stored:
    """A model on disk of which one array at a time, and of a stack one layer at a time, is read."""

    config: LlamaConfig
    shapes: Params
    parts: Parts
    dtypes: Callable[[tuple[str, ...]], str]  # of an array, as it is stored
    tokenizer: Tokenizer | None = None
    cast: str | None = None  # the type to be written, if another
    content: Any = field(default_factory=hashlib.sha256)  # of all that has been read

    @property
    def parameters(self) -> int:
        return sum(int(np.prod(leaf.shape)) for _, leaf in flatten(self.shapes))

    def dtype(self, path: tuple[str, ...]) -> str:
        return self.cast or self.dtypes(path)

    def read(self, path: tuple[str, ...]) -> Iterator[np.ndarray]:
        """The parts of an array in the type to be written. Raises BadInput where a value is not finite, or not in that type."""
        parts = self.parts(path)
        for part in parts:
            self.content.update(np.ascontiguousarray(part).view(np.uint8))
            with np.errstate(over="ignore"):
                out = np.asarray(part).astype(self.dtype(path), copy=False)
            if not np.isfinite(out).all():
                for _ in parts:
                    pass  # where the reason is damage, the rest tells
                raise UserError(
                    f"{'/'.join(path)}: holds values that are NaN, infinite, or too large for {out.dtype}"
                )
            yield out


def _from_folder(folder: Path) -> Stored:
    config = weights.config_from_json(folder / weights.CONFIG)
    files, shapes = weights.WeightFiles(folder), Model(config).shapes()
    weights.check_names(files, [path for path, _ in flatten(shapes)], config)

    def parts(path: tuple[str, ...]) -> Iterator[np.ndarray]:
        return weights.read_leaf(files, path, config, leaf_at(shapes, path).shape)

    types = lambda path: files.dtype(weights.tensor_names(path, config))  # noqa: E731
    return Stored(config, shapes, parts, types)


def _from_workdir(workdir: Path, step: int) -> Stored:
    """Reading it raises checkpoints.Damaged where the checkpoint is not what was saved."""
    trained = workdirs.read_architecture(workdir)
    config = replace(trained, lora=None, vocab_padding=0)
    arrays, wanted, frozen = _lazy_params(workdir, step)
    found = {path: tuple(array.shape) for path, array in flatten(arrays)}
    expected = {path: leaf.shape for path, leaf in flatten(Model(trained).shapes())}
    for path in sorted(found.keys() | expected.keys()):
        if found.get(path) != expected.get(path):
            raise UserError(
                f"{workdir}: {'/'.join(path)} has shape {found.get(path)} in the checkpoint and {expected.get(path)} by "
                f"{workdirs.MODEL_FILE}"
            )

    def stored(path: tuple[str, ...]) -> Iterator[np.ndarray]:
        array, total = leaf_at(arrays, path), 0
        layered = path[0] == "layers"
        try:
            for i in range(array.shape[0] if layered else 1):
                try:
                    part = (array[i] if layered else array).read().result()
                except ValueError as e:  # tensorstore's
                    raise integrity.Damaged(
                        f"{'/'.join(path)} cannot be read ({str(e).splitlines()[0][:300]})"
                    ) from e
                total += fingerprints.part_fingerprint(part, i * part.size)
                yield part
            if total % 2**32 != wanted[path]:
                raise integrity.Damaged(
                    f"the bits of {'/'.join(path)} are not those that were saved"
                )
        except integrity.Damaged as e:
            raise loading.frozen_weights_damaged(workdir, e) if path in frozen else e from None

    def parts(path: tuple[str, ...]) -> Iterator[np.ndarray]:
        axis = {"embed": 0, "head": 1}.get(path[0])
        if axis is not None:
            for table in stored(path):
                yield (
                    np.take(table, range(config.vocab_size), axis)
                    if trained.vocab_padding
                    else table
                )
        elif trained.lora is None or (*path[:-1], lora.LORA_A) not in found or path[-1] != "kernel":
            yield from stored(path)
        else:
            three = (stored((*path[:-1], name)) for name in ("kernel", lora.LORA_A, lora.LORA_B))
            for kernel, a, b in zip(*three, strict=True):
                yield lora.merged_kernel(kernel, a, b, trained.lora)

    # Merged in f32: rounded to the type of the frozen weights, most of a small update would be lost.
    types = lambda path: "float32" if trained.lora else str(leaf_at(arrays, path).dtype.numpy_dtype)  # noqa: E731
    return Stored(config, Model(config).shapes(), parts, types)


def _with_reflection_tokens(s: Stored) -> Stored:
    """The same model with a larger vocabulary; new rows are the mean of the old ones."""
    tokenizer, V, old = (
        s.tokenizer.with_reflection_tokens(),
        s.config.vocab_size,
        s.tokenizer.vocab_size,
    )
    config = replace(
        s.config, vocab_size=max(V, tokenizer.vocab_size)
    )  # a padded table may have room for them

    def parts(path: tuple[str, ...]) -> Iterator[np.ndarray]:
        axis = {"embed": 0, "head": 1}.get(path[0])
        if axis is None:
            yield from s.parts(path)
            return
        [table] = s.parts(path)
        rows = np.moveaxis(table, axis, 0)
        mean = rows[:old].mean(0, dtype=np.float32).astype(rows.dtype)
        grown = np.concatenate([rows, np.repeat(mean[None], config.vocab_size - V, 0)])
        grown[old : tokenizer.vocab_size] = mean
        yield np.moveaxis(grown, 0, axis)

    return replace(
        s, config=config, tokenizer=tokenizer, shapes=Model(config).shapes(), parts=parts
    )


def _to_folder(s: Stored, out: Path, bar: Progress) -> None:
    def tensors():
        for path, _ in flatten(s.shapes):
            yield from weights.tensors_of(path, s.config, s.read(path))
            bar.advance(note="/".join(path))

    weights.write_tensors(out, tensors())
    weights.write_config_and_tokenizer(out, s.config, s.tokenizer, s.dtype(EMBEDDING))


# ---- Orbax -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Streamed:
    """A leaf that Orbax writes part by part: layers, or the whole as the only one."""

    shape: tuple[int, ...]
    dtype: np.dtype
    layered: bool
    parts: Callable[[], Iterator[np.ndarray]]
    done: Callable[[], None]

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


class _StreamHandler(type_handlers.NumpyHandler):
    """Writes `_Streamed` leaves as the numpy arrays that they stand for, one at a time, in a thread of Orbax's."""

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)
        self.stopped = threading.Event()

    async def _background_serialize(self, values, infos, args=None):
        for one in zip(values, infos, args, strict=True):
            await super()._background_serialize(*([x] for x in one))

    async def serialize(self, values, infos, args=None):
        args = args or [ocp.SaveArgs()] * len(values)
        return [
            future.CommitFutureAwaitingContractedSignals(
                self._background_serialize(values, infos, args), name="stream"
            )
        ]

    async def _open_and_write(self, value: _Streamed, tspec: dict[str, Any], ts_context) -> None:
        import tensorstore as ts

        if value.layered:  # a chunk per layer, else each write would read and rewrite the whole
            tspec["metadata"]["chunks"] = (1, *value.shape[1:])
        array = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
        for i, part in enumerate(value.parts()):
            if self.stopped.is_set():
                raise InterruptedError("told to stop")
            await (array[i] if value.layered else array).write(part)
        value.done()


def _to_workdir(s: Stored, out: Path, bar: Progress) -> None:
    """A training workdir whose checkpoint of step 0 holds the parameters."""
    prints: dict[str, int] = {}

    def leaf(path: tuple[str, ...], shape: tuple[int, ...]) -> _Streamed:
        def parts() -> Iterator[np.ndarray]:
            total = 0
            for i, part in enumerate(s.read(path)):
                total += fingerprints.part_fingerprint(part, i * part.size)
                yield part
            prints[fingerprints.path_name(("params", *path))] = total % 2**32

        done = lambda: bar.advance(note="/".join(path))  # noqa: E731
        return _Streamed(shape, np.dtype(s.dtype(path)), path[0] == "layers", parts, done)

    tree = unflatten((path, leaf(path, shape.shape)) for path, shape in flatten(s.shapes))
    handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
    stream = _StreamHandler()
    streamed = ((_Streamed, stream), (jax.Array, type_handlers.ArrayHandler()))
    handlers.add("state", ocp.args.PyTreeSave, orbax_streaming.handler(*streamed))
    handlers.add("data", ocp.args.JsonSave, ocp.JsonCheckpointHandler())
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    folder = out.absolute() / workdirs.CHECKPOINTS
    orbax_errors.silence_secondary_errors()
    with ocp.CheckpointManager(folder, options=options, handler_registry=handlers) as saved:
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave({"params": tree}), data=ocp.args.JsonSave({})
        )
        _undisturbed(partial(saved.save, 0, args=args), stream.stopped)
    integrity.write_record(
        folder / "0" / "data" / "metadata", {}, prints
    )  # known once all has been read
    workdirs.write_architecture(out, s.config, s.tokenizer)


def _undisturbed(save: Callable[[], Any], stopped: threading.Event) -> None:
    """Saves in a thread of its own, which no signal reaches. Where one ends the waiting for it, `stopped` is set, and what the signal
    raises goes on only when all of Orbax's threads have ended; else one of them might write what is being removed."""
    running, failed = threading.Lock(), []

    def run() -> None:
        with running:
            try:
                if not stopped.is_set():
                    save()
            except BaseException as e:
                failed.append(e)

    thread = threading.Thread(target=run, name="save")
    try:
        thread.start()
        thread.join()
    except BaseException:
        stopped.set()
        with running:  # it has ended, or will find that it need not begin
            raise
    if failed:
        raise failed[0]


def _lazy_params(
    workdir: Path, step: int
) -> tuple[Params, dict[tuple[str, ...], int], set[tuple[str, ...]]]:
    """The parameters of a checkpoint as opened, unread tensorstore arrays, their fingerprints, and which of them LoRA froze."""
    _, prints = integrity.read_record(workdir, step)
    params = orbax_streaming.open_tree(workdir / workdirs.CHECKPOINTS / str(step) / "state")[
        "params"
    ]
    names, frozen = {path: ("params", *path) for path, _ in flatten(params)}, set()
    if (workdir / workdirs.FROZEN).is_dir():
        try:
            more = orbax_streaming.open_tree(workdir / workdirs.FROZEN)
        except Exception as e:  # Orbax and tensorstore raise many kinds
            raise loading.frozen_weights_damaged(workdir, e) from e
        frozen = {path for path, _ in flatten(more)}
        names |= {path: (workdirs.FROZEN, *path) for path in frozen}
        params = lora.join_trained(params, more)
    return (
        params,
        {path: prints[fingerprints.path_name(name)] for path, name in names.items()},
        frozen,
    )
