"""The public façade: load a model, get text.

The only place where text meets ids and files meet modules: a tokenizer and a chat template on one side, the engine on the other.
Owns `load`, `Model` and what they return; refuses to know kernels, pages and wire formats. Read `engine/engine.py` for what runs
beneath, `text/stream.py` for how ids become text.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from typing import Any, overload

from gemcutter.checkpoint.load import Progress
from gemcutter.checkpoint.match import Checkpoint
from gemcutter.completion import Chunk, Completion, Mail, Stream, Timings
from gemcutter.engine.engine import Engine
from gemcutter.engine.request import Request
from gemcutter.engine.sampling import Sampling
from gemcutter.errors import RequestError
from gemcutter.lexicon import read_defaults, read_template, read_tokenizer
from gemcutter.load_options import LoadOptions
from gemcutter.loading import open_model
from gemcutter.model.text import Decoder
from gemcutter.pause import collector_paused
from gemcutter.text.stream import TextStream

__all__ = ["Chunk", "Completion", "Message", "Model", "Prompt", "Stream", "Timings", "load"]

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]  # raw text, token ids, or a conversation


class Model:
    """A loaded model. One thread at a time; several streams may be read in turns."""

    def __init__(self, checkpoint: Checkpoint, decoder: Decoder, engine: Engine, load_s: float) -> None:
        self.checkpoint, self.decoder, self.engine, self.load_s = checkpoint, decoder, engine, load_s
        self.plan = checkpoint.plan
        self.notes = checkpoint.matched.notes(checkpoint.plan)  # what was left out, and what an option costs
        self.tokenizer = read_tokenizer(checkpoint.source)
        self.template = read_template(checkpoint.source, self.tokenizer)
        self.defaults = read_defaults(checkpoint, self.tokenizer)
        self._mail = Mail(engine)

    @overload
    def generate(self, prompts: str, **options: Any) -> Completion: ...
    @overload
    def generate(self, prompts: Sequence[Prompt], **options: Any) -> list[Completion]: ...
    def generate(self, prompts: str | Sequence[Prompt], **options: Any) -> Completion | list[Completion]:
        """Continue one raw text, or a list of prompts (texts, id lists, conversations) in one batch.

        Options are `max_tokens`, `stop`, `ignore_eos`, the fields of `Sampling` and of `Request`. Raises RequestError.
        """
        if isinstance(prompts, str):
            return self.stream(prompts, **options).finish()
        if not isinstance(prompts, list | tuple):
            raise RequestError(f"prompts: expected a text or a list of prompts, found {type(prompts).__name__}")
        if prompts and not isinstance(prompts[0], str | list | tuple):
            raise RequestError("prompts: a list of prompts holds texts, id lists or conversations; put a single one in a list")
        with ExitStack() as open_streams:  # a prompt that is refused, or an interrupt, withdraws the others
            streams = [open_streams.enter_context(closing(self.stream(prompt, **options))) for prompt in prompts]
            return [stream.finish() for stream in streams]

    def chat(self, messages: Sequence[Message], **options: Any) -> Completion:
        """Answer a conversation through the checkpoint's chat template. Raises RequestError if it has none."""
        return self.stream(messages, **options).finish()

    def stream(self, prompt: Prompt, **options: Any) -> Stream:
        """Queue a prompt now and give the stream of its chunks; queued prompts run together once any stream is read.

        Closing or dropping the stream cancels the request and keeps what was computed for reuse. Raises RequestError.
        """
        stop: Sequence[str] = options.pop("stop", None) or ()
        ids = self.encode(prompt, enable_thinking=options.pop("enable_thinking", False), tools=options.pop("tools", None))
        request = self._request(ids, options)
        self.engine.check(request)  # before the tokenizer meets ids that are none of its own
        return Stream(self._mail, request, TextStream.after(ids, self.tokenizer, stop=stop))

    def encode(self, prompt: Prompt, *, enable_thinking: bool = False, tools: Sequence[Message] | None = None) -> list[int]:
        """Give the token ids of a prompt: raw text gets <bos>, a conversation goes through the chat template.

        Raises RequestError for anything else, and for `enable_thinking` or `tools` without a conversation.
        """
        kinds = set(map(type, prompt)) if isinstance(prompt, list | tuple) else set()
        if kinds and all(issubclass(kind, Mapping) for kind in kinds):
            if self.template is None:
                raise RequestError("this checkpoint has no chat template (a base model?); pass raw text instead of messages")
            return self.template.encode(prompt, enable_thinking=enable_thinking, tools=tools)  # type: ignore[arg-type]
        given = [name for name, value in (("enable_thinking", enable_thinking), ("tools", tools)) if value]
        if given:
            raise RequestError(f"{' and '.join(given)}: a part of the chat template, which raw text and ids leave out")
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, bos=True)
        if not isinstance(prompt, list | tuple) or kinds - {int}:
            raise RequestError("request.prompt: expected text, a list of token ids or a list of messages")
        return list(prompt)

    def _request(self, ids: Sequence[int], options: dict[str, Any]) -> Request:
        own = {
            name: options.pop(name)
            for name in ("max_tokens", "prompt_logprobs", "hidden_states", "top_logits", "adapter")
            if name in options
        }
        stop_ids = frozenset() if options.pop("ignore_eos", False) else self.defaults.stop_ids
        sampling = options.pop("sampling", None)
        if sampling is None:
            unknown = sorted(set(options) - set(Sampling.__slots__))
            if unknown:
                raise RequestError(
                    f"unknown options: {', '.join(unknown)}", [f"{name}: not an option of a request" for name in unknown]
                )
            sampling = self.defaults.sampling(options)
        elif options:
            raise RequestError(f"pass either `sampling` or {', '.join(sorted(options))}, not both")
        return Request(tuple(ids), sampling, stop_ids=stop_ids, **own)


@collector_paused()
def load(
    model: str,
    *,
    dtype: str | None = None,
    device: str = "cpu",
    kernels: str = "auto",
    activations: str | None = None,
    context: int | None = None,
    max_batched_tokens: int = 512,
    max_num_seqs: int = 8,
    prefix_cache_entries: int = 4,
    ignore: Sequence[str] = (),
    quant: str | None = None,
    adapter: str | None = None,
    adapters: Mapping[str, str] | None = None,
    repack_cache: bool = False,
    ple: str | None = None,
    kv: str | None = None,
    progress: Progress | None = None,
) -> Model:
    """Load a checkpoint: a folder, a .safetensors or GGUF file, a hub id, or "demo".

    The options are those of `LoadOptions`, where each is explained. `progress` is told the bytes done and the bytes in all.
    Raises GemcutterError with everything that is wrong.
    """
    options = LoadOptions(
        model=model,
        dtype=dtype,
        device=device,
        kernels=kernels,
        activations=activations,
        context=context,
        max_batched_tokens=max_batched_tokens,
        max_num_seqs=max_num_seqs,
        prefix_cache_entries=prefix_cache_entries,
        ignore=tuple(ignore),
        quant=quant,
        adapter=adapter,
        adapters=dict(adapters or {}),
        repack_cache=repack_cache,
        ple=ple,
        kv=kv,
    )
    return load_model(options, progress)


@collector_paused()
def load_model(options: LoadOptions, progress: Progress | None = None) -> Model:
    """Load a checkpoint as the options say. Raises GemcutterError with everything that is wrong."""
    started = time.perf_counter()
    opened = open_model(options, progress)
    built = Model(opened.checkpoint, opened.decoder, opened.engine(), 0.0)
    built.notes += opened.notes
    built.load_s = time.perf_counter() - started
    return built
