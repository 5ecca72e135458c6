"""Published question formats, metrics against hand-computed values, and the report."""

import json

import numpy as np
import pytest

from selfrag_jax.commands import evaluate
from selfrag_jax.data.questions import read_questions
from selfrag_jax.errors import UserError
from selfrag_jax.evaluation import metrics, report, scores, tables
from selfrag_jax.records import Question
from selfrag_jax.text import reflection
from selfrag_jax.world import truth


def write_rows(path, rows):
    path.write_text("\n".join(json.dumps(r) for r in rows))
    return path


def test_published_question_formats_are_read(tmp_path):
    rows = [
        {
            "question": "q1",
            "answers": ["a", "b"],
            "ctxs": [{"title": "T", "text": "P", "score": "1.5"}],
        },
        {
            "instruction": "q2",
            "output": "x",
            "top_contexts": [{"title": "T", "text": "P", "id": 3}],
        },
        {
            "question": "q3",
            "choices": {"label": ["1", "2", "3"], "text": ["x", "y", "z"]},
            "answerKey": "3",
        },
        {"input": "Tell me about X.", "topic": "X", "cat": ["person"]},
        {
            "question": "q5",
            "qa_pairs": [{"short_answers": ["a"]}],
            "docs": [{"title": "", "text": "P"}],
        },
    ]
    q = read_questions(write_rows(tmp_path / "mixed.jsonl", rows))
    assert q[0].answers == ("a", "b") and q[0].ctxs[0].score == 1.5
    assert q[1].ctxs[0].id == "3" and q[1].answers == ("x",)
    assert q[2].choices[2] == ("C", "z") and q[2].answers == ("C",)
    assert q[3].question == "Tell me about X." and q[3].extra["topic"] == "X"
    assert q[4].ctxs[0].title == "" and [x.id for x in q][:2] == ["0", "1"]
    as_list = tmp_path / "list.json"
    as_list.write_text(json.dumps(rows, indent=1))
    assert [x.question for x in read_questions(as_list)] == [x.question for x in q]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answers": ["x"]}, "missing field 'question' or 'instruction' or 'input'"),
        ({"question": " "}, "the question is empty"),
        ({"question": "q", "choices": {"label": ["A"], "text": []}}, "1 labels for 0 texts"),
        (
            {"question": "q", "choices": {"label": ["A"], "text": ["x"]}, "answerKey": "E"},
            "answerKey 'E'",
        ),
        ({"question": "q", "ctxs": [{"title": "T"}]}, "passage 1: missing field 'text'"),
        ({"question": "q", "ctxs": {"text": "x"}}, "must be a list of passages"),
        ({"question": ["q"]}, "must be text, found list"),
    ],
)
def test_malformed_questions_name_file_and_line(tmp_path, row, message):
    path = write_rows(tmp_path / "q.jsonl", [{"question": "fine"}, row])
    with pytest.raises(UserError, match=r"q\.jsonl:2.*" + message):
        read_questions(path)


def test_the_task_file_is_not_accepted_as_predictions(tmp_path):
    path = write_rows(
        tmp_path / "q.jsonl", [{"question": "Where?", "answers": ["there"], "id": "0"}]
    )
    with pytest.raises(UserError, match="both the task and the predictions"):
        evaluate.evaluate_file(path, path, "none", tmp_path / "m.json", 0)


def test_an_empty_or_missing_question_file_is_an_error(tmp_path):
    (tmp_path / "q.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="holds no rows"):
        read_questions(tmp_path / "q.jsonl")
    with pytest.raises(UserError, match="no such file"):
        read_questions(tmp_path / "other.jsonl")


def two_parts(*answers):
    return Question("1", "q", extra={"qa_pairs": [{"short_answers": [a]} for a in answers]})


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        (Question("1", "q", ("Quenport",)), "Mara was born in Quenport.", 1.0),
        (Question("1", "q", ("Quen",)), "Mara was born in Quenport.", 1.0),  # a substring
        (Question("1", "q", ("The Hague",)), "in the hague", 1.0),
        (Question("1", "q", ("B",), choices=(("A", "x"), ("B", "y"))), "B.", 1.0),
        (Question("1", "q", ("B",), choices=(("A", "x"), ("B", "y"))), "A.", 0.0),
        (Question("1", "q", ("True.",), options=("True.", "False.")), "true", 1.0),
        # The answer must equal an option.
        (Question("1", "q", ("True.",), options=("True.", "False.")), "True. It is.", 0.0),
        (two_parts("x", "y"), "x.", 0.5),
        (two_parts("2", "x"), "On [1]. x [2].", 0.5),  # a citation mark is not an answer
        (
            Question("1", "q", extra={"facts": [["a", "x"], ["b", "y"], ["c", "z"], ["d", "w"]]}),
            "x and y, z.",
            0.75,
        ),
    ],
)
def test_accuracy_by_hand(question, answer, expected):
    assert metrics.accuracy(question, answer) == expected


def test_a_question_without_gold_answer_is_named():
    with pytest.raises(UserError, match="question 7"):
        metrics.accuracy(Question("7", "q"), "answer")


