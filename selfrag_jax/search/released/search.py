"""The search as the released scripts run it (run_short_form.py and run_long_form_static.py of AkariAsai/self-rag), quirks
included: published numbers come from it. `beam_search.py` is the paper's.

max_depth=1 is the short-form script, more the long-form one. What is theirs, and not the paper's:

  gate (short)   compares log-probabilities, which inverts it
  gate (long)    retrieves where the model says [Retrieval] within 25 tokens, before a blank line, and the threshold agrees (as of
                 commit f109462; before, a missing [Retrieval] retrieved, in a version whose search could not run)
  no retrieval   (long) ends at the first blank line
  generation     goes on to the end of text or the limit, never ends with a segment
  scores         see scoring.released_score and scoring.released_score_long
  long form      depth T gives T - 1 segments; scores are multiplied; only what says [Retrieval] goes on, the rest is dropped
                 unless it stands at the deepest level; child i's history has the text of child i - 1 in place of its parent's;
                 passages of earlier segments are not kept; the same passages serve at every step
  votes          are for texts, character by character: line breaks are deleted, white space and [Continue to Use Evidence] are not
  answer (short) line breaks are deleted, and a number sign or colon in front; of an answer from passages that was not elected only
                 the sign, and that only where no critique stands before it
  answer (long)  [Continue to Use Evidence] stays in the text. With passages, a space is put behind a full stop (exclamation mark,
                 question mark) within a word, "3.5" included. For tasks asqa and eli5, the last character of the i-th segment of the
                 path, of those that --ignore_cont leaves, makes way for a mark, " [i].", though the list of passages may be another;
                 a mark is all that is seen of a segment that only criticises; one with the text of an earlier one is left out; a
                 full stop with [Continue to Use Evidence] and ". [1] " become " [1]. "; and where what is left of the best path is
                 nothing, or one segment without text, the second best path is the answer
  unknown        what is none of the 5,000 (short) or 32,000 (long) most likely tokens of a step counts as e^-100 beside the others of
                 its group; of IsRel, in the long form, as a probability of -100. The short form's gate knows 32,016

--constraints=[No support / Contradictory] is the long form's --ignore_cont: such segments are left out of the answer, not of the
search. The long form is the script with --use_grounding; --use_groundness, --use_utility and --use_seqscore of the short one are
weights above 0. Not as theirs:

  failures       their searches die where passages are to be read and there are none; in mode no_retrieval and, but for asqa and
                 eli5, wherever nothing is retrieved (long); where [No Retrieval] is said and the threshold is None (long; taken for 0
                 here); of a gate that lacks a token (long); where the one path has no text (long, asqa and eli5); of one passage in
                 mode always_retrieve, and of an empty answer (short). The short form is that of commit ed22968 but for max_depth,
                 which that one hands to a function that has none
  tasks          votes are for all questions with options, there for fever and arc_c; in the long form tasks but asqa and eli5 are
                 treated as factscore, which is all that there is
  tokens         what was generated goes into histories as it is, not as text that is cut into tokens again; a control token that is
                 spelled, in a passage or by the model, is none; passages without a title have no empty line in its place; passages
                 are cut to max_length, and paths end with the model's context
  text           an answer from passages that was not elected (short) has lost its control tokens and white space around it; white
                 space beside control tokens is that of Tokenizer.decode, theirs depends on the version of vLLM. And vLLM leaves
                 tokens out of texts that a tokenizer holds for special, unless it is told not to, which the scripts do not: where
                 [Retrieval] is one of those, their long form has one segment in mode always_retrieve, and else retrieves nothing
"""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from selfrag_jax.engine.requests import Generate, Passages, Read
from selfrag_jax.engine.segments import Segment, TokenRules
from selfrag_jax.errors import UserError
from selfrag_jax.models.llama import Model
from selfrag_jax.models.params import Params
from selfrag_jax.records import Passage
from selfrag_jax.search import scoring
from selfrag_jax.search.config import SearchConfig
from selfrag_jax.search.paper import BeamSearch
from selfrag_jax.search.released import scores
from selfrag_jax.search.tree import Beam, Node, Search
from selfrag_jax.text import reflection
from selfrag_jax.text.tokenizer import Tokenizer

