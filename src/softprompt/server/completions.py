"""``POST /v1/completions``."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, final

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from softprompt.inference import EchoEvent, FinishEvent, TokenEvent
from softprompt.server.asked import Asked, asked_completion
from softprompt.server.problems import Problem
from softprompt.server.replies import Choice, Completion, Position, Reply, Scores
from softprompt.server.run import Run
from softprompt.server.service import USER, Service, in_thread, service_of
from softprompt.server.shapes import CompletionBody
from softprompt.server.streaming import CLIENT_GONE, STREAMED, EventStream, unless_gone

router = APIRouter(tags=["generation"], dependencies=[USER])


@router.post("/v1/completions", response_model=Completion, responses=STREAMED)
async def complete(body: CompletionBody, request: Request) -> Response:
    """Answer one prompt or several, each ``n`` times."""
    service = service_of(request)
    served = await service.served(body.model, body.task)
    asked = await in_thread(asked_completion, body, served, service.settings.request_seconds)
    check_rows(service, sum(each.n for each in asked.requests))
    reply = Reply.of(asked, "cmpl", "text_completion")
    run = service.run(served, asked.requests)
    if body.stream:
        return EventStream(run, _pieces(service, body, reply, run))
    return await answered(request, reply, run, lambda each: _whole(service, body, asked, each))


def check_rows(service: Service, rows: int) -> None:
    """Refuse a call that asks for too much at once.

    Raises:
        Problem: 400.
    """
    most = service.settings.max_request_rows
    if rows > most:
        raise Problem(400, f"the request asks for {rows} answers, this server gives {most} at once")


async def answered(
    request: Request, reply: Reply, run: Run, shown: Callable[[Choice], dict[str, Any]]
) -> Response:
    """Wait for all answers and return them together, each as it is shown."""
    done = await unless_gone(request, _gathered(reply, run), run.cancel)
    if done is None:
        return Response(status_code=CLIENT_GONE)
    return JSONResponse(done.whole([shown(choice) for choice in done.choices]))


async def _gathered(reply: Reply, run: Run) -> Reply:
    async with aclosing(run.events()) as events:
        async for number, event in events:
            reply.take(number, event)
    return reply


def _whole(service: Service, body: CompletionBody, asked: Asked, choice: Choice) -> dict[str, Any]:
    given = asked.inputs[choice.index // (body.n or 1)]
    before = asked.served.plain.decode(given.ids) if body.echo else ""
    scores = None
    if body.logprobs is not None:
        start = Position(0 if body.echo else len(asked.served.plain.decode(given.ids)))
        scores = choice.scores.completion(service.tokens, start, top=body.logprobs > 0)
    return _choice(choice, before + choice.text, scores, choice.reason)


def _choice(
    choice: Choice, text: str, scores: dict[str, Any] | None, reason: str | None
) -> dict[str, Any]:
    return {
        "index": choice.index,
        "text": text,
        "logprobs": scores,
        "finish_reason": reason,
        "seed": choice.seed,
    }


@final
class _Chunks:
    """The chunks of one answer that is streamed."""

    def __init__(self, service: Service, body: CompletionBody, reply: Reply) -> None:
        plain, n = reply.asked.served.plain, body.n or 1
        texts = [plain.decode(given.ids) for given in reply.asked.inputs]
        self.inputs = [texts[choice.index // n] for choice in reply.choices]
        self.usage = body.stream_options is not None and body.stream_options.include_usage
        self._head = {**reply.head, "object": reply.kind}
        self._top = None if body.logprobs is None else body.logprobs > 0
        self._names = service.tokens
        self._places = [Position(0 if body.echo else len(text)) for text in self.inputs]

    def of(
        self,
        choice: Choice,
        text: str = "",
        event: TokenEvent | EchoEvent | None = None,
        reason: str | None = None,
    ) -> dict[str, Any]:
        """Return a chunk that adds a text to an answer, with the scores that an event tells."""
        told = None
        if event is not None and self._top is not None:
            scores = Scores()
            scores.take(event)
            told = scores.completion(self._names, self._places[choice.index], top=self._top)
        return self._with_usage([_choice(choice, text, told, reason)], None)

    def last(self, usage: dict[str, int]) -> dict[str, Any]:
        """Return the chunk that tells the usage."""
        return self._with_usage([], usage)

    def _with_usage(
        self, choices: list[dict[str, Any]], usage: dict[str, int] | None
    ) -> dict[str, Any]:
        return {
            **self._head,
            "choices": choices,
            **({"usage": usage} if self.usage else {}),
        }


async def _pieces(
    service: Service, body: CompletionBody, reply: Reply, run: Run
) -> AsyncGenerator[dict[str, Any]]:
    """Yield an answer's chunks: the echo, every token's text, the end, and the usage where wanted."""
    chunks, scored = _Chunks(service, body, reply), body.logprobs is not None
    if body.echo and not scored:
        for choice in reply.choices:
            yield chunks.of(choice, chunks.inputs[choice.index])
    async with aclosing(run.events()) as events:
        async for number, event in events:
            reply.take(number, event)
            for choice in reply.choices_of(number, event):
                match event:
                    case EchoEvent() if body.echo and scored:
                        yield chunks.of(choice, chunks.inputs[choice.index], event)
                    case TokenEvent() if event.text or scored:
                        yield chunks.of(choice, event.text, event)
                    case FinishEvent():
                        yield chunks.of(choice, reason=choice.reason)
    if body.max_tokens == 0:
        for choice in reply.choices:
            yield chunks.of(choice, reason=choice.reason)
    if chunks.usage:
        yield chunks.last(reply.usage())
