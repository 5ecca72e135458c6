"""Evaluation of the critic and agreement of two teachers: by hand, by references, end to end."""

import json
import random
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfrag_jax import cli, config
from selfrag_jax.checkpoints import loading
from selfrag_jax.commands import asking_critic, evaluate
from selfrag_jax.critic.collecting import CollectConfig, critique_queries
from selfrag_jax.critic.critic import Critic, CriticConfig
from selfrag_jax.critic.teachers.rule import RuleTeacher
from selfrag_jax.errors import UserError
from selfrag_jax.evaluation import agreement, critic_evaluation, critic_scores, plots, tables
from selfrag_jax.files import write_json
from selfrag_jax.huggingface import weights
from selfrag_jax.models.llama import Model
from selfrag_jax.records import (
    CriticExample,
    Passage,
    instruction_from,
    read_records,
    read_rows,
    write_jsonl,
)
from selfrag_jax.text import prompts, reflection
from selfrag_jax.text.prompts import CritiqueQuery
from selfrag_jax.world import questions, truth

CONFIG = CriticConfig(batch=8, length_bucket=32, brief=True)


# ---- scores by hand ------------------------------------------------------------------------------
def test_confusion_and_accuracy_by_hand():
    labels, answers = np.array([0, 0, 1, 2, 2, 2]), np.array([0, 1, 1, 2, 0, 2])
    table = critic_scores.confusion_matrix(labels, answers, 4)
    assert table.tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [1, 0, 2, 0], [0, 0, 0, 0]]
    assert critic_scores.accuracy(labels, answers) == pytest.approx(4 / 6)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        # p_o = 35/50, p_e = (25*30 + 25*20)/2500 = 1/2
        ([[20, 5], [10, 15]], 0.4),
        # Equal in half of the cases, as chance is.
        ([[1, 1], [1, 1]], 0.0),
        ([[0, 3], [3, 0]], -1.0),
        ([[7, 0, 0], [0, 2, 0], [0, 0, 0]], 1.0),
        # p_o = 88/100, p_e = (60*58 + 30*33 + 10*9)/10000 = 0.456
        ([[55, 5, 0], [2, 26, 2], [1, 2, 7]], (0.88 - 0.456) / (1 - 0.456)),
        # One label everywhere, on one side only: nothing beyond chance.
        ([[8, 2], [0, 0]], 0.0),
    ],
)
def test_kappa_by_hand(table, expected):
    assert critic_scores.cohens_kappa(np.array(table)) == pytest.approx(expected, abs=1e-12)


def test_kappa_has_no_value_where_both_give_one_label():
    table = np.diag([9, 0])
    assert np.isnan(critic_scores.cohens_kappa(table))
    assert np.isnan(critic_scores.kappa_interval(table, 0)).all()


def test_reliability_bins_and_calibration_error_by_hand():
    confidence = np.array([0.5, 0.45, 0.6, 0.9, 1.0, 1.0])
    correct = np.array([True, False, True, True, True, False])
    bins = critic_scores.reliability_bins(confidence, correct, 2)  # (0, 0.5] and (0.5, 1]
    assert bins.count.tolist() == [2, 4] and bins.edges.tolist() == [0, 0.5, 1]
    assert bins.confidence == pytest.approx([0.475, 0.875])
    assert bins.accuracy == pytest.approx([0.5, 0.75])
    error = critic_scores.calibration_error(confidence, correct, 2)
    assert error == pytest.approx((2 * 0.025 + 4 * 0.125) / 6)
    sparse = critic_scores.reliability_bins(confidence, correct, 10)
    assert np.isnan(sparse.accuracy[sparse.count == 0]).all() and sparse.count.sum() == 6
    assert [row["n"] for row in sparse.to_rows()] == [2, 1, 1, 2]


# ---- against slow references ---------------------------------------------------------------------
answered = st.lists(
    st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60
)  # (confidence, correct)
labelled = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=60)


