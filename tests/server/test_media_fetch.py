"""Images at addresses: asked only where the operator allows it, never at a private address, within bytes and time.

Names are resolved by the tests: what a name means may change between two questions, as an attacker's does.
"""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import gemcutter
from gemcutter.api import Model
from gemcutter.server import media_fetch
from gemcutter.server.media_fetch import is_public
from gemcutter.server.options import ServerOptions
from tests.server.conftest import Running, running
from tests.server.seeing import PICTURE, data_url, image_url, png, text, user
from tests.trained import release_folder

HOST, OTHER, INNER, MIXED = "pictures.test", "more.test", "inner.test", "mixed.test"
LIMIT = 200_000
OPTIONS: dict[str, Any] = {
    "names": ("demo",),
    "max_soft_tokens": 70,
    "max_body_bytes": LIMIT,
    "media_timeout_s": 1.0,
    "allowed_media_domains": (HOST, "*.parts.test", INNER, MIXED),
}


class Pictures(BaseHTTPRequestHandler):
    """Serves what each path names."""

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers["Host"], self.headers["User-Agent"]))  # type: ignore[attr-defined]
        word, _, rest = self.path.lstrip("/").partition("/")
        getattr(self, f"send_{word.partition('.')[0].partition('?')[0]}")(rest)

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"content_length": str(len(body)), "content_type": "text/html"} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def send_a(self, _: str) -> None:
        self.answer(png())

    def send_page(self, _: str) -> None:
        self.answer(b"<html>no image</html>", content_type="image/png")

    def send_gone(self, _: str) -> None:
        self.answer(b"", 404)

    def send_empty(self, _: str) -> None:
        self.answer(b"")

    def send_to(self, target: str) -> None:
        self.answer(b"", 302, location=target)

    def send_round(self, _: str) -> None:
        self.answer(b"", 307, location="/round")

    def send_packed(self, _: str) -> None:
        self.answer(gzip.compress(png()), content_encoding="gzip")

    def send_large(self, _: str) -> None:
        self.answer(b"", content_length=str(LIMIT + 1))

    def send_half(self, _: str) -> None:
        self.answer(png() + bytes(LIMIT * 2 // 3))

    def send_endless(self, _: str) -> None:
        self.send_response(200)
        self.end_headers()
        try:
            while True:
                self.wfile.write(bytes(1 << 16))
        except OSError:
            pass

    def send_slow(self, _: str) -> None:
        self.send_response(200)
        self.end_headers()
        try:
            for _ in range(100):
                self.wfile.write(b"x")
                time.sleep(0.1)
        except OSError:
            pass

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with gemcutter.load(release_folder(), media="image", dtype="float32", context=1024) as found:
        yield found


@pytest.fixture(scope="module")
def follows(model: Model) -> Iterator[Running]:
    with running(model, ServerOptions(**OPTIONS, allow_loopback_media=True)) as found:
        yield found


@pytest.fixture(scope="module")
def web() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    server.asked = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch, web: ThreadingHTTPServer) -> dict[str, list[list[str]]]:
    """Return what each name resolves to, question by question, the last answer for ever."""
    web.asked.clear()  # type: ignore[attr-defined]
    found = {name: [["127.0.0.1"]] for name in (HOST, OTHER, "a.parts.test")}
    found |= {INNER: [["10.0.0.1"]], MIXED: [["127.0.0.1", "192.168.1.1"]]}

    async def resolve(host: str, port: int) -> list[str]:
        answers = found.get(host, [[host]])
        return answers.pop(0) if len(answers) > 1 else answers[0]

    monkeypatch.setattr(media_fetch, "resolve", resolve)
    return found


def at(web: ThreadingHTTPServer, path: str, host: str = HOST) -> dict[str, Any]:
    """Return an image at an address as a part of a message."""
    return {"type": "image_url", "image_url": {"url": f"http://{host}:{web.server_port}/{path}"}}


def tokenized(server: Running, *parts: Any) -> Any:
    return server.post("/tokenize", {"messages": [user(*parts, text())]})


def refused(server: Running, *parts: Any) -> str:
    answer = tokenized(server, *parts)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"].startswith("messages[0].content[")
    return str(error["message"])


def test_what_is_fetched_is_as_what_is_sent(follows: Running, web: ThreadingHTTPServer, names: dict[str, Any]) -> None:
    wanted = tokenized(follows, image_url(), image_url()).json()["tokens"]
    assert tokenized(follows, at(web, "a.png"), at(web, "a.png")).json()["tokens"] == wanted
    ((path, host, agent),) = web.asked  # type: ignore[attr-defined]
    assert (path, host) == ("/a.png", f"{HOST}:{web.server_port}")
    assert agent.startswith("gemcutter/")
    below = tokenized(follows, at(web, "a.png?size=1 2", "a.parts.test"), image_url()).json()["tokens"]
    assert below == wanted
    block = {"type": "image", "source": {"type": "url", "url": at(web, "a")["image_url"]["url"]}}
    body = {"model": "demo", "messages": [user(block, block, text())]}
    assert follows.post("/v1/messages/count_tokens", body).json() == {"input_tokens": len(wanted)}


@pytest.mark.parametrize(
    ("path", "host", "message"),
    [
        ("a", OTHER, "is not among those that this server asks"),
        ("a", "127.0.0.1", "is not among those"),
        ("a", f"user:secret@{HOST}", "with a name or a password"),
        ("a", INNER, "at an address that is not public"),
        ("a", MIXED, "at an address that is not public"),
        ("page", HOST, "no image that can be read"),
        ("gone", HOST, "answered with status 404"),
        ("empty", HOST, "sent nothing"),
        ("packed", HOST, "compressed"),
        ("large", HOST, "more than 200,000 bytes"),
        ("endless", HOST, "more than 200,000 bytes"),
        ("slow", HOST, "not fetched within 1 s"),
        ("round", HOST, "more than 3 redirects"),
        (f"to/http://{OTHER}/a", HOST, "is not among those"),
        (f"to/http://{INNER}/a", HOST, "not public"),
        ("to/file:///etc/passwd", HOST, "file is not http or https"),
        ("a", "[::1", "can't be fetched"),
    ],
)
def test_what_cannot_be_had_is_refused(
    follows: Running, web: ThreadingHTTPServer, names: dict[str, Any], path: str, host: str, message: str
) -> None:
    assert message in refused(follows, text("See: "), at(web, path, host))
    assert tokenized(follows, image_url()).status_code == 200


def test_redirects_to_hosts_that_are_allowed_are_followed(
    follows: Running, web: ThreadingHTTPServer, names: dict[str, Any]
) -> None:
    target = f"to/http://a.parts.test:{web.server_port}/a"
    assert tokenized(follows, at(web, target)).json() == tokenized(follows, image_url()).json()
    assert [path for path, *_ in web.asked] == [f"/{target}", "/a"]  # type: ignore[attr-defined]


def test_all_images_of_a_request_share_its_bytes(follows: Running, web: ThreadingHTTPServer, names: dict[str, Any]) -> None:
    assert tokenized(follows, at(web, "half")).status_code == 200
    assert "for all of a request" in refused(follows, at(web, "half"), at(web, "half?again"))


def test_this_machine_is_not_asked(model: Model, web: ThreadingHTTPServer, names: dict[str, Any]) -> None:
    with running(model, ServerOptions(**OPTIONS)) as server:
        assert "not public" in refused(server, at(web, "a"))
        names["a.parts.test"] = [["::ffff:127.0.0.1"]]
        assert "not public" in refused(server, at(web, "a", "a.parts.test"))
    assert web.asked == []  # type: ignore[attr-defined]


def test_a_name_that_changes_its_meaning_gains_nothing(
    follows: Running, web: ThreadingHTTPServer, names: dict[str, list[list[str]]]
) -> None:
    """What is connected to is the address that was checked; the next question is the next redirect's."""
    names[HOST] = [["127.0.0.1"], ["10.0.0.1"]]
    assert tokenized(follows, at(web, "a")).status_code == 200
    assert names[HOST] == [["10.0.0.1"]]
    names[HOST] = [["127.0.0.1"], ["169.254.169.254"]]
    assert "not public" in refused(follows, at(web, "to/a"))


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        *((address, True) for address in ("1.1.1.1", "2606:4700::1111", "64:ff9b::101:101", "::ffff:1.1.1.1")),
        *((address, False) for address in ("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.0.1", "169.254.169.254", "0.0.0.0")),
        *((address, False) for address in ("100.64.0.1", "224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1%eth0", "fc00::1")),
        *(
            (address, False)
            for address in ("::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:7f00:1::", "2001:0:4136:e378:8000:63bf:3fff:fdd2")
        ),
    ],
)
def test_public_addresses(address: str, expected: bool) -> None:
    assert is_public(address) is expected


