"""MAUVE (Pillutla et al., 2021) between answers and long gold answers, as ALCE computes it."""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from selfrag_jax.errors import UserError, library
from selfrag_jax.evaluation.alce import first_line, without_marks
from selfrag_jax.evaluation.metrics import long_answer
from selfrag_jax.records import Question

MAX_WORDS, MAX_TOKENS = 100, 512
RUNS = 5  # of its k-means, as MAUVE's authors advise


def mauve_text(question: str, answer: str) -> str:
    """Returns what ALCE compares: question and answer, 100 words, no punctuation at the end."""
    text = f"{question} {without_marks(first_line(answer)).strip()}"
    return " ".join(text.split()[:MAX_WORDS]).rstrip(string.punctuation)


def mauve_of_answers(
    questions: Sequence[Question], answers: Sequence[dict[str, Any]], folder: str | Path, seed: int
) -> dict[str, Any]:
    """Returns a row of results.json without system and task, of questions with a long gold answer.

    answers: rows of `selfrag answer`; folder: of the model (`features`). low and high are the range
    of the runs (`mauve`). Raises UserError as `long_answers` does.
    """
    by_id = {str(row["id"]): row["answer"] for row in answers}
    long = long_answers(questions)
    gold = [mauve_text(q.question, reference) for q, reference in long]
    ours = [mauve_text(q.question, by_id[q.id]) for q, _ in long]
    value, low, high = mauve(features(gold, folder), features(ours, folder), seed)
    return {"metric": "mauve", "value": value, "low": low, "high": high, "n": len(long)}


def long_answers(questions: Sequence[Question]) -> list[tuple[Question, str]]:
    """Returns the questions with a long gold answer. Raises UserError if there are fewer than 2."""
    found = [(q, reference) for q in questions if (reference := long_answer(q))]
    if len(found) < 2:
        raise UserError(
            "--mauve: fewer than two questions have a long gold answer (answer, or annotations "
            "with long_answer)"
        )
    return found


def mauve(
    gold: Float[np.ndarray, "n d"], answers: Float[np.ndarray, "m d"], seed: int
) -> tuple[float, float, float]:
    """Returns the mean MAUVE of several runs of k-means, and the lowest and highest of them.

    gold, answers: features of the texts, such as `features` computes.
    """
    mauve = library("mauve", "MAUVE", "eval")
    found = [
        float(
            mauve.compute_mauve(
                p_features=gold, q_features=answers, seed=seed + run, verbose=False
            ).mauve
        )
        for run in range(RUNS)
    ]
    return float(np.mean(found)), min(found), max(found)


def features(texts: Sequence[str], folder: str | Path) -> Float[np.ndarray, "n d"]:
    """Returns the last hidden state at each text's last token, by the model in a local folder.

    Published figures take gpt2-large.
    """
    torch, transformers = (library(name, "MAUVE", "eval") for name in ("torch", "transformers"))
    if not (Path(folder) / "config.json").is_file():
        raise UserError(
            f"{folder}: no config.json; --mauve is the local folder of a language model, such as "
            "gpt2-large"
        )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    except (OSError, ValueError, KeyError) as e:
        reason = str(e).strip().split("\n")[0]
        raise UserError(f"{folder}: transformers cannot open this model: {reason}") from None
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    with torch.inference_mode():
        for text in texts:  # one by one: padding would change what a decoder sees
            ids = tokenizer(text, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
            states = model(input_ids=ids.input_ids.to(model.device)).last_hidden_state
            rows.append(states[0, -1].float().cpu().numpy())
    return np.stack(rows)
