"""The typed records that pass between stages, and the JSON-lines files that hold them.

Errors name the file, the line and the field. Files are written to a temporary name and renamed, so
a partly written file is never mistaken for a complete one.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from selfrag_jax.errors import OnError, UserError, raise_error
from selfrag_jax.files import atomic_write, open_text
from selfrag_jax.json_lists import begins_list, list_items
from selfrag_jax.storage.paths import as_path

T = TypeVar("T")

PASSAGE_ID_FIELDS = ("id", "_id", "docid", "doc_id", "passage_id", "pid")
ROW_ID_FIELDS = (
    "id", "_id", "qid", "q_id", "question_id", "QuestionId", "query_id", "sample_id", "claim_id",
    "docid",
)  # fmt: skip
# In Question.extra, numbers that some question files have: the popularity of what is asked about,
# and the decile of it among its like.
RANKS = ("popularity", "decile")
PASSAGE_TEXT_FIELDS = ("text", "contents", "content")


def __getattr__(name: str) -> Any:
    if name == "BadInput":
        message = "BadInput is now selfrag_jax.errors.UserError"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return UserError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# ---- the records --------------------------------------------------------------------------------
@dataclass(frozen=True)
class Passage:
    id: str
    title: str
    text: str
    score: float | None = None


@dataclass(frozen=True)
class Instruction:
    """An instruction and its output, as a source supplies them; `ctxs` are set after retrieval."""

    id: str
    instruction: str
    output: str
    input: str = ""
    dataset_name: str = ""
    ctxs: tuple[Passage, ...] = ()

    @property
    def full_instruction(self) -> str:
        """Instruction and input as one text, for retrieval and for the critic."""
        return f"{self.instruction} {self.input}".strip()


@dataclass(frozen=True)
class CriticExample:
    """A labelled critique.

    It has the published fields (`instruction`, `input`, `output`, `task`) and keeps those of the
    query apart.
    """

    task: str  # retrieve, isrel, issup or isuse
    instruction: str
    output: str  # the reflection token
    preceding: str = ""
    evidence: Passage | None = None
    segment: str = ""
    id: str = ""  # of the instruction
    explanation: str = ""  # the teacher's, if it gave one


@dataclass(frozen=True)
class GeneratorExample:
    """A row of the published training format. `output` spells out passages and control tokens."""

    id: str
    instruction: str
    output: str
    input: str = ""
    dataset_name: str = ""


@dataclass(frozen=True)
class Question:
    """A question to answer or evaluate, read from any published format (see data/questions.py)."""

    id: str
    question: str
    answers: tuple[str, ...] = ()
    ctxs: tuple[Passage, ...] = ()
    choices: tuple[tuple[str, str], ...] = ()  # (label, text)
    # The only possible answers: the labels of the choices, or a list in the file.
    options: tuple[str, ...] = ()
    task: str = ""
    # What metrics need, under one name whatever the file calls it (see data/questions.py).
    extra: dict[str, Any] = field(default_factory=dict)
    prompt: str = ""  # the instruction as a task words it; "": the question and its choices
    input: str = ""  # the prompt's `### Input:` part

    @property
    def popularity(self) -> float | None:
        """How well known is what the question asks about; None if its file does not say."""
        return self.extra.get("popularity")

    @property
    def full_question(self) -> str:
        """Question and input as one text, for retrieval."""
        return f"{self.question} {self.input}" if self.input else self.question


# ---- files --------------------------------------------------------------------------------------
def to_json(record: Any) -> dict[str, Any]:
    """Returns a dataclass as JSON data without its empty optional fields; a dict as it is."""
    if isinstance(record, dict):
        return dict(record)
    always = ("output", "text", "title")
    return {k: v for k, v in asdict(record).items() if v not in (None, (), {}) or k in always}


def write_jsonl(path: str | Path, rows: Iterable[Any]) -> int:
    """Writes dataclasses or dicts, one per line; returns their number."""
    n = 0
    with atomic_write(path) as f:
        for row in rows:
            f.write(json.dumps(to_json(row), ensure_ascii=False) + "\n")
            n += 1
    return n


def read_rows(
    path: str | Path,
    on_position: Callable[[int], None] | None = None,
    on_error: OnError = raise_error,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields ("file:line", row) from a JSON-lines file, or from a JSON file with a list of objects.

    Either may be compressed (.gz). on_position: called before each row with the number of bytes of
    the file on disk that were read. on_error: takes the UserError of a row that is not a JSON
    object, which names file and line.

    Raises UserError for a file that cannot be read on.
    """
    path = as_path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder; expected a file of JSON lines")
    with open_text(path) as (f, raw):
        is_list = begins_list(f)
        for number, text in list_items(path, f) if is_list else enumerate(f, 1):
            if on_position:
                on_position(raw.tell())
            if not is_list and not text.strip():
                continue
            try:
                where = f"{path}: item {number}" if is_list else f"{path}:{number}"
                checked = checked_row(where, text) if is_list else _parsed_line(where, text)
            except UserError as e:
                on_error(e)
            else:
                yield checked


