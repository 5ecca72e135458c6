"""`selfrag retrieve`: rows with a question or instruction in, the same rows with passages out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfrag_jax import artifacts
from selfrag_jax.commands.command import SEARCH, Command, Flag
from selfrag_jax.data.instructions import instruction_rows
from selfrag_jax.data.question_files import question_rows
from selfrag_jax.data.questions import question_and_input
from selfrag_jax.errors import UserError
from selfrag_jax.progress import progress
from selfrag_jax.records import to_json, write_jsonl

if TYPE_CHECKING:
    from selfrag_jax.retrieval.retriever import IndexRetriever

_BATCH = 256  # queries searched at once


def retrieve_file(
    index: str | Path,
    input_path: str | Path,
    out: str | Path,
    k: int,
    mix: str | None = None,
    backend: str = "scann",
    open_index: Callable[[], IndexRetriever] | None = None,
) -> int:
    """Adds `ctxs`, the k best passages, to each row; returns the number of rows, 0 if already done.

    A k above the corpus size gives the whole corpus. mix, backend: as in IndexRetriever.
    open_index: returns the retriever to use; for several files, one that is opened once. Raises
    UserError for k < 1 and for a row without a question.
    """
    from selfrag_jax.retrieval.retriever import IndexRetriever

    config = {"k": k, "mix": mix, "backend": backend}
    inputs = {"index": index, "input": input_path}
    artifacts.require_finished(index, "index")
    if artifacts.is_finished(out, "retrieve", config, inputs):
        return 0
    rows = list(instruction_rows(input_path, read=question_rows))
    if not rows:
        raise UserError(f"{input_path}: holds no rows")
    queries = [_query(where, row) for where, row in rows]
    retriever = open_index() if open_index else IndexRetriever(index, backend, mix)
    n = len(retriever.index)
    if k > n:
        print(f"--k={k}: the corpus has {n} passages; every row gets all of them", file=sys.stderr)
    written = []
    with progress("retrieve", len(rows), "questions") as bar:
        for i in range(0, len(rows), _BATCH):
            batch = queries[i : i + _BATCH]
            found = retriever.search(batch, k)
            for (_, row), passages in zip(rows[i : i + _BATCH], found, strict=True):
                written.append(row | {"ctxs": [to_json(p) for p in passages]})
            bar.advance(len(found))
    write_jsonl(out, written)
    artifacts.write_manifest(out, "retrieve", config, inputs, {"rows": len(written)})
    return len(written)


def _query(where: str, row: dict[str, Any]) -> str:
    """The question, or the instruction followed by its input."""
    _, text, input_text = question_and_input(where, row)
    return f"{text} {input_text}" if input_text else text


def run(values: dict[str, Any], _: list[str]) -> None:
    retrieve_file(
        values["index"],
        values["input"],
        values["out"],
        values["k"],
        values["mix"],
        values["backend"],
    )
    print(values["out"])


COMMAND = Command(
    example="selfrag retrieve --index=W/index --input=questions.jsonl --out=with_passages.jsonl",
    flags=(
        Flag("index", "made by `selfrag index`", required=True, is_folder=True),
        Flag(
            "input",
            "questions or instructions in a published format, or a folder of `selfrag prepare`",
            required=True,
        ),
        Flag("out", "JSON lines", required=True, writes=True),
        Flag("k", "passages for each row", 5, type=int, group=SEARCH),
        Flag(
            "mix",
            "bm25: fuse with the ranking by words; none (default: bm25 if indexed)",
            group=SEARCH,
            choices=("none", "bm25"),
        ),
        Flag(
            "backend",
            "scann; or device: every vector, on the accelerators of this host; or "
            "device_approximate",
            "scann",
            group=SEARCH,
            choices=("scann", "device", "device_approximate"),
        ),
    ),
    run=run,
)
