"""Artifacts of stages: what made them, whether they are finished, and whether they are still what was asked for.

A stage writes its artifact (a file or a folder) and, last of all, a manifest: the stage's name, its config, the hashes
of its inputs, versions and counts. A manifest is thus the mark of a finished artifact. Asked again for the same, a
stage does nothing; asked for something else under the same name, it refuses and says what differs, so that nothing
finished is ever overwritten by accident.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from selfrag_jax.errors import UserError
from selfrag_jax.files import read_json, write_json

try:
    import fcntl
except ImportError:  # no Unix
    fcntl = None

STARTED = "started.json"
LOCK = ".lock"  # a file of its own: one that is written anew and renamed would be another file to whoever holds it
MODEL_FILE_PATTERNS = (
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "added_tokens.json",
    "special_tokens_map.json",
)
FILE_STAGES = ("collect", "retrieve", "label", "answer")  # stages whose artifact is a file
_VERSIONS = ("selfrag-jax", "jax", "flax", "optax", "scann", "tokenizers")


def lock_file(file: IO, what: str | Path) -> None:
    """This process alone writes `file`, until it is closed or the process ends, however that be. Raises BadInput where another
    one does. A file system that knows no locks gives none."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"{what}: another process is writing it; wait for its end, or take another name"
        ) from None
    except OSError:
        return


def manifest_path(artifact: str | Path) -> Path:
    """`folder/manifest.json`, or `file.manifest.json` beside a file (what isn't there yet is told by its suffix)."""
    artifact = Path(artifact)
    is_file = artifact.is_file() or (bool(artifact.suffix) and not artifact.is_dir())
    return (
        artifact.with_name(artifact.name + ".manifest.json")
        if is_file
        else artifact / "manifest.json"
    )


def fingerprint(path: str | Path) -> str:
    """A hash of an input: a file's content, or a finished folder's manifest. Of a folder in the format of Hugging Face, in which
    others write too, it is its files that count. Raises BadInput when it isn't there."""
    path = Path(path)
    if path.is_file():
        stat = path.stat()
        return _file_hash(path.resolve(), stat.st_size, stat.st_mtime_ns)
    manifest, model = manifest_path(path), (path / "config.json").is_file()
    if manifest.is_file() and not model:
        made = {k: v for k, v in read_json(manifest).items() if k in ("stage", "config", "inputs")}
        return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:16]
    if path.is_dir():
        found = (
            [p for name in MODEL_FILE_PATTERNS for p in path.glob(name)]
            if model
            else path.rglob("*")
        )
        files = sorted(p for p in found if p.is_file())
        return hashlib.sha256(
            "".join(f"{p.relative_to(path)}{fingerprint(p)}" for p in files).encode()
        ).hexdigest()[:16]
    raise UserError(f"{path}: no such file or folder")


