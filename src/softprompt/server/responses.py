"""``POST /v1/responses``, OpenAI's newer interface: text in, text out, whole or as events; nothing is stored."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from itertools import count
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field, StringConstraints
from starlette.responses import Response

from softprompt.errors import ConfigError
from softprompt.generation import Input, Request, TokenEvent
from softprompt.server.bodies import BodyRoute, in_turn
from softprompt.server.chat import DEFAULT_TOKENS, chat_input
from softprompt.server.protocol import (
    MOST_TOKENS,
    Choice,
    Choices,
    Items,
    JsonSchema,
    Part,
    Reply,
    ResponseFormat,
    SamplingBody,
    Several,
    Submission,
    Text,
    Whole,
    options_of,
)
from softprompt.server.service import (
    CLIENT_GONE,
    STREAMED,
    USER,
    EventStream,
    Run,
    service_of,
    unless_gone,
)
from softprompt.server.unserved import OF_ITEM, OF_PART, PARAMETERS, RESPONSES, Neutral

if TYPE_CHECKING:
    from softprompt.server.served import Served

router = APIRouter(tags=["generation"], dependencies=[USER], route_class=BodyRoute)


class ItemPart(Part):
    """A text part of a message, as sent or as answered before."""

    neutral: ClassVar[Neutral] = {**OF_PART, "annotations": None, "logprobs": None}

    type: Literal["input_text", "output_text", "text"]
    text: Text


class Item(Part):
    """A message of the input."""

    neutral: ClassVar[Neutral] = OF_ITEM

    type: Literal["message"] = "message"
    role: Annotated[str, StringConstraints(pattern="^[a-z_]{1,32}$")]
    content: Text | Items[ItemPart]

    def plain(self) -> dict[str, str]:
        """Return the message as chat templates expect it."""
        content = self.content
        return {
            "role": self.role,
            "content": content if isinstance(content, str) else "".join(part.text for part in content),
        }


class TextFormat(Part):
    """The form of the answer under the names of this interface."""

    neutral: ClassVar[Neutral] = {"strict": None, "description": None, "name": None}

    type: Literal["text", "json_object", "json_schema", "choice", "regex"]
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    choices: Choices | None = None
    regex: Text | None = None

    def format(self) -> ResponseFormat:
        """Return it under the names of the other interfaces."""
        schema = None if self.schema_ is None else JsonSchema(schema=self.schema_)
        return ResponseFormat(type=self.type, json_schema=schema, choices=self.choices, regex=self.regex)


class TextConfig(Part):
    """What the answer is like."""

    neutral: ClassVar[Neutral] = {"verbosity": ("medium",)}

    format: TextFormat | None = None


class ResponsesBody(SamplingBody):
    """The body of ``POST /v1/responses``."""

    neutral: ClassVar[Neutral] = {**PARAMETERS, **RESPONSES}
    expects: ClassVar[Mapping[str, str]] = {
        "input": "a text, or a list of messages, each with its role and content"
    }

    input: Text | Several[Item]
    instructions: Text | None = Field(None, description="The system turn of the chat.")
    max_output_tokens: Whole | None = Field(None, ge=1, le=MOST_TOKENS)
    text: TextConfig | None = None


class ResponseObject(BaseModel):
    """The response of ``POST /v1/responses``."""

    id: str
    object: str
    created_at: int
    status: str
    model: str
    output: list[dict[str, Any]]
    usage: dict[str, Any] | None
    incomplete_details: dict[str, str] | None
    system_fingerprint: str


@router.post("/v1/responses", response_model=ResponseObject, responses=STREAMED)
async def respond(body: ResponsesBody, request: HTTPRequest) -> Response:
    """Answer a text, or a chat, once."""
    service = service_of(request)
    served = await service.served(body.model, body.task)
    submission = await in_turn(request, _submission, body, served, service.settings.request_seconds)
    if served.plain.tokenizer.chat_template:
        service.note_chat(served)
    reply = Reply.of(submission, body, "resp", "response")
    run = service.start(served, submission.requests)
    if body.stream:
        return EventStream(run, _events(body, reply, run))
    whole = await unless_gone(request, _whole(body, reply, run), run.cancel)
    return Response(status_code=CLIENT_GONE) if whole is None else JSONResponse(whole)


def _submission(body: ResponsesBody, served: Served, seconds: float) -> Submission:
    if (body.n or 1) > 1:
        raise ConfigError("n is 1 here; ask /v1/chat/completions for several answers")
    if body.text and body.text.format:
        if body.response_format:
            raise ConfigError("text.format and response_format are the same thing; send one")
        body = body.model_copy(update={"response_format": body.text.format.format()})
    given = _input(body, served)
    most = served.manifest.max_target_length if served.manifest else DEFAULT_TOKENS
    options = options_of(body, served, body.max_output_tokens or most, seconds)
    return Submission(served, (given,), (Request.of(given, served.prompt, options=options),))


def _input(body: ResponsesBody, served: Served) -> Input:
    """Return a chat's tokens; of a base without a chat template those of one text as the prompt puts it."""
    texts = body.input if isinstance(body.input, list) else [Item(role="user", content=body.input)]
    messages = [each.plain() for each in texts]
    if not served.plain.tokenizer.chat_template:
        if body.instructions or len(messages) > 1:
            raise ConfigError("this base model has no chat template; send one text as input, and no instructions")
        return served.of_fields(messages[0]["content"])
    if body.instructions:
        messages = [{"role": "system", "content": body.instructions}, *messages]
    return chat_input(served, messages)


