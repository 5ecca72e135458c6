"""Training data without reflection tokens: of baselines, and of the paper's trained ablations."""

from __future__ import annotations

import random
from pathlib import Path

from selfrag_jax import artifacts
from selfrag_jax.data.instructions import checked_instructions, require_passages
from selfrag_jax.errors import UserError
from selfrag_jax.records import GeneratorExample, write_jsonl
from selfrag_jax.text.prompts import format_passage

KINDS = {
    "closed": "outputs alone (the paper's ablation without a retriever)",
    "top1": "the top passage in front of every output (the paper's ablation without a critic)",
    "rag": "the top passage in four of five rows, all passages in the others",
}


def baseline_data(input_path: str | Path, kind: str, seed: int, out: str | Path) -> int:
    """Writes training rows without reflection tokens; returns their number.

    input_path: instructions with outputs. kind: of KINDS. Returns 0 if they are there already.
    Raises UserError for an unknown kind, and if no row has passages where the kind needs them.
    """
    if kind not in KINDS:
        raise UserError(f"--plain={kind}: must be one of {', '.join(KINDS)}")
    config, inputs = {"kind": kind, "seed": seed}, {"input": input_path}
    if artifacts.is_finished(out, "baseline_data", config, inputs):
        return 0
    rows, any_passages = [], False
    for _, row in checked_instructions(input_path):
        any_passages = any_passages or bool(row.ctxs)
        ctxs = () if kind == "closed" else row.ctxs[:1]
        if kind == "rag":
            draw = random.Random(f"{kind}-{seed}-{row.id}").random()
            ctxs = row.ctxs if draw < 0.2 else row.ctxs[:1]
        output = "".join(map(format_passage, ctxs)) + row.output
        rows.append(GeneratorExample(row.id, row.instruction, output, row.input, row.dataset_name))
    require_passages(input_path, any_passages or kind == "closed")
    n = write_jsonl(out, rows)
    artifacts.write_manifest(out, "baseline_data", config, inputs, {"rows": n})
    return n
