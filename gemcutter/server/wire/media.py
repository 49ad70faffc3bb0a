"""Images in bodies of requests: the forms in which the three APIs bring them, and how many soft tokens each may become.

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
from gemcutter.server.wire.fields import as_text, refuse

IMAGE = "image"
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
    text = as_text(url, where).lstrip()
    scheme, colon, _ = text[:16].partition(":")
    if not colon or scheme.lower() not in SCHEMES:
        refuse(where, f"expected a URL, such as data:image/png;base64,..., found {spell_value(text[:40])}")
    part: dict[str, Any] = {"type": IMAGE, "image": MediaUrl(IMAGE, where, text)}
    if (most := _budget(detail, soft_tokens, where)) is not None:
        part[SOFT_TOKENS] = most
    return part


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
    """Return a message in the chat API's layout whose images are `MediaUrl`s; what else is in it stays as it is."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, list):
        return message
    parts = [_with_url(part, f"{where}.content[{index}]") for index, part in enumerate(content)]
    return {**message, "content": parts}


def _with_url(part: Any, where: str) -> Any:
    """Return a part of a message; one with an image, as OpenAI or Hugging Face spell it, with a `MediaUrl`."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in ("image_url", "input_image"):
        return read_image_url(part, where)
    if kind == IMAGE:
        name = next((name for name in (IMAGE, "image_url", "url") if part.get(name) is not None), IMAGE)
        return read_image_url({**part, "image_url": part.get(name)}, where, name)
    return part


def read_image_url(part: Mapping[str, Any], where: str, name: str = "image_url") -> dict[str, Any]:
    """Return the image of a part whose `image_url` is a URL or an object with one; `name` is what the field is called there."""
    given = part.get("image_url")
    if given is None and part.get("file_id") is not None:
        refuse(f"{where}.file_id", "files are not kept here; send the image itself as image_url")
    told = given if isinstance(given, Mapping) else {"url": given}
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
