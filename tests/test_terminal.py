"""An answer on a terminal of 80 or 120 columns: judgements are whole, long texts cut, all inert."""

import io
import re
import time
from types import SimpleNamespace

import pytest
from plain_search import make_rag
from rich.console import Console
from wcwidth import wcswidth

from selfrag_jax.answering.citations import Citation
from selfrag_jax.answering.printable import printable, shortened
from selfrag_jax.answering.records import Answer, failed_answer
from selfrag_jax.answering.terminal import _in_tree_order, show
from selfrag_jax.records import Passage, Question


def node(passage, **changes):
    return {
        "id": 0,
        "parent": -1,
        "chosen": True,
        "passage": passage,
        "text": "Ada lives there.",
        "isrel": (0.03, 0.97),
        "issup": (0.91, 0.06, 0.03),
        "isuse": (0.0, 0.0, 0.0, 0.12, 0.88),
        "p_segment": 0.74,
        "score": 2.65,
    } | changes


def answer_with(passage, tree, **changes):
    fields = dict(
        id="0",
        question="Where does Ada live?",
        answer="Ada lives there.",
        segments=(SimpleNamespace(text="Ada lives there."),),
        citations=(Citation(0, 0, "[Fully supported]"),),
        passages=(passage,),
        retrieved=True,
        p_retrieve=0.83,
        score=2.65,
        tree=tree,
        notices=("the passage was cut",),
    )
    return Answer(**fields | changes)


def shown(answer, width, **arguments):
    out = io.StringIO()
    show(answer, Console(file=out, width=width), **arguments)
    text = out.getvalue()
    assert max(map(wcswidth, text.splitlines())) <= width
    return text


def as_row(passage):
    return {"title": passage.title, "text": passage.text}


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_is_readable(width):
    passage = Passage("1", "Ada", "Ada lives in [bold]Lisford[/bold] and plays the :harp:.")
    other = node(as_row(passage), chosen=False)
    without_passage = node(None, id=1, chosen=False, p_segment=0.11, score=0.33)
    with_title = other | {"id": 2, "passage": {"title": "Lisford", "text": "A town."}}
    tree = (node(as_row(passage)), without_passage, with_title)
    text = shown(answer_with(passage, tree), width)
    lines = text.splitlines()
    header = next(line for line in lines if "IsRel" in line)
    assert header.split() == ["passage", "segment", "IsRel", "IsSup", "IsUse", "p(seg)", "score"]
    row = next(line for line in lines if "►" in line)
    assert row.split()[-5:] == ["0.97", "0.91", "0.88", "0.74", "2.65"]
    assert header.index("score") + len("score") == row.index("2.65") + len("2.65")
    assert "[bold]Lisford[/bold]" in text and "(none)" in text and "Lisford: A" in text
    assert "[1] Ada: Ada lives in" in text and ":harp:" in text and "cut;" not in text
    in_order = (
        "note: the passage was cut", "Ada lives there. [1]", "p(retrieve) = 0.83: retrieved"
    )  # fmt: skip
    positions = [text.index(part) for part in in_order]
    assert positions[0] < positions[1] < positions[2]


@pytest.mark.parametrize("width", [80, 120])
def test_a_passage_of_20_000_words_is_cut_and_it_says_how_much(width):
    passage = Passage("1", "Ada", " ".join(f"word{i}" for i in range(20_000)))
    answer = answer_with(passage, (node(as_row(passage)),))
    text = shown(answer, width)
    assert len(text.splitlines()) < 30
    cut = re.findall(r"word(\d+) … ([\d,]+) more words", " ".join(text.split()))
    assert cut, text
    for last, more in cut:  # the title is a word, too
        assert int(last) + 1 + int(more.replace(",", "")) == 20_000
    assert "Long texts are cut; --full shows them whole." in text
    whole = shown(answer, width, full=True)
    assert whole.count("word19999") == 2 and "more words" not in whole


def test_scripts_without_spaces_are_cut_between_characters():
    for letter, cells in (("北", 2), ("e\u0301", 1), ("👩‍🌾", 2), ("नि", 1)):
        text, was_cut = shortened(letter * 500, 100)
        kept = text.partition("…")[0]
        assert was_cut and kept == letter * (len(kept) // len(letter))
        assert len(kept) // len(letter) * cells <= 100 and len(kept) >= 20 * len(letter)
        rest = 500 * len(letter) - len(kept)
        assert text.endswith(f"… {rest:,} more characters")
    assert shortened("one two", 7) == ("one two", False)
    assert shortened("one two three", 7) == ("one two … 1 more word", True)


WIDE = ("北京是中国的首都。" * 6, "cafe\u0301 nai\u0308ve " * 12, "👩\u200d🌾 🇯🇵 ❤️ 👍🏽 " * 8)


@pytest.mark.parametrize("width", [80, 120])
def test_numbers_stay_in_their_columns_beside_wide_characters(width):
    for text in WIDE:
        passage = Passage("1", "", text)
        rows = (node(as_row(passage), text=text[:40]), node(as_row(passage), id=1, chosen=False))
        lines = shown(answer_with(passage, rows), width).splitlines()
        header = next(line for line in lines if "IsRel" in line)
        numbers = [line for line in lines if "2.65" in line]
        ends = {wcswidth(line[: line.index("2.65")]) for line in numbers}
        assert len(numbers) == 2 and ends == {header.index("score") + 1}


def test_no_escape_sequence_of_a_text_reaches_the_terminal():
    evil = (
        "\x1b[31mred\x1b[0m \x1b]0;title\x07\x1b]52;c;aGk=\x1b\\ \x9b2J \x1bPq\x1b\\ \x1b(0 \x1bc"
        " bell\x07 back\x08 \x85 over\u202eride tab\there \ud800"
    )
    passage = Passage("1", evil, f"{evil} text")
    answer = answer_with(
        passage,
        (node(as_row(passage), text=evil),),
        segments=(SimpleNamespace(text=evil),),
        answer=evil,
        notices=(evil,),
    )
    for text in (*(shown(answer, 80, full=full) for full in (False, True)), str(answer)):
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800]", text)
        assert "red" in text and "tab here" in text and "title" not in text and "aGk" not in text
        text.encode()
    assert "\x1b" not in repr(answer) and "\n" not in repr(answer)
    failed = failed_answer(Question("0", "Who?"), ValueError(evil))
    assert not re.search("[\x00-\x1f\x7f-\x9f\u202e\ud800]", str(failed))


def test_strings_that_do_not_end_take_no_long_time():
    """Of 100,000 of them, each would be looked for to the end: minutes."""
    for begin in ("\x90", "\x9d", "\x1b]", "\x1b["):
        start = time.monotonic()
        assert printable(f"{begin * 100_000} text").endswith("ext")
        assert time.monotonic() - start < 10


def test_a_notice_of_a_citation_stands_below_it_and_others_above_the_answer():
    passage = Passage("1", "Ada", "Ada lives in Lisford.")
    text = '"Ada" does not mention Mara Oak'
    answer = answer_with(
        passage,
        (node(as_row(passage)),),
        citations=(Citation(0, 0, "[Fully supported]", text),),
        notices=("the passage was cut", f"[1] {text}"),
    )
    lines = [line.strip() for line in shown(answer, 80).splitlines()]
    assert lines[1:5] == [
        "note: the passage was cut",
        "Ada lives there. [1]",
        "[1] Ada: Ada lives in Lisford.",
        f"note: [1] {text}",
    ]


def test_an_answer_prints_as_text():
    passage = Passage("1", "Ada", "Ada lives in Lisford.")
    answer = answer_with(passage, ())
    assert str(answer) == (
        "Ada lives there. [1]\n  [1] Ada: Ada lives in Lisford.\nnote: the passage was cut"
    )
    assert repr(answer) == (
        "Answer(id='0', question='Where does Ada live?', answer='Ada lives there.', "
        "citations=1, score=2.650)"
    )
    assert str(failed_answer(Question("0", "Who?"), ValueError("none"))) == (
        "no answer: ValueError: none"
    )


def test_a_model_prints_as_one_line(talkative):
    rag = make_rag(talkative)
    assert repr(rag) == (f"SelfRAG({rag.loaded!r}; no index; adaptive_retrieval)")
    layers = talkative.model.config.num_layers
    assert re.fullmatch(
        rf"Llama of {layers} layers, \d+k parameters, float32, on TFRT_CPU_0|"
        rf"Llama of {layers} layers, \d+k parameters, float32, on cpu:0",
        repr(rag.loaded),
        re.IGNORECASE,
    )
    rag.retriever = SimpleNamespace(search=None, big="x" * 1000)
    assert "; SimpleNamespace; " in repr(rag)


def test_segments_are_listed_in_the_order_of_the_tree():
    tree = [{"id": i, "parent": parent} for i, parent in enumerate((-1, -1, 1, 1, 0, 2))]
    assert [(place, n["id"]) for place, n in _in_tree_order(tree)] == [
        ("1", 0), ("1.1", 4), ("2", 1), ("2.1", 2), ("2.1.1", 5), ("2.2", 3),
    ]  # fmt: skip
    # In a tree of one level, places would say nothing.
    assert [place for place, _ in _in_tree_order(tree[:2])] == ["", ""]
