"""From the options of a verb to a loaded model.

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
    name: str, how: Loading, *, context: int | None, kv: str | None = None, max_sequences: int = 1, checkpoints: int = 0
) -> Model:
    """Load a model as the options say, and tell on stderr what was left out. Raises GemcutterError."""
    import torch

    from gemcutter import api

    if how.threads is not None:
        torch.set_num_threads(how.threads)
    with progress(f"loading {name}") as advance:
        model = api.load(
            name,
            dtype=how.dtype,
            device=how.device,
            kernels=how.kernels,
            activations=how.activations,
            ignore=tuple(how.ignore or ()),
            adapter=how.adapter,
            quant=how.quant,
            repack_cache=how.repack_cache,
            ple=how.ple,
            context=context,
            kv=kv,
            max_sequences=max_sequences,
            checkpoints=checkpoints,
            progress=advance,
        )
    gc.freeze()  # what there is now stays: no collection in the token loop need look at it
    for line in model.notes:
        note(f"note: {line}")
    if context is not None and context > model.engine.context:
        note(f"note: the model was made for {model.engine.context} tokens, which bounds --context {context}")
    return model
