"""Progress: the time left is that of the work still to do, and what an earlier run did does not count as fast work."""

import io

import pytest

from selfrag_jax import progress as module
from selfrag_jax.progress import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Time stands still but for `clock.now += seconds`."""

    class Clock:
        now = 0.0

    monkeypatch.setattr(module.time, "monotonic", lambda: Clock.now)
    return Clock


def test_a_terminal_sees_a_bar_and_the_time_left(clock, monkeypatch):
    out = Terminal()
    monkeypatch.setattr(module.sys, "stderr", out)
    with progress("answer", 100, "questions") as bar:
        clock.now += 10
        bar.advance(25, note="3 skipped")
    drawn, last = out.getvalue().split("\r")[1:]
    assert drawn.split() == [
        "answer",
        "█" * 6 + "·" * 18,
        "25/100",
        "questions",
        "0:30",
        "left",
        "3",
        "skipped",
    ]
    assert last.split() == ["answer", "25", "questions", "in", "0:10", "3", "skipped"]


def test_a_log_gets_a_line_now_and_then(clock, monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(module.sys, "stderr", out)
    with progress("train", 1000, "steps") as bar:
        for _ in range(40):
            clock.now += 1
            bar.advance()
    lines = out.getvalue().splitlines()
    assert [line.split()[2] for line in lines[:-1]] == [
        "15/1000",
        "30/1000",
    ] and "\r" not in out.getvalue()
    assert lines[-1].split() == ["train", "40", "steps", "in", "0:40"]


def test_work_of_an_earlier_run_is_no_rate(clock, monkeypatch):
    out = Terminal()
    monkeypatch.setattr(module.sys, "stderr", out)
    with progress("train", 100, "steps", done=80) as bar:
        clock.now += 10
        bar.advance(10)  # one a second: ten are left
    assert "90/100 steps  0:10 left" in out.getvalue()


def test_of_several_processes_one_reports(clock, monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(module.sys, "stderr", out)
    with progress("train", 100, "steps", shown=False) as bar:
        clock.now += 20
        bar.advance(50)
    assert bar.done == 50 and out.getvalue() == ""


def test_nothing_to_do_and_long_times(clock, monkeypatch):
    out = Terminal()
    monkeypatch.setattr(module.sys, "stderr", out)
    with progress("label", 0, "rows") as bar:
        clock.now += 4000
        bar.advance(0)
    assert "0/0 rows" in out.getvalue() and out.getvalue().rstrip().endswith("in 1:06:40")
