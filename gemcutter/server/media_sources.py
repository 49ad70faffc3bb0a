"""What is found at the addresses of images: the bytes of data: URLs, within limits.

Owns how base64 is read, and the limits on bytes and on the number of images. Refuses to know what an image is: the decoder tells,
whatever a URL says of its type. Read `wire/media.py` for the addresses, `preparation.py` for who asks.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from urllib.parse import unquote

from gemcutter.server.options import ServerOptions
from gemcutter.server.wire.fields import FieldError, refuse
from gemcutter.server.wire.media import MediaSource

BASE64 = "base64"
SPACE = re.compile(r"\s")  # lines, where base64 was wrapped


def check_sources(sources: Sequence[MediaSource], options: ServerOptions) -> None:
    """Raise FieldError, naming the first, for images that this server does not read, before anything is done for any."""
    if len(sources) > options.max_images:
        remedy = f"at most {options.max_images} images in a request, found {len(sources)}; leave the oldest out"
        refuse(sources[options.max_images].where, f"{remedy} (the operator's limit: --limit-mm-per-prompt)")
    for source in sources:
        if source.scheme != "data":
            refuse(source.where, "addresses are not followed by this server; send the image itself as data:image/png;base64,...")


def read_data_url(source: MediaSource) -> bytes:
    """Return the bytes of a data: URL. Raises FieldError for what can't be read."""
    head, comma, data = source.url.partition(",")
    if not comma:
        refuse(source.where, "a data: URL without a comma; write data:image/png;base64,...")
    if head.rpartition(";")[2].strip().lower() != BASE64:
        refuse(source.where, "a data: URL that is not base64; write data:image/png;base64,...")
    if "%" in data:
        data = unquote(data)
    try:
        found = base64.b64decode(SPACE.sub("", data), validate=True)
    except (binascii.Error, ValueError) as error:
        raise FieldError(source.where, f"the base64 can't be read ({error}); was it cut off?") from None
    if not found:
        refuse(source.where, "a data: URL without data")
    return found
