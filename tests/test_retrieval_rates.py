"""The curve of all thresholds: by hand, against a plain loop, and against adaptive runs."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfrag_jax.evaluation.retrieval_rates import (
    BothModes,
    area_interval,
    both_modes,
    curve_area,
    modes_by_task,
    rate_curve,
    share_of_oracle,
    to_json,
)

P, ALWAYS, NEVER = (
    np.array(column, float) for column in ([0.9, 0.2, 0.5, 0.5], [1, 0, 1, 0], [0, 1, 0, 0])
)


def modes(p, always, never):
    ids = tuple(map(str, range(len(p))))
    return BothModes(ids, *(np.array(c, float) for c in (p, always, never)), left_out=0)


def drawn(points):
    return [(p.retrieval_rate, p.accuracy) for p in points]


# ---- the curve -----------------------------------------------------------------------------------
def test_a_curve_by_hand():
    points = rate_curve(P, ALWAYS, NEVER)
    # None: only the second is right; then the first, too; the two at 0.5 come together.
    assert drawn(points) == [(0.0, 0.25), (0.25, 0.5), (0.75, 0.75), (1.0, 0.5)]
    assert [(p.threshold_from, p.threshold_below) for p in points] == [
        (0.9, None), (0.5, 0.9), (0.2, 0.5), (None, 0.2)
    ]  # fmt: skip


def test_areas_by_hand():
    both = modes(P, ALWAYS, NEVER)
    # Trapezoids: 0.25 * 0.375 + 0.5 * 0.625 + 0.25 * 0.625
    assert both.area("p_retrieve") == pytest.approx(0.5625)
    # Gains 1, -1, 1, 0: right are 1 of 4, then 3 after two, still 3, and 2 in the end.
    assert drawn(both.curve("oracle")) == [(0.0, 0.25), (0.5, 0.75), (0.75, 0.75), (1.0, 0.5)]
    assert both.area("oracle") == pytest.approx(0.25 + 0.1875 + 0.15625)
    assert drawn(both.curve("random")) == [(0.0, 0.25), (1.0, 0.5)]
    assert both.area("random") == pytest.approx(0.375)
    assert share_of_oracle(both) == pytest.approx((0.5625 - 0.375) / (0.59375 - 0.375))


def test_orders_that_cannot_matter_have_no_share():
    assert share_of_oracle(modes([0.1, 0.2], [1, 1], [0, 0])) is None


columns = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.1, 0.2, 0.35, 0.5, 0.9, 1.0]) | st.floats(0, 1),
        st.sampled_from([0.0, 0.25, 1.0]),
        st.sampled_from([0.0, 0.5, 1.0]),
    ),
    min_size=1,
    max_size=30,
)


@given(columns, st.floats(0, 1))
def test_every_threshold_is_on_the_curve(rows, threshold):
    """A plain loop over the questions, at thresholds between, at and beyond the values of p."""
    points = rate_curve(*(np.array(c, float) for c in zip(*rows, strict=True)))
    for t in (threshold, -0.5, 1.5, *(p for p, *_ in rows)):
        right, retrieved = 0.0, 0
        for p, always, never in rows:
            right += always if p > t else never
            retrieved += p > t
        [point] = [
            x
            for x in points
            if (x.threshold_from is None or x.threshold_from <= t)
            and (x.threshold_below is None or t < x.threshold_below)
        ]
        assert point.retrieval_rate == retrieved / len(rows)
        assert point.accuracy == pytest.approx(right / len(rows), abs=1e-12)
    assert len(points) == len({p for p, *_ in rows}) + 1


@given(columns)
def test_no_order_is_above_the_oracle_or_below_its_mirror_image(rows):
    p, always, never = (np.array(c, float) for c in zip(*rows, strict=True))
    gain = always - never
    best, worst = curve_area(gain, always, never), curve_area(-gain, always, never)
    assert worst - 1e-9 <= curve_area(p, always, never) <= best + 1e-9
    assert curve_area(np.zeros(len(p)), always, never) == pytest.approx(
        (always.mean() + never.mean()) / 2
    )


def test_the_interval_of_an_area_holds_it():
    rng = np.random.default_rng(0)
    both = modes(rng.random(80), rng.integers(0, 2, 80), rng.integers(0, 2, 80))
    value, low, high = area_interval(both, 0)
    assert low < value < high and high - low < 0.3
    assert area_interval(both, 0) == (value, low, high) != area_interval(both, 1)


# ---- from answers --------------------------------------------------------------------------------
def answer(i, accuracy, p, retrieved, system, **fields):
    row = {"id": str(i), "system": system, "task": "facts", "metrics": {"accuracy": accuracy}}
    row |= {"p_retrieve": p, "retrieved": retrieved, "tree": [{"parent": -1}], "error": ""}
    return row | fields


def both_rows(always="selfrag_always", never="selfrag_never"):
    rows = [answer(i, a, p, True, always) for i, (a, p) in enumerate(zip(ALWAYS, P, strict=True))]
    return rows + [answer(i, a, 0.0, False, never) for i, a in enumerate(NEVER)]


def test_both_modes_are_read_from_answers_in_any_order():
    rows = both_rows()
    found = both_modes(rows[:4], rows[:3:-1])
    assert found.ids == ("0", "1", "2", "3") and found.left_out == 0
    for mine, other in ((found.p, P), (found.always, ALWAYS), (found.never, NEVER)):
        np.testing.assert_array_equal(mine, other)


def test_questions_without_both_answers_are_left_out_and_counted():
    rows = both_rows()
    rows[0] |= {"error": "RuntimeError: too long", "p_retrieve": 0.0}
    rows[5] |= {"metrics": {}}
    found = both_modes(rows[:4], rows[4:7])  # the last has no answer without retrieval
    assert found.ids == ("2",) and found.left_out == 3
    assert both_modes(rows[:1], rows[4:5]) is None


def test_answers_of_several_segments_have_no_curve():
    rows = both_rows()
    rows[6]["tree"] = [{"parent": -1}, {"parent": 0}]
    assert both_modes(rows[:4], rows[4:]) is None


def test_the_modes_are_told_by_name_or_by_what_they_did():
    named, unnamed = both_rows(), both_rows("W/a", "W/b")
    adaptive = [answer(i, 1.0, 0.5, i > 0, "W/c") for i in range(4)]
    other = [r | {"system": "ablation_top1"} for r in named[:4]]
    plain = [answer(i, 1.0, 0.0, False, "no_retrieval", tree=[]) for i in range(4)]
    for rows in (named, [*named, *other, *plain], [*unnamed, *adaptive, *plain]):
        [(task, found)] = modes_by_task(rows).items()
        assert task == "facts"
        assert (found.always.tolist(), found.never.tolist()) == (ALWAYS.tolist(), NEVER.tolist())
    assert modes_by_task([*unnamed, *other]) == {}  # two that always retrieve
    assert modes_by_task(named[:4]) == {}
    assert modes_by_task([r | {"scorer": "released"} for r in named]) == {}


def test_the_file_holds_all_curves_and_areas():
    found = to_json({"facts": modes(P, ALWAYS, NEVER)}, 0)
    json.dumps(found, allow_nan=False)
    by_order = {}
    for row in found["rows"]:
        by_order.setdefault(row["order"], []).append((row["retrieval_rate"], row["accuracy"]))
    assert {order: len(points) for order, points in by_order.items()} == {
        "p_retrieve": 4, "oracle": 4, "random": 2
    }  # fmt: skip
    assert all(row["threshold_from"] is None for row in found["rows"] if row["order"] == "oracle")
    [area] = found["areas"]
    assert (area["area"], area["random"], area["n"]) == (0.5625, 0.375, 4)
    assert area["low"] <= area["area"] <= area["high"]


# ---- a finished quickstart -----------------------------------------------------------------------
@pytest.fixture(scope="module")
def rag(quickstart):
    from selfrag_jax import config
    from selfrag_jax.answering.config import AnswerConfig
    from selfrag_jax.answering.selfrag import SelfRAG

    workdir, _ = quickstart
    c = config.load("tiny:smoke")
    answering = config.build(AnswerConfig, c.answer, "answer")
    return SelfRAG.load(workdir / "generator", workdir / "index", answering)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["no_need", "claims"])
def test_adaptive_runs_are_on_the_curve(quickstart, rag, task):
    """Three thresholds between the values of p(retrieve), each really answered with."""
    from selfrag_jax.commands.plotted_answers import plotted_answers
    from selfrag_jax.data.questions import read_questions
    from selfrag_jax.evaluation import scores

    workdir, _ = quickstart
    points = modes_by_task(plotted_answers(workdir))[task].curve("p_retrieve")
    questions = read_questions(workdir / "retrieved" / "eval" / f"{task}.jsonl", task)
    inner = [p for p in points if p.threshold_from is not None and p.threshold_below is not None]
    # The ranges that are wide enough: p differs in its last bits by what is computed beside it.
    wide = [p for p in inner if p.threshold_below - p.threshold_from > 1e-4]
    for point in (wide[0], wide[len(wide) // 2], wide[-1]):
        threshold = (point.threshold_from + point.threshold_below) / 2
        asked = [replace(q, ctxs=()) for q in questions]
        made = rag.answer(asked, threshold=threshold, max_depth=1, beam_width=1)
        values = scores.score(questions, [a.to_row() for a in made], None, None)
        assert np.mean(values["retrieval_rate"]) == point.retrieval_rate
        assert np.mean(values["accuracy"]) == pytest.approx(point.accuracy, abs=1e-12)


def test_the_quickstart_has_the_curves_and_its_own_threshold_is_on_them(quickstart):
    workdir, rows = quickstart
    report = workdir / "report"
    found = json.loads((report / "retrieval_rates.json").read_text())
    tasks = {row["task"] for row in found["rows"]}
    assert {"long_tail", "well_known", "no_need", "claims", "multiple_choice"} <= tasks
    page = (report / "index.html").read_text()
    assert page.count("Accuracy against retrieval rate: ") >= 2 * len(tasks)
    value = {(r["system"], r["task"], r["metric"]): r["value"] for r in rows}
    for task in tasks:
        curve = [r for r in found["rows"] if r["task"] == task and r["order"] == "p_retrieve"]
        for system, point in (("selfrag_never", curve[0]), ("selfrag_always", curve[-1])):
            assert point["accuracy"] == pytest.approx(value[system, task, "accuracy"], abs=1e-12)
        adaptive = [value["selfrag_adaptive", task, m] for m in ("retrieval_rate", "accuracy")]
        at_rate = [r for r in curve if r["retrieval_rate"] == pytest.approx(adaptive[0])]
        assert [r["accuracy"] for r in at_rate] == [pytest.approx(adaptive[1], abs=1e-12)], task
