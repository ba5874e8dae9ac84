"""``POST /v1/classify``: log-probabilities of labels as the answer to each text."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Self, final

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.responses import Response
from torch import Tensor

from softprompt.errors import ConfigError, DataError
from softprompt.generation import Input, Labelling, label_ids_of
from softprompt.server.bodies import BodyRoute, in_turn
from softprompt.server.errors import Problem
from softprompt.server.protocol import Body, Fields, InputUsage, Several, Stop, Text
from softprompt.server.service import CLIENT_GONE, USER, in_thread, service_of, unless_gone

if TYPE_CHECKING:
    from softprompt.prompts import Prompt
    from softprompt.server.served import Served
    from softprompt.server.service import Service

router = APIRouter(tags=["classification"], dependencies=[USER], route_class=BodyRoute)


class ClassifyBody(Body):
    """The body of ``POST /v1/classify``."""

    input: Text | Several[Text] | None = None
    fields: Fields | Several[Fields] | None = None
    labels: Annotated[list[Stop], Field(min_length=1, max_length=1000, fail_fast=True)] | None = Field(
        None, description="Instead of the prompt's own."
    )
    normalize: bool = Field(False, description="Divide scores by the labels' token counts.")
    truncate_input: bool = False


class LabelScore(BaseModel):
    """Label scores of one text: log-probabilities in nats, and their softmax over the labels."""

    index: int
    label: str
    scores: dict[str, float]
    probabilities: dict[str, float]
    input_cut: bool


class Classification(BaseModel):
    """The response of ``POST /v1/classify``."""

    object: str
    created: int
    model: str
    system_fingerprint: str
    data: list[LabelScore]
    usage: InputUsage


def labelling_of(body: ClassifyBody, served: Served, most_rows: int) -> Labelling:
    """Return a body's texts and labels as tokens.

    Raises:
        ConfigError: There are no labels, or two have the same tokens.
        DataError: A text does not fit the prompt, or is empty and nothing else precedes the label; a
            label exceeds the prompt's maximum target length.
        Problem: 400, there are more texts than ``max_request_rows``.
    """
    texts = texts_of(body)
    if len(texts) > most_rows:
        raise Problem(400, f"the request has {len(texts)} texts, this server takes {most_rows}")
    labels = served.labels if body.labels is None else tuple(body.labels)
    if labels is None:
        raise ConfigError(f"{served.name!r} generates free text and has no labels of its own; send labels")
    inputs = [served.of_fields(text, truncate=body.truncate_input) for text in texts]
    _check_inputs(inputs, served.prompt)
    return Labelling(labels, label_ids_of(served.rows or served.plain.answers, labels), inputs)


def _check_inputs(inputs: Sequence[Input], prompt: Prompt | None) -> None:
    if prompt is not None and prompt.input is not None:
        return
    # A prefix is attended to, but the label's first token needs a token that predicts it.
    alone = "the base model has" if prompt is None or prompt.prefix is None else "a prefix-tuning prompt has"
    for number, each in enumerate(inputs, start=1):
        if not each.ids:
            raise DataError(
                f"text {number} is empty, and {alone} no token of its own to go on from; send some text"
            )


@final
@dataclass(slots=True)
class LabelRun:
    """The label scores of one HTTP request, which the scorer computes.

    Attributes:
        service: The service, whose metrics count it.
        served: The prompt.
        labelling: Its texts and labels.
        future: The scorer's log-probabilities ``[N·K]``.
        started: When it began, in seconds of the monotonic clock.
        usage: Its tokens, once the scores are there.
    """

    service: Service
    served: Served
    labelling: Labelling
    future: Future[Tensor]
    started: float
    usage: dict[str, int] = field(default_factory=dict)

    @classmethod
    def start(cls, service: Service, served: Served, labelling: Labelling) -> Self:
        """Give the texts to the scorer; raises QueueFullError if too many wait."""
        started = time.monotonic()
        return cls(service, served, labelling, service.scorer.submit(labelling.rows(served.prompt)), started)

    def cancel(self) -> None:
        """Cancel it, unless it has ended."""
        if self.future.cancel():
            self._abort()

    async def sums(self) -> Tensor:
        """Return the log-probabilities; raises Problem 503 if they take too long."""
        seconds = self.service.settings.request_seconds
        try:
            found = await asyncio.wait_for(asyncio.wrap_future(self.future), seconds)
        except TimeoutError:
            self._abort()
            raise Problem(503, f"no answer within {seconds:g} s; try again later") from None
        tokens, rows = sum(len(each.ids) for each in self.labelling.inputs), len(self.labelling.inputs)
        self.usage = self.service.count(self.served, "classified", rows, tokens, self.started)
        return found

    def _abort(self) -> None:
        metrics = self.service.metrics
        metrics.success.labels(metrics.label(self.served.name), "abort").inc(len(self.labelling.inputs))


@router.post("/v1/classify", response_model=Classification)
async def classify(body: ClassifyBody, request: Request) -> Response:
    """Score the labels of one text or several, in one forward pass."""
    service = service_of(request)
    served = await service.served(body.model, body.task)
    labelling = await in_turn(request, labelling_of, body, served, service.settings.max_request_rows)
    scoring = await in_thread(LabelRun.start, service, served, labelling)
    sums = await unless_gone(request, scoring.sums(), scoring.cancel)
    if sums is None:
        return Response(status_code=CLIENT_GONE)
    return await in_thread(_written, body, scoring, sums)


def _written(body: ClassifyBody, scoring: LabelRun, sums: Tensor) -> JSONResponse:
    answers = enumerate(scoring.labelling.answers(sums, normalize=body.normalize))
    data = [{"index": index, **each.to_dict()} for index, each in answers]
    head = {"object": "list", "created": int(time.time()), "model": scoring.served.name}
    fingerprint = f"sp-{scoring.served.version[:16]}"
    return JSONResponse({**head, "system_fingerprint": fingerprint, "data": data, "usage": scoring.usage})


def texts_of(body: ClassifyBody) -> list[str | dict[str, str | float | int]]:
    """Return the texts or fields to classify; raises DataError if neither or both of input and fields were sent."""
    if (body.input is None) == (body.fields is None):
        raise DataError("send either input, or the template's fields")
    if body.fields is not None:
        return list(body.fields) if isinstance(body.fields, list) else [body.fields]
    texts = body.input if isinstance(body.input, list) else [body.input or ""]
    return list(texts)
