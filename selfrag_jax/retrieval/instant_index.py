"""The index of a small corpus, made when its first question is asked and kept in the user's cache.

    ~/.cache/selfrag_jax/passages/KEY/   an index as `selfrag index` makes it (index.py)

KEY is a hash of what the index is made from: the content of the files, the encoder, how the corpus
is read. A changed file therefore means another index, and the next question on the same files finds
this one. Search is exact, and fused with BM25. An index grows under a temporary name, where a
killed run continues; a finished one is compared with the hashes of its files before it is used.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from selfrag_jax import __version__, artifacts, locks
from selfrag_jax.errors import UserError
from selfrag_jax.files import read_object
from selfrag_jax.huggingface import hub, packaged
from selfrag_jax.records import Passage
from selfrag_jax.retrieval import index, segments
from selfrag_jax.retrieval.corpus import DEFAULT_WORDS, Corpus, CorpusConfig
from selfrag_jax.retrieval.corpus_files import Document
from selfrag_jax.retrieval.embedding import ENCODER, EmbeddingWork
from selfrag_jax.retrieval.encoders import HASHED, EncoderConfig
from selfrag_jax.retrieval.plan import EXACT, IndexConfig, Plan
from selfrag_jax.retrieval.retriever import IndexRetriever

# On two cores MiniLM embeds some 66 passages a second (launch/benchmarks/README.md): this many take
# a quarter of an hour. What takes longer should have a name and a place of the user's own.
MOST_PASSAGES = 50_000
MOST_CORPUS_BYTES = 1_000_000_000  # of files, whose content is hashed for every question
# Rows of a table are passages already, unless MiniLM would not read all of one: 256 tokens.
LONG_ROW = 1200  # characters
# What the cache keeps; the least recently used index goes first.
MOST_INDEXES, MOST_BYTES = 20, 2_000_000_000
_ROWS_PER_FILE = 2048  # half a minute of MiniLM's work, which a kill may cost
_SHARED_BYTES = 1_000_000  # files of encoders from this size on are stored once
_LAYOUT = 1  # goes up when older indexes in the cache are to be made again


@dataclass(frozen=True)
class PassageSource:
    """A corpus to be asked without an index of its own."""

    path: str | Path
    encoder: EncoderConfig | None = None  # None: default_encoder
    reading: CorpusConfig = field(default_factory=CorpusConfig)


class InstantIndex(IndexRetriever):
    """Searches the passages of a corpus that has no index of its own."""

    def __init__(self, folder: Path, path: Path):
        super().__init__(folder)
        self.path = path

    def __repr__(self) -> str:
        return f"{len(self.index):,} passages of {self.path}"


def open_passages(source: PassageSource) -> InstantIndex:
    """Returns the index of a corpus: the kept one, or a new one, made with progress bars.

    Raises UserError as reading the corpus does, for a corpus that is too large, and for an encoder
    that is missing.
    """
    corpus = SmallCorpus(source.path, source.reading)
    encoder = replace(source.encoder or default_encoder(), rows_per_file=_ROWS_PER_FILE)
    made = {"encoder": asdict(encoder), "layout": _LAYOUT, "version": __version__}
    # A single file has its name in the id and the title of its passages.
    made |= source.reading.changes() | {"file": corpus.path.name * corpus.path.is_file()}
    inputs: dict[str, artifacts.Input] = {"passages": corpus}
    if encoder.name not in packaged.ENCODERS and Path(encoder.name).is_dir():
        inputs["encoder"] = encoder.name
    root = _writable_root()
    folder = root / artifacts.identity("index", made, inputs)
    found = _kept(folder, corpus)
    if found is None:
        _build(folder, corpus, encoder, made, inputs)
        found = InstantIndex(folder, corpus.path)
    os.utime(folder)
    _evict(root)
    return found


def default_encoder() -> EncoderConfig:
    """MiniLM where it is on this machine, else the hashed encoder, which is said in a line.

    Nothing is downloaded unasked.
    """
    minilm = packaged.ENCODERS[packaged.MINILM]
    if packaged.installed_folder(minilm) or hub.is_downloaded(minilm.hub):
        return EncoderConfig(packaged.MINILM)
    print(
        f"passages are found by their words alone; by their meaning with `{minilm.how_to_get}`, or "
        f"with --encoder={packaged.MINILM}, which downloads it",
        file=sys.stderr,
    )
    return EncoderConfig(HASHED)


class SmallCorpus(Corpus):
    """A corpus that may be embedded for a question. Raises UserError when it is too large."""

    def __init__(self, path: str | Path, config: CorpusConfig):
        super().__init__(path, config)
        if self.num_bytes > MOST_CORPUS_BYTES:
            raise self._too_large(f"its files have {self.num_bytes / 1e9:.1f} GB")

    def __iter__(self) -> Iterator[tuple[str, Passage]]:
        for i, row in enumerate(super().__iter__()):
            if i == MOST_PASSAGES:
                raise self._too_large(f"has more than {MOST_PASSAGES:,} passages")
            yield row

    def _too_large(self, what: str) -> UserError:
        return UserError(
            f"{self.path}: {what}, too many to embed for a question; make an index once: `selfrag "
            f"index --passages={self.path} --out=INDEX`, and give --index=INDEX"
        )

    def _words_of(self, d: Document) -> int:
        if self.config.split is None and len(d.text) > LONG_ROW:
            return DEFAULT_WORDS
        return super()._words_of(d)


# ---- the cache -----------------------------------------------------------------------------------
def cache_folder() -> Path:
    """Where indexes are kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "selfrag_jax" / "passages"


