"""Metrics of one answer's text against gold answers, each in [0, 1] and under its published name.

All texts are compared as SQuAD's evaluation does (text/normalising.py), unless a docstring says
otherwise.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

from selfrag_jax.records import Question
from selfrag_jax.text.normalising import normalise, without_punctuation

CITATION_MARK = re.compile(r" ?\[\d+\]")
# FEVER's labels, which the released scripts read as the answers of PubHealth.
_VERDICTS = {"SUPPORTS": "true", "REFUTES": "false"}
# Question.extra: the gold answers of a released variant, which its script compares with.
SCRIPT_GOLD = "script_gold"


# ---- free text ----------------------------------------------------------------------------------
def match(answer: str, gold: Sequence[str]) -> float:
    """Returns 1 if a gold answer is a substring of the answer, both normalised, else 0.

    The paper's accuracy for PopQA and TriviaQA ("gold answers are included in the generation",
    Section 4.1). `released_match` is the released script's variant.
    """
    text = normalise(answer)
    return float(any(_found(g, answer, lambda g: g in text) for g in gold))


def word_match(answer: str, gold: Sequence[str]) -> float:
    """Returns 1 if the answer contains a gold answer as whole words, both normalised, else 0.

    Stricter than `match`: "Quen" is not in "Quenport". Useless in scripts without spaces.
    """
    text = f" {normalise(answer)} "
    return float(any(_found(g, answer, lambda g: f" {g} " in text) for g in gold))


def released_match(answer: str, gold: Sequence[str]) -> float:
    """Returns 1 if a gold answer is a substring of the answer as they are, else 0.

    `match` of the released scripts (self-rag, retrieval_lm/metrics.py): case and punctuation count.
    For run_short_form.py, an answer with SUPPORTS is "true", another one with REFUTES "false".
    """
    answer = next((verdict for label, verdict in _VERDICTS.items() if label in answer), answer)
    return float(any(g in answer for g in gold if g))


def exact_match(answer: str, gold: Sequence[str]) -> float:
    """Returns 1 if the answer equals a gold answer, both normalised (SQuAD's EM), else 0."""
    text = normalise(answer)
    return float(any(_found(g, answer, lambda g: g == text) for g in gold))


def f1(answer: str, gold: Sequence[str]) -> float:
    """Returns the best token F1 with a gold answer (SQuAD's F1)."""
    return max((_token_f1(answer, g) for g in gold), default=0.0)


def without_citations(text: str) -> str:
    """Removes marks like "[1]", with the space before each."""
    return CITATION_MARK.sub("", text)


def _found(gold: str, answer: str, is_in: Callable[[str], bool]) -> bool:
    """Whether `is_in` holds for a normalised gold answer.

    Some golds are nothing once normalised ("The The", "+"): they are looked for as they are, by
    whole words, since they would otherwise be in every text or in none.
    """
    if text := normalise(gold):
        return is_in(text)
    if words := without_punctuation(gold):
        return f" {words} " in f" {without_punctuation(answer)} "
    return bool(gold.strip()) and gold.strip() in answer


def _token_f1(answer: str, gold: str) -> float:
    ours, theirs = normalise(answer).split(), normalise(gold).split()
    common = sum((Counter(ours) & Counter(theirs)).values())
    if not common:
        return 0.0
    precision, recall = common / len(ours), common / len(theirs)
    return 2 * precision * recall / (precision + recall)


# ---- options ------------------------------------------------------------------------------------
def option_accuracy(q: Question, answer: str) -> float:
    """Returns 1 if the answer names the gold option and no other, else 0 (PubHealth, ARC).

    Multiple choice: the one label that stands by itself in the answer ("B", "**B**", "B, iron",
    "The answer is B."). Without a label, or with two, it is 0. Choices with the labels 1 to 4 may
    be answered by A to D as well, because prompts show them so.
    Other options: the answer equals the gold option, both normalised. SUPPORTS and REFUTES are true
    and false, as in the released scripts.
    """
    if q.choices:
        return float(bool(q.answers) and chosen_label(q, answer) == q.answers[0])
    return float(_verdict(answer) in map(_verdict, q.answers))


def _verdict(text: str) -> str:
    """The text normalised; FEVER's label as true or false, if it holds one of them."""
    found = [verdict for label, verdict in _VERDICTS.items() if label in text]
    return found[0] if len(found) == 1 else normalise(text)


def chosen_label(q: Question, answer: str) -> str | None:
    """Returns the label of the choice that an answer names; None if it names none, or several."""
    labels = [label for label, _ in q.choices]
    by_name = {label: label for label in labels}
    if all(label.isdigit() for label in labels):
        by_name |= {chr(ord("A") + i): label for i, label in enumerate(labels)}
    text = answer.strip()
    bare = text.strip("*_`\"'().:, \n").upper()
    if alone := [label for name, label in by_name.items() if name.upper() == bare]:
        return alone[0]
    # A choice's own text may hold a label ("vitamin A", "2 metres"), which names nothing.
    for choice in sorted((c for _, c in q.choices if len(c.strip()) > 1), key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(choice.strip())}(?!\w)", " ", text, flags=re.IGNORECASE)
    names = "|".join(map(re.escape, by_name))
    named = {by_name[n] for n in re.findall(rf"(?<![^\W_])({names})(?![^\W_])", text)}
    return named.pop() if len(named) == 1 else None
