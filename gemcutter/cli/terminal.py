"""What the terminal shows beside an answer.

Owns the two lanes (stdout holds the answer alone; notes, reasoning and progress go to stderr, dimmed), how much is said in the
second one (-q, -v), and the spelling of sizes and JSON. Refuses to know models. Imports rich only when something is to be shown.
"""

from __future__ import annotations

import io
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

PATIENCE_S = 1.0  # shorter work shows no bar
UNITS = ("B", "kB", "MB", "GB", "TB")


@cache
def aside() -> Console:
    """Return the console on stderr."""
    from rich.console import Console

    return Console(stderr=True, markup=False, highlight=False, emoji=False, soft_wrap=True)


@contextmanager
def tables(width: int) -> Iterator[Console]:
    """Yield a console for tables on stdout: as wide as the terminal, or `width` in a file or pipe, without trailing blanks."""
    from rich.console import Console

    if sys.stdout.isatty():
        yield Console(markup=False, highlight=False, emoji=False)
        return
    kept = io.StringIO()
    yield Console(file=kept, width=width, markup=False, highlight=False, emoji=False)
    print("\n".join(line.rstrip() for line in kept.getvalue().splitlines()))


def new_table(title: str, *columns: str) -> Table:
    """Return an empty table; a column whose name begins with < is of text, the others are of numbers."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column.strip("<"), justify="left" if column.startswith("<") else "right", no_wrap=True)
    return table


class Volume(Enum):
    """How much is said beside an answer: only what was asked for and errors, notes too, or also how long things took."""

    QUIET = -1
    NORMAL = 0
    VERBOSE = 1


_volume = [Volume.NORMAL]


def set_volume(volume: Volume) -> None:
    """Set how much is said from now on."""
    _volume[0] = volume


def volume() -> Volume:
    """Return how much is said."""
    return _volume[0]


def say(text: str) -> None:
    """Print on stderr what was asked for: the answer to a command, a table of log-probabilities."""
    aside().print(text, style="dim")


def note(text: str) -> None:
    """Print a note on stderr, unless -q keeps them out: what the user did not ask for and should know."""
    if volume() is not Volume.QUIET:
        say(f"note: {text}")


def remark(text: str, *, on_terminal: bool = False) -> None:
    """Print how long or how fast something was: with -v; `on_terminal`, also without it where a person is looking."""
    if volume() is Volume.VERBOSE or (on_terminal and volume() is Volume.NORMAL and aside().is_terminal):
        say(text)


def print_json(found: Any) -> None:
    """Print one JSON object on stdout. JSON has neither NaN nor infinity: such numbers become null."""
    print(json.dumps(finite(found), allow_nan=False))


def finite(value: Any) -> Any:
    """Return a value as JSON can hold it: None in place of every number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    return [finite(each) for each in value] if isinstance(value, list | tuple) else value


class Answer:
    """Prints an answer as it comes: content on stdout, reasoning on stderr, each flushed at once."""

    def __init__(self) -> None:
        self._kind: Literal["content", "reasoning", "tool_call"] = "content"
        self._in_line = False

    def write(self, text: str, kind: Literal["content", "reasoning", "tool_call"] = "content") -> None:
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
    is_shown = volume() is not Volume.QUIET and sys.stderr.isatty() and aside().is_interactive
    bar: Progress | None = None
    started = time.monotonic()

    def advance(done: int, total: int) -> None:
        nonlocal bar
        spent = time.monotonic() - started
        if not is_shown or spent <= PATIENCE_S:
            return
        if bar is None:
            bar = _new_bar(title)
        bar.update(bar.task_ids[0], completed=done, total=total, left=spell_left(spent, done, total))

    try:
        yield advance
    finally:
        if bar is not None:
            bar.stop()


def _new_bar(title: str) -> Progress:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[left]}"))
    bar = Progress(*columns, console=aside(), transient=True)
    bar.add_task(title, left="")
    bar.start()
    return bar


def spell_left(spent_s: float, done: int, total: int) -> str:
    """Return how long work will still take if it goes on as it went; nothing where that can't be told."""
    if not done or done > total:
        return ""
    minutes, seconds = divmod(round(spent_s * (total - done) / done), 60)
    return f"{minutes}:{seconds:02} left"


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


def spell_drafts(drafted: int, accepted: int) -> str:
    """Format how many guessed tokens were right; nothing where none was guessed."""
    return f", {accepted} of {drafted} guesses right" if drafted else ""


def spell_tower(tower: Mapping[str, Any]) -> str:
    """Format a tower that a report describes on a line: its sizes, how it is stored, and where."""
    if tower["layers"] is None:
        return "does not load"
    stored = ", ".join(f"{row['dtype']} {spell_bytes(row['bytes'])}" for row in tower["stored"])
    sizes = f"{tower['layers']} layers, hidden {tower['hidden']}, {spell_count(tower['parameters'])} parameters"
    where = f" in {tower['file']}" if tower.get("file") else ""
    return f"{sizes}; {stored}{where}" if stored else sizes
