"""`selfrag sweep` and `selfrag calibrate`: every setting as a search of its own would have it."""

import itertools
import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plain_search import make_questions, make_rag

from selfrag_jax import cli
from selfrag_jax.commands import calibrate as calibrate_command
from selfrag_jax.commands import sweep as sweep_command
from selfrag_jax.commands.answer import answer_file
from selfrag_jax.errors import UserError
from selfrag_jax.evaluation.calibration import calibrate, choose_threshold
from selfrag_jax.evaluation.scores import columns, score_questions
from selfrag_jax.records import read_rows, to_json, write_jsonl


@pytest.fixture(scope="module")
def asked(talkative, tmp_path_factory):
    """A model, and questions whose gold answers are words that it says."""
    folder = tmp_path_factory.mktemp("sweep")
    texts = [f"Where {i}?" for i in range(12)]
    questions = make_questions(talkative.tokenizer, 3, texts)
    gold = itertools.cycle(["the", "Mara", "studied"])
    rows = [to_json(q) | {"answers": [next(gold)]} for q in questions]
    write_jsonl(folder / "questions.jsonl", rows)
    return make_rag(talkative), folder / "questions.jsonl"


def test_a_sweep_scores_each_setting_as_a_search_does_and_generates_twice(
    asked, tmp_path, monkeypatch
):
    rag, file = asked
    grid = {"w_use": [0.5, 5.0], "threshold": [0.0, 0.5]}
    searches = []
    real = rag.answer
    monkeypatch.setattr(rag, "answer", lambda *a, **k: searches.append(k) or real(*a, **k))
    judge = OddJudge()
    out = tmp_path / "out"
    found = sweep_command.sweep(rag, file, out, grid, {"max_depth": 1}, 0, judge, "odd")
    assert len(judge.asked) == len({*judge.asked}) > 0  # each pair once, of four combinations
    assert [s["mode"] for s in searches] == ["always_retrieve", "no_retrieval"]
    assert [p["settings"] for p in found] == [
        {"w_use": w, "threshold": t} for w in (0.5, 5.0) for t in (0.0, 0.5)
    ]
    for point in (found[1], found[2]):
        settings = point["settings"] | {"max_depth": 1}
        answer_file(rag, file, tmp_path / "direct.jsonl", None, settings)
        answers = [row for _, row in read_rows(tmp_path / "direct.jsonl")]
        questions = sweep_command.read_questions(file)
        values = columns(score_questions(questions, answers, OddJudge()))
        rows = {r["metric"]: r["value"] for r in point["rows"]}
        assert {*rows} >= {
            "accuracy", "retrieval_rate", "citation_precision", "citation_recall",
            "num_passages", "num_answer_tokens",
        }  # fmt: skip
        assert rows == {metric: np.mean(values[metric]) for metric in rows}
        for name in ("direct.jsonl", "direct.jsonl.manifest.json"):
            (tmp_path / name).unlink()
    # Again, and larger: only what is new is generated. Scored anew, nothing is.
    searches.clear()
    grid |= {"ndocs": [1, 5]}
    sweep_command.sweep(rag, file, out, grid, {"max_depth": 1}, 0)
    assert "citation" not in (out / "sweep.csv").read_text()
    sweep_command.sweep(rag, file, out, grid, {"max_depth": 1}, 0, OddJudge(), "odd")
    assert [s.get("ndocs") for s in searches] == [1, 1, 5, 5]
    lines = (tmp_path / "out/sweep.csv").read_text().splitlines()
    assert lines[0] == "w_use,threshold,ndocs,metric,value,low,high,n"
    assert all((tmp_path / "out" / f"{name}.svg").is_file() for name in grid)
    assert (tmp_path / "out/w_use.num_answer_tokens.svg").is_file()
    assert any(",citation_precision," in line for line in lines)
    assert json.loads((tmp_path / "out/sweep.json").read_text())["judge"] == "odd"
    head, first, *_ = sweep_command.table(found).splitlines()
    cells = dict(zip(re.split("  +", head.strip()), first.split(), strict=True))
    first_rows = {r["metric"]: r["value"] for r in found[0]["rows"]}
    assert cells["num answer tokens"] == f"{first_rows['num_answer_tokens']:.1f}"
    assert cells["citation precision"] == f"{100 * first_rows['citation_precision']:.1f}"


class OddJudge:
    """An NLI judge: what has an odd number of letters is entailed."""

    name = "odd"

    def __init__(self):
        self.asked = []

    def entails(self, pairs):
        self.asked += pairs
        return [len(hypothesis) % 2 == 1 for _, hypothesis in pairs]


def test_a_judge_that_is_not_there_is_named_before_the_model_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr(sweep_command, "load_selfrag", lambda *_, **__: pytest.fail("loaded"))
    flags = ("--model=M", "--input=Q", "--out=O", "--w_sup=0,1", "--judge=nobody")
    assert cli.main(["sweep", *flags]) == 2
    assert "--judge='nobody': must be one of none, world" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "nothing to sweep: give a list to one of --w_rel"),
        ({"ndocs": ("5",)}, "nothing to sweep"),
        ({"w_sup": ("1", "x")}, "--w_sup=1,x: expected numbers with commas"),
        ({"ndocs": ("1.5",)}, "--ndocs=1.5: expected whole numbers with commas"),
        ({"threshold": ("0.2", "0.20")}, "--threshold=0.2,0.20: names a value twice"),
    ],
)
def test_wrong_lists_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        sweep_command.parse_grid(dict.fromkeys(sweep_command.SWEPT) | flags)


