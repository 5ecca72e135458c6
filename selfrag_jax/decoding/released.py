"""The search as the released scripts run it (run_short_form.py and run_long_form_static.py of AkariAsai/self-rag), quirks
included: published numbers come from it. `beam_search.py` is the paper's.

max_depth=1 is the short-form script, more the long-form one. What is theirs, and not the paper's:

  gate (short)   compares log-probabilities, which inverts it
  gate (long)    retrieves when the model does not say [Retrieval] within 25 tokens, and asks the threshold when it does
  no retrieval   (long) ends at the first blank line
  generation     goes on to the end of text or the limit, never ends with a segment
  scores         see scoring.released_score and scoring.released_score_long
  long form      depth T gives T - 1 segments; scores are multiplied; only what says [Retrieval] goes on, the rest is dropped
                 unless it stands at the deepest level; child i's history has the text of child i - 1 in place of its parent's;
                 passages of earlier segments are not kept; the same passages serve at every step

Log-probabilities outside the 5,000 or 32,000 best, which the scripts take for e^-100, are taken as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from selfrag_jax import reflection
from selfrag_jax.decoding import scoring, segments
from selfrag_jax.decoding.beam_search import Beam, BeamSearch, Node, Retrieve, Search, SearchConfig
from selfrag_jax.decoding.segments import TokenRules
from selfrag_jax.models.llama import Model
from selfrag_jax.models.params import Params
from selfrag_jax.records import BadInput, Passage
from selfrag_jax.tokenizer import Tokenizer

GATE_TOKENS = 25  # that the long-form script looks through for [Retrieval]


@dataclass
class _Open:
    """A node that may go on: its history without its own text, and whether it said [Retrieval]."""

    node: Node | None  # None: the root
    prompt: list[int]
    said: list[int]
    goes_on: bool


class ReleasedSearch(BeamSearch):
    def __init__(self, model: Model, params: Params, tokenizer: Tokenizer, config: SearchConfig, max_length: int):
        super().__init__(model, params, tokenizer, config, max_length)
        if config.constraints:
            raise BadInput("--constraints: the released scripts have none; use --scorer=paper")
        if config.mode == "adaptive_retrieval" and config.threshold is None:
            raise BadInput("--scorer=released needs a --threshold in adaptive mode: the scripts fail without one")
        self.whole = TokenRules(tokenizer.eos_id, tokenizer.pad_id, tokenizer.reflection_ids(), whole=True)
        self.retrieval, self.no_retrieval = (self.id_of[t] for t in (reflection.RETRIEVAL, reflection.NO_RETRIEVAL))

    def run(self, prompt_ids: Sequence[list[int]], retrieve: Retrieve) -> list[Search]:
        """As BeamSearch.run."""
        prompts = [list(ids) for ids in prompt_ids]
        long = self.config.max_depth > 1
        wanted, p = self._gate(prompts, long)
        searches = [Search([Beam(None, p[q], len(ids))]) for q, ids in enumerate(prompts)]
        asked = [q for q in range(len(prompts)) if wanted[q]]
        found = dict(zip(asked, retrieve([(q, []) for q in asked]) if asked else [], strict=True))
        for q in asked:
            if not found[q]:
                searches[q].notices.append("no passage was found; answered without one")
        self._without(searches, prompts, [q for q in range(len(prompts)) if not found.get(q)])
        passages = {q: ps[: self.config.ndocs] for q, ps in found.items() if ps}
        levels = {q: [_Open(None, prompts[q], [], True)] for q in passages}
        for _ in range(self.config.max_depth - 1 if long else 1):
            opened = {q: [o for o in level if o.goes_on] for q, level in levels.items()}
            if not any(opened.values()):
                break
            levels = self._level(searches, opened, passages, long)
            for q, level in levels.items():
                if level:  # the deepest level that there is
                    searches[q].beams = [Beam(o.node, p[q], 0) for o in level]
        return searches

    # ---- the gate ------------------------------------------------------------------------------------------------
    def _gate(self, prompts: list[list[int]], long: bool) -> tuple[list[bool], np.ndarray]:
        """Whether to retrieve, and the Retrieve distribution after each prompt [Q, 3]."""
        c = self.config
        tokens, valid = self._pad(prompts)
        prefix, logits = segments.prefill(self.model, self.params, tokens, valid, tokens.shape[1])
        p = np.asarray(segments.retrieve_distribution(logits, self.rules))
        if c.mode != "adaptive_retrieval":
            return [c.mode == "always_retrieve"] * len(prompts), p
        if not long:
            log_probs = np.asarray(segments.retrieve_log_probs(logits, self.rules), np.float64)
            return [scoring.released_gate(row) > c.threshold for row in log_probs], p
        del prefix
        out = self._generate(prompts, [[[]] for _ in prompts], GATE_TOKENS)
        says = [self._before_blank_line(out, i).count(self.retrieval) > 0 for i in range(len(prompts))]
        return [not s or scoring.p_retrieve(row, "yes_no") > c.threshold for s, row in zip(says, p, strict=True)], p

    def _before_blank_line(self, out: segments.Segment, i: int) -> list[int]:
        tokens = [int(t) for t in out.tokens[i, : out.length[i]]]
        for n in range(1, len(tokens) + 1):
            if "\n\n" in self.tokenizer.decode(tokens[:n]):
                return tokens[: n - 1]
        return tokens

    # ---- generation ----------------------------------------------------------------------------------------------
    def _generate(self, histories: list[list[int]], branches: list[list[list[int]]], new: int) -> segments.Segment:
        """Each branch on its history, which is read once for all of them. Row r * P + j is branch j of history r."""
        P = max(map(len, branches))
        tokens, valid = self._pad([h[:-1] for h in histories])  # the last token leads each branch, so that none is empty
        prefix, _ = segments.prefill(self.model, self.params, tokens, valid, tokens.shape[1])
        fed: list[list[int]] = [[] for _ in range(len(histories) * P)]
        for r, (history, own) in enumerate(zip(histories, branches, strict=True)):
            for j, branch in enumerate(own):
                fed[r * P + j] = [history[-1], *branch]
        start = np.repeat([len(h) - 1 for h in histories], P).astype(np.int32)
        tokens, valid = self._pad(fed)
        segment, _ = segments.generate(self.model, self.params, self.whole, prefix, start, tokens, valid, new)
        return jax.tree.map(np.asarray, segment)

    def _without(self, searches: list[Search], prompts: list[list[int]], which: list[int]) -> None:
        """Answers without retrieval."""
        if not which:
            return
        out = self._generate([prompts[q] for q in which], [[[self.no_retrieval]] for _ in which], self.config.max_new_tokens)
        for i, q in enumerate(which):
            tokens = [int(t) for t in out.tokens[i, : out.length[i]]]
            if self.config.max_depth > 1:
                tokens = self._before_blank_line(out, i)
            node = self._add(searches[q], None, "no_retrieval", None, tokens, out, i, 0.0, 0.0)
            searches[q].beams = [Beam(node, searches[q].beams[0].retrieve, 0)]

    def _level(self, searches: list[Search], opened: dict[int, list[_Open]], passages, long: bool) -> dict[int, list[_Open]]:
        """The best children of all open nodes, by question."""
        W, P = self.config.beam_width, max(len(passages[q]) for q, level in opened.items() if level)
        at = [(q, o) for q, level in opened.items() for o in level]
        histories = [o.prompt + o.said for _, o in at]
        branches = [[self._branch_input(searches[q], "retrieve", passage) for passage in passages[q]] for q, _ in at]
        out = self._generate(histories, branches, self.config.max_new_tokens)
        children: dict[int, list[_Open]] = {q: [] for q in opened}
        for r, (q, o) in enumerate(at):
            previous = o.said
            for j, passage in enumerate(passages[q]):
                child, said = self._child(searches[q], o, passage, out, r * P + j, long)
                children[q].append(_Open(child, o.prompt + previous, said, self.retrieval in self._remapped(out, r * P + j)))
                previous = said  # the next sibling's history
        for q, found in children.items():
            children[q] = sorted(found, key=lambda o: -o.node.total)[: W if long else len(found)]
        return children

    def _child(self, search: Search, o: _Open, passage: Passage, out, i: int, long: bool) -> tuple[Node, list[int]]:
        """The node of a branch, and its text as later segments see it."""
        tokens = self._remapped(out, i) if long else [int(t) for t in out.tokens[i, : out.length[i]]]
        said = tokens[: tokens.index(self.retrieval)] if long and self.retrieval in tokens else tokens
        if long:
            score = scoring.released_score_long(out.isrel[i], out.issup[i])
        else:
            score = float(
                scoring.released_score(_p_sequence(out, i), out.isrel[i], out.issup[i], out.isuse[i], self.config.weights)
            )
        total = score if o.node is None else o.node.total * score
        return self._add(search, o.node, "retrieve", passage, said, out, i, score, total), [
            t for t in said if t != self.rules.eos
        ]

    def _remapped(self, out: segments.Segment, i: int) -> list[int]:
        """The long form decides at every [No Retrieval] once more, and puts one behind what said any."""
        tokens = [int(t) for t in out.tokens[i, : out.length[i]]]
        where = [j for j, t in enumerate(tokens) if t == self.no_retrieval]
        if not where:
            return tokens
        threshold = self.config.threshold or 0.0
        for j in where:
            no, yes, again = out.retrieve_at[i, j]
            if float((yes + again) / (yes + no) > threshold) > threshold:
                tokens[j] = self.retrieval
        return [t for t in tokens if t != self.rules.eos] + [self.no_retrieval]

    def _add(self, search: Search, parent: Node | None, action: str, passage, tokens, out, i: int, score, total) -> Node:
        node = Node(
            id=len(search.nodes),
            parent=parent.id if parent else -1,
            depth=parent.depth + 1 if parent else 0,
            action=action,
            p_retrieve=float(scoring.p_retrieve(search.beams[0].retrieve, self.config.normalise)),
            passage=passage,
            tokens=tuple(tokens),
            p_segment=_p_sequence(out, i),
            isrel=tuple(map(float, out.isrel[i])),
            issup=tuple(map(float, out.issup[i])),
            isuse=tuple(map(float, out.isuse[i])),
            score=score,
            total=total,
            allowed=True,
            start=0,
            finished=bool(out.finished[i]),
            complete=bool(out.complete[i]),
        )
        search.nodes.append(node)
        return node


def _p_sequence(out: segments.Segment, i: int) -> float:
    return float(np.exp(out.log_prob[i] / max(int(out.text_tokens[i]), 1)))
