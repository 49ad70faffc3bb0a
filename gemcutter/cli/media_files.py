"""Files of media on the command line: `--image`, `--audio` and `--video`, in the order in which they are given together.

Owns these options, what messages are made of them, and how a file is described in a chat. Refuses to know prompts. Read `run.py`
and `chat.py` for who asks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any

import typer

from gemcutter.media_parts import KINDS

Part = dict[str, str]  # of a message: its type, and the path of a file


def _placed(kind: str) -> Callable[[typer.Context, list[str] | None], list[tuple[int, Part]]]:
    """Build the callback that makes parts of a kind's files, each with the place of its option on the command line."""

    def place(context: typer.Context, files: list[str] | None) -> list[tuple[int, Part]]:
        found = [{"type": kind, "path": file} for file in files or ()]
        words: Any = context.obj  # the command line, which begins with the command's name
        if not found or not isinstance(words, list):
            return list(enumerate(found))
        *_, order = context.command.make_parser(context).parse_args(list(words[1:]))
        return list(zip((index for index, option in enumerate(order) if option.name == kind), found, strict=True))

    return place


def _option(kind: str, what: str) -> Any:
    """Build the option of a kind's files."""
    help = f"{what} before the prompt, or in place of <|{kind}|> in --raw text; repeatable."
    return typer.Option(f"--{kind}", metavar="FILE", help=help, callback=_placed(kind), show_default=False)


@dataclass(frozen=True, slots=True)
class MediaFiles:
    """What is shown and played before a prompt."""

    image: Annotated[list[str] | None, _option("image", "An image")] = None
    audio: Annotated[list[str] | None, _option("audio", "A sound")] = None
    video: Annotated[list[str] | None, _option("video", "A video")] = None

    @property
    def parts(self) -> list[Part]:
        """List the files as parts of a message, in the order of the command line."""
        placed: list[Any] = [each for kind in fields(self) for each in getattr(self, kind.name) or ()]
        return [part for _, part in sorted(placed, key=lambda each: int(each[0]))]

    @property
    def kinds(self) -> tuple[str, ...]:
        """Return the kinds of these files, for which a model is to be loaded."""
        return tuple(dict.fromkeys(part["type"] for part in self.parts))

    @property
    def options(self) -> dict[str, list[str]]:
        """Return the files by the option that holds them beside raw text."""
        return {KINDS[kind][0]: [part["path"] for part in self.parts if part["type"] == kind] for kind in self.kinds}


def with_media(text: str, parts: Sequence[Part]) -> str | list[Part]:
    """Return a message's content: a text, or parts where there are files before it."""
    return [*parts, {"type": "text", "text": text}] if parts else text


def describe_file(kind: str, file: str) -> str:
    """Return how large an image or how long a sound is, or what is taken of a video. Raises RequestError if it can't be read."""
    if kind == "audio":
        from gemcutter.media.decode_sound import RATE, read_samples

        return f"{len(read_samples(file, file)) / RATE:.1f} s"
    if kind == "video":
        from gemcutter.media.image import PatchShape
        from gemcutter.media.video import cut_video

        frames = cut_video(file, PatchShape(), file)
        return f"{len(frames)} frames from 00:00 to {frames[-1].time}"
    from gemcutter.media.decode import read_pixels

    height, width, _ = read_pixels(file, file).shape
    return f"{width} x {height} pixels"
