"""Whether the server lives, whether it may be sent requests, what it is, and its numbers."""

from __future__ import annotations

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from softprompt.artifacts import installed_versions
from softprompt.server.problems import Problem
from softprompt.server.service import USER, in_thread, service_of

router = APIRouter(tags=["health"])


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health() -> dict[str, str]:
    """Answer while the process does."""
    return {"status": "ok"}


@router.head("/ready", include_in_schema=False)
@router.get("/ready")
async def ready(request: Request) -> dict[str, str]:
    """Answer while requests can be taken; 503 otherwise, which takes it out of a load balancer."""
    service = service_of(request)
    if service.draining:
        raise Problem(503, "the server is stopping")
    if not service.batcher.healthy:
        failure = service.batcher.failure
        # Its kind alone: a message may hold what is nobody's business.
        why = f" ({type(failure).__name__})" if failure else ""
        raise Problem(503, f"the engine has stopped{why}; see the log and restart the server")
    if not service.scorer.healthy:
        raise Problem(503, "label scoring has stopped; see the log and restart the server")
    await in_thread(service.registry.root.check)
    return {"status": "ready"}


@router.get("/version")
async def version() -> dict[str, str]:
    """Show the versions that answers depend on."""
    return installed_versions()


@router.get("/metrics", dependencies=[USER], response_class=Response)
async def metrics(request: Request) -> Response:
    """Show the numbers in Prometheus' text format."""
    return Response(service_of(request).meter.page(), media_type=CONTENT_TYPE_LATEST)
