"""`selfrag check`: what is wrong with a file, what it consists of, and what a model sees of it."""

import gzip
import io
import json
import re
import tracemalloc
from pathlib import Path

import documents
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from selfrag_jax import cli
from selfrag_jax.commands import check, check_text
from selfrag_jax.commands.prepare import prepare_sets
from selfrag_jax.data.critic_examples import CriticSource, read_critic_examples
from selfrag_jax.data.file_kinds import KINDS, file_rows, guess_kind
from selfrag_jax.data.generator_examples import GeneratorSource
from selfrag_jax.data.instructions import read_instructions
from selfrag_jax.data.questions import read_questions
from selfrag_jax.errors import UserError, raise_error
from selfrag_jax.files import read_json
from selfrag_jax.records import write_jsonl
from selfrag_jax.retrieval.corpus import Corpus
from selfrag_jax.text import reflection

WEIGHTS = dict.fromkeys(reflection.GROUPS, 1.0)
LABELLED = (
    "[Retrieval]<paragraph>Sea\nIt is in the west.</paragraph>[Relevant]In the west."
    "[Fully supported][Utility:5]"
)
ROWS = {
    "instructions": {"id": "1", "instruction": "Name a bird.", "output": "An owl."},
    "critic": {"task": "isuse", "instruction": "Who?", "segment": "Mara.", "output": "[Utility:3]"},
    "generator": {"id": "1", "instruction": "Where is the sea?", "output": LABELLED},
    "questions": {"id": "1", "question": "Who?", "answers": ["Mara"]},
    "corpus": {"id": "1", "title": "Sea", "text": "It is in the west."},
}
PUBLISHED = {
    "instruction": "Judge it.",
    "input": "Task instruction: Who?\nEvidence: Pier\nIt opened in 1901.",
    "output": "[Relevant]",
    "task": "relevance",
}
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Returns run(argv, content): status, stdout and stderr of the check of a file."""
    monkeypatch.chdir(tmp_path)

    def run(name, content=None, *flags):
        if isinstance(content, list):
            write_jsonl(name, content)
        elif content is not None:
            Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
        status = cli.main(["check", name, *flags])
        return status, *capsys.readouterr()

    return run


# ---- kinds --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "row"),
    [
        *ROWS.items(),
        ("critic", PUBLISHED),
        ("instructions", CHAT),
        ("questions", {"claim": "Otters swim.", "label": "SUPPORTS"}),
        ("questions", {"instruction": "Who?", "answers": ["Mara"]}),
        ("questions", {"input": "Tell of Mara.", "topic": "Mara", "output": "other text"}),
        ("corpus", {"_id": "3", "contents": "It is in the west."}),
    ],
)
def test_the_kind_is_told_by_the_first_row(run, kind, row):
    status, out, _ = run("rows.jsonl", [row])
    assert status == 0 and f"rows.jsonl: {kind} (told by " in out
    assert "1 rows: 1 good" in out


def test_tables_and_folders_have_their_kinds(tmp_path):
    (tmp_path / "p.tsv").write_text("id\ttext\ttitle\n1\ta\tb\n")
    (tmp_path / "q.tsv").write_text("question\tanswer\nWho?\tMara\n")
    (tmp_path / "q.txt").write_text("Who?\n")
    (tmp_path / "d").mkdir()
    with pytest.raises(UserError, match="the folder has no files of passages"):
        guess_kind(tmp_path / "d")
    (tmp_path / "d" / "p.md").write_text("# Sea\n\nIt is in the west.\n")
    kinds = [guess_kind(tmp_path / name)[0] for name in ("p.tsv", "q.tsv", "q.txt", "d", "d/p.md")]
    assert kinds == ["corpus", "questions", "questions", "corpus", "corpus"]
    assert guess_kind(tmp_path / "q.txt")[1] == "its name, .txt: a question a line"
    (tmp_path / "p.tsv").write_text('id\ttext\n1\t"not closed\n')
    assert guess_kind(tmp_path / "p.tsv") == ("corpus", "its columns")


def test_a_prepared_folder_is_checked_as_it_is_trained(run, tmp_path, tokenizer):
    """Its outputs are plain: what looks like a control token there is text."""
    rows = [{"instruction": "Say it.", "input": "", "output": "[Relevant] it."}]
    (tmp_path / "alpaca_data.json").write_text(json.dumps(rows))
    prepare_sets(["stanford_alpaca"], tmp_path, tmp_path / "out")
    status, out, _ = run("out")
    assert status == 0 and "out: instructions (told by a folder of `selfrag prepare`" in out
    status, out, _ = run("out", None, "--for=generator")
    assert status == 0 and "1 rows: 1 good" in out and "isrel" not in out
    source = GeneratorSource.read(tmp_path / "out", tokenizer, WEIGHTS)
    [row] = file_rows("generator", tmp_path / "out", False, raise_error)
    assert row.record == source.rows[0]


def strictly(kind, path, tokenizer):
    """The records that the kind's own commands read."""
    if kind == "instructions":
        return read_instructions(path)
    if kind == "critic":
        return list(CriticSource.read(path, tokenizer, True, WEIGHTS).rows)
    if kind == "generator":
        return list(GeneratorSource.read(path, tokenizer, WEIGHTS).rows)
    return [p for _, p in Corpus(path)] if kind == "corpus" else read_questions(path)


