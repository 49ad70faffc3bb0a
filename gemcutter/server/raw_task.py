"""Raw prompts: their ids, the <bos> that scores need, and the log-probabilities of prompt and reply in OpenAI's old layout.

Owns what is hidden of a prompt (a <bos> that was put in front of ids) and the offsets of tokens in the text. Refuses to know
HTTP. Read `wire/completions.py` for the prompts, `routes/completions.py` for who asks.
"""

from __future__ import annotations

import codecs
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gemcutter.api import Model, PreparedRequest
from gemcutter.completion import Completion
from gemcutter.engine.sampling import TokenLogprobs
from gemcutter.server.errors import too_long
from gemcutter.server.options import ServerOptions
from gemcutter.server.wire.chat import OF_OUTPUTS, read_constraint
from gemcutter.server.wire.completions import CompletionRequest
from gemcutter.server.wire.fields import RawText, naming_constraint
from gemcutter.text.tokenizer import Tokenizer

NEVER = -9999.0  # what clients take for minus infinity, which JSON has not

log = logging.getLogger(__name__)
_told: set[str] = set()


@dataclass(frozen=True, slots=True)
class RawRequest:
    """A request that was checked; `hidden` ids at the start of its prompt are told to nobody, `text` is what echo repeats."""

    prepared: PreparedRequest
    hidden: int
    text: str


def prepare_raw(
    model: Model, body: CompletionRequest, prompt: RawText, options: ServerOptions, adapter: str | None = None
) -> RawRequest:
    """Encode a raw prompt and check all that is wanted; meant for a worker thread. Raises RequestError or ApiError."""
    tokenizer, hidden = model.tokenizer, 0
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt, bos=body.add_special_tokens is not False)
    else:
        ids = list(prompt)
        if ids[0] != tokenizer.bos_id:
            hidden = int(options.bos_for_token_prompts == "auto")
            ids = [tokenizer.bos_id] * hidden + ids
            _tell_once(hidden)
    wanted: dict[str, Any] = body.sampling(options.max_logit_bias)
    if stops := body.stops(options.max_stop):
        wanted["stop"] = list(stops)
    if adapter is not None:
        wanted["adapter"] = adapter
    if body.logprobs is not None:
        wanted["logprobs"] = body.logprobs
        if body.echo:
            wanted["prompt_logprobs"] = body.logprobs
    context, count = model.engine.context, 16 if body.max_tokens is None else body.max_tokens
    if (constraint := read_constraint(body)) is not None:
        wanted["constraint"] = constraint
    with naming_constraint(OF_OUTPUTS):
        prepared = model.prepare(ids, max_tokens=count, **wanted)  # which refuses ids outside the vocabulary
    if len(ids) + count > context:
        raise too_long(len(ids) - hidden, count, context, field="prompt")
    return RawRequest(prepared, hidden, prompt if isinstance(prompt, str) else tokenizer.decode(prompt))


def _tell_once(hidden: int) -> None:
    """Log that ids came without a <bos>, which lm-eval's requests do; once, for there are thousands of them."""
    what = "one is put in front, unseen" if hidden else "scores of such prompts are noise"
    if what not in _told:
        _told.add(what)
        log.warning("a prompt of token ids does not begin with <bos>: %s (--bos-for-token-prompts)", what)


def reply_text(completion: Completion) -> str:
    """Return a reply as text: a raw prompt has no channels, so thoughts are part of it."""
    return completion.reasoning + completion.text


def logprobs(raw: RawRequest, completion: Completion, tokenizer: Tokenizer, *, echo: bool) -> dict[str, Any]:
    """Return the arrays of a choice: over prompt and reply with `echo`, else over the reply.

    With `echo` a stop token counts: clients that score a prompt, as lm-eval does, cut off one token after it, whichever it is.
    """
    ids, found = list(completion.tokens), list[TokenLogprobs | None](completion.logprobs)
    if echo:
        if (end := completion.end_logprobs) is not None:
            ids, found = [*ids, end.token], [*found, end]
        shown = list(raw.prepared.request.prompt[raw.hidden :])
        # The report has no entry for the first token of the prompt, which is the hidden one where there is one.
        report = [None, *completion.prompt.logprobs][raw.hidden :]
        if raw.hidden and report:
            report[0] = None  # as every other server has it: nothing stands before the first token
        ids, found = shown + ids, report + found
    return arrays(ids, found, tokenizer, Offsets(tokenizer))


def arrays(ids: Sequence[int], found: Sequence[TokenLogprobs | None], tokenizer: Tokenizer, offsets: Offsets) -> dict[str, Any]:
    """Return tokens, log-probabilities, alternatives and offsets, all of one length."""
    return {
        "tokens": [spell(token, tokenizer) for token in ids],
        "token_logprobs": [None if each is None else max(each.logprob, NEVER) for each in found],
        "top_logprobs": [None if each is None else _alternatives(each, tokenizer) for each in found],
        "text_offset": [offsets.push(token) for token in ids],
    }


def _alternatives(found: TokenLogprobs, tokenizer: Tokenizer) -> dict[str, float]:
    """Return the best tokens and the one that was taken; of two that are spelled alike, the likelier one."""
    best = dict[str, float]()
    for token, value in (*found.top, (found.token, found.logprob)):
        name = spell(token, tokenizer)
        best[name] = max(best.get(name, NEVER), value)
    return best


def spell(token: int, tokenizer: Tokenizer) -> str:
    """Return a token's text; a marker's own name."""
    if token in tokenizer.special_ids:
        return tokenizer.piece(token)
    return tokenizer.bytes_of(token).decode("utf-8", errors="replace")


class Offsets:
    """Counts where each token begins in a text, in characters; one that only completes a character begins after it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._at = tokenizer, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> int:
        """Return where the next token begins."""
        start = self._at
        if token not in self._tokenizer.special_ids:
            self._at += len(self._decoder.decode(self._tokenizer.bytes_of(token)))
        return start
