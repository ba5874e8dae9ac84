"""The text of an answer while it grows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from softprompt.inference.stopping import INCOMPLETE, Decode, StopSequences

_WINDOW = 24
"""Tokens that are decoded again with each new one, at least; enough for any character or joined word."""


@final
class GrowingText:
    """Decodes an answer token by token and gives its text out in whole characters.

    What may be the start of a stop sequence is held back until it is known not to be one. The
    pieces given out together are exactly the answer's text.
    """

    def __init__(self, decode: Decode, stops: StopSequences) -> None:
        self._decode = decode
        self._stops = stops
        self._text = ""
        self._given = 0
        self._start = 0  # first token of the window
        self._before = ""  # the text when the window was set
        self._overlap = ""  # what of it the window's tokens gave by themselves
        self.stop_start: int | None = None

    @property
    def answer(self) -> str:
        """The answer's text so far, without the stop sequence that ended it."""
        return self._text if self.stop_start is None else self._text[: self.stop_start]

    def add(self, tokens: Sequence[int]) -> bool:
        """Decode an answer that has one more token, and tell whether a stop sequence ends it."""
        before, self._text = self._text, self._decoded(tokens)
        if self._stops.texts:
            self.stop_start = self._stops.completed(len(tokens), self._text, before)
        return self.stop_start is not None

    def settle(self, tokens: Sequence[int]) -> None:
        """Decode a finished answer whole."""
        self._text = self._decode(tokens)

    def _decoded(self, tokens: Sequence[int]) -> str:
        """Return the text of all tokens by decoding the last of them."""
        window = self._decode(tokens[self._start :])
        if not window.startswith(self._overlap):
            self._start, self._before, self._overlap = 0, "", ""
            return self._decode(tokens)
        text = self._before + window[len(self._overlap) :]
        if len(tokens) - self._start >= 2 * _WINDOW and not text.endswith(INCOMPLETE):
            self._start = len(tokens) - _WINDOW
            self._before = self._decode(tokens)
            self._overlap = self._decode(tokens[self._start :])
            return self._before
        return text

    def new(self, *, ended: bool) -> str:
        """Return the text that was not given out yet and may be."""
        text = self.answer
        end = len(text) if ended else len(text.rstrip(INCOMPLETE))
        if not ended:
            end -= self._may_be_stop(text[:end])
        piece = text[self._given : end]
        self._given = max(self._given, end)
        return piece

    def _may_be_stop(self, text: str) -> int:
        """Return how many characters at the end of a text may begin a stop sequence."""
        longest = max((len(stop) - 1 for stop in self._stops.texts), default=0)
        for count in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-count:]) for stop in self._stops.texts):
                return count
        return 0