FAULTS = {
    "instructions": {"instruction": "a", "output": " "},
    "critic": {"task": "isuse", "instruction": "a", "output": "[Relevant]"},
    "generator": {"instruction": "a", "output": "[Retrieval]<paragraph>b"},
    "questions": {"question": ""},
    "corpus": {"title": "b"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_good_if_and_only_if_its_commands_read_it(run, tokenizer, kind, tmp_path):
    status, out, err = run("rows.jsonl", [ROWS[kind]], f"--for={kind}")
    assert status == 0 and "told by" not in out and "Traceback" not in err
    [record] = strictly(kind, tmp_path / "rows.jsonl", tokenizer)
    [row] = file_rows(kind, tmp_path / "rows.jsonl", False, raise_error)
    assert (record.id, vars(record) | {"task": ""}) == (row.id, vars(row.record) | {"task": ""})
    status, out, err = run("rows.jsonl", [ROWS[kind], FAULTS[kind]], f"--for={kind}")
    with pytest.raises(UserError) as e:
        strictly(kind, "rows.jsonl", tokenizer)
    assert status == 2 and f"\n  {e.value}\n" in out and "rows.jsonl:2: " in out
    assert "rows.jsonl: 1 of 2 rows cannot be used; mend or remove them" in err


POOL = [*ROWS.values(), *FAULTS.values(), PUBLISHED, CHAT, {}, {"id": 3, "output": None}]


@settings(max_examples=25)
@given(kind=st.sampled_from(sorted(KINDS)), rows=st.lists(st.sampled_from(POOL), max_size=6))
def test_rows_are_refused_as_they_are_alone(tmp_path_factory, tokenizer, kind, rows):
    """Ids aside: whether a row can be used does not depend on those around it."""
    folder = tmp_path_factory.mktemp("rows")
    rows = [{k: v for k, v in row.items() if k != "id"} for row in rows]
    refused = []
    for number, row in enumerate(rows, 1):
        write_jsonl(folder / "one.jsonl", [row])
        try:
            strictly(kind, folder / "one.jsonl", tokenizer)
        except UserError as e:
            refused.append(str(e).replace("one.jsonl:1:", f"all.jsonl:{number}:"))
    write_jsonl(folder / "all.jsonl", rows)
    found = []
    read = list(file_rows(kind, folder / "all.jsonl", False, found.append))
    assert [str(e) for e in found] == refused
    assert len(read) == len(rows) - len(refused)


def test_a_corpus_is_read_as_index_is_told_to(run):
    row = {"key": "a", "abstract": "One is here. Two is there."}
    assert run("p.jsonl", [row], "--for=corpus")[0] == 2
    flags = ["--for=corpus", "--fields=text=abstract,id=key", "--split=3"]
    status, out, _ = run("p.jsonl", [row], *flags)
    assert status == 0 and "2 rows: 2 good" in out and "different ids: 2" in out
    status, _, err = run("q.jsonl", Q, "--split=3")
    assert status == 2 and "--split: is for a corpus, not for questions" in err


# ---- problems -----------------------------------------------------------------------------------
def test_twenty_problems_are_listed_and_the_others_counted(run):
    rows = [{"question": "Who?"}, *[{"question": ""}] * 31, {"question": "What?"}]
    status, out, _ = run("q.jsonl", rows)
    assert status == 2 and out.count("q.jsonl:") == 1 + 20 + 3  # the longest row and those shown
    assert "33 rows: 2 good, 31 with problems" in out and "  and 11 more" in out
    assert "q.jsonl:21: the question is empty" in out and "q.jsonl:22:" not in out


@pytest.mark.parametrize("kind", ["instructions", "questions", "corpus"])
def test_ids_that_occur_twice_are_named_where_commands_refuse_them(run, kind):
    other = ROWS[kind] | {"id": "2"}
    status, out, _ = run("rows.jsonl", [ROWS[kind], other, ROWS[kind]], f"--for={kind}")
    assert status == 2 and "3 rows: 2 good, 1 with problems" in out
    assert "rows.jsonl:3: id '1' is also the id of rows.jsonl:1" in out


def test_ids_of_training_rows_may_repeat(run):
    status, out, _ = run("g.jsonl", [ROWS["generator"]] * 3)
    assert status == 0 and "different ids: 1 (rows with the id of an earlier one: 2)" in out


def test_malformed_rows_of_published_files_are_left_out_as_in_training(run):
    bad = PUBLISHED | {"output": "[Relevent]"}
    status, out, _ = run("c.jsonl", [PUBLISHED, bad, PUBLISHED], "--format=released")
    assert status == 0 and "3 rows: 2 good, 1 left out" in out
    assert "  c.jsonl:2: unknown control token" in out
    status, out, err = run("c.jsonl", [bad, bad, PUBLISHED], "--format=released")
    assert status == 2 and "2 of 3 rows are malformed, which is too many to train with" in err
    with pytest.raises(UserError, match="2 of 3 rows are malformed"):
        read_critic_examples("c.jsonl", released=True)
    status, out, err = run("c.jsonl", [PUBLISHED, bad, PUBLISHED])
    assert status == 2 and "c.jsonl:2: unknown control token; --format=released leaves out" in out


# Files as they come: name -> content, and what is said.
Q = '{"question": "Who?"}\n'
HOSTILE = {
    "nul.jsonl": (b"\0\0\0\n", "nul.jsonl:1: not valid JSON"),
    "latin.jsonl": (Q.encode() + b'{"question": "caf\xe9"}\n', "latin.jsonl:2: not UTF-8"),
    "deep.jsonl": (Q + "[" * 100_000 + "\n", "deep.jsonl:2: nested too deeply"),
    "surrogate.jsonl": (Q + '{"question": "\\ud800"}\n', "surrogate.jsonl:2: holds '\\ud800'"),
    "empty.jsonl": ("", "empty.jsonl: holds no rows"),
    "blank.jsonl": ("\n \n", "blank.jsonl: holds no rows"),
    "text.json": ('"a"', "text.json:1: expected a JSON object, found str"),
    "cut.json": ('[{"question": "Who?"}, {"question', "cut.json:1: the list is cut off"),
    "cut.jsonl.gz": (gzip.compress(Q.encode() * 9, mtime=0)[:-9], "cut.jsonl.gz: is cut off"),
    "plain.jsonl.gz": (Q, "plain.jsonl.gz: is not compressed by gzip"),
    "quote.csv": ('question,answer\nWho?,Mara\n"Where?,there\n', "quote.csv:3: unexpected end"),
    "columns.tsv": ("id\ttext\n1\ta\n2\n", "columns.tsv:3: 1 columns, but the header has 2"),
    "other.jsonl": ('{"a": 1}\n', "other.jsonl: cannot tell what it is for by its fields (a)"),
    "pretty.jsonl": ('{"question": "Who?"}\n{\n', "at column 1); a row must end on its line"),
    "evidence.jsonl": (
        '{"task": "isrel", "instruction": "Who?", "output": "[Relevant]", "evidence": "Sea"}',
        "evidence.jsonl:1: evidence: passage 1 must be an object with title and text",
    ),
    "no_user.jsonl": ('{"messages": []}\n', "no_user.jsonl:1: messages: has no user turn"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_met_with_file_and_line(run, name):
    content, message = HOSTILE[name]
    status, out, err = run(name, content)
    assert status == 2 and message in out + err and "Traceback" not in err
    assert err.splitlines()[-1].startswith(f"selfrag check: {name}")


def test_a_file_that_cannot_be_read_on_says_what_was_read(run):
    status, out, err = run("latin.jsonl", b'{"question": "Who?"}\n' * 900 + b"\xff")
    assert status == 2 and "reading stopped: latin.jsonl:901: not UTF-8" in out
    assert "latin.jsonl:901: not UTF-8 (invalid start byte)" in err and "was not read" in err


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bom.jsonl", b"\xef\xbb\xbf" + Q.encode()),
        ("list.json", json.dumps([json.loads(Q)], indent=2)),
        ("q.jsonl.gz", gzip.compress(Q.encode(), mtime=0)),
        ("nul.jsonl", '{"question": "a\\u0000b"}\n'),
        ("huge.jsonl", json.dumps({"question": "word " * 40_000})),
    ],
)
def test_a_strange_but_good_file_is_good(run, name, content):
    status, out, _ = run(name, content)
    assert status == 0 and "1 rows: 1 good" in out and "\0" not in out and len(out) < 4000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["q.jsonl", "--for=generater"], "--for=generater: must be one of .* did you mean gener"),
        (["q.jsonl", "q.jsonl"], "one file is checked, found 2"),
        ([], "one file is checked, found 0"),
        (["none.jsonl"], "none.jsonl: no such file"),
        (["book.pdf"], r"book.pdf: .pdf files are not read; .*: pdftotext"),
        (["none.zip", "--for=corpus"], "none.zip: no such file or folder of passages"),
        ([".", "--for=questions"], "is a folder"),
        (["q.jsonl", "--format=released"], "is for critic and generator data, not for questions"),
        (["q.jsonl", "--format=new"], "--format=new: must be one of own, released"),
        (["q.jsonl", "--length=0"], "--length=0: must be at least 1"),
        (["q.jsonl", "--model=none"], "none: no such folder"),
        (["q.jsonl", "--out=q.jsonl"], "is both the output and the file"),
        (["q.jsonl", "--out=."], "is a folder"),
    ],
)
def test_wrong_use_is_one_line(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    Path("q.jsonl").write_text(Q)
    Path("book.pdf").write_text("%PDF")
    assert cli.main(["check", *flags]) == 2
    *progress, line = capsys.readouterr().err.splitlines()
    assert re.search(message, line) and all(p.startswith("check ") for p in progress)


CONFIG = """
from selfrag_jax import config
from ml_collections import ConfigDict
def get_config():
    c = config.load("tiny").to_dict()
    {}
    return ConfigDict(c)
"""


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_a_file_is_for_has_to_be_right_in_a_config(run, kind):
    changes = ["c['generator']['optimizer'] = 3", "c['collect'] = c['index'] = None"]
    if kind not in ("generator", "instructions"):
        changes.append(
            "c['generator'] = None" if kind == "critic" else "c['generator']['mask'] = 1"
        )
    changes.append("c['critic'] = 'x'" if kind != "critic" else "c['critic']['optimizer'] = ()")
    changes.append("c['label'] = 5" if kind != "critic" else "c['label']['beam'] = 5")
    Path("mine.py").write_text(CONFIG.format("; ".join(changes)))
    status, *_ = run("f.jsonl", [ROWS[kind]], f"--for={kind}", "--config=mine.py")
    assert status == 0


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("generator", "c['generator']['length'] = '9'", "generator.length='9': expected a whole"),
        ("generator", "c['generator']['length'] = -1", "generator.length=-1: must be at least 1"),
        (
            "generator",
            "c['generator']['mask'] = 'all'",
            "mask='all': must be one of each, released",
        ),
        ("critic", "c['label']['critic']['brief'] = 1", "label.critic.brief=1: expected True or F"),
        ("questions", "c['answer']['max_length'] = 1.5", "answer.max_length=1.5: expected a whole"),
    ],
)
def test_what_it_is_for_has_to_be_right(run, kind, change, message):
    Path("mine.py").write_text(CONFIG.format(change))
    status, _, err = run("f.jsonl", [ROWS[kind]], f"--for={kind}", "--config=mine.py")
    assert status == 2 and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("corpus", {"id": "1", "title": "", "text": " "}),
        ("questions", {"claim": "It is in the west.", "label": "NOT ENOUGH INFO"}),
    ],
)
def test_a_file_of_which_nothing_is_left_is_refused(run, kind, row):
    status, out, err = run("f.jsonl", [row], f"--for={kind}")
    assert status == 2 and "0 good, 1 left out" in out
    assert err.splitlines()[-1] == "selfrag check: f.jsonl: all rows would be left out"


