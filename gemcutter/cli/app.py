"""The commands under one roof, and the way every command line ends.

Owns the list of commands, `gemcutter --help` and the exit codes: 0 done, 1 an error of gemcutter or of the system, 2 bad usage,
130 interrupted. Refuses to know what a command does. Read `run.py` for a whole command, `options.py` for what commands share,
`failure.py` for the messages.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

import gemcutter
from gemcutter.cli import bench, chat, convert, doctor, inspect, run, score, tiny, verify
from gemcutter.cli.failure import discard_output, report

INTRO = """
Run the Gemma 4 family: every layer holds exactly the weights that its place in the model needs.

MODEL is a folder or a .safetensors file, a hub id such as google/gemma-4-E2B-it, or "demo", the small model that comes with
gemcutter.
"""
START = """\b
Start here:
  gemcutter run demo "What is a lantern?"
  gemcutter chat demo
  gemcutter inspect demo

`gemcutter COMMAND --help` explains a command's options, with examples.
"""

app = typer.Typer(
    name="gemcutter",
    help=INTRO,
    epilog=START,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
app.command("run", help=run.HELP, epilog=run.EXAMPLES)(run.run)
app.command("chat", help=chat.HELP, epilog=chat.EXAMPLES)(chat.chat)
app.command("inspect", help=inspect.HELP, epilog=inspect.EXAMPLES)(inspect.inspect)
app.command("doctor", help=doctor.HELP, epilog=doctor.EXAMPLES)(doctor.doctor)
app.command("convert", help=convert.HELP, epilog=convert.EXAMPLES)(convert.convert)
app.command("score", help=score.HELP, epilog=score.EXAMPLES)(score.score)
app.command("verify", help=verify.HELP, epilog=verify.EXAMPLES)(verify.verify)
app.command("bench", help=bench.HELP, epilog=bench.EXAMPLES)(bench.bench)
app.command("tiny", help=tiny.HELP, epilog=tiny.EXAMPLES)(tiny.tiny)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"gemcutter {gemcutter.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's own) and give its exit code; whatever happens is told in a message."""
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115 (a parent may have closed it; to us that is an empty one)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal's encoding may lack what a model says
            stream.reconfigure(errors="replace")
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["bench"]:
        words = bench.join_values(words)
    try:
        # The two steps of typer's own `app()`, without its handling of errors, which prints tracebacks and changes by version.
        with typer.main.get_command(app).make_context("gemcutter", words) as context:
            context.command.invoke(context)
        print(end="", flush=True)
    except typer.Exit as end:
        return end.exit_code
    except BaseException as error:
        if isinstance(error, OSError):
            discard_output()
        return report(error)
    return 0
