"""Documents are split into passages: nothing is lost, and sentences stay whole."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfrag_jax.text.splitting import first_heading, sections, split_words

TEXT = st.lists(
    st.sampled_from(["One two. ", "Three!\n", "\n\n", "word ", "東京は首都。", "x" * 45, "♬ ", "#"])
).map("".join)


@given(st.text() | TEXT, st.integers(1, 9))
def test_joined_pieces_are_the_text_and_none_is_longer(text, most):
    pieces = split_words(text, most)
    assert "".join(pieces) == (text if text.strip() else "")
    assert all(piece.strip() for piece in pieces)
    for piece in pieces:
        assert len(piece.split()) <= most and len("".join(piece.split())) <= 20 * most


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("One two. Three four five. Six.", ["One two. ", "Three four five. Six."]),
        ("Ants bite. Cats sleep. Eels flee. Go.", ["Ants bite. Cats sleep. ", "Eels flee. Go."]),
        ("one two three four five six. Seven", ["one two three four", " five six. Seven"]),
        ("北京是中国的首都。", ["北京是中国的首都", "。"]),  # two characters are a word
        ("# A\n| b c |\n| d e |\n", ["# A\n", "| b c |\n", "| d e |\n"]),
        ("A b. \nc d e f g. H", ["A b. \nc d", " e f g. H"]),
        ("x" * 100, ["x" * 80, "x" * 20]),
    ],
)
def test_pieces_end_where_sentences_do(text, pieces):
    assert split_words(text, 4) == pieces


@pytest.mark.parametrize(
    "unit", ["This is a sentence of words. ", "北京是中国的首都。", "x", "word\n"]
)
def test_a_document_of_a_million_characters_takes_no_time(unit):
    text = unit * (1_000_000 // len(unit))
    start = time.perf_counter()
    assert "".join(split_words(text, 100)) == text
    assert time.perf_counter() - start < 5  # seconds; a few tenths are usual


@given(
    st.text(alphabet="#ab \n`~\r")
    | st.lists(st.sampled_from(["# A\n", "b\n", "```\n"])).map("".join)
)
def test_joined_sections_are_the_document(markdown):
    assert "".join(text for _, text in sections(markdown)) == markdown


def test_a_heading_ends_before_its_marks_and_its_line_break():
    assert first_heading("# A b ##\r\ntext\r\n") == "A b"
    assert first_heading("# " + " #" * 100_000 + "x").endswith("x")  # at once
    assert [heading for heading, _ in sections("# A\r\nx\r\n## B\r\ny")] == ["A", "B"]


def test_sections_have_the_headings_above_them():
    markdown = "Before.\n# Otters #\n\n## Food\nFish.\n```\n# a comment\n```\n### Homes\nRivers."
    assert sections(markdown) == [
        ("", "Before.\n"),
        ("Food", "# Otters #\n\n## Food\nFish.\n```\n# a comment\n```\n"),
        ("Homes", "### Homes\nRivers."),
    ]
    assert first_heading(markdown) == "Otters" and first_heading("#no heading") == ""
