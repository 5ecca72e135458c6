"""`selfrag embed`: a corpus in, its embeddings out."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from glob import glob
from pathlib import Path
from typing import Any

from selfrag_jax import artifacts, locks
from selfrag_jax.commands.command import (
    DISTRIBUTED,
    INPUT,
    Command,
    Flag,
    config_flag,
    config_section,
    flags_of,
    given,
)
from selfrag_jax.errors import UserError
from selfrag_jax.files import read_json
from selfrag_jax.huggingface import packaged
from selfrag_jax.processes.group import Group, current
from selfrag_jax.retrieval.corpus import Corpus, CorpusConfig
from selfrag_jax.retrieval.embedding import (
    ENCODER,
    PASSAGES,
    VECTORS,
    EmbeddingWork,
    missing_files,
    num_passages,
)
from selfrag_jax.retrieval.encoders import HASHED, EncoderConfig
from selfrag_jax.retrieval.passages import COUNTS
from selfrag_jax.storage import copies, mirror

_PATIENCE = 60  # seconds until a network disk shows what other hosts have written
CORPUS_FLAGS = flags_of(CorpusConfig, "", INPUT)
_ENCODER = "Encoder"
ENCODER_FLAGS = (
    Flag(
        "encoder",
        "hashed, minilm, or another encoder model: a folder or a hub name (default: the config's)",
        group=_ENCODER,
        is_folder=True,
    ),
    *flags_of(EncoderConfig, "encoder", _ENCODER),
)


def embed_corpus(
    passages: str | Path,
    config: EncoderConfig,
    out: str | Path,
    shard: tuple[int, int] = (0, 1),
    pickles: str = "",
    reading: CorpusConfig | None = None,
) -> int:
    """Embeds a corpus into the folder `out`; returns the number of passages.

    Does nothing if `out` is already finished, and continues if it was interrupted. shard: (i, n):
    writes every n-th file of vectors only; the last of n such runs finishes the folder. Of the
    processes of a job (`--distributed`), each writes its share, and process 0 finishes the folder.
    pickles: a pattern of published embeddings (`passages_*`) to take the vectors from. reading: how
    the corpus is read. Raises UserError as reading the corpus does, and if `out` is a folder of
    something else or was begun with other settings.
    """
    out = Path(out)
    corpus = Corpus(passages, reading)
    made = asdict(config) | corpus.config.changes()
    inputs: dict[str, artifacts.Input] = {"passages": corpus}
    if config.name not in packaged.ENCODERS and Path(config.name).is_dir():
        inputs["encoder"] = config.name
    sources = sorted(map(Path, glob(pickles))) if pickles else []
    if pickles and not sources:
        raise UserError(f"--vectors={pickles}: no such file")
    group = current()
    if pickles and (shard != (0, 1) or group.count > 1):
        raise UserError(
            "--vectors: published embeddings are read by one process; leave out --shard and "
            "--distributed"
        )
    inputs |= {f"vectors {source.name}": source for source in sources}

    def num_finished() -> int | None:
        done = artifacts.is_finished(out, "embed", made, inputs) and not missing_files(out)
        return num_passages(out) if done else None

    finished = group.from_main("embeddings are there", num_finished)
    if finished is not None:
        return finished
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; `selfrag embed` writes a folder")
    # Several processes may start at once: the first reads the corpus, the others wait.
    with _only_if_ours(out), locks.exclusive_workdir(out, "reading the corpus"):
        artifacts.require_own_or_empty(out, "embed")
        if _failed_at_the_start(out):  # what was corrected since may have changed the settings
            (out / artifacts.STARTED).unlink()
            for name in (PASSAGES, ENCODER, VECTORS):
                shutil.rmtree(out / name, ignore_errors=True)
        artifacts.claim_workdir(out, "embed", made, inputs)
        work = EmbeddingWork.start(out, corpus, config)
        if sources and work.missing():
            work.import_pickled(sources)
    if group.count > 1:
        _embed_share(work, out, group)
        if group.is_main:
            artifacts.write_manifest(out, "embed", made, inputs, work.counts())
        group.barrier("embeddings are finished")
        return len(work.store)
    work.embed(range(shard[0], work.layout.num_files, shard[1]))
    if missing := work.missing():
        print(
            f"{out}: shard {shard[0]}/{shard[1]} is finished; {len(missing)} of "
            f"{work.layout.num_files} files of vectors are missing, from other shards"
        )
        return len(work.store)
    artifacts.remove_temporary_files(out)
    artifacts.write_manifest(out, "embed", made, inputs, work.counts())
    return len(work.store)


def _embed_share(work: EmbeddingWork, out: Path, group: Group) -> None:
    """Embeds this process's share of the missing files, and waits until all are where they belong.

    That is a disk that all processes see, or a bucket: each sends its own files there.
    """
    fingerprint = artifacts.fingerprint(out / ENCODER)
    group.require_same("another encoder", fingerprint, "copy the same model and passages to all")
    everywhere = _files_of_all(work, group)
    left = [f for f in range(work.layout.num_files) if f not in everywhere]
    work.embed(left[group.index :: group.count])
    mirror.push_now()
    everywhere = _files_of_all(work, group)  # also a barrier: all have sent theirs
    if group.is_main and not copies.is_copy(out):
        for _ in range(_PATIENCE):
            if not work.missing():
                break
            time.sleep(1)
        else:
            f = work.missing()[0]
            raise UserError(
                f"{out}: {group.name(everywhere[f])} has written vectors that {group.name(0)} does "
                "not see; give an --out on a disk that all hosts share, or in a bucket (gs://)"
            )
        artifacts.remove_temporary_files(out)


def _files_of_all(work: EmbeddingWork, group: Group) -> dict[int, int]:
    """The files of vectors that are written, and the first process that has each."""
    missing = set(work.missing())
    here = [f for f in range(work.layout.num_files) if f not in missing]
    found: dict[int, int] = {}
    for i, files in enumerate(group.gather("vectors", here)):
        for f in files:
            found.setdefault(f, i)
    return found


def _failed_at_the_start(out: Path) -> bool:
    """Whether an earlier run failed while it held the lock, before there was any vector."""
    if not (out / artifacts.STARTED).is_file() or any((out / VECTORS).glob("*.npy")):
        return False
    imported = any(
        name.startswith("vectors ") for name in read_json(out / artifacts.STARTED)["inputs"]
    )
    return imported or not (out / PASSAGES / COUNTS).is_file() or not (out / ENCODER).is_dir()


@contextmanager
def _only_if_ours(out: Path) -> Iterator[None]:
    """Removes what the block has begun, if it fails, and nothing of a stranger's folder."""
    had_lock, existed = (out / locks.LOCK).exists(), out.exists()
    try:
        yield
    except UserError:
        if not existed and _failed_at_the_start(out):
            shutil.rmtree(out)
        elif not had_lock and not (out / artifacts.STARTED).exists():
            (out / locks.LOCK).unlink(missing_ok=True)
            if not existed and out.is_dir() and not any(out.iterdir()):
                out.rmdir()
        raise


