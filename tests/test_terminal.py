"""An answer on a terminal of 80 columns: every judgement is whole, and markup in texts is inert."""

import io
from types import SimpleNamespace

from rich.console import Console

from selfrag_jax.answering.citations import Citation
from selfrag_jax.answering.records import Answer
from selfrag_jax.answering.terminal import _in_tree_order, show
from selfrag_jax.records import Passage


def test_the_table_is_readable_at_80_columns():
    passage = Passage("1", "Ada", "Ada lives in [bold]Lisford[/bold] and plays the bow harp.")
    chosen = {
        "id": 0,
        "parent": -1,
        "chosen": True,
        "passage": {"title": "Ada", "text": passage.text},
        "text": "Ada lives there.",
        "isrel": (0.03, 0.97),
        "issup": (0.91, 0.06, 0.03),
        "isuse": (0.0, 0.0, 0.0, 0.12, 0.88),
        "p_segment": 0.74,
        "score": 2.65,
    }
    other = chosen | {"chosen": False}
    without_passage = other | {"id": 1, "passage": None, "p_segment": 0.11, "score": 0.33}
    with_title = other | {"id": 2, "passage": {"title": "Lisford", "text": "A town."}}
    answer = Answer(
        id="0",
        question="Where does Ada live?",
        answer="Ada lives there.",
        segments=(SimpleNamespace(text="Ada lives there."),),
        citations=(Citation(0, 0, "[Fully supported]"),),
        passages=(passage,),
        retrieved=True,
        p_retrieve=0.83,
        score=2.65,
        tree=(chosen, without_passage, with_title),
        notices=("the passage was cut",),
    )
    out = io.StringIO()
    show(answer, Console(file=out, width=80))
    text = out.getvalue()
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    header = next(line for line in lines if "IsRel" in line)
    assert header.split() == ["passage", "segment", "IsRel", "IsSup", "IsUse", "p(seg)", "score"]
    row = next(line for line in lines if "►" in line)
    assert row.split()[-5:] == ["0.97", "0.91", "0.88", "0.74", "2.65"]
    assert "[bold]Lisford[/bold]" in text and "(none)" in text and "Lisford: A" in text
    in_order = (
        "note: the passage was cut", "Ada lives there. [1]", "p(retrieve) = 0.83: retrieved"
    )  # fmt: skip
    positions = [text.index(part) for part in in_order]
    assert positions[0] < positions[1] < positions[2]


def test_segments_are_listed_in_the_order_of_the_tree():
    tree = [{"id": i, "parent": parent} for i, parent in enumerate((-1, -1, 1, 1, 0, 2))]
    assert [(place, n["id"]) for place, n in _in_tree_order(tree)] == [
        ("1", 0), ("1.1", 4), ("2", 1), ("2.1", 2), ("2.1.1", 5), ("2.2", 3),
    ]  # fmt: skip
    # In a tree of one level, places would say nothing.
    assert [place for place, _ in _in_tree_order(tree[:2])] == ["", ""]
