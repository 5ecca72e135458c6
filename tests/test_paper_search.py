"""The paper's search against a plain one over full forward passes; and what every search keeps."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_search import (
    PlainSearch,
    make_passages,
    make_questions,
    make_rag,
    make_search,
    own_passages,
    prompt_ids,
    same_passages,
    scores_of,
    structure,
)
from repetitions import some

from selfrag_jax.engine import engine, shapes
from selfrag_jax.errors import UserError
from selfrag_jax.records import Passage, Question
from selfrag_jax.search import scoring
from selfrag_jax.search.config import ACCUMULATE, SearchConfig
from selfrag_jax.search.paper import PaperSearch
from selfrag_jax.search.released.search import ReleasedSearch
from selfrag_jax.search.tree import SearchTree
from selfrag_jax.text import prompts, reflection
from selfrag_jax.text.tokenizer import Control

# Beam width, passages, depth. There are few, because each is compiled; all else is random.
SHAPES = ((1, 1, 1), (1, 10, 1), (2, 3, 3), (3, 2, 3), (4, 1, 3), (4, 10, 2), (2, 5, 2), (1, 3, 3))
MODES = ("always_retrieve", "adaptive_retrieval", "adaptive_retrieval", "no_retrieval")
CONSTRAINTS = ((), (), (reflection.NO_SUPPORT,), (reflection.IRRELEVANT, "[Utility:1]"))


def random_config(seed):
    """Settings of a paper search: the shape and the mode go round with the seed."""
    rng = np.random.default_rng(seed)
    width, ndocs, depth = SHAPES[seed % len(SHAPES)]
    mode = MODES[seed // 8 % 4]
    return SearchConfig(
        mode=mode,
        threshold=(None, 0.2, 0.4)[rng.integers(3)] if mode == "adaptive_retrieval" else None,
        normalise=("yes_no", "all")[rng.integers(2)],
        weights=scoring.Weights(*rng.choice([0.0, 0.5, 1.0, 2.0], 4)),
        beam_width=width,
        max_depth=depth,
        ndocs=ndocs,
        accumulate=ACCUMULATE[rng.integers(3)],
        constraints=CONSTRAINTS[rng.integers(4)],
        keep_passages=bool(rng.integers(3)),
        max_new_tokens=6,
        length_bucket=32,
        scorer="paper",
        temperature=0.0,
        top_p=1.0,
        seed=0,
    )


def random_search(loaded, seed, **changes):
    """(search, prompt, passages) of a random question with four passages."""
    rng = np.random.default_rng(seed)
    fields = dict(mode="always_retrieve", beam_width=2, max_depth=2, ndocs=4, threshold=None)
    config = replace(random_config(0), **(fields | changes))
    words = ["where", "what", "who is Mara", "the ropemaker"]
    prompt = prompt_ids(loaded.tokenizer, " ".join(rng.choice(words, rng.integers(1, 4))))
    return make_search(loaded, config), prompt, make_passages(rng, loaded.tokenizer, 4)


def assert_same_trees(tree, other):
    """The same segments in the same places, with scores within rounding."""
    assert structure(tree) == structure(other)
    np.testing.assert_allclose(scores_of(tree), scores_of(other), atol=1e-5)


# ---- against the plain search --------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(
    "seeds", [range(at, some(32, 64), 8) for at in range(8)], ids=[str(s) for s in SHAPES]
)
def test_the_search_equals_the_plain_one(talkative, seeds):
    """For 160 questions (--full: 320): the same tree and tokens, scores within 1e-5."""
    tokenizer = talkative.tokenizer
    words = ["where", "what", "who is Mara", "the ropemaker", "of Quenport"]
    endings = set()
    for seed in seeds:
        config, rng = random_config(seed), np.random.default_rng(1000 + seed)
        questions = [" ".join(rng.choice(words, 1 + i)) for i in range(5)]
        all_prompts = [prompt_ids(tokenizer, q) for q in questions]
        passages = [
            make_passages(rng, tokenizer, int(rng.integers(1, config.ndocs + 1))) for _ in questions
        ]
        trees = make_search(talkative, config).run(all_prompts, own_passages(passages))
        plain = PlainSearch(talkative, config)
        for prompt, found, tree in zip(all_prompts, passages, trees, strict=True):
            expected = plain.search(prompt, found)
            assert structure(tree) == structure(expected)
            np.testing.assert_allclose(scores_of(tree), scores_of(expected), atol=1e-5, rtol=0)
            assert tree.num_tokens == sum(len(n.tokens) for n in expected.nodes)
            paths = [tuple(n.tokens for n in tree.path(b)) for b in tree.beams]
            assert paths == [b.path for b in expected.beams]
            np.testing.assert_allclose(
                [b.node.total for b in tree.beams], [b.total for b in expected.beams], atol=1e-5
            )
            endings |= {(n.finished, n.complete) for n in tree.nodes}
    # Answers ended, segments ended, and segments were cut.
    assert endings == {(True, True), (False, True), (False, False)}


@pytest.mark.slow
@pytest.mark.parametrize("where", ("cpu", "tpu"))  # unstacked layers, and stacked ones
def test_a_sliding_window_holds_while_buffers_grow(talkative, monkeypatch, where):
    """The window goes by positions, though a branch's buffer wraps round and is resized."""
    monkeypatch.setattr(engine, "platform", lambda: where)
    monkeypatch.setattr(shapes, "FIRST_GENERATED_CAPACITY", 2)
    resizes, resize = [], engine.Engine._resize

    def recording_resize(self, fed, generated):
        resize(self, fed, generated)
        resizes.append((fed, generated))

    monkeypatch.setattr(engine.Engine, "_resize", recording_resize)
    model = replace(talkative.model, config=replace(talkative.model.config, sliding_window=9))
    loaded, rng = replace(talkative, model=model), np.random.default_rng(5)
    config = replace(
        random_config(0), mode="always_retrieve", threshold=None, beam_width=2, max_depth=3,
        ndocs=3, max_new_tokens=12,
    )  # fmt: skip
    prompt = prompt_ids(loaded.tokenizer, "where is the ropemaker")
    passages = make_passages(rng, loaded.tokenizer, 3)

    [tree] = make_search(loaded, config).run([prompt], same_passages(passages))
    expected = PlainSearch(loaded, config).search(prompt, passages)
    assert structure(tree) == structure(expected)
    np.testing.assert_allclose(scores_of(tree), scores_of(expected), atol=1e-5, rtol=0)
    assert {2, 4, 12} <= {generated for _, generated in resizes}
    without_window = PlainSearch(talkative, config).search(prompt, passages)
    # Otherwise the test would show nothing.
    assert [n.tokens for n in without_window.nodes] != [n.tokens for n in expected.nodes]


