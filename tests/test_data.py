"""Batches and loss masks: what is learned, what is context, and exact resumption."""

from types import SimpleNamespace

import numpy as np
import pytest

from selfrag_jax.data.batches import LOSS_GROUPS, Example, Packer, build_example
from selfrag_jax.data.critic_examples import CriticSource
from selfrag_jax.data.generator_examples import GeneratorSource, output_spans
from selfrag_jax.errors import UserError
from selfrag_jax.records import CriticExample, GeneratorExample, Passage, read_rows
from selfrag_jax.text.tokenizer import Control

WEIGHTS = {"retrieve": 1.0, "isrel": 2.0, "issup": 1.0, "isuse": 1.0}


def test_each_passage_is_masked_by_itself():
    output = (
        "[Retrieval]<paragraph>A\nfirst</paragraph>[Relevant]One.[Fully supported]"
        "[Retrieval]<paragraph>B\nsecond</paragraph>[Irrelevant]Two."
        "[No support / Contradictory][Utility:4]"
    )
    learned = [
        p.token if isinstance(p, Control) else p
        for parts, weight in output_spans(output)
        if weight
        for p in parts
    ]
    assert learned == [
        "[Retrieval]",
        "[Relevant]",
        "One.",
        "[Fully supported]",
        "[Retrieval]",
        "[Irrelevant]",
        "Two.",
        "[No support / Contradictory]",
        "[Utility:4]",
    ]


def test_a_generator_example_learns_only_the_response(tokenizer):
    row = GeneratorExample(
        "1", "Where was Mara Tellock born?", "[No Retrieval]Quenport.[Utility:5]"
    )
    e = GeneratorSource([row], tokenizer, WEIGHTS).example(0)
    learned = [tokenizer.token(t) for t, w in zip(e.tokens, e.weight, strict=True) if w > 0]
    assert learned[0] == "[No Retrieval]" and learned[-2:] == ["[Utility:5]", "</s>"]
    groups = [LOSS_GROUPS[g] for g in e.group[e.weight > 0][[0, -2, -1]]]
    assert groups == ["retrieve", "isuse", "text"]


def test_a_critic_example_learns_one_token(tokenizer):
    evidence = Passage("1", "Mara", "Mara was born.")
    row = CriticExample("isrel", "Where was Mara born?", "[Relevant]", evidence=evidence)
    e = CriticSource([row], tokenizer, True, WEIGHTS).example(0)
    assert (e.weight > 0).sum() == 1 and e.weight[-1] == 2.0
    assert tokenizer.token(e.tokens[-1]) == "[Relevant]"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"task": "isrel", "instruction": "q", "output": "[Utility:1]"}',
            r"critic\.jsonl:2: output '\[Utility:1\]'",
        ),
        (
            '{"task": "relevancy", "instruction": "q", "output": "[Relevant]"}',
            r"critic\.jsonl:2: task 'relevancy' must be one of retrieve",
        ),
        (
            '{"task": "isrel", "output": "[Relevant]"}',
            r"critic\.jsonl:2: missing field 'instruction'",
        ),
        ("{not json", r"critic\.jsonl:2: not valid JSON"),
        ("[1]", r"critic\.jsonl:2: expected a JSON object"),
    ],
)
def test_malformed_critic_rows_name_file_and_line(tokenizer, tmp_path, line, message):
    path = tmp_path / "critic.jsonl"
    good = '{"task": "retrieve", "instruction": "q", "output": "[Retrieval]"}'
    path.write_text(good + "\n" + line + "\n")
    with pytest.raises(UserError, match=message):
        CriticSource.read(path, tokenizer, True, WEIGHTS)


class NumberedSource:
    """Example i has i % 9 + 2 tokens of value i + 1, which shows where each example went."""

    size = 50

    def example(self, i):
        n = i % 9 + 2
        weight = np.array([0.0] + [1.0] * (n - 1), np.float32)
        return Example(np.full(n, i + 1, np.int32), weight, np.zeros(n, np.int8))


def test_an_epoch_has_every_example_once_and_resumes_exactly():
    packer, seen, batches = Packer(NumberedSource(), 3, 16, 40, seed=0), [], []
    while packer.state < 50:
        before = packer.state
        batch = packer.next()
        batches.append((before, batch))
        for row, docs in zip(batch.tokens, batch.doc_ids, strict=True):
            seen += [int(row[docs == d][0]) - 1 for d in range(1, docs.max() + 1)]
    assert sorted(seen[:50]) == list(range(50))
    state, expected = batches[4]
    again = Packer(NumberedSource(), 3, 16, 40, seed=0, state=state).next()
    np.testing.assert_array_equal(again.tokens, expected.tokens)
    np.testing.assert_array_equal(again.loss_index, expected.loss_index)


def test_targets_are_the_next_tokens():
    batch = Packer(NumberedSource(), 3, 16, 40, seed=1).next()
    flat, used = batch.tokens.reshape(-1), batch.weights > 0
    np.testing.assert_array_equal(flat[batch.loss_index[used] + 1], batch.targets[used])
    docs = batch.doc_ids.reshape(-1)
    np.testing.assert_array_equal(docs[batch.loss_index[used]], docs[batch.loss_index[used] + 1])


@pytest.fixture
def words_source(tokenizer):
    """Returns words_source(n): a source with one example of n learned words."""

    def make(n):
        example = build_example(tokenizer, [(["word " * n], 1.0)], WEIGHTS)
        return SimpleNamespace(size=1, example=lambda i: example)

    return make


def test_an_overlong_example_is_truncated_and_counted(words_source):
    assert Packer(words_source(50), 1, 16, 64, seed=0).next().truncated >= 1


def test_an_overlong_critic_row_keeps_its_verdict(tokenizer):
    evidence = Passage("p", "Title", "word " * 60)
    row = CriticExample("isrel", "Is it true?", "[Relevant]", evidence=evidence)
    source = CriticSource([row], tokenizer, True, WEIGHTS)
    batch = Packer(source, 1, 24, 8, seed=0).next()
    assert batch.truncated == 1
    assert list(batch.targets[batch.weights > 0]) == [tokenizer.id("[Relevant]")]
    whole = source.example(0).tokens
    assert batch.tokens[0, 0] == tokenizer.bos_id
    assert list(batch.tokens[0, -12:]) == list(whole[-12:])
    np.testing.assert_array_equal(batch.positions[0], range(24))


def test_an_example_with_too_many_targets_is_counted_as_truncated(words_source):
    batch = Packer(words_source(12), 1, 64, 8, seed=0).next()
    assert batch.truncated == 1 and (batch.weights > 0).sum() == 8


def test_an_unpaired_surrogate_is_refused(tmp_path):
    file = tmp_path / "rows.jsonl"
    good = '{"instruction": "a \\ud83d\\ude00", "output": "b"}'
    bad = '{"instruction": "a \\ud83d", "output": "b"}'
    file.write_text(f"{good}\n{bad}\n")
    rows = read_rows(file)
    assert next(rows)[1]["instruction"] == "a 😀"
    with pytest.raises(UserError, match=r"rows.jsonl:2: holds .*, an unpaired surrogate"):
        next(rows)