@given(answered, st.integers(1, 20))
def test_calibration_error_equals_a_loop_over_bins(rows, bins):
    edges = np.linspace(0, 1, bins + 1)
    expected = 0.0
    for m in range(bins):
        inside = [(p, c) for p, c in rows if edges[m] < p <= edges[m + 1] or (m == 0 and p == 0)]
        if inside:
            mean_p, acc = (sum(column) / len(inside) for column in zip(*inside, strict=True))
            expected += len(inside) / len(rows) * abs(acc - mean_p)
    confidence, correct = (np.array(column) for column in zip(*rows, strict=True))
    error = critic_scores.calibration_error(confidence, correct, bins)
    assert error == pytest.approx(expected, abs=1e-9) and 0 <= error <= 1
    value, low, high = critic_scores.calibration_interval(confidence, correct, bins, 0, 50)
    assert value == error and 0 <= low <= value <= high <= 1


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.integers(1, 20))
def test_one_hot_answers_that_are_right_are_perfectly_calibrated(labels, bins):
    tokens = reflection.ISUSE
    [v] = critic_evaluation.by_group(
        ["isuse"] * len(labels), [tokens[i] for i in labels], np.eye(5)[labels]
    ).values()
    assert v.calibration_error(bins) == 0 and v.correct.all()
    assert v.confusion.sum() == np.trace(v.confusion) == len(labels)


@given(labelled)
def test_kappa_equals_the_definition_and_is_symmetric(pairs):
    first, second = (np.array(column) for column in zip(*pairs, strict=True))
    n = len(pairs)
    observed = sum(a == b for a, b in pairs) / n
    by_chance = sum(
        (sum(a == k for a, _ in pairs) / n) * (sum(b == k for _, b in pairs) / n) for k in range(3)
    )
    table = critic_scores.confusion_matrix(first, second, 3)
    kappa = critic_scores.cohens_kappa(table)
    if len({*first, *second}) == 1:
        assert np.isnan(kappa)
        return
    assert kappa == pytest.approx((observed - by_chance) / (1 - by_chance), abs=1e-9)
    assert kappa == critic_scores.cohens_kappa(table.T) and -1 <= kappa <= 1
    value, low, high = critic_scores.kappa_interval(table, 0, 50)
    assert value == kappa and low <= value <= high
    if len(set(first)) > 1:
        assert critic_scores.cohens_kappa(critic_scores.confusion_matrix(first, first, 3)) == 1


def test_the_interval_of_kappa_equals_resampled_queries():
    """Drawing cells of the table is drawing queries; 4,000 resamples agree to a percentage."""
    rng = np.random.default_rng(1)
    first = rng.integers(0, 3, 300)
    second = np.where(rng.random(300) < 0.7, first, rng.integers(0, 3, 300))
    kappas = []
    for _ in range(4000):
        i = rng.integers(0, 300, 300)
        table = critic_scores.confusion_matrix(first[i], second[i], 3)
        kappas.append(critic_scores.cohens_kappa(table))
    expected = np.percentile(kappas, [2.5, 97.5])
    table = critic_scores.confusion_matrix(first, second, 3)
    _, low, high = critic_scores.kappa_interval(table, 0, 4000)
    assert [low, high] == pytest.approx(expected, abs=0.01)


# ---- the critic's answers ------------------------------------------------------------------------
def example_queries():
    evidence = Passage("1", "Mara Tellock", "Mara Tellock was born in East Quenport.")
    text = "Where was Mara Tellock born?"
    return [
        CritiqueQuery("retrieve", text),
        CritiqueQuery("retrieve", text, "She sings.", evidence),
        CritiqueQuery("isrel", text, evidence=evidence),
        CritiqueQuery("issup", text, evidence=evidence, output="In East Quenport."),
        CritiqueQuery("isuse", text, output="In East Quenport."),
    ]


