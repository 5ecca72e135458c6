"""Question files in their published layouts and formats, and what a row's input becomes."""

import csv
import gzip
import io
import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_search import make_rag

from selfrag_jax.answering.selfrag import _as_questions
from selfrag_jax.data import question_fields
from selfrag_jax.data.questions import read_questions
from selfrag_jax.errors import UserError
from selfrag_jax.evaluation import metrics
from selfrag_jax.records import Passage, Question, write_jsonl
from selfrag_jax.text import prompts
from selfrag_jax.text.tokenizer import INPUT, Control

FOUR = ("3", "4", "5", "6")
LETTERED = tuple(zip("ABCD", FOUR, strict=True))
CLAIM = {"question": "Otters fly.", "options": ("true", "false")}
SUMS = {"question": "2+2?", "choices": LETTERED, "options": tuple("ABCD"), "answers": ("B",)}
FACTSCORE = {
    "input": "Question: Tell me a bio of X.",
    "output": "X is.",
    "topic": "X",
    "cat": ["rare"],
    "annotations": [{"text": "X is.", "is-relevant": True}],
}

# name, row, the fields of its Question that are not empty
LAYOUTS = [
    (
        "PopQA of the released repository",
        {"id": 4, "question": "q", "answers": ["a", "b"], "ctxs": [{"title": "T", "text": "P"}]},
        {"id": "4", "answers": ("a", "b"), "ctxs": (Passage("0", "T", "P"),)},
    ),
    (
        "PopQA",
        {"id": "1", "question": "q", "possible_answers": '["map finder"]', "s_pop": "142"},
        {"id": "1", "answers": ("map finder",), "extra": {"popularity": 142.0}},
    ),
    (
        "facts with the decile of their popularity",
        {"question": "q", "answers": ["a"], "popularity": 7, "decile": 3, "entity": "X"},
        {"answers": ("a",), "extra": {"popularity": 7.0, "decile": 3.0}},
    ),
    ("EntityQuestions", {"question": "q", "answers": ["a"]}, {"answers": ("a",)}),
    (
        "TriviaQA",
        {
            "question_id": "tc_2",
            "question": "q",
            "answer": {
                "value": "Sunset",
                "aliases": ["Sunset", "Dusk"],
                "normalized_aliases": ["dusk"],
                "type": "WikipediaEntity",
            },
        },
        {"id": "tc_2", "answers": ("Sunset", "Dusk", "dusk")},
    ),
    (
        "TriviaQA as its authors spell it",
        {"QuestionId": "tc_3", "Question": "q", "Answer": {"Value": "x", "Aliases": ["y"]}},
        {"id": "tc_3", "answers": ("x", "y")},
    ),
    ("NQ-open", {"question": "q", "answer": ["a", "b"]}, {"answers": ("a", "b")}),
    (
        "FlashRAG",
        {"id": "test_0", "question": "q", "golden_answers": ["a"], "metadata": {}},
        {"id": "test_0", "answers": ("a",)},
    ),
    (
        "KILT",
        {
            "id": "5",
            "input": "q",
            "output": [
                {"answer": "a", "provenance": [{"wikipedia_id": "7"}]},
                {"provenance": [{"wikipedia_id": "8"}]},
                {"answer": "b"},
            ],
        },
        {"id": "5", "answers": ("a", "b")},
    ),
    ("KILT, test split", {"id": "6", "input": "q"}, {"id": "6"}),
    (
        "FEVER of KILT",
        {"id": "7", "input": "Otters fly.", "output": [{"answer": "REFUTES"}]},
        CLAIM | {"id": "7", "answers": ("false",)},
    ),
    (
        "FEVER",
        {"id": 8, "verifiable": "VERIFIABLE", "label": "SUPPORTS", "claim": "Otters fly."},
        CLAIM | {"id": "8", "answers": ("true",)},
    ),
    ("FEVER, test split", {"id": 9, "claim": "Otters fly."}, CLAIM | {"id": "9"}),
    (
        "PubHealth",
        {"claim_id": "15", "claim": "Otters fly.", "label": "false", "subjects": "Otters"},
        CLAIM | {"id": "15", "answers": ("false",)},
    ),
    (
        "PubHealth of the released repository",
        {"question": "Otters fly.", "answers": ["SUPPORTS"]},
        CLAIM | {"answers": ("true",)},
    ),
    (
        "StrategyQA",
        {"qid": "s1", "question": "q", "answer": True, "facts": ["Otters swim."]},
        {"id": "s1", "answers": ("yes", "true"), "options": ("yes", "no")},
    ),
    (
        "BoolQ",
        {"question": "q", "answer": False, "title": "T", "passage": "P"},
        {
            "answers": ("no", "false"),
            "options": ("yes", "no"),
            "ctxs": (Passage("0", "T", "P"),),
        },
    ),
    (
        "a truth value with options of its own",
        {"question": "q", "answer": False, "options": ["True.", "False."]},
        {"answers": ("False.",), "options": ("True.", "False.")},
    ),
    (
        "HotpotQA",
        {
            "_id": "5a7",
            "question": "q",
            "answer": "yes",
            "supporting_facts": [["T", 0]],
            "context": [["T", ["One.", " Two."]], ["U", ["Three."]]],
        },
        {
            "id": "5a7",
            "answers": ("yes",),
            "ctxs": (Passage("0", "T", "One. Two."), Passage("1", "U", "Three.")),
        },
    ),
    (
        "HotpotQA of Hugging Face",
        {"id": "5", "question": "q", "context": {"title": ["T"], "sentences": [["One.", "Two."]]}},
        {"id": "5", "ctxs": (Passage("0", "T", "One. Two."),)},
    ),
    (
        "2WikiMultihopQA, its context as text",
        {"_id": "2w", "question": "q", "answer": "a", "context": '[["T", ["One.", "Two."]]]'},
        {"id": "2w", "answers": ("a",), "ctxs": (Passage("0", "T", "One. Two."),)},
    ),
    (
        "MuSiQue",
        {
            "id": "2hop__1",
            "question": "q",
            "answer": "a",
            "answer_aliases": ["A."],
            "paragraphs": [{"idx": 3, "title": "T", "paragraph_text": "P"}],
        },
        {"id": "2hop__1", "answers": ("a", "A."), "ctxs": (Passage("3", "T", "P"),)},
    ),
    (
        "SQuAD of Hugging Face",
        {"id": "s", "title": "T", "context": "P", "question": "q", "answers": {"text": ["a"]}},
        {"id": "s", "answers": ("a",), "ctxs": (Passage("0", "T", "P"),)},
    ),
    (
        "ASQA of ALCE",
        {
            "sample_id": "-7",
            "question": "q",
            "qa_pairs": [{"question": "q1", "short_answers": ["a"], "context": "c"}],
            "annotations": [{"long_answer": "l", "knowledge": []}],
            "answer": "l",
            "docs": [{"id": "3", "title": "T", "text": "P", "score": 1.5}],
        },
        {
            "id": "-7",
            "answers": ("l",),
            "ctxs": (Passage("3", "T", "P", 1.5),),
            "extra": {
                "qa_pairs": [{"question": "q1", "short_answers": ["a"], "context": "c"}],
                "annotations": [{"long_answer": "l", "knowledge": []}],
            },
        },
    ),
    ("no qa_pairs", {"question": "q", "answer": "a", "qa_pairs": None}, {"answers": ("a",)}),
    (
        "ELI5 of ALCE",
        {"question": "q", "question_ctx": "", "answer": "long", "claims": ["c1", "c2"]},
        {"answers": ("long",), "extra": {"claims": ["c1", "c2"]}},
    ),
    (
        "QAMPARI of ALCE",
        {"id": "w", "question": "q", "answers": [["a", "b"], ["c"]]},
        {"id": "w", "answers": ("a", "b", "c"), "extra": {"answer_groups": [["a", "b"], ["c"]]}},
    ),
    (
        "QAMPARI",
        {
            "qid": "1__wiki",
            "question_text": "q",
            "answer_list": [
                {"answer_text": "a", "aliases": ["a", "b"], "proof": []},
                {"answer_text": "c", "aliases": []},
            ],
        },
        {
            "id": "1__wiki",
            "answers": ("a", "b", "c"),
            "extra": {"answer_groups": [["a", "b"], ["c"]]},
        },
    ),
    (
        "FActScore",
        FACTSCORE,
        {"question": "Question: Tell me a bio of X.", "extra": {"topic": "X", "cat": ["rare"]}},
    ),
    (
        "ARC",
        {
            "id": "Mercury_7",
            "question": "2+2?",
            "choices": {"label": list("ABCD"), "text": list(FOUR)},
            "answerKey": "B",
        },
        SUMS | {"id": "Mercury_7"},
    ),
    (
        "ARC with numbers",
        {
            "question": "2+2?",
            "choices": {"label": list("1234"), "text": list(FOUR)},
            "answerKey": "2",
        },
        SUMS | {"extra": {"numbered_answer": "2"}},
    ),
    (
        "ARC and OpenBookQA as their authors publish them",
        {
            "id": "7-980",
            "question": {
                "stem": "2+2?",
                "choices": [{"text": text, "label": label} for label, text in LETTERED],
            },
            "answerKey": "B",
        },
        SUMS | {"id": "7-980"},
    ),
    (
        "OpenBookQA of Hugging Face",
        {
            "question_stem": "2+2?",
            "choices": {"text": list(FOUR), "label": list("ABCD")},
            "answerKey": "B",
            "fact1": "f",
        },
        SUMS,
    ),
    ("MMLU", {"question": "2+2?", "choices": ["w", "x", "y", "z"], "answer": 1}, None),
    ("a position, not a text", {"question": "2+2?", "choices": ["1", "0", "3"], "answer": 1}, None),
    ("MMLU with a letter", {"question": "2+2?", "choices": list(FOUR), "answer": "B"}, SUMS),
    ("a choice's text", {"question": "2+2?", "choices": list(FOUR), "answer": "4"}, SUMS),
    (
        "MMLU's columns",
        {"question": "2+2?", **dict(LETTERED), "answer": "B"},
        SUMS,
    ),
    (
        "MMLU-Pro",
        {"question_id": 70, "question": "2+2?", "options": list(FOUR), "answer_index": 1},
        SUMS | {"id": "70"},
    ),
    (
        "MedQA",
        {"question": "2+2?", "options": dict(LETTERED), "answer": "4", "answer_idx": "B"},
        SUMS,
    ),
    (
        "an instruction with its input",
        {"instruction": "Translate.", "input": "ein Haus", "output": "a house"},
        {"question": "Translate.", "input": "ein Haus", "answers": ("a house",)},
    ),
    ("no answer", {"question": "北京在哪里？", "id": "é"}, {"question": "北京在哪里？", "id": "é"}),
    ("empty answers", {"question": "q", "answers": ["", None], "answer": "a"}, {"answers": ("a",)}),
]


