"""The page at ``/``: files of this package, sent as they are."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from starlette.responses import FileResponse

_FOLDER = Path(__file__).with_name("page")
_HEADERS = {
    # Nothing but this server's own files runs or is asked.
    "content-security-policy": (
        "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def page_routes() -> APIRouter:
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