@lru_cache(maxsize=4096)
def _file_hash(path: Path, size: int, changed: int) -> str:
    """Read once as long as it has not changed: weights are large."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()[:16]


def require_finished(path: str | Path, stage: str, role: str = "") -> Path:
    """The path of an earlier stage's artifact. Raises BadInput when it is missing, unfinished, or of another stage.

    role: of a trained model, "critic" or "generator"; a converted one may be either.
    """
    path = Path(path)
    if not manifest_path(path).is_file():
        state = "is unfinished" if path.exists() else "does not exist"
        raise UserError(f"{path}: {state}; run `selfrag {stage}` first (it continues where it was)")
    made = read_json(manifest_path(path))
    if made.get("stage") != stage and not (stage == "train" and made.get("stage") == "convert"):
        raise UserError(
            f"{path}: was made by `selfrag {made.get('stage')}`; something made by `selfrag {stage}` is needed here"
        )
    found = made.get("config", {}).get("role", role)
    if role and found != role:
        raise UserError(f"{path}: is a {found}; a {role} is needed here")
    return path


def _made(stage: str, config: Any, inputs: Mapping[str, str | Path]) -> dict[str, Any]:
    config = asdict(config) if is_dataclass(config) else dict(config)
    made = {
        "stage": stage,
        "config": config,
        "inputs": {k: fingerprint(p) for k, p in inputs.items()},
    }
    return json.loads(json.dumps(made, sort_keys=True, default=str))


def claim_workdir(
    folder: str | Path,
    stage: str,
    config: Any,
    inputs: Mapping[str, str | Path],
    write: bool = True,
) -> None:
    """Marks an unfinished folder as this stage's, config's and inputs' own, so that only the same may continue it.

    write: False, in all but one of several processes, only looks whether it is another's. Raises BadInput naming the first difference when it was begun with others.
    """
    path, new = Path(folder) / STARTED, _made(stage, config, inputs)
    if not path.is_file():
        if write:
            write_json(path, new)
    elif (old := read_json(path)) != new:
        raise UserError(
            f"{folder}: was begun with something else ({_difference(old, new)}); remove it or choose another"
        )


@contextmanager
def exclusive_workdir(folder: str | Path) -> Iterator[None]:
    """Within the block no other process may have the folder, which is made if need be. Raises BadInput where one has it, as `lock`
    does."""
    path = Path(folder) / LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as f:
        lock_file(f, folder)
        yield


def identity(stage: str, config: Any, inputs: Mapping[str, str | Path]) -> str:
    """A short hash of what an artifact is made from; names the parts of an unfinished one."""
    made = _made(stage, config, inputs)
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:16]


def remove_parts(folder: str | Path) -> None:
    """Removes the parts of an artifact that is finished."""
    shutil.rmtree(folder, ignore_errors=True)


def is_finished(
    artifact: str | Path, stage: str, config: Any, inputs: Mapping[str, str | Path]
) -> bool:
    """True when `artifact` was already made by this stage, config and inputs. A file that no stage has made is moved aside.

    Raises BadInput naming the first difference when it was made by others, and when it is one of its own inputs.
    """
    path, artifact = manifest_path(artifact), Path(artifact)
    if stage in FILE_STAGES and artifact.is_dir():
        raise UserError(
            f"{artifact}: is a folder; --out is a file, {artifact}/{stage}.jsonl for example"
        )
    for name, given in inputs.items():
        if artifact.exists() and Path(given).exists() and artifact.samefile(given):
            raise UserError(f"{artifact}: is both the output and the {name}; choose another --out")
    if not path.is_file() or not artifact.exists():
        if (
            artifact.is_file()
        ):  # the user's own, or complete but for a manifest that a kill prevented
            aside = next(
                p
                for i in itertools.count(1)
                if not (p := artifact.with_name(f"{artifact.name}.old-{i}")).exists()
            )
            artifact.rename(aside)
            print(
                f"{artifact}: was not finished by `selfrag {stage}`, or never its own; kept as {aside}",
                file=sys.stderr,
            )
        return False
    old, new = read_json(path), _made(stage, config, inputs)
    for part in ("stage", "config", "inputs"):
        if old.get(part) != new[part]:
            raise UserError(
                f"{artifact}: is already there, made with another {part} ({_difference(old.get(part), new[part])}). "
                "Choose another output, or remove it to make it anew."
            )
    return True


def _difference(old: Any, new: Any, at: str = "") -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(set(old) | set(new)):
            if old.get(key) != new.get(key):
                return _difference(old.get(key), new.get(key), f"{at}.{key}" if at else key)
    return f"{at}: {old!r} there, {new!r} asked for"


def write_manifest(
    artifact: str | Path,
    stage: str,
    config: Any,
    inputs: Mapping[str, str | Path],
    counts: Mapping[str, Any],
) -> None:
    """Writes the manifest: from now on the artifact counts as finished."""
    write_json(
        manifest_path(artifact),
        _made(stage, config, inputs)
        | {
            "counts": dict(counts),
            "versions": _versions(),
            "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
        },
    )


def _versions() -> dict[str, str]:
    versions = {}
    for name in _VERSIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions
