"""Sentences: all of the text is in them, and no text takes long."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfrag_jax.text.sentences import split_sentences


@given(st.text() | st.text(alphabet="aA1.!?\n \"'()[]♬。"))
def test_joined_sentences_are_the_text(text):
    sentences = split_sentences(text)
    assert "".join(sentences) == (text if text.strip() else "")
    assert all(sentence.strip() for sentence in sentences)


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("See ♬ here. And ♬ there.", ["See ♬ here. ", "And ♬ there."]),
        ("One line.\nAnother. Last", ["One line.\n", "Another. ", "Last"]),
        ("He came from Washington, D.C. on Jan. 5. He left.", None),
        ("第一句。第二句。", ["第一句。", "第二句。"]),
        ("..[484 216 622 139] that day.", ["..[484 216 622 139] that day."]),
        (" \n", []),
    ],
)
def test_sentences_of_real_text(text, sentences):
    expected = sentences or ["He came from Washington, D.C. on Jan. 5. ", "He left."]
    assert split_sentences(text) == ([] if not text.strip() else expected)


@pytest.mark.parametrize(
    "text",
    [
        "..[484 216 622 139 651 592 379 228 242 355] that day." * 2000,
        "word " * 10**6,
        "(." * 10**5,
        "北京是中国的首都。" * 10**5,
        "“。”" * 10**5,
    ],
)
def test_no_text_takes_long(text):
    start = time.perf_counter()
    split_sentences(text)
    assert time.perf_counter() - start < 5  # seconds; milliseconds are usual


@pytest.mark.parametrize("space", ("\xa0", "\u2028", "\u3000"))
def test_an_initial_before_a_wide_space_and_a_full_stop_is_read(space):
    """The kept library fails on it."""
    text = f"See Plan B {space}. It{space}works."
    assert split_sentences(text) == [f"See Plan B {space}. ", f"It{space}works."]


def test_a_run_without_spaces_is_split_as_its_parts_are():
    text = "他说：“你好。”然后走了。"
    assert split_sentences(text) == ["他说：“你好。”", "然后走了。"]
    assert split_sentences(text * 1000) == split_sentences(text) * 1000
