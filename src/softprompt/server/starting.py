"""From settings to a listening server, and to its end."""

from __future__ import annotations

import logging
import math
import signal
import socket
from typing import Any

import uvicorn
from fastapi import FastAPI

from softprompt.backbone import freeze, load_base
from softprompt.errors import UsageError
from softprompt.inference import Batcher, Bounds, Scorer
from softprompt.server.access import Access
from softprompt.server.app import create_app
from softprompt.server.connections import Connections
from softprompt.server.folder import Root
from softprompt.server.registry import Registry
from softprompt.server.settings import ServeSettings

logger = logging.getLogger(__name__)

_END_SECONDS = 10
"""Time to end answers in after their time is over: a pass of the model, and telling the clients."""


def serve(settings: ServeSettings) -> None:
    """Serve until told to stop; running answers are finished first.

    Raises:
        UsageError: The folder, a file of keys or the address cannot be used.
        BackboneError: The base cannot be loaded.
    """
    # What is wrong with the settings shows before a model is loaded.
    root = Root.of(settings.prompts)
    Access.of(settings)
    bounds = bounds_of(settings)
    with listening(settings.host, settings.port) as sock:
        # Later than the service, which ends the answer and says so.
        reset_unread(sock, 2 * settings.stall_seconds)
        app = build_app(settings, root, bounds)
        if not settings.is_local and settings.api_key_file is None:
            logger.warning(
                "everybody who reaches %s can use this server; --api-key-file asks for a key",
                settings.host,
            )
        address = sock.getsockname()
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        logger.info("listening on http://%s:%d", host, address[1])
        _run(app, settings, sock)


def build_app(settings: ServeSettings, root: Root, bounds: Bounds) -> FastAPI:
    """Load the base and return the application over it.

    Raises:
        BackboneError: The base cannot be loaded.
    """
    base = load_base(settings.base_model, torch_dtype=settings.torch_dtype, device=settings.device)
    freeze(base.model)
    registry = Registry(
        root,
        base,
        max_resident=settings.max_prompts_resident,
        max_bytes=settings.max_prompt_bytes,
    )
    batcher = Batcher(base.model, base.tokenizer, bounds)
    scorer = Scorer(
        base.model,
        max_rows=settings.max_score_rows,
        max_tokens=settings.max_step_tokens,
        max_waiting=settings.max_waiting,
        residents=batcher.residents,
    )
    scorer.start()
    logger.info(
        "%s with %d prompts, engine %s%s",
        base.name,
        len(registry.names()),
        batcher.engine,
        f" ({batcher.reason})" if batcher.reason else "",
    )
    return create_app(settings, registry, batcher, scorer)


def bounds_of(settings: ServeSettings) -> Bounds:
    """Return what the batcher may use.

    Raises:
        ConfigError: The bounds contradict each other.
    """
    return Bounds(
        max_batch_rows=settings.max_batch_rows,
        max_step_tokens=settings.max_step_tokens,
        max_cached_tokens=settings.max_cached_tokens,
        max_queue=settings.max_waiting,
        max_prompts_resident=settings.max_prompts_resident,
        max_prompt_tokens=settings.max_prompt_tokens,
        ordered_weights=settings.ordered_weights,
    )


def listening(host: str, port: int) -> socket.socket:
    """Return a socket bound to an address; clients are refused until the server listens on it.

    Raises:
        UsageError: The address cannot be had.
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
    """Have the system drop connections to a socket whose clients do not take what is sent.

    A connection that is closed stays until its last byte is taken, which may be never. Only Linux
    can be told so.
    """
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, math.ceil(seconds * 1000))


def config_of(app: FastAPI, settings: ServeSettings) -> uvicorn.Config:
    """Return how an application is served."""
    return uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        # Answers are ended before, by the service, with what their clients are to know.
        timeout_graceful_shutdown=math.ceil(settings.drain_seconds) + _END_SECONDS,
        ws="none",
        lifespan="on",
    )


def server_of(app: FastAPI, config: uvicorn.Config) -> uvicorn.Server:
    """Return the server of an application, which is told what only the server knows."""
    server = uvicorn.Server(config)
    service = app.state.service
    service.stop_asked = lambda: server.should_exit
    service.connections = Connections(server)
    return server


def _run(app: FastAPI, settings: ServeSettings, sock: socket.socket) -> None:
    # uvicorn drains on these signals and then raises them again, to whoever had them before.
    before = signal.signal(signal.SIGTERM, _taken)
    server = server_of(app, config_of(app, settings))

    def tells(record: logging.LogRecord) -> bool:
        return not server.force_exit

    # A second Ctrl-C cancels what runs; uvicorn would log each as a failure, with its traceback.
    told = logging.getLogger("uvicorn.error")
    told.addFilter(tells)
    try:
        server.run(sockets=[sock])
    finally:
        told.removeFilter(tells)
        signal.signal(signal.SIGTERM, before)


def _taken(number: int, frame: Any) -> None:
    """Do nothing: the server has stopped already."""
