"""Image files, PIL images and arrays as pixels: RGB, upright, on white, within limits.

Owns the limits in bytes and pixels, which hold before anything is decoded, and what becomes of other kinds of pixels:
orientation is applied, transparency is laid on white, 16 bits are read by their high byte, of an animation the first frame is
taken. Refuses to know sizes and patches. Pillow is imported when the first image comes. Read `image.py` next.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gemcutter.errors import RequestError
from gemcutter.media.source_bytes import read_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

    ImageSource = str | Path | bytes | bytearray | memoryview | Image | np.ndarray
else:
    ImageSource = object  # checked, not trusted

MAX_FILE_BYTES = 64 << 20
MAX_PIXELS = 1 << 26  # 67 million: an image of 8192 x 8192
# What is decoded, by Pillow's names; others, such as EPS, run programs or are no images that people send.
FORMATS = ("PNG", "JPEG", "MPO", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
WHITE = (255, 255, 255, 255)
WIDE_MODES = ("I;16", "I;16L", "I;16B", "I;16N")  # 16 bits of grey
PLAIN_MODES = ("RGB", "L", "1", "CMYK", "YCbCr", "LAB", "HSV")  # modes that hold no transparency


def read_pixels(source: ImageSource, name: str = "image") -> np.ndarray:
    """Return the pixels [H, W, 3] of an image in uint8; the array is the caller's own.

    Raises RequestError, which begins with `name`, for what is no image, is damaged, or exceeds MAX_FILE_BYTES or MAX_PIXELS.
    """
    if isinstance(source, np.ndarray):
        return _of_array(source, name)
    from PIL import Image, UnidentifiedImageError

    if isinstance(source, Image.Image):
        return _decode(source, name)
    data = read_bytes(source, name, "a PIL image or a numpy array", MAX_FILE_BYTES)
    _refuse_by_name(data, name)
    Image.init()
    try:
        found = Image.open(io.BytesIO(data), formats=[each for each in FORMATS if each in Image.OPEN])
    except UnidentifiedImageError:
        raise RequestError(f"{name}: no image that can be read; give PNG, JPEG, WebP, GIF, BMP or TIFF") from None
    except Image.DecompressionBombError:  # Pillow has a limit of its own, before a size is known here
        raise RequestError(f"{name}: more than {MAX_PIXELS:,} pixels; make it smaller") from None
    except Exception as error:  # the file is a stranger's, and decoders raise whatever they meet
        raise _damaged(name, error) from error
    with found:
        return _decode(found, name)


def _refuse_by_name(data: bytes, name: str) -> None:
    """Raise RequestError for documents that people take for images, with what to do instead."""
    head = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith(b"%pdf"):
        raise RequestError(f"{name}: a PDF document; give its pages as images")
    if head.startswith((b"<svg", b"<?xml", b"<!doctype svg")):
        raise RequestError(f"{name}: an SVG drawing; give it as an image, PNG for instance")


def _decode(image: Image, name: str) -> np.ndarray:
    """Return the first frame's pixels, within the limits, upright and on white."""
    width, height = image.size
    if not (width and height):
        raise RequestError(f"{name}: {width} x {height} pixels; there is nothing to see")
    if width * height > MAX_PIXELS:
        raise RequestError(f"{name}: {width} x {height} pixels, more than {MAX_PIXELS:,}; make it smaller")
    try:
        from PIL import ImageOps

        upright = ImageOps.exif_transpose(image)
        return np.array(_on_white(upright, name), dtype=np.uint8)
    except RequestError:
        raise
    except Exception as error:  # the file is a stranger's, and decoders raise whatever they meet
        raise _damaged(name, error) from error


def _on_white(image: Image, name: str) -> Image:
    """Return an image as RGB, with white where it is transparent."""
    from PIL import Image as images

    if image.mode in WIDE_MODES or image.mode == "I":
        return images.fromarray(_high_bytes(np.asarray(image).astype(np.int64), name)).convert("RGB")
    if image.mode == "F":
        raise RequestError(f"{name}: floating-point pixels; save it with 8 bits a colour")
    if image.mode in PLAIN_MODES and "transparency" not in image.info:
        return image if image.mode == "RGB" else image.convert("RGB")
    with_alpha = image.convert("RGBA")
    return images.alpha_composite(images.new("RGBA", with_alpha.size, WHITE), with_alpha).convert("RGB")


def _high_bytes(values: np.ndarray, name: str) -> np.ndarray:
    """Return 16-bit values by their high byte."""
    if values.min() < 0 or values.max() > 0xFFFF:
        raise RequestError(f"{name}: values from {values.min()} to {values.max()}; save it with 8 or 16 bits a colour")
    return (values >> 8).astype(np.uint8)


def _of_array(array: np.ndarray, name: str) -> np.ndarray:
    """Return an array's pixels: grey, RGB or RGBA, of uint8 or uint16."""
    from PIL import Image

    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in (1, 3, 4) or array.dtype not in (np.uint8, np.uint16):
        wanted = "[height, width] or [height, width, 1, 3 or 4] of uint8 or uint16"
        raise RequestError(f"{name}: expected an array {wanted}, found {list(array.shape)} of {array.dtype}")
    if not array.size:
        raise RequestError(f"{name}: an array of {list(array.shape)}; there is nothing to see")
    if array.shape[0] * array.shape[1] > MAX_PIXELS:
        raise RequestError(f"{name}: {array.shape[1]} x {array.shape[0]} pixels, more than {MAX_PIXELS:,}; make it smaller")
    levels = array if array.dtype == np.uint8 else (array >> 8).astype(np.uint8)
    if channels == 1:
        return np.repeat(levels.reshape(*array.shape[:2], 1), 3, axis=2)
    return _decode(Image.fromarray(np.ascontiguousarray(levels)), name)


def _damaged(name: str, error: Exception) -> RequestError:
    return RequestError(f"{name}: can't be decoded ({type(error).__name__}: {str(error)[:200]}); is the file damaged?")
