"""How quantizations are called: one table of names for every command, the Python API and files.

Owns the names, their other spellings (capitals never count), and the error for a name that means nothing here. Refuses to know
what a name stands for: read `quant/recipes.py` for that. Imports no torch, so that options are checked before it is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from gemcutter.errors import ConfigError

RECIPE_NAMES = ("q4", "q8", "mlx4", "mlx8", "Q4_0", "Q8_0")
UNCHANGED, BF16, F16 = "none", "bf16", "f16"
# Other spellings, in lower case and with "_" for "-".
ALIASES = {
    "4bit": "q4",
    "4_bit": "q4",
    "int4": "q4",
    "8bit": "q8",
    "8_bit": "q8",
    "int8": "q8",
    "mlx_4bit": "mlx4",
    "mlx_8bit": "mlx8",
    "bfloat16": BF16,
    "float16": F16,
    "fp16": F16,
    "half": F16,
}
DENSE_DTYPES = {BF16: "bfloat16", F16: "float16"}
# llama.cpp's other types: Q4_K_M, IQ4_XS, UD-Q4_K_XL, MXFP4 ...
BLOCK_TYPE = re.compile(r"(ud_)?(i?q(?P<bits>[1-8])_\w+|tq[12]_0|mxfp4\w*|nvfp4)")


def find_quant(name: str, known: Iterable[str]) -> str:
    """Return the name among `known` that a spelling stands for. Raises ConfigError with the list, or what comes nearest."""
    allowed = tuple(known)
    plain = name.strip().lower().replace("-", "_")
    wanted = ALIASES.get(plain, plain)
    for each in allowed:
        if each.lower() == wanted.lower():
            return each
    raise ConfigError(f"quant: {explain_quant(name, allowed)}")


def explain_quant(name: str, known: tuple[str, ...]) -> str:
    """Return why a name is none of `known`, and what to take instead."""
    plain = name.strip().lower().replace("-", "_")
    listed = f"expected {', '.join(known[:-1])} or {known[-1]}" if len(known) > 1 else f"expected {known[0]}"
    lowered = {each.lower(): each for each in known}
    block = BLOCK_TYPE.fullmatch(plain)
    if block and plain not in {each.lower() for each in RECIPE_NAMES}:
        bits = "8" if int(block["bits"] or 4) > 4 else "4"
        nearest = lowered.get(f"q{bits}_0") or lowered.get(f"q{bits}") or known[-1]
        return (
            f"{name} is read, not written (as all K-quants and IQ types are); nearest: {nearest}, "
            "or an f16 GGUF file and llama.cpp's llama-quantize"
        )
    dense = DENSE_DTYPES.get(ALIASES.get(plain, plain))
    if dense is not None and not lowered.keys() & DENSE_DTYPES.keys():
        return f"{listed}, found {name!r}, which quantizes nothing: the dtype to compute in is --dtype"
    return f"{listed}, found {name!r}"
