"""An answer on a terminal of 80 columns: every judgement whole, markup in texts not obeyed."""

import io
from types import SimpleNamespace

from rich.console import Console

from selfrag_jax.answering.citations import Citation
from selfrag_jax.answering.records import Answer
from selfrag_jax.answering.terminal import _in_tree_order, show
from selfrag_jax.records import Passage


def test_the_table_is_readable_at_80_columns():
    passage = Passage("1", "Ada", "Ada lives in [bold]Lisford[/bold] and plays the bow harp.")
    node = {
        "id": 0,
        "parent": -1,
        "chosen": True,
        "passage": {"title": "Ada", "text": passage.text},
        "text": "Ada lives there.",
        "isrel": (0.03, 0.97),
    }
    node |= {
        "issup": (0.91, 0.06, 0.03),
        "isuse": (0.0, 0.0, 0.0, 0.12, 0.88),
        "p_segment": 0.74,
        "score": 2.65,
    }
    none = node | {"id": 1, "chosen": False, "passage": None, "p_segment": 0.11, "score": 0.33}
    untitled = node | {"id": 2, "chosen": False, "passage": {"title": "Lisford", "text": "A town."}}
    said = SimpleNamespace(text="Ada lives there.")
    answer = Answer(
        "0", "Where does Ada live?", "Ada lives there.", (said,), (Citation(0, 0, "[Fully supported]"),), (passage,), True, 0.83, 2.65,
        (node, none, untitled), ("the passage was cut",),
    )  # fmt: skip
    out = io.StringIO()
    show(answer, Console(file=out, width=80))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    header = next(line for line in text.splitlines() if "IsRel" in line)
    assert header.split() == ["passage", "segment", "IsRel", "IsSup", "IsUse", "p(seg)", "score"]
    row = next(line for line in text.splitlines() if "►" in line)
    assert row.split()[-5:] == ["0.97", "0.91", "0.88", "0.74", "2.65"]
    assert "[bold]Lisford[/bold]" in text and "(none)" in text and "Lisford: A" in text
    assert (
        text.index("note: the passage was cut")
        < text.index("Ada lives there. [1]")
        < text.index("p(retrieve) = 0.83: retrieved")
    )


def test_segments_stand_in_the_order_of_the_tree():
    tree = [{"id": i, "parent": p} for i, p in enumerate((-1, -1, 1, 1, 0, 2))]
    assert [(place, n["id"]) for place, n in _in_tree_order(tree)] == [
        ("1", 0), ("1.1", 4), ("2", 1), ("2.1", 2), ("2.1.1", 5), ("2.2", 3),
    ]  # fmt: skip
    assert [place for place, _ in _in_tree_order(tree[:2])] == [
        "",
        "",
    ]  # of one level, places say nothing
