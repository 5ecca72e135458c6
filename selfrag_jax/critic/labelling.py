"""The critic labels training data for the generator (paper, Section 3.2.2, Algorithm 2).

For each instruction: is retrieval needed? If so, the critic judges the relevance and support of
retrieved passages for each segment of the output. One passage is placed in front of the segment
together with its critiques. Usually it is the passage that supports the segment best. Sometimes it
is another, so that the generator also learns what an irrelevant or unsupportive passage looks like.

The rows of a chunk go through the stages together: all that one stage asks of the critic or of the
retriever is one call. `label_rows` shows their order; assembly.py writes the result.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from jaxtyping import Float

from selfrag_jax.critic.assembly import LabelledSegment, assemble
from selfrag_jax.critic.critic import CriticConfig, PromptTooLong
from selfrag_jax.critic.needs import CRITIC, NeedsConfig, check_choice
from selfrag_jax.errors import UserError
from selfrag_jax.records import GeneratorExample, Instruction, Passage
from selfrag_jax.search import scoring
from selfrag_jax.text import prompts, reflection
from selfrag_jax.text.prompts import CritiqueQuery
from selfrag_jax.text.sentences import split_sentences

# Passages for each of several queries, best first.
FindPassages = Callable[[Sequence[str]], Sequence[Sequence[Passage]]]


class QueryJudge(Protocol):
    """What labels are made from: a Critic, or a StoredCritic."""

    def judge(self, queries: Sequence[CritiqueQuery]) -> list[Float[np.ndarray, " n"]]:
        """Returns the distribution over each query's group. Raises PromptTooLong."""
        ...


@dataclass(frozen=True)
class LabelConfig:
    seed: int
    critic: CriticConfig
    passages: int  # judged per segment: the best-ranked ones and one drawn from the rest
    variants: int  # examples made from each instruction
    best_rate: float  # how often the best-supporting passage is taken rather than another
    chunk: int  # instructions labelled between two saves
    retrieve_labels: str = CRITIC  # who decides whether an instruction needs retrieval: needs.py
    needs: NeedsConfig | None = None  # of retrieve_labels = self

    def __post_init__(self):
        check_choice(self.retrieve_labels)
        for name in ("passages", "variants", "chunk"):
            if getattr(self, name) < 1:
                raise UserError(f"config label: {name}={getattr(self, name)} must be at least 1")


@dataclass
class _Source:
    """A row, and what is decided about it as a whole."""

    row: Instruction
    sentences: list[str]  # with the white space after them
    retrieves: bool = False
    utility: str = ""  # the IsUse token of the whole output
    ctxs: Sequence[Passage] = ()  # for the first segment
    failure: str = ""  # why it cannot be labelled

    def query(self, group: str, **fields) -> CritiqueQuery:
        return CritiqueQuery(group, self.row.full_instruction, **fields)


@dataclass
class _Draft:
    """An example under construction."""

    number: int  # among all that the rows make, failed ones too
    source: _Source
    rng: random.Random
    best_only: bool  # whether every segment takes the passage that supports it best
    segments: list[LabelledSegment] = field(default_factory=list)
    evidence: Passage | None = None  # of the latest segment that has one

    @property
    def at(self) -> int:
        """Index of the next sentence."""
        return len(self.segments)

    @property
    def written(self) -> list[str]:
        """The sentences before it, as critic and retriever are asked about them."""
        return [sentence.strip() for sentence in self.source.sentences[: self.at]]

    @property
    def sentence(self) -> str:
        return self.source.sentences[self.at].strip()

    @property
    def is_done(self) -> bool:
        return bool(self.source.failure) or self.at == len(self.source.sentences)


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
    critic: QueryJudge,
    rows: Sequence[Instruction],
    config: LabelConfig,
    needs: Mapping[str, str] | None = None,
    find_passages: FindPassages | None = None,
    on_failure: Callable[[Instruction, str], None] | None = None,
    on_nothing_found: Callable[[Instruction], None] | None = None,
) -> list[GeneratorExample]:
    """Returns `config.variants` labelled examples of each row, in the order of the rows.

    needs: [Retrieval] or [No Retrieval] by row id, instead of the critic's decision about the
    instruction. find_passages: for every segment that retrieves, by the instruction and the
    previous segment; None: a row's own ctxs serve all of its segments. on_failure: is told of rows
    that cannot be labelled, and why; None: such a row raises UserError. on_nothing_found: is told
    of rows that need passages and have none; they go without.
    """
    # 1. Sentences.
    sources = [_source(row) for row in rows]
    # 2. Is retrieval needed, and how useful is the whole output?
    _judge_whole_rows(critic, sources, needs or {})
    # 3. Passages for the first segment. A row that needs them and has none goes without.
    needing = [s for s in sources if s.retrieves and not s.failure]
    _find_first_passages(needing, find_passages)
    for source in needing:
        if not source.retrieves and on_nothing_found:
            on_nothing_found(source.row)
    # 4. Segment by segment: the need of each, its passages, their critiques, the choice.
    drafts = [d for i, s in enumerate(sources) if not s.failure for d in _drafts(i, s, config)]
    while unfinished := [d for d in drafts if not d.is_done]:
        _add_segment(critic, unfinished, config, find_passages)
    # 5. The published format.
    for source in sources:
        if source.failure:
            if on_failure is None:
                raise UserError(f"row {source.row.id!r}: {source.failure}")
            on_failure(source.row, source.failure)
    return [
        GeneratorExample(
            id=f"{d.source.row.id}-{d.number}",
            instruction=d.source.row.instruction,
            input=d.source.row.input,
            output=assemble(d.segments, d.source.utility),
            dataset_name=d.source.row.dataset_name,
        )
        for d in drafts
        if not d.source.failure
    ]


