"""GET /health, /ready, /ping, /version and /metrics: what operators and balancers ask, without a key.

Read `metrics.py` for the names.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

import gemcutter
from gemcutter.server.errors import RETRY_S
from gemcutter.server.service import Service

OPEN_PATHS = ("/health", "/ready", "/ping", "/version", "/metrics")


def router(service: Service) -> APIRouter:
    """Return the routes over a service."""
    routes = APIRouter(tags=["operation"])

    @routes.get("/health", response_class=Response)
    @routes.get("/ping", include_in_schema=False)
    async def health() -> Response:
        """Answer while the process lives."""
        return Response(status_code=200)

    @routes.get("/ready", response_model=None)
    async def ready() -> Response:
        """Answer 200 while requests are taken, 503 while the server ends."""
        if service.is_ready:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "draining"}, 503, {"retry-after": str(RETRY_S)})

    @routes.get("/version")
    async def version() -> dict[str, Any]:
        """Return the version of gemcutter."""
        return {"version": gemcutter.__version__}

    @routes.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Return everything that is counted, for Prometheus."""
        return Response(service.metrics.text(service.refresh), media_type=CONTENT_TYPE_LATEST)

    return routes
