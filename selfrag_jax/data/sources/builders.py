"""The published sets as builders of tensorflow-datasets, in array_record files.

    Fever(data_dir="D", manual_dir="downloads").download_and_prepare()

TensorFlow is not needed. Of tensorflow-datasets, `tfds.load` and `as_dataset` do need it; read the
result with `builder_from_directory(...).as_data_source(split="train")`, or with data/prepared.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from selfrag_jax.data import prepared
from selfrag_jax.data.sources.sets import SETS, SetCounts, read_set
from selfrag_jax.errors import UserError


class InstructionBuilder(tfds.core.GeneratorBasedBuilder):
    """A builder of instructions with outputs, from published files in `manual_dir`.

    After preparing, `counts` says what became of the rows; UserError is raised if none can be used.
    Rows keep the order of their files. The same files give the same rows; their bytes may differ
    from process to process, as protobuf writes the fields of a row in any order.
    """

    def __init_subclass__(cls, **kwargs: Any):
        # tensorflow-datasets has sets of its own under some of these names.
        super().__init_subclass__(skip_registration=True, **kwargs)

    VERSION = tfds.core.Version(prepared.VERSION)
    # Nothing is downloaded, so there are no checksums to look for beside this file.
    url_infos = None

    def __init__(
        self,
        *,
        manual_dir: str | Path,
        limit: int | None = None,
        seed: int = 0,
        advance: Callable[[int], None] = lambda n: None,
        **kwargs: Any,
    ):
        """limit: at most so many rows, drawn with `seed`. advance: called with 1 per row read."""
        self.published, self.counts = SETS[self.name], SetCounts()
        self.files = self.published.find_files(manual_dir)
        self._limit, self._seed, self._advance = limit, seed, advance
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{self.name}, published at {self.published.published_at}.",
            features=tfds.features.FeaturesDict(
                {name: tfds.features.Text() for name in prepared.FIELDS}
            ),
            disable_shuffling=True,  # training shuffles
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {prepared.SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, str]]]:
        rows = read_set(
            self.published, self.files, self.counts, self._limit, self._seed, self._advance
        )
        for number, row in enumerate(rows):
            yield number, {name: getattr(row, name) for name in prepared.FIELDS}
        if not self.counts.kept:
            reasons = "; ".join(self.counts.faults.by_frequency()) or "it holds no rows"
            raise UserError(f"{self.files[0]}: no row can be used as {self.name}: {reasons}")


class Gpt4Alpaca(InstructionBuilder):
    name = "gpt4_alpaca"


class StanfordAlpaca(InstructionBuilder):
    name = "stanford_alpaca"


class FlanV2(InstructionBuilder):
    name = "flan_v2"


class ShareGpt(InstructionBuilder):
    name = "sharegpt"


class OpenAssistant(InstructionBuilder):
    name = "oasst1"


class NaturalQuestions(InstructionBuilder):
    name = "nq"


class Fever(InstructionBuilder):
    name = "fever"


class WizardOfWikipedia(InstructionBuilder):
    name = "wow"


class OpenBookQa(InstructionBuilder):
    name = "openbookqa"


class ArcEasy(InstructionBuilder):
    name = "arc_easy"


class Asqa(InstructionBuilder):
    name = "asqa"


class SelfRagGenerator(InstructionBuilder):
    name = prepared.GENERATOR


BUILDERS: dict[str, type[InstructionBuilder]] = {
    builder.name: builder for builder in InstructionBuilder.__subclasses__()
}
