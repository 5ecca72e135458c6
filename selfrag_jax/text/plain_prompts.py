"""The prompts of baselines, for models with or without reflection tokens.

A template has fields: {instruction}, the question as its task words it, and {paragraph}, its
passages as numbered lines. What fills a field is ordinary text, whatever it spells.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfrag_jax.errors import UserError
from selfrag_jax.files import open_text
from selfrag_jax.records import Passage, Question
from selfrag_jax.text import prompts
from selfrag_jax.text.tokenizer import HEADINGS, INPUT, Control, Part

FIELDS = ("instruction", "paragraph")
_FIELD = re.compile(r"\{(\w+)\}")
_HEADING = re.compile("(" + "|".join(map(re.escape, sorted(HEADINGS, key=len)[::-1])) + ")")
_KEYS = {"no_retrieval", "retrieval", "stop"}


@dataclass(frozen=True)
class Demonstration:
    """A question with its answer, to show a model what is asked of it."""

    question: Question
    passages: tuple[Passage, ...]  # shown where the prompt has passages
    answer: str


@dataclass(frozen=True)
class PlainPrompt:
    """Two templates: of questions alone, and of questions with passages.

    Without templates it is the generator's own prompt, with the passages after the response
    heading. stop: the answer ends before this text; "" for the end of text alone. demonstrations:
    come before the question, in the same template, each followed by a space, its answer and an
    empty line.
    """

    name: str
    no_retrieval: str = ""
    retrieval: str = ""
    stop: str = ""
    demonstrations: tuple[Demonstration, ...] = ()

    def parts(self, q: Question, passages: Sequence[Passage]) -> list[Part]:
        """The prompt, for Tokenizer.encode. The template's headings are controls, no text is."""
        shown: list[Part] = []
        for d in self.demonstrations:
            own = d.passages[: len(passages)]
            shown += [*self._question_parts(d.question, own), f" {d.answer}\n\n"]
        return [*shown, *self._question_parts(q, passages)]

    def _question_parts(self, q: Question, passages: Sequence[Passage]) -> list[Part]:
        if not self.no_retrieval:
            parts = prompts.question_prompt(q)
            return [*parts, *(part for p in passages for part in prompts.passage(p))]
        instruction = prompts.question_text(q) + (f"{INPUT}{q.input}" if q.input else "")
        texts = {"instruction": instruction, "paragraph": numbered(passages)}
        template = self.retrieval if passages else self.no_retrieval
        parts = []
        for i, piece in enumerate(_FIELD.split(template)):
            parts += [texts[piece]] if i % 2 else _literal(piece)
        return [part for part in parts if part]

    def cut(self, text: str) -> str:
        """The answer in a continuation."""
        return (text.split(self.stop)[0] if self.stop else text).strip()


def numbered(passages: Sequence[Passage]) -> str:
    """The passages as the released baselines show them: `[1] title`, a new line, the text."""
    return "\n".join(f"[{i}] {p.title}\n{p.text}" for i, p in enumerate(passages, 1))


def _literal(text: str) -> list[Part]:
    return [Control(t) if t in HEADINGS else t for t in _HEADING.split(text)]


SELFRAG = PlainPrompt("selfrag")
# For a base that was trained on text alone: the demonstrations say what an answer looks like.
FEW_SHOT = PlainPrompt(
    "few_shot",
    "Question: {instruction}\nAnswer:",
    "{paragraph}\nQuestion: {instruction}\nAnswer:",
    "\n",
)
# PROMPT_DICT of the released repository's retrieval_lm/utils.py, at commit a4d75d1; the second of
# each pair is called NAME_retrieval there. Its run_baseline_lm.py cuts answers at a blank line.
RELEASED = (
    PlainPrompt(
        "prompt_no_input",
        "### Instruction:\n{instruction}\n\n### Response:\n",
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Paragraph:\n{paragraph}\n\n### Instruction:\n{instruction}"
        "\n\n### Response:",
        "\n\n",
    ),
    PlainPrompt(
        "prompt_open_instruct",
        "<user>\n{instruction}\n<assistant>\n",
        "<user>\nReference:{paragraph}\n{instruction}\n<assistant>\n",
        "\n\n",
    ),
    PlainPrompt(
        "llama_chat_prompt",
        "[INST]{instruction}[/INST]",
        "[INST]{paragraph}\n{instruction}[/INST]",
        "\n\n",
    ),
)
BY_NAME = {p.name: p for p in (SELFRAG, *RELEASED)}


def load(name_or_file: str) -> PlainPrompt:
    """The prompt of that name, or of a JSON file: {"no_retrieval", "retrieval", "stop"?}.

    Raises UserError if there is none, and for a template without its fields or with others.
    """
    if name_or_file in BY_NAME:
        return BY_NAME[name_or_file]
    file = Path(name_or_file)
    if not file.is_file():
        raise UserError(
            f"--plain_prompt={name_or_file}: no such file or prompt; prompts: {', '.join(BY_NAME)}"
        )
    try:
        with open_text(file) as (f, _):
            row = json.loads(f.read())
    except (ValueError, RecursionError) as e:
        raise UserError(f"{file}: not valid JSON ({e})") from None
    _check(file, row)
    return PlainPrompt(file.name, row["no_retrieval"], row["retrieval"], row.get("stop", ""))


def _check(file: Path, row: Any) -> None:
    is_text = isinstance(row, dict) and all(isinstance(v, str) for v in row.values())
    if not is_text or not {"no_retrieval", "retrieval"} <= set(row) <= _KEYS:
        raise UserError(
            f"{file}: expected an object of two templates, no_retrieval and retrieval, and if need "
            "be stop, the text that ends an answer"
        )
    for key, needed in (("no_retrieval", FIELDS[:1]), ("retrieval", FIELDS)):
        found = _FIELD.findall(row[key])
        if sorted(found) != sorted(needed):
            names = " and ".join(f"{{{name}}}" for name in needed)
            raise UserError(f"{file}: field {key!r} must hold {names}, each once, and no other")
