"""Images and sounds at addresses of other servers: fetched where the operator allows the host, and from nowhere private.

Owns who may be asked, checked on the very addresses that are connected to, so that a name that resolves to another address a
moment later gains nothing; redirects, each of which is checked alike; and the limits on time and bytes. Proxies of the
environment are not used, and no cookie or key is sent. Refuses to know what is fetched: what a server says of its type is not
believed. Read `preparation.py` for who asks, `options.py` for the operator's word.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from typing import Any, NoReturn
from urllib.parse import SplitResult, quote, urljoin, urlsplit

import httpcore

import gemcutter
from gemcutter.server.options import ServerOptions
from gemcutter.server.wire.fields import FieldError, refuse
from gemcutter.server.wire.media import MediaUrl

AT_ONCE = 8  # addresses that are asked at a time, of all requests
MOST_REDIRECTS = 3
REDIRECTS = (301, 302, 303, 307, 308)
PORTS = {"http": 80, "https": 443}
KEPT = "%/:@!$&'()*+,;=~-._"  # characters of a path that need no quoting
NAT64 = ipaddress.ip_network("64:ff9b::/96")
HEADERS = [
    (b"User-Agent", f"gemcutter/{gemcutter.__version__}".encode()),
    (b"Accept", b"image/*, audio/*, */*;q=0.5"),
    (b"Accept-Encoding", b"identity"),
]


class Refused(Exception):
    """An address that is not asked, or an answer that is not taken; the message says why."""


class MediaFetcher:
    """Fetches for all requests of a server; all methods belong to the event loop's thread."""

    def __init__(self, options: ServerOptions) -> None:
        self._hosts = [host.lower() for host in options.allowed_media_domains]
        self._timeout_s, self._most = options.media_timeout_s, options.max_body_bytes
        self._backend = GuardedBackend(options.allow_loopback_media)
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._tls: ssl.SSLContext | None = None

    async def fetch_all(self, urls: Sequence[MediaUrl]) -> dict[MediaUrl, bytes]:
        """Return what is found at addresses, each asked once. Raises FieldError for what can't be had, or is too much."""
        allowance = Allowance(self._most)
        firsts = {url.url: url for url in urls}
        found = await _all_or_none([self._fetch(url, allowance) for url in firsts.values()])
        by_address = dict(zip(firsts, found, strict=True))
        return {url: by_address[url.url] for url in urls}

    async def _fetch(self, url: MediaUrl, allowance: Allowance) -> bytes:
        try:
            async with self._slots, asyncio.timeout(self._timeout_s):
                return await self._follow(url.url, allowance)
        except Refused as error:
            raise FieldError(url.where, str(error)) from None
        except TimeoutError:
            refuse(url.where, f"not fetched within {self._timeout_s:g} s; send it as a data: URL")
        except (OSError, ValueError, httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException) as error:
            _refuse_error(url, error)

    async def _follow(self, address: str, allowance: Allowance) -> bytes:
        """Return what is found at an address, after redirects. Raises Refused, and what connections raise."""
        for _ in range(MOST_REDIRECTS + 1):
            parts = self._checked(address)
            async with httpcore.AsyncConnectionPool(ssl_context=self._context(parts), network_backend=self._backend) as pool:
                target, headers = _target(parts), [*HEADERS, (b"Host", _host_header(parts))]
                extensions = {"timeout": dict.fromkeys(("connect", "read", "write", "pool"), self._timeout_s)}
                async with pool.stream("GET", target, headers=headers, extensions=extensions) as answer:
                    told = {name.lower(): value for name, value in answer.headers}
                    if answer.status in REDIRECTS and b"location" in told:
                        address = urljoin(address, told[b"location"].decode("latin-1"))
                        continue
                    return await _read(answer, told, allowance)
        raise Refused(f"more than {MOST_REDIRECTS} redirects; give the address where they end")

    def _checked(self, address: str) -> SplitResult:
        """Return the parts of an address that may be asked. Raises Refused."""
        parts = urlsplit(address)
        host = (parts.hostname or "").lower()
        if parts.scheme.lower() not in PORTS:
            raise Refused(f"{parts.scheme or 'no scheme'} is not http or https")
        if parts.username is not None or parts.password is not None:
            raise Refused("an address with a name or a password in it is not asked")
        if not any(_matches(host, allowed) for allowed in self._hosts):
            told = f"the host {host[:80]!r} is not among those that this server asks (--allowed-media-domains)"
            raise Refused(f"{told}; send it as a data: URL")
        return parts

    def _context(self, parts: SplitResult) -> ssl.SSLContext | None:
        if parts.scheme.lower() != "https":
            return None
        self._tls = self._tls or ssl.create_default_context()
        return self._tls


