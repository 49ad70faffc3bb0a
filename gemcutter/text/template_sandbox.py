"""The Jinja that chat templates are written for, with limits: a template is foreign code, and a hostile one must end soon.

Owns the dialect (transformers': its settings, the `generation` tag, `tojson`, `raise_exception`, `strftime_now`) and the limits:
turns of loops and calls of one rendering, and the size of every text and list that it makes. Nothing that can be large is
computed while a template is compiled. Refuses to know messages and tokens. Read `chat.py` for who renders.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from functools import wraps
from itertools import islice
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes, pass_context
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_SOURCE = 1 << 20  # characters of a template; the released ones have some 20,000
MAX_TURNS = 1_000_000  # of loops and calls together, in one rendering
CALL_TURNS = 5
MAX_SIZE = 1 << 24  # characters of a text, entries of a list
MAX_PRINTED = 1 << 20  # entries of lists in lists that are printed
MAX_NUMBER = 10_000  # of widths, counts and indents
MAX_EXPONENT = 64
HUGE_WIDTH = re.compile(r"[0-9]{5,}|\*")  # in a format string
COUNTED, JOINED = "_counted", "_joined"  # filters that compiling puts in
# Filters that take a container as it is; all others may print it, and lists can hold one list many times.
OF_CONTAINERS = frozenset(
    """
    attr batch count d default dictsort first groupby items last length list map max min random reject rejectattr reverse select
    selectattr slice sort sum unique
    """.split()  # noqa: SIM905
)
GROWING_METHODS = frozenset(("center", "expandtabs", "join", "ljust", "replace", "rjust", "translate", "zfill"))


class TemplateLimitError(jinja2.TemplateError):
    """A template that computes more than any conversation needs."""


_turns_left: ContextVar[list[int] | None] = ContextVar("turns_left", default=None)


@contextmanager
def limited_turns() -> Iterator[None]:
    """Let what is rendered within share one budget of turns."""
    token = _turns_left.set([MAX_TURNS])
    try:
        yield
    finally:
        _turns_left.reset(token)


class GenerationTag(Extension):
    """`{% generation %}`: marks the model's own words for training on them; it renders as what it holds."""

    tags = {"generation"}  # noqa: RUF012 (declared so by jinja2)

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the tag's body, in a scope of its own, as transformers has it."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _concat(pieces: Iterable[str]) -> str:
    """Join what a template, a macro or a block puts out."""
    found, size = list[str](), 0
    for piece in pieces:
        found.append(piece)
        size += len(piece)
        _check_size(size)
    return "".join(found)


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of all chat templates."""

    intercepted_binops = frozenset(("**", "*", "+", "%"))
    concat = staticmethod(_concat)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationTag], finalize=_printed
        )
        self.filters["tojson"] = _to_json
        self.filters.update({name: _guarded(name, function) for name, function in self.filters.items()})
        self.filters.update({COUNTED: _counted, JOINED: _joined})
        self.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now, lipsum=_lipsum)

    def compile_limited(self, source: str) -> tuple[jinja2.Template, nodes.Template]:
        """Return a compiled template and its syntax tree. Raises jinja2.TemplateError, and whatever absurd nesting leads to."""
        if len(source) > MAX_SOURCE:
            raise TemplateLimitError(f"it has {len(source):,} characters, above {MAX_SOURCE:,}")
        tree = self.parse(source)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = _filter(loop.iter, COUNTED)
        for joint in list(tree.find_all(nodes.Concat)):
            joint.nodes = [_filter(nodes.List(joint.nodes, lineno=joint.lineno), JOINED)]
        return self.from_string(tree), tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Apply an operator whose result can be much larger than its operands."""
        if operator == "**" and max(abs(left), abs(right)) > MAX_EXPONENT:
            raise TemplateLimitError("it raises to an absurd power")
        if operator == "*":
            _check_product(*((left, right) if hasattr(left, "__len__") else (right, left)))
        if operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            _check_size(len(left) + len(right))
        if operator == "%" and isinstance(left, str):
            _check_format(left, [right])
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function, a macro or a method; each call is a turn, and so is each entry that a recursive loop is given."""
        entries = args[0] if isinstance(obj, LoopContext) and args else ()
        _spend(CALL_TURNS + (len(entries) if hasattr(entries, "__len__") else 0))
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(owner, str | bytes) and name in GROWING_METHODS:
            _check_growth(name, owner, [*args, *kwargs.values()])
        return super().call(context, obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return what runs instead of `str.format` and `str.format_map`, None for anything else."""
        safe = super().wrap_str_format(value)
        if safe is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> str:
            _check_format(str(value.__self__), [*args, *kwargs.values()])
            return str(safe(*args, **kwargs))

        return checked


