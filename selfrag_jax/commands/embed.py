"""`selfrag embed`: a corpus in, its embeddings out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from selfrag_jax import artifacts
from selfrag_jax.commands.command import Command, Flag, config_flag, config_section
from selfrag_jax.retrieval import corpus, encoders


def embed_corpus(passages: str | Path, config: encoders.EncoderConfig, out: str | Path) -> int:
    """Writes embeddings.npy [n, dim] float32, encoder.json and the passages; returns n.

    Does nothing if `out` is already finished.
    """
    out, inputs = Path(out), {"passages": passages}
    rows = corpus.read_corpus(passages)
    if not artifacts.is_finished(out, "embed", config, inputs):
        out.mkdir(parents=True, exist_ok=True)
        encoders.write_embeddings(rows, config, out)
        corpus.write_tsv(out / encoders.PASSAGES, rows)
        artifacts.write_manifest(out, "embed", config, inputs, {"passages": len(rows)})
    return len(rows)


def run(values: dict[str, Any], _: list[str]) -> None:
    config = config_section(values, encoders.EncoderConfig, "encoder")
    config = replace(config, name=values["encoder"])
    n = embed_corpus(values["passages"], config, values["out"])
    print(f"{values['out']}: {n} passages")


COMMAND = Command(
    example="selfrag embed --passages=passages.tsv --out=W/embeddings",
    flags=(
        Flag(
            "passages", ".tsv (columns id, text, title) or .jsonl (id, title, text)", required=True
        ),
        Flag("encoder", "hashed: words and trigrams, no training", "hashed"),
        Flag("out", "folder to write", required=True),
        config_flag(),
    ),
    run=run,
)