def parse_shard(text: str) -> tuple[int, int]:
    """(i, n) of "i/n", counted from 0."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match.group(1)) >= int(match.group(2)):
        n = match.group(2) if match and match.group(2) != "0" else "4"
        raise UserError(f"--shard={text}: expected i/n with i from 0 to n-1, such as 0/{n}")
    return int(match.group(1)), int(match.group(2))


def encoder_config(values: dict[str, Any]) -> EncoderConfig:
    """The encoder that the config and the flags describe."""
    config = config_section(values, EncoderConfig, "encoder")
    changes = given(values, ENCODER_FLAGS)
    if "encoder" in changes:
        changes["name"] = changes.pop("encoder")
    config = replace(config, **changes)
    if not config.name:
        raise UserError("--encoder=: expected hashed, minilm, the folder of a model or a hub name")
    unused = [name for name in changes if name != "name"]
    if config.name == HASHED and unused:
        raise UserError(
            f"--{unused[0]}: is for encoder models, and the encoder here is {HASHED!r}; give "
            "--encoder=MODEL, or leave it out"
        )
    return config


def corpus_config(values: dict[str, Any]) -> CorpusConfig:
    """How the flags say that the corpus is read."""
    return CorpusConfig(**given(values, CORPUS_FLAGS))


def run(values: dict[str, Any], _: list[str]) -> None:
    shard = parse_shard(values["shard"])
    if shard != (0, 1) and values["distributed"]:
        raise UserError("--shard: goes without --distributed, which shares the work itself")
    config, out = encoder_config(values), values["out"]
    reading = corpus_config(values)
    n = embed_corpus(values["passages"], config, out, shard, values["vectors"] or "", reading)
    if current().is_main:
        print(f"{out}: {n:,} passages")


COMMAND = Command(
    example="selfrag embed --passages=psgs_w100.tsv.gz --encoder=facebook/contriever-msmarco "
    "--out=embeddings",
    flags=(
        Flag(
            "passages",
            ".tsv, .csv or .jsonl (id, text, title), .txt or .md, each also .gz; or a folder",
            required=True,
        ),
        *CORPUS_FLAGS,
        *ENCODER_FLAGS,
        Flag(
            "vectors",
            "published embeddings to take instead of computing them: pickles, like 'passages_*'",
            group=INPUT,
        ),
        Flag("out", "folder to write", required=True, writes=True, each_sends=f"{VECTORS}/*.npy"),
        Flag("shard", "i/n: every n-th file only, where n machines share a disk", "0/1"),
        DISTRIBUTED,
        config_flag("index", examples="index, index:wikipedia"),
    ),
    run=run,
)
