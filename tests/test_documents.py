"""The runner of documents (documents.py) notices what it is there to notice."""

import documents
import pytest


def run(text, tmp_path, monkeypatch, **swaps):
    (tmp_path / "doc.md").write_text(text, encoding="utf-8")
    documents.run(tmp_path / "doc.md", tmp_path, monkeypatch, swaps)


def test_a_document_runs_in_order(tmp_path, monkeypatch):
    text = """
<!-- file: a.txt -->
```text
one [1] line
```
```bash
cat a.txt  # a comment
cat \\
  a.txt > b.txt
```
<!-- output -->
```
one [1] ...
```
```python
x = open("b.txt").read()
```
<!-- not run: there is no such file -->
```bash
cat missing.txt
```
```python
print(x, "BIG")
```
<!-- output -->
```
...small
```
"""
    run(text, tmp_path, monkeypatch, BIG="small")


@pytest.mark.parametrize(
    ("text", "swaps"),
    [
        ("```bash\nselfrag no_such_command\n```\n", {}),
        ("```bash\ncat missing.txt\n```\n", {}),
        ("```bash\necho one\n```\n<!-- output -->\n```\ntwo\n```\n", {}),
        ("```bash\necho one\n```\n", {"two": "three"}),
        ("```python\nassert 1 == 2\n```\n", {}),
    ],
)
def test_a_wrong_document_fails(tmp_path, monkeypatch, text, swaps):
    with pytest.raises(AssertionError):
        run(text, tmp_path, monkeypatch, **swaps)
