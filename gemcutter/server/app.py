"""The server's application: a model behind the routes, with errors, keys and limits in front.

Owns how the parts are put together. Refuses to know processes, ports and signals. Read `service.py` for what the routes stand on,
`routes/` for one file each, `cli/serve.py` for the process.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI

import gemcutter
from gemcutter.api import Model
from gemcutter.server import errors
from gemcutter.server.gate import Gate
from gemcutter.server.options import ServerOptions
from gemcutter.server.routes import (
    audio,
    chat_completions,
    chat_page,
    completions,
    embeddings,
    health,
    lora,
    messages,
    models,
    responses,
    score,
    tokens,
)
from gemcutter.server.service import Service

ROUTERS: tuple[Callable[[Service], APIRouter], ...] = (
    models.router,
    chat_completions.router,
    completions.router,
    responses.router,
    messages.router,
    audio.router,
    tokens.router,
    embeddings.router,
    score.router,
    lora.router,
    health.router,
)


def create_app(model: Model, options: ServerOptions | None = None) -> FastAPI:
    """Return the application that serves a model; `app.state.service` is its service. The model stays open when it ends."""
    service = Service(model, options or ServerOptions())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()

    app = FastAPI(title="gemcutter", version=gemcutter.__version__, lifespan=lifespan, redirect_slashes=False)
    app.state.service = service
    errors.install(app)
    for make in ROUTERS:
        app.include_router(make(service), responses=errors.documented(anthropic=make is messages.router))
    app.include_router(chat_page.router)
    app.add_middleware(
        Gate, keys=service.options.api_keys, open_paths=(*health.OPEN_PATHS, "/"), most=service.options.max_body_bytes
    )
    return app
