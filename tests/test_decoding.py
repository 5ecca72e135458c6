"""Scores against hand-worked tables; the search against a slow, plain one over full forwards."""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_search import PlainSearch, make_passages, make_rag

from selfrag_jax import artifacts
from selfrag_jax.answering.citations import cite
from selfrag_jax.answering.config import DEFAULT
from selfrag_jax.answering.records import _doubts
from selfrag_jax.answering.selfrag import SelfRAG
from selfrag_jax.commands.answer import answer_file
from selfrag_jax.engine import engine
from selfrag_jax.errors import UserError
from selfrag_jax.records import Passage, Question, write_jsonl
from selfrag_jax.search import scoring
from selfrag_jax.search.config import ACCUMULATE, SearchConfig
from selfrag_jax.search.paper import PaperSearch
from selfrag_jax.search.released.search import ReleasedSearch
from selfrag_jax.search.tree import Beam, Node, SearchTree
from selfrag_jax.text import prompts, reflection
from selfrag_jax.text.tokenizer import Control, Tokenizer


def test_scores_by_hand():
    # s_rel = .6/.8; s_sup = (.5 + .5*.2)/1; s_use = (-.1 - .05 + 0 + .1 + .5)/1
    isrel, issup = np.array([0.2, 0.6]), np.array([0.5, 0.2, 0.3])
    isuse = np.array([0.1, 0.1, 0.1, 0.2, 0.5])
    assert scoring.s_rel(isrel) == pytest.approx(0.75)
    assert scoring.s_sup(issup) == pytest.approx(0.6)
    assert scoring.s_use(isuse) == pytest.approx(0.45)
    weights = scoring.Weights(w_rel=1.0, w_sup=2.0, w_use=0.5, w_seq=1.0)
    assert scoring.segment_score(0.4, isrel, issup, isuse, 1.0, weights) == pytest.approx(
        0.4 + 0.75 + 1.2 + 0.225
    )
    assert scoring.segment_score(0.4, isrel, issup, isuse, 0.0, weights) == pytest.approx(
        0.4 + 0.225
    )
    p = np.array([0.3, 0.1, 0.6])
    assert scoring.p_retrieve(p, "yes_no") == pytest.approx(0.25)
    assert scoring.p_retrieve(p, "all") == pytest.approx(0.1)
    with pytest.raises(UserError, match="w_sup"):
        scoring.Weights(w_sup=-1)


# Beam width, passages, depth. Few, for each is compiled; everything else is drawn at random.
SHAPES = ((1, 1, 1), (1, 10, 1), (2, 3, 3), (3, 2, 3), (4, 1, 3), (4, 10, 2), (2, 5, 2), (1, 3, 3))


def drawn(seed):
    """A configuration of the search."""
    rng = np.random.default_rng(seed)
    width, ndocs, depth = SHAPES[seed % len(SHAPES)]
    mode = ("always_retrieve", "adaptive_retrieval", "adaptive_retrieval", "no_retrieval")[
        seed // 8 % 4
    ]
    return SearchConfig(
        mode=mode,
        threshold=(None, 0.2, 0.4)[rng.integers(3)] if mode == "adaptive_retrieval" else None,
        normalise=("yes_no", "all")[rng.integers(2)],
        weights=scoring.Weights(*rng.choice([0.0, 0.5, 1.0, 2.0], 4)),
        beam_width=width,
        max_depth=depth,
        ndocs=ndocs,
        accumulate=ACCUMULATE[rng.integers(3)],
        constraints=((), (), (reflection.NO_SUPPORT,), (reflection.IRRELEVANT, "[Utility:1]"))[
            rng.integers(4)
        ],
        keep_passages=bool(rng.integers(3)),
        max_new_tokens=6,
        length_bucket=32,
        scorer="paper",
        temperature=0.0,
        top_p=1.0,
        seed=0,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "seeds", [range(at, 64, 8) for at in range(8)], ids=[str(s) for s in SHAPES]
)
def test_search_equals_the_plain_one(talkative, seeds):
    """320 questions: the same tree, the same tokens in the beams, scores within 1e-5."""
    tokenizer = talkative.tokenizer
    endings = set()
    for seed in seeds:
        config, rng = drawn(seed), np.random.default_rng(1000 + seed)
        words = ["where", "what", "who is Mara", "the ropemaker", "of Quenport"]
        asked = [
            [
                tokenizer.bos_id,
                *tokenizer.encode(prompts.instruction(" ".join(rng.choice(words, 1 + i)))),
            ]
            for i in range(5)
        ]
        passages = [
            make_passages(rng, tokenizer, int(rng.integers(1, config.ndocs + 1))) for _ in asked
        ]
        search = PaperSearch(talkative.model, talkative.params, tokenizer, config, 64)
        outcome = search.run(asked, lambda queries, p=passages: [p[q] for q, _ in queries])
        plain = PlainSearch(talkative, config)
        for ids, found, got in zip(asked, passages, outcome, strict=True):
            expected = plain.run(ids, found)
            assert [(n.parent, n.tokens) for n in got.nodes] == [
                (parent, tokens) for parent, tokens, _ in plain.tree
            ]
            np.testing.assert_allclose(
                [n.score for n in got.nodes], [score for *_, score in plain.tree], atol=1e-5, rtol=0
            )
            assert [tuple(n.tokens for n in got.path(b)) for b in got.beams] == [
                b["path"] for b in expected
            ]
            np.testing.assert_allclose(
                [b.node.total for b in got.beams], [b["total"] for b in expected], atol=1e-5
            )
            endings |= {(n.finished, n.complete) for n in got.nodes}
    assert endings == {
        (True, True),
        (False, True),
        (False, False),
    }  # answers end, segments end, or are cut


