"""Asking from an event loop, whose callers may go away at any moment."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

Asked = TypeVar("Asked")


async def asked_in_thread(
    ask: Callable[[], list[Asked]], cancel: Callable[[Asked], object]
) -> list[Asked]:
    """Run ``ask``, which may block, in a thread, and return what it asked for.

    A caller who is cancelled meanwhile leaves nothing running: what the thread asks for all the same
    is cancelled, by whichever of the two is later.
    """
    gone = threading.Event()
    found: list[Asked] = []

    def run() -> None:
        found.extend(ask())
        if gone.is_set():
            undo()

    def undo() -> None:
        for each in found:
            cancel(each)

    try:
        await asyncio.to_thread(run)
    except asyncio.CancelledError:
        gone.set()
        undo()
        raise
    return found
