"""`selfrag collect`: instructions with passages in, critic data out (paper, Section 3.2.1)."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from selfrag_jax import artifacts
from selfrag_jax.commands.command import Command, Flag, config_flag, config_section
from selfrag_jax.critic.collecting import CollectConfig, RuleTeacher, critique_queries
from selfrag_jax.errors import UserError
from selfrag_jax.progress import progress
from selfrag_jax.records import CriticExample, instruction_from, read_records, write_jsonl
from selfrag_jax.world.truth import read_truth


def collect_critiques(
    input_path: str | Path, truth: str | Path, config: CollectConfig, out: str | Path
) -> int:
    """Asks the teacher about the input's rows and writes critic data; returns the number of rows.

    input_path: instructions with `ctxs`, as `selfrag retrieve` writes them; truth: the world's
    teacher.jsonl. Does nothing, and returns 0, if `out` is already finished.
    """
    inputs = {"input": input_path, "truth": truth}
    made = {**vars(config), "limit": None}  # a setting of the past, kept for old manifests
    if artifacts.is_finished(out, "collect", made, inputs):
        return 0
    rows = read_records(input_path, instruction_from)
    if not any(row.ctxs for row in rows):
        raise UserError(
            f"{input_path}: no row has passages (ctxs); run `selfrag retrieve` on it first"
        )
    teacher = RuleTeacher(read_truth(truth), config.teacher_error_rate, config.seed)
    examples: list[CriticExample] = []
    with progress("collect", len(rows), "instructions") as bar:
        for row in rows:
            rng = random.Random(f"collect-{config.seed}-{row.id}")
            for q in critique_queries(row, config, rng):
                label = teacher.judge(q, row.id)
                examples.append(
                    CriticExample(q.group, q.instruction, label, q.preceding, q.evidence, q.output)
                )
            bar.advance()
    n = write_jsonl(out, examples)
    counts = {"examples": n, **Counter(e.output for e in examples)}
    artifacts.write_manifest(out, "collect", made, inputs, counts)
    return n


def run(values: dict[str, Any], _: list[str]) -> None:
    config = config_section(values, CollectConfig, "collect")
    config = replace(config, teacher=values["teacher"])
    collect_critiques(values["input"], values["truth"], config, values["out"])
    print(values["out"])


COMMAND = Command(
    example="selfrag collect --input=W/retrieved/instructions.jsonl --truth=W/world/teacher.jsonl "
    "--out=W/critic_data.jsonl",
    flags=(
        Flag("input", "instructions with ctxs, as `selfrag retrieve` writes them", required=True),
        Flag("teacher", "rule: judges by the synthetic world's truth", "rule"),
        Flag("truth", "the world's teacher.jsonl", required=True),
        Flag("out", "critic data (JSON lines)", required=True),
        config_flag(),
    ),
    run=run,
)
