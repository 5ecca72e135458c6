"""A corpus as a stream of passages, never read into memory; long documents are split.

What files it may have: corpus_listing.py. What is in them: corpus_files.py. How documents are
split: text/splitting.py.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from selfrag_jax import artifacts
from selfrag_jax.config import setting
from selfrag_jax.errors import OnError, UserError, raise_error
from selfrag_jax.files import atomic_write
from selfrag_jax.records import Passage
from selfrag_jax.retrieval.corpus_files import Document, documents
from selfrag_jax.retrieval.corpus_listing import DOCUMENTS, corpus_files, kind_of
from selfrag_jax.text.splitting import sections, split_words

COLUMNS = ("id", "text", "title")
DEFAULT_WORDS = 100  # of a passage from a text file: DPR's
# A passage of more is not read whole by most encoders (256 or 512 tokens).
LONG = 2400  # characters


def write_tsv(path: str | Path, passages: Iterable[Passage]) -> int:
    """Writes passages in DPR's format; returns their number."""
    n = 0
    with atomic_write(path) as f:
        writer = csv.writer(f, delimiter="\t", quoting=csv.QUOTE_ALL, lineterminator="\n")
        writer.writerow(COLUMNS)
        for p in passages:
            writer.writerow((p.id, p.text, p.title))
            n += 1
    return n


@dataclass(frozen=True)
class CorpusConfig:
    """How a corpus is read."""

    split: int | None = setting(
        f"words of a passage, at most; longer texts are split at ends of sentences, with ids like "
        f"doc#3 (default: {DEFAULT_WORDS} for .txt, .md and .rst; rows are left whole); 0: never",
        default=None,
    )
    fields: str | None = setting(
        "how the file names its fields, e.g. text=abstract,title=name,id=key", default=None
    )

    def __post_init__(self):
        if self.split is not None and self.split < 0:
            raise UserError(f"--split={self.split}: expected a number of words, or 0: never")
        for part in (self.fields or "").split(",") if self.fields is not None else ():
            role, equals, name = part.partition("=")
            if role.strip() not in COLUMNS or not equals or not name.strip():
                raise UserError(
                    f"--fields={self.fields}: expected id=, text= or title= and the file's name "
                    "for it, with commas between them"
                )

    @property
    def names(self) -> dict[str, str]:
        """What the file calls id, text and title, where `fields` says it."""
        parts = (part.partition("=") for part in (self.fields or "").split(",") if part)
        return {role.strip(): name.strip() for role, _, name in parts}

    def adding_to(self, built: CorpusConfig) -> CorpusConfig:
        """How what is added to an index is read: as the index was, which was read by `built`.

        A file may call its fields otherwise; `fields` then names those that differ. Raises
        UserError for another `split`.
        """
        if self.split not in (None, built.split):
            was = "without --split" if built.split is None else f"by --split={built.split}"
            raise UserError(
                f"--split={self.split}: the index was made {was}, and what is added is split in "
                "the same way; leave --split out, or build another index"
            )
        names = built.names | self.names
        fields = ",".join(f"{role}={name}" for role, name in names.items()) or None
        return replace(built, fields=fields)

    def changes(self) -> dict[str, Any]:
        """What was set, for a manifest: {} if nothing was."""
        given = {"split": self.split, "fields": self.fields}
        return {name: value for name, value in given.items() if value is not None}