def write_rows(path, rows):
    path.write_text("\n".join(json.dumps(r) for r in rows))
    return path


@pytest.mark.parametrize(("row", "expected"), [c[1:] for c in LAYOUTS], ids=[c[0] for c in LAYOUTS])
def test_published_layouts_are_read(tmp_path, row, expected):
    [got] = read_questions(write_rows(tmp_path / "t.jsonl", [row]))
    if expected is None:  # the second of choices without labels
        assert got.answers == ("B",) and got.options == tuple("ABCD"[: len(row["choices"])])
        assert [text for _, text in got.choices] == row["choices"]
    else:
        fields = {"question": "q"} | expected
        assert got == Question(**{"id": "0", "task": "t"} | fields)


@pytest.mark.parametrize(
    "name",
    sorted({"id", "_id", "docid", "qid", "question_id", "sample_id", *question_fields.ID}),
)
def test_ids_are_kept(tmp_path, name):
    rows = [{"question": "q", name: "é/1"}, {"question": "q", name: 7}, {"question": "q"}]
    got = read_questions(write_rows(tmp_path / "t.jsonl", rows))
    assert [q.id for q in got] == ["é/1", "7", "2"]


SAID = "field 'possible_answers' holds"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"paragraphs": [], "title": "T"},
            "missing field 'question' or 'instruction' or 'input' or 'query' or 'claim'.*"
            r"the row has: paragraphs, title",
        ),
        ({"instruction": " ", "input": "x"}, r"the question is empty \(field 'instruction'\)"),
        ({"question": {"words": "q"}}, "field 'question': missing field 'stem' or 'text'"),
        ({"question": "q", "id": ""}, "the id is empty"),
        ({"question": "q", "id": True}, "field 'id' must be text, found bool"),
        ({"question": "q", "possible_answers": '["a", "b'}, SAID),
        ({"question": "q", "possible_answers": "['a' 'b']"}, SAID),
        ({"question": "q", "possible_answers": "[print(1)]"}, SAID),
        ({"question": "q", "possible_answers": '["\\ud800"]'}, SAID),
        ({"question": "q", "possible_answers": "[" * 9999}, SAID),
        (
            {"question": "q", "answer": {"text_value": "a"}},
            "object without value or .*text_value",
        ),
        ({"question": "q", "answers": [[["a"]]]}, "must be a list of texts"),
        ({"question": "q", "label": 2}, "field 'label': 2 is a number without choices"),
        ({"claim": "c", "label": 2}, "'label': 2 means different things.*write true or false"),
        (
            {"question": "q", "answer": True, "options": ["A"]},
            "answer true is none of the options",
        ),
        ({"question": "q", "answers": ["x"], "options": ["y"]}, "must be one of the options y"),
        (
            {"question": "q", "choices": ["x", "y"], "answer": 2},
            "'2' must be one of the labels A",
        ),
        ({"question": "q", "choices": ["1", "0"], "answer": "1"}, "the text of one choice and the"),
        ({"question": "q", "choices": 5}, "must be an object with the lists label and text, or"),
        ({"question": "q", "choices": ["x", None]}, "holds None; expected text"),
        (
            {"question": "q", "choices": {"label": ["A", "A"], "text": ["x", "y"]}},
            "has the label 'A' more than once",
        ),
        ({"question": "q", "s_pop": "many"}, "field 's_pop' must be a number, found 'many'"),
        ({"question": "q", "s_pop": float("nan")}, "must be a number"),
        ({"question": "q", "popularity": [1]}, "field 'popularity' must be a number, found"),
        ({"question": "q", "popularity": True}, "field 'popularity' must be a number, found"),
        ({"question": "q", "s_pop": 10**400}, "field 's_pop' must be a number, found '1000"),
        (
            {"question": "q", "popularity": 5, "decile": "rare"},
            "field 'decile' must be a number, found 'rare'",
        ),
        ({"question": "q", "context": [["T"]]}, r"context item 1: expected \[title"),
        (
            {"question": "q", "context": {"title": ["T"], "sentences": []}},
            "1 titles for 0 pass",
        ),
        ({"question": "q", "qa_pairs": {"a": 1}}, "'qa_pairs' must be a list of objects"),
        ({"question": "q", "qa_pairs": [{"short_answers": "a"}]}, "qa_pairs item 1 must be"),
    ],
)
def test_malformed_rows_are_refused_by_line(tmp_path, row, message):
    path = write_rows(tmp_path / "q.jsonl", [{"question": "fine"}, row])
    with pytest.raises(UserError, match=r"q\.jsonl:2: .*" + message) as caught:
        read_questions(path)
    assert "\n" not in str(caught.value)


