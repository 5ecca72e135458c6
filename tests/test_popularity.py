"""Accuracy by popularity: bins by hand, their properties, and several systems side by side."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfrag_jax.evaluation.metrics import interval
from selfrag_jax.evaluation.popularity import accuracy_by_popularity, popularity_bins


def members(bins):
    return [b.members for b in bins]


# ---- bins ----------------------------------------------------------------------------------------
def test_bins_by_hand():
    popularity = [30, 10, 20, 60, 50, 40]
    bins = popularity_bins(popularity, None, 3, 1)
    assert members(bins) == [(1, 2), (0, 5), (3, 4)]
    assert [(b.at, b.low, b.high) for b in bins] == [(15, 10, 20), (35, 30, 40), (55, 50, 60)]


def test_equal_popularity_is_one_bin():
    """Quarters of eight: the fours' middle is at 2, in the second; then 4.5, 5.5, 6.5, 7.5."""
    bins = popularity_bins([4, 7, 4, 8, 4, 9, 4, 10], None, 4, 1)
    assert members(bins) == [(0, 2, 4, 6), (1, 3), (5, 7)]
    assert [b.at for b in bins] == [4, 7.5, 9.5]


def test_small_bins_join_their_neighbours():
    popularity = list(range(10))
    assert [len(b.members) for b in popularity_bins(popularity, None, 10, 3)] == [3, 3, 4]
    assert [len(b.members) for b in popularity_bins(popularity, None, 10, 11)] == [10]
    assert popularity_bins([], None, 10, 1) == []


def test_the_files_deciles_are_the_bins():
    """Votes of films and inhabitants of cities: the numbers alone would sort by kind."""
    popularity, deciles = [5, 9_000_000, 900, 1000], [1, 2, 2, 1]
    bins = popularity_bins(popularity, deciles, 10, 1)
    assert members(bins) == [(0, 3), (1, 2)] and [b.at for b in bins] == [1, 2]
    assert (bins[1].low, bins[1].high) == (900, 9_000_000)
    [merged] = popularity_bins(popularity, [1, 1, 1, 3], 10, 2)
    assert merged.at == 1.5  # the mean of its questions' deciles


@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=80),
    st.integers(1, 12),
    st.integers(1, 12),
    st.randoms(use_true_random=False),
)
def test_bins_part_the_questions_from_rare_to_popular(popularity, bins, fewest, rng):
    found = popularity_bins(popularity, None, bins, fewest)
    assert sorted(i for b in found for i in b.members) == list(range(len(popularity)))
    assert 1 <= len(found) <= bins
    assert all(b.low <= b.at <= b.high for b in found)
    assert all(one.high < other.low for one, other in itertools.pairwise(found))
    if len(popularity) >= fewest:
        assert all(len(b.members) >= fewest for b in found)
    # Without ties no bin differs by more than one from its share, whatever the order of the file.
    if len(set(popularity)) == len(popularity) and fewest == 1:
        share = len(popularity) / bins
        assert all(abs(len(b.members) - share) <= 1 for b in found)
    order = list(range(len(popularity)))
    rng.shuffle(order)
    again = popularity_bins([popularity[i] for i in order], None, bins, fewest)
    assert [{order[i] for i in b.members} for b in again] == [{*b.members} for b in found]


# ---- systems -------------------------------------------------------------------------------------
def rows(system, accuracies, popularity, task="facts", **fields):
    return [
        {"system": system, "task": task, "id": str(i), "metrics": {"accuracy": a}, "popularity": p}
        | fields
        for i, (a, p) in enumerate(zip(accuracies, popularity, strict=True))
    ]


def test_each_system_has_its_accuracy_in_the_same_bins():
    popularity = [1, 2, 3, 4, None]
    some = rows("a", [0.0, 1.0, 1.0, 1.0, 0.0], popularity)
    some += rows("b", [1.0, 0.0, 0.5, 0.0, 1.0], popularity)
    table = accuracy_by_popularity(some, bins=2, fewest=2, seed=3)
    found = [(r["system"], r["at"], r["value"], r["n"]) for r in table.rows]
    assert found == [
        ("a", 1.5, 0.5, 2),
        ("a", 3.5, 1.0, 2),
        ("b", 1.5, 0.5, 2),
        ("b", 3.5, 0.25, 2),
    ]
    assert table.left_out == {"facts": 1}
    assert [(r["low"], r["high"]) for r in table.rows[:2]] == [(0.0, 1.0), (1.0, 1.0)]
    assert {r["by"] for r in table.rows} == {"popularity"}
    assert [(r["popularity_low"], r["popularity_high"]) for r in table.rows[:2]] == [(1, 2), (3, 4)]


def test_intervals_are_those_of_the_results():
    rng = random.Random(0)
    right = [float(rng.random() < 0.6) for _ in range(40)]
    table = accuracy_by_popularity(rows("a", right, range(40)), 2, 10, seed=5)
    for part, row in zip((right[:20], right[20:]), table.rows, strict=True):
        assert (row["value"], row["low"], row["high"]) == interval(part, 5)


def test_what_has_no_bins_has_no_rows():
    assert not accuracy_by_popularity(rows("a", [1.0] * 30, [None] * 30), 10, 10, 0).rows
    assert not accuracy_by_popularity(rows("a", [1.0] * 30, [5.0] * 30), 10, 10, 0).rows  # one bin
    assert not accuracy_by_popularity(rows("a", [1.0] * 9, range(9)), 10, 10, 0).rows
    no_gold = [r | {"metrics": {}} for r in rows("a", [1.0] * 30, range(30))]
    assert not accuracy_by_popularity(no_gold, 10, 10, 0).rows
    assert not accuracy_by_popularity([], 10, 10, 0).rows


def test_a_system_that_answered_few_of_a_bin_has_no_point_there():
    some = rows("a", [1.0] * 20, range(20)) + rows("b", [1.0] * 12, range(12))
    table = accuracy_by_popularity(some, 2, 10, 0)
    assert [(r["system"], r["n"]) for r in table.rows] == [("a", 10), ("a", 10), ("b", 10)]


@pytest.mark.parametrize("deciles", [(1, 2), (0, 9)])
def test_deciles_count_only_if_all_questions_have_one(deciles):
    some = rows("a", [0.0] * 4, [1, 2, 3, 4])
    given = [r | {"decile": deciles[i % 2]} for i, r in enumerate(some)]
    table = accuracy_by_popularity(given, 10, 2, 0)
    assert [r["at"] for r in table.rows] == list(deciles) and table.rows[0]["by"] == "decile"
    del given[3]["decile"]
    table = accuracy_by_popularity(given, 2, 2, 0)
    assert [r["at"] for r in table.rows] == [1.5, 3.5] and table.rows[0]["by"] == "popularity"