@pytest.mark.slow
def test_text_ends_where_the_padding_token_is_the_end_of_text(talkative):
    """Published tokenizers without a padding token pad with </s>."""
    tokenizer = copy.copy(talkative.tokenizer)
    tokenizer.pad_id = tokenizer.eos_id
    loaded, num_ended = replace(talkative, tokenizer=tokenizer), 0
    for seed in range(4):
        rng = np.random.default_rng(seed)
        config = replace(random_config(seed), temperature=0.0, ndocs=4)
        passages = make_passages(rng, tokenizer, 4)
        prompt = prompt_ids(tokenizer, f"where is the ropemaker {seed}")
        [tree] = make_search(loaded, config).run([prompt], same_passages(passages))
        assert structure(tree) == structure(PlainSearch(loaded, config).search(prompt, passages))
        num_ended += sum(n.tokens[-1:] == (tokenizer.eos_id,) for n in tree.nodes)
    assert num_ended


@pytest.mark.slow
@given(st.integers(0, 2**20))
@settings(max_examples=some(8, 25), deadline=None)
def test_one_beam_and_one_passage_is_greedy_decoding(talkative, seed):
    """Each token is the most likely one after prompt and passage, up to the segment's end."""
    search, prompt, passages = random_search(talkative, seed, beam_width=1, ndocs=1, max_depth=1)
    [tree] = search.run([prompt], same_passages(passages))
    t, r = talkative.tokenizer, talkative.tokenizer.reflection_ids()
    plain = PlainSearch(talkative, search.config)
    history = prompt + t.encode([Control(reflection.RETRIEVAL), *prompts.passage(passages[0])])
    greedy = []
    while len(greedy) < search.config.max_new_tokens:
        logits = plain.logits(history + greedy)
        logits[t.pad_id] = -np.inf
        token = int(logits.argmax())
        if token in r.retrieve:
            break
        greedy.append(token)
        if token in r.isuse or token == t.eos_id:
            break
    assert tree.best().node.tokens == tuple(greedy)


@pytest.mark.slow
def test_stacked_and_unstacked_layers_give_the_same_trees(talkative, monkeypatch):
    """Decoding reads the layers one by one on a CPU and a GPU, from their stack on a TPU."""
    trees = []
    for where in ("cpu", "tpu", "gpu"):
        monkeypatch.setattr(engine, "platform", lambda where=where: where)
        for seed in range(3):
            search, prompt, passages = random_search(talkative, seed)
            [tree] = search.run([prompt], same_passages(passages))
            trees.append(tree)
            assert isinstance(search.params["layers"], tuple) == (where != "tpu")
    for tree, other in zip(trees[:3] * 2, trees[3:], strict=True):
        assert_same_trees(tree, other)


