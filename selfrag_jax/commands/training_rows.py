"""The rows of `selfrag train`: those to train on, and those that are held out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from selfrag_jax.commands.command import Flag
from selfrag_jax.errors import UserError
from selfrag_jax.processes.group import current
from selfrag_jax.progress import say

if TYPE_CHECKING:
    from selfrag_jax.data.batches import Source
    from selfrag_jax.data.critic_examples import CriticSource
    from selfrag_jax.data.generator_examples import GeneratorSource
    from selfrag_jax.data.published_files import Faults
    from selfrag_jax.text.tokenizer import Tokenizer
    from selfrag_jax.training.config import TrainConfig

HELD_OUT_FLAG = Flag(
    "held_out",
    "rows to measure the model on whenever a checkpoint is saved: a file in the format of the "
    "data, or a share of its rows (0.02), which are then not trained on; the best checkpoint is "
    "chosen by their loss",
)


def read_source(
    c: ConfigDict,
    role: str,
    section: TrainConfig,
    path: str | Path,
    tokenizer: Tokenizer,
    weights: dict[str, float],
    released: bool,
    faults: Faults,
) -> CriticSource | GeneratorSource:
    """The examples of a file of data."""
    from selfrag_jax.data.critic_examples import CriticSource
    from selfrag_jax.data.generator_examples import GeneratorSource

    if role == "critic":
        brief = c.label.critic.brief
        return CriticSource.read(path, tokenizer, brief, weights, released, faults)
    return GeneratorSource.read(path, tokenizer, weights, released, section.mask, faults)


def hold_out(
    source: CriticSource | GeneratorSource,
    held_out: str | None,
    seed: int,
    read: Callable[[str], CriticSource | GeneratorSource],
    name: str,
) -> tuple[Source, Source | None]:
    """The rows to train on, and those to measure on; says which they are."""
    from selfrag_jax.data import held_out as rows

    if held_out is None:
        return source, None
    share, is_main = held_out_share(held_out), current().is_main
    if share is not None:
        kept, held = rows.hold_out(source, share, seed)
        text = f"{held.size:,} of {source.size:,} rows are held out, by a hash of what they ask"
        say(name, f"{text} and seed {seed}", is_main)
        return kept, held
    others = read(held_out)
    say(name, f"{others.size:,} rows of {held_out} are held out", is_main)
    if is_main and (common := rows.questions_in_common(source, others)):
        print(
            f"warning: {common} of the {others.size} rows of {held_out} ask what a row of the "
            "training data asks; their loss says little about others",
            file=sys.stderr,
        )
    return source, rows.all_rows(others)


def held_out_share(held_out: str) -> float | None:
    """The value of --held_out as a share of the rows; None if it names a file.

    Raises UserError if it is neither a file nor a number between 0 and 1.
    """
    try:
        share = float(held_out)
    except ValueError:
        return None
    if not 0 < share < 1:
        raise UserError(f"--held_out={held_out}: must be a file, or a share between 0 and 1")
    return share
