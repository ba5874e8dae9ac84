"""``POST /v1/embeddings``: texts as vectors, behind prompts for FEATURE_EXTRACTION or by the base alone."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import anyio
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.responses import Response
from torch import Tensor

from softprompt.engine import EngineRow, text_states
from softprompt.errors import ConfigError, DataError, NotServingError, QueueFullError
from softprompt.server.bodies import BodyRoute, in_turn
from softprompt.server.protocol import Body, InputUsage, Several, Text, TokenIds, Whole
from softprompt.server.service import CLIENT_GONE, USER, Service, in_thread, service_of, unless_gone

if TYPE_CHECKING:
    from softprompt.server.served import Served

router = APIRouter(tags=["embeddings"], dependencies=[USER], route_class=BodyRoute)


class EmbeddingsBody(Body):
    """The body of ``POST /v1/embeddings``."""

    expects: ClassVar[Mapping[str, str]] = {
        "input": "a text, token ids from 0 up, or a list of up to 2,048 texts or token id lists, none empty"
    }

    input: Text | Several[Text] | TokenIds | Several[TokenIds] = Field(
        description="The template's input; or token ids, which are used as they are."
    )
    encoding_format: Literal["float", "base64"] | None = Field(None, description="base64: float32, little-endian.")
    dimensions: Whole | None = Field(None, description="The base's own width, or left out.")
    pooling: Literal["mean", "last"] = Field("mean", description="Over the text's tokens, virtual ones left out.")
    normalize: bool = Field(True, description="Scale to length 1.")
    truncate_input: bool = False


class Embedding(BaseModel):
    """The vector of one text."""

    object: str
    index: int
    embedding: list[float] | str


class Embeddings(BaseModel):
    """The response of ``POST /v1/embeddings``."""

    object: str
    data: list[Embedding]
    model: str
    system_fingerprint: str
    usage: InputUsage


@router.post("/v1/embeddings", response_model=Embeddings)
async def embed(body: EmbeddingsBody, request: Request) -> Response:
    """Return the vector of one text or of several."""
    service, started = service_of(request), time.monotonic()
    served = await service.served(body.model, body.task, embeds=True)
    rows = await in_turn(request, _rows, body, served, service.settings.max_request_rows)
    waiting = service.embedding.statistics().tasks_waiting
    if waiting >= service.settings.bounds.max_queue:
        raise QueueFullError(f"{waiting} requests wait already; try again later", 1.0)
    aborted = service.metrics.success.labels(service.metrics.label(served.name), "abort")
    deadline = started + service.settings.request_seconds
    vectors = await unless_gone(request, _vectors(service, body, rows, deadline), lambda: aborted.inc(len(rows)))
    if vectors is None:
        return Response(status_code=CLIENT_GONE)
    usage = service.count(served, "embedded", len(rows), sum(len(row.source) for row in rows), started)
    return await in_thread(_written, body, served, vectors, usage)


def _rows(body: EmbeddingsBody, served: Served, most: int) -> list[EngineRow]:
    """Return a body's texts as rows behind their prompt.

    Raises:
        ConfigError: There are more texts than ``max_request_rows``.
        DataError: A text is empty, or does not fit the prompt.
    """
    given: Sequence[Any] = body.input if isinstance(body.input, list) else [body.input]
    if isinstance(given[0], int):
        given = [given]
    if len(given) > most:
        raise ConfigError(f"the request has {len(given)} texts, this server takes {most}; send fewer")
    inputs = [
        served.of_ids(each) if isinstance(each, list) else served.of_fields(each, truncate=body.truncate_input)
        for each in given
    ]
    for number, each in enumerate(inputs, start=1):
        if not each.ids:
            raise DataError(f"text {number} has no tokens, so it has no vector; send some text")
    prompt = served.prompt
    return [EngineRow(each.ids, (), prompt, each.at) for each in inputs]


async def _vectors(
    service: Service, body: EmbeddingsBody, rows: Sequence[EngineRow], deadline: float
) -> list[Tensor]:
    """Return the vector ``[H]`` of each row; of the requests that wait, each has a pass in turn.

    Raises:
        NotServingError: The deadline has passed.
    """
    found: list[Tensor] = []

    def run(part: Sequence[EngineRow]) -> None:
        if time.monotonic() > deadline:
            raise NotServingError(f"no answer within {service.settings.request_seconds:g} s; try again later")
        states = text_states(service.registry.base, part)
        found.extend(each.mean(0) if body.pooling == "mean" else each[-1] for each in states)

    for part in _passes(rows, service.settings.bounds.max_step_tokens):
        await anyio.to_thread.run_sync(run, part, limiter=service.embedding)
    if body.dimensions not in (None, len(found[0])):
        raise ConfigError(f"vectors of this base have {len(found[0]):,} dimensions; leave dimensions out")
    return [each / each.norm().clamp(min=1e-12) for each in found] if body.normalize else found


def _passes(rows: Sequence[EngineRow], most: int) -> Iterator[list[EngineRow]]:
    """Cut rows into passes of at most that many tokens, padding counted, or of one row."""
    part: list[EngineRow] = []
    for row in rows:
        grown = [*part, row]
        width = max(len(each.source) + (each.prompt.tokens if each.prompt else 0) for each in grown)
        if part and width * len(grown) > most:
            yield part
            grown = [row]
        part = grown
    yield part


def _written(
    body: EmbeddingsBody, served: Served, vectors: Sequence[Tensor], usage: Mapping[str, int]
) -> JSONResponse:
    data = [{"object": "embedding", "index": i, "embedding": _shown(each, body)} for i, each in enumerate(vectors)]
    head = {"object": "list", "model": served.name, "system_fingerprint": f"sp-{served.version[:16]}"}
    return JSONResponse({**head, "data": data, "usage": usage})


def _shown(vector: Tensor, body: EmbeddingsBody) -> list[float] | str:
    if body.encoding_format == "base64":
        return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()
    return vector.tolist()
