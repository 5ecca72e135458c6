"""Training examples of the generator, from the published format.

Passages in the output are context only; everything else is learned. Each passage is masked by
itself. (The released training script masks from the beginning of the first passage to the end of
the last one, so the segments between them have no loss.)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selfrag_jax.data.batches import Example, Span, build_example
from selfrag_jax.errors import UserError
from selfrag_jax.records import GeneratorExample, generator_example_from, read_records
from selfrag_jax.text import prompts
from selfrag_jax.text.reflection import PARAGRAPH_CLOSE, PARAGRAPH_OPEN
from selfrag_jax.text.tokenizer import EOS, Control, Tokenizer

_MARKUP = (PARAGRAPH_OPEN, PARAGRAPH_CLOSE)


class GeneratorSource:
    """Generator data (rows of instruction, input, output) as a Source.

    Also serves the baselines, whose outputs have no reflection tokens.
    """

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
        """Reads a file of generator data.

        Raises UserError with file and line if a row is malformed or a passage is not closed.
        """
        return cls(read_records(path, _checked_example), tokenizer, group_weights)

    def example(self, i: int) -> Example:
        row = self.rows[i]
        spans: list[Span] = [
            (prompts.instruction(row.instruction, row.input), 0.0),
            *output_spans(row.output),
            ([Control(EOS)], 1.0),
        ]
        return build_example(self.tokenizer, spans, self.group_weights)


def output_spans(output: str) -> list[Span]:
    """Returns the parts of an output with their loss weights.

    The weight is 0 from each `<paragraph>` to its own `</paragraph>`, and 1 elsewhere.
    """
    spans: list[Span] = []
    in_passage = False
    for part in prompts.parse_output(output):
        if isinstance(part, Control) and part.token == PARAGRAPH_OPEN:
            in_passage = True
        spans.append(([part], 0.0 if in_passage else 1.0))
        if isinstance(part, Control) and part.token == PARAGRAPH_CLOSE:
            in_passage = False
    return spans


def _checked_example(where: str, row: dict[str, Any]) -> GeneratorExample:
    example = generator_example_from(where, row)
    controls = [p.token for p in prompts.parse_output(example.output) if isinstance(p, Control)]
    markup = [token for token in controls if token in _MARKUP]
    if markup != list(_MARKUP) * (len(markup) // 2):
        raise UserError(
            f"{where}: each {PARAGRAPH_OPEN} in output must be followed by its own "
            f"{PARAGRAPH_CLOSE}"
        )
    return example
