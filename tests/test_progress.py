"""Bars, status lines and seconds, on stand-ins for a terminal, a log file and a notebook."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
import termios
import time

import tqdm.auto
import tqdm.std

from softprompt import progress
from softprompt.progress import phase, progress_bar, timed


class Terminal(io.StringIO):
    def isatty(self):
        return True


PROGRAM = """
import logging, sys, warnings
from softprompt.progress import progress_bar
logging.basicConfig(format="%(message)s")
with progress_bar(3, "update") as shown:
    shown.update()
    warnings.warn("take care", stacklevel=1)
    logging.warning("from a logger")
    print("half ", end="", file=sys.stderr)
    print("a line", file=sys.stderr)
    shown.update(2)
print("behind", file=sys.stderr)
"""


def drawn(text):
    """Return what stood on the lines of a terminal, one after the other."""
    return [part.strip() for line in text.split("\n") for part in line.split("\r") if part.strip()]


def test_warnings_and_log_lines_stand_above_the_bar():
    """On a real terminal, of which this test holds the other end."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    with os.fdopen(ours, "rb") as screen, os.fdopen(theirs, "wb") as stderr:
        subprocess.run([sys.executable, "-c", PROGRAM], stderr=stderr, check=True)
        lines = drawn(os.read(screen.fileno(), 1 << 16).decode())
    messages = [line for line in lines if "/3 [" not in line and "warnings.warn" not in line]
    assert messages == ["<string>:7: UserWarning: take care", "from a logger", "half a line", "behind"]
    assert any(line.startswith("100%") and "3/3 [" in line for line in lines)


def test_elsewhere_there_is_a_line_every_few_seconds_at_most(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar(100, "update") as shown:
        for _ in range(100):
            shown.update()
    assert stream.getvalue() == ""  # it took less
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.05)
    with progress_bar(40, "update") as shown:
        for _ in range(40):
            time.sleep(0.01)
            shown.update()
            shown.set_postfix_str("loss 1.5", refresh=False)
    lines = stream.getvalue().splitlines()
    assert 2 <= len(lines) <= 10
    assert lines[-1].startswith("40/40 updates [")
    assert all("loss 1.5" in line and "\r" not in line for line in lines)


def test_a_notebook_gets_its_widget_and_silence_nothing(monkeypatch):
    made = []

    class Widget(tqdm.std.tqdm):
        def __init__(self, *args, **options):
            made.append(options)
            super().__init__(*args, **options, file=io.StringIO())

    monkeypatch.setattr(tqdm.auto, "tqdm", Widget)
    with progress_bar(2, "row") as shown:
        shown.update()
    with progress_bar(2, "row", silent=True):
        pass
    assert [options["disable"] for options in made] == [False, True]


def test_a_phase_says_what_it_does_and_is_counted_once(monkeypatch):
    terminal, clock = Terminal(), [0.0]
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    with timed(silent=False) as parts:
        with phase("loading", "loading a model"):
            clock[0] += 1.0
            with phase("probing", "probing it"):
                clock[0] += 2.0
        with progress_bar(1, "update"), phase("probing", "in between"):
            clock[0] += 4.0
        with phase("probing", "probing it alone"):
            clock[0] += 8.0
    assert parts == {"loading": 3.0, "probing": 8.0}
    lines = drawn(terminal.getvalue())
    assert "loading a model ..." in lines
    assert "probing it alone ..." in lines
    assert "probing it ..." not in lines
    assert "in between ..." not in lines


def test_elsewhere_a_phase_is_a_line_where_it_takes_long(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with phase("loading", "loading a model"):
        pass
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.01)
    with timed(silent=True), phase("probing", "silent"):
        time.sleep(0.1)
    assert stream.getvalue() == ""
    with phase("probing", "probing it"), phase("loading", "inside"):
        end = time.monotonic() + 10
        while not stream.getvalue() and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.05)
    assert stream.getvalue() == "probing it ...\n"


def test_a_silent_phase_is_counted_alone(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with timed(silent=True) as parts, phase("loading", "loading a model"):
        pass
    assert list(parts) == ["loading"]
    assert terminal.getvalue() == ""


def test_bars_side_by_side_may_end_in_any_order():
    with timed(silent=True) as parts:
        bars = [progress_bar(1, "update") for _ in range(2)]
        for each in bars:
            each.__enter__()
        for each in bars:
            each.__exit__(None, None, None)
        with phase("loading", "loading it"):
            pass
    assert list(parts) == ["loading"]