@pytest.mark.slow
@pytest.mark.parametrize("where", ("cpu", "tpu"))  # layers one by one, and stacked
def test_a_sliding_window_and_room_that_grows(talkative, monkeypatch, where):
    """Tokens of a branch lie in a ring that is smaller than its segments at first; the window goes by positions all the same."""
    monkeypatch.setattr(engine, "platform", lambda: where)
    monkeypatch.setattr(engine, "FIRST_RING", 2)
    grown, resize = [], engine.Engine._resize
    monkeypatch.setattr(
        engine.Engine, "_resize", lambda self, *size: resize(self, *size) or grown.append(size)
    )
    model = replace(talkative.model, config=replace(talkative.model.config, sliding_window=9))
    loaded, rng = replace(talkative, model=model), np.random.default_rng(5)
    config = replace(
        drawn(0),
        mode="always_retrieve",
        threshold=None,
        beam_width=2,
        max_depth=3,
        ndocs=3,
        max_new_tokens=12,
    )
    ids = [
        loaded.tokenizer.bos_id,
        *loaded.tokenizer.encode(prompts.instruction("where is the ropemaker")),
    ]
    passages = make_passages(rng, loaded.tokenizer, 3)
    [got] = PaperSearch(model, loaded.params, loaded.tokenizer, config, 64).run(
        [ids], lambda queries: [passages for _ in queries]
    )
    plain = PlainSearch(loaded, config)
    plain.run(ids, passages)
    assert [(n.parent, n.tokens) for n in got.nodes] == [
        (parent, tokens) for parent, tokens, _ in plain.tree
    ]
    np.testing.assert_allclose(
        [n.score for n in got.nodes], [score for *_, score in plain.tree], atol=1e-5, rtol=0
    )
    assert {2, 4, 12} <= {places for _, places in grown}
    wide = PlainSearch(talkative, config)  # the window matters
    wide.run(ids, passages)
    assert [tokens for _, tokens, _ in wide.tree] != [tokens for _, tokens, _ in plain.tree]


def searched(loaded, seed, **changes):
    """(search, prompts, passages) of a random question with four passages."""
    rng = np.random.default_rng(seed)
    config = replace(
        drawn(0),
        **(
            dict(mode="always_retrieve", beam_width=2, max_depth=2, ndocs=4, threshold=None)
            | changes
        ),
    )
    prompt = prompts.instruction(
        " ".join(rng.choice(["where", "what", "who is Mara", "the ropemaker"], rng.integers(1, 4)))
    )
    ids = [loaded.tokenizer.bos_id, *loaded.tokenizer.encode(prompt)]
    kind = ReleasedSearch if config.scorer == "released" else PaperSearch
    return (
        kind(loaded.model, loaded.params, loaded.tokenizer, config, 64),
        ids,
        make_passages(rng, loaded.tokenizer, 4),
    )


# Kinds of searches that the properties are of: the paper's, and the released scripts' short and long form.
SEARCHES = st.sampled_from(
    [
        dict(scorer="paper", max_depth=2),
        dict(scorer="paper", max_depth=2, mode="adaptive_retrieval", threshold=0.5),
        dict(scorer="released", accumulate="sum", max_depth=1),
        dict(
            scorer="released",
            accumulate="sum",
            max_depth=1,
            mode="adaptive_retrieval",
            threshold=0.5,
        ),
        dict(scorer="released", accumulate="sum", max_depth=3),
        dict(
            scorer="released",
            accumulate="sum",
            max_depth=3,
            mode="adaptive_retrieval",
            threshold=0.2,
        ),
    ]
)


@pytest.mark.slow
@given(st.integers(0, 2**20), st.permutations(range(4)), SEARCHES)
@settings(max_examples=30, deadline=None)
def test_permuted_passages_have_permuted_scores(talkative, seed, order, kind):
    """Of a first segment: later ones of the released long form have a sibling's text in their history."""
    depth = (
        2 if kind["scorer"] == "released" and kind["max_depth"] > 1 else 1
    )  # there, a segment less than its depth
    search, ids, passages = searched(talkative, seed, **(kind | dict(max_depth=depth)))
    [one] = search.run([ids], lambda _: [passages])
    [other] = search.run([ids], lambda _: [[passages[i] for i in order]])
    if one.nodes[0].action == "no_retrieval":
        order = [0]
    assert [n.tokens for n in other.nodes] == [one.nodes[i].tokens for i in order]
    np.testing.assert_allclose(
        [n.score for n in other.nodes], [one.nodes[i].score for i in order], atol=1e-5
    )


