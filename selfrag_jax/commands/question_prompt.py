"""`selfrag ask` without a question: questions typed at a prompt, or piped in, one a line.

The model stays loaded between them. A question that fails does not end the conversation.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from selfrag_jax.errors import StageFailed, UserError

PROMPT = "> "
HISTORY_LENGTH = 1000  # questions that are kept
_LEAVE = (":quit", ":q", "quit", "exit")
_HELP = (
    "Type a question and Enter; the arrow keys bring back earlier ones.\n"
    "Ctrl-C stops an answer. Ctrl-D or :quit leaves. :full shows the last answer uncut."
)

Ask = Callable[[str], Any]  # answers a question and prints the answer, which it returns


def converse(ask: Ask, show_whole: Callable[[Any], None], loaded: str) -> None:
    """Answers questions until Ctrl-D.

    show_whole: prints an answer that `ask` returned, uncut. loaded: what was loaded, in one line.
    """
    print(f"{loaded}\nAsk a question. :help explains more, Ctrl-D leaves.", file=sys.stderr)
    remember, last = _open_history(), None
    while True:
        stopped = ""
        try:  # around all of it: Ctrl-C may come just before or after the answer, too
            line = " ".join(_read_line().split())
            if line in _LEAVE:
                return
            if line:
                stopped = "\nstopped"
                remember(line)
                last = _obey(line, ask, show_whole, last)
        except KeyboardInterrupt:
            print(stopped, file=sys.stderr)
        except EOFError:
            print(file=sys.stderr)
            return


def _obey(line: str, ask: Ask, show_whole: Callable[[Any], None], last: Any) -> Any:
    """Answers a question, or does what a command says; returns the last answer."""
    if line == ":help":
        print(_HELP, file=sys.stderr)
    elif line == ":full" and last is not None:
        show_whole(last)
    elif line.startswith(":"):
        what = "nothing was answered yet" if line == ":full" else f"no command {line!r}"
        print(f"{what}; :help lists the commands", file=sys.stderr)
    else:
        try:
            return ask(line)
        except BrokenPipeError:
            raise
        except Exception as e:
            print(_message(e), file=sys.stderr)
    return last


def answer_lines(ask: Ask, lines: Iterator[str]) -> None:
    """Answers questions in their order. Raises StageFailed in the end if some failed."""
    asked = failed = 0
    for asked, question in enumerate(lines, 1):  # noqa: B007
        try:
            ask(question)
        except BrokenPipeError:
            raise
        except Exception as e:
            failed += 1
            print(_message(e), file=sys.stderr)
    if failed:
        raise StageFailed(f"{failed} of {asked} questions have no answer")


def piped_lines() -> Iterator[str]:
    """The lines of stdin that are not empty, as they come. Raises UserError if they are no text."""
    try:
        for line in sys.stdin or ():  # None: closed
            if question := line.lstrip("\ufeff").strip():  # a file may begin with a BOM
                yield question
    except UnicodeDecodeError as e:
        raise UserError(f"stdin: questions are read as {e.encoding}, and this is not: {e}") from e


def _message(e: Exception) -> str:
    from selfrag_jax.answering.printable import printable

    kind = "" if isinstance(e, (UserError, StageFailed)) else f"{type(e).__name__}: "
    return f"selfrag ask: {kind}{printable(str(e))}"


# ---- typing --------------------------------------------------------------------------------------
def _read_line() -> str:
    if sys.stdout.isatty():
        return input(PROMPT)
    print(PROMPT, end="", file=sys.stderr, flush=True)  # stdout holds the answers alone
    return input()


def history_file() -> Path:
    """In the user's folder for state (XDG)."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "selfrag_jax" / "ask_history"


def _open_history() -> Callable[[str], None]:
    """Reads earlier questions into readline; returns what saves one.

    Without readline, or where the file cannot be written, nothing is remembered.
    """
    try:
        import readline
    except ImportError:
        return lambda _: None
    readline.set_history_length(HISTORY_LENGTH)
    try:
        file = history_file()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        file.chmod(0o600)  # questions are private
        readline.read_history_file(file)
        readline.write_history_file(file)  # shortens it
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return lambda _: None
    known = readline.get_current_history_length()

    def remember(line: str) -> None:
        nonlocal known
        if not sys.stdout.isatty():  # then `input` leaves readline aside
            readline.add_history(line)
        before, known = known, readline.get_current_history_length()
        if known == before:  # the same question again
            return
        with contextlib.suppress(OSError):
            if hasattr(readline, "append_history_file"):
                readline.append_history_file(1, file)
            else:  # libedit
                readline.write_history_file(file)

    return remember
