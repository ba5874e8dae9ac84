"""``POST /v1/classify``: how likely each label is as the answer to each text."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import torch
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.responses import Response

from softprompt.engine.rows import EngineRow, is_keys_and_values
from softprompt.errors import ConfigError, DataError
from softprompt.inference.continuous.request import PromptValue
from softprompt.inference.scoring import per_token
from softprompt.server.asked import texts_of
from softprompt.server.problems import Problem
from softprompt.server.served import Input, Served
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


_NO_PROMPT = PromptValue("base", None)


class Questions:
    """Texts and labels as tokens, ready to be scored."""

    def __init__(self, body: ClassifyBody, served: Served, most_rows: int) -> None:
        """Read a body.

        Raises:
            ConfigError: There are no labels.
            DataError: A text does not suit the prompt, or is empty where nothing else is read.
            Problem: More texts than a request may have.
        """
        texts = texts_of(body)
        if len(texts) > most_rows:
            raise Problem(400, f"the request has {len(texts)} texts, this server takes {most_rows}")
        names = served.labels if body.labels is None else tuple(body.labels)
        if names is None:
            raise ConfigError(
                f"{served.name!r} generates free text and has no labels of its own; send labels"
            )
        self.prompt = served.prompt or _NO_PROMPT
        self.names = names
        self.label_ids = served.label_ids(names)
        self.inputs: list[Input] = [
            served.of_fields(text, truncate=body.truncate_input) for text in texts
        ]
        self._check_inputs()

    def _check_inputs(self) -> None:
        value = self.prompt.value
        if value is not None and not is_keys_and_values(value):
            return
        # Keys and values are looked back at, but only a token's place predicts the next one.
        alone = "the base model has" if value is None else "a prefix-tuning prompt has"
        for number, each in enumerate(self.inputs, start=1):
            if not each.ids:
                raise DataError(
                    f"text {number} is empty, and {alone} no token of its own to go on from; send some text"
                )

    def rows(self) -> list[EngineRow]:
        """Return a row for each label of each text, text by text."""
        return [
            EngineRow(each.ids, tuple(label), at=each.at)
            for each in self.inputs
            for label in self.label_ids
        ]

    def answers(self, sums: torch.Tensor, *, normalize: bool) -> list[dict[str, Any]]:
        """Return what the sums of log-probabilities ``[N·K]`` say of each text."""
        scores = sums.view(len(self.inputs), len(self.names))
        if normalize:
            scores = per_token(scores, [len(ids) for ids in self.label_ids])
        shares = torch.softmax(scores, dim=1)
        return [
            {
                "index": index,
                "label": self.names[int(row.argmax())],
                "scores": dict(zip(self.names, row.tolist(), strict=True)),
                "probabilities": dict(zip(self.names, share.tolist(), strict=True)),
                "input_cut": given.cut,
            }
            for index, (given, row, share) in enumerate(
                zip(self.inputs, scores, shares, strict=True)
            )
        ]


@router.post("/v1/classify", response_model=Classification)
async def classify(body: ClassifyBody, request: Request) -> Response:
    """Score the labels of one text or several, in one pass of the model."""
    service = service_of(request)
    started = time.monotonic()
    served = await service.served(body.model, body.task)
    asked = await in_thread(Questions, body, served, service.settings.max_request_rows)
    future = service.scorer.submit(asked.prompt, asked.rows())
    waiting = asyncio.wait_for(asyncio.wrap_future(future), service.settings.request_seconds)
    label, seconds = service.meter.label(served.name), service.settings.request_seconds
    try:
        sums = await unless_gone(request, waiting, future.cancel)
    except TimeoutError:
        service.meter.success.labels(label, "abort").inc(len(asked.inputs))
        raise Problem(503, f"no answer within {seconds:g} s; try again later") from None
    if sums is None:
        service.meter.success.labels(label, "abort").inc(len(asked.inputs))
        return Response(status_code=CLIENT_GONE)
    inputs = sum(len(each.ids) for each in asked.inputs)
    virtual = asked.prompt.tokens * len(asked.inputs)
    service.meter.input.labels(label).inc(inputs)
    service.meter.virtual.labels(label).inc(virtual)
    service.meter.success.labels(label, "classified").inc(len(asked.inputs))
    service.meter.whole.labels(label).observe(time.monotonic() - started)
    return JSONResponse(
        {
            "object": "list",
            "created": int(time.time()),
            "model": served.name,
            "system_fingerprint": f"sp-{served.version[:16]}",
            "data": asked.answers(sums, normalize=body.normalize),
            "usage": {
                "prompt_tokens": inputs,
                "virtual_tokens": virtual,
                "total_tokens": inputs,
            },
        }
    )