def test_claims_that_are_neither_true_nor_false_are_left_out_with_a_word(tmp_path, capsys):
    labels = ("SUPPORTS", "NOT ENOUGH INFO", "REFUTES", "mixture", "True")
    rows = [{"id": i, "claim": "c", "label": label} for i, label in enumerate(labels)]
    path = write_rows(tmp_path / "fever.jsonl", rows)
    assert [(q.id, *q.answers) for q in read_questions(path)] == [
        ("0", "true"),
        ("2", "false"),
        ("4", "true"),
    ]
    assert "left out 2 of 5 claims" in capsys.readouterr().err
    with pytest.raises(UserError, match="holds no rows that can be asked"):
        read_questions(write_rows(path, rows[1:2]))


def test_a_question_without_gold_is_refused_by_its_metric_alone(tmp_path):
    [q] = read_questions(write_rows(tmp_path / "f.jsonl", [FACTSCORE]))
    assert q.extra["topic"] == "X"
    with pytest.raises(UserError, match="question 0: has no gold answer"):
        metrics.accuracy(q, "X is.")


FIELDS = sorted(
    {
        *question_fields.QUESTION,
        *question_fields.ID,
        *question_fields.CHOICE_KEY,
        *question_fields.PASSAGES,
        *question_fields.CONTEXT,
        *question_fields.POPULARITY,
        *question_fields.MORE_GOLD,
        *("input", "options", "choices", "qa_pairs", "annotations", "facts", "claims", "A", "B"),
    }
)
INNER = sorted(
    {*question_fields.ANSWER_PARTS, *question_fields.STEM, "label", "text", "title", "sentences"}
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-1, 3)
    | st.floats()
    | st.sampled_from(("", " ", "x", "B", "true", "['a']", '[["T", ["s"]]]', "[{1: 2}]", "[{'a'")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(INNER), inner),
    max_leaves=6,
)


