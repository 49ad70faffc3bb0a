"""The options that several verbs share.

Owns their names, help texts and checks; a bad value is told before torch is imported, or at least before a model is loaded.
Refuses to know what a verb does with them. Read `loading.py` for how a model comes from them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any

import typer

from gemcutter.errors import RequestError
from gemcutter.ops.bind import CHOICES

DTYPES = {"float32": "float32", "f32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16"}
HALVES = ("float16", "f16", "fp16", "half")
DEVICE = re.compile(r"cpu|cuda(:\d+)?")


def check_dtype(name: str | None) -> str | None:
    """Give the full name of a compute dtype. Raises typer.BadParameter."""
    if name in HALVES:
        raise typer.BadParameter(f"activations of this family exceed {name}'s range; use bfloat16 or float32")
    if name is not None and name not in DTYPES:
        raise typer.BadParameter(f"expected float32 or bfloat16, found {name!r}")
    return name and DTYPES[name]


def check_device(name: str) -> str:
    """Accept the name of a device, whether or not there is one. Raises typer.BadParameter."""
    if not DEVICE.fullmatch(name):
        raise typer.BadParameter(f"expected cpu, cuda or cuda:N, found {name!r}")
    return name


def check_kernels(name: str) -> str:
    """Accept one of the sets of kernels. Raises typer.BadParameter."""
    if name not in CHOICES:
        raise typer.BadParameter(f"expected {' or '.join(CHOICES)}, found {name!r}")
    return name


def parse_counts(text: str) -> tuple[int, ...]:
    """Read positive numbers with commas between them. Raises typer.BadParameter."""
    counts = parse_ids(text)
    if not counts or min(counts) < 1:
        raise typer.BadParameter(f"expected positive numbers with commas between them, found {text!r}")
    return counts


def parse_ids(text: str) -> tuple[int, ...]:
    """Read integers with commas between them, of any sign; what may be a token id is the engine's to say.

    Raises typer.BadParameter.
    """
    try:
        return tuple(int(word) for word in text.split(",")) if text.strip() else ()
    except ValueError:
        raise typer.BadParameter(f"expected integers with commas between them, found {text!r}") from None


def given(**options: Any) -> dict[str, Any]:
    """Keep the options that were given; the checkpoint's own defaults fill in the others."""
    return {name: value for name, value in options.items() if value is not None}


def check_sampling(options: dict[str, Any]) -> dict[str, Any]:
    """Give sampling options back if the engine would take them. Raises typer.BadParameter that names all it would not."""
    from gemcutter.engine.sampling import Sampling

    try:
        Sampling(**options)
    except RequestError as error:
        raise _misuse("; ".join(error.problems)) from None
    return options


def misuse(problem: str) -> Exception:
    """Make the error for options that don't go together."""
    return _misuse(problem)


def _misuse(problem: str) -> Exception:
    return typer.BadParameter(problem)


def _option(*names: str, help: str, metavar: str | None = None, check: Callable[..., Any] | None = None, **more: Any) -> Any:
    return typer.Option(*names, help=help, metavar=metavar, callback=check, **more)
