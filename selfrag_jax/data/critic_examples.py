"""Training examples of the critic: a critique prompt, and one reflection token as the only target.

See the paper, Section 3.2.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selfrag_jax.data.batches import Example, Span, build_example
from selfrag_jax.data.published_files import Faults, RowFault
from selfrag_jax.data.released import critic_example, is_released_critic, read_released_critic
from selfrag_jax.errors import UserError
from selfrag_jax.records import CriticExample, critic_example_from, read_records
from selfrag_jax.text import prompts, reflection
from selfrag_jax.text.tokenizer import Control, Tokenizer


class CriticSource:
    """Critic data as a Source.

    brief: use the short prompts for small models. A critic must be prompted as it was trained.
    """

    def __init__(
        self,
        rows: Sequence[CriticExample],
        tokenizer: Tokenizer,
        brief: bool,
        group_weights: dict[str, float],
    ):
        self.rows, self.tokenizer, self.brief = rows, tokenizer, brief
        self.group_weights = group_weights
        self.size = len(rows)

    @classmethod
    def read(
        cls,
        path: str | Path,
        tokenizer: Tokenizer,
        brief: bool,
        group_weights: dict[str, float],
        released: bool = False,
        faults: Faults | None = None,
    ) -> CriticSource:
        """Reads a file of critic data, as `read_critic_examples` does."""
        return cls(read_critic_examples(path, released, faults), tokenizer, brief, group_weights)

    def example(self, i: int) -> Example:
        row = self.rows[i]
        prompt = prompts.critique(critique_query(row), self.brief)
        spans: list[Span] = [(prompt, 0.0), ([Control(row.output)], 1.0)]
        return build_example(self.tokenizer, spans, self.group_weights)


def read_critic_examples(
    path: str | Path, released: bool = False, faults: Faults | None = None
) -> list[CriticExample]:
    """Returns the rows of a file of critic data.

    released: malformed rows of a published file are left out, reported, and noted in `faults`.
    Without it, raises UserError as `checked_critic_example` does.
    """
    if released:
        return read_released_critic(path, faults)
    return read_records(path, checked_critic_example)


def critique_query(row: CriticExample) -> prompts.CritiqueQuery:
    """Returns the query of a critic example, without its label."""
    return prompts.CritiqueQuery(
        row.task, row.instruction, row.preceding, row.evidence, row.segment
    )


def checked_critic_example(where: str, row: dict[str, Any]) -> CriticExample:
    """Returns a row of critic data, of our layout or of the published one.

    Raises UserError with file and line if the row has an unknown task, lacks its evidence, or has a
    label of another group.
    """
    if is_released_critic(row):
        try:
            return critic_example(row)
        except RowFault as fault:
            raise UserError(
                f"{where}: {fault}; --format=released leaves out such rows of published data"
            ) from None
    example = critic_example_from(where, row)
    if example.task not in reflection.GROUPS:
        groups = ", ".join(reflection.GROUPS)
        raise UserError(f"{where}: task {example.task!r} must be one of {groups}")
    if example.output not in reflection.GROUPS[example.task]:
        known = ", ".join(reflection.GROUPS[example.task])
        raise UserError(
            f"{where}: output {example.output!r} must be one of the {example.task} tokens: {known}"
        )
    if example.task in ("isrel", "issup") and example.evidence is None:
        raise UserError(f"{where}: missing field 'evidence': {example.task} judges a passage")
    return example
