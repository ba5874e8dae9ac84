"""``POST /v1/chat/completions``, for tokenizers that have a chat template."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from starlette.responses import Response

from softprompt.errors import ConfigError
from softprompt.generation import EchoEvent, Input, Request, TokenEvent
from softprompt.prompts import Placement
from softprompt.server.completions import answered, check_rows
from softprompt.server.parameters import MOST_TOKENS, SamplingBody, Text, Whole, options_of
from softprompt.server.replies import Choice, Reply, Scores, Submission, Usage
from softprompt.server.served import Served
from softprompt.server.service import USER, Service, in_thread, service_of
from softprompt.server.streaming import STREAMED, EventStream, Run

router = APIRouter(tags=["generation"], dependencies=[USER])

_TOKENS = 128
"""Default maximum of new tokens where no prompt's record has a limit."""


_PLACEHOLDER = "SYSTEMTURN"
"""Placeholder for the prompt while the template is rendered, as in training."""


class TextPart(BaseModel):
    """A text part of a message."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Annotated[str, StringConstraints(pattern="^[a-z_]{1,32}$")]
    content: Text | list[TextPart]
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

    messages: Annotated[list[Message], Field(min_length=1)]
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


class ChatCompletion(BaseModel):
    """The response of ``POST /v1/chat/completions``."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=STREAMED)
async def chat(body: ChatBody, request: HTTPRequest) -> Response:
    """Answer a chat, ``n`` times."""
    service = service_of(request)
    served = await service.served(body.model, body.task)
    most = served.manifest.max_target_length if served.manifest else _TOKENS
    seconds = service.settings.request_seconds
    submission = await in_thread(chat_submission, body, served, seconds, most)
    check_rows(service, body.n or 1)
    reply = Reply.of(submission, "chatcmpl", "chat.completion")
    run = service.start(served, submission.requests)
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
    """Yield the chunks of a stream: role, each token's text, finish reasons, and usage if requested."""
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    head = {**reply.head, "object": "chat.completion.chunk"}

    def chunk(
        choice: Choice, delta: dict[str, str], scores: Scores | None, reason: str | None
    ) -> dict[str, Any]:
        logprobs = scores.chat(service.tokens) if scores is not None and body.logprobs else None
        own = {
            "index": choice.index,
            "delta": delta,
            "logprobs": logprobs,
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


def chat_submission(body: ChatBody, served: Served, seconds: float, most: int) -> Submission:
    """Return a chat body's request to the batcher; ``most`` is the default of ``max_tokens``.

    Raises:
        ConfigError: Settings contradict each other, or there is no chat template for this.
    """
    if body.max_tokens and body.max_completion_tokens:
        raise ConfigError("max_tokens and max_completion_tokens are the same thing; send one")
    if body.top_logprobs is not None and not body.logprobs:
        raise ConfigError("top_logprobs needs logprobs=true")
    given = chat_input(served, [message.plain() for message in body.messages])
    options = options_of(body, body.max_completion_tokens or body.max_tokens or most, seconds)
    request = Request(
        ids=given.ids,
        prompt=served.prompt,
        at=given.at,
        options=options,
        n=body.n or 1,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        decode=given.decode,
    )
    return Submission(served, (given,), (request,))


def chat_input(served: Served, messages: Sequence[Mapping[str, Any]]) -> Input:
    """Render messages with the tokenizer's chat template and return the tokens.

    Raises:
        ConfigError: There is no chat template, or it or the prompt does not support these messages.
    """
    tokenizer: Any = served.plain.tokenizer
    if not tokenizer.chat_template:
        raise ConfigError("this base model has no chat template; send the text to /v1/completions")
    in_system = served.rows is not None and served.rows.placement is Placement.CHAT_SYSTEM
    if in_system:
        if messages[0]["role"] == "system":
            raise ConfigError(
                f"the prompt {served.name!r} stands in the system turn; leave the system message out"
            )
        messages = [{"role": "system", "content": _PLACEHOLDER}, *messages]
    try:
        text = str(
            tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        )
    except Exception as cause:  # templates raise any exception
        first = (str(cause).splitlines() or [type(cause).__name__])[0]
        raise ConfigError(f"the chat template refuses these messages: {first}") from cause
    if not in_system:
        return served.of_ids(served.plain.bare_ids([text])[0])
    head, found, tail = text.partition(_PLACEHOLDER)
    if not found:
        raise ConfigError("the chat template of this base model prints no system turn")
    before, behind = served.plain.bare_ids([head, tail])
    return Input(before + behind, len(before), served.plain.decode)
