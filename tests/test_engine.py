"""The engine: sampling, slots, streaming, and how few programs it compiles."""

import itertools
from collections import Counter
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_search import make_passages, make_questions, make_rag

from selfrag_jax.answering.records import Answer, SegmentDone
from selfrag_jax.engine import engine, programs, segments, shapes
from selfrag_jax.engine.shapes import bucket
from selfrag_jax.errors import UserError
from selfrag_jax.models.llama import Cache
from selfrag_jax.records import Question
from selfrag_jax.search.paper import PaperSearch

SEARCH_PROGRAMS = ("read", "start_branches", "decode", "keep")


def ragged_questions(loaded, n, num_passages=2):
    """n questions of different lengths, with passages of their own."""
    words = ("Where is Mara?", "Who?", "What is the ropemaker of Quenport?", "Where does she live?")
    texts = [words[i % 4] + " x" * i for i in range(n)]
    return make_questions(loaded.tokenizer, 7, texts, num_passages)


# ---- sampling ------------------------------------------------------------------------------------
def nucleus(logits, temperature, top_p):
    """By sorting: the most likely tokens whose mass reaches top_p, with all ties of the last."""
    p = np.exp((logits - logits.max()) / temperature)
    p /= p.sum()
    order = np.argsort(-p)
    last = 0.0
    if top_p < 1:
        last = p[order[np.searchsorted(np.cumsum(p[order]), top_p - 1e-6)]]
    kept = np.where(p >= last, p, 0.0)
    return kept / kept.sum()


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9), (2.0, 0.5), (1.0, 0.01)]
)
def test_tokens_are_sampled_from_the_nucleus(temperature, top_p):
    rng = np.random.default_rng(0)
    logits, n = rng.normal(size=12).astype(np.float32) * 2, 20_000
    keys = rng.integers(0, 2**32, (n, 2), dtype=np.uint32)
    ages = jnp.zeros(n, jnp.int32)
    sampled = segments.sample(jnp.tile(logits, (n, 1)), keys, ages, temperature, top_p)
    expected = nucleus(logits.astype(np.float64), temperature, top_p)
    frequencies = np.bincount(np.asarray(sampled), minlength=12) / n
    assert (frequencies[expected == 0] == 0).all()
    five_deviations = 5 * np.sqrt(0.25 / n)
    np.testing.assert_allclose(frequencies, expected, atol=five_deviations)


@given(st.integers(0, 2**20))
@settings(max_examples=30, deadline=None)
def test_the_most_likely_token_is_argmax(seed):
    logits = np.random.default_rng(seed).integers(0, 4, (3, 9)).astype(np.float32)  # has ties
    np.testing.assert_array_equal(segments.most_likely(jnp.asarray(logits)), logits.argmax(-1))


@pytest.mark.slow
def test_sampling_depends_on_question_and_seed_alone(talkative):
    """Not on what else is answered."""
    rag, questions = make_rag(talkative, ndocs=2), ragged_questions(talkative, 6)

    def texts(questions, **changes):
        answers = rag.answer(questions, mode="always_retrieve", **changes)
        return [[n["text"] for n in a.tree] for a in answers]

    sampling = dict(temperature=1.0, top_p=0.95)
    first = texts(questions, **sampling, seed=1)
    assert first == texts(questions, **sampling, seed=1)
    assert first[2:] == texts(questions[2:], **sampling, seed=1)
    assert first != texts(questions, **sampling, seed=2)
    assert first != texts(questions)
    released = dict(scorer="released", threshold=0.2)
    for wrong, message in (
        (dict(temperature=-1.0), "--temperature=-1.0: must be from 0.01 to 100, or 0"),
        (dict(temperature=1.0, top_p=0.0), "--top_p=0.0: must be from 0.000001 to 1"),
        (dict(top_p=0.5), "--top_p=0.5 needs a --temperature"),
        (dict(temperature=1.0, **released), "the released scripts take the most likely token"),
    ):
        with pytest.raises(UserError, match=message):
            rag.answer(["q"], **wrong)


def test_a_tiny_nucleus_gives_the_most_likely_tokens(talkative):
    rag, questions = make_rag(talkative, ndocs=2), ragged_questions(talkative, 4)
    greedy = rag.answer(questions, mode="always_retrieve")
    sampled = rag.answer(questions, mode="always_retrieve", temperature=1.0, top_p=1e-6)
    assert [a.answer for a in greedy] == [a.answer for a in sampled]
    # Scores are the same too: they come from the model's own probabilities.
    for a, b in zip(greedy, sampled, strict=True):
        assert a.score == pytest.approx(b.score, abs=1e-5)


