"""Exports against a plain second reading of the judges' formats; broken files are refused."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfrag_jax import artifacts, cli
from selfrag_jax.commands.export import export_file
from selfrag_jax.errors import UserError
from selfrag_jax.evaluation import exports, metrics
from selfrag_jax.evaluation.citation_marks import marked_text, remove_marks
from selfrag_jax.evaluation.cited_answers import CitedAnswer, read_answers
from selfrag_jax.records import Passage, Question, write_jsonl


# ---- the judges' rules, written without the exports ----------------------------------------------
def plain_sentences(text):
    return re.split(r"(?<=[.!?])\s+|(?<=[.!?][\"')\]])\s+", text)


def alce_faults(data):
    """What ALCE's eval.py would stumble over or misread."""
    faults = []
    items = data["data"]
    for n, item in enumerate(items):
        missing = [f for f in ("output", "question", "docs") if f not in item]
        if missing:
            faults.append((n, missing[0]))
            continue
        if item["output"] != item["output"].strip().split("\n")[0]:
            faults.append((n, "more than a line"))
        for i, sentence in enumerate(plain_sentences(item["output"])):
            numbers = [int(m) for m in re.findall(r"\[(\d+)", sentence)]
            if len(numbers) > 3:
                faults.append((n, "more than three marks"))
            if any(not 1 <= k <= len(item["docs"]) for k in numbers):
                faults.append((n, "no such document"))
            if i and re.match(r"\[\d", sentence):
                faults.append((n, "mark after the full stop"))
            if re.search(r"[.!?][\"')\]]*\[\d", sentence):
                faults.append((n, "mark after the full stop"))
        if not all({"title", "text"} <= set(d) for d in item["docs"]):
            faults.append((n, "docs"))
        if "annotations" in item and len(item["annotations"]) < 2:
            faults.append((n, "annotations"))
        if "qa_pairs" in item and not all(p["short_answers"] for p in item["qa_pairs"]):
            faults.append((n, "qa_pairs"))
    for field in ("qa_pairs", "claims", "answers"):
        if len({field in item for item in items}) > 1:
            faults.append((None, field))
    return faults


def without_alce_marks(sentence):
    """ALCE's remove_citations."""
    return re.sub(r"\[\d+", "", re.sub(r" \[\d+", "", sentence)).replace(" |", "").replace("]", "")


# ---- marks in sentences --------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It is old.", "It is old [1]."),
        ("It is old", "It is old [1]"),
        ("He met Dr. Ann Smith. She left!", "He met Dr. Ann Smith [1]. She left [1]!"),
        ("J. R. Tolkien wrote it.", "J. R. Tolkien wrote it [1]."),
        ('He said "Stop!" Then he went.', 'He said "Stop [1]!" Then he went [1].'),
        ('He said "Stop!".', 'He said "Stop [1]!".'),
        ("She left (see p. 4).", "She left (see p. 4) [1]."),
        ("(So he said.) It is.", "(So he said [1].) It is [1]."),
        ("It is 5%. And so on ...", "It is 5% [1]. And so on [1] ..."),
        ("One line\n\nAnother\u2028line.", "One line Another line [1]."),
        ("Old [3]. New [1][2] port.[4, 5-7]", "Old [1]. New port [1]."),
        ("In [2015], [3rd time], [[1]2], [7", "In (2015), (3rd time), (2), (7 [1]"),
        ("In Bonn (D.C.) Ann left.", "In Bonn (D.C.) Ann left [1]."),
        ("...", "..."),
        ("", ""),
    ],
)
def test_a_mark_stands_before_the_punctuation_that_ends_its_sentence(text, expected):
    assert marked_text(text, [text], [[1]]) == expected