@pytest.mark.slow
@given(st.integers(0, 2**20), st.sampled_from([16, 48, 64]), SEARCHES)
@settings(max_examples=30, deadline=None)
def test_padding_never_changes_a_result(talkative, seed, bucket, kind):
    found = []
    for length in (32, bucket):
        search, ids, passages = searched(talkative, seed, length_bucket=length, **kind)
        [outcome] = search.run([ids], lambda queries, p=passages: [p for _ in queries])
        found.append(outcome)
    assert [(n.parent, n.tokens) for n in found[0].nodes] == [
        (n.parent, n.tokens) for n in found[1].nodes
    ]
    np.testing.assert_allclose(*([n.score for n in f.nodes] for f in found), atol=1e-5)


@pytest.mark.slow
@given(st.integers(0, 2**20))
@settings(max_examples=25, deadline=None)
def test_one_beam_and_one_passage_is_greedy_decoding(talkative, seed):
    """Token by token the most likely one after the prompt and the passage, up to the end of the segment."""
    search, ids, passages = searched(talkative, seed, beam_width=1, ndocs=1, max_depth=1)
    [outcome] = search.run([ids], lambda _: [passages])
    plain, r = PlainSearch(talkative, search.config), talkative.tokenizer.reflection_ids()
    text = ids + talkative.tokenizer.encode(
        [Control(reflection.RETRIEVAL), *prompts.passage(passages[0])]
    )
    greedy = []
    while len(greedy) < search.config.max_new_tokens:
        logits = plain.logits(text + greedy)
        logits[talkative.tokenizer.pad_id] = -np.inf
        if (token := int(logits.argmax())) in r.retrieve:
            break
        greedy.append(token)
        if token in r.isuse or token == talkative.tokenizer.eos_id:
            break
    assert outcome.best().node.tokens == tuple(greedy)


@pytest.mark.slow
def test_layers_one_by_one_and_stacked_are_the_same(talkative, monkeypatch):
    """On a CPU and a GPU a step of decoding takes the layers one by one, on a TPU from their stack."""
    found = []
    for where in ("cpu", "tpu", "gpu"):
        monkeypatch.setattr(engine, "platform", lambda where=where: where)
        for seed in range(3):
            search, ids, passages = searched(talkative, seed)
            [outcome] = search.run([ids], lambda queries, p=passages: [p for _ in queries])
            found.append(outcome)
            assert isinstance(search.params["layers"], tuple) == (where != "tpu")
    for one, other in zip(found[:3] * 2, found[3:], strict=True):
        assert [(n.parent, n.tokens) for n in one.nodes] == [
            (n.parent, n.tokens) for n in other.nodes
        ]
        np.testing.assert_allclose(
            [n.score for n in one.nodes], [n.score for n in other.nodes], atol=1e-5
        )


@pytest.mark.slow
@given(st.integers(0, 2**20), st.integers(1, 3), SEARCHES)
@settings(max_examples=30, deadline=None)
def test_another_question_changes_no_answer(talkative, seed, more, kind):
    """Beside one to three others: the same tree and tokens, and scores but for the rounding of sums in another order."""
    search, ids, passages = searched(talkative, seed, **kind)
    others = [searched(talkative, seed + 1 + i) for i in range(more)]
    [alone] = search.run([ids], lambda queries: [passages for _ in queries], 4)
    found = [passages, *(p for _, _, p in others)]
    beside, *_ = search.run(
        [ids, *(o for _, o, _ in others)], lambda queries: [found[q] for q, _ in queries], 4
    )
    assert [(n.parent, n.tokens) for n in beside.nodes] == [
        (n.parent, n.tokens) for n in alone.nodes
    ]
    np.testing.assert_allclose(
        [n.score for n in beside.nodes], [n.score for n in alone.nodes], atol=1e-5
    )


def test_answers_do_not_depend_on_their_neighbours(talkative):
    rng = np.random.default_rng(5)
    rows = [
        Question(str(i), f"Where is {w}?", ctxs=tuple(make_passages(rng, talkative.tokenizer, 3)))
        for i, w in enumerate(("Mara", "Quenport", "the ropemaker"))
    ]
    rag = make_rag(talkative)
    together = rag.answer(rows, mode="always_retrieve")
    for row, a in zip(rows, together, strict=True):
        [alone] = rag.answer([row], mode="always_retrieve")
        assert alone.answer == a.answer and alone.score == pytest.approx(a.score, abs=1e-4)


def test_only_reflection_distributions_leave_the_device(talkative, monkeypatch):
    """Every array that the search takes to the host, by its shape: nothing is as wide as the vocabulary."""
    taken = []

    def spy(original):
        def take(x, *args, **kwargs):
            taken.extend(leaf.shape for leaf in jax.tree.leaves(x) if isinstance(leaf, jax.Array))
            return original(x, *args, **kwargs)

        return take

    for owner, name in ((np, "asarray"), (np, "array"), (jax, "device_get")):
        monkeypatch.setattr(owner, name, spy(getattr(owner, name)))
    question = Question(
        "0",
        "Where is Mara?",
        ctxs=tuple(make_passages(np.random.default_rng(1), talkative.tokenizer, 3)),
    )
    assert make_rag(talkative).answer([question], mode="always_retrieve")[0].segments
    widths = {shape[-1] for shape in taken if len(shape) > 1}
    assert (1, 3) in taken and {
        2,
        3,
        5,
    } <= widths  # Retrieve of the prompt; IsRel, IsSup, IsUse of the branches
    assert max(widths) == 6  # max_new_tokens
    assert max(np.prod(shape) for shape in taken) < talkative.tokenizer.vocab_size