# ---- slots ---------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_slot_is_taken_as_soon_as_it_is_free(talkative):
    """Answers come when they are done, not in order; two slots and four give the same ones."""
    questions = ragged_questions(talkative, 14)
    ids = [q.id for q in questions]
    four_slots, two_slots = make_rag(talkative, ndocs=2), make_rag(talkative, ndocs=2)
    two_slots.config = replace(two_slots.config, batch=2)
    expected = {a.id: a for a in two_slots.answer(questions, mode="always_retrieve")}
    order = []
    answers = four_slots.answer(
        questions, on_answer=lambda a: order.append(a.id), mode="always_retrieve"
    )
    assert [a.id for a in answers] == ids and sorted(order) == sorted(ids)
    assert order != ids
    for a in answers:
        assert a.answer == expected[a.id].answer
        assert a.score == pytest.approx(expected[a.id].score, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"keep_passages": False}, {"scorer": "released"}], ids=str)
def test_changing_slots_together_equals_changing_them_one_by_one(talkative, monkeypatch, changes):
    """Of eight slots, all that wait are read, fed and kept as one batch, full or padded."""
    questions, batches = ragged_questions(talkative, 29), shapes.Shapes.batches
    batch_sizes = []  # (jobs, different slots among them)

    def recording_batches(*args):
        for batch in batches(*args):
            batch_sizes.append((len(batch), len({slot for slot, _ in batch})))
            yield batch

    monkeypatch.setattr(shapes.Shapes, "batches", recording_batches)
    results = []
    for min_slots in (8, 100):
        batch_sizes.clear()
        monkeypatch.setattr(shapes, "MIN_BATCH_SLOTS", min_slots)
        rag = make_rag(talkative, ndocs=2)
        rag.config = replace(rag.config, batch=8)
        results.append(rag.answer(questions, mode="always_retrieve", **changes))
        together = {num_slots for num_jobs, num_slots in batch_sizes if num_jobs > 1}
        if min_slots == 100:
            assert not together
        else:
            assert 8 in together and together & {5, 6, 7}

    def segments_of(answer):
        return [(n["parent"], n["text"], n["said"]) for n in answer.tree]

    def scores_of(answer):
        return [n["score"] for n in answer.tree]

    for a, b in zip(*results, strict=True):
        assert not a.error and a.answer == b.answer
        assert segments_of(a) == segments_of(b)
        np.testing.assert_allclose(scores_of(a), scores_of(b), atol=1.1e-4)  # of four digits


def test_a_search_that_fails_frees_its_slot(talkative, monkeypatch):
    rag, questions = make_rag(talkative, ndocs=2), ragged_questions(talkative, 9)
    node = PaperSearch._node

    def broken_node(self, tree, extension, passage, segment):
        if passage is questions[3].ctxs[0]:
            raise RuntimeError("broken")
        return node(self, tree, extension, passage, segment)

    monkeypatch.setattr(PaperSearch, "_node", broken_node)
    answers = rag.answer(questions, mode="always_retrieve")
    assert [a.error for a in answers] == [""] * 3 + ["RuntimeError: broken"] + [""] * 5
    assert all(a.segments for a in answers if not a.error)


@pytest.mark.slow
def test_other_questions_generate_while_passages_are_looked_for(talkative, monkeypatch):
    """The answers are the same whether retrieval is waited for or not, and so is their order."""

    class Index:
        def __init__(self):
            self.num_queries: list[int] = []

        def search(self, queries, k):
            self.num_queries.append(len(queries))
            return [
                make_passages(np.random.default_rng(len(q)), talkative.tokenizer, 2)
                for q in queries
            ]

    rag = make_rag(talkative, ndocs=2)
    rag.retriever = index = Index()
    questions = [replace(q, ctxs=()) for q in ragged_questions(talkative, 7)]
    orders, steps, decode = [], [], engine.Engine.decode

    def recording_decode(self, n):
        steps.append(n)
        decode(self, n)

    monkeypatch.setattr(engine.Engine, "decode", recording_decode)
    for _ in range(2):
        order = []
        answers = rag.answer(
            questions, on_answer=lambda a, order=order: order.append(a.id), mode="always_retrieve"
        )
        orders.append(order)
    assert orders[0] == orders[1]
    # Some generated while others were waiting for passages.
    assert engine.STEPS_BESIDE_RETRIEVAL in steps
    assert max(index.num_queries) > 1  # several questions are looked up together
    for question, answer in zip(questions, answers, strict=True):
        [alone] = rag.answer([question], mode="always_retrieve")
        assert alone.answer == answer.answer


