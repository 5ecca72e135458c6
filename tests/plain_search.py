"""The paper's search as a plain, slow loop: the specification that PaperSearch is compared with.

One branch at a time, and every token by a full forward pass: no cache, no batch, nothing shared.
Below it are the small things that tests search with: passages, questions, prompts, a SelfRAG.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from selfrag_jax.answering.config import DEFAULT
from selfrag_jax.answering.selfrag import SelfRAG
from selfrag_jax.records import Passage, Question
from selfrag_jax.search import scoring
from selfrag_jax.search.algorithms import ALGORITHMS
from selfrag_jax.search.config import SearchConfig
from selfrag_jax.text import prompts, reflection
from selfrag_jax.text.tokenizer import Control


# ---- the search ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class PlainNode:
    """A segment in the tree. parent: its index in the tree's nodes, or -1."""

    parent: int
    tokens: tuple[int, ...]
    score: float


@dataclass(frozen=True)
class PlainBeam:
    """A path of segments, and all that its next segment depends on."""

    history: list[int]  # every token so far
    retrieve: np.ndarray  # [3] distribution before the next segment
    path: tuple[tuple[int, ...], ...] = ()  # the tokens of each segment
    total: float | None = None
    finished: bool = False
    allowed: bool = True  # by the hard constraints
    evidence: Passage | None = None
    isrel: np.ndarray | None = None  # of the evidence, as judged when it was retrieved
    has_evidence: bool = False
    node: int = -1  # of its last segment


@dataclass
class PlainTree:
    nodes: list[PlainNode] = field(default_factory=list)
    beams: list[PlainBeam] = field(default_factory=list)  # best first


@dataclass(frozen=True)
class PlainSegment:
    tokens: tuple[int, ...]
    isrel: np.ndarray
    retrieve: np.ndarray
    score: float
    finished: bool


@partial(jax.jit, static_argnames="model")  # compiled once for all searches of a model
def forward(params, tokens, last, model):
    positions = jnp.arange(tokens.shape[1])[None]
    hidden, _ = model.hidden(params, tokens, positions, jnp.ones(tokens.shape, jnp.int32))
    return model.logits(params, hidden[0, last])


