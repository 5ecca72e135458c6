"""Labelling: the critic's judgements end up in the published training format."""

import json
from pathlib import Path

import pytest
from fake_critic import ArbitraryCritic, FakeCritic
from hypothesis import given
from hypothesis import strategies as st

from selfrag_jax.critic.assembly import LabelledSegment, assemble
from selfrag_jax.critic.critic import CriticConfig, PromptTooLong
from selfrag_jax.critic.label_statistics import LabelStatistics, table, write_plot
from selfrag_jax.critic.labelling import LabelConfig, label_rows
from selfrag_jax.errors import UserError
from selfrag_jax.records import GeneratorExample, Instruction, Passage, to_json
from selfrag_jax.text import prompts, reflection
from selfrag_jax.text.sentences import split_sentences
from selfrag_jax.text.tokenizer import NEWLINE, Control

CONFIG = LabelConfig(
    seed=0, critic=CriticConfig(8, 32, True), passages=3, variants=2, best_rate=0.5, chunk=10
)
PASSAGES = tuple(Passage(str(i), f"Title {i}", f"Text {i}.") for i in range(5))


def control_names(output):
    """The control tokens in an output, without newlines."""
    controls = [p.token for p in prompts.parse_output(output) if isinstance(p, Control)]
    return [name for name in controls if name != NEWLINE]


def text_parts(output):
    """The texts of an output's segments, without passages."""
    texts, in_passage = [], False
    for part in prompts.parse_output(output):
        if isinstance(part, Control) and part.token in reflection.MARKUP:
            in_passage = part.token == reflection.PARAGRAPH_OPEN
        elif isinstance(part, str) and not in_passage:
            texts.append(part)
    return texts


# ---- assembly: cases worked out by hand ----------------------------------------------------------
P, Q = Passage("7", "T", "P."), Passage("8", "", "Two\nlines.")
FOUND, AT_HAND, ALONE = reflection.RETRIEVAL, reflection.CONTINUE, reflection.NO_RETRIEVAL
RELEVANT, IRRELEVANT = reflection.RELEVANT, reflection.IRRELEVANT
FULLY, PARTIALLY, NONE = reflection.ISSUP
S = LabelledSegment