def test_rows_of_a_published_list_are_named_as_items(run):
    row = {"instruction": "Who?", "output": LABELLED}
    rows = json.dumps([row, row, {"instruction": "Who?", "output": "Mara"}])
    status, out, _ = run("f.json", rows, "--for=generator", "--format=released")
    assert status == 0 and "f.json: item 3: no reflection token" in out


# ---- what is counted ----------------------------------------------------------------------------
def test_the_report_counts_by_hand(run, tokenizer):
    rows = [ROWS["generator"], ROWS["generator"] | {"output": "[No Retrieval]A.[Utility:5]"}]
    rows += [{"instruction": "Say [Relevant].", "output": "Yes."}, CHAT]
    status, _, _ = run("g.jsonl", rows, "--length=12", "--out=report.json")
    report = read_json("report.json")
    assert status == 0 and report["rows"] == report["good"] == 4
    assert report["labels"] == {
        "retrieve": {"[Retrieval]": 1, "[No Retrieval]": 1}, "isrel": {"[Relevant]": 1},
        "issup": {"[Fully supported]": 1}, "isuse": {"[Utility:5]": 2},
    }  # fmt: skip
    assert set(report["notes"].values()) == {1, 2}
    model = Path(check.__file__).parents[1] / "base_model/weights"
    tokens = check._tokenizer(str(model), check.load_config(DEFAULTS))[0]
    source = GeneratorSource.read("g.jsonl", tokens, WEIGHTS)
    examples = [source.example(i) for i in range(4)]
    lengths = sorted(len(e.tokens) for e in examples)
    counted = report["tokens"]
    assert counted["total"] == sum(lengths) and counted["max"] == lengths[-1]
    assert (counted["p50"], counted["p95"]) == (lengths[1], lengths[3])
    assert counted["learned"] == sum(int((e.weight > 0).sum()) for e in examples)
    assert counted["longer"] == sum(n > 12 for n in lengths) > 0
    assert counted["longest"] == "g.jsonl:1"


