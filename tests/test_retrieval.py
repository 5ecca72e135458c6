"""Corpus files, embeddings, index and retrieval, on the kinds of input that real corpora have."""

import json
from dataclasses import replace

import numpy as np
import pytest

from selfrag_jax import cli, config, records
from selfrag_jax.commands.embed import embed_corpus
from selfrag_jax.commands.index import build_index
from selfrag_jax.commands.retrieve import retrieve_file
from selfrag_jax.errors import UserError
from selfrag_jax.records import Passage, read_rows
from selfrag_jax.retrieval import corpus, encoders, index
from selfrag_jax.retrieval.retriever import OnlineRetriever
from selfrag_jax.world import encyclopedia

# As in the quickstart; with fewer dimensions, words collide.
ENCODER = encoders.EncoderConfig("hashed", 384, 2.0)
INDEX = index.IndexConfig(20_000, 0.5, 2, 50)

AWKWARD = [
    Passage("a", "Čapek, Karel", "Karel Čapek wrote “R.U.R.” — the word robot is his brother’s."),
    Passage("b", "", "A passage with an empty title."),
    Passage("c", 'Quotes "inside"', 'He said: "tabs\tand\nnewlines, too".'),
    Passage("d", "東京", "東京は日本の首都である。"),
    Passage("e", "Long", " ".join(f"word{i}" for i in range(300))),
    Passage("f", "Control", "This text spells [Retrieval] and </paragraph> and <s>."),
]


def embed(passages, folder):
    """Writes a corpus to folder/p.tsv and embeds it. Returns the folder of the embeddings."""
    corpus.write_tsv(folder / "p.tsv", passages)
    embed_corpus(folder / "p.tsv", ENCODER, folder / "e")
    return folder / "e"


def test_tsv_preserves_awkward_text(tmp_path):
    path = tmp_path / "p.tsv"
    assert corpus.write_tsv(path, AWKWARD) == len(AWKWARD)
    assert corpus.read_corpus(path) == AWKWARD


def test_json_lines_preserve_awkward_text(tmp_path):
    path = tmp_path / "p.jsonl"
    lines = [json.dumps(vars(p), ensure_ascii=False) for p in AWKWARD]
    path.write_text("\n".join(lines), encoding="utf-8")
    found = [(p.id, p.title, p.text) for p in corpus.read_corpus(path)]
    assert found == [(p.id, p.title, p.text) for p in AWKWARD]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.tsv", "", "holds no passages"),
        ("p.tsv", "id\ttext\ttitle\n", "holds no passages"),
        ("p.tsv", "id\ttitle\n1\tx\n", r"p\.tsv:1: the header lacks text"),
        ("p.tsv", "id\ttext\ttitle\n1\tonly two\n", r"p\.tsv:2: 2 columns"),
        (
            "p.tsv",
            "id\ttext\ttitle\n1\ta\tb\n1\tc\td\n",
            r"p\.tsv:3: id '1' was already used at .*p\.tsv:2",
        ),
        ("p.tsv", "id\ttext\ttitle\n1\t \tb\n", r"p\.tsv:2: the passage has no text"),
        ("p.jsonl", '{"id": 1, "title": "t"}\n', r"p\.jsonl:1: passage 1: missing field 'text'"),
        ("p.jsonl", '{"text": "a"}\n{"text": 3,}\n', r"p\.jsonl:2: not valid JSON"),
    ],
)
def test_errors_in_a_corpus_name_file_and_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        corpus.read_corpus(path)


def test_a_corpus_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "p.tsv"
    path.write_bytes(b"id\ttext\ttitle\n1\t\xff\xfe\tb\n")
    with pytest.raises(UserError, match="UTF-8"):
        corpus.read_corpus(path)


def test_the_old_name_of_user_error_still_works_with_a_warning():
    with pytest.warns(DeprecationWarning, match=r"BadInput is now selfrag_jax\.errors\.UserError"):
        assert records.BadInput is UserError
    assert not hasattr(records, "GoodInput")


