"""`selfrag index`: embeddings (or a corpus) in, an index out; passages added and removed."""

from __future__ import annotations

import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from selfrag_jax import artifacts, locks
from selfrag_jax.commands.command import (
    INPUT,
    Command,
    Flag,
    config_flag,
    config_section,
    flags_of,
    given,
)
from selfrag_jax.commands.embed import (
    CORPUS_FLAGS,
    ENCODER_FLAGS,
    corpus_config,
    embed_corpus,
    encoder_config,
)
from selfrag_jax.commands.index_changes import add_passages, remove_passages
from selfrag_jax.commands.index_plan import PLAN, plan_of
from selfrag_jax.errors import UserError
from selfrag_jax.files import link_or_copy_tree, read_json
from selfrag_jax.retrieval import bm25, embedding
from selfrag_jax.retrieval.bm25 import MIXES
from selfrag_jax.retrieval.encoders import open_encoder
from selfrag_jax.retrieval.plan import IndexConfig

_INDEX, _CHANGES = "Index", "Changes to an index"
INDEX_FLAGS = flags_of(IndexConfig, "index", _INDEX)
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
    _refuse_pickles(Path(embeddings))
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
    with locks.exclusive_workdir(unfinished):
        segment = unfinished / index.SEGMENTS / "0000"
        if not any((segment / segments.PARTS).glob("[0-9]*")):
            _clear(unfinished)  # no part is finished: other settings may begin anew
        artifacts.claim_workdir(unfinished, "index", made, inputs)
        chosen = plan_of(segment, embeddings, config, mix)
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
        (segment / PLAN).unlink()
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


def _refuse_pickles(embeddings: Path) -> None:
    """Raises UserError for published embeddings (Contriever's passages_00 ...) as they are."""
    is_folder = embeddings.is_dir() and any(embeddings.glob("passages_[0-9]*"))
    if embeddings.is_file() or is_folder:
        pattern = embeddings / "passages_*" if is_folder else embeddings
        raise UserError(
            f"{embeddings}: published embeddings need their corpus first: selfrag embed "
            f"--passages=CORPUS --encoder=MODEL --vectors='{pattern}' --out=embeddings"
        )


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
        elif path.name != locks.LOCK:
            path.unlink()


def _require_free(out: Path) -> None:
    """Raises UserError if there is anything at `out` but an empty folder."""
    if out.is_file():
        raise UserError(f"{out}: is a file; `selfrag index` writes a folder")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(
            f"{out}: is not empty and was not made by `selfrag index`; choose another --out"
        )


def _link(source: Path, target: Path) -> None:
    """Links or copies a folder under a temporary name, then renames it."""
    unfinished = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    link_or_copy_tree(source, unfinished)
    unfinished.rename(target)


# ---- the command ---------------------------------------------------------------------------------
def run(values: dict[str, Any], _: list[str]) -> None:
    sources = ("embeddings", "passages", "add", "remove")
    asked = [name for name in sources if values[name]]
    if len(asked) != 1:
        raise UserError(
            "give either --embeddings (made by `selfrag embed`), --passages (a corpus), or --add "
            f"or --remove to change --out; found {' and '.join(asked) or 'none'}"
        )
    about_the_corpus = given(values, CORPUS_FLAGS)
    if about_the_corpus and asked[0] not in ("passages", "add"):
        raise UserError(
            f"--{next(iter(about_the_corpus))}: goes with --passages or --add, which read a corpus"
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
    reading = corpus_config(values)
    if values["add"]:
        n = add_passages(out, values["add"], config, reading)
        print(f"{out}: {n:,} passages added")
        return
    if values["remove"]:
        print(f"{out}: {remove_passages(out, values['remove']):,} passages removed")
        return
    embeddings = values["embeddings"]
    if values["passages"]:
        manifest = artifacts.manifest_path(out)
        if not manifest.is_file():
            _require_free(out)
        elif (made := read_json(manifest).get("stage")) != "index":
            raise UserError(f"{out}: was made by `selfrag {made}`; choose another --out")
        embeddings = out.with_name(out.name + "_embeddings")
        embed_corpus(values["passages"], encoder_config(values), embeddings, reading=reading)
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
            "a corpus to embed and index in one step: .tsv, .csv or .jsonl (id, text, title), "
            ".txt or .md, each also .gz; or a folder of them",
            group=INPUT,
        ),
        *CORPUS_FLAGS,
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
