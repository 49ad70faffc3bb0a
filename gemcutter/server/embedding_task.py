"""Texts as vectors: the states that leave the final norm, pooled over the tokens of a text.

Owns the prompts and the pooling. A model of this family was trained to continue text, not to embed it; these vectors are what
its last layer says, no more. Refuses to know HTTP. Read `wire/embeddings.py` for the bodies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from fastapi import Request
from torch import Tensor

from gemcutter.api import Model, PreparedRequest
from gemcutter.server.errors import too_long
from gemcutter.server.service import Service, unless_gone
from gemcutter.server.wire.embeddings import Pooling
from gemcutter.server.wire.fields import RawText


def prepare_input(model: Model, given: RawText, adapter: str | None) -> PreparedRequest:
    """Encode one input, with <bos> in front; meant for a worker thread. Raises RequestError or ApiError."""
    bos = model.tokenizer.bos_id
    ids = model.tokenizer.encode(given, bos=True) if isinstance(given, str) else list(given)
    if ids[0] != bos:
        ids = [bos, *ids]
    if len(ids) > model.engine.context:
        raise too_long(len(ids), 0, model.engine.context, field="input")
    named = {} if adapter is None else {"adapter": adapter}
    return model.prepare(ids, max_tokens=0, temperature=0.0, hidden_states=True, **named)  # type: ignore[arg-type]


async def embed(
    service: Service, request: Request, inputs: Sequence[RawText], pooling: Pooling, adapter: str | None
) -> tuple[Tensor, int]:
    """Return float32 vectors [inputs, hidden] and the number of tokens computed for them."""
    service.check_room(request, len(inputs))
    prepared = await service.work(lambda: [prepare_input(service.model, each, adapter) for each in inputs])
    found = await unless_gone(request, service.finish(service.open(prepared)))
    vectors = await service.work(lambda: torch.stack([pool(each.prompt.hidden_states, pooling) for each in found]))
    return vectors, sum(len(each.request.prompt) for each in prepared)


def pool(chunks_MD: Sequence[Tensor], pooling: Pooling) -> Tensor:
    """Return one float32 vector of the states of a prompt that begins with <bos>.

    Its state is no part of a mean, unless there is no other: every text has it, whatever it says.
    """
    states_MD = torch.cat([chunk.detach().cpu().float() for chunk in chunks_MD])
    return states_MD[-1] if pooling == "last" else states_MD[min(1, len(states_MD) - 1) :].mean(0)


def unit(vectors_BD: Tensor) -> Tensor:
    """Return vectors of length 1."""
    return torch.nn.functional.normalize(vectors_BD, dim=1)
