"""Corpus files and the passages, vectors and pickles made of them, on the kinds of input that real
corpora have."""

import gzip
import json
import os
import pickle
import socket
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfrag_jax import cli
from selfrag_jax.commands.embed import embed_corpus
from selfrag_jax.errors import UserError
from selfrag_jax.records import Passage
from selfrag_jax.retrieval import embedding, passages, vectors
from selfrag_jax.retrieval.corpus import Corpus, write_tsv
from selfrag_jax.retrieval.encoders import EncoderConfig
from selfrag_jax.retrieval.passages import PassageStore, write_passages
from selfrag_jax.retrieval.pickles import read_pickled_embeddings
from selfrag_jax.retrieval.vectors import VectorFiles, VectorLayout, as_float32, write_vectors

AWKWARD = [
    Passage("a", "Čapek, Karel", "Karel Čapek wrote “R.U.R.” — the word robot is his brother’s."),
    Passage("b", "", "A passage with an empty title."),
    Passage("c", 'Quotes "inside"', 'He said: "tabs\tand\nnewlines, too".'),
    Passage("d", "東京", "東京は日本の首都である。"),
    Passage("e", "Long", " ".join(f"word{i}" for i in range(300))),
    Passage("f", "Control", "This text spells [Retrieval] and </paragraph> and <s>."),
    Passage("g", "A title alone", ""),
]
ENCODER = EncoderConfig("hashed", dim=16, rows_per_file=7)


def read(path):
    return [p for _, p in Corpus(path)]


def many(n):
    return [Passage(f"id-{i}", f"Title {i % 7}", f"Text of passage {i}.") for i in range(n)]


# ---- files ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["p.tsv", "p.tsv.gz"])
def test_tsv_preserves_awkward_text(tmp_path, name):
    assert write_tsv(tmp_path / "p.tsv", AWKWARD) == len(AWKWARD)
    path = tmp_path / name
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress((tmp_path / "p.tsv").read_bytes()))
    assert read(path) == AWKWARD


@pytest.mark.parametrize("id_field", ["id", "_id", "docid", "pid"])
@pytest.mark.parametrize("text_field", ["text", "contents"])
def test_json_lines_keep_ids_and_text(tmp_path, id_field, text_field):
    rows = [{id_field: p.id, "title": p.title, text_field: p.text} for p in AWKWARD]
    path = tmp_path / "p.jsonl.gz"
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_bytes(gzip.compress(text.encode()))
    assert read(path) == AWKWARD


def test_a_quoted_first_line_of_contents_is_the_title(tmp_path):
    path = tmp_path / "p.jsonl"  # as FlashRAG has it
    path.write_text('{"id": "0", "contents": "\\"Paris\\"\\nThe capital."}\n')
    assert read(path) == [Passage("0", "Paris", "The capital.")]


