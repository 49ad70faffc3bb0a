"""The options that several verbs share.

Owns their names, help texts and checks: a bad value is told before a model is loaded, most of them before torch is imported.
Options that belong together are the fields of a dataclass, which a verb under `spread` takes as one parameter. Refuses to know
what a verb does with them. Read `loading.py` for how a model comes from them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Annotated, Any, get_type_hints

import typer

from gemcutter.cli.failure import UsageError
from gemcutter.errors import RequestError
from gemcutter.ops.bind import ACTIVATIONS, CHOICES

DTYPES = {"float32": "float32", "f32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16"}
HALVES = ("float16", "f16", "fp16", "half")
QUANTS = ("q4", "q8")
DEVICE = re.compile(r"cpu|cuda(:\d+)?")


def check_dtype(name: str | None) -> str | None:
    """Give the full name of a compute dtype. Raises typer.BadParameter."""
    if name in HALVES:
        raise typer.BadParameter(f"activations of this family exceed {name}'s range; use bfloat16 or float32")
    if name is not None and name not in DTYPES:
        raise typer.BadParameter(f"expected float32 or bfloat16, found {name!r}")
    return name and DTYPES[name]


def check_device(name: str) -> str:
    """Accept the name of a device, whether or not this machine has it. Raises typer.BadParameter."""
    if not DEVICE.fullmatch(name):
        raise typer.BadParameter(f"expected cpu, cuda or cuda:N, found {name!r}")
    return name


def check_kernels(name: str) -> str:
    """Accept the name of a set of kernels. Raises typer.BadParameter."""
    if name not in CHOICES:
        raise typer.BadParameter(f"expected {' or '.join(CHOICES)}, found {name!r}")
    return name


def check_activations(name: str | None) -> str | None:
    """Accept the name of a form of rows. Raises typer.BadParameter."""
    if name is not None and name not in ACTIVATIONS:
        raise typer.BadParameter(f"expected {' or '.join(ACTIVATIONS)}, found {name!r}")
    return name


def check_quant(name: str | None) -> str | None:
    """Accept the name of a way to quantize while loading. Raises typer.BadParameter."""
    if name is not None and name not in QUANTS:
        raise typer.BadParameter(f"expected {' or '.join(QUANTS)}, found {name!r}")
    return name


def parse_integers(option: str, text: str) -> tuple[int, ...]:
    """Read integers with commas between them; none in an empty text. Raises UsageError that names the option."""
    try:
        return tuple(int(word) for word in text.split(",")) if text.strip() else ()
    except ValueError:
        raise UsageError(f"{option}: expected integers with commas between them, found {text!r}") from None


def check_sampling(choosing: Choosing, **more: Any) -> dict[str, Any]:
    """Give the sampling options that are set, for a checkpoint's own defaults to fill in the others.

    Raises UsageError that names all that the engine does not take.
    """
    from gemcutter.engine.sampling import SamplingParams

    found = {name: value for name, value in (asdict(choosing) | more).items() if value is not None}
    try:
        SamplingParams(**found)
    except RequestError as error:
        raise UsageError("; ".join(error.problems)) from None
    return found


def spread(verb: Callable[..., None]) -> Callable[..., None]:
    """Show typer the fields of a verb's dataclass parameters as options of the verb, which gets each as one object again."""
    types = get_type_hints(verb, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in types.items() if is_dataclass(kind)}

    @wraps(verb)
    def call(**values: Any) -> None:
        objects = {name: kind(**{each.name: values.pop(each.name) for each in fields(kind)}) for name, kind in groups.items()}
        verb(**values, **objects)

    call.__signature__ = Signature(list(_parameters(verb)))  # type: ignore[attr-defined]  # where typer finds it
    return call


def _parameters(verb: Callable[..., Any]) -> Iterator[Parameter]:
    """Yield a function's parameters, and in place of a dataclass its fields."""
    types = get_type_hints(verb, include_extras=True)
    for name, parameter in signature(verb).parameters.items():
        if is_dataclass(types[name]):
            yield from _parameters(types[name])
        else:
            yield parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=types[name])


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help='Folder, .safetensors or .gguf file, hub id (owner/name), or "demo".', show_default=False
    ),
]

# ---- how a model is loaded ----

Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="float32|bfloat16", help="Compute in this dtype.  [default: the checkpoint's own]", callback=check_dtype
    ),
]
Device = Annotated[str, typer.Option(metavar="cpu|cuda|cuda:N", help="Compute on this device.", callback=check_device)]
Kernels = Annotated[
    str,
    typer.Option(
        metavar="auto|triton|reference",
        help='"reference" takes the plain definitions, whose results never depend on what else is in a batch; "triton" takes '
        "Triton's kernels or fails.",
        callback=check_kernels,
    ),
]
Activations = Annotated[
    str | None,
    typer.Option(
        metavar="int8|bf16",
        help="Form in which the native CPU kernels take the rows that meet packed weights.  "
        "[default: int8 in bfloat16, as they are in float32]",
        callback=check_activations,
    ),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Pass over tensors and config keys that match, such as 'blk.*.foo'; repeatable."),
]


@dataclass(frozen=True, slots=True)
class Loading:
    """How a model is loaded: the options of every verb that loads one."""

    dtype: Dtype = None
    device: Device = "cpu"
    kernels: Kernels = "auto"
    activations: Activations = None
    threads: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="CPU threads.  [default: torch's choice]", show_default=False)
    ] = None
    ignore: Ignore = None
    adapter: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="LoRA adapter as PEFT saves it, merged into the weights: a folder, or a hub id."),
    ] = None
    quant: Annotated[
        str | None,
        typer.Option(metavar="q4|q8", help="Quantize dense weights while they are loaded, to 4 or 8 bits.", callback=check_quant),
    ] = None
    repack_cache: Annotated[
        bool,
        typer.Option(
            "--repack-cache", help="Keep repacked weights in the user's cache folder, so that later starts only map them."
        ),
    ] = False
    ple: Annotated[
        str | None,
        typer.Option(
            metavar="gpu|host|mmap", help="Where the per-layer embeddings live beside a GPU.  [default: gpu if there is room]"
        ),
    ] = None


# ---- the cache that its engine gets; some verbs know themselves what they need ----

Context = Annotated[
    int | None, typer.Option(metavar="TOKENS", min=1, help="Room for prompt and reply.  [default: 32768]", show_default=False)
]
Kv = Annotated[
    str | None, typer.Option(metavar="fp8", help="Keep keys and values in 8 bits on a GPU.  [default: as rows are computed]")
]

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


# ---- what to say ----

System = Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt.")]
Think = Annotated[bool, typer.Option("--think", help="Let the model reason before it answers.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else.")]
