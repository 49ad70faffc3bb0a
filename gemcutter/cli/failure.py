"""What a failed command line says, and the exit code it ends with.

Owns the words for errors that are no GemcutterError: bad usage (with the names that other programs use for the same options),
interrupts, closed pipes, full disks, lack of memory, and the unexpected. Never shows a traceback unless GEMCUTTER_DEBUG is set.
Read `gemcutter/errors.py` for the errors that explain themselves.
"""

from __future__ import annotations

import os
import sys
import traceback

import typer

from gemcutter.errors import GemcutterError

FAILED, MISUSED, INTERRUPTED, UNREAD = 1, 2, 130, 141  # the last as the shell spells the end by SIGPIPE
DEBUG = "GEMCUTTER_DEBUG"
ALLOCATORS = ("can't allocate memory", "out of memory")  # how torch words what Python calls a MemoryError

# What llama.cpp, Ollama, mlx-lm and transformers call what has another name or place here.
ELSEWHERE = {
    "--temp": "--temperature",
    "--max-new-tokens": "--max-tokens",
    "--n-predict": "--max-tokens",
    "--predict": "--max-tokens",
    "--num-predict": "--max-tokens",
    "--ctx-size": "--context",
    "--max-model-len": "--context",
    "--max-kv-size": "--context",
    "--lora": "--adapter",
    "--adapter-path": "--adapter",
    "--sys": "--system",
    "--system-prompt": "--system",
    "--system-prompt-file": '--system "$(cat FILE)"',
    "--repeat-penalty": "--repetition-penalty",
    "--threads-batch": "--threads",
    "--cache-type-k": "--kv",
    "--kv-bits": "--kv",
    "--model": "MODEL, the first argument",
    "--prompt": "PROMPT, the argument after MODEL",
    "--file": "stdin: gemcutter run MODEL < FILE",
    "--prompt-file": "stdin: gemcutter run MODEL < FILE",
    "-m": "MODEL, the first argument",
    "-p": "PROMPT, the argument after MODEL",
    "-f": "stdin: gemcutter run MODEL < FILE",
    "-c": "--context",
    "-s": "--seed",
}

# The class that all errors of usage share. Typer exports only this child of it, and has moved the parent between its versions.
UsageError: type[Exception] = typer.BadParameter.__bases__[0]


def report(error: BaseException) -> int:
    """Print what went wrong on stderr and give the exit code."""
    if isinstance(error, UsageError):
        return _tell(_usage(error), MISUSED)
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return _tell("", INTERRUPTED)
    if isinstance(error, BrokenPipeError):
        return UNREAD  # whoever read the output has gone, and so has the reason to speak
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else FAILED if error.code else 0
    if os.environ.get(DEBUG):
        traceback.print_exception(error)
        return FAILED
    return _tell(f"error: {describe(error)}", FAILED)


def describe(error: BaseException) -> str:
    """Describe in words what an error means and what to do about it."""
    if isinstance(error, GemcutterError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else f"input or output failed: {error.strerror or error}"
    if isinstance(error, MemoryError) or any(words in str(error) for words in ALLOCATORS):
        return "out of memory; lower --context, or choose a smaller model (`gemcutter inspect MODEL` shows what one needs)"
    return f"{type(error).__name__}: {_one_line(str(error))} (unexpected; set {DEBUG}=1 to see the traceback)"


def discard_output() -> None:
    """Send what stdout still holds nowhere, so that the interpreter's last flush can't fail once more."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError, AttributeError):
        return  # no stdout of the process's own


def _usage(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "gemcutter"
    unknown = getattr(error, "option_name", None) if hasattr(error, "possibilities") else None
    if meant := _meant(unknown, context):
        message = f"No such option: {unknown}. Did you mean {meant}?"
    else:
        message = _one_line(error.format_message() if hasattr(error, "format_message") else str(error))
    return f"error: {message}{'' if message.endswith(('.', '?')) else '.'} See {command} --help."


def _meant(unknown: str | None, context: typer.Context | None) -> str | None:
    """Return what a command calls an option that other programs have under this name; None where it has none such."""
    meant = ELSEWHERE.get(unknown or "")
    if meant is None or context is None:
        return None
    if meant.startswith("--"):
        there = {option for parameter in context.command.params for option in parameter.opts}
        return meant if meant.split()[0] in there else None
    return meant if context.info_name == "run" or meant.startswith("MODEL") else None


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _tell(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code
