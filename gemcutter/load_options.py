"""How a model is loaded: one frozen object for the Python API, every command of the command line, the benchmark and `verify`.

Owns the options, their defaults and the check of each, which needs no torch: a bad value is refused before anything is read. What
depends on the machine's GPU or on the checkpoint is checked by `loading.py`, which carries the options out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from gemcutter.engine.speculate.tally import MOST_DRAFTS
from gemcutter.errors import KernelError, RequestError, spell_value
from gemcutter.ops.registry import ACTIVATIONS, CPU, KERNELS, TRITON
from gemcutter.quant_names import RECIPE_NAMES, find_quant

DTYPES = {"float32": "float32", "f32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16"}
HALVES = ("float16", "f16", "fp16", "half")
DEVICE = re.compile(r"cpu|cuda(:\d+)?")
PLE_PLACES = ("gpu", "split", "host", "mmap")
KV_DTYPES = ("fp8", "int8")
SPECULATORS = ("auto", "mtp", "ngram", "off")
MEDIA = ("image", "audio", "video")  # what requests may bring beside text, where the model was loaded for it
AUTO_MEDIA = "auto"  # whatever the checkpoint has a tower for; of other names beside it, those
DEFAULT_CONTEXT = 32768  # tokens; cache memory is only touched as far as a sequence gets


def check_dtype(name: str) -> str:
    """Return the full name of a compute dtype. Raises KernelError; float16 overflows in this family and is refused."""
    if name in HALVES:
        raise KernelError(f"dtype {name}: activations of this family exceed its range; use bfloat16 or float32")
    if name not in DTYPES:
        raise KernelError(f"dtype: expected float32 or bfloat16, found {spell_value(name)}")
    return DTYPES[name]


def own_dtype(stored: str) -> tuple[str, str | None]:
    """Return the compute dtype for a checkpoint that was stored in a dtype, and a note where it is another one."""
    name = stored.removeprefix("torch.").lower()
    if name in DTYPES:
        return DTYPES[name], None
    why = "activations of this family exceed float16" if name in HALVES else f"the config's dtype is {stored!r}"
    return "bfloat16", f"computed in bfloat16: {why}; dtype float32 is exact, and slower"


def check_device(name: str) -> str:
    """Return the name of a device, whether or not this machine has it. Raises KernelError."""
    if not DEVICE.fullmatch(name):
        raise KernelError(f"device: expected cpu, cuda or cuda:N, found {spell_value(name)}")
    return name


def _one_of(option: str, names: Sequence[str]) -> Callable[[str], str]:
    """Build the check of an option that takes one of a few names."""
    *most, last = names
    known = f"{', '.join(most)} or {last}" if most else last

    def check(name: str) -> str:
        if name not in names:
            raise KernelError(f"{option}: expected {known}, found {name!r}")
        return name

    return check


CHECKS: Mapping[str, Callable[[str], str]] = {
    "dtype": check_dtype,
    "device": check_device,
    "kernels": _one_of("kernels", KERNELS),
    "activations": _one_of("activations", ACTIVATIONS),
    "quant": lambda name: find_quant(name, RECIPE_NAMES),
    "ple": _one_of("ple", PLE_PLACES),
    "kv": _one_of("kv", KV_DTYPES),
    "speculate": _one_of("speculate", SPECULATORS),
}
NEEDED = ("model", "device", "kernels", "generation_config")  # texts that can't be None
TEXTS = (*NEEDED, "dtype", "activations", "quant", "adapter", "ple", "kv", "chat_template", "speculate", "draft_model", "mmproj")
LEAST = {
    "tensor_parallel": 1,
    "pipeline_parallel": 1,
    "context": 1,
    "max_batched_tokens": 1,
    "max_num_seqs": 1,
    "prefix_cache_bytes": 0,
}
MAY_BE_NONE = ("context", "prefix_cache_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """Everything that decides how a model is loaded and computed. Raises GemcutterError for values that can't be used.

    `model` is a folder, a .safetensors or GGUF file, a hub id, or "demo". `dtype` is the compute dtype ("float32" or
    "bfloat16"; None: the checkpoint's own). `device` is "cpu", "cuda" or "cuda:N". `kernels` is "auto", "triton" (Triton's or
    an error) or "reference" (the plain definitions, whose rows never depend on their neighbours). `activations` is the
    activation precision of quantized CPU matmuls: "int8" (dynamic, a scale for 32 columns; the default in bfloat16) or "bf16";
    in float32 rows stay as they are unless it is given. `ignore` holds patterns of config keys and tensor names to pass over.
    `quant` ("q4", "q8", "mlx4", "mlx8", "Q4_0", "Q8_0") quantizes dense matrices while they are loaded; packed ones stay as
    they are. `adapter` is a LoRA adapter (a folder or a hub id) that is merged into the weights, before they are quantized;
    `adapters`, by name, stay apart, and a request with `adapter="name"` gets that one's changes. `repack_cache` keeps what the
    CPU kernels repack, and a large vocabulary, in the user's cache folder, for later loads to map; None: weights of more than
    256 MiB, where the disk has room, of which the folder takes a tenth at most. `ple` says where the table of per-layer
    embeddings is kept for a GPU: "gpu", "host" (pinned memory) or "mmap", whole for each process, or "split": tensor-parallel
    processes share its rows, on CPUs too; None: mapped on a CPU, on the GPU if there is room, shared by several GPUs. `kv` keeps
    keys and values in 8 bits: "fp8" on a GPU that has them (compute capability 8.9), "int8" with a scale for each vector on a
    CPU; None: in the compute dtype. `chat_template` is "own" (the checkpoint's), "canonical" (Google's
    of July 2026) or a Jinja file; None: the checkpoint's own, unless that is an older generation of Google's.
    `generation_config` says where the defaults of sampling come from: "auto" (the checkpoint), "none" (greedy) or a
    generation_config.json, or the folder of one.

    The engine's limits: `context` bounds a sequence in tokens, `max_batched_tokens` the rows of a step (the chunk of a long
    prompt), `max_num_seqs` the sequences that run at once; `prefix_cache_bytes` is the memory for beginnings of prompts
    that are kept for reuse (0: none is kept; None: half as many whole contexts as sequences, and as much again of windows).
    `max_stall_ms` bounds the time of a step in milliseconds, so that a long prompt does not keep others waiting (None:
    its rows alone are bounded).

    `speculate` says who guesses tokens that are then verified several a step, which changes no reply: "mtp" (the assistant
    `draft_model`), "ngram" (what followed the same tokens before), "auto" (both) or "off"; None: "auto" with a `draft_model`,
    else "off". `draft_tokens` is how many are guessed at a time, 0 to 8; None: as many as pay on this machine. An assistant is
    quantized as `quant` says, or else in 4 bits beside a target that is.

    `media` names what prompts may hold beside text: "image" or "video" loads the vision tower, which reads both, "audio" the
    audio tower, "image,audio" or a list both towers; "auto" loads those that the checkpoint has, beside names those of them that
    they are read by. Nothing is read of other towers.
    `mmproj` is a file or folder that holds the towers; None: the model's own files, or else the mmproj file beside a GGUF model.

    `tensor_parallel` is on how many processes of this host the model runs: each holds a slice of every layer, and its heads of
    the cache, on "cuda" on a GPU of its own. Replies are those of one process, but for rounding.
    `pipeline_parallel` is in how many stages the layers are cut, each of which has `tensor_parallel` processes; rows pass from
    stage to stage, and replies are those of one stage.
    """

    model: str
    dtype: str | None = None
    device: str = "cpu"
    kernels: str = "auto"
    activations: str | None = None
    ignore: tuple[str, ...] = ()
    quant: str | None = None
    adapter: str | None = None
    adapters: Mapping[str, str] = field(default_factory=dict)
    repack_cache: bool | None = None
    ple: str | None = None
    kv: str | None = None
    chat_template: str | None = None
    generation_config: str = "auto"
    context: int | None = None
    max_batched_tokens: int = 512
    max_num_seqs: int = 8
    prefix_cache_bytes: int | None = None
    max_stall_ms: float | None = None
    speculate: str | None = None
    draft_model: str | None = None
    draft_tokens: int | None = None
    media: tuple[str, ...] = ()
    mmproj: str | None = None
    tensor_parallel: int = 1
    pipeline_parallel: int = 1

    def __post_init__(self) -> None:
        self._check_kinds()
        for name, check in CHECKS.items():
            if getattr(self, name) is not None:
                check(getattr(self, name))
        if self.quant is not None:
            object.__setattr__(self, "quant", find_quant(self.quant, RECIPE_NAMES))  # one spelling from here on
        self._check_limits()
        place = self.device.partition(":")[0]
        if self.kernels == "triton" and (reason := TRITON.refusal(place, self.kernels)):
            raise KernelError(f"kernels triton: {reason}")
        if self.activations is not None and (reason := CPU.refusal(place, self.kernels)):
            found = f"activations {self.activations}"
            raise KernelError(f"{found}: a choice of the native CPU kernels, which are not used here: {reason}")
        if self.ple in ("gpu", "host") and place != "cuda":
            raise KernelError(f"ple {self.ple}: a choice for models on a GPU; on a CPU the table stays mapped")
        if self.kv == "int8" and place != "cpu":
            raise KernelError("kv int8: a choice for models on a CPU; on a GPU use kv fp8")
        if self.kv == "fp8" and (reason := TRITON.refusal(place, self.kernels)):
            remedy = "; on a CPU use kv int8" if place == "cpu" else ""
            raise KernelError(f"kv fp8: a choice of the Triton kernels, which are not used here: {reason}{remedy}")

    @property
    def splits_ple(self) -> bool:
        """Return whether tensor-parallel processes share the rows of the table of per-layer embeddings."""
        return self.ple == "split" or (self.ple is None and self.device != "cpu")

    @property
    def drafts_by_model(self) -> bool:
        """Return whether a draft model is to be loaded."""
        return self.draft_model is not None and self.speculate in (None, "auto", "mtp")

    def _check_kinds(self) -> None:
        """Raise RequestError, with every problem, for options of another type: callers are checked, not trusted."""
        problems = list[str]()
        for name in TEXTS:
            value: object = getattr(self, name)
            may_be_none = name not in NEEDED
            if not ((isinstance(value, str) and value) or (value is None and may_be_none)):
                problems.append(f"{name}: expected a text{' or None' if may_be_none else ''}, found {spell_value(value)}")
        ignore: object = self.ignore
        if not isinstance(ignore, tuple) or not all(isinstance(each, str) for each in ignore):
            problems.append(f"ignore: expected a list of patterns, such as ['*.foo'], found {spell_value(ignore)}")
        media: object = self.media
        if not isinstance(media, tuple) or not set(map(repr, media)) <= set(map(repr, (AUTO_MEDIA, *MEDIA))):
            known = ", ".join((AUTO_MEDIA, *MEDIA))
            problems.append(f"media: expected some of {known}, such as ['image'], found {spell_value(media)}")
        adapters: object = self.adapters
        if not isinstance(adapters, Mapping) or not all(isinstance(each, str) for pair in adapters.items() for each in pair):
            problems.append(f"adapters: expected paths by name, such as {{'lamp': 'path/to/it'}}, found {spell_value(adapters)}")
        flag: object = self.repack_cache
        if not isinstance(flag, bool | None):
            problems.append(f"repack_cache: expected True, False or None, found {spell_value(flag)}")
        if problems:
            raise RequestError("the model can't be loaded with these options", problems)

    def _check_limits(self) -> None:
        """Raise RequestError, with every problem, unless the limits leave room for a request."""
        limits = {name: value for name in LEAST if (value := getattr(self, name)) is not None or name not in MAY_BE_NONE}
        problems = [
            f"{name}: expected {LEAST[name]} or more, found {spell_value(value)}"
            for name, value in limits.items()
            if not isinstance(value, int) or isinstance(value, bool) or value < LEAST[name]
        ]
        stall: object = self.max_stall_ms
        if stall is not None and not (isinstance(stall, int | float) and not isinstance(stall, bool) and stall > 0):
            problems.append(f"max_stall_ms: expected None or milliseconds above 0, found {spell_value(stall)}")
        drafts: object = self.draft_tokens
        if drafts is not None and not (type(drafts) is int and 0 <= drafts <= MOST_DRAFTS):
            problems.append(f"draft_tokens: expected None or 0 to {MOST_DRAFTS}, found {spell_value(drafts)}")
        if self.speculate == "mtp" and self.draft_model is None:
            problems.append("speculate: mtp needs an assistant; name it with draft_model")
        if problems:
            raise RequestError("the limits leave no room", problems)