@settings(max_examples=100)
@given(row=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4), claim=st.booleans())
def test_any_row_is_read_or_refused_by_line(tmp_path_factory, row, claim):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    row = {"claim" if claim else "question": "q"} | row
    try:
        [q] = read_questions(write_rows(path, [row]))
    except UserError as e:
        assert str(e).startswith(str(path)) and "\n" not in str(e)
    else:
        assert q.question.strip() and q.id.strip()
        assert all(isinstance(a, str) and a.strip() for a in q.answers)
        assert not q.choices or set(q.answers) <= set(q.options)
        json.dumps(q.extra, allow_nan=False)


# ---- files --------------------------------------------------------------------------------------
ROWS = [{"id": "a", "question": "Wo?", "answers": ["é", "b"]}, {"question": "q2"}]
WRITERS = {
    "t.json": lambda rows: json.dumps(rows, indent=1),
    "t.jsonl": lambda rows: "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows),
    "t": lambda rows: json.dumps({"data": rows, "args": {"k": 5}}),
    "t.data.json": lambda rows: json.dumps({"version": "1", "data": rows}, indent=2),
}


def write_text(path, text):
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


ANY_TEXT = st.text(st.characters(exclude_categories=("Cs",)), min_size=1)
QUESTION_ROWS = st.lists(
    st.fixed_dictionaries(
        {"question": ANY_TEXT.filter(str.strip)},
        optional={"id": ANY_TEXT.filter(str.strip), "answers": st.lists(ANY_TEXT)},
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=40)
@given(rows=QUESTION_ROWS)
def test_all_json_formats_give_the_same_questions(tmp_path_factory, rows):
    folder = tmp_path_factory.getbasetemp() / "formats"
    folder.mkdir(exist_ok=True)
    for name, render in WRITERS.items():
        for suffix in ("", ".gz"):
            got = read_questions(write_text(folder / (name + suffix), render(rows)), "t")
            assert [q.question for q in got] == [r["question"] for r in rows]
            assert [q.id for q in got] == [r.get("id", str(i)) for i, r in enumerate(rows)]
            for q, row in zip(got, rows, strict=True):
                assert list(q.answers) == list(
                    dict.fromkeys(a for a in row.get("answers", ()) if a.strip())
                )


CELL = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1)