@pytest.mark.parametrize("favoured", reflection.GROUPS)
def test_a_token_of_another_group_is_never_the_answer(tiny_model, favoured):
    """The model's most probable token is of the group `favoured`, whatever it is asked."""
    model = Model(replace(tiny_model.model.config, tie_embeddings=False))
    params = jax.device_get(model.init(jax.random.key(0), 0.5))
    head = np.array(params["head"]["kernel"])
    ids = tiny_model.tokenizer.reflection_ids()
    # One of two opposite columns wins over all others.
    favourite, other = ids.group(favoured)[:2]
    head[:, favourite] *= 100
    head[:, other] = -head[:, favourite]
    params = {**params, "head": {"kernel": head}}
    critic = Critic(replace(tiny_model, model=model, params=params), CONFIG)
    for query, p in zip(example_queries(), critic.judge(example_queries()), strict=True):
        prompt = tiny_model.tokenizer.encode(prompts.critique(query, True), before_control=True)
        tokens = np.array([[tiny_model.tokenizer.bos_id, *prompt]])
        hidden, _ = model.hidden(params, tokens, np.arange(tokens.size)[None], np.ones_like(tokens))
        logits = np.asarray(model.logits(params, hidden[:, -1]))[0]
        assert int(logits.argmax()) in ids.group(favoured)
        assert len(p) == len(reflection.GROUPS[query.group]) and p.sum() == pytest.approx(1)
        of_group = logits[list(ids.group(query.group))]
        odds = np.exp(of_group - of_group.max())
        assert p == pytest.approx(odds / odds.sum(), abs=1e-5)


def test_accuracy_of_all_queries_and_of_each_kind():
    groups = ["isrel", "retrieve", "isrel", "isrel"]
    labels = ["[Relevant]", "[Retrieval]", "[Relevant]", "[Irrelevant]"]
    distributions = [[0.2, 0.8], [0.1, 0.2, 0.7], [0.6, 0.4], [0.9, 0.1]]
    rows = critic_evaluation.accuracy_by_kind(groups, labels, distributions, list("abba"), 0)
    assert [(r["task"], r["metric"], r["value"], r["n"]) for r in rows] == [
        ("critic", "isrel_accuracy", pytest.approx(2 / 3), 3),
        ("critic", "retrieve_accuracy", 0.0, 1),
        ("a", "isrel_accuracy", 1.0, 2),
        ("b", "retrieve_accuracy", 0.0, 1),
        ("b", "isrel_accuracy", 0.0, 1),
    ]
    assert {r["system"] for r in rows} == {"critic"}


def test_plots_are_the_same_in_every_run_and_hold_their_numbers(tmp_path):
    bins = critic_scores.reliability_bins(
        np.array([0.5, 0.8, 0.9]), np.array([True, False, True]), 5
    )
    table = np.array([[1234, 5], [67, 89]])
    for folder in ("a", "b"):
        plots.reliability_diagram(tmp_path / folder / "r.svg", "isrel", bins, 0.123)
        plots.confusion_plot(tmp_path / folder / "c.svg", "isrel", table, "data", "critic")
    for name in ("r.svg", "c.svg"):
        first, second = ((tmp_path / f / name).read_text() for f in ("a", "b"))
        assert first == second and first.startswith("<?xml") and "dc:date" not in first
    assert "12.3%" in (tmp_path / "a" / "r.svg").read_text()
    drawn = (tmp_path / "a" / "c.svg").read_text()
    assert all(text in drawn for text in ("1,234", "67", "Irrelevant", "Relevant", "critic"))


# ---- selfrag evaluate --task=critic --------------------------------------------------------------
@pytest.fixture(scope="module")
def critic_folder(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("critic")
    weights.save_folder(folder, tiny_model.model.config, tiny_model.params, tiny_model.tokenizer)
    return folder


@pytest.fixture
def dev_set(tmp_path):
    """50 labelled queries."""
    rng, examples = random.Random(0), []
    for i in range(10):
        for q in example_queries():
            label = rng.choice(reflection.GROUPS[q.group])
            text = f"{q.instruction} {'Please. ' * i}"
            examples.append(
                CriticExample(q.group, text, label, q.preceding, q.evidence, q.output, str(i))
            )
    write_jsonl(tmp_path / "dev.jsonl", examples)
    return tmp_path / "dev.jsonl"


def rows_of(path):
    return [row for _, row in read_rows(path)]


def files_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".json", ".svg")}


