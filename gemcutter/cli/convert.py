"""`gemcutter convert`: write a checkpoint in another format, quantization or layout.

Owns the options and the words of the report, and joins the two halves that must not know each other:
`checkpoint/convert/convert.py`, which does the work, and `text/tokenizer.py`, which makes the tokenizer's files where a GGUF
has only a vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemcutter.checkpoint.remote.hub import locate
from gemcutter.cli import options
from gemcutter.cli.terminal import note, progress, spell_bytes
from gemcutter.errors import GemcutterError
from gemcutter.quant_names import BF16, F16, RECIPE_NAMES, UNCHANGED, find_quant

if TYPE_CHECKING:
    from gemcutter.checkpoint.convert.convert import Report
    from gemcutter.checkpoint.load.match import Checkpoint

HELP = """
Write a checkpoint in another format, quantization or layout.

SRC is any Gemma 4 checkpoint that gemcutter loads (Gemma 3 files run, but are not converted). DST is a folder for hf
(transformers and most engines) and mlx (mlx-lm), a file that ends in .gguf for gguf (llama.cpp) and for mmproj, which is the
towers for images and sounds alone: GGUF keeps them in a file of their own. Without --quant, weights stay as they are stored where
the target has a place for them, byte for byte, and become dense where it has none. q4 and q8 are recommended mixtures (in a GGUF
file Q4_0 and Q8_0), mlx4 and mlx8 are mlx-lm's, Q4_0 and Q8_0 llama.cpp's blocks, with Q8_0 for tables and head. K-quants and IQ
types are read, not written.

--adapter merges a LoRA adapter, in float32, before weights are rounded or quantized. A source that is quantized already needs
--quant for this: q4 or q8 to quantize what was merged again, bf16 to write it dense.

Nothing stands under the name DST before it is complete, and an interrupted run can be started again. What was done to each
tensor is in gemcutter-manifest.json, for a GGUF in a file beside it.
"""
EXAMPLES = """\b
Examples:
  gemcutter convert google/gemma-4-E2B-it ./e2b-q4 --to mlx --quant q4
  gemcutter convert demo demo-Q8_0.gguf --to gguf --quant Q8_0
  gemcutter convert google/gemma-4-E2B-it mmproj-e2b.gguf --to mmproj --quant f16
  gemcutter convert ./gemma.gguf ./gemma --to hf --quant bf16
  gemcutter convert ./gemma-4-E2B-it ./smaller --to hf --shared-kv drop
  gemcutter convert ./gemma-4-E2B-it ./mine --to hf --adapter ./my-adapter
  gemcutter convert e2b ./mine.gguf --to gguf --quant q4 --adapter ./my-adapter --dry-run
"""
FORMATS = ("hf", "mlx", "gguf", "mmproj")
QUANTS = (UNCHANGED, BF16, F16, *RECIPE_NAMES)
SHARED_KV = ("keep", "drop", "restore")


def one_of(*allowed: str) -> Callable[[str], str]:
    """Make a check that accepts one of some words. The check raises typer.BadParameter."""

    def check(word: str) -> str:
        if word not in allowed:
            raise typer.BadParameter(f"expected one of {', '.join(allowed)}, found {word!r}")
        return word

    return check


def check_quant(name: str) -> str:
    """Return the name of a quantization in its own spelling. Raises typer.BadParameter."""
    try:
        return find_quant(name, QUANTS)
    except GemcutterError as error:
        raise typer.BadParameter(str(error).removeprefix("quant: ")) from None


Source = Annotated[
    str,
    typer.Argument(metavar="SRC", help="The checkpoint to read: all that MODEL can be.", show_default=False),
]
To = Annotated[
    str, typer.Option(metavar="hf|mlx|gguf|mmproj", help="Format to write.", callback=one_of(*FORMATS), show_default=False)
]
Destination = Annotated[Path, typer.Argument(metavar="DST", help="Folder, or .gguf file, to write.", show_default=False)]
Quant = Annotated[
    str,
    typer.Option(metavar="none|bf16|f16|q4|q8|mlx4|mlx8|Q4_0|Q8_0", help="How to store the weights.", callback=check_quant),
]
SharedKV = Annotated[
    str,
    typer.Option(
        "--shared-kv",
        metavar="keep|drop|restore",
        help="Unread keys and values of layers that share another's: keep what there is, drop it, or write zeros.",
        callback=one_of(*SHARED_KV),
    ),
]
Adapter = Annotated[
    str | None, typer.Option(metavar="PATH", help="LoRA adapter to merge into the weights: a folder, or a hub id.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Only say what would be written, from the headers of SRC; nothing is downloaded for it.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace DST, if it is a file or an earlier result.")]


def convert(
    source: Source,
    destination: Destination,
    to: To,
    quant: Quant = "none",
    adapter: Adapter = None,
    shared_kv: SharedKV = "keep",
    force: Force = False,
    dry_run: DryRun = False,
    ignore: options.Ignore = None,
    as_json: options.Json = False,
) -> None:
    """Write the target and say what was done. Raises GemcutterError."""
    from gemcutter.checkpoint.convert import convert as converting

    asked, merged = tuple(ignore or ()), None if adapter is None else locate(adapter)
    if dry_run:
        from gemcutter.checkpoint.load.match import read_checkpoint
        from gemcutter.checkpoint.remote.remote_source import open_source

        checkpoint = read_checkpoint(open_source(source), asked)
        report = converting.preview(checkpoint, destination, to, quant, shared_kv, adapter=merged, ignore=asked)
    else:
        with progress(f"writing {destination}") as advance:
            report = converting.convert(
                locate(source),
                destination,
                to,
                quant,
                shared_kv,
                adapter=merged,
                force=force,
                ignore=asked,
                texts=make_texts,
                progress=advance,
            )
    if as_json:
        print(json.dumps(as_object(report) | {"dry_run": dry_run}))
    else:
        show(report, dry_run)


def show(report: Report, dry_run: bool) -> None:
    """Print what was done, or would be, for a reader: sizes, types, deeds, and notes on stderr."""
    before, after = spell_bytes(report.source_bytes), spell_bytes(report.target_bytes)
    print(f"{report.target}: {'would hold ' if dry_run else ''}{after} of tensors, from {before}")
    types = (f"{count} {kind} ({spell_bytes(size)})" for kind, (count, size) in report.types.items())
    print(f"  stored: {', '.join(types)}")
    print(f"  tensors: {', '.join(f'{count} {deed}' for deed, count in report.deeds.items())}")
    for line in report.notes():
        note(line)
    if dry_run:
        note("a dry run; nothing was written")


def as_object(report: Report) -> dict[str, object]:
    """Return the report as the object that --json prints."""
    return {
        "target": str(report.target),
        "deeds": dict(report.deeds),
        "types": {kind: {"tensors": count, "bytes": size} for kind, (count, size) in report.types.items()},
        "dropped": dict(report.dropped),
        "source_bytes": report.source_bytes,
        "target_bytes": report.target_bytes,
        "notes": report.notes(),
    }


def make_texts(checkpoint: Checkpoint) -> Mapping[str, bytes]:
    """Make the tokenizer's files of a GGUF's vocabulary. Raises CheckpointError."""
    from gemcutter.text.export import tokenizer_files
    from gemcutter.text_assets import read_tokenizer

    return tokenizer_files(read_tokenizer(checkpoint.source))
