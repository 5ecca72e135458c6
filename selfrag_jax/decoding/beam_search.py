"""Segment-level beam search (paper, Section 3.3, Algorithm 1): retrieve, generate per passage in parallel, criticise, keep.

Many questions are searched at once. A step extends every live beam of every question by one segment: the beam's
Retrieve distribution decides between retrieving (P branches, one for each passage), continuing with the evidence at
hand, and no retrieval (one branch); all branches are generated together on the prefix that they share; the best W of
each question's candidates stay. Finished beams are kept and compete with the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from selfrag_jax import prompts, reflection
from selfrag_jax.decoding import scoring, segments
from selfrag_jax.decoding.segments import TokenRules
from selfrag_jax.models.llama import Model
from selfrag_jax.models.params import Params
from selfrag_jax.records import BadInput, Passage
from selfrag_jax.tokenizer import Control, Tokenizer

MAX_NDOCS = 100
SCORERS = ("paper", "released")  # the paper's equations, or what the released scripts compute (see released.py)
ACCUMULATE = ("sum", "mean", "product")
MODES = ("adaptive_retrieval", "always_retrieve", "no_retrieval")


@dataclass(frozen=True)
class SearchConfig:
    mode: str  # one of MODES
    threshold: float | None  # of p(retrieve) in adaptive mode; None: the most likely Retrieve token decides
    normalise: str  # of p(retrieve): "yes_no" or "all"
    weights: scoring.Weights
    beam_width: int  # W
    max_depth: int  # segments at most
    ndocs: int  # P, passages per retrieval
    accumulate: str  # rank paths by the "sum" (paper), "mean" or "product" of their segments' scores; sums favour long answers
    constraints: tuple[
        str, ...
    ]  # a segment that says one of these critique tokens is dropped ("hard constraints" in the paper)
    keep_passages: bool  # in the history of later segments, as in training data; the released script drops them
    max_new_tokens: int  # of a segment
    length_bucket: int  # token lengths are padded to a multiple of it, to bound the number of compilations
    scorer: str  # one of SCORERS

    def __post_init__(self):
        if self.mode not in MODES:
            raise BadInput(f"--mode={self.mode!r}: must be one of {', '.join(MODES)}")
        if self.normalise not in ("yes_no", "all"):
            raise BadInput(f"normalise={self.normalise!r}: must be yes_no or all")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise BadInput(f"--threshold={self.threshold}: must be a probability between 0 and 1")
        if self.accumulate not in ACCUMULATE:
            raise BadInput(f"--accumulate={self.accumulate!r}: must be one of {', '.join(ACCUMULATE)}")
        if self.scorer not in SCORERS:
            raise BadInput(f"--scorer={self.scorer!r}: must be one of {', '.join(SCORERS)}")
        critiques = (*reflection.ISREL, *reflection.ISSUP, *reflection.ISUSE)
        for token in self.constraints:
            if token not in critiques:
                raise BadInput(f"--constraints: {token!r} is no critique token; they are {', '.join(critiques)}")
        for name in ("beam_width", "max_depth", "ndocs", "max_new_tokens", "length_bucket"):
            if getattr(self, name) < 1:
                raise BadInput(f"--{name}={getattr(self, name)}: must be at least 1")
        if self.ndocs > MAX_NDOCS:  # each is a branch that is generated
            raise BadInput(f"--ndocs={self.ndocs}: at most {MAX_NDOCS} passages; the paper takes 5 or 10")


@dataclass(frozen=True)
class Node:
    """One segment in the search tree of a question, with what the model said about it."""

    id: int
    parent: int  # -1 for a first segment
    depth: int
    action: str  # the Retrieve token that was fed: "retrieve", "continue" or "no_retrieval"
    p_retrieve: float
    passage: Passage | None
    tokens: tuple[int, ...]  # generated, reflection tokens included
    p_segment: float
    isrel: tuple[float, ...]
    issup: tuple[float, ...]
    isuse: tuple[float, ...]
    score: float  # f of this segment
    total: float  # sum or product over the path
    allowed: bool  # by the hard constraints
    start: int  # position of its first token, the Retrieve token
    finished: bool
    complete: bool  # False where the length limit cut the segment


@dataclass
class Beam:
    """A path in the tree. `row` is its row in the device's prefix cache, -1 once it needs none."""

    node: Node | None
    retrieve: np.ndarray  # [3] distribution before its next segment
    next_position: int
    row: int = -1

    def rank(self, accumulate: str) -> float:
        """What paths are compared by."""
        return self.node.total / (self.node.depth + 1 if accumulate == "mean" else 1)

    @property
    def finished(self) -> bool:
        return self.node is not None and self.node.finished


