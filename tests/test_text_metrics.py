"""Matching, options and comparisons: published cases, and a plain second implementation."""

import json
import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfrag_jax import cli
from selfrag_jax.commands import evaluate
from selfrag_jax.errors import UserError
from selfrag_jax.evaluation import comparison, metrics, scores
from selfrag_jax.evaluation import text_metrics as tm
from selfrag_jax.records import Question

ARC = Question("1", "q", ("B",), choices=(("A", "wood"), ("B", "iron"), ("C", "vitamin A")))
DIGITS = Question("1", "q", ("2",), choices=(("1", "wood"), ("2", "iron"), ("3", "3 metres")))
CLAIM = Question("1", "q", ("false",), options=("true", "false"))


# ---- free text ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("gold", "answer", "match", "word_match"),
    [
        ("Quen", "Mara was born in Quenport.", 1, 0),
        ("北京", "中国的首都是北京。", 1, 0),
        ("Tokyo", "It is Tokyo's old port.", 1, 0),
        ("otter", "It keeps otters.", 1, 0),
        ("The Hague", "in the hague", 1, 1),
        ("Paris", "London", 0, 0),
        ("The The", "a band named The The", 1, 1),  # nothing is left of it once normalised
        ("The The", "the band", 0, 0),
        ("+", "a + b", 1, 1),
        ("", "anything", 0, 0),
        (" ", "any thing", 0, 0),
    ],
)
def test_match_and_word_match(gold, answer, match, word_match):
    assert (tm.match(answer, [gold]), tm.word_match(answer, [gold])) == (match, word_match)


def test_released_match_counts_case_and_punctuation():
    assert tm.released_match("It is Paris.", ["Paris"]) == 1
    assert tm.released_match("It is paris.", ["Paris"]) == 0
    assert tm.match("It is paris.", ["Paris"]) == 1


@pytest.mark.parametrize(
    ("answer", "gold", "exact", "f1"),
    [
        ("The map finder.", ["map finder"], 1, 1.0),
        ("a map", ["map finder"], 0, 2 / 3),
        ("map map", ["map finder", "x"], 0, 0.5),
        ("", ["x"], 0, 0.0),
        ("x", [], 0, 0.0),
    ],
)
def test_exact_match_and_f1_by_hand(answer, gold, exact, f1):
    assert tm.exact_match(answer, gold) == exact and tm.f1(answer, gold) == pytest.approx(f1)


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=20), st.lists(st.text(max_size=6), max_size=3))
def test_stricter_metrics_are_never_higher(answer, gold):
    values = [m(answer, gold) for m in (tm.exact_match, tm.word_match, tm.match)]
    assert values == sorted(values) and 0 <= tm.f1(answer, gold) <= 1


# ---- options ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        *((ARC, text, 1) for text in ("B", "B.", "(B)", "b", "B\niron", "B, iron", "B: iron")),
        *((ARC, text, 1) for text in ("The answer is B.", "**B**", "B, not vitamin A", "B. B.")),
        *((ARC, text, 0) for text in ("A or B", "A, B", "A", "iron", "", "Be", "B2", "ABC", "D")),
        (Question("1", "q", ("C",), choices=ARC.choices), "C, vitamin A", 1),
        *((DIGITS, text, 1) for text in ("2", "B", "2. iron", "2 (B)", "B, not 3 metres")),
        *((DIGITS, text, 0) for text in ("1", "A", "2 or 3", "B and C", "12")),
        *((CLAIM, text, 1) for text in ("REFUTES", "false", "False.", "It REFUTES it.")),
        *((CLAIM, text, 0) for text in ("SUPPORTS", "true", "SUPPORTS REFUTES", "", "not false")),
        (Question("1", "q", ("true",), options=("true", "false")), "SUPPORTS", 1),
        (Question("1", "q", ("SUPPORTS",), options=("SUPPORTS", "REFUTES")), "true", 1),
    ],
)
def test_options_as_published(question, answer, expected):
    assert tm.option_accuracy(question, answer) == expected
    assert metrics.accuracy(question, answer) == expected


def plain_label(labels, answer):
    """Which label the answer names: its words that are labels, if they are one and the same."""
    digits = labels[0] == "1"
    words = re.sub(r"[^0-9A-Za-z]", " ", answer).split()
    if len(words) == 1:
        words = [words[0].upper()]
    named = set()
    for word in words:
        if digits and word in list("ABCDE")[: len(labels)]:
            word = "12345"["ABCDE".index(word)]
        if word in labels:
            named.add(word)
    return named.pop() if len(named) == 1 else None


