"""Real English for the benchmarks of retrieval, from what Python brings: passages and queries.

    python launch/benchmarks/english.py --kind=docstrings --out=FOLDER

Two kinds of text:

    docstrings  of the standard library: the first line of each asks for the rest
    topics      of the language reference: a topic's title asks for any of its passages

Writes FOLDER/corpus.jsonl (id, title, text) and FOLDER/queries.jsonl (id, question, relevant: ids).
The same Python gives the same files.
"""

import argparse
import importlib
import inspect
import io
import pkgutil
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

KINDS = ("docstrings", "topics")
_MIN_TEXT, _MIN_QUERY = 80, 20  # characters
_WORDS = 100  # of a topic's passage, at most, where its paragraphs allow
# Modules that act when imported (antigravity opens a browser), need a display, or are no library.
_SKIPPED = (
    "antigravity this idlelib turtle turtledemo tkinter test lib2to3 distutils ensurepip site "
    "pydoc_data"
).split()


class Query(NamedTuple):
    text: str
    relevant: set[str]  # ids of passages


def corpus(kind: str) -> tuple[list[tuple[str, str]], list[Query]]:
    """Returns passages (id, text) and queries of one of KINDS."""
    return {"docstrings": _docstrings, "topics": _topics}[kind]()


# ---- docstrings ----------------------------------------------------------------------------------
def _docstrings() -> tuple[list[tuple[str, str]], list[Query]]:
    passages: list[tuple[str, str]] = []
    queries: dict[str, set[str]] = {}
    texts: set[str] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecated modules
        documented = list(_documented())
    for name, doc in documented:
        first, _, rest = inspect.cleandoc(doc).partition("\n")
        first, rest = first.strip(), rest.strip()
        if len(first) < _MIN_QUERY or len(rest) < _MIN_TEXT or rest in texts:
            continue
        texts.add(rest)
        passages.append((name, rest))
        queries.setdefault(first, set()).add(name)
    return passages, [Query(text, ids) for text, ids in queries.items()]


def _documented() -> Iterator[tuple[str, str]]:
    """Yields (dotted name, docstring) of public modules, classes, functions and methods."""
    for module in _modules():
        name = module.__name__
        if module.__doc__:
            yield name, module.__doc__
        for key, value in _public(module):
            if not (inspect.isclass(value) or inspect.isroutine(value)):
                continue
            if doc := _doc(value):
                yield f"{name}.{key}", doc
            if not inspect.isclass(value) or value.__module__ != name:
                continue
            for method, function in _public(value):
                if inspect.isroutine(function) and (doc := _doc(function)):
                    yield f"{name}.{key}.{method}", doc


def _public(x: Any) -> list[tuple[str, Any]]:
    return sorted((k, v) for k, v in vars(x).items() if not k.startswith("_"))


def _doc(x: Any) -> str:
    """A docstring; "" without one, and for what another library added to a class."""
    origin = getattr(x, "__module__", None) or "builtins"
    if origin.partition(".")[0] not in sys.stdlib_module_names:
        return ""
    doc = getattr(x, "__doc__", None)
    return doc if isinstance(doc, str) else ""


def _modules() -> Iterator[ModuleType]:
    """Yields the public modules of the standard library that this system can import, sorted."""
    names = [n for n in sorted(sys.stdlib_module_names) if _is_public(n) and n not in _SKIPPED]
    for name in names:
        module = _import(name)
        if module is None:
            continue
        yield module
        if hasattr(module, "__path__"):
            yield from _submodules(module)


def _submodules(package: ModuleType) -> Iterator[ModuleType]:
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda info: info.name):
        if not _is_public(info.name) or info.name in ("test", "tests"):
            continue
        module = _import(f"{package.__name__}.{info.name}")
        if module is not None:
            yield module
            if info.ispkg:
                yield from _submodules(module)


def _is_public(name: str) -> bool:
    return not name.startswith("_")


def _import(name: str) -> ModuleType | None:
    """Imports a module; None if this system has no such module."""
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            return importlib.import_module(name)
    except (ImportError, AttributeError, OSError, ValueError):  # those of other systems
        return None


# ---- topics --------------------------------------------------------------------------------------
def _topics() -> tuple[list[tuple[str, str]], list[Query]]:
    from pydoc_data.topics import topics

    passages: list[tuple[str, str]] = []
    queries: dict[str, set[str]] = {}
    seen: set[str] = set()
    for name, topic in sorted(topics.items()):
        title, _, text = topic.strip().partition("\n")
        if text in seen:  # `if` stands there twice, for instance
            continue
        seen.add(text)
        text = re.sub(r"\A[*=~-]+\n", "", text)  # underlines the title
        for i, passage in enumerate(_grouped(re.split(r"\n\s*\n", text.strip()))):
            passages.append((f"{name}.{i}", passage))
            queries.setdefault(title, set()).add(f"{name}.{i}")
    return passages, [Query(title, ids) for title, ids in queries.items()]


def _grouped(paragraphs: list[str]) -> Iterator[str]:
    """Joins paragraphs while they have at most _WORDS words together; cuts longer ones."""
    group: list[str] = []
    for paragraph in paragraphs:
        words = paragraph.split()
        for i in range(0, len(words), _WORDS):
            piece = words[i : i + _WORDS]
            if group and len(group) + len(piece) > _WORDS:
                yield " ".join(group)
                group = []
            group = group + piece
    if group:
        yield " ".join(group)


# ---- files ---------------------------------------------------------------------------------------
def write_corpus(kind: str, folder: Path) -> tuple[Path, Path]:
    """Writes corpus.jsonl and queries.jsonl; returns their paths."""
    from selfrag_jax.records import write_jsonl

    passages, queries = corpus(kind)
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / "corpus.jsonl", folder / "queries.jsonl"
    write_jsonl(files[0], [{"id": id_, "title": "", "text": text} for id_, text in passages])
    rows = [
        {"id": str(i), "question": q.text, "relevant": sorted(q.relevant)}
        for i, q in enumerate(queries)
    ]
    write_jsonl(files[1], rows)
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kind", choices=KINDS, default="docstrings")
    parser.add_argument("--out", default="english", help="folder to write")
    args = parser.parse_args()
    for file in write_corpus(args.kind, Path(args.out)):
        print(file)


if __name__ == "__main__":
    main()
