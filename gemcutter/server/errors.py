"""How an error leaves the server: one status, one shape for each API, and no words that belong to Python.

Owns `ApiError`, the translation of every exception into one, and the two shapes of bodies. Refuses to know routes; the path alone
decides the shape. Read `app.py` for where handlers are installed, `sse.py` for errors after the headers.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from typing import Any, Literal

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from gemcutter.errors import CapacityError, GemcutterError, NumericError, RankError, RequestError
from gemcutter.server.wire.fields import FieldError

ANTHROPIC = "/v1/messages"  # how the paths begin whose errors have the other shape
RETRY_S = 2  # that a client is asked to wait where nothing better is known

# By status: the type of an error on OpenAI's routes, and on Anthropic's.
TYPES: Mapping[int, tuple[str, str]] = {
    400: ("invalid_request_error", "invalid_request_error"),
    401: ("invalid_request_error", "authentication_error"),
    404: ("invalid_request_error", "not_found_error"),
    405: ("invalid_request_error", "invalid_request_error"),
    408: ("timeout_error", "timeout_error"),
    413: ("invalid_request_error", "request_too_large"),
    415: ("invalid_request_error", "invalid_request_error"),
    429: ("rate_limit_error", "rate_limit_error"),
    503: ("service_unavailable_error", "overloaded_error"),
}
CODES = {401: "invalid_api_key", 413: "request_too_large", 429: "rate_limit_exceeded", 503: "unavailable", 500: "internal_error"}
MEMBERS = ("str", "int", "float", "bool")  # of unions, which pydantic puts into a place and no client knows
GONE = 499  # that a log shows of a client that left
OVERLOADED = 529  # what Anthropic's API says for 503

log = logging.getLogger(__name__)


class OpenAIError(BaseModel):
    """What went wrong, as OpenAI's API says it."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIErrorBody(BaseModel):
    """The body of an error on every route but Anthropic's."""

    error: OpenAIError


class AnthropicError(BaseModel):
    """What went wrong, as Anthropic's API says it."""

    type: str
    message: str


class AnthropicErrorBody(BaseModel):
    """The body of an error on Anthropic's routes."""

    type: Literal["error"]
    error: AnthropicError
    request_id: str


def documented(anthropic: bool = False) -> dict[int | str, dict[str, Any]]:
    """Return what the OpenAPI document says of a route's errors; FastAPI's own 422, which never leaves, goes away with it."""
    body = {"model": AnthropicErrorBody if anthropic else OpenAIErrorBody}
    return {"4XX": {**body, "description": "The request can't be served"}, "5XX": {**body, "description": "Not now"}}


class ApiError(GemcutterError):
    """An answer that is an error: a status, a message, and the field concerned."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code = code or CODES.get(status)
        self.retry_s = RETRY_S if retry_s is None and status in (429, 503) else retry_s

    def body(self, anthropic: bool, request_id: str | None = None) -> dict[str, Any]:
        """Return the body in an API's own shape."""
        kinds = TYPES.get(self.status, ("internal_error", "api_error"))
        if anthropic:
            error = {"type": kinds[1], "message": self.message}
            return {"type": "error", "error": error, "request_id": request_id or f"req_{uuid.uuid4().hex}"}
        return {"error": {"message": self.message, "type": kinds[0], "param": self.param, "code": self.code}}

    def response(self, anthropic: bool, request_id: str | None = None) -> JSONResponse:
        """Return the whole answer; clients retry only what may succeed."""
        headers = {"x-should-retry": "true" if self.status in (408, 429, 503) else "false"}
        if self.retry_s is not None:
            headers["retry-after"] = str(self.retry_s)
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        status = OVERLOADED if anthropic and self.status == 503 else self.status
        return JSONResponse(self.body(anthropic, request_id), status, headers)


class ClientGone(Exception):
    """The client has closed its connection; nobody waits for an answer."""


def no_model(name: str, known: str) -> ApiError:
    """Return the error for a model that is not served."""
    return ApiError(404, f"the model {name!r} does not exist; this server has: {known}", param="model", code="model_not_found")


def too_long(prompt: int, wanted: int, context: int, anthropic: bool = False, field: str = "messages") -> ApiError:
    """Return the error for a prompt, in the field `field`, and a reply that the context does not hold."""
    message = f"this model's maximum context length is {context} tokens, but the prompt has {prompt}"
    message += f" and {wanted} more are wanted: requested {prompt + wanted}; shorten the prompt or lower max_tokens"
    if anthropic:
        message = (
            f"prompt is too long: {prompt + wanted} tokens > {context} maximum ({prompt} of the prompt, {wanted} of the reply)"
        )
    return ApiError(400, message, param=field, code="context_length_exceeded")


def as_api_error(error: BaseException) -> ApiError:
    """Return what a client is told of an error. What is no fault of the request's is logged, and told without details."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, FieldError):
        return ApiError(error.status, str(error), param=error.param or None, code=error.code)
    if isinstance(error, RequestError):
        if "the context holds" in str(error):  # clients shorten the conversation when they read these words
            text = f"maximum context length exceeded: prompt is too long: {error}"
            return ApiError(400, text, param=_param(error), code="context_length_exceeded")
        return ApiError(400, str(error), param=_param(error))
    if isinstance(error, RankError):
        return ApiError(503, str(error))
    if isinstance(error, CapacityError):
        return ApiError(503, str(error))
    if isinstance(error, NumericError):
        log.error("a request failed: %s", error)
        return ApiError(500, str(error))
    log.error("a request failed", exc_info=error)
    return ApiError(500, "internal error; the server's log has more")


def _param(error: RequestError) -> str | None:
    """Return the field that the first problem names, in front of its colon."""
    first = error.problems[0] if error.problems else str(error)
    name, colon, _ = first.partition(":")
    name = name.removeprefix("sampling.").removeprefix("request.")
    return name if colon and " " not in name and len(name) < 80 else None


def is_anthropic(path: str) -> bool:
    """Return whether a path's errors have Anthropic's shape."""
    return path == ANTHROPIC or path.startswith(f"{ANTHROPIC}/")


def install(app: FastAPI) -> None:
    """Let every error of the app leave in its API's shape."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        return _translate(error).response(is_anthropic(request.url.path), request.headers.get("x-request-id"))

    async def forget(_: Request, __: Exception) -> Response:
        return Response(status_code=GONE)

    app.add_exception_handler(ClientGone, forget)
    for kind in (GemcutterError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)


def _translate(error: Exception) -> ApiError:
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        return ApiError(400, f"{spell_path(first['loc'])}: {first['msg']}", param=spell_path(first["loc"]) or None)
    if isinstance(error, HTTPException):
        if error.status_code == 404:
            return ApiError(404, "no such route; GET /docs lists them", code="not_found")
        return ApiError(error.status_code, str(error.detail))
    return as_api_error(error)


def spell_path(place: tuple[int | str, ...]) -> str:
    """Return a place in a body as clients write it: messages[2].content."""
    words = place[1:] if place and place[0] in ("body", "query", "path") else place
    known = [word for word in words if isinstance(word, int) or not ("[" in word or word in MEMBERS)]
    text = "".join(f"[{word}]" if isinstance(word, int) else f".{word}" for word in known)
    return text.removeprefix(".") or "body"
