"""`gemcutter parse`: what the parser of replies makes of raw output.

Owns the reading of the raw output and the object that is printed. Refuses to know the rules: read `gemcutter/text/reply.py`. Only
the checkpoint's vocabulary is read; no weights, no torch.
"""

from __future__ import annotations

import json
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemcutter.cli import options
from gemcutter.cli.terminal import note, print_json
from gemcutter.cli.tool_files import Tools, read_tools
from gemcutter.errors import RequestError, spell_value

if TYPE_CHECKING:
    from gemcutter.text.tokenizer import Tokenizer

HELP = """
Show what is made of a model's raw output.

FILE ("-" is stdin) is a text, in which markers such as <|tool_call> are read as the special tokens that they spell, or a JSON
list of such texts and of {"literal": TEXT}, in which they are not. One JSON object is printed: reasoning, content and tool_calls,
each with a name and arguments. For reports of replies that were read wrong, and for tests.
"""
EXAMPLES = """\b
Examples:
  gemcutter parse demo reply.txt
  gemcutter parse demo reply.txt --tools tools.json --finish length
  echo '<|channel>thought\\nHm.<channel|>Yes.' | gemcutter parse demo -
"""


class Start(Enum):
    """Where a prompt leaves the model."""

    CONTENT = "content"
    THINKING = "thinking"


class Ending(Enum):
    """Why an output ended."""

    STOP = "stop"
    LENGTH = "length"


File = Annotated[Path, typer.Argument(metavar="FILE", help='Raw output; "-" is stdin.', show_default=False, allow_dash=True)]
StartOption = Annotated[
    Start, typer.Option("--start", help="Where the prompt left the model: in its text, or in an open channel.")
]
FinishOption = Annotated[Ending, typer.Option("--finish", help="Why the output ended: by itself, or cut off.")]
OneCall = Annotated[bool, typer.Option("--one-call", help="End at the first call, as with parallel_tool_calls off.")]


def parse(
    model: options.Model,
    file: File,
    tools: Tools = None,
    start: StartOption = Start.CONTENT,
    finish: FinishOption = Ending.STOP,
    one_call: OneCall = False,
) -> None:
    """Print one JSON object. Raises OSError or GemcutterError."""
    from gemcutter.text.reply import ReplyParser

    output = read_output(file)
    declared = read_tools(tools).declarations if tools is not None else None
    tokenizer = open_tokenizer(model)
    is_thinking = start is Start.THINKING
    parser = ReplyParser(
        tokenizer, tools=declared, parallel=not one_call, in_reasoning=is_thinking, at_turn_start=not is_thinking
    )
    for text, has_markers in output:
        for id in tokenizer.encode(text, bos=False) if has_markers else tokenizer.encode_plain(text):
            parser.push(id)
    parser.finish(finish is Ending.STOP)
    calls = [{"name": call.name, "arguments": call.parsed} for call in parser.tool_calls]
    print_json({"reasoning": parser.reasoning or None, "content": parser.text or None, "tool_calls": calls})
    if parser.cut_call is not None:
        note(f"a call was cut off and is left out: {parser.cut_call!r}")


def read_output(file: Path) -> list[tuple[str, bool]]:
    """Return the stretches of a raw output, and whether their markers are read. Raises OSError or RequestError."""
    try:
        raw = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{file} is not valid UTF-8 (byte {error.start}); convert it first") from None
    try:
        found = json.loads(text) if text.lstrip().startswith("[") else None
    except (ValueError, RecursionError):
        found = None  # a text that begins with a bracket
    if not isinstance(found, list):
        return [(text, True)]
    return [_stretch(f"{file}[{place}]", each) for place, each in enumerate(found)]


def _stretch(where: str, piece: Any) -> tuple[str, bool]:
    if isinstance(piece, str):
        return piece, True
    if isinstance(piece, dict) and list(piece) == ["literal"] and isinstance(piece["literal"], str):
        return piece["literal"], False
    raise RequestError(f'{where}: expected a string or {{"literal": TEXT}}, found {spell_value(piece)}')


def open_tokenizer(model: str) -> Tokenizer:
    """Return a checkpoint's tokenizer; a folder may hold no more than that. Raises GemcutterError."""
    from gemcutter.checkpoint.remote.remote_source import open_source
    from gemcutter.text.tokenizer import Tokenizer
    from gemcutter.text.tokenizer_parts import TOKENIZER
    from gemcutter.text_assets import read_tokenizer

    folder = Path(model)
    if (folder / TOKENIZER).is_file() and not any(folder.glob("*.safetensors")):
        return Tokenizer.load(folder)
    return read_tokenizer(open_source(model))
