"""A server that sees: the trained model with its vision tower, and images as clients of the three APIs send them.

Refuses to judge. Read `test_image_parts.py` next.
"""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

from tests.images import drawing

PICTURE = drawing(60, 90)
ROWS = 60  # that it becomes at 70 soft tokens
PLACEHOLDER = 18  # the id of an image's rows in the trained model
QUESTION = "What is it?"


def png(image: np.ndarray = PICTURE) -> bytes:
    """Return an image as a file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def in_base64(image: np.ndarray | bytes = PICTURE) -> str:
    """Return an image, or the bytes of a file, in base64."""
    return base64.b64encode(image if isinstance(image, bytes) else png(image)).decode()


def data_url(image: np.ndarray | bytes = PICTURE, kind: str = "image/png") -> str:
    """Return an image, or the bytes of a file, as a data: URL."""
    return f"data:{kind};base64,{in_base64(image)}"


def image_url(image: np.ndarray | bytes = PICTURE, **more: Any) -> dict[str, Any]:
    """Return an image as a part of a chat completion's message."""
    return {"type": "image_url", "image_url": {"url": data_url(image), **more}}


def block(image: np.ndarray | bytes = PICTURE) -> dict[str, Any]:
    """Return an image as a block of Anthropic's API."""
    return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": in_base64(image)}}


def text(said: str = QUESTION) -> dict[str, Any]:
    """Return text as a part, or a block."""
    return {"type": "text", "text": said}


def user(*parts: Any) -> dict[str, Any]:
    """Return a user's message."""
    return {"role": "user", "content": list(parts)}
