"""A client that stops reading costs one line in the log, and no connection for ever."""

import json
import logging
import socket

import pytest

from oracles.serving import ScriptedBatcher, app_over, running, until
from softprompt.server.app import listening, reset_unread


def connected(port):
    """Return a connection whose other side can send little without being read."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", port))
    return sock


class Records(logging.Handler):
    def __init__(self):
        super().__init__()
        self.all = []

    def emit(self, record):
        self.all.append(record)


@pytest.fixture
def records():
    """What the server and uvicorn log, whatever becomes of it elsewhere."""
    found = Records()
    loggers = [logging.getLogger(name) for name in ("softprompt.server.middleware", "uvicorn.error")]
    for logger in loggers:
        logger.addHandler(found)
    yield found.all
    for logger in loggers:
        logger.removeHandler(found)


def test_hanging_up_is_no_failure_of_the_server(base, shared_prompts, records):
    batcher = ScriptedBatcher()
    app = app_over(base, shared_prompts, batcher, stall_seconds=0.3)
    body = json.dumps({"model": "writer", "prompt": "x", "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with running(app) as server, connected(int(server.url.rpartition(":")[2])) as sock:
        sock.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        until(lambda: batcher.tickets)
        long = batcher.token(5)
        object.__setattr__(long, "text", "x" * 100_000)
        for _ in range(100):
            batcher.tickets[0].push(long)
        until(lambda: any("stopped reading" in record.getMessage() for record in records))
        until(lambda: batcher.tickets[0].is_cancelled)
    assert not [record for record in records if record.exc_info]


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="only Linux can be told so")
def test_the_system_drops_what_is_not_taken():
    with listening("127.0.0.1", 0) as server:
        reset_unread(server, 0.5)
        server.listen()
        with connected(server.getsockname()[1]), server.accept()[0] as ours:
            ours.settimeout(20)
            with pytest.raises(TimeoutError) as caught:
                while True:
                    ours.send(b"x" * 65536)
            assert caught.value.errno is not None  # the system's, not that of settimeout