# ---- streaming -----------------------------------------------------------------------------------
@pytest.mark.parametrize(("width", "least"), [(1, 6), (2, 1)])
def test_segments_are_streamed_as_soon_as_they_are_final(talkative, width, least):
    """In the answer's order, before the answer; none changes later. One beam is final at once."""
    rag, questions = make_rag(talkative, ndocs=2), ragged_questions(talkative, 8)
    streamed: dict[str, list[str]] = {q.id: [] for q in questions}
    num_early = 0
    for event in rag.stream(
        questions, mode="always_retrieve", max_depth=4, accumulate="mean", beam_width=width
    ):
        if isinstance(event, SegmentDone):
            streamed[event.id].append(event.segment.text)
            continue
        assert isinstance(event, Answer)
        early = streamed[event.id]
        assert early == [s.text for s in event.segments][: len(early)]
        num_early += len(early)
    assert num_early >= least


def test_no_segment_is_streamed_before_a_vote(talkative):
    """With options, another first segment may be elected in the end."""
    rag = make_rag(talkative, ndocs=2)
    questions = [replace(q, options=("yes", "no")) for q in ragged_questions(talkative, 2)]
    changes = dict(mode="always_retrieve", max_depth=4, accumulate="mean", beam_width=1)
    assert all(isinstance(event, Answer) for event in rag.stream(questions, **changes))


# ---- shapes --------------------------------------------------------------------------------------
@given(st.integers(1, 5000), st.sampled_from([1, 8, 32, 64]))
def test_buckets_are_few_and_large_enough(n, least):
    assert bucket(1, least) == 1
    size = bucket(n, least)
    assert size >= n and size >= bucket(n - 1, least) and (n == 1 or size % least == 0)
    if n > 8 * least:
        assert size <= n * 5 / 4
    assert len({bucket(m, least) for m in range(2, 4097)}) <= 8 + 4 * np.log2(4096 / least)


def shapes_for(max_new_tokens):
    return shapes.Shapes(
        num_slots=1,
        beam_width=1,
        num_passages=1,
        max_new_tokens=max_new_tokens,
        length_bucket=32,
        longest_prompt=64,
        prefix_grows=True,
    )


@pytest.mark.parametrize("limit", [16, 100, 191, 192, 193, 300, 512, 1000])
def test_generated_capacities_are_few_and_large_enough(limit):
    sizes = [shapes_for(limit).generated_capacity(n) for n in range(limit)]
    assert all(n < size <= limit for n, size in enumerate(sizes)) and sizes == sorted(sizes)
    assert sizes[-1] == limit and len(set(sizes)) <= 1 + max(0, np.ceil(np.log2(limit / 128)))
    assert sizes[0] == (limit if limit <= 192 else 128)


# ---- capacities ----------------------------------------------------------------------------------
@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize(("fed", "generated"), [(3, 4), (3, 9), (3, 2), (5, 4), (5, 9), (5, 2)])
def test_a_resized_buffer_holds_the_last_tokens(per_layer, fed, generated):
    """Keys, values and positions hold the step that wrote them; the buffer wrapped or did not."""
    fed_before, generated_before, steps = 3, 4, np.arange(3, 10)
    fed_steps = [100, 101, 102]
    for num_generated in (2, 4, 7):
        written = np.zeros(fed_before + generated_before, np.float32)
        written[:fed_before] = fed_steps
        for step in steps[:num_generated]:
            written[fed_before + (step - fed_before) % generated_before] = step
        rows = np.stack([written, written + 50])
        keys = jnp.asarray(rows)[None, :, None, None, :]
        cache = Cache(
            keys,
            keys.swapaxes(3, 4),
            jnp.tile(written > 0, (2, 1)),
            jnp.asarray(rows, jnp.int32),
            jnp.int32(fed_before + num_generated % generated_before),
        )
        cache = cache.per_layer() if per_layer else cache
        new = programs.resize_branches(cache, fed_before, fed, generated)

        k, v = np.asarray(new.k[0])[:, 0, 0], np.asarray(new.v[0])[:, 0, :, 0]
        valid = np.asarray(new.valid)
        np.testing.assert_array_equal(k, v)
        np.testing.assert_array_equal(np.where(valid, k, 0), np.where(valid, new.positions, 0))
        assert int(new.cursor) == fed and k.shape[-1] == fed + generated
        num_kept = min(num_generated, generated_before, generated)
        last_steps = steps[num_generated - num_kept : num_generated]
        for row, offset in enumerate((0, 50)):
            np.testing.assert_array_equal(valid[row, :fed_before], True)
            np.testing.assert_array_equal(k[row, :fed_before], np.array(fed_steps) + offset)
            assert not valid[row, fed_before:fed].any()
            held = valid[row, fed:]
            # In order: the oldest is overwritten first.
            np.testing.assert_array_equal(k[row, fed:][held], last_steps + offset)
            np.testing.assert_array_equal(held, np.arange(generated) >= generated - num_kept)


