"""The released scripts' search: each of their quirks, by hand or against a plain form of the scripts over full forwards."""

import re
from dataclasses import replace

import numpy as np
import pytest
from plain_search import PlainSearch, make_passages, make_rag

from selfrag_jax.answering.config import DEFAULT
from selfrag_jax.engine import engine
from selfrag_jax.errors import UserError
from selfrag_jax.records import Question
from selfrag_jax.search import scoring
from selfrag_jax.search.released import scores
from selfrag_jax.search.released.search import ReleasedSearch
from selfrag_jax.text import prompts, reflection
from selfrag_jax.text.tokenizer import Control


def test_the_gate_compares_logarithms():
    """With p(Retrieval) = .9 and p(No Retrieval) = .1, log .9 / (log .9 + log .1) is .04: less likely means more."""
    likely, unlikely = np.log([0.1, 0.9, 0.0001]), np.log([0.9, 0.1, 0.0001])
    assert scores.released_gate(likely) == pytest.approx(0.10536 / (0.10536 + 2.30259), abs=1e-4)
    assert scores.released_gate(likely) < 0.2 < scores.released_gate(unlikely)
    assert scoring.p_retrieve(np.array([0.1, 0.9, 0.0]), "yes_no") > 0.2  # the paper's


def test_scores_by_hand():
    isrel, issup = np.array([0.2, 0.6]), np.array([0.5, 0.2, 0.3])
    isuse, never = np.array([0.1, 0.1, 0.1, 0.2, 0.5]), np.zeros
    weights = scoring.Weights(1.0, 2.0, 0.5, 0.0)
    assert scores.released_score(0.4, isrel, issup, isuse, weights) == pytest.approx(
        0.75 + 1.2 + 0.225
    )
    assert scores.released_score(0.4, isrel, never(3), never(5), weights) == pytest.approx(
        0.75
    )  # never said: 0
    with_sequence = replace(weights, w_seq=1.0)
    assert scores.released_score(0.4, isrel, issup, isuse, with_sequence) == pytest.approx(
        0.4 + 0.75 + 1.2 + 0.225
    )
    # The long form: no sequence, no IsUse, and no weights.
    assert scores.released_score_long(np.log(isrel), issup) == pytest.approx(0.75 + 0.6)
    assert scores.released_score_long(np.log(isrel), never(3)) == pytest.approx(0.75)