class PlainSearch:
    LENGTH = 160  # every forward pass is padded to it

    def __init__(self, loaded, config: SearchConfig):
        self.loaded, self.config, self.tokenizer = loaded, config, loaded.tokenizer
        self.reflection = loaded.tokenizer.reflection_ids()

    def search(self, prompt: list[int], passages: Sequence[Passage]) -> PlainTree:
        """Extends every live beam by a segment per passage, and keeps the best; then again."""
        c, tree = self.config, PlainTree()
        after_prompt = self.group(self.logits(prompt), self.reflection.retrieve)
        tree.beams = [PlainBeam(prompt, after_prompt)]
        for _ in range(c.max_depth):
            if all(b.finished for b in tree.beams):
                break
            candidates = [b for b in tree.beams if b.finished]
            for beam in tree.beams:
                if not beam.finished:
                    candidates += self.extend(tree, beam, passages)
            allowed = [b for b in candidates if b.allowed]
            ranked = sorted(allowed or candidates, key=self.rank, reverse=True)
            tree.beams = ranked[: c.beam_width]
        return tree

    def rank(self, beam: PlainBeam) -> float:
        """What beams are compared by."""
        return beam.total / (len(beam.path) if self.config.accumulate == "mean" else 1)

    # ---- one step of one beam ----
    def extend(
        self, tree: PlainTree, beam: PlainBeam, passages: Sequence[Passage]
    ) -> Iterator[PlainBeam]:
        """The beam's continuations: one for each passage, or a single one without."""
        c, t = self.config, self.tokenizer
        token = self.retrieve_token(beam)
        keeps_evidence = token == reflection.CONTINUE
        for passage in passages[: c.ndocs] if token == reflection.RETRIEVAL else [None]:
            fed = t.encode([Control(token), *(prompts.passage(passage) if passage else [])])
            evidence = beam.evidence if keeps_evidence else passage
            isrel = beam.isrel if keeps_evidence else None
            segment = self.segment(beam.history + fed, evidence is not None, isrel)
            if not c.keep_passages:  # later segments do not see the passage
                fed = [] if passage else [t.id(reflection.NO_RETRIEVAL)]
            tree.nodes.append(PlainNode(beam.node, segment.tokens, segment.score))
            yield PlainBeam(
                history=[*beam.history, *fed, *segment.tokens],
                retrieve=segment.retrieve,
                path=(*beam.path, segment.tokens),
                total=self.total(beam, segment.score),
                finished=segment.finished,
                allowed=not {t.id(name) for name in c.constraints} & set(segment.tokens),
                evidence=evidence,
                isrel=segment.isrel,
                has_evidence=token != reflection.NO_RETRIEVAL,
                node=len(tree.nodes) - 1,
            )

    def retrieve_token(self, beam: PlainBeam) -> str:
        """The Retrieve token that the beam's next segment begins with."""
        c, p = self.config, beam.retrieve
        if c.mode == "no_retrieval":
            return reflection.NO_RETRIEVAL
        if c.mode == "always_retrieve":
            return reflection.RETRIEVAL
        most_likely = reflection.RETRIEVE[p.argmax()]
        if c.keep_passages and beam.has_evidence and most_likely == reflection.CONTINUE:
            return reflection.CONTINUE
        if c.threshold is None:
            retrieves = most_likely == reflection.RETRIEVAL
        else:
            retrieves = scoring.p_retrieve(p, c.normalise) > c.threshold
        return reflection.RETRIEVAL if retrieves else reflection.NO_RETRIEVAL

    def total(self, beam: PlainBeam, score: float) -> float:
        """The score of the beam's path with another segment of that score."""
        if self.config.accumulate == "product":
            score = max(score, 0.0)
            return score if beam.total is None else beam.total * score
        return score if beam.total is None else beam.total + score

    # ---- one segment ----
    def segment(
        self, history: list[int], has_passage: bool, isrel: np.ndarray | None
    ) -> PlainSegment:
        """Generates a segment greedily. isrel: of evidence that was judged before, else None."""
        c, t, r = self.config, self.tokenizer, self.reflection
        text, tokens, log_probs = list(history), [], []
        issup = isuse = retrieve = None
        finished = False
        for step in range(c.max_new_tokens):
            logits = self.logits(text)
            if t.pad_id != t.eos_id:
                logits[t.pad_id] = -1e30
            token = int(logits.argmax())
            ends_before = token in r.retrieve
            ends_answer = token == t.eos_id or token in r.isuse
            ends = ends_before or ends_answer or step + 1 == c.max_new_tokens

            # Critiques: IsRel at the first position, IsSup where it is first generated, the rest at
            # the end; there IsSup too, if it was not generated.
            if isrel is None:
                isrel = self.group(logits, r.isrel)
            if issup is None and (ends or token in r.issup):
                issup = self.group(logits, r.issup)
            if ends:
                isuse, retrieve = self.group(logits, r.isuse), self.group(logits, r.retrieve)

            if ends_before:
                break
            text.append(token)
            tokens.append(token)
            if token not in r.all and token != t.eos_id:
                log_probs.append(log_softmax(logits)[token])
            if ends_answer:
                finished = True
                break
        p = np.exp(sum(log_probs) / len(log_probs)) if log_probs else 0.0
        score = scoring.segment_score(p, isrel, issup, isuse, float(has_passage), c.weights)
        return PlainSegment(tuple(tokens), isrel, retrieve, float(score), finished)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """[V] float64: of the token after these."""
        tokens = np.zeros((1, self.LENGTH), np.int32)
        tokens[0, : len(ids)] = ids
        logits = forward(self.loaded.params, tokens, len(ids) - 1, self.loaded.model)
        return np.asarray(logits).astype(np.float64)

    def group(self, logits: np.ndarray, ids: Sequence[int]) -> np.ndarray:
        """The distribution within a group of tokens."""
        e = np.exp(logits[list(ids)] - logits[list(ids)].max())
        return e / e.sum()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


# ---- comparing trees -----------------------------------------------------------------------------
def structure(tree) -> list[tuple[int, tuple[int, ...]]]:
    """(parent, tokens) of every segment, in a plain tree or a SearchTree."""
    return [(n.parent, n.tokens) for n in tree.nodes]


def scores_of(tree) -> list[float]:
    return [n.score for n in tree.nodes]


# ---- what tests search with ----------------------------------------------------------------------
def make_passages(rng, tokenizer, n):
    """Short passages of random words."""
    words = [
        "Quenport", "ropemaker", "Mara Tellock", "lives in", "studied", "the", "starlore",
        "Lisford",
    ]  # fmt: skip
    return [
        Passage(str(i), str(rng.choice(words)), " ".join(rng.choice(words, rng.integers(1, 7))))
        for i in range(n)
    ]


def make_questions(tokenizer, seed, texts, num_passages=3):
    """A question for each text, with random passages of its own; ids count from "0"."""
    rng = np.random.default_rng(seed)
    return [
        Question(str(i), text, ctxs=tuple(make_passages(rng, tokenizer, num_passages)))
        for i, text in enumerate(texts)
    ]


def prompt_ids(tokenizer, question):
    """The tokens of a prompt that asks the question."""
    return [tokenizer.bos_id, *tokenizer.encode(prompts.instruction(question))]


def make_search(loaded, config, max_length=64):
    """The search that config.scorer names."""
    algorithm = ALGORITHMS[config.scorer]
    return algorithm(loaded.model, loaded.params, loaded.tokenizer, config, max_length)


def same_passages(passages):
    """A find_passages function that finds these for every query."""
    return lambda queries: [passages for _ in queries]


def own_passages(passages):
    """A find_passages function that finds passages[i] for every query of question i."""
    return lambda queries: [passages[i] for i, _ in queries]


def make_rag(loaded, **changes):
    """A SelfRAG without an index, for short searches: two segments of six tokens at most."""
    search = replace(DEFAULT.search, max_new_tokens=6, length_bucket=16, max_depth=2, **changes)
    return SelfRAG(loaded, None, replace(DEFAULT, search=search, batch=4, max_length=64))
