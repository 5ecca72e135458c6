"""The critic labels training data for the generator (paper, Section 3.2.2, Algorithm 2).

For each instruction: is retrieval needed? If so, the critic judges the relevance and support of
retrieved passages for each segment of the output. One passage is placed in front of the segment
together with its critiques. Usually it is the passage that supports the segment best. Sometimes it
is another, so that the generator also learns what an irrelevant or unsupportive passage looks like.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from selfrag_jax.critic.critic import Critic, CriticConfig
from selfrag_jax.records import GeneratorExample, Instruction, Passage
from selfrag_jax.search import scoring
from selfrag_jax.text import prompts, reflection
from selfrag_jax.text.prompts import CritiqueQuery
from selfrag_jax.text.sentences import split_sentences


@dataclass(frozen=True)
class LabelConfig:
    seed: int
    critic: CriticConfig
    passages: int  # judged per segment: the best-ranked ones and one drawn from the rest
    variants: int  # examples made from each instruction
    best_rate: float  # how often the best-supporting passage is taken rather than another
    chunk: int  # instructions labelled between two saves


@dataclass
class _Draft:
    """An example under construction."""

    row: Instruction
    rng: random.Random
    segments: list[str]
    best_only: bool  # whether every segment takes the passage that supports it best
    utility: str  # the IsUse token of the whole output
    output: str = ""
    evidence: Passage | None = None  # of the latest segment that has one
    at: int = 0  # index of the next segment

    @property
    def preceding(self) -> str:
        return " ".join(self.segments[: self.at])

    @property
    def is_done(self) -> bool:
        return self.at == len(self.segments)


@dataclass(frozen=True)
class _Judged:
    """A passage with the critic's distributions for a segment."""

    passage: Passage
    relevance: Float[np.ndarray, " 2"]
    support: Float[np.ndarray, " 3"]

    @property
    def score(self) -> float:
        return float(scoring.s_sup(self.support) + scoring.s_rel(self.relevance))


def label_rows(
    critic: Critic, rows: Sequence[Instruction], config: LabelConfig
) -> list[GeneratorExample]:
    """Returns `config.variants` labelled examples of each row.

    Without retrieval the variants are identical. They are all kept: with fewer, the generator would
    see less of what it must memorise.
    """
    drafts = _drafts(critic, rows, config)
    while unfinished := [d for d in drafts if not d.is_done]:
        _add_segment(critic, unfinished, config)
    return [
        GeneratorExample(
            id=f"{d.row.id}-{i}",
            instruction=d.row.instruction,
            input=d.row.input,
            output=d.output + d.utility,
            dataset_name=d.row.dataset_name,
        )
        for i, d in enumerate(drafts)
    ]


def _drafts(critic: Critic, rows: Sequence[Instruction], config: LabelConfig) -> list[_Draft]:
    """Starts the variants of each row; those without retrieval are already complete."""
    retrieve = critic.judge([CritiqueQuery("retrieve", r.full_instruction) for r in rows])
    utilities = critic.judge(
        [CritiqueQuery("isuse", r.full_instruction, output=r.output) for r in rows]
    )
    drafts: list[_Draft] = []
    for row, p, useful in zip(rows, retrieve, utilities, strict=True):
        # [Continue to Use Evidence] is not an option yet: there is no evidence.
        retrieving = p[1] > p[0] and bool(row.ctxs)
        utility = reflection.ISUSE[int(useful.argmax())]
        segments = split_sentences(row.output) if retrieving else [row.output.strip()]
        for v in range(config.variants):
            rng = random.Random(f"label-{config.seed}-{row.id}-{v}")
            draft = _Draft(row, rng, segments, rng.random() < config.best_rate, utility)
            if not retrieving:
                draft.output = reflection.NO_RETRIEVAL + prompts.escape_controls(segments[0])
                draft.at = 1
            drafts.append(draft)
    return drafts


def _add_segment(critic: Critic, drafts: list[_Draft], config: LabelConfig) -> None:
    """Adds the next segment to each draft, with its Retrieve token, passage and critiques."""
    actions = _next_actions(critic, drafts)
    candidates = [_candidates(d, a, config) for d, a in zip(drafts, actions, strict=True)]
    judged = iter(_judge(critic, drafts, candidates))
    for d, action, passages in zip(drafts, actions, candidates, strict=True):
        options = [next(judged) for _ in passages]
        text = prompts.escape_controls(d.segments[d.at])
        d.output += action
        if action == reflection.NO_RETRIEVAL:
            d.output += text
        else:
            best = max(options, key=lambda option: option.score)
            others = [option for option in options if option is not best]
            chosen = best if d.best_only or not others else d.rng.choice(others)
            d.evidence = chosen.passage
            if action == reflection.RETRIEVAL:
                d.output += prompts.format_passage(chosen.passage)
                d.output += reflection.ISREL[int(chosen.relevance.argmax())]
            d.output += text + reflection.ISSUP[int(chosen.support.argmax())]
        d.at += 1


def _next_actions(critic: Critic, drafts: list[_Draft]) -> list[str]:
    """The Retrieve token of each draft's next segment: [Retrieval] for a first segment."""
    later = [d for d in drafts if d.at > 0]
    queries = [
        CritiqueQuery("retrieve", d.row.full_instruction, d.preceding, d.evidence) for d in later
    ]
    judged = iter(critic.judge(queries))
    actions = []
    for d in drafts:
        action = reflection.RETRIEVAL
        if d.at > 0:
            action = reflection.RETRIEVE[int(next(judged).argmax())]
        if action == reflection.CONTINUE and d.evidence is None:
            action = reflection.RETRIEVAL
        actions.append(action)
    return actions


def _candidates(d: _Draft, action: str, config: LabelConfig) -> list[Passage]:
    """The passages to judge for a draft's next segment."""
    if action == reflection.RETRIEVAL:
        n = config.passages - 1
        top, rest = list(d.row.ctxs[:n]), d.row.ctxs[n:]
        return top + ([d.rng.choice(rest)] if rest else [])
    if action == reflection.CONTINUE and d.evidence is not None:
        return [d.evidence]
    return []


def _judge(critic: Critic, drafts: list[_Draft], candidates: list[list[Passage]]) -> list[_Judged]:
    """Judges all candidates of all drafts, in order."""
    pairs = [(d, p) for d, passages in zip(drafts, candidates, strict=True) for p in passages]
    queries = [CritiqueQuery("isrel", d.row.full_instruction, evidence=p) for d, p in pairs]
    relevance = critic.judge(queries)
    queries = [
        CritiqueQuery("issup", d.row.full_instruction, evidence=p, output=d.segments[d.at])
        for d, p in pairs
    ]
    support = critic.judge(queries)
    passages = [p for _, p in pairs]
    return [_Judged(*judged) for judged in zip(passages, relevance, support, strict=True)]
