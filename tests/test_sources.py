"""Published sets become instructions in array_record files, and nothing is dropped unsaid."""

import gzip
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfrag_jax import artifacts, cli, json_lists
from selfrag_jax.commands.prepare import counts_table, prepare_sets
from selfrag_jax.commands.retrieve import retrieve_file
from selfrag_jax.data import prepared
from selfrag_jax.data.instructions import instruction_rows, read_instructions
from selfrag_jax.data.published_files import RowFault, published_rows
from selfrag_jax.data.sources import knowledge_sets as knowledge
from selfrag_jax.data.sources.sets import SETS, SetCounts, read_set
from selfrag_jax.errors import UserError
from selfrag_jax.records import Passage, read_rows

FILES = Path(__file__).parent / "data" / "sources"  # written by hand in the published layouts
NAMES = [name for name in SETS if name != prepared.GENERATOR]

# name -> (instruction, input, output, id) of every row that is kept
KEPT = {
    "gpt4_alpaca": [
        ("Name a colour of the sky.", "", "Blue.", "1"),
        ("Turn the sentence into a question.", "The kettle boils.", "Does the kettle boil?", "2"),
        ("用中文问好。", "", "你好！", "5"),
    ],
    "stanford_alpaca": [
        ("Add the numbers.", "2 and 5", "7", "1"),
        ("Name a spoon's material.", "", "Wood.", "2"),
    ],
    "flan_v2": [("Is a hen a bird?", "", "yes", "0"), ("Is a mole a bird?", "", "no", "2")],
    "sharegpt": [
        ("How do I dry a boot?", "", "Stuff it with paper.", "abc_0"),
        ("Be brief.\n\nWhy salt?", "", "Taste.", "jkl_0"),
        ("How many legs has a crab?", "", "Ten.", "mno_0"),
    ],
    "oasst1": [
        ("What is felt?", "", "Pressed wool.", "t1"),
        ("What is tweed?", "", "Cloth.", "t4"),
    ],
    "nq": [("who mends the town clock of quenport", "", "Ida Marsh", "1")],
    "fever": [
        (knowledge.FEVER_TASK, "Herons eat fish.", "true", "75"),
        (knowledge.FEVER_TASK, "Herons eat bricks.", "false", "76"),
    ],
    "wow": [
        (knowledge.CHAT_TASK, "I like kites.", "They were first flown in Asia.", "1-1"),
        (
            knowledge.CHAT_TASK,
            "I like kites.\nThey were first flown in Asia.\nWhen?",
            "Long ago.",
            "1-3",
        ),
    ],
    "openbookqa": [
        (
            knowledge.CHOICE_TASK,
            "A cup is best made of\nA: smoke\nB: clay\nC: rain\nD: song",
            "B",
            "7-980",
        )
    ],
    "arc_easy": [
        (knowledge.CHOICE_TASK, "Which one floats?\nA: iron\nB: cork\nC: stone", "B", "M_1"),
        (
            knowledge.CHOICE_TASK,
            "Which one burns?\nA: water\nB: wood\nC: sand\nD: glass\nE: ice",
            "B",
            "M_2",
        ),
    ],
    "asqa": [
        (
            knowledge.ASQA_TASK,
            "When did the pier open?",
            "The old pier opened in 1901, the new one in 1988.",
            "-11",
        )
    ],
}
LEFT_OUT = {
    "gpt4_alpaca": {"empty output": ["3"], "missing field 'output'": ["4"]},
    "stanford_alpaca": {},
    "flan_v2": {"duplicate id": ["3"], "not JSON": ["4"]},
    "sharegpt": {
        "does not begin with a user and an assistant": ["sg_90k_part1_html_cleaned.json:2"],
        "fewer than two turns": ["sg_90k_part1_html_cleaned.json:3"],
    },
    "oasst1": {"not English": ["2"], "prompt without a reply": ["3"]},
    "nq": {"empty output": ["2"]},
    "fever": {"label NOT ENOUGH INFO": ["3"], "duplicate id": ["4"]},
    "wow": {"empty output": ["2"], "missing field 'dialog'": ["3"]},
    "openbookqa": {"answerKey is none of the labels": ["2"]},
    "arc_easy": {"1 choices": ["3"]},
    "asqa": {"no annotation": ["2"]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All sets in one folder, with their counts."""
    out = tmp_path_factory.mktemp("prepared") / "all"
    return out, prepare_sets(NAMES, FILES, out)


# ---- the sets ------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_each_published_layout_becomes_instructions_with_counts(folder, name):
    out, counts = folder
    rows = [r for r in read_instructions(out) if r.dataset_name == name]
    expected = [(i, t, o, f"{name}_{n}") for i, t, o, n in KEPT[name]]
    assert [(r.instruction, r.input, r.output, r.id) for r in rows] == expected
    c = counts[name]
    assert c.faults.rows == LEFT_OUT[name]
    assert c.kept == c.usable == len(rows) and c.read == c.kept + c.faults.total


def test_every_set_has_a_builder_of_tensorflow_datasets(tmp_path):
    import tensorflow_datasets as tfds

    from selfrag_jax.data.sources.builders import BUILDERS, ArcEasy

    assert set(BUILDERS) == set(SETS)
    builder = ArcEasy(manual_dir=FILES, data_dir=tmp_path)
    builder.download_and_prepare()
    rows = tfds.builder_from_directory(builder.data_dir).as_data_source(split="train[1:]")
    assert [row["id"] for row in rows] == [b"arc_easy_M_2"]
    assert rows.dataset_info.features.keys() == set(prepared.FIELDS)


@pytest.mark.parametrize(
    ("name", "file", "expected"),
    [
        ("oasst1", "2023-04-12_oasst_ready.messages.jsonl", KEPT["oasst1"]),
        ("nq", "NQ-open.train.jsonl", KEPT["nq"]),
        ("nq", "nq-train-kilt.jsonl", [("who rings the bell", "", "Ole Finn", "k1")]),
        (
            "fever",
            "fever-train-kilt.jsonl",
            [(knowledge.FEVER_TASK, "Herons eat fish.", "true", "5")],
        ),
    ],
)
def test_other_published_forms_of_a_set_are_read(tmp_path, name, file, expected):
    prepare_sets([name], FILES / "flat" / file, tmp_path / "out")
    rows = read_instructions(tmp_path / "out")
    assert [(r.instruction, r.input, r.output, r.id) for r in rows] == [
        (i, t, o, f"{name}_{n}") for i, t, o, n in expected
    ]


def test_files_are_found_by_name_compressed_or_not_and_nothing_else(tmp_path):
    labelled = SETS[prepared.GENERATOR]
    for name in ("my_generator.jsonl.gz", "my_generator.jsonl.manifest.json"):
        (tmp_path / name).write_text("")
    assert [p.name for p in labelled.find_files(tmp_path)] == ["my_generator.jsonl.gz"]
    (tmp_path / "my_generator.jsonl").write_text("")
    assert [p.name for p in labelled.find_files(tmp_path)] == ["my_generator.jsonl"]
    (tmp_path / labelled.name).mkdir()
    (tmp_path / labelled.name / "train.jsonl").write_text("")
    assert labelled.find_files(tmp_path) == [tmp_path / labelled.name / "train.jsonl"]


def test_the_same_files_give_the_same_rows_wherever_they_stand(folder, tmp_path):
    out, counts = folder
    again = tmp_path / "again"
    assert prepare_sets(NAMES[::-1], FILES, again) == counts
    rows = [[r for r in read_instructions(f) if r.dataset_name == "wow"] for f in (out, again)]
    assert rows[0] == rows[1] and len(rows[0]) == 2
    assert read_instructions(again)[0].dataset_name == "asqa"  # in the order asked for


def test_the_table_counts_every_row(folder):
    _, counts = folder
    lines = counts_table(counts).splitlines()
    assert "all                     37         21         21         16" in lines
    assert "fever: left out: label NOT ENOUGH INFO: 1 (row 3)" in lines


def test_a_limit_draws_rows_with_the_seed(tmp_path):
    rows = [{"instruction": f"Say {i}.", "output": str(i)} for i in range(300)]
    (tmp_path / "alpaca_data.json").write_text(json.dumps(rows))

    names = ["stanford_alpaca"]

    def drawn(seed):
        out = tmp_path / f"out{seed}"
        counts = prepare_sets(names, tmp_path, out, {"stanford_alpaca": 60}, seed)
        assert counts["stanford_alpaca"].kept == 60 and counts["stanford_alpaca"].usable == 300
        return [int(r.output) for r in read_instructions(out)]

    first, second = drawn(0), drawn(1)
    assert first == sorted(set(first)) and first != second
    assert 100 < sum(first) / 60 < 200  # from all of the file


LEAVES = st.none() | st.booleans() | st.integers() | st.text(max_size=3)
JSON = (
    LEAVES | st.lists(LEAVES, max_size=2) | st.dictionaries(st.sampled_from("ab"), LEAVES)
    | st.lists(st.dictionaries(st.sampled_from("ab"), LEAVES), max_size=2)
)  # fmt: skip


def paths_in(value, path=()):
    """The path of every value inside a JSON value."""
    if not isinstance(value, (dict, list)):
        return
    for key, child in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*path, key)
        yield from paths_in(child, (*path, key))


@pytest.mark.parametrize("name", [*NAMES, "oasst1 flat"])
@settings(max_examples=60)
@given(data=st.data())
def test_a_row_with_any_value_in_any_place_is_used_or_counted(tmp_path_factory, name, data):
    name, _, flat = name.partition(" ")
    published = SETS[name]
    file = published.find_files(FILES / "flat" if flat else FILES)[0]
    if name == "asqa":
        whole = json.loads(file.read_text())["train"]
    else:
        whole = [row for _, row in published_rows(file) if isinstance(row, dict)]
    path = data.draw(st.sampled_from(list(paths_in(whole))))
    at = whole
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = data.draw(JSON)
    changed = tmp_path_factory.getbasetemp() / f"changed-{name}.json"
    changed.write_text(json.dumps({"train": whole} if name == "asqa" else whole))
    counts = SetCounts()
    rows = list(read_set(published, [changed], counts))
    assert counts.read == counts.kept + counts.faults.total and counts.kept == len(rows)
    assert all(r.instruction and r.output.strip() and r.id for r in rows)
    with_question = name in ("fever", "wow", "openbookqa", "arc_easy", "asqa")
    assert all(r.input for r in rows) or not with_question


# ---- the command ---------------------------------------------------------------------------------
def test_the_command_prints_the_table_and_does_finished_work_once(tmp_path, capsys):
    argv = ["prepare", "--dataset=fever,nq", f"--manual_dir={FILES}", f"--out={tmp_path}/out"]
    assert cli.main(argv) == 0
    first = capsys.readouterr().out
    assert "fever          4          2          2          2" in first
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    assert cli.main(argv) == 0 and capsys.readouterr().out == first
    assert times == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    assert cli.main([*argv, "--limit=1"]) == 2
    assert "limits.fever: None there, 1 asked for" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("downloads"))


def test_the_command_imports_tensorflow_datasets_only_to_write():
    program = (
        "import sys\n"
        "from selfrag_jax.commands import load_command, prepare, retrieve\n"
        "heavy = {'tensorflow_datasets', 'array_record', 'grain', 'jax'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_each_set_may_have_a_number_of_its_own(tmp_path, capsys):
    argv = ["prepare", "--dataset=gpt4_alpaca:2,fever:1,nq", f"--manual_dir={FILES}", "--limit=9"]
    assert cli.main([*argv, f"--out={tmp_path}/mix"]) == 0
    kept = [r.dataset_name for r in read_instructions(tmp_path / "mix")]
    assert kept == ["gpt4_alpaca"] * 2 + ["fever", "nq"]
    assert "all                 11          6          4          5" in capsys.readouterr().out


def test_an_interrupted_preparation_continues_after_the_last_finished_set(tmp_path, monkeypatch):
    from selfrag_jax.data.sources.builders import Fever

    def interrupted(self):
        yield 0, dict.fromkeys(prepared.FIELDS, "x")
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as m:
        m.setattr(Fever, "_generate_examples", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare_sets(["nq", "fever"], FILES, out)
    with pytest.raises(UserError, match="out: is unfinished; run `selfrag prepare` first"):
        read_instructions(out)
    finished = next((out / "nq").rglob("*array_record*"))
    before = finished.stat().st_mtime_ns
    counts = prepare_sets(["nq", "fever"], FILES, out)
    assert finished.stat().st_mtime_ns == before and counts["fever"].kept == 2
    assert [r.id for r in read_instructions(out)] == ["nq_1", "fever_75", "fever_76"]
    assert not list(out.rglob("*incomplete*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset=fevr"], "--dataset=fevr: no such set; did you mean 'fever'?"),
        (["--dataset=nq,nq"], "name each set once"),
        (["--dataset=nq,selfrag_generator"], "give it a folder of its own"),
        (["--dataset=nq", "--limit=0"], "nq: a limit of 0 rows: must be at least 1"),
        (["--dataset=nq:many"], "--dataset=nq:many: expected NAME or NAME:ROWS, such as nq:10000"),
        (["--dataset=nq", "--manual_dir=."], "has no biencoder-nq-train.json or NQ-open"),
        (["--dataset=nq", "--manual_dir=none"], "none: no such folder; expected it to hold"),
        (["--dataset=nq,fever", "--manual_dir=cut.json"], "cut.json: is a file; give one"),
        (["--dataset=stanford_alpaca", "--manual_dir=cut.json"], "cut.json:1: the list is cut off"),
        (["--dataset=gpt4_alpaca", "--manual_dir=cut.jsonl.gz"], "cut.jsonl.gz: is cut off"),
        (["--dataset=asqa", "--manual_dir=cut.json"], "cut.json: not valid JSON"),
        (
            ["--dataset=fever", "--manual_dir=other.jsonl"],
            "other.jsonl: no row can be used as fever: missing field 'label': 2 (rows 1, 2)",
        ),
    ],
)
def test_wrong_input_is_met_with_a_remedy(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    Path("cut.json").write_text('[{"instruction": "a", "output": "b"}, {"instruction')
    Path("other.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    whole = gzip.compress(b'{"instruction": "a", "output": "b"}\n' * 50)
    Path("cut.jsonl.gz").write_bytes(whole[:-12])
    argv = ["prepare", "--out=out", f"--manual_dir={FILES}", *flags]
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err
    # With the right file the same folder can be written.
    assert cli.main(["prepare", "--out=out", f"--manual_dir={FILES}", "--dataset=asqa"]) == 0


# ---- reading -------------------------------------------------------------------------------------
def write(path, *lines):
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


VALUES = st.text(max_size=6) | st.integers() | st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=40)
@given(st.lists(VALUES | st.dictionaries(st.text(max_size=3), VALUES, max_size=3), max_size=6))
def test_a_list_read_piece_by_piece_is_the_list(values):
    text = json.dumps(values, ensure_ascii=False, indent=1)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(json_lists, "_PIECE", 3)
        items = list(json_lists.list_items("x.json", io.StringIO(text)))
    assert items == list(enumerate(values, 1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[{"a": 1},\n {"b" 2}, {"c": "a long way on"}]',
            r"x:2: not valid JSON: .*column 7",
        ),
        ('[{"a": 1} {"b": 2}]', "x:1: not valid JSON: expected ','.*column 11"),
        ('[\n{"a": 1}, ', "x:2: the list is cut off"),
        ('[{"a": "on and', "x:1: the list is cut off"),
        ('[{"a": 1}] {}', "x:1: not valid JSON: text after the end"),
        ("[" * 100_000, "x:1: nested too deeply"),
    ],
)
@pytest.mark.parametrize("piece", [3, 1 << 20])
def test_a_damaged_list_names_line_and_column(monkeypatch, text, message, piece):
    monkeypatch.setattr(json_lists, "_PIECE", piece)
    with pytest.raises(UserError, match=message):
        list(json_lists.list_items("x", io.StringIO(text)))


def test_a_list_and_json_lines_are_the_same_rows(tmp_path):
    rows = [{"a": 1}, 7, {"b": "x\ny"}]
    write(tmp_path / "rows.jsonl", *map(json.dumps, rows))
    (tmp_path / "rows.json").write_text(" \n" + json.dumps(rows))
    for name in ("rows.jsonl", "rows.json"):
        read = list(published_rows(tmp_path / name))
        assert [n for n, _ in read] == [1, 2, 3]
        assert read[0][1] == rows[0] and read[2][1] == rows[2]
        assert isinstance(read[1][1], RowFault) and str(read[1][1]) == "not a JSON object"


@pytest.mark.parametrize("field", ["id", "_id", "qid", "question_id", "sample_id", "docid"])
def test_ids_are_kept_under_any_name(tmp_path, field):
    row = {field: "x7", "instruction": "Say it.", "output": "It."}
    file = write(tmp_path / "rows.jsonl", json.dumps(row))
    assert read_instructions(file)[0].id == "x7"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "a"}, r"rows.jsonl:2: missing field 'output'"),
        ({"instruction": "a", "output": " \n"}, r"rows.jsonl:2: the output is empty; add it"),
        ({"instruction": " ", "output": "b"}, r"rows.jsonl:2: the instruction is empty"),
        (
            {"instruction": "a", "output": "b", "qid": 1},
            r"rows.jsonl:2: id '1' is also the id of .*rows.jsonl:1",
        ),
        ({"messages": [{"role": "user", "content": "a"}]}, r"rows.jsonl:2: messages: has no user"),
        ({"messages": [{"role": "user"}]}, r"rows.jsonl:2: message 1 must be an object with role"),
        ({"messages": "hello"}, r"rows.jsonl:2: field 'messages' must be a list"),
    ],
)
def test_a_row_that_cannot_be_used_names_file_and_line(tmp_path, row, message):
    good = {"id": "1", "instruction": "Say it.", "output": "It."}
    file = write(tmp_path / "rows.jsonl", json.dumps(good), json.dumps(row))
    with pytest.raises(UserError, match=message):
        read_instructions(file)


def test_a_row_of_five_megabytes_is_read(tmp_path):
    output = "Ein Satz über Möwen. " * 240_000
    row = {"instruction": "Schreib viel.", "output": output}
    file = write(tmp_path / "rows.jsonl", json.dumps(row, ensure_ascii=False))
    assert read_instructions(file)[0].output == output
    prepare_sets(["stanford_alpaca"], file, tmp_path / "out")
    assert read_instructions(tmp_path / "out")[0].output == output.strip()


def test_chats_give_their_last_exchange_and_are_counted(tmp_path, capsys):
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is tin?"},
        {"role": "assistant", "content": "A metal."},
        {"role": "user", "content": [{"type": "text", "text": "Is it soft?"}]},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Thanks."},
    ]
    plain = {"instruction": "Say it.", "output": "It."}
    file = write(tmp_path / "c.jsonl", json.dumps({"id": "c", "messages": chat}), json.dumps(plain))
    rows = read_instructions(file)
    assert (rows[0].id, rows[0].instruction, rows[0].output) == (
        "c", "Be brief.\n\nIs it soft?", "Yes.",
    )  # fmt: skip
    assert rows[1].instruction == "Say it."
    assert "c.jsonl: 1 chats; each gave its last user and assistant turn" in capsys.readouterr().err


def test_a_folder_that_is_not_prepared_is_refused(tmp_path):
    with pytest.raises(UserError, match="expected JSON lines, or a folder made by"):
        read_instructions(tmp_path)
    artifacts.write_manifest(tmp_path, "index", {}, {}, {})
    with pytest.raises(UserError, match="was made by `selfrag index`"):
        read_instructions(tmp_path)


def test_a_damaged_folder_says_how_to_make_it_again(tmp_path):
    prepare_sets(["nq"], FILES, tmp_path / "out")
    (tmp_path / "out" / "nq" / prepared.VERSION / "features.json").unlink()
    with pytest.raises(UserError, match=r"nq/1.0.0: not readable .* run `selfrag prepare` again"):
        read_instructions(tmp_path / "out")


def test_rows_are_read_by_index_across_sets(folder):
    out, _ = folder
    rows = prepared.PreparedRows(out)
    in_order = [row for _, row in prepared.read_prepared(out)]
    assert len(rows) == 21 and [rows[i] for i in range(21)] == in_order == list(rows)
    assert rows[19:] == in_order[19:]


def test_retrieve_takes_a_folder(folder, tmp_path, monkeypatch):
    from selfrag_jax.retrieval import retriever

    class FakeRetriever:
        def __init__(self, *_):
            self.index = range(9)

        def search(self, queries, k):
            return [[Passage("0", "", query)] * k for query in queries]

    artifacts.write_manifest(tmp_path / "index", "index", {}, {}, {})
    monkeypatch.setattr(retriever, "IndexRetriever", FakeRetriever)
    out, _ = folder
    assert retrieve_file(tmp_path / "index", out, tmp_path / "with.jsonl", 2) == 21
    written = [row for _, row in read_rows(tmp_path / "with.jsonl")]
    assert [r["id"] for r in written] == [row["id"] for _, row in instruction_rows(out)]
    claim = next(r for r in written if r["id"] == "fever_75")
    assert claim["ctxs"][0]["text"] == f"{knowledge.FEVER_TASK} Herons eat fish."
