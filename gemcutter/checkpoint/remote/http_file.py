"""Files on a web server, read by byte ranges.

Owns the requests: redirects (a token goes to the server it was given for and to no other), deadlines, the proof that an answer
is the range that was asked for, and the count of bytes that came. A server without ranges is told from one with them before any
body is read. Refuses to know checkpoints and hubs. Read next: `remote_source.py`.
"""

from __future__ import annotations

import http.client
import mmap
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urljoin, urlsplit

from gemcutter.errors import CheckpointError
from gemcutter.sidecar.small_file import SMALL_BYTES, shown

AHEAD_BYTES = 4096  # the least that is asked for: shorter answers cost the same round trip
PATIENCE_S = 20.0  # without a byte
DEADLINE_S = 120.0  # of one whole answer
MAX_REDIRECTS = 5
REDIRECTS = (301, 302, 303, 307, 308)
BLOCK_BYTES = 1 << 16

_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})")


@dataclass(frozen=True, slots=True)
class Reply:
    """What a server answered: `total_bytes` is the size of the whole file, as far as it was told."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    total_bytes: int | None


@dataclass(slots=True)
class Client:
    """Ask web servers, and count what they send. `headers` go to the server at `origin` alone, as a token must."""

    origin: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    requests: int = 0
    received_bytes: int = 0

    def get(self, url: str, limit_bytes: int) -> Reply:
        """Return a whole small file, or the server's refusal of it. Raises CheckpointError if it is larger than the limit."""
        return self._ask(url, None, limit_bytes)

    def get_range(self, url: str, start: int, stop: int) -> Reply:
        """Return bytes `start` to `stop` - 1, fewer at the file's end, or the server's refusal.

        Raises CheckpointError, before the body is read, if the server sends anything else.
        """
        return self._ask(url, (start, stop), stop - start)

    def _ask(self, url: str, span: tuple[int, int] | None, limit_bytes: int) -> Reply:
        deadline = time.monotonic() + DEADLINE_S
        at = url
        for _ in range(MAX_REDIRECTS + 1):
            try:
                with self._open(at, span) as response:
                    if response.status in REDIRECTS and response.headers.get("Location"):
                        at = _follow(at, response.headers["Location"])
                        continue
                    return self._read(response, url, span, limit_bytes, deadline)
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = error.reason if isinstance(error, urllib.error.URLError) else error
                raise CheckpointError(
                    f"{place(url)} can't be read ({type(reason).__name__}: {reason}); check the address and the network"
                ) from error
        raise CheckpointError(f"{place(url)} redirects more than {MAX_REDIRECTS} times; give the file's own address")

    def _open(self, url: str, span: tuple[int, int] | None) -> http.client.HTTPResponse:
        asked = {"Accept-Encoding": "identity", "User-Agent": "gemcutter"}
        if origin_of(url) == self.origin:
            asked |= self.headers
        if span is not None:
            asked["Range"] = f"bytes={span[0]}-{span[1] - 1}"
        self.requests += 1
        response: http.client.HTTPResponse = _opener().open(urllib.request.Request(url, headers=asked), timeout=PATIENCE_S)
        return response

    def _read(
        self, response: http.client.HTTPResponse, url: str, span: tuple[int, int] | None, limit_bytes: int, deadline: float
    ) -> Reply:
        headers = {name.lower(): value for name, value in response.headers.items()}
        declared = headers.get("content-length", "")
        length = int(declared) if declared.isdecimal() and len(declared) < 20 else None
        if response.status not in (200, 206):
            return Reply(response.status, headers, b"", None)
        total = length
        if span is not None and response.status == 206:
            total = _judge_range(headers.get("content-range", ""), span, url)
        elif span is not None and (span[0] or length is None or length > limit_bytes):
            raise CheckpointError(
                f"{place(url)}: the server sends whole files only (HTTP {response.status} to a request for "
                f"{limit_bytes:,} bytes); nothing was downloaded. Download the file yourself and pass its path"
            )
        if length is not None and length > limit_bytes:
            raise CheckpointError(f"{place(url)} takes {length:,} bytes, above the {limit_bytes:,} that are read of such a file")
        body = bytearray()
        while block := response.read1(min(BLOCK_BYTES, limit_bytes + 1 - len(body))):
            body += block
            self.received_bytes += len(block)
            if len(body) > limit_bytes:
                raise CheckpointError(f"{place(url)} sends more than the {limit_bytes:,} bytes that were asked for")
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(body):,} bytes in {DEADLINE_S:.0f} s")
        if length is not None and len(body) < length:
            raise CheckpointError(f"{place(url)}: the connection ended after {len(body):,} of {length:,} bytes; try again")
        return Reply(response.status, headers, bytes(body), total)


