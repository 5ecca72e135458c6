"""The order of the test files for several workers."""

from pathlib import Path
from types import SimpleNamespace

import longest_first
import pytest


@pytest.mark.parametrize("name", longest_first.SECONDS)
def test_a_measured_test_exists(name):
    file, test = name.split("::")
    assert f"\ndef {test}(" in (Path(__file__).parent / file).read_text()


def test_the_longest_file_is_first_and_files_stay_together(monkeypatch):
    monkeypatch.setattr(longest_first, "SECONDS", {"b.py::long": 5, "c.py::cases": 3})
    names = ["a.py::x", "b.py::y", "b.py::long", "c.py::cases", "c.py::cases"]
    parts = [name.split("::") for name in names]
    items = [SimpleNamespace(path=Path("tests", f), originalname=n) for f, n in parts]
    longest_first.sort_files(items)
    found = [f"{item.path.name}::{item.originalname}" for item in items]
    assert found == [*["c.py::cases"] * 2, "b.py::y", "b.py::long", "a.py::x"]
