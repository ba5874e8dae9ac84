"""The text of one answer as it comes."""

from __future__ import annotations

import weakref
from collections.abc import AsyncIterator, Iterator

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softprompt.inference.continuous.batcher import Batcher
from softprompt.inference.continuous.events import TokenEvent
from softprompt.inference.continuous.request import Request
from softprompt.inference.continuous.ticket import Ticket


def streamed(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, request: Request
) -> Iterator[str]:
    """Yield the text of a request's answer; what runs it is made at the first piece, and stopped after the last."""
    batcher = Batcher(model, tokenizer)
    try:
        yield from pieces(batcher.submit(request))
    finally:
        batcher.stop()


def pieces(ticket: Ticket) -> Iterator[str]:
    """Yield the text of a ticket's first answer; an iterator that is dropped cancels the request."""
    found = _pieces(ticket)
    # Also one that was never begun, in which no "finally" runs.
    weakref.finalize(found, ticket.cancel).atexit = False
    return found


def async_pieces(ticket: Ticket) -> AsyncIterator[str]:
    """Yield as ``pieces``, without blocking the event loop."""
    found = _async_pieces(ticket)
    weakref.finalize(found, ticket.cancel).atexit = False
    return found


def _pieces(ticket: Ticket) -> Iterator[str]:
    try:
        for event in ticket:
            if isinstance(event, TokenEvent) and event.index == 0 and event.text:
                yield event.text
    finally:
        ticket.cancel()


async def _async_pieces(ticket: Ticket) -> AsyncIterator[str]:
    try:
        async for event in ticket:
            if isinstance(event, TokenEvent) and event.index == 0 and event.text:
                yield event.text
    finally:
        ticket.cancel()
