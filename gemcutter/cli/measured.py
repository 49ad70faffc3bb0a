"""What a result belongs to: the part of a command's JSON that tells one measurement from another.

Owns its names, which `run`, `score` and `bench` share. Refuses to know what was measured. Read
`gemcutter/checkpoint/doctor/fingerprint.py` for what identifies a checkpoint without reading all of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gemcutter
from gemcutter import native

if TYPE_CHECKING:
    from gemcutter.api import Model
    from gemcutter.checkpoint.container.source import Source
    from gemcutter.cli.options import Loading


def describe_model(model: Model, name: str, how: Loading) -> dict[str, Any]:
    """Return which model gave a result, and how it was computed."""
    decoder = model.decoder
    return {
        "model": name,
        "sampled_sha256": fingerprint(model.checkpoint.source),
        "format": model.checkpoint.format,
        "quant": how.quant,
        "adapter": how.adapter,
        "dtype": str(decoder.dtype).removeprefix("torch."),
        "activations": decoder.precision.activations,
        "device": str(decoder.device),
        "kernels": how.kernels,
        "backend": decoder.backend.name,
        "level": native.level() if decoder.backend.name == "cpu" else None,
        "gemcutter": gemcutter.__version__,
    }


def fingerprint(source: Source) -> str:
    """Return the hash over a checkpoint's headers and a sample of its bytes that `verify` gives, too."""
    from gemcutter.checkpoint.doctor.fingerprint import sampled_sha256

    return sampled_sha256(source)
