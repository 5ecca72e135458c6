"""Sets of questions with short answers: NQ, FEVER, WoW, OpenBookQA, ARC-Easy and ASQA.

They have questions only, so the instruction is ours; the question is its input. Natural Questions
needs none: the question is the instruction.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from selfrag_jax.data.published_files import RowFault, object_items, published_rows
from selfrag_jax.data.sources.published import (
    PublishedSet,
    Rows,
    filled_text,
    objects,
    row_id,
    text,
)
from selfrag_jax.records import Instruction

FEVER_TASK = (
    "Decide whether the following claim is factually correct. Answer true if it is, and false if "
    "it is not."
)
CHAT_TASK = (
    "The input is a conversation between two people. Write the next turn: reply to the last one in "
    "an informative and engaging way."
)
CHOICE_TASK = (
    "The input is a question with several possible answers. Pick the best one, and answer with its "
    "letter alone."
)
ASQA_TASK = (
    "The following question can be understood in more than one way. Answer it in a paragraph that "
    "clears up the ambiguity and covers the answer to each reading."
)
_LETTERS = "ABCDEFGH"


# ---- questions and claims -----------------------------------------------------------------------
def convert_nq(row: dict[str, Any]) -> Instruction:
    """Reads DPR's rows (question, answers), NQ-open's (question, answer) and KILT's."""
    return Instruction(row_id(row), filled_text(row, "question", "input"), _first_answer(row))


def convert_fever(row: dict[str, Any]) -> Instruction:
    """Reads FEVER's own rows (claim, label), DPR's and KILT's.

    Claims without enough information are left out: true and false are the only answers to learn.
    """
    others = "answers" in row or "output" in row
    label = _first_answer(row) if others else text(row, "label")
    answer = {"SUPPORTS": "true", "REFUTES": "false"}.get(label)
    if answer is None:
        known = label == "NOT ENOUGH INFO"
        raise RowFault("label NOT ENOUGH INFO" if known else "unknown label")
    claim = filled_text(row, "claim", "question", "input")
    return Instruction(row_id(row), FEVER_TASK, answer, claim)


def _first_answer(row: dict[str, Any]) -> str:
    """The first answer: of a list of texts, of KILT's list of objects, or a text."""
    for name in ("answers", "answer", "output"):
        value = row.get(name)
        if isinstance(value, list):
            # KILT lists passages without an answer, too.
            answers = [v.get("answer") if isinstance(v, dict) else v for v in value]
            value = next((a for a in answers if a is not None), "")
        if isinstance(value, str):
            return value.strip()
        if value is not None:
            raise RowFault(f"malformed {name!r}")
    raise RowFault("missing field 'answers' or 'answer'")


# ---- conversations ------------------------------------------------------------------------------
def read_wizard_turns(path: Path) -> Rows:
    """Yields one row for each turn of a wizard that follows one of the apprentice.

    Its number is that of the dialog.
    """
    for number, dialog in published_rows(path):
        if isinstance(dialog, RowFault) or "input" in dialog:  # KILT's rows are turns already
            yield number, dialog
            continue
        try:
            turns = objects(dialog, "dialog")
        except RowFault as fault:
            yield number, fault
            continue
        for i, turn in enumerate(turns):
            if i and "wizard" in str(turn.get("speaker", "")).lower():
                yield number, {"id": f"{number}-{i}", "history": turns[:i], "turn": turn}


def convert_wizard_turn(row: dict[str, Any]) -> Instruction:
    if "history" not in row:
        return Instruction(row_id(row), CHAT_TASK, _first_answer(row), filled_text(row, "input"))
    history = "\n".join(filled_text(turn, "text") for turn in row["history"])
    return Instruction(row_id(row), CHAT_TASK, text(row["turn"], "text"), history)


# ---- multiple choice ----------------------------------------------------------------------------
def convert_choices(row: dict[str, Any]) -> Instruction:
    """Reads both layouts of OpenBookQA and ARC; choices are lettered A, B, ... in their order."""
    question, choices = row.get("question"), row.get("choices")
    if isinstance(question, dict):
        stem = filled_text(question, "stem")
        options = [(text(c, "label"), text(c, "text")) for c in objects(question, "choices")]
    else:
        stem, options = filled_text(row, "question", "question_stem"), _in_columns(choices)
    labels = [label for label, _ in options]
    key = text(row, "answerKey")
    if not 2 <= len(options) <= len(_LETTERS):
        raise RowFault(f"{len(options)} choices")
    if key not in labels:
        raise RowFault("answerKey is none of the labels")
    lines = [f"{letter}: {said}" for letter, (_, said) in zip(_LETTERS, options, strict=False)]
    answer = _LETTERS[labels.index(key)]
    return Instruction(row_id(row), CHOICE_TASK, answer, "\n".join([stem, *lines]))


def _in_columns(choices: Any) -> list[tuple[str, str]]:
    """Choices as {"label": [...], "text": [...]}."""
    if not isinstance(choices, dict):
        raise RowFault("missing field 'choices'")
    labels, texts = choices.get("label"), choices.get("text")
    if not isinstance(labels, list) or not isinstance(texts, list) or len(labels) != len(texts):
        raise RowFault("malformed 'choices'")
    return [(str(label), str(said).strip()) for label, said in zip(labels, texts, strict=True)]


# ---- ambiguous questions ------------------------------------------------------------------------
def read_asqa(path: Path) -> Rows:
    """Yields the questions of ASQA's training split, with their keys as ids."""
    for number, key, row in object_items(path, "train"):
        yield number, row | {"id": key} if isinstance(row, dict) else RowFault("not a JSON object")


def convert_asqa(row: dict[str, Any]) -> Instruction:
    annotations = objects(row, "annotations")
    if not annotations:
        raise RowFault("no annotation")
    answer = text(annotations[0], "long_answer")
    question = filled_text(row, "ambiguous_question", "question")
    return Instruction(row_id(row), ASQA_TASK, answer, question)


KNOWLEDGE_SETS = (
    PublishedSet(
        "nq",
        ("biencoder-nq-train.json", "NQ-open.train.jsonl", "nq-train-kilt.jsonl"),
        "github.com/facebookresearch/DPR (data.retriever.nq-train) or github.com/google-research-"
        "datasets/natural-questions (nq_open/)",
        convert_nq,
    ),
    PublishedSet(
        "fever",
        ("fever*train*.jsonl", "train.jsonl"),
        "fever.ai/dataset/fever.html",
        convert_fever,
    ),
    PublishedSet(
        "wow",
        ("data.json", "train.json", "wow-train-kilt.jsonl"),
        "parl.ai/projects/wizard_of_wikipedia",
        convert_wizard_turn,
        read_wizard_turns,
    ),
    PublishedSet(
        "openbookqa",
        ("train_complete.jsonl", "openbookqa*train*.jsonl", "train.jsonl"),
        "allenai.org/data/open-book-qa (OpenBookQA-V1-Sep2018/Data/)",
        convert_choices,
    ),
    PublishedSet(
        "arc_easy",
        ("ARC-Easy-Train.jsonl",),
        "allenai.org/data/arc (ARC-V1-Feb2018/ARC-Easy/)",
        convert_choices,
    ),
    PublishedSet(
        "asqa",
        ("ASQA.json",),
        "github.com/google-research/language (language/asqa)",
        convert_asqa,
        read_asqa,
    ),
)