@dataclass
class Search:
    """The state of one question's search and its outcome."""

    beams: list[Beam]
    nodes: list[Node] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def path(self, beam: Beam) -> list[Node]:
        """The nodes from the first segment to the beam's last."""
        out, node = [], beam.node
        while node is not None:
            out.append(node)
            node = self.nodes[node.parent] if node.parent >= 0 else None
        return out[::-1]

    def best(self) -> Beam:
        return self.beams[0]  # kept in order


# passages for a query: (question index, previous segments' texts) for each -> passages, best first
Retrieve = Callable[[Sequence[tuple[int, list[str]]]], list[list[Passage]]]


class BeamSearch:
    def __init__(self, model: Model, params: Params, tokenizer: Tokenizer, config: SearchConfig, max_length: int):
        self.model, self.params, self.tokenizer, self.config = model, params, tokenizer, config
        self.max_length = max_length  # of prompt and of passage, in tokens
        self.rules = TokenRules(tokenizer.eos_id, tokenizer.pad_id, tokenizer.reflection_ids())
        self.id_of = {t: tokenizer.id(t) for t in reflection.RETRIEVE}
        self.refused = {tokenizer.id(t) for t in config.constraints}

    def run(self, prompt_ids: Sequence[list[int]], retrieve: Retrieve) -> list[Search]:
        """Searches one batch of questions. prompt_ids: tokens of each prompt, up to the response heading."""
        searches, prefix = self._start(prompt_ids)
        for depth in range(self.config.max_depth):
            live = [(q, b) for q, s in enumerate(searches) for b in s.beams if not b.finished]
            if not live:
                break
            prefix = self._step(searches, live, prefix, depth, retrieve)
        return searches

    # ---- first step: the prompts ---------------------------------------------------------------------------------
    def _start(self, prompt_ids: Sequence[list[int]]):
        tokens, valid = self._pad(prompt_ids)
        cache, logits = segments.prefill(self.model, self.params, tokens, valid, tokens.shape[1])
        retrieve = np.asarray(segments.retrieve_distribution(logits, self.rules))
        return [Search([Beam(None, retrieve[q], len(ids), q)]) for q, ids in enumerate(prompt_ids)], cache

    def _pad(self, rows: Sequence[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        longest, bucket = max([1, *map(len, rows)]), self.config.length_bucket
        length = 1 if longest == 1 else -(-longest // bucket) * bucket  # a lone Retrieve token needs no padding
        tokens = np.full((len(rows), length), self.tokenizer.pad_id, np.int32)
        valid = np.zeros((len(rows), length), bool)
        for i, row in enumerate(rows):
            tokens[i, : len(row)], valid[i, : len(row)] = row, True
        return tokens, valid

    # ---- one step ------------------------------------------------------------------------------------------------
    def _action(self, beam: Beam) -> tuple[str, float]:
        """What precedes the beam's next segment, and p(retrieve)."""
        c, p = self.config, beam.retrieve
        probability = float(scoring.p_retrieve(p, c.normalise))
        has_evidence = c.keep_passages and beam.node is not None and beam.node.action != "no_retrieval"
        if c.mode == "no_retrieval":
            return "no_retrieval", probability
        if has_evidence and p.argmax() == 2:
            return "continue", probability
        if c.mode == "always_retrieve":
            return "retrieve", probability
        wanted = probability > c.threshold if c.threshold is not None else p.argmax() == 1
        return ("retrieve" if wanted else "no_retrieval"), probability

    def _step(self, searches: list[Search], live: list[tuple[int, Beam]], prefix, depth: int, retrieve: Retrieve):
        actions = [self._action(b) for _, b in live]
        passages = self._passages(searches, live, actions, retrieve)
        P = max(map(len, passages))
        R = len(searches) * (1 if depth == 0 else self.config.beam_width)  # rows of the prefix cache

        # Branch inputs [R * P]: rows without a live beam, and branches without a passage, stay empty.
        rows: list[list[int]] = [[] for _ in range(R * P)]
        start = np.zeros(R * P, np.int32)
        for (q, beam), (action, _), found in zip(live, actions, passages, strict=True):
            for j, passage in enumerate(found):
                rows[beam.row * P + j] = self._branch_input(searches[q], action, passage)
                start[beam.row * P + j] = beam.next_position
        tokens, valid = self._pad(rows)
        segment, branches = segments.generate(
            self.model, self.params, self.rules, prefix, start, tokens, valid, self.config.max_new_tokens
        )
        out = jax.tree.map(np.asarray, segment)

        candidates: list[list[tuple[Beam, int, int]]] = [  # (new beam, parent row, branch row)
            [(b, -1, -1) for b in s.beams if b.finished] for s in searches
        ]
        for (q, beam), (action, p), found in zip(live, actions, passages, strict=True):
            for j, passage in enumerate(found):
                i = beam.row * P + j
                node = self._node(searches[q], beam, action, p, passage, out, i)
                new = Beam(node, out.retrieve[i], int(out.next_position[i]))
                candidates[q].append((new, beam.row, i))

        parent, branch = self._keep_best(searches, candidates)
        if depth + 1 == self.config.max_depth or all(b.finished for s in searches for b in s.beams):
            return None
        if not self.config.keep_passages:
            return self._without_passages(searches, prefix, parent)
        return segments.append_branches(prefix, branches, jnp.asarray(parent), jnp.asarray(branch))

    def _keep_best(self, searches: list[Search], candidates) -> tuple[np.ndarray, np.ndarray]:
        """Keeps the best W of each question; ties go to the earlier candidate. Returns the rows of the prefix and of the
        branches that the new beams stand on, [Q * W] each."""
        W = self.config.beam_width
        parent, branch = np.zeros(len(searches) * W, np.int32), np.zeros(len(searches) * W, np.int32)
        for q, search in enumerate(searches):
            allowed = [c for c in candidates[q] if c[0].node.allowed]
            if candidates[q] and not allowed:
                search.notices.append("every segment was refused by the constraints; the best of them are kept")
            kept = sorted(allowed or candidates[q], key=lambda c: -c[0].rank(self.config.accumulate))[:W]
            search.beams = [beam for beam, _, _ in kept]
            for w, (beam, parent_row, branch_row) in enumerate(kept):
                beam.row = q * W + w
                parent[beam.row], branch[beam.row] = max(parent_row, 0), max(branch_row, 0)
        return parent, branch

    def _without_passages(self, searches: list[Search], prefix, parent: np.ndarray):
        """The prefix of each new beam without the passage of its last segment, which is read once more for that."""
        rows: list[list[int]] = [[] for _ in parent]
        start = np.zeros(len(parent), np.int32)
        for beam in (b for s in searches for b in s.beams if not b.finished):
            node = beam.node
            fed = [] if node.action == "retrieve" else [self.id_of[reflection.NO_RETRIEVAL]]
            rows[beam.row] = [*fed, *node.tokens]
            start[beam.row] = node.start
            beam.next_position = node.start + len(rows[beam.row])
        tokens, valid = self._pad(rows)
        return segments.append_tokens(self.model, self.params, prefix, jnp.asarray(parent), start, tokens, valid)

    def _passages(self, searches, live, actions, retrieve: Retrieve) -> list[list[Passage | None]]:
        """For each live beam the passages of its branches; [None] for the single branch without a new passage."""
        wanted = [i for i, (action, _) in enumerate(actions) if action == "retrieve"]
        queries = []
        for i in wanted:
            q, beam = live[i]
            queries.append((q, [self.text(n.tokens) for n in searches[q].path(beam)]))
        out: list[list[Passage | None]] = [[None] for _ in live]
        for i, found in zip(wanted, retrieve(queries) if queries else [], strict=True):
            q = live[i][0]
            if found:
                out[i] = list(found[: self.config.ndocs])
            else:
                searches[q].notices.append("no passage was found; answered without one")
                actions[i] = ("no_retrieval", actions[i][1])
        return out

    def _branch_input(self, search: Search, action: str, passage: Passage | None) -> list[int]:
        if action == "no_retrieval":
            return [self.id_of[reflection.NO_RETRIEVAL]]
        if action == "continue":
            return [self.id_of[reflection.CONTINUE]]
        ids = self.tokenizer.encode([Control(reflection.RETRIEVAL), *prompts.passage(passage)])
        if len(ids) > self.max_length:
            search.notices.append(f"passage {passage.id} was cut from {len(ids)} to {self.max_length} tokens")
            ids = [*ids[: self.max_length - 1], ids[-1]]  # cut the text, keep </paragraph>
        return ids

    def _node(self, search: Search, beam: Beam, action, p, passage, out: segments.Segment, i: int) -> Node:
        evidence, isrel = passage, out.isrel[i]
        if action == "continue" and beam.node is not None:  # the same evidence, judged relevant when it was retrieved
            evidence, isrel = beam.node.passage, np.asarray(beam.node.isrel)
        words = int(out.text_tokens[i])
        p_segment = float(np.exp(out.log_prob[i] / words)) if words else 0.0  # saying nothing is not certain
        score = float(
            scoring.segment_score(
                p_segment, isrel, out.issup[i], out.isuse[i], float(evidence is not None), self.config.weights
            )
        )
        node = Node(
            id=len(search.nodes),
            parent=beam.node.id if beam.node else -1,
            depth=beam.node.depth + 1 if beam.node else 0,
            action=action,
            p_retrieve=p,
            passage=evidence,
            tokens=tuple(int(t) for t in out.tokens[i, : out.length[i]]),
            p_segment=p_segment,
            isrel=tuple(map(float, isrel)),
            issup=tuple(map(float, out.issup[i])),
            isuse=tuple(map(float, out.isuse[i])),
            score=score,
            total=self._total(beam, score),
            allowed=not self.refused & {int(t) for t in out.tokens[i, : out.length[i]]},
            start=beam.next_position,
            finished=bool(out.finished[i]),
            complete=bool(out.complete[i]),
        )
        search.nodes.append(node)
        return node

    def _total(self, beam: Beam, score: float) -> float:
        if beam.node is None:
            return score
        return beam.node.total * score if self.config.accumulate == "product" else beam.node.total + score

    def critiques(self, tokens: Sequence[int]) -> list[str]:
        """The critique tokens that a segment says, by name."""
        r = self.rules.reflection
        return [self.tokenizer.token(t) for t in tokens if t in (*r.isrel, *r.issup, *r.isuse)]

    def text(self, tokens: Sequence[int]) -> str:
        """The text of a segment without its control tokens."""
        control = {*self.rules.reflection.all, self.rules.eos, self.rules.pad}
        return self.tokenizer.decode([t for t in tokens if t not in control]).strip()
