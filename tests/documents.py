"""Runs a document as its reader would: every block in order, in one folder.

- A block after `<!-- file: NAME -->` is written to NAME.
- Each command of a `bash` block is run; `selfrag` in this process. It must succeed.
- A `python` block is executed; its names stay for the blocks after it.
- Each line of a block after `<!-- output -->` must be among what the block before it printed;
  in a line, `...` stands for any text.
- A block after `<!-- not run: REASON -->` is left out.
- Blocks of other kinds (pictures of a terminal, say) are for reading.
"""

import contextlib
import fnmatch
import io
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

from selfrag_jax import cli

_BLOCK = re.compile(r"(?:<!-- (?P<mark>[^>]*) -->\n+)?```(?P<kind>\w*)\n(?P<text>.*?)```", re.S)


@dataclass(frozen=True)
class Block:
    mark: str  # "", "output", "file: NAME" or "not run: REASON"
    kind: str  # "bash", "python", "jsonl", ...
    text: str
    line: int  # of its first line in the document, from 1


def blocks(document: Path) -> list[Block]:
    """Returns the document's blocks between fences, in order."""
    text = document.read_text(encoding="utf-8")
    return [
        Block(m["mark"] or "", m["kind"], m["text"], text[: m.start("text")].count("\n") + 1)
        for m in _BLOCK.finditer(text)
    ]


def run(document: Path, folder: Path, monkeypatch, swaps: dict[str, str] | None = None) -> None:
    """Runs the document's blocks in `folder`.

    swaps: text of the commands and what takes its place, for a large model or a long training. Each
        must occur: one that does not is an AssertionError, as is a command that fails and output
        that is not as shown.
    """
    monkeypatch.chdir(folder)
    unused, printed, names = set(swaps or {}), "", {"__name__": "__main__"}
    for block in blocks(document):
        where, text = f"{document.name}:{block.line}", block.text
        for old, new in (swaps or {}).items():
            if old in text and block.kind in ("bash", "python"):
                unused.discard(old)
                text = text.replace(old, new)
        if block.mark.startswith("not run:"):
            continue
        if block.mark.startswith("file: "):
            (folder / block.mark.removeprefix("file: ")).write_text(text, encoding="utf-8")
        elif block.mark == "output":
            _check_printed(text, printed, where)
        elif block.kind == "bash":
            printed = "".join(_run(line, where) for line in _commands(text))
        elif block.kind == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(text, where, "exec"), names)
            printed = out.getvalue()
    assert not unused, f"{document.name} has no {unused}"


def _commands(text: str) -> list[str]:
    joined = text.replace("\\\n", " ").splitlines()
    return [line for line in joined if line.strip() and not line.lstrip().startswith("#")]


def _run(line: str, where: str) -> str:
    """Runs one command; returns what it printed, on both streams."""
    words = shlex.split(line, comments=True)
    simple = not any(w in ("|", ">", "<", "&&", ";") for w in words)
    if words[0] != "selfrag" or not simple:
        done = subprocess.run(line, shell=True, capture_output=True, text=True)
        assert done.returncode == 0, f"{where}: {line}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = cli.main(words[1:])
    assert status == 0, f"{where}: {line}\n{out.getvalue()}"
    return out.getvalue()


def _check_printed(expected: str, printed: str, where: str) -> None:
    lines = [line.strip() for line in printed.splitlines()]
    for line in expected.splitlines():
        pattern = re.sub(r"([\[\]*?])", r"[\1]", line.strip()).replace("...", "*")
        assert not line.strip() or fnmatch.filter(lines, pattern), (
            f"{where}: {line!r} was not printed:\n{printed}"
        )
