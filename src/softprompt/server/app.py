"""The HTTP application: its routes, and what stands around them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress

from fastapi import FastAPI

from softprompt.artifacts import installed_versions
from softprompt.inference import Scorer
from softprompt.server import chat, classify, completions, handlers, health, listing
from softprompt.server.access import Access
from softprompt.server.backend import Backend
from softprompt.server.limits import Limits
from softprompt.server.meter import Meter
from softprompt.server.origins import Origins
from softprompt.server.page import page_routes
from softprompt.server.problems import ErrorBody
from softprompt.server.registry import Registry
from softprompt.server.replies import TokenTexts
from softprompt.server.service import Service
from softprompt.server.settings import ServeSettings


def create_app(
    settings: ServeSettings, registry: Registry, batcher: Backend, scorer: Scorer
) -> FastAPI:
    """Return the application; the batcher and the scorer are its own and end with it.

    Args:
        settings: What it is told.
        registry: The prompts.
        batcher: Generates; it runs already.
        scorer: Scores labels; it runs already.

    Raises:
        UsageError: A file of keys cannot be used.
    """
    access = Access.of(settings)
    service = Service(
        settings=settings,
        registry=registry,
        batcher=batcher,
        scorer=scorer,
        access=access,
        meter=Meter(batcher, lambda: registry.resident, settings.max_metric_prompts),
        tokens=TokenTexts(registry.base.tokenizer),
    )
    app = FastAPI(
        title="softprompt",
        version=installed_versions()["softprompt"],
        summary="Many soft prompts of one base model.",
        # FastAPI's pages about the API load their scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=_lifespan,
        responses={
            "4XX": {"model": ErrorBody, "description": "What is wrong with the request."},
            "5XX": {"model": ErrorBody, "description": "What is wrong with the server."},
        },
    )
    app.state.service = service
    for router in (
        completions.router,
        chat.router,
        classify.router,
        listing.models,
        listing.admin,
        health.router,
        page_routes(),
    ):
        app.include_router(router)
    handlers.install(app)
    app.add_middleware(Limits, service=service)
    if settings.allowed_origin:  # outside of it, so that a page can read what it refuses
        app.add_middleware(Origins, allowed=settings.allowed_origin)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncGenerator[None]:
    """Watch the folder while the server runs; let running answers finish at its end."""
    service: Service = app.state.service
    tasks = [asyncio.create_task(each) for each in (service.watch(), service.end_in_time())]
    try:
        yield
    finally:
        service.draining = True
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        await asyncio.to_thread(service.stop)
