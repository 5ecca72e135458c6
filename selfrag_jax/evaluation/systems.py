"""The systems that an evaluation compares: Self-RAG, its ablations, and baselines.

This is the one list of them. `selfrag evaluate --systems` runs them on any task; the quickstart
runs most of them in the synthetic world. The paper's figures stand beside each.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from selfrag_jax.errors import UserError
from selfrag_jax.search.config import ADAPTIVE, ALWAYS, NEVER

# What --model, --plain_model and so on name.
MODEL, PLAIN, NO_RETRIEVER, NO_CRITIC = (
    "model",
    "plain_model",
    "no_retriever_model",
    "no_critic_model",
)
BASE = "base"  # the model of FEW_SHOT
NDOCS = "ndocs"  # as many passages as the task retrieves
EACH_PASSAGE = "each"  # answers from each passage; the most probable answer is taken
WEIGHTS = ("w_rel", "w_sup", "w_use", "w_seq")
FULL = "selfrag"  # what the others are compared with

Figures = dict[str, dict[str, float]]  # task -> metric -> the paper's figure, in percent


@dataclass(frozen=True)
class System:
    """A row of a results table: which model answers, and how it differs from full Self-RAG."""

    name: str
    group: str = ""  # a name of GROUPS
    changes: tuple[tuple[str, Any], ...] = ()  # fields of SearchConfig or Weights
    model: str = MODEL
    # Passages in the prompt of a plain model: a number, NDOCS or EACH_PASSAGE. None: Self-RAG.
    passages: int | str | None = None
    table2: Figures = field(default_factory=dict)  # Llama-2 7B; of Self-RAG, see the tasks
    table3: Figures = field(default_factory=dict)  # 7B, trained on 50k rows

    @property
    def is_search(self) -> bool:
        return self.passages is None

    def refusal(self, scorer: str, max_depth: int) -> str:
        """Why a scorer cannot run this system; "" if it can."""
        if scorer != "released" or not self.is_search:
            return ""
        changes = dict(self.changes)
        if max_depth > 1 and any(name in changes for name in WEIGHTS):
            return "the released long form scores without weights; take --scorer=paper"
        if "threshold" in changes and changes["threshold"] is None:
            return "the released scripts cannot decide without a threshold; take --scorer=paper"
        return ""


def _table3(popqa: float, pubhealth: float, asqa: float | None = None) -> Figures:
    found = {"popqa": {"match": popqa}, "pubhealth": {"option_accuracy": pubhealth}}
    return found if asqa is None else found | {"asqa": {"str_em": asqa}}


def _table2(
    popqa: float, triviaqa: float, pubhealth: float, arc: float, bio: float, **asqa: float
) -> Figures:
    return {
        "popqa": {"match": popqa},
        "triviaqa": {"match": triviaqa},
        "pubhealth": {"option_accuracy": pubhealth},
        "arc_challenge": {"option_accuracy": arc},
        "factscore_bio": {"fact_precision": bio},
        "asqa": asqa,
    }


_ALONE = _table2(14.7, 30.5, 34.2, 21.8, 44.5, str_em=7.9, rouge_lsum=15.3, mauve=19.0)
_WITH_PASSAGES = _table2(
    38.2, 42.5, 30.0, 48.0, 78.0, str_em=15.2, rouge_lsum=22.1, mauve=32.0,
    citation_precision=2.9, citation_recall=4.0,
)  # fmt: skip


def _ablation(name: str, figures: Figures | None = None, **changes: Any) -> System:
    settings = tuple(changes.items())
    return System(f"ablation_{name}", "ablations", settings, table3=figures or {})


def _mode(name: str, mode: str) -> System:
    return System(f"selfrag_{name}", "modes", (("mode", mode),))


SYSTEMS = (
    System(FULL, table3=_table3(45.5, 73.5, 32.1)),
    _mode("always", ALWAYS),
    _mode("adaptive", ADAPTIVE),
    _mode("never", NEVER),
    System(
        "train_no_retriever", "ablations", model=NO_RETRIEVER, passages=0,
        table3=_table3(43.6, 67.8, 31.0),
    ),
    System(
        "train_no_critic", "ablations", model=NO_CRITIC, passages=1,
        table3=_table3(42.6, 72.0, 18.1),
    ),
    _ablation("no_retrieval", _table3(24.7, 73.0), mode=NEVER),
    _ablation("hard_constraints", _table3(28.3, 72.6), mode=ADAPTIVE, threshold=None),
    _ablation("top1", _table3(41.8, 73.1, 28.6), mode=ALWAYS, ndocs=1),
    _ablation("no_isrel", w_rel=0.0),
    _ablation("no_issup", _table3(44.1, 73.2, 30.6), w_sup=0.0),
    _ablation("no_isuse", w_use=0.0),
    _ablation("no_seqscore", w_seq=0.0),
    System("no_retrieval", "baselines", model=PLAIN, passages=0, table2=_ALONE),
    System("rag_top1", "baselines", model=PLAIN, passages=1, table2=_WITH_PASSAGES),
    System("rag_topk", "baselines", model=PLAIN, passages=NDOCS, table2=_WITH_PASSAGES),
)  # fmt: skip
BY_NAME = {s.name: s for s in SYSTEMS}
# The base as it is before any training, shown a few answers. Run by the quickstart, which has
# training questions to draw them from.
FEW_SHOT = (
    System("base_few_shot", model=BASE, passages=0),
    System("base_few_shot_rag", model=BASE, passages=1),
)
GROUPS = {
    group: tuple(s.name for s in SYSTEMS if s.group == group)
    for group in ("modes", "ablations", "baselines")
} | {"all": tuple(BY_NAME)}


def chosen(names: Sequence[str]) -> tuple[list[System], set[str]]:
    """The systems that names and groups stand for, in the order of SYSTEMS; those named singly.

    Raises UserError for an unknown name, naming a close one, and for none.
    """
    known = (*GROUPS, *BY_NAME)
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise UserError(f"--systems={name}: no such system{hint} (systems: {', '.join(known)})")
    if not names:
        raise UserError(f"--systems: names no system (systems: {', '.join(known)})")
    wanted = {n for name in names for n in GROUPS.get(name, (name,))}
    return [s for s in SYSTEMS if s.name in wanted], {n for n in names if n in BY_NAME}
