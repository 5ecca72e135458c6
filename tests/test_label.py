"""Labelling: the critic's judgements end up in the published training format."""

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


class FakeCritic:
    """Gives all probability to `label(query)`, and records the queries."""

    def __init__(self, label):
        self.label, self.queries = label, []

    def judge(self, queries):
        self.queries += queries
        groups = [reflection.GROUPS[q.group] for q in queries]
        return [
            np.eye(len(group))[group.index(self.label(q))]
            for q, group in zip(queries, groups, strict=True)
        ]


def control_names(example):
    """The control tokens in an example's output, without newlines."""
    controls = [p.token for p in prompts.parse_output(example.output) if isinstance(p, Control)]
    return [name for name in controls if name != NEWLINE]


def test_without_retrieval_an_example_keeps_all_its_variants():
    """With fewer, knowledge that has to be memorised would carry less weight in training."""
    labels = {"retrieve": "[No Retrieval]", "isuse": "[Utility:4]"}
    row = Instruction("a", "What is the opposite of hot?", "Cold. It is.", ctxs=PASSAGES)
    examples = label_rows(FakeCritic(lambda q: labels[q.group]), [row], CONFIG)
    assert [e.output for e in examples] == ["[No Retrieval]Cold. It is.[Utility:4]"] * 2
    assert len({e.id for e in examples}) == 2


def test_each_segment_has_its_passage_and_critiques():
    def label(q):
        if q.group == "retrieve":  # the second sentence continues, the third retrieves again
            return "[Retrieval]" if q.preceding.count(".") != 1 else "[Continue to Use Evidence]"
        if q.group == "isrel":
            return "[Relevant]" if q.evidence.id == "1" else "[Irrelevant]"
        return {"issup": "[Partially supported]", "isuse": "[Utility:5]"}[q.group]

    critic = FakeCritic(label)
    row = Instruction("a", "Tell me.", "One. Two. Three.", ctxs=PASSAGES)
    for e in label_rows(critic, [row], CONFIG):
        names = control_names(e)
        retrieval, support = ["[Retrieval]", "<paragraph>", "</paragraph>"], "[Partially supported]"
        first, second = names[3], names[10]
        assert names == [
            *[*retrieval, first, support],
            *["[Continue to Use Evidence]", support],
            *[*retrieval, second, support],
            "[Utility:5]",
        ]
        starts = (e.output.index("<paragraph>"), e.output.rindex("<paragraph>"))
        for start, relevance in zip(starts, (first, second), strict=True):
            title = e.output[start:].removeprefix("<paragraph>").split("\n")[0]
            assert (title == "Title 1") == (relevance == "[Relevant]")
    later = [q.preceding for q in critic.queries if q.group == "retrieve" and q.preceding]
    assert set(later) == {"One.", "One. Two."}
    judged = {q.output for q in critic.queries if q.group == "issup"}
    assert judged == {"One.", "Two.", "Three."}


def test_without_passages_nothing_is_retrieved():
    labels = {"retrieve": "[Retrieval]", "isuse": "[Utility:1]"}
    row = Instruction("a", "Where?", "There.")
    examples = label_rows(FakeCritic(lambda q: labels[q.group]), [row], CONFIG)
    assert {e.output for e in examples} == {"[No Retrieval]There.[Utility:1]"}