@pytest.fixture(scope="module")
def world_index(small_world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    build_index(embed(small_world.passages, folder), INDEX, folder / "i")
    return folder / "i"


def test_the_index_agrees_with_exhaustive_search(world_index, small_world):
    retriever = OnlineRetriever(world_index)
    queries = [f"Where was {e.name} born?" for e in small_world.entities[:20]]
    vectors = retriever.encoder.encode([encoders.indexed_text(p) for p in retriever.index.passages])
    exact = np.argsort(-retriever.encoder.encode(queries) @ vectors.T, axis=1)[:, :5]
    found, _ = retriever.index.search(retriever.encoder.encode(queries), 5)
    np.testing.assert_array_equal(np.sort(found, 1), np.sort(exact, 1))


def test_the_tree_index_finds_nearly_all_neighbours(small_world, tmp_path):
    # Distinct passages, not copies: ScaNN partitions equal points arbitrarily, and differently in
    # each run.
    world = encyclopedia.build_world(replace(small_world.config, train=500))
    tree = index.IndexConfig(100, 0.5, 2, 100)
    build_index(embed(world.passages, tmp_path), tree, tmp_path / "i")
    names = [e.name for e in world.entities]
    found = OnlineRetriever(tmp_path / "i").passages([()] * len(names), names, 3)
    hits = sum(ps[0].title == name for ps, name in zip(found, names, strict=True))
    assert len(world.passages) > 1000 and hits / len(names) > 0.95


def test_nearly_all_names_of_the_default_world_are_found(tmp_path):
    c = config.load("tiny")
    world = encyclopedia.build_world(config.build(encyclopedia.WorldConfig, c.world, "world"))
    corpus.write_tsv(tmp_path / "p.tsv", world.passages)
    encoder = config.build(encoders.EncoderConfig, c.encoder, "encoder")
    embed_corpus(tmp_path / "p.tsv", encoder, tmp_path / "e")
    build_index(tmp_path / "e", config.build(index.IndexConfig, c.index, "index"), tmp_path / "i")
    names = [e.name for e in world.entities]
    queries = [f"Tell me about {n}." for n in names]
    found = OnlineRetriever(tmp_path / "i").passages([()] * len(names), queries, 2)
    assert len(names) > 800
    assert sum(ps[0].title == n for ps, n in zip(found, names, strict=True)) / len(names) > 0.97


def test_a_k_above_the_corpus_size_returns_the_whole_corpus(
    world_index, small_world, capsys, tmp_path
):
    source = tmp_path / "q.jsonl"
    source.write_text('{"question": "Who?"}\n')
    retrieve_file(world_index, source, tmp_path / "out.jsonl", 10_000)
    [(_, row)] = read_rows(tmp_path / "out.jsonl")
    n = len(small_world.passages)
    assert len(row["ctxs"]) == n
    assert f"the corpus has {n} passages; every row gets all of them" in capsys.readouterr().err


def test_a_users_file_is_never_overwritten(world_index, tmp_path, capsys):
    questions, mine = tmp_path / "q.jsonl", tmp_path / "mine.jsonl"
    questions.write_text('{"question": "Where?"}\n')
    mine.write_text("mine\n")
    command = ["retrieve", f"--index={world_index}", f"--input={questions}"]
    assert cli.main([*command, f"--out={questions}"]) == 2
    assert "is both the output and the input" in capsys.readouterr().err
    assert questions.read_text() == '{"question": "Where?"}\n'
    assert cli.main([*command, f"--out={mine}", "--k=1"]) == 0
    assert f"kept as {mine}.old-1" in capsys.readouterr().err
    assert (tmp_path / "mine.jsonl.old-1").read_text() == "mine\n" and "ctxs" in mine.read_text()


def test_unfinished_and_missing_artifacts_are_refused(tmp_path):
    (tmp_path / "half").mkdir()
    with pytest.raises(UserError, match="unfinished"):
        index.Index(tmp_path / "half")
    with pytest.raises(UserError, match="does not exist"):
        build_index(tmp_path / "nothing", INDEX, tmp_path / "i")


def test_another_config_for_the_same_output_is_refused(small_world, tmp_path):
    embed(small_world.passages, tmp_path)
    smaller = encoders.EncoderConfig("hashed", 64, 2.0)
    with pytest.raises(UserError, match="dim: 384 there, 64 asked for"):
        embed_corpus(tmp_path / "p.tsv", smaller, tmp_path / "e")


def test_a_nan_in_the_embeddings_is_reported_with_its_row(small_world, tmp_path):
    file = embed(small_world.passages, tmp_path) / "embeddings.npy"
    vectors = np.load(file)
    vectors[7, 0] = np.nan
    np.save(file, vectors)
    with pytest.raises(UserError, match="row 7"):
        build_index(tmp_path / "e", INDEX, tmp_path / "i")


def test_a_saved_and_loaded_encoder_gives_the_same_vectors(world_index, small_world):
    passages = [encoders.indexed_text(p) for p in small_world.passages]
    encoder = encoders.HashedEncoder.fit(ENCODER, passages)
    loaded = encoders.HashedEncoder.load(world_index)
    texts = ["Where was Mara born?", "", "東京"]
    np.testing.assert_allclose(encoder.encode(texts), loaded.encode(texts), atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(loaded.encode(texts), axis=1), 1.0, atol=1e-5)