@pytest.mark.parametrize("scorer", ("paper", pytest.param("released", marks=pytest.mark.slow)))
def test_nothing_stands_beyond_the_models_context(talkative, scorer):
    """Passages are cut to what is left of it, a path ends that has no room for more, each with a notice; a question is cut too."""
    context = 100
    loaded = replace(
        talkative,
        model=replace(talkative.model, config=replace(talkative.model.config, max_length=context)),
    )
    rng = np.random.default_rng(3)
    long = [
        replace(p, text=" ".join([p.text] * 40)) for p in make_passages(rng, loaded.tokenizer, 2)
    ]
    row = Question("0", "Where is Mara Tellock?", ctxs=tuple(long))
    rag = make_rag(loaded, ndocs=2, scorer=scorer)
    rag.config = replace(rag.config, max_length=95)
    [a] = rag.answer([row], mode="always_retrieve", max_depth=4, threshold=0.2)
    assert not a.error and a.segments
    assert any(
        f"tokens: the model's context has {context}" in n and "passage" in n for n in a.notices
    )
    # The scripts keep no passages in the history, so that theirs never fills up here.
    assert any(f"context of {context} tokens is full" in n for n in a.notices) == (
        scorer == "paper"
    )
    search = rag._search(dict(mode="always_retrieve", max_depth=4, threshold=0.2))
    prompt = rag._prompt(row, search.max_prompt, [])
    [outcome] = search.run([prompt], lambda queries: [long for _ in queries])
    for n in outcome.nodes if scorer == "paper" else ():
        fed = (
            search._branch_input(outcome, n.action, n.passage, n.start)
            if n.action == "retrieve"
            else [0]
        )
        assert n.start + len(fed) + len(n.tokens) <= context
    [a] = rag.answer([replace(row, question="where " * 90)], mode="no_retrieval", max_depth=1)
    assert any(
        "the question was cut from" in n and f"the model's context has {context}" in n
        for n in a.notices
    )
    with pytest.raises(
        UserError,
        match="max_new_tokens=50 leaves no room for questions in the model's context of 100 tokens; 36",
    ):
        rag.answer([row], max_new_tokens=50)


def test_a_segment_says_where_in_the_tree_it_stands(talkative):
    rng = np.random.default_rng(6)
    rows = [
        Question(str(i), "Where?", ctxs=tuple(make_passages(rng, talkative.tokenizer, 3)))
        for i in range(3)
    ]
    for a in make_rag(talkative).answer(rows, mode="always_retrieve"):
        places = [s.node for s in a.segments]
        assert [a.tree[n]["text"] for n in places] == [s.text for s in a.segments]
        assert [a.tree[n]["parent"] for n in places] == [-1, *places[:-1]] and all(
            a.tree[n]["chosen"] for n in places
        )


def test_nothing_is_read_twice(talkative, monkeypatch):
    """A prompt once, and of each branch its passage or its control token: what was generated is never fed again."""
    reads, fed = [], []
    read, start = engine.Engine.read, engine.Engine.start
    monkeypatch.setattr(
        engine.Engine, "read", lambda self, jobs: reads.extend(jobs) or read(self, jobs)
    )
    monkeypatch.setattr(
        engine.Engine, "start", lambda self, jobs: fed.extend(jobs) or start(self, jobs)
    )
    rng = np.random.default_rng(6)
    rows = [
        Question(str(i), "Where?", ctxs=tuple(make_passages(rng, talkative.tokenizer, 3)))
        for i in range(3)
    ]
    rag = make_rag(talkative)
    answers = rag.answer(rows, mode="always_retrieve")
    assert len(reads) == len(rows) and any(len(a.segments) > 1 for a in answers)
    t = talkative.tokenizer
    allowed = [
        t.encode([Control(reflection.RETRIEVAL), *prompts.passage(p)]) for q in rows for p in q.ctxs
    ]
    allowed += [[t.id(reflection.CONTINUE)], [t.id(reflection.NO_RETRIEVAL)]]
    assert all([*branch] in allowed for _, job in fed for beam in job.branches for branch in beam)


@pytest.mark.slow
def test_later_queries_hold_the_segment_before(talkative, monkeypatch):
    """The input alone, then the input and the last segment's text (paper, Section 3.3)."""
    asked, rag = [], make_rag(talkative)
    passages = make_passages(np.random.default_rng(2), talkative.tokenizer, 3)

    class Index:
        def passages(self, ctxs, texts, ndocs):
            asked.extend(texts)
            return [passages[:ndocs] for _ in texts]

    rag.retriever, lengths = Index(), set()
    # Earlier passages are dropped, so that no path goes on with the one it has.
    rag.config = replace(rag.config, search=replace(rag.config.search, keep_passages=False))
    for name in ("Mara", "Quenport", "Lisford", "the ropemaker", "starlore"):
        asked.clear()
        [a] = rag.answer([f"Where is {name}?"], mode="always_retrieve", max_depth=3, beam_width=1)
        before = ["", *(f" {s.text}" for s in a.segments[:-1])]
        assert asked == [f"Where is {name}?{text}" for text in before]
        lengths.add(len(asked))
    assert max(lengths) > 1


