"""`selfrag ask`: a question in, an answer on the screen; without one, a prompt for many."""

from __future__ import annotations

import itertools
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfrag_jax.commands import question_prompt
from selfrag_jax.commands.command import OUTPUT, Command, Flag
from selfrag_jax.commands.model_flags import (
    ANSWER_CONFIG_FLAG,
    DEFAULT_CONFIG,
    LOADING_FLAGS,
    MODEL_FLAGS,
    SEARCH_FLAGS,
    load_selfrag,
    search_changes,
)
from selfrag_jax.commands.passages_flags import PASSAGES_FLAGS
from selfrag_jax.errors import StageFailed, UserError

if TYPE_CHECKING:
    from selfrag_jax.answering.records import Answer
    from selfrag_jax.answering.selfrag import SelfRAG
    from selfrag_jax.records import Question

_EXAMPLE = 'selfrag ask --workdir=W "What does Silverlight Waltz praise?"'
# JSON leaves them as they are, but terminals obey the first two (bidirectional overrides are the
# second), and no encoding has the third.
_NOT_PRINTABLE = re.compile("[\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_UNPAIRED = re.compile("[\ud800-\udfff]")  # bytes that could not be decoded


def run(values: dict[str, Any], positional: list[str]) -> None:
    question = " ".join(positional).strip()
    _check_text(question)
    _require_no_file(question)
    is_typed = not question and sys.stdin is not None and sys.stdin.isatty()
    piped = iter(()) if question or is_typed else question_prompt.piped_lines()
    first = next(piped, None)  # before a model is loaded
    if not (question or is_typed or first):
        raise UserError(f"ask what? For example: {_EXAMPLE}")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # answers have characters that a locale may lack
            stream.reconfigure(errors="replace")

    from selfrag_jax.answering.terminal import show
    from selfrag_jax.records import Question

    rag, changes = load_selfrag(values), search_changes(values)
    mode = rag.search_config(changes).mode
    if rag.retriever is None and mode != "no_retrieval":
        raise UserError(
            "give --index, made by `selfrag index`, --passages, a file or folder of your own "
            "texts, or --mode=no_retrieval"
        )
    number = itertools.count()
    hint = ":full" if is_typed else "--full"

    def ask(text: str) -> Answer:
        _check_text(text)
        return _ask(rag, Question(id=str(next(number)), question=text), changes, values, hint)

    if question:
        ask(question)
    elif is_typed:
        question_prompt.converse(ask, lambda answer: show(answer, full=True), repr(rag))
    else:
        question_prompt.answer_lines(ask, itertools.chain([str(first)], piped))


def _check_text(question: str) -> None:
    if _UNPAIRED.search(question):
        encoding = sys.getfilesystemencoding()
        raise UserError(f"the question is no text in {encoding}: {question!a}")


def _require_no_file(text: str) -> None:
    """Raises UserError if a question is the name of a file."""
    if len(text) < 256 and "\0" not in text and Path(text).is_file():
        raise UserError(
            f"{text}: is a file; answer the questions in it by `selfrag answer --input={text}`, "
            f"or one on each line by `selfrag ask < {text}`"
        )


def _ask(
    rag: SelfRAG, question: Question, changes: dict[str, Any], values: dict[str, Any], hint: str
) -> Answer:
    """Answers a question, prints the answer and returns it. Raises StageFailed without one.

    hint: how to see all of a text that was cut.
    """
    from selfrag_jax.answering.printable import printable
    from selfrag_jax.answering.records import Answer
    from selfrag_jax.answering.terminal import show

    answer = None
    for event in rag.stream(question, **changes):
        if isinstance(event, Answer):
            answer = event
        elif sys.stderr.isatty() and event.segment.text:  # a long answer is read as it grows
            print(f"... {printable(event.segment.text)}", file=sys.stderr, flush=True)
    if answer is None:
        raise StageFailed("no answer: the search ended without one")
    if values["json"]:
        is_utf8 = "utf" in (sys.stdout.encoding or "utf-8").lower()
        row = json.dumps(answer.to_row(), ensure_ascii=not is_utf8)
        print(_NOT_PRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", row), flush=True)
    if answer.error:
        raise StageFailed(f"no answer: {printable(answer.error)}")
    if not values["json"]:
        show(answer, full=values["full"], how_to_see_all=hint)
        sys.stdout.flush()
    return answer


COMMAND = Command(
    example=f"{_EXAMPLE}\nselfrag ask --workdir=W\nselfrag ask --workdir=W < questions.txt\n"
    'selfrag ask --model=demo --passages=notes "Where do the keys hang?"',
    flags=(
        *MODEL_FLAGS,
        *PASSAGES_FLAGS,
        *SEARCH_FLAGS,
        *LOADING_FLAGS,
        Flag(
            "full",
            "show long passages whole, instead of how much of them was cut",
            False,
            type=bool,
            group=OUTPUT,
        ),
        Flag(
            "json",
            "print the record instead, on one line for each question",
            False,
            type=bool,
            group=OUTPUT,
        ),
        ANSWER_CONFIG_FLAG,
    ),
    run=run,
    default_config=DEFAULT_CONFIG,
    positional='["QUESTION"]',
)
