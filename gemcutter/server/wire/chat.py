"""POST /v1/chat/completions: what a body may hold, and what becomes of each field.

Owns the fields of the request (honoured, ignored or refused by name) and `to_chat`, the conversion to `ChatInput`. The
messages themselves are this API's own and go on as they are, but for images. Refuses to know HTTP. Read `server/chat_events.py`
for the way back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from gemcutter.errors import spell_value
from gemcutter.server.options import ServerOptions
from gemcutter.server.wire.fields import (
    ChatInput,
    as_list,
    as_name,
    as_object,
    as_text,
    check_declared,
    choice_word,
    function,
    refuse,
    schema_constraint,
)
from gemcutter.server.wire.media import of_request, with_urls
from gemcutter.text.grammar import Constraint

# Fields that would change what a client gets: refused by name where they ask for something.
REFUSED = {
    "audio": "there is no spoken output",
    "functions": "declare them as tools",
    "function_call": "use tool_choice",
    "web_search_options": "the server searches nothing; declare a tool",
    "prompt_logprobs": "ask POST /v1/completions with echo and logprobs",
    "best_of": "ask for n replies and choose by their logprobs",
    "use_beam_search": "there is no beam search",
}
SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "ignore_eos",
    "min_tokens",
    "stop_token_ids",
    "priority",
    "watchdog",
    "cache_salt",
)
FORMATS = ("text", "json_object", "json_schema")  # of response_format
FORMS = ("json", "regex", "choice", "grammar", "json_object")  # of structured_outputs
OF_OUTPUTS = "structured_outputs"


class StreamOptions(BaseModel):
    """What a stream brings beside the reply."""

    model_config = ConfigDict(extra="allow")

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingFields(BaseModel):
    """How tokens are chosen and where a reply ends, for both completion routes; vLLM's spelling where OpenAI has none."""

    model_config = ConfigDict(extra="allow")

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(default=None, ge=1)
    stop: str | list[str] | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    priority: int | None = Field(default=None, description="lower ones first")
    watchdog: bool | None = Field(default=None, description="end replies that go round in circles")
    structured_outputs: dict[str, Any] | None = Field(default=None, description=f"one of {', '.join(FORMS)}, as vLLM has it")
    cache_salt: str | None = Field(default=None, min_length=1, description="share cached prefixes under this word only")

    @property
    def wants_usage(self) -> bool:
        """Return whether a stream ends with a chunk of usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def wants_running_usage(self) -> bool:
        """Return whether every chunk of a stream carries usage."""
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def stops(self, limit: int) -> tuple[str, ...]:
        """Return the stop strings. Raises FieldError for too many, or empty ones."""
        found = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(found) > limit:
            refuse("stop", f"at most {limit} strings, found {len(found)}")
        if not all(found):
            refuse("stop", "expected strings that are not empty")
        return found

    def sampling(self, limit: int) -> dict[str, Any]:
        """Return the sampling options that were given. Raises FieldError for a bias that can't be read."""
        found = {name: value for name in SAMPLING if (value := getattr(self, name)) is not None}
        if isinstance(found.get("top_k"), int) and found["top_k"] == -1:  # how vLLM spells "off"
            found["top_k"] = 0
        if isinstance(found.get("seed"), int) and found["seed"] < 0:  # clients send any 64 bits
            found["seed"] += 1 << 64
        if self.logit_bias:
            found["logit_bias"] = _biases(self.logit_bias, limit)
        return found


