"""POST /v1/score: how alike texts are, as the cosine of their vectors; body and answer are vLLM's.

Owns the body of the answer. Read `wire/embeddings.py` for the request's, `embedding_task.py` for the vectors.
"""

from __future__ import annotations

import uuid
from typing import Any

from fastapi import APIRouter, Request

from gemcutter.server.embedding_task import embed, unit
from gemcutter.server.service import Service
from gemcutter.server.wire.embeddings import ScoreRequest, read_pairs


def router(service: Service) -> APIRouter:
    """Return the routes over a service."""
    routes = APIRouter(tags=["embeddings"])

    @routes.post("/v1/score")
    @routes.post("/score", include_in_schema=False)
    async def score(body: ScoreRequest, request: Request) -> dict[str, Any]:
        """Compare one text with one or several, or two lists in pairs."""
        adapter = service.check_model(body.model)
        texts, pairs = read_pairs(body, service.options)
        vectors, tokens = await embed(service, request, texts, body.pooling, adapter)
        units = unit(vectors)
        data = [
            {"index": index, "object": "score", "score": float(units[first] @ units[second])}
            for index, (first, second) in enumerate(pairs)
        ]
        return {
            "id": f"score-{uuid.uuid4().hex}",
            "object": "list",
            "created": service.created,
            "model": body.model,
            "data": data,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }

    return routes
