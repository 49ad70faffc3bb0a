"""What an operator decides about a server, with the limits that keep strangers' requests harmless.

Owns `ServerOptions` and the check of every field. Standard library only. Read `app.py` for what is made of them,
`cli/serve.py` for the command line.
"""

from __future__ import annotations

from dataclasses import dataclass

from gemcutter.errors import RequestError, spell_value

REASONING_FIELDS = ("reasoning_content", "reasoning", "both")
BOS_RULES = ("auto", "never")
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """How a model is served; times in seconds, sizes in bytes.

    `names` are those that requests may use for the model, the first one is its own; "*" among them answers any. `max_queue`
    bounds the requests that wait beside those that run, `max_queued_tokens` the prompt tokens that are not computed yet.
    `max_soft_tokens` is what an image may become unless its request says so, None: what the model was made for.
    `allowed_media_domains` are the hosts whose images may be named by address (*.example.org those below it, * any), and
    `allowed_local_media_path` is the folder of files that may be; without them none is followed. No private address is asked,
    this machine's own only with `allow_loopback_media`. `reader_patience_s` is how long a reader may leave its reply unread
    before the request is cancelled, 0 for ever. Raises RequestError with every field that is out of range.
    """

    names: tuple[str, ...] = ("gemcutter",)
    api_keys: tuple[str, ...] = ()
    reasoning_field: str = "reasoning_content"
    strict_tool_deltas: bool = False
    bos_for_token_prompts: str = "auto"
    template_options: tuple[tuple[str, object], ...] = ()  # for every conversation; a request's own win
    max_queue: int = 256
    max_queued_tokens: int = 1 << 18
    max_body_bytes: int = 32 * MIB
    max_n: int = 16
    max_stop: int = 16
    max_logit_bias: int = 1024
    max_tools: int = 256
    max_images: int = 32  # of one request
    max_sounds: int = 8
    max_videos: int = 2
    max_speech_s: float = 3600.0  # of a sound that is transcribed
    max_soft_tokens: int | None = None
    allowed_media_domains: tuple[str, ...] = ()
    allowed_local_media_path: str | None = None
    media_timeout_s: float = 10.0  # of one address
    allow_loopback_media: bool = False
    max_batch: int = 128  # prompts of one request to /v1/completions
    request_timeout_s: float = 0.0  # 0: none
    ping_s: float = 10.0
    reader_patience_s: float = 60.0
    shutdown_timeout_s: float = 30.0
    store_bytes: int = 0  # of /v1/responses; 0: nothing is kept
    tokenizer_info: bool = False
    prefix_cache_salt_per_key: bool = False  # cached prefixes are shared among requests of one key only
    lora_root: str | None = None  # folder whose folders may be loaded as adapters on request; None: none may

    def __post_init__(self) -> None:
        problems = [f"{name}: expected 0 or more, found {value}" for name, value in self._numbers() if value < 0]
        if not self.names or not all(self.names):
            problems.append(f"names: expected one name or more, found {spell_value(self.names)}")
        if self.reasoning_field not in REASONING_FIELDS:
            problems.append(f"reasoning_field: expected one of {', '.join(REASONING_FIELDS)}, found {self.reasoning_field!r}")
        if self.bos_for_token_prompts not in BOS_RULES:
            problems.append(
                f"bos_for_token_prompts: expected one of {', '.join(BOS_RULES)}, found {self.bos_for_token_prompts!r}"
            )
        if problems:
            raise RequestError("the server can't run with these options", problems)

    def _numbers(self) -> list[tuple[str, float]]:
        found = ((name, getattr(self, name)) for name in self.__slots__)
        return [(name, value) for name, value in found if isinstance(value, int | float) and not isinstance(value, bool)]

    @property
    def name(self) -> str:
        """Return the model's own name."""
        return next((name for name in self.names if name != "*"), "gemcutter")

    def serves(self, name: str) -> bool:
        """Return whether a request may call the model by this name."""
        return name in self.names or "*" in self.names
