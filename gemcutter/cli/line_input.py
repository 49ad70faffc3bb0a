"""What a user types into a conversation: one message at a time, of one line or of several.

Owns the prompt, messages that go on over lines (a trailing backslash, blocks between three quotes, and on a terminal whatever is
pasted at once), and the history of lines between sessions. Works the same on a pipe, where it prompts for nothing. Refuses to
know commands. Read `chat.py` for what becomes of a message.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gemcutter.cli.terminal import say

HISTORY_LINES = 1000
FIRST, NEXT = "> ", "... "  # prompts of a message's first line and of the others
QUOTES = '"""'


def read_message() -> str | None:
    """Read a message of one line or of several; None at the end of the input.

    What spans lines is never a command: it begins with a space then, whatever its first letter.
    """
    line = read_line(FIRST)
    if line is None:
        return None
    if line.lstrip().startswith(QUOTES):
        return " " + _read_block(line.lstrip().removeprefix(QUOTES))
    while line.endswith("\\"):
        more = read_line(NEXT)
        line = line[:-1] + ("" if more is None else f"\n{more}")
    return f" {line}" if "\n" in line else line  # several lines that were pasted, too


def _read_block(line: str) -> str:
    """Read on until three quotes end a line, or the input ends."""
    lines = [line]
    while not lines[-1].rstrip().endswith(QUOTES):
        more = read_line(NEXT)
        if more is None:
            break
        lines.append(more)
    return "\n".join(lines).rstrip().removesuffix(QUOTES).strip("\n")


def read_line(prompt: str) -> str | None:
    """Read a line, prompting for it on a terminal; None at the end of the input. Several lines pasted there come as one."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        try:
            return input(prompt)
        except EOFError:
            say("")
            return None
    line = sys.stdin.readline()
    return line.removesuffix("\n") if line else None


@contextmanager
def line_history() -> Iterator[None]:
    """Keep the lines of all sessions in the user's state folder, on a terminal; do without where that can't be written."""
    if not sys.stdin.isatty():
        yield
        return
    try:
        import readline
    except ImportError:  # not everywhere
        yield
        return
    readline.parse_and_bind("set enable-bracketed-paste on")  # Python switches it off; another library than GNU's ignores it
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    file = Path(state) / "gemcutter" / "history"
    with suppress(OSError):
        readline.read_history_file(file)
    try:
        yield
    finally:
        readline.set_history_length(HISTORY_LINES)
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(file)
