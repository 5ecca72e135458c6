"""`selfrag index`: embeddings (or a corpus) in, an index out; passages added and removed."""

from __future__ import annotations

import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from selfrag_jax import artifacts
from selfrag_jax.commands.command import (
    INPUT,
    Command,
    Flag,
    config_flag,
    config_section,
    flags_of,
    given,
)
from selfrag_jax.commands.embed import ENCODER_FLAGS, embed_corpus, encoder_config
from selfrag_jax.errors import UserError
from selfrag_jax.files import link_or_copy_tree, open_text, read_json, write_json
from selfrag_jax.retrieval import bm25, embedding
from selfrag_jax.retrieval.bm25 import MIXES
from selfrag_jax.retrieval.corpus import Corpus
from selfrag_jax.retrieval.encoders import open_encoder
from selfrag_jax.retrieval.passages import BATCH_ROWS
from selfrag_jax.retrieval.plan import IndexConfig, Plan, budget_of, plan, show_bytes
from selfrag_jax.retrieval.vectors import VectorLayout

if TYPE_CHECKING:
    from selfrag_jax.retrieval.index import Index

_INDEX, _CHANGES = "Index", "Changes to an index"
INDEX_FLAGS = flags_of(IndexConfig, "index", _INDEX)
_PLAN = "plan.json"
_LOW_RECALL = 0.9


def build_index(
    embeddings: str | Path, config: IndexConfig, out: str | Path, mix: str = "none"
) -> int:
    """Builds the index of an `embed` artifact; returns the number of passages.

    mix: "bm25" to index the words as well. Does nothing if `out` is already finished, and continues
    if it was interrupted. Raises UserError if the embeddings are unfinished, if no structure fits
    the memory, and if `out` is a folder of something else.
    """
    from selfrag_jax.retrieval import index, segments

    if mix not in MIXES:
        raise UserError(f"--mix={mix}: must be one of {', '.join(MIXES)}")
    embeddings, out = artifacts.require_finished(embeddings, "embed"), Path(out)
    if not (embeddings / embedding.VECTORS).is_dir():
        raise UserError(f"{embeddings}: damaged, or of an older version; embed the corpus again")
    inputs, made = {"embeddings": embeddings}, asdict(config) | {"mix": mix}
    if changes := _changes(out):
        raise UserError(
            f"{out}: was changed since it was built ({changes[0]}); choose another --out"
        )
    if artifacts.is_finished(out, "index", made, inputs):
        return embedding.num_passages(embeddings)
    _require_free(out)
    unfinished = out.with_name(f".{out.name}.tmp")
    with artifacts.exclusive_workdir(unfinished):
        segment = unfinished / index.SEGMENTS / "0000"
        if not any((segment / segments.PARTS).glob("[0-9]*")):
            _clear(unfinished)  # no part is finished: other settings may begin anew
        artifacts.claim_workdir(unfinished, "index", made, inputs)
        chosen = _plan_of(segment, embeddings, config, mix)
        for name in (embedding.PASSAGES, embedding.VECTORS):
            if not (segment / name).is_dir():
                _link(embeddings / name, segment / name)
        if not (unfinished / index.ENCODER).is_dir():
            _link(embeddings / embedding.ENCODER, unfinished / index.ENCODER)
        segments.write_segment(segment, chosen, config, mix == bm25.NAME)
        recall = index.measure_recall(
            segments.Segment(segment), open_encoder(unfinished / index.ENCODER), config
        )
        index.write_index(unfinished, [segment.name], config.candidates, recall=recall)
        counts = {"passages": chosen.rows} | recall | {"resident_bytes": round(chosen.resident)}
        (segment / _PLAN).unlink()
        artifacts.remove_temporary_files(unfinished)
        artifacts.write_manifest(unfinished, "index", made, inputs, counts)
        if out.exists():
            out.rmdir()  # empty, as checked above
        unfinished.rename(out)
    if recall["queries"]:
        print(f"recall@10 {recall['recall@10']:.3f} against exact search", file=sys.stderr)
    if recall["recall@10"] < _LOW_RECALL:
        print(
            f"this is low; under another --out, from {embeddings}, try "
            f"--config.index.leaves_search_fraction={min(1, 4 * config.leaves_search_fraction)}",
            file=sys.stderr,
        )
    return chosen.rows