def _message(reply: Reply, choice: Choice, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
    name = str(reply.head["id"]).replace("resp-", "msg_")
    return {"id": name, "type": "message", "role": "assistant", "status": status, "content": content}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _response(body: ResponsesBody, reply: Reply, choice: Choice | None) -> dict[str, Any]:
    """Return a response; without a choice the one that is still being made."""
    head = {name: value for name, value in reply.head.items() if name not in ("id", "created")}
    cut = choice is not None and choice.reason != "stop"
    status = "in_progress" if choice is None else "incomplete" if cut else "completed"
    why = {"length": "max_output_tokens"}.get(choice.reason, choice.reason) if choice and cut else None
    usage = reply.usage()
    text = body.text.model_dump(exclude_none=True, by_alias=True) if body.text else {"format": {"type": "text"}}
    return {
        **head,
        "id": str(reply.head["id"]).replace("resp-", "resp_"),
        "object": reply.kind,
        "created_at": reply.head["created"],
        "status": status,
        "error": None,
        "incomplete_details": why and {"reason": why},
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "output": [] if choice is None else [_message(reply, choice, status, [_part(choice.text)])],
        "parallel_tool_calls": False,
        "previous_response_id": None,
        "seed": choice and choice.seed,
        "store": False,
        "temperature": body.temperature,
        "text": text,
        "tool_choice": "none",
        "tools": [],
        "top_p": body.top_p,
        "truncation": "disabled",
        "usage": choice
        and {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
            "virtual_tokens": usage["virtual_tokens"],
        },
    }


async def _whole(body: ResponsesBody, reply: Reply, run: Run) -> dict[str, Any]:
    """Return the response that the last event holds."""
    async with aclosing(_events(body, reply, run)) as events:
        *_, last = [event async for event in events]
    return dict(last["response"])


async def _events(body: ResponsesBody, reply: Reply, run: Run) -> AsyncGenerator[Mapping[str, Any]]:
    """Yield the events of a streamed response, in OpenAI's order, each with its number."""
    numbers, (choice,) = count(), reply.choices

    def event(kind: str, **more: Any) -> dict[str, Any]:
        return {"type": f"response.{kind}", "sequence_number": next(numbers), **more}

    begun = _message(reply, choice, "in_progress", [])
    item, part = {"output_index": 0}, {"item_id": begun["id"], "output_index": 0, "content_index": 0}
    for kind in ("created", "in_progress"):
        yield event(kind, response=_response(body, reply, None))
    yield event("output_item.added", **item, item=begun)
    yield event("content_part.added", **part, part=_part(""))
    async with aclosing(run.events()) as events:
        async for number, each in events:
            reply.take(number, each)
            if isinstance(each, TokenEvent) and each.text:
                yield event("output_text.delta", **part, delta=each.text, logprobs=[])
    whole = _response(body, reply, choice)
    yield event("output_text.done", **part, text=choice.text, logprobs=[])
    yield event("content_part.done", **part, part=_part(choice.text))
    yield event("output_item.done", **item, item=whole["output"][0])
    yield event(whole["status"], response=whole)