@settings(max_examples=40)
@given(
    rows=st.lists(
        st.tuples(
            CELL.filter(str.strip),
            st.lists(CELL.filter(str.strip), min_size=1, max_size=3, unique=True),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_tables_give_the_questions_that_were_written(tmp_path_factory, rows):
    folder = tmp_path_factory.getbasetemp() / "tables"
    folder.mkdir(exist_ok=True)
    for name, delimiter, spell in (
        ("t.tsv", "\t", json.dumps),
        ("t.csv", ",", str),
        ("t.csv.gz", ",", json.dumps),
        ("dpr.csv", "\t", str),
    ):
        out = io.StringIO()
        writer = csv.writer(out, delimiter=delimiter)
        if name != "dpr.csv":
            writer.writerow(("question", "possible_answers"))
        writer.writerows((q, spell(answers)) for q, answers in rows)
        got = read_questions(write_text(folder / name, out.getvalue()))
        assert [(q.question, list(q.answers)) for q in got] == rows


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("one.json", '{\n "question": "q",\n "answers": ["a"]\n}', [("0", "q", ("a",))]),
        ("bom.jsonl", '\ufeff{"question": "q"}\n\n', [("0", "q", ())]),
        ("list.txt", "Who is é?\n\n  And she? \n", [("0", "Who is é?", ()), ("1", "And she?", ())]),
        ("nq-test.qa.csv", 'who\t[\'a\', "b\'s"]\nwhen\t["1967"]\n', None),
        ("mmlu.csv", '"2+2, is",3,4,5,6,B\nq,a,b,c,d,A\n', None),
        (
            "popQA.tsv",
            'id\tsubj\ts_pop\tquestion\tpossible_answers\n12\tX\t5\tq\t"[""a"", ""b""]"\n',
            [("12", "q", ("a", "b"))],
        ),
        (
            "pubhealth.tsv",
            "\tclaim_id\tclaim\tlabel\n0\t15661\tOtters fly.\tfalse\n",
            [("15661", "Otters fly.", ("false",))],
        ),
        ("mmlu.tsv", "Question\tA\tB\tAnswer\nq\tx\ty\tB\n", [("0", "q", ("B",))]),
    ],
)
def test_published_files_are_read(tmp_path, name, text, expected):
    got = read_questions(write_text(tmp_path / name, text))
    if name == "nq-test.qa.csv":
        expected = [("0", "who", ("a", "b's")), ("1", "when", ("1967",))]
    if name == "mmlu.csv":
        expected = [("0", "2+2, is", ("B",)), ("1", "q", ("A",))]
        assert got[0].choices == LETTERED
    assert [(q.id, q.question, q.answers) for q in got] == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("q.csv", "text,label\na,b\n", r"q\.csv:1: no column is the question; .* question or"),
        ("q.csv", "question,answer\na\n", r"q\.csv:2: 1 columns, but the first row has 2.*commas"),
        ("q.tsv", "question\tanswer\n\na\tb\tc\n", r"q\.tsv:3: 3 columns.*tabs"),
        ("q.tsv", 'question\n"He" said\n', r"q\.tsv:2: .*double the quotes"),
        ("q.tsv", 'question\n"open\nq2\n', r"q\.tsv:2: .*double the quotes"),
        ("q.csv", "question,question\na,b\n", "column 'question' occurs more than once"),
        ("q.csv", "who\t['a']\nwhen\tnever\n", r"q\.csv:2: field 'answers' holds 'never'"),
        ("q.csv", "", "holds no rows"),
        ("q.txt", "\n \n", "holds no rows"),
        ("q.json", '{"data": []}', "holds no rows"),
        ("q.json", '{"data": ["x"]}', r"q\.json: data item 1: expected a JSON object, found str"),
        ("q.json", '{\n "data": [\n {"question" "q"}]}', r"q\.json:3: not valid JSON"),
        ("q.json", '{\n "question": "\\ud800"\n}', "unpaired surrogate"),
        ("q.jsonl", '{"question": "q"}\n{"question"\n', r"q\.jsonl:2: not valid JSON"),
        ("q.jsonl", "\x00\x01", r"q\.jsonl:1: not valid JSON"),
    ],
)
def test_malformed_files_are_refused_by_line(tmp_path, name, text, message):
    with pytest.raises(UserError, match=message) as caught:
        read_questions(write_text(tmp_path / name, text))
    assert "\n" not in str(caught.value)