def test_passages_with_neither_title_nor_text_are_left_out_and_counted(tmp_path):
    path = tmp_path / "p.tsv"
    path.write_text("id\ttext\ttitle\n1\t \t\n2\t\tTitle\n3\tText\t\n")
    corpus = Corpus(path)
    assert [p.id for _, p in corpus] == ["2", "3"] and corpus.num_empty == 1
    assert write_passages(corpus, tmp_path / "s") == {"passages": 2, "empty": 1, "repeated": 0}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.tsv", "", "holds no passages"),
        ("p.tsv", "id\ttext\ttitle\n", "holds no passages"),
        ("p.tsv", "id\ttitle\n1\tx\n", r"p\.tsv:1: the header lacks text"),
        ("p.tsv", "id\ttext\ttitle\n1\tonly two\n", r"p\.tsv:2: 2 columns"),
        ("p.tsv", "id\ttext\ttitle\n\ta\tb\n", r"p\.tsv:2: the id is empty"),
        ("p.tsv", 'id\ttext\ttitle\n1\t"a\nb"\tt\n2\ta\n', r"p\.tsv:4: 2 columns"),
        ("p.tsv", 'id\ttext\ttitle\n1\t"a"b\tt\n', r"p\.tsv:2: '\t' expected after '\"'"),
        ("p.tsv", 'id\ttext\ttitle\n1\t"never closed\tt\n', r"p\.tsv:2: .* quote not closed"),
        (
            "p.tsv",
            "id\ttext\ttitle\n1\ta\tb\n1\tc\td\n",
            r"p\.tsv:3: id '1' was already used at .*p\.tsv:2",
        ),
        ("p.jsonl", '{"id": 1, "title": "t"}\n', r"p\.jsonl:1: missing field 'text'"),
        ("p.jsonl", '{"text": "a"}\n{"text": 3,}\n', r"p\.jsonl:2: not valid JSON"),
        ("p.jsonl", '{"_id": "x", "text": ["a"]}\n', r"p\.jsonl:1: field 'text' must be text"),
    ],
)
def test_errors_in_a_corpus_name_file_and_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        write_passages(Corpus(path), tmp_path / "s")
    assert not (tmp_path / "s" / passages.COUNTS).exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.tsv", b"id\ttext\ttitle\n1\t\xff\xfe\tb\n", "not UTF-8"),
        ("p.tsv.gz", b"id\ttext\n", "is not compressed by gzip"),
        ("p.tsv.gz", gzip.compress(b"id\ttext\n" + b"1\ta\n" * 9000, mtime=0)[:-9], "cut off"),
        ("p.jsonl", b'{"text": "a"}\n' * 2000 + b'{"text": "\xff"}\n', r"p\.jsonl:2001: not UTF-8"),
        ("p.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9000, mtime=0)[:-9], "cut off"),
    ],
    ids=["bytes", "no gzip", "cut tsv", "late byte", "cut json"],
)
def test_damaged_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


# ---- passages on disk ----------------------------------------------------------------------------
def test_a_store_is_read_by_row_by_range_and_by_id(tmp_path, monkeypatch):
    monkeypatch.setattr(passages, "BATCH_ROWS", 4)
    rows = many(23)
    write_tsv(tmp_path / "p.tsv", rows)
    write_passages(Corpus(tmp_path / "p.tsv"), tmp_path / "s")
    store = PassageStore(tmp_path / "s")
    assert len(store) == 23 and list(store) == rows and store[22] == rows[22]
    for start, stop in ((0, 4), (3, 9), (8, 23), (20, 99), (5, 5)):
        assert list(store.read(start, stop)) == rows[start:stop]
    assert store.rows_of(["id-7", "id-0", "nothing", "id-22"]).tolist() == [7, 0, -1, 22]
    with pytest.raises(IndexError):
        store[23]


def test_ids_with_equal_hashes_are_told_apart(tmp_path, monkeypatch):
    def colliding(ids):
        return np.array([len(i) for i in ids], np.uint64)

    monkeypatch.setattr(passages, "id_hashes", colliding)
    write_tsv(tmp_path / "p.tsv", many(12))
    write_passages(Corpus(tmp_path / "p.tsv"), tmp_path / "s")
    store = PassageStore(tmp_path / "s")
    assert store.rows_of([f"id-{i}" for i in range(13)]).tolist() == [*range(12), -1]


def test_a_truncated_store_is_refused(tmp_path):
    write_tsv(tmp_path / "p.tsv", many(12))
    write_passages(Corpus(tmp_path / "p.tsv"), tmp_path / "s")
    for name in ("passages.arrow", "id_rows.npy"):
        file = tmp_path / "s" / name
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match="damaged|cut off"):
            PassageStore(tmp_path / "s")
        file.write_bytes(whole)


# ---- vectors on disk -----------------------------------------------------------------------------
def test_every_finite_float16_becomes_the_same_float32():
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    every = every[np.isfinite(every)]
    np.testing.assert_array_equal(as_float32(every), every.astype(np.float32))