def _parsed_line(where: str, line: str) -> tuple[str, dict[str, Any]]:
    try:
        return checked_row(where, json.loads(line), line)
    except json.JSONDecodeError as e:
        hint = "; a row must end on its line" if e.pos >= len(line.rstrip()) else ""
        raise UserError(f"{where}: not valid JSON ({e.msg} at column {e.colno}){hint}") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deeply to be a row of data") from None


def checked_row(where: str, row: Any, source: str = "\\ud") -> tuple[str, dict[str, Any]]:
    """Returns `where` and `row`.

    Raises UserError if the row is no object, or has text that cannot be written as UTF-8.

    source: the row's JSON text, if known. Only an escape `\\ud...` can hold a lone surrogate.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}")
    if "\\ud" in source.lower():
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as e:
            lone = e.object[e.start]
            raise UserError(f"{where}: holds {lone!r}, an unpaired surrogate") from None
    return where, row


def read_records(path: str | Path, build: Callable[[str, dict[str, Any]], T]) -> list[T]:
    """Returns `build(where, row)` of all rows of a file. Raises UserError if there are none."""
    records = [record for _, record in build_records(read_rows(path), build)]
    if not records:
        raise UserError(f"{path}: holds no rows")
    return records


def build_records(
    rows: Iterable[tuple[str, dict[str, Any]]],
    build: Callable[[str, dict[str, Any]], T],
    on_error: OnError = raise_error,
) -> Iterator[tuple[str, T]]:
    """Yields ("file:line", build(where, row)) of each row.

    on_error: takes the UserErrors of `build`.
    """
    for where, row in rows:
        try:
            record = build(where, row)
        except UserError as e:
            on_error(e)
        else:
            yield where, record


# ---- rows to records ----------------------------------------------------------------------------
def text_field(
    where: str, row: dict[str, Any], names: str | tuple[str, ...], default: str | None = None
) -> str:
    """Returns the first of the fields `names` that the row has, as text.

    Raises UserError naming the field if it is not text, or if it is missing without a default.
    """
    names = (names,) if isinstance(names, str) else names
    for name in names:
        value = row.get(name)
        if value is None:
            continue
        if value != value:  # NaN, as pandas writes what is missing
            raise UserError(f"{where}: field {name!r} must be text, found NaN")
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return str(value)
        raise UserError(f"{where}: field {name!r} must be text, found {type(value).__name__}")
    if default is not None:
        return default
    wanted = " or ".join(repr(n) for n in names)
    present = ", ".join(sorted(row)) or "nothing"
    raise UserError(f"{where}: missing field {wanted} (the row has: {present})")


def passage_from(where: str, row: Any, number: int) -> Passage:
    """Reads a passage: {"title", "text", "id"?, "score"?}. `number` is its default id."""
    where = f"{where}: passage {number + 1}"
    if not isinstance(row, dict):
        raise UserError(f"{where} must be an object with title and text")
    score = row.get("score")
    if score is not None:
        try:
            score = float(score)
        except (TypeError, ValueError):
            raise UserError(f"{where}: field 'score' must be a number, found {score!r}") from None
    return Passage(
        id=text_field(where, row, PASSAGE_ID_FIELDS, str(number)),
        title=text_field(where, row, "title", ""),
        text=text_field(where, row, PASSAGE_TEXT_FIELDS),
        score=score,
    )


def passages_from(where: str, row: dict[str, Any]) -> tuple[Passage, ...]:
    """Reads the passages of a row, under any of their published field names."""
    for name in ("ctxs", "top_contexts", "docs"):
        if row.get(name):
            if not isinstance(row[name], list):
                raise UserError(f"{where}: field {name!r} must be a list of passages")
            return tuple(passage_from(where, p, i) for i, p in enumerate(row[name]))
    return ()


def instruction_from(where: str, row: dict[str, Any]) -> Instruction:
    return Instruction(
        id=text_field(where, row, ROW_ID_FIELDS, where) or where,
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
        evidence=None if evidence is None else passage_from(f"{where}: evidence", evidence, 0),
        segment=text_field(where, row, "segment", ""),
        id=text_field(where, row, ROW_ID_FIELDS, ""),
        explanation=text_field(where, row, "explanation", ""),
    )


def generator_example_from(where: str, row: dict[str, Any]) -> GeneratorExample:
    if "task" in row:
        raise UserError(
            f"{where}: field 'task': this is critic data; "
            "the generator is trained on what `selfrag label` writes"
        )
    return GeneratorExample(
        id=text_field(where, row, ROW_ID_FIELDS, ""),
        instruction=text_field(where, row, "instruction"),
        output=text_field(where, row, "output"),
        input=text_field(where, row, "input", ""),
        dataset_name=text_field(where, row, "dataset_name", ""),
    )
