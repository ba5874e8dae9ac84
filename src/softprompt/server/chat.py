"""``POST /v1/chat/completions``, where the base's tokenizer has a chat template."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from softprompt.inference import EchoEvent, TokenEvent
from softprompt.server.asked import asked_chat
from softprompt.server.completions import answered, check_rows
from softprompt.server.replies import ChatCompletion, Choice, Reply, Scores
from softprompt.server.run import Run
from softprompt.server.service import USER, Service, in_thread, service_of
from softprompt.server.shapes import ChatBody
from softprompt.server.streaming import STREAMED, EventStream

router = APIRouter(tags=["generation"], dependencies=[USER])

_TOKENS = 128
"""Most tokens of an answer when a client does not say, and no prompt has a limit on record."""


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=STREAMED)
async def chat(body: ChatBody, request: Request) -> Response:
    """Answer a conversation, ``n`` times."""
    service = service_of(request)
    served = await service.served(body.model, body.task)
    most = served.manifest.max_target_length if served.manifest else _TOKENS
    seconds = service.settings.request_seconds
    asked = await in_thread(asked_chat, body, served, seconds, most)
    check_rows(service, body.n or 1)
    reply = Reply.of(asked, "chatcmpl", "chat.completion")
    run = service.run(served, asked.requests)
    if body.stream:
        return EventStream(run, _pieces(service, body, reply, run))
    return await answered(request, reply, run, lambda each: _whole(service, body, each))


def _whole(service: Service, body: ChatBody, choice: Choice) -> dict[str, Any]:
    return {
        "index": choice.index,
        "message": {"role": "assistant", "content": choice.text},
        "logprobs": choice.scores.chat(service.tokens) if body.logprobs else None,
        "finish_reason": choice.reason,
        "seed": choice.seed,
    }


async def _pieces(
    service: Service, body: ChatBody, reply: Reply, run: Run
) -> AsyncGenerator[dict[str, Any]]:
    """Yield an answer's chunks: the role, every token's text, the end, and the usage where wanted."""
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    head = {**reply.head, "object": "chat.completion.chunk"}

    def chunk(
        choice: Choice, delta: dict[str, str], scores: Scores | None, reason: str | None
    ) -> dict[str, Any]:
        told = scores.chat(service.tokens) if scores is not None and body.logprobs else None
        own = {
            "index": choice.index,
            "delta": delta,
            "logprobs": told,
            "finish_reason": reason,
            "seed": choice.seed,
        }
        return {**head, "choices": [own], **({"usage": None} if with_usage else {})}

    for choice in reply.choices:
        yield chunk(choice, {"role": "assistant", "content": ""}, None, None)
    async with aclosing(run.events()) as events:
        async for number, event in events:
            reply.take(number, event)
            for choice in reply.choices_of(number, event):
                if isinstance(event, TokenEvent):
                    if event.text or body.logprobs:
                        scores = Scores()
                        scores.take(event)
                        yield chunk(choice, {"content": event.text}, scores, None)
                elif not isinstance(event, EchoEvent):
                    yield chunk(choice, {}, None, choice.reason)
    if with_usage:
        yield {**head, "choices": [], "usage": reply.usage()}
