"""POST /v1/embeddings: vectors of texts.

Owns the body of the answer. Read `wire/embeddings.py` for the request's, `embedding_task.py` for the vectors.
"""

from __future__ import annotations

import base64
from typing import Any

from fastapi import APIRouter, Request
from torch import Tensor

from gemcutter.server.embedding_task import embed, unit
from gemcutter.server.service import Service
from gemcutter.server.wire.embeddings import EmbeddingRequest, read_inputs


def router(service: Service) -> APIRouter:
    """Return the route over a service."""
    routes = APIRouter(tags=["embeddings"])

    @routes.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest, request: Request) -> dict[str, Any]:
        """Return the state after the final norm, pooled over each text's tokens."""
        adapter = service.check_model(body.model)
        vectors, tokens = await embed(service, request, read_inputs(body, service.options), body.pooling, adapter)
        shown = unit(vectors) if body.normalize else vectors
        data = [
            {"object": "embedding", "index": index, "embedding": spell(each, body.encoding_format)}
            for index, each in enumerate(shown)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": data, "model": body.model, "usage": usage}

    return routes


def spell(vector: Tensor, encoding: str) -> list[float] | str:
    """Return a vector as numbers, or as base64 of little-endian float32."""
    if encoding == "base64":
        return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()
    return [float(value) for value in vector.tolist()]
