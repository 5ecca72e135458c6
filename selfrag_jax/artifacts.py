"""Artifacts of stages: what made them, whether they are finished, and whether they are up to date.

A stage writes its artifact (a file or a folder) and, last of all, a manifest: the stage's name, its
config, the hashes of its inputs, versions and counts. A manifest therefore marks a finished
artifact. Run again with the same settings, a stage does nothing. Run with other settings under the
same name, it refuses and names the difference, so a finished artifact is never overwritten by
accident.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, is_dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from selfrag_jax.errors import UserError
from selfrag_jax.files import read_json, read_object, write_json
from selfrag_jax.locks import LOCK
from selfrag_jax.storage.paths import as_path, is_remote

Input = str | os.PathLike[str]  # a path, or an object that stands for one
STARTED = "started.json"
ADAPTER_CONFIG, ADAPTER_BASE = "adapter_config.json", "base_model_name_or_path"  # PEFT's
MODEL_FILE_PATTERNS = (
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "added_tokens.json",
    "special_tokens_map.json",
    "pytorch_model.bin",
    ADAPTER_CONFIG,
    "adapter_model.bin",
)
# Read only where there are no safetensors.
TORCH_SHARD_PATTERNS = ("pytorch_model-*.bin", "pytorch_model.bin.index.json")
# Stages whose artifact is a file.
FILE_STAGES = (
    "check", "collect", "retrieve", "label", "answer", "export", "compare", "calibrate",
)  # fmt: skip
_OTHER = {"stage": "another stage", "config": "another config", "inputs": "other inputs"}
FOLDER_STAGES = ("base", "embed", "index", "prepare", "report", "train", "world")
_VERSIONS = ("selfrag-jax", "jax", "flax", "optax", "scann", "tokenizers")


# ---- what an artifact is made from --------------------------------------------------------------
def manifest_path(artifact: str | Path) -> Path:
    """Returns `folder/manifest.json`, or `file.manifest.json` next to a file.

    An artifact that does not exist yet counts as a file if its name has a suffix.
    """
    artifact = as_path(artifact)
    is_file = artifact.is_file() or (bool(artifact.suffix) and not artifact.is_dir())
    if is_file:
        return artifact.with_name(artifact.name + ".manifest.json")
    return artifact / "manifest.json"


def fingerprint(path: Input) -> str:
    """Returns a hash of an input: of a file's content, or of a finished folder's manifest.

    For a folder in Hugging Face format, which other programs write too, the model's files are
    hashed and a manifest is ignored; for an unfinished training, the records of its checkpoints,
    which have the fingerprints of all arrays. An input may bring a method `fingerprint` of its own.
    Raises UserError if the path does not exist.
    """
    if own := getattr(path, "fingerprint", None):
        return own()
    path = as_path(path)  # type: ignore[arg-type]
    if path.is_file():
        stat: Any = path.stat()
        if is_remote(path):
            return _file_hash(path, stat.length, stat.mtime)
        return _file_hash(path.resolve(), stat.st_size, stat.st_mtime_ns)
    manifest = manifest_path(path)
    is_model = _is_model(path)
    if manifest.is_file() and not is_model:
        made = {k: v for k, v in read_json(manifest).items() if k in ("stage", "config", "inputs")}
        return _short_hash(json.dumps(made, sort_keys=True))
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder")
    if is_model:
        found = _model_files(path)
    elif (path / STARTED).is_file() and (path / "model.json").is_file():
        found = [path / STARTED, *path.glob("checkpoints/*/data/metadata")]
    else:
        found = list(path.rglob("*"))
    content = _contents(path, found)
    if adapted := local_base(path):  # not followed further: an adapter might name itself
        content += _contents(adapted, _model_files(adapted))
    return _short_hash(content)


def _contents(folder: Path, files: Iterable[Path]) -> str:
    """The names and hashes of a folder's files."""
    return "".join(f"{p.relative_to(folder)}{fingerprint(p)}" for p in sorted(files) if p.is_file())


def _is_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", ADAPTER_CONFIG))


def _model_files(folder: Path) -> list[Path]:
    found = [p for pattern in MODEL_FILE_PATTERNS for p in folder.glob(pattern)]
    if any(p.name.startswith("model") and ".safetensors" in p.name for p in found):
        return found
    return found + [p for pattern in TORCH_SHARD_PATTERNS for p in folder.glob(pattern)]


