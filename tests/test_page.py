"""The report's page: its structure, escaping, size and plots."""

import csv
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from page_rows import HOSTILE, PAPER, Parsed, answer, answers, in_all_modes, results

from selfrag_jax.errors import UserError
from selfrag_jax.evaluation import report, scores
from selfrag_jax.evaluation.page import figures, plots_of_answers, plots_of_results, questions
from selfrag_jax.evaluation.page.figures import Curve, Plot
from selfrag_jax.evaluation.page.page import build_page
from selfrag_jax.evaluation.page.questions import PageLimits


def test_the_page_is_whole_and_loads_nothing():
    plots = plots_of_results.plots_of(results(), answers())
    page = Parsed(build_page(f"T {HOSTILE}", results(), answers(), paper=PAPER, plots=plots))
    assert page.tags.count("script") == 2 and "img" not in page.tags
    names = {name for name, _ in page.attributes}
    assert not names & {"src", "style", "onerror", "onclick"}
    assert all(value.startswith("#") for name, value in page.attributes if name == "href")
    policy = next(v for name, v in page.attributes if name == "content" and "default-src" in v)
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    data = json.loads(page.scripts[0])
    assert data["passages"] == [{"id": "7", "title": "Otters", "text": HOSTILE}]
    assert len(data["questions"]) == 120 and {"main", "header", "nav"} <= set(page.tags)
    assert page.tags.count("figure") == 3  # popularity, retrieval rate, support


def test_tables_show_intervals_and_the_papers_figures(tmp_path):
    report.write_report(results(), answers(), tmp_path, "T", paper=PAPER)
    page, text = ((tmp_path / name).read_text() for name in ("index.html", "results.md"))
    assert "Self-RAG 7B <span class='paper'>paper</span></th><td>54.9</td>" in page
    assert "mine &lt;b&gt;" in page and "95% interval" in page
    assert "| Self-RAG, adaptive | 100.0 (100–100) |" in text
    with open(tmp_path / "results.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [r["metric"] for r in rows] == ["accuracy", "retrieval_rate"] * 2
    assert float(rows[2]["value"]) == 0.5 and rows[2]["system"] == "mine <b>"


def test_counts_and_times_are_no_per_cents(tmp_path):
    values = {"num_tokens": [2.0, 3.0], "mean_isuse": [-0.5, 0.25]}  # IsUse is from -1 to 1
    rows = scores.result_rows("selfrag_adaptive", "popqa", values, 0)
    report.write_report(rows, [], tmp_path, "T")
    assert "### Num tokens\n" in (tmp_path / "results.md").read_text()
    assert "### Mean isuse\n" in (tmp_path / "results.md").read_text()
    page = (tmp_path / "index.html").read_text()
    assert ">2.5</span>" in page and ">-0.125</span>" in page


@given(st.text(), st.text())
def test_no_text_leaves_its_script(one, other):
    text = questions.script_json({one: other + HOSTILE})
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text)[one] == other + HOSTILE


def test_a_lone_surrogate_can_be_written():
    assert json.loads(questions.script_json("a\ud800b")) == "a?b"


def test_wrong_answers_come_first_and_the_order_stays():
    data = questions.question_data(answers(), PageLimits(50))
    shown = [int(q["id"][1:]) for q in data["questions"]]
    assert shown == sorted(shown) and len(shown) == data["shown"] == 50
    assert {i for i in range(120) if i % 3 == 0} <= set(shown)
    unsupported = {i for i in range(120) if i % 12 == 1}
    assert unsupported <= set(shown)
    assert data["wrong"] == data["wrong_shown"] == 40 and data["total"] == 120
    assert "50 of 120 answers" in build_page("T", results(), answers(), limits=PageLimits(50))


