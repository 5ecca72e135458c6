"""`selfrag ask` for many questions: a prompt on a terminal, or one question a line from stdin."""

import io
import json
import sys
from pathlib import Path

import pytest
from pseudo_terminal import PseudoTerminal
from shouting import Shouting

from selfrag_jax import cli
from selfrag_jax.commands import ask, question_prompt

SHOUTING = Path(__file__).with_name("shouting.py")


def piped(capsys, monkeypatch, lines, *flags):
    """(exit status, stdout, stderr) with the lines on stdin."""
    monkeypatch.setattr(ask, "load_selfrag", lambda values: Shouting())
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    status = cli.main(["ask", "--workdir=W", *flags])
    return status, *capsys.readouterr()


def test_piped_questions_are_answered_in_order(capsys, monkeypatch):
    lines = "who was first?\n\n  who was second?  \nwho was third?"
    status, out, err = piped(capsys, monkeypatch, lines, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and not err
    assert [(row["id"], row["question"], row["answer"]) for row in rows] == [
        ("0", "who was first?", "WHO WAS FIRST? INDEED"),
        ("1", "who was second?", "WHO WAS SECOND? INDEED"),
        ("2", "who was third?", "WHO WAS THIRD? INDEED"),
    ]
    status, out, err = piped(capsys, monkeypatch, lines)
    assert status == 0 and out.count("p(retrieve) =") == 3
    assert "\x1b" not in out + err, "no colours where nobody looks"
    assert question_prompt.PROMPT not in out + err


def test_a_piped_question_that_fails_does_not_end_the_others(capsys, monkeypatch):
    status, out, err = piped(capsys, monkeypatch, "broken\ntea?\nlost\n")
    assert status == 1 and "TEA? INDEED" in out
    assert err.splitlines() == [
        "selfrag ask: RuntimeError: the device is gone",
        "selfrag ask: no answer: KeyError: 'index'",
        "selfrag ask: 2 of 3 questions have no answer",
    ]


def test_questions_in_odd_encodings(capsys, monkeypatch):
    """A byte order mark is no part of the first question; bytes that are no text are named."""
    status, out, err = piped(capsys, monkeypatch, "\ufefftea?\nM\udce9?\nmilk?\n", "--json")
    assert [json.loads(line)["question"] for line in out.splitlines()] == ["tea?", "milk?"]
    assert status == 1 and "the question is no text in utf-8: 'M\\udce9?'\n" in err
    monkeypatch.setattr(ask, "load_selfrag", None)  # a question in the command: before that
    assert cli.main(["ask", "--workdir=W", "M\udce9?"]) == 2


def test_a_long_answer_is_cut_in_the_table_unless_all_is_wanted(capsys, monkeypatch):
    _, out, _ = piped(capsys, monkeypatch, "how long?")
    assert "Long texts are cut; --full shows them whole." in out
    _, whole, _ = piped(capsys, monkeypatch, "how long?", "--full")
    assert whole.count("INDEED") == 1000 and "cut" not in whole


def test_no_question_at_all_is_refused_before_a_model_is_loaded(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(" \n\n"))
    assert cli.main(["ask", "--workdir=nowhere"]) == 2
    assert "ask what? For example: selfrag ask" in capsys.readouterr().err


def test_json_holds_nothing_that_a_terminal_obeys(capsys, monkeypatch):
    question = "who \x9b31m is \x1b[2J \x7f \u202e 北京?"
    _, out, _ = piped(capsys, monkeypatch, question, "--json")
    assert "北京" in out and not set("\x1b\x9b\x7f\u202e") & set(out)
    assert json.loads(out)["question"] == question


# ---- the prompt ----------------------------------------------------------------------------------
def start(folder):
    command = [sys.executable, str(SHOUTING)]
    return PseudoTerminal(command, folder, XDG_STATE_HOME=str(folder), JAX_PLATFORMS="cpu")


@pytest.mark.slow
def test_the_prompt_keeps_going_until_ctrl_d(tmp_path):
    with start(tmp_path) as terminal:
        welcome = terminal.read_until("> ")
        assert "Shouting(4 parameters)" in welcome and "Ctrl-D leaves" in welcome
        terminal.type("why is it?\r")
        assert "WHY IS IT? INDEED" in terminal.read_until("> ")
        terminal.type("\r")  # nothing
        assert "INDEED" not in terminal.read_until("> ")
        terminal.type("discarded\x03")  # Ctrl-C on a line
        terminal.read_until("> ")
        terminal.type("a slow one\r")
        terminal.read_until("thinking")
        terminal.type("\x03")  # Ctrl-C on an answer
        assert "stopped" in terminal.read_until("> ")
        for question, message in (
            ("broken", "selfrag ask: RuntimeError: the device is gone"),
            ("lost", "selfrag ask: no answer: KeyError: 'index'"),
            (":fulll", "no command ':fulll'; :help lists the commands"),
            (":help", "Ctrl-C stops an answer"),
            ("how long is it?", "Long texts are cut; :full shows them whole."),
        ):
            terminal.type(f"{question}\r")
            assert message in terminal.read_until("\n> "), question
        terminal.type(":full\r")
        out = terminal.read_until("\n> ")
        assert out.count("INDEED") == 1000 and "Long texts" not in out
        terminal.type("\x1b[A\x1b[A\x1b[A\r")  # three lines up: before :full and the long one
        assert "Ctrl-C stops an answer" in terminal.read_until("\n> ")
        terminal.type("\x04")
        _, status = terminal.read_to_end()
        assert status == 0
    file = tmp_path / "selfrag_jax" / "ask_history"
    lines = file.read_text().splitlines()
    assert lines[:2] == ["why is it?", "a slow one"] and "discarded" not in lines
    assert file.stat().st_mode & 0o077 == 0, "questions are private"
    with start(tmp_path) as terminal:  # tomorrow
        terminal.read_until("> ")
        terminal.type("\x1b[A" * len(lines) + "\r")
        assert "WHY IS IT? INDEED" in terminal.read_until("\n> ")
        terminal.type(":quit\r")
        assert terminal.read_to_end()[1] == 0


@pytest.mark.slow
def test_questions_are_remembered_where_only_answers_are_redirected(tmp_path):
    file = tmp_path / "selfrag_jax" / "ask_history"
    file.parent.mkdir()
    file.write_text("yesterday?\n")
    file.chmod(0o644)
    command = ["sh", "-c", f"exec '{sys.executable}' '{SHOUTING}' > answers"]
    environment = {"XDG_STATE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    with PseudoTerminal(command, tmp_path, **environment) as terminal:
        for line in ("tea?\r", "tea?\r", "milk?\r", "\x04"):
            terminal.read_until("> ")
            terminal.type(line)
        assert terminal.read_to_end()[1] == 0
    assert (tmp_path / "answers").read_text().count("INDEED") == 2 * 3  # the answer, the table
    assert [*dict.fromkeys(file.read_text().splitlines())] == ["yesterday?", "tea?", "milk?"]
    assert file.stat().st_mode & 0o077 == 0


@pytest.mark.slow
def test_the_prompt_answers_with_a_real_model(quickstart):
    workdir, _ = quickstart
    command = [sys.executable, "-m", "selfrag_jax", "ask", f"--workdir={workdir}"]
    with PseudoTerminal(command, workdir.parent, XDG_STATE_HOME=str(workdir.parent)) as terminal:
        assert "index of " in terminal.read_until("> ")
        question = "What does Silverlight Waltz praise?\r"
        terminal.type(question)
        first = terminal.read_until("\n> ")
        assert "p(retrieve) = " in first
        terminal.type(question)
        terminal.read_until(question.strip())
        terminal.type("\x03")  # stops it, or comes too late
        terminal.read_until("\n> ")
        terminal.type(question)
        assert terminal.read_until("\n> ") == first
        terminal.type("\x04")
        assert terminal.read_to_end()[1] == 0
