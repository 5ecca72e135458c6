"""The picture of a search tree: whole texts apart from each other, and what the numbers say."""

import random
import re

import numpy as np
import pytest
from matplotlib.colors import to_rgba

from selfrag_jax import UserError, draw_tree
from selfrag_jax.answering.sheet import Sheet, fit
from selfrag_jax.records import read_rows

WORDS = (
    "Marie Curie discovered polonium and radium in Paris with her husband and received two "
    "Nobel Prizes of $1 and $2, which nobody_else has done"
).split()


def answer(num_passages, depth, seed=0, beams=2, **changes):
    """A record with a full tree: every step goes on from the best `beams` segments."""
    rng, tree, parents = random.Random(seed), [], [-1]

    def distribution(n):
        p = rng.choices(range(1, 100), k=n)
        return [x / sum(p) for x in p]

    def text(n):
        return " ".join(rng.choices(WORDS, k=n))

    for _ in range(depth):
        step = []
        for parent in parents:
            for _ in range(num_passages):
                node = dict(
                    id=len(tree), parent=parent, action="retrieve", p_retrieve=rng.random(),
                    passage=dict(id="1", title=text(rng.randint(0, 12)), text=text(60)),
                    text=text(rng.randint(1, 40)), allowed=rng.random() > 0.1,
                    p_segment=rng.random(), isrel=distribution(2), issup=distribution(3),
                    isuse=distribution(5), score=4 * rng.random(), chosen=False,
                )  # fmt: skip
                tree.append(node)
                step.append(node)
        step.sort(key=lambda n: -n["score"])
        parents = [n["id"] for n in step[:beams]]
    path, i = [], parents[0]
    while i >= 0:
        path.insert(0, tree[i])
        tree[i]["chosen"] = True
        i = tree[i]["parent"]
    row = dict(
        id="0", question=text(30), segments=[dict(text=n["text"]) for n in path],
        citations=[dict(segment=i, passage=i) for i in range(len(path))],
        passages=[n["passage"] for n in path], notices=["a passage was cut"], tree=tree,
        score=sum(n["score"] for n in path),
    )  # fmt: skip
    return row | changes


def in_order(tree, parent=-1):
    for node in tree:
        if node["parent"] == parent:
            yield node
            yield from in_order(tree, node["id"])


def written(figure):
    return [t.get_text() for t in figure.axes[0].texts]


@pytest.mark.parametrize("num_passages, depth", [(1, 1), (10, 3), (3, 7)])
def test_no_text_overlaps_another_or_leaves_the_sheet(num_passages, depth):
    figure = draw_tree(answer(num_passages, depth))
    renderer = figure.canvas.get_renderer()
    boxes = [t.get_window_extent(renderer) for t in figure.axes[0].texts if t.get_text()]
    x0, y0, x1, y1 = (np.array([getattr(b, k) for b in boxes]) for k in ("x0", "y0", "x1", "y1"))
    wide = (np.minimum.outer(x1, x1) - np.maximum.outer(x0, x0)) > 0.5  # in pixels
    high = (np.minimum.outer(y1, y1) - np.maximum.outer(y0, y0)) > 2.0  # boxes include line spacing
    overlapping = np.argwhere(np.triu(wide & high, 1))
    texts = [t for t in written(figure) if t]
    assert not [(texts[i], texts[j]) for i, j in overlapping]
    width, height = figure.get_size_inches() * figure.dpi
    assert x0.min() >= 0 and y0.min() >= 0 and x1.max() <= width and y1.max() <= height


