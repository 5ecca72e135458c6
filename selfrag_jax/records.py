"""The typed records that pass between stages, and their JSON-lines files.

Errors name the file, the line and the field. Files are written to a temporary name and renamed, so a half-written
file is never taken for a whole one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from selfrag_jax.errors import UserError
from selfrag_jax.files import atomic_write

T = TypeVar("T")


@dataclass(frozen=True)
class Passage:
    id: str
    title: str
    text: str
    score: float | None = None


@dataclass(frozen=True)
class Instruction:
    """An instruction with its output, as sources supply them; `ctxs` once a retriever has run."""

    id: str
    instruction: str
    output: str
    input: str = ""
    dataset_name: str = ""
    ctxs: tuple[Passage, ...] = ()

    @property
    def asked(self) -> str:
        """Instruction and input as one text: what is retrieved for and judged."""
        return f"{self.instruction} {self.input}".strip()


@dataclass(frozen=True)
class CriticExample:
    """One labelled critique (published format: `instruction`, `input`, `output`, `task`), with the query's fields kept apart."""

    task: str  # retrieve, isrel, issup or isuse
    instruction: str
    output: str  # the reflection token
    preceding: str = ""
    evidence: Passage | None = None
    segment: str = ""


@dataclass(frozen=True)
class GeneratorExample:
    """A row of the published training format: `output` spells passages and reflection tokens."""

    id: str
    instruction: str
    output: str
    input: str = ""
    dataset_name: str = ""


@dataclass(frozen=True)
class Question:
    """A row to answer or evaluate, whatever published spelling it came in (see evaluation/tasks.py)."""

    id: str
    question: str
    answers: tuple[str, ...] = ()
    ctxs: tuple[Passage, ...] = ()
    choices: tuple[tuple[str, str], ...] = ()  # (label, text)
    options: tuple[
        str, ...
    ] = ()  # the only possible answers: the labels of choices, or what the file lists
    task: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


def to_json(record: Any) -> dict[str, Any]:
    """A dataclass as JSON data without its empty optional fields; a dict as it is."""
    if not is_dataclass(record):
        return dict(record)
    return {
        k: v
        for k, v in asdict(record).items()
        if v not in (None, (), {}) or k in ("output", "text", "title")
    }


def write_jsonl(path: str | Path, rows: Iterable[Any]) -> int:
    """Writes dataclasses or dicts, one a line; returns how many."""
    n = 0
    with atomic_write(path) as f:
        for row in rows:
            f.write(json.dumps(to_json(row), ensure_ascii=False) + "\n")
            n += 1
    return n


def read_rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields ("file:line", row) from a JSON-lines file, or from a JSON file that holds one list of objects.

    Raises BadInput naming file and line when a row is not a JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"{path}: is a folder; expected a file of JSON lines"
            if path.is_dir()
            else f"{path}: no such file"
        )
    number = 0
    with open(path, encoding="utf-8-sig") as f:
        try:
            head = f.read(1)
            while head.isspace():
                head = f.read(1)
            f.seek(0)
            if head == "[":
                for i, row in enumerate(json.load(f)):
                    yield _object(f"{path}: item {i + 1}", row)
                return
            for number, line in enumerate(f, 1):
                if line.strip():
                    yield _object(f"{path}:{number}", json.loads(line), line)
        except json.JSONDecodeError as e:
            where = f"{path}:{e.lineno}" if head == "[" else f"{path}:{number}"
            raise UserError(f"{where}: not valid JSON ({e.msg} at column {e.colno})") from None
        except UnicodeDecodeError as e:
            raise UserError(f"{path}: not UTF-8 ({e.reason} at byte {e.start})") from None
        except RecursionError:
            raise UserError(f"{path}:{number}: nested too deeply to be a row of data") from None


def _object(where: str, row: Any, written: str = "\\ud") -> tuple[str, dict[str, Any]]:
    """written: the row as it stands in the file."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}")
    if "\\ud" in written.lower():  # JSON can spell what no text holds
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as e:
            raise UserError(
                f"{where}: holds half of a character, {e.object[e.start]!r}, which stands for no text"
            ) from None
    return where, row


def read_records(path: str | Path, build: Callable[[str, dict[str, Any]], T]) -> list[T]:
    """All rows of a file through `build(where, row)`. Raises BadInput when there is no row."""
    records = [build(where, row) for where, row in read_rows(path)]
    if not records:
        raise UserError(f"{path}: holds no rows")
    return records


def text_field(
    where: str, row: dict[str, Any], names: str | tuple[str, ...], default: str | None = None
) -> str:
    """The first of `names` that the row has, as text. Raises BadInput naming the field when missing or not text."""
    names = (names,) if isinstance(names, str) else names
    for name in names:
        if row.get(name) is not None:
            if isinstance(row[name], (str, int, float)) and not isinstance(row[name], bool):
                return str(row[name])
            raise UserError(
                f"{where}: field {name!r} must be text, found {type(row[name]).__name__}"
            )
    if default is not None:
        return default
    wanted = " or ".join(repr(n) for n in names)
    raise UserError(
        f"{where}: missing field {wanted} (the row has: {', '.join(sorted(row)) or 'nothing'})"
    )


def passage_from(where: str, row: Any, number: int) -> Passage:
    """A passage from {"title", "text", "id"?, "score"?}."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: passage {number + 1} must be an object with title and text")
    score = row.get("score")
    if score is not None:
        try:
            score = float(score)
        except (TypeError, ValueError):
            raise UserError(
                f"{where}: passage {number + 1}: field 'score' must be a number, found {score!r}"
            ) from None
    where = f"{where}: passage {number + 1}"
    return Passage(
        id=text_field(where, row, ("id", "passage_id"), str(number)),
        title=text_field(where, row, "title", ""),
        text=text_field(where, row, ("text", "contents")),
        score=score,
    )


def passages_from(where: str, row: dict[str, Any]) -> tuple[Passage, ...]:
    for name in ("ctxs", "top_contexts", "docs"):
        if row.get(name):
            if not isinstance(row[name], list):
                raise UserError(f"{where}: field {name!r} must be a list of passages")
            return tuple(passage_from(where, p, i) for i, p in enumerate(row[name]))
    return ()


def instruction_from(where: str, row: dict[str, Any]) -> Instruction:
    return Instruction(
        id=text_field(where, row, "id", where),
        instruction=text_field(where, row, ("instruction", "question")),
        output=text_field(where, row, "output"),
        input=text_field(where, row, "input", ""),
        dataset_name=text_field(where, row, "dataset_name", ""),
        ctxs=passages_from(where, row),
    )


def critic_example_from(where: str, row: dict[str, Any]) -> CriticExample:
    evidence = row.get("evidence")
    return CriticExample(
        task=text_field(where, row, "task"),
        instruction=text_field(where, row, "instruction"),
        output=text_field(where, row, "output"),
        preceding=text_field(where, row, "preceding", ""),
        evidence=None if evidence is None else passage_from(where, evidence, 0),
        segment=text_field(where, row, "segment", ""),
    )


def generator_example_from(where: str, row: dict[str, Any]) -> GeneratorExample:
    if "task" in row:
        raise UserError(
            f"{where}: field 'task': this is critic data; the generator learns from what `selfrag label` writes"
        )
    names = [f.name for f in fields(GeneratorExample)]
    values = {
        n: text_field(where, row, n, "" if n in ("input", "dataset_name", "id") else None)
        for n in names
    }
    return GeneratorExample(**values)