def test_options_equal_a_plain_second_implementation():
    rng, named = random.Random(0), 0
    pieces = ["A", "B", "C", "D", "E", "1", "2", "3", "4", "iron", "b", "is", "AB", "12", "The"]
    gaps = [" ", ", ", ". ", "\n", "** ", " (", ") ", ": ", ""]
    for _ in range(500):
        labels = list(rng.choice(["ABCD", "1234", "ABC", "12345"]))
        question = Question("1", "q", (labels[1],), choices=tuple((x, f"text{x}") for x in labels))
        answer = "".join(rng.choice(pieces) + rng.choice(gaps) for _ in range(rng.randint(0, 4)))
        expected = plain_label(labels, answer)
        assert tm.chosen_label(question, answer) == expected, (labels, answer)
        assert tm.option_accuracy(question, answer) == (expected == labels[1])
        named += expected is not None
    assert 100 < named < 400


# ---- scores of a file ---------------------------------------------------------------------------
def prediction(i, answer="x", **fields):
    row = {"id": str(i), "question": f"q{i}", "answer": answer, "retrieved": True, "segments": []}
    return row | {"citations": [], "passages": []} | fields


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_scores_and_metrics_are_written(tmp_path, capsys):
    task = write_rows(
        tmp_path / "t.jsonl",
        [{"id": "0", "question": "q0", "answers": ["x"]}, {"id": "1", "question": "q1"}],
    )
    said = {"isrel": {"[Irrelevant]": 0.25, "[Relevant]": 0.75}, "text": "x"}
    # An id may be that of a page: what was read is told apart by its text.
    read = [{"id": i, "text": t} for i, t in (("a", "x"), ("b", "x"), ("a", "x"), ("b", "y"))]
    tree = [{"passage": p} for p in [*read, None]]
    counted = {"num_tokens": 12, "num_answer_tokens": 3}
    rows = [prediction(0, segments=[said], tree=tree, **counted), prediction(1, error="x")]
    answers = write_rows(tmp_path / "a.jsonl", rows)
    assert cli.main(["evaluate", f"--task={task}", f"--predictions={answers}"]) == 0
    assert "1 of 2 questions have no gold answer" in capsys.readouterr().err
    first, second = map(json.loads, (tmp_path / "a.scores.jsonl").read_text().splitlines())
    assert first["gold"] == ["x"] and first["metrics"]["num_passages"] == 3
    assert first["metrics"]["num_tokens"] == 12 and first["metrics"]["num_answer_tokens"] == 3
    assert first["metrics"]["mean_isrel"] == 0.75 and first["metrics"]["accuracy"] == 1
    assert second["metrics"] == {"retrieval_rate": 1.0}
    written = json.loads((tmp_path / "a.metrics.json").read_text())
    by_name = {row["metric"]: row for row in written["rows"]}
    assert written["seed"] == 0 and "judge" not in written
    assert (by_name["accuracy"]["n"], by_name["retrieval_rate"]["n"]) == (1, 2)


def test_without_any_gold_the_rest_is_computed():
    questions = [Question("0", "q0", extra={"topic": "T", "qa_pairs": None})]
    assert "no question has a gold answer" in scores.gold_notice(questions)
    [row] = scores.score_questions(questions, [prediction(0)])
    assert row["metrics"] == {"retrieval_rate": 1.0} and row["gold"] == []


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no answers"),
        ([prediction(0, score=float("nan"))], r"a\.jsonl:1: field 'score' is nan"),
        ([prediction(0), prediction(0)], r"a\.jsonl:2: id '0' occurs more than once"),
        ([prediction(7)], r"a\.jsonl: id '7' is not in the question file \(1 of 1 answers\)"),
        ([prediction(0), prediction(7)], r"id '7' is not in the question file \(1 of 2 answers\)"),
        ([prediction(0, question="Who?")], "'q0' in the question file and 'Who\\?' in the answers"),
        ([prediction(0, question="Please: q0")], "'Please: q0' in the answers"),
        ([prediction(0, answer=None)], "field 'answer' must be text"),
        ([{"id": "0"}], "missing field 'answer'"),
        ([prediction(0, passages=["x"])], "'passages' must be a list of objects"),
        ([prediction(0, passages=[{"title": "x"}])], "passage 1: missing field 'text'"),
        ([prediction(0, citations=[{"segment": 0, "passage": 0}])], "segment 0 must be one of its"),
    ],
)
def test_bad_predictions_are_named(tmp_path, rows, message):
    task = write_rows(tmp_path / "t.jsonl", [{"id": "0", "question": "q0", "answers": ["x"]}])
    answers, out = write_rows(tmp_path / "a.jsonl", rows), tmp_path / "metrics.json"
    with pytest.raises(UserError, match=message):
        evaluate.evaluate_file(task, answers, "none", out, 0)
    assert not out.exists()


