"""What is found at the addresses of images and sounds: the bytes of data: URLs, within limits.

Owns how base64 is read, and the limits on bytes and numbers. Refuses to know what is in them: the decoder tells, whatever a URL
says of its type. Read `wire/media.py` for the addresses, `preparation.py` for who asks.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from urllib.parse import unquote

from gemcutter.media_parts import KINDS
from gemcutter.server.options import ServerOptions
from gemcutter.server.wire.fields import FieldError, refuse
from gemcutter.server.wire.media import MediaUrl

BASE64 = "base64"
SPACE = re.compile(r"\s")  # lines, where base64 was wrapped


def check_urls(urls: Sequence[MediaUrl], options: ServerOptions) -> None:
    """Raise FieldError, naming the first, for media that this server does not read, before anything is done for any."""
    for kind, most in {"image": options.max_images, "audio": options.max_sounds}.items():
        alike = [url for url in urls if url.kind == kind]
        if len(alike) > most:
            remedy = f"at most {most} {KINDS[kind][1]} in a request, found {len(alike)}; leave the oldest out"
            refuse(alike[most].where, f"{remedy} (the operator's limit: --limit-mm-per-prompt)")
    for url in urls:
        if url.scheme != "data":
            refuse(url.where, "addresses are not followed by this server; send the image itself as data:image/png;base64,...")


def read_data_url(url: MediaUrl) -> bytes:
    """Return the bytes of a data: URL. Raises FieldError for what can't be read."""
    head, comma, data = url.url.partition(",")
    if not comma:
        refuse(url.where, "a data: URL without a comma; write data:image/png;base64,...")
    if head.rpartition(";")[2].strip().lower() != BASE64:
        refuse(url.where, "a data: URL that is not base64; write data:image/png;base64,...")
    if "%" in data:
        data = unquote(data)
    try:
        found = base64.b64decode(SPACE.sub("", data), validate=True)
    except (binascii.Error, ValueError) as error:
        raise FieldError(url.where, f"the base64 can't be read ({error}); was it cut off?") from None
    if not found:
        refuse(url.where, "a data: URL without data")
    return found
