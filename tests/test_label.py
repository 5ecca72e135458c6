"""Labelling: what the critic says goes into the published format, whoever the critic is."""

import numpy as np

from selfrag_jax.critic.critic import CriticConfig
from selfrag_jax.critic.labelling import LabelConfig, label_rows
from selfrag_jax.records import Instruction, Passage
from selfrag_jax.text import prompts, reflection
from selfrag_jax.text.tokenizer import NEWLINE, Control

CONFIG = LabelConfig(
    seed=0, critic=CriticConfig(8, 32, True), passages=3, variants=2, best_rate=0.5, chunk=10
)
PASSAGES = tuple(Passage(str(i), f"Title {i}", f"Text {i}.") for i in range(5))


class Critic:
    """Says what it is told to: the likeliest token of each group, by the query."""

    def __init__(self, say):
        self.say, self.asked = say, []

    def judge(self, queries):
        self.asked += queries
        return [
            np.eye(len(group))[group.index(self.say(q))]
            for q in queries
            for group in [reflection.GROUPS[q.group]]
        ]


def controls(example):
    return [
        p.token
        for p in prompts.parse_output(example.output)
        if isinstance(p, Control) and p.token != NEWLINE
    ]


def test_without_retrieval_an_example_has_all_its_variants():
    """With fewer of them, what has to be known by heart would count for less."""
    said = {"retrieve": "[No Retrieval]", "isuse": "[Utility:4]"}
    row = Instruction("a", "What is the opposite of hot?", "Cold. It is.", ctxs=PASSAGES)
    examples = label_rows(Critic(lambda q: said[q.group]), [row], CONFIG)
    assert [e.output for e in examples] == ["[No Retrieval]Cold. It is.[Utility:4]"] * 2
    assert len({e.id for e in examples}) == 2


def test_each_segment_has_its_passage_and_what_the_critic_said():
    def say(q):
        if (
            q.group == "retrieve"
        ):  # the second sentence goes on with the evidence, the third looks for more
            return "[Retrieval]" if q.preceding.count(".") != 1 else "[Continue to Use Evidence]"
        if q.group == "isrel":
            return "[Relevant]" if q.evidence.id == "1" else "[Irrelevant]"
        return {"issup": "[Partially supported]", "isuse": "[Utility:5]"}[q.group]

    critic = Critic(say)
    examples = label_rows(
        critic, [Instruction("a", "Tell me.", "One. Two. Three.", ctxs=PASSAGES)], CONFIG
    )
    for e in examples:
        assert controls(e) == [
            "[Retrieval]", "<paragraph>", "</paragraph>", controls(e)[3], "[Partially supported]",
            "[Continue to Use Evidence]", "[Partially supported]",
            "[Retrieval]", "<paragraph>", "</paragraph>", controls(e)[10], "[Partially supported]", "[Utility:5]",
        ]  # fmt: skip
        for at, verdict in (
            (e.output.index("<paragraph>"), controls(e)[3]),
            (e.output.rindex("<paragraph>"), controls(e)[10]),
        ):
            title = e.output[at:].removeprefix("<paragraph>").split("\n")[0]
            assert (title == "Title 1") == (verdict == "[Relevant]")
    later = [q.preceding for q in critic.asked if q.group == "retrieve" and q.preceding]
    assert set(later) == {"One.", "One. Two."}
    assert {q.output for q in critic.asked if q.group == "issup"} == {"One.", "Two.", "Three."}


def test_without_passages_nothing_is_retrieved():
    said = {"retrieve": "[Retrieval]", "isuse": "[Utility:1]"}
    examples = label_rows(
        Critic(lambda q: said[q.group]), [Instruction("a", "Where?", "There.")], CONFIG
    )
    assert {e.output for e in examples} == {"[No Retrieval]There.[Utility:1]"}
