"""Critic examples: the critique prompt, and one reflection token as the only target (paper, Section 3.2.1)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from selfrag_jax.data.batches import Example, build_example
from selfrag_jax.errors import UserError
from selfrag_jax.records import CriticExample, critic_example_from, read_records
from selfrag_jax.text import prompts, reflection
from selfrag_jax.text.tokenizer import Control, Tokenizer


class CriticSource:
    """Critic examples for the packer. `brief` prompts are for small models; a critic is asked as it was trained."""

    def __init__(
        self,
        rows: Sequence[CriticExample],
        tokenizer: Tokenizer,
        brief: bool,
        group_weights: dict[str, float],
    ):
        self.rows, self.tokenizer, self.brief, self.group_weights = (
            rows,
            tokenizer,
            brief,
            group_weights,
        )
        self.size = len(rows)

    @classmethod
    def read(
        cls, path: str | Path, tokenizer: Tokenizer, brief: bool, group_weights: dict[str, float]
    ) -> CriticSource:
        """Raises BadInput naming file and line of a row with an unknown task or a label of another group."""

        def check(where, row):
            example = critic_example_from(where, row)
            if example.task not in reflection.GROUPS:
                raise UserError(
                    f"{where}: task {example.task!r} is none of {', '.join(reflection.GROUPS)}"
                )
            if example.output not in reflection.GROUPS[example.task]:
                known = ", ".join(reflection.GROUPS[example.task])
                raise UserError(
                    f"{where}: output {example.output!r} is no {example.task} token ({known})"
                )
            return example

        return cls(read_records(path, check), tokenizer, brief, group_weights)

    def example(self, i: int) -> Example:
        row = self.rows[i]
        prompt = prompts.critique(critique_query(row), self.brief)
        return build_example(
            self.tokenizer, [(prompt, 0.0), ([Control(row.output)], 1.0)], self.group_weights
        )


def critique_query(row: CriticExample) -> prompts.CritiqueQuery:
    return prompts.CritiqueQuery(
        row.task, row.instruction, row.preceding, row.evidence, row.segment
    )
