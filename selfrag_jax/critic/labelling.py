"""The critic labels training data for the generator (paper, Section 3.2.2, Algorithm 2).

For each instruction: is retrieval needed? If so, for each segment of the output the critic judges retrieved passages
for relevance and support; one of them is put in front of the segment together with its critiques. Mostly it is the
passage that supports the segment best; sometimes another, so that the generator also learns what it looks like when a
passage is irrelevant or does not support the segment.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from selfrag_jax import artifacts
from selfrag_jax.checkpoints import saving as checkpoints
from selfrag_jax.engine.segments import group_distribution
from selfrag_jax.progress import progress
from selfrag_jax.records import (
    BadInput,
    GeneratorExample,
    Instruction,
    Passage,
    generator_example_from,
    instruction_from,
    read_records,
    read_rows,
    write_jsonl,
)
from selfrag_jax.retrieval.retriever import OnlineRetriever
from selfrag_jax.search import scoring
from selfrag_jax.text import prompts, reflection
from selfrag_jax.text.prompts import CritiqueQuery
from selfrag_jax.text.sentences import split


@dataclass(frozen=True)
class CriticConfig:
    batch: int  # queries judged together
    length_bucket: int  # prompts are padded to a multiple of it
    brief: bool  # the prompts' wording, as the critic was trained


class Critic:
    """A trained critic: distributions over a group's tokens for critique queries."""

    def __init__(self, loaded: checkpoints.LoadedModel, config: CriticConfig):
        self.loaded, self.config = loaded, config
        self.params = jax.device_put(loaded.params)  # once, not at every call
        self.ids = loaded.tokenizer.reflection_ids()
        self._forward = jax.jit(partial(self._logits, loaded.model, self.ids))

    @staticmethod
    def _logits(model, ids, params, tokens, valid):
        positions = jnp.maximum(jnp.cumsum(valid, 1) - 1, 0)
        hidden, _ = model.hidden(params, tokens, positions, valid.astype(jnp.int32))
        last = jnp.take_along_axis(hidden, (valid.sum(1) - 1)[:, None, None], axis=1)[:, 0]
        logits = model.logits(params, last)
        return {group: group_distribution(logits, ids.group(group)) for group in reflection.GROUPS}

    def judge(self, queries: Sequence[CritiqueQuery]) -> list[np.ndarray]:
        """For each query the distribution over its group's tokens, in the order of reflection.GROUPS."""
        tokenizer, c = self.loaded.tokenizer, self.config
        ids = [[tokenizer.bos_id, *tokenizer.encode(prompts.critique(q, c.brief), before_control=True)] for q in queries]
        out: list[np.ndarray] = [np.empty(0)] * len(queries)
        order = sorted(range(len(queries)), key=lambda i: len(ids[i]))
        for at in range(0, len(order), c.batch):
            chunk = order[at : at + c.batch]
            length = -(-max(len(ids[i]) for i in chunk) // c.length_bucket) * c.length_bucket
            tokens = np.full((c.batch, length), tokenizer.pad_id, np.int32)
            valid = np.zeros((c.batch, length), bool)
            valid[:, 0] = True
            for row, i in enumerate(chunk):
                tokens[row, : len(ids[i])], valid[row, : len(ids[i])] = ids[i], True
            groups = {g: np.asarray(p) for g, p in self._forward(self.params, tokens, valid).items()}
            for row, i in enumerate(chunk):
                out[i] = groups[queries[i].group][row]
        return out


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


def label_rows(critic: Critic, rows: Sequence[Instruction], config: LabelConfig) -> list[GeneratorExample]:
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
            segments = split(row.output) if retrieving else [row.output.strip()]
            drafts.append(_Draft(row, rng, segments, rng.random() < config.best_rate, use, retrieving=retrieving))

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
    again = critic.judge([CritiqueQuery("retrieve", d.row.asked, d.preceding, d.evidence) for d in later])
    action = {id(d): reflection.RETRIEVE[int(p.argmax())] for d, p in zip(later, again, strict=True)}
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
    support = critic.judge([CritiqueQuery("issup", d.row.asked, evidence=p, output=d.segments[d.at]) for d, p in pool])
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


def label(
    critic_path: str | Path,
    input_path: str | Path,
    config: LabelConfig,
    out: str | Path,
    index: str | Path | None = None,
    k: int | None = None,
) -> int:
    """Labels all rows of `input_path` and writes generator data in the published format.

    index: where the passages (k of them) of rows without ctxs are looked for. Interrupted, it continues behind the last
    finished chunk. Returns the number of examples. Raises BadInput when no row has passages.
    """
    made = asdict(config) | ({"k": k} if index else {})
    inputs = {"critic": critic_path, "input": input_path} | ({"index": index} if index else {})
    artifacts.require_finished(critic_path, "train", "critic")
    if artifacts.is_finished(out, "label", made, inputs):
        return 0
    rows = read_records(input_path, instruction_from)
    if index:
        found = OnlineRetriever(index).passages([r.ctxs for r in rows], [r.asked for r in rows], k)
        rows = [replace(r, ctxs=r.ctxs or tuple(ps)) for r, ps in zip(rows, found, strict=True)]
    if not any(r.ctxs for r in rows):
        raise BadInput(f"{input_path}: no row has passages (ctxs); give --index, or run `selfrag retrieve` on it first")
    critic = Critic(checkpoints.load(critic_path), config.critic)
    parts = Path(out).with_name(Path(out).name + ".parts")
    # Parts belong to exactly this critic, config and input; anything else starts anew.
    parts = parts / artifacts.identity("label", made, inputs)
    chunks = range(0, len(rows), config.chunk)
    with progress("label", len(rows), "instructions") as bar:
        for at in chunks:
            part = parts / f"{at:08d}.jsonl"
            if not part.is_file():
                write_jsonl(part, label_rows(critic, rows[at : at + config.chunk], config))
            else:
                bar.first += len(rows[at : at + config.chunk])
            bar.advance(len(rows[at : at + config.chunk]))
    examples = [generator_example_from(where, row) for at in chunks for where, row in read_rows(parts / f"{at:08d}.jsonl")]
    n = write_jsonl(out, examples)
    artifacts.finish(out, "label", made, inputs, {"examples": n})
    artifacts.remove(parts.parent)
    return n