def run_evaluate(folder, data, *flags):
    return cli.main(["evaluate", "--task=critic", f"--critic={folder}", f"--data={data}", *flags])


def test_a_critic_is_evaluated_by_one_command(critic_folder, dev_set, capsys):
    assert run_evaluate(critic_folder, dev_set) == 0
    shown, out = capsys.readouterr().out, dev_set.with_suffix(".scores")
    predictions = rows_of(out / "predictions.jsonl")
    examples = rows_of(dev_set)
    assert [(p["id"], p["task"], p["label"]) for p in predictions] == [
        (e["id"], e["task"], e["output"]) for e in examples
    ]
    assert all(tuple(p["distribution"]) == reflection.GROUPS[p["task"]] for p in predictions)
    for p in predictions:
        assert p["answer"] == max(p["distribution"], key=p["distribution"].get)
    metrics = json.loads((out / "metrics.json").read_text())
    assert tables.read_results(out / "metrics.json") == metrics["rows"]
    for group, n in (("retrieve", 20), ("isrel", 10), ("issup", 10), ("isuse", 10)):
        mine = [p for p in predictions if p["task"] == group]
        right = sum(p["answer"] == p["label"] for p in mine)
        [row] = [r for r in metrics["rows"] if r["metric"] == f"{group}_accuracy"]
        assert row["value"] == pytest.approx(right / n) and row["n"] == n
        assert row["system"] == row["task"] == "critic"
        table = np.array(metrics["confusion"][group]["table"])
        assert table.sum() == n and np.trace(table) == right
        assert sum(b["n"] for b in metrics["reliability"][group]) == n
        assert (out / f"reliability_{group}.svg").is_file()
        assert (out / f"confusion_{group}.svg").is_file()
        assert f"{group} (rows: the label; columns: the critic's answer)" in shown
    assert "93.8" in shown and "agrees with GPT-4" in shown and str(out) in shown
    assert not (out / "parts").exists()


def test_the_quickstart_and_the_command_score_alike(quickstart, tmp_path, capsys):
    workdir, rows = quickstart
    c = config.load("tiny:smoke")
    collect = config.build(CollectConfig, c.collect, "collect")
    right, examples = truth.read_truth(workdir / "world" / "teacher.jsonl"), []
    for row in read_records(workdir / "retrieved" / "eval" / "critic.jsonl", instruction_from):
        for q in critique_queries(row, collect, random.Random(f"critic-{row.id}")):
            examples.append(
                CriticExample(q.group, q.instruction, right(q), q.preceding, q.evidence, q.output)
            )
    write_jsonl(tmp_path / "dev.jsonl", examples)
    flags = f"--out={tmp_path}/scores", f"--seed={c.report.seed}"
    assert run_evaluate(workdir / "critic", tmp_path / "dev.jsonl", *flags) == 0
    found = tables.read_results(tmp_path / "scores" / "metrics.json")
    expected = [r for r in rows if r["system"] == "critic" and r["task"] == "critic"]
    assert {r["metric"].split("_")[1] for r in expected} == {"accuracy", "ece"}

    def by_metric(rows):  # batches of other sizes: sums in another order
        return {r["metric"]: pytest.approx(r["value"], abs=1e-5) for r in rows}

    assert by_metric(expected).items() <= by_metric(found).items()
    shown = tables.critic_rows(rows)
    assert {cells[0] for cells in shown} == set(reflection.GROUPS) and all(map(all, shown))
    assert "expected calibration error" in (workdir / "report" / "index.html").read_text()


