"""The commands under one roof, and the way every command line ends.

Owns the list of commands, `gemcutter --help` and the exit codes: 0 done (also where a reader such as `head` has left early), 1 an
error of gemcutter or of the system, 2 bad usage, 130 interrupted, 141 nobody read a verdict to its end. Refuses to know what a
command does. Read `run.py` for a whole command, `options.py` for what commands share, `failure.py` for the messages.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

import gemcutter
from gemcutter.cli import options
from gemcutter.cli.failure import UNREAD, discard_output, report
from gemcutter.cli.loading import closing_at_end
from gemcutter.cli.terminal import Volume, note, set_volume

INTRO = """
Run the Gemma 4 family: every layer holds exactly the weights that its place in the model needs.

MODEL is a folder, a .safetensors or .gguf file, a hub id such as google/gemma-4-E2B-it, a short name of one (`gemcutter models`
lists them), or "demo", the small model that comes with gemcutter.
"""
COMPLETION = "_GEMCUTTER_COMPLETE"  # set by the scripts of --show-completion
START = """\b
Start here:
  gemcutter run demo "What is a lantern?"
  gemcutter chat demo
  gemcutter inspect demo

`gemcutter COMMAND --help`, or `gemcutter help COMMAND`, explains a command's options, with examples.
"""

COMMANDS = (  # in the order of `gemcutter --help`; each is a module of this package
    *("run", "chat", "serve", "inspect", "plan", "doctor", "models", "convert", "score", "eval", "verify", "bench"),
    *("bench-serve", "tiny", "parse", "cache", "lm-eval"),
)
SHORT = {  # of what does not fit beside the others on a terminal of 80 columns
    "doctor": "Say what is in a checkpoint, and what is wrong with it.",
    "verify": "Certify that two ways of computing a model agree.",
    "bench-serve": "Put a load on a server, and measure it.",
    "lm-eval": "Run lm-eval on a model, in one process.",
    "plan": "Say what a model needs on several ranks, and how fast.",
    "bench": "Measure speed and memory beside this machine's limits.",
}
VERDICTS = ("doctor", "verify")  # whose exit code says something: it is not 0 where nobody has read the rest
# All that follows is another program's, its options among it: none of ours is looked for behind the first argument.
HANDED_OVER = {"lm-eval": {"ignore_unknown_options": True, "allow_interspersed_args": False}}


def make_app(names: Sequence[str] = COMMANDS) -> typer.Typer:
    """Make the command line of these commands, whose modules alone are imported: all of them take as long as half of torch."""
    app = typer.Typer(
        name="gemcutter",
        help=INTRO,
        epilog=START,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    )
    app.callback(invoke_without_command=True)(_top)
    for name in names:
        function = name.replace("-", "_")
        module = importlib.import_module(f"gemcutter.cli.{function}")
        command = getattr(module, function)
        app.command(
            name,
            help=module.HELP,
            short_help=SHORT.get(name),
            epilog=module.EXAMPLES,
            context_settings=HANDED_OVER.get(name),
        )(command if name in HANDED_OVER else options.with_volume(command))
    return app


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"gemcutter {gemcutter.__version__}")
        raise typer.Exit


def _top(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("-V", "--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
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
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    if words[:1] == ["bench"]:
        from gemcutter.cli.bench import join_values

        words = join_values(words)
    set_volume(Volume.NORMAL)
    warnings.showwarning = _show_warning
    try:
        if arguments is None and "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK", "0") != "0":
            return _follow()
        if COMPLETION in os.environ:
            make_app()(prog_name="gemcutter")  # a shell asks what a word may become; ends with SystemExit
        # The two steps of typer's own `app()`, without its handling of errors, which prints tracebacks and changes by version.
        app = make_app(words[:1] if words and words[0] in COMMANDS else COMMANDS)
        with closing_at_end(), typer.main.get_command(app).make_context("gemcutter", words, obj=list(words)) as context:
            context.command.invoke(context)
        print(end="", flush=True)
    except typer.Exit as end:
        return end.exit_code
    except BaseException as error:
        if isinstance(error, OSError):
            discard_output()
        code = report(error)
        return 0 if code == UNREAD and not set(words[:1]) & set(VERDICTS) else code
    return 0


def _follow() -> int:
    """Take part in the command that rank 0 runs, as one of the ranks that torchrun started; return the exit code."""
    from gemcutter.parallel.rendezvous import torchrun_rank
    from gemcutter.rank_process import follow_torchrun

    found = torchrun_rank()
    return 0 if found is None else follow_torchrun(*found)


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: object = None, line: str | None = None
) -> None:
    """Print a warning of Python's as the note that it is, without the line of source that it came from."""
    note(str(message))
