"""``POST /v1/classify``: how likely each label is as the answer to each text."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.responses import Response

from softprompt.errors import ConfigError, DataError
from softprompt.inference import Input, Labelling
from softprompt.prompts import Prompt
from softprompt.server.asked import texts_of
from softprompt.server.problems import Problem
from softprompt.server.served import Served
from softprompt.server.service import USER, in_thread, service_of
from softprompt.server.shapes import ClassifyBody
from softprompt.server.streaming import CLIENT_GONE, unless_gone

router = APIRouter(tags=["classification"], dependencies=[USER])


class LabelScore(BaseModel):
    """The labels of one text: log-probabilities in nats, and their softmax over the labels."""

    index: int
    label: str
    scores: dict[str, float]
    probabilities: dict[str, float]
    input_cut: bool


class ClassifyUsage(BaseModel):
    """Tokens of a call, each text's counted once."""

    prompt_tokens: int
    virtual_tokens: int
    total_tokens: int


class Classification(BaseModel):
    """The answer of ``POST /v1/classify``."""

    object: str
    created: int
    model: str
    system_fingerprint: str
    data: list[LabelScore]
    usage: ClassifyUsage


def labelling_of(body: ClassifyBody, served: Served, most_rows: int) -> Labelling:
    """Return a body's texts and labels as tokens, ready to be scored.

    Raises:
        ConfigError: There are no labels.
        DataError: A text does not suit the prompt, or is empty where nothing else is read.
        Problem: More texts than a request may have.
    """
    texts = texts_of(body)
    if len(texts) > most_rows:
        raise Problem(400, f"the request has {len(texts)} texts, this server takes {most_rows}")
    labels = served.labels if body.labels is None else tuple(body.labels)
    if labels is None:
        raise ConfigError(
            f"{served.name!r} generates free text and has no labels of its own; send labels"
        )
    inputs = [served.of_fields(text, truncate=body.truncate_input) for text in texts]
    _check_inputs(inputs, served.prompt)
    return Labelling(labels, served.label_ids(labels), inputs)


def _check_inputs(inputs: Sequence[Input], prompt: Prompt | None) -> None:
    if prompt is not None and prompt.input is not None:
        return
    # Keys and values are attended to, but only a token's own position predicts the next one.
    alone = (
        "a prefix-tuning prompt has"
        if prompt and prompt.prefix is not None
        else "the base model has"
    )
    for number, each in enumerate(inputs, start=1):
        if not each.ids:
            raise DataError(
                f"text {number} is empty, and {alone} no token of its own to go on from; send some text"
            )


@router.post("/v1/classify", response_model=Classification)
async def classify(body: ClassifyBody, request: Request) -> Response:
    """Score the labels of one text or several, in one pass of the model."""
    service = service_of(request)
    started = time.monotonic()
    served = await service.served(body.model, body.task)
    labelling = await in_thread(labelling_of, body, served, service.settings.max_request_rows)
    future = service.scorer.submit(labelling.rows(served.prompt))
    waiting = asyncio.wait_for(asyncio.wrap_future(future), service.settings.request_seconds)
    label, seconds = service.meter.label(served.name), service.settings.request_seconds
    try:
        sums = await unless_gone(request, waiting, future.cancel)
    except TimeoutError:
        service.meter.success.labels(label, "abort").inc(len(labelling.inputs))
        raise Problem(503, f"no answer within {seconds:g} s; try again later") from None
    if sums is None:
        service.meter.success.labels(label, "abort").inc(len(labelling.inputs))
        return Response(status_code=CLIENT_GONE)
    inputs = sum(len(each.ids) for each in labelling.inputs)
    virtual = served.prompt.tokens * len(labelling.inputs) if served.prompt else 0
    service.meter.input.labels(label).inc(inputs)
    service.meter.virtual.labels(label).inc(virtual)
    service.meter.success.labels(label, "classified").inc(len(labelling.inputs))
    service.meter.whole.labels(label).observe(time.monotonic() - started)
    return JSONResponse(
        {
            "object": "list",
            "created": int(time.time()),
            "model": served.name,
            "system_fingerprint": f"sp-{served.version[:16]}",
            "data": [
                {"index": index, **each.to_dict()}
                for index, each in enumerate(labelling.answers(sums, normalize=body.normalize))
            ],
            "usage": {
                "prompt_tokens": inputs,
                "virtual_tokens": virtual,
                "total_tokens": inputs,
            },
        }
    )
