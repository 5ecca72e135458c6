"""Corpus files, embedding, index and retrieval, with the input that real corpora bring."""

import json
from dataclasses import replace

import numpy as np
import pytest

from selfrag_jax import cli, config
from selfrag_jax.commands import embed
from selfrag_jax.commands.retrieve import retrieve_file
from selfrag_jax.errors import UserError
from selfrag_jax.records import Passage, read_rows
from selfrag_jax.retrieval import corpus, encoders, index
from selfrag_jax.retrieval.retriever import OnlineRetriever
from selfrag_jax.world import encyclopedia

ENCODER = encoders.EncoderConfig(
    "hashed", 384, 2.0
)  # of the quickstart; with fewer dimensions, words collide
INDEX = index.IndexConfig(20_000, 0.5, 2, 50)

AWKWARD = [
    Passage("a", "Čapek, Karel", "Karel Čapek wrote “R.U.R.” — the word robot is his brother’s."),
    Passage("b", "", "A passage with an empty title."),
    Passage("c", 'Quotes "inside"', 'He said: "tabs\tand\nnewlines, too".'),
    Passage("d", "東京", "東京は日本の首都である。"),
    Passage("e", "Long", " ".join(f"word{i}" for i in range(300))),
    Passage("f", "Control", "This text spells [Retrieval] and </paragraph> and <s>."),
]


def test_tsv_keeps_awkward_text(tmp_path):
    path = tmp_path / "p.tsv"
    assert corpus.write_tsv(path, AWKWARD) == len(AWKWARD)
    assert corpus.read_corpus(path) == AWKWARD


def test_json_lines_keep_awkward_text(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(
        "\n".join(json.dumps(vars(p), ensure_ascii=False) for p in AWKWARD), encoding="utf-8"
    )
    assert [(p.id, p.title, p.text) for p in corpus.read_corpus(path)] == [
        (p.id, p.title, p.text) for p in AWKWARD
    ]


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
def test_bad_corpora_name_file_and_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        corpus.read_corpus(path)


def test_a_corpus_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "p.tsv"
    path.write_bytes(b"id\ttext\ttitle\n1\t\xff\xfe\tb\n")
    with pytest.raises(UserError, match="UTF-8"):
        corpus.read_corpus(path)


@pytest.fixture(scope="module")
def world_index(small_world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    corpus.write_tsv(folder / "p.tsv", small_world.passages)
    embed.embed_corpus(folder / "p.tsv", ENCODER, folder / "e")
    index.build(folder / "e", INDEX, folder / "i")
    return folder / "i"


def test_index_agrees_with_exhaustive_search(world_index, small_world):
    retriever = OnlineRetriever(world_index)
    queries = [f"Where was {e.name} born?" for e in small_world.entities[:20]]
    vectors = retriever.encoder.encode([encoders.passage_key(p) for p in retriever.index.passages])
    exact = np.argsort(-retriever.encoder.encode(queries) @ vectors.T, axis=1)[:, :5]
    found, _ = retriever.index.search(retriever.encoder.encode(queries), 5)
    np.testing.assert_array_equal(np.sort(found, 1), np.sort(exact, 1))


def test_the_tree_index_finds_nearly_all_neighbours(small_world, tmp_path):
    # Passages of their own, not copies: ScaNN's partitions of equal points are arbitrary, and differ from run to run.
    world = encyclopedia.build_world(replace(small_world.config, train=500))
    corpus.write_tsv(tmp_path / "p.tsv", world.passages)
    embed.embed_corpus(tmp_path / "p.tsv", ENCODER, tmp_path / "e")
    index.build(tmp_path / "e", index.IndexConfig(100, 0.5, 2, 100), tmp_path / "i")
    retriever = OnlineRetriever(tmp_path / "i")
    names = [e.name for e in world.entities]
    found = retriever.passages([()] * len(names), names, 3)
    hits = sum(ps[0].title == name for ps, name in zip(found, names, strict=True))
    assert len(world.passages) > 1000 and hits / len(names) > 0.95


def test_nearly_all_names_of_the_default_world_are_found(tmp_path):
    c = config.load("tiny")
    world = encyclopedia.build_world(config.build(encyclopedia.WorldConfig, c.world, "world"))
    corpus.write_tsv(tmp_path / "p.tsv", world.passages)
    embed.embed_corpus(
        tmp_path / "p.tsv",
        config.build(encoders.EncoderConfig, c.encoder, "encoder"),
        tmp_path / "e",
    )
    index.build(tmp_path / "e", config.build(index.IndexConfig, c.index, "index"), tmp_path / "i")
    names = [e.name for e in world.entities]
    found = OnlineRetriever(tmp_path / "i").passages(
        [()] * len(names), [f"Tell me about {n}." for n in names], 2
    )
    assert len(names) > 800
    assert sum(ps[0].title == n for ps, n in zip(found, names, strict=True)) / len(names) > 0.97


def test_k_above_the_corpus_gives_all_of_it(world_index, small_world, capsys, tmp_path):
    source = tmp_path / "q.jsonl"
    source.write_text('{"question": "Who?"}\n')
    retrieve_file(world_index, source, tmp_path / "out.jsonl", 10_000)
    [(_, row)] = read_rows(tmp_path / "out.jsonl")
    assert len(row["ctxs"]) == len(small_world.passages)
    assert "more than the corpus holds" in capsys.readouterr().err


def test_a_file_of_the_user_is_never_overwritten(world_index, tmp_path, capsys):
    questions, mine = tmp_path / "q.jsonl", tmp_path / "mine.jsonl"
    questions.write_text('{"question": "Where?"}\n')
    mine.write_text("mine\n")
    assert (
        cli.main(
            ["retrieve", f"--index={world_index}", f"--input={questions}", f"--out={questions}"]
        )
        == 2
    )
    assert "is both the output and the input" in capsys.readouterr().err
    assert questions.read_text() == '{"question": "Where?"}\n'
    assert (
        cli.main(
            ["retrieve", f"--index={world_index}", f"--input={questions}", f"--out={mine}", "--k=1"]
        )
        == 0
    )
    assert f"kept as {mine}.old-1" in capsys.readouterr().err
    assert (tmp_path / "mine.jsonl.old-1").read_text() == "mine\n" and "ctxs" in mine.read_text()


def test_unfinished_and_missing_artifacts_are_refused(world_index, tmp_path):
    (tmp_path / "half").mkdir()
    with pytest.raises(UserError, match="unfinished"):
        index.Index(tmp_path / "half")
    with pytest.raises(UserError, match="does not exist"):
        index.build(tmp_path / "nothing", INDEX, tmp_path / "i")


def test_another_config_under_the_same_name_is_refused(small_world, tmp_path):
    corpus.write_tsv(tmp_path / "p.tsv", small_world.passages)
    embed.embed_corpus(tmp_path / "p.tsv", ENCODER, tmp_path / "e")
    with pytest.raises(UserError, match="dim: 384 there, 64 asked for"):
        embed.embed_corpus(
            tmp_path / "p.tsv", encoders.EncoderConfig("hashed", 64, 2.0), tmp_path / "e"
        )


def test_nan_embeddings_are_named(small_world, tmp_path):
    corpus.write_tsv(tmp_path / "p.tsv", small_world.passages)
    embed.embed_corpus(tmp_path / "p.tsv", ENCODER, tmp_path / "e")
    vectors = np.load(tmp_path / "e" / "embeddings.npy")
    vectors[7, 0] = np.nan
    np.save(tmp_path / "e" / "embeddings.npy", vectors)
    with pytest.raises(UserError, match="row 7"):
        index.build(tmp_path / "e", INDEX, tmp_path / "i")


def test_an_encoder_saved_and_loaded_encodes_alike(world_index, small_world):
    encoder = encoders.HashedEncoder.fit(
        ENCODER, [encoders.passage_key(p) for p in small_world.passages]
    )
    again = encoders.HashedEncoder.load(world_index)
    texts = ["Where was Mara born?", "", "東京"]
    np.testing.assert_allclose(encoder.encode(texts), again.encode(texts), atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(again.encode(texts), axis=1), 1.0, atol=1e-5)
