"""What stands before the replicas: one route that reads just enough of a request to send it to the right one.

Owns keys and sizes (as a server of its own would), the choice of what Ray's router sees of a request, and what becomes of a
request whose replica is lost: as long as nothing of its answer has been sent it is asked again elsewhere, afterwards its stream
ends with the API's own event for errors. Refuses to know models. Read `calls.py` for what is sent, `replica.py` for who answers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from gemcutter.ray.asgi_call import Part
from gemcutter.ray.calls import Call, Head, prompt_of, read_body, session_of
from gemcutter.ray.merged_metrics import merged
from gemcutter.ray.options import ReplicaOptions
from gemcutter.server import errors, sse
from gemcutter.server.errors import ApiError, is_anthropic
from gemcutter.server.gate import REQUEST_ID, Gate
from gemcutter.server.options import ServerOptions
from gemcutter.server.routes.health import OPEN_PATHS

ATTEMPTS = 4  # replicas that may fail a request, or be full, before it is given up
PAUSE_S = 0.25  # before the second attempt; each later one doubles it
MOST_PAUSE_S = 2.0
FULL = 429
ELSEWHERE = (FULL, 503)  # what one replica says of itself alone
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD"]
METRICS_S = 5.0  # that replicas have to say what they counted
RESPONSES = "/v1/responses"  # whose events have names and numbers
LOST = "the replica that answered is gone; ask again"
OWN_HEADERS = (REQUEST_ID, b"content-length", b"transfer-encoding", b"connection")  # which the ingress sets itself

log = logging.getLogger(__name__)


class ReplicaLost(Exception):
    """A replica did not take a request, or, having taken it, ended before its answer did."""

    def __init__(self, message: str, *, had_taken: bool) -> None:
        super().__init__(message)
        self.had_taken = had_taken


class Ingress:
    """The ingress deployment: Ray makes it with the handle of the replicas' deployment, and asks it for its application."""

    def __init__(self, replicas: Any, options: ReplicaOptions) -> None:
        self._dispatch, self._server = Dispatch(replicas, options), options.server

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the application that Ray's proxies call; the name is Ray's."""
        return create_ingress(self._dispatch, self._server)


def create_ingress(dispatch: Dispatch, server: ServerOptions) -> FastAPI:
    """Return the application before the replicas: every path is theirs, but /metrics, which is all of theirs together."""
    app = FastAPI(title="gemcutter", docs_url=None, redoc_url=None, openapi_url=None)  # a replica has these pages
    errors.install(app)

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Return what all replicas count, each under an `engine` label of its own."""
        return Response(merged(await dispatch.metrics()), media_type=CONTENT_TYPE_LATEST)

    @app.api_route("/{path:path}", methods=METHODS, response_model=None)
    async def forward(request: Request) -> Response:
        """Answer a request by a replica."""
        return await dispatch.forward(await dispatch.read(request))

    open_paths = (*OPEN_PATHS, "/")
    app.add_middleware(Gate, keys=server.api_keys, open_paths=open_paths, most=server.max_body_bytes, tells_id=False)
    return app


