"""The engine: sampling, streaming, slots that are filled as they become free, few compilations."""

import itertools
from collections import Counter
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_search import make_passages, make_rag

from selfrag_jax.answering.records import Answer, SegmentDone
from selfrag_jax.engine import engine, programs, segments, shapes
from selfrag_jax.engine.shapes import bucket
from selfrag_jax.errors import UserError
from selfrag_jax.models.llama import Cache
from selfrag_jax.records import Question


# ---- sampling --------------------------------------------------------------------------------------------------------
def nucleus(logits, temperature, top_p):
    """By sorting: the most likely tokens until their mass reaches top_p, and those as likely as the last."""
    p = np.exp((logits - logits.max()) / temperature)
    p /= p.sum()
    order = np.argsort(-p)
    last = p[order[np.searchsorted(np.cumsum(p[order]), top_p - 1e-6)]] if top_p < 1 else 0.0
    kept = np.where(p >= last, p, 0.0)
    return kept / kept.sum()


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9), (2.0, 0.5), (1.0, 0.01)]
)
def test_tokens_are_drawn_from_the_nucleus(temperature, top_p):
    rng = np.random.default_rng(0)
    logits, n = rng.normal(size=12).astype(np.float32) * 2, 20_000
    keys = rng.integers(0, 2**32, (n, 2), dtype=np.uint32)
    drawn = segments.sample(
        jnp.tile(logits, (n, 1)), keys, jnp.zeros(n, jnp.int32), temperature, top_p
    )
    expected = nucleus(logits.astype(np.float64), temperature, top_p)
    found = np.bincount(np.asarray(drawn), minlength=12) / n
    assert (found[expected == 0] == 0).all()
    np.testing.assert_allclose(
        found, expected, atol=5 * np.sqrt(0.25 / n)
    )  # five standard deviations


@given(st.integers(0, 2**20))
@settings(max_examples=30, deadline=None)
def test_the_most_likely_token_is_argmax(seed):
    logits = np.random.default_rng(seed).integers(0, 4, (3, 9)).astype(np.float32)  # with equals
    np.testing.assert_array_equal(segments.most_likely(jnp.asarray(logits)), logits.argmax(-1))


def asked(loaded, n, passages=2):
    rng = np.random.default_rng(7)
    words = ("Where is Mara?", "Who?", "What is the ropemaker of Quenport?", "Where does she live?")
    return [
        Question(
            str(i),
            words[i % 4] + " x" * i,
            ctxs=tuple(make_passages(rng, loaded.tokenizer, passages)),
        )
        for i in range(n)
    ]


@pytest.mark.slow
def test_draws_belong_to_a_question_and_a_seed(talkative):
    """Not to what else is answered; and to nothing else."""
    rag, rows = make_rag(talkative, ndocs=2), asked(talkative, 6)
    drawn = dict(mode="always_retrieve", temperature=1.0, top_p=0.95)
    texts = lambda answers: [[n["text"] for n in a.tree] for a in answers]  # noqa: E731
    one = texts(rag.answer(rows, **drawn, seed=1))
    assert one == texts(rag.answer(rows, **drawn, seed=1))
    assert one[2:] == texts(rag.answer(rows[2:], **drawn, seed=1))
    assert one != texts(rag.answer(rows, **drawn, seed=2))
    assert one != texts(rag.answer(rows, mode="always_retrieve"))
    for wrong, message in (
        (dict(temperature=-1.0), "--temperature=-1.0: must be from 0.01 to 100, or 0"),
        (dict(temperature=1.0, top_p=0.0), "--top_p=0.0: must be from 0.000001 to 1"),
        (dict(top_p=0.5), "--top_p=0.5 needs a --temperature"),
        (
            dict(temperature=1.0, scorer="released", threshold=0.2),
            "the released scripts take the most likely token",
        ),
    ):
        with pytest.raises(UserError, match=message):
            rag.answer(["q"], **wrong)


def test_cold_draws_are_the_most_likely_tokens(talkative):
    rag, rows = make_rag(talkative, ndocs=2), asked(talkative, 4)
    greedy = rag.answer(rows, mode="always_retrieve")
    cold = rag.answer(rows, mode="always_retrieve", temperature=1.0, top_p=1e-6)
    assert [a.answer for a in greedy] == [a.answer for a in cold]
    for a, b in zip(
        greedy, cold, strict=True
    ):  # and scored alike, by the model's own probabilities
        assert a.score == pytest.approx(b.score, abs=1e-5)


