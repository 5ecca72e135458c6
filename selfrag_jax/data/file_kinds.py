"""The kinds of files that users bring, each read row by row with the functions of its commands.

A row that its command would refuse goes to `on_error`; a row that it would leave out comes without
a record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfrag_jax import artifacts
from selfrag_jax.data import prepared, question_fields
from selfrag_jax.data.chats import flatten_chat, is_chat
from selfrag_jax.data.critic_examples import checked_critic_example
from selfrag_jax.data.generator_examples import checked_generator_example
from selfrag_jax.data.instructions import instruction_of, require_text
from selfrag_jax.data.published_files import Faults
from selfrag_jax.data.question_files import question_rows
from selfrag_jax.data.questions import question_from
from selfrag_jax.data.released import (
    TASKS,
    critic_example,
    generator_example,
    released_records,
)
from selfrag_jax.errors import OnError, UserError
from selfrag_jax.files import open_text
from selfrag_jax.json_lists import begins_list
from selfrag_jax.records import (
    CriticExample,
    GeneratorExample,
    Instruction,
    Question,
    build_records,
    read_rows,
)
from selfrag_jax.retrieval.corpus import Corpus, CorpusConfig
from selfrag_jax.retrieval.corpus_files import TEXT, is_passage_table
from selfrag_jax.retrieval.corpus_listing import CURES, TABLES, corpus_files, kind_of
from selfrag_jax.text import prompts, reflection
from selfrag_jax.text.tokenizer import Control

Row = dict[str, Any]

KINDS = {
    "instructions": "instructions with outputs, for `retrieve`, `collect` and `label`",
    "critic": "critic data, for `train --role=critic`",
    "generator": "generator data, for `train --role=generator`",
    "questions": "questions, for `answer` and `evaluate`",
    "corpus": "passages, for `embed` and `index`",
}
# Kinds whose commands refuse an id that occurs twice.
UNIQUE_IDS = ("instructions", "questions", "corpus")
_CHATS = "chats, of which the last user and assistant turn are used"
_SPELLS = "with a control token spelled in user text, where it stays text"


@dataclass(frozen=True)
class FileRow:
    """One row of a file."""

    where: str  # "file:line"
    id: str = ""  # "": it has none
    # A CriticExample, GeneratorExample, Instruction, Question or Passage; None: it is left out.
    record: Any = None
    labels: tuple[tuple[str, str], ...] = ()  # (group, reflection token)
    notes: tuple[str, ...] = ()  # what is counted about it


def file_rows(
    kind: str,
    path: str | Path,
    released: bool,
    on_error: OnError,
    reading: CorpusConfig | None = None,
) -> Iterator[FileRow]:
    """Yields the rows of a file.

    kind: of KINDS. released: read critic or generator data as `--format=released` does. on_error:
    takes the UserErrors of rows, which name file and line. reading: how a corpus is read. Raises
    UserError for a file that cannot be read on.
    """
    if released:
        yield from _released_rows(kind, path, on_error)
    elif kind == "corpus":
        yield from _passage_rows(path, on_error, reading)
    else:
        yield from _READERS[kind](path, on_error)


# ---- training data ------------------------------------------------------------------------------
def _critic_rows(path: str | Path, on_error: OnError) -> Iterator[FileRow]:
    rows = read_rows(path, on_error=on_error)
    for where, made in build_records(rows, checked_critic_example, on_error):
        yield _critic_row(where, made)


def _critic_row(where: str, made: CriticExample) -> FileRow:
    notes = ["with evidence"] if made.evidence else []
    if any(map(_spells_control, (made.instruction, made.preceding, made.segment))):
        notes.append(_SPELLS)
    return FileRow(where, made.id, made, ((made.task, made.output),), tuple(notes))


def _generator_rows(path: str | Path, on_error: OnError) -> Iterator[FileRow]:
    is_plain = Path(path).is_dir() and prepared.GENERATOR not in prepared.datasets(path)

    def build(where: str, row: Row) -> tuple[GeneratorExample, bool]:
        if is_plain:  # training escapes them, too
            row = row | {"output": prompts.escape_controls(row["output"])}
        return checked_generator_example(where, row), is_chat(row)

    rows = _rows_or_folder(path, on_error)
    for where, (made, was_chat) in build_records(rows, build, on_error):
        yield _generator_row(where, made, was_chat)


def _generator_row(where: str, made: GeneratorExample, was_chat: bool = False) -> FileRow:
    parts = prompts.parse_output(made.output)
    tokens = [p.token for p in parts if isinstance(p, Control)]
    labels = [(group, t) for t in tokens for group, of in reflection.GROUPS.items() if t in of]
    notes = {
        _CHATS: was_chat,
        "with passages": reflection.PARAGRAPH_OPEN in tokens,
        "without reflection tokens, so that nothing of them is learned": not labels,
        "with an empty output": not made.output.strip(),
        _SPELLS: _spells_control(made.instruction) or _spells_control(made.input),
    }
    return FileRow(where, made.id, made, tuple(labels), _true(notes))


def _released_rows(kind: str, path: str | Path, on_error: OnError) -> Iterator[FileRow]:
    class ReportedFaults(Faults):
        def add(self, fault: str, number: int | str) -> None:
            super().add(fault, number)
            on_error(UserError(f"{place}{number}: {fault}"))

    with open_text(path) as (f, _):
        place = f"{path}: item " if begins_list(f) else f"{path}:"
    faults = ReportedFaults()
    if kind == "critic":
        for number, critique in released_records(path, critic_example, faults):
            yield _critic_row(f"{place}{number}", critique)
    else:
        for number, example in released_records(path, generator_example, faults):
            yield _generator_row(f"{place}{number}", example)


# ---- instructions, questions, passages ----------------------------------------------------------
def _instruction_rows(path: str | Path, on_error: OnError) -> Iterator[FileRow]:
    def build(where: str, row: Row) -> tuple[Instruction, bool]:
        made = instruction_of(where, flatten_chat(where, row) if is_chat(row) else row)
        require_text(where, made)
        return made, is_chat(row)

    rows = _rows_or_folder(path, on_error)
    for where, (made, was_chat) in build_records(rows, build, on_error):
        notes = {
            _CHATS: was_chat,
            "with passages (ctxs)": bool(made.ctxs),
            _SPELLS: any(map(_spells_control, (made.instruction, made.input, made.output))),
        }
        yield FileRow(where, made.id, made, notes=_true(notes))


def _rows_or_folder(path: str | Path, on_error: OnError) -> Iterator[tuple[str, Row]]:
    return (
        prepared.read_prepared(path) if Path(path).is_dir() else read_rows(path, on_error=on_error)
    )


def _question_rows(path: str | Path, on_error: OnError) -> Iterator[FileRow]:
    number = -1

    def build(where: str, row: Row) -> tuple[Question, str]:
        nonlocal number
        number += 1
        return question_from(where, row, "", number)

    for where, (q, undecided) in build_records(question_rows(path, on_error), build, on_error):
        if undecided:
            yield FileRow(where, notes=("claims that are neither true nor false, left out",))
            continue
        notes = {
            "with gold answers": bool(q.answers),
            "with choices or options": bool(q.choices or q.options),
            "with passages (ctxs)": bool(q.ctxs),
            "with an input": bool(q.input),
            _SPELLS: _spells_control(q.full_question),
        }
        yield FileRow(where, q.id, q, notes=_true(notes))


def _passage_rows(
    path: str | Path, on_error: OnError, reading: CorpusConfig | None
) -> Iterator[FileRow]:
    corpus = Corpus(path, reading, on_error)
    for where, p in corpus:
        notes = {
            "without a title": not p.title.strip(),
            "without a text": not p.text.strip(),
            _SPELLS: _spells_control(p.title) or _spells_control(p.text),
        }
        yield FileRow(where, p.id, p, notes=_true(notes))
    for _ in range(corpus.num_empty):
        yield FileRow(str(path), notes=("with neither title nor text, left out",))


_READERS: dict[str, Callable[[str | Path, OnError], Iterator[FileRow]]] = {
    "instructions": _instruction_rows,
    "critic": _critic_rows,
    "generator": _generator_rows,
    "questions": _question_rows,
}


def _true(notes: dict[str, bool]) -> tuple[str, ...]:
    return tuple(note for note, holds in notes.items() if holds)


def _spells_control(text: str) -> bool:
    return prompts.escape_controls(text) != text


# ---- which kind a file is -----------------------------------------------------------------------
def guess_kind(path: str | Path) -> tuple[str, str]:
    """Returns a file's kind, and what it was told by.

    Raises UserError if its first row, or its header, fits none, and if it has no row.
    """
    if Path(path).is_dir():
        return _kind_of_folder(Path(path))
    suffix = kind_of(Path(path))
    if suffix in CURES:
        corpus_files(Path(path))  # raises, and says what turns it into text
    if suffix in (".md", ".rst"):
        return "corpus", f"its name, {suffix}"
    if suffix == ".txt":
        return "questions", "its name, .txt: a question a line"
    if suffix in TABLES and is_passage_table(Path(path), question_fields.QUESTION):
        return "corpus", "its columns"
    errors: list[UserError] = []
    _, row = next(question_rows(path, errors.append), ("", None))
    if row is None:
        raise errors[0] if errors else UserError(f"{path}: holds no rows")
    if kind := _kind_of(row):
        return kind
    raise UserError(
        f"{path}: cannot tell what it is for by its fields ({', '.join(sorted(row))}); give "
        f"--for={'|'.join(KINDS)}"
    )


def _kind_of(row: Row) -> tuple[str, str] | None:
    """The kind of a row, and what told it."""
    output = row.get("output")
    if row.get("task") in (*reflection.GROUPS, *TASKS):
        return "critic", f"task {row['task']!r}"
    if isinstance(output, str) and any(t in output for t in reflection.RETRIEVE):
        return "generator", "the reflection tokens in its output"
    if is_chat(row):
        return "instructions", "its messages"
    if "instruction" in row and isinstance(output, str) and not row.get("answers"):
        return "instructions", "its instruction and output"
    question = next((n for n in question_fields.QUESTION if row.get(n) is not None), "")
    if question:
        return "questions", f"field {question!r}"
    text = next((n for n in (*TEXT, "title") if n in row), "")
    return ("corpus", f"field {text!r}") if text else None


def _kind_of_folder(folder: Path) -> tuple[str, str]:
    if artifacts.manifest_path(folder).is_file() or (folder / artifacts.STARTED).is_file():
        is_labelled = prepared.GENERATOR in prepared.datasets(folder)
        return "generator" if is_labelled else "instructions", "a folder of `selfrag prepare`"
    corpus_files(folder)  # raises if there are none
    return "corpus", "a folder of files"
