"""`gemcutter cache`: which repacked weights and vocabularies are on disk, and how to get rid of them.

Owns the two actions and what a reader sees of them; imports no torch. Refuses to know what is in the files; read
`gemcutter/checkpoint/load/packed_weight_files.py` for that.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from gemcutter.checkpoint.load.packed_weight_files import PackedFile, packed_files, remove, user_folder
from gemcutter.cli import options
from gemcutter.cli.failure import UsageError
from gemcutter.cli.terminal import print_json, spell_bytes

HELP = """
List or clear the repacked weights and vocabularies that loads have kept.

They are in ~/.cache/gemcutter, or in XDG_CACHE_HOME, and may go at any time: the next load makes them again. "list" shows each
file's size and the checkpoint that it was made of; "clear" removes all of them, with --stale only those whose checkpoint has
changed or gone. Downloaded checkpoints are not among them: those are in the Hugging Face cache (`hf cache`).
"""
EXAMPLES = """\b
Examples:
  gemcutter cache list
  gemcutter cache clear --stale
"""
LIST, CLEAR = "list", "clear"

Action = Annotated[str, typer.Argument(metavar="list|clear", help="What to do.", show_default=False)]
Stale = Annotated[bool, typer.Option("--stale", help="Only what no checkpoint of this machine can use any more.")]


def cache(action: Action = LIST, stale: Stale = False, as_json: options.Json = False) -> None:
    """List or clear the folder. Raises UsageError, or OSError where a file can't be removed."""
    if action not in (LIST, CLEAR):
        raise UsageError(f"expected list or clear, found {action!r}")
    found = [file for file in packed_files() if not (stale and file.is_current)]
    if action == CLEAR:
        for file in found:
            remove(file)
    if as_json:
        print_json({"folder": str(user_folder()), "action": action, "files": [as_object(file) for file in found]})
        return
    total = spell_bytes(sum(file.nbytes for file in found))
    if action == LIST:
        for file in found:
            print(f"{spell_bytes(file.nbytes):>8}  {spell_origin(file)}")
    count = f"{len(found)} file" if len(found) == 1 else f"{len(found)} files"
    print(f"{'removed ' if action == CLEAR else ''}{count}, {total}, in {user_folder()}")


def as_object(file: PackedFile) -> dict[str, Any]:
    """Return a file as an object of --json."""
    made_of = {"checkpoint": list(file.files), "quant": file.quant, "is_current": file.is_current}
    made_of["holds"] = "vocabulary" if file.is_vocabulary else "weights"
    return {"path": str(file.path), "bytes": file.nbytes} | made_of


def spell_origin(file: PackedFile) -> str:
    """Return what a file was made of, and whether that is still there."""
    if not file.files:
        return f"{file.path.name} (unfinished or damaged)"
    more = f" and {len(file.files) - 1} more" if len(file.files) > 1 else ""
    what = ", its vocabulary" if file.is_vocabulary else f", quantized to {file.quant}" if file.quant else ""
    return f"{file.files[0]}{more}{what}{'' if file.is_current else ' (changed or gone since)'}"
