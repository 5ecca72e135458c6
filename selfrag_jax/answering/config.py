"""How questions are answered: the search, and how the model is loaded for it."""

from __future__ import annotations

from dataclasses import dataclass

from selfrag_jax import config
from selfrag_jax.config import setting
from selfrag_jax.errors import UserError
from selfrag_jax.models.params import DTYPES
from selfrag_jax.search import scoring
from selfrag_jax.search.config import SearchConfig


@dataclass(frozen=True, kw_only=True)
class AnswerConfig:
    search: SearchConfig
    batch: int  # maximum number of questions searched at once
    max_length: int  # maximum number of tokens in a prompt, and in a passage
    closed_set: bool  # let the passages of a question with options vote (paper, Section 3.3)
    dtype: str | None = setting(
        "float32, bfloat16 or float16; default: the model's", choices=tuple(DTYPES)
    )
    quantization: str | None = setting("int8: weights in 8 bits", choices=("int8",))
    tensor: int = setting("devices to split the model over")
    product_dtype: str | None = setting(
        "bfloat16: round the factors of products to it, which recent CPUs multiply twice as fast; "
        "default: as the model was trained",
        choices=("bfloat16",),
        default=None,
    )

    def __post_init__(self):
        if self.dtype not in (None, *DTYPES):
            raise UserError(f"--dtype={self.dtype!r}: must be one of {', '.join(DTYPES)}")
        if self.quantization not in (None, "int8"):
            raise UserError(f"--quantization={self.quantization!r}: must be int8, or left out")
        if self.product_dtype not in (None, "bfloat16"):
            raise UserError(
                f"--product_dtype={self.product_dtype!r}: must be bfloat16, or left out"
            )
        if self.tensor < 1:
            raise UserError(f"--tensor={self.tensor}: must be at least 1")
        if self.batch < 1:
            raise UserError(f"batch={self.batch}: must be at least 1")
        if self.max_length < 32:
            raise UserError(
                f"max_length={self.max_length}: must be at least 32 tokens, for a short question "
                "in its template"
            )

    @classmethod
    def load(cls, name: str, *changes: str) -> AnswerConfig:
        """The section `answer` of a config: an installed one, or a path.

        changes: assignments as the command line takes them after `--config.answer.`, such as
        "search.max_depth=3". Raises UserError if there is no such config, section or field.
        """
        loaded = config.load(name)
        config.require(loaded, "answer")
        config.override(loaded, [f"answer.{change}" for change in changes])
        return config.build(cls, loaded.answer, "answer")


# What SelfRAG.load takes without a config: the paper's long form. The command line reads its
# defaults from a config instead (tiny for the quickstart's models, any_model for others).
DEFAULT = AnswerConfig(
    search=SearchConfig(
        mode="adaptive_retrieval",
        threshold=0.2,
        normalise="yes_no",
        weights=scoring.Weights(),
        beam_width=2,
        max_depth=7,
        ndocs=5,
        accumulate="sum",
        constraints=(),
        keep_passages=True,
        max_new_tokens=100,
        length_bucket=32,
        scorer="paper",
        temperature=0.0,
        top_p=1.0,
        seed=0,
    ),
    batch=16,
    max_length=512,
    closed_set=True,
    dtype=None,
    quantization=None,
    tensor=1,
)