def test_every_citation_points_into_the_answer(talkative):
    rng = np.random.default_rng(6)
    rows = [
        Question(str(i), "Where?", ctxs=tuple(make_passages(rng, talkative.tokenizer, 4)))
        for i in range(4)
    ]
    for a in make_rag(talkative).answer(rows, mode="always_retrieve", beam_width=3):
        assert a.tree and all(
            c.passage < len(a.passages) and c.segment < len(a.segments) for c in a.citations
        )
        for c in a.citations:
            assert a.segments[c.segment].passage == a.passages[c.passage]


def test_a_segment_without_text_cites_nothing(talkative):
    """Its critique tokens may call the passage what they like."""
    rag, t = make_rag(talkative), talkative.tokenizer
    [passage] = make_passages(np.random.default_rng(6), t, 1)
    judged = dict(
        p_segment=1.0,
        isrel=(0.1, 0.9),
        issup=(0.9, 0.1, 0.0),
        isuse=(0, 0, 0, 0, 1),
        score=1.0,
        total=1.0,
        p_retrieve=1.0,
    )
    node = Node(
        0,
        -1,
        0,
        "retrieve",
        passage=passage,
        tokens=(),
        allowed=True,
        start=5,
        finished=True,
        complete=True,
        **judged,
    )
    cited = []
    for text in ("", "Mara studied."):
        said = replace(
            node,
            tokens=tuple(t.encode([Control("[Relevant]"), text, Control("[Fully supported]")])),
        )
        outcome = SearchTree([Beam(said, np.zeros(3), 9)], [said])
        answer = rag._answer(rag._search({}), outcome, Question("0", "Who?"), [])
        assert answer.segments[0].passage == passage
        cited.append((len(answer.citations), len(answer.passages)))
    assert cited == [(0, 0), (1, 1)]


@pytest.mark.parametrize("accumulate", ACCUMULATE)
def test_the_score_of_an_answer_is_what_paths_were_compared_by(talkative, accumulate):
    rng = np.random.default_rng(6)
    rows = [
        Question(str(i), "Where?", ctxs=tuple(make_passages(rng, talkative.tokenizer, 3)))
        for i in range(3)
    ]
    together = {"sum": np.sum, "mean": np.mean, "product": np.prod}[accumulate]
    answers = make_rag(talkative).answer(rows, mode="always_retrieve", accumulate=accumulate)
    assert any(len(a.segments) > 1 for a in answers)
    for a in answers:
        scores = [a.tree[s.node]["score"] for s in a.segments]
        assert a.score == pytest.approx(
            together(np.maximum(scores, 0) if accumulate == "product" else scores), abs=1e-3
        )


def test_closed_set_voting_by_hand():
    said = [
        ("True.", 0, 0.9),
        ("false", 0, 0.5),
        ("False.", 0, 0.6),
        ("Perhaps.", 0, 3.0),
        ("True.", 1, 3.0),
    ]
    nodes = [
        SimpleNamespace(tokens=t, depth=depth, score=score, action="retrieve", allowed=True)
        for t, depth, score in said
    ]
    paper = SimpleNamespace(text=lambda t: t)
    released = SimpleNamespace(script_text=SimpleNamespace(option=lambda t: t))
    tree = SearchTree([SimpleNamespace(retrieve=None)], nodes)
    q = Question("1", "Is it true?", options=("True.", "False."))
    # 0.5 + 0.6 against 0.9; "Perhaps." is no option, and has no vote.
    assert PaperSearch.elect(paper, tree, q).node is nodes[2]
    nodes[2].allowed = False  # by the constraints
    assert PaperSearch.elect(paper, tree, q).node is nodes[0]
    tree.nodes = nodes[2:3]
    assert PaperSearch.elect(paper, tree, q).node is nodes[2]  # all are refused: then none is
    tree.nodes = nodes[3:4]
    assert PaperSearch.elect(paper, tree, q) is None
    # Each text by itself: Perhaps. 3.0, True. 0.9, False. 0.6, false 0.5.
    tree.nodes = nodes
    assert ReleasedSearch.elect(released, tree, q).node is nodes[3]


def test_an_answer_that_no_passage_supports_says_so():
    node = dict(complete=True, issup=(0.9, 0.1, 0.0))
    found, alone = (
        SimpleNamespace(passage="p", isrel=(0.1, 0.9), **node),
        SimpleNamespace(passage=None, isrel=(0.5, 0.5), **node),
    )
    other = SimpleNamespace(passage="about another name", isrel=(0.8, 0.2), **node)
    assert any(
        "passage that was found supports this answer" in d for d in _doubts([alone, found], [])
    )
    assert any("no passage about this was found" in d for d in _doubts([alone, other], []))
    assert _doubts([found], ["a citation"]) == _doubts([alone], []) == []


def test_what_is_irrelevant_or_unsupported_is_not_cited():
    node = lambda passage, isrel, issup: SimpleNamespace(passage=passage, isrel=isrel, issup=issup)  # noqa: E731
    right, wrong = (0.2, 0.8), (0.6, 0.4)
    full, partly, no = (0.7, 0.2, 0.1), (0.2, 0.5, 0.3), (0.1, 0.3, 0.6)
    a, b, c, d = (Passage(x, "", x, 0.5) for x in "abcd")
    path = [node(a, right, full), node(b, wrong, full), node(c, right, no), node(None, right, full)]
    path += [
        node(d, right, partly),
        node(replace(a, score=0.4), right, full),
    ]  # the same, of another query
    passages, citations = cite(path)
    assert passages == [a, d]
    assert [(c.segment, c.passage, c.support) for c in citations] == [
        (0, 0, "[Fully supported]"), (4, 1, "[Partially supported]"), (5, 0, "[Fully supported]"),
    ]  # fmt: skip


