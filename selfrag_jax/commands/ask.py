"""`selfrag ask`: a question in, an answer on the screen."""

from __future__ import annotations

import json
import sys
from typing import Any

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
from selfrag_jax.errors import StageFailed, UserError

_EXAMPLE = 'selfrag ask --workdir=W "What does Silverlight Waltz praise?"'


def run(values: dict[str, Any], positional: list[str]) -> None:
    question = " ".join(positional).strip()
    if not question:
        raise UserError(f"ask what? For example: {_EXAMPLE}")
    from selfrag_jax.answering.records import Answer
    from selfrag_jax.answering.terminal import show

    rag = load_selfrag(values)
    mode = values["mode"] or rag.config.search.mode
    if rag.retriever is None and mode != "no_retrieval":
        raise UserError("give --index, made by `selfrag index`, or --mode=no_retrieval")
    for event in rag.stream([question], **search_changes(values)):
        if not isinstance(event, Answer):
            if sys.stderr.isatty() and event.segment.text:  # a long answer is read as it grows
                print(f"... {event.segment.text}", file=sys.stderr, flush=True)
            continue
        if values["json"]:
            print(json.dumps(event.to_row(), ensure_ascii=False))
        if event.error:
            raise StageFailed(f"no answer: {event.error}")
        if not values["json"]:
            show(event)


COMMAND = Command(
    example=_EXAMPLE,
    flags=(
        *MODEL_FLAGS,
        *SEARCH_FLAGS,
        *LOADING_FLAGS,
        Flag("json", "print the record instead", False, type=bool, group=OUTPUT),
        ANSWER_CONFIG_FLAG,
    ),
    run=run,
    default_config=DEFAULT_CONFIG,
    positional="question",
)
