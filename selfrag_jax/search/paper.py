"""Segment-level beam search (paper, Section 3.3, Algorithm 1): retrieve, generate per passage in parallel, criticise, keep.

A step extends every live beam of a question by one segment: the beam's Retrieve distribution decides between retrieving
(P branches, one for each passage), continuing with the evidence at hand, and no retrieval (one branch); all branches are
generated together on the prefix that they share; the best W candidates stay. Finished beams are kept and compete with the
others. Many questions are searched at once, each at its own pace (engine.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import numpy as np

from selfrag_jax.engine.engine import Engine, drive, on_device
from selfrag_jax.engine.requests import Generate, Keep, Passages, Read, Settled
from selfrag_jax.engine.segments import Segment, TokenRules
from selfrag_jax.errors import UserError
from selfrag_jax.models.llama import Model
from selfrag_jax.models.params import Params
from selfrag_jax.records import Passage
from selfrag_jax.search import scoring
from selfrag_jax.search.config import SearchConfig
from selfrag_jax.search.tree import Beam, Node, Search
from selfrag_jax.text import prompts, reflection
from selfrag_jax.text.tokenizer import Control, Tokenizer

PASSAGE_TOKENS = (
    32  # what must be left of the model's context for a passage, or else the answer ends
)

# passages for a query: (question index, previous segments' texts) for each -> passages, best first
Retrieve = Callable[[Sequence[tuple[int, list[str]]]], list[list[Passage]]]


class BeamSearch:
    """max_length: of a passage, in tokens. Parameters as engine.on_device gives them, or stacked.

    Nothing stands beyond the model's context: passages are cut to what is left of it, and a path ends that has no room for another
    segment, with a notice each. Raises BadInput where not even a first segment has room.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        tokenizer: Tokenizer,
        config: SearchConfig,
        max_length: int,
    ):
        self.model, self.params, self.tokenizer, self.config = (
            model,
            on_device(model, params),
            tokenizer,
            config,
        )
        self.max_length, self.context = max_length, model.config.max_length
        if self.longest_prompt < PASSAGE_TOKENS:
            raise UserError(
                f"max_new_tokens={config.max_new_tokens} leaves no room for questions in the model's context of {self.context} "
                f"tokens; {self.context - 2 * PASSAGE_TOKENS} would"
            )
        self.rules = TokenRules(tokenizer.eos_id, tokenizer.pad_id, tokenizer.reflection_ids())
        self.id_of = {t: tokenizer.id(t) for t in reflection.RETRIEVE}
        self.refused = {tokenizer.id(t) for t in config.constraints}

    def run(
        self, prompt_ids: Sequence[list[int]], retrieve: Retrieve, slots: int | None = None
    ) -> list[Search]:
        """Searches questions, `slots` (default: all) at once. prompt_ids: tokens of each prompt, up to the response heading.

        Raises what a search raises.
        """
        out: list[Search | None] = [None] * len(prompt_ids)
        for i, event in self.stream(prompt_ids, retrieve, slots or len(prompt_ids)):
            if isinstance(event, Exception):
                raise event
            if isinstance(event, Search):
                out[i] = event
        return out

    def stream(
        self,
        prompt_ids: Sequence[list[int]],
        retrieve: Retrieve,
        slots: int,
        names: Sequence[str] | None = None,
        overlap: bool = False,
    ) -> Iterator[tuple[int, Settled | Search | Exception]]:
        """(index of the question, event) as they come: segments that have settled, and in the end a question's outcome.

        names: of the questions, for the random numbers of sampling (default: their indices). overlap: see engine.drive.
        """
        if not prompt_ids:
            return
        c, names = self.config, names or [str(i) for i in range(len(prompt_ids))]
        engine = Engine(
            self.model, self.params, self.engine_rules, slots, self.width, self.branches, self.limit, c.length_bucket,
            max(map(len, prompt_ids)), self.grows, (c.temperature, c.top_p) if c.temperature else None,
        )  # fmt: skip
        searches = ((i, self.search(list(ids), names[i])) for i, ids in enumerate(prompt_ids))
        yield from drive(engine, searches, retrieve, overlap)

    # What the engine is made for.
    @property
    def engine_rules(self) -> TokenRules:
        return self.rules

    @property
    def width(self) -> int:
        return self.config.beam_width if self.config.max_depth > 1 else 1

    @property
    def branches(self) -> int:
        return 1 if self.config.mode == "no_retrieval" else self.config.ndocs

    @property
    def limit(self) -> int:
        return self.config.max_new_tokens

    @property
    def grows(self) -> bool:
        return self.config.max_depth > 1

    @property
    def longest_prompt(self) -> int:
        """Tokens of a question at most."""
        return min(self.max_length, self.context - self.config.max_new_tokens - PASSAGE_TOKENS)

    # ---- the search of one question ------------------------------------------------------------------------------
    def search(self, prompt: list[int], name: str) -> Generator[Any, Any, Search]:
        """Algorithm 1, as a generator that engine.drive runs."""
        distribution, _ = yield Read([prompt], [0])
        search = Search([Beam(None, distribution[0], len(prompt), 0)])
        for depth in range(self.config.max_depth):
            live = [b for b in search.beams if not b.finished]
            if not live:  # or no path has room for another segment
                break
            actions = [self._action(b) for b in live]
            passages = yield from self._passages(search, live, actions)
            out = yield self._branches(search, live, actions, passages, name)
            candidates = [
                (b, -1, -1) for b in search.beams if b.finished
            ]  # (new beam, parent lane, branch)
            for beam, (action, p), found in zip(live, actions, passages, strict=True):
                for j, passage in enumerate(found):
                    mine = out.at((beam.row, j))
                    node = self._node(search, beam, action, p, passage, mine)
                    follows = (
                        int(mine.next_position)
                        if self.config.keep_passages
                        else node.start + len(self._kept(node))
                    )
                    new = Beam(node, mine.retrieve, follows)
                    new.full = (
                        not node.finished
                        and depth + 1 < self.config.max_depth
                        and self._full(search, new.next_position)
                    )
                    candidates.append((new, beam.row, beam.row * self.branches + j))
            parents, branches = self._keep_best(search, candidates)
            last = depth + 1 == self.config.max_depth or all(b.finished for b in search.beams)
            if last:
                break
            if settled := search.settle():
                yield Settled(settled)
            yield (
                Keep(parents, branches)
                if self.config.keep_passages
                else self._without_passages(search, parents)
            )
        return search

    def _action(self, beam: Beam) -> tuple[str, float]:
        """What precedes the beam's next segment, and p(retrieve)."""
        c, p = self.config, beam.retrieve
        probability = float(scoring.p_retrieve(p, c.normalise))
        has_evidence = (
            c.keep_passages and beam.node is not None and beam.node.action != "no_retrieval"
        )
        if c.mode == "no_retrieval":
            return "no_retrieval", probability
        if c.mode == "always_retrieve":
            return "retrieve", probability
        if has_evidence and p.argmax() == 2:
            return "continue", probability
        wanted = probability > c.threshold if c.threshold is not None else p.argmax() == 1
        return ("retrieve" if wanted else "no_retrieval"), probability

    def _passages(
        self, search: Search, live: list[Beam], actions
    ) -> Generator[Any, Any, list[list[Passage | None]]]:
        """For each live beam the passages of its branches; [None] for the single branch without a new passage."""
        wanted = [i for i, (action, _) in enumerate(actions) if action == "retrieve"]
        out: list[list[Passage | None]] = [[None] for _ in live]
        if not wanted:
            return out
        queries = [[self.text(n.tokens) for n in search.path(live[i])] for i in wanted]
        for i, found in zip(wanted, (yield Passages(queries)), strict=True):
            if found:
                out[i] = list(found[: self.config.ndocs])
            else:
                search.notices.append("no passage was found; answered without one")
                actions[i] = ("no_retrieval", actions[i][1])
        return out

    def _branches(self, search: Search, live: list[Beam], actions, passages, name: str) -> Generate:
        lanes = max(b.row for b in live) + 1
        lanes = 1 if lanes == 1 else self.width  # two shapes only
        branches: list[list[list[int]]] = [[] for _ in range(lanes)]
        start, keys = [0] * lanes, np.zeros((lanes, self.branches, 2), np.uint32)
        for beam, (action, _), found in zip(live, actions, passages, strict=True):
            branches[beam.row] = [
                self._branch_input(search, action, passage, beam.next_position) for passage in found
            ]
            start[beam.row] = beam.next_position
            if self.config.temperature:
                for j in range(len(found)):
                    keys[beam.row, j] = _key(
                        self.config.seed, name, beam.node.id if beam.node else -1, j
                    )
        return Generate(branches, start, self.config.max_new_tokens, keys)

    def _keep_best(self, search: Search, candidates) -> tuple[list[int], list[int]]:
        """Keeps the best W; ties go to the earlier candidate. Returns the lanes and the branches that the new beams stand on,
        [W] each."""
        W = self.config.beam_width
        allowed = [c for c in candidates if c[0].node.allowed]
        if not allowed:
            search.notices.append(
                "every segment was refused by the constraints; the best of them are kept"
            )
        kept = sorted(allowed or candidates, key=lambda c: -c[0].rank(self.config.accumulate))[:W]
        search.beams = [beam for beam, _, _ in kept]
        parents, branches = [0] * W, [0] * W
        for w, (beam, parent, branch) in enumerate(kept):
            beam.row = w
            parents[w], branches[w] = max(parent, 0), max(branch, 0)
        return parents, branches

    def _without_passages(self, search: Search, parents: list[int]) -> Read:
        """The prefix of each new beam without the passage of its last segment, which is read once more for that."""
        rows: list[list[int]] = [[] for _ in parents]
        start = [0] * len(parents)
        for beam in (b for b in search.beams if not b.finished):
            rows[beam.row], start[beam.row] = self._kept(beam.node), beam.node.start
        return Read(rows, start, parents)

    def _kept(self, node: Node) -> list[int]:
        """What later segments see of a segment without its passage."""
        return [
            *([] if node.action == "retrieve" else [self.id_of[reflection.NO_RETRIEVAL]]),
            *node.tokens,
        ]

    def _full(self, search: Search, position: int) -> bool:
        """Whether no other segment may begin there; a notice says so."""
        if position <= self.context - self.config.max_new_tokens - PASSAGE_TOKENS:
            return False
        notice = f"the model's context of {self.context} tokens is full; a path ended there"
        search.notices += [notice] if notice not in search.notices else []
        return True

    def _branch_input(
        self, search: Search, action: str, passage: Passage | None, position: int
    ) -> list[int]:
        """What is fed to a branch, from that position on."""
        if action == "no_retrieval":
            return [self.id_of[reflection.NO_RETRIEVAL]]
        if action == "continue":
            return [self.id_of[reflection.CONTINUE]]
        ids = self.tokenizer.encode([Control(reflection.RETRIEVAL), *prompts.passage(passage)])
        most = min(self.max_length, self.context - self.config.max_new_tokens - position)
        if len(ids) > most:
            why = "" if most == self.max_length else f": the model's context has {self.context}"
            search.notices.append(
                f"passage {passage.id} was cut from {len(ids)} to {most} tokens{why}"
            )
            ids = [*ids[: most - 1], ids[-1]]  # cut the text, keep </paragraph>
        return ids

    def _node(self, search: Search, beam: Beam, action, p, passage, out: Segment) -> Node:
        """out: the segment of one branch."""
        evidence, isrel = passage, out.isrel
        if (
            action == "continue" and beam.node is not None
        ):  # the same evidence, judged relevant when it was retrieved
            evidence, isrel = beam.node.passage, np.asarray(beam.node.isrel)
        judged = (isrel, out.issup, out.isuse, float(evidence is not None))
        score = scoring.finite(
            scoring.segment_score(out.mean_probability(), *judged, self.config.weights)
        )
        return search.add(
            beam.node,
            out,
            action=action,
            p_retrieve=p,
            passage=evidence,
            isrel=isrel,
            score=score,
            total=self._total(beam, score),
            allowed=not self.refused & {*out.said()},
            start=beam.next_position,
        )

    def _total(self, beam: Beam, score: float) -> float:
        if self.config.accumulate == "product":  # two bad segments are not a good one
            return max(score, 0.0) * (1.0 if beam.node is None else beam.node.total)
        return score if beam.node is None else beam.node.total + score

    def critiques(self, tokens: Sequence[int]) -> list[str]:
        """The critique tokens that a segment says, by name."""
        r = self.rules.reflection
        return [self.tokenizer.token(t) for t in tokens if t in (*r.isrel, *r.issup, *r.isuse)]

    def told(
        self, search: Search, best: Beam, task: str, voted: bool
    ) -> tuple[Beam, list[Node], str]:
        """The path that is the answer, its segments that are told, and the text that they make. task: of the question, and
        voted: whether `best` was elected, matter to the released scripts."""
        path = search.path(best)
        return best, path, " ".join(text for n in path if (text := self.text(n.tokens)))

    def text(self, tokens: Sequence[int]) -> str:
        """The text of a segment without its control tokens."""
        control = {*self.rules.reflection.all, self.rules.eos, self.rules.pad}
        return self.tokenizer.decode([t for t in tokens if t not in control]).strip()


def _key(seed: int, name: str, node: int, branch: int) -> np.ndarray:
    """[2] uint32: the same for a branch of a question's tree, wherever and beside whatever it is generated."""
    digest = hashlib.sha256(
        f"{seed}/{node}/{branch}/{name}".encode("utf-8", "surrogatepass")
    ).digest()
    return np.frombuffer(digest[:8], "<u4")
