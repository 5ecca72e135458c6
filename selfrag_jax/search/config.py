"""The settings of a search. Those with help are flags of `selfrag ask` and `selfrag answer`."""

from __future__ import annotations

from dataclasses import dataclass

from selfrag_jax.config import setting
from selfrag_jax.engine.shapes import Shapes
from selfrag_jax.errors import UserError
from selfrag_jax.search.scoring import Weights
from selfrag_jax.text import reflection

ADAPTIVE, ALWAYS, NEVER = "adaptive_retrieval", "always_retrieve", "no_retrieval"
MODES = (ADAPTIVE, ALWAYS, NEVER)
NORMALISE = ("yes_no", "all")
ACCUMULATE = ("sum", "mean", "product")
# The keys of algorithms.ALGORITHMS, which cannot be imported here: its classes import this module.
SCORERS = ("paper", "released")
MAX_NDOCS = 100  # every passage is a branch to generate
MAX_BEAM_WIDTH = 100


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    mode: str = setting(
        "adaptive_retrieval (the model may continue with the passage it has), always_retrieve or "
        "no_retrieval",
        choices=MODES,
    )
    threshold: float | None = setting(
        "retrieve when p(retrieve) exceeds it, unless the model prefers to continue with its "
        "passage; without one, the most likely Retrieve token decides"
    )
    normalise: str = setting(
        "p(retrieve) is the share of [Retrieval] in: yes_no, [Retrieval] and [No Retrieval]; all, "
        "also [Continue to Use Evidence]",
        choices=NORMALISE,
    )
    weights: Weights
    beam_width: int = setting("segments kept at each step")
    max_depth: int = setting("maximum number of segments in an answer")
    ndocs: int = setting("passages per retrieval")
    accumulate: str = setting(
        "rank a path by the sum (paper), mean or product of its segments' scores; sums favour "
        "long answers, and a product counts scores below 0 as 0",
        choices=ACCUMULATE,
    )
    constraints: tuple[str, ...] = setting(
        "drop segments that say one of these critique tokens, e.g. '[No support / Contradictory]'; "
        "separate several by commas. --scorer=released takes this one only, in the long form"
    )
    keep_passages: bool = setting(
        "true or false: keep the passages of earlier segments in the history, as in the training "
        "data"
    )
    max_new_tokens: int = setting("maximum number of tokens in a segment")
    length_bucket: int  # lengths are padded to its multiples, to bound the number of compilations
    scorer: str = setting(
        "paper: the equations; released: what the authors' scripts compute, quirks included; its "
        "--w_use is 1 unless given",
        choices=SCORERS,
    )
    temperature: float = setting(
        "0 takes the most likely token; above 0, tokens are sampled, and higher is more random",
        group="Sampling",
    )
    top_p: float = setting(
        "with --temperature: sample from the most likely tokens that make up this probability",
        group="Sampling",
    )
    seed: int = setting(
        "with --temperature: seed of the sampling; a question's samples do not depend on the "
        "others",
        group="Sampling",
    )

    def __post_init__(self):
        for name, known in (
            ("mode", MODES), ("accumulate", ACCUMULATE), ("scorer", SCORERS),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise UserError(
                    f"--{name}={getattr(self, name)!r}: must be one of {', '.join(known)}"
                )
        if self.normalise not in NORMALISE:
            raise UserError(f"--normalise={self.normalise!r}: must be {' or '.join(NORMALISE)}")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise UserError(f"--threshold={self.threshold}: must be a probability between 0 and 1")
        critiques = (*reflection.ISREL, *reflection.ISSUP, *reflection.ISUSE)
        for token in self.constraints:
            if token not in critiques:
                listed = ", ".join(critiques)
                raise UserError(f"--constraints: {token!r} is no critique token; they are {listed}")
        if self.length_bucket < 1:
            raise UserError(f"length_bucket={self.length_bucket}: must be at least 1")
        for name in ("beam_width", "max_depth", "ndocs", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name}={getattr(self, name)}: must be at least 1")
        if self.ndocs > MAX_NDOCS:
            raise UserError(
                f"--ndocs={self.ndocs}: at most {MAX_NDOCS} passages; the paper takes 5 or 10"
            )
        if self.beam_width > MAX_BEAM_WIDTH:
            raise UserError(
                f"--beam_width={self.beam_width}: at most {MAX_BEAM_WIDTH} segments at each step; "
                "the paper keeps 2"
            )
        self._check_sampling()

    def _check_sampling(self) -> None:
        if self.temperature != 0 and not 0.01 <= self.temperature <= 100:
            raise UserError(
                f"--temperature={self.temperature}: must be from 0.01 to 100, or 0 for the most "
                "likely token"
            )
        if not 1e-6 <= self.top_p <= 1:
            raise UserError(
                f"--top_p={self.top_p}: must be from 0.000001 to 1, which samples from all tokens"
            )
        if self.top_p < 1 and not self.temperature:
            raise UserError(
                f"--top_p={self.top_p} needs a --temperature, e.g. --temperature=1; without one "
                "nothing is sampled: take --top_p=1"
            )

    @property
    def sampling(self) -> tuple[float, float] | None:
        """(temperature, top_p), or None for the most likely token."""
        return (self.temperature, self.top_p) if self.temperature else None

    @property
    def num_beams(self) -> int:
        """Beams that are live at once; a search of one segment has only the first."""
        return self.beam_width if self.max_depth > 1 else 1

    @property
    def num_branches(self) -> int:
        """Branches of a beam: one for each passage."""
        return 1 if self.mode == "no_retrieval" else self.ndocs

    def shapes(self, num_slots: int, longest_prompt: int) -> Shapes:
        """The shapes of the compiled programs. longest_prompt: in tokens."""
        return Shapes(
            num_slots=num_slots,
            beam_width=self.num_beams,
            num_passages=self.num_branches,
            max_new_tokens=self.max_new_tokens,
            length_bucket=self.length_bucket,
            longest_prompt=longest_prompt,
            prefix_grows=self.max_depth > 1,
        )
