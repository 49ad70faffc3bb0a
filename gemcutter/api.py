"""The public façade: load a model, get text.

The only place where text meets ids and files meet modules: a tokenizer and a chat template on one side, the engine on the other.
Owns `load`, `Model` and what they return; refuses to know kernels, pages and wire formats. Read `engine/engine.py` for what runs
beneath, `text/reply.py` for how ids become text.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, cast, overload

import numpy as np
import torch

from gemcutter.checkpoint.container.lazy_tensor import MappedFile
from gemcutter.checkpoint.load.load_params import Progress
from gemcutter.checkpoint.load.match import Checkpoint
from gemcutter.completion import Chunk, Completion, RequestMetrics, Stream
from gemcutter.constrained import ReplyTerms, constrain
from gemcutter.engine.engine import Engine
from gemcutter.engine.loop import CLOSED, EngineLoop, Sink
from gemcutter.engine.media import MediaSpan
from gemcutter.engine.request import Request
from gemcutter.engine.watchdog import TokenClasses
from gemcutter.errors import RequestError, spell_value
from gemcutter.gc_pause import collector_paused
from gemcutter.generate_options import (
    OF_REQUEST,
    OF_TEMPLATE,
    PARTS,
    GenerateOptions,
    Message,
    TemplateOptions,
    check_flag,
    check_names,
    check_parts,
    check_stop,
    check_stop_ids,
    check_template_options,
    is_conversation,
)
from gemcutter.load_options import LoadOptions
from gemcutter.loading import load_adapter, open_model, unload_adapter
from gemcutter.media.budgets import check_budget
from gemcutter.media_parts import KINDS, TOWERS, MediaItem, media_beside, take_media
from gemcutter.media_reader import MediaReader
from gemcutter.model.audio import AudioTower
from gemcutter.model.text import Decoder
from gemcutter.model.vision import VisionTower
from gemcutter.scoring import Pair, Score, encode_pair, score_pairs
from gemcutter.text.grammar_compiler import GrammarCompiler
from gemcutter.text.reply import CHANNEL_CLOSE, ReplyParser
from gemcutter.text.splice import ReplyStore
from gemcutter.text.token_classes import blank_and_data_ids
from gemcutter.text_assets import TextAssets, read_text_assets
from gemcutter.tools import check_tools
from gemcutter.vocabulary_cache import VocabularyCache

__all__ = [
    "Chunk",
    "Completion",
    "GenerateOptions",
    "Message",
    "Model",
    "PreparedRequest",
    "Prompt",
    "RequestMetrics",
    "Score",
    "Stream",
    "load",
]

log = logging.getLogger(__name__)

Prompt = str | Sequence[int] | Sequence[Message]  # raw text, token ids, or a conversation
IN_FLIGHT = 4  # requests of a long list for each sequence of a step
SHOWN_PROBLEMS, SHOWN_PROMPTS = 20, 5  # of a batch, in an error
OF_OPTIONS = ("sampling.", *(f"request.{name}:" for name in OF_REQUEST))  # how problems of no prompt's own begin


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request that was encoded and checked, and how its reply is read; it may be submitted any number of times.

    `stop` are strings that end the text, `tools` the declarations that calls are read by; without `parallel_tool_calls` the first
    call ends the reply. The reply to a conversation is remembered by its ids, for when it comes back as history; `written` is the
    conversation's prompt before media took their rows.
    """

    request: Request
    stop: tuple[str, ...] = ()
    tools: tuple[Message, ...] = ()
    parallel_tool_calls: bool = True
    is_conversation: bool = False
    written: tuple[int, ...] = ()