class PlainScripts(PlainSearch):
    """The scripts, one prompt at a time, every token by a full forward, log-probabilities of the whole vocabulary. known: how many
    of them, the best, the scripts get to see."""

    known = 5_000
    missed = 0  # that were asked for and not known
    nearly_0 = np.exp(-100)

    def sample(self, prompt, new):
        """Tokens, and at each the log-probabilities of all."""
        tokens, logs = [], []
        for _ in range(new):
            logits = self.logits([*prompt, *tokens])
            logits[self.t.pad_id] = -1e30
            logs.append(logits - logits.max() - np.log(np.exp(logits - logits.max()).sum()))
            tokens.append(int(logits.argmax()))
            if tokens[-1] == self.t.eos_id:
                break
        return tokens, logs

    def seen(self, log, i, unknown=nearly_0):
        known = (log > log[i]).sum() < self.known
        self.missed += not known
        return np.exp(log[i]) if known else unknown

    def scores(self, tokens, logs):
        r = self.r
        relevance = np.array(
            [self.seen(logs[0], i, *[-100] * (self.c.max_depth > 1)) for i in r.isrel]
        )
        out = {"rel": relevance[1] / relevance.sum(), "sup": 0.0, "use": 0.0}
        at = [i for i, t in enumerate(tokens) if t in r.issup]
        if at:
            p = np.array([self.seen(logs[at[0]], i) for i in r.issup])
            out["sup"] = p[0] / p.sum() + 0.5 * p[1] / p.sum()
        at = [i for i, t in enumerate(tokens) if t in r.isuse]
        if at:
            p = np.array([self.seen(logs[at[0]], i) for i in r.isuse])
            out["use"] = sum(w * x for w, x in zip((-1, -0.5, 0, 0.5, 1), p / p.sum(), strict=True))
        out["seq"] = np.exp(
            sum(log[t] for log, t in zip(logs, tokens, strict=True)) / max(len(tokens), 1)
        )
        return out

    def with_passage(self, prompt, passage):
        return prompt + self.t.encode([Control(reflection.RETRIEVAL), *prompts.passage(passage)])

    def first_paragraph(self, tokens):
        ends = [n for n in range(len(tokens)) if "\n\n" in self.t.decode(tokens[: n + 1])]
        return tokens[: ends[0] + 1] if ends else tokens

    def short(self, prompt, passages):
        """(retrieved, tokens and scores of the tree)"""
        c, (no, yes, _) = self.c, self.r.retrieve
        retrieve = c.mode == "always_retrieve"
        if c.mode == "adaptive_retrieval":
            _, logs = self.sample(prompt, 1)
            retrieve = logs[0][yes] / (logs[0][yes] + logs[0][no]) > c.threshold
        if not retrieve:
            return False, [(tuple(self.sample([*prompt, no], c.max_new_tokens)[0]), 0.0)]
        tree = []
        for passage in passages[: c.ndocs]:
            tokens, logs = self.sample(self.with_passage(prompt, passage), c.max_new_tokens)
            s, w = self.scores(tokens, logs), c.weights
            tree.append(
                (
                    tuple(tokens),
                    w.w_seq * s["seq"]
                    + w.w_rel * s["rel"]
                    + w.w_sup * s["sup"]
                    + w.w_use * s["use"],
                )
            )
        return True, tree

    def text(self, tokens):
        """As vLLM has it, but for the space behind what control tokens it begins with."""
        removed = "|".join(re.escape(t) for t in reflection.ALL if t != reflection.CONTINUE)
        return re.sub(f"^((?:{removed})+) ", r"\1", self.t.decode(tokens))

    def cleaned(self, tokens, *more):
        text = tokens if isinstance(tokens, str) else self.text(tokens)
        for token in (*(t for t in reflection.ALL if t != reflection.CONTINUE), "</s>", *more):
            text = text.replace(token, "")
        return text

    def elected(self, tree):
        """Of the short form's closed sets: the option, as a text, by the sum of its passages' scores."""
        sums = {}
        for tokens, score in tree:
            text = self.cleaned(tokens, "\n")
            sums[text] = sums.get(text, 0) + score
        return sorted(sums.items(), key=lambda pair: pair[1], reverse=True)[0][0]

    def short_answer(self, decided, tree, closed):
        if not decided:
            text = self.cleaned(tree[0][0], "\n")
        else:
            text = (
                self.elected(tree) if closed else self.text(max(tree, key=lambda pair: pair[1])[0])
            )
        text = text[1:] if text[:1] in ("#", ":") else text
        return (
            text if closed or not decided else self.cleaned(text, reflection.CONTINUE).strip()
        )  # ours shows none

    def long_answer(self, decided, tree, beams, task):
        """tree, beams: as of `long`."""
        tidy = lambda text: (lambda t: t[1:] if t[:1] == " " else t)(self.cleaned(text))  # noqa: E731
        spaced = lambda text: re.sub(r"(?<=\w)([.!?])(?=\w)", r"\1 ", text)  # noqa: E731
        if not decided:
            return tidy(self.text(tree[0][1]).split("\n\n")[0])
        paths = []
        for at in beams:
            paths.append([])
            while at >= 0:
                paths[-1].insert(
                    0, self.text(tree[at][1]).replace("</s>", "")
                )  # the end of text is not in vLLM's
                at = tree[at][0]
        joined = " ".join(["", *paths[0]])
        if task == "factscore":
            return spaced(tidy(joined))
        sentences = paths[1] if not tidy(joined) and len(paths) > 1 else paths[0]
        out, before = "", []
        for i, sentence in enumerate(["", *sentences]):
            if len(sentence) and tidy(sentence) not in before:
                before.append(tidy(sentence))
                out += tidy(sentence)[:-1] + f" [{i}]" + ". "
        out = spaced(out[:-1])
        return out.replace(".[Continue to Use Evidence]", " [1]. ").replace(". [1] ", " [1]. ")

    def long(self, prompt, passages):
        """(retrieved, parent, tokens and score of each node, the beams of the deepest level as node numbers)"""
        c, (no, yes, again), eos = self.c, self.r.retrieve, self.t.eos_id
        retrieve = c.mode == "always_retrieve"
        if c.mode == "adaptive_retrieval":
            tokens, logs = self.sample(prompt, 25)
            tokens = self.first_paragraph(tokens)
            p = np.exp([logs[0][i] for i in self.r.retrieve])
            retrieve = yes in tokens and p[1] / (p[0] + p[1]) > c.threshold
        if not retrieve:
            tokens = self.first_paragraph(self.sample([*prompt, no], c.max_new_tokens)[0])
            return False, [(-1, tuple(tokens), 0.0)], [0]
        nodes = [dict(prompt=prompt, pred=[yes], said=[], score=None)]  # the root
        levels = {0: [0]}
        depth = 1
        while depth < c.max_depth:
            levels[depth] = []
            for number in levels[depth - 1]:
                node = nodes[number]
                history, previous = node["prompt"], node["said"]
                if yes not in node["pred"]:
                    continue
                sampled = [
                    self.sample(self.with_passage(history + previous, p), c.max_new_tokens)
                    for p in passages[: c.ndocs]
                ]
                for tokens, logs in sampled:
                    s = self.scores(tokens, logs)
                    pred = [t for t in tokens if t != eos] if no in tokens else list(tokens)
                    if no in pred:
                        for i, token in enumerate(tokens):
                            if token == no:
                                p = [self.seen(logs[i], j) for j in (no, yes, again)]
                                if float((p[1] + p[2]) / (p[1] + p[0]) > c.threshold) > c.threshold:
                                    pred[i] = yes
                        pred.append(no)
                    score = (s["rel"] + s["sup"]) * (
                        1.0 if node["score"] is None else node["score"]
                    )
                    cut = pred[: pred.index(yes)] if yes in pred else pred
                    nodes.append(
                        dict(
                            prompt=history + previous,
                            pred=pred,
                            score=score,
                            parent=number,
                            cut=cut,
                        )
                    )
                    previous = [
                        t for t in cut if t != eos
                    ]  # and so into the prompt of the next child
                    nodes[-1]["said"] = previous
                    levels[depth].append(len(nodes) - 1)
            levels[depth] = sorted(levels[depth], key=lambda n: -nodes[n]["score"])[: c.beam_width]
            depth += 1
        deepest = [level for d, level in levels.items() if d and level][-1]
        return (
            True,
            [(n["parent"] - 1, tuple(n["cut"]), n["score"]) for n in nodes[1:]],
            [n - 1 for n in deepest],
        )


