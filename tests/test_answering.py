"""SelfRAG: questions in, answers out; what an answer holds, and how one question fails alone."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from plain_search import make_passages, make_questions, make_rag

from selfrag_jax.answering.asked import missing_names
from selfrag_jax.answering.citations import Citation, cite, doubts
from selfrag_jax.answering.config import DEFAULT
from selfrag_jax.answering.records import make_answer
from selfrag_jax.answering.selfrag import SelfRAG
from selfrag_jax.base_model.source import make_tokenizer
from selfrag_jax.errors import UserError
from selfrag_jax.huggingface import weights
from selfrag_jax.records import Passage, Question
from selfrag_jax.search.config import ACCUMULATE
from selfrag_jax.search.paper import PaperSearch
from selfrag_jax.search.tree import Beam, Node, SearchTree
from selfrag_jax.text.tokenizer import Control, Tokenizer


# ---- loading -------------------------------------------------------------------------------------
def test_a_model_without_reflection_tokens_is_refused(tiny_model, tmp_path):
    weights.save_folder(tmp_path, tiny_model.model.config, tiny_model.params, make_tokenizer(4000))
    with pytest.raises(UserError, match="is a base model without reflection tokens; run `selfrag"):
        SelfRAG.load(tmp_path)


# ---- questions and settings ----------------------------------------------------------------------
def test_one_question_needs_no_list(talkative):
    rag = make_rag(talkative)
    [bare] = rag.answer("Who?", mode="no_retrieval")
    [listed] = rag.answer(["Who?"], mode="no_retrieval")
    assert bare == listed and bare.question == "Who?"


def test_unknown_fields_and_values_are_refused(talkative):
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
    for questions in (None, 5, [None], ["q", 5], [["q"]]):
        with pytest.raises(UserError, match="expected text, a dict or|expected questions"):
            rag.answer(questions)


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


# ---- slots ---------------------------------------------------------------------------------------
def test_the_rest_of_a_file_is_answered_in_as_many_slots(talkative, monkeypatch):
    """With the same number of slots, floating point rounds mostly as before."""
    rag, num_slots = make_rag(talkative, ndocs=2), []

    class Stop(Exception):
        pass

    def stream(search, prompts, find_passages, slots, **rest):
        num_slots.append(slots)
        raise Stop

    monkeypatch.setattr(PaperSearch, "stream", stream)
    for num_questions, total in (
        (1, None),
        (2, None),
        (3, None),
        (9, None),
        (1, 9),
        (2, 9),
        (3, 3),
    ):
        with pytest.raises(Stop):
            rag.answer(["a"] * num_questions, total=total)
    assert num_slots == [1, 2, 4, 4, 4, 4, 4]


def test_more_branches_for_each_question_mean_fewer_slots(talkative, monkeypatch):
    rag, num_slots = make_rag(talkative, ndocs=2), []

    def stream(search, prompts, find_passages, slots, **rest):
        num_slots.append(slots)
        return iter(())

    monkeypatch.setattr(PaperSearch, "stream", stream)
    for num_questions, ndocs in ((3, 2), (3, 4), (2, 50), (1, 2), (9, 2)):
        list(rag.stream(["a"] * num_questions, ndocs=ndocs))
    assert num_slots == [4, 2, 1, 1, 4]  # memory is for 4 questions with 2 passages each
    list(rag.stream(["a"] * 3, beam_width=2 * rag.config.search.beam_width))
    assert num_slots[-1] == 2
    with pytest.raises(UserError, match="--beam_width=101: at most 100"):
        rag.check({"beam_width": 101})


def test_answers_do_not_depend_on_their_neighbours(talkative):
    texts = [f"Where is {name}?" for name in ("Mara", "Quenport", "the ropemaker")]
    questions = make_questions(talkative.tokenizer, 5, texts)
    rag = make_rag(talkative)
    together = rag.answer(questions, mode="always_retrieve")
    for question, answer in zip(questions, together, strict=True):
        [alone] = rag.answer([question], mode="always_retrieve")
        assert alone.answer == answer.answer
        assert alone.score == pytest.approx(answer.score, abs=1e-4)


# ---- prompts -------------------------------------------------------------------------------------
def test_a_long_question_and_a_long_passage_are_cut_with_a_notice(talkative):
    rag, prompts = make_rag(talkative), []
    make_prompt = rag._prompt

    def recording_prompt(*args):
        prompts.append(make_prompt(*args))
        return prompts[-1]

    rag._prompt = recording_prompt
    passage = Passage("p7", "Long", " ".join(["word"] * 300))
    question = Question("1", "word " * 200, ctxs=(passage,))
    [answer] = rag.answer([question], mode="always_retrieve")
    assert any("question was cut" in n for n in answer.notices)
    assert any("passage p7 was cut" in n for n in answer.notices)
    heading = talkative.tokenizer.id("\n\n### Response:\n")
    assert len(prompts[0]) == 64 and prompts[0][-1] == heading


def test_a_cut_question_keeps_the_heading_of_a_published_vocabulary():
    """There the heading is plain text, several tokens long."""
    tokenizer = Tokenizer.load(Path(__file__).parent / "data" / "llama_tokenizer")
    model = SimpleNamespace(config=SimpleNamespace(max_length=4096))
    rag = SimpleNamespace(
        loaded=SimpleNamespace(tokenizer=tokenizer, model=model),
        config=SimpleNamespace(max_length=64),
    )
    notices = []
    question = Question("1", "Which town lies by the river? " * 30)
    tokens = SelfRAG._prompt(rag, question, 64, notices)
    assert len(tokens) == 64 and "was cut" in notices[0]
    text = tokenizer.decode(tokens)
    assert text.rstrip().endswith("### Response:") and "Which town" in text


# ---- failures ------------------------------------------------------------------------------------
def test_a_question_without_passages_is_answered_with_a_notice(talkative):
    [answer] = make_rag(talkative).answer(["Where?"], mode="always_retrieve")
    assert any("no passage" in n for n in answer.notices) and not answer.retrieved


def test_probabilities_that_are_not_finite_are_an_error_of_the_question(talkative):
    params = jax.tree.map(lambda x: x, jax.device_get(talkative.params))
    params["norm"]["scale"] = params["norm"]["scale"] * np.nan
    rag = make_rag(replace(talkative, params=params))
    [answer] = rag.answer(["Where?"], mode="no_retrieval", max_depth=1)
    assert "not finite" in answer.error and not answer.answer


def test_a_question_that_fails_leaves_the_others_alone(talkative):
    passages = make_passages(np.random.default_rng(0), talkative.tokenizer, 2)

    class BrokenForMara:
        def search(self, queries, k):
            if any("Mara" in q for q in queries):
                raise RuntimeError("the index is gone")
            return [passages for _ in queries]

    rag = make_rag(talkative)
    [without_index] = rag.answer(["Where is it?"], mode="no_retrieval")
    assert not without_index.error
    rag.retriever = BrokenForMara()
    questions = ["Who?", "Where is Mara?", "a \ud83d", "What?"]
    who, mara, unpaired_surrogate, what = rag.answer(questions, mode="always_retrieve")
    assert mara.error == "RuntimeError: the index is gone" and not mara.answer
    assert unpaired_surrogate.error
    for question, answer in (("Who?", who), ("What?", what)):
        [alone] = rag.answer([question], mode="always_retrieve")
        assert not answer.error and answer.answer == alone.answer and answer.segments
    with pytest.raises(UserError, match="question '1' is empty"):
        rag.answer(["Who?", "  "])


# ---- what an answer holds ------------------------------------------------------------------------
def test_a_segment_names_its_node_in_the_tree(talkative):
    questions = make_questions(talkative.tokenizer, 6, ["Where?"] * 3)
    for answer in make_rag(talkative).answer(questions, mode="always_retrieve"):
        nodes = [s.node for s in answer.segments]
        assert [answer.tree[n]["text"] for n in nodes] == [s.text for s in answer.segments]
        assert [answer.tree[n]["parent"] for n in nodes] == [-1, *nodes[:-1]]
        assert all(answer.tree[n]["chosen"] for n in nodes)


@pytest.mark.parametrize("accumulate", ACCUMULATE)
def test_the_score_of_an_answer_is_what_paths_were_compared_by(talkative, accumulate):
    questions = make_questions(talkative.tokenizer, 6, ["Where?"] * 3)
    combine = {"sum": np.sum, "mean": np.mean, "product": np.prod}[accumulate]
    answers = make_rag(talkative).answer(questions, mode="always_retrieve", accumulate=accumulate)
    assert any(len(a.segments) > 1 for a in answers)
    for answer in answers:
        scores = [answer.tree[s.node]["score"] for s in answer.segments]
        if accumulate == "product":
            scores = np.maximum(scores, 0)
        assert answer.score == pytest.approx(combine(scores), abs=1e-3)
        running = answer.tree[answer.segments[-1].node]["total"]
        expected = np.sum(scores) if accumulate == "mean" else answer.score
        assert running == pytest.approx(expected, abs=1e-3)  # rows are rounded
        for n in answer.tree:
            no, yes, _ = n["retrieve"]
            assert n["p_retrieve"] == pytest.approx(yes / (yes + no), abs=1e-3)


def test_every_citation_points_into_the_answer(talkative):
    questions = make_questions(talkative.tokenizer, 6, ["Where?"] * 4, 4)
    for a in make_rag(talkative).answer(questions, mode="always_retrieve", beam_width=3):
        assert a.tree
        for c in a.citations:
            assert c.passage < len(a.passages) and c.segment < len(a.segments)
            assert a.segments[c.segment].passage == a.passages[c.passage]
        on_path = [a.tree[s.node]["num_tokens"] for s in a.segments]
        assert a.num_answer_tokens == sum(on_path) > 0
        assert a.num_tokens == sum(n["num_tokens"] for n in a.tree) > a.num_answer_tokens


def node_by_hand(rag, text, passage):
    """A first segment that is relevant and supported."""
    parts = [Control("[Relevant]"), text, Control("[Fully supported]")]
    tokens = tuple(rag.loaded.tokenizer.encode(parts))
    return Node(
        id=0,
        parent=-1,
        depth=0,
        action="retrieve",
        p_retrieve=1.0,
        retrieve=(0.0, 1.0, 0.0),
        passage=passage,
        tokens=tokens,
        num_tokens=len(tokens),
        p_segment=1.0,
        isrel=(0.1, 0.9),
        issup=(0.9, 0.1, 0.0),
        isuse=(0, 0, 0, 0, 1),
        score=1.0,
        total=1.0,
        allowed=True,
        fed_position=5,
        finished=True,
        complete=True,
    )


def answer_of(rag, segments, question="Who?"):
    """An answer by hand, whose segments (text, passage) are relevant and supported."""
    nodes = [
        replace(node_by_hand(rag, text, passage), id=i, parent=i - 1, depth=i, total=1.0 + i)
        for i, (text, passage) in enumerate(segments)
    ]
    tree = SearchTree([Beam(nodes[-1], np.zeros(3), 9)], nodes)
    return rag._answer(rag._search({}), tree, Question("0", question), [])


def test_a_segment_without_text_cites_nothing(talkative):
    """Whatever its critique tokens say of the passage."""
    [passage] = make_passages(np.random.default_rng(6), talkative.tokenizer, 1)
    num_cited = []
    for text in ("", "Mara studied."):
        answer = answer_of(make_rag(talkative), [(text, passage)])
        assert answer.segments[0].passage == passage
        num_cited.append((len(answer.citations), len(answer.passages)))
    assert num_cited == [(0, 0), (1, 1)]


def test_irrelevant_and_unsupported_passages_are_not_cited():
    def node(passage, isrel, issup):
        return SimpleNamespace(passage=passage, isrel=isrel, issup=issup)

    relevant, irrelevant = (0.2, 0.8), (0.6, 0.4)
    fully, partly, unsupported = (0.7, 0.2, 0.1), (0.2, 0.5, 0.3), (0.1, 0.3, 0.6)
    a, b, c, d = (Passage(x, "", x, 0.5) for x in "abcd")
    path = [
        node(a, relevant, fully),
        node(b, irrelevant, fully),
        node(c, relevant, unsupported),
        node(None, relevant, fully),
        node(d, relevant, partly),
        node(replace(a, score=0.4), relevant, fully),  # the same passage, found by another query
    ]
    passages, citations = cite(path)
    assert passages == [a, d]
    assert [(c.segment, c.passage, c.support) for c in citations] == [
        (0, 0, "[Fully supported]"), (4, 1, "[Partially supported]"), (5, 0, "[Fully supported]"),
    ]  # fmt: skip


def test_an_answer_that_no_passage_supports_has_a_notice():
    def node(passage, isrel):
        return SimpleNamespace(passage=passage, isrel=isrel, complete=True, issup=(0.9, 0.1, 0.0))

    relevant, irrelevant = node("p", (0.1, 0.9)), node("about another name", (0.8, 0.2))
    without_passage = node(None, (0.5, 0.5))
    unsupported = "passage that was found supports this answer"
    assert any(unsupported in d for d in doubts([without_passage, relevant], []))
    nothing_found = "no passage about this was found"
    assert any(nothing_found in d for d in doubts([without_passage, irrelevant], []))
    citation = Citation(0, 0, "[Fully supported]")
    assert doubts([relevant], [citation]) == doubts([without_passage], []) == []
    [doubt] = doubts([relevant, irrelevant], [citation])
    assert doubt == "segment 2: the model judges its passage irrelevant; not cited"
    [doubt] = doubts([relevant, irrelevant, irrelevant], [citation])
    assert doubt == "segments 2, 3: the model judges their passages irrelevant; not cited"


def test_a_citation_of_another_name_has_a_notice(talkative):
    """In the citation, once in the answer, and in the row; nothing else differs."""
    passages = [Passage(str(i), "Marvin Tellgate", f"Marvin Tellgate, {i}.") for i in range(2)]
    segments = [("He plays.", p) for p in (*passages, passages[0])]
    rag = make_rag(talkative)
    other = answer_of(rag, segments, "Where was Marvin Tellock born?")
    same = answer_of(rag, segments, "Where was Marvin Tellgate born?")
    text = '"Marvin Tellgate" does not mention Marvin Tellock'
    assert [c.notice for c in other.citations] == 3 * [text]
    assert other.notices == (f"[1] [2] {text}",)
    assert other.to_row()["citations"][0]["notice"] == text
    assert [c.notice for c in same.citations] == 3 * [""] and not same.notices
    bare = [replace(c, notice="") for c in other.citations]
    assert replace(other, question=same.question, citations=tuple(bare), notices=()) == same


def test_notices_are_those_of_the_chosen_answers_segments(talkative):
    """By hand: two beams of two segments each, of which every segment has something to say."""
    rag = make_rag(talkative)
    right = [Passage(f"r{i}", "Marvin Tellock", f"Marvin Tellock, {i}.") for i in range(2)]
    wrong = [Passage(f"w{i}", "Marvin Tellgate", f"Marvin Tellgate, {i}.") for i in range(2)]
    search, tree = rag._search({}), SearchTree([])
    before = [None, None]
    for depth in range(2):
        for beam, passages in enumerate((right, wrong)):
            passage = passages[depth]
            made = replace(
                node_by_hand(rag, "He plays.", passage), id=len(tree.nodes), depth=depth,
                parent=before[beam].id if depth else -1, complete=beam == 0 or depth == 0,
            )  # fmt: skip
            tree.nodes.append(made)
            tree.notice_segment(f"passage {passage.id} was cut", before[beam], passage)
            tree.notice_segment(f"passage {passage.id} was cut", before[beam], passage)
            before[beam] = made
    tree.notice_segment("no passage was found", before[1], None)  # a third segment, dropped
    tree.notice("about the search")
    best, dropped = (Beam(node, np.zeros(3), 0) for node in before)
    tree.beams = [best, dropped]
    asked = Question("0", "Where was Marvin Tellock born?")
    answer = make_answer(search, tree, best, asked, False, ("the question was cut",))
    of_search = ("the question was cut", "about the search")
    assert answer.notices == (*of_search, "passage r0 was cut", "passage r1 was cut")
    assert [c.notice for c in answer.citations] == ["", ""]
    other = make_answer(search, tree, dropped, asked, False, ("the question was cut",))
    length = "a segment was cut at the length limit"
    named = '[1] [2] "Marvin Tellgate" does not mention Marvin Tellock'
    assert other.notices == (*of_search, "passage w0 was cut", "passage w1 was cut", length, named)
    # Either answer's tree has all of them, each with its segment.
    assert [n.get("notices") for n in answer.tree] == [n.get("notices") for n in other.tree] == [
        ["passage r0 was cut"], ["passage w0 was cut"],
        ["passage r1 was cut"], ["passage w1 was cut", length],
    ]  # fmt: skip


# The question, a passage's title and text, and what it does not mention ("" for nothing).
ABOUT = (
    ("Where was Marvin Tellock born?", "Marvin Tellock", "He was born in Lisford.", ""),
    ("Where was Marvin Tellock born?", "", "Marvin Tellock was born in Lisford.", ""),
    ("Where was Marvin Tellock born?", "Marvin Tellgate", "Born.", "Marvin Tellock"),
    ("Where was Marvin Tellock born?", "Oslo", "A city.", "Marvin Tellock"),
    ("What does Red Oak praise and where is Blue Fen?", "Blue Fen", "A fen.", ""),
    ("Who was President Obama's wife?", "Barack Obama", "Barack Hussein Obama.", ""),
    ("Where did Queen Elizabeth II die?", "Elizabeth II", "At Balmoral.", ""),
    ("When was J. K. Rowling born?", "J. K. Rowling", "Joanne Rowling, 1965.", ""),
    ("When was J. K. Rowling born?", "Stephen King", "In 1947.", "Rowling"),
    ("What is the capital of the US?", "Washington, D.C.", "Of the United States.", ""),
    ("Who is Michelle O’Neill?", "Michelle O'Neill", "A politician.", ""),
    ("What did Beyoncé release?", "Beyonce", "Lemonade.", ""),
    ("Welche Farbe haben Goethes Augen?", "Goethe", "Braun.", ""),
    ("Что построили в Москве?", "Москва", "Столица.", ""),
    ("Где родился Александр Пушкин?", "Лев Толстой", "В Поляне.", "Александр Пушкин"),
    ("Where is Moscow?", "Москва", "Столица России.", ""),  # another script
    ("居里夫人在哪里?", "玛丽·居里", "又称居里夫人", ""),
    ("居里夫人在哪里?", "牛顿", "英国物理学家", "what was asked"),
    ("「吾輩は猫である」の作者は?", "夏目漱石", "「吾輩は猫である」を書いた", ""),
    ("「吾輩は猫である」の作者は?", "村上春樹", "小説家", "吾輩は猫である"),
    ('Who sang "Bohemian rhapsody"?', "ABBA", "Waterloo.", "Bohemian rhapsody"),
    ("Was M*A*S*H made by Mara Oak?", "M*A*S*H", "A film.", ""),
    ("Was it made by Mrs. Oak?", "Oak", "A film.", ""),
    ("What helps if I'm ill and I’ve no tea?", "Fever", "Rest.", ""),
    ("Who won in November 2020?", "2020 election", "Joe Biden won.", ""),
    ("Who won in May? Did Mara Oak?", "Lisford", "A town.", "Mara Oak"),
    ("Please tell me, What is tall?", "Everest", "It is tall.", ""),
    # No name that can be told from other words: nothing is doubted.
    ("What is the opposite of big?", "Oxick Bay", "A bay.", ""),
    ("who was marie curie", "Isaac Newton", "A physicist.", ""),
    ("WHO WAS MARIE CURIE?", "Isaac Newton", "A physicist.", ""),
    ("Who Wrote The Great Gatsby?", "Ulysses", "A novel.", ""),
)


@pytest.mark.parametrize(("question", "title", "text", "missing"), ABOUT)
def test_a_passage_is_doubted_if_it_has_no_name_of_the_question(question, title, text, missing):
    assert missing_names(question, Passage("0", title, text)) == missing


def test_in_the_world_all_other_passages_are_doubted_and_no_own_one(small_world):
    """Many names share a word, so each is asked with the passages of all entities."""
    own, similar, other = Counter(), Counter(), Counter()
    for e in small_world.entities:
        question = f"Tell me about {e.name}."
        for p in small_world.passages:
            kind = own if p.title == e.name else other
            if kind is other and set(e.words) & set(p.title.split()):
                kind = similar
            kind[bool(missing_names(question, p))] += 1
    assert own[False] and not own[True] and other[True] and not other[False]
    assert similar[True] > 0.95 * similar.total()
