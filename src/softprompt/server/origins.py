"""Web pages of other origins (CORS): those that may ask, and a refusal that clients can read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from softprompt.errors import excerpt
from softprompt.server.problems import Problem


@final
class Origins:
    """An ASGI layer around the app; a browser's question in advance never reaches a route."""

    def __init__(self, app: ASGIApp, allowed: Sequence[str]) -> None:
        self._cors = CORSMiddleware(
            app,
            allow_origins=list(allowed),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer what a browser asks in advance, and pass on the rest."""
        if scope["type"] != "http":
            await self._cors(scope, receive, send)
            return
        headers = Headers(scope=scope)
        asks = scope["method"] == "OPTIONS" and "access-control-request-method" in headers
        if not (asks and "origin" in headers):
            await self._cors(scope, receive, send)
            return
        found = self._cors.preflight_response(request_headers=headers)
        if found.status_code < 400:
            await found(scope, receive, send)
            return
        origin, said = excerpt(headers["origin"]), bytes(found.body).decode()
        # What was allowed stays said; the rest is about the text that is not sent.
        kept = {name: value for name, value in found.headers.items() if name == "vary"}
        problem = Problem(
            found.status_code,
            f"a page of {origin!r} may not ask this ({said}); --allowed-origin lists those that may, "
            "with GET and POST",
            headers=kept,
        )
        await problem.response()(scope, receive, send)
