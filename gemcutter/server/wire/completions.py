"""POST /v1/completions: what a body may hold, and which prompts are in it.

Owns the fields of the request and the four forms of `prompt`. Refuses to know HTTP and tokenizers. Read `chat.py` for the fields
that both completion routes share, `server/raw_task.py` for what becomes of the prompts.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from gemcutter.errors import spell_value
from gemcutter.server.options import ServerOptions
from gemcutter.server.wire.chat import SamplingFields
from gemcutter.server.wire.fields import refuse

REFUSED = {
    "suffix": "there is no filling in; put the text before and after into the prompt",
    "best_of": "ask for n replies and choose by their logprobs",
    "use_beam_search": "there is no beam search",
    "prompt_logprobs": "ask for logprobs with echo",
}
MOST_LOGPROBS = 64
RawPrompt = str | tuple[int, ...]


class CompletionRequest(SamplingFields):
    """The body of POST /v1/completions. Ignored: user, and names that are not known."""

    prompt: Any = Field(description="a text, a list of texts, a list of token ids, or a list of such lists")
    max_tokens: int | None = Field(default=16, ge=0)
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)
    add_special_tokens: bool | None = Field(
        default=None, description="false leaves <bos> out of texts, and scores are noise then"
    )


def read_prompts(request: CompletionRequest, options: ServerOptions) -> list[RawPrompt]:
    """Return the prompts in order. Raises FieldError, naming the field, for what can't be served."""
    for name, remedy in REFUSED.items():
        if (request.model_extra or {}).get(name) not in (None, 1, "", False):
            refuse(name, f"not supported: {remedy}")
    if (request.n or 1) > options.max_n:
        refuse("n", f"at most {options.max_n} replies, found {request.n}")
    if request.max_tokens == 0 and not request.echo:
        refuse("max_tokens", "0 without echo leaves nothing to return")
    found, where = request.prompt, "prompt"
    prompts = found if isinstance(found, list) and found and not _is_ids(found) else [found]
    if len(prompts) > options.max_batch:
        refuse(where, f"at most {options.max_batch} prompts, found {len(prompts)}")
    return [_read_prompt(each, where if len(prompts) == 1 else f"{where}[{index}]") for index, each in enumerate(prompts)]


def _read_prompt(found: Any, where: str) -> RawPrompt:
    if isinstance(found, str):
        return found
    if not (isinstance(found, list) and found and _is_ids(found)):
        refuse(where, f"expected a text or a list of token ids, found {spell_value(found)}")
    return tuple(found)


def _is_ids(found: list[Any]) -> bool:
    return all(isinstance(each, int) and not isinstance(each, bool) for each in found)