DEFAULTS = {"config": "tiny", "overrides": []}


def test_a_report_is_written_again_and_never_over_a_file_of_ones_own(run):
    Path("mine.json").write_text("{}")
    assert run("q.jsonl", Q, "--out=mine.json")[0] == 0
    assert Path("mine.json.old-1").read_text() == "{}"
    assert run("q.jsonl", Q + Q, "--out=mine.json")[0] == 0
    assert read_json("mine.json")["rows"] == 2 and not Path("mine.json.old-2").exists()
    assert run("q.jsonl", Q + '{"question": ""}', "--out=mine.json")[0] == 2
    assert read_json("mine.json")["problems"]["count"] == 1


def test_tokens_need_not_be_counted(run):
    status, out, _ = run("q.jsonl", Q, "--tokens=false")
    assert status == 0 and "tokens:" not in out and "### Instruction:" in out


def test_memory_does_not_grow_with_the_file(tmp_path, tokenizer):
    peaks = []
    for n in (300, 3000):
        write_jsonl(tmp_path / "p.jsonl", [{"text": f"{i} " * 500} for i in range(n)])
        s = check.CheckSettings("corpus", False, None, False, tokenizer, "", True, "each")
        tracemalloc.start()
        check.check_file(tmp_path / "p.jsonl", s)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 200_000  # bytes; the larger file has six millions more


