"""Images, sounds and videos in bodies of requests: the forms in which the APIs bring them, and the budgets of images.

Owns `MediaUrl`, an address that nobody has followed yet, the mapping of `detail` to budgets, and the refusal of everything
that is no address: what a server would find under a path is none of a client's business. Refuses to know HTTP and what an image
is. Read `server/media_sources.py` for what is found at an address, `chat.py`, `messages.py` and `responses.py` for who asks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from gemcutter.errors import RequestError, spell_value
from gemcutter.media.budgets import BUDGETS, check_budget
from gemcutter.server.wire.fields import as_object, as_text, refuse

IMAGE, AUDIO, VIDEO = "image", "audio", "video"
# Types of parts by which clients name the kinds: OpenAI's, vLLM's and Hugging Face's.
SPELLINGS = {"image_url": IMAGE, "input_image": IMAGE, IMAGE: IMAGE, "audio_url": AUDIO, "input_audio": AUDIO, AUDIO: AUDIO}
SPELLINGS |= {"video_url": VIDEO, VIDEO: VIDEO}
EXAMPLES = {IMAGE: "data:image/png;base64,...", AUDIO: "data:audio/wav;base64,...", VIDEO: "data:video/mp4;base64,..."}
# What OpenAI's `detail` means in soft tokens; None: what the request, the operator or the model says.
DETAILS: Mapping[str, int | None] = {"low": BUDGETS[0], "auto": None, "high": BUDGETS[-1], "original": BUDGETS[-1]}
SCHEMES = ("data", "http", "https", "file")
SOFT_TOKENS = "max_soft_tokens"
OF_PROCESSOR = "mm_processor_kwargs"  # where vLLM has it
NO_MEDIA: Mapping[str, int] = MappingProxyType({})  # tokens of a prompt that are no text


@dataclass(frozen=True, slots=True)
class MediaUrl:
    """Where an image, or another thing that is no text, can be found; `where` is the field that says so."""

    kind: str  # as parts of the Python API name it
    where: str
    url: str = field(repr=False)

    @property
    def scheme(self) -> str:
        """Return how the URL begins, in small letters."""
        return self.url[: self.url.index(":")].lower()


def image_part(url: object, where: str, detail: object = None, soft_tokens: object = None) -> dict[str, Any]:
    """Return an image as a part of a message. Raises FieldError for what is no URL, and for a detail or budget there is not."""
    part = _media_part(IMAGE, url, where)
    if (most := _budget(detail, soft_tokens, where)) is not None:
        part[SOFT_TOKENS] = most
    return part


def _media_part(kind: str, url: object, where: str) -> dict[str, Any]:
    text = as_text(url, where).lstrip()
    scheme, colon, _ = text[:16].partition(":")
    if not colon or scheme.lower() not in SCHEMES:
        refuse(where, f"expected a URL, such as {EXAMPLES[kind]}, found {spell_value(text[:40])}")
    return {"type": kind, kind: MediaUrl(kind, where, text)}


def _budget(detail: object, soft_tokens: object, where: str) -> int | None:
    """Return what an image may become by its own fields, of which the number wins."""
    if soft_tokens is not None:
        return read_budget(soft_tokens, f"{where}.{SOFT_TOKENS}")
    if detail is None:
        return None
    if not isinstance(detail, str) or detail not in DETAILS:
        refuse(f"{where}.detail", f"expected one of {', '.join(DETAILS)}, found {spell_value(detail)}")
    return DETAILS[detail]


def read_budget(soft_tokens: object, where: str) -> int:
    """Return a number of soft tokens. Raises FieldError for any but those that there are."""
    try:
        return check_budget(soft_tokens)
    except RequestError as error:
        refuse(where, error.summary.partition(": ")[2])


def of_request(soft_tokens: object, of_processor: Mapping[str, Any] | None) -> int | None:
    """Return what every image of a request may become; None where it does not say. Raises FieldError."""
    if soft_tokens is not None:
        return read_budget(soft_tokens, SOFT_TOKENS)
    given = of_processor or {}
    for name in given:
        if name != SOFT_TOKENS:
            refuse(f"{OF_PROCESSOR}.{name}", f"no option of images here; there is {SOFT_TOKENS}")
    return read_budget(given[SOFT_TOKENS], f"{OF_PROCESSOR}.{SOFT_TOKENS}") if SOFT_TOKENS in given else None


def with_urls(message: Any, where: str) -> Any:
    """Return a message in the chat API's layout whose media are `MediaUrl`s; what else is in it stays as it is."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, list):
        return message
    parts = [read_part(part, f"{where}.content[{index}]") for index, part in enumerate(content)]
    return {**message, "content": parts}


def read_part(part: Any, where: str) -> Any:
    """Return a part of a message; one that holds media, however it is spelled, with a `MediaUrl`. Raises FieldError."""
    word = part.get("type") if isinstance(part, Mapping) else None
    kind = SPELLINGS.get(word) if isinstance(word, str) else None
    if kind is None:
        return part
    if word == "input_audio":
        told = as_object(part.get(word), f"{where}.{word}")
        data = as_text(told.get("data"), f"{where}.{word}.data")  # in whatever format: the bytes tell
        return _media_part(kind, data if data.startswith("data:") else f"data:;base64,{data}", f"{where}.{word}.data")
    name = next((name for name in (f"{kind}_url", kind, "url") if part.get(name) is not None), f"{kind}_url")
    given = part.get(name)
    if given is None and part.get("file_id") is not None:
        refuse(f"{where}.file_id", f"files are not kept here; send it as {kind}_url")
    told = given if isinstance(given, Mapping) else {"url": given}
    if kind != IMAGE:
        return _media_part(kind, told.get("url"), f"{where}.{name}")
    detail, own = told.get("detail", part.get("detail")), told.get(SOFT_TOKENS, part.get(SOFT_TOKENS))
    return image_part(told.get("url"), f"{where}.{name}", detail, own)


def urls_of(messages: Sequence[Any]) -> Iterator[tuple[str, MediaUrl]]:
    """Yield the addresses in messages in order, each with its place there: messages[1].content[0]."""
    for index, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        for place, part in enumerate(content if isinstance(content, list) else ()):
            if (url := _url_of(part)) is not None:
                yield f"messages[{index}].content[{place}]", url


def with_contents(messages: Sequence[Any], contents: Mapping[MediaUrl, bytes]) -> list[Any]:
    """Return messages with what was found in the places of its addresses."""
    return [_filled(message, contents) for message in messages]


def _filled(message: Any, contents: Mapping[MediaUrl, bytes]) -> Any:
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, list):
        return message
    urls = [_url_of(part) for part in content]
    parts = [part if url is None else {**part, url.kind: contents[url]} for part, url in zip(content, urls, strict=True)]
    return {**message, "content": parts}


def _url_of(part: Any) -> MediaUrl | None:
    kind = part.get("type") if isinstance(part, Mapping) else None
    found = part.get(kind) if isinstance(kind, str) else None
    return found if isinstance(found, MediaUrl) else None