# ---- what holds of every search ------------------------------------------------------------------
ADAPTIVE = dict(mode="adaptive_retrieval", threshold=0.5)
RELEASED = dict(scorer="released", accumulate="sum")
# The paper's search, and the short and the long form of the released scripts.
SEARCHES = st.sampled_from(
    [
        dict(scorer="paper", max_depth=2),
        dict(scorer="paper", max_depth=2, **ADAPTIVE),
        dict(RELEASED, max_depth=1),
        dict(RELEASED, max_depth=1, **ADAPTIVE),
        dict(RELEASED, max_depth=3),
        dict(RELEASED, max_depth=3, mode="adaptive_retrieval", threshold=0.2),
    ]
)


@pytest.mark.slow
@given(st.integers(0, 2**20), st.permutations(range(4)), SEARCHES)
@settings(max_examples=some(8, 30), deadline=None)
def test_permuted_passages_have_permuted_scores(talkative, seed, order, changes):
    """Of first segments: later ones of the released long form see the text of a sibling."""
    is_long_form = changes["scorer"] == "released" and changes["max_depth"] > 1
    depth = 2 if is_long_form else 1  # the long form has a segment less than its depth
    search, prompt, passages = random_search(talkative, seed, **(changes | dict(max_depth=depth)))
    [tree] = search.run([prompt], same_passages(passages))
    [permuted] = search.run([prompt], same_passages([passages[i] for i in order]))
    if tree.nodes[0].action == "no_retrieval":
        order = [0]
    assert [n.tokens for n in permuted.nodes] == [tree.nodes[i].tokens for i in order]
    np.testing.assert_allclose(scores_of(permuted), [tree.nodes[i].score for i in order], atol=1e-5)


@pytest.mark.slow
@given(st.integers(0, 2**20), st.sampled_from([16, 48, 64]), SEARCHES)
@settings(max_examples=some(8, 30), deadline=None)
def test_padding_never_changes_a_result(talkative, seed, bucket, changes):
    trees = []
    for length in (32, bucket):
        search, prompt, passages = random_search(talkative, seed, length_bucket=length, **changes)
        trees += search.run([prompt], same_passages(passages))
    assert_same_trees(*trees)


@pytest.mark.slow
@given(st.integers(0, 2**20), st.integers(1, 3), SEARCHES)
@settings(max_examples=some(8, 30), deadline=None)
def test_another_question_changes_no_tree(talkative, seed, num_others, changes):
    """The same tree beside one to three others; sums in another order round differently."""
    search, prompt, passages = random_search(talkative, seed, **changes)
    others = [random_search(talkative, seed + 1 + i) for i in range(num_others)]
    [alone] = search.run([prompt], same_passages(passages), 4)
    all_prompts = [prompt, *(other for _, other, _ in others)]
    all_passages = [passages, *(found for _, _, found in others)]
    beside, *_ = search.run(all_prompts, own_passages(all_passages), 4)
    assert_same_trees(beside, alone)


@pytest.mark.parametrize("scorer", ("paper", pytest.param("released", marks=pytest.mark.slow)))
def test_nothing_goes_beyond_the_models_context(talkative, scorer):
    """Questions and passages are cut, and a path without room ends, each with a notice."""
    context = 100
    model = replace(talkative.model, config=replace(talkative.model.config, max_length=context))
    loaded = replace(talkative, model=model)
    short = make_passages(np.random.default_rng(3), loaded.tokenizer, 2)
    passages = [replace(p, text=" ".join([p.text] * 40)) for p in short]
    question = Question("0", "Where is Mara Tellock?", ctxs=tuple(passages))
    rag = make_rag(loaded, ndocs=2, scorer=scorer)
    rag.config = replace(rag.config, max_length=95)
    changes = dict(mode="always_retrieve", max_depth=4, threshold=0.2)
    [answer] = rag.answer([question], **changes)
    assert not answer.error and answer.segments
    cut = f"tokens: the model's context has {context}"
    assert any(cut in n and "passage" in n for n in answer.notices)
    # The released scripts keep no passage in the history, so theirs never fills up here.
    is_full = any(f"context of {context} tokens is full" in n for n in answer.notices)
    assert is_full == (scorer == "paper")

    search = rag._search(changes)
    prompt = rag._prompt(question, search.max_prompt, [])
    [tree] = search.run([prompt], same_passages(passages))
    for n in tree.nodes if scorer == "paper" else ():
        fed = [0]
        if n.action == "retrieve":
            fed = search.passage_input(tree, None, n.passage, n.fed_position)
        assert n.fed_position + len(fed) + len(n.tokens) <= context

    long_question = replace(question, question="where " * 90)
    [answer] = rag.answer([long_question], mode="no_retrieval", max_depth=1)
    limit = f"the model's context has {context}"
    assert any("the question was cut from" in n and limit in n for n in answer.notices)
    with pytest.raises(
        UserError,
        match="max_new_tokens=50 leaves no room for questions in the model's context of 100 "
        "tokens; at most 36 fits",
    ):
        rag.answer([question], max_new_tokens=50)


