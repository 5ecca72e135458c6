"""Installed versions against the package's own requirements: what is missing for which command."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement

OURS = "selfrag-jax"
SHOWN = (
    "jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "flax", "optax", "orbax-checkpoint",
    "tensorstore", "numpy", "scann", "tokenizers", "sentencepiece", "safetensors",
    "huggingface-hub", "transformers", "torch", "tensorflow-datasets", "grain", "openai",
    "mauve-text",
)  # fmt: skip
EXTRAS = ("tpu", "gpu", "train", "eval", "teacher")


@dataclass(frozen=True)
class ExtraUse:
    """What a command needs an extra for."""

    extras: tuple[str, ...]  # one of them is enough
    used_for: str


# Commands that are not named here need the core alone.
USES = {
    "prepare": ExtraUse(("train",), "published sets"),
    "train": ExtraUse(("train",), "--data=FOLDER, as `selfrag prepare` writes it"),
    "collect": ExtraUse(("teacher",), "--teacher=openai and openai-batch"),
    "evaluate": ExtraUse(("eval",), "long references (ROUGE), --judge and --mauve"),
    "compile": ExtraUse(("tpu", "gpu"), "the compiler of the --topology"),
}


@dataclass(frozen=True)
class MissingPackage:
    name: str
    wanted: str  # versions, such as ">=5"
    found: str | None  # the version that is installed, if any

    def __str__(self) -> str:
        return f"{self.name}{self.wanted}" + (f" (found {self.found})" if self.found else "")


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    return {name: version(name) for name in SHOWN}


def missing(extra: str = "") -> list[MissingPackage]:
    """Returns the packages that the core ("") or an extra requires and that are not installed.

    Versions out of the required bounds count as missing. Empty if selfrag_jax itself is not
    installed, but imported from a folder: then nothing says what it requires.
    """
    return _missing_of(OURS, extra)


def _missing_of(package: str, extra: str) -> list[MissingPackage]:
    try:
        lines = metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        return []
    found: list[MissingPackage] = []
    for line in lines:
        wanted = Requirement(line)
        in_core = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
        if in_core if extra else not in_core:
            continue
        if extra and not (wanted.marker and wanted.marker.evaluate({"extra": extra})):
            continue
        installed = version(wanted.name)
        if installed is None or not wanted.specifier.contains(installed, prereleases=True):
            found.append(MissingPackage(wanted.name, str(wanted.specifier), installed))
        else:  # jax[tpu]: what that extra of jax requires
            found += [m for name in sorted(wanted.extras) for m in _missing_of(wanted.name, name)]
    return found


def mismatches() -> list[str]:
    """Returns what of JAX does not fit together; pip allows it, JAX then fails or ignores a GPU."""
    jaxlib = version("jaxlib")
    others = {name: version(name) for name in ("jax-cuda13-plugin", "jax-cuda13-pjrt")}
    return [
        f"{name} {found} beside jaxlib {jaxlib}: pip install -U 'selfrag-jax[gpu]'"
        for name, found in others.items()
        if jaxlib and found and found != jaxlib
    ]


def pip_command(extra: str) -> str:
    return f"pip install '{OURS}[{extra}]'" if extra else f"pip install {OURS}"


def lacking(stage: str) -> list[str]:
    """Returns what a command lacks, one line each with the command that installs it."""
    lines = _lines("", missing())
    if use := USES.get(stage):
        absent = {extra: missing(extra) for extra in use.extras}
        if all(absent.values()):
            lines += _lines(use.extras[0], absent[use.extras[0]], f", for {use.used_for}")
    return lines


def _lines(extra: str, absent: list[MissingPackage], note: str = "") -> list[str]:
    if not absent:
        return []
    return [f"{', '.join(map(str, absent))}{note}: {pip_command(extra)}"]


def report() -> dict[str, Any]:
    return {
        "versions": versions(),
        "missing": {name or "core": [asdict(m) for m in missing(name)] for name in ("", *EXTRAS)},
        "mismatches": mismatches(),
    }