def test_an_interrupted_evaluation_continues_and_a_finished_one_asks_nothing(
    critic_folder, dev_set, monkeypatch, tmp_path
):
    monkeypatch.setattr(asking_critic, "BATCHES_PER_CHUNK", 2)  # of 8: four chunks of 50
    whole, out, asked = tmp_path / "whole", tmp_path / "out", []
    evaluate.evaluate_critic(critic_folder, dev_set, CONFIG, whole)
    judge = Critic.judge

    def interrupted(self, queries, limit):
        if len(asked) == limit:
            raise KeyboardInterrupt
        asked.append(len(queries))
        return judge(self, queries)

    monkeypatch.setattr(Critic, "judge", lambda *args: interrupted(*args, limit=2))
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate_critic(critic_folder, dev_set, CONFIG, out)
    assert not (out / "metrics.json").exists()
    with pytest.raises(UserError, match="started with other settings"):
        evaluate.evaluate_critic(critic_folder, dev_set, replace(CONFIG, batch=4), out)
    monkeypatch.setattr(Critic, "judge", lambda *args: interrupted(*args, limit=9))
    evaluate.evaluate_critic(critic_folder, dev_set, CONFIG, out)
    assert asked == [16, 16, 16, 2]
    assert (out / "predictions.jsonl").read_bytes() == (whole / "predictions.jsonl").read_bytes()
    mine, expected = files_of(out), files_of(whole)
    del mine["manifest.json"], expected["manifest.json"]  # they hold the time
    assert mine == expected

    evaluate.evaluate_critic(critic_folder, dev_set, CONFIG, out, bins=3)
    assert asked == [16, 16, 16, 2]
    reliability = json.loads((out / "metrics.json").read_text())["reliability"]
    assert {b["up_to"] for bins in reliability.values() for b in bins} <= {1 / 3, 2 / 3, 1.0}
    with pytest.raises(UserError, match="already there, made with another config"):
        evaluate.evaluate_critic(critic_folder, dev_set, replace(CONFIG, batch=4), out)


def test_queries_that_do_not_fit_the_critic_are_counted_and_left_out(
    critic_folder, tmp_path, capsys
):
    rows = [
        {"task": "isuse", "instruction": "Who?", "segment": "Ada. " * n, "output": "[Utility:5]"}
        for n in (1, 4000, 2)
    ]
    write_jsonl(tmp_path / "dev.jsonl", rows)
    out = tmp_path / "out"
    verdicts = evaluate.evaluate_critic(critic_folder, tmp_path / "dev.jsonl", CONFIG, out)
    assert len(verdicts["isuse"].labels) == 2
    assert "1 of 3 queries are left out of the scores" in capsys.readouterr().err
    assert ["error" in row for row in rows_of(out / "predictions.jsonl")] == [False, True, False]


