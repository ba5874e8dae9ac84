"""Running the server: from settings to a listening uvicorn server, and its shutdown."""

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
from softprompt.generation import Batcher, Scorer
from softprompt.server.access import Access
from softprompt.server.app import create_app
from softprompt.server.folder import PromptFolder
from softprompt.server.registry import Registry
from softprompt.server.settings import ServeSettings

logger = logging.getLogger(__name__)

_END_SECONDS = 10
"""Seconds after ``drain_seconds`` for the last forward pass and for sending errors to clients."""


def serve(settings: ServeSettings) -> None:
    """Serve until SIGTERM or Ctrl-C; running answers are finished first.

    Raises:
        UsageError: The folder, a key file or the address cannot be used.
        BackboneError: The base model cannot be loaded.
    """
    # Errors of the settings are raised before a model is loaded.
    root = PromptFolder.of(settings.prompts)
    Access.of(settings)
    with listening(settings.host, settings.port) as sock:
        # Later than the middleware, which closes the connection and logs it.
        reset_unread(sock, 2 * settings.stall_seconds)
        app = build_app(settings, root)
        if not settings.is_local and settings.api_key_file is None:
            logger.warning(
                "everybody who reaches %s can use this server; --api-key-file requires a key",
                settings.host,
            )
        address = sock.getsockname()
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        logger.info("listening on http://%s:%d", host, address[1])
        _run(app, settings, sock)


def build_app(settings: ServeSettings, root: PromptFolder) -> FastAPI:
    """Load the base model and return the application.

    Raises:
        BackboneError: The base model cannot be loaded.
    """
    base = load_base(settings.base_model, torch_dtype=settings.torch_dtype, device=settings.device)
    freeze(base.model)
    registry = Registry(
        root,
        base,
        max_resident=settings.bounds.max_prompts_resident,
        max_bytes=settings.max_prompt_bytes,
    )
    bounds = settings.bounds
    batcher = Batcher(base, bounds)
    scorer = Scorer(
        base,
        max_rows=bounds.max_score_rows,
        max_tokens=bounds.max_step_tokens,
        max_waiting=bounds.max_queue,
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

    A closed connection otherwise stays until its last byte is acknowledged, which may be never.
    Linux only.
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
    # uvicorn drains on SIGINT and SIGTERM and then raises them again for the previous handlers.
    before = signal.signal(signal.SIGTERM, _ignored)
    server = server_of(app, config_of(app, settings))

    def keeps(record: logging.LogRecord) -> bool:
        return not server.force_exit

    # A second Ctrl-C cancels running tasks; uvicorn would log a traceback for each.
    log = logging.getLogger("uvicorn.error")
    log.addFilter(keeps)
    try:
        server.run(sockets=[sock])
    finally:
        log.removeFilter(keeps)
        signal.signal(signal.SIGTERM, before)


def _ignored(number: int, frame: Any) -> None:
    """Do nothing: the server has stopped already."""