@given(st.lists(st.integers(0, 22), max_size=40), st.integers(0, 22), st.integers(1, 9))
def test_rows_are_taken_from_all_files_in_the_order_asked(tmp_path_factory, rows, start, size):
    folder, n = tmp_path_factory.getbasetemp() / "vectors", 23
    everything = np.random.default_rng(0).standard_normal((n, 3)).astype(np.float16)
    layout = VectorLayout(n, 3, "float16", 5)
    if not folder.exists():
        layout.write(folder)
        for i in range(layout.num_files):
            first, after = layout.rows_of_file(i)
            write_vectors(layout.file(folder, i), everything[first:after], first)
    files = VectorFiles(folder)
    np.testing.assert_array_equal(files.take(np.array(rows, np.int64)), everything[rows])
    blocks = list(files.blocks(size, start))
    assert max(map(len, blocks)) <= size
    np.testing.assert_array_equal(np.concatenate(blocks), everything[start:])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_vectors_that_are_not_finite_are_refused_by_row(tmp_path, value):
    x = np.ones((5, 3), np.float16)
    x[3, 1] = value
    with pytest.raises(UserError, match="row 103 holds NaN or infinite"):
        write_vectors(tmp_path / "000000.npy", x, 100)
    assert not list(tmp_path.iterdir())


# ---- published embeddings ------------------------------------------------------------------------
@pytest.fixture
def corpus_of_20(tmp_path):
    write_tsv(tmp_path / "p.tsv", many(20))
    return tmp_path / "p.tsv"


def write_pickles(folder, ids, x, protocol=4, parts=2):
    size = -(-len(ids) // parts)
    for i in range(parts):
        at = slice(i * size, (i + 1) * size)
        (folder / f"passages_{i:02d}").write_bytes(pickle.dumps((ids[at], x[at]), protocol))


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_published_embeddings_are_taken_by_id(corpus_of_20, tmp_path, protocol):
    order = np.random.default_rng(0).permutation(20)
    x = np.random.default_rng(1).standard_normal((20, 16)).astype(np.float16)
    write_pickles(tmp_path, [f"id-{i}" for i in order], x[order], protocol)
    embed_corpus(corpus_of_20, ENCODER, tmp_path / "e", pickles=f"{tmp_path}/passages_*")
    found = VectorFiles(tmp_path / "e" / "vectors")
    np.testing.assert_array_equal(np.concatenate(list(found.blocks(99))), x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids, x: (ids[:-1], x), "19 ids for 20 vectors"),
        (lambda ids, x: (ids[:-1], x[:-1]), "1 passages have no vector, the first is 'id-19'"),
        (lambda ids, x: ([*ids[:-1], "other"], x), "id 'other' is not in the corpus"),
        (lambda ids, x: ([*ids[:-1], "id-0"], x), "have a vector already"),
        (lambda ids, x: (ids, x[:, :8]), "vectors of 8 dimensions; the encoder has 16"),
        (lambda ids, x: (ids, x * np.float16("nan")), "row 0 holds NaN"),
        (lambda ids, x: (ids, x.astype(str)), "expected n ids and an array of floats"),
        (lambda ids, x: (ids, x.astype(object)), "an array that is not of numbers or text"),
        (lambda ids, x: (np.array(ids, object), x), "an array that is not of numbers or"),
        (lambda ids, x: (ids, x * np.float64(1e6)), "row 0 holds NaN or infinite"),
        (lambda ids, x: (ids, os.getcwd), "asks for (posix|os).getcwd, and only arrays"),
        (lambda ids, x: (ids, x.tolist()), "expected n ids"),
    ],
)
def test_wrong_embeddings_are_refused_by_file(corpus_of_20, tmp_path, change, message):
    ids = [f"id-{i}" for i in range(20)]
    content = change(ids, np.ones((20, 16), np.float16))
    (tmp_path / "passages_00").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=message):
        embed_corpus(corpus_of_20, ENCODER, tmp_path / "e", pickles=f"{tmp_path}/passages_*")
    assert not list((tmp_path / "e" / "vectors").glob("*.npy"))