def test_a_cut_compressed_file_is_refused(tmp_path):
    path = write_text(tmp_path / "q.csv.gz", "question\n" + "é" * 999)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="is cut off"):
        read_questions(path)


# ---- a row's input ------------------------------------------------------------------------------
def test_an_input_reaches_prompt_and_query(talkative):
    rag, found = make_rag(talkative), []

    class Recorder:
        def search(self, queries, k):
            found.extend(queries)
            return [[Passage("0", "T", "P")] for _ in queries]

    rag.retriever = Recorder()
    plain = Question("1", "Who?", choices=(("A", "x"), ("B", "y")))
    with_input = replace(plain, input="[Retrieval] Mara")
    assert prompts.question_prompt(plain) == prompts.instruction("Who? A: x B: y")
    parts = prompts.question_prompt(with_input)
    assert parts == prompts.instruction("Who? A: x B: y", "[Retrieval] Mara")
    assert Control(INPUT) in parts and Control("[Retrieval]") not in parts

    encode, bos = talkative.tokenizer.encode, talkative.tokenizer.bos_id
    for q in (plain, with_input):
        expected = [bos, *encode(prompts.question_prompt(q), before_control=True)]
        assert rag._prompt(q, 10_000, []) == expected
    notices = []
    cut = rag._prompt(with_input, 20, notices)
    assert len(cut) == 20 and "was cut from" in notices[0]
    heading = encode(prompts.instruction(""), before_control=True)[-1]
    assert cut[-1] == heading

    row = {"_id": "2", "instruction": "Who?", "input": "[Retrieval] Mara"}
    asked = [replace(with_input, id="2", choices=()), Question("1", "Why?")]
    assert _as_questions([row, "Why?"]) == asked and _as_questions(row) == asked[:1]
    with pytest.raises(UserError, match="question 1: missing field 'question'"):
        _as_questions(["Why?", {"input_text": "Who?"}])

    rag._retrieve([(plain, []), (with_input, ["First."])], 1)
    assert found == ["Who?", "Who? [Retrieval] Mara First."]


def test_a_question_tells_its_popularity(tmp_path):
    rows = [{"question": "q", "s_pop": "142"}, {"question": "r", "decile": 3}]
    write_jsonl(tmp_path / "q.jsonl", rows)
    known, unknown = read_questions(tmp_path / "q.jsonl")
    assert known.popularity == 142.0 and unknown.popularity is None
    assert not unknown.extra  # a decile of nothing