def _filter(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


# ---- limits ----


def _spend(turns: int) -> None:
    left = _turns_left.get()
    if left is not None:
        left[0] -= turns
        if left[0] < 0:
            raise TemplateLimitError(f"it takes more than {MAX_TURNS:,} turns of loops and calls")


def _check_size(size: int) -> None:
    if size > MAX_SIZE:
        raise TemplateLimitError(f"it makes a text or list of more than {MAX_SIZE:,} characters or entries")


def _check_product(sized: Any, times: Any) -> None:
    if hasattr(sized, "__len__") and isinstance(times, int):
        _check_size(len(sized) * times)
    elif any(isinstance(number, int) and number.bit_length() > MAX_NUMBER for number in (sized, times)):
        raise TemplateLimitError("it multiplies absurd numbers")


def _check_printed(value: object) -> None:
    """Raise TemplateLimitError for a container that would print as a huge text: it may hold one entry many times."""
    if not isinstance(value, list | tuple | dict | set | frozenset):
        return
    waiting: list[Any] = [value]
    entries = size = 0
    while waiting:
        found = waiting.pop()
        entries, size = entries + 1, size + (len(found) if isinstance(found, str | bytes) else 0)
        _check_size(max(size, (entries + len(waiting)) * (MAX_SIZE // MAX_PRINTED)))
        if isinstance(found, Mapping):
            waiting += [*found.keys(), *found.values()]
        elif isinstance(found, list | tuple | set | frozenset):
            waiting += found


def _check_format(text: str, values: Sequence[object]) -> None:
    if HUGE_WIDTH.search(text) or any(isinstance(value, int) and "{" in text and value > MAX_NUMBER for value in values):
        raise TemplateLimitError("it formats to an absurd width")
    for value in values:
        _check_printed(value)


def _check_growth(name: str, text: str | bytes, values: Sequence[Any]) -> None:
    """Raise TemplateLimitError for a method or filter that would make a huge text of `text`."""
    numbers = [value for value in values if isinstance(value, int)]
    if name == "format":
        _check_format(str(text), values)
    elif any(number > MAX_NUMBER for number in numbers) or name == "translate":
        raise TemplateLimitError(f"{name}: a width or count above {MAX_NUMBER:,}")
    if name in ("expandtabs", "indent", "wordwrap"):
        lines = sum(text.count(mark) for mark in ("\t", "\n")) if isinstance(text, str) else len(text)
        longest = max((len(value) for value in values if isinstance(value, str)), default=0)
        _check_size((lines + 1) * max([longest, 8, *numbers]) + len(text) * (1 + longest) // 8)
    if name == "replace" and len(values) > 1:
        old, new = values[:2]
        _check_size(len(text) + text.count(old) * len(new))
    if name == "join" and values:
        _check_joined(values[0], len(text))


def _check_joined(entries: Any, between: int) -> None:
    size = 0
    for entry in entries if isinstance(entries, list | tuple | dict | set) else ():
        size += between + (len(entry) if hasattr(entry, "__len__") else 1)
        _check_size(size)


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter that refuses to make huge texts and lists."""
    skipped = int(getattr(function, "jinja_pass_arg", None) is not None)  # an environment or a context comes first

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        value, more = args[skipped] if len(args) > skipped else None, [*args[skipped + 1 :], *kwargs.values()]
        if name == "sum" and isinstance(value, list | tuple):
            _check_joined(value, 0)
        if name not in OF_CONTAINERS:
            _check_printed(value)
        if name == "join":
            _check_joined(value, max((len(each) for each in more if isinstance(each, str)), default=0))
        elif name in ("center", "indent", "wordwrap", "format", "replace", "truncate") and isinstance(value, str):
            _check_growth(name, value, more)
        elif any(isinstance(each, int) and each > MAX_NUMBER for each in more):
            raise TemplateLimitError(f"{name}: a width or count above {MAX_NUMBER:,}")
        return function(*args, **kwargs)

    return guarded


@pass_context  # which keeps it from being computed while a template is compiled
def _counted(_: Context, entries: Iterable[Any]) -> list[Any]:
    """Return what a loop runs over, paid for."""
    left = _turns_left.get()
    found = list(islice(entries, (MAX_TURNS if left is None else left[0]) + 1))
    _spend(len(found))
    return found


def _joined(pieces: Sequence[Any]) -> str:
    """Return texts joined by `~`."""
    for piece in pieces:
        _check_printed(piece)
    return _concat(map(str, pieces))


# ---- what templates may call ----


def _printed(value: Any) -> Any:
    """Print None as `null`: templates before July 2026 print arguments as they are, and the model never saw Python's spelling."""
    _check_printed(value)
    return "null" if value is None else value


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Replace Jinja's own filter, which escapes `<`, `>` and `&` for HTML."""
    if isinstance(indent, int) and indent > 16:
        raise TemplateLimitError("tojson: an indent above 16")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    if len(format) > MAX_NUMBER or HUGE_WIDTH.search(format):
        raise TemplateLimitError("strftime_now: an absurd format")
    return datetime.now().strftime(format)


def _lipsum(*_: object, **__: object) -> NoReturn:
    raise TemplateLimitError("lipsum makes random text, which no conversation needs")
