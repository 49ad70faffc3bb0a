"""What every request passes before its route: the key, and the id that its answer carries.

Owns one piece of ASGI middleware, plain, because wrapped responses hide that a client has left, and the name by which the rest
of the server knows a key: never the key itself. Read `app.py` for its place.
"""

from __future__ import annotations

import hashlib
import hmac
import uuid
from collections.abc import Sequence
from contextvars import ContextVar

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gemcutter.server.errors import ApiError, is_anthropic

REQUEST_ID = b"x-request-id"
CALLER: ContextVar[str] = ContextVar("caller", default="")  # a digest of the key that the request under way was let in with


class Gate:
    """Lets requests through that need no key, or have one of `keys` (without keys, all), and have at most `most` bytes.

    Without `tells_id` answers get no id: whoever stands before the gate adds it.
    """

    def __init__(
        self, app: ASGIApp, keys: Sequence[str], open_paths: Sequence[str], most: int = 0, tells_id: bool = True
    ) -> None:
        self._tells_id = tells_id
        self._app, self._most, self._keys, self._open = app, most, [key.encode() for key in keys], frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 401."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(REQUEST_ID) or uuid.uuid4().hex.encode()
        if REQUEST_ID not in headers:
            scope["headers"] = [*scope["headers"], (REQUEST_ID, given)]

        async def tell(message: Message) -> None:
            if self._tells_id and message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (REQUEST_ID, given[:200])]
            await send(message)

        key = self._find_key(headers)
        if self._keys and scope["path"] not in self._open and scope["method"] != "OPTIONS" and key is None:
            error = ApiError(401, "no valid API key: send it as `Authorization: Bearer KEY` or `x-api-key: KEY`")
            await error.response(is_anthropic(scope["path"]))(scope, receive, tell)
            return
        length = headers.get(b"content-length", b"")
        if self._most and length.isdigit() and int(length) > self._most:
            await self._too_large().response(is_anthropic(scope["path"]))(scope, receive, tell)
            return
        before = CALLER.set("" if key is None else hashlib.blake2b(key, digest_size=16).hexdigest())
        try:
            await self._app(scope, self._counted(receive), tell)
        finally:
            CALLER.reset(before)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body has more than {self._most:,} bytes, the operator's limit (--max-body-mb)")

    def _counted(self, receive: Receive) -> Receive:
        """Return what reads a body that did not tell its length, and raises ApiError (413) where it grows too large."""
        read = 0

        async def count() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if self._most and read > self._most:
                raise HTTPException(413, self._too_large().message)  # which the framework hands on as it is
            return message

        return count

    def _find_key(self, headers: dict[bytes, bytes]) -> bytes | None:
        """Return the key that a request brings if it is one of those that are let in, else None."""
        scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
        found = [bearer.strip()] if scheme.lower() == b"bearer" else []
        found += [headers[b"x-api-key"]] if b"x-api-key" in headers else []
        matches = [key for one in found for key in self._keys if hmac.compare_digest(one, key)]  # all, so that time tells nothing
        return matches[0] if matches else None