def _writable_root() -> Path:
    """The cache or, where it cannot be written, a folder that is removed when the process ends."""
    root = cache_folder()
    try:
        root.mkdir(parents=True, exist_ok=True)
        if os.access(root, os.W_OK | os.X_OK):
            return root
        reason = "no permission"
    except OSError as e:
        reason = e.strerror or str(e)
    print(
        f"{root}: cannot be written ({reason}), so the passages are embedded for every question; "
        "XDG_CACHE_HOME names another place",
        file=sys.stderr,
    )
    temporary = Path(tempfile.mkdtemp(prefix="selfrag_passages_"))
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    return temporary


def _kept(folder: Path, corpus: Corpus) -> InstantIndex | None:
    """The index in the cache; None if there is none. A damaged one is removed, with a line."""
    if not folder.exists():
        return None
    try:
        _check_files(folder)
        return InstantIndex(folder, corpus.path)
    except UserError as e:
        print(
            f"the kept index of {corpus.path} is damaged and is made again ({e})", file=sys.stderr
        )
        shutil.rmtree(folder)
        return None


def _check_files(folder: Path) -> None:
    """Raises UserError if a file of an index is missing or not what was written."""
    counts = read_object(artifacts.manifest_path(folder), ("counts",))["counts"]
    for name, expected in counts["files"].items():
        if artifacts.fingerprint(folder / name) != expected:
            raise UserError(f"{folder / name}: is not what was written")


def _evict(root: Path) -> None:
    """Removes the indexes that were not used for longest, down to what the cache may keep."""
    seen: set[tuple[int, int]] = set()
    total = 0
    with suppress(FileNotFoundError):  # another process removes some, too
        folders = sorted(root.iterdir(), key=lambda f: f.stat().st_mtime, reverse=True)
        for i, folder in enumerate(folders):
            for stat in map(os.lstat, folder.rglob("*")):
                if (stat.st_dev, stat.st_ino) not in seen:  # encoders are stored once
                    seen.add((stat.st_dev, stat.st_ino))
                    total += stat.st_size
            if i and (i >= MOST_INDEXES or total > MOST_BYTES) and not _is_being_written(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _is_being_written(folder: Path) -> bool:
    lock = folder / locks.LOCK
    if not lock.is_file():
        return False
    with open(lock, "ab") as f:
        try:
            locks.lock_file(f, folder)
        except UserError:
            return True
    return False


# ---- building ------------------------------------------------------------------------------------
def _build(
    folder: Path,
    corpus: SmallCorpus,
    encoder: EncoderConfig,
    made: dict[str, Any],
    inputs: dict[str, artifacts.Input],
) -> None:
    """Writes the index under a temporary name and renames it; continues what was interrupted.

    Waits for a process that is making the same one.
    """
    before = corpus.fingerprint()
    unfinished = folder.with_name(f".{folder.name}.tmp")
    with locks.exclusive_workdir(unfinished, "embedding the same passages"):
        if folder.is_dir():  # the other process has finished it
            shutil.rmtree(unfinished, ignore_errors=True)
            return
        segment = unfinished / index.SEGMENTS / "0000"
        try:
            work = EmbeddingWork.start(segment, corpus, encoder)
            work.embed()
            if corpus.fingerprint() != before:
                raise UserError(f"{corpus.path}: changed while it was read; ask again")
        except UserError:
            shutil.rmtree(unfinished / index.SEGMENTS, ignore_errors=True)
            raise
        settings = IndexConfig(structure=EXACT)
        exact = Plan(EXACT, work.layout.rows, work.layout.dim, 0, (), 0, 0, 0, 0, 0, 0)
        segments.write_segment(segment, exact, settings, with_bm25=True)
        shutil.rmtree(unfinished / ENCODER, ignore_errors=True)
        (segment / ENCODER).rename(unfinished / ENCODER)
        _share_files(unfinished / ENCODER, folder.parent)
        index.write_index(unfinished, [segment.name], settings.candidates)
        artifacts.remove_temporary_files(unfinished)
        names = sorted(f for f in unfinished.rglob("*") if f.is_file() and f.name != locks.LOCK)
        files = {str(f.relative_to(unfinished)): artifacts.fingerprint(f) for f in names}
        artifacts.write_manifest(
            unfinished, "index", made, inputs, work.counts() | {"files": files}
        )
        unfinished.rename(folder)


def _share_files(encoder: Path, root: Path) -> None:
    """Replaces large files of an encoder by links to equal ones of other indexes in the cache."""
    for file in encoder.rglob("*"):
        if not file.is_file() or (size := file.stat().st_size) < _SHARED_BYTES:
            continue
        for other in sorted(root.glob(f"[!.]*/{ENCODER}/{file.relative_to(encoder)}")):
            if other.stat().st_size == size and (
                artifacts.fingerprint(other) == artifacts.fingerprint(file)
            ):
                link = file.with_name(f".{file.name}.tmp")
                try:
                    os.link(other, link)
                    os.replace(link, file)
                except OSError:  # no hard links here
                    link.unlink(missing_ok=True)
                break
