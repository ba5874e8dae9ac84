"""``POST /v1/completions``: its body, its requests to the batcher, and its answer, whole or streamed."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field, field_validator
from starlette.responses import Response

from softprompt.errors import ConfigError, DataError
from softprompt.generation import (
    EchoEvent,
    Event,
    FinishEvent,
    GenerationOptions,
    Input,
    Labelling,
    Reason,
    Request,
    TokenEvent,
    label_ids_of,
)
from softprompt.server.access_log import tally
from softprompt.server.bodies import BodyRoute, in_turn
from softprompt.server.classify import LabelRun
from softprompt.server.logprobs import Position, Scores
from softprompt.server.protocol import (
    MOST_TOKENS,
    Choice,
    Fields,
    GenerationResponse,
    Reply,
    SamplingBody,
    Several,
    Submission,
    Text,
    TokenIds,
    Whole,
    options_of,
)
from softprompt.server.service import (
    CLIENT_GONE,
    STREAMED,
    USER,
    Answering,
    EventStream,
    Service,
    in_thread,
    service_of,
    unless_gone,
)

if TYPE_CHECKING:
    from softprompt.server.served import Served

router = APIRouter(tags=["generation"], dependencies=[USER], route_class=BodyRoute)


class CompletionBody(SamplingBody):
    """The body of ``POST /v1/completions``."""

    prompt: Text | Several[Text] | TokenIds | Several[TokenIds] | None = Field(
        None, description="The template's input; or token ids, which are used as they are."
    )
    fields: Fields | Several[Fields] | None = Field(
        None, description="Fields of a template that has several; instead of prompt."
    )
    raw: bool = Field(False, description="Leave the template out, and read special tokens in prompt.")
    truncate_input: bool = Field(False, description="Cut an input that is too long for the prompt.")
    max_tokens: Whole | None = Field(16, ge=0, le=MOST_TOKENS)
    echo: bool | None = False
    logprobs: Whole | None = Field(None, ge=0, le=20)

    @field_validator("logprobs", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        """Read false as no log-probabilities, as chats spell it."""
        return None if value is False else value


class TokenLogprobs(BaseModel):
    """Tokens of a completion with their log-probabilities, in nats."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One answer; a sampled one is reproduced by its ``seed``."""

    index: int
    text: str
    logprobs: TokenLogprobs | None
    finish_reason: str
    seed: int | None


class Completion(GenerationResponse):
    """The response of ``POST /v1/completions``."""

    choices: list[CompletionChoice]


@router.post("/v1/completions", response_model=Completion, responses=STREAMED)
async def complete(body: CompletionBody, request: HTTPRequest) -> Response:
    """Complete one prompt or several, each ``n`` times; a classifier that is asked no more answers with a label."""
    service = service_of(request)
    served = await service.served(body.model, body.task)
    seconds = service.settings.request_seconds
    submission = await in_turn(request, completion_submission, body, served, seconds)
    reply = Reply.of(submission, body, "cmpl", "text_completion")
    run: Answering
    if (labelling := await in_thread(label_question, body, submission)) is None:
        run = service.start(served, submission.requests)
    else:
        service.check_answers(submission.requests)
        run = LabelAnswers(await in_thread(LabelRun.start, service, served, labelling), submission)
    if body.stream:
        return EventStream(run, _pieces(service, body, reply, run))
    return await answered(request, reply, run, lambda each: _whole(service, body, submission, each))


async def answered(
    request: HTTPRequest, reply: Reply, run: Answering, shown: Callable[[Choice], dict[str, Any]]
) -> Response:
    """Wait for all answers and return them in one response, each as ``shown`` gives it.

    A client that disconnects cancels the run.
    """
    done = await unless_gone(request, _gathered(reply, run), run.cancel)
    if done is None:
        return Response(status_code=CLIENT_GONE)
    # Log-probabilities of many tokens are text by text, and megabytes: the loop answers others meanwhile.
    return await in_thread(lambda: JSONResponse(done.whole([shown(choice) for choice in done.choices])))


async def _gathered(reply: Reply, run: Answering) -> Reply:
    async with aclosing(run.events()) as events:
        async for number, event in events:
            reply.take(number, event)
    return reply