class ChatRequest(SamplingFields):
    """The body of POST /v1/chat/completions.

    Ignored: user, metadata, store, service_tier, safety_identifier, prompt_cache_key, verbosity, and names that are not known.
    """

    messages: list[Any] = Field(description="the conversation, in OpenAI's layout")
    max_tokens: int | None = Field(default=None, ge=0)
    max_completion_tokens: int | None = Field(default=None, ge=0, description="wins over max_tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    modalities: list[str] | None = None
    max_soft_tokens: int | None = Field(default=None, description="what an image may become: 70, 140, 280, 560 or 1120")
    mm_processor_kwargs: dict[str, Any] | None = Field(default=None, description="the same, as vLLM has it")


def to_chat(request: ChatRequest, options: ServerOptions) -> ChatInput:
    """Return a request as a conversation. Raises FieldError, naming the field, for what can't be served."""
    extra = request.model_extra or {}
    for name, remedy in REFUSED.items():
        if extra.get(name):
            refuse(name, f"not supported: {remedy}")
    if request.modalities and request.modalities != ["text"]:
        refuse("modalities", "only text can be written; leave it out")
    if (request.n or 1) > options.max_n:
        refuse("n", f"at most {options.max_n} replies, found {request.n}")
    if request.add_generation_prompt is False and not request.continue_final_message:
        refuse("add_generation_prompt", "false leaves nothing to answer; leave it out, or set continue_final_message")
    if not request.messages:
        refuse("messages", "expected one message or more, found none")
    tools = read_tools(request.tools or ())
    wanted = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    sampling = request.sampling(options.max_logit_bias)
    if request.logprobs:
        sampling["logprobs"] = request.top_logprobs or 0
    elif request.top_logprobs:
        refuse("top_logprobs", "needs logprobs: true")
    return ChatInput(
        messages=[with_urls(each, f"messages[{index}]") for index, each in enumerate(request.messages)],
        tools=tools,
        tool_choice=read_tool_choice(request.tool_choice, tools),
        parallel_tool_calls=request.parallel_tool_calls is not False,
        max_tokens=wanted,
        stop=request.stops(options.max_stop),
        sampling=sampling,
        thinking=None if request.reasoning_effort is None else request.reasoning_effort != "none",
        template_options=dict(request.chat_template_kwargs or {}),
        constraint=read_constraint(request, request.response_format),
        format_field=OF_OUTPUTS if request.response_format is None else "response_format",
        continues=bool(request.continue_final_message),
        max_soft_tokens=of_request(request.max_soft_tokens, request.mm_processor_kwargs),
    )


def read_tools(tools: Any) -> list[dict[str, Any]]:
    """Return declarations of functions in the layout that templates print. Raises FieldError."""
    found = list[dict[str, Any]]()
    for index, each in enumerate(tools):
        where = f"tools[{index}]"
        tool = as_object(each, where)
        if tool.get("type", "function") != "function":
            refuse(f"{where}.type", f"{spell_value(tool.get('type'))}: only functions can be called")
        declared = as_object(tool.get("function"), f"{where}.function")
        name = as_name(declared.get("name"), f"{where}.function.name")
        details = (declared.get("description"), declared.get("parameters"), declared.get("strict"))
        found.append(function(name, *details, f"{where}.function"))
    return found


def read_tool_choice(choice: str | Mapping[str, Any] | None, tools: list[dict[str, Any]]) -> str | dict[str, Any]:
    """Return which tools may or must be called. Raises FieldError."""
    if choice is None:
        return "auto"
    if isinstance(choice, str):
        return choice_word(choice, tools)
    kind = choice.get("type")
    if kind not in ("function", "allowed_tools"):
        refuse("tool_choice.type", f"expected function or allowed_tools, found {spell_value(kind)}")
    return _named_function(choice, tools) if kind == "function" else _allowed_tools(choice, tools)


def _named_function(choice: Mapping[str, Any], tools: list[dict[str, Any]]) -> dict[str, Any]:
    named = as_object(choice.get("function"), "tool_choice.function")
    name = as_name(named.get("name"), "tool_choice.function.name")
    return {"name": check_declared(name, tools, "tool_choice.function.name")}


def _allowed_tools(choice: Mapping[str, Any], tools: list[dict[str, Any]]) -> dict[str, Any]:
    allowed = as_object(choice.get("allowed_tools", choice), "tool_choice.allowed_tools")
    names = list[str]()
    for index, each in enumerate(as_list(allowed.get("tools") or (), "tool_choice.allowed_tools.tools")):
        where = f"tool_choice.allowed_tools.tools[{index}]"
        tool = as_object(each, where)
        name = as_name(as_object(tool.get("function", tool), f"{where}.function").get("name"), f"{where}.function.name")
        names.append(check_declared(name, tools, f"{where}.function.name"))
    if not names:
        refuse("tool_choice.allowed_tools.tools", "expected one tool or more")
    return {"names": names, "mode": "required" if allowed.get("mode") == "required" else "auto"}


def read_constraint(request: SamplingFields, format: Mapping[str, Any] | None = None) -> Constraint | None:
    """Return what the answer must be: by `response_format`, or as vLLM spells it. Raises FieldError, naming the field."""
    wanted = dict(request.structured_outputs or {})
    for name in FORMS:
        if (older := (request.model_extra or {}).get(f"guided_{name}")) is not None:
            wanted[name] = older
    asked = [name for name in FORMS if wanted.get(name) not in (None, False)]
    if len(asked) + (format is not None) > 1:
        refuse(OF_OUTPUTS, f"one form at a time: {', '.join(FORMS)} or response_format")
    if asked:
        return _constraint(asked[0], wanted[asked[0]])
    return None if format is None else _of_format(format)


def _constraint(name: str, value: object) -> Constraint:
    """Return one of vLLM's forms as a constraint. Raises FieldError."""
    where = f"{OF_OUTPUTS}.{name}"
    if name == "json":
        return schema_constraint(value, where, strict=False)
    if name == "json_object":
        return Constraint("json_object")
    if name == "choice":
        return Constraint("choice", tuple(as_text(each, f"{where}[{at}]") for at, each in enumerate(as_list(value, where))))
    return Constraint("regex" if name == "regex" else "lark", as_text(value, where))


def _of_format(format: Mapping[str, Any]) -> Constraint | None:
    kind = format.get("type")
    if kind not in FORMATS:
        refuse("response_format.type", f"expected one of {', '.join(FORMATS)}, found {spell_value(kind)}")
    if kind == "json_schema":
        where = "response_format.json_schema"
        told = as_object(format.get("json_schema"), where)
        return schema_constraint(told.get("schema"), f"{where}.schema", strict=told.get("strict") is True)
    return Constraint("json_object") if kind == "json_object" else None


def _biases(given: Mapping[str, float], limit: int) -> dict[int, float]:
    if len(given) > limit:
        refuse("logit_bias", f"at most {limit} tokens, found {len(given)}")
    found = dict[int, float]()
    for token, bias in given.items():
        if not token.isdecimal():
            refuse(f"logit_bias.{token}", "expected a token id")
        found[int(token)] = bias
    return found
