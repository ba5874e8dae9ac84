"""What is shown while one waits: bars, a status line, and how long each part of the work took.

Bars are tqdm's: a bar on a terminal, a widget in a notebook, and elsewhere a line every few seconds at most.
Log lines and warnings are written above a bar, never into it.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from contextvars import ContextVar
from typing import Any, TextIO

from softprompt.errors import line

SECONDS_BETWEEN_LINES = 5.0
"""Seconds between two lines where there is no terminal; what ends sooner shows none."""

_LINE = "{n_fmt}/{total_fmt} {unit}s [{elapsed}<{remaining}{postfix}]"
_silent: ContextVar[bool] = ContextVar("silent", default=False)
_within: ContextVar[int] = ContextVar("within", default=0)
_parts: ContextVar[dict[str, float] | None] = ContextVar("parts", default=None)


def silence(*, silent: bool) -> None:
    """Show no bars and no status lines in this context from now on, or show them again."""
    _silent.set(silent)


@contextmanager
def timed(*, silent: bool) -> Iterator[dict[str, float]]:
    """Yield a mapping that gets the seconds of each part of the work inside, as ``phase`` names it."""
    parts: dict[str, float] = {}
    tokens = _parts.set(parts), _silent.set(silent or _silent.get())
    try:
        yield parts
    finally:
        _parts.reset(tokens[0])
        _silent.reset(tokens[1])


@contextmanager
def phase(part: str, doing: str) -> Iterator[None]:
    """Say what is being done, such as ``loading demo``, and count its seconds for ``timed``.

    Elsewhere than on a terminal it is a line, of what takes longer than the time between two. Within another phase,
    or while a bar is shown, it is part of that.
    """
    if _within.get():
        yield
        return
    started, parts = time.perf_counter(), _parts.get()
    doing, terminal = f"{line(doing)} ...", sys.stderr.isatty()
    later = threading.Timer(SECONDS_BETWEEN_LINES, print, (doing,), {"file": sys.stderr, "flush": True})
    later.daemon = True
    if not terminal and not _silent.get():
        later.start()
    status = {"bar_format": "{desc}", "desc": doing, "leave": False}
    with _on_terminal(status) if terminal and not _silent.get() else _once():
        try:
            yield
        finally:
            later.cancel()
            if parts is not None:
                parts[part] = parts.get(part, 0.0) + time.perf_counter() - started


@contextmanager
def progress_bar(
    total: int, unit: str, *, done: int = 0, silent: bool = False, delay: float = 0.0
) -> Iterator[Any]:
    """Yield a bar of tqdm: ``update`` counts one, ``set_postfix_str`` says more.

    Args:
        total: What there is to do, in units.
        unit: Name of one, such as ``row``.
        done: Units done before.
        silent: Show nothing.
        delay: Seconds after which it appears; one that waits is gone when it ends.
    """
    from tqdm.asyncio import tqdm
    from tqdm.auto import tqdm as fitting

    silent = silent or _silent.get()
    options: dict[str, Any] = {"total": total, "initial": done, "unit": unit, "disable": silent}
    options |= {"delay": delay, "leave": False} if delay else {}
    if sys.stderr.isatty() and fitting is tqdm and not silent:
        with _on_terminal(options) as shown:
            yield shown
        return
    if fitting is tqdm:  # neither in a terminal nor in a notebook
        wait = {"mininterval": SECONDS_BETWEEN_LINES, "delay": SECONDS_BETWEEN_LINES, "miniters": 1}
        options |= {**wait, "bar_format": _LINE, "file": _Lines(sys.stderr)}
    with _once(), fitting(**options) as shown:
        yield _steady(shown)


@contextmanager
def _once() -> Iterator[None]:
    """Mark that something is shown or counted, so that nothing inside is a second time."""
    _within.set(_within.get() + 1)
    try:
        yield
    finally:
        _within.set(_within.get() - 1)  # bars side by side end in any order


@contextmanager
def _on_terminal(options: dict[str, Any]) -> Iterator[Any]:
    """Yield a bar on stderr; what others write there, and loggers to stdout, stands above it."""
    from tqdm import tqdm
    from tqdm.contrib import DummyTqdmFile
    from tqdm.contrib.logging import logging_redirect_tqdm

    known = [logging.root, *logging.root.manager.loggerDict.values()]
    loggers = [each for each in known if isinstance(each, logging.Logger) and _writes_there(each)]
    with (
        _once(),
        tqdm(**options, file=sys.stderr, dynamic_ncols=True) as shown,
        logging_redirect_tqdm(loggers),
        redirect_stderr(DummyTqdmFile(sys.stderr)),
    ):
        yield _steady(shown)


def _steady(shown: Any) -> Any:
    """Let a bar go by a clock that nobody sets back; by the wall's, which is tqdm's, it would stand still."""
    now = time.monotonic()
    vars(shown).update(_time=time.monotonic, start_t=now, last_print_t=now)
    return shown


def _writes_there(logger: logging.Logger) -> bool:
    """Return whether a logger has a handler that holds this very stdout or stderr."""
    streams = [getattr(each, "stream", None) for each in logger.handlers]
    return any(stream is not None and stream in (sys.stdout, sys.stderr) for stream in streams)


class _Lines:
    """Takes what a bar draws and writes each state as a line of its own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last = ""

    def write(self, drawn: str) -> None:
        """Write one state that is not the last one, without what wipes an earlier one."""
        if drawn.strip() not in ("", self._last):
            self._last = drawn.strip()
            self._stream.write(self._last + "\n")

    def flush(self) -> None:
        """Flush."""
        self._stream.flush()