@pytest.mark.slow
def test_growing_in_the_middle_of_a_search_changes_no_answer(talkative, monkeypatch):
    """Prefixes, fed and generated tokens outgrow small capacities, or large ones hold them."""
    resizes, resize = [], engine.Engine._resize

    def recording_resize(self, fed, generated):
        resize(self, fed, generated)
        resizes.append((fed, generated))

    monkeypatch.setattr(engine.Engine, "_resize", recording_resize)
    rng = np.random.default_rng(11)
    questions = [
        Question(
            str(i),
            "Where?" + " x" * i,
            ctxs=tuple(make_passages(rng, talkative.tokenizer, 2 * (i + 1))),
        )
        for i in range(3)
    ]
    long_passages = [replace(p, text=" ".join([p.text] * 6)) for p in questions[2].ctxs]
    questions[2] = replace(questions[2], ctxs=tuple(long_passages))
    results = []
    for length in (4, 64):
        monkeypatch.setattr(shapes, "FIRST_GENERATED_CAPACITY", length // 2)
        rag = make_rag(talkative, ndocs=2)
        search = replace(rag.config.search, length_bucket=length, max_depth=4, max_new_tokens=16)
        rag.config = replace(rag.config, search=search, batch=3)
        results.append(rag.answer(questions, mode="always_retrieve"))
        if length == 4:
            capacities = [generated for _, generated in resizes]
            assert {2, 4, 8} <= set(capacities)
            assert any(after < before for before, after in itertools.pairwise(capacities))
    for a, b in zip(*results, strict=True):
        assert a.answer == b.answer and [n["text"] for n in a.tree] == [n["text"] for n in b.tree]
        assert a.score == pytest.approx(b.score, abs=1e-4)


# ---- compilations --------------------------------------------------------------------------------
def test_other_lengths_and_weights_compile_nothing_new(talkative, caplog, monkeypatch):
    monkeypatch.setattr(engine, "_seen", set())
    rag, questions = make_rag(talkative, ndocs=2), ragged_questions(talkative, 5)
    shorter = [replace(q, question=q.question[:-1]) for q in questions]

    def num_traced():
        return [getattr(programs, name)._cache_size() for name in SEARCH_PROGRAMS]

    with caplog.at_level("INFO", logger="selfrag_jax.engine.engine"):
        rag.answer(questions, mode="always_retrieve")
        num_compiled, traced = len(engine.compiled), num_traced()
        weights = dict(w_rel=0.3, w_use=2.0, w_sup=0.0)
        rag.answer(shorter, mode="always_retrieve", accumulate="mean", threshold=0.7, **weights)
    assert len(engine.compiled) == num_compiled
    assert num_traced() == traced
    assert all(f"compiled {name} in" in caplog.text for name in SEARCH_PROGRAMS)


@pytest.mark.slow
def test_ragged_questions_compile_few_programs(talkative, monkeypatch):
    """Hardly two questions have the same lengths, yet few calls compile, and later ones fewer."""
    monkeypatch.setattr(engine, "_seen", set())
    monkeypatch.setattr(shapes, "FIRST_GENERATED_CAPACITY", 4)
    rng, rag = np.random.default_rng(3), make_rag(talkative, ndocs=3)
    search = replace(rag.config.search, length_bucket=16, max_depth=3, max_new_tokens=16)
    rag.config = replace(rag.config, search=search, batch=3, max_length=64)
    words = ["where", "what", "who is Mara", "the ropemaker", "of Quenport"]
    questions = [
        Question(
            str(i),
            " ".join(rng.choice(words, rng.integers(1, 20))) + "?",
            ctxs=tuple(make_passages(rng, talkative.tokenizer, int(rng.integers(1, 4)))),
        )
        for i in range(48)
    ]
    compilations, num_calls, run = [], 0, engine.Engine._run

    def counting_run(self, *args):
        nonlocal num_calls
        num_calls += not compilations  # of the first half
        return run(self, *args)

    monkeypatch.setattr(engine.Engine, "_run", counting_run)
    for half in (questions[:24], questions[24:]):
        before = len(engine.compiled)
        answers = rag.answer(half, mode="always_retrieve")
        assert not any(a.error for a in answers) and max(len(a.segments) for a in answers) == 3
        compilations.append(Counter(name for name, _ in engine.compiled[before:]))
    first, second = compilations
    num_buckets = len({bucket(n, 16) for n in range(2, 64 + 3 * (64 + 16))})
    num_capacities = len({shapes_for(16).generated_capacity(n) for n in range(16)})
    num_shapes = num_buckets + num_capacities
    assert first["decode"] <= num_shapes and first["keep"] <= num_shapes, (first, num_calls)
    assert first.total() <= num_calls / 4, (first, num_calls)
    assert second.total() <= first.total() / 4, (first, second)
