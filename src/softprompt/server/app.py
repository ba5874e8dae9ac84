"""The FastAPI application: routers, middleware, lifespan, health endpoints and the page at ``/``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from fastapi import APIRouter, FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import FileResponse, Response

from softprompt.artifacts import installed_versions
from softprompt.generation import Batcher, Scorer
from softprompt.server import chat, classify, completions, models
from softprompt.server.access import Access
from softprompt.server.errors import ErrorBody, Problem, install_handlers
from softprompt.server.limits import Limits
from softprompt.server.metrics import Metrics
from softprompt.server.registry import Registry
from softprompt.server.replies import TokenTexts
from softprompt.server.service import USER, Service, in_thread, service_of
from softprompt.server.settings import ServeSettings


def create_app(
    settings: ServeSettings, registry: Registry, batcher: Batcher, scorer: Scorer
) -> FastAPI:
    """Return the application; it owns the batcher and the scorer and stops them at its end.

    Args:
        settings: Its settings.
        registry: The prompts.
        batcher: Generates; already running.
        scorer: Scores labels; already running.

    Raises:
        UsageError: A key file cannot be read, or is empty.
    """
    service = Service(
        settings=settings,
        registry=registry,
        batcher=batcher,
        scorer=scorer,
        access=Access.of(settings),
        metrics=Metrics(batcher, lambda: registry.resident, settings.max_metric_prompts),
        tokens=TokenTexts(registry.base.tokenizer),
    )
    app = FastAPI(
        title="softprompt",
        version=installed_versions()["softprompt"],
        summary="Many soft prompts of one base model.",
        # FastAPI's documentation pages load scripts from a CDN.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=_lifespan,
        responses={
            "4XX": {"model": ErrorBody, "description": "The request is invalid."},
            "5XX": {"model": ErrorBody, "description": "The server failed."},
        },
    )
    app.state.service = service
    for router in (
        completions.router,
        chat.router,
        classify.router,
        models.public,
        models.admin,
        health,
        _page(),
    ):
        app.include_router(router)
    install_handlers(app)
    _add_middleware(app, service)
    return app


def _add_middleware(app: FastAPI, service: Service) -> None:
    """Add middleware; what is added last is outermost, so errors of Limits carry CORS headers."""
    app.add_middleware(
        Limits,
        settings=service.settings,
        access=service.access,
        metrics=service.metrics,
        connections=service.connections,
    )
    if service.settings.allowed_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(service.settings.allowed_origin),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncGenerator[None]:
    """Poll the folder of prompts while the server runs; stop batcher and scorer at its end."""
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


health = APIRouter(tags=["health"])


@health.head("/health", include_in_schema=False)
@health.get("/health")
async def alive() -> dict[str, str]:
    """Liveness: 200 while the process answers."""
    return {"status": "ok"}


@health.head("/ready", include_in_schema=False)
@health.get("/ready")
async def ready(request: Request) -> dict[str, str]:
    """Readiness: 200 while requests are accepted, else 503, for load balancers."""
    service = service_of(request)
    if service.draining:
        raise Problem(503, "the server is stopping")
    if not service.batcher.healthy:
        failure = service.batcher.failure
        # The class name only: the message may hold private data.
        why = f" ({type(failure).__name__})" if failure else ""
        raise Problem(503, f"the engine has stopped{why}; see the log and restart the server")
    if not service.scorer.healthy:
        raise Problem(503, "label scoring has stopped; see the log and restart the server")
    await in_thread(service.registry.root.check)
    return {"status": "ready"}


@health.get("/version")
async def version() -> dict[str, str]:
    """Return the versions of softprompt and the libraries that answers depend on."""
    return installed_versions()


@health.get("/metrics", dependencies=[USER], response_class=Response)
async def metrics(request: Request) -> Response:
    """Return the metrics in Prometheus' text format."""
    return Response(service_of(request).metrics.page(), media_type=CONTENT_TYPE_LATEST)


_FOLDER = Path(__file__).with_name("page")
_HEADERS = {
    # Only this server's own files are loaded or requested.
    "content-security-policy": (
        "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def _page() -> APIRouter:
    """Return a route for each file of the page, and ``/`` for its index."""
    router = APIRouter(include_in_schema=False)
    for path in sorted(_FOLDER.iterdir()):
        if path.is_file() and not path.name.startswith("."):
            _add(router, "/" if path.name == "index.html" else f"/{path.name}", path)
    return router


def _add(router: APIRouter, route: str, path: Path) -> None:
    async def send() -> FileResponse:
        return FileResponse(path, headers=_HEADERS)

    router.add_api_route(route, send, methods=["GET"], response_class=FileResponse)
