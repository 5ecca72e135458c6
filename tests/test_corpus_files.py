"""What people have: folders of notes, tables with other columns, long documents, damaged files."""

import csv
import gzip
import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest

from selfrag_jax import artifacts, cli
from selfrag_jax.commands.embed import embed_corpus
from selfrag_jax.commands.index import build_index
from selfrag_jax.commands.index_changes import add_passages, remove_passages
from selfrag_jax.errors import UserError
from selfrag_jax.files import read_json
from selfrag_jax.records import Passage
from selfrag_jax.retrieval.corpus import Corpus, CorpusConfig
from selfrag_jax.retrieval.encoders import EncoderConfig
from selfrag_jax.retrieval.passages import write_passages
from selfrag_jax.retrieval.plan import IndexConfig
from selfrag_jax.retrieval.retriever import IndexRetriever

ENCODER = EncoderConfig("hashed", dim=16)
CURED = "{} files are not read; turn it into text first: {}"


def write(folder, **files):
    """Writes files; `__` in a name is a folder's slash, the last `_` its dot."""
    for name, content in files.items():
        path = folder / ".".join(name.replace("__", "/").rsplit("_", 1))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def read(path, **settings):
    return [p for _, p in Corpus(path, CorpusConfig(**settings))]


def index(path, out, mix="none", **settings):
    embed_corpus(path, ENCODER, out / "e", reading=CorpusConfig(**settings))
    build_index(out / "e", IndexConfig(), out / "i", mix)
    return out / "i"


# ---- rows ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("row", "passage"),
    [
        ({"docid": 7, "title": "T", "text": "x"}, Passage("7", "T", "x")),
        ({"_id": "a b", "contents": "x"}, Passage("a b", "", "x")),
        ({"url": "http://a/b", "headline": "T", "body": "x"}, Passage("http://a/b", "T", "x")),
        ({"Id": 1, "Title": "T", "Passage": "x"}, Passage("1", "T", "x")),
        ({"document": "x"}, Passage("0", "", "x")),
        ({"id": None, "text": "x", "title": None}, Passage("0", "", "x")),
        ({"id": 1, "title": "T", "text": None}, Passage("1", "T", "")),
        ({"id": 1.5, "text": 2}, Passage("1.5", "", "2")),
    ],
)
def test_rows_with_other_field_names_are_read(tmp_path, row, passage):
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    assert read(tmp_path / "p.jsonl") == [passage]


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(("name", "delimiter"), [("p.tsv", "\t"), ("p.csv", ","), ("p.csv", ";")])
def test_tables_of_any_delimiter_and_line_end_are_read(tmp_path, name, delimiter, ending):
    rows = [("Key", "Body", "Title"), ("a", f"One{delimiter} two", "T"), ("b", "Three", "")]
    with open(tmp_path / name, "w", newline="") as f:
        csv.writer(f, delimiter=delimiter, lineterminator=ending).writerows(rows)
    expected = [Passage("a", "T", f"One{delimiter} two"), Passage("b", "", "Three")]
    assert read(tmp_path / name, fields="id=Key") == expected


def test_fields_name_what_a_file_calls_them(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"k": 3, "abstract": "x", "name": "T", "text": "not this"}')
    fields = "text=abstract, title=name,id=k"
    assert read(tmp_path / "p.jsonl", fields=fields) == [Passage("3", "T", "x")]
    with pytest.raises(UserError, match=r"p\.jsonl:1: missing field 'K2' .*--fields=id=NAME"):
        read(tmp_path / "p.jsonl", fields="id=K2")
    (tmp_path / "p.csv").write_text("id,Text\n1,x\n")
    with pytest.raises(
        UserError, match=r"p\.csv:1: the header lacks body .*; correct text= in --f"
    ):
        read(tmp_path / "p.csv", fields="text=body")
    for wrong in ("abstract", "body=x", "text=", ""):
        with pytest.raises(UserError, match=f"--fields={wrong}: expected id=, text= or title="):
            CorpusConfig(fields=wrong)


