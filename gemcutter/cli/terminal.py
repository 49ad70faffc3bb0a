"""What the terminal shows beside an answer.

Owns the two lanes (stdout holds the answer alone; notes, reasoning and progress go to stderr, dimmed) and the spelling of sizes.
Refuses to know models. Imports rich only when something is to be shown.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.console import Console

PATIENCE_S = 1.0  # shorter work shows no bar
UNITS = ("B", "kB", "MB", "GB", "TB")


@cache
def aside() -> Console:
    """Return the console on stderr."""
    from rich.console import Console

    return Console(stderr=True, markup=False, highlight=False, emoji=False, soft_wrap=True)


def note(text: str) -> None:
    """Print a note on stderr, apart from the answer."""
    aside().print(text, style="dim")


class Answer:
    """Prints an answer as it comes: content on stdout, reasoning on stderr, each flushed at once."""

    def __init__(self) -> None:
        self._kind: Literal["content", "reasoning"] = "content"
        self._in_line = False

    def write(self, text: str, kind: Literal["content", "reasoning"] = "content") -> None:
        """Print a stretch of text, on a new line where reasoning ends or begins."""
        if not text:
            return
        if kind != self._kind:
            self.end()
            self._kind = kind
        if kind == "content":
            print(text, end="", flush=True)
        else:
            aside().print(text, end="", style="dim")
        self._in_line = not text.endswith("\n")

    def end(self) -> None:
        """End the line, if one is open."""
        if self._in_line:
            print(file=sys.stdout if self._kind == "content" else sys.stderr, flush=True)
        self._in_line = False


@contextmanager
def progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """Return a function of (done, all) that draws a bar on stderr, once the work has lasted a while and only on a terminal."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=aside(), transient=True, disable=not aside().is_interactive)
    task, started = bar.add_task(title), time.monotonic()

    def advance(done: int, total: int) -> None:
        if time.monotonic() - started > PATIENCE_S:
            bar.start()
        bar.update(task, completed=done, total=total)

    try:
        yield advance
    finally:
        bar.stop()


def spell_bytes(count: float) -> str:
    """Format a number of bytes with three digits: 812 B, 23.0 MB, 10.2 GB."""
    exponent = 0
    while count >= 999.5 and exponent < len(UNITS) - 1:
        count, exponent = count / 1000, exponent + 1
    decimals = 0 if exponent == 0 or count >= 99.95 else 1 if count >= 9.995 else 2
    return f"{count:.{decimals}f} {UNITS[exponent]}"


def spell_count(count: float) -> str:
    """Format a large number in billions or millions: 2.30 B, 11.5 M."""
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"


def spell_work(flops: float) -> str:
    """Format a number of floating-point operations: 44.7 GFLOP, 18.5 TFLOP."""
    return f"{flops / 1e12:.3g} TFLOP" if flops >= 1e12 else f"{flops / 1e9:.3g} GFLOP"


def spell_rate(tokens: int, seconds: float) -> str:
    """Format tokens a second."""
    return f"{tokens / seconds:.1f} tokens/s" if tokens and seconds else "- tokens/s"
