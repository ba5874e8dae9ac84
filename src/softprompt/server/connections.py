"""The open connections of a uvicorn server: how many, and an end to those that ask nothing.

uvicorn waits for ever for the head of a request, so clients that never send one would fill the
places of those who do.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, final
from weakref import WeakKeyDictionary

import uvicorn


@dataclass(frozen=True, slots=True)
class _Silence:
    """How long a connection has not begun a request.

    Attributes:
        behind: Its last request, None before the first.
        since: When it was first seen so, by ``time.monotonic``.
    """

    behind: Any
    since: float


@final
class Connections:
    """The connections of one server."""

    def __init__(self, server: uvicorn.Server) -> None:
        self._open: set[Any] = server.server_state.connections
        self._silent: WeakKeyDictionary[Any, _Silence] = WeakKeyDictionary()

    @property
    def count(self) -> int:
        """How many are open, idle ones too."""
        return len(self._open)

    def close_silent(self, seconds: float) -> None:
        """Close those whose next request has not begun for so long; uvicorn's own thread calls."""
        now = time.monotonic()
        for each in list(self._open):
            cycle = each.cycle
            if cycle is not None and not cycle.response_complete:
                self._silent.pop(each, None)
                continue
            known = self._silent.get(each)
            if known is None or known.behind is not cycle:
                self._silent[each] = _Silence(cycle, now)
            elif now - known.since > seconds:
                each.transport.close()
