"""POST /v1/completions: what a body may hold, and which prompts are in it.

Owns the fields of the request and the four forms of `prompt`. Refuses to know HTTP and tokenizers. Read `chat.py` for the fields
that both completion routes share, `server/raw_task.py` for what becomes of the prompts.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from gemcutter.server.options import ServerOptions
from gemcutter.server.wire.chat import SamplingFields
from gemcutter.server.wire.fields import RawText, read_texts, refuse

REFUSED = {
    "suffix": "there is no filling in; put the text before and after into the prompt",
    "best_of": "ask for n replies and choose by their logprobs",
    "use_beam_search": "there is no beam search",
    "prompt_logprobs": "ask for logprobs with echo",
}
MOST_LOGPROBS = 64


class CompletionRequest(SamplingFields):
    """The body of POST /v1/completions. Ignored: user, and names that are not known."""

    prompt: Any = Field(description="a text, a list of texts, a list of token ids, or a list of such lists")
    max_tokens: int | None = Field(default=16, ge=0)
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)
    add_special_tokens: bool | None = Field(
        default=None, description="false leaves <bos> out of texts, and scores are noise then"
    )


def read_prompts(request: CompletionRequest, options: ServerOptions) -> list[RawText]:
    """Return the prompts in order. Raises FieldError, naming the field, for what can't be served."""
    for name, remedy in REFUSED.items():
        if (request.model_extra or {}).get(name) not in (None, 1, "", False):
            refuse(name, f"not supported: {remedy}")
    if (request.n or 1) > options.max_n:
        refuse("n", f"at most {options.max_n} replies, found {request.n}")
    if request.max_tokens == 0 and not request.echo:
        refuse("max_tokens", "0 without echo leaves nothing to return")
    return read_texts(request.prompt, "prompt", options.max_batch)