def test_a_metric_that_is_no_number_is_refused():
    row = prediction(0, num_tokens=float("nan"))
    with pytest.raises(UserError, match="question 0: num_tokens is nan"):
        scores.score_questions([Question("0", "q0", ("x",))], [row])


# ---- comparisons --------------------------------------------------------------------------------
def run_of(values, name="accuracy"):
    return [
        {"id": str(i), "question": f"q{i}", "metrics": {name: float(v)}}
        for i, v in enumerate(values)
    ]


def test_a_comparison_by_hand():
    [d] = comparison.compare(run_of([1, 1, 0, 1]), run_of([0, 1, 0, 0])[::-1], 0)
    assert (d.first, d.second, d.value, d.n) == (0.75, 0.25, 0.5, 4)
    assert (d.only_first, d.only_second) == (("0", "3"), ())
    assert d.p == 0.5 and d.low <= d.value <= d.high  # ++ and -- of the four signs


@pytest.mark.parametrize("n", [5, 40])
def test_p_values_of_sign_flips(n):
    assert comparison.sign_flip_p(np.zeros(n), 0) == 1
    alike = np.array([1.0, -1.0] * n)
    assert comparison.sign_flip_p(alike, 0) == pytest.approx(1, abs=1e-3)
    p = comparison.sign_flip_p(np.ones(n), 0)
    assert p == pytest.approx(max(2 / 2**n, 1 / 10_001))


def test_drawn_and_enumerated_p_values_agree(monkeypatch):
    d = np.random.default_rng(1).normal(0.1, 1, 12)
    exact = comparison.sign_flip_p(d, 0)
    monkeypatch.setattr(comparison, "MAX_EXACT", 0)
    assert comparison.sign_flip_p(d, 0) == pytest.approx(exact, abs=0.02)
    assert 0.01 < exact < 0.9


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (run_of([1, 0, 1]), "1 of 3 ids are in the second only, e.g. '2'"),
        (run_of([1]), "1 of 2 ids are in the first only, e.g. '1'"),
        ([run_of([1, 0])[0], {"id": "1", "question": "Who?", "metrics": {}}], "id '1' asks 'q1'"),
        (run_of([1, 0], "f1"), "no metric in common"),
        (run_of([1, float("nan")]), "accuracy is not a number"),
        (run_of([1, 0]) + run_of([1]), "3 rows and only 2 ids"),
    ],
)
def test_runs_that_cannot_be_compared(other, message):
    with pytest.raises(UserError, match=message):
        comparison.compare(run_of([1, 0]), other, 0)


def test_the_compare_command(tmp_path, capsys):
    task = write_rows(
        tmp_path / "t.jsonl",
        [{"id": str(i), "question": f"q{i}", "answers": ["x"]} for i in range(4)],
    )
    for name, answers in (("a", "xxyx"), ("b", "yxyy")):
        rows = [prediction(i, answer) for i, answer in enumerate(answers)]
        file = write_rows(tmp_path / f"{name}.jsonl", rows)
        evaluate.evaluate_file(task, file, "none", tmp_path / name / "metrics.json", 0)
    a, b, out = str(tmp_path / "a"), str(tmp_path / "b" / "metrics.json"), tmp_path / "d.json"
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["compare", a, b]) == 0
    of_scores = capsys.readouterr().out
    assert "accuracy: right in the first only: 0, 3" in of_scores
    assert sorted(tmp_path.rglob("*")) == before
    files = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), f"--task={task}"]
    assert cli.main(["compare", *files, f"--out={out}"]) == 0
    assert of_scores.strip() in capsys.readouterr().out
    assert json.loads(out.read_text())["differences"][0]["only_first"] == ["0", "3"]
    for arguments, message in (
        ([a], "two runs are compared, found 1"),
        ([a, a], "is both runs"),
        ([a, str(tmp_path / "none")], "no such file"),
        (files[:2], "predictions need --task"),
    ):
        assert cli.main(["compare", *arguments]) == 2
        assert message in capsys.readouterr().err
