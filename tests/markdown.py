"""The code blocks of Markdown pages: found, told apart, and their command lines run or checked.

Owns `Fence` and the marker that says why a block is not run here: `<!-- not run: REASON -->` on the line before it, where REASON
is one of `REASONS`. A line of such a block that calls gemcutter is still parsed, so that commands, options and values exist. In a
`console` block, lines after `$ ` are commands and the others what they print. Read `unit/test_guides.py` for who runs what.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from gemcutter.cli import bench
from gemcutter.cli.app import main, make_app

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
REASONS = (
    "needs a GPU",
    "downloads",
    "takes minutes",
    "needs a tool",
    "needs a server",
    "waits for input",
    "changes your files",
    "serves until it is stopped",
)
FENCE = re.compile(
    r"(?:<!-- not run: (?P<reason>[^>]*) -->\n+)?^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.DOTALL | re.MULTILINE
)
SHELL_ONLY = re.compile(r"[|<>&;$*?`]|^\w+=")  # what only a shell understands


@dataclass(frozen=True, slots=True)
class Fence:
    """One code block; `reason` says why it is not run, None that it is."""

    language: str
    body: str
    reason: str | None

    def commands(self) -> list[str]:
        """List the command lines of a `sh` or `console` block, comments and line continuations removed."""
        lines = self.body.replace("\\\n", " ").splitlines()
        if self.language == "console":
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        return [line for line in (re.split(r"(?:^|\s)#\s", line)[0].strip() for line in lines) if line]

    def examples(self) -> Iterator[tuple[str, list[str]]]:
        """Yield each command of a `console` block with the lines that it prints; "..." stands for some that are left out."""
        for part in re.split(r"^\$ ", self.body.replace("\\\n", " "), flags=re.MULTILINE)[1:]:
            command, *shown = part.splitlines()
            yield command, [line for line in shown if line.strip() not in ("", "...")]


def fences(text: str) -> list[Fence]:
    """List the code blocks of a page."""
    return [Fence(found["language"], found["body"], found["reason"]) for found in FENCE.finditer(text)]


def links(text: str) -> list[str]:
    """List the targets of a page's links that are no web addresses, without their anchors."""
    found = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [target.partition("#")[0] for target in found if not target.startswith(("http", "#", "mailto:"))]


def run(command: str, folder: Path) -> tuple[int, str]:
    """Run a command line in a folder and return its exit code and what it printed, errors included.

    A plain call of gemcutter runs within this process, which saves the import of torch; all else goes through the shell.
    """
    words = shlex.split(command)
    if words[0] != "gemcutter" or SHELL_ONLY.search(command):
        done = subprocess.run(
            command,
            shell=True,
            cwd=folder,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr
    printed, before, stdin = io.StringIO(), Path.cwd(), sys.stdin
    os.chdir(folder)
    sys.stdin = io.StringIO()
    try:
        with redirect_stdout(printed), redirect_stderr(printed):
            code = main(words[1:])
    finally:
        os.chdir(before)
        sys.stdin = stdin
    return code, printed.getvalue()


def parse(command: str) -> None:
    """Parse every call of gemcutter in a command line without running it. Raises click's UsageError for what does not exist."""
    group: Any = typer.main.get_command(make_app())
    for part in re.split(r"\s\|\s|\s&&\s", command):
        words = [word for word in shlex.split(part.split(" > ")[0].split(" < ")[0]) if not re.match(r"[A-Z_]+=", word)]
        words = words[next((index for index, word in enumerate(words) if word.endswith("gemcutter")), len(words)) + 1 :]
        if words[:1] == ["bench"]:
            words = bench.join_values(words)
        if words and words[0] != "--version":
            known = group.get_command(None, words[0])
            assert known is not None, f"{command}: there is no command {words[0]}"
            known.make_context(words[0], words[1:])