# ---- 1. retrieve, continue or neither ------------------------------------------------------------
@pytest.mark.slow
def test_a_later_query_adds_the_previous_segment(talkative):
    """The first query is the input, a later one the input and the last segment's text.

    See Section 3.3 of the paper.
    """
    queries, num_queries, rag = [], set(), make_rag(talkative)
    passages = make_passages(np.random.default_rng(2), talkative.tokenizer, 3)

    class Index:
        def search(self, texts, k):
            queries.extend(texts)
            return [passages[:k] for _ in texts]

    rag.retriever = Index()
    # Earlier passages are dropped, so no path continues with the one it has.
    rag.config = replace(rag.config, search=replace(rag.config.search, keep_passages=False))
    for name in ("Mara", "Quenport", "Lisford", "the ropemaker", "starlore"):
        queries.clear()
        question = f"Where is {name}?"
        [answer] = rag.answer([question], mode="always_retrieve", max_depth=3, beam_width=1)
        previous = ["", *(f" {s.text}" for s in answer.segments[:-1])]
        assert queries == [question + text for text in previous]
        num_queries.add(len(queries))
    assert max(num_queries) > 1


# ---- 2. generate and score -----------------------------------------------------------------------
def test_no_token_is_read_twice(talkative, monkeypatch):
    """A prompt is read once, and a branch is fed its passage or its Retrieve token alone."""
    reads, starts = [], []
    read, start = engine.Engine.read, engine.Engine.start

    def recording_read(self, jobs):
        reads.extend(jobs)
        return read(self, jobs)

    def recording_start(self, jobs):
        starts.extend(jobs)
        return start(self, jobs)

    monkeypatch.setattr(engine.Engine, "read", recording_read)
    monkeypatch.setattr(engine.Engine, "start", recording_start)
    t = talkative.tokenizer
    questions = make_questions(t, 6, ["Where?"] * 3)
    answers = make_rag(talkative).answer(questions, mode="always_retrieve")
    assert len(reads) == len(questions) and any(len(a.segments) > 1 for a in answers)
    allowed = [
        t.encode([Control(reflection.RETRIEVAL), *prompts.passage(p)])
        for q in questions
        for p in q.ctxs
    ]
    allowed += [[t.id(reflection.CONTINUE)], [t.id(reflection.NO_RETRIEVAL)]]
    assert all([*b] in allowed for _, job in starts for beam in job.branches for b in beam)


def test_only_reflection_distributions_leave_the_device(talkative, monkeypatch):
    """No array that the search takes to the host is as wide as the vocabulary."""
    taken = []  # shapes

    def recording(original):
        def take(x, *args, **kwargs):
            taken.extend(leaf.shape for leaf in jax.tree.leaves(x) if isinstance(leaf, jax.Array))
            return original(x, *args, **kwargs)

        return take

    for owner, name in ((np, "asarray"), (np, "array"), (jax, "device_get")):
        monkeypatch.setattr(owner, name, recording(getattr(owner, name)))
    questions = make_questions(talkative.tokenizer, 1, ["Where is Mara?"])
    [answer] = make_rag(talkative).answer(questions, mode="always_retrieve")
    assert answer.segments
    widths = {shape[-1] for shape in taken if len(shape) > 1}
    # Retrieve after the prompt; IsRel, IsSup and IsUse of the branches.
    assert (1, 3) in taken and {2, 3, 5} <= widths
    assert max(widths) == 6  # max_new_tokens
    assert max(np.prod(shape) for shape in taken) < talkative.tokenizer.vocab_size