def test_published_critic_files_are_evaluated_and_compared(critic_folder, tmp_path, capsys):
    """In the published layout; the row with another group's token is left out and reported."""
    rows = [
        {"instruction": "How useful?", "input": f"Task instruction: {q}\nOutput: {q}.",
         "output": label, "task": "utility"}
        for q, label in (("Who?", "[Utility:5]"), ("Why?", "[Utility:1]"), ("How?", "[Relevant]"))
    ]  # fmt: skip
    other = [rows[1], rows[0] | {"output": "[Utility:4]"}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    write_jsonl(tmp_path / "b.jsonl", other)
    assert run_evaluate(critic_folder, tmp_path / "a.jsonl", "--format=released") == 0
    assert len(rows_of(tmp_path / "a.scores" / "predictions.jsonl")) == 2
    assert run_evaluate(critic_folder, tmp_path / "a.jsonl", f"--out={tmp_path}/x") == 2
    assert "--format=released" in capsys.readouterr().err
    files = f"--first={tmp_path}/a.jsonl", f"--second={tmp_path}/b.jsonl"
    assert cli.main(["agree", *files, "--format=released", f"--out={tmp_path}/o.json"]) == 0
    [share, _] = tables.read_results(tmp_path / "o.json")
    assert share["metric"] == "isuse_accuracy" and (share["value"], share["n"]) == (0.5, 2)


@pytest.mark.parametrize(
    ("mode", "batch", "brief"), [("words", 64, True), ("llama_fast", 64, False)]
)
def test_a_critic_is_asked_as_critics_of_its_kind_are_trained(
    monkeypatch, tmp_path, mode, batch, brief
):
    monkeypatch.setattr(loading, "read_tokenizer", lambda path: SimpleNamespace(mode=mode))
    values = {"config": None, "critic": str(tmp_path), "overrides": []}
    asked = evaluate._critic_config(values)
    assert (asked.batch, asked.brief) == (batch, brief)
    changed = evaluate._critic_config(values | {"overrides": ["label.critic.batch=3"]})
    assert changed == replace(asked, batch=3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--task=critic", "missing --critic, --data; for example: selfrag evaluate --task=critic"),
        ("--task=critic --critic=none", "missing --data"),
        ("--task=critic --critic=none --data=d --predictions=p", "--predictions: is of answers"),
        ("--task=critic --critic=none --data=d --judge=world", "--judge: is of answers"),
        ("--task=critic --critic=none --data=d --bins=0", "--bins=0: must be at least 1"),
        ("--task=critic --critic=none --data=d", "none: no such folder"),
        ("--task=critic --critic=F --data=none.jsonl", "none.jsonl: no such file"),
        ("--task=critic --critic=F --data=bad.jsonl", "bad.jsonl:1: output '[Relevant]' must be"),
        ("--task=critic --critic=F --data=d --config=index", "lacks label"),
        (
            "--task=critic --critic=F --data=d --config.label.critic.batch=0",
            "batch=0: must be 1 or more",
        ),
        ("--task=critic --critic=F --data=good.jsonl --out=good.jsonl", "choose another --out"),
        ("--task=critic --critic=F --data=good.jsonl --out=mine", "is not empty and was not made"),
        ("--task=critic --critic=begun --data=good.jsonl", "begun: is unfinished"),
        ("--task=critic --critic=generator --data=good.jsonl", "is a generator; expected a critic"),
        ("--task=critic --critic=full --data=good.jsonl", "--config.label.critic.brief=false"),
        ("--task=q.jsonl", "missing --predictions"),
        ("--task=q.jsonl --predictions=p --critic=F", "--critic: goes with --task=critic"),
        (
            "--task=critic --critic=F --data=d --format=theirs",
            "--format=theirs: must be one of own",
        ),
        ("--task=q.jsonl --predictions=p --format=own", "--format: goes with --task=critic"),
        ("--task=q.jsonl --predictions=p --bins=5", "--bins: goes with --task=critic"),
        (
            "--task=q.jsonl --predictions=p --config.label.critic.batch=2",
            "--config.label.critic.batch=2: goes with --task=critic",
        ),
    ],
)
def test_wrong_flags_and_files_get_one_line(
    critic_folder, tmp_path, monkeypatch, capsys, flags, message
):
    monkeypatch.chdir(tmp_path)
    write_jsonl("bad.jsonl", [{"task": "isuse", "instruction": "x", "output": "[Relevant]"}])
    write_jsonl("good.jsonl", [{"task": "isuse", "instruction": "x", "output": "[Utility:5]"}])
    write_json("mine/thesis.json", {})
    for name, made in (
        ("begun", None),
        ("generator", {"role": "generator"}),
        ("full", {"role": "critic", "brief": False}),
    ):
        write_json(f"{name}/model.json", {})
        for file in critic_folder.glob("*token*"):
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
        if made:
            write_json(f"{name}/manifest.json", {"stage": "train", "config": made})
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["evaluate", *flags.replace("=F", f"={critic_folder}").split()]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


# ---- selfrag agree -------------------------------------------------------------------------------
def labelled_queries(*labels, **changes):
    """IsRel queries that differ in their evidence."""
    return [
        CriticExample(
            "isrel", "Who?", f"[{label}]", evidence=Passage(str(i), "T", f"Text {i}"), id="a",
            **changes,
        )
        for i, label in enumerate(labels)
    ]  # fmt: skip


