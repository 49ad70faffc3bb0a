"""The options that several commands share.

Owns their names, help texts and checks: a bad value is told before a model is loaded, most of them before torch is imported.
Options that belong together are the fields of a dataclass, which a command under `spread` takes as one parameter. Refuses to know
what a command does with them. Read `loading.py` for how a model comes from them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Annotated, Any, get_type_hints

import typer

from gemcutter.checkpoint.remote.hub import DEMO
from gemcutter.cli.failure import UsageError
from gemcutter.cli.terminal import Volume, note, remark, set_volume
from gemcutter.errors import GemcutterError, RequestError
from gemcutter.load_options import AUTO_MEDIA, CHECKS, MEDIA, LoadOptions
from gemcutter.media.budgets import check_budget

NO_MEDIA = "none"  # of what a server may read
BYTES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def _checked(option: str) -> Callable[[typer.Context, str | None], str | None]:
    """Build the callback that checks a load option as `LoadOptions` does. It raises typer.BadParameter."""

    def check(context: typer.Context, value: str | None) -> str | None:
        if option == "quant" and context.info_name in ("bench", "plan"):
            return value  # which take other names for a preset, and check both themselves
        try:
            return value if value is None else CHECKS[option](value)
        except GemcutterError as error:
            raise typer.BadParameter(str(error).removeprefix(f"{option}: ")) from None

    return check


def _split_names(value: list[str] | None) -> list[str]:
    """Return names that are given one by one, or with commas between them."""
    return [name.strip() for text in value or () for name in text.split(",")]


def _checked_media(context: typer.Context, value: list[str] | None) -> list[str] | None:
    names = _split_names(value)
    if unknown := [name for name in names if name not in MEDIA]:
        raise typer.BadParameter(f"expected {' or '.join(MEDIA)}, found {', '.join(unknown)}")
    return names


def _checked_media_of_server(context: typer.Context, value: list[str] | None) -> list[str] | None:
    names = _split_names(value)
    if names in ([AUTO_MEDIA], [NO_MEDIA]):
        return names
    if unknown := [name for name in names if name not in MEDIA]:
        words = ", ".join((AUTO_MEDIA, NO_MEDIA))
        raise typer.BadParameter(f"expected {words}, or {' and '.join(MEDIA)}, found {', '.join(unknown)}")
    return names


def _checked_budget(context: typer.Context, value: int | None) -> int | None:
    try:
        return None if value is None else check_budget(value)
    except RequestError as error:
        raise typer.BadParameter(str(error).partition(": ")[2]) from None


def parse_integers(option: str, text: str) -> tuple[int, ...]:
    """Read integers with commas between them; none in an empty text. Raises UsageError that names the option."""
    try:
        return tuple(int(word) for word in text.split(",")) if text.strip() else ()
    except ValueError:
        raise UsageError(f"{option}: expected integers with commas between them, found {text!r}") from None


def parse_bytes(option: str, text: str | None) -> int | None:
    """Read a size in bytes, or with K, M or G in powers of 1024; None for None. Raises UsageError that names the option."""
    if text is None:
        return None
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].upper() in BYTES else (text, "")
    if not number.isascii() or not number.isdigit():
        raise UsageError(f"{option}: expected bytes, such as 0, 200000000, 512M or 4G, found {text!r}")
    return int(number) * BYTES[unit]


def check_sampling(choosing: Choosing, **more: Any) -> dict[str, Any]:
    """Return the sampling options that are set, for a checkpoint's own defaults to fill in the others.

    Raises UsageError that names all that the engine does not take.
    """
    from gemcutter.engine.sampling_params import SamplingParams

    found = {name: value for name, value in (asdict(choosing) | more).items() if value is not None}
    try:
        SamplingParams(**found)
    except RequestError as error:
        raise UsageError("; ".join(error.problems)) from None
    return found


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """Show typer the fields of a command's dataclass parameters as options of the command, which gets each as one object."""
    types = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in types.items() if is_dataclass(kind)}

    @wraps(command)
    def call(**values: Any) -> None:
        objects = {name: kind(**{each.name: values.pop(each.name) for each in fields(kind)}) for name, kind in groups.items()}
        command(**values, **objects)

    call.__signature__ = Signature(list(_parameters(command)))  # type: ignore[attr-defined]  # where typer finds it
    return call


def _parameters(command: Callable[..., Any]) -> Iterator[Parameter]:
    """Yield a function's parameters, and in place of a dataclass its fields."""
    types = get_type_hints(command, include_extras=True)
    for name, parameter in signature(command).parameters.items():
        if is_dataclass(types.get(name)):
            yield from _parameters(types[name])
        else:  # a command under `spread` has its types in the signature alone
            yield parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=types.get(name, parameter.annotation))


