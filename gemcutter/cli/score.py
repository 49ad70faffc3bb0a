"""`gemcutter score`: how well a model predicts a text.

Owns the options, and the reading of texts and ids from files. Refuses to know how windows are cut and predicted: read
`gemcutter/evals/perplexity.py` for that.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemcutter.cli import options
from gemcutter.cli.failure import UsageError
from gemcutter.cli.loading import load_model
from gemcutter.cli.measured import describe_model
from gemcutter.cli.run import read_stdin
from gemcutter.cli.terminal import print_json, progress, spell_rate
from gemcutter.errors import RequestError
from gemcutter.evals import perplexity
from gemcutter.evals.perplexity import WINDOW, Window, cut

if TYPE_CHECKING:
    from gemcutter.api import Model

HELP = """
Give the perplexity of a text.

That is exp(mean negative log-likelihood in nats per token); both are shown, with the standard error that they would have if
tokens were independent of each other.

FILE ("-", or none, is stdin) is cut into windows: <bos> and the next TOKENS - 1 tokens, starting where the window before ended.
Every window is predicted on its own, so every token of the text counts once, with what stands before it in its window as context.
With --stride S, windows start every S tokens instead; the tokens that a window shares with the one before are context and don't
count again, so that more context costs more time. Numbers can be compared only between equal windows.

--tokens-file holds JSON: a list of ids, or a list of such lists, each of which is one window as it is, <bos> included or not.
All tokens but the first of a window are predicted. With --window or --stride, a single list is cut like a text.
"""
EXAMPLES = """\b
Examples:
  gemcutter score demo README.md
  gemcutter score demo README.md --window 1024 --stride 512 --json
  gemcutter score demo --tokens-file windows.json --dtype float32
"""
BATCH = 8  # windows in flight

File = Annotated[str | None, typer.Argument(metavar="FILE", help='UTF-8 text; "-" is stdin.', show_default=False)]
TokensFile = Annotated[Path | None, typer.Option(metavar="FILE", help="Token ids as JSON in place of text.")]
WindowOption = Annotated[
    int | None,
    typer.Option("--window", metavar="TOKENS", min=2, help=f"Length of a window, <bos> included.  [default: {WINDOW}]"),
]
Stride = Annotated[
    int | None, typer.Option(metavar="S", min=1, help="Tokens from one window's start to the next.  [default: TOKENS - 1]")
]


@options.spread
def score(
    model: options.Model,
    file: File = None,
    *,
    tokens_file: TokensFile = None,
    window: WindowOption = None,
    stride: Stride = None,
    as_json: options.Json = False,
    loading: options.Loading,
    kv: options.Kv = None,
) -> None:
    """Score one text and print the result. Raises UsageError or GemcutterError."""
    if file is not None and tokens_file is not None:
        raise UsageError("give either FILE or --tokens-file, not both")
    if file is None and tokens_file is None:
        if sys.stdin.isatty():
            raise UsageError("missing FILE; give a file, --tokens-file, or text on stdin")
        file = "-"
    length = window or WINDOW
    step = stride or length - 1
    if step > length - 1:
        raise UsageError(f"--stride {step} would skip tokens between windows of {length}; give at most {length - 1}")
    text = None if file is None else read_text(file)
    lists = [] if tokens_file is None else read_lists(tokens_file)
    is_cut = text is not None or window is not None or stride is not None
    if is_cut and len(lists) > 1:
        raise UsageError("--window and --stride cut a text or one list of ids; several lists are windows already")
    longest = length if is_cut else max(map(len, lists))
    loaded = load_model(model, loading, context=longest, kv=kv, max_num_seqs=BATCH)
    if longest > loaded.engine.context:
        raise RequestError(f"a window of {longest} tokens does not fit the model's context of {loaded.engine.context}")
    windows = [Window(tuple(ids)) for ids in lists]
    if is_cut:
        body = lists[0] if text is None else loaded.tokenizer.encode(text, bos=True)
        windows = list(cut(body, loaded.tokenizer.bos_id, length, step))
    found = measure(loaded, windows) | {"window": length if is_cut else None, "stride": step if is_cut else None}
    if as_json:
        print_json(found | {"measured": describe_model(loaded, model, loading)})
    else:
        show(found)


# ---- what is scored ----


def read_text(file: str) -> str:
    """Read the text to score. Raises RequestError."""
    if file == "-":
        return read_stdin()
    try:
        return Path(file).read_bytes().decode("utf-8")
    except OSError as error:
        raise RequestError(f"{file} can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"{file} is not valid UTF-8 (byte {error.start}); convert it first") from None


def read_lists(file: Path) -> list[list[int]]:
    """Read a file of ids, one list or several, none of them empty. Raises RequestError."""
    try:
        found = json.loads(file.read_bytes())
    except OSError as error:
        raise RequestError(f"{file} can't be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{file} is not JSON: {error}") from None
    if _are_ids(found):
        return [found]
    if not isinstance(found, list) or not found or not all(map(_are_ids, found)):
        raise RequestError(f"{file}: expected a list of token ids, or a list of such lists")
    return found


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


# ---- the score ----


def measure(model: Model, windows: Sequence[Window]) -> dict[str, Any]:
    """Predict all windows, BATCH at a time. Raises RequestError for ids out of range, or if nothing is left to predict."""
    num_tokens = sum(window.counted for window in windows)
    if not num_tokens:
        raise RequestError("nothing to score: a window needs at least two tokens, the first of which is not predicted")
    started, found = time.perf_counter(), list[float]()
    with progress("scoring") as advance:
        for of_window in perplexity.losses(model.loop, windows, BATCH):
            found += of_window
            advance(len(found), num_tokens)
    likelihood = perplexity.mean_of(found)
    return {
        "nll_mean": likelihood.nll,
        "nll_standard_error": likelihood.nll_error,
        "perplexity": likelihood.perplexity,
        "perplexity_standard_error": likelihood.perplexity_error,
        "tokens": num_tokens,
        "windows": len(windows),
        "seconds": time.perf_counter() - started,
    }


def show(found: dict[str, Any]) -> None:
    """Print the result for a reader."""
    how = "as given"
    if found["window"] is not None:
        how = f"of up to {found['window']} tokens, <bos> included, {found['stride']} apart; every token counts once"
    print(f"nll         {found['nll_mean']:.4f} +/- {found['nll_standard_error']:.4f} nats per token")
    print(f"perplexity  {found['perplexity']:.3f} +/- {found['perplexity_standard_error']:.3f}")
    print(f"tokens      {found['tokens']} predicted ({spell_rate(found['tokens'], found['seconds'])})")
    print(f"windows     {found['windows']}, {how}")