KNOWN_SHORT, KNOWN_LONG = (
    5_000,
    32_000,
)  # most likely tokens whose log-probabilities the scripts ask for
GATE_TOKENS = 25  # that the long-form script looks through for [Retrieval]
_CITED = ("asqa", "eli5")  # tasks for which the long-form script marks citations in the text


def _spaced(text: str) -> str:
    """With a space behind what ends a sentence within a word."""
    return re.sub(r"(?<=\w)([.!?])(?=\w)", r"\1 ", text)


@dataclass
class _Open:
    """A node that may go on: its history without its own text, and whether it said [Retrieval]."""

    node: Node | None  # None: the root
    prompt: list[int]
    said: list[int]
    goes_on: bool


@dataclass
class _Search(Search):
    standing: list[int] = field(default_factory=list)  # what stands in the question's lane


class ReleasedSearch(BeamSearch):
    def __init__(
        self,
        model: Model,
        params: Params,
        tokenizer: Tokenizer,
        config: SearchConfig,
        max_length: int,
    ):
        super().__init__(model, params, tokenizer, config, max_length)
        if config.constraints and (
            [*config.constraints] != [reflection.NO_SUPPORT] or config.max_depth == 1
        ):
            raise UserError(
                f"--constraints: the released scripts' searches have none, but {reflection.NO_SUPPORT} in the long form; use --scorer=paper"
            )
        if config.mode == "adaptive_retrieval" and config.threshold is None:
            raise UserError(
                "--scorer=released needs a --threshold in adaptive mode: without one the short form's script fails and the long "
                "form's does not retrieve (--mode=no_retrieval)"
            )
        if config.accumulate != "sum":
            raise UserError(
                f"--accumulate={config.accumulate}: the released scripts multiply, whatever is asked; use --scorer=paper"
            )
        if config.temperature:
            raise UserError(
                "--temperature: the released scripts take the most likely token; use --scorer=paper"
            )
        self.long = config.max_depth > 1
        known = KNOWN_LONG if self.long else KNOWN_SHORT
        self.whole = TokenRules(
            tokenizer.eos_id, tokenizer.pad_id, tokenizer.reflection_ids(), True, known
        )
        self.retrieval, self.no_retrieval = (
            self.id_of[t] for t in (reflection.RETRIEVAL, reflection.NO_RETRIEVAL)
        )

    engine_rules = property(lambda self: self.whole)
    width = property(lambda self: 1)  # one open node after the other
    limit = property(lambda self: max(self.config.max_new_tokens, GATE_TOKENS if self.long else 0))

    # ---- what is told of a search --------------------------------------------------------------------------------
    def told(
        self, search: Search, best: Beam, task: str, voted: bool
    ) -> tuple[Beam, list[Node], str]:
        path = search.path(best)
        if not self.long:
            return best, path, self._short_text(path[0], voted)
        if path[0].action == "no_retrieval":
            return best, path, self._first_paragraph(path[0].tokens).removeprefix(" ")
        path = self._not_refused(path)
        if task not in _CITED:
            return best, path, _spaced(" ".join(self._bare(n.tokens) for n in path))
        # Where there are two segments without text, the space between them is text enough for the script.
        if len(path) <= 1 and not any(self._bare(n.tokens) for n in path) and len(search.beams) > 1:
            best = search.beams[1]
            path = self._not_refused(search.path(best))
        return best, *self._with_marks(path)

    def option(self, tokens: Sequence[int]) -> str:
        """What the short form's votes are counted by."""
        return self._bare(tokens).replace("\n", "")

    def _short_text(self, node: Node, voted: bool) -> str:
        if voted or node.action == "no_retrieval":
            text = seen = self.option(node.tokens)
        else:  # the script looks at what still has its critiques
            text, seen = self.text(node.tokens), self.tokenizer.decode(node.tokens)
        return text[seen.startswith(("#", ":")) :]

    def _bare(self, tokens: Sequence[int]) -> str:
        """The text as the scripts clean it: with white space, and with the one control token that they do not know of."""
        again = self.rules.reflection.retrieve[2]
        gone = {*self.rules.reflection.all, self.rules.eos, self.rules.pad} - {again}
        return self.tokenizer.decode([t for t in tokens if t not in gone])

    def _first_paragraph(self, tokens: Sequence[int]) -> str:
        whole = self.tokenizer.decode(tokens)  # a critique between two line breaks keeps them apart
        behind = len(whole) - len(whole.split("\n\n")[0])
        text = self._bare(tokens)
        return text[: len(text) - behind]

    def _not_refused(self, path: Sequence[Node]) -> list[Node]:
        return [n for n in path if not self.refused & {*n.tokens}]

    def _with_marks(self, path: Sequence[Node]) -> tuple[list[Node], str]:
        """The segments that are told where citations are counted, and their text with a mark in place of each one's last
        character."""
        told: dict[str, tuple[int, Node]] = {}
        for i, node in enumerate(path, 1):
            if any(t != self.rules.eos for t in node.tokens):
                told.setdefault(self._bare(node.tokens).removeprefix(" "), (i, node))
        text = "".join(f"{text[:-1]} [{i}]. " for text, (i, _) in told.items())
        text = _spaced(text.removesuffix(" "))
        for mark in (f".{reflection.CONTINUE}", ". [1] "):
            text = text.replace(mark, " [1]. ")
        return [node for _, node in told.values()], text

    # ---- the search of one question ------------------------------------------------------------------------------
    def search(self, prompt: list[int], name: str) -> Generator[Any, Any, Search]:
        """As BeamSearch.search; nothing settles before the end, and every history but the prompt is read anew, for none
        continues another."""
        p, log_probs = (x[0] for x in (yield Read([prompt], [0])))
        search = _Search([Beam(None, p, len(prompt))], standing=prompt)
        if self.long and self.config.weights != scoring.Weights():
            search.notices.append(
                "the released long form scores without weights: those that were given have no effect"
            )
        found: list[Passage] = []
        if (yield from self._gate(search, prompt, p, log_probs)):
            [found] = yield Passages([[]])
            if not found:
                search.notices.append("no passage was found; answered without one")
        if not found:
            yield from self._without(search, prompt)
            return search
        level = [_Open(None, prompt, [], True)]
        for _ in range(self.config.max_depth - 1 if self.long else 1):
            opened = [
                o
                for o in level
                if o.goes_on and not self._full(search, len(o.prompt) + len(o.said))
            ]
            if not opened:
                break
            level = yield from self._level(search, opened, found[: self.config.ndocs])
            if level:  # the deepest level that there is
                search.beams = [Beam(o.node, p, 0) for o in level]
        return search

    def _gate(
        self, search: _Search, prompt: list[int], p: np.ndarray, log_probs: np.ndarray
    ) -> Generator[Any, Any, bool]:
        """Whether to retrieve. p, log_probs: [3] of the Retrieve tokens after the prompt."""
        c = self.config
        if c.mode != "adaptive_retrieval":
            return c.mode == "always_retrieve"
        if not self.long:
            return scores.released_gate(log_probs.astype(np.float64)) > c.threshold
        [out] = yield from self._generate(search, prompt, [[]], GATE_TOKENS)
        says = self.retrieval in self._to_blank_line(out)
        return says and scoring.p_retrieve(p, "yes_no") > c.threshold

    def _to_blank_line(self, out: Segment) -> list[int]:
        """With the token that ends the first one; a token may hold what stands before it and after."""
        tokens = out.said()
        for n in range(1, len(tokens) + 1):
            if "\n\n" in self.tokenizer.decode(tokens[:n]):
                return tokens[:n]
        return tokens

    def _generate(
        self, search: _Search, history: list[int], branches: list[list[int]], new: int
    ) -> Generator[Any, Any, list[Segment]]:
        """The segment of each branch on a history, which is read unless it stands there already."""
        whole = search.standing == history and all(branches)
        lead = [] if whole else history[-1:]  # of each branch, so that none is empty
        begin = history[: len(history) - len(lead)]
        if search.standing != begin:
            yield Read([begin], [0])
            search.standing = begin
        out = yield Generate([[[*lead, *b] for b in branches]], [len(begin)], new)
        return [out.at((0, j)) for j in range(len(branches))]

    def _without(self, search: _Search, prompt: list[int]) -> Generator[Any, Any, None]:
        """Answers without retrieval."""
        [out] = yield from self._generate(
            search, prompt, [[self.no_retrieval]], self.config.max_new_tokens
        )
        tokens = self._to_blank_line(out) if self.long else out.said()
        node = self._add(search, None, "no_retrieval", None, tokens, out, 0.0, 0.0)
        search.beams = [Beam(node, search.beams[0].retrieve, 0)]

    def _level(
        self, search: _Search, opened: list[_Open], passages: list[Passage]
    ) -> Generator[Any, Any, list[_Open]]:
        """The best children of the open nodes."""
        children = []
        for o in opened:
            history = o.prompt + o.said
            branches = [
                self._branch_input(search, "retrieve", passage, len(history))
                for passage in passages
            ]
            out = yield from self._generate(search, history, branches, self.config.max_new_tokens)
            previous = o.said
            for passage, segment in zip(passages, out, strict=True):
                child, said = self._child(search, o, passage, segment)
                children.append(
                    _Open(
                        child, o.prompt + previous, said, self.retrieval in self._remapped(segment)
                    )
                )
                previous = said  # the next sibling's history
        return sorted(children, key=lambda o: -o.node.total)[
            : self.config.beam_width if self.long else None
        ]

    def _child(
        self, search: Search, o: _Open, passage: Passage, out: Segment
    ) -> tuple[Node, list[int]]:
        """The node of a branch, and its text as later segments see it."""
        tokens = self._remapped(out) if self.long else out.said()
        said = (
            tokens[: tokens.index(self.retrieval)]
            if self.long and self.retrieval in tokens
            else tokens
        )
        if self.long:
            score = scoring.finite(scores.released_score_long(out.rel_log_probs, out.issup))
        else:
            judged = (out.mean_probability(), out.isrel, out.issup, out.isuse)
            score = scoring.finite(scores.released_score(*judged, self.config.weights))
        total = score if o.node is None else o.node.total * score
        node = self._add(search, o.node, "retrieve", passage, said, out, score, total)
        return node, [t for t in said if t != self.rules.eos]

    def _remapped(self, out: Segment) -> list[int]:
        """The long form decides at every [No Retrieval] once more, and puts one behind what said any."""
        tokens = out.said()
        where = [j for j, t in enumerate(tokens) if t == self.no_retrieval]
        if not where:
            return tokens
        threshold = self.config.threshold or 0.0
        for j in where:
            no, yes, again = out.retrieve_at[j]
            if float((yes + again) / (yes + no) > threshold) > threshold:
                tokens[j] = self.retrieval
        return [t for t in tokens if t != self.rules.eos] + [self.no_retrieval]

    def _add(
        self,
        search: Search,
        parent: Node | None,
        action: str,
        passage,
        tokens,
        out: Segment,
        score,
        total,
    ) -> Node:
        p = float(scoring.p_retrieve(search.beams[0].retrieve, self.config.normalise))
        fields = dict(
            action=action,
            p_retrieve=p,
            passage=passage,
            score=score,
            total=total,
            allowed=True,
            start=0,
        )
        return search.add(parent, out, tokens=tokens, **fields)
