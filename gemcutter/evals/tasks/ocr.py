"""Text in images: a few words and a number in several sizes, rendered by Pillow in the font that it brings along."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher

from gemcutter.evals.data import Data
from gemcutter.evals.generated import ADJECTIVES, NOUNS, integer, integers, random_of
from gemcutter.evals.task import Asked, Grade, Item, Mode, Reply

COUNT = 30
SIZES = (12, 16, 24, 32, 48)
MARGIN = 16  # pixels
QUESTION = "What does the image say? Answer with the text only."
MODE = Mode("chat", "one image and a question in a user's turn", "generate", "ocr-1", is_chat=True, max_tokens=48, can_think=True)


class Ocr:
    """The task."""

    name = "ocr"
    about = "rendered text in several sizes (generated)"
    modes: Sequence[Mode] = (MODE,)
    media: Sequence[str] = ("image",)

    def items(self, data: Data, mode: Mode, asked: Asked) -> Iterator[Item]:
        """Yield as many items as are asked for, of every size in turn. Raises RequestError."""
        sizes = integers(asked, "sizes", SIZES, 6, 256)
        for number in range(integer(asked, "count", COUNT, 1)):
            source, size = random_of("ocr", asked, number), sizes[number % len(sizes)]
            text = f"{source.choice(ADJECTIVES)} {source.choice(NOUNS)} {source.randrange(1000, 10000)}"
            parts = [{"type": "image", "image": render(text, size)}, {"type": "text", "text": QUESTION}]
            yield Item(f"{number:05}", [{"role": "user", "content": parts}], text, str(size))

    def grade(self, item: Item, mode: Mode, reply: Reply, asked: Asked) -> Grade:
        """Compare texts but for case and white space; `similar` is the share of matching characters."""
        text, right = " ".join(reply.text.split()).lower(), item.gold.lower()
        similar = SequenceMatcher(None, text, right, autojunk=False).ratio()
        return Grade(text or None, {"exact": float(text == right), "similar": similar})


def render(text: str, size: int) -> bytes:
    """Return a PNG with a line of black text on white, `size` pixels high."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size)
    left, top, right, bottom = font.getbbox(text)
    image = Image.new("RGB", (int(right - left) + 2 * MARGIN, int(bottom - top) + 2 * MARGIN), "white")
    ImageDraw.Draw(image).text((MARGIN - left, MARGIN - top), text, fill="black", font=font)
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=0)  # bytes that no version of a compressor changes
    return file.getvalue()
