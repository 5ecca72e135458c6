"""`selfrag index`: embeddings (or a corpus) in, a ScaNN index out."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from selfrag_jax import artifacts
from selfrag_jax.commands.command import Command, Flag, config_flag, config_section
from selfrag_jax.commands.embed import embed_corpus
from selfrag_jax.errors import UserError
from selfrag_jax.retrieval import encoders, index


def build_index(embeddings: str | Path, config: index.IndexConfig, out: str | Path) -> int:
    """Builds the index of an `embed` artifact; returns the number of passages.

    Does nothing if `out` is already finished. Raises UserError if the embeddings are unfinished or
    hold NaN, and if `out` is a folder of something else.
    """
    embeddings, out = artifacts.require_finished(embeddings, "embed"), Path(out)
    inputs = {"embeddings": embeddings}
    if artifacts.is_finished(out, "index", config, inputs):
        return len(encoders.read_embeddings(embeddings))
    vectors = index.checked_vectors(embeddings)
    if out.exists() and any(out.iterdir()):
        raise UserError(
            f"{out}: is not empty and was not made by `selfrag index`; choose another --out"
        )
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    index.write_index(vectors, config, embeddings, temporary)
    counts = {"passages": len(vectors)}
    artifacts.write_manifest(temporary, "index", config, inputs, counts)
    if out.exists():
        out.rmdir()  # empty, as checked above
    temporary.rename(out)
    return len(vectors)


def run(values: dict[str, Any], _: list[str]) -> None:
    embeddings, passages, out = values["embeddings"], values["passages"], Path(values["out"])
    if bool(embeddings) == bool(passages):
        raise UserError(
            "give either --embeddings, made by `selfrag embed`, or --passages to do both in one"
        )
    if passages:
        embeddings = out.with_name(out.name + "_embeddings")
        encoder = config_section(values, encoders.EncoderConfig, "encoder")
        embed_corpus(passages, encoder, embeddings)
    n = build_index(embeddings, config_section(values, index.IndexConfig, "index"), out)
    print(f"{values['out']}: {n} passages")


COMMAND = Command(
    example="selfrag index --passages=passages.tsv --out=W/index",
    flags=(
        Flag("embeddings", "made by `selfrag embed`"),
        Flag("passages", "a corpus to embed and index in one step"),
        Flag("out", "folder to write", required=True),
        config_flag(),
    ),
    run=run,
)
