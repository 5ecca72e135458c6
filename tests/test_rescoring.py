"""Answers scored again equal a search with those weights, and a threshold equals adaptive mode."""

from dataclasses import replace

import numpy as np
import pytest
from plain_search import make_questions, make_rag

from selfrag_jax.answering.rescoring import ROUNDING, at_threshold, rescored
from selfrag_jax.errors import UserError
from selfrag_jax.search.scoring import Weights

SAME = ("id", "answer", "segments", "citations", "passages", "num_answer_tokens", "retrieved")
WEIGHTS = (
    Weights(),
    Weights(w_rel=0.0),
    Weights(w_sup=3.0, w_use=0.0),
    Weights(w_rel=0.0, w_sup=0.0, w_use=5.0, w_seq=0.0),
)


@pytest.fixture(scope="module")
def asked(talkative):
    texts = [f"Where {i}?" for i in range(12)]
    rag = make_rag(talkative)
    return rag, make_questions(talkative.tokenizer, 3, texts)


def rows(rag, questions, **changes):
    return [a.to_row() for a in rag.answer(questions, max_depth=1, **changes)]


def margin(row):
    """How far the best two branches are apart."""
    scores = sorted(n["score"] for n in row["tree"])
    return scores[-1] - scores[-2] if len(scores) > 1 else 1.0


def assert_same(again, searched, weights):
    """Up to the rows' rounding."""
    total = weights.w_rel + weights.w_sup + weights.w_use + weights.w_seq
    assert again["score"] == pytest.approx(searched["score"], abs=2 * ROUNDING * total + ROUNDING)
    for name in SAME[:-1] if margin(searched) > 0.01 else ():
        mine, other = again[name], searched[name]
        if name == "segments":
            mine, other = ([s | {"score": 0} for s in side] for side in (mine, other))
        if name in ("segments", "passages"):  # scores of retrieval are not in a tree
            mine, other = (str(side).replace(", 'score': None", "") for side in (mine, other))
        assert mine == other, name


def test_answers_scored_again_are_those_of_a_search(asked):
    rag, questions = asked
    first = rows(rag, questions, mode="always_retrieve", w_rel=0.3)
    changed = 0
    for weights in WEIGHTS:
        searched = rows(rag, questions, mode="always_retrieve", **vars(weights))
        for before, now in zip(first, searched, strict=True):
            assert_same(rescored(before, weights), now, weights)
            changed += before["answer"] != now["answer"]
    assert changed  # the weights matter


def test_notices_are_those_of_the_segment_that_is_chosen_again():
    """A notice on a citation goes with it; the other notices stay."""
    common = dict(
        parent=-1, action="retrieve", p_retrieve=0.9, retrieve=[0.1, 0.9, 0.0], text="He plays.",
        allowed=True, isrel=[0.1, 0.9], isuse=[0.0, 0.0, 0.0, 0.0, 1.0],
    )  # fmt: skip
    tree = [
        common
        | dict(id=i, passage=dict(id=title, title=title, text="He plays."))
        | dict(p_segment=p_segment, issup=[issup, 1 - issup, 0.0])
        for i, (title, p_segment, issup) in enumerate(
            [("Marvin Tellgate", 0.9, 0.6), ("Marvin Tellock", 0.1, 0.9)]
        )
    ]
    row = dict(id="0", question="Who is Marvin Tellock?", tree=tree, citations=[])
    other = rescored(row | {"notices": ["cut"]}, Weights(w_sup=0.0))
    text = '"Marvin Tellgate" does not mention Marvin Tellock'
    assert other["notices"] == ["cut", f"[1] {text}"] and other["citations"][0]["notice"] == text
    same = rescored(other, Weights(w_seq=0.0))
    assert same["notices"] == ["cut"] and same["citations"][0]["notice"] == ""
    assert rescored(same, Weights(w_sup=0.0)) == other


def test_a_guess_and_a_cut_passage_go_with_their_segment():
    common = dict(
        parent=-1, action="retrieve", p_retrieve=0.9, retrieve=[0.1, 0.9, 0.0], text="He plays.",
        allowed=True, isrel=[0.1, 0.9], isuse=[0.0, 0.0, 0.0, 0.0, 1.0], chosen=False,
    )  # fmt: skip
    tree = [
        common
        | dict(id=i, passage=dict(id=f"p{i}", title="", text="He plays."))
        | dict(p_segment=p_segment, issup=[issup, 0.0, 1 - issup])
        | ({"notices": [cut]} if (cut := "passage p0 was cut") and i == 0 else {})
        for i, (p_segment, issup) in enumerate([(0.9, 0.1), (0.1, 0.9)])
    ]
    row = dict(id="0", question="what?", tree=tree, citations=[], notices=["of the question"])
    guess = rescored(row, Weights(w_sup=0.0))
    unsupported = "no passage that was found supports this answer: take it as a guess"
    assert guess["notices"] == ["of the question", "passage p0 was cut", unsupported]
    assert rescored(guess, Weights(w_seq=0.0))["notices"] == ["of the question"]


def test_the_passages_of_a_question_with_options_vote_again(asked):
    """Two weak branches of one option beat a strong one of the other, as in PaperSearch.elect."""
    row = rows(*asked, mode="always_retrieve")[0]
    scored = zip(row["tree"], ("True.", "false", "false"), (0.9, 0.5, 0.5), strict=True)
    tree = [n | {"text": text, "p_segment": p} for n, text, p in scored]
    only_sequence = Weights(w_rel=0.0, w_sup=0.0, w_use=0.0)
    again = rescored(row | {"tree": tree}, only_sequence, ("True", "False"))
    assert again["answer"] == "false" and again["score"] == 0.5
    assert [n["chosen"] for n in again["tree"]] == [False, True, False]
    assert rescored(row | {"tree": tree}, only_sequence)["answer"] == "True."


def test_a_threshold_chooses_between_always_and_never(asked):
    rag, questions = asked
    always, never = (rows(rag, questions, mode=m) for m in ("always_retrieve", "no_retrieval"))
    p = sorted(row["p_retrieve"] for row in always)
    retrieved = []
    for threshold in (0.0, float(np.mean(p[5:7])), 1.0):
        adaptive = rows(rag, questions, mode="adaptive_retrieval", threshold=threshold)
        mine = [at_threshold(a, n, threshold) for a, n in zip(always, never, strict=True)]
        assert [r["retrieved"] for r in mine] == [r["retrieved"] for r in adaptive]
        assert [r["answer"] for r in mine] == [r["answer"] for r in adaptive]
        retrieved.append(sum(r["retrieved"] for r in mine))
    assert retrieved[0] == 12 > retrieved[1] > retrieved[2] == 0
    with pytest.raises(UserError, match="are not of one question"):
        at_threshold(always[0], never[1], 0.5)


def test_what_cannot_be_scored_again_is_refused(asked):
    rag, questions = asked
    [long] = [a.to_row() for a in rag.answer([replace(questions[0])], mode="always_retrieve")]
    with pytest.raises(UserError, match="has several segments; only answers of --max_depth=1"):
        rescored(long, Weights())
    with pytest.raises(UserError, match="holds no tree"):
        rescored(long | {"tree": []}, Weights())
