"""What all routes stand on: one model, who is let in, and the replies that run.

Owns the life of a request between its body and its last token: encoded on a worker thread, let in, submitted, watched while it
runs (its reader's patience, its time), counted, and cancelled when its client leaves. Refuses to know wire formats. Read
`chat_task.py` for what a conversation becomes, `bridge.py` for replies, `app.py` for who makes a service.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Request

from gemcutter.api import Model, PreparedRequest
from gemcutter.completion import Completion
from gemcutter.engine.request import RequestEvent
from gemcutter.engine.stats import EngineStats
from gemcutter.server.admission import Admission, Ticket
from gemcutter.server.bridge import Mailbox, Reply
from gemcutter.server.errors import ApiError, ClientGone, no_model
from gemcutter.server.gate import CALLER
from gemcutter.server.metrics import Metrics
from gemcutter.server.options import ServerOptions
from gemcutter.server.wire.media import MediaUrl

if TYPE_CHECKING:
    from gemcutter.server.media_fetch import MediaFetcher

Found = TypeVar("Found")
WORKERS = 2  # threads that encode prompts
MEDIA_WORKERS = 2  # threads that read images: one decodes while the other one's are encoded
LOOK_S = 0.5  # between two looks at the readers

log = logging.getLogger(__name__)


class Service:
    """One model and its requests; all methods belong to the event loop's thread."""

    def __init__(self, model: Model, options: ServerOptions) -> None:
        self.model, self.options = model, options
        self.created = int(time.time())
        self.admission = Admission(model.engine.scheduler.max_num_seqs + options.max_queue, options.max_queued_tokens)
        self.metrics = Metrics(options.name)
        self._workers = ThreadPoolExecutor(WORKERS, "gemcutter-encode")
        self._media_workers = ThreadPoolExecutor(MEDIA_WORKERS, "gemcutter-media")
        self._fetcher: MediaFetcher | None = None  # once an address is to be followed
        self._replies: dict[Reply, Ticket] = {}
        self._last_token_s: dict[Reply, float] = {}
        self._mailbox: Mailbox | None = None
        self._stats = EngineStats()  # of the last look
        self._watch: asyncio.Task[None] | None = None

    # ---- life ----

    def start(self) -> None:
        """Begin to serve on the running event loop."""
        self._mailbox = Mailbox(asyncio.get_running_loop())
        self._watch = asyncio.create_task(self._watch_readers())

    async def stop(self) -> None:
        """End every request and the threads; the model stays open."""
        if self._watch is not None:
            self._watch.cancel()
        self.admission.is_draining = True
        self.fail_all("the server is shutting down")
        for workers in (self._workers, self._media_workers):
            workers.shutdown(wait=False, cancel_futures=True)

    def drain(self, grace_s: float) -> None:
        """Take no more requests; those that run are told to end once `grace_s` seconds have gone by."""
        self.admission.is_draining = True
        asyncio.get_running_loop().call_later(grace_s, self.fail_all, "the server is shutting down")

    def fail_all(self, reason: str) -> None:
        """End every request with an error (503)."""
        for reply in list(self._replies):
            reply.fail(ApiError(503, reason))

    @property
    def is_ready(self) -> bool:
        """Return whether requests are taken."""
        return self._mailbox is not None and not self.admission.is_draining

    # ---- requests ----

    def check_model(self, name: str) -> str | None:
        """Return the adapter that a model's name stands for, None for the model itself. Raises ApiError (404)."""
        if name in self.model.adapters:
            return name
        if not self.options.serves(name):
            raise no_model(name, ", ".join((*self.options.names, *self.model.adapters)))
        return None

    async def work(self, function: Callable[[], Found]) -> Found:
        """Run a function that only computes, such as encoding, on a worker thread."""
        return await asyncio.get_running_loop().run_in_executor(self._workers, function)

    async def work_on_media(self, function: Callable[[], Found]) -> Found:
        """Run a function that reads images or sounds, which may take seconds, on a thread for these."""
        return await asyncio.get_running_loop().run_in_executor(self._media_workers, function)

    async def fetch(self, urls: Sequence[MediaUrl]) -> dict[MediaUrl, bytes]:
        """Return what is found at addresses that the operator allows. Raises FieldError for what can't be had."""
        if not urls:
            return {}
        if self._fetcher is None:
            from gemcutter.server.media_fetch import MediaFetcher

            self._fetcher = MediaFetcher(self.options)
        return await self._fetcher.fetch_all(urls)

    def check_room(self, request: Request, count: int = 1, media_bytes: int = 0) -> None:
        """Raise ApiError (429, 503) where a request can't be let in, before its prompt is encoded.

        `media_bytes` of its body are no text.
        """
        length = request.headers.get("content-length", "")
        self.admission.check(count, max(int(length) - media_bytes, 0) if length.isdecimal() else 0)

    def open(self, prepared: Sequence[PreparedRequest]) -> list[Reply]:
        """Submit requests together and return their replies. Raises ApiError (429) or RequestError."""
        assert self._mailbox is not None, "the service was not started"
        prepared = [self._salted(each) for each in prepared]
        for each in prepared:
            self.metrics.request_most.observe(each.request.max_tokens)
        tickets = list[Ticket]()
        try:
            for each in prepared:
                tickets.append(self.admission.enter(len(each.request.prompt)))
            replies = Reply.open_all(self.model, self._mailbox, prepared, self._note)
        except BaseException:
            for ticket in tickets:
                ticket.leave()
            raise
        self._replies |= dict(zip(replies, tickets, strict=True))
        return replies

    def _salted(self, prepared: PreparedRequest) -> PreparedRequest:
        """Return a request that shares cached prefixes with those of its own key alone, where the operator wants that."""
        if not self.options.prefix_cache_salt_per_key:
            return prepared
        request = prepared.request
        return replace(prepared, request=replace(request, cache_salt=f"{CALLER.get()}:{request.cache_salt or ''}"))

    async def finish(self, replies: Sequence[Reply]) -> list[Completion]:
        """Read replies to their ends and close them. Raises the error of the first that fails."""
        try:
            return list(await asyncio.gather(*(reply.finish() for reply in replies)))
        finally:
            self.close(replies)

    def close(self, replies: Sequence[Reply]) -> None:
        """End requests, those that have ended by themselves too, and count them."""
        for reply in replies:
            reply.close()
            ticket = self._replies.pop(reply, None)
            self._last_token_s.pop(reply, None)
            if ticket is None:
                continue
            ticket.leave()
            if reply.completion is None:
                self.metrics.aborted()
            else:
                self.metrics.finished(reply.completion, reply.completion.finish_reason)
                if reply.on_end is not None and not self.admission.is_draining:
                    self._workers.submit(reply.on_end, reply.completion)

    def _note(self, reply: Reply, event: RequestEvent) -> None:
        """Count a token."""
        ticket = self._replies.get(reply)
        if ticket is not None:
            ticket.computed()
        if event.token is None:
            return
        before = self._last_token_s.get(reply)
        self._last_token_s[reply] = event.time_s
        if before is None:
            self.metrics.ttft.observe(max(event.time_s - reply.submitted_s, 0.0))
        else:
            self.metrics.inter_token.observe(max(event.time_s - before, 0.0))

    async def _watch_readers(self) -> None:
        """Cancel requests whose readers sleep, or whose time is over."""
        while True:
            await asyncio.sleep(LOOK_S)
            now, options = time.perf_counter(), self.options
            for reply in list(self._replies):
                lag = reply.reader_lag_s(now)
                if options.reader_patience_s and lag > options.reader_patience_s:
                    log.warning("a client has read nothing for %.0f s; its request is cancelled", lag)
                    reply.fail(ApiError(408, "the reply was not read; the request is cancelled"))
                if options.request_timeout_s and now - reply.submitted_s > options.request_timeout_s:
                    reply.fail(ApiError(408, f"the request took longer than {options.request_timeout_s:g} s"))

    def refresh(self, metrics: Metrics) -> None:
        """Bring the gauges up to date."""
        found = self.model.engine.stats()
        metrics.worked(self._stats, found)
        self._stats = found
        if (media := self.model.media) is not None:
            metrics.looked_up(media.queries, media.hits)
        metrics.running.set(found.running)
        metrics.waiting.set(found.waiting)
        metrics.cache_usage.set(found.kv_usage)
        count = self.admission.rejected
        self.admission.rejected = 0
        metrics.rejections.inc(count)


async def unless_gone(request: Request, work: Coroutine[Any, Any, Found]) -> Found:
    """Return what `work` brings, or cancel it when the client leaves first. Raises ClientGone."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_leaves(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        await _end(task)
        await _end(gone)


async def _leaves(request: Request) -> None:
    """Wait until the client closes its connection; the body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _end(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