def test_a_pickle_that_runs_code_runs_nothing(corpus_of_20, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    (tmp_path / "passages_00").write_bytes(pickle.dumps(([], Evil())))
    with pytest.raises(UserError, match="only arrays, lists and text are allowed"):
        embed_corpus(corpus_of_20, ENCODER, tmp_path / "e", pickles=f"{tmp_path}/passages_*")
    assert not (tmp_path / "ran").exists()


class Crafted:
    """Pickles as a call of a NumPy name with chosen arguments and state."""

    def __init__(self, call, arguments, state=None):
        self.reduced = (call, arguments, state)

    def __reduce__(self):
        return self.reduced


def test_a_crafted_array_of_pointers_is_not_built(tmp_path):
    """Flags of object types that a dtype's state clears would make NumPy follow raw bytes."""
    plain = (3, "|", None, None, None, -1, -1, 0)
    pointers = Crafted(np.dtype, ("O8", False, True), plain)
    data = b"A" * 16
    reconstruct, from_buffer = np._core.multiarray._reconstruct, np._core.numeric._frombuffer
    for array in (
        Crafted(reconstruct, (np.ndarray, (0,), b"b"), (1, (2,), pointers, False, data)),
        Crafted(from_buffer, (data, pointers, (2,), "C")),
        Crafted(np.ndarray, ((2,), pointers, data)),
    ):
        (tmp_path / "p").write_bytes(pickle.dumps((array, np.ones((2, 3), np.float16))))
        with pytest.raises(UserError, match="safe to read: (holds an array of type 'O8'|'str')"):
            read_pickled_embeddings(tmp_path / "p")


@pytest.mark.parametrize("protocol", [3, 5])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_any_layout_are_read(tmp_path, protocol, order):
    x = np.asarray(np.arange(12).reshape(3, 4), ">f4", order=order)
    (tmp_path / "p").write_bytes(pickle.dumps((np.array(["a", "b", "é"]), x), protocol))
    ids, found = read_pickled_embeddings(tmp_path / "p")
    assert ids == ["a", "b", "é"]
    np.testing.assert_array_equal(found, x)


# ---- embedding -----------------------------------------------------------------------------------
def contents(folder):
    """Relative path -> bytes of all files but manifests, which hold the time."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name not in ("manifest.json", ".lock")
    }


def test_shards_and_interruptions_end_with_the_same_files(corpus_of_20, tmp_path, monkeypatch):
    assert embed_corpus(corpus_of_20, ENCODER, tmp_path / "whole") == 20
    for shard in ((1, 2), (0, 2)):
        embed_corpus(corpus_of_20, ENCODER, tmp_path / "shards", shard)
        finished = (tmp_path / "shards" / "manifest.json").exists()
        assert finished == (shard == (0, 2))
    assert contents(tmp_path / "shards") == contents(tmp_path / "whole")

    write, calls = embedding.write_vectors, []

    def disk_full_at_the_second_file(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        write(*args)

    monkeypatch.setattr(embedding, "write_vectors", disk_full_at_the_second_file)
    with pytest.raises(OSError, match="No space left"):
        embed_corpus(corpus_of_20, ENCODER, tmp_path / "cut")
    assert len(list((tmp_path / "cut" / "vectors").glob("*.npy"))) == 1
    embed_corpus(corpus_of_20, ENCODER, tmp_path / "cut")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert len(calls) == 1 + 1 + 2  # one file, the failure, the two that were missing


@pytest.mark.slow
def test_processes_of_one_job_share_the_work(corpus_of_20, tmp_path):
    """Started at once, on one disk: one reads the corpus, both embed, neither ends too early."""
    embed_corpus(corpus_of_20, ENCODER, tmp_path / "whole")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "selfrag_jax", "embed", f"--passages={corpus_of_20}"]
    command += [f"--out={tmp_path}/both", "--config.encoder.dim=16"]
    command += ["--config.encoder.rows_per_file=7"]
    processes = [
        subprocess.Popen([*command, f"--distributed={address},2,{i}"], stderr=subprocess.PIPE)
        for i in range(2)
    ]
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err.decode()[-2000:]
    whole = contents(tmp_path / "whole")
    assert len(whole) > 6 and contents(tmp_path / "both").keys() == whole.keys()
    same = {name for name, content in contents(tmp_path / "both").items() if content == whole[name]}
    assert whole.keys() - same <= {"started.json"}  # the config is spelt another way


def test_a_changed_corpus_and_a_strangers_folder_are_refused(corpus_of_20, tmp_path, capsys):
    embed_corpus(corpus_of_20, ENCODER, tmp_path / "e", (0, 2))
    write_tsv(corpus_of_20, many(21))
    with pytest.raises(UserError, match="another passages: .* has changed since"):
        embed_corpus(corpus_of_20, ENCODER, tmp_path / "e")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="is not empty and was not made by"):
        embed_corpus(corpus_of_20, ENCODER, tmp_path / "mine")
    with pytest.raises(UserError, match="dim: 16 there, 32 asked for"):
        write_tsv(corpus_of_20, many(20))
        embed_corpus(corpus_of_20, replace(ENCODER, dim=32), tmp_path / "e")
    argv = ["embed", f"--passages={corpus_of_20}", f"--out={tmp_path}/o", "--shard=2/2"]
    assert cli.main(argv) == 2
    assert "--shard=2/2: expected i/n with i from 0 to n-1" in capsys.readouterr().err


def test_a_corrected_corpus_is_embedded(tmp_path):
    """Nothing of the failed attempt stands in its way, nor in that of other pickles."""
    path, out = tmp_path / "p.tsv", tmp_path / "e"
    write_tsv(path, [*many(5), many(1)[0]])
    with pytest.raises(UserError, match="already used"):
        embed_corpus(path, ENCODER, out)
    write_tsv(path, many(5))
    x = np.ones((5, 16), np.float16)
    (tmp_path / "x_0").write_bytes(pickle.dumps(([f"id-{i}" for i in range(4)], x[:4])))
    with pytest.raises(UserError, match="1 passages have no vector"):
        embed_corpus(path, ENCODER, out, pickles=f"{tmp_path}/x_*")
    (tmp_path / "x_1").write_bytes(pickle.dumps((["id-4"], x[4:])))
    assert embed_corpus(path, ENCODER, out, pickles=f"{tmp_path}/x_*") == 5
    assert not list(out.rglob("*.tmp"))


def test_a_truncated_file_of_vectors_is_refused(corpus_of_20, tmp_path):
    embed_corpus(corpus_of_20, ENCODER, tmp_path / "e")
    file = tmp_path / "e" / "vectors" / "000001.npy"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"000001\.npy: is damaged or cut off"):
        VectorFiles(tmp_path / "e" / "vectors")
    np.save(file, np.zeros((7, 8), np.float16))
    with pytest.raises(UserError, match=r"holds float16 \[7, 8\]; expected float16 \[7, 16\]"):
        VectorFiles(tmp_path / "e" / "vectors")
    file.unlink()
    with pytest.raises(UserError, match="no such file; remove it and run `selfrag embed` again"):
        VectorFiles(tmp_path / "e" / "vectors")


def test_the_space_of_an_array_is_reserved(tmp_path):
    """A full disk is then an error at once, and not the end of the process while it is written."""
    array = vectors.create_array(tmp_path / "x.npy", "float32", (1 << 18,))
    used = (tmp_path / "x.npy").stat().st_blocks * 512
    assert used >= array.nbytes == 1 << 20


def test_top_k_breaks_ties_by_row():
    scores = np.array([[1, 3, 3, 2, 3]], np.float32)
    columns, values = vectors.top_k(scores, 2)
    assert columns.tolist() == [[1, 2]]
    columns, values = vectors.top_k(scores, 4)
    assert columns.tolist() == [[1, 2, 4, 3]] and values.tolist() == [[3, 3, 3, 2]]
