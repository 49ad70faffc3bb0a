"""From a sound of any length to a text: window by window, in order, each a request of its own.

Owns what is kept of an answer (of a translation, what stands behind its mark), how the texts of windows are joined, and what is
told of them in the end. Refuses to know forms and HTTP. Read `wire/transcription.py` for what is asked, `media/long_sound.py` for
windows, `routes/audio.py` for who sends the text.
"""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gemcutter.api import PreparedRequest
from gemcutter.completion import Completion
from gemcutter.media.decode_sound import RATE
from gemcutter.media.long_sound import Window
from gemcutter.server.bridge import Reply
from gemcutter.server.chat_task import prepare_chat
from gemcutter.server.service import Service
from gemcutter.server.wire.transcription import SpeechInput

MOST_TOKENS = 1024  # of an answer to one window: four times what people say in 30 s


class Heard:
    """Turns the pieces of an answer into text that may be sent, white space at both ends left out."""

    def __init__(self, mark: str | None) -> None:
        self._mark, self._all, self._held, self.text = mark, "", "", ""

    def push(self, piece: str) -> str:
        """Return what a piece adds to the text; nothing before the mark, where there is to be one."""
        if self._mark is not None:
            self._all += piece
            place = self._all.find(self._mark)
            if place < 0:
                return ""
            piece, self._mark = self._all[place + len(self._mark) :], None
        return self._add(piece)

    def finish(self) -> str:
        """Return what is left: the whole answer, where the mark never came."""
        if self._mark is None:
            return ""
        self._mark = None
        return self._add(self._all)

    def _add(self, piece: str) -> str:
        """Return the new text up to its last word; white space waits for a word behind it."""
        found = self._held + piece if self.text else piece.lstrip()
        kept = found.rstrip()
        self._held = found[len(kept) :] if self.text or kept else ""
        self.text += kept
        return kept


@dataclass(slots=True)
class Segment:
    """The text of one window, and the reply that it came from, if there was anything to hear."""

    window: Window
    text: str = ""
    completion: Completion | None = None


@dataclass
class Transcription:
    """One sound on its way to a text; `segments` are the windows that are done."""

    service: Service
    asked: SpeechInput
    windows: Sequence[Window]
    adapter: str | None = None
    segments: list[Segment] = field(default_factory=list)
    audio_tokens: int = 0
    _reply: Reply | None = None
    _first: PreparedRequest | None = None

    async def prepare(self) -> None:
        """Encode the first window, so that what can't be served is told before anything is sent. Raises RequestError."""
        if not self.windows[0].is_silent:
            self._first = await self._prepared(self.windows[0])

    async def pieces(self) -> AsyncIterator[str]:
        """Yield the text as it comes. Raises what requests raise."""
        for window in self.windows:
            segment = Segment(window)
            if not window.is_silent:
                async for piece in self._hear(segment):
                    yield piece
            self.segments.append(segment)

    async def _hear(self, segment: Segment) -> AsyncIterator[str]:
        first, self._first = self._first, None
        prepared = first or await self._prepared(segment.window)
        self.audio_tokens += sum(span.rows for span in prepared.request.media)
        heard, is_later = Heard(self.asked.mark), any(each.text for each in self.segments)
        (self._reply,) = self.service.open([prepared])
        try:
            async for reading in self._reply:
                for chunk in reading.chunks:
                    if piece := heard.push(chunk.text if chunk.kind == "content" else ""):
                        yield f" {piece}" if is_later else piece
                        is_later = False
            if piece := heard.finish():
                yield f" {piece}" if is_later else piece
            segment.text, segment.completion = heard.text, self._reply.completion
        finally:
            self.close()

    async def _prepared(self, window: Window) -> PreparedRequest:
        model, options = self.service.model, self.service.options
        chat = self.asked.to_chat((window.samples, RATE))
        found = await self.service.work_on_media(lambda: prepare_chat(model, chat, options, adapter=self.adapter))
        return replace(found, request=replace(found.request, max_tokens=min(found.request.max_tokens, MOST_TOKENS)))

    def close(self) -> None:
        """End the request that runs, if one does."""
        if self._reply is not None:
            self.service.close([self._reply])
            self._reply = None

    @property
    def text(self) -> str:
        """Return the text so far."""
        return " ".join(segment.text for segment in self.segments if segment.text)

    def usage(self) -> dict[str, Any]:
        """Return the tokens of all windows as OpenAI's API counts them."""
        done = [segment.completion for segment in self.segments if segment.completion is not None]
        given, written = sum(len(each.prompt_tokens) for each in done), sum(len(each.tokens) for each in done)
        details = {"text_tokens": given - self.audio_tokens, "audio_tokens": self.audio_tokens}
        return {
            "type": "tokens",
            "input_tokens": given,
            "input_token_details": details,
            "output_tokens": written,
            "total_tokens": given + written,
        }

    def verbose(self) -> dict[str, Any]:
        """Return text and segments; whatever can't be known of them is left out."""
        task = "transcribe" if self.asked.target is None else "translate"
        language = (self.asked.target or self.asked.language or "unknown").lower()
        segments = [_segment(index, each, self.asked) for index, each in enumerate(self.segments) if each.completion is not None]
        duration = self.windows[-1].stop_s
        told = {"task": task, "language": language, "duration": round(duration, 3), "text": self.text, "segments": segments}
        return {**told, "usage": self.usage()}


def _segment(index: int, segment: Segment, asked: SpeechInput) -> dict[str, Any]:
    found, data = segment.completion, segment.text.encode()
    assert found is not None
    logprobs = [each.logprob for each in found.logprobs]
    return {
        "id": index,
        "seek": round(segment.window.start_s * 100),
        "start": round(segment.window.start_s, 3),
        "end": round(segment.window.stop_s, 3),
        "text": segment.text,
        "tokens": list(found.tokens),
        "temperature": asked.sampling["temperature"],
        "avg_logprob": sum(logprobs) / len(logprobs) if logprobs else 0.0,
        "compression_ratio": len(data) / len(zlib.compress(data)) if data else 0.0,
    }