@pytest.mark.slow
# ---- slots -----------------------------------------------------------------------------------------------------------
def test_a_slot_is_filled_as_soon_as_it_is_free(talkative):
    """Answers come when they are done, not in the order of the questions; with two slots and with four they are the same."""
    rag, rows = make_rag(talkative, ndocs=2), asked(talkative, 14)
    two = make_rag(talkative, ndocs=2)
    two.config = replace(two.config, batch=2)
    others = {a.id: a for a in two.answer(rows, mode="always_retrieve")}
    order = []
    answers = rag.answer(rows, on_answer=lambda a: order.append(a.id), mode="always_retrieve")
    assert [a.id for a in answers] == [q.id for q in rows] and sorted(order) == sorted(
        q.id for q in rows
    )
    assert order != [q.id for q in rows]  # who is done is done
    for a in answers:
        assert a.answer == others[a.id].answer and a.score == pytest.approx(
            others[a.id].score, abs=1e-4
        )


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"keep_passages": False}, {"scorer": "released"}], ids=str)
def test_slots_that_are_changed_together_are_changed_as_one_by_one(talkative, monkeypatch, changes):
    """Of eight slots, all that wait are read, fed and kept as one group: whole ones, and some that are filled up."""
    rows, sizes, batches = asked(talkative, 29), [], shapes.Shapes.batches

    def noted(*args):
        for batch in batches(*args):
            sizes.append((len(batch), len({slot for slot, _ in batch})))
            yield batch

    monkeypatch.setattr(shapes.Shapes, "batches", noted)
    found = []
    for smallest in (8, 100):
        monkeypatch.setattr(shapes, "MIN_BATCH_SLOTS", smallest)
        rag = make_rag(talkative, ndocs=2)
        rag.config = replace(rag.config, batch=8)
        found.append(rag.answer(rows, mode="always_retrieve", **changes))
        together, sizes[:] = [of for n, of in sizes if n > 1], []
        assert (
            together == []
            if smallest == 100
            else 8 in together and set(together) & set(range(5, 8))
        )
    for one, other in zip(*found, strict=True):
        assert not one.error and one.answer == other.answer
        assert [(n["parent"], n["text"], n["said"]) for n in one.tree] == [
            (n["parent"], n["text"], n["said"]) for n in other.tree
        ]
        np.testing.assert_allclose(
            [n["score"] for n in one.tree], [n["score"] for n in other.tree], atol=1.1e-4
        )  # 4 digits


@pytest.mark.parametrize(("width", "least"), [(1, 6), (2, 1)])
def test_segments_are_told_when_they_have_settled(talkative, width, least):
    """In the order of the answer, before it, and none of them changes any more. One beam settles each segment at once."""
    rag, rows = make_rag(talkative, ndocs=2), asked(talkative, 8)
    told: dict[str, list[str]] = {q.id: [] for q in rows}
    early = 0
    for event in rag.stream(
        rows, mode="always_retrieve", max_depth=4, accumulate="mean", beam_width=width
    ):
        if isinstance(event, SegmentDone):
            told[event.id].append(event.segment.text)
            continue
        assert isinstance(event, Answer)
        texts = [s.text for s in event.segments]
        assert told[event.id] == texts[: len(told[event.id])]
        early += len(told[event.id])
    assert early >= least


@pytest.mark.slow
def test_other_questions_go_on_while_passages_are_looked_for(talkative, monkeypatch):
    """The same answers whether retrieval is waited for or not, in the same order each time."""

    class Slow:
        def __init__(self):
            self.calls: list[int] = []

        def passages(self, static, queries, k):
            self.calls.append(len(queries))
            found = []
            for q in queries:
                found.append(make_passages(np.random.default_rng(len(q)), talkative.tokenizer, 2))
            return found

    rag = make_rag(talkative, ndocs=2)
    rag.retriever = slow = Slow()
    rows = [replace(q, ctxs=()) for q in asked(talkative, 7)]
    orders, steps, decode = [], [], engine.Engine.decode
    monkeypatch.setattr(engine.Engine, "decode", lambda self, n: steps.append(n) or decode(self, n))
    for _ in range(2):
        orders.append([])
        answers = rag.answer(
            rows, on_answer=lambda a: orders[-1].append(a.id), mode="always_retrieve"
        )
    assert orders[0] == orders[1]
    assert (
        engine.STEPS_BESIDE_RETRIEVAL in steps
    )  # some generated while others were waiting for passages
    assert max(slow.calls) > 1  # several questions are looked up together
    for q, a in zip(rows, answers, strict=True):
        [alone] = rag.answer([q], mode="always_retrieve")
        assert alone.answer == a.answer


