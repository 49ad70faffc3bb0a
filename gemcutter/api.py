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

import torch

from gemcutter.checkpoint.formats.lora import open_adapter
from gemcutter.checkpoint.load.adapters import attach, fold
from gemcutter.checkpoint.load.load_params import Progress, load_params
from gemcutter.checkpoint.load.match import Checkpoint, open_checkpoint
from gemcutter.checkpoint.load.packed_weight_cache import PackedWeightCache
from gemcutter.checkpoint.load.ple_placement import check_place, place_table
from gemcutter.checkpoint.remote.hub import locate
from gemcutter.completion import Chunk, Completion, Mail, Stream, Timings
from gemcutter.engine.engine import Engine
from gemcutter.engine.memory import check_limits
from gemcutter.engine.request import Request
from gemcutter.engine.sampling import Sampling
from gemcutter.errors import KernelError, RequestError
from gemcutter.gc_pause import collector_paused
from gemcutter.model.text import Decoder
from gemcutter.ops.bind import ACTIVATIONS, CHOICES, native_refusal, triton_refusal
from gemcutter.ops.reference import matrix
from gemcutter.text.stream import TextStream
from gemcutter.text_assets import read_defaults, read_template, read_tokenizer

__all__ = ["Chunk", "Completion", "Message", "Model", "Prompt", "Stream", "Timings", "load"]

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]  # raw text, token ids, or a conversation

DTYPES = {"float32": torch.float32, "f32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16}
FP8_CAPABILITY = (8, 9)
DEFAULT_CONTEXT = 32768  # tokens; cache memory is only touched as far as a sequence gets


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
    max_rows: int = 512,
    max_sequences: int = 8,
    checkpoints: int = 4,
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

    `dtype` is the compute dtype ("float32" or "bfloat16"; default: the checkpoint's own). `kernels` is "auto", "triton" for
    Triton's or an error, or "reference" for the plain definitions, whose rows never depend on their neighbours. `activations`
    says in what form the native CPU kernels take the rows that meet packed weights: "int8", the default in bfloat16, or "bf16";
    in float32 they stay as they are unless it is given. `context` bounds a sequence, `max_rows` a step, `max_sequences` a
    batch; `checkpoints` finished prompts and replies are kept for reuse. `quant`, "q4" or "q8", quantizes dense matrices while
    they are loaded; packed ones stay as they are. `adapter` is a LoRA adapter (a folder or a hub id) that is merged into the
    weights; `adapters`, by name, stay beside them, and a request with `adapter="name"` gets that one's changes. `repack_cache`
    keeps what the native kernels repack in the user's cache folder, for later loads to map. `ple` says where the table of
    per-layer embeddings lives beside a GPU: "gpu", "host" (pinned memory) or "mmap"; by default on the GPU if there is room.
    `kv` "fp8" keeps keys and values in 8 bits on a GPU that has them (compute capability 8.9).
    Raises CheckpointError or ConfigError with everything that is wrong.
    """
    started = time.perf_counter()
    checkpoint = open_checkpoint(locate(model), ignore)
    context = DEFAULT_CONTEXT if context is None else context
    check_limits(context, max_rows, max_sequences, checkpoints)
    place, compute = check_device(device), check_dtype(dtype or checkpoint.config.dtype)
    check_kernels(kernels, place)
    is_native = check_activations(activations, place, kernels)
    check_place(ple, place)
    kv_dtype = check_kv(kv, place, kernels)
    if checkpoint.plan.is_drafter:
        raise RequestError(f"{model} is an assistant: it drafts for its target and can't run alone; load the target instead")
    merged = None if adapter is None else open_adapter(locate(adapter), checkpoint.plan, ignore)
    beside = {name: open_adapter(locate(path), checkpoint.plan, ignore) for name, path in (adapters or {}).items()}
    cache = PackedWeightCache.of(checkpoint, quant) if repack_cache and is_native else None
    is_striped = triton_refusal(place.type, kernels) is None
    params, notes = load_params(checkpoint, compute, place, progress, quant, is_native, cache, is_striped), list[str]()
    if "embed.ple" in params:
        params["embed.ple"] = place_table(matrix(params, "embed.ple"), ple, place)
    if merged is not None:
        params, note = fold(params, merged, checkpoint, compute, place)
        notes += [*merged.notes(), note]
    for name, each in beside.items():
        params = attach(params, each, name, place)
        notes += each.notes()
    decoder = Decoder(checkpoint.plan, params, compute, place, kernels, activations)
    engine = Engine(decoder, context, max_rows, max_sequences, checkpoints, kv_dtype=kv_dtype)
    built = Model(checkpoint, decoder, engine, 0.0)
    if not is_native and place.type == "cpu" and kernels == "auto":
        notes.append(f"several times slower than it could be: {native_refusal('cpu', kernels)}")
    built.notes += notes
    built.load_s = time.perf_counter() - started
    return built


def check_kernels(name: str, device: torch.device) -> None:
    """Raise KernelError for kernels that do not exist, or can't run here."""
    if name not in CHOICES:
        raise KernelError(f"kernels: expected one of {', '.join(CHOICES)}, found {name!r}")
    if name == "triton" and (reason := triton_refusal(device.type, name)):
        raise KernelError(f"kernels triton: {reason}")


def check_activations(name: str | None, device: torch.device, kernels: str) -> bool:
    """Tell whether the native kernels serve. Raises KernelError for a form that does not exist, or that would be ignored."""
    if name is not None and name not in ACTIVATIONS:
        raise KernelError(f"activations: expected one of {', '.join(ACTIVATIONS)}, found {name!r}")
    refusal = native_refusal(device.type, kernels)
    if name is not None and refusal is not None:
        raise KernelError(f"activations {name}: a choice of the native CPU kernels, which are not used here: {refusal}")
    return refusal is None


def check_dtype(name: str) -> torch.dtype:
    """Give the compute dtype of a name. Raises KernelError; float16 overflows in this family and is refused."""
    if name in ("float16", "f16", "fp16", "half"):
        raise KernelError("dtype float16: activations of this family exceed its range; use bfloat16 or float32")
    if name not in DTYPES:
        raise KernelError(f"dtype: expected float32 or bfloat16, found {name!r}")
    return DTYPES[name]


def check_kv(name: str | None, device: torch.device, kernels: str) -> torch.dtype | None:
    """Give the dtype of keys and values; None for that of the rows. Raises KernelError where no kernel reads it."""
    if name is None:
        return None
    if name != "fp8":
        raise KernelError(f"kv: expected fp8, found {name!r}")
    refusal = triton_refusal(device.type, kernels)
    if refusal is None and device.type == "cuda" and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        refusal = "this GPU has no 8-bit floats"
    if refusal is not None:
        raise KernelError(f"kv fp8: a choice of the Triton kernels, which are not used here: {refusal}")
    return torch.float8_e4m3fn


def check_device(name: str) -> torch.device:
    """Give the device of a name. Raises KernelError if there is none such."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise KernelError(f"device: expected cpu or cuda, found {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise KernelError("device cuda: torch finds no CUDA device here; use --device cpu")
    if device.type not in ("cpu", "cuda"):
        raise KernelError(f"device: expected cpu or cuda, found {name!r}")
    return device