@pytest.mark.parametrize(
    ("answer", "segments", "cited", "expected"),
    [
        ("A is. B is.", ["A is.", "B is."], [[1], [2]], "A is [1]. B is [2]."),
        ("A is. B is.", ["A is.", "B is."], [[], [2]], "A is. B is [2]."),
        # Segments that are no sentences share one.
        (
            "It is in the north.",
            ["It is in", "the north."],
            [[2], [1]],
            "It is in the north [2][1].",
        ),
        ("a b c d", ["a", "b", "c", "d"], [[1], [2], [3], [4]], "a b c d [1][2][3]"),
        ("A is.", ["A is."], [[1, 1, 2, 3, 4]], "A is [1][2][3]."),
        # The scripts take the last character off, and number otherwise.
        ("A is [1]. B is [4]. ", ["A is.", "B is!"], [[2], [1]], "A is [2]. B is [1]."),
        ("true", ["#true"], [[1]], "true [1]"),
        # A segment that the answer spells otherwise has what is left.
        (
            "A is. Not. D is.",
            ["A is.", "B is.", "D is."],
            [[1], [2], [3]],
            "A is [1]. Not [2]. D is [3].",
        ),
        ("An answer.", [], [], "An answer."),
    ],
)
def test_a_sentence_has_the_marks_of_its_segments(answer, segments, cited, expected):
    assert marked_text(answer, segments, cited) == expected


# ---- any answer ----------------------------------------------------------------------------------
PIECES = st.sampled_from(
    ["It is", " old", ".", "!", "?", '"', ")", "(", " ", "\n", "[0]", "[9]", "[", "12", "]", "Dr. "]
    + ["e.g.", "She", "…", "。", ". ", "U.S.", "\u2028", ",", "  [2]", "é", "٣"]
)
TEXTS = st.lists(PIECES, max_size=12).map("".join)


@st.composite
def rows_of_answers(draw):
    """Rows of `selfrag answer`, and their questions."""
    rows, questions = [], []
    for i in range(draw(st.integers(1, 3))):
        segments = draw(st.lists(TEXTS, max_size=5))
        own = [
            {"id": f"p{j}", "title": "", "text": f"t{j}"} for j in range(draw(st.integers(0, 3)))
        ]
        other = [{"id": f"q{j}", "title": "T", "text": "t"} for j in range(draw(st.integers(0, 2)))]
        pairs = [(s, p) for s in range(len(segments)) for p in range(len(own))]
        chosen = draw(st.lists(st.sampled_from(pairs), max_size=8)) if pairs else []
        rows.append(
            {
                "id": str(i),
                "question": "q?",
                "answer": " ".join(t for t in segments if t),
                "segments": [{"text": t, "passage": None} for t in segments],
                "citations": [{"segment": s, "passage": p, "support": ""} for s, p in chosen],
                "passages": own,
                "tree": [{"passage": p} for p in [*other, None, *own]],
                "error": draw(st.sampled_from(["", "", "ValueError: x"])),
            }
        )
        extra = {"topic": "T", "qa_pairs": [{"question": "a", "short_answers": ["x"]}]}
        extra["annotations"] = [{"long_answer": "x"}] * draw(st.integers(0, 3))
        questions.append(Question(str(i), "q?", ("gold",), extra=extra))
    return rows, questions


@settings(max_examples=40, deadline=None)
@given(rows_of_answers())
def test_exports_satisfy_the_judges(tmp_path_factory, made):
    rows, questions = made
    folder = tmp_path_factory.mktemp("exports")
    write_jsonl(folder / "answers.jsonl", rows)
    answers = read_answers(folder / "answers.jsonl", questions)
    for name, kind in exports.FORMATS.items():
        kind.write(folder / name, kind.rows(answers))
        assert kind.check(folder / name) == len(rows)
    alce = json.loads((folder / "alce").read_text())
    assert alce_faults(alce) == []
    for a, item, row in zip(answers, alce["data"], rows, strict=True):
        # Marks are all that is added, and each names a document that its answer cites.
        texts = without_alce_marks(item["output"]), remove_marks(a.text).replace("]", "")
        assert len({"".join(t.split()) for t in texts}) == 1
        cited = {c["passage"] + 1 for c in row["citations"]}
        assert {int(n) for n in re.findall(r"\[(\d+)", item["output"])} <= cited
        assert [d["text"] for d in item["docs"]][: len(row["passages"])] == [
            p["text"] for p in row["passages"]
        ]
    for row, line in zip(rows, (folder / "factscore").read_text().strip().split("\n"), strict=True):
        assert not re.search(r"\[\d", json.loads(line)["output"])
        assert not row["error"] or json.loads(line)["output"] == ""


