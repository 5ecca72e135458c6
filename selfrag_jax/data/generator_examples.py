"""Generator examples from the published format: passages in the output are read, everything else is learned.

Each passage is masked on its own (the released training script masks from the first passage's beginning to the last
one's end, which leaves the segments between without a loss).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from selfrag_jax.data.batches import Example, build_example
from selfrag_jax.errors import UserError
from selfrag_jax.records import GeneratorExample, generator_example_from, read_records
from selfrag_jax.text import prompts
from selfrag_jax.text.reflection import PARAGRAPH_CLOSE, PARAGRAPH_OPEN
from selfrag_jax.text.tokenizer import EOS, Control, Part, Tokenizer

_MARKS = (PARAGRAPH_OPEN, PARAGRAPH_CLOSE)


class GeneratorSource:
    """Rows `instruction, input, output` for the packer; also baselines' rows, whose outputs hold no reflection tokens."""

    def __init__(
        self,
        rows: Sequence[GeneratorExample],
        tokenizer: Tokenizer,
        group_weights: dict[str, float],
    ):
        self.rows, self.tokenizer, self.group_weights = rows, tokenizer, group_weights
        self.size = len(rows)

    @classmethod
    def read(
        cls, path: str | Path, tokenizer: Tokenizer, group_weights: dict[str, float]
    ) -> GeneratorSource:
        """Raises BadInput naming file and line of a row that is no example, or whose passages do not end."""

        def check(where, row):
            example = generator_example_from(where, row)
            marks = [
                p.token
                for p in prompts.parse_output(example.output)
                if isinstance(p, Control) and p.token in _MARKS
            ]
            if marks != list(_MARKS) * (len(marks) // 2):
                raise UserError(
                    f"{where}: each {PARAGRAPH_OPEN} in output must be followed by its own {PARAGRAPH_CLOSE}"
                )
            return example

        return cls(read_records(path, check), tokenizer, group_weights)

    def example(self, i: int) -> Example:
        row = self.rows[i]
        segments = [
            (prompts.instruction(row.instruction, row.input), 0.0),
            *output_segments(row.output),
        ]
        return build_example(self.tokenizer, [*segments, ([Control(EOS)], 1.0)], self.group_weights)


def output_segments(output: str) -> list[tuple[list[Part], float]]:
    """The parts of an output with their loss weights: 0 from `<paragraph>` to its own `</paragraph>`, else 1."""
    segments: list[tuple[list[Part], float]] = []
    inside = False
    for part in prompts.parse_output(output):
        if isinstance(part, Control) and part.token == PARAGRAPH_OPEN:
            inside = True
        segments.append(([part], 0.0 if inside else 1.0))
        if isinstance(part, Control) and part.token == PARAGRAPH_CLOSE:
            inside = False
    return segments
