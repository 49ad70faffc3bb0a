"""What is found at the addresses of images and sounds: the bytes of data: URLs, and of files that may be read, within limits.

Owns how base64 is read, the limits on bytes and numbers, and the one folder that file: URLs may name. Refuses to know what is in
them: the decoder tells, whatever a URL says of its type. Read `wire/media.py` for the addresses, `media_fetch.py` for those of
other servers, `preparation.py` for who asks.
"""

from __future__ import annotations

import binascii
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from urllib.parse import unquote, urlsplit

from gemcutter.media_parts import KINDS
from gemcutter.server.options import ServerOptions
from gemcutter.server.wire.fields import FieldError, refuse
from gemcutter.server.wire.media import EXAMPLES, MediaUrl

REMOTE = ("http", "https")
BASE64 = "base64"
PIECE = 1 << 20  # characters that are decoded at a time: others get their turn in between


def check_urls(urls: Sequence[MediaUrl], options: ServerOptions) -> None:
    """Raise FieldError, naming the first, for media that this server does not read, before anything is done for any."""
    for kind, most in {"image": options.max_images, "audio": options.max_sounds, "video": options.max_videos}.items():
        alike = [url for url in urls if url.kind == kind]
        if len(alike) > most:
            remedy = f"at most {most} {KINDS[kind][1]} in a request, found {len(alike)}; leave the oldest out"
            refuse(alike[most].where, f"{remedy} (the operator's limit: --limit-mm-per-prompt)")
    for url in urls:
        if url.scheme == "file" and options.allowed_local_media_path is None:
            refuse(url.where, f"files of the server are not read here; send it as {EXAMPLES[url.kind]}")
        if url.scheme in REMOTE and not options.allowed_media_domains:
            refuse(url.where, f"addresses are not followed by this server; send it as {EXAMPLES[url.kind]}")


def read_here(url: MediaUrl, options: ServerOptions) -> bytes:
    """Return the bytes of a data: URL, or of a file that may be read. Raises FieldError for what can't be read."""
    return read_data_url(url) if url.scheme == "data" else _read_file(url, options)


def _read_file(url: MediaUrl, options: ServerOptions) -> bytes:
    """Return the bytes of a file below the operator's folder; of others it is not even told whether they exist."""
    parts, most = urlsplit(url.url), options.max_body_bytes
    try:
        root = Path(options.allowed_local_media_path or "").resolve(strict=True)
        path = Path(unquote(parts.path)).resolve(strict=True)
        is_open = parts.netloc in ("", "localhost") and path.is_relative_to(root) and path.is_file()
        with path.open("rb") if is_open else nullcontext(None) as file:
            found = None if file is None else file.read(most + 1)
    except (OSError, ValueError, RuntimeError):  # nothing there, or links that go round
        found = None
    if found is None:
        refuse(url.where, "no file below the folder whose files this server reads (--allowed-local-media-path)")
    if len(found) > most:
        refuse(url.where, f"more than {most:,} bytes, the operator's limit (--max-body-mb)")
    return found


def read_data_url(url: MediaUrl) -> bytes:
    """Return the bytes of a data: URL. Raises FieldError for what can't be read."""
    head, comma, data = url.url.partition(",")
    if not comma:
        refuse(url.where, f"a data: URL without a comma; write {EXAMPLES[url.kind]}")
    if head.rpartition(";")[2].strip().lower() != BASE64:
        refuse(url.where, f"a data: URL that is not base64; write {EXAMPLES[url.kind]}")
    if "%" in data:
        data = unquote(data)
    try:
        found = _decode(data)
    except ValueError:
        try:
            found = _decode("".join(data.split()))  # it may have been wrapped in lines
        except ValueError as error:
            raise FieldError(url.where, f"the base64 can't be read ({error}); was it cut off?") from None
    if not found:
        refuse(url.where, "a data: URL without data")
    return found


def _decode(data: str) -> bytes:
    """Return the bytes of base64. Raises ValueError for what is none."""
    return b"".join(binascii.a2b_base64(data[at : at + PIECE], strict_mode=True) for at in range(0, len(data), PIECE))