def _whole(service: Service, body: CompletionBody, submission: Submission, choice: Choice) -> dict[str, Any]:
    given = submission.inputs[choice.index // (body.n or 1)]
    before = submission.served.plain.decode(given.ids)
    position = Position(0 if body.echo else len(before))
    scores = _scored(service, body, choice.scores, position)
    text = before + choice.text if body.echo else choice.text
    return _choice(choice, text, scores, choice.reason)


def _scored(
    service: Service, body: CompletionBody, scores: Scores | None, position: Position
) -> dict[str, Any] | None:
    """Return the ``logprobs`` of tokens, None where the request wants none; ``position`` advances past them."""
    if scores is None or body.logprobs is None:
        return None
    return scores.completion(service.tokens, position, top=body.logprobs > 0)


def _choice(choice: Choice, text: str, scores: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
    return {"index": choice.index, "text": text, "logprobs": scores, "finish_reason": reason, "seed": choice.seed}


async def _pieces(
    service: Service, body: CompletionBody, reply: Reply, run: Answering
) -> AsyncGenerator[dict[str, Any]]:
    """Yield the chunks of a stream: echo, each token's text, finish reasons, and usage if requested."""
    plain, scored = reply.submission.served.plain, body.logprobs is not None
    decoded = [plain.decode(given.ids) for given in reply.submission.inputs]
    inputs = [decoded[choice.index // (body.n or 1)] for choice in reply.choices]
    positions = [Position(0 if body.echo else len(text)) for text in inputs]

    def chunk(
        choice: Choice, text: str = "", event: TokenEvent | EchoEvent | None = None, reason: str | None = None
    ) -> dict[str, Any]:
        found = None if event is None else Scores.of(event)
        scores = _scored(service, body, found, positions[choice.index])
        return reply.chunk(reply.kind, _choice(choice, text, scores, reason))

    if body.echo and not scored:
        for choice in reply.choices:
            yield chunk(choice, inputs[choice.index])
    async with aclosing(run.events()) as events:
        async for number, event in events:
            reply.take(number, event)
            for choice in reply.choices_of(number, event):
                match event:
                    case EchoEvent() if body.echo and scored:
                        yield chunk(choice, inputs[choice.index], event)
                    case TokenEvent() if event.text or scored:
                        yield chunk(choice, event.text, event)
                    case FinishEvent():
                        yield chunk(choice, reason=choice.reason)
    if body.max_tokens == 0:
        for choice in reply.choices:
            yield chunk(choice, reason=choice.reason)
    if reply.reports_usage:
        yield reply.chunk(reply.kind, usage=reply.usage())


@final
@dataclass(frozen=True, slots=True)
class LabelAnswers:
    """The likeliest label of each input as its completion, the same as ``/v1/classify`` gives."""

    scoring: LabelRun
    submission: Submission

    def cancel(self) -> None:
        """Cancel the scoring, unless it has ended."""
        self.scoring.cancel()

    async def events(self) -> AsyncGenerator[tuple[int, Event]]:
        """Yield each label, cut at ``max_tokens``, and its end; raises Problem 503 if that takes too long."""
        labelling = self.scoring.labelling
        sums = await self.scoring.sums()
        ids_of = dict(zip(labelling.labels, labelling.label_ids, strict=True))
        for number, answer in enumerate(labelling.answers(sums, normalize=False)):
            request = self.submission.requests[number]
            whole, decode = ids_of[answer.label], request.decode
            kept = whole[: request.new_tokens]
            text = answer.label if decode is None or kept == whole else decode(kept)
            tally(output=len(kept))
            yield number, TokenEvent(0, kept[0], text)
            reason: Reason = "stop" if kept == whole else "length"
            yield number, FinishEvent(0, reason, text, kept, request.virtual_tokens, len(request.ids))


def label_question(body: CompletionBody, submission: Submission) -> Labelling | None:
    """Return the labels to score, for a classifier that is given a text or fields and no sampling setting.

    Raises:
        SoftPromptError: The prompt's labels cannot be scored.
    """
    served, request = submission.served, submission.requests[0]
    texts = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    if served.rows is None or served.labels is None or body.raw or isinstance(texts[0], int | list):
        return None
    options = request.options
    plain = GenerationOptions(options.max_new_tokens, decoding_method="SAMPLING", max_time=options.max_time)
    if options != plain or ("temperature" in body.model_fields_set and body.temperature is not None):
        return None
    if request.n > 1 or body.echo or request.logprobs is not None:
        return None
    return Labelling(served.labels, label_ids_of(served.rows, served.labels), submission.inputs)


def completion_submission(body: CompletionBody, served: Served, seconds: float) -> Submission:
    """Return a completion body's requests to the batcher.

    Raises:
        ConfigError: Settings contradict each other.
        DataError: An input does not suit the prompt.
    """
    if body.max_tokens == 0 and not body.echo:
        raise ConfigError("max_tokens 0 generates nothing; send echo=true with it, or at least 1")
    inputs = _inputs(body, served)
    generate = body.max_tokens != 0
    scored = bool(body.echo) and body.logprobs is not None
    options = options_of(body, served, 16 if body.max_tokens is None else body.max_tokens, seconds)
    requests = [
        Request(
            each.ids,
            served.prompt,
            each.at,
            options=options,
            n=body.n or 1,
            logprobs=body.logprobs,
            echo=scored or not generate,
            generate=generate,
            # After an echoed input the answer keeps its leading space.
            decode=served.plain.decode if body.echo else each.decode,
        )
        for each in inputs
    ]
    return Submission(served, tuple(inputs), tuple(requests))


def _inputs(body: CompletionBody, served: Served) -> list[Input]:
    if (body.prompt is None) == (body.fields is None):
        raise DataError("send either prompt, or the template's fields")
    if body.fields is not None:
        if body.raw:
            raise ConfigError("raw takes prompt as it is; leave fields out")
        given = body.fields if isinstance(body.fields, list) else [body.fields]
        return [served.of_fields(each, truncate=body.truncate_input) for each in given]
    prompts: Sequence[Any] = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    if isinstance(prompts[0], int):
        prompts = [prompts]
    return [_input(each, body, served) for each in prompts]


def _input(prompt: str | list[int], body: CompletionBody, served: Served) -> Input:
    if isinstance(prompt, list):
        found = served.of_ids(prompt)
    elif body.raw:
        found = served.of_text(prompt, raw=True)
    else:
        found = served.of_fields(prompt, truncate=body.truncate_input)
    if not found.ids:
        raise DataError("the text has no tokens, there is nothing to go on from; send some text")
    return found
