"""Small images, sounds and videos in the forms that people send, for readers that get them mutated.

Owns which forms there are. Refuses to judge: read `tools/fuzz.py` for who mutates them.
"""

from __future__ import annotations

import io
from importlib.util import find_spec

import pytest
from PIL import Image

from tests.images import drawing
from tests.sounds import saved, tones
from tests.videos import CONTAINERS, filmed, rolling

IMAGES = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
SOUNDS = ("WAV", "FLAC", "OGG", "MP3", "AIFF", "CAF")


def media_files() -> list[tuple[str, bytes]]:
    """Return the kind and the bytes of every file; videos only where PyAV and their encoders are."""
    found = [("image", _image(form)) for form in IMAGES]
    found += [("audio", saved(tones(2000), form=form)) for form in SOUNDS]
    for form, codec in CONTAINERS if find_spec("av") else ():
        try:
            found.append(("video", filmed(rolling(8, 32, 48), form=form, codec=codec)))
        except pytest.skip.Exception:
            continue  # PyAV was built without this encoder
    return found


def _image(form: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(drawing(24, 32)).save(buffer, form)
    return buffer.getvalue()