def with_volume(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take -q and -v, which say how much is told beside its result; a folder that is called demo is told."""

    @wraps(command)
    def call(*, quiet: bool, verbose: bool, **values: Any) -> None:
        if quiet and verbose:
            raise UsageError("give either --quiet or --verbose")
        set_volume(Volume.QUIET if quiet else Volume.VERBOSE if verbose else Volume.NORMAL)
        if DEMO in (values.get("model"), values.get("source")) and os.path.lexists(DEMO):
            note(f"{DEMO} is the packaged model; ./{DEMO} is the one in this folder")
        started = time.perf_counter()
        command(**values)
        remark(f"done in {time.perf_counter() - started:.2f} s")

    flags = {"quiet": Quiet, "verbose": Verbose}
    more = [Parameter(name, Parameter.KEYWORD_ONLY, default=False, annotation=kind) for name, kind in flags.items()]
    call.__signature__ = Signature([*_parameters(command), *more])  # type: ignore[attr-defined]  # where typer finds it
    return call


Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Leave out notes, statistics and progress; errors are told.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Also tell how a model was loaded, and how long all took.")]

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help='Folder, .safetensors or .gguf file, hub id (owner/name), short name (`gemcutter models`), or "demo".',
        show_default=False,
    ),
]

# ---- how a model is loaded ----

Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="float32|bfloat16", help="Compute in this dtype.  [default: the checkpoint's own]", callback=_checked("dtype")
    ),
]
Device = Annotated[str, typer.Option(metavar="cpu|cuda|cuda:N", help="Compute on this device.", callback=_checked("device"))]
Kernels = Annotated[
    str,
    typer.Option(
        metavar="auto|triton|reference",
        help='"reference" takes the plain definitions, whose results never depend on what else is in a batch; "triton" takes '
        "Triton's kernels or fails.",
        callback=_checked("kernels"),
    ),
]
Activations = Annotated[
    str | None,
    typer.Option(
        metavar="int8|bf16",
        help="Activation precision in quantized CPU matmuls: int8 (dynamic, a scale for 32 columns) or bf16.  "
        "[default: int8 in bfloat16, none in float32]",
        callback=_checked("activations"),
    ),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Pass over tensors and config keys that match, such as 'blk.*.foo'; repeatable."),
]

Mmproj = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="What holds the towers for images and sounds.  [default: the model, or what is beside it]"),
]
Adapter = Annotated[
    str | None,
    typer.Option(metavar="PATH", help="LoRA adapter as PEFT saves it, merged into the weights: a folder, or a hub id."),
]
Quant = Annotated[
    str | None,
    typer.Option(
        metavar="q4|q8|mlx4|mlx8|Q4_0|Q8_0",
        help="Quantize dense weights while they are loaded; q4 and q8 are the recommended ones.",
        callback=_checked("quant"),
    ),
]


@dataclass(frozen=True, slots=True)
class Loading:
    """How a model is loaded: the options of every command that loads one."""

    dtype: Dtype = None
    device: Device = "cpu"
    kernels: Kernels = "auto"
    activations: Activations = None
    threads: Annotated[
        int | None,
        typer.Option("-t", "--threads", metavar="N", min=1, help="CPU threads.  [default: torch's choice]", show_default=False),
    ] = None
    ignore: Ignore = None
    adapter: Adapter = None
    quant: Quant = None
    repack_cache: Annotated[
        bool | None,
        typer.Option(
            "--repack-cache/--no-repack-cache",
            help="Keep repacked weights and large vocabularies in the user's cache folder, so that later starts only map them.  "
            "[default: more than 256 MiB of weights, and vocabularies, where the disk has room]",
            show_default=False,
        ),
    ] = None
    ple: Annotated[
        str | None,
        typer.Option(
            metavar="gpu|split|host|mmap",
            help="Where the per-layer embeddings are kept for a GPU; split: --tp processes share them.  [default: gpu if there "
            "is room, split over several GPUs]",
            callback=_checked("ple"),
        ),
    ] = None
    tensor_parallel: Annotated[
        int,
        typer.Option(
            "--tensor-parallel",
            "--tp",
            metavar="N",
            min=1,
            help="Run the model on so many processes of this host, each with a slice of every layer.",
        ),
    ] = 1
    pipeline_parallel: Annotated[
        int,
        typer.Option(
            "--pipeline-parallel",
            "--pp",
            metavar="M",
            min=1,
            help="Cut the layers into so many stages, each on processes of its own; they work on different steps at a time.",
        ),
    ] = 1

    mmproj: Mmproj = None
    chat_template: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|canonical|own",
            help="How conversations become prompts.  [default: the checkpoint's own, unless Google has replaced it]",
        ),
    ] = None
    generation_config: Annotated[
        str, typer.Option(metavar="FILE|auto|none", help="Where the defaults of sampling come from; none: greedy.")
    ] = "auto"

    def options(self, model: str, **engine: Any) -> LoadOptions:
        """Return these options for a model; `engine` holds the limits of the engine and its cache. Raises GemcutterError."""
        own = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "threads"}
        return LoadOptions(model=model, **own | {"ignore": tuple(self.ignore or ())}, **engine)


# ---- the cache that its engine gets; some commands know themselves what they need ----

Context = Annotated[
    int | None, typer.Option(metavar="TOKENS", min=1, help="Room for prompt and reply.  [default: 32768]", show_default=False)
]
Kv = Annotated[
    str | None,
    typer.Option(
        metavar="fp8|int8",
        help="Keep keys and values in 8 bits: fp8 on a GPU, int8 on a CPU.  [default: as rows are computed]",
        callback=_checked("kv"),
        show_default=False,
    ),
]

PrefixCacheBytes = Annotated[
    str | None,
    typer.Option(
        metavar="BYTES",
        help="Memory for beginnings of prompts that are kept for reuse, such as 4G; 0: none.  [default: by the context]",
        show_default=False,
    ),
]

# ---- who guesses tokens ----


@dataclass(frozen=True, slots=True)
class Speculating:
    """Who guesses tokens that are then verified several a step."""

    speculate: Annotated[
        str | None,
        typer.Option(
            metavar="auto|mtp|ngram|off",
            help="Guess tokens and verify several a step, which changes no reply: by --draft-model (mtp), by what followed the "
            "same tokens before (ngram), or both (auto).  [default: auto with --draft-model, else off]",
            callback=_checked("speculate"),
            show_default=False,
        ),
    ] = None
    draft_model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The assistant that was made for this model: a folder or a hub id.")
    ] = None
    draft_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=0, help="Tokens to guess at a time, 8 at most.  [default: as many as pay]", show_default=False
        ),
    ] = None

    @property
    def given(self) -> dict[str, Any]:
        """Return the options as load options."""
        return asdict(self)


# ---- how tokens are chosen; the engine checks the ranges ----


@dataclass(frozen=True, slots=True)
class Choosing:
    """How the tokens of a reply are chosen; what is None is left to the checkpoint's defaults."""

    temperature: Annotated[
        float | None,
        typer.Option(metavar="T", help="0 is greedy.  [default: the checkpoint's generation_config.json, else 0]"),
    ] = None
    top_k: Annotated[int | None, typer.Option(metavar="K", help="Sample from the K most likely tokens; 0 switches this off.")] = (
        None
    )
    top_p: Annotated[
        float | None, typer.Option(metavar="P", help="Sample from the fewest tokens whose probabilities reach P.")
    ] = None
    min_p: Annotated[float | None, typer.Option(metavar="P", help="Drop tokens below P times the best one's probability.")] = None
    repetition_penalty: Annotated[
        float | None, typer.Option(metavar="R", help="Above 1: disfavour the tokens of prompt and reply.")
    ] = None
    presence_penalty: Annotated[float | None, typer.Option(metavar="X", help="Taken off the logits of tokens in the reply.")] = (
        None
    )
    frequency_penalty: Annotated[
        float | None, typer.Option(metavar="X", help="The same, once for each time that they occur.")
    ] = None
    seed: Annotated[int | None, typer.Option(metavar="N", help="Make sampling repeatable.")] = None


# ---- images and sounds ----

Media = Annotated[
    list[str] | None,
    typer.Option(
        metavar="image|audio|video",
        help="What messages may hold beside text: image or video loads the vision tower, audio the audio tower; repeatable.",
        callback=_checked_media,
        show_default=False,
    ),
]
MediaOfServer = Annotated[
    list[str] | None,
    typer.Option(
        "--media",
        metavar="auto|none|image|audio|video",
        help="What messages may hold beside text; auto: what the model has a tower for; repeatable.  [default: auto]",
        callback=_checked_media_of_server,
        show_default=False,
    ),
]
Soft = Annotated[
    int | None,
    typer.Option(
        "--max-soft-tokens",
        metavar="70|140|280|560|1120",
        help="What an image may become at most.  [default: what the model was made for]",
        callback=_checked_budget,
        show_default=False,
    ),
]

# ---- what to say ----

System = Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt.")]
Think = Annotated[bool, typer.Option("--think", help="Let the model reason before it answers.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else.")]
