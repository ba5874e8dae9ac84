"""What commands that answer are asked: lines of stdin, or records; and the processes that answer them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from softprompt.cli.options import say
from softprompt.errors import UsageError, line
from softprompt.world import world

if TYPE_CHECKING:
    from softprompt.inference import Fields, TunedPrompt

T = TypeVar("T")


def records_of(data: str, tuned: TunedPrompt) -> dict[int, Fields]:
    """Return what each record of a data file asks, by its number; the columns are those of the prompt's tuning."""
    from softprompt.data import read_records

    columns = {name: tuned.manifest.settings.get(name) for name in ("input_field", "output_field")}
    found: dict[int, Fields] = {}
    for number, record in enumerate(read_records(data, **columns, require_target=False), start=1):
        chat = record.chat.asked() if record.chat and tuned.manifest.chat else None
        found[number] = record.fields if chat is None else {"messages": chat.messages, "tools": chat.tools}
    return found


def recorded_data(prompt_dir: str, option: str = "--data", *names: str) -> str | None:
    """Return the first records that a prompt's run file names, where they still are and may be read unasked.

    A distilled prompt has none: its records are the questions beside it.

    A stranger may have written the file, as it came with the prompt: only what lies in the working directory is
    read, and in the prompt's own folder no link that leads out of it.
    """
    from softprompt.distillation import HELD_OUT_NAME, QUESTIONS_NAME
    from softprompt.training import RUN_FILE, read_run

    folder = Path(prompt_dir)
    beside = {"validation_data": str(folder / HELD_OUT_NAME), "train_data": str(folder / QUESTIONS_NAME)}
    run = read_run(folder / RUN_FILE) if (folder / RUN_FILE).is_file() else beside
    for name in names or ("validation_data", "train_data"):
        recorded = run.get(name)
        path = os.path.normpath(recorded) if isinstance(recorded, str) else ""  # behind a link ".." is elsewhere
        if not path or not os.path.exists(path):
            continue
        found = Path(os.path.abspath(path))
        own = found.is_relative_to(os.path.abspath(folder))
        if found.is_relative_to(Path.cwd()) and (not own or found.resolve().is_relative_to(folder.resolve())):
            return path
        where = "is not read unasked outside the working directory"
        say(line(f"the {name} of {folder}, {path}, {where}: {option} names it"))
    return None


def shared_out(tuned: TunedPrompt, inputs: Sequence[Fields], answer: Callable[[Any], Sequence[T]]) -> list[T]:
    """Return the answers to inputs, of which each process of a launcher gives its share.

    Each reads all of them first, so that an error has the number of an input among all.
    """
    if world().size > 1:
        tuned.sources(inputs)
    return world().split(inputs, answer)


def stdin_lines() -> dict[int, str]:
    """Return the lines of stdin that are not blank, by their numbers; of several processes the first reads them.

    Raises:
        UsageError: stdin is a terminal, empty, or not UTF-8.
    """
    return world().from_main(_stdin_lines)


def _stdin_lines() -> dict[int, str]:
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