# ---- the formats, as docs/data.md describes them ------------------------------------------------
DOCUMENT = Path(__file__).parents[1] / "docs" / "data.md"


def test_every_example_of_the_document_is_good(tmp_path, monkeypatch, capsys):
    documents.run(DOCUMENT, tmp_path, monkeypatch)
    text = DOCUMENT.read_text()
    for file in tmp_path.glob("*.jsonl"):
        assert f"selfrag check {file.name}" in text
    # The one that is wrong on purpose, and what is said of it.
    assert cli.main(["check", "draft.jsonl"]) == 2
    printed = "".join(capsys.readouterr())
    [said] = [b for b in documents.blocks(DOCUMENT) if b.text.startswith("draft.jsonl: ")]
    documents._check_printed(said.text, printed, "draft.jsonl")


# ---- what a model sees --------------------------------------------------------------------------
def shown(row, tokenizer, kind, tmp_path, mask="each", terminal=False):
    """The rows of a file as they are printed."""
    write_jsonl(tmp_path / "rows.jsonl", [row])
    s = check.CheckSettings(kind, False, None, True, tokenizer, "", True, mask)
    summary, problems, stopped = check.check_file(tmp_path / "rows.jsonl", s)
    console = Console(file=io.StringIO(), force_terminal=terminal, width=80)
    report = check._report("rows.jsonl", s, summary, problems, stopped)
    check_text.show(report, "", check._shown_rows(s, summary), console)
    return console.file.getvalue().partition("as the model sees")[2]