CASES = {
    "a passage, as the paper's example": (
        [S("Segment.", FOUND, P, RELEVANT, FULLY)],
        "[Utility:5]",
        "[Retrieval]<paragraph>T\nP.</paragraph>[Relevant]Segment.[Fully supported][Utility:5]",
    ),
    "no retrieval": (
        [S("Answer.", ALONE)],
        "[Utility:5]",
        "[No Retrieval]Answer.[Utility:5]",
    ),
    "continue to use evidence: no passage and no IsRel, but IsSup": (
        [S("One. ", FOUND, P, RELEVANT, FULLY), S("Two.", AT_HAND, support=PARTIALLY)],
        "[Utility:4]",
        "[Retrieval]<paragraph>T\nP.</paragraph>[Relevant]One.[Fully supported]"
        "[Continue to Use Evidence]Two.[Partially supported][Utility:4]",
    ),
    "all three needs": (
        [
            S("One. ", FOUND, P, IRRELEVANT, NONE),
            S("Two. ", AT_HAND, support=NONE),
            S("Three. ", ALONE),
            S("Four. ", FOUND, Q, RELEVANT, PARTIALLY),
            S("Five.", AT_HAND, support=FULLY),
        ],
        "[Utility:1]",
        "[Retrieval]<paragraph>T\nP.</paragraph>[Irrelevant]One.[No support / Contradictory]"
        "[Continue to Use Evidence]Two.[No support / Contradictory]"
        "[No Retrieval]Three."
        "[Retrieval]<paragraph>\nTwo\nlines.</paragraph>[Relevant]Four.[Partially supported]"
        "[Continue to Use Evidence]Five.[Fully supported][Utility:1]",
    ),
    "line breaks stay in front of IsSup, a single space goes": (
        [
            S("One.\n", FOUND, P, RELEVANT, FULLY),
            S("Two.  ", AT_HAND, support=FULLY),
            S("Three. ", ALONE),
            S("- four\n\n", ALONE),
            S("Five.\n", ALONE),
        ],
        "[Utility:2]",
        "[Retrieval]<paragraph>T\nP.</paragraph>[Relevant]One.\n[Fully supported]"
        "[Continue to Use Evidence]Two.  [Fully supported]"
        "[No Retrieval]Three.[No Retrieval]- four\n\n[No Retrieval]Five.[Utility:2]",
    ),
    "control tokens of the text and of the passage are broken up": (
        [S("Say [Relevant]</s>.", FOUND, Passage("1", "<paragraph>", "a</paragraph>"), RELEVANT,
           NONE)],
        "[Utility:3]",
        "[Retrieval]<paragraph>< paragraph>\na< /paragraph></paragraph>[Relevant]"
        "Say [ Relevant]</s>.[No support / Contradictory][Utility:3]",
    ),
    "other scripts": (
        [S("第一句。", FOUND, Passage("1", "题", "文。"), RELEVANT, FULLY), S("第二句。", ALONE)],
        "[Utility:5]",
        "[Retrieval]<paragraph>题\n文。</paragraph>[Relevant]第一句。[Fully supported]"
        "[No Retrieval]第二句。[Utility:5]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_assembly_is_the_published_format(name):
    segments, utility, output = CASES[name]
    assert assemble(segments, utility) == output


@pytest.mark.parametrize(
    "fields",
    [
        ("[Relevant]",),
        (ALONE, P, RELEVANT),
        (ALONE, None, "", FULLY),
        (FOUND, P, RELEVANT),
        (FOUND, None, "", FULLY),
        (AT_HAND, P, RELEVANT, FULLY),
        (AT_HAND,),
    ],
)
def test_a_segment_has_the_critiques_of_its_action(fields):
    with pytest.raises(ValueError):
        LabelledSegment("Text.", *fields)


PIECES = st.sampled_from(
    ["Ab c. ", "One!\n", "\n\n", "  ", "[Relevant]", "</paragraph>", "第一句。", "♬ ", "1. ", "\t"]
)


@given(st.lists(PIECES, max_size=12).map("".join) | st.text(), st.integers(0, 9))
def test_no_character_and_no_line_break_is_lost(output, number):
    row = Instruction(str(number), "Tell me.", output, ctxs=PASSAGES)
    failed = []
    rows = label_rows(
        ArbitraryCritic(), [row], CONFIG, on_failure=lambda *failure: failed.append(failure)
    )
    if not output.strip():
        assert failed == [(row, "its output is empty")] and rows == []
        return
    sentences = split_sentences(output.strip())
    for example in rows:
        texts, joined = text_parts(example.output), ""
        assert "".join("".join(texts).split()) == "".join(output.split())
        assert "".join(texts).count("\n") == output.strip().count("\n")
        for text in texts:
            joined += (" " if joined and not joined[-1].isspace() else "") + text
        separated = len(texts) == 1 or all(s[-1].isspace() for s in sentences[:-1])
        if separated and prompts.escape_controls(output) == output:
            assert joined == output.strip()


# ---- the stages ----------------------------------------------------------------------------------
def test_static_passages_give_the_labels_that_they_always_gave():
    """Rows with one to four sentences and five to no passages; variants and best_rate count."""
    rows = [
        Instruction(
            str(i),
            f"Question {i}?",
            " ".join(f"Sentence {j} of {i}." for j in range(1 + i % 4)),
            input="More." if i % 3 == 0 else "",
            dataset_name="d",
            ctxs=PASSAGES[: (5, 2, 5, 0, 1)[i % 5]],
        )
        for i in range(14)
    ]
    file = Path(__file__).parent / "data" / "labels_of_static_passages.jsonl"
    expected = [json.loads(line) for line in file.read_text().splitlines()]
    assert [to_json(e) for e in label_rows(ArbitraryCritic(), rows, CONFIG)] == expected


def test_without_retrieval_an_example_keeps_all_its_variants():
    """With fewer, knowledge that has to be memorised would carry less weight in training."""
    labels = {"retrieve": "[No Retrieval]", "isuse": "[Utility:4]"}
    row = Instruction("a", "What is the opposite of hot?", "Cold. It is.\nYes.", ctxs=PASSAGES)
    examples = label_rows(FakeCritic(lambda q: labels[q.group]), [row], CONFIG)
    assert [e.output for e in examples] == ["[No Retrieval]Cold. It is.\nYes.[Utility:4]"] * 2
    assert len({e.id for e in examples}) == 2


def continuing(q):
    """The second sentence continues with the passage at hand, the third retrieves again."""
    if q.group == "retrieve":
        return "[Retrieval]" if q.preceding.count(".") != 1 else "[Continue to Use Evidence]"
    if q.group == "isrel":
        return "[Relevant]" if q.evidence.id == "1" else "[Irrelevant]"
    return {"issup": "[Partially supported]", "isuse": "[Utility:5]"}[q.group]


def test_each_segment_has_its_passage_and_critiques():
    critic = FakeCritic(continuing)
    row = Instruction("a", "Tell me.", "One.\nTwo. Three.", ctxs=PASSAGES)
    for e in label_rows(critic, [row], CONFIG):
        names = control_names(e.output)
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


@pytest.mark.parametrize("ctxs", [(), PASSAGES])
def test_each_segment_is_searched_for_with_the_question_and_the_previous_segment(ctxs):
    searches = []

    def find_passages(queries):
        searches.append(list(queries))
        return [(Passage("1", f"found for {query}", "Text."),) for query in queries]

    rows = [
        Instruction("a", "Who?", "One. Two. Three.", input="Here.", ctxs=ctxs),
        Instruction("b", "Why?", "So."),
    ]
    examples = label_rows(FakeCritic(continuing), rows, CONFIG, find_passages=find_passages)
    # All rows and variants of a stage in one search; the second segment needs none.
    assert [s for s in searches if s] == [["Who? Here.", "Why?"], ["Who? Here. Two."]]
    for e in examples[:2]:
        titles = [text.split("\n")[0] for text in e.output.split("<paragraph>")[1:]]
        assert titles == ["found for Who? Here.", "found for Who? Here. Two."]


def test_a_segment_without_new_passages_continues_with_the_one_at_hand():
    labels = {"isrel": "[Relevant]", "issup": "[Fully supported]", "isuse": "[Utility:5]"}
    critic = FakeCritic(lambda q: labels.get(q.group, "[Retrieval]"))
    row = Instruction("a", "Who?", "One. Two.")
    found = {"Who?": PASSAGES[:1]}
    [one, _] = label_rows(
        critic, [row], CONFIG, find_passages=lambda queries: [found.get(q, ()) for q in queries]
    )
    assert control_names(one.output) == [
        *["[Retrieval]", "<paragraph>", "</paragraph>", "[Relevant]", "[Fully supported]"],
        *["[Continue to Use Evidence]", "[Fully supported]", "[Utility:5]"],
    ]


def test_without_passages_nothing_is_retrieved():
    labels = {"retrieve": "[Retrieval]", "isuse": "[Utility:1]"}
    row = Instruction("a", "Where?", "There.")
    examples = label_rows(FakeCritic(lambda q: labels[q.group]), [row], CONFIG)
    assert {e.output for e in examples} == {"[No Retrieval]There.[Utility:1]"}


def test_given_needs_replace_the_decision_about_the_instruction():
    critic = FakeCritic(continuing)  # it always wants to retrieve
    rows = [Instruction(i, "Where?", "There. Yes.", ctxs=PASSAGES) for i in "abc"]
    needs = {"a": reflection.NO_RETRIEVAL, "b": reflection.RETRIEVAL}
    outputs = [e.output for e in label_rows(critic, rows, CONFIG, needs)][::2]
    assert [o.split("]")[0] for o in outputs] == ["[No Retrieval", "[Retrieval", "[Retrieval"]
    assert len([q for q in critic.queries if q.group == "retrieve" and not q.preceding]) == 1
    assert "[Continue to Use Evidence]Yes." in outputs[1]  # later needs are the critic's


class NarrowCritic(FakeCritic):
    def judge(self, queries):
        if too_long := {i: f"{q.group} is too long" for i, q in enumerate(queries) if
                        len(q.output) > 40}:  # fmt: skip
            raise PromptTooLong(too_long)
        return super().judge(queries)


def test_rows_that_cannot_be_labelled_are_reported_and_the_others_kept():
    rows = [
        Instruction("a", "Where?", "There."),
        Instruction("b", "Where?", " \n"),
        Instruction("c", "Where?", "T" * 50),
        Instruction("d", " ", "There."),
        Instruction("e", "Where?", "There."),
    ]
    labels, failed = {"retrieve": "[Retrieval]", "isuse": "[Utility:1]"}, {}
    critic = NarrowCritic(lambda q: labels[q.group])
    examples = label_rows(
        critic, rows, CONFIG, on_failure=lambda r, why: failed.update({r.id: why})
    )
    assert [e.id for e in examples] == ["a-0", "a-1", "e-8", "e-9"]  # as if none had failed
    assert failed == {
        "b": "its output is empty",
        "c": "isuse is too long",
        "d": "its instruction is empty",
    }
    with pytest.raises(UserError, match="row 'b': its output is empty"):
        label_rows(critic, rows, CONFIG)


def test_an_output_of_megabytes_takes_seconds():
    labels = {"retrieve": "[No Retrieval]", "isuse": "[Utility:1]"}
    row = Instruction("a", "Where?", "It is there. " * 400_000)
    [one, _] = label_rows(FakeCritic(lambda q: labels[q.group]), [row], CONFIG)
    assert len(one.output) > 5_000_000


# ---- statistics ----------------------------------------------------------------------------------
def statistics():
    counted = LabelStatistics()
    for i, (segments, utility, _) in enumerate(CASES.values()):
        name = ("", "$x^$|", "nq")[i % 3]
        counted.add(GeneratorExample(str(i), "Q?", assemble(segments, utility), "", name))
    return counted.to_json()


def test_statistics_count_tokens_segments_and_datasets():
    counted = statistics()
    assert counted["rows"] == 7
    assert counted["tokens"]["retrieve"] == {
        "[No Retrieval]": {"count": 6, "share": 0.3529},
        "[Retrieval]": {"count": 7, "share": 0.4118},
        "[Continue to Use Evidence]": {"count": 4, "share": 0.2353},
    }
    assert counted["tokens"]["isuse"]["[Utility:4]"] == {"count": 1, "share": 0.1429}
    assert counted["segments"] == {"mean": 2.4286, "rows": {"1": 3, "2": 2, "5": 2}}
    assert counted["retrieval"]["$x^$|"] == {"rows": 2, "retrieving": 1, "share": 0.5}
    assert counted["retrieval"]["(no name)"] == {"rows": 3, "retrieving": 3, "share": 1.0}
    shown = table(counted)
    assert "| Retrieve | [No Retrieval] | 6 | 35.3% |" in shown
    assert r"| $x^$\| | 2 | 1 | 50.0% |" in shown


def test_the_plot_is_the_same_every_time(tmp_path):
    for name in ("a", "b"):
        write_plot(statistics(), tmp_path / f"{name}.svg")
    drawn = (tmp_path / "a.svg").read_text()
    assert drawn == (tmp_path / "b.svg").read_text()
    assert "[Continue to Use Evidence]" in drawn and "$x^$|" in drawn and "<dc:date>" not in drawn