def test_a_product_of_bad_segments_is_not_good():
    def total(accumulate, parent, score):
        search = SimpleNamespace(config=SimpleNamespace(accumulate=accumulate))
        return PaperSearch._total(search, parent, score)

    root, bad, good = None, SimpleNamespace(total=0.0), SimpleNamespace(total=2.0)
    assert total("product", root, -0.3) == total("product", bad, -0.3) == 0
    assert total("product", root, 2.0) == 2.0 and total("product", good, 1.5) == 3.0
    assert total("sum", good, -0.5) == total("mean", good, -0.5) == 1.5


# ---- 3. keep the best ----------------------------------------------------------------------------
@pytest.mark.slow
def test_constraints_drop_segments_but_never_all(talkative):
    rag = make_rag(talkative, ndocs=4)
    questions = make_questions(talkative.tokenizer, 3, [f"Where {i}?" for i in range(12)], 4)
    critiques = (*reflection.ISREL, *reflection.ISSUP, *reflection.ISUSE)
    changes = dict(mode="always_retrieve", max_depth=1)
    unconstrained = rag.answer(questions, **changes)
    assert not any(n["said"] and not n["allowed"] for a in unconstrained for n in a.tree)
    some_refused = all_refused = 0
    for constraints, ndocs in (*(((token,), 4) for token in critiques), (critiques, 1)):
        for a in rag.answer(questions, **changes, constraints=constraints, ndocs=ndocs):
            refused = [bool({*constraints} & {*n["said"]}) for n in a.tree]
            [chosen] = [n for n in a.tree if n["chosen"]]
            assert [not n["allowed"] for n in a.tree] == refused
            assert bool({*constraints} & {*chosen["said"]}) == all(refused)
            has_notice = any("refused by the constraints" in n for n in a.notices)
            assert has_notice == all(refused)
            some_refused += any(refused) and not all(refused)
            all_refused += all(refused)
    assert some_refused and all_refused
    with pytest.raises(UserError, match="'Relevant' is no critique token"):
        rag.answer(["q"], constraints=("Relevant",))
    with pytest.raises(UserError, match="--accumulate='max': must be one of sum, mean, product"):
        rag.answer(["q"], accumulate="max")


def test_a_dropped_passage_takes_no_room_in_the_context(talkative):
    """The model's context would be full if the first segment's passage stayed."""
    model = replace(talkative.model, config=replace(talkative.model.config, max_length=80))
    rag = make_rag(replace(talkative, model=model))
    words = ("word", "Quenport", "Mara", "ropemaker", "studied", "starlore", "lives", "the")
    questions = [
        Question(w, "Where?", ctxs=(Passage("p", "Long", " ".join([w] * 40)),)) for w in words
    ]
    changes = dict(mode="always_retrieve", beam_width=1)
    kept = rag.answer(questions, **changes, keep_passages=True)
    dropped = rag.answer(questions, **changes, keep_passages=False)

    def is_full(answer):
        return any("is full" in n for n in answer.notices)

    has_second_segment = [len(a.tree) == 2 for a in dropped]  # the others end with their first
    assert any(has_second_segment) and not any(map(is_full, dropped))
    assert [*map(is_full, kept)] == has_second_segment and all(len(a.tree) == 1 for a in kept)


# ---- the answer ----------------------------------------------------------------------------------
def test_closed_set_voting_by_hand():
    segments = [
        ("True.", 0, 0.9), ("false", 0, 0.5), ("False.", 0, 0.6), ("Perhaps.", 0, 3.0),
        ("True.", 1, 3.0),
    ]  # fmt: skip
    nodes = [
        SimpleNamespace(tokens=text, depth=depth, score=score, action="retrieve", allowed=True)
        for text, depth, score in segments
    ]
    paper = SimpleNamespace(text=lambda tokens: tokens)
    released = SimpleNamespace(script_text=SimpleNamespace(option=lambda tokens: tokens))
    tree = SearchTree([SimpleNamespace(retrieve=None)], nodes)
    question = Question("1", "Is it true?", options=("True.", "False."))
    # 0.5 + 0.6 against 0.9. "Perhaps." is no option, and has no vote.
    assert PaperSearch.elect(paper, tree, question).node is nodes[2]
    nodes[2].allowed = False  # by the constraints
    assert PaperSearch.elect(paper, tree, question).node is nodes[0]
    tree.nodes = nodes[2:3]  # where all are refused, all count
    assert PaperSearch.elect(paper, tree, question).node is nodes[2]
    tree.nodes = nodes[3:4]
    assert PaperSearch.elect(paper, tree, question) is None
    # Each text is an option of its own: Perhaps. 3.0, True. 0.9, False. 0.6, false 0.5.
    tree.nodes = nodes
    assert ReleasedSearch.elect(released, tree, question).node is nodes[3]
