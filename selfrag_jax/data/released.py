"""Reads the published training files as they are; malformed rows are left out and reported.

generator   instruction, input, output with passages and reflection tokens, id, dataset_name
critic      instruction (the question in words), input (all fields as one text), output (the
            reflection token), task: retrieval, multi_retrieval, relevance, groudness, utility
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from selfrag_jax.data.chats import flatten_chat, is_chat
from selfrag_jax.data.published_files import Faults, RowFault, published_rows
from selfrag_jax.errors import UserError
from selfrag_jax.records import ROW_ID_FIELDS, CriticExample, GeneratorExample, Passage
from selfrag_jax.text import prompts, reflection
from selfrag_jax.text.reflection import PARAGRAPH_CLOSE, PARAGRAPH_OPEN
from selfrag_jax.text.tokenizer import Control

T = TypeVar("T")

TASKS = {
    "retrieval": "retrieve",
    "multi_retrieval": "retrieve",
    "relevance": "isrel",
    "groudness": "issup",  # so spelt
    "utility": "isuse",
}
_PASSAGE = re.compile(f"{re.escape(PARAGRAPH_OPEN)}.*?{re.escape(PARAGRAPH_CLOSE)}", re.DOTALL)
# Bracketed text outside passages that must have been meant as a reflection token.
_LIKE_A_TOKEN = re.compile(
    r"\[\s*(?:(?:no |need )?retriev(?:al|e)|continue[^\]]*evidence|(?:ir|not )?relevant|"
    r"(?:fully |partially |not )?supported|no support[^\]]*|contradictory|"
    r"utility\s*:?[^\]\n]{0,10})\s*\]|</?\s*paragraph\s*/?>",
    re.IGNORECASE,
)
_HEADINGS = {
    "preceding": "Preceding sentences:",
    "evidence": "Evidence:",
    "output": "Output:",
}
_ALL_FIELDS = {"preceding", "evidence", "output"}
_HEADING = re.compile(r"^(?:##\s*)?Task instruction:[ \t]?", re.MULTILINE)


# ---- files --------------------------------------------------------------------------------------
def read_released_generator(
    path: str | Path, faults: Faults | None = None
) -> list[GeneratorExample]:
    """Returns the well-formed rows of generator data, and reports the others on stderr.

    faults: takes the numbers of all malformed rows. Raises UserError if more than half are.
    """
    return _read(path, generator_example, faults)


def read_released_critic(path: str | Path, faults: Faults | None = None) -> list[CriticExample]:
    """Returns the well-formed rows of critic data, and reports the others on stderr.

    faults: takes the numbers of all malformed rows. Raises UserError if more than half are.
    """
    return _read(path, critic_example, faults)


def _read(path: str | Path, build: Callable[[dict[str, Any]], T], faults: Faults | None) -> list[T]:
    faults = Faults() if faults is None else faults
    found = [record for _, record in released_records(path, build, faults)]
    read = len(found) + faults.total
    if not read:
        raise UserError(f"{path}: holds no rows")
    if 2 * faults.total > read:
        raise UserError(
            f"{path}: {faults.total:,} of {read:,} rows are malformed; is it the right file? "
            + "; ".join(faults.by_frequency())
        )
    if faults.total:
        print(f"{path}: {faults.total:,} of {read:,} rows are left out", file=sys.stderr)
        for line in faults.by_frequency():
            print(f"  {line}", file=sys.stderr)
    return found


def released_records(
    path: str | Path, build: Callable[[dict[str, Any]], T], faults: Faults
) -> Iterator[tuple[int, T]]:
    """Yields (number, build(row)) of the well-formed rows; notes the others in `faults`."""
    for number, row in published_rows(path):
        try:
            if isinstance(row, RowFault):
                raise row
            record = build(row)
        except RowFault as fault:
            faults.add(str(fault), number)
        else:
            yield number, record


def is_released_critic(row: dict[str, Any]) -> bool:
    return isinstance(row.get("task"), str) and row["task"] in TASKS


# ---- generator rows -----------------------------------------------------------------------------
def generator_example(row: dict[str, Any]) -> GeneratorExample:
    """Returns a row of published generator data. Raises RowFault with the kind of fault."""
    if "task" in row:
        raise RowFault("critic data")
    if is_chat(row):
        try:
            row = flatten_chat("", row)
        except UserError:
            raise RowFault("malformed messages") from None
    example = GeneratorExample(
        id=_id(row),
        instruction=_field(row, "instruction"),
        output=_field(row, "output"),
        input=_field(row, "input", ""),
        dataset_name=_field(row, "dataset_name", ""),
    )
    if not example.instruction.strip():
        raise RowFault("empty instruction")
    if fault := _output_fault(example.output):
        raise RowFault(fault)
    return example


def _output_fault(output: str) -> str:
    """The kind of fault in an output; "" if there is none."""
    parts = prompts.parse_output(output)
    if not prompts.closes_paragraphs(parts):
        return "unclosed paragraph"
    text = _PASSAGE.sub("", output)  # a passage may say anything
    if any(m.group() not in reflection.ALL for m in _LIKE_A_TOKEN.finditer(text)):
        return "unknown control token"
    for token in reflection.ALL:
        text = text.replace(token, "")
    if not text.strip():
        return "empty output"
    return "" if any(isinstance(p, Control) for p in parts) else "no reflection token"


# ---- critic rows --------------------------------------------------------------------------------
def critic_example(row: dict[str, Any]) -> CriticExample:
    """Returns a row of published critic data. Raises RowFault with the kind of fault.

    Its own wording of the question is dropped: training asks in ours, as labelling does.
    """
    task = _field(row, "task")
    if task not in TASKS:
        raise RowFault("unknown task")
    group = TASKS[task]
    label = _label(group, _field(row, "output"))
    fields = split_input(task, _field(row, "input"))
    if not fields["instruction"]:
        raise RowFault("empty instruction")
    needed = {"isrel": ("evidence",), "issup": ("evidence", "output"), "isuse": ("output",)}
    for name in needed.get(group, ()):
        if not fields.get(name):
            raise RowFault(f"no {name} in input")
    return CriticExample(
        task=group,
        instruction=fields["instruction"],
        output=label,
        preceding=fields.get("preceding", ""),
        evidence=_passage(fields.get("evidence", "")),
        segment=fields.get("output", ""),
        id=_id(row),
        explanation=_field(row, "explanation", ""),
    )


def split_input(task: str, text: str) -> dict[str, str]:
    """Splits the input of a published critic row into instruction, preceding, evidence, output.

    Each field begins a line with its heading. An instruction may hold such lines of its own (as
    those with examples do), so the last line with each heading counts, from the end of the text
    backwards. Raises RowFault if the instruction's heading is missing.
    """
    opening = _HEADING.search(text)
    if opening is None or text[: opening.start()].strip():
        raise RowFault("no task instruction in input")
    found: dict[str, str] = {}
    rest = text[opening.end() :]
    names = {"utility": {"output"}, "relevance": {"evidence"}}.get(task, _ALL_FIELDS)
    if TASKS[task] == "retrieve" and f"\n{_HEADINGS['evidence']}" not in rest:
        names = set()  # asked of the instruction alone
    while names:
        starts = {name: rest.rfind(f"\n{_HEADINGS[name]}") for name in names}
        last = max(starts, key=lambda name: starts[name])
        if starts[last] < 0:
            break
        found[last] = rest[starts[last] + 1 + len(_HEADINGS[last]) :].strip()
        rest = rest[: starts[last]]
        names = names - {last}
    return found | {"instruction": rest.strip()}


def _label(group: str, output: str) -> str:
    """The only reflection token in an output."""
    labels = [t for t in reflection.ALL if t not in reflection.MARKUP and t in output]
    if not output.strip():
        raise RowFault("empty output")
    if not labels:
        raise RowFault("unknown control token" if "[" in output else "no label")
    if len(labels) > 1:
        raise RowFault("two labels")
    if labels[0] not in reflection.GROUPS[group]:
        raise RowFault("label of another group")
    if output.strip() != labels[0]:
        raise RowFault("text beside the label")
    return labels[0]


def _passage(evidence: str) -> Passage | None:
    """Evidence as a passage: its first line is the title if others follow."""
    if not evidence:
        return None
    title, newline, text = evidence.partition("\n")
    return Passage("0", title.strip(), text.strip()) if newline else Passage("0", "", evidence)


def _id(row: dict[str, Any]) -> str:
    """The row's id under any of its names; "" if it has none."""
    return _field(row, next((n for n in ROW_ID_FIELDS if row.get(n) is not None), "id"), "")


def _field(row: dict[str, Any], name: str, default: str | None = None) -> str:
    value = row.get(name, default)
    if value is None and default is not None:
        return default
    if value is None:
        raise RowFault(f"missing field {name!r}")
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise RowFault(f"field {name!r} is not text")
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowFault("unpaired surrogate") from None
    return text