# ---- the rows by hand ----------------------------------------------------------------------------
CITED = Passage("7", "Port", "It is old.")
OTHER = Passage("3", "Inn", "It is new.")


def cited_answer(text="It is old.", **question):
    question = {"id": "a", "question": "How old?", "answers": ("very",)} | question
    return CitedAnswer(
        "answers.jsonl:1",
        Question(**question),
        text,
        (text,),
        ((0,),),
        (CITED, OTHER),
        (OTHER, CITED),
    )


def test_an_alce_item_takes_over_the_references():
    extra = {
        "annotations": [{"long_answer": "x"}, {"long_answer": "y"}],
        "qa_pairs": [{"question": "p", "short_answers": ["x"]}],
        "claims": ["c"],
        "answer_groups": [["x", "X"]],
    }
    item = exports.alce_item(cited_answer(extra=extra))
    assert item["output"] == "It is old [1]." and item["question"] == "How old?"
    assert item["docs"] == [
        {"title": "Port", "text": "It is old."},
        {"title": "Inn", "text": "It is new."},
    ]
    assert item["answer"] == "very" and item["answers"] == [["x", "X"]]
    assert all(item[name] == extra[name] for name in ("annotations", "qa_pairs", "claims"))


def test_a_single_annotation_becomes_the_answer():
    cited = cited_answer(extra={"annotations": [{"long_answer": "long"}], "qa_pairs": [{}]})
    item = exports.alce_item(cited)
    assert item["answer"] == "long" and "annotations" not in item
    assert metrics.long_answer(cited.question) == "long"  # MAUVE compares with the same text


def test_kilt_and_ragchecker_rows():
    assert exports.kilt_row(cited_answer("Old [2].\nYes.")) == {
        "id": "a",
        "output": [
            {
                "answer": "Old. Yes.",
                "provenance": [{"wikipedia_id": "7"}, {"wikipedia_id": "3"}],
            }
        ],
    }
    assert exports.ragchecker_row(cited_answer()) == {
        "query_id": "a",
        "query": "How old?",
        "gt_answer": "very",
        "response": "It is old.",
        "retrieved_context": [
            {"doc_id": "3", "text": "It is new."},
            {"doc_id": "7", "text": "It is old."},
        ],
    }


@pytest.mark.parametrize(
    ("question", "gold"),
    [
        ({"answers": ("B",), "choices": (("A", "tin"), ("B", "iron"))}, "iron"),
        ({"answers": (), "extra": {"annotations": [{"long_answer": "x y"}]}}, "x y"),
        (
            {"answers": (), "extra": {"qa_pairs": [{"short_answers": [v, "z"]} for v in "xy"]}},
            "x; y",
        ),
        ({"answers": ("x", "X", "y"), "extra": {"answer_groups": [["x", "X"], ["y"]]}}, "x, y"),
        ({"answers": (), "extra": {"claims": ["X is.", "Y is."]}}, "X is. Y is."),
    ],
)
def test_the_gold_answer_is_one_text(question, gold):
    assert exports.ragchecker_row(cited_answer(**question))["gt_answer"] == gold


# ---- broken files --------------------------------------------------------------------------------
def good_item():
    return {
        "question": "q",
        "output": "It is [1].",
        "answer": "x",
        "annotations": [{"long_answer": "x"}, {"long_answer": "y"}],
        "qa_pairs": [{"question": "p", "short_answers": ["x"]}],
        "docs": [{"title": "", "text": "t"}],
    }


