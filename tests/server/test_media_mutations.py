"""Broken, mislabelled and hostile files in requests: one clear refusal each, and the service lives on."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

import gemcutter
from gemcutter.server.options import ServerOptions
from tests.images import drawing
from tests.server.conftest import Running, running
from tests.server.seeing import data_url, in_base64, png, text, user
from tests.sounds import saved, tones
from tests.trained import release_folder

CASES = 60  # of each kind of file


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    options = ServerOptions(names=("demo",), max_soft_tokens=70)
    with (
        gemcutter.load(release_folder(), media="image,audio", dtype="float32", context=1024) as model,
        running(model, options) as found,
    ):
        yield found


def encoded(form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(drawing(40, 56)).save(buffer, form, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width: int, height: int, rows: bytes) -> bytes:
    """Return a PNG that claims a size, with rows that are compressed already."""
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def asked(server: Running, part: Any) -> Any:
    return server.post("/tokenize", {"messages": [user(part, text())]})


def check(server: Running, part: Any, *, may_pass: bool = False) -> str:
    """Send a part that can't be read, and return what is said of it."""
    answer = asked(server, part)
    if may_pass and answer.status_code == 200:
        return ""
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"].startswith("messages[0].content[0]."), error
    assert "Traceback" not in error["message"]
    return str(error["message"])


def image(data: bytes, kind: str = "image/png") -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(data, kind)}}


def sound(data: bytes) -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": in_base64(data), "format": "wav"}}


def test_what_is_no_image_is_named(server: Running) -> None:
    svg = b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>"
    for data, kind, message in (
        (svg, "image/svg+xml", "an SVG drawing"),
        (svg, "image/png", "an SVG drawing"),
        (b"%PDF-1.7\n1 0 obj", "image/jpeg", "a PDF document"),
        (b"GIF89a", "image/gif", "image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "image/png", "no image that can be read"),
        (b"<html>", "text/html", "no image that can be read"),
        (b"\0" * 5000, "image/png", "no image that can be read"),
        (saved(tones(4000)), "image/png", "no image that can be read"),
        (png()[: len(png()) // 2], "image/png", "is the file damaged?"),
        (png_of(60_000, 60_000, zlib.compress(b"\0")), "image/png", "more than 67,108,864"),
        (png_of(2**31 - 1, 1, zlib.compress(b"\0")), "image/png", "more than 67,108,864"),
        (png_of(0, 9, zlib.compress(b"\0")), "image/png", "image"),
    ):
        assert message in check(server, image(data, kind))
    assert asked(server, image(encoded("JPEG"), "image/png")).status_code == 200  # what it says it is, is not believed
    assert asked(server, image(encoded("WEBP"), "application/octet-stream")).status_code == 200


def test_what_is_no_sound_is_named(server: Running) -> None:
    huge = bytearray(saved(tones(4000)))
    huge[40:44] = struct.pack("<I", 2**32 - 9)  # bytes of samples
    for data, message in (
        (png(), "no sound that can be read"),
        (b"RIFF", "sound"),
        (b"\x00\x00\x00\x18ftypM4A ", "an MP4 or M4A file"),
        (b"\x1aE\xdf\xa3", "a WebM or Matroska file"),
    ):
        assert message in check(server, sound(data))
    check(server, sound(bytes(huge)), may_pass=True)


def test_a_flat_picture_that_unpacks_to_millions_of_pixels_is_read(server: Running) -> None:
    """Within the limit, however small its file."""
    rows = zlib.compress(bytes((4096 + 1) * 4096), 9)
    assert len(rows) < 20_000
    assert asked(server, image(png_of(4096, 4096, rows))).status_code == 200


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow, about what is cut off
@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_mutated_images(server: Running, form: str) -> None:
    dice, data = random.Random(form), encoded(form)
    for _ in range(CASES // 6):
        check(server, image(mutated(dice, data)), may_pass=True)
    assert asked(server, image(data)).status_code == 200


@pytest.mark.parametrize("form", ["WAV", "FLAC", "OGG", "MP3"])
def test_mutated_sounds(server: Running, form: str) -> None:
    dice, data = random.Random(form), saved(tones(8000), form=form)
    for _ in range(CASES // 4):
        check(server, sound(mutated(dice, data)), may_pass=True)
    assert asked(server, sound(data)).status_code == 200


def mutated(dice: random.Random, data: bytes) -> bytes:
    """Return a file with bytes changed, cut out, doubled, or its end lost."""
    found = bytearray(data)
    for _ in range(dice.randint(1, 4)):
        place, size = dice.randrange(len(found)), dice.randint(1, 16)
        match dice.randrange(4):
            case 0:
                found[place] = dice.randrange(256)
            case 1:
                del found[place : place + size]
            case 2:
                found[place:place] = found[place : place + size]
            case _:
                del found[max(place, 1) :]
        found = found or bytearray(b"\0")
    return bytes(found)


def test_mutated_addresses(server: Running) -> None:
    dice, url = random.Random(7), data_url(png())
    for _ in range(CASES):
        cut = dice.randrange(len(url))
        word = "".join(
            dice.choices(["", ":", ";", ",", "=", "%", "%00", "data:", "base64", "\n", "é", "A"], k=dice.randint(1, 3))
        )
        text = url[:cut] + word + url[cut + dice.choice([0, 1, 40, len(url)]) :]
        check(server, {"type": "image_url", "image_url": {"url": text}}, may_pass=True)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": None},
        {"type": "image_url", "image_url": [data_url()]},
        {"type": "image_url", "image_url": {"url": {"url": data_url()}}},
        {"type": "image_url", "image_url": {"url": ""}},
        {"type": "image_url", "image_url": {"url": "data:"}},
        {"type": "image_url", "image_url": {"url": "javascript:alert(1)"}},
        {"type": "image_url", "image_url": {"url": data_url(), "max_soft_tokens": True}},
        {"type": "input_audio", "input_audio": "AAAA"},
        {"type": "audio", "audio": [[0.1], 16000]},
        {"type": "image", "image": 7},
    ],
    ids=str,
)
def test_parts_of_another_shape(server: Running, part: Any) -> None:
    check(server, part)


def test_the_service_lives_on(server: Running) -> None:
    assert server.service.admission.requests == 0
    wanted = server.model.prepare([user({"type": "image", "image": np.array(drawing(60, 90))}, text())], max_soft_tokens=70)
    assert asked(server, image(png())).json()["tokens"] == list(wanted.request.prompt)