def config_of(seed, long):
    rng = np.random.default_rng(seed)
    ndocs, width, depth = (
        ((1, 2, 3), (3, 1, 3), (3, 2, 4), (10, 4, 3))[seed % 4]
        if long
        else ((1, 3, 5, 10)[seed % 4], 1, 1)
    )
    return replace(
        DEFAULT.search,
        scorer="released",
        mode=("always_retrieve", "adaptive_retrieval", "no_retrieval", "adaptive_retrieval")[
            seed // 4 % 4
        ],
        threshold=(0.2, 0.5, 0.9)[rng.integers(3)],
        weights=scoring.Weights(*rng.choice([0.0, 0.5, 1.0, 2.0], 4)),
        beam_width=width,
        max_depth=depth,
        ndocs=ndocs,
        max_new_tokens=8,
        length_bucket=32,
    )


def cases(tokenizer, config, seed, n=5):
    rng = np.random.default_rng(2000 + seed)
    words = ["where", "what", "who is Mara", "the ropemaker", "of Quenport"]
    asked = [
        [
            tokenizer.bos_id,
            *tokenizer.encode(prompts.instruction(" ".join(rng.choice(words, 1 + i)))),
        ]
        for i in range(n)
    ]
    return asked, [
        make_passages(rng, tokenizer, int(rng.integers(1, config.ndocs + 1))) for _ in asked
    ]