class Dispatch:
    """Sends calls to replicas through Ray's handle of their deployment."""

    def __init__(self, replicas: Any, options: ReplicaOptions) -> None:
        self._replicas, self._options = replicas, options

    async def read(self, request: Request) -> Call:
        """Return a request as a call."""
        raw = await request.body()
        body = read_body(raw) if request.method == "POST" else {}
        name = body.get("model")
        is_adapter = self._options.lora_root is not None and isinstance(name, str) and not self._options.server.serves(name)
        query: bytes = request.scope["query_string"]
        return Call(
            request.method,
            f"/{request.path_params['path']}",  # without the application's own prefix
            query,
            tuple(request.headers.raw),
            raw,
            prompt=prompt_of(body),
            session=session_of(body),
            adapter=str(name) if is_adapter else "",
        )

    async def forward(self, call: Call) -> Response:
        """Return the answer of a replica, or of another one where the first is lost or full. Raises ApiError (503).

        Replicas that are gone, or about to end, are asked for as long as nobody need have taken the request: while they are
        replaced, Ray names them for a while. One that ends while it answers may do so because of the request.
        """
        clock, last, attempt, failures, pause_s = asyncio.get_running_loop().time, None, 0, 0, PAUSE_S
        until = clock() + self._options.accept_timeout_s
        while failures < ATTEMPTS and (attempt < ATTEMPTS or clock() < until):
            if attempt:
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, MOST_PAUSE_S)
            attempt += 1
            try:
                last = await self._ask(call, attempt - 1)
            except ReplicaLost as error:
                log.warning("%s %s: %s", call.method, call.path, error)
                failures += error.had_taken
                continue
            if last.status_code not in ELSEWHERE and last.status_code != errors.OVERLOADED:
                return last
            failures += last.status_code == FULL
        if last is None:
            raise ApiError(503, "no replica could take the request; ask again later")
        return last

    async def metrics(self) -> Sequence[bytes]:
        """Return what each replica says of itself. Raises ApiError (503) where one is silent."""
        try:
            found: Sequence[bytes] = await self._replicas.broadcast("metrics").results_async(timeout_s=METRICS_S)
        except (RayError, RayServeException, TimeoutError) as error:
            raise ApiError(503, "a replica does not say what it counts; ask again") from error
        return found

    async def _ask(self, call: Call, attempt: int) -> Response:
        """Return the answer of one replica: whole, or as a stream of which nothing has been read. Raises ReplicaLost."""
        source = self._send(call, is_first=not attempt)
        parts, is_handed_on = _parts(source), False
        try:
            head = await _head(parts, self._patience_s(attempt))
            if head.is_stream:
                is_handed_on = True
                stream = sse.ClosingStream(_rest(parts, call), source.cancel, status_code=head.status)
                stream.raw_headers = _kept(head)
                return stream
            body = b"".join([part async for part in parts if isinstance(part, bytes)])
            response = Response(body, head.status)
            response.raw_headers = [*_kept(head), (b"content-length", str(len(body)).encode())]
            return response
        finally:
            if not is_handed_on:
                source.cancel()

    def _send(self, call: Call, is_first: bool) -> Any:
        """Return the parts of an answer as they come.

        Ray's prefix router reads the text of positional arguments, fails at an empty one, and sends what it knows to the same
        replica again; what is no prompt, or comes a second time, is therefore named, and goes to the shorter queue.
        """
        handle = self._replicas.options(
            method_name="answer", stream=True, multiplexed_model_id=call.adapter, session_id=call.session if is_first else ""
        )
        return handle.remote(call) if is_first and call.prompt else handle.remote(call=call)

    def _patience_s(self, attempt: int) -> float:
        """Return how long an attempt waits to be taken: half of the time, then half of the rest, and all of it in the end."""
        return self._options.accept_timeout_s / (1 << min(attempt + 1, ATTEMPTS - 1))


async def _head(parts: AsyncIterator[Part], patience_s: float) -> Head:
    """Wait until a replica has taken the call, which is soon, and then for the head of its answer, which may take long."""
    try:
        await asyncio.wait_for(anext(parts), patience_s)
    except TimeoutError:
        raise ReplicaLost(f"no replica took it within {patience_s:g} s", had_taken=False) from None
    except StopAsyncIteration:
        raise ReplicaLost("a replica ended without an answer", had_taken=False) from None
    try:
        head = await anext(parts)
    except StopAsyncIteration:
        raise ReplicaLost("a replica ended without an answer", had_taken=True) from None
    assert isinstance(head, Head)
    return head


async def _rest(parts: AsyncIterator[Part], call: Call) -> AsyncGenerator[bytes]:
    """Yield the bytes of a stream; where the replica is lost, its last event says so."""
    events = 0
    try:
        async for part in parts:
            assert isinstance(part, bytes)
            events += part.count(b"data: ")
            yield part
    except ReplicaLost as error:
        log.warning("%s %s: %s", call.method, call.path, error)
        yield last_event(call.path, events)


async def _parts(source: Any) -> AsyncGenerator[Part]:
    """Yield what a replica sends. Raises ReplicaLost."""
    had_taken = False
    try:
        async for part in source:
            had_taken = True
            yield part
    except RayTaskError:
        raise  # an error of our own, which another replica would repeat
    except (RayError, RayServeException) as error:
        raise ReplicaLost(f"{type(error).__name__}: {error}", had_taken=had_taken) from error


def last_event(path: str, events: int) -> bytes:
    """Return how a stream ends whose replica is gone, as the path's API says it; `events` have been sent."""
    error = ApiError(503, LOST)
    if is_anthropic(path):
        return sse.frame(error.body(anthropic=True), "error")
    if path.startswith(RESPONSES):
        told = {"type": "error", "code": "server_error", "message": LOST, "param": None, "sequence_number": events}
        return sse.frame(told, "error")
    return sse.frame(error.body(anthropic=False)) + sse.DONE


def _kept(head: Head) -> list[tuple[bytes, bytes]]:
    """Return the headers of a replica's answer that are the client's, too."""
    return [(name, value) for name, value in head.headers if name.lower() not in OWN_HEADERS]