@pytest.mark.parametrize(
    ("change", "message", "seen_by_both"),
    [
        ({"output": "It is [0]."}, r"mark \[0\]; its docs are \[1\] to \[1\]", True),
        ({"output": "It is [2]."}, r"mark \[2\]", True),
        ({"output": "It is [" + "9" * 4400}, r"mark \[999999999…\]", False),
        ({"output": "It is. [1]"}, r"mark \[1\] after a full stop", True),
        ({"output": 'It "is."[1]'}, "after a full stop", True),
        ({"output": "It is.\nSo."}, "must be one line", True),
        ({"output": "It is [1][1][1][1]."}, "more than 3 marks in 'It is", True),
        ({"output": None}, "'output' is NoneType", False),
        ({"question": " "}, "'question' is empty", False),
        ({"annotations": [{"long_answer": "x"}]}, "'annotations' must hold at least 2", True),
        ({"annotations": [{}, {}]}, "annotations 1: missing field 'long_answer'", False),
        ({"qa_pairs": []}, "'qa_pairs' must be a list with something", False),
        ({"qa_pairs": [{"short_answers": []}]}, "qa_pairs 1: field 'short_answers'", True),
        ({"claims": ["x", 3]}, "'claims' must be a list of texts", True),
        ({"answers": ["x"]}, "'answers 1' must be a list", True),
        ({"docs": [{"title": "x"}]}, "docs 1: missing field 'text'", True),
        ({"docs": {}}, "'docs' must be a list", False),
        ({"extra": {"score": float("nan")}}, r"'extra.score' is nan", False),
    ],
)
def test_a_broken_alce_file_is_refused(tmp_path, change, message, seen_by_both):
    file = tmp_path / "alce.json"
    data = {"data": [good_item(), good_item() | change]}
    file.write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"alce\.json: data 2.*" + message):
        exports.check_alce(file)
    assert not seen_by_both or alce_faults(data)


@pytest.mark.parametrize("field", ["output", "question", "docs"])
def test_an_alce_item_without_a_field_is_refused(tmp_path, field):
    broken = {k: v for k, v in good_item().items() if k != field}
    (tmp_path / "a.json").write_text(json.dumps({"data": [good_item(), broken]}))
    with pytest.raises(UserError, match=f"data 2: missing field '{field}'"):
        exports.check_alce(tmp_path / "a.json")
    assert alce_faults({"data": [good_item(), broken]})


def test_references_of_some_alce_items_only_are_refused(tmp_path):
    broken = {k: v for k, v in good_item().items() if k != "qa_pairs"}
    (tmp_path / "a.json").write_text(json.dumps({"data": [good_item(), broken]}))
    with pytest.raises(UserError, match="data 2: missing field 'qa_pairs', which other items have"):
        exports.check_alce(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("judge", "content", "message"),
    [
        ("alce", "", "not valid JSON"),
        ("alce", "[]", "must be a JSON object with the list 'data'"),
        ("alce", '{"data": []}', "holds no rows"),
        ("alce", "[" * 100_000, "nested too deeply"),
        ("kilt", "[" * 100_000, ":1: nested too deeply"),
        ("alce", '{"data": [3]}', "data 1: must be an object"),
        ("factscore", "", "holds no rows"),
        ("factscore", '[{"topic": "T", "output": ""}]', ":1: must be an object"),
        ("factscore", '{"topic": "T"}', ":1: missing field 'output'"),
        ("factscore", '{"topic": "", "output": ""}', "'topic' is empty"),
        ("factscore", '{"topic": "T", "output": " "}', "white space"),
        ("factscore", '{"topic": "T", "output": "x [1]."}', r"the citation mark \[1\]"),
        ("factscore", '{"topic": "T", "output": ""}\n\n', ":2: not a line of JSON"),
        ("kilt", '{"id": "1", "output": []}', "must hold one answer, found 0"),
        ("kilt", '{"id": 1, "output": []}', "'id' is int"),
        ("kilt", '{"id": "1", "output": [{"answer": "x"}]}', "missing field 'provenance'"),
        (
            "kilt",
            '{"id": "1", "output": [{"answer": "x", "provenance": [{"wikipedia_id": ""}]}]}',
            "provenance 1: field 'wikipedia_id' is empty",
        ),
        ("kilt", '{"id": "1", "output": []}\n' * 2, "id '1' occurs more than once"),
        ("ragchecker", '{"results": [{"query_id": "1"}]}', "results 1: missing field 'query'"),
        (
            "ragchecker",
            '{"results": [{"query_id": "1", "query": "q", "gt_answer": "", "response": ""}]}',
            "'gt_answer' is empty",
        ),
    ],
)
def test_other_broken_files_are_refused(tmp_path, judge, content, message):
    (tmp_path / "f").write_text(content)
    with pytest.raises(UserError, match=message):
        exports.FORMATS[judge].check(tmp_path / "f")


