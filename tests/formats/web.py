"""A web server for tests: files of a folder by byte ranges, with the faults of real servers on demand, and a hub in miniature.

Owns `Site`, which counts what it sends. Refuses to judge. Read `test_remote.py` for who visits it.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

from gemcutter import config as configs
from gemcutter.checkpoint.formats import hf
from gemcutter.checkpoint.write.synth import SIZES, spell_config
from gemcutter.plan import derive

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Site:
    """What a server serves and how; `sent_bytes` counts bodies, `seen` the requests as (path, range, authorization)."""

    folder: Path
    url: str = ""
    fault: str = ""
    repo: str = "owner/model"
    elsewhere: str = ""  # where redirects lead
    sent_bytes: int = 0
    seen: list[tuple[str, str | None, str | None]] = field(default_factory=list)


@contextmanager
def serve(folder: Path, **options: Any) -> Iterator[Site]:
    """Serve a folder on this machine, and as the repository `repo` of a hub."""
    site = Site(folder, **options)

    class Visitor(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path).lstrip("/")
            site.seen.append((path, self.headers.get("Range"), self.headers.get("Authorization")))
            status, headers, body = _answer(site, path, self.headers.get("Range"), self.headers.get("Authorization"))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            try:
                for block in body:
                    site.sent_bytes += len(block)  # before it is sent, so that whoever has it finds it counted
                    self.wfile.write(block)
            except ConnectionError:
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Visitor)
    site.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()


def _answer(site: Site, path: str, span: str | None, token: str | None) -> tuple[int, dict[str, str], Iterator[bytes]]:
    status, _, code = site.fault.partition(" ")
    if status.isdecimal():
        return int(status), {"Content-Length": "6", "X-Error-Code": code}, iter([b"refuse"])
    if site.fault == "loop":
        return 302, {"Location": f"/{path}"}, iter([])
    if site.fault == "ftp":
        return 302, {"Location": "ftp://127.0.0.1/x"}, iter([])
    if site.elsewhere:
        return 302, {"Location": f"{site.elsewhere}/{path.rpartition('/')[2]}"}, iter([])
    if path.startswith(f"api/models/{site.repo}"):
        names = sorted(file.name for file in site.folder.iterdir())
        return _whole(json.dumps({"id": site.repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}).encode())
    file = site.folder / path.removeprefix(f"{site.repo}/resolve/{COMMIT}/")
    if not file.is_file():
        return _whole(b"no such file", 404)
    return _part(site, file, span)


def _whole(body: bytes, status: int = 200) -> tuple[int, dict[str, str], Iterator[bytes]]:
    return status, {"Content-Length": str(len(body)), "Content-Type": "application/json"}, iter([body])


def _part(site: Site, file: Path, span: str | None) -> tuple[int, dict[str, str], Iterator[bytes]]:
    size = file.stat().st_size
    if span is None or site.fault == "no ranges":
        return 200, {"Content-Length": str(size)}, _blocks(file, 0, size)
    if site.fault == "no ranges, no length":
        return 200, {}, _blocks(file, 0, size)
    first, last = (int(number) for number in span.removeprefix("bytes=").split("-"))
    if first >= size:
        return 416, {"Content-Range": f"bytes */{size}", "Content-Length": "0"}, iter([])
    last = min(last, size - 1)
    told = {"other range": f"bytes {first + 1}-{last + 1}/{size}", "no range": "", "no total": f"bytes {first}-{last}/*"}
    total = size + 1 if site.fault == "grows" and first else size
    length = last - first + 1
    promised = {"cut": length + 100}.get(site.fault, length)
    headers = {"Content-Range": told.get(site.fault, f"bytes {first}-{last}/{total}"), "Content-Length": str(promised)}
    if site.fault == "too much":
        return 206, {"Content-Range": headers["Content-Range"]}, _blocks(file, 0, size)
    return 206, headers, _blocks(file, first, length)


def _blocks(file: Path, start: int, length: int) -> Iterator[bytes]:
    with open(file, "rb") as opened:
        opened.seek(start)
        while length > 0 and (block := opened.read(min(length, 1 << 16))):
            length -= len(block)
            yield block


def cut_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep a test on this machine: no proxies, no token, no hub, and an empty cache of it."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # a closed port refuses at once


def write_hollow(folder: Path, like: str, shards: int = 1) -> int:
    """Write a checkpoint of a released size's full geometry whose data are holes in the files; return its size in bytes.

    The disk holds only the headers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    raw = spell_config(SIZES[like])
    plan = derive(configs.read(raw))
    entries = []
    for spec in plan.params():
        whole = not spec.parts or len(spec.shape) == 3
        for part, rows in [(None, 0)] if whole else spec.parts:
            shape = spec.shape if whole else (rows, spec.shape[-1])
            entries.append((hf.spell(spec.name, part), shape, 2 * math.prod(shape)))
    names = ["model.safetensors"] if shards == 1 else [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    total, weight_map = 0, {}
    for index, name in enumerate(names):
        header, offset = {}, 0
        for tensor, shape, nbytes in entries[index::shards]:
            header[tensor] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
            weight_map[tensor] = name
            offset += nbytes
        packed = json.dumps(header).encode()
        with open(folder / name, "wb") as file:
            file.write(len(packed).to_bytes(8, "little") + packed)
            file.truncate(8 + len(packed) + offset)
        total += 8 + len(packed) + offset
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(raw))
    return total