class Model:
    """A loaded model; its methods may be called from any thread, and requests of all threads run together.

    A context manager, which closes it. Once closed, everything that is asked of it raises RequestError.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        decoder: Decoder,
        engine: Engine,
        load_s: float,
        text: TextAssets,
        ignore: tuple[str, ...] = (),
        vision: VisionTower | None = None,
        audio: AudioTower | None = None,
    ) -> None:
        self.checkpoint, self.decoder, self.engine, self.load_s = checkpoint, decoder, engine, load_s
        self._ignore = ignore  # patterns of config keys and tensor names that adapters may have, too
        self.plan = checkpoint.plan
        towers = {"vision tower": vision, "audio tower": audio}
        self.notes = checkpoint.notes([name for name, tower in towers.items() if tower is not None])
        self.tokenizer, self.template, self.defaults = text.tokenizer, text.template, text.defaults
        self.notes += text.notes
        self.media = None if vision is None and audio is None else MediaReader(self.tokenizer, vision, audio)
        self._towers = tuple(tower for tower in (vision, audio) if tower is not None)
        self._adapting = threading.Lock()  # of adapters that come and go, of decoder and towers together
        self.replies = ReplyStore(self.tokenizer)
        self.grammars = GrammarCompiler(self.tokenizer, self.defaults.stop_ids)
        mapped = (tensor.mapped for tensor in checkpoint.source.tensors.values())
        self._files = tuple({id(file): file for file in mapped if isinstance(file, MappedFile)}.values())
        self._classes: TokenClasses | None = None
        self.loop = EngineLoop(engine)  # the way to the engine; its own methods are for the loop's thread

    def __repr__(self) -> str:
        """Return what was loaded and how it runs, on one line."""
        if "engine" not in vars(self):
            return "<gemcutter.Model, closed>"
        decoder, source = self.decoder, self.checkpoint.source
        how = f"{str(decoder.dtype).removeprefix('torch.')} on {decoder.device}, context {self.engine.context}"
        return f"<gemcutter.Model {source.path}: {len(self.plan.layers)} layers, {how}>"

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every request, and give memory, threads and files back; a second call does nothing."""
        loop = vars(self).get("loop")
        if loop is None:
            return
        loop.close()
        if (leader := self.decoder.leader) is not None:
            leader.close()
        vars(self).clear()
        del loop, leader
        gc.collect()  # layers and the kernels bound to them refer to each other

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> object:
            """Raise RequestError: only a closed model lacks what its class promises."""
            if name.startswith("__") or vars(self):
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            raise RequestError(CLOSED)

    @overload
    def generate(  # type: ignore[overload-overlap]  # a text is a sequence of texts, too
        self, prompts: str, **options: Unpack[GenerateOptions]
    ) -> Completion: ...
    @overload
    def generate(self, prompts: Sequence[Prompt], **options: Unpack[GenerateOptions]) -> list[Completion]: ...
    def generate(self, prompts: str | Sequence[Prompt], **options: Unpack[GenerateOptions]) -> Completion | list[Completion]:
        """Continue one raw text, or a list of prompts (texts, id lists, conversations) in one batch. Raises RequestError."""
        if isinstance(prompts, str):
            return self.stream(prompts, **options).finish()
        if not isinstance(prompts, list | tuple):
            raise RequestError(f"prompts: expected a text or a list of prompts, found {type(prompts).__name__}")
        if prompts and not isinstance(prompts[0], str | list | tuple | np.ndarray):
            instead = "ask `chat` for an answer to this one" if isinstance(prompts[0], Mapping) else "put a single one in a list"
            raise RequestError(f"prompts: a list of prompts holds texts, id lists or conversations; {instead}")
        prepared = self._prepare_all(prompts, options)
        with ExitStack() as open_streams:  # an error or an interrupt withdraws the others
            streams = [open_streams.enter_context(closing(stream)) for stream in self.submit_many(prepared)]
            return [stream.finish() for stream in streams]

    def _prepare_all(self, prompts: Sequence[Prompt], options: GenerateOptions) -> list[PreparedRequest]:
        """Prepare prompts that share their options. Raises RequestError that says which prompts are bad and why."""
        prepared, bad = list[PreparedRequest](), dict[str, list[int]]()
        for index, prompt in enumerate(prompts):
            try:
                prepared.append(self.prepare(prompt, **options))
            except RequestError as error:
                for problem in error.problems:
                    bad.setdefault(problem, []).append(index)
        if bad:
            raise RequestError("the prompts can't be served", _by_prompt(bad, len(prompts)))
        return prepared

    def chat(self, messages: str | Sequence[Message], **options: Unpack[GenerateOptions]) -> Completion:
        """Answer a conversation, or a text as a user's first message, through the checkpoint's chat template.

        Raises RequestError if it has none, and for what is no conversation.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        if not isinstance(messages, list | tuple) or not messages or not all(isinstance(each, Mapping) for each in messages):
            raise RequestError(f"messages: expected a text or a list of messages, found {spell_value(messages)}")
        return self.stream(messages, **options).finish()

    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Stream:
        """Submit a prompt and return the stream of its chunks.

        Closing or dropping the stream cancels the request and keeps what was computed for reuse. Raises RequestError.
        """
        return self.submit(self.prepare(prompt, **options))

    def score(self, context: Prompt, continuation: str | Sequence[int], *, adapter: str | None = None) -> Score:
        """Return how likely a continuation is after a context: raw text, ids, or a conversation that it answers.

        Raises RequestError for what can't be encoded, is empty, or is longer than the model's context.
        """
        return self.score_all([(context, continuation)], adapter=adapter)[0]

    def score_all(self, pairs: Sequence[tuple[Prompt, str | Sequence[int]]], *, adapter: str | None = None) -> list[Score]:
        """Score pairs of context and continuation in batches; rows that they have in common are computed once.

        Raises RequestError as `score` does, before anything is computed.
        """
        encoded = [self.encode_pair(*pair) for pair in pairs]
        found = dict(score_pairs(self.loop, encoded, in_flight=self.in_flight, adapter=adapter))
        return [found[index] for index in range(len(encoded))]

    @property
    def in_flight(self) -> int:
        """Return how many requests of a long list should be submitted at a time, so that every step finds enough of them."""
        return IN_FLIGHT * self.engine.scheduler.max_num_seqs

    def encode_pair(self, context: Prompt, continuation: str | Sequence[int]) -> Pair:
        """Return the ids of a context and of what is to be scored after it.

        Two texts are split as lm-eval does it (`scoring.encode_pair`); ids, and the reply to a conversation, stay apart. Raises
        RequestError.
        """
        if isinstance(context, str) and isinstance(continuation, str):
            pair = encode_pair(self.tokenizer, context, continuation)
        else:
            after = self.tokenizer.encode(continuation, bos=False) if isinstance(continuation, str) else self.encode(continuation)
            pair = Pair(tuple(self.encode(context)), tuple(after))
        if not pair.continuation:
            raise RequestError(
                f"continuation: {spell_value(continuation)} has no tokens of its own, so there is nothing to score"
            )
        return pair

    def prepare(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> PreparedRequest:
        """Encode a prompt and check it with its options, without the engine's thread. Raises RequestError with every problem."""
        given: dict[str, object] = dict(options)
        check_names(given)
        stop = check_stop(given.pop("stop", None))
        ignore_eos = check_flag("ignore_eos", given.pop("ignore_eos", False))
        of_template = {name: given.pop(name) for name in OF_TEMPLATE if name in given}
        of_template["tools"] = tools = check_tools(of_template.get("tools"))
        items = self._items(prompt, {option: given.pop(option, None) for option, *_ in KINDS.values()})
        budget = given.pop("max_soft_tokens", None)
        ids = written = self.encode(prompt, **cast(TemplateOptions, of_template))
        media: tuple[MediaSpan, ...] = ()
        if budget is not None:
            check_budget(budget)
        if self.media is not None and items:
            ids, media = self.media.place(written, items, budget, given.get("adapter"))
        parallel = check_flag("parallel_tool_calls", given.pop("parallel_tool_calls", True))
        stop_ids = check_stop_ids(given.pop("stop_token_ids", None)) | (frozenset() if ignore_eos else self.defaults.stop_ids)
        terms = ReplyTerms(given.pop("constraint", None), tuple(tools or ()), given.pop("tool_choice", "auto"), parallel)
        watchdog = self._token_classes() if check_flag("watchdog", given.pop("watchdog", False)) else None
        request = replace(self._request(ids, given, stop_ids), watchdog=watchdog, media=media)
        request = constrain(
            request, terms, self.tokenizer, self.grammars, _thinks(of_template) if is_conversation(prompt) else None
        )
        for file in self._files:
            file.insist_unchanged()
        self.engine.check(request)  # before the tokenizer meets ids that are none of its own
        return PreparedRequest(request, stop, tuple(tools or ()), parallel, is_conversation(prompt), tuple(written))

    def _items(self, prompt: Prompt, given: Mapping[str, object]) -> list[MediaItem]:
        """Return the media of a prompt: a conversation's own, or those given beside a text or ids. Raises RequestError."""
        if is_conversation(prompt):
            for option, sources in given.items():
                if sources:
                    raise RequestError(f"{option}: in a conversation they are parts of messages; leave the option out")
            return [] if self.media is None else take_media(prompt)[1]
        items = media_beside(given)
        for item in items:
            if item.kind not in self.kinds:
                option, tower, name = KINDS[item.kind][0], TOWERS[item.kind], item.kind
                raise RequestError(f"{option}: the model was loaded without its {tower}; load it with media '{name}'")
        return items

    @property
    def kinds(self) -> tuple[str, ...]:
        """Return which media prompts may hold, as parts of messages name them."""
        return () if self.media is None else self.media.kinds

    def _token_classes(self) -> TokenClasses:
        """Return what a watchdog must know of the vocabulary; made when it is first asked for."""
        if self._classes is None:
            self._classes = TokenClasses(*blank_and_data_ids(self.tokenizer), self.tokenizer.id_of(CHANNEL_CLOSE))
        return self._classes

    def submit(self, prepared: PreparedRequest) -> Stream:
        """Queue a prepared request and return the stream of its chunks."""
        return self.submit_many([prepared])[0]

    def submit_many(self, prepared: Sequence[PreparedRequest], sinks: Sequence[Sink] = ()) -> list[Stream]:
        """Queue prepared requests that start in the same step, and return their streams.

        With `sinks`, one a request, events go there instead, on the engine's thread; `Stream.read_event` makes chunks of them.
        """
        streams = [Stream(each.request, self._parser(each)) for each in prepared]
        for each, stream in zip(prepared, streams, strict=True):
            if each.is_conversation:
                stream.on_end = partial(_remember, self.replies, each.written)
        taken = sinks or [stream.sink for stream in streams]
        requests = [(each.request, sink) for each, sink in zip(prepared, taken, strict=True)]
        for stream, number in zip(streams, self.loop.submit_many(requests, is_checked=True), strict=True):
            stream.attach(self.loop, number)
        return streams

    def encode(self, prompt: Prompt, **options: Unpack[TemplateOptions]) -> list[int]:
        """Return the token ids of a prompt: raw text gets <bos>, a conversation goes through the chat template.

        Ids may be integers of NumPy, too; an image or a sound is one id still. Raises RequestError for anything else, for parts
        of messages that can't be read, and for options of the template without a conversation.
        """
        check_names(options)
        asked = check_template_options(options, self.tokenizer.special_tokens)
        asked["tools"] = check_tools(asked["tools"])
        given_ids: object = prompt
        if isinstance(given_ids, np.ndarray) and given_ids.ndim == 1 and np.issubdtype(given_ids.dtype, np.integer):
            prompt = given_ids.tolist()
        if is_conversation(prompt):
            if self.template is None:
                raise RequestError("this checkpoint has no chat template (a base model?); pass raw text instead of messages")
            check_parts(prompt, (*PARTS, *self.kinds))
            return self.template.encode(take_media(prompt)[0], replies=self.replies, **asked)
        values: dict[str, object] = dict(options)
        of_prompts = [name for name in OF_TEMPLATE if name not in ("trusted", "lenient_options")]  # the others change nothing
        given = [name for name in of_prompts if values.get(name) not in (None, OF_TEMPLATE[name])]
        if given:
            raise RequestError(f"{' and '.join(given)}: a part of the chat template, which raw text and ids leave out")
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, bos=True)
        kinds = set(map(type, prompt)) if isinstance(prompt, list | tuple) else set()
        if not isinstance(prompt, list | tuple) or not all(kind is int or issubclass(kind, np.integer) for kind in kinds):
            raise RequestError("request.prompt: expected text, a list of token ids or a list of messages")
        return [int(token) for token in prompt]

    def remember(self, prompt_ids: Sequence[int], reply_ids: Sequence[int]) -> None:
        """Let later prompts that begin with this conversation and reply have these very ids, so that what was computed is found.

        Streams of conversations do so at their end. Raises RequestError for ids outside the vocabulary.
        """
        self.replies.remember(prompt_ids, reply_ids)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Return the names of the adapters that a request may ask for."""
        return self.decoder.adapters

    @property
    def problem(self) -> str | None:
        """Return what keeps the model from serving: it is closed, or its engine or a rank of it is gone. None: nothing does."""
        if "loop" not in vars(self):
            return CLOSED
        leader = self.decoder.leader
        return (None if leader is None else leader.problem) or self.loop.problem

    def load_adapter(self, name: str, path: str | Path) -> None:
        """Load a LoRA adapter (a folder or a hub id) while the model serves; requests made from now on may ask for it by name.

        Its files are read and checked in the calling thread, and it is added between two steps: requests that run go on, and
        their text is what it would have been. Raises RequestError if the name is taken, CheckpointError if the adapter can't be
        read, does not fit the model or can only be merged, and CapacityError if there is no memory; nothing has changed then.
        """
        if not isinstance(path, str | Path):
            raise RequestError(f"adapter path: expected a folder or a hub id, found {path!r}")
        with self._adapting:
            notes = load_adapter(name, str(path), self.loop, self.checkpoint, self._towers, self._ignore)
        for note in notes:
            log.info("adapter %s: %s", name, note)
        self.notes += [note for note in notes if note not in self.notes]

    def unload_adapter(self, name: str) -> None:
        """Unload an adapter, whether it came with the model or later: its memory is given back, its prefixes are forgotten.

        Raises RequestError if there is none of this name, or while requests that run or wait use it: they may be awaited or
        cancelled. A prepared request that asks for it is refused from then on.
        """
        with self._adapting:
            unload_adapter(name, self.loop, self._towers)

    def _parser(self, prepared: PreparedRequest) -> ReplyParser:
        """Return what reads the reply to a request."""
        return ReplyParser.after(
            prepared.request.prompt,
            self.tokenizer,
            tools=prepared.tools,
            stop=prepared.stop,
            parallel=prepared.parallel_tool_calls,
        )

    def _request(self, ids: Sequence[int], options: dict[str, Any], stop_ids: frozenset[int]) -> Request:
        own = {name: options.pop(name) for name in OF_REQUEST if name in options}
        if isinstance(own.get("logits_processors"), list):
            own["logits_processors"] = tuple(own["logits_processors"])
        sampling = options.pop("sampling", None)
        if sampling is None:
            sampling = self.defaults.sampling(options)
        elif options:
            raise RequestError(f"pass either `sampling` or {', '.join(sorted(options))}, not both")
        return Request(tuple(ids), sampling, stop_ids=stop_ids, **own)


def _thinks(of_template: Mapping[str, object]) -> bool:
    """Return whether the template lets a reply begin with a thought."""
    more, is_inside = of_template.get("template_options"), bool(of_template.get("continue_final_message"))
    asked = {**of_template, **more} if isinstance(more, Mapping) else of_template
    return bool(asked.get("enable_thinking")) and not is_inside


def _remember(replies: ReplyStore, prompt: Sequence[int], found: Completion) -> None:
    replies.remember(prompt, found.tokens)


def _by_prompt(bad: Mapping[str, Sequence[int]], count: int) -> Iterator[str]:
    """Yield problems with the prompts that have them; the options are those of all prompts."""
    for place, (problem, indices) in enumerate(bad.items()):
        if place == SHOWN_PROBLEMS:
            yield f"and {len(bad) - place} problems more"
            return
        named = ", ".join(f"prompts[{index}]" for index in indices[:SHOWN_PROMPTS])
        more = f" and {len(indices) - SHOWN_PROMPTS} more" if len(indices) > SHOWN_PROMPTS else ""
        if problem.startswith(OF_OPTIONS):
            yield problem
        else:
            yield f"every prompt: {problem}" if len(indices) == count > 1 else f"{named}{more}: {problem}"


@collector_paused()
def load(
    model: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    kernels: str = "auto",
    activations: str | None = None,
    context: int | None = None,
    max_batched_tokens: int = 512,
    max_num_seqs: int = 8,
    prefix_cache_bytes: int | None = None,
    max_stall_ms: float | None = None,
    ignore: Sequence[str] = (),
    quant: str | None = None,
    adapter: str | Path | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    repack_cache: bool | None = None,
    ple: str | None = None,
    kv: str | None = None,
    chat_template: str | Path | None = None,
    generation_config: str | Path = "auto",
    speculate: str | None = None,
    draft_model: str | Path | None = None,
    draft_tokens: int | None = None,
    media: str | Sequence[str] = (),
    mmproj: str | Path | None = None,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    progress: Progress | None = None,
) -> Model:
    """Load a checkpoint: a folder, a .safetensors or GGUF file, a hub id, or "demo".

    The options are those of `LoadOptions`, where each is explained. `progress` is told the bytes done and the bytes in all.
    Raises GemcutterError with everything that is wrong.
    """
    options = LoadOptions(
        model=_as_name(model),
        dtype=_as_name(dtype),
        device=_as_name(device),
        kernels=kernels,
        activations=activations,
        context=context,
        max_batched_tokens=max_batched_tokens,
        max_num_seqs=max_num_seqs,
        prefix_cache_bytes=prefix_cache_bytes,
        max_stall_ms=max_stall_ms,
        ignore=tuple(ignore) if isinstance(ignore, list | set | frozenset) else ignore,  # type: ignore[arg-type]
        quant=quant,
        adapter=_as_name(adapter),
        adapters=_as_names({} if adapters is None else adapters),
        repack_cache=repack_cache,
        ple=ple,
        kv=kv,
        chat_template=_as_name(chat_template),
        generation_config=_as_name(generation_config),
        speculate=speculate,
        draft_model=_as_name(draft_model),
        draft_tokens=draft_tokens,
        media=tuple(_names(media)) if isinstance(media, str | list) else media,  # type: ignore[arg-type]
        mmproj=_as_name(mmproj),
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
    )
    if progress is not None and not callable(progress):
        raise RequestError(f"progress: expected a function of the bytes done and the bytes in all, found {spell_value(progress)}")
    return load_model(options, progress)


def _as_name(value: Any) -> Any:
    """Return the name of a path, a dtype or a device of torch's; anything else as it is, for `LoadOptions` to check."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return str(value) if isinstance(value, torch.device | Path) else value