def local_base(folder: Path) -> Path | None:
    """The local folder of the model that a PEFT adapter names: beside the adapter, or from here."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return None
    row = read_json(folder / ADAPTER_CONFIG)
    name = row.get(ADAPTER_BASE) if isinstance(row, dict) else None
    candidates = [folder / name, Path(name)] if isinstance(name, str) and name else []
    return next((path for path in candidates if path.is_dir()), None)


@lru_cache(maxsize=4096)  # weights are large, so an unchanged file is read once
def _file_hash(path: Path, size: int, modified: int) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()[:16]


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def made_from(stage: str, config: Any, inputs: Mapping[str, Input]) -> dict[str, Any]:
    """The stage, config and input hashes of an artifact, as JSON data."""
    is_instance = is_dataclass(config) and not isinstance(config, type)
    made = {
        "stage": stage,
        "config": asdict(config) if is_instance else dict(config),
        "inputs": {k: fingerprint(p) for k, p in inputs.items()},
    }
    return json.loads(json.dumps(made, sort_keys=True, default=str))


def identity(stage: str, config: Any, inputs: Mapping[str, Input]) -> str:
    """Returns a short hash of what an artifact is made from; it names an unfinished one's parts."""
    return _short_hash(json.dumps(made_from(stage, config, inputs), sort_keys=True))


