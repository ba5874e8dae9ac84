"""How fast requests leave, to tell those that find the queue full when to come back."""

from __future__ import annotations

import time
from typing import final

_LEAST, _MOST = 1.0, 60.0
_WEIGHT = 0.1
"""Weight of the newest interval in the mean."""


@final
class Pace:
    """Mean seconds between answers that end, recent ones counting most."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._seconds = 0.1

    def note(self, ended: int) -> None:
        """Note that some answers ended now."""
        now = time.monotonic()
        if ended:
            self._seconds += _WEIGHT * ((now - self._last) / ended - self._seconds)
            self._last = now

    def seconds_for(self, waiting: int) -> float:
        """Return after how many seconds half of those who wait are likely to run."""
        return min(_MOST, max(_LEAST, self._seconds * waiting / 2))