def test_the_size_is_bounded():
    full = len(questions.script_json(questions.question_data(answers(), PageLimits())))
    data = questions.question_data(answers(), PageLimits(2000, full // 2))
    assert 0 < data["shown"] < 120 and len(questions.script_json(data)) < full * 0.6
    assert questions.question_data(answers(), PageLimits(0))["questions"] == []


def test_answers_without_a_tree_are_shown():
    plain = {
        "id": 1,
        "system": "rag",
        "task": "t",
        "question": "q",
        "answer": "",
        "p_retrieve": None,
    }
    [q] = questions.question_data([plain], PageLimits())["questions"]
    assert q["id"] == "1" and not q["retrieved"] and "tree" not in q and "p" not in q


# ---- plots ---------------------------------------------------------------------------------------
def test_popularity_is_drawn_from_rare_to_popular():
    def drawn(some):
        return plots_of_answers.popularity_plots(plots_of_answers.answer_curves(some).popularity)

    some = [*answers(), answer(120, 1.0) | {"popularity": None}]
    [plot] = drawn(some)
    [curve] = plot.curves
    assert plot.title == "Accuracy by popularity: popqa" and plot.log_x
    assert "Left out, without popularity: 1." in plot.note
    assert [x for x, *_ in curve.points] == [10**d for d in range(5)]
    for _, y, low, high in curve.points:
        assert low < y < high
    [plot] = drawn([a | {"popularity": a["popularity"] / 1e4} for a in answers()])
    assert not plot.log_x  # shares: below 1, powers of ten have no place
    [plot] = drawn([a | {"decile": 1 + i % 4} for i, a in enumerate(answers())])
    assert plot.x == "decile of popularity" and not plot.log_x
    assert [x for x, *_ in plot.curves[0].points] == [1, 2, 3, 4]
    assert not drawn([a | {"popularity": None} for a in answers()])
    assert not drawn([a | {"popularity": 7} for a in answers()])  # a single bin


def test_the_curve_of_all_thresholds_stands_in_the_place_of_points():
    some = in_all_modes()
    curves = plots_of_answers.answer_curves(some)
    both = [*results(), *(r | {"system": "no_retrieval"} for r in results()[:2])]
    by_rate = [p for p in plots_of_results.plots_of(both, some, curves) if p.x.startswith("retr")]
    [plot] = by_rate
    assert plot.title == "Accuracy against retrieval rate: popqa"
    every, random, oracle, *points = plot.curves
    assert len(every.points) == 200  # of 301 in the file, both ends among them
    assert every.points[0][:2] == (0.0, 0.0) and every.points[-1][:2] == (1.0, 200 / 300)
    assert [(x, y) for x, y, *_ in random.points] == [(0.0, 0.0), (1.0, 200 / 300)]
    assert [(x, y) for x, y, *_ in oracle.points] == [
        (0.0, 0.0), (200 / 300, 200 / 300), (1.0, 200 / 300)
    ]  # fmt: skip
    assert random.dashed and oracle.dashed and not every.dashed
    assert {c.name for c in points} == {"Self-RAG, adaptive", "No retrieval", "mine <b>"}
    drawn = figures.figure(plot, 0)
    Parsed(drawn)
    assert drawn.count("'line dashed ") == 2 and drawn.count("<circle") == 7 + 3 - 1
    assert len(curves.files()["retrieval_rates.json"]["rows"]) == 301 + 2 + 3


def test_numbers_of_an_earlier_report_go_and_others_stay(tmp_path):
    report.write_report(results(), answers(), tmp_path, "T")
    numbers = json.loads((tmp_path / "popularity.json").read_text())
    assert [r["n"] for r in numbers["rows"]] == [24] * 5 and numbers["left_out"] == {"popqa": 0}
    assert not (tmp_path / "retrieval_rates.json").exists()  # one mode alone
    report.write_report(results(), answers()[:5], tmp_path, "T")
    assert not (tmp_path / "popularity.json").exists()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "popularity.json").write_text("mine")
    with pytest.raises(UserError, match=r"popularity\.json: was not made by `selfrag report`"):
        report.write_report(results(), answers(), mine, "T")
    assert (mine / "popularity.json").read_text() == "mine"


def test_curves_side_by_side_keep_their_values_and_whole_numbers_their_ticks():
    one, other = (Curve(name, ((x, 0.5, 0.4, 0.6),)) for name, x in (("a", 1), ("b", 10)))
    plot = Plot("t", "x", "y", (one, other), side_by_side=True)
    text = figures.figure(plot, 0)
    Parsed(text)
    assert "translate(-1.5 0)" in text and "translate(1.5 0)" in text
    assert ">5</text>" in text and ">2.5</text>" not in text
    assert "translate" not in figures.figure(Plot("t", "x", "y", (one, other)), 0)


def test_accuracy_is_shown_against_the_answers_own_critique():
    [plot] = plots_of_results.accuracy_by_support(answers())
    [curve] = plot.curves  # of the answers with a passage: 90 well supported, 10 are not
    (low, right, *_), (high, others, *_) = curve.points
    assert (low, high) == (0.05, 0.95) and right == 1.0 and others == pytest.approx(50 / 90)
    assert not plots_of_results.accuracy_by_support(answers()[:4])


def test_wilson_intervals_by_hand():
    # 8 of 10: (0.8 + z²/20 ± z √(0.016 + z²/400)) / (1 + z²/10)
    low, high = plots_of_results.wilson_interval(0.8, 10)
    assert low == pytest.approx(0.4901625) and high == pytest.approx(0.9433178)
    assert plots_of_results.wilson_interval(1.0, 5)[1] == 1.0


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5),
    st.booleans(),
    st.floats(0, 1),
)
def test_every_plot_can_be_drawn(xs, log_x, y):
    curve = Curve("<a>", tuple((x, y, None, None) for x in xs))
    text = figures.figure(Plot("t & u", "x", "y", (curve,), log_x=log_x, share_y=False), 0)
    Parsed(text)
    assert "nan" not in text and "&lt;a&gt;" in text and "<a>" not in text
    assert not figures.figure(Plot("t", "x", "y", ()), 0)


def test_the_losses_of_a_training_are_read_back(tmp_path):
    from selfrag_jax.training.event_files import read_scalars
    from selfrag_jax.training.log import _EventFile

    log = _EventFile(tmp_path / "logs")
    for step in (1, 2, 3):
        log.write({"loss/text": 1 / step, "mfu": 0.5}, step)
    log.close()
    scalars = read_scalars(tmp_path)
    assert scalars["loss/text"] == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    [plot] = plots_of_results.training_losses({"critic": scalars})
    assert [c.name for c in plot.curves] == ["text"] and len(plot.curves[0].points) == 3
    [file] = (tmp_path / "logs").iterdir()
    file.write_bytes(file.read_bytes()[:-5])  # killed while it wrote
    assert len(read_scalars(tmp_path)["loss/text"]) >= 2
    assert read_scalars(tmp_path / "nothing") == {}
