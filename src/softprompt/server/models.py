"""``/v1/models``, the prompts' cards, and ``/v1/prompts`` for administrators."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from softprompt.errors import AdapterError
from softprompt.server.errors import Problem
from softprompt.server.service import ADMIN, USER, Service, in_thread, service_of

public = APIRouter(tags=["prompts"], dependencies=[USER])
admin = APIRouter(tags=["administration"], dependencies=[ADMIN])

Name = Annotated[str, Path(description="Name of a prompt.")]


class TaskReading(BaseModel):
    """Kind, labels and template of one task of a multitask prompt, and whether it is a chat's."""

    name: str
    task: str
    labels: list[str] | None
    template: str
    chat: bool | None


class Model(BaseModel):
    """A prompt, or the base, under OpenAI's names; ``parent`` is the base.

    ``chat`` says of the base whether it has a chat template, and of a prompt whether that template puts its
    inputs as in training; None is unknown. For a multitask prompt it, ``task``, ``labels`` and ``template`` are
    those that all tasks share.
    """

    id: str
    object: str
    created: int
    owned_by: str
    root: str
    parent: str | None
    engine: str
    engine_reason: str
    peft_type: str | None = None
    task_type: str | None = None
    virtual_tokens: int | None = None
    task: str | None = None
    labels: list[str] | None = None
    template: str | None = None
    tasks: list[TaskReading] | None = None
    metrics: dict[str, float] | None = None
    chat: bool | None


class Unusable(BaseModel):
    """A prompt of the folder that cannot be served, and why."""

    id: str
    problem: str


class Models(BaseModel):
    """The base model under each of its names, the prompts that answer, and apart those that cannot."""

    object: str
    data: list[Model]
    unusable: list[Unusable]


class PromptState(BaseModel):
    """State of a prompt, for administrators."""

    name: str
    resident: bool = False
    unloaded: bool = False
    version: str | None = None
    problem: str | None = None


class PromptStates(BaseModel):
    """All prompts of the folder."""

    object: str
    data: list[PromptState]


@public.get("/v1/models", response_model=Models)
async def list_models(request: Request) -> JSONResponse:
    """List the base and every prompt that is for it; apart, what else lies in the folder, with the reason."""
    return JSONResponse(await in_thread(_models, service_of(request)))


@public.get("/v1/models/{model:path}", response_model=Model)
async def get_model(model: Annotated[str, Path()], request: Request) -> JSONResponse:
    """Return the base model or one prompt."""
    return JSONResponse(await in_thread(_model, service_of(request), model))


@public.get("/v1/prompts/{name}/card")
async def card(name: Name, request: Request) -> JSONResponse:
    """Return a prompt's card: its record, size, norms and nearest tokens."""
    service = service_of(request)
    if name in await in_thread(service.registry.withdrawn):
        raise AdapterError(f"the prompt {name!r} is unloaded")
    return JSONResponse(await in_thread(service.card, name))


@admin.get("/v1/prompts")
async def list_prompts(request: Request) -> PromptStates:
    """List the folder's prompts with their state."""
    return PromptStates(object="list", data=await in_thread(_states, service_of(request)))


@admin.post("/v1/prompts/{name}/load")
async def load(name: Name, request: Request) -> PromptState:
    """Load a prompt."""
    served = await in_thread(service_of(request).registry.load, name)
    return PromptState(name=name, resident=True, version=served.version)


@admin.post("/v1/prompts/{name}/unload")
async def unload(name: Name, request: Request) -> PromptState:
    """Unload a prompt; running requests finish."""
    await in_thread(service_of(request).registry.unload, name)
    return PromptState(name=name, unloaded=True)


@admin.post("/v1/prompts/{name}/reload")
async def reload(name: Name, request: Request) -> PromptState:
    """Reload a prompt's files."""
    served = await in_thread(service_of(request).registry.reload, name)
    return PromptState(name=name, resident=True, version=served.version)


def _states(service: Service) -> list[PromptState]:
    registry, out = service.registry, set(service.registry.withdrawn())
    return [
        PromptState(
            name=name,
            resident=registry.is_resident(name),
            unloaded=name in out,
            problem=registry.outline(name).problem,
        )
        for name in registry.root.names()
    ]


def _models(service: Service) -> dict[str, Any]:
    registry = service.registry
    ready, unusable = registry.sorted_out()
    found = [_base(service, name) for name in registry.base_names]
    for name in ready:
        with suppress(Problem, AdapterError):  # damaged or deleted meanwhile
            found.append(_prompt(service, name))
    apart = [{"id": name, "problem": problem} for name, problem in unusable.items()]
    return {"object": "list", "data": found, "unusable": apart}


def _model(service: Service, name: str) -> dict[str, Any]:
    if name in service.registry.base_names:
        return _base(service, name)
    if name in service.registry.withdrawn():
        raise AdapterError(f"the prompt {name!r} is unloaded; load it to have it answer")
    return _prompt(service, name)


def _base(service: Service, name: str) -> dict[str, Any]:
    root = service.registry.base_names[0]
    chat = bool(service.registry.base.tokenizer.chat_template)
    return {**_common(service, name), "created": 0, "root": root, "parent": None, "chat": chat}


def _prompt(service: Service, name: str) -> dict[str, Any]:
    outline = service.registry.outline(name)
    if outline.problem is not None:
        raise Problem(500, outline.problem, code="prompt_unusable", param="model")
    base = service.registry.base_names[0]
    head = {**_common(service, name), "created": outline.created, "root": base, "parent": base}
    return {**head, **outline.facts}


def _common(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "owned_by": "softprompt",
        "engine": service.batcher.engine,
        "engine_reason": service.batcher.reason,
    }