class Allowance:
    """How many bytes may still come for a request."""

    def __init__(self, most: int) -> None:
        self.most = self.left = most

    def take(self, count: int) -> None:
        """Count bytes. Raises Refused for one too many."""
        self.left -= count
        if self.left < 0:
            raise Refused(f"more than {self.most:,} bytes, the operator's limit for all of a request (--max-body-mb)")


class GuardedBackend(httpcore.AsyncNetworkBackend):
    """Connects to addresses of the public network only; with `may_loop`, to this machine's own as well.

    A name is resolved once, all its addresses are checked, and these are connected to, not the name.
    """

    def __init__(self, may_loop: bool = False) -> None:
        self._may_loop, self._backend = may_loop, httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Return a connection to a host. Raises Refused where one of its addresses is private."""
        found = await resolve(host, port)
        if not found:
            raise Refused(f"the host {host[:80]!r} has no address")
        for address in found:
            if not is_public(address) and not (self._may_loop and ipaddress.ip_address(address).is_loopback):
                raise Refused(f"the host {host[:80]!r} is at an address that is not public")
        for place, address in enumerate(found):
            try:
                return await self._backend.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                if place == len(found) - 1:
                    raise
        raise AssertionError("there was an address")

    async def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None
    ) -> httpcore.AsyncNetworkStream:
        """Raise Refused: no address means one."""
        raise Refused("sockets of this machine are not asked")

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        await self._backend.sleep(seconds)


async def resolve(host: str, port: int) -> list[str]:
    """Return the addresses of a host, as the system resolves it, each once and in its order. Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def is_public(text: str) -> bool:
    """Return whether an address is one of the public network, whatever other address is written inside of it."""
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        inside = address.ipv4_mapped or address.sixtofour
        if inside is None and address in NAT64:
            inside = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inside is not None:
            return is_public(str(inside))
        if address.teredo is not None:
            return False
    return address.is_global and not address.is_multicast


def _matches(host: str, allowed: str) -> bool:
    """Return whether a host is the one that is allowed; *.example.org allows those below example.org."""
    return bool(host) and (host == allowed or (allowed.startswith("*.") and host.endswith(allowed[1:])) or allowed == "*")


def _host(parts: SplitResult) -> bytes:
    """Return the host of an address as it is looked up. Raises ValueError for a name that is none."""
    host = parts.hostname or ""
    return host.encode("ascii" if host.isascii() else "idna")


def _target(parts: SplitResult) -> httpcore.URL:
    """Return an address as it is asked for. Raises ValueError for a port or a name that is none."""
    scheme = parts.scheme.lower()
    path = quote(parts.path or "/", safe=KEPT)
    if parts.query:
        path += "?" + quote(parts.query, safe=f"{KEPT}?")
    return httpcore.URL(scheme=scheme.encode(), host=_host(parts), port=parts.port or PORTS[scheme], target=path.encode())


def _host_header(parts: SplitResult) -> bytes:
    host = _host(parts)
    name = b"[" + host + b"]" if b":" in host else host
    return name if parts.port in (None, PORTS[parts.scheme.lower()]) else name + f":{parts.port}".encode()


async def _read(answer: httpcore.Response, told: Mapping[bytes, bytes], allowance: Allowance) -> bytes:
    """Return an answer's body. Raises Refused for one that is no file, or larger than is allowed."""
    if answer.status != 200:
        raise Refused(f"the server answered with status {answer.status}")
    if told.get(b"content-encoding", b"identity").lower() != b"identity":
        raise Refused("the server sent it compressed, which was not asked for")
    length = told.get(b"content-length", b"")
    if length.isdigit() and int(length) > allowance.left:
        allowance.take(int(length))
    found = bytearray()
    async for chunk in answer.aiter_stream():
        allowance.take(len(chunk))
        found += chunk
    if not found:
        raise Refused("the server sent nothing")
    return bytes(found)


async def _all_or_none(work: Sequence[Coroutine[Any, Any, bytes]]) -> list[bytes]:
    """Return what all bring, or end the others and raise the error of the first that fails."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _refuse_error(url: MediaUrl, error: Exception) -> NoReturn:
    reason = str(error)[:120] or type(error).__name__
    refuse(url.where, f"can't be fetched ({reason}); send it as a data: URL")