def _names(media: str | Sequence[str]) -> Sequence[str]:
    """Return the names of a list, or of a text with commas between them."""
    return [name.strip() for name in media.split(",")] if isinstance(media, str) else media


def _as_names(adapters: Any) -> Any:
    """Return adapters whose paths are texts."""
    return {name: _as_name(path) for name, path in adapters.items()} if isinstance(adapters, Mapping) else adapters


@collector_paused()
def load_model(options: LoadOptions, progress: Progress | None = None) -> Model:
    """Load a checkpoint as the options say. Raises GemcutterError with everything that is wrong."""
    started = time.perf_counter()
    opened = open_model(options, progress)
    source, keeps = opened.checkpoint.source, options.repack_cache
    cache = None if keeps is False else VocabularyCache.of(source, is_asked=keeps is not None)
    text = read_text_assets(opened.checkpoint, options.chat_template, options.generation_config, cache)
    built = Model(opened.checkpoint, opened.decoder, opened.engine(), 0.0, text, options.ignore, opened.vision, opened.audio)
    built.notes += opened.notes
    built.load_s = time.perf_counter() - started
    for note in built.notes:
        log.info("%s: %s", options.model, note)
    log.info("%s: loaded in %.2f s: %s", options.model, built.load_s, repr(built))  # a record outlives the model
    return built
