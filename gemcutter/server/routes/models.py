"""GET /v1/models: what is served, in one body that OpenAI's and Anthropic's clients both read.

Owns that body. Read `service.py` for which names a request may use.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter

from gemcutter.server.service import Service


def router(service: Service) -> APIRouter:
    """Return the routes over a service."""
    routes = APIRouter(tags=["models"])

    @routes.get("/v1/models")
    async def models() -> dict[str, Any]:
        """List the model, its aliases and its adapters."""
        names = [name for name in service.options.names if name != "*"] + list(service.model.adapters)
        found = [describe(service, name) for name in names or [service.options.name]]
        ends = {"first_id": found[0]["id"], "last_id": found[-1]["id"]}
        return {"object": "list", "data": found, "has_more": False, **ends}

    @routes.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """Describe one of them."""
        service.check_model(name)
        return describe(service, name)

    return routes


def describe(service: Service, name: str) -> dict[str, Any]:
    """Return a model as both APIs describe one."""
    own, context = service.options.name, service.model.engine.context
    is_adapter = name in service.model.adapters
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "gemcutter",
        "root": own,
        "parent": own if is_adapter else None,
        "max_model_len": context,
        "permission": [],
        "type": "model",
        "display_name": name,
        "created_at": datetime.fromtimestamp(service.created, UTC).isoformat().replace("+00:00", "Z"),
        "max_input_tokens": context,
        "max_tokens": context,
        "lifecycle": "active",
        "input_modalities": ["text", *service.model.kinds],
    }
