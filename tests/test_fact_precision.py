"""Facts of answers, verified by passages: cases by hand, and a local model as the verifier."""

import json
import math

import pytest
from test_alce import SetJudge, make_model

from selfrag_jax import cli
from selfrag_jax.commands import judging
from selfrag_jax.errors import UserError
from selfrag_jax.evaluation import fact_precision
from selfrag_jax.evaluation.fact_precision import FactVerifier
from selfrag_jax.records import Passage, Question, write_jsonl
from selfrag_jax.world import truth


def asked(answer, *texts, question=None, **fields):
    """A question about the topic "M", and its answer; `texts` are the passages of its search."""
    tree = [{"passage": {"id": str(i), "title": t, "text": t}} for i, t in enumerate(texts)]
    row = {"id": "0", "answer": answer, "segments": [], "passages": [], "tree": tree}
    return question or Question("0", "q", extra={"topic": "M"}), row | fields


def verified(*pairs, facts=None):
    return FactVerifier(SetJudge(), facts).scores(pairs)


@pytest.mark.parametrize(
    ("answer", "texts", "precision", "num_facts"),
    [
        ("Mara sings.", ["Mara sings"], 1, 1),
        # Marks go, and every line counts.
        ("Mara sings [1]. Tom swims [2].\nAnna runs.", ["Mara sings", "Tom swims"], 2 / 3, 3),
        ("Mara sings.", ["Mara", "sings"], 0, 1),  # each passage is read alone
        ("Mara sings. Tom swims. Anna runs. Olga reads.", ["Mara sings"], 0.25, 4),
    ],
)
def test_the_share_of_supported_sentences(answer, texts, precision, num_facts):
    [found] = verified(asked(answer, *texts))
    assert found["fact_precision"] == pytest.approx(precision)
    assert found["num_facts"] == num_facts
    penalty = math.exp(1 - 10 / num_facts)
    assert found["fact_precision_penalised"] == pytest.approx(precision * penalty)


def test_short_answers_are_penalised_as_by_factscore():
    assert [fact_precision.length_penalty(n) for n in (10, 11, 50)] == [1, 1, 1]
    assert fact_precision.length_penalty(5) == pytest.approx(math.exp(-1))


def test_who_has_no_fact_precision():
    without_topic = Question("0", "q")
    pairs = [
        asked("", "a"),  # abstains
        asked("a.", "a", error="ValueError: x"),
        asked("a."),  # no passages
        asked("a.", "a", question=without_topic),
        asked("...", "a"),
    ]
    assert verified(*pairs) == [{}] * 5
    verifier = FactVerifier(SetJudge())
    assert "1 of 5 answers have no passages to verify their facts" in verifier.notice(pairs)
    assert verifier.notice(pairs[:2]) == ""
    assert verifier.notice(pairs[3:4]) == "no question has a topic: fact_precision is left out"


def test_the_topics_own_passages_come_first():
    own = (Passage("0", "other", "a"), Passage("1", "The M", "b"))
    question = Question("0", "q", ctxs=own, extra={"topic": "M"})
    # Those of the search are not read, nor those of another title.
    [found] = verified(asked("a.", "a", question=question))
    assert found["fact_precision"] == 0
    [found] = verified(asked("b.", question=question))
    assert found["fact_precision"] == 1
    [found] = verified(asked("a.", "a"))  # none is titled like the topic
    assert found["fact_precision"] == 1


def test_facts_of_a_file_replace_the_sentences():
    pair = asked("a b.", "a")
    [found] = verified(pair, facts={"0": ["a", "b", "a a"]})
    assert found["fact_precision"] == pytest.approx(2 / 3) and found["num_facts"] == 3
    assert verified(pair, facts={"0": []}) == [{}]
    with pytest.raises(UserError, match="--facts: id '7' is not in the question file"):
        verified(pair, facts={"0": [], "7": []})
    with pytest.raises(UserError, match="--facts: has no row for 1 of 1 answers, e.g. id '0'"):
        verified(pair, facts={})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no facts"),
        ([{"id": "0"}], r"f\.jsonl:1: missing field 'facts'"),
        ([{"facts": []}], r"f\.jsonl:1: missing field 'id'"),
        ([{"id": "0", "facts": "a"}], "'facts' must be a list of texts"),
        ([{"id": "0", "facts": ["a", " "]}], "'facts' must be a list of texts"),
        ([{"id": "0", "facts": None}] * 2, r"f\.jsonl:2: id '0' occurs more than once"),
    ],
)
def test_broken_facts_are_named(tmp_path, rows, message):
    write_jsonl(tmp_path / "f.jsonl", rows)
    with pytest.raises(UserError, match=message):
        fact_precision.read_facts(tmp_path / "f.jsonl")


def test_verifiers_are_opened_by_name(tmp_path):
    assert judging.open_verifier("none", "") is None
    assert judging.open_verifier("world", "") is truth.stated_facts
    with pytest.raises(UserError, match="--facts: goes with --verifier=FOLDER"):
        judging.open_verifier("world", "f.jsonl")
    with pytest.raises(UserError, match="--verifier='wrold': must be one of none, world, or the"):
        judging.open_verifier("wrold", "")
    with pytest.raises(UserError, match="no such file"):
        judging.open_verifier(str(tmp_path), str(tmp_path / "none.jsonl"))


def test_the_verifiers_name_stands_beside_its_number(tmp_path, capsys):
    make_model(tmp_path / "nli", "bert")
    _, row = asked("Mara sings. Tom swims.", "a b", question="Tell.")
    task, answers = tmp_path / "bio.jsonl", tmp_path / "a.jsonl"
    write_jsonl(task, [{"id": "0", "input": "Tell.", "topic": "M", "question": "Tell."}])
    write_jsonl(answers, [row | {"retrieved": True, "citations": []}])
    write_jsonl(tmp_path / "f.jsonl", [{"id": "0", "facts": ["a", "b", "c"]}])
    files = ["evaluate", f"--task={task}", f"--predictions={answers}"]

    def metrics(*flags):
        assert cli.main([*files, *flags]) == 0
        return json.loads((tmp_path / "a.metrics.json").read_text())

    def value(written, name):
        return {r["metric"]: r["value"] for r in written["rows"]}.get(name)

    verifier = f"--verifier={tmp_path / 'nli'}"
    written = metrics(verifier)
    assert written["verifier"] == "nli" and value(written, "num_facts") == 2
    written = metrics(verifier, f"--facts={tmp_path / 'f.jsonl'}")
    assert value(written, "num_facts") == 3
    penalty = fact_precision.length_penalty(3)
    penalised = value(written, "fact_precision_penalised")
    assert penalised == pytest.approx(penalty * value(written, "fact_precision"))
    for flags in ((), ("--verifier=none",)):  # not of the synthetic world
        written = metrics(*flags)
        assert value(written, "fact_precision") is None and "verifier" not in written
    write_jsonl(task, [{"id": "0", "question": "q", "topic": "M", "facts": [["r", "x"]]}])
    stated = [row | {"answer": "Mara plays.", "retrieved": True, "citations": []}]
    write_jsonl(answers, stated)
    assert "verifier" not in metrics()  # states no fact of the world
