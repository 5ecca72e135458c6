"""The passages of a corpus on disk, read by row number or by id.

    passages.arrow   columns id, title, text; record batches of BATCH_ROWS rows
    id_hashes.npy    [n] uint64, sorted: hashes of the ids
    id_rows.npy      [n] uint32: the row of each of those hashes
    reading.json     how the corpus was read: `split` and `fields`
    counts.json      number of passages, of rows left out, and of repeated passages

Arrow's file format is memory-mapped, so an open store takes almost no memory, whatever its size;
a row takes microseconds. It is written in one pass with one batch in memory, the same corpus gives
the same bytes, and pandas, polars, DuckDB and datasets read it. (LMDB is as fast, but its files
depend on the order of writes; array_record has no columns and needs a schema of our own.)
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt64

from selfrag_jax.config import build
from selfrag_jax.errors import UserError
from selfrag_jax.files import atomic_write, read_json, read_object, write_json
from selfrag_jax.progress import progress
from selfrag_jax.records import Passage
from selfrag_jax.retrieval.corpus import DEFAULT_WORDS, LONG, Corpus, CorpusConfig

BATCH_ROWS = 4096
COUNTS, READING = "counts.json", "reading.json"
_TABLE, _HASHES, _ROWS = "passages.arrow", "id_hashes.npy", "id_rows.npy"
_MB = 1 << 20
_SHOWN_DUPLICATES, _LISTED_DUPLICATES = 3, 1000


def id_hashes(ids: Iterable[str]) -> UInt64[np.ndarray, " n"]:
    """Hashes of ids: the first 64 bits of BLAKE2b.

    Two of 21 million ids have the same with a probability of 1e-5, so ids are compared as well.
    """
    digests = (hashlib.blake2b(i.encode(), digest_size=8).digest() for i in ids)
    return np.frombuffer(b"".join(digests), "<u8")


# ---- writing -------------------------------------------------------------------------------------
def write_passages(corpus: Corpus, folder: Path) -> dict[str, int]:
    """Reads a corpus into the store `folder` in one pass; returns its counts.

    A finished store is kept. Raises UserError as reading the corpus does, for an empty corpus, and
    for duplicate ids, with their lines.
    """
    import pyarrow as pa

    if (folder / COUNTS).is_file():
        return read_json(folder / COUNTS)
    before = corpus.state()
    schema = pa.schema([(name, pa.large_string()) for name in ("id", "title", "text")])
    hashes: list[np.ndarray] = []
    contents: list[np.ndarray] = []
    n = 0
    with (
        progress("read corpus", max(1, corpus.num_bytes // _MB), "MB") as bar,
        atomic_write(folder / _TABLE, "wb") as f,
        pa.ipc.new_file(f, schema) as writer,
    ):
        for batch in _batches((p for _, p in corpus), BATCH_ROWS):
            columns = [[p.id for p in batch], [p.title for p in batch], [p.text for p in batch]]
            writer.write_batch(pa.record_batch(columns, schema=schema))
            hashes.append(id_hashes(columns[0]))
            contents.append(id_hashes(f"{p.title}\0{p.text}" for p in batch))
            n += len(batch)
            bar.advance(corpus.bytes_read // _MB - bar.done, f"{n:,} passages")
        if not n:
            why = f": {corpus.num_empty:,} rows have neither title nor text" * bool(
                corpus.num_empty
            )
            raise UserError(f"{corpus.path}: holds no passages{why}")
        _write_ids(np.concatenate(hashes), corpus, folder)
        if before != corpus.state():
            raise UserError(f"{corpus.path}: changed while it was read; run the command again")
    sorted_contents = np.sort(np.concatenate(contents))
    repeated = int(np.sum(sorted_contents[1:] == sorted_contents[:-1]))
    counts = {"passages": n, "empty": corpus.num_empty, "repeated": repeated}
    write_json(folder / READING, asdict(corpus.config))
    write_json(folder / COUNTS, counts)
    for line in _notices(corpus, n, repeated):
        print(line, file=sys.stderr)
    return counts


def _notices(corpus: Corpus, n: int, repeated: int) -> Iterator[str]:
    """Yields a line for each thing about a corpus of n passages that its owner should know."""
    if corpus.left_out:
        yield corpus.left_out
    if corpus.num_empty:
        yield f"{corpus.path}: {corpus.num_empty:,} rows without title and text were left out"
    if corpus.num_without_id:
        yield (
            f"{corpus.path}: {corpus.num_without_id:,} rows have no id and got their numbers; "
            "--fields=id=NAME names the field of the id"
        )
    if repeated:
        yield (
            f"{corpus.path}: {repeated:,} of {n:,} passages repeat the title and text of another "
            "one; all are kept, and can take several places of one answer"
        )
    if corpus.num_long:
        yield (
            f"{corpus.path}: {corpus.num_long:,} of {n:,} passages are longer than {LONG:,} "
            f"characters (the longest has {corpus.longest:,}), which most encoders cut; "
            f"--split={DEFAULT_WORDS} makes passages of {DEFAULT_WORDS} words of them"
        )


def _batches(passages: Iterable[Passage], size: int) -> Iterator[list[Passage]]:
    batch: list[Passage] = []
    for p in passages:
        batch.append(p)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _write_ids(hashes: UInt64[np.ndarray, " n"], corpus: Corpus, folder: Path) -> None:
    """Writes the lookup of ids. Raises UserError naming duplicate ids."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    if (repeated := ordered[1:][ordered[1:] == ordered[:-1]]).size:
        _refuse_duplicates(corpus, set(repeated[:_LISTED_DUPLICATES].tolist()), len(repeated))
    for name, array in ((_HASHES, ordered), (_ROWS, order.astype("<u4"))):
        with atomic_write(folder / name, "wb") as f:
            np.save(f, array)


