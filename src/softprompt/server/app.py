"""The FastAPI application and its run: from settings to a listening uvicorn server, and its shutdown.

Routers, middleware, lifespan, health endpoints and the page at ``/``.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import signal
import socket
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
from fastapi import APIRouter, FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import FileResponse, Response

from softprompt.artifacts import installed_versions, local_prompts
from softprompt.backbone import freeze, load_base
from softprompt.errors import UpstreamError, UsageError
from softprompt.generation import AnswerSource, Batcher, Scorer, ScoreSource
from softprompt.server import chat, classify, completions, embeddings, models, responses
from softprompt.server.access_log import AccessLog
from softprompt.server.errors import ErrorBody, Problem, install_handlers
from softprompt.server.folder import PromptFolder
from softprompt.server.logprobs import TokenTexts
from softprompt.server.metrics import Metrics
from softprompt.server.middleware import Access, Limits
from softprompt.server.registry import Registry
from softprompt.server.service import USER, Service, in_thread, service_of
from softprompt.server.start_lines import log_addresses, log_prompts
from softprompt.server.upstream.serving import upstream_of

if TYPE_CHECKING:
    from softprompt.server.settings import ServeSettings

logger = logging.getLogger(__name__)

_END_SECONDS = 10
"""Seconds after ``drain_seconds`` for the last forward pass and for sending errors to clients."""
_FOLDER = Path(__file__).with_name("page")
_ROUTES = {"index.html": "/", "docs.html": "/docs"}
_HEADERS = {
    # Only this server's own files are loaded or requested.
    "content-security-policy": (
        "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}

health = APIRouter(tags=["health"])


def serve(settings: ServeSettings) -> None:
    """Serve until SIGTERM or Ctrl-C; running answers are finished first.

    Raises:
        UsageError: The folder, a key file or the address cannot be used.
        BackboneError: The base model cannot be loaded.
    """
    # Errors of the settings are raised before a model is loaded.
    Access.of(settings)
    with local_prompts(settings.prompts) as folder:
        _serve(settings, PromptFolder.of(folder))


def _serve(settings: ServeSettings, root: PromptFolder) -> None:
    with listening(settings.host, settings.port) as sock:
        # Later than the middleware, which closes the connection and logs it.
        reset_unread(sock, 2 * settings.stall_seconds)
        app = build_app(settings, root)
        if not settings.is_local and settings.api_key_file is None:
            logger.warning(
                "everybody who reaches %s can use this server; --api-key-file requires a key", settings.host
            )
        address = sock.getsockname()
        registry = app.state.service.registry
        sock.listen()  # whoever connects from the next line on waits for uvicorn's start, and is not refused
        log_addresses(registry, *address[:2], asks_for_key=settings.api_key_file is not None)
        _run(app, settings, sock)


def build_app(settings: ServeSettings, root: PromptFolder) -> FastAPI:
    """Load the base model and return the application; raises BackboneError if the base model cannot be loaded."""
    own = settings.engine == "own"
    base = load_base(settings.base_model, torch_dtype=settings.torch_dtype, device=settings.device, runs=own)
    freeze(base.model)
    bounds = settings.bounds
    batcher: AnswerSource
    scorer: ScoreSource
    refuses = None
    if own:
        batcher = running = Batcher(base, bounds)
        scorer = Scorer(base, bounds, running.residents)
        scorer.start()
    else:
        batcher, scorer, refuses = upstream_of(base, settings)
    registry = Registry(
        root,
        base,
        max_resident=settings.bounds.max_prompts_resident,
        max_bytes=settings.max_prompt_bytes,
        ignore_fingerprint=settings.ignore_fingerprint,
        base_names=settings.served_model_name,
        refuses=refuses,
    )
    log_prompts(registry, batcher)
    return create_app(settings, registry, batcher, scorer)


def listening(host: str, port: int) -> socket.socket:
    """Return a socket bound to an address; connections are refused until the server listens on it.

    Raises:
        UsageError: The address is invalid or in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UsageError(f"{host!r} is no address to listen on ({error.strerror})") from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise UsageError(
            f"cannot listen on {host}:{port} ({error.strerror}); choose another --host or --port"
        ) from error
    return sock


def reset_unread(sock: socket.socket, seconds: float) -> None:
    """Set TCP_USER_TIMEOUT: the kernel resets connections whose clients do not acknowledge data.

    A closed connection otherwise stays until its last byte is acknowledged, which may be never. Linux only.
    """
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, math.ceil(seconds * 1000))


def config_of(app: FastAPI, settings: ServeSettings) -> uvicorn.Config:
    """Return uvicorn's configuration."""
    return uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        # The service ends answers before that, with an error for their clients.
        timeout_graceful_shutdown=math.ceil(settings.drain_seconds) + _END_SECONDS,
        ws="none",
        lifespan="on",
    )


def server_of(app: FastAPI, config: uvicorn.Config) -> uvicorn.Server:
    """Return the uvicorn server, connected to the application's service."""
    server = uvicorn.Server(config)
    service = app.state.service
    service.should_stop = lambda: server.should_exit
    service.connections.attach(server)
    return server


def _run(app: FastAPI, settings: ServeSettings, sock: socket.socket) -> None:
    server = server_of(app, config_of(app, settings))

    def stop(*_: object) -> None:
        server.should_exit = True

    # uvicorn drains on SIGINT and SIGTERM and then raises them again for the previous handlers; one that comes
    # before its own handlers are there must not be lost.
    before = signal.signal(signal.SIGTERM, stop)

    def keeps(record: logging.LogRecord) -> bool:
        return not server.force_exit

    # A second Ctrl-C cancels running tasks; uvicorn would log a traceback for each.
    log = logging.getLogger("uvicorn.error")
    log.addFilter(keeps)
    try:
        with _uncollected():
            server.run(sockets=[sock])
    finally:
        log.removeFilter(keeps)
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _uncollected() -> Generator[None]:
    """Leave what the process holds by now, torch's modules for the most part, out of collections of garbage.

    A body of very many lists starts collections while it is parsed. One holds the interpreter, and so the event
    loop, for as long as it looks through all objects there are.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def create_app(settings: ServeSettings, registry: Registry, batcher: AnswerSource, scorer: ScoreSource) -> FastAPI:
    """Return the application; it owns the batcher and the scorer, which already run, and stops them at its end.

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
        # FastAPI's documentation pages load scripts from a CDN; ours, beside the page, loads none.
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
    generating = (completions.router, chat.router, responses.router)
    for router in (*generating, classify.router, embeddings.router, models.public, models.admin, health, _page()):
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
    if service.settings.access_log:
        app.add_middleware(AccessLog)


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
        if isinstance(failure, UpstreamError):  # which needs no restart of this server
            raise Problem(503, str(failure))
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


def _page() -> APIRouter:
    """Return a route for each file of the page: ``/`` for its index, ``/docs`` for what describes the API."""
    router = APIRouter(include_in_schema=False)
    for path in sorted(_FOLDER.iterdir()):
        if path.is_file() and not path.name.startswith("."):
            _add(router, _ROUTES.get(path.name, f"/{path.name}"), path)
    return router


def _add(router: APIRouter, route: str, path: Path) -> None:
    async def send() -> FileResponse:
        return FileResponse(path, headers=_HEADERS)

    router.add_api_route(route, send, methods=["GET"], response_class=FileResponse)