def test_wrong_settings_and_folders_are_refused_before_anything_is_written(asked, tmp_path):
    rag, file = asked
    with pytest.raises(UserError, match="--threshold=2.0: must be a probability"):
        sweep_command.sweep(rag, file, tmp_path / "new", {"threshold": [0.1, 2.0]}, {}, 0)
    assert not (tmp_path / "new").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"questions\.jsonl is a file; choose another"):
        sweep_command.sweep(rag, file, file / "out", {"w_sup": [1.0]}, {}, 0)
    with pytest.raises(UserError, match="was not made by `selfrag sweep`"):
        sweep_command.sweep(rag, file, tmp_path / "mine", {"w_sup": [1.0]}, {}, 0)


# ---- calibration ---------------------------------------------------------------------------------
def plain_choice(p, always, never, rate):
    """Every threshold between two values of p, tried one by one."""
    values = sorted({*p}, reverse=True)
    edges = [1.0, *values, 0.0]
    thresholds = [(a + b) / 2 for a, b in itertools.pairwise(edges)]

    def quality(t):
        retrieved = p > t
        share = retrieved.mean()
        if rate is None:
            return np.where(retrieved, always, never).mean().round(9), -share
        return -abs(share - rate).round(9), -share

    return max(thresholds, key=quality)


@given(
    st.lists(
        st.tuples(st.sampled_from([0.1, 0.2, 0.35, 0.5, 0.9]), st.booleans(), st.booleans()),
        min_size=2, max_size=12,
    ),
    st.sampled_from([None, 0.0, 0.3, 0.5, 1.0]),
)  # fmt: skip
def test_the_threshold_is_the_best_of_all(rows, rate):
    p, always, never = (np.array(c, float) for c in zip(*rows, strict=True))
    best = plain_choice(p, always, never, rate)
    assert choose_threshold(p, always, never, rate) == pytest.approx(best)


def test_intervals_hold_their_value_and_equal_probabilities_are_refused():
    rng = np.random.default_rng(0)
    p, always, never = rng.random(60), rng.integers(0, 2, 60), np.zeros(60)
    found = calibrate(p, always, never, 0.3, 0)
    for value, low, high in (found.threshold, found.accuracy, found.retrieval_rate):
        assert 0 <= low < value < high <= 1
    assert found == calibrate(p, always, never, 0.3, 0) != calibrate(p, always, never, 0.3, 1)
    with pytest.raises(UserError, match="is the same for all 60 questions"):
        calibrate(np.full(60, 0.5), always, never, 0.3, 0)


def test_a_calibration_replaces_only_a_calibration(tmp_path):
    check, file = calibrate_command._check_out, tmp_path / "q.jsonl"
    file.write_text("mine")
    check(tmp_path / "new.json", file)
    for out, message in (
        (file, "is both the output and the input"),
        (tmp_path, "is a folder"),
        (file / "c.json", "is a file"),
    ):
        with pytest.raises(UserError, match=message):
            check(out, file)
    with pytest.raises(UserError, match="was not made by `selfrag calibrate`"):
        check(file, tmp_path / "other.jsonl")
    (tmp_path / "c.json").write_text('{"threshold": 0.5, "model": "x"}')
    check(tmp_path / "c.json", file)


def test_questions_without_gold_are_named_before_they_are_answered(asked, tmp_path):
    rag, _ = asked
    write_jsonl(tmp_path / "q.jsonl", [{"id": "7", "question": "Where?"}])
    with pytest.raises(UserError, match="1 of 1 questions have no gold answer, '7' first"):
        calibrate_command.calibrate_file(rag, tmp_path / "q.jsonl", tmp_path / "w", 0.5, {}, 0)
    assert not (tmp_path / "w").exists()


def test_a_threshold_gives_the_wanted_rate(asked, tmp_path):
    rag, file = asked
    found = calibrate_command.calibrate_file(rag, file, tmp_path / "w", 0.5, {"max_depth": 1}, 0)
    settings = {"max_depth": 1, "threshold": found.threshold[0]}
    answer_file(rag, file, tmp_path / "a.jsonl", None, settings)
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert np.mean([row["retrieved"] for row in rows]) == found.retrieval_rate[0] == 0.5
    other = tmp_path / "other.jsonl"  # another file may share the folder
    other.write_text("".join(file.read_text().splitlines(keepends=True)[:6]))
    again = calibrate_command.calibrate_file(rag, other, tmp_path / "w", 0.5, {"max_depth": 1}, 0)
    assert again.retrieval_rate[0] == 0.5 and len(list((tmp_path / "w").glob("*.jsonl"))) == 4
    with pytest.raises(UserError, match="--rate=1.5: must be a share"):
        calibrate_command.calibrate_file(rag, file, tmp_path / "w", 1.5, {"max_depth": 1}, 0)
    with pytest.raises(UserError, match="gate compares quotients"):
        calibrate_command.calibrate_file(rag, file, tmp_path / "w", 0.5, {"scorer": "released"}, 0)
