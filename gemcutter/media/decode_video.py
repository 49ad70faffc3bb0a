"""Video files as pixels of some of their frames: RGB, upright, each with its time, within limits.

Owns the limits in bytes, seconds, pixels and formats, and which frames are taken: as many as asked for, evenly over the file, by
their number, as the official processor takes them. PyAV decodes; it is imported when the first file comes, and needed for files
alone. Refuses to know patches. Read `video.py` next.
"""

from __future__ import annotations

import errno
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemcutter.errors import RequestError
from gemcutter.media.source_bytes import read_bytes

MAX_FILE_BYTES = 256 << 20
MAX_SECONDS = 600
MAX_PIXELS = 1 << 24  # of a frame: 4096 x 4096
MAX_DECODED_PIXELS = 1 << 36  # of all frames up to the last one that is taken: ten minutes of 1920 x 1080 at 55 a second
ASSUMED_RATE = 24.0  # frames a second where nothing says how many: what the official processor assumes
WHOLE = 0.9  # the share of its frames that a file must hold to count as whole
# What is opened, by libavformat's names: containers that hold their frames themselves. Playlists would open other files.
FORMATS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,gif,ogg,flv,asf"
KNOWN_FORMATS = "MP4, MOV, WebM, Matroska, AVI or MPEG"
OPTIONS = {"format_whitelist": FORMATS, "protocol_whitelist": "none"}


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """One frame: its pixels [H, W, 3] in uint8, and when it is shown, in seconds from the beginning."""

    pixels_HWC: np.ndarray
    seconds: float


def pick(total: int, most: int) -> list[int]:
    """Return the numbers of the frames that are taken of `total`: `most` of them, evenly, the first among them; or all."""
    count = min(total, most)
    return [index * total // count for index in range(count)]


def read_frames(source: object, most: int, name: str = "video") -> Iterator[Frame]:
    """Yield frames of a video file, given its path or bytes: `most` of them, evenly over it, or all where it has fewer.

    Raises RequestError, which begins with `name`, where PyAV is not installed, and for what is no video, is damaged, or exceeds
    MAX_FILE_BYTES, MAX_SECONDS, MAX_PIXELS or MAX_DECODED_PIXELS.
    """
    data = read_bytes(source, name, "or a list of images with their rate", MAX_FILE_BYTES)
    try:
        import av
    except ImportError:
        remedy = "install PyAV (pip install 'gemcutter[video]'), or give the frames as images"
        raise RequestError(f"{name}: video files can't be decoded here; {remedy}") from None
    try:
        total = _count(av, data, name)
        found = list(_decode(av, data, pick(total, most), total, name))
        if len(found) < min(total, most):  # the file holds fewer than it says: those that there are, evenly
            total = _count_decoded(av, data, total, name)
            found = list(_decode(av, data, pick(total, most), total, name))
    except RequestError:
        raise
    except Exception as error:  # the file is a stranger's, and decoders raise whatever they meet
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise RequestError(f"{name}: can't be decoded ({reason}); is the file damaged?") from error
    yield from found


def _open(av: Any, data: bytes, name: str) -> Any:
    """Open a container whose first video stream is within the limits. Raises RequestError."""
    try:
        container = av.open(io.BytesIO(data), options=OPTIONS, metadata_errors="replace")
    except av.error.FFmpegError as error:
        if not isinstance(error, av.error.InvalidDataError) and error.errno != errno.EINVAL:
            raise
        # Of no known format, or of one that is not among FORMATS.
        raise RequestError(f"{name}: no video that can be read; give {KNOWN_FORMATS}") from None
    if not container.streams.video:
        container.close()
        raise RequestError(f"{name}: no pictures in this file; a sound is read as audio")
    return container


def _count(av: Any, data: bytes, name: str) -> int:
    """Return how many frames a file says that it holds, or has packets of. Raises RequestError beyond the limits."""
    with _open(av, data, name) as container:
        stream = container.streams.video[0]
        pixels, rate = stream.width * stream.height, _rate(stream)
        if not pixels:
            raise RequestError(f"{name}: frames of {stream.width} x {stream.height} pixels; there is nothing to see")
        if pixels > MAX_PIXELS:
            raise RequestError(f"{name}: {stream.width} x {stream.height} pixels, more than {MAX_PIXELS:,}; make it smaller")
        total = int(stream.frames)
        if total <= 0:
            total = sum(bool(packet.size) for packet in container.demux(stream))
    if not total:
        raise RequestError(f"{name}: no frames; there is nothing to see")
    if total / rate > MAX_SECONDS:
        raise RequestError(f"{name}: {total:,} frames at {rate:.3g} a second, longer than {MAX_SECONDS} s; cut it")
    if total * pixels > MAX_DECODED_PIXELS:
        raise RequestError(f"{name}: {total:,} frames of {pixels:,} pixels; make it smaller, or cut it")
    return total


def _rate(stream: Any) -> float:
    """Return a stream's frames a second."""
    rate = float(stream.average_rate or stream.guessed_rate or 0)
    return rate if rate > 0 else ASSUMED_RATE


def _decode(av: Any, data: bytes, wanted: list[int], total: int, name: str) -> Iterator[Frame]:
    """Yield the frames of these numbers, in order; fewer where the file ends before."""
    taken = iter(wanted)
    following = next(taken, None)
    with _open(av, data, name) as container:
        stream = container.streams.video[0]
        rate = _rate(stream)
        for number, frame in enumerate(_frames(av, container, stream, total, name)):
            if following is None:
                return
            if number == following:
                yield Frame(_upright(frame), number / rate)
                following = next(taken, None)
                if following is None:
                    return


def _frames(av: Any, container: Any, stream: Any, total: int, name: str) -> Iterator[Any]:
    """Yield decoded frames up to the first that can't be, of which `total` are expected."""
    decoded, size = 0, (stream.width, stream.height)
    try:
        for frame in container.decode(stream):
            if frame.width * frame.height > MAX_PIXELS or decoded * frame.width * frame.height > MAX_DECODED_PIXELS:
                raise RequestError(f"{name}: frames grow from {size} to {(frame.width, frame.height)} pixels; is it damaged?")
            yield frame
            decoded += 1
    except av.error.FFmpegError as error:
        if not decoded or decoded < WHOLE * total:
            reason = f"{decoded:,} of {total:,} frames can be decoded: {error.strerror}"
            raise RequestError(f"{name}: {reason}; is the file damaged?") from error


def _count_decoded(av: Any, data: bytes, total: int, name: str) -> int:
    """Return how many frames a file really holds. Raises RequestError where too many of `total` are missing."""
    with _open(av, data, name) as container:
        found = sum(1 for _ in _frames(av, container, container.streams.video[0], total, name))
    if not found or found < WHOLE * total:
        raise RequestError(f"{name}: {found:,} of {total:,} frames can be decoded; is the file damaged?")
    return found


def _upright(frame: Any) -> np.ndarray:
    """Return a decoded frame's pixels in RGB, turned as its file says."""
    pixels: np.ndarray = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90) % 4  # counter-clockwise
    return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels
