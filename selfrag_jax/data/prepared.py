"""Reads the folders that `selfrag prepare` writes: one tensorflow-datasets data set per source.

Rows lie in array_record files, so any row is read without those before it; nothing here needs
TensorFlow.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

from selfrag_jax import artifacts
from selfrag_jax.errors import UserError, library
from selfrag_jax.files import read_json

STAGE = "prepare"
VERSION = "1.0.0"  # of the layout below
SPLIT = "train"
FIELDS = ("id", "instruction", "input", "output", "dataset_name")
GENERATOR = "selfrag_generator"  # the data set whose outputs have reflection tokens


def datasets(folder: str | Path) -> dict[str, Path]:
    """Returns the folder of each data set by name, in the order in which they were asked for.

    Raises UserError if the folder is not a finished one of `selfrag prepare`.
    """
    folder = Path(folder)
    if not artifacts.manifest_path(folder).is_file() and not (folder / artifacts.STARTED).is_file():
        raise UserError(
            f"{folder}: is a folder; expected JSON lines, or a folder made by `selfrag prepare`"
        )
    artifacts.require_finished(folder, STAGE)
    names = read_json(artifacts.manifest_path(folder))["config"]["datasets"]
    return {name: folder / name / VERSION for name in names}


def read_prepared(folder: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields ("folder/set: row n", row) of all data sets of a folder."""
    for name, path in datasets(folder).items():
        for number, record in enumerate(_records(path), 1):
            yield f"{Path(folder) / name}: row {number}", _as_text(record)


class PreparedRows(Sequence[dict[str, str]]):
    """All rows of a folder by index, read from disk when they are asked for."""

    def __init__(self, folder: str | Path):
        self.folder, self._sets = Path(folder), [_records(p) for p in datasets(folder).values()]
        self._ends = list(accumulate(map(len, self._sets)))

    def __len__(self) -> int:
        return self._ends[-1]

    @overload
    def __getitem__(self, i: int) -> dict[str, str]: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[dict[str, str]]: ...
    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        if not 0 <= i < len(self):
            raise IndexError(i)
        at = bisect_right(self._ends, i)
        return _as_text(self._sets[at][i - (self._ends[at - 1] if at else 0)])


def _records(path: Path) -> Sequence[dict[str, bytes]]:
    tfds = library("tensorflow_datasets", f"reading {path}", "train")
    try:
        return tfds.builder_from_directory(path).as_data_source(split=SPLIT)
    except (FileNotFoundError, ValueError, KeyError, tfds.core.DatasetNotFoundError) as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise UserError(
            f"{path}: not readable ({reason}); remove {path.parent.parent} and run "
            "`selfrag prepare` again"
        ) from None


def _as_text(record: dict[str, bytes]) -> dict[str, str]:
    return {name: record[name].decode() for name in FIELDS}