def _changes(out: Path) -> list[str]:
    """The additions and removals that the manifest of an index records, in their order."""
    path = artifacts.manifest_path(out)
    made = read_json(path) if path.is_file() else {}
    inputs = made["inputs"] if made.get("stage") == "index" else {}
    return [name for name in inputs if name.startswith(("added ", "removed "))]


def _clear(folder: Path) -> None:
    """Empties a folder of ours, but for its lock."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != artifacts.LOCK:
            path.unlink()


def _require_free(out: Path) -> None:
    """Raises UserError if there is anything at `out` but an empty folder."""
    if out.is_file():
        raise UserError(f"{out}: is a file; `selfrag index` writes a folder")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(
            f"{out}: is not empty and was not made by `selfrag index`; choose another --out"
        )


def _plan_of(segment: Path, embeddings: Path, config: IndexConfig, mix: str) -> Plan:
    """Plans a segment, or returns the plan that an interrupted run made.

    Without a budget the plan depends on the memory that happens to be free.
    """
    if (segment / _PLAN).is_file():
        row = read_json(segment / _PLAN)
        return Plan(**row | {"parts": tuple(map(tuple, row["parts"]))})
    layout = VectorLayout.read(embeddings / embedding.VECTORS)
    chosen = plan(layout.rows, layout.dim, config)
    needed = layout.rows * bm25.BUILD_BYTES
    if mix == bm25.NAME and needed > (budget := budget_of(config)):
        raise UserError(
            f"--mix=bm25: the words of {layout.rows:,} passages need about {show_bytes(needed)} "
            f"while they are indexed; the budget is {show_bytes(budget)} (--memory)"
        )
    print(chosen.describe(), file=sys.stderr)
    write_json(segment / _PLAN, asdict(chosen))
    return chosen


def _link(source: Path, target: Path) -> None:
    """Links or copies a folder under a temporary name, then renames it."""
    unfinished = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    link_or_copy_tree(source, unfinished)
    unfinished.rename(target)


# ---- additions and removals ----------------------------------------------------------------------
def add_passages(out: str | Path, passages: str | Path, config: IndexConfig) -> int:
    """Adds a corpus to a finished index as a new segment; returns the number of new passages.

    Raises UserError for ids that the index has already.
    """
    from selfrag_jax.retrieval import index, segments

    out = artifacts.require_finished(out, "index")
    corpus = Corpus(passages)
    with artifacts.exclusive_workdir(out):
        opened = index.Index(out, searchable=False)
        name = f"{len(opened.segments):04d}"
        folder = out / index.SEGMENTS / name
        shutil.rmtree(folder, ignore_errors=True)  # of an addition killed before it counted
        unfinished = folder.with_name(f".{name}.tmp")
        started = artifacts.identity("add", config, {"passages": passages})
        if not (unfinished / started).is_file():  # of an addition of another corpus
            shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(exist_ok=True)
        (unfinished / started).touch()
        like = opened.segments[0].vectors.layout
        work = embedding.EmbeddingWork.start_addition(unfinished, corpus, opened.encoder, like)
        _refuse_known_ids(opened, work)
        work.embed()
        mix = bm25.NAME if opened.has_bm25 else MIXES[0]
        chosen = _plan_of(unfinished, unfinished, config, mix)
        segments.write_segment(unfinished, chosen, config, opened.has_bm25)
        for name_of_work in (_PLAN, started):
            (unfinished / name_of_work).unlink()
        artifacts.remove_temporary_files(unfinished)
        unfinished.rename(folder)
        n = len(opened) + len(work.store)
        _change_manifest(out, f"added {name}", passages, n)
        row = read_json(out / index.INDEX)
        write_json(out / index.INDEX, row | {"segments": [*row["segments"], name]})
        return len(work.store)


def _refuse_known_ids(opened: Index, work: embedding.EmbeddingWork) -> None:
    """Raises UserError naming an id that an index has already."""
    for start in range(0, len(work.store), BATCH_ROWS):
        ids = [p.id for p in work.store.read(start, start + BATCH_ROWS)]
        rows = opened.rows_of(ids)
        if (rows >= 0).any():
            known = ids[int(np.argmax(rows >= 0))]
            raise UserError(
                f"id {known!r} is in the index already; remove it first (`selfrag index --remove`)"
            )


def remove_passages(out: str | Path, ids_file: str | Path) -> int:
    """Removes the passages whose ids a file lists, one in each line; returns their number.

    Raises UserError naming a line with an id that the index does not have.
    """
    from selfrag_jax.retrieval import index

    out = artifacts.require_finished(out, "index")
    with open_text(ids_file) as (f, _):
        lines = [line.rstrip("\r\n") for line in f]
    numbers = [i for i, line in enumerate(lines) if line]
    ids = [lines[i] for i in numbers]
    if not ids:
        raise UserError(f"{ids_file}: lists no ids; expected one on each line")
    with artifacts.exclusive_workdir(out):
        opened = index.Index(out, searchable=False)
        rows = opened.rows_of(ids)
        if (rows < 0).any():
            i = int(np.argmax(rows < 0))
            raise UserError(f"{ids_file}:{numbers[i] + 1}: the index has no passage {ids[i]!r}")
        removed = np.union1d(opened.removed, rows)
        if len(removed) == sum(len(segment) for segment in opened.segments):
            raise UserError(
                f"{ids_file}: removes every passage of {out}; delete the folder instead"
            )
        name = f"removed {len(removed)}"
        _change_manifest(out, name, ids_file, len(opened) - len(np.unique(rows)))
        index.write_removed(out, removed)
        return len(np.unique(rows))


def _change_manifest(out: Path, name: str, source: str | Path, num_passages: int) -> None:
    """Adds an input to the manifest, by which later stages see that the index has changed."""
    path = artifacts.manifest_path(out)
    manifest = read_json(path)
    while name in manifest["inputs"]:  # by a change that was killed before it counted
        name += " again"
    manifest["inputs"][name] = artifacts.fingerprint(source)
    manifest["counts"]["passages"] = num_passages
    write_json(path, manifest)


# ---- the command ---------------------------------------------------------------------------------
def run(values: dict[str, Any], _: list[str]) -> None:
    sources = ("embeddings", "passages", "add", "remove")
    asked = [name for name in sources if values[name]]
    if len(asked) != 1:
        raise UserError(
            "give either --embeddings (made by `selfrag embed`), --passages (a corpus), or --add "
            f"or --remove to change --out; found {' and '.join(asked) or 'none'}"
        )
    about_the_encoder = given(values, ENCODER_FLAGS)
    if not values["passages"] and about_the_encoder:
        raise UserError(
            f"--{next(iter(about_the_encoder))}: goes with --passages; here the encoder is settled"
        )
    if values["mix"] not in MIXES:
        raise UserError(f"--mix={values['mix']}: must be one of {', '.join(MIXES)}")
    if asked[0] in ("add", "remove") and values["mix"] != MIXES[0]:
        raise UserError(f"--mix={values['mix']}: is settled when an index is built")
    config = config_section(values, IndexConfig, "index")
    config = replace(config, **given(values, INDEX_FLAGS))
    out = Path(values["out"]).absolute()
    if values["add"]:
        print(f"{out}: {add_passages(out, values['add'], config):,} passages added")
        return
    if values["remove"]:
        print(f"{out}: {remove_passages(out, values['remove']):,} passages removed")
        return
    embeddings = values["embeddings"]
    if values["passages"]:
        if not artifacts.manifest_path(out).is_file():
            _require_free(out)
        embeddings = out.with_name(out.name + "_embeddings")
        embed_corpus(values["passages"], encoder_config(values), embeddings)
    n = build_index(embeddings, config, out, values["mix"])
    print(f"{out}: {n:,} passages")


COMMAND = Command(
    example="selfrag index --passages=corpus.tsv --encoder=facebook/contriever-msmarco "
    "--memory=8GB --out=index",
    flags=(
        Flag(
            "embeddings",
            "folder of embeddings, made by `selfrag embed`",
            group=INPUT,
            is_folder=True,
        ),
        Flag(
            "passages",
            "a corpus (.tsv, .jsonl, or .gz) to embed and index in one step",
            group=INPUT,
        ),
        *ENCODER_FLAGS,
        Flag(
            "out",
            "folder to write, or the index that --add and --remove change",
            required=True,
            writes=True,
        ),
        *INDEX_FLAGS,
        Flag(
            "mix",
            "bm25: index the words as well, and fuse both rankings",
            "none",
            group=_INDEX,
            choices=MIXES,
        ),
        Flag("add", "a corpus to add to the index --out", group=_CHANGES),
        Flag(
            "remove",
            "a file with the ids of passages to remove from the index --out",
            group=_CHANGES,
        ),
        config_flag("index", examples="index, index:wikipedia"),
    ),
    run=run,
)
