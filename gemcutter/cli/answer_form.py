"""The options that say what form an answer must have, and which tools must or may be called.

Owns their names and checks, and the reading of the files that they name. Refuses to know grammars. Read
`gemcutter/text/grammar.py` for what constraints mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemcutter.cli.failure import UsageError
from gemcutter.errors import RequestError

if TYPE_CHECKING:
    from gemcutter.text.grammar import Constraint

CHOICES = ("auto", "none", "required")


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """What the answer must be; one of them at most."""

    json_schema: Annotated[
        Path | None, typer.Option("--json-schema", metavar="FILE", help="Make the answer JSON that this schema allows.")
    ] = None
    regex: Annotated[
        str | None, typer.Option("--regex", metavar="PATTERN", help="Make the answer a text that matches from end to end.")
    ] = None
    choice: Annotated[
        list[str] | None,
        typer.Option("--choice", metavar="TEXT", help="Make the answer this text or another --choice; repeatable."),
    ] = None
    grammar: Annotated[
        Path | None, typer.Option("--grammar", metavar="FILE", help="Make the answer a text of this grammar, in Lark.")
    ] = None

    def constraint(self) -> Constraint | None:
        """Return the constraint that is asked for. Raises UsageError for more than one, OSError or RequestError for bad files."""
        given = {
            "--json-schema": self.json_schema,
            "--regex": self.regex,
            "--choice": self.choice or None,
            "--grammar": self.grammar,
        }
        names = [name for name, value in given.items() if value is not None]
        if len(names) > 1:
            raise UsageError(f"give one of {' and '.join(names)}: an answer has one form")
        if not names:
            return None
        from gemcutter.text.grammar import Constraint

        if self.json_schema is not None:
            return Constraint("json_schema", _read(self.json_schema))
        if self.grammar is not None:
            return Constraint("lark", _read(self.grammar))
        return Constraint("regex", self.regex) if self.regex is not None else Constraint("choice", tuple(self.choice or ()))


ToolChoice = Annotated[
    str | None,
    typer.Option(
        "--tool-choice",
        metavar="auto|none|required|NAME",
        help="Whether the model may or must call a tool, or the one that it must call.  [default: auto]",
    ),
]


def read_tool_choice(choice: str | None, declared: Sequence[Mapping[str, Any]] | None) -> str | dict[str, str]:
    """Return a tool choice as a request has it. Raises UsageError for one without tools, and for a name that is not declared."""
    if choice is None:
        return "auto"
    if declared is None:
        raise UsageError("--tool-choice is about the tools of --tools; give both")
    names = [str(each["function"]["name"]) for each in declared]
    if choice not in (*CHOICES, *names):
        raise UsageError(f"--tool-choice: expected {', '.join((*CHOICES, *names))}, found {choice!r}")
    return choice if choice in CHOICES else {"name": choice}


def _read(path: Path) -> str:
    """Return the text of a file. Raises OSError, or RequestError if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not valid UTF-8 (byte {error.start}); convert it first") from None
