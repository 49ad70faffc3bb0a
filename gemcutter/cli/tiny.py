"""`gemcutter tiny`: write a random checkpoint with every trait of a released size.

Owns the options; `checkpoint/write/synth.py` and `synth_assistant.py` own the geometry and the bytes. Imports no torch.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from gemcutter.cli.terminal import spell_bytes
from gemcutter.errors import GemcutterError

HELP = """
Write a random checkpoint like a released size.

It goes into the folder OUT, which must be empty or absent, in the layout of Hugging Face's libraries, so that other engines load
it too. It has every trait of the size, but is small: a few layers of each kind, narrow, and the demo's tokenizer. Its text is
noise; it is there for tests and for a look at the topology.

--like E2B-assistant writes the size's assistant, which fits what --like E2B writes: `gemcutter run ./tiny-e2b --draft-model
./tiny-e2b-assistant`. What it drafts is noise, too, so that hardly a draft is right; the reply stays the same.
"""
EXAMPLES = """\b
Examples:
  gemcutter tiny --like E2B ./tiny-e2b
  gemcutter tiny --like 26B-A4B ./tiny-moe --seed 7
  gemcutter tiny --like E2B-assistant ./tiny-e2b-assistant
  gemcutter tiny --like 31B ./big --full     (the true geometry: 61 GB)
"""


def check_size(name: str) -> str:
    """Return the name of a released size, or of its assistant, in its own spelling. Raises typer.BadParameter."""
    from gemcutter.checkpoint.write.synth import SIZES, find_size
    from gemcutter.checkpoint.write.synth_assistant import SUFFIX, find_assistant

    try:
        target = find_assistant(name)
        return find_size(name) if target is None else target + SUFFIX
    except GemcutterError:
        known = f"expected one of {', '.join(SIZES)}, or one of these with {SUFFIX} behind it"
        raise typer.BadParameter(f"{known}, found {name!r}") from None


Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.", show_default=False)]
Like = Annotated[
    str,
    typer.Option(
        metavar="E2B|E4B|12B|26B-A4B|31B[-assistant]",
        help="The size to imitate, or whose assistant.",
        callback=check_size,
        show_default=False,
    ),
]
Full = Annotated[bool, typer.Option("--full", help="Keep the true geometry.")]
Seed = Annotated[int, typer.Option(metavar="N", min=0, help="Same seed, same bytes.")]


def tiny(out: Out, like: Like, full: Full = False, seed: Seed = 0) -> None:
    """Write the checkpoint and say what to do with it. Raises GemcutterError."""
    from gemcutter.checkpoint.write.synth import write_checkpoint
    from gemcutter.checkpoint.write.synth_assistant import find_assistant, write_assistant

    target = find_assistant(like)
    if target is None:
        written = write_checkpoint(like, out, full=full, seed=seed)
    else:
        written = write_assistant(target, out, full=full, seed=seed)
    size = sum(path.stat().st_size for path in written)
    print(f"{out}: {len(written)} files, {spell_bytes(size)}")
    print(f"try: gemcutter inspect {shlex.quote(str(out))}")