# ---- the command ---------------------------------------------------------------------------------
def answer_row(**fields):
    passage = {"id": "7", "title": "Port", "text": "It is old."}
    row = {"id": "a", "question": "How old?", "answer": "It is old."}
    row |= {"segments": [{"text": "It is old.", "passage": passage}], "passages": [passage]}
    row |= {"citations": [{"segment": 0, "passage": 0, "support": "[Fully supported]"}]}
    return row | {"tree": [{"id": 0, "passage": passage}], "error": ""} | fields


@pytest.fixture
def files(tmp_path):
    def write(*rows, questions=({"id": "a", "question": "How old?", "answers": ["old"]},)):
        write_jsonl(tmp_path / "answers.jsonl", rows)
        write_jsonl(tmp_path / "task.jsonl", questions)
        return tmp_path / "answers.jsonl", tmp_path / "task.jsonl", tmp_path / "out.json"

    return write


def test_the_command_writes_checks_and_writes_again(files, capsys):
    answers, task, out = files(answer_row())
    argv = ["export", "--for=alce", f"--answers={answers}", f"--task={task}", f"--out={out}"]
    for _ in range(2):
        assert cli.main(argv) == 0
        assert json.loads(out.read_text())["data"][0]["output"] == "It is old [1]."
    assert json.loads(artifacts.manifest_path(out).read_text())["counts"]["answers"] == 1
    assert cli.main(["export", "--for=alce", f"--check={out}"]) == 0
    assert "1 rows" in capsys.readouterr().out
    out.write_text(out.read_text().replace("[1]", "[2]"))
    assert cli.main(["export", "--for=alce", f"--check={out}"]) == 2
    assert "data 1: field 'output' has the mark [2]" in capsys.readouterr().err


def test_a_failed_question_abstains(files, capsys):
    rows = [answer_row(), answer_row(id="b", answer="", error="ValueError: x")]
    questions = [{"id": i, "question": "How old?", "topic": f"T{i}"} for i in "ab"]
    answers, task, out = files(*rows, questions=questions)
    assert export_file("factscore", answers, task, out) == 2
    assert [json.loads(line) for line in out.read_text().strip().split("\n")] == [
        {"topic": "Ta", "output": "It is old."},
        {"topic": "Tb", "output": ""},
    ]
    assert "1 of 2 answers are empty" in capsys.readouterr().err


def test_what_the_judge_would_not_tell_is_noted(files, capsys):
    row = answer_row(segments=[], citations=[], passages=[], tree=[], retrieved=True)
    parts = [{"short_answers": ["x"]}]
    question = {"id": "a", "question": "How old?", "qa_pairs": parts}
    answers, task, out = files(row, questions=[question])
    export_file("alce", answers, task, out)
    (item,) = json.loads(out.read_text())["data"]
    assert item["qa_pairs"] == parts and "answer" not in item  # short answers are no long one
    notes = capsys.readouterr().err
    assert "1 of 1 answers retrieved, but their rows lack the passages" in notes
    assert "--no_rouge" in notes