class HttpFile:
    """Read the head of one file on a web server, as far as it is asked for. Its tensors can't be mapped.

    Raises CheckpointError where the server can't be read, ValueError where it has no such file.
    """

    __slots__ = ("_client", "_head", "_url", "path", "size_bytes")

    def __init__(self, client: Client, url: str, path: Path) -> None:
        self.path, self._client, self._url = path, client, url
        reply = client.get_range(url, 0, AHEAD_BYTES)
        if reply.status == 416:  # no byte of an empty file can be asked for
            reply = Reply(200, reply.headers, b"", 0)
        refuse(reply, url)
        self._head = bytearray(reply.body)
        self.size_bytes = len(reply.body) if reply.total_bytes is None else reply.total_bytes

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset` on, fewer at the file's end. What is read in order is kept, and read once.

        Raises ValueError for more than headers take, CheckpointError where the server fails.
        """
        stop = min(offset + length, self.size_bytes)
        if stop - offset > SMALL_BYTES or (offset <= len(self._head) and stop > SMALL_BYTES + 8):
            raise ValueError(f"has a header of more than {SMALL_BYTES:,} bytes, which is not read over a network")
        start = len(self._head)
        if offset > start:
            return self._fetch(offset, stop) if stop > offset else b""
        if stop > start:
            self._head += self._fetch(start, min(max(stop, start + AHEAD_BYTES), self.size_bytes))
        return bytes(self._head[offset:stop])

    def _fetch(self, start: int, stop: int) -> bytes:
        reply = self._client.get_range(self._url, start, stop)
        refuse(reply, self._url)
        if reply.total_bytes != self.size_bytes:
            raise CheckpointError(f"{place(self._url)} changed while it was being read; try again")
        return reply.body

    def mapping(self) -> mmap.mmap:
        """Raise CheckpointError: only headers are read over a network."""
        raise CheckpointError(
            f"{self.path} is on a server, and only its header was read; download the checkpoint to use its weights"
        )

    def release(self, offset: int, nbytes: int) -> None:
        """Do nothing: there are no pages of a mapping."""

    def expect_scattered_reads(self, offset: int, nbytes: int) -> None:
        """Do nothing: there are no pages of a mapping."""


def refuse(reply: Reply, url: str) -> None:
    """Raise for a reply that is no file: ValueError if there is none, CheckpointError, with the remedy, for all else."""
    if reply.status in (404, 410):
        raise ValueError(f"is absent on the server (HTTP {reply.status})")
    if reply.status in (401, 403):
        raise CheckpointError(
            f"{place(url)}: access refused (HTTP {reply.status}); if it is on the hub, accept its terms there and set HF_TOKEN "
            "to a token that may read it"
        )
    if reply.status not in (200, 206):
        raise CheckpointError(f"{place(url)}: the server answered HTTP {reply.status}; try again later")


def place(url: str) -> str:
    """Return an address as a message may show it: without credentials and signatures."""
    parts = urlsplit(url)
    return shown(f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}")[1:-1]


def origin_of(url: str) -> str:
    """Return scheme, host and port of an address: what a token belongs to."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}".lower()


def _opener() -> urllib.request.OpenerDirector:
    """Return an opener that follows no redirects and gives every status back as it came."""
    opener = urllib.request.OpenerDirector()
    for handler in (urllib.request.ProxyHandler(), urllib.request.HTTPHandler(), urllib.request.HTTPSHandler()):
        opener.add_handler(handler)
    return opener


def _follow(url: str, location: str) -> str:
    target = urljoin(url, location)
    if urlsplit(target).scheme not in ("http", "https"):
        raise CheckpointError(f"{place(url)} redirects to {shown(target)}, which is no web address")
    return target


def _judge_range(content_range: str, span: tuple[int, int], url: str) -> int:
    """Return the file's size if the range is the one that was asked for. Raises CheckpointError."""
    found = _CONTENT_RANGE.fullmatch(content_range)
    if found:
        first, last, total = map(int, found.groups())
        if first == span[0] and last == min(span[1], total) - 1:
            return total
    raise CheckpointError(
        f"{place(url)}: asked for bytes {span[0]}-{span[1] - 1}, the server sends {shown(content_range)}; "
        "download the file yourself and pass its path"
    )