# ---- stages 1 to 3: whole rows -------------------------------------------------------------------
def _source(row: Instruction) -> _Source:
    source = _Source(row, split_sentences(row.output.strip()))
    if not source.sentences:
        source.failure = "its output is empty"
    elif not row.full_instruction:
        source.failure = "its instruction is empty"
    return source


def _judge_whole_rows(
    critic: QueryJudge, sources: Sequence[_Source], needs: Mapping[str, str]
) -> None:
    asked = [(s, s.query("isuse", output=s.row.output)) for s in sources]
    asked += [(s, s.query("retrieve")) for s in sources if s.row.id not in needs]
    for (source, query), p in zip(asked, _ask(critic, asked), strict=True):
        if p is None:
            continue
        if query.group == "isuse":
            source.utility = reflection.ISUSE[int(p.argmax())]
        else:
            # [Continue to Use Evidence] is not an option yet: there is no evidence.
            source.retrieves = bool(p[1] > p[0])
    for source in sources:
        if source.row.id in needs:
            source.retrieves = needs[source.row.id] == reflection.RETRIEVAL


def _ask(
    critic: QueryJudge, asked: Sequence[tuple[_Source, CritiqueQuery]]
) -> list[Float[np.ndarray, " n"] | None]:
    """The critic's answers, in one call; None for the queries of rows that have failed.

    A row whose query does not fit the critic fails here.
    """
    while True:
        possible = [query for source, query in asked if not source.failure]
        sources = [source for source, _ in asked if not source.failure]
        try:
            judged = iter(critic.judge(possible))
        except PromptTooLong as e:
            for i, reason in e.reasons.items():
                sources[i].failure = reason
            continue
        return [None if source.failure else next(judged) for source, _ in asked]


def _find_first_passages(sources: Sequence[_Source], find_passages: FindPassages | None) -> None:
    queries = [s.row.full_instruction for s in sources]
    found = _find(queries, find_passages)
    for i, source in enumerate(sources):
        source.ctxs = source.row.ctxs if found is None else found[i]
        source.retrieves = bool(source.ctxs)


def _find(
    queries: Sequence[str], find_passages: FindPassages | None
) -> list[Sequence[Passage]] | None:
    """The passages of each query, all searched for at once; None if nothing searches."""
    if find_passages is None:
        return None
    unique = list(dict.fromkeys(queries))
    found = dict(zip(unique, find_passages(unique), strict=True)) if unique else {}
    return [found[query] for query in queries]


# ---- stage 4: segment by segment -----------------------------------------------------------------
@dataclass
class _Step:
    """What is decided about a draft's next segment."""

    draft: _Draft
    action: str = reflection.RETRIEVAL  # the Retrieve token
    candidates: Sequence[Passage] = ()


def _drafts(i: int, source: _Source, config: LabelConfig) -> list[_Draft]:
    """Starts the variants of row i; those without retrieval are already complete."""
    if not source.retrieves:
        source.sentences = ["".join(source.sentences)]
    drafts = []
    for v in range(config.variants):
        rng = random.Random(f"label-{config.seed}-{source.row.id}-{v}")
        best_only = rng.random() < config.best_rate
        draft = _Draft(i * config.variants + v, source, rng, best_only)
        if not source.retrieves:
            draft.segments = [LabelledSegment(source.sentences[0], reflection.NO_RETRIEVAL)]
        drafts.append(draft)
    return drafts


