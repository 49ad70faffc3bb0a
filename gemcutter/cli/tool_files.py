"""Tools from a file: Python functions, or declarations in JSON.

Owns the reading of the file that --tools names. Refuses to know models and how calls are run. Read `gemcutter/tools.py` for
declarations.
"""

from __future__ import annotations

import inspect
import json
import runpy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from gemcutter.errors import RequestError, spell_value

Tools = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Tools that the model may call: a .py file, whose functions they are, or a .json file with a list of declarations.",
    ),
]


@dataclass(frozen=True, slots=True)
class ToolFile:
    """The declarations of a file in OpenAI's layout, and the functions that it brings, by name."""

    declarations: list[dict[str, Any]]
    functions: dict[str, Any]

    @property
    def names(self) -> list[str]:
        """Return the names of all tools."""
        return [each["function"]["name"] for each in self.declarations]


def read_tools(path: Path) -> ToolFile:
    """Read a file of tools. A .py file is run as a program is. Raises OSError, or RequestError for what holds no tools."""
    from gemcutter.tools import declarations

    found = _functions_of(path) if path.suffix == ".py" else _declared_in(path)
    if not found:
        raise RequestError(f"{path}: no tools in it; expected functions (.py), or a JSON list of declarations")
    declared = declarations(found)
    problems = [f"{path}[{place}]: {problem}" for place, each in enumerate(declared) if (problem := _problem(each))]
    if problems:
        raise RequestError(f"{path}: tools that can't be used", problems)
    return ToolFile(declared, {each.__name__: each for each in found if callable(each)})


def _functions_of(path: Path) -> list[Any]:
    """Return the public functions that a file defines itself."""
    path.open().close()  # a missing file is told as such
    try:
        names = runpy.run_path(str(path), run_name=path.stem)
    except Exception as error:  # whatever the program raises
        raise RequestError(f"{path}: the program failed: {type(error).__name__}: {error}") from error
    own = (value for name, value in names.items() if inspect.isfunction(value) and not name.startswith("_"))
    return [value for value in own if value.__code__.co_filename == str(path)]


def _declared_in(path: Path) -> list[Any]:
    """Return the declarations in a JSON file: a list, an object whose `tools` is one, or schemas by name."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} is not JSON: {error}") from None
    if isinstance(found, dict) and isinstance(found.get("tools"), list):
        found = found["tools"]
    if isinstance(found, dict):
        return [{"name": name, "parameters": schema} for name, schema in found.items()]
    if not isinstance(found, list):
        raise RequestError(f"{path}: expected a JSON list of tools, found {spell_value(found)}")
    return found


def _problem(declared: Any) -> str | None:
    function = declared.get("function") if isinstance(declared, dict) else None
    if isinstance(function, dict) and isinstance(function.get("name"), str):
        return None
    return f"expected a declaration with a name and parameters, found {spell_value(declared)}"