def _difference(old: Any, new: Any, at: str = "") -> str:
    """Names the first field in which two manifests differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(set(old) | set(new)):
            if old.get(key) != new.get(key):
                return _difference(old.get(key), new.get(key), f"{at}.{key}" if at else key)
    return f"{at}: {old!r} there, {new!r} asked for"


# ---- reading and writing manifests --------------------------------------------------------------
def require_finished(path: str | Path, stage: str, role: str = "") -> Path:
    """Returns the path of an earlier stage's artifact.

    role: of a trained model, "critic" or "generator"; a converted model may be either.
    Raises UserError if the artifact is missing, unfinished or made by another stage.
    """
    path = as_path(path)
    if path.is_file() and stage in FOLDER_STAGES:
        raise UserError(f"{path}: is a file; expected a folder made by `selfrag {stage}`")
    if not manifest_path(path).is_file():
        if stage == "train" and _is_model(path):
            raise UserError(
                f"{path}: is a model in Hugging Face format, or an adapter; expected a "
                f"{role or 'model'} made by `selfrag train`: train one from it (--role={role} "
                f"--config.base={path}), or make a workdir of a published one by "
                "`selfrag convert --format=orbax`"
            )
        if manifest_path(path / stage).is_file():  # a quickstart's folder
            raise UserError(f"{path}: holds other things too; give {path / stage}")
        if stage == "index" and (_is_model(path) or (path / "model.json").is_file()):
            raise UserError(f"{path}: is a model; expected an index made by `selfrag index`")
        if stage == "index" and path.exists() and not (path / STARTED).is_file():
            raise UserError(
                f"{path}: is no index; `selfrag index --passages={path} --out=INDEX` makes one of "
                "a corpus"
            )
        state = "is unfinished" if path.exists() else "does not exist"
        raise UserError(
            f"{path}: {state}; run `selfrag {stage}` first (it resumes unfinished work)"
        )
    made = read_json(manifest_path(path))
    if made.get("stage") != stage and not (stage == "train" and made.get("stage") == "convert"):
        raise UserError(
            f"{path}: was made by `selfrag {made.get('stage')}`; "
            f"expected something made by `selfrag {stage}`"
        )
    found = made.get("config", {}).get("role", role)
    if role and found != role:
        raise UserError(f"{path}: is a {found}; expected a {role}")
    return path


def require_own_or_empty(folder: Path, stage: str) -> None:
    """Raises UserError if a folder holds anything that this stage did not begin."""
    require_folders_above(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; `selfrag {stage}` writes a folder")
    if folder.is_dir() and any(p.name != LOCK for p in folder.iterdir()):
        made = folder / STARTED
        if not made.is_file() or read_json(made).get("stage") != stage:
            raise UserError(
                f"{folder}: is not empty and was not made by `selfrag {stage}`; "
                "choose another --out"
            )


def is_of_a_stage(folder: Path) -> bool:
    """Whether a stage made this folder, or has begun it."""
    if (folder / STARTED).is_file():
        return True
    try:
        return "stage" in read_object(folder / "manifest.json", ())
    except UserError:  # there is none, or it is another program's
        return False


def require_folders_above(path: Path, flag: str = "--out") -> None:
    """Raises UserError if a path leads through a file."""
    if (parent := next(p for p in path.absolute().parents if p.exists())).is_file():
        raise UserError(f"{path}: {parent} is a file; choose another {flag}")


def claim_workdir(
    folder: str | Path,
    stage: str,
    config: Any,
    inputs: Mapping[str, Input],
    write: bool = True,
) -> None:
    """Records the stage, config and inputs in an unfinished folder; only the same may resume it.

    write: False to check only, as all but one of several processes do.
    Raises UserError naming the first difference if the folder was started with other settings.
    """
    path, new = as_path(folder) / STARTED, made_from(stage, config, inputs)
    if not path.is_file():
        if write:
            write_json(path, new)
    elif (old := read_json(path)) != new:
        for name, path_of_input in inputs.items():
            if name in old.get("inputs", {}) and old["inputs"][name] != new["inputs"][name]:
                raise UserError(
                    f"{folder}: was started with another {name}: {path_of_input} is another file, "
                    f"or has changed since; remove {folder} to begin again"
                )
        raise UserError(
            f"{folder}: was started with other settings ({_difference(old, new)}); "
            "remove it or choose another"
        )


def check_output(
    artifact: str | Path,
    stage: str,
    inputs: Mapping[str, Input],
    beside: Iterable[str | Path] = (),
) -> None:
    """Raises UserError if a stage cannot write `artifact`, or the files `beside` it, there."""
    artifact = as_path(artifact)
    if is_remote(artifact):
        return
    if stage in FOLDER_STAGES and artifact.is_file():
        raise UserError(f"{artifact}: is a file; `selfrag {stage}` writes a folder")
    if stage in FILE_STAGES and artifact.is_dir():
        raise UserError(
            f"{artifact}: is a folder; --out is a file, {artifact}/{stage}.jsonl for example"
        )
    if stage in FILE_STAGES and artifact.suffix == ".gz":
        raise UserError(f"{artifact}: is written as plain text; leave .gz out of --out")
    require_folders_above(artifact)
    for written in (artifact, *map(Path, beside)):
        if written is not artifact and written.is_dir():
            raise UserError(f"{written}: is a folder; `selfrag {stage}` writes a file there")
        for name, given in inputs.items():
            if written.exists() and Path(given).exists() and written.samefile(given):
                what = "the output" if written is artifact else "a file beside the output"
                raise UserError(f"{written}: is both {what} and the {name}; choose another --out")


def is_finished(
    artifact: str | Path,
    stage: str,
    config: Any,
    inputs: Mapping[str, Input],
    beside: Iterable[str | Path] = (),
) -> bool:
    """Returns whether this stage already made `artifact` from this config and these inputs.

    beside: other files that the stage writes with it. Files without a manifest are moved aside.
    Raises UserError naming the first difference if the artifact was made from something else, and
    as `check_output` does.
    """
    artifact, others = as_path(artifact), [as_path(b) for b in beside]
    check_output(artifact, stage, inputs, others)
    path = manifest_path(artifact)
    if not path.is_file() or not artifact.exists():
        for file in (artifact, *others):
            if file.is_file():
                _move_aside(file, stage)
        return False
    old, new = read_object(path, ()), made_from(stage, config, inputs)
    for part in ("stage", "config", "inputs"):
        if old.get(part) != new[part]:
            raise UserError(
                f"{artifact}: is already there, made with {_OTHER[part]} "
                f"({_difference(old.get(part), new[part], part if part == 'stage' else '')}). "
                "Choose another output, or remove it to make it again."
            )
    return True


def claim_rewritten(file: str | Path, stage: str) -> None:
    """Makes way for a file that a stage writes anew every time; a stranger's is moved aside.

    Raises UserError if it was made by another stage.
    """
    file, manifest = as_path(file), manifest_path(file)
    if not manifest.is_file():
        if file.is_file():
            _move_aside(file, stage)
    elif (made := read_object(manifest, ()).get("stage")) != stage:
        raise UserError(f"{file}: was made by `selfrag {made}`; choose another --out")


def _move_aside(file: Path, stage: str) -> None:
    """Renames a file without a manifest: the user's own, or one whose stage was killed."""
    names = (file.with_name(f"{file.name}.old-{i}") for i in itertools.count(1))
    aside = next(name for name in names if not name.exists())
    file.rename(aside)
    print(
        f"{file}: is not a finished output of `selfrag {stage}`; kept as {aside}", file=sys.stderr
    )


def write_manifest(
    artifact: str | Path,
    stage: str,
    config: Any,
    inputs: Mapping[str, Input],
    counts: Mapping[str, Any],
) -> None:
    """Writes the manifest, which marks the artifact as finished.

    The inputs of a claimed folder are recorded as they were when it was claimed.
    """
    started = as_path(artifact) / STARTED
    made = read_json(started) if started.is_file() else None
    manifest = made or made_from(stage, config, inputs)
    manifest["counts"] = dict(counts)
    manifest["versions"] = {name: _version(name) for name in _VERSIONS}
    manifest["finished"] = time.strftime("%Y-%m-%d %H:%M:%S")
    write_json(manifest_path(artifact), manifest)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def remove_temporary_files(folder: str | Path) -> None:
    """Removes what killed writers left in a folder and below; nobody may be writing there."""
    for path in Path(folder).rglob(".*.tmp"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def remove_parts(folder: str | Path) -> None:
    """Removes the parts of an artifact that is now finished."""
    shutil.rmtree(folder, ignore_errors=True)