def test_a_search_that_fails_frees_its_slot(talkative, monkeypatch):
    rag, rows = make_rag(talkative, ndocs=2), asked(talkative, 9)
    from selfrag_jax.search.paper import PaperSearch

    node = PaperSearch._node

    def breaks(self, tree, extension, passage, segment):
        if passage is rows[3].ctxs[0]:
            raise RuntimeError("broken")
        return node(self, tree, extension, passage, segment)

    monkeypatch.setattr(PaperSearch, "_node", breaks)
    answers = rag.answer(rows, mode="always_retrieve")
    assert [a.error for a in answers] == [""] * 3 + ["RuntimeError: broken"] + [""] * 5
    assert all(a.segments for a in answers if not a.error)


# ---- shapes ----------------------------------------------------------------------------------------------------------
@given(st.integers(1, 5000), st.sampled_from([1, 8, 32, 64]))
def test_buckets_are_few_and_hold_what_they_should(n, least):
    assert bucket(1, least) == 1
    size = bucket(n, least)
    assert size >= n and size >= bucket(n - 1, least) and (n == 1 or size % least == 0)
    if n > 8 * least:
        assert size <= n * 5 / 4
    assert len({bucket(m, least) for m in range(2, 4097)}) <= 8 + 4 * np.log2(4096 / least)


def with_limit(max_new_tokens):
    return shapes.Shapes(1, 1, 1, max_new_tokens, 32, 64, True)


@pytest.mark.parametrize("limit", [16, 100, 191, 192, 193, 300, 512, 1000])
def test_rings_hold_what_goes_on(limit):
    sizes = [with_limit(limit).generated_capacity(n) for n in range(limit)]
    assert all(n < size <= limit for n, size in enumerate(sizes)) and sizes == sorted(sizes)
    assert sizes[-1] == limit and len(set(sizes)) <= 1 + max(0, np.ceil(np.log2(limit / 128)))
    assert sizes[0] == (limit if limit <= 192 else 128)


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize(("fed", "ring"), [(3, 4), (3, 9), (3, 2), (5, 4), (5, 9), (5, 2)])
def test_a_resized_ring_holds_the_last_tokens(per_layer, fed, ring):
    """Keys, values and positions hold the step that wrote them; the ring has been around, or not yet."""
    old, before, steps = 4, 3, np.arange(3, 10)
    for n in (2, 4, 7):  # tokens that were generated
        written = np.zeros(before + old, np.float32)
        written[:before] = [100, 101, 102]
        for step in steps[:n]:
            written[before + (step - before) % old] = step
        valid = written > 0
        both = np.stack([written, written + 50])  # two rows
        keys = jnp.asarray(both)[None, :, None, None, :]
        cache = Cache(
            keys,
            keys.swapaxes(3, 4),
            jnp.tile(valid, (2, 1)),
            jnp.asarray(both, jnp.int32),
            jnp.int32(before + n % old),
        )
        new = programs.resize_branches(cache.per_layer() if per_layer else cache, before, fed, ring)
        k, v = (np.asarray(x[0]) for x in (new.k, new.v))
        np.testing.assert_array_equal(k[:, 0, 0], v[:, 0, :, 0])
        np.testing.assert_array_equal(
            np.where(new.valid, k[:, 0, 0], 0), np.where(new.valid, new.positions, 0)
        )
        assert int(new.cursor) == fed and k.shape[-1] == fed + ring
        last = steps[max(0, n - min(old, ring)) : n]
        for row, more in enumerate((0, 50)):
            np.testing.assert_array_equal(np.asarray(new.valid)[row, :before], True)
            np.testing.assert_array_equal(k[row, 0, 0, :before], np.array([100, 101, 102]) + more)
            assert not np.asarray(new.valid)[row, before:fed].any()
            there = np.asarray(new.valid)[row, fed:]
            np.testing.assert_array_equal(
                k[row, 0, 0, fed:][there], last + more
            )  # in order: the oldest is overwritten first
            np.testing.assert_array_equal(there, np.arange(ring) >= ring - len(last))