class Corpus:
    """A file of passages, or a folder of such files, as a stream of passages.

    What is counted while it is read: `num_empty`, rows with neither title nor text, which are left
    out; `num_without_id`, rows whose number is their id; `num_long`, passages longer than LONG.
    """

    def __init__(
        self,
        path: str | Path,
        config: CorpusConfig | None = None,
        on_error: OnError = raise_error,
    ):
        """on_error: takes the UserErrors of rows, which name file and line.

        Raises UserError if there is no such file, or none in a folder that can be read.
        """
        self.path, self.config, self.on_error = Path(path), config or CorpusConfig(), on_error
        self.files, self.left_out = corpus_files(self.path)
        self.num_bytes = sum(file.stat().st_size for file in self.files)
        self.bytes_read = 0  # so far, on disk
        self.num_empty = self.num_without_id = self.num_long = self.longest = 0

    def __fspath__(self) -> str:
        return str(self.path)

    __str__ = __fspath__

    def fingerprint(self) -> str:
        """A hash of what the corpus is read from, for manifests: hidden files do not count."""
        if self.path.is_file():
            return artifacts.fingerprint(self.path)
        names = "".join(f"{self._name(f)}\0{artifacts.fingerprint(f)}\n" for f in self.files)
        return hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()[:16]

    def may_split(self) -> bool:
        """Whether a document may become several passages, with ids like doc#3."""
        if self.config.split is None:
            return any(kind_of(file) in DOCUMENTS for file in self.files)
        return self.config.split > 0

    def state(self) -> list[tuple[str, int, int]]:
        """Name, size and time of each file, by which a change is noticed while they are read."""
        stats = ((str(file), file.stat()) for file in corpus_files(self.path)[0])
        return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]

    def _name(self, file: Path) -> str:
        """Of a file within a folder; "" for a single file."""
        return "" if self.path.is_file() else file.relative_to(self.path).as_posix()

    def __iter__(self) -> Iterator[tuple[str, Passage]]:
        """Yields ("file:line", passage).

        A row without an id gets its row number, in a folder behind the file's name. Raises
        UserError naming file and line for a missing column or field and for an empty id; at the
        end, if no row has a title in the field that `fields` names.
        """
        title_field = self.config.names.get("title")
        num_rows, has_title = 0, False
        self.num_empty = self.num_without_id = self.num_long = self.longest = 0
        self.bytes_read = before = 0

        def at(position: int) -> None:
            self.bytes_read = before + position

        for file in self.files:
            for d in documents(file, self._name(file), self.config.names, at, self.on_error):
                if title_field and not d.is_file:
                    num_rows, has_title = num_rows + 1, has_title or bool(d.title)
                # The title of a whole file may be its name.
                if not d.text.strip() and (d.is_file or not d.title.strip()):
                    self.num_empty += 1
                    continue
                if not d.has_id:
                    self.num_without_id += 1
                for passage in self._split(d):
                    yield d.where, passage
            before += file.stat().st_size
            self.bytes_read = before
        if num_rows and title_field and not has_title:
            self.on_error(UserError(
                f"{self.path}: no row has a title in its field {title_field!r}; correct title= in "
                f"--fields={self.config.fields}, or leave it out"
            ))  # fmt: skip

    def _words_of(self, d: Document) -> int:
        """Words of a document's passages, at most; 0: it is not split."""
        if self.config.split is None:
            return DEFAULT_WORDS if d.is_file else 0
        return self.config.split

    def _split(self, d: Document) -> list[Passage]:
        """Returns the passages of a document: itself, or its pieces, with ids like doc#3."""
        words = self._words_of(d)
        # Most rows are short, and counting words takes longer than all else.
        if words and (d.is_file or len(d.text) > words):
            pieces = _pieces(d, words)
        else:
            pieces = [(d.title, d.text)]
        for _, text in pieces:
            if len(text) > LONG:
                self.num_long += 1
                self.longest = max(self.longest, len(text))
        if len(pieces) == 1:
            return [Passage(d.id, *pieces[0])]
        return [Passage(f"{d.id}#{i}", *piece) for i, piece in enumerate(pieces, 1)]


def _pieces(d: Document, words: int) -> list[tuple[str, str]]:
    """(title, text) of the pieces of a document, without white space around them.

    Those of a Markdown document end at its headings, and have them in their titles.
    """
    if not d.is_markdown:
        return [(d.title, piece.strip()) for piece in split_words(d.text, words)] or [
            (d.title, d.text)
        ]
    found = []
    for heading, text in sections(d.text):
        title = d.title if heading in ("", d.title) else f"{d.title}: {heading}"
        found += [(title, piece.strip()) for piece in split_words(text, words)]
    return found