def test_queries_are_matched_by_what_was_asked():
    first = labelled_queries("Relevant", "Relevant", "Irrelevant", "Irrelevant")
    second = labelled_queries("Relevant", "Irrelevant", "Irrelevant")
    # Another order; another id and score of the passage do not matter.
    second = [replace(e, evidence=replace(e.evidence, id="9", score=0.5)) for e in second[::-1]]
    second += [
        CriticExample("isuse", "Who?", "[Utility:5]", id="a"),
        CriticExample("isrel", "Who else?", "[Relevant]", evidence=first[0].evidence, id="a"),
    ]
    isrel, isuse = agreement.compare_labels(first, second)
    assert isrel.table.tolist() == [[1, 0], [1, 1]]  # rows: first; tokens: irrelevant, relevant
    assert (isrel.n, isrel.only_first, isrel.only_second) == (3, 1, 1)
    assert (isuse.n, isuse.only_first, isuse.only_second) == (0, 0, 1)
    rows = agreement.agreement_rows([isrel, isuse], 0)
    assert [(r["metric"], r["n"]) for r in rows] == [("isrel_accuracy", 3), ("isrel_kappa", 3)]
    assert rows[0]["value"] == pytest.approx(2 / 3) and rows[1]["value"] == pytest.approx(0.4)


def test_a_query_that_stands_twice_is_matched_twice():
    twice = labelled_queries("Relevant") + labelled_queries("Irrelevant")
    thrice = twice + labelled_queries("Relevant")
    [g] = agreement.compare_labels(twice, thrice)
    assert g.table.tolist() == [[1, 0], [0, 1]] and (g.only_first, g.only_second) == (0, 1)


def agree(tmp_path, first, second, *flags):
    write_jsonl(tmp_path / "a.jsonl", first)
    write_jsonl(tmp_path / "b.jsonl", second)
    return cli.main(
        ["agree", f"--first={tmp_path}/a.jsonl", f"--second={tmp_path}/b.jsonl", *flags]
    )


def test_agreement_is_a_command(tmp_path, capsys):
    first = labelled_queries(*["Relevant"] * 25, *["Irrelevant"] * 25)
    second = labelled_queries(
        *["Relevant"] * 20, *["Irrelevant"] * 5, *["Relevant"] * 10, *["Irrelevant"] * 15
    )
    first.append(CriticExample("isuse", "Who?", "[Utility:5]", id="a"))
    second.append(CriticExample("isuse", "Who?", "[Utility:5]", id="a"))
    assert agree(tmp_path, first, second, f"--out={tmp_path}/agreement.json") == 0
    shown = capsys.readouterr().out
    assert "isrel" in shown and "0.400" in shown and "70.0" in shown
    written = json.loads((tmp_path / "agreement.json").read_text())
    values = {r["metric"]: r["value"] for r in tables.read_results(tmp_path / "agreement.json")}
    # One IsUse label everywhere: kappa has no value.
    assert values == {
        "isrel_accuracy": 0.7, "isrel_kappa": pytest.approx(0.4), "isuse_accuracy": 1.0
    }  # fmt: skip
    assert written["rows"] and written["confusion"]["isrel"]["table"] == [[15, 10], [5, 20]]
    assert written["only_in_first"] == {"isrel": 0, "isuse": 0} == written["only_in_second"]
    assert json.loads((tmp_path / "agreement.json.manifest.json").read_text())["stage"] == "agree"


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (labelled_queries("Relevant", preceding="Yes."), "not what stands beside them"),
        ([replace(e, id="b") for e in labelled_queries("Relevant")], "but not their ids"),
        ([replace(e, instruction="?") for e in labelled_queries("Relevant")], "no instruction in"),
        ([CriticExample("isuse", "Who?", "[Utility:5]")], "other groups (isrel and isuse)"),
        ([], "holds no rows"),
    ],
)
def test_files_without_a_common_query_are_refused_with_the_reason(
    tmp_path, capsys, second, message
):
    assert agree(tmp_path, labelled_queries("Relevant"), second) == 2
    err = capsys.readouterr().err
    assert message in err and "b.jsonl" in err and err.count("\n") == 1