def test_other_lengths_and_weights_compile_nothing_new(talkative, caplog, monkeypatch):
    monkeypatch.setattr(engine, "_seen", set())
    rag = make_rag(talkative, ndocs=2)
    rows = asked(talkative, 5)
    with caplog.at_level("INFO", logger="selfrag_jax.engine.engine"):
        rag.answer(rows, mode="always_retrieve")
        before = len(engine.compiled)
        traced = [
            getattr(programs, name)._cache_size()
            for name in ("read", "start_branches", "decode", "keep")
        ]
        shorter = [replace(q, question=q.question[:-1]) for q in rows]
        rag.answer(
            shorter,
            mode="always_retrieve",
            w_rel=0.3,
            w_use=2.0,
            w_sup=0.0,
            accumulate="mean",
            threshold=0.7,
        )
    assert len(engine.compiled) == before
    assert traced == [
        getattr(programs, name)._cache_size()
        for name in ("read", "start_branches", "decode", "keep")
    ]
    assert all(
        f"compiled {name} in" in caplog.text
        for name in ("read", "start_branches", "decode", "keep")
    )


@pytest.mark.slow
def test_ragged_questions_compile_few_programs(talkative, monkeypatch):
    """Of what runs, few are new, though hardly two questions have the same lengths; and more of the same kind need hardly any."""
    monkeypatch.setattr(engine, "_seen", set())
    monkeypatch.setattr(shapes, "FIRST_GENERATED_CAPACITY", 4)
    rng, rag = np.random.default_rng(3), make_rag(talkative, ndocs=3)
    search = replace(rag.config.search, length_bucket=16, max_depth=3, max_new_tokens=16)
    rag.config = replace(rag.config, search=search, batch=3, max_length=64)
    words = ["where", "what", "who is Mara", "the ropemaker", "of Quenport"]
    rows = [
        Question(
            str(i),
            " ".join(rng.choice(words, rng.integers(1, 20))) + "?",
            ctxs=tuple(make_passages(rng, talkative.tokenizer, int(rng.integers(1, 4)))),
        )
        for i in range(48)
    ]
    counts, ran, run = [], [0], engine.Engine._run

    def counted(self, *args):
        ran[0] += len(counts) == 0
        return run(self, *args)

    monkeypatch.setattr(engine.Engine, "_run", counted)
    for some in (rows[:24], rows[24:]):
        before = len(engine.compiled)
        answers = rag.answer(some, mode="always_retrieve")
        assert not any(a.error for a in answers) and max(len(a.segments) for a in answers) == 3
        counts.append(Counter(name for name, _ in engine.compiled[before:]))
    first, more = counts
    sizes = len({bucket(n, 16) for n in range(2, 64 + 3 * (64 + 16))}) + len(
        {with_limit(16).generated_capacity(n) for n in range(16)}
    )
    assert first["decode"] <= sizes and first["keep"] <= sizes and first.total() <= ran[0] / 4, (
        first,
        ran,
    )
    assert more.total() <= first.total() / 4, (first, more)


@pytest.mark.slow
def test_room_grows_in_the_middle_of_a_search(talkative, monkeypatch):
    """Prefixes, fed and generated tokens beyond the first sizes give what larger sizes from the start give."""
    sizes, resize = [], engine.Engine._resize
    monkeypatch.setattr(
        engine.Engine, "_resize", lambda self, *size: resize(self, *size) or sizes.append(size)
    )
    rng = np.random.default_rng(11)
    rows = [
        Question(
            str(i),
            "Where?" + " x" * i,
            ctxs=tuple(make_passages(rng, talkative.tokenizer, 2 * (i + 1))),
        )
        for i in range(3)
    ]
    long = [replace(p, text=" ".join([p.text] * 6)) for p in rows[2].ctxs]
    rows[2] = replace(rows[2], ctxs=tuple(long))
    found = []
    for length in (4, 64):
        monkeypatch.setattr(shapes, "FIRST_GENERATED_CAPACITY", length // 2)
        rag = make_rag(talkative, ndocs=2)
        search = replace(rag.config.search, length_bucket=length, max_depth=4, max_new_tokens=16)
        rag.config = replace(rag.config, search=search, batch=3)
        found.append(rag.answer(rows, mode="always_retrieve"))
        rings = [places for _, places in sizes]
        assert length == 64 or (
            {2, 4, 8} <= set(rings) and any(b < a for a, b in itertools.pairwise(rings))
        )
    for a, b in zip(*found, strict=True):
        assert a.answer == b.answer and [n["text"] for n in a.tree] == [n["text"] for n in b.tree]
        assert a.score == pytest.approx(b.score, abs=1e-4)


def test_votes_are_not_told_before_they_are_counted(talkative):
    """With options, another first segment may be elected in the end."""
    rag, rows = make_rag(talkative, ndocs=2), asked(talkative, 2)
    rows = [replace(q, options=("yes", "no")) for q in rows]
    events = list(
        rag.stream(rows, mode="always_retrieve", max_depth=4, accumulate="mean", beam_width=1)
    )
    assert all(isinstance(e, Answer) for e in events)