def _refuse_duplicates(corpus: Corpus, hashes: set[int], total: int) -> None:
    """Raises UserError naming the ids with one of these hashes that occur twice, and their lines.

    Reads the corpus again, which is cheaper than to remember every id's line. total: of repeated
    ids, of which `hashes` may be a part.
    """
    places: dict[str, list[str]] = {}
    for where, p in corpus:
        if int(id_hashes([p.id])[0]) in hashes:
            places.setdefault(p.id, []).append(where)
    repeated = [(i, where) for i, where in places.items() if len(where) > 1]
    if not repeated:
        return
    shown = "; ".join(
        f"{where[1]}: id {i!r} was already used at {where[0]}"
        for i, where in repeated[:_SHOWN_DUPLICATES]
    )
    more = max(total, len(repeated)) - _SHOWN_DUPLICATES
    more_text = f"; {more} more ids are used twice" if more > 0 else ""
    raise UserError(f"{shown}{more_text}; make them differ, or leave the field out")


# ---- reading -------------------------------------------------------------------------------------
class PassageStore:
    """A finished store as a read-only sequence of passages. Safe to share between threads."""

    def __init__(self, folder: str | Path):
        """Raises UserError if the store is missing, unfinished or cut off."""
        import pyarrow as pa

        self.folder = Path(folder)
        self.counts: dict[str, Any] = read_object(self.folder / COUNTS, ("passages",))
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(self.folder / _TABLE)))
            self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
            self._hashes = np.load(self.folder / _HASHES, mmap_mode="r")
            self._rows = np.load(self.folder / _ROWS, mmap_mode="r")
        except (pa.ArrowInvalid, OSError, ValueError, EOFError) as e:
            raise UserError(
                f"{self.folder}: is damaged ({e}); remove it and make it again"
            ) from None
        n = sum(b.num_rows for b in self._batches)
        if not n == self.counts["passages"] == len(self._hashes) == len(self._rows):
            raise UserError(f"{self.folder}: is cut off; remove it and make it again")

    def reading(self) -> CorpusConfig | None:
        """How the corpus was read; None if the store is of a version that did not record it."""
        path = self.folder / READING
        return build(CorpusConfig, read_object(path, ()), str(path)) if path.is_file() else None

    def __len__(self) -> int:
        return self.counts["passages"]

    def __getitem__(self, row: int) -> Passage:
        if not 0 <= row < len(self):
            raise IndexError(row)
        batch, i = self._batches[row // BATCH_ROWS], row % BATCH_ROWS
        id_, title, text = (batch.column(c)[i].as_py() for c in range(3))
        return Passage(id_, title, text)

    def read(self, start: int, stop: int) -> Iterator[Passage]:
        """Yields the passages of rows start .. stop - 1."""
        while start < min(stop, len(self)):
            batch, i = self._batches[start // BATCH_ROWS], start % BATCH_ROWS
            part = batch.slice(i, min(batch.num_rows - i, stop - start))
            yield from map(Passage, *(part.column(c).to_pylist() for c in range(3)))
            start += part.num_rows

    def __iter__(self) -> Iterator[Passage]:
        return self.read(0, len(self))

    def rows_of(self, ids: Sequence[str]) -> Int64[np.ndarray, " n"]:
        """Returns the row of each id; -1 for an id that the corpus does not have."""
        hashes = id_hashes(ids)
        at = np.searchsorted(self._hashes, hashes)
        rows = np.full(len(ids), -1, np.int64)
        for i, id_ in enumerate(ids):
            j = int(at[i])
            while j < len(self) and self._hashes[j] == hashes[i]:
                row = int(self._rows[j])
                if self._batches[row // BATCH_ROWS].column(0)[row % BATCH_ROWS].as_py() == id_:
                    rows[i] = row
                    break
                j += 1
        return rows
