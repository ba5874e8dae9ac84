"""``POST /v1/chat/completions``, for tokenizers that have a chat template."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from pydantic import BaseModel, Field, StringConstraints
from starlette.responses import Response

from softprompt.data import Chat
from softprompt.errors import ConfigError
from softprompt.generation import EchoEvent, Input, Request, TokenEvent
from softprompt.prompts import Placement
from softprompt.server.bodies import BodyRoute, in_turn
from softprompt.server.completions import answered
from softprompt.server.logprobs import Scores
from softprompt.server.protocol import (
    MOST_TOKENS,
    Choice,
    GenerationResponse,
    Items,
    Part,
    Reply,
    SamplingBody,
    Several,
    Submission,
    Text,
    Whole,
    options_of,
)
from softprompt.server.service import STREAMED, USER, EventStream, Run, Service, service_of
from softprompt.server.unserved import OF_MESSAGE, OF_PART, PARAMETERS, Neutral

if TYPE_CHECKING:
    from softprompt.server.served import Served

router = APIRouter(tags=["generation"], dependencies=[USER], route_class=BodyRoute)

DEFAULT_TOKENS = 128
"""Default maximum of new tokens where no prompt's record has a limit."""


class TextPart(Part):
    """A text part of a message."""

    neutral: ClassVar[Neutral] = OF_PART

    type: Literal["text"]
    text: Text


class Message(Part):
    """One message of a chat."""

    neutral: ClassVar[Neutral] = OF_MESSAGE

    role: Annotated[str, StringConstraints(pattern="^[a-z_]{1,32}$")]
    content: Text | Items[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, Any]:
        """Return the message as chat templates expect it."""
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        named = {} if self.name is None else {"name": self.name}
        return {"role": self.role, "content": content, **named}


class ChatBody(SamplingBody):
    """The body of ``POST /v1/chat/completions``."""

    # The chat template prints them.
    neutral: ClassVar[Neutral] = {**PARAMETERS, "add_special_tokens": (False,)}

    messages: Several[Message]
    max_tokens: Whole | None = Field(None, ge=1, le=MOST_TOKENS)
    max_completion_tokens: Whole | None = Field(None, ge=1, le=MOST_TOKENS)
    logprobs: bool | None = False
    top_logprobs: Whole | None = Field(None, ge=0, le=20)


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: dict[str, str]
    logprobs: dict[str, Any] | None
    finish_reason: str
    seed: int | None


class ChatCompletion(GenerationResponse):
    """The response of ``POST /v1/chat/completions``."""

    choices: list[ChatChoice]


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=STREAMED)
async def chat(body: ChatBody, request: HTTPRequest) -> Response:
    """Answer a chat, ``n`` times."""
    service = service_of(request)
    served = await service.served(body.model, body.task)
    most = served.manifest.max_target_length if served.manifest else DEFAULT_TOKENS
    seconds = service.settings.request_seconds
    submission = await in_turn(request, chat_submission, body, served, seconds, most)
    service.note_chat(served)
    reply = Reply.of(submission, body, "chatcmpl", "chat.completion")
    run = service.start(served, submission.requests)
    if body.stream:
        return EventStream(run, _pieces(service, body, reply, run))
    return await answered(request, reply, run, lambda each: _whole(service, body, each))


def _whole(service: Service, body: ChatBody, choice: Choice) -> dict[str, Any]:
    message = {"role": "assistant", "content": choice.text}
    scores = choice.scores.chat(service.tokens) if body.logprobs else None
    return _choice(choice, "message", message, scores, choice.reason)


def _choice(choice: Choice, key: str, value: dict[str, str], scores: Any, reason: str | None) -> dict[str, Any]:
    return {"index": choice.index, key: value, "logprobs": scores, "finish_reason": reason, "seed": choice.seed}


async def _pieces(service: Service, body: ChatBody, reply: Reply, run: Run) -> AsyncGenerator[dict[str, Any]]:
    """Yield the chunks of a stream: role, each token's text, finish reasons, and usage if requested."""
    kind = f"{reply.kind}.chunk"

    def chunk(
        choice: Choice, delta: dict[str, str], event: TokenEvent | None = None, reason: str | None = None
    ) -> dict[str, Any]:
        scores = Scores.of(event).chat(service.tokens) if event and body.logprobs else None
        return reply.chunk(kind, _choice(choice, "delta", delta, scores, reason))

    for choice in reply.choices:
        yield chunk(choice, {"role": "assistant", "content": ""})
    async with aclosing(run.events()) as events:
        async for number, event in events:
            reply.take(number, event)
            for choice in reply.choices_of(number, event):
                if isinstance(event, TokenEvent):
                    if event.text or body.logprobs:
                        yield chunk(choice, {"content": event.text}, event)
                elif not isinstance(event, EchoEvent):
                    yield chunk(choice, {}, reason=choice.reason)
    if reply.reports_usage:
        yield reply.chunk(kind, usage=reply.usage())


def chat_submission(body: ChatBody, served: Served, seconds: float, most: int) -> Submission:
    """Return a chat body's request to the batcher; ``most`` is the default of ``max_tokens``.

    Raises:
        ConfigError: Settings contradict each other, or there is no chat template for this.
    """
    most = body.max_completion_tokens or body.max_tokens or most
    if body.max_tokens not in (None, most):
        raise ConfigError("max_tokens and max_completion_tokens are the same thing; send one")
    if body.top_logprobs and not body.logprobs:
        raise ConfigError("top_logprobs needs logprobs=true")
    given = chat_input(served, [message.plain() for message in body.messages])
    request = Request.of(
        given,
        served.prompt,
        options=options_of(body, served, most, seconds),
        n=body.n or 1,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    return Submission(served, (given,), (request,))


def chat_input(served: Served, messages: Sequence[Mapping[str, Any]]) -> Input:
    """Render messages with the tokenizer's chat template and return the tokens.

    Raises:
        ConfigError: There is no chat template, or it or the prompt does not support these messages.
    """
    if not served.plain.tokenizer.chat_template:
        raise ConfigError("this base model has no chat template; send the text to /v1/completions")
    rows = served.rows or served.plain.answers
    in_system = rows.placement is Placement.CHAT_SYSTEM
    if in_system and rows.chats is None and messages[0]["role"] == "system":
        raise ConfigError(f"the prompt {served.name!r} stands in the system turn; leave the system message out")
    ids, at = rows.chat_template.opening(Chat(tuple(messages)))
    return Input(ids, at, served.plain.decode) if in_system else served.of_ids(ids)
