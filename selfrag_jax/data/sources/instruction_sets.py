"""Sets of instructions with written answers: both Alpacas, FLAN-V2, ShareGPT, OpenAssistant.

Of a conversation the first exchange is taken: later turns need those before them to make sense.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from selfrag_jax.data.chats import ASSISTANTS, USERS
from selfrag_jax.data.published_files import RowFault, published_rows
from selfrag_jax.data.sources.published import (
    PublishedSet,
    Rows,
    objects,
    optional_text,
    row_id,
    text,
)
from selfrag_jax.records import Instruction


def convert_alpaca(row: dict[str, Any]) -> Instruction:
    return Instruction(
        row_id(row), text(row, "instruction"), text(row, "output"), optional_text(row, "input")
    )


def convert_flan(row: dict[str, Any]) -> Instruction:
    """Reads FLAN's own rows (inputs, targets) and those republished as chats."""
    if "messages" in row:
        made = convert_conversation(row)
    else:
        made = Instruction(row_id(row), text(row, "inputs"), text(row, "targets"))
    # Many of its templates end with a heading for the answer.
    return replace(made, instruction=made.instruction.removesuffix("Output:").rstrip())


def convert_conversation(row: dict[str, Any]) -> Instruction:
    """Returns the first exchange of a conversation in ShareGPT's layout or as messages."""
    if "messages" in row:
        turns = [(text(m, "role"), text(m, "content")) for m in objects(row, "messages")]
    else:
        turns = [(text(m, "from"), text(m, "value")) for m in objects(row, "conversations")]
    system = "\n\n".join(said for role, said in turns if role == "system")
    turns = [(role, said) for role, said in turns if role != "system"]
    if len(turns) < 2:
        raise RowFault("fewer than two turns")
    (first, asked), (second, said) = turns[:2]
    if first not in USERS or second not in ASSISTANTS:
        raise RowFault("does not begin with a user and an assistant")
    if not asked:
        raise RowFault("empty instruction")
    return Instruction(row_id(row), f"{system}\n\n{asked}" if system else asked, said)


def convert_tree(row: dict[str, Any]) -> Instruction:
    """Returns the prompt of an OpenAssistant tree, and the reply that was ranked best."""
    prompt = row.get("prompt")
    if not isinstance(prompt, dict):
        raise RowFault("missing field 'prompt'")
    if prompt.get("lang") != "en":
        raise RowFault("not English")  # as the paper's copy, and the corpus
    if prompt.get("deleted"):
        raise RowFault("deleted prompt")
    replies = [
        reply
        for reply in objects(prompt, "replies")
        if reply.get("role") == "assistant" and not reply.get("deleted")
    ]
    if not replies:
        raise RowFault("prompt without a reply")
    # Rank 0 is the best; replies that nobody ranked come last.
    best = min(replies, key=lambda r: r["rank"] if isinstance(r.get("rank"), int) else 1 << 30)
    made_id = row.get("message_tree_id") or prompt.get("message_id") or ""
    return Instruction(str(made_id), text(prompt, "text"), text(best, "text"))


def read_trees(path: Path) -> Rows:
    """Yields the trees of either OpenAssistant file; of .messages, the prompts with replies."""
    numbers: dict[str, int] = {}  # of the prompts, by message id
    prompts: dict[str, dict[str, Any]] = {}
    for number, row in published_rows(path):
        if isinstance(row, RowFault) or "message_id" not in row:
            yield number, row
        elif not row.get("parent_id"):
            numbers[str(row["message_id"])] = number
            prompts[str(row["message_id"])] = row | {"replies": []}
        elif prompt := prompts.get(str(row["parent_id"])):
            prompt["replies"].append(row)
    yield from _as_trees(numbers, prompts)


def _as_trees(
    numbers: dict[str, int], prompts: dict[str, dict[str, Any]]
) -> Iterator[tuple[int, Any]]:
    for message_id, prompt in prompts.items():
        yield numbers[message_id], {"message_tree_id": message_id, "prompt": prompt}


INSTRUCTION_SETS = (
    PublishedSet(
        "gpt4_alpaca",
        ("alpaca_gpt4_data.json",),
        "github.com/Instruction-Tuning-with-GPT-4/GPT-4-LLM (data/)",
        convert_alpaca,
    ),
    PublishedSet(
        "stanford_alpaca",
        ("alpaca_data.json",),
        "github.com/tatsu-lab/stanford_alpaca",
        convert_alpaca,
    ),
    PublishedSet(
        "flan_v2",
        ("flan_v2_data.jsonl", "flan_v2*.jsonl"),
        "github.com/google-research/FLAN (flan/v2), or github.com/allenai/open-instruct, which "
        "has a sample as chats",
        convert_flan,
    ),
    PublishedSet(
        "sharegpt",
        (
            "sg_90k_part*_html_cleaned.json",
            "ShareGPT_V3*.json",
            "sharegpt*.json",
            "sharegpt*.jsonl",
        ),
        "huggingface.co/datasets/anon8231489123/ShareGPT_Vicuna_unfiltered",
        convert_conversation,
    ),
    PublishedSet(
        "oasst1",
        ("*oasst_ready.trees.jsonl", "*oasst_ready.messages.jsonl"),
        "huggingface.co/datasets/OpenAssistant/oasst1",
        convert_tree,
        read_trees,
    ),
)
