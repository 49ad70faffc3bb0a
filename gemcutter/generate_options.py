"""What a request may ask for by name, and the checks that need no model.

Owns `GenerateOptions`, the names of other engines for the same things, the checks of single options, and which parts of a message
can be read. Refuses to know tokenizers, templates and the engine, which checks what depends on the model. Read `api.py` for who
asks, `engine/sampling.py` for the ranges of the sampling options.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypedDict, TypeGuard

from gemcutter.engine.sampler import LogitsProcessor
from gemcutter.engine.sampling_params import SamplingParams
from gemcutter.errors import RequestError, spell_value
from gemcutter.media.decode import ImageSource
from gemcutter.media.decode_sound import SoundSource
from gemcutter.media.video import VideoSource
from gemcutter.text.grammar import Constraint

Message = Mapping[str, object]


class TemplateOptions(TypedDict, total=False):
    """What decides how a conversation becomes a prompt, beside the conversation.

    `enable_thinking`, `tools` and `template_options` (by the names of the template's own) are for the chat template: what it
    does not read is refused, or with `lenient_options` left out. What looks like a marker in a conversation stays text, unless
    it is `trusted`. `add_generation_prompt` off ends the prompt after the last message; `continue_final_message` ends it within
    that one, so that the reply goes on with the assistant's text.
    """

    enable_thinking: bool
    tools: Sequence[Message | Callable[..., object]] | None
    template_options: Mapping[str, object]
    lenient_options: bool
    trusted: bool
    add_generation_prompt: bool
    continue_final_message: bool


class GenerateOptions(TypedDict, total=False):
    """What a request may ask for, all of it optional; a checkpoint's generation_config.json fills in the sampling fields.

    `max_tokens` bounds the reply, 128 tokens by default. `stop` are strings that end the text, `ignore_eos` goes on after
    tokens that end a turn; `TemplateOptions` are for conversations. Tools are declarations as OpenAI's API has them, or
    functions, which are declared by their signature; calls are read by them, and with `parallel_tool_calls` False the first
    call ends the reply. `tool_choice` is "auto", "none", "required", {"name": N} or {"names": [...], "mode": "auto" or
    "required"}. `constraint` is what the answer must be, thoughts aside. `stop_token_ids` end the reply as a turn's end does.
    With `watchdog` a reply that goes round in circles ends early, with "repetition" as its reason; arrays of equal numbers,
    tables and code pass. What was computed for a prompt is reused among requests of one `cache_salt` only. `sampling` takes the
    place of the single sampling fields (`SamplingParams`); the others are `Request`'s. While `temperature` is 0 the most likely
    token is taken: `top_k`, `top_p`, `min_p` and `seed` change nothing then. `images` (paths, bytes, PIL images or arrays) take
    the places of <|image|> in raw text or ids, `audio` (paths, bytes, or pairs of an array and its rate) those of <|audio|>, and
    `videos` (paths, bytes, or frames as images, alone or in pairs with their rate) those of <|video|>. In conversations they
    are parts of messages: {"type": "image", "image": ...}, {"type": "audio", "audio": ...}, {"type": "video", "video": ...}.
    `max_soft_tokens` is what an image may become at most: 70, 140, 280, 560 or 1120.
    """

    max_tokens: int
    stop: Sequence[str] | None
    ignore_eos: bool
    enable_thinking: bool
    tools: Sequence[Message | Callable[..., object]] | None
    template_options: Mapping[str, object]
    lenient_options: bool
    trusted: bool
    add_generation_prompt: bool
    continue_final_message: bool
    parallel_tool_calls: bool
    tool_choice: str | Mapping[str, object]
    constraint: Constraint | None
    prompt_logprobs: int | None
    hidden_states: bool
    top_logits: int
    adapter: str | None
    logits_processors: Sequence[LogitsProcessor]
    stop_token_ids: Sequence[int] | None
    min_tokens: int
    priority: int
    deadline_s: float | None
    watchdog: bool
    cache_salt: str | None
    sampling: SamplingParams | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    suppress: tuple[int, ...]
    seed: int | None
    logprobs: int | None
    images: Sequence[ImageSource]
    audio: Sequence[SoundSource]
    videos: Sequence[VideoSource]
    max_soft_tokens: int | None


NAMES = tuple(GenerateOptions.__annotations__)
OF_REQUEST = (
    "max_tokens",
    "prompt_logprobs",
    "hidden_states",
    "top_logits",
    "adapter",
    "logits_processors",
    "min_tokens",
    "priority",
    "deadline_s",
    "cache_salt",
)

# What other engines call an option that there is here.
ELSEWHERE = {
    "max_new_tokens": "max_tokens",
    "max_length": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "num_predict": "max_tokens",
    "min_new_tokens": "min_tokens",
    "timeout": "deadline_s",
    "max_time": "deadline_s",
    "eos_token_id": "stop_token_ids",
    "n_predict": "max_tokens",
    "temp": "temperature",
    "repeat_penalty": "repetition_penalty",
    "stop_strings": "stop",
    "stop_sequences": "stop",
    "bad_words_ids": "suppress",
    "suppress_tokens": "suppress",
    "top_logprobs": "logprobs",
    "num_logprobs": "logprobs",
    "output_logits": "top_logits",
    "output_hidden_states": "hidden_states",
    "logits_processor": "logits_processors",
    "sampling_params": "sampling",
    "generation_config": "sampling",
    "thinking": "enable_thinking",
    "think": "enable_thinking",
    "functions": "tools",
    "function_call": "tool_choice",
    "response_format": "constraint",
    "structured_outputs": "constraint",
    "guided_decoding": "constraint",
    "guided_json": "constraint",
    "guided_regex": "constraint",
    "guided_choice": "constraint",
    "guided_grammar": "constraint",
    "grammar": "constraint",
    "json_schema": "constraint",
    "chat_template_kwargs": "template_options",
    "lora": "adapter",
    "lora_request": "adapter",
}
# What other engines have an option for, and is done in another way here.
OTHERWISE = {
    "n": "for several replies, pass the prompt several times in a list, with a temperature",
    "best_of": "for several replies, pass the prompt several times in a list, and take the best by its logprobs",
    "num_return_sequences": "for several replies, pass the prompt several times in a list, with a temperature",
    "do_sample": "a temperature above 0 samples, 0 is greedy",
    "num_beams": "there is no beam search",
    "stream": "`model.stream(prompt)` gives the text while it is written",
    "streamer": "`model.stream(prompt)` gives the text while it is written",
    "echo": "for the prompt's log-probabilities there is prompt_logprobs",
    "system": 'a system prompt is a message {"role": "system", "content": ...}',
}

# The options of templates, and what each is without being asked for.
OF_TEMPLATE: Mapping[str, object] = {
    "enable_thinking": False,
    "tools": None,
    "template_options": {},
    "lenient_options": False,
    "trusted": False,
    "add_generation_prompt": True,
    "continue_final_message": False,
}
PARTS = ("text",)  # types of a message's parts that every model can read
LOADABLE = ("image", "audio", "video")  # types that a model can read which was loaded for them


def check_names(options: Iterable[str]) -> None:
    """Raise RequestError, with what was probably meant, for options that there are not."""
    unknown = sorted(set(options) - set(NAMES))
    if unknown:
        problems = [f"{name}: not an option of a request{_meant(name)}" for name in unknown]
        raise RequestError(f"unknown options: {', '.join(unknown)}", [*problems, f"options are: {', '.join(NAMES)}"])


def _meant(name: str) -> str:
    """Return a hint after an unknown name, empty where nothing is alike."""
    if name in OTHERWISE:
        return f"; {OTHERWISE[name]}"
    near = difflib.get_close_matches(name, NAMES, 1, 0.7)
    meant = ELSEWHERE.get(name) or (near[0] if near else None)
    return f"; did you mean {meant}?" if meant else ""


def check_stop(stop: object) -> tuple[str, ...]:
    """Return stop strings as a tuple; none for None. Raises RequestError for anything but texts."""
    if stop is None:
        return ()
    if isinstance(stop, str):
        raise RequestError(f"stop is the string {spell_value(stop)}, expected a list of strings: write [{spell_value(stop)}]")
    if not isinstance(stop, list | tuple | set | frozenset):  # an iterator would give its strings to one prompt of a batch alone
        raise RequestError(f"stop: expected a list of strings, found {type(stop).__name__}")
    strings = tuple(stop)
    problems = [
        f"stop[{index}] is {spell_value(item)}, expected a non-empty string"
        for index, item in enumerate(strings)
        if not isinstance(item, str) or not item
    ]
    if problems:
        raise RequestError("stop strings can't be used", problems)
    return strings


def check_stop_ids(ids: object) -> frozenset[int]:
    """Return ids that end a reply; none for None. Raises RequestError for anything but a list of ids."""
    found = () if ids is None else ids
    if not isinstance(found, list | tuple | set | frozenset) or not all(type(token) is int and token >= 0 for token in found):
        raise RequestError(f"stop_token_ids: expected a list of token ids, found {spell_value(ids)}")
    return frozenset(found)


def check_flag(name: str, value: object) -> bool:
    """Return an option that is on or off. Raises RequestError for anything else."""
    if not isinstance(value, bool):
        raise RequestError(f"{name}: expected True or False, found {spell_value(value)}")
    return value


def check_template_options(options: Mapping[str, object], tokens: Iterable[str]) -> dict[str, Any]:
    """Return what a chat template is asked for, `template_options` among the others, of which `enable_thinking` wins.

    `tokens` are names under which a template finds special tokens: only trusted callers may give others.
    Raises RequestError, with every problem.
    """
    found = {name: options.get(name, default) for name, default in OF_TEMPLATE.items() if name != "template_options"}
    given = options.get("template_options")
    extra = dict(given) if isinstance(given, Mapping) else {}
    found["enable_thinking"] = extra.pop("enable_thinking", found["enable_thinking"])
    problems = list[str]()
    if given is not None and not isinstance(given, Mapping):
        problems.append(f"template_options: expected an object, found {spell_value(given)}")
    for name in (name for name, default in OF_TEMPLATE.items() if isinstance(default, bool)):
        try:
            check_flag(name, found[name])
        except RequestError as error:
            problems.append(error.summary)
    reserved = {*OF_TEMPLATE, "messages", *(() if found["trusted"] is True else tokens)}
    for name in extra:
        if not isinstance(name, str) or name in reserved:
            problems.append(f"template_options.{name}: no option of the template's own; leave it out")
    if problems:
        raise RequestError("the conversation can't be rendered with these options", problems)
    return {**found, **extra}


def is_conversation(prompt: object) -> TypeGuard[Sequence[Message]]:
    """Return whether a prompt is a list of messages."""
    return isinstance(prompt, list | tuple) and bool(prompt) and all(issubclass(kind, Mapping) for kind in set(map(type, prompt)))


def check_parts(messages: Iterable[object], readable: Collection[str] = PARTS) -> None:
    """Raise RequestError, naming each part, where a message holds something else than parts of the types that are `readable`.

    What else may be wrong with messages is left to the chat template's own check.
    """
    problems = list[str]()
    for place, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        for index, part in enumerate(content if isinstance(content, list | tuple) else ()):
            kind = part.get("type") if isinstance(part, Mapping) else None
            if isinstance(kind, str) and kind not in readable:
                remedy = f"; load the model with media '{kind}' for it" if kind in LOADABLE else ""
                problems.append(
                    f"messages[{place}].content[{index}].type: a part of type {kind!r}; only {' and '.join(readable)} can be "
                    f"read{remedy}"
                )
    if problems:
        raise RequestError("the conversation holds parts that can't be read yet", problems)