def test_what_its_owner_should_know_is_said(tmp_path, capsys):
    rows = [{"text": "Otters swim."}, {"text": "Otters swim."}, {"text": ""}, {"text": "x" * 3000}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    counts = write_passages(Corpus(tmp_path / "p.jsonl"), tmp_path / "s")
    assert counts == {"passages": 3, "empty": 1, "repeated": 1}
    said = capsys.readouterr().err
    for notice in (
        "1 rows without title and text were left out",
        "3 rows have no id and got their numbers; --fields=id=NAME",
        "1 of 3 passages repeat the title and text of another one",
        "1 of 3 passages are longer than 2,400 characters (the longest has 3,000)",
    ):
        assert notice in said


# ---- folders and documents -----------------------------------------------------------------------
def test_a_folder_of_notes_is_read(tmp_path, capsys):
    notes = write(
        tmp_path / "notes",
        otters_txt="Otters live in rivers. " * 30,
        animals__beaver_md="# The beaver\n\nIt builds dams.\n\n## Food\n\nBark.\n",
        more_jsonl='{"text": "Frogs jump."}\n{"id": "toad", "text": "Toads walk."}',
        zipped_csv="id,text\n1,Newts swim.",
        empty_txt=" \n",
        picture_png=b"\x89PNG",
        paper_pdf=b"%PDF",
        _git__config_txt="hidden",
    )
    (notes / "_git").rename(notes / ".git")
    (notes / "old.txt.gz").write_bytes(gzip.compress(b"Old news."))
    corpus = Corpus(notes)
    found = {p.id: (p.title, p.text) for _, p in corpus}
    assert found == {
        "animals/beaver.md#1": ("The beaver", "# The beaver\n\nIt builds dams."),
        "animals/beaver.md#2": ("The beaver: Food", "## Food\n\nBark."),
        "more.jsonl:0": ("", "Frogs jump."),
        "toad": ("", "Toads walk."),
        "old.txt.gz": ("old", "Old news."),
        "otters.txt#1": ("otters", ("Otters live in rivers. " * 25).strip()),
        "otters.txt#2": ("otters", ("Otters live in rivers. " * 5).strip()),
        "1": ("", "Newts swim."),
    }
    assert corpus.num_empty == 1 and corpus.bytes_read == corpus.num_bytes
    assert "files left out: 1 .pdf, 1 .png; .pdf: pdftotext FILE.pdf" in corpus.left_out
    assert "animals/beaver.md" in [p.id for p in read(notes, split=0)]
    assert "otters.txt#12" in [p.id for p in read(notes, split=10)]


def test_a_document_in_a_row_is_split_and_keeps_its_title(tmp_path):
    text = "".join(f"Sentence {i} has five words. " for i in range(4000))  # 20,000 words
    (tmp_path / "p.jsonl").write_text(json.dumps({"id": "d", "title": "T", "text": text}))
    assert len(read(tmp_path / "p.jsonl")) == 1
    pieces = read(tmp_path / "p.jsonl", split=100)
    assert [p.id for p in pieces] == [f"d#{i}" for i in range(1, 201)]
    assert {p.title for p in pieces} == {"T"}
    assert " ".join(p.text for p in pieces) == text.strip()
    assert all(p.text.endswith(".") and len(p.text.split()) == 100 for p in pieces)


def test_links_in_circles_end(tmp_path):
    notes = write(tmp_path / "notes", a__one_txt="One.")
    write(tmp_path, outside_txt="not of this folder")
    os.symlink("..", notes / "up")
    os.symlink("a", notes / "again")
    os.symlink("self", notes / "self")
    os.symlink(tmp_path, notes / "a" / "above")
    assert [p.id for p in read(notes)] == ["a/one.txt"]


def test_names_that_are_not_utf8_are_ids(tmp_path):
    (tmp_path / "notes").mkdir()
    with open(os.path.join(os.fsencode(tmp_path / "notes"), b"caf\xe9.txt"), "w") as f:
        f.write("Coffee.")
    assert read(tmp_path / "notes") == [Passage("caf�.txt", "caf�", "Coffee.")]
    assert index(tmp_path / "notes", tmp_path).is_dir()


def test_a_folder_that_changed_is_noticed_and_hidden_files_do_not_count(tmp_path):
    notes = write(tmp_path / "notes", a_txt="One.", manifest_json="{}", config_json="{}")
    index(notes, tmp_path)
    (notes / ".hidden.txt").write_text("Nothing.")
    assert index(notes, tmp_path).is_dir()
    write(notes, a_txt="Two.")
    with pytest.raises(UserError, match="made with other inputs"):
        index(notes, tmp_path)


def test_what_was_embedded_before_these_settings_existed_is_still_finished(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"id": 1, "text": "x"}')
    index(path, tmp_path)
    made = read_json(tmp_path / "e" / "manifest.json")
    assert made["config"] == asdict(ENCODER)  # no trace of --split and --fields
    assert made["inputs"] == {"passages": artifacts.fingerprint(path)}


def test_documents_are_added_and_removed_by_their_own_ids(tmp_path):
    text = "Otters live in rivers. " * 30
    one = write(tmp_path / "one", otters_txt=text, frogs_txt="Frogs jump.")
    out = index(one, tmp_path, split=20)
    more = write(tmp_path / "two", newts_txt="Newts swim far. " * 40)
    assert add_passages(out, more, IndexConfig()) == 6 + 1
    with pytest.raises(UserError, match="id 'newts.txt#1' is in the index already"):
        add_passages(out, more, IndexConfig(), CorpusConfig(split=20))
    (tmp_path / "ids.txt").write_text("otters.txt\nnewts.txt#1\n")
    assert remove_passages(out, tmp_path / "ids.txt") == 6 + 1
    [found] = IndexRetriever(out).search(["otters"], 9)
    assert sorted(p.id for p in found) == ["frogs.txt", *(f"newts.txt#{i}" for i in range(2, 8))]
    (tmp_path / "ids.txt").write_text("newts.txt#4\n")
    remove_passages(out, tmp_path / "ids.txt")
    (tmp_path / "ids.txt").write_text("newts.txt\n")  # also what comes after a removed passage
    assert remove_passages(out, tmp_path / "ids.txt") == 5
    assert [p.id for p in IndexRetriever(out).search(["newts"], 9)[0]] == ["frogs.txt"]
    (tmp_path / "ids.txt").write_text("frogs.txt\notters\n")
    with pytest.raises(UserError, match=r"ids\.txt:2: the index has no passage 'otters'"):
        remove_passages(out, tmp_path / "ids.txt")


def test_what_is_added_is_split_and_read_as_the_index_was(tmp_path):
    long = "Otters live in rivers. They eat fish."
    write(tmp_path, a_jsonl=json.dumps({"k": "a", "abstract": long}))
    out = index(tmp_path / "a.jsonl", tmp_path, split=4, fields="id=k,text=abstract")
    write(tmp_path, b_jsonl=json.dumps({"k": "b", "abstract": long, "text": "not this"}))
    assert add_passages(out, tmp_path / "b.jsonl", IndexConfig()) == 2
    write(tmp_path, c_csv=f"k,text\nc,{long}\n")  # another file may name a field otherwise
    with pytest.raises(UserError, match=r"c\.csv:1: the header lacks abstract"):
        add_passages(out, tmp_path / "c.csv", IndexConfig())
    assert add_passages(out, tmp_path / "c.csv", IndexConfig(), CorpusConfig(4, "text=text")) == 2
    with pytest.raises(UserError, match=r"--split=9: the index was made by --split=4, .*leave"):
        add_passages(out, tmp_path / "b.jsonl", IndexConfig(), CorpusConfig(split=9))
    (tmp_path / "ids.txt").write_text("b\n")
    assert remove_passages(out, tmp_path / "ids.txt") == 2
    kept = {p.id for p in IndexRetriever(out).search(["fish"], 9)[0]}
    assert kept == {"a#1", "a#2", "c#1", "c#2"}

    notes = index(write(tmp_path / "notes", a_txt="x"), tmp_path / "n")
    with pytest.raises(UserError, match="--split=9: the index was made without --split"):
        add_passages(notes, tmp_path / "b.jsonl", IndexConfig(), CorpusConfig(split=9))
    # Indexes of earlier versions do not know how they were read: what is asked for counts.
    (notes / "segments" / "0000" / "passages" / "reading.json").unlink()
    read_so = CorpusConfig(4, "id=k,text=abstract")
    assert add_passages(notes, tmp_path / "b.jsonl", IndexConfig(), read_so) == 2


@pytest.mark.parametrize(("before", "after"), [(9, 1), (1, 9)])
def test_a_document_that_grew_or_shrank_is_not_added_twice(tmp_path, before, after):
    text = "Otters live in rivers. "
    out = index(write(tmp_path / "one", otters_txt=text * before, a_txt="x"), tmp_path, split=20)
    more = write(tmp_path / "two", otters_txt=text * after)
    with pytest.raises(UserError, match="'otters.txt' is in the index already, in .* passages?;"):
        add_passages(out, more, IndexConfig())
    (tmp_path / "ids.txt").write_text("otters.txt\n")
    assert remove_passages(out, tmp_path / "ids.txt") == (before > 1) + 1
    assert add_passages(out, more, IndexConfig()) == (after > 1) + 1


def test_what_a_stage_made_beside_the_notes_is_no_part_of_them(tmp_path):
    notes = write(tmp_path / "notes", a_txt="One.", app__a_txt="Two.", app__manifest_json="{}")
    out = index(notes, notes)
    write(out, encoder__vocab_txt="three")  # as encoder models bring it
    assert sorted(p.id for p in read(notes)) == ["a.txt", "app/a.txt"]
    assert index(notes, notes) == out  # finished, and known by the same files
    assert [p.id for p in read(out)] == ["encoder/vocab.txt"]  # asked for by name


def test_a_title_field_that_no_row_has_is_refused(tmp_path):
    write(tmp_path, p_jsonl='{"name": "A", "text": "x"}\n{"text": "y"}\n')
    with pytest.raises(UserError, match=r"no row has a title in its field 'nmae'; correct title="):
        read(tmp_path / "p.jsonl", fields="title=nmae")
    assert [p.title for p in read(tmp_path / "p.jsonl", fields="title=name")] == ["A", ""]


def test_files_of_a_folder_are_compared_once(tmp_path, monkeypatch):
    for i in range(40):
        write(tmp_path, **{f"a{i}_txt": "x", f"b{i}_py": "x"})
    hashed = []
    plain = Path.__hash__
    monkeypatch.setattr(type(tmp_path), "__hash__", lambda p: hashed.append(p) or plain(p))
    assert len(Corpus(tmp_path).files) == 40 and len(hashed) < 4 * 80  # not the square


# ---- small and odd corpora -----------------------------------------------------------------------
@pytest.mark.parametrize("n", [1, 3])
def test_a_tiny_corpus_answers_with_all_that_it_has(tmp_path, n):
    rows = [{"id": i, "text": f"Otter {i} swims."} for i in range(n)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = index(tmp_path / "p.jsonl", tmp_path, "bm25")
    [found] = IndexRetriever(out).search(["Does otter 0 swim?"], 5)
    assert len(found) == n and found[0].id == "0"


def test_odd_ids_and_texts_come_back_as_they_are(tmp_path):
    ids = ["A", "a", " a", "a ", "1", "01", "#1"]
    texts = ["[Relevant] <paragraph>x</paragraph></s>", "a\0b", "\u2028", "é", "🦦", '"', "\\N"]
    rows = [{"id": i, "text": t} for i, t in zip(ids, texts, strict=True)]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    out = index(tmp_path / "p.jsonl", tmp_path, "bm25")
    [found] = IndexRetriever(out).search(["x"], 9)
    kept = {i: t for i, t in zip(ids, texts, strict=True) if t.strip()}
    assert {p.id: p.text for p in found} == kept


def test_a_line_of_ten_megabytes_is_read(tmp_path):
    text = "word and word. " * 700_000
    (tmp_path / "p.tsv").write_text(f"id\ttext\n1\t{text}\n")
    assert read(tmp_path / "p.tsv") == [Passage("1", "", text)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"\x7fELF\0\1\xff" * 9, r"p\.txt:\d: not UTF-8 .*is it a text file at all\?"),
        ("p.txt", b"id\ttext\r\n1\ta\r\n", r"p\.txt:1: begins as a table does; rename it to \.tsv"),
        ("p.txt", b"text\n\0", r"p\.txt:2: holds a NUL byte; is it a text file"),
        ("p.tsv", b"\x7fELF\0\1", r"p\.tsv:1: holds a NUL byte"),
        ("p.md", "é".encode("utf-16"), r"p\.md:\d: not UTF-8 .*iconv -f UTF-16 -t UTF-8 .*p\.md"),
        ("p.jsonl", '{"text": "é"}'.encode("utf-16"), r"p\.jsonl:\d: not UTF-8 .*iconv -f UTF-16"),
        ("p.csv", "id,text\n1,Café\n".encode("latin-1"), r"p\.csv:\d: not UTF-8 .*iconv -f LATIN1"),
        ("p.tsv", b'id\ttext\n1\t"Hi" he said\n', r"p\.tsv:2: .*double those in it"),
        ("p.csv", b"Otters swim.,1\n", r"p\.csv:1: the header lacks text \(it has: Otters swim"),
        ("p.csv", b"id,text,text\n", r"p\.csv:1: the column 'text' occurs more than once"),
        ("p.jsonl", b'{"id": 1, "text": "a"}\n{"id": "1", "text": "b"}', r":2: id '1' was already"),
        ("p.jsonl", b'{"id": "", "text": "a"}', r"p\.jsonl:1: the id is empty; leave the"),
        ("p.jsonl", b'{"id": 1, "Abstract": "a"}', r":1: missing field 'text' .*--fields=text="),
        ("p.pdf", b"%PDF", r"p\.pdf: \.pdf files are not read; .*: pdftotext"),
        ("p.html", b"<p>", r"p\.html: \.html files are not read; .*: pandoc -t plain"),
        ("passages_00", b"", r"passages_00: is of no kind that is read; expected \.tsv, \.csv"),
        ("p.txt", b" ", "holds no passages: 1 rows have neither title nor text"),
    ],
)  # fmt: skip
def test_a_hostile_corpus_is_refused_in_one_line(tmp_path, capsys, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as e:
        write_passages(Corpus(tmp_path / name), tmp_path / "s")
    assert "\n" not in str(e.value) and name in str(e.value)


def test_folders_that_cannot_be_read_are_refused(tmp_path, monkeypatch):
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="none: the folder has no files of passages"):
        Corpus(tmp_path / "none")
    with pytest.raises(UserError, match=r"it has 2 \.pdf; \.pdf: pdftotext FILE\.pdf"):
        Corpus(write(tmp_path / "papers", a_pdf=b"", b__c_pdf=b""))
    with pytest.raises(UserError, match="no such file or folder of passages"):
        Corpus(tmp_path / "missing")

    notes = write(tmp_path / "notes", a_txt="One.", b_txt="Two.")
    # Root may read everything, so this is pretended.
    monkeypatch.setattr(os, "access", lambda path, _: path.name != "b.txt")
    with pytest.raises(UserError, match=r"notes/b\.txt: you may not read it"):
        Corpus(notes)


@pytest.mark.parametrize("name", ["passages_00", "published"])
def test_published_embeddings_are_not_taken_for_ours(tmp_path, name):
    write(tmp_path / "published", passages_00=b"")
    (tmp_path / "published" / "passages.00").rename(tmp_path / "published" / "passages_00")
    (tmp_path / "passages_00").write_bytes(b"")
    with pytest.raises(
        UserError, match=f"{name}: published embeddings need .*--vectors='.*passages_"
    ):
        build_index(tmp_path / name, IndexConfig(), tmp_path / "i")


def test_flags_about_a_corpus_go_with_a_corpus(tmp_path, capsys):
    command = ["index", f"--embeddings={tmp_path}", f"--out={tmp_path}/i"]
    assert cli.main([*command, "--split=100"]) == 2
    assert "--split: goes with --passages or --add" in capsys.readouterr().err
    assert cli.main(["index", f"--passages={tmp_path}", f"--out={tmp_path}/i", "--split=-1"]) == 2
    assert "--split=-1: expected a number of words" in capsys.readouterr().err
