"""The plan of a segment, which an interrupted `selfrag index` keeps."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

from selfrag_jax.errors import UserError
from selfrag_jax.files import read_json, write_json
from selfrag_jax.retrieval import bm25, embedding
from selfrag_jax.retrieval.plan import IndexConfig, Plan, budget_of, plan, show_bytes
from selfrag_jax.retrieval.vectors import VectorLayout

PLAN = "plan.json"


def plan_of(segment: Path, embeddings: Path, config: IndexConfig, mix: str) -> Plan:
    """Plans a segment, or returns the plan that an interrupted run made.

    Without a budget the plan depends on the memory that happens to be free.
    """
    if (segment / PLAN).is_file():
        row = read_json(segment / PLAN)
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
    write_json(segment / PLAN, asdict(chosen))
    return chosen