def test_inputs_are_not_compared_with_themselves_nor_overwritten(tmp_path, capsys):
    rows = labelled_queries("Relevant", "Irrelevant")
    assert agree(tmp_path, rows, rows, f"--second={tmp_path}/a.jsonl") == 2
    assert "both --first and --second" in capsys.readouterr().err
    assert agree(tmp_path, rows, rows, f"--out={tmp_path}/b.jsonl") == 2
    assert "both --out and --second" in capsys.readouterr().err
    assert agree(tmp_path, rows, rows, f"--out={tmp_path}") == 2
    assert "is a folder" in capsys.readouterr().err
    assert len((tmp_path / "b.jsonl").read_text().splitlines()) == 2
    (tmp_path / "mine").write_text("precious")
    assert agree(tmp_path, rows, rows, f"--out={tmp_path}/mine") == 0
    assert (tmp_path / "mine.old-1").read_text() == "precious"


@pytest.mark.parametrize("same_seed", [False, True])
def test_two_rule_teachers_agree_as_arithmetic_predicts(small_world, same_seed):
    """Teachers that err at 0.02 and 0.2.

    With seeds of their own they err independently. With one seed the errors of the better teacher
    are errors of the other one too, and the same ones.
    """
    share = tuple((group, 1.0) for group in reflection.GROUPS)
    collect = CollectConfig(0, "rule", 0.0, share, passages=5)
    known = [e.name for e in small_world.entities if e.group == "known"]
    right = partial(truth.judge, known_names=known)
    rates = (0.02, 0.2)
    teachers = [RuleTeacher(right, rate, 0 if same_seed else i) for i, rate in enumerate(rates)]
    files, correct, rng = ([], []), [], random.Random(0)
    for row in questions.instructions(small_world, n=600):
        about = [p for p in small_world.passages if p.title and p.title in row.instruction]
        others = rng.sample(small_world.passages, 4)
        row = replace(row, ctxs=(*about[:2], *others))
        for q in critique_queries(row, collect, rng):
            correct.append((q.group, right(q)))
            for file, teacher in zip(files, teachers, strict=True):
                label = teacher.judge(q, row.id)
                file.append(
                    CriticExample(
                        q.group, q.instruction, label, q.preceding, q.evidence, q.output, row.id
                    )
                )
    found = agreement.compare_labels(*files)
    assert [g.group for g in found] == list(reflection.GROUPS)
    rows = {r["metric"]: r for r in agreement.agreement_rows(found, 0)}
    for g in found:
        tokens = reflection.GROUPS[g.group]
        k, n = len(tokens), g.n
        of_group = [tokens.index(token) for group, token in correct if group == g.group]
        prior = np.bincount(of_group, minlength=k)
        assert n == len(of_group) > 150 and g.only_first == g.only_second == 0
        if same_seed:  # right or wrong together, or only the worse teacher wrong
            expected = np.diag(prior * (1 - rates[1]))
            for t in range(k):
                wrong = (1 - np.eye(k)[t]) / (k - 1)
                expected = expected + prior[t] * (
                    rates[0] * np.diag(wrong)
                    + (rates[1] - rates[0]) * np.outer(np.eye(k)[t], wrong)
                )
        else:
            chances = [(1 - e) * np.eye(k) + e / (k - 1) * (1 - np.eye(k)) for e in rates]
            expected = chances[0].T @ np.diag(prior) @ chances[1]
        predicted = critic_scores.cohens_kappa(expected)
        kappa = rows[f"{g.group}_kappa"]
        half = (kappa["high"] - kappa["low"]) / 2
        assert abs(kappa["value"] - predicted) < 1.5 * half < 0.2  # three standard deviations
