"""From the options of a verb to a loaded model.

Owns what the user sees meanwhile: a bar for long loads, and once what was left out and why. Imports torch, but only inside.
Refuses to know what the model will be asked. Read `gemcutter/api.py` for the load itself.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gemcutter.cli.terminal import note, progress
from gemcutter.pause import collector_paused

if TYPE_CHECKING:
    from gemcutter.api import Model


@collector_paused()
def load_model(
    name: str,
    *,
    dtype: str | None,
    device: str,
    kernels: str,
    context: int | None,
    threads: int | None,
    ignore: Sequence[str] | None,
    max_sequences: int = 1,
    checkpoints: int = 0,
    adapter: str | None = None,
    quant: str | None = None,
    activations: str | None = None,
    repack_cache: bool = False,
    ple: str | None = None,
    kv: str | None = None,
) -> Model:
    """Load a model as the options say, and tell on stderr what was left out. Raises GemcutterError."""
    import torch

    from gemcutter import api

    if threads is not None:
        torch.set_num_threads(threads)
    with progress(f"loading {name}") as advance:
        model = api.load(
            name,
            dtype=dtype,
            device=device,
            kernels=kernels,
            context=context,
            max_sequences=max_sequences,
            checkpoints=checkpoints,
            ignore=tuple(ignore or ()),
            adapter=adapter,
            quant=quant,
            activations=activations,
            repack_cache=repack_cache,
            ple=ple,
            kv=kv,
            progress=advance,
        )
    gc.freeze()  # what there is now stays: no collection in the token loop need look at it
    for line in model.notes:
        note(f"note: {line}")
    if context is not None and context > model.engine.context:
        note(f"note: the model was made for {model.engine.context} tokens, which bounds --context {context}")
    return model
