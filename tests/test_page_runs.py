"""Reports of evaluations' folders: what is shown, and which folders are refused."""

import json

import pytest
from page_rows import Parsed, answer, node, results

from selfrag_jax import cli
from selfrag_jax.errors import UserError
from selfrag_jax.evaluation import report, scores
from selfrag_jax.evaluation.page import plots_of_results, runs
from selfrag_jax.training.log import _EventFile


def write_run(folder, changed_score=None, changed_answer=None):
    folder.mkdir(parents=True, exist_ok=True)
    of_run, made = results()[:2], [answer(i, float(i)) for i in range(2)]
    scored = [
        {k: a[k] for k in ("id", "question", "gold", "answer", "metrics", "popularity")}
        for a in made
    ]
    scored[1] |= changed_score or {}
    made[1] |= changed_answer or {}
    of_run[0]["paper"] = {"7b": 0.549, "13b": 0.558}
    (folder / "metrics.json").write_text(json.dumps({"rows": of_run, "seed": 0}))
    for name, rows in (("answers", made), ("scores", scored)):
        lines = [json.dumps(row) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_an_evaluations_folder_becomes_a_report(tmp_path, capsys):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    assert cli.main(["report", f"--run={a}"]) == 0
    assert f"{a}/report/index.html" in capsys.readouterr().out
    page = Parsed((a / "report" / "index.html").read_text())
    data = json.loads(page.scripts[0])
    assert [q["metrics"]["accuracy"] for q in data["questions"]] == [0.0, 1.0]
    assert data["questions"][0]["popularity"] == 1 and data["tasks"] == ["popqa"]
    text = (a / "report" / "index.html").read_text()
    assert "Self-RAG 13B <span class='paper'>paper</span></th><td>55.8</td>" in text
    # Two runs of one system stand beside each other under their folders' names.
    assert cli.main(["report", f"--run={a},{b}", f"--out={tmp_path}/both"]) == 0
    text = (tmp_path / "both" / "index.html").read_text()
    assert list(json.loads(Parsed(text).scripts[0])["systems"]) == [str(a), str(b)]


def test_a_time_without_an_interval_is_shown(tmp_path):
    row = scores.seconds_row("selfrag", "popqa", 1.0, 8)
    report.write_report([row], [], tmp_path / "report", "T")
    assert "| Self-RAG | 0.125 |" in (tmp_path / "report" / "results.md").read_text()
    assert "seconds_per_question,0.125,,,8" in (tmp_path / "report" / "results.csv").read_text()
    assert "<span title='n = 8'>0.125</span>" in (tmp_path / "report" / "index.html").read_text()
    folder = write_run(tmp_path / "run")
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["rows"].append(row)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    assert runs.read_run(folder).rows[-1] == row


def test_the_curves_of_a_sweep_are_shown(tmp_path):
    points = [
        {"settings": {"threshold": t, "w_sup": w}, "rows": scores.result_rows("x", "t", values, 0)}
        for w in (1.0, 0.0)
        for t in (0.8, 0.2)
        for values in [{"accuracy": [w, t], "num_tokens": [1.0]}]
    ]
    by_threshold, tokens, by_weight, _ = plots_of_results.sweep_curves(points)
    assert tokens.y == "num tokens" and not tokens.share_y
    assert tokens.curves[0].points == ((0.2, 1.0, 1.0, 1.0), (0.8, 1.0, 1.0, 1.0))
    assert [(c.name, [p[:2] for p in c.points]) for c in by_threshold.curves] == [
        ("accuracy", [(0.2, 0.6), (0.8, 0.9)])
    ]
    assert by_weight.note == "With threshold=0.8."
    (tmp_path / "sweep.json").write_text(json.dumps({"points": points}))
    run = write_run(tmp_path / "run")
    assert cli.main(["report", f"--run={run}", f"--sweep={tmp_path}"]) == 0
    assert "Sweep of threshold" in (run / "report" / "index.html").read_text()
    for damaged in ({}, [5], [{"settings": {"threshold": "x"}, "rows": []}]):
        (tmp_path / "sweep.json").write_text(json.dumps({"points": damaged}))
        with pytest.raises(UserError, match=r"sweep\.json: is damaged"):
            runs.read_sweep(tmp_path)
    with pytest.raises(UserError, match="holds no finished sweep"):
        runs.read_sweep(run)


def test_a_critics_reliability_and_trainings_losses_are_shown(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    bins = {"isrel": [{"n": 3, "confidence": 0.75, "accuracy": 0.5}], "issup": []}
    scored = tmp_path / "scored" / "metrics.json"
    scored.parent.mkdir()
    scored.write_text(json.dumps({"reliability": bins}))
    for name in ("a/generator", "b/generator", "critic"):
        log = _EventFile(tmp_path / name / "logs")
        log.write({"loss/text": 1.5}, 7)
        log.close()
    losses = ",".join(str(tmp_path / name) for name in ("a/generator", "b/generator", "critic"))
    flags = f"--run={run}", f"--critic_scores={scored.parent}", f"--losses={losses}"
    assert cli.main(["report", *flags]) == 0
    text = (run / "report" / "index.html").read_text()
    assert "Reliability of the critic" in text and "<td>75.0</td><td>50.0</td>" in text
    assert "Training loss: critic<" in text and "<td>7</td><td>1.5</td>" in text
    assert f"Training loss: {tmp_path / 'b/generator'}<" in text  # two of one name
    capsys.readouterr()
    for flag, message in (
        (f"--losses={run}", "run: holds no losses; --losses are workdirs of `selfrag train`"),
        (f"--critic_scores={run / 'none'}", "none: holds no evaluation of a critic; run `selfrag"),
        (f"--critic_scores={run}", "run: holds no evaluation of a critic"),
    ):
        assert cli.main(["report", flags[0], flag]) == 2
        assert message in capsys.readouterr().err
    for damaged in ([], {"isrel": [{"n": 1}]}, {"isrel": 5}):
        scored.write_text(json.dumps({"reliability": damaged}))
        with pytest.raises(UserError, match=r"metrics\.json: field 'reliability' is damaged"):
            runs.read_reliability(scored.parent)


def test_two_modes_side_by_side_show_every_threshold(tmp_path, capsys):
    """Told by what they did, since both are named selfrag; not of the released scorer."""
    folders = []
    for name, retrieved in (("always", True), ("never", False)):
        one = node(0, "It swims.", chosen=True, passage="Otters swim." if retrieved else "")
        changed = {"tree": [one], "retrieved": retrieved, "p_retrieve": 0.25}
        folders.append(write_run(tmp_path / name, {"metrics": {"accuracy": 1.0}}, changed))
        rows = (folders[-1] / "answers.jsonl").read_text().splitlines()
        first = json.loads(rows[0]) | changed | {"id": "q0", "question": "Who swims 0?"}
        lines = [json.dumps(first | {"p_retrieve": 0.75}), rows[1]]
        (folders[-1] / "answers.jsonl").write_text("\n".join(lines) + "\n")
    flags = f"--run={folders[0]},{folders[1]}", f"--out={tmp_path / 'both'}"
    assert cli.main(["report", *flags]) == 0
    found = json.loads((tmp_path / "both" / "retrieval_rates.json").read_text())
    curve = [r for r in found["rows"] if r["order"] == "p_retrieve"]
    assert [(r["retrieval_rate"], r["threshold_from"]) for r in curve] == [
        (0.0, 0.75), (0.5, 0.25), (1.0, None)
    ]  # fmt: skip
    assert {r["task"] for r in curve} == {"popqa"} and found["areas"][0]["n"] == 2
    text = (tmp_path / "both" / "index.html").read_text()
    assert "Accuracy against retrieval rate: popqa</figcaption>" in text
    for folder in folders:
        for config in (
            {"answer": {"search": {"scorer": "paper"}}, "changes": {"scorer": "released"}},
            {"answer": {"search": {"scorer": "released"}}, "changes": {}},
        ):
            file = folder / "answers.jsonl.manifest.json"
            file.write_text(json.dumps({"config": config}))
            assert runs.read_run(folder).questions[0]["scorer"] == "released"
    assert cli.main(["report", *flags]) == 0
    assert not (tmp_path / "both" / "retrieval_rates.json").exists()
    capsys.readouterr()


def test_the_retrieval_rates_of_one_system_are_those_of_its_tasks():
    values = {"accuracy": [1.0, 0.0], "retrieval_rate": [1.0, 1.0]}
    rows = [r for t in ("popqa", "asqa") for r in scores.result_rows("selfrag", t, values, 0)]
    [plot] = plots_of_results.accuracy_against_retrieval(rows)
    assert {c.name: c.points[0][:2] for c in plot.curves} == {
        "popqa": (1.0, 0.5),
        "asqa": (1.0, 0.5),
    }
    assert plots_of_results.accuracy_against_retrieval(rows[:2]) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "other"}, r"answers\.jsonl:2: id 'q1' is not in scores\.jsonl"),
        ({"metrics": {"f1": float("nan")}}, r"scores\.jsonl:2: metric f1 must be a finite number"),
        ({"popularity": "high"}, r"scores\.jsonl:2: popularity must be a finite number"),
        ({"decile": True}, r"scores\.jsonl:2: decile must be a finite number"),
        ({"metrics": {"f1": 10**400}}, r"scores\.jsonl:2: metric f1 must be a finite number"),
        ({"metrics": [1]}, r"scores\.jsonl:2: field 'metrics' must be an object"),
        ({"gold": 5}, r"scores\.jsonl:2: field 'gold' must be a list"),
        ({"id": "q0"}, r"scores\.jsonl:2: id 'q0' stands twice"),
    ],
)
def test_a_run_that_does_not_fit_is_refused(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        runs.read_run(write_run(tmp_path / "run", change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tree": [{"text": "x"}]}, "tree node 1 lacks chosen, isuse, p_segment, passage, score"),
        ({"citations": [{"segment": 0, "passage": 3}]}, "a citation names passage 3 of 1"),
        ({"citations": [{"segment": 0}]}, "a citation names passage None of 1"),
        ({"citations": None}, "field 'citations' must be a list of objects"),
        ({"tree": ["x"]}, "field 'tree' must be a list of objects"),
        ({"tree": [node(0, "x") | {"issup": [0.1]}]}, "tree node 1: field 'issup' must be 3 numb"),
        ({"tree": [node(0, "x") | {"passage": "p"}]}, "tree node 1: passage must be an object"),
        ({"passages": ["x"]}, "field 'passages' must be a list of objects"),
        ({"segments": [{"text": 5}]}, "segment 1: field 'text' must be text"),
        ({"answer": 5}, "field 'answer' must be text, found '5'"),
        ({"p_retrieve": "x"}, "field 'p_retrieve' must be a number"),
        ({"score": 10**400}, "field 'score' must be a number"),
        ({"id": "q0"}, "id 'q0' stands twice"),
    ],
)
def test_answers_of_another_form_are_refused(tmp_path, change, message):
    with pytest.raises(UserError, match=r"answers\.jsonl:2: " + message):
        runs.read_run(write_run(tmp_path / "run", changed_answer=change))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "is not an object"),
        ({"rows": {}}, "holds no results"),
        ({"rows": ["x"]}, "row 1 lacks high"),
        ({"rows": [results()[0] | {"value": float("nan")}]}, "row 1: value must be a finite"),
        ({"rows": [results()[0] | {"n": "many"}]}, "row 1: n must be a finite number"),
    ],
)
def test_damaged_results_are_refused(tmp_path, content, message):
    (write_run(tmp_path / "run") / "metrics.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"metrics\.json: " + message):
        runs.read_run(tmp_path / "run")


def test_a_report_replaces_only_a_report(tmp_path, capsys):
    run, out = write_run(tmp_path / "run"), tmp_path / "out"
    for _ in range(2):  # a report is written anew
        assert cli.main(["report", f"--run={run}", f"--out={out}"]) == 0
    for name in ("index.html", "results.csv"):
        mine = tmp_path / "mine" / name
        mine.parent.mkdir(exist_ok=True)
        mine.write_text("mine")
        assert cli.main(["report", f"--run={run}", f"--out={tmp_path / 'mine'}"]) == 2
        assert f"{name}: was not made by `selfrag report`" in capsys.readouterr().err
        assert [p.read_text() for p in mine.parent.iterdir()] == ["mine"]
        mine.unlink()
    for taken in (run / "metrics.json", run / "metrics.json" / "x"):
        assert cli.main(["report", f"--run={run}", f"--out={taken}"]) == 2
        assert "is a file" in capsys.readouterr().err


def test_an_unfinished_run_is_named(tmp_path):
    (write_run(tmp_path / "run") / "scores.jsonl").unlink()
    with pytest.raises(UserError, match=r"run: holds no finished evaluation \(scores\.jsonl"):
        runs.read_run(tmp_path / "run")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "give --workdir"),
        (("--run=a", "--workdir=b"), "give --workdir"),
        (("--run=a", "--examples=-1"), "--examples=-1: must be 0 or more"),
        (("--run=a,b",), "--out says where"),
        (("--run=a,a", "--out=c"), "names a folder twice"),
        (("--workdir=a", "--losses=b"), "--losses goes with --run"),
        (("--workdir=a", "--critic_scores=b"), "--critic_scores goes with --run"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, message, capsys):
    assert cli.main(["report", *flags]) == 2
    assert message in capsys.readouterr().err
