"""Lines of stdin as inputs."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from itertools import count

from softprompt.cli.options import say
from softprompt.errors import UsageError


def stdin_lines() -> dict[int, str]:
    """Return the lines of stdin that are not blank, by their numbers.

    Raises:
        UsageError: stdin is a terminal, empty, or not UTF-8.
    """
    if sys.stdin.isatty():
        raise UsageError("nothing to answer: give --text, --data, or lines on stdin")
    lines = dict(enumerate(text_lines(), start=1))
    kept = {number: line for number, line in lines.items() if line.strip()}
    if not kept:
        raise UsageError("nothing to answer: stdin is empty; give --text, --data, or lines on stdin")
    blank = sorted(lines.keys() - kept.keys())
    if blank:
        shown = ", ".join(map(str, blank[:5])) + (", ..." if len(blank) > 5 else "")
        say(f"warning: {len(blank)} blank lines of stdin have no answer: {shown}")
    return kept


def text_lines() -> Iterator[str]:
    """Yield the lines of stdin as they come; raise ``UsageError`` for one that is not UTF-8."""
    return map(_line, _raw_lines(), count(1))


def _raw_lines() -> Iterable[bytes]:
    # In some locales Python would decode bytes that are not UTF-8 to halves of characters.
    buffer = getattr(sys.stdin, "buffer", None)
    return (line.encode(errors="surrogatepass") for line in sys.stdin) if buffer is None else buffer


def _line(raw: bytes, number: int) -> str:
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"stdin is not UTF-8: byte 0x{raw[error.start]:02x} in line {number}; convert the text first"
        ) from error
