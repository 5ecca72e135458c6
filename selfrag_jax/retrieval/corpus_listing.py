"""Which files a corpus consists of, and which kinds of file are read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from selfrag_jax import artifacts
from selfrag_jax.errors import UserError

TABLES, ROWS, DOCUMENTS = (".tsv", ".csv"), (".jsonl", ".ndjson", ".json"), (".txt", ".md", ".rst")
_KINDS = f"{', '.join((*TABLES, *ROWS, *DOCUMENTS))}, each also as .gz, or a folder of them"
# Kinds of file that other programs turn into text.
_PANDOC = (".html", ".htm", ".docx", ".odt", ".epub")
CURES = {
    ".pdf": "pdftotext FILE.pdf",
    **{suffix: f"pandoc -t plain FILE{suffix} -o FILE.txt" for suffix in _PANDOC},
    ".doc": "soffice --convert-to txt FILE.doc",
    ".xlsx": "save it as .csv",
    ".parquet": "pandas.read_parquet(FILE).to_json('corpus.jsonl', orient='records', lines=True)",
    ".zip": "unzip FILE.zip, and give the folder",
}


def kind_of(path: Path) -> str:
    """The suffix of a file, without .gz: ".tsv"."""
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def corpus_files(path: Path) -> tuple[list[Path], str]:
    """Returns the files of a corpus, in a fixed order, and a line about files that are left out.

    Raises UserError if there is no such file, if it is of a kind that is not read or may not be
    read, and if a folder has none.
    """
    files, left_out = _chosen(path)
    if denied := next((f for f in files if not os.access(f, os.R_OK)), None):
        raise UserError(f"{denied}: you may not read it (see `ls -l`); change that, or take it out")
    return files, left_out


def _chosen(path: Path) -> tuple[list[Path], str]:
    known = (*TABLES, *ROWS, *DOCUMENTS)
    if path.is_file():
        if kind_of(path) not in known:
            raise UserError(f"{path}: {_refusal(kind_of(path))}")
        return [path], ""
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder of passages: {_KINDS}")
    found = list(_walk(path))
    # A folder's .json files are settings more often than passages.
    files = [p for p in found if kind_of(p) in known and kind_of(p) != ".json"]
    is_read = set(files)
    others = Counter(kind_of(p) or "without a suffix" for p in found if p not in is_read)
    counted = ", ".join(f"{n:,} {kind}" for kind, n in others.most_common(5))
    cures = "".join(f"; {kind}: {CURES[kind]}" for kind in others if kind in CURES)
    if not files:
        what = f"; it has {counted}{cures}" if others else ""
        raise UserError(f"{path}: the folder has no files of passages ({_KINDS}){what}")
    return files, f"{path}: files left out: {counted}{cures}" if others else ""


def _refusal(kind: str) -> str:
    if kind in CURES:
        return f"{kind} files are not read; turn it into text first: {CURES[kind]}"
    return f"is of no kind that is read; expected {_KINDS}; rename it if it is one of these"


def _walk(folder: Path) -> Iterator[Path]:
    """Yields the files below a folder in sorted order, without hidden ones.

    Links are followed, but not to a folder that was read already or that this one is in. Folders
    that a stage made (an index beside the notes, say) are no part of a corpus.
    """

    def failed(e: OSError) -> None:
        raise UserError(f"{e.filename}: may not be read ({e.strerror}); see `ls -l`")

    root = Path(os.path.realpath(folder))
    seen: set[str] = set(map(str, root.parents))
    for above, folders, names in os.walk(folder, onerror=failed, followlinks=True):
        real = os.path.realpath(above)
        if real in seen or (real != str(root) and artifacts.is_of_a_stage(Path(above))):
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in sorted(names):
            path = Path(above, name)
            if not name.startswith(".") and path.is_file():
                yield path