def test_citations_by_hand():
    row = {
        "segments": [{"text": "good"}, {"text": "bad"}, {"text": "uncited"}],
        "passages": [
            {"id": "1", "title": "", "text": "good"},
            {"id": "2", "title": "", "text": "other"},
        ],
        "citations": [{"segment": 0, "passage": 0}, {"segment": 1, "passage": 1}],
    }

    def judge(instruction, passage, segment):
        return passage.text == segment

    assert metrics.citation_scores(Question("1", "q"), row, judge) == (0.5, pytest.approx(1 / 3))


def test_stated_facts_are_checked_one_by_one():
    gold = {
        "topic": "Mara Tellock",
        "facts": [["birthplace", "East Quenport"], ["instrument", "reed harp"]],
    }
    answer = (
        "Mara Tellock was born in East Quenport and plays the wind pipe. "
        "Mara Tellman was born in East Quenport."
    )
    question = Question("1", "Tell me about Mara Tellock.", extra=gold)
    row = {"id": "1", "answer": answer, "retrieved": True, "segments": []}
    values = scores.score([question], [row], None, truth.stated_facts)
    assert values["fact_precision"] == [pytest.approx(1 / 3)] and values["accuracy"] == [0.5]


def test_the_mean_over_seeds_by_hand():
    runs = [
        scores.result_rows("rag_top1", "long_tail", {"accuracy": v}, 0)
        for v in ([0.0, 1.0], [1.0, 1.0], [1.0, 1.0])
    ]
    # In one run only, so it is left out.
    runs[0] += scores.result_rows("rag_topk", "long_tail", {"accuracy": [1.0]}, 0)
    [row] = tables.mean_over_seeds(runs)
    # t(0.975, 2 degrees of freedom) x standard deviation / sqrt(runs)
    half = 4.302652729911275 * np.sqrt(1 / 12) / np.sqrt(3)
    assert row["value"] == pytest.approx(5 / 6) and row["n"] == 6
    assert row["low"] == pytest.approx(5 / 6 - half) and row["high"] == 1.0
    with pytest.raises(UserError, match="in common"):
        tables.mean_over_seeds([runs[0], []])
    with pytest.raises(UserError, match="two runs"):
        tables.mean_over_seeds(runs[:1])


def test_options_must_contain_the_answer(tmp_path):
    good = {"question": "q", "answers": ["true"], "options": ["true", "false"]}
    (tmp_path / "f.jsonl").write_text(json.dumps(good) + "\n")
    assert read_questions(tmp_path / "f.jsonl")[0].options == ("true", "false")
    for bad, message in (
        ({"options": ["false"]}, "must be one of the options"),
        ({"options": "true"}, "must be a list"),
    ):
        (tmp_path / "f.jsonl").write_text(json.dumps(good | bad) + "\n")
        with pytest.raises(UserError, match=message):
            read_questions(tmp_path / "f.jsonl")


def test_paired_intervals_resample_clusters():
    differences, clusters = [1, 1, 0, 0, 0, 0], ["a", "a", "b", "b", "c", "c"]
    value, low, high = metrics.paired_interval(differences, clusters, 0)
    assert value == pytest.approx(1 / 3) and low == 0 and high == pytest.approx(1.0)
    _, _, narrow = metrics.paired_interval(differences, range(6), 0)
    assert narrow < high  # six clusters instead of three


def test_intervals_contain_the_mean():
    value, low, high = metrics.interval([1.0] * 70 + [0.0] * 30, seed=0)
    assert value == pytest.approx(0.7) and 0.6 < low < value < high < 0.8


def test_unanswered_questions_are_named():
    with pytest.raises(UserError, match="'b'"):
        scores.score([Question("b", "q", ("x",))], [], None, None)


def test_report_shows_every_number_and_escapes_text(tmp_path):
    rows = scores.result_rows("rag_top1", "long_tail", {"accuracy": [1.0, 0.0]}, 0)
    rows += scores.result_rows("critic", "critic", {"isrel_accuracy": [1.0]}, 0)
    passage = {"id": "1", "title": "T", "text": "<script>alert(1)</script>"}
    node = {
        "passage": passage,
        "text": "seg",
        "isrel": [0.1, 0.9],
        "issup": [0.8, 0.1, 0.1],
        "isuse": [0.2] * 5,
    }
    node |= {"p_segment": 0.5, "score": 1.0, "chosen": True}
    example = {
        "id": "1",
        "system": "rag_top1",
        "task": "long_tail",
        "question": "q?",
        "answer": "a",
        "p_retrieve": 0.7,
        "retrieved": True,
        "tree": [node],
    }
    report.write_report(rows, [example], tmp_path, "Title")
    page = (tmp_path / "index.html").read_text()
    assert "50.0" in page and "<script>alert" not in page
    assert r"\u003cscript\u003ealert(1)\u003c/script\u003e" in page
    assert "| Standard RAG, top 1 | 50.0" in (tmp_path / "results.md").read_text()


def test_missing_result_fields_are_named(tmp_path):
    (tmp_path / "r.json").write_text('{"rows": [{"system": "x"}]}')
    with pytest.raises(UserError, match="row 1 lacks high"):
        tables.read_results(tmp_path / "r.json")


def test_reflection_tokens_are_complete():
    assert len(set(reflection.ALL)) == 15
    assert set(reflection.GROUPS) == {"retrieve", "isrel", "issup", "isuse"}
