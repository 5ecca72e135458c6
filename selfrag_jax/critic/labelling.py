"""The critic labels training data for the generator (paper, Section 3.2.2, Algorithm 2).

For each instruction: is retrieval needed? If so, for each segment of the output the critic judges retrieved passages
for relevance and support; one of them is put in front of the segment together with its critiques. Mostly it is the
passage that supports the segment best; sometimes another, so that the generator also learns what it looks like when a
passage is irrelevant or does not support the segment.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from selfrag_jax.critic.critic import Critic, CriticConfig
from selfrag_jax.records import (
    GeneratorExample,
    Instruction,
    Passage,
)
from selfrag_jax.search import scoring
from selfrag_jax.text import prompts, reflection
from selfrag_jax.text.prompts import CritiqueQuery
from selfrag_jax.text.sentences import split_sentences


@dataclass(frozen=True)
class LabelConfig:
    seed: int
    critic: CriticConfig
    passages: int  # judged for each segment: the best-ranked ones and one drawn from the rest
    variants: int  # examples made of each instruction
    best_rate: float  # how often the best-supported passage is taken rather than another
    chunk: int  # instructions labelled between two saves


@dataclass
class _Draft:
    """An example in the making: the output so far, and what its next segment rests on."""

    row: Instruction
    rng: random.Random
    segments: list[str]
    best_only: bool
    use: str  # the IsUse token of the whole output
    output: str = ""
    evidence: Passage | None = None
    at: int = 0
    retrieving: bool = True

    @property
    def preceding(self) -> str:
        return " ".join(self.segments[: self.at])


def label_rows(
    critic: Critic, rows: Sequence[Instruction], config: LabelConfig
) -> list[GeneratorExample]:
    """Labelled examples of the rows, `config.variants` of each. Where no retrieval is needed they are alike: with fewer of
    them, the generator would learn less of what it has to know by heart."""
    needs = critic.judge([CritiqueQuery("retrieve", r.asked) for r in rows])
    utilities = critic.judge([CritiqueQuery("isuse", r.asked, output=r.output) for r in rows])
    drafts: list[_Draft] = []
    for row, p, useful in zip(rows, needs, utilities, strict=True):
        retrieving = p[1] > p[0] and bool(row.ctxs)  # there is nothing yet to continue with
        for v in range(config.variants):
            rng = random.Random(f"label-{config.seed}-{row.id}-{v}")
            use = reflection.ISUSE[int(useful.argmax())]
            segments = split_sentences(row.output) if retrieving else [row.output.strip()]
            drafts.append(
                _Draft(
                    row, rng, segments, rng.random() < config.best_rate, use, retrieving=retrieving
                )
            )

    for d in drafts:
        if not d.retrieving:
            d.output = reflection.NO_RETRIEVAL + prompts.defuse(d.segments[0])
            d.at = len(d.segments)
    while open_drafts := [d for d in drafts if d.at < len(d.segments)]:
        _add_segment(critic, open_drafts, config)
    return [
        GeneratorExample(
            id=f"{d.row.id}-{i}",
            instruction=d.row.instruction,
            input=d.row.input,
            output=d.output + d.use,
            dataset_name=d.row.dataset_name,
        )
        for i, d in enumerate(drafts)
    ]


def _add_segment(critic: Critic, drafts: list[_Draft], config: LabelConfig) -> None:
    """Adds the next segment to each draft, with its Retrieve token, passage and critiques."""
    later = [d for d in drafts if d.at > 0]
    again = critic.judge(
        [CritiqueQuery("retrieve", d.row.asked, d.preceding, d.evidence) for d in later]
    )
    action = {
        id(d): reflection.RETRIEVE[int(p.argmax())] for d, p in zip(later, again, strict=True)
    }
    for d in later:
        if action[id(d)] == reflection.CONTINUE and d.evidence is None:
            action[id(d)] = reflection.RETRIEVAL
    action |= {id(d): reflection.RETRIEVAL for d in drafts if d.at == 0}

    pool: list[tuple[_Draft, Passage]] = []
    for d in drafts:
        if action[id(d)] == reflection.RETRIEVAL:
            pool += [(d, p) for p in _candidates(d, config)]
        elif action[id(d)] == reflection.CONTINUE:
            pool.append((d, d.evidence))
    relevance = critic.judge([CritiqueQuery("isrel", d.row.asked, evidence=p) for d, p in pool])
    support = critic.judge(
        [CritiqueQuery("issup", d.row.asked, evidence=p, output=d.segments[d.at]) for d, p in pool]
    )
    judged: dict[int, list[tuple[Passage, np.ndarray, np.ndarray]]] = {}
    for (d, p), rel, sup in zip(pool, relevance, support, strict=True):
        judged.setdefault(id(d), []).append((p, rel, sup))

    for d in drafts:
        text = prompts.defuse(d.segments[d.at])
        kind = action[id(d)]
        if kind == reflection.NO_RETRIEVAL:
            d.output += kind + text
        else:
            options = judged[id(d)]
            best = max(options, key=lambda o: scoring.s_sup(o[2]) + scoring.s_rel(o[1]))
            others = [o for o in options if o is not best]
            passage, rel, sup = best if d.best_only or not others else d.rng.choice(others)
            d.evidence = passage
            d.output += kind
            if kind == reflection.RETRIEVAL:
                d.output += prompts.format_passage(passage) + reflection.ISREL[int(rel.argmax())]
            d.output += text + reflection.ISSUP[int(sup.argmax())]
        d.at += 1


def _candidates(d: _Draft, config: LabelConfig) -> list[Passage]:
    """The best-ranked passages, and one drawn from the rest."""
    top, rest = list(d.row.ctxs[: config.passages - 1]), d.row.ctxs[config.passages - 1 :]
    return top + ([d.rng.choice(rest)] if rest else [])