def _add_segment(
    critic: QueryJudge,
    drafts: list[_Draft],
    config: LabelConfig,
    find_passages: FindPassages | None,
) -> None:
    """Adds the next segment to each draft, with its Retrieve token, passage and critiques."""
    steps = _steps(critic, drafts)
    _add_candidates(steps, config, find_passages)
    judged = _judge_candidates(critic, steps)
    for step, options in zip(steps, judged, strict=True):
        if not step.draft.source.failure:
            step.draft.segments.append(_segment(step, options))


def _steps(critic: QueryJudge, drafts: list[_Draft]) -> list[_Step]:
    """The Retrieve token of each draft's next segment: [Retrieval] for a first segment."""
    later = [d for d in drafts if d.at > 0]
    asked = [
        (
            d.source,
            d.source.query("retrieve", preceding=" ".join(d.written), evidence=d.evidence),
        )
        for d in later
    ]
    judged = iter(_ask(critic, asked))
    steps = []
    for d in drafts:
        step = _Step(d)
        if d.at > 0 and (p := next(judged)) is not None:
            step.action = reflection.RETRIEVE[int(p.argmax())]
        if step.action == reflection.CONTINUE and d.evidence is None:
            step.action = reflection.RETRIEVAL
        steps.append(step)
    return [step for step in steps if not step.draft.source.failure]


def _add_candidates(
    steps: list[_Step], config: LabelConfig, find_passages: FindPassages | None
) -> None:
    """Adds the passages to judge: the best-ranked ones and one of the rest, or the one at hand.

    A later segment for which nothing is found continues with the passage at hand.
    """
    searched = [s for s in steps if s.action == reflection.RETRIEVAL and s.draft.at > 0]
    queries = [
        prompts.retrieval_query(s.draft.source.row.full_instruction, s.draft.written)
        for s in searched
    ]
    found = _find(queries, find_passages)
    later = (
        {} if found is None else {s.draft.number: f for s, f in zip(searched, found, strict=True)}
    )
    for step in steps:
        d = step.draft
        ctxs = later.get(d.number, d.source.ctxs)
        if step.action == reflection.RETRIEVAL and not ctxs:
            step.action = reflection.NO_RETRIEVAL if d.evidence is None else reflection.CONTINUE
        if step.action == reflection.RETRIEVAL:
            n = config.passages - 1
            top, rest = list(ctxs[:n]), ctxs[n:]
            step.candidates = top + ([d.rng.choice(rest)] if rest else [])
        elif step.action == reflection.CONTINUE and d.evidence is not None:
            step.candidates = [d.evidence]


def _judge_candidates(critic: QueryJudge, steps: list[_Step]) -> list[list[_Judged]]:
    """Judges the candidates of all drafts: the relevance and the support of each."""
    pairs = [(step.draft, p) for step in steps for p in step.candidates]
    asked = [(d.source, d.source.query("isrel", evidence=p)) for d, p in pairs]
    asked += [(d.source, d.source.query("issup", evidence=p, output=d.sentence)) for d, p in pairs]
    answers = _ask(critic, asked)
    relevance, support = iter(answers[: len(pairs)]), iter(answers[len(pairs) :])
    judged: list[list[_Judged]] = []
    for step in steps:
        options = [(p, next(relevance), next(support)) for p in step.candidates]
        judged.append([_Judged(p, r, s) for p, r, s in options if r is not None and s is not None])
    return judged


def _segment(step: _Step, options: Sequence[_Judged]) -> LabelledSegment:
    """The draft's next segment, with one of the judged passages."""
    d, action = step.draft, step.action
    text = d.source.sentences[d.at]
    if action == reflection.NO_RETRIEVAL:
        return LabelledSegment(text, action)
    best = max(options, key=lambda option: option.score)
    others = [option for option in options if option is not best]
    chosen = best if d.best_only or not others else d.rng.choice(others)
    d.evidence = chosen.passage
    support = reflection.ISSUP[int(chosen.support.argmax())]
    if action == reflection.CONTINUE:
        return LabelledSegment(text, action, support=support)
    relevance = reflection.ISREL[int(chosen.relevance.argmax())]
    return LabelledSegment(text, action, chosen.passage, relevance, support)