@pytest.mark.parametrize("mask", ["each", "released"])
def test_what_is_not_learned_stands_between_marks(tokenizer, tmp_path, mask):
    twice = LABELLED.replace("[Utility:5]", "") + LABELLED
    text = shown(ROWS["generator"] | {"output": twice}, tokenizer, "generator", tmp_path, mask)
    outside = "".join(part.partition("⟧")[2] or part for part in text.split("⟦")[1:])
    inside = "".join(part.partition("⟧")[0] for part in text.split("⟦")[1:])
    assert "Where is the sea?" in inside and "[Fully supported][Utility:5]" in outside
    assert inside.count("It is in the west.") == 2 and "It is in the west." not in outside
    assert outside.count("[Relevant]") == (2 if mask == "each" else 1)
    assert ("<paragraph>" in outside) == (mask == "released")


def test_on_a_terminal_it_is_dim_and_control_characters_are_spelled(tokenizer, tmp_path):
    row = ROWS["generator"] | {"instruction": "Ring \x1b[31m \x07 it."}
    text = shown(row, tokenizer, "generator", tmp_path, terminal=True)
    assert "⟦" not in text and "\x1b[2m" in text  # dim
    assert "\x1b[31m" not in text and "\x07" not in text and "\\x1b[31m \\x07" in text


def test_a_critic_learns_one_token(tokenizer, tmp_path):
    text = shown(PUBLISHED, tokenizer, "critic", tmp_path)
    assert text.rpartition("⟧")[2].strip() == "[Relevant]"
    assert "It opened in 1901." in text.rpartition("⟧")[0]


def test_an_input_reaches_the_prompt_in_every_kind(tokenizer, tmp_path):
    row = {"instruction": "Sort.", "input": "b a", "output": "a b"}
    for kind in ("instructions", "generator", "questions"):
        text = shown(row, tokenizer, kind, tmp_path)
        assert "### Input:\n b a" in text


def test_a_long_row_is_shown_without_its_middle(tokenizer, tmp_path):
    text = shown({"question": "begin " + "word " * 9000 + "end"}, tokenizer, "questions", tmp_path)
    assert len(text) < 2000 and "begin" in text and "end" in text and " characters ... " in text
