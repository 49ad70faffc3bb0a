"""The bytes of files that requests bring, given themselves or by a path, within a limit.

Refuses to know what files hold, and to follow addresses. Read `decode.py` for images, `decode_sound.py` for sounds.
"""

from __future__ import annotations

import os
from pathlib import Path

from gemcutter.errors import RequestError, spell_value


def read_bytes(source: object, name: str, also: str, most: int) -> bytes:
    """Return a file's bytes, `most` of them at most, given them or its path.

    Raises RequestError, which begins with `name`, for an empty file, a larger one, one that can't be read, and for a source that
    is neither; `also` names what else the caller takes.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
    elif isinstance(source, str | Path):
        if str(source).startswith(("http://", "https://", "data:")):
            raise RequestError(f"{name}: addresses are not followed; give a file's path or its bytes")
        data = _read_file(Path(source), name, most)
    else:
        raise RequestError(f"{name}: expected a path, a file's bytes, {also}, found {spell_value(source)}")
    if len(data) > most:
        raise RequestError(f"{name}: more than {most >> 20} MiB; save it smaller")
    if not data:
        raise RequestError(f"{name}: an empty file")
    return data


def _read_file(path: Path, name: str, most: int) -> bytes:
    try:
        if not os.path.isfile(path):  # opening a pipe would wait forever
            raise RequestError(f"{name}: there is no file {path}")
        with path.open("rb") as file:
            return file.read(most + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"{name}: {path} can't be read ({error})") from error
