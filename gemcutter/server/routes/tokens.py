"""POST /tokenize, /detokenize and /apply-template: the text side alone, as vLLM spells it; GET /tokenizer_info on request.

Owns their bodies. Raw prompts may spell markers here, as in /v1/completions. Read `chat_task.py` for conversations.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from gemcutter.server.preparation import prepare
from gemcutter.server.raw_task import spell
from gemcutter.server.service import Service
from gemcutter.server.wire.chat import ChatRequest, to_chat
from gemcutter.server.wire.fields import refuse


class TokenizeRequest(BaseModel):
    """A raw prompt, or a conversation with what a chat request may have beside it."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = None
    messages: list[Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(BaseModel):
    """Token ids."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    tokens: list[int] = Field(description="ids of the vocabulary")


def router(service: Service) -> APIRouter:
    """Return the routes over a service."""
    routes = APIRouter(tags=["text"])

    async def encode(body: TokenizeRequest, request: Request) -> list[int]:
        """Return the ids of a prompt or a conversation, those of the rows of images among them."""
        if body.model is not None:
            service.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            refuse("prompt", "expected either prompt or messages")
        text = body.prompt
        if text is not None:
            service.check_room(request)
            return await service.work(lambda: service.model.tokenizer.encode(text, bos=body.add_special_tokens is not False))
        fields = {name: value for name, value in (body.model_extra or {}).items() if name in ChatRequest.model_fields}
        wanted = ChatRequest.model_validate({**fields, "model": service.options.name, "messages": body.messages, "max_tokens": 0})
        chat = to_chat(wanted, service.options)
        return list((await prepare(service, request, chat)).request.prompt)

    @routes.post("/tokenize")
    async def tokenize(body: TokenizeRequest, request: Request) -> dict[str, Any]:
        """Encode a prompt or a conversation."""
        ids = await encode(body, request)
        strings = [spell(token, service.model.tokenizer) for token in ids] if body.return_token_strs else None
        return {"count": len(ids), "max_model_len": service.model.engine.context, "tokens": ids, "token_strs": strings}

    @routes.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        """Decode token ids, markers included."""
        tokenizer = service.model.tokenizer
        bad = next((token for token in body.tokens if not 0 <= token < tokenizer.num_ids), None)
        if bad is not None:
            refuse("tokens", f"{bad} is outside the vocabulary of {tokenizer.num_ids}")
        return {"prompt": tokenizer.decode(body.tokens, special=True)}

    @routes.post("/apply-template")
    async def apply_template(body: TokenizeRequest, request: Request) -> dict[str, Any]:
        """Show the prompt that a conversation becomes, as text."""
        if body.messages is None:
            refuse("messages", "expected a conversation")
        return {"prompt": service.model.tokenizer.decode(await encode(body, request), special=True)}

    if service.options.tokenizer_info:

        @routes.get("/tokenizer_info")
        async def tokenizer_info() -> dict[str, Any]:
            """Return what tokenizer_config.json names; lm-eval then sends prompts without <bos>."""
            template = service.model.template
            return {**service.model.tokenizer.special_tokens, "chat_template": None if template is None else template.source}

    return routes
