"""Who judges citations and verifies facts: the flags, and how their values are opened."""

from __future__ import annotations

from pathlib import Path

from selfrag_jax.commands.command import Flag
from selfrag_jax.commands.worlds import read_truth
from selfrag_jax.errors import UserError
from selfrag_jax.evaluation.fact_precision import FactVerifier, read_facts
from selfrag_jax.evaluation.judges import EntailmentJudge, NliJudge
from selfrag_jax.evaluation.metrics import FactReader, SupportJudge
from selfrag_jax.world import truth

JUDGES: dict[str, SupportJudge | None] = {"none": None, "world": truth.fully_supports}
VERIFIERS: dict[str, FactReader | None] = {"none": None, "world": truth.stated_facts}
_JUDGES = "Judges"
JUDGE_FLAG = Flag(
    "judge",
    "who judges citations: none (default), the local folder of a Hugging Face NLI model, or world "
    "(a world's truth: --truth)",
    group=_JUDGES,
)
TRUTH_FLAG = Flag(
    "truth",
    "the teacher.jsonl of the judge `world` (default: the quickstart's fictional encyclopedia, "
    "whose language says all)",
    group=_JUDGES,
)
JUDGING_FLAGS = (
    JUDGE_FLAG,
    Flag(
        "verifier",
        "who verifies the facts in answers about a topic: none, the local folder of a Hugging Face "
        "NLI model, or world (a world's truth, for its own files; default)",
        group=_JUDGES,
    ),
    TRUTH_FLAG,
    Flag(
        "facts",
        "with --verifier=FOLDER: a file of the answers' atomic facts, rows of id and facts (a "
        "list of texts); default: their sentences",
        group=_JUDGES,
    ),
    Flag(
        "mauve",
        "the local folder of a language model (gpt2-large): MAUVE is computed",
        group=_JUDGES,
        is_folder=True,
    ),
)


def open_judge(name: str, teacher: str = "") -> SupportJudge | EntailmentJudge | None:
    """The judge of citations called so: one of JUDGES, or an NLI model's folder.

    teacher: of "world", the teacher.jsonl of another world than the encyclopedia.
    """
    if name == "world" and teacher:
        return read_truth(teacher).supports
    if name in JUDGES:
        return JUDGES[name]
    if "/" not in name and not Path(name).is_dir():
        raise UserError(
            f"--judge={name!r}: must be one of {', '.join(JUDGES)}, or the folder of an NLI model"
        )
    return NliJudge(name)


def open_verifier(name: str, facts: str, teacher: str = "") -> FactReader | FactVerifier | None:
    """The verifier of facts called so: none, world, or an NLI model's folder.

    facts: a file of the answers' facts; "" takes their sentences. teacher: as of `open_judge`.
    """
    if facts and name in VERIFIERS:
        raise UserError("--facts: goes with --verifier=FOLDER, the NLI model that verifies them")
    if name == "world" and teacher:
        return read_truth(teacher).stated_facts
    if name in VERIFIERS:
        return VERIFIERS[name]
    given = read_facts(facts) if facts else None  # before a model is loaded
    if "/" not in name and not Path(name).is_dir():
        raise UserError(
            f"--verifier={name!r}: must be one of {', '.join(VERIFIERS)}, or the folder of an NLI "
            "model"
        )
    return FactVerifier(NliJudge(name), given)
