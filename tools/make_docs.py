"""Writes docs/cli.md and docs/api.md: the help of every command as a reader sees it, and the public names with their docstrings.

`make docs` writes them, `make lint` calls `--check`, which fails when they are stale. Nothing in them depends on the machine, the
terminal or the version of Python. How help is laid out does depend on typer, whose version docs/cli.md therefore names; where
another one is installed, that page is not compared. Refuses to hold any text about a command or a name: that is the code's.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from types import FunctionType
from typing import Any, get_overloads, is_typeddict

ROOT = Path(__file__).parents[1]
WIDTH = 112  # columns of the terminal for which help is laid out
SIGNATURE_WIDTH = 100
HINT = "<!-- written by `make docs`; do not edit -->"


def cli_page() -> str:
    """Return docs/cli.md."""
    os.environ |= {"COLUMNS": str(WIDTH), "TERM": "dumb", "NO_COLOR": "1"}
    import typer

    from gemcutter.cli.app import make_app

    group: Any = typer.main.get_command(make_app())
    top = group.make_context("gemcutter", [], resilient_parsing=True)
    parts = ["# The command line", f"{HINT}\n<!-- typer {minor_version(typer.__version__)} -->"]
    parts.append("What `gemcutter --help` and `gemcutter COMMAND --help` print, one by one. [guide/](guide) shows them at work.")
    parts.append(_fence("text", top.get_help()))
    for name in group.list_commands(top):
        command = group.get_command(top, name)
        context = command.make_context(name, [], parent=top, resilient_parsing=True)
        parts += [f"## gemcutter {name}", _fence("text", context.get_help())]
    return "\n\n".join(parts) + "\n"


def minor_version(version: str) -> str:
    """Return the first two numbers of a version."""
    return ".".join(version.split(".")[:2])


def api_page() -> str:
    """Return docs/api.md."""
    import gemcutter

    intro = (
        "Every name that `import gemcutter` offers. Names resolve when they are first used, so that the import itself costs no "
        "torch. What begins with an underscore, and what is not listed here, may change in any release."
    )
    names = sorted(gemcutter.__all__, key=lambda name: (not name[0].islower(), name))
    parts = ["# The Python API", HINT, textwrap.fill(intro, 120), _contents(names)]
    for name in names:
        parts += list(_describe(name, getattr(gemcutter, name)))
    return "\n\n".join(parts) + "\n"


def _contents(names: list[str]) -> str:
    links = " · ".join(f"[{name}](#{name.lower()})" for name in names)
    return textwrap.fill(links, 120, break_long_words=False, break_on_hyphens=False)


def _describe(name: str, thing: Any) -> Iterator[str]:
    """Yield the Markdown of one public name."""
    yield f"## {name}"
    if isinstance(thing, FunctionType):
        yield _fence("python", _signature(name, thing))
        yield _prose(thing)
        return
    if not isinstance(thing, type):  # an alias of a type
        yield _fence("python", f"{name} = {thing}")
        return
    if issubclass(thing, Exception):
        yield _fence("python", f"class {name}({', '.join(base.__name__ for base in thing.__bases__)})")
        yield _prose(thing)
        return
    if dataclasses.is_dataclass(thing) or is_typeddict(thing) or issubclass(thing, Enum):
        bases = [base.__name__ for base in getattr(thing, "__orig_bases__", thing.__bases__) if base is not object]
        heading = f"class {name}({', '.join(bases)}):" if bases else f"class {name}:"
        yield _fence("python", "\n".join([heading, *_fields(thing)]))
    elif getattr(thing, "_is_protocol", False):
        yield _fence("python", f"class {name}(Protocol): ...")
    else:
        yield _fence("python", f"class {_signature(name, inspect.getattr_static(thing, '__init__'), drop_self=True)}")
    yield _prose(thing)
    for member, value in vars(thing).items():
        if (not member.startswith("_") or member == "__call__") and (_is_method(value) or isinstance(value, property)):
            yield from _member(name, member, value)


def _is_method(value: object) -> bool:
    return isinstance(value, FunctionType | classmethod | staticmethod)


def _member(owner: str, name: str, value: Any) -> Iterator[str]:
    """Yield the Markdown of one method or property."""
    yield f"### {owner}.{name}".replace("_", r"\_")
    if isinstance(value, property):
        assert value.fget is not None
        yield _fence("python", f"{name}: {inspect.signature(value.fget).return_annotation}")
        yield _prose(value.fget)
        return
    function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
    versions = get_overloads(function) or [function]
    yield _fence("python", "\n".join(_signature(name, version, drop_self=True) for version in versions))
    yield _prose(function)


def _signature(name: str, function: Callable[..., Any], drop_self: bool = False) -> str:
    """Return a signature as code, one parameter a line where it is long."""
    found = inspect.signature(inspect.unwrap(function))
    parameters = list(found.parameters.values())
    if drop_self and parameters and parameters[0].name in ("self", "cls"):
        found = found.replace(parameters=parameters[1:])
    returned = "" if found.return_annotation in (inspect.Signature.empty, "None") else f" -> {found.return_annotation}"
    bare = str(found.replace(return_annotation=inspect.Signature.empty)).replace("'", "")
    bare = re.sub(r"= ([A-Za-z_][\w./-]*)", lambda match: f"= {_literal(match[1], found)}", bare)
    if len(name) + len(bare) + len(returned) <= SIGNATURE_WIDTH:
        return f"{name}{bare}{returned}"
    lines = [f"    {line}," for line in _split(bare[1:-1])]
    return "\n".join([f"{name}(", *lines, f"){returned}"])


def _literal(text: str, signature: inspect.Signature) -> str:
    """Put quotes around a default that is a string."""
    strings = {parameter.default for parameter in signature.parameters.values() if isinstance(parameter.default, str)}
    return f'"{text}"' if text in strings else text


def _split(parameters: str) -> list[str]:
    """Cut a parameter list at its own commas, not at those within brackets."""
    found, depth = [""], 0
    for letter in parameters:
        depth += (letter in "[({") - (letter in "])}")
        if letter == "," and not depth:
            found.append("")
        else:
            found[-1] += letter
    return [part.strip() for part in found]


def _fields(thing: type) -> list[str]:
    """Return the lines of a class's fields or members as its source has them, comments included."""
    module = importlib.import_module(thing.__module__)
    source = Path(str(module.__file__)).read_text()
    (node,) = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == thing.__name__]
    lines = source.splitlines()
    return [
        line
        for field in node.body
        if isinstance(field, ast.AnnAssign | ast.Assign)
        for line in lines[field.lineno - 1 : field.end_lineno or field.lineno]
    ]


