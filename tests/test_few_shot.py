"""Demonstrations: training questions with right answers, in front of the question of a base."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from selfrag_jax.commands.few_shot import FewShotConfig, few_shot_prompt
from selfrag_jax.errors import UserError
from selfrag_jax.records import Instruction, Passage, Question
from selfrag_jax.text import plain_prompts

ROMES = Passage("p1", "Rome", "Rome is in Italy.")
OTHER = Passage("p2", "Oslo", "Oslo is in Norway.")


class Atlas:
    """Knows that a passage about Italy supports any answer that names Italy.

    Such answers are useful if they are short.
    """

    def judge(self, query):
        assert query.group == "isuse" and query.evidence is None
        return "[Utility:5]" if len(query.output) < 20 else "[Utility:2]"

    def supports(self, instruction, passage, segment):
        return "Italy" in passage.text and "Italy" in segment


KIND = SimpleNamespace(right_rows={"unanswerable": lambda truth, row: row.output == "No idea."})


def row(i, output="Italy.", task="facts", ctxs=(OTHER, ROMES)):
    return Instruction(f"r{i}", f"Where is Rome {i}?", output, dataset_name=task, ctxs=ctxs)


def prompt_of(task, rows, shots=2, seed=0):
    return few_shot_prompt(task, rows, KIND, Atlas(), FewShotConfig(seed, shots))


def shown(*arguments, **settings):
    return list(prompt_of(*arguments, **settings).demonstrations)


def test_only_right_answers_are_shown_with_the_passage_that_supports_them():
    rows = [row(1, "Norway."), row(2), row(3, "Peru."), row(4), row(5, ctxs=(OTHER,))]
    rows.append(row(6, "It is said that Italy has volcanoes."))  # supported, but no answer
    found = shown("facts", rows, shots=5)
    assert sorted(d.question.id for d in found) == ["r2", "r4"]
    assert all(d.passages == (ROMES,) and d.answer == "Italy." for d in found)


def test_rows_are_of_the_task_and_drawn_by_the_seed():
    rows = [row(i, task="claims" if i % 2 else "facts") for i in range(40)]
    found = shown("claims", rows, 4)
    assert len(found) == 4 and all(int(d.question.id[1:]) % 2 for d in found)
    assert found == shown("claims", rows, 4) != shown("claims", rows, 4, seed=1)
    for task, others in (("claims", [row(1, "Peru.", "claims")]), ("unanswerable", rows)):
        with pytest.raises(UserError, match=f"no training row with a right output .* '{task}'"):
            shown(task, others)
    with pytest.raises(UserError, match="shots=0: must be at least 1"):
        FewShotConfig(0, 0)


def test_demonstrations_are_unlike_each_other():
    """Whatever is drawn first, the second is about something else."""
    alike = [
        Instruction(n, f"Where is {n}?", "It is in Italy.", "", "facts", (ROMES,))
        for n in ("Rome", "Milan", "Turin")
    ]
    other = Instruction("x", "Which land has Rome as capital?", "Italy.", "", "facts", (ROMES,))
    for seed in range(10):
        found = {d.question.id for d in shown("facts", [*alike, other], 2, seed)}
        assert "x" in found and len(found) == 2


def test_where_no_passage_supports_a_right_answer_the_first_one_is_shown():
    rows = [row(1, "Italy.", "unanswerable"), row(2, "No idea.", "unanswerable")]
    [found] = shown("unanswerable", rows)
    assert found.question.id == "r2" and found.passages == (OTHER,)
    [found] = shown("unanswerable", [row(1, "No idea.", "unanswerable", ctxs=())])
    assert found.passages == ()


def test_the_prompt_is_the_demonstrations_and_then_the_question():
    prompt = prompt_of("facts", [row(1)], 1)
    asked = Question("q", "Where is Oslo?", choices=(("A", "Peru"), ("B", "Norway")))
    assert "".join(prompt.parts(asked, ())) == (
        "Question: Where is Rome 1?\nAnswer: Italy.\n\n"
        "Question: Where is Oslo? A: Peru B: Norway\nAnswer:"
    )
    assert "".join(prompt.parts(asked, (OTHER,))) == (
        "[1] Rome\nRome is in Italy.\nQuestion: Where is Rome 1?\nAnswer: Italy.\n\n"
        "[1] Oslo\nOslo is in Norway.\nQuestion: Where is Oslo? A: Peru B: Norway\nAnswer:"
    )
    assert prompt.cut(" Norway.\n\nQuestion: Where") == "Norway."
    bare = replace(prompt, demonstrations=())
    assert bare == plain_prompts.FEW_SHOT
