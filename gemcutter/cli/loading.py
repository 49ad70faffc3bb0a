"""From the options of a command to a loaded model.

Owns what the user sees meanwhile: a bar for long loads, and once what was left out and why. Imports torch, but only inside.
Refuses to know what the model will be asked. Read `options.py:Loading` for the options, `gemcutter/api.py` for the load itself.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from gemcutter.cli.options import Loading
from gemcutter.cli.terminal import note, progress, remark
from gemcutter.cores import core_count
from gemcutter.gc_pause import collector_paused

if TYPE_CHECKING:
    from gemcutter.api import Model

_opened = ContextVar[ExitStack | None]("opened", default=None)  # by the command that runs


@collector_paused()
def load_model(
    name: str,
    how: Loading,
    *,
    context: int | None,
    kv: str | None = None,
    max_num_seqs: int = 1,
    prefix_cache_bytes: int | None = 0,
    **more: Any,
) -> Model:
    """Load a model as the options say, and tell on stderr what was left out; `more` are other load options.

    It is closed when the command ends: other ranks are processes, and a program that calls commands goes on without them.
    Raises GemcutterError.
    """
    limits = {"context": context, "max_num_seqs": max_num_seqs, "prefix_cache_bytes": prefix_cache_bytes}
    options = how.options(name, kv=kv, **limits, **more)
    from gemcutter import api

    use_threads(how.threads)
    with progress(f"loading {name}") as advance:
        model = api.load_model(options, advance)
    close_with_command(model.close)
    gc.freeze()  # what there is now stays: no collection in the token loop need look at it
    for line in model.notes:
        note(line)
    if context is not None and context > model.engine.context:
        note(f"the model was made for {model.engine.context} tokens, which bounds --context {context}")
    remark(f"loaded in {model.load_s:.2f} s: {spell_how(model)}")
    return model


@contextmanager
def closing_at_end() -> Iterator[None]:
    """Close at the block's end, however it ends, what was loaded within it."""
    with ExitStack() as opened:
        token = _opened.set(opened)
        try:
            yield
        finally:
            _opened.reset(token)


def close_with_command(close: Callable[[], None]) -> None:
    """Call something when the command that runs now ends, however it does; outside of a command never."""
    if (opened := _opened.get()) is not None:
        opened.callback(close)


def use_threads(count: int | None) -> None:
    """Let torch, and so the kernels, use that many threads; None: its own choice, but no more than there are cores to use."""
    import torch

    cores = core_count()
    if count is None:
        if torch.get_num_threads() > cores and not os.environ.get("OMP_NUM_THREADS"):
            torch.set_num_threads(cores)
        return
    torch.set_num_threads(count)
    if count > cores:
        note(f"--threads {count} is more than the {cores} cores that this process may use, which is slower than {cores}")


def spell_how(model: Model) -> str:
    """Return how a model is computed, and how long its sequences may be."""
    from gemcutter import native

    decoder = model.decoder
    dtype = str(decoder.dtype).removeprefix("torch.")
    kernels = f"{native.level()} kernels" if decoder.backend.name == "cpu" else f"{decoder.backend.name} kernels"
    return f"{dtype} on {decoder.device}, {kernels}, context {model.engine.context} tokens"