def _prose(thing: Any) -> str:
    """Return a docstring as Markdown: paragraphs wrapped anew, indented examples as code."""
    parts = []
    for part in inspect.cleandoc(thing.__doc__ or "").split("\n\n"):
        if part.startswith("    "):
            parts.append(_fence("python", textwrap.dedent(part)))
        else:
            text = re.sub(r"(?<!`)<(?=\w)", r"\<", " ".join(part.split()))  # <bos> is no HTML
            parts.append(textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False))
    return "\n\n".join(parts)


def _fence(language: str, text: str) -> str:
    lines = [line.rstrip() for line in text.strip("\n").splitlines()]
    return "\n".join([f"```{language}", *lines, "```"])


def is_stale(path: Path, made: str) -> bool:
    """Return whether a page differs from what would be written; one made with another typer is not compared."""
    found = path.read_text() if path.exists() else ""
    versions = [re.search(r"<!-- typer (\S+) -->", text) for text in (found, made)]
    if versions[0] and versions[1] and versions[0][1] != versions[1][1]:
        print(f"{path.relative_to(ROOT)}: made with typer {versions[0][1]}, {versions[1][1]} is installed: not compared")
        return False
    return found != made


def main() -> int:
    """Write the pages, or with --check say which are stale; return the exit code."""
    sys.path.insert(0, str(ROOT))
    pages = {ROOT / "docs" / "cli.md": cli_page(), ROOT / "docs" / "api.md": api_page()}
    if sys.argv[1:] == ["--check"]:
        stale = [str(path.relative_to(ROOT)) for path, made in pages.items() if is_stale(path, made)]
        if stale:
            print(f"stale: {', '.join(stale)}; run `make docs` and commit what it writes", file=sys.stderr)
        return bool(stale)
    if sys.argv[1:]:
        print("usage: tools/make_docs.py [--check]", file=sys.stderr)
        return 2
    for path, made in pages.items():
        path.write_text(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
