"""Passages added to a finished index, and removed from it: `selfrag index --add` and `--remove`."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from selfrag_jax import artifacts, locks
from selfrag_jax.commands.index_plan import PLAN, plan_of
from selfrag_jax.errors import UserError
from selfrag_jax.files import open_text, read_json, write_json
from selfrag_jax.retrieval import embedding
from selfrag_jax.retrieval.bm25 import MIXES, NAME
from selfrag_jax.retrieval.corpus import Corpus, CorpusConfig
from selfrag_jax.retrieval.passages import BATCH_ROWS
from selfrag_jax.retrieval.plan import IndexConfig

if TYPE_CHECKING:
    from selfrag_jax.retrieval.index import Index

_LONG_ID = 60  # characters: what is longer is a line of something else


def add_passages(
    out: str | Path,
    passages: str | Path,
    config: IndexConfig,
    reading: CorpusConfig | None = None,
) -> int:
    """Adds a corpus to a finished index as a new segment; returns the number of new passages.

    The corpus is split and read as that of the index was. reading: names of its fields that
    differ; of an index that does not know how it was read, all of it. Raises UserError for ids that
    the index has already, and for another `split` than the index has.
    """
    from selfrag_jax.retrieval import index, segments

    out = artifacts.require_finished(out, "index")
    reading = reading or CorpusConfig()
    with locks.exclusive_workdir(out):
        opened = index.Index(out, searchable=False)
        if built := opened.segments[0].store.reading():
            reading = reading.adding_to(built)
        corpus = Corpus(passages, reading)
        name = f"{len(opened.segments):04d}"
        folder = out / index.SEGMENTS / name
        shutil.rmtree(folder, ignore_errors=True)  # of an addition killed before it counted
        unfinished = folder.with_name(f".{name}.tmp")
        made = asdict(config) | corpus.config.changes()
        started = artifacts.identity("add", made, {"passages": corpus})
        if not (unfinished / started).is_file():  # of an addition of another corpus
            shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(exist_ok=True)
        (unfinished / started).touch()
        like = opened.segments[0].vectors.layout
        try:
            work = embedding.EmbeddingWork.start_addition(unfinished, corpus, opened.encoder, like)
            _refuse_known_ids(opened, work, corpus.may_split())
        except UserError:
            shutil.rmtree(unfinished)
            raise
        work.embed()
        mix = NAME if opened.has_bm25 else MIXES[0]
        chosen = plan_of(unfinished, unfinished, config, mix)
        segments.write_segment(unfinished, chosen, config, opened.has_bm25)
        for name_of_work in (PLAN, started):
            (unfinished / name_of_work).unlink()
        artifacts.remove_temporary_files(unfinished)
        unfinished.rename(folder)
        n = len(opened) + len(work.store)
        _change_manifest(out, f"added {name}", corpus, n)
        row = read_json(out / index.INDEX)
        write_json(out / index.INDEX, row | {"segments": [*row["segments"], name]})
        return len(work.store)


def _refuse_known_ids(opened: Index, work: embedding.EmbeddingWork, may_split: bool) -> None:
    """Raises UserError naming an id that an index has already.

    may_split: a document may have become several passages. One that had several before and has one
    now, or one before and several now, is known, too.
    """
    for start in range(0, len(work.store), BATCH_ROWS):
        ids = [p.id for p in work.store.read(start, start + BATCH_ROWS)]
        rows = opened.rows_of(ids)
        if (rows >= 0).any():
            known = ids[int(np.argmax(rows >= 0))]
            raise UserError(
                f"id {known!r} is in the index already; remove it first (`selfrag index --remove`)"
            )
        if not may_split:
            continue
        before = [i.removesuffix("#1") if i.endswith("#1") else f"{i}#1" for i in ids]
        rows = opened.rows_of(before)
        if (rows >= 0).any():
            i = int(np.argmax(rows >= 0))
            document = ids[i].removesuffix("#1")
            pieces = "in several passages" if before[i].endswith("#1") else "in one passage"
            raise UserError(
                f"document {document!r} is in the index already, {pieces}; remove it first "
                "(`selfrag index --remove`)"
            )


def remove_passages(out: str | Path, ids_file: str | Path) -> int:
    """Removes the passages whose ids a file lists, one in each line; returns their number.

    The id of a document that was split stands for all of its passages. Raises UserError naming a
    line with an id that the index does not have.
    """
    from selfrag_jax.retrieval import index

    out = artifacts.require_finished(out, "index")
    with open_text(ids_file) as (f, _):
        lines = [line.rstrip("\r\n") for line in f]
    numbers = [i for i, line in enumerate(lines) if line]
    ids = [lines[i] for i in numbers]
    if not ids:
        raise UserError(f"{ids_file}: lists no ids; expected one on each line")
    with locks.exclusive_workdir(out):
        opened = index.Index(out, searchable=False)
        rows = opened.rows_of(ids)
        missing = np.flatnonzero(rows < 0)
        pieces = _rows_of_pieces(opened, [ids[i] for i in missing])
        for i, of_document in zip(missing, pieces, strict=True):
            if not of_document:
                id_ = ids[i] if len(ids[i]) < _LONG_ID else f"{ids[i][:_LONG_ID]}..."
                raise UserError(
                    f"{ids_file}:{numbers[i] + 1}: the index has no passage {id_!r}; --remove "
                    "takes a file of ids, one on each line"
                )
        rows = np.concatenate([rows[rows >= 0], *(np.array(p, np.int64) for p in pieces)])
        removed = np.union1d(opened.removed, rows)
        if len(removed) == sum(len(segment) for segment in opened.segments):
            raise UserError(
                f"{ids_file}: removes every passage of {out}; delete the folder instead"
            )
        name = f"removed {len(removed)}"
        _change_manifest(out, name, ids_file, len(opened) - len(np.unique(rows)))
        index.write_removed(out, removed)
        return len(np.unique(rows))


def _rows_of_pieces(opened: Index, documents: list[str]) -> list[list[int]]:
    """The rows of the passages into which each document was split, [] if there are none.

    Some may have been removed by ids of their own, so the count goes on past them.
    """
    found: list[list[int]] = [[] for _ in documents]
    going_on, number = list(range(len(documents))), 1
    while going_on:
        ids = [f"{documents[i]}#{number}" for i in going_on]
        for i, row in zip(going_on, opened.rows_of(ids).tolist(), strict=True):
            if row >= 0:
                found[i].append(row)
        known = opened.rows_of(ids, removed=True) >= 0
        going_on = [i for i, is_known in zip(going_on, known, strict=True) if is_known]
        number += 1
    return found


def _change_manifest(out: Path, name: str, source: artifacts.Input, num_passages: int) -> None:
    """Adds an input to the manifest, by which later stages see that the index has changed."""
    path = artifacts.manifest_path(out)
    manifest = read_json(path)
    while name in manifest["inputs"]:  # by a change that was killed before it counted
        name += " again"
    manifest["inputs"][name] = artifacts.fingerprint(source)
    manifest["counts"]["passages"] = num_passages
    write_json(path, manifest)
