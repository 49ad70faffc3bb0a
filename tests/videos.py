"""Videos drawn by formula, and files of them as PyAV writes them; the tests that need files skip where it is not installed.

Owns what a video shows, so that goldens made elsewhere mean the same one. Refuses to judge: read `unit/test_video.py`.
"""

from __future__ import annotations

import io

import numpy as np
import pytest

from tests.images import drawing

# Forms of files, and a codec for each.
CONTAINERS = (
    ("mp4", "libx264"),
    ("mov", "mpeg4"),
    ("matroska", "libx264"),
    ("webm", "libvpx-vp9"),
    ("avi", "mpeg4"),
    ("mpegts", "libx264"),
    ("gif", "gif"),
)


def rolling(count: int, height: int, width: int) -> np.ndarray:
    """Return frames [T, H, W, 3] of a drawing that moves to the right, around the edge."""
    return np.stack([np.roll(drawing(height, width), 3 * index, axis=1) for index in range(count)])


def filmed(frames: np.ndarray, rate: int = 10, form: str = "mp4", codec: str = "libx264") -> bytes:
    """Return the bytes of a file with these frames, or skip the test where PyAV or its encoder is missing."""
    av = pytest.importorskip("av", reason="PyAV is not installed (gemcutter[video]): no video files are made")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form) as container:
        try:
            stream = container.add_stream(codec, rate=rate)
        except ValueError:
            pytest.skip(f"this PyAV has no encoder {codec}")
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()