def test_an_interrupted_answer_file_goes_on(talkative, tmp_path):
    questions, out = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    write_jsonl(questions, [{"id": str(i), "question": f"Where is {'x' * i}?"} for i in range(10)])
    changes = {"mode": "no_retrieval"}
    whole = make_rag(talkative)
    assert answer_file(whole, questions, tmp_path / "whole.jsonl", None, dict(changes)) == 10

    rag, told = make_rag(talkative), []
    answer = rag._answer

    def dies_after_the_fifth(search, tree, q, notices):
        if len(told) == 5:
            raise KeyboardInterrupt
        told.append(q.id)
        return answer(search, tree, q, notices)

    rag._answer = dies_after_the_fifth
    with pytest.raises(KeyboardInterrupt):
        answer_file(rag, questions, out, None, dict(changes))
    assert len(set(told)) == 5
    [partial] = tmp_path.glob(".a.jsonl.*.partial")
    with open(partial, "a") as f:
        f.write('{"id": "4", "ans')  # as a kill in the middle of a line leaves it
    assert not out.exists()
    with open(partial, "a") as held:  # as another process that answers the same holds it
        artifacts.lock_file(held, out)
        with pytest.raises(UserError, match=r"a\.jsonl: another process is writing it"):
            answer_file(rag, questions, out, None, dict(changes))
    rag = make_rag(talkative)
    rag.config = replace(rag.config, batch=2)  # as one does where the device was too small
    rag._answer = lambda search, tree, q, *rest: told.append(q.id) or answer(search, tree, q, *rest)
    assert answer_file(rag, questions, out, None, dict(changes)) == 10
    assert sorted(told) == [str(i) for i in range(10)] and not partial.exists()  # none twice
    same_rows(out, tmp_path / "whole.jsonl")


def same_rows(one, other):
    """The same answers; numbers are within the rounding of sums in another order, for other questions stand beside them."""

    def rounded(x):
        if isinstance(x, dict):
            return {k: rounded(v) for k, v in x.items()}
        if isinstance(x, list):
            return [rounded(v) for v in x]
        return (
            pytest.approx(x, abs=2e-4) if isinstance(x, float) else x
        )  # they are written with four digits

    lines, others = (path.read_text().splitlines() for path in (one, other))
    assert [json.loads(line) for line in lines] == [rounded(json.loads(line)) for line in others]


def test_no_passages_found_is_noticed_not_a_crash(talkative):
    [a] = make_rag(talkative).answer(["Where?"], mode="always_retrieve")
    assert any("no passage" in n for n in a.notices) and not a.retrieved


def test_a_long_question_and_a_long_passage_are_cut_with_a_notice(talkative):
    rag = make_rag(talkative)
    seen = []
    prompt = rag._prompt
    rag._prompt = lambda *args: seen.append(prompt(*args)) or seen[-1]
    long = Passage("p7", "Long", " ".join(["word"] * 300))
    [a] = rag.answer([Question("1", "word " * 200, ctxs=(long,))], mode="always_retrieve")
    assert any("question was cut" in n for n in a.notices) and any(
        "passage p7 was cut" in n for n in a.notices
    )
    heading = talkative.tokenizer.id("\n\n### Response:\n")
    assert len(seen[0]) == 64 and seen[0][-1] == heading


def test_a_cut_question_keeps_the_heading_of_a_published_vocabulary():
    """There it is plain text, several tokens long."""
    tokenizer = Tokenizer.load(Path(__file__).parent / "data" / "llama_tokenizer")
    loaded = SimpleNamespace(
        tokenizer=tokenizer, model=SimpleNamespace(config=SimpleNamespace(max_length=4096))
    )
    notices = []
    asked = Question("1", "Which town lies by the river? " * 30)
    tokens = SelfRAG._prompt(
        SimpleNamespace(loaded=loaded, config=SimpleNamespace(max_length=64)), asked, 64, notices
    )
    assert len(tokens) == 64 and "was cut" in notices[0]
    assert tokenizer.decode(tokens).rstrip().endswith(
        "### Response:"
    ) and "Which town" in tokenizer.decode(tokens)


@pytest.mark.slow
def test_text_may_end_where_padding_is_the_end_of_text(talkative):
    """Published tokenizers without a padding token pad with </s>."""
    tokenizer = copy.copy(talkative.tokenizer)
    tokenizer.pad_id = tokenizer.eos_id
    loaded, ended = replace(talkative, tokenizer=tokenizer), 0
    for seed in range(4):
        rng, config = np.random.default_rng(seed), replace(drawn(seed), temperature=0.0, ndocs=4)
        passages = make_passages(rng, tokenizer, 4)
        ids = [
            tokenizer.bos_id,
            *tokenizer.encode(prompts.instruction(f"where is the ropemaker {seed}")),
        ]
        [got] = PaperSearch(loaded.model, loaded.params, tokenizer, config, 64).run(
            [ids], lambda qs, p=passages: [p for _ in qs]
        )
        plain = PlainSearch(loaded, config)
        plain.run(ids, passages)
        assert [(n.parent, n.tokens) for n in got.nodes] == [
            (parent, tokens) for parent, tokens, _ in plain.tree
        ]
        ended += sum(n.tokens[-1:] == (tokenizer.eos_id,) for n in got.nodes)
    assert ended


def test_a_product_of_bad_segments_is_not_good():
    total = PaperSearch._total

    def search(accumulate):
        return SimpleNamespace(config=SimpleNamespace(accumulate=accumulate))

    root, bad, good = None, SimpleNamespace(total=0.0), SimpleNamespace(total=2.0)
    assert total(search("product"), root, -0.3) == total(search("product"), bad, -0.3) == 0
    assert total(search("product"), root, 2.0) == 2.0 and total(search("product"), good, 1.5) == 3.0
    assert total(search("sum"), good, -0.5) == total(search("mean"), good, -0.5) == 1.5


def test_what_is_not_finite_is_an_error_of_its_question(talkative):
    params = jax.tree.map(lambda x: x, jax.device_get(talkative.params))
    params["norm"]["scale"] = params["norm"]["scale"] * np.nan
    [a] = make_rag(replace(talkative, params=params)).answer(
        ["Where?"], mode="no_retrieval", max_depth=1
    )
    assert "not finite" in a.error and not a.answer


def test_a_passage_that_is_dropped_takes_no_room(talkative):
    """The model's context would be full if the passage of the first segment stayed."""
    model = replace(talkative.model, config=replace(talkative.model.config, max_length=80))
    rag = make_rag(replace(talkative, model=model))
    words = ("word", "Quenport", "Mara", "ropemaker", "studied", "starlore", "lives", "the")
    rows = [Question(w, "Where?", ctxs=(Passage("p", "Long", " ".join([w] * 40)),)) for w in words]
    asked = dict(mode="always_retrieve", beam_width=1)
    kept, dropped = (rag.answer(rows, **asked, keep_passages=keep) for keep in (True, False))
    goes_on = [len(a.tree) == 2 for a in dropped]  # the others end with their first segment
    assert any(goes_on) and not any("is full" in n for a in dropped for n in a.notices)
    assert [any("is full" in n for n in a.notices) for a in kept] == goes_on and all(
        len(a.tree) == 1 for a in kept
    )


