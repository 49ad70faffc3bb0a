"""`gemcutter lm-eval`: lm-eval's own command line, with our models among its own.

Owns the registration and the hand-over of the arguments; all else is lm-eval's. Read `gemcutter/evals/lm_eval_model.py` for the
model.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from gemcutter.cli.failure import UsageError

HELP = """
Run lm-eval (EleutherAI's lm-evaluation-harness) on a model of ours, in one process.

All arguments are lm-eval's; what is not said is `run` and `--model gemcutter`. --model_args are load options with commas between
them: model=FOLDER,dtype=float32,quant=q4_0; several media with + between them. lm-eval is installed by
`pip install 'gemcutter[lm-eval]'`.
"""
EXAMPLES = """\b
Examples:
  gemcutter lm-eval --model_args model=demo --tasks my_task --include_path tasks/
  gemcutter lm-eval ls tasks
"""
COMMANDS = ("run", "ls", "validate")

Arguments = Annotated[list[str] | None, typer.Argument(metavar="ARGUMENTS", help="lm-eval's own.", show_default=False)]


def lm_eval(arguments: Arguments = None) -> None:
    """Hand a command line over. Raises UsageError where lm-eval is not installed."""
    given = list(arguments or ())
    try:
        from lm_eval import __main__ as harness
        from lm_eval.api.registry import model_registry
    except ImportError as error:
        raise UsageError(f"lm-eval is not there ({error}); install it with: pip install 'gemcutter[lm-eval]'") from None
    from gemcutter.evals.lm_eval_model import NAME, GemcutterLM

    model_registry.register(NAME, target=GemcutterLM)
    sys.argv = ["lm-eval", *completed(given, NAME)]
    harness.cli_evaluate()


def completed(arguments: list[str], name: str) -> list[str]:
    """Return a command line with the command `run` and the model's name, unless it names others."""
    if not arguments or arguments[0] in ("-h", "--help"):
        return arguments
    command, rest = (arguments[0], arguments[1:]) if arguments[0] in COMMANDS else ("run", arguments)
    if command == "run" and not any(each in ("--model", "-M") or each.startswith("--model=") for each in rest):
        rest = ["--model", name, *rest]
    return [command, *rest]