@pytest.mark.parametrize("is_qampari", [True, False])
def test_a_path_that_eval_takes_for_another_task_is_noted(files, capsys, monkeypatch, is_qampari):
    answers, task, out = files(answer_row())
    out = out.with_name("alce.json" if is_qampari else "qampari.json")
    extra = {"answer_groups": [["x"]]} if is_qampari else {}
    monkeypatch.setattr(
        "selfrag_jax.commands.export.read_questions",
        lambda _: [Question("a", "How old?", ("old",), extra=extra)],
    )
    export_file("alce", answers, task, out)
    assert f"the path {'lacks' if is_qampari else 'holds'} 'qampari'" in capsys.readouterr().err


OTHER_QUESTION = {"id": "a", "question": "Who is Mara?", "answers": ["x"]}


@pytest.mark.parametrize(
    ("judge", "rows", "questions", "message"),
    [
        ("alce", [], None, "holds no answers"),
        ("alce", [{"id": "a"}], None, r":1: missing field 'answer'"),
        ("alce", [answer_row()] * 2, None, r":2: id 'a' occurs more than once"),
        ("alce", [answer_row(id="z")], None, r"answers\.jsonl: id 'z' is not in the question file"),
        ("alce", [answer_row()], [OTHER_QUESTION], "question 'a' is 'Who is Mara"),
        (
            "alce",
            [answer_row()],
            [OTHER_QUESTION] * 2,
            "occurs more than once in the question file",
        ),
        (
            "alce",
            [answer_row()],
            [{"id": i, "question": "How old?", "answers": ["x"]} for i in "ab"],
            "1 of 2 questions have no answer, e.g. id 'b'",
        ),
        ("alce", [answer_row(score=float("inf"))], None, "'score' is inf"),
        ("alce", [answer_row(citations=[{"segment": 0, "passage": 1}])], None, "passage 1 must be"),
        ("alce", [answer_row(citations=[{"segment": -1, "passage": 0}])], None, "segment -1 must"),
        ("alce", [answer_row(citations=[{"passage": 0}])], None, "citation 1: segment None must"),
        ("alce", [answer_row(passages=[{"title": "x"}])], None, "passages: passage 1: missing"),
        ("alce", [answer_row(segments=["x"])], None, "'segments' must be a list of objects"),
        ("alce", [answer_row(answer=["x"])], None, "'answer' must be text"),
        ("factscore", [answer_row()], None, "question 'a' has no field 'topic'"),
        ("ragchecker", [answer_row()], [{"id": "a", "question": "How old?"}], "has no gold answer"),
    ],
)
def test_answers_that_cannot_be_exported_are_refused(files, judge, rows, questions, message):
    answers, task, out = files(*rows, **({"questions": questions} if questions else {}))
    with pytest.raises(UserError, match=message):
        export_file(judge, answers, task, out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--for=trec"], "--for=trec: must be one of alce"),
        (["--for=alce"], "missing --answers, --out"),
        (["--for=alce", "--check=x", "--out=y"], "--out: does not go with --check"),
        (["--for=alce", "--check=none.json"], "none.json: no such file"),
        (["--for=factscore", "--answers=none", "--out=x"], "missing --task"),
        (["--for=alce", "--answers=none", "--out=x"], "none: no such file"),
        (["--for=alce", "--answers=none", "--out=x.gz"], "leave .gz out of --out"),
    ],
)
def test_wrong_flags(capsys, argv, message):
    assert cli.main(["export", *argv]) == 2
    assert message in capsys.readouterr().err


def test_a_file_of_another_stage_is_not_overwritten(files):
    answers, task, out = files(answer_row())
    out.write_text("{}")
    artifacts.write_manifest(out, "evaluate", {}, {}, {})
    with pytest.raises(UserError, match="was made by `selfrag evaluate`"):
        export_file("alce", answers, task, out)
    with pytest.raises(UserError, match="both the output and the answers"):
        export_file("alce", answers, task, answers)
