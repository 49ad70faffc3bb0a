"""transformers as the other side of a comparison, in float32, where it is installed.

Owns all that this package knows of that library: it is imported by name, here and only when it is asked for, and never needed to
run a model. The weights are read by transformers itself, so that a loader's mistake shows as well. Read `trace.py` for our side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemcutter.checkpoint.container.shard_index import SINGLE_NAME
from gemcutter.errors import CheckpointError, RequestError
from gemcutter.parity.trace import Trace

INSTALL = "pip install 'transformers>=5.23', which gemcutter's extra \"verify\" names"


def check(path: Path) -> str:
    """Return the version of transformers that would read a checkpoint. Raises RequestError if there is none, or it can't."""
    try:
        library = import_module("transformers")
    except ImportError as error:
        raise RequestError(f"--against transformers: it can't be imported here ({error}); {INSTALL}") from None
    if path.is_file() and path.name != SINGLE_NAME:
        raise RequestError(f"--against transformers: it reads folders that hold {SINGLE_NAME} or its shards, not {path.name}")
    return str(library.__version__)


@torch.inference_mode()
def trace(folder: Path, ids: Sequence[int], kept_K: Tensor) -> Trace:
    """Run ids through transformers, all at once. Raises CheckpointError if it can't load or run the model."""
    library = import_module("transformers")
    library.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
    try:
        model, report = library.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True, output_loading_info=True
        )
        if report["missing_keys"]:  # it would fill them with random numbers
            raise ValueError(f"it misses {len(report['missing_keys'])} tensors, such as {min(report['missing_keys'])}")
        # Asked to record states, transformers leaves out its own skipping of rows: every row passes every layer.
        model.config.get_text_config().output_hidden_states = True
        return _run(model.eval(), ids, kept_K)
    except Exception as error:  # whatever it is, it is the other library's
        reason = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"{folder}: transformers {library.__version__} can't run it ({type(error).__name__}: {reason}); "
            "compare with --against reference, or with the original checkpoint"
        ) from error


def _run(model: Any, ids: Sequence[int], kept_K: Tensor) -> Trace:
    decoder = model.get_decoder()
    layers, states = list[Tensor](), list[Tensor]()

    def note(into: list[Tensor], rows: Tensor | slice) -> Callable[..., None]:
        return lambda module, inputs, output: into.append(
            (output[0] if isinstance(output, tuple) else output).view(len(ids), -1)[rows]
        )

    hooks = [layer.register_forward_hook(note(layers, kept_K)) for layer in decoder.layers]
    hooks.append(decoder.norm.register_forward_hook(note(states, slice(None))))
    last_V = model(input_ids=torch.tensor([ids]), use_cache=False, logits_to_keep=1).logits[0, -1]
    for hook in hooks:
        hook.remove()
    found = Trace(tuple(layers), states[0], _head(model))
    if not torch.allclose(found.logits(len(ids) - 1, len(ids))[0], last_V, rtol=1e-5, atol=1e-5):
        raise ValueError("its logits are not made of its final states as they are here")
    return found


def _head(model: Any) -> Callable[[Tensor], Tensor]:
    """Return the head alone, so that the rest of the model can go."""
    weight_VD: Tensor = model.get_output_embeddings().weight.detach()
    cap = model.config.get_text_config().final_logit_softcapping

    def head(h_RD: Tensor) -> Tensor:
        logits_RV = h_RD @ weight_VD.t()
        return logits_RV if cap is None else (logits_RV / cap).tanh() * cap

    return head
