"""POST /v1/audio/transcriptions and /v1/audio/translations: what a form may hold, and the words in which a model is asked.

Owns the fields with what becomes of each, the names of languages, and Google's prompts for speech recognition and translation.
Refuses to know HTTP and sounds. Read `server/transcription_task.py` for what is done with the answers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gemcutter.server.wire.fields import ChatInput, refuse

FORMATS = ("json", "text", "verbose_json")
NAME = re.compile(r"[A-Za-z][A-Za-z ()-]{2,39}")
ORIGINAL = "its original language"
MOST_PROMPT = 2000  # characters of a hint
# By their codes in ISO 639-1; any other is asked for by its English name.
CODES = (
    "af:Afrikaans am:Amharic ar:Arabic az:Azerbaijani be:Belarusian bg:Bulgarian bn:Bengali bs:Bosnian ca:Catalan cs:Czech "
    "cy:Welsh da:Danish de:German el:Greek en:English es:Spanish et:Estonian eu:Basque fa:Persian fi:Finnish fr:French "
    "ga:Irish gl:Galician gu:Gujarati he:Hebrew hi:Hindi hr:Croatian hu:Hungarian hy:Armenian id:Indonesian is:Icelandic "
    "it:Italian ja:Japanese ka:Georgian kk:Kazakh km:Khmer kn:Kannada ko:Korean lo:Lao lt:Lithuanian lv:Latvian "
    "mk:Macedonian ml:Malayalam mn:Mongolian mr:Marathi ms:Malay my:Burmese ne:Nepali nl:Dutch no:Norwegian pa:Punjabi "
    "pl:Polish pt:Portuguese ro:Romanian ru:Russian si:Sinhala sk:Slovak sl:Slovenian so:Somali sq:Albanian sr:Serbian "
    "sv:Swedish sw:Swahili ta:Tamil te:Telugu th:Thai tl:Filipino tr:Turkish uk:Ukrainian ur:Urdu uz:Uzbek vi:Vietnamese "
    "yo:Yoruba zh:Chinese zu:Zulu"
)
LANGUAGES = dict(pair.split(":") for pair in CODES.split())


@dataclass(frozen=True, slots=True)
class SpeechInput:
    """What a form asks for: the language that is spoken, None where it is not told, and the one to translate into, if any."""

    model: str
    language: str | None = None
    target: str | None = None
    hint: str = ""
    format: str = "json"
    is_streamed: bool = False
    sampling: dict[str, Any] = field(default_factory=dict)

    @property
    def mark(self) -> str | None:
        """Return what stands before a translation in an answer; None where nothing is translated."""
        return None if self.target is None else f"{self.target}: "

    def words(self) -> str:
        """Return the instruction beside a sound, as Google's model card has it, and the client's hint."""
        spoken = self.language or ORIGINAL
        if self.target is not None:
            asked = (
                f"Transcribe the following speech segment in {spoken}, then translate it into {self.target}.\n"
                f"When formatting the answer, first output the transcription in {spoken}, then one newline, then output the "
                f"string '{self.mark}', then the translation in {self.target}."
            )
        else:
            into = f" into {self.language} text" if self.language else ""
            asked = (
                f"Transcribe the following speech segment in {spoken}{into}.\n\n"
                "Follow these specific instructions for formatting the answer:\n"
                "* Only output the transcription, with no newlines.\n"
                "* When transcribing numbers, write the digits, i.e. write 1.7 and not one point seven, and write 3 instead of "
                "three."
            )
        return f"{asked}\n* Spell names and terms as here: {self.hint}" if self.hint else asked

    def to_chat(self, sound: object) -> ChatInput:
        """Return the conversation about one sound, as the Python API takes it."""
        content = [{"type": "audio", "audio": sound}, {"type": "text", "text": self.words()}]
        return ChatInput([{"role": "user", "content": content}], thinking=False, sampling=dict(self.sampling))


def read_form(
    model: str,
    *,
    language: str | None = None,
    target: str | None = None,
    prompt: str | None = None,
    response_format: str | None = None,
    temperature: float | None = None,
    stream: bool | None = None,
    granularities: Sequence[str] = (),
) -> SpeechInput:
    """Return what a form asks for. Raises FieldError, naming the field, for what can't be served."""
    format = response_format or "json"
    if format not in FORMATS:
        remedy = "; when words were said is not known" if format in ("srt", "vtt") else ""
        refuse("response_format", f"expected one of {', '.join(FORMATS)}, found {format[:40]!r}{remedy}")
    if "word" in granularities:
        refuse("timestamp_granularities", "when words were said is not known; there are segments, of up to 30 s")
    if stream and format == "verbose_json":
        refuse("response_format", "a stream has the format json or text")
    if prompt and len(prompt) > MOST_PROMPT:
        refuse("prompt", f"at most {MOST_PROMPT} characters, found {len(prompt)}")
    sampling: dict[str, Any] = {"temperature": 0.0 if temperature is None else temperature, "watchdog": True}
    if format == "verbose_json":
        sampling["logprobs"] = 0
    return SpeechInput(
        model,
        read_language(language, "language"),
        read_language(target, "to_language"),
        " ".join((prompt or "").split()),
        format,
        bool(stream),
        sampling,
    )


def read_language(text: str | None, where: str) -> str | None:
    """Return the English name of a language, given it or a code; None for none. Raises FieldError for what is neither."""
    found = (text or "").strip()
    if not found:
        return None
    code = found.lower().replace("_", "-").partition("-")[0]
    if code in LANGUAGES:
        return LANGUAGES[code]
    if not NAME.fullmatch(found):
        refuse(where, f"expected a code such as en, or a language's English name, found {found[:40]!r}")
    return found[0].upper() + found[1:]
