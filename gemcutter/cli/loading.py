"""From the options of a command to a loaded model.

Owns what the user sees meanwhile: a bar for long loads, and once what was left out and why. Imports torch, but only inside.
Refuses to know what the model will be asked. Read `options.py:Loading` for the options, `gemcutter/api.py` for the load itself.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

from gemcutter.cli.options import Loading
from gemcutter.cli.terminal import note, progress
from gemcutter.gc_pause import collector_paused

if TYPE_CHECKING:
    from gemcutter.api import Model


@collector_paused()
def load_model(
    name: str, how: Loading, *, context: int | None, kv: str | None = None, max_num_seqs: int = 1, prefix_cache_entries: int = 0
) -> Model:
    """Load a model as the options say, and tell on stderr what was left out. Raises GemcutterError."""
    limits = {"context": context, "max_num_seqs": max_num_seqs, "prefix_cache_entries": prefix_cache_entries}
    options = how.options(name, kv=kv, **limits)
    import torch

    from gemcutter import api

    if how.threads is not None:
        torch.set_num_threads(how.threads)
    with progress(f"loading {name}") as advance:
        model = api.load_model(options, advance)
    gc.freeze()  # what there is now stays: no collection in the token loop need look at it
    for line in model.notes:
        note(f"note: {line}")
    if context is not None and context > model.engine.context:
        note(f"note: the model was made for {model.engine.context} tokens, which bounds --context {context}")
    return model