def test_the_picture_says_what_the_tree_says():
    row = answer(5, 2, seed=1)
    figure = draw_tree(row)
    texts = written(figure)
    for n in row["tree"]:
        numbers = (n["isrel"][1], n["issup"][0], n["isuse"][4], n["p_segment"], n["score"])
        start = next(
            i for i in range(len(texts)) if texts[i : i + 5] == [f"{x:.2f}" for x in numbers]
        )
        assert start > 0
    decisions = [t for t in texts if t.startswith("Segment ")]
    assert len(decisions) == 3  # the first, and one below each of two beams
    assert decisions[0] == (
        f"Segment 1: p(retrieve) = {row['tree'][0]['p_retrieve']:.2f}, retrieved 5 passages"
    )
    assert f"2 segments, score {row['score']:.2f}" in texts
    assert any("[2]" in t for t in texts)
    # Every bar is as long as its probability, on a track of length 0.85; the legend is less high.
    bars = [p for p in figure.axes[0].patches if p.get_height() == pytest.approx(0.14)]
    blue = [p.get_width() / 0.85 for p in bars if p.get_facecolor() == to_rgba("#0072B2")]
    np.testing.assert_allclose(blue, [n["isrel"][1] for n in in_order(row["tree"])], atol=1e-9)


def test_few_rows_keep_the_path_and_count_the_others():
    row = answer(10, 3)
    texts = written(draw_tree(row, passages=2))
    scores = [f"{n['score']:.2f}" for n in row["tree"] if n["chosen"]]
    assert all(s in texts for s in scores)
    hidden = [int(re.match(r"and (\d+) more, with", t)[1]) for t in texts if "more, with" in t]
    rows = sum(t.count("IsRel") == 0 and bool(re.fullmatch(r"-?\d\.\d\d", t)) for t in texts) // 5
    assert rows + sum(hidden) == len(row["tree"])
    assert len(hidden) == 5 and rows < 20


def test_segments_without_a_passage_and_going_on_with_one():
    row = answer(1, 2, beams=1)
    first, second = row["tree"]
    first.update(action="no_retrieval", passage=None, isrel=[0, 0], issup=[0, 0, 0])
    second.update(action="continue")
    texts = written(draw_tree(row | dict(citations=[], passages=[])))
    assert any(t.endswith("wrote without a passage") for t in texts)
    assert any(t.endswith("went on with the passage at hand") for t in texts)
    assert "(none)" in texts


def test_what_cannot_be_drawn_is_refused():
    for record, message in (
        (answer(1, 1, error="OSError: gone"), "question '0' has no answer to draw: OSError: gone"),
        ({"id": "0", "question": "x"}, "no search tree"),
    ):
        with pytest.raises(UserError, match=message):
            draw_tree(record)
    with pytest.raises(UserError, match="passages=0: must be at least 1"):
        draw_tree(answer(1, 1), passages=0)


def test_lines_are_broken_between_words_and_cut_with_an_ellipsis():
    def lines(text, width, n):
        return fit(text, width, n, len)

    assert lines("a bc def", 4, 9) == ["a bc", "def"]
    assert lines("a bc def", 4, 1) == ["a b…"]
    assert lines("abcdefgh", 3, 9) == ["abc", "def", "gh"]
    assert lines("abcdefgh", 3, 2) == ["abc", "de…"]
    assert lines(" \n", 3, 2) == [""]
    assert lines("a\x06b\tc", 9, 1) == ["a\N{REPLACEMENT CHARACTER}b c"]  # fonts lack control codes


def test_a_formula_is_only_text():
    sheet = Sheet(3.0, 0.1, "black")
    sheet.paragraph("costs $1 or $x^2$", 1, 8.0)
    sheet.finish().canvas.draw()
    assert [t.get_text() for t in sheet.axes.texts] == ["costs $1 or $x^2$"]
    assert not sheet.axes.texts[0].get_parse_math()


@pytest.mark.slow
def test_answers_of_a_file_are_drawn(quickstart):
    workdir, _ = quickstart
    rows = [row for _, row in read_rows(workdir / "predictions/selfrag_always/biography.jsonl")]
    for row in rows[:3]:
        assert row["question"].split()[0] in written(draw_tree(row))[0]
