"""The options that several verbs share.

Owns their names, help texts and checks: a bad value is told before a model is loaded, most of them before torch is imported.
Refuses to know what a verb does with them. Read `loading.py` for how a model comes from them.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

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


def parse_integers(option: str, text: str) -> tuple[int, ...]:
    """Read integers with commas between them; none in an empty text. Raises UsageError that names the option."""
    try:
        return tuple(int(word) for word in text.split(",")) if text.strip() else ()
    except ValueError:
        raise UsageError(f"{option}: expected integers with commas between them, found {text!r}") from None


def given(**options: Any) -> dict[str, Any]:
    """Keep the options that were given; a checkpoint's own defaults fill in the others."""
    return {name: value for name, value in options.items() if value is not None}


def check_sampling(options: dict[str, Any]) -> dict[str, Any]:
    """Give sampling options back if the engine takes them. Raises UsageError that names all it does not."""
    from gemcutter.engine.sampling import Sampling

    try:
        Sampling(**options)
    except RequestError as error:
        raise UsageError("; ".join(error.problems)) from None
    return options


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help='Folder, .safetensors or .gguf file, hub id (owner/name), or "demo".', show_default=False
    ),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Pass over tensors and config keys that match, such as 'blk.*.foo'; repeatable."),
]
Adapter = Annotated[
    str | None,
    typer.Option(metavar="PATH", help="LoRA adapter as PEFT saves it, merged into the weights: a folder, or a hub id."),
]


def check_quant(name: str | None) -> str | None:
    """Accept the name of a way to quantize while loading. Raises typer.BadParameter."""
    if name is not None and name not in QUANTS:
        raise typer.BadParameter(f"expected {' or '.join(QUANTS)}, found {name!r}")
    return name


Quant = Annotated[
    str | None,
    typer.Option(metavar="q4|q8", help="Quantize dense weights while they are loaded, to 4 or 8 bits.", callback=check_quant),
]

RepackCache = Annotated[
    bool,
    typer.Option("--repack-cache", help="Keep repacked weights in the user's cache folder, so that later starts only map them."),
]

Ple = Annotated[
    str | None,
    typer.Option(
        metavar="gpu|host|mmap", help="Where the per-layer embeddings live beside a GPU.  [default: gpu if there is room]"
    ),
]
Kv = Annotated[
    str | None, typer.Option(metavar="fp8", help="Keep keys and values in 8 bits on a GPU.  [default: as rows are computed]")
]

# ---- how to compute ----

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
Context = Annotated[
    int | None, typer.Option(metavar="TOKENS", min=1, help="Room for prompt and reply.  [default: 32768]", show_default=False)
]
Threads = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="CPU threads.  [default: torch's choice]", show_default=False)
]

# ---- what to choose; the engine checks the ranges ----

Temperature = Annotated[
    float | None, typer.Option(metavar="T", help="0 is greedy.  [default: the checkpoint's generation_config.json, else 0]")
]
TopK = Annotated[int | None, typer.Option(metavar="K", help="Sample from the K most likely tokens; 0 switches this off.")]
TopP = Annotated[float | None, typer.Option(metavar="P", help="Sample from the fewest tokens whose probabilities reach P.")]
MinP = Annotated[float | None, typer.Option(metavar="P", help="Drop tokens below P times the best one's probability.")]
RepetitionPenalty = Annotated[float | None, typer.Option(metavar="R", help="Above 1: disfavour the tokens of prompt and reply.")]
PresencePenalty = Annotated[float | None, typer.Option(metavar="X", help="Taken off the logits of tokens in the reply.")]
FrequencyPenalty = Annotated[float | None, typer.Option(metavar="X", help="The same, once for each time that they occur.")]
Seed = Annotated[int | None, typer.Option(metavar="N", help="Make sampling repeatable.")]

# ---- what to say ----

System = Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt.")]
Think = Annotated[bool, typer.Option("--think", help="Let the model reason before it answers.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else.")]