def both(talkative, config, seed):
    """The search and the plain scripts, half of the times with few known probabilities."""
    plain = PlainScripts(talkative, config)

    class Search(ReleasedSearch):
        @property
        def rules(self):
            return replace(super().rules, num_known=plain.known)

    search = Search(talkative.model, talkative.params, talkative.tokenizer, config, 64)
    known = ReleasedSearch.rules.fget(search).num_known
    plain.known = (talkative.tokenizer.vocab_size // 2, known)[seed % 2]
    return search, plain


@pytest.mark.slow
def test_the_short_form_equals_the_script(talkative):
    """160 questions: the same decision, tokens, scores, vote and text of the answer, be the set closed or open."""
    retrieved = shared = missed = 0
    for seed in range(32):
        config = config_of(seed, long=False)
        asked, passages = cases(talkative.tokenizer, config, seed)
        passages = [
            [*found, found[-1]][: config.ndocs] for found in passages
        ]  # where there is room, two say the same
        search, plain = both(talkative, config, seed)
        for ids, found, got in zip(
            asked,
            passages,
            search.run(asked, lambda qs, p=passages: [p[q] for q, _ in qs]),
            strict=True,
        ):
            decided, tree = plain.short(ids, found)
            for closed in (False, True):
                voted = (
                    closed and decided and search.elect(got, Question("0", "?", options=("a", "b")))
                ) or got.best()
                text = search.render(got, voted, "", closed)[2]
                assert text == plain.short_answer(decided, tree, closed)
            assert (got.nodes[0].action == "retrieve") == decided
            assert [n.tokens for n in got.nodes] == [tokens for tokens, _ in tree]
            np.testing.assert_allclose(
                [n.score for n in got.nodes], [score for _, score in tree], atol=1e-5
            )
            assert got.best().node.score == max(n.score for n in got.nodes)
            retrieved += decided
            if decided:
                voted = search.elect(got, Question("0", "?", options=("a", "b")))
                elected = plain.elected(tree)
                assert search.script_text.option(voted.node.tokens) == elected
                mine = [
                    n.score for n in got.nodes if search.script_text.option(n.tokens) == elected
                ]
                assert voted.node.score == max(mine)
                shared += len(mine) > 1
        missed += plain.missed
    assert 40 < retrieved < 120 and shared > 10 and missed > 10


@pytest.mark.slow
def test_the_long_form_equals_the_script(talkative):
    """160 questions: the same tree, the same beams of the deepest level, scores multiplied down the path, the same text of the
    answer, for tasks with marks of citations and without."""
    deep = stopped = remapped = missed = 0
    for seed in range(32):
        config = config_of(seed, long=True)
        asked, passages = cases(talkative.tokenizer, config, seed)
        search, plain = both(talkative, config, seed)
        for ids, found, got in zip(
            asked,
            passages,
            search.run(asked, lambda qs, p=passages: [p[q] for q, _ in qs]),
            strict=True,
        ):
            decided, tree, beams = plain.long(ids, found)
            for task in ("asqa", "factscore"):
                text = search.render(got, got.best(), task, False)[2]
                assert text == plain.long_answer(decided, tree, beams, task)
            assert (got.nodes[0].action == "retrieve") == decided
            assert [(n.parent, n.tokens) for n in got.nodes] == [
                (parent, tokens) for parent, tokens, _ in tree
            ]
            np.testing.assert_allclose(
                [n.total for n in got.nodes], [score for *_, score in tree], atol=1e-5
            )
            assert [b.node.id for b in got.beams] == beams
            deep += max(n.depth for n in got.nodes) > 0
            stopped += decided and max(n.depth for n in got.nodes) < config.max_depth - 2
            remapped += any(
                talkative.tokenizer.id(reflection.NO_RETRIEVAL) in n.tokens for n in got.nodes
            )
        missed += plain.missed
    assert deep > 10 and stopped > 10 and remapped > 10 and missed > 10


@pytest.mark.slow
def test_answers_of_the_released_scorer(talkative):
    """Through the public object: citations are valid, neighbours do not matter, nothing that was never judged is cited."""
    rng = np.random.default_rng(5)
    rows = [
        Question(str(i), f"Where {i}?", ctxs=tuple(make_passages(rng, talkative.tokenizer, 3)))
        for i in range(5)
    ]
    rag = make_rag(talkative)
    for depth in (1, 3):
        changes = dict(scorer="released", mode="always_retrieve", max_depth=depth)
        for row, a in zip(rows, rag.answer(rows, **changes), strict=True):
            [alone] = rag.answer([row], **changes)
            assert alone.answer == a.answer and alone.score == pytest.approx(a.score, abs=1e-5)
            assert all(
                sum(a.segments[c.segment].issup.values()) > 0 and c.passage < len(a.passages)
                for c in a.citations
            )


@pytest.mark.slow
def test_the_task_and_the_options_of_a_question_reach_its_text(talkative, monkeypatch):
    """Marks of citations for asqa alone, and in the short form what was elected is told as such."""
    rng = np.random.default_rng(5)
    row = Question("0", "Where?", ctxs=tuple(make_passages(rng, talkative.tokenizer, 3)))
    rag, changes = make_rag(talkative), dict(scorer="released", mode="always_retrieve")
    for task, marked in (("asqa", True), ("factscore", False), ("", False)):
        [a] = rag.answer([replace(row, task=task)], max_depth=3, **changes)
        assert a.answer and not a.error and bool(re.search(r" \[1\]\.", a.answer)) == marked
    seen, told = [], ReleasedSearch.told
    monkeypatch.setattr(
        ReleasedSearch, "told", lambda self, *args: seen.append(args[3]) or told(self, *args)
    )
    for options, depth in (((), 1), (("a", "b"), 1), (("a", "b"), 3)):
        rag.answer([replace(row, options=options)], max_depth=depth, **changes)
    assert seen == [False, True, False]


def test_what_the_scripts_cannot_do_is_refused(talkative):
    rag = make_rag(talkative)
    with pytest.raises(UserError, match="needs a --threshold"):
        rag.answer(["q"], scorer="released", threshold=None)
    with pytest.raises(UserError, match="searches have none"):
        rag.answer(["q"], scorer="released", constraints=(reflection.IRRELEVANT,))
    with pytest.raises(UserError, match="searches have none"):
        rag.answer(["q"], scorer="released", constraints=(reflection.NO_SUPPORT,), max_depth=1)
    rag.check(
        dict(scorer="released", constraints=[reflection.NO_SUPPORT], max_depth=3, threshold=0.2)
    )
    with pytest.raises(UserError, match="keep no passage"):
        rag.answer(["q"], scorer="released", keep_passages=True)
    with pytest.raises(UserError, match="--scorer='authors': must be one of paper, released"):
        rag.answer(["q"], scorer="authors")


@pytest.mark.parametrize(
    ("depth", "mode", "reads"),
    [
        (1, "always_retrieve", 1),
        (1, "adaptive_retrieval", 1),
        (2, "always_retrieve", 1),
        (2, "adaptive_retrieval", 2),
    ],
)
def test_a_prompt_is_read_once(talkative, monkeypatch, depth, mode, reads):
    """Once more, without its last token, for the gate of the long form, on which the first level stands too."""
    seen, read = [], engine.Engine.read
    monkeypatch.setattr(
        engine.Engine, "read", lambda self, jobs: seen.extend(jobs) or read(self, jobs)
    )
    rag = make_rag(talkative, ndocs=2)
    rng = np.random.default_rng(5)
    rows = [
        Question(str(i), "Who?" + " x" * i, ctxs=tuple(make_passages(rng, talkative.tokenizer, 2)))
        for i in range(3)
    ]
    answers = rag.answer(rows, scorer="released", mode=mode, threshold=0.2, max_depth=depth)
    assert all(a.segments and not a.error for a in answers) and len(seen) == reads * len(rows)
