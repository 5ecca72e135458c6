"""Training examples of the generator, from the published format.

Passages in the output are context only; everything else is learned. Each passage is masked by
itself, and its marks with it. The released training script masks from the first `<paragraph>` to
the last `</paragraph>`, so the segments between have no loss, and learns these two marks;
`mask="released"` does the same, to compare.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selfrag_jax.data import prepared
from selfrag_jax.data.batches import Example, Span, build_example
from selfrag_jax.data.chats import flatten_chat, is_chat
from selfrag_jax.data.instructions import print_chats
from selfrag_jax.data.published_files import Faults
from selfrag_jax.data.released import read_released_generator
from selfrag_jax.errors import UserError, library
from selfrag_jax.records import GeneratorExample, generator_example_from, read_records
from selfrag_jax.text import prompts, reflection
from selfrag_jax.text.reflection import PARAGRAPH_CLOSE, PARAGRAPH_OPEN
from selfrag_jax.text.tokenizer import EOS, Control, Part, Tokenizer

MASKS = ("each", "released")


class GeneratorSource:
    """Generator data (rows of instruction, input, output) as a Source.

    Also serves the baselines, whose outputs have no reflection tokens.
    """

    def __init__(
        self,
        rows: Sequence[GeneratorExample],
        tokenizer: Tokenizer,
        group_weights: dict[str, float],
        mask: str = "each",
    ):
        self.rows, self.tokenizer, self.group_weights = rows, tokenizer, group_weights
        self.mask = mask  # one of MASKS
        self.size = len(rows)

    @classmethod
    def read(
        cls,
        path: str | Path,
        tokenizer: Tokenizer,
        group_weights: dict[str, float],
        released: bool = False,
        mask: str = "each",
        faults: Faults | None = None,
    ) -> GeneratorSource:
        """Reads a file of generator data, or a folder that `selfrag prepare` made of one.

        released: malformed rows are left out, reported, and noted in `faults`. Without it, raises
        UserError with file and line if a row is malformed or a passage is not closed.
        """
        if Path(path).is_dir():
            if released:
                raise UserError(
                    f"{path}: is a folder, whose rows were checked when it was made; leave "
                    "--format=released out"
                )
            return ShuffledGeneratorSource(path, tokenizer, group_weights, mask)
        rows = read_released_generator(path, faults) if released else _read_strictly(path)
        return cls(rows, tokenizer, group_weights, mask)

    def has_reflection_tokens(self) -> bool:
        """Whether any output retrieves or criticises. Those of baselines do neither."""
        tokens = [t for t in reflection.ALL if t not in reflection.MARKUP]
        return any(token in row.output for row in self.rows for token in tokens)

    def example(self, i: int) -> Example:
        row = self.rows[i]
        spans: list[Span] = [
            (prompts.instruction(row.instruction, row.input), 0.0),
            *output_spans(row.output, self.mask),
            ([Control(EOS)], 1.0),
        ]
        return build_example(self.tokenizer, spans, self.group_weights)


class ShuffledGeneratorSource(GeneratorSource):
    """Generator data in a folder that `selfrag prepare` made: grain decides the order.

    Rows stay on disk. The order of an epoch is computed index by index, so any position is resumed
    at once, however large the data.
    """

    def __init__(
        self,
        folder: str | Path,
        tokenizer: Tokenizer,
        group_weights: dict[str, float],
        mask: str = "each",
    ):
        rows = _PreparedExamples(folder)
        if not rows.is_labelled:
            print_plain_outputs(folder)
        super().__init__(rows, tokenizer, group_weights, mask)
        self._is_labelled = rows.is_labelled
        self._orders: dict[int, Sequence[int]] = {}  # by seed

    def has_reflection_tokens(self) -> bool:
        return self._is_labelled

    def row_at(self, i: int, seed: int) -> int:
        """Returns the row of the i-th example in training order, counted over all epochs."""
        grain = library("grain", "training on a folder of rows", "train")
        if seed not in self._orders:
            rows = grain.MapDataset.range(self.size)
            self._orders[seed] = rows.shuffle(seed=seed % 2**32).repeat()
        return int(self._orders[seed][i])


class _PreparedExamples(Sequence[GeneratorExample]):
    """The rows of a folder as records, read when they are asked for."""

    def __init__(self, folder: str | Path):
        self.rows = prepared.PreparedRows(folder)
        self.is_labelled = prepared.GENERATOR in prepared.datasets(folder)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i):
        row = self.rows[i]
        if not self.is_labelled:  # what looks like a control token there is text
            row = row | {"output": prompts.escape_controls(row["output"])}
        return checked_generator_example(f"{self.rows.folder}: row {i + 1}", row)


def print_plain_outputs(path: str | Path) -> None:
    """Says on stderr that generator data look as before `selfrag label`."""
    print(
        f"{path}: holds instructions without reflection tokens; this trains a model that neither "
        "retrieves nor criticises. `selfrag label` makes generator data of them",
        file=sys.stderr,
    )


def _read_strictly(path: str | Path) -> list[GeneratorExample]:
    chats = 0

    def build(where: str, row: dict[str, Any]) -> GeneratorExample:
        nonlocal chats
        chats += is_chat(row)
        return checked_generator_example(where, row)

    rows = read_records(path, build)
    if chats:
        print_chats(path, chats)
    return rows


def output_spans(output: str, mask: str = "each") -> list[Span]:
    """Returns the parts of an output with their loss weights, 0 or 1.

    mask: "each" gives 0 from each `<paragraph>` to its own `</paragraph>`. "released" gives 0
    between the first `<paragraph>` and the last `</paragraph>`, and 1 to these two marks.
    """
    parts = prompts.parse_output(output)
    if mask == "released":
        opened = [i for i, part in enumerate(parts) if _is(part, PARAGRAPH_OPEN)]
        closed = [i for i, part in enumerate(parts) if _is(part, PARAGRAPH_CLOSE)]
        start, end = (opened[0], closed[-1]) if opened else (len(parts), 0)
        return [([part], float(not start < i < end)) for i, part in enumerate(parts)]
    spans: list[Span] = []
    in_passage = False
    for part in parts:
        in_passage = in_passage or _is(part, PARAGRAPH_OPEN)
        spans.append(([part], 0.0 if in_passage else 1.0))
        in_passage = in_passage and not _is(part, PARAGRAPH_CLOSE)
    return spans


def _is(part: Part, token: str) -> bool:
    return isinstance(part, Control) and part.token == token


def checked_generator_example(where: str, row: dict[str, Any]) -> GeneratorExample:
    """Returns a row of generator data, or a chat's last exchange.

    Raises UserError with file and line if the row is malformed or a passage is not closed.
    """
    if is_chat(row):
        row = flatten_chat(where, row)
    example = generator_example_from(where, row)
    if not prompts.closes_paragraphs(prompts.parse_output(example.output)):
        raise UserError(
            f"{where}: each {PARAGRAPH_OPEN} in output must be followed by its own "
            f"{PARAGRAPH_CLOSE}; --format=released leaves out such rows of published data"
        )
    return example
