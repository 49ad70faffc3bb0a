"""Videos as vision towers read them: some frames, each an image of few soft tokens with its time.

Owns how many frames are taken, and how their times are written. Frames of a file come from `decode_video.py`; those that are
given as images need no decoder. Refuses to know prompts. Read `image.py` for what becomes of a frame, `media_reader.py` for who
asks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gemcutter.errors import RequestError, spell_value
from gemcutter.media.decode_video import ASSUMED_RATE, pick, read_frames
from gemcutter.media.image import ImagePatches, PatchShape, cut_image

if TYPE_CHECKING:
    from gemcutter.media.decode import ImageSource

    Pictures = Sequence[ImageSource] | np.ndarray
    VideoSource = str | Path | bytes | bytearray | memoryview | Pictures | tuple[Pictures, float]
else:
    VideoSource = object  # checked, not trusted

FRAMES = 32  # that are taken of a video, at most
FRAME_BUDGET = 70  # soft tokens a frame, at most
MAX_PICTURES = 100_000  # given as images


@dataclass(frozen=True, slots=True, eq=False)
class VideoFrame:
    """The patches of one frame, and its time as prompts write it: minutes and seconds, "00:07"."""

    time: str
    image: ImagePatches


def cut_video(source: VideoSource, shape: PatchShape, name: str = "video") -> list[VideoFrame]:
    """Return the frames of a video: FRAMES of them, evenly over it, or all where it has fewer.

    `source` is a file's path or bytes, or its frames as images (a list, or an array [frames, height, width, 3]), alone or in a
    pair with their number a second; alone, they are taken for 24 a second, as the official processor does. Raises RequestError,
    which begins with `name`, for what is too long, too large, damaged or no video.
    """
    return [VideoFrame(spell_time(seconds), image) for seconds, image in _images(source, shape, name)]


def spell_time(seconds: float) -> str:
    """Return a time as the official processor writes it: whole minutes and seconds, rounded down."""
    return f"{int(seconds // 60):02d}:{int(seconds % 60):02d}"


def _images(source: Any, shape: PatchShape, name: str) -> Iterator[tuple[float, ImagePatches]]:
    """Yield the frames that are taken, each with its time in seconds."""
    if not isinstance(source, list | tuple | np.ndarray):
        for frame in read_frames(source, FRAMES, name):
            yield frame.seconds, cut_image(frame.pixels_HWC, FRAME_BUDGET, shape, name)
        return
    pictures, rate = source if _is_pair(source) else (source, ASSUMED_RATE)
    if not (rate > 0 and math.isfinite(rate)):
        raise RequestError(f"{name}: expected a rate of frames a second above 0, found {spell_value(rate)}")
    if isinstance(pictures, np.ndarray) and pictures.ndim != 4:
        raise RequestError(f"{name}: expected an array [frames, height, width, 3], found {list(pictures.shape)}")
    if not 1 <= len(pictures) <= MAX_PICTURES:
        raise RequestError(f"{name}: {len(pictures):,} frames; expected 1 to {MAX_PICTURES:,}")
    for number in pick(len(pictures), FRAMES):
        yield number / rate, cut_image(pictures[number], FRAME_BUDGET, shape, f"{name}, frame {number}")


def _is_pair(source: Any) -> bool:
    """Return whether frames are given with their rate."""
    if not isinstance(source, tuple) or len(source) != 2 or not isinstance(source[0], list | tuple | np.ndarray):
        return False
    return isinstance(source[1], int | float | np.number) and not isinstance(source[1], bool)
