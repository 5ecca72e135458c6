"""Progress: the time left counts remaining work only, and earlier work does not raise the rate."""

import io

import pytest

from selfrag_jax import progress as module
from selfrag_jax.progress import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that advances only by `clock.now += seconds`."""

    class Clock:
        now = 0.0

    monkeypatch.setattr(module.time, "monotonic", lambda: Clock.now)
    return Clock


def redirect_stderr(monkeypatch, out):
    monkeypatch.setattr(module.sys, "stderr", out)
    return out


def test_a_terminal_shows_a_bar_and_the_time_left(clock, monkeypatch):
    terminal = redirect_stderr(monkeypatch, Terminal())
    with progress("answer", 100, "questions") as bar:
        clock.now += 10
        bar.advance(25, note="3 skipped")
    drawn, last = terminal.getvalue().split("\r")[1:]
    bar_text = "█" * 6 + "·" * 18
    assert drawn.split() == ["answer", bar_text, *"25/100 questions 0:30 left 3 skipped".split()]
    assert last.split() == "answer 25 questions in 0:10 3 skipped".split()


def test_a_log_gets_a_line_every_15_seconds(clock, monkeypatch):
    log = redirect_stderr(monkeypatch, io.StringIO())
    with progress("train", 1000, "steps") as bar:
        for _ in range(40):
            clock.now += 1
            bar.advance()
    *lines, last = log.getvalue().splitlines()
    assert [line.split()[2] for line in lines] == ["15/1000", "30/1000"]
    assert "\r" not in log.getvalue()
    assert last.split() == "train 40 steps in 0:40".split()


def test_work_done_before_does_not_count_towards_the_rate(clock, monkeypatch):
    terminal = redirect_stderr(monkeypatch, Terminal())
    with progress("train", 100, "steps", done=80) as bar:
        clock.now += 10
        bar.advance(10)  # one per second: ten seconds are left
    assert "90/100 steps  0:10 left" in terminal.getvalue()


def test_skipped_work_does_not_count_towards_the_rate(clock, monkeypatch):
    terminal = redirect_stderr(monkeypatch, Terminal())
    with progress("label", 100, "rows") as bar:
        bar.skip(80)
        clock.now += 10
        bar.advance(10)
    assert "90/100 rows  0:10 left" in terminal.getvalue()


def test_only_one_of_several_processes_reports(clock, monkeypatch):
    log = redirect_stderr(monkeypatch, io.StringIO())
    with progress("train", 100, "steps", shown=False) as bar:
        clock.now += 20
        bar.advance(50)
    assert bar.done == 50 and log.getvalue() == ""


def test_no_work_and_long_times_are_printed(clock, monkeypatch):
    terminal = redirect_stderr(monkeypatch, Terminal())
    with progress("label", 0, "rows") as bar:
        clock.now += 4000
        bar.advance(0)
    assert "0/0 rows" in terminal.getvalue()
    assert terminal.getvalue().rstrip().endswith("in 1:06:40")