def test_unknown_fields_and_modes_are_refused(talkative):
    rag = make_rag(talkative)
    with pytest.raises(UserError, match="tresh"):
        rag.answer(["q"], treshold=0.5)
    with pytest.raises(UserError, match="mode"):
        rag.answer(["q"], mode="sometimes")
    for weight in (-1.0, 2e6, float("inf"), float("nan")):
        with pytest.raises(UserError, match=r"--w_rel=.*a number from 0 to 1,000,000"):
            rag.answer(["q"], w_rel=weight)
    with pytest.raises(UserError, match="--ndocs=100000: at most 100"):
        rag.answer(["q"], ndocs=100_000)
    with pytest.raises(UserError, match="batch=0"):
        replace(DEFAULT, batch=0)
    with pytest.raises(UserError, match="max_length=0"):
        replace(DEFAULT, max_length=0)
    for wrong in (None, 5, [None], ["q", 5], [["q"]]):
        with pytest.raises(UserError, match="expected text or a Question|expected questions"):
            rag.answer(wrong)


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        (dict(threshold="0.5"), "threshold='0.5' must be a number"),
        (dict(ndocs="5"), "ndocs='5' must be a whole number"),
        (dict(ndocs=2.5), "ndocs=2.5 must be a whole number"),
        (dict(ndocs=None), "ndocs must not be none"),
        (dict(keep_passages="false"), "keep_passages='false' must be true or false"),
        (dict(w_rel="1"), "w_rel='1' must be a number"),
        (dict(mode=1), "mode=1 must be text"),
        (dict(constraints="[Irrelevant]"), "expected several tokens"),
    ),
)
def test_changes_of_the_wrong_type_are_refused(talkative, changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        make_rag(talkative).check(changes)


def test_numbers_of_numpy_are_numbers(talkative):
    rag = make_rag(talkative)
    rag.check(dict(ndocs=np.int64(3), threshold=np.float32(0.5), keep_passages=np.bool_(True)))


def test_what_is_left_of_a_file_is_computed_in_as_many_slots(talkative, monkeypatch):
    """Which is most of what makes floating point round as it did before."""
    rag, sizes = make_rag(talkative, ndocs=2), []

    class Enough(Exception):
        pass

    def stream(search, ids, find_passages, slots, **rest):
        sizes.append(slots)
        raise Enough

    monkeypatch.setattr(PaperSearch, "stream", stream)
    for asked, of in ((1, None), (2, None), (3, None), (9, None), (1, 9), (2, 9), (3, 3)):
        with pytest.raises(Enough):
            rag.answer(["a"] * asked, total=of)
    assert sizes == [1, 2, 4, 4, 4, 4, 4]


def test_more_passages_for_each_question_mean_fewer_questions_at_once(talkative, monkeypatch):
    rag, sizes = make_rag(talkative, ndocs=2), []
    monkeypatch.setattr(
        PaperSearch,
        "stream",
        lambda self, ids, find_passages, slots, **rest: iter(sizes.append(slots) or ()),
    )
    for asked, ndocs in ((3, 2), (3, 4), (2, 50), (1, 2), (9, 2)):
        list(rag.stream(["a"] * asked, ndocs=ndocs))
    assert sizes == [4, 2, 1, 1, 4]  # of 4 questions with 2 passages each
    list(rag.stream(["a"] * 3, beam_width=2 * rag.config.search.beam_width))
    assert sizes[-1] == 2
    with pytest.raises(UserError, match="--beam_width=101: at most 100"):
        rag.check({"beam_width": 101})


def test_a_model_without_reflection_tokens_is_refused(tiny_model, tmp_path):
    from selfrag_jax.base_model.source import make_tokenizer
    from selfrag_jax.huggingface import weights

    weights.save_folder(tmp_path, tiny_model.model.config, tiny_model.params, make_tokenizer(4000))
    with pytest.raises(UserError, match=r"\[Retrieval\]"):
        SelfRAG.load(tmp_path)


def test_a_question_that_fails_leaves_the_others_alone(talkative, tmp_path, capsys):
    class Broken:
        def passages(self, static, queries, k):
            if any("Mara" in q for q in queries):
                raise RuntimeError("the index is gone")
            return [
                make_passages(np.random.default_rng(0), talkative.tokenizer, 2) for _ in queries
            ]

    rag = make_rag(talkative)
    [whole] = rag.answer(["Where is it?"], mode="no_retrieval")
    assert not whole.error
    rag.retriever = Broken()
    good, mara, half, last = rag.answer(
        ["Who?", "Where is Mara?", "a \ud83d", "What?"], mode="always_retrieve"
    )
    assert mara.error == "RuntimeError: the index is gone" and not mara.answer and half.error
    for q, a in (("Who?", good), ("What?", last)):
        [alone] = rag.answer([q], mode="always_retrieve")
        assert not a.error and a.answer == alone.answer and a.segments
    with pytest.raises(UserError, match="question '1' is empty"):
        rag.answer(["Who?", "  "])
    write_jsonl(
        tmp_path / "q.jsonl",
        [{"id": i, "question": q} for i, q in enumerate(("Who?", "Where is Mara?"))],
    )
    answer_file(rag, tmp_path / "q.jsonl", tmp_path / "a.jsonl", None, {"mode": "always_retrieve"})
    said = capsys.readouterr().err
    assert (
        "1 of 2 questions failed, '1' first" in said
        and "retrieved for 1 of 1 questions (100.0%)" in said
    )
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [bool(r["error"]) for r in rows] == [False, True]
    rag.retriever = SimpleNamespace(passages=lambda static, queries, k: [rows_of for _ in queries])
    rows_of = make_passages(np.random.default_rng(0), talkative.tokenizer, 2)
    answer_file(
        rag, tmp_path / "q.jsonl", tmp_path / "a.jsonl", None, {"mode": "always_retrieve"}
    )  # only what failed
    again = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert again[0] == rows[0] and again[1]["segments"] and not again[1]["error"]
    with pytest.raises(
        UserError, match="--mode='sometimes'"
    ):  # before the file of the user is touched
        answer_file(rag, tmp_path / "q.jsonl", tmp_path / "q.jsonl", None, {"mode": "sometimes"})


@pytest.mark.slow
def test_constraints_drop_segments_but_never_all(talkative):
    rng, rag = np.random.default_rng(3), make_rag(talkative, ndocs=4)
    rows = [
        Question(str(i), f"Where {i}?", ctxs=tuple(make_passages(rng, talkative.tokenizer, 4)))
        for i in range(12)
    ]
    critiques = (*reflection.ISREL, *reflection.ISSUP, *reflection.ISUSE)
    asked = dict(mode="always_retrieve", max_depth=1)
    free = rag.answer(rows, **asked)
    assert not any(n["said"] and not n["allowed"] for a in free for n in a.tree)
    some, all_refused = 0, 0
    for constraints, ndocs in (*(((token,), 4) for token in critiques), (critiques, 1)):
        for a in rag.answer(rows, **asked, constraints=constraints, ndocs=ndocs):
            says = [bool({*constraints} & {*n["said"]}) for n in a.tree]
            [chosen] = [n for n in a.tree if n["chosen"]]
            assert [not n["allowed"] for n in a.tree] == says
            assert bool({*constraints} & {*chosen["said"]}) == all(says)
            assert any("refused by the constraints" in n for n in a.notices) == all(says)
            some, all_refused = some + (any(says) and not all(says)), all_refused + all(says)
    assert some and all_refused
    with pytest.raises(UserError, match="'Relevant' is no critique token"):
        rag.answer(["q"], constraints=("Relevant",))
    with pytest.raises(UserError, match="--accumulate='max': must be one of sum, mean, product"):
        rag.answer(["q"], accumulate="max")


def test_one_question_needs_no_list(talkative):
    rag = make_rag(talkative)
    [one], [other] = (
        rag.answer("Who?", mode="no_retrieval"),
        rag.answer(["Who?"], mode="no_retrieval"),
    )
    assert one == other and one.question == "Who?"