def test_without_the_operators_word_no_address_is_followed(model: Model, web: ThreadingHTTPServer, names: dict[str, Any]) -> None:
    with running(model, ServerOptions(names=("demo",), allow_loopback_media=True)) as server:
        assert "addresses are not followed by this server" in refused(server, at(web, "a"))
    assert web.asked == []  # type: ignore[attr-defined]


def test_files_are_read_below_one_folder(model: Model, tmp_path: Path) -> None:
    root, outside = tmp_path / "media", tmp_path / "secret.png"
    (root / "in ner").mkdir(parents=True)
    for file in (outside, root / "a.png", root / "in ner" / "b.png"):
        file.write_bytes(png())
    (root / "link.png").symlink_to(outside)
    (root / "large.png").write_bytes(png() + bytes(LIMIT))
    options = {**OPTIONS, "allowed_local_media_path": str(root)}
    with running(model, ServerOptions(**options)) as server:
        wanted = tokenized(server, image_url()).json()
        for url in (f"file://{root}/a.png", f"file://localhost{root}/in%20ner/b.png"):
            assert tokenized(server, {"type": "image_url", "image_url": {"url": url}}).json() == wanted
        bad = (
            outside,
            root / "link.png",
            root / ".." / "secret.png",
            root / "none.png",
            root,
            Path("/etc/passwd"),
            Path("/proc/0"),
        )
        told = {refused(server, {"type": "image_url", "image_url": {"url": f"file://{path}"}}).partition(": ")[2] for path in bad}
        assert told == {"no file below the folder whose files this server reads (--allowed-local-media-path)"}
        assert "no file below" in refused(server, {"type": "image_url", "image_url": {"url": f"file://other{root}/a.png"}})
        assert "more than 200,000 bytes" in refused(
            server, {"type": "image_url", "image_url": {"url": f"file://{root}/large.png"}}
        )
    assert len(data_url(PICTURE)) < LIMIT
