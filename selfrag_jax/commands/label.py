"""`selfrag label`: a critic and instructions in, generator data out (paper, Section 3.2.2)."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfrag_jax import artifacts
from selfrag_jax.commands.command import Command, Flag, config_flag, config_section
from selfrag_jax.errors import UserError
from selfrag_jax.progress import progress
from selfrag_jax.records import (
    Instruction,
    generator_example_from,
    instruction_from,
    read_records,
    read_rows,
    write_jsonl,
)

if TYPE_CHECKING:
    from selfrag_jax.critic.labelling import LabelConfig


def label_file(
    critic_path: str | Path,
    input_path: str | Path,
    config: LabelConfig,
    out: str | Path,
    index: str | Path | None = None,
    k: int | None = None,
) -> int:
    """Labels all rows of `input_path` and writes generator data in the published format.

    index: where to find k passages for rows without ctxs. Returns the number of examples; 0 if it
    is finished already. An interrupted run continues after the last finished chunk. Raises
    UserError if no row has passages.
    """
    from selfrag_jax.checkpoints import loading
    from selfrag_jax.critic.critic import Critic
    from selfrag_jax.critic.labelling import label_rows

    made = asdict(config) | ({"k": k} if index else {})
    inputs = {"critic": critic_path, "input": input_path} | ({"index": index} if index else {})
    artifacts.require_finished(critic_path, "train", "critic")
    if artifacts.is_finished(out, "label", made, inputs):
        return 0
    rows = _with_passages(read_records(input_path, instruction_from), index, k)
    if not any(r.ctxs for r in rows):
        raise UserError(
            f"{input_path}: no row has passages (ctxs); give --index, "
            "or run `selfrag retrieve` on it first"
        )
    critic = Critic(loading.load(critic_path), config.critic)
    # Named by critic, config and input: chunks of another run are never continued.
    all_chunks = Path(out).with_name(Path(out).name + ".parts")
    chunks = all_chunks / artifacts.identity("label", made, inputs)
    files = []
    with progress("label", len(rows), "instructions") as bar:
        for i in range(0, len(rows), config.chunk):
            chunk = rows[i : i + config.chunk]
            files.append(chunks / f"{i:08d}.jsonl")
            if files[-1].is_file():
                bar.skip(len(chunk))
            else:
                write_jsonl(files[-1], label_rows(critic, chunk, config))
                bar.advance(len(chunk))
    examples = [generator_example_from(*row) for file in files for row in read_rows(file)]
    n = write_jsonl(out, examples)
    artifacts.write_manifest(out, "label", made, inputs, {"examples": n})
    artifacts.remove_parts(all_chunks)
    return n


def _with_passages(
    rows: list[Instruction], index: str | Path | None, k: int | None
) -> list[Instruction]:
    from selfrag_jax.retrieval.retriever import OnlineRetriever

    if index is None or k is None:
        return rows
    queries = [r.full_instruction for r in rows]
    found = OnlineRetriever(index).passages([r.ctxs for r in rows], queries, k)
    return [replace(r, ctxs=r.ctxs or tuple(ps)) for r, ps in zip(rows, found, strict=True)]


def run(values: dict[str, Any], _: list[str]) -> None:
    from selfrag_jax.critic.labelling import LabelConfig

    config = config_section(values, LabelConfig, "label")
    label_file(
        values["critic"], values["input"], config, values["out"], values["index"], values["k"]
    )
    print(values["out"])


COMMAND = Command(
    example="selfrag label --critic=W/critic --input=W/retrieved/instructions.jsonl "
    "--out=W/generator_data.jsonl",
    flags=(
        Flag("critic", "workdir of a trained critic", required=True),
        Flag(
            "input",
            "instructions with outputs, and with ctxs unless --index is given",
            required=True,
        ),
        Flag("index", "made by `selfrag index`: finds passages for rows without ctxs"),
        Flag("k", "passages for each row, from the index", 5, type=int),
        Flag("out", "generator data in the published format (JSON lines)", required=True),
        config_flag(),
    ),
    run=run,
)
