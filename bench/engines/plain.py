"""A transformers model of some geometry with constant weights: speed does not depend on their values.

Owns nothing but the making. The table of per-layer embeddings is not filled, so that on a CPU only what is read takes memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers

PLAIN = 0.01  # of a weight: products with it meet no denormal numbers


def make_model(raw: Mapping[str, Any], dtype: torch.dtype, device: str) -> Any:
    """Make the model of a config.json's content on a device, ready to run."""
    config = transformers.AutoConfig.for_model(**raw)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = model.to_empty(device=device).eval()
    for name, parameter in model.named_parameters():
        if "embed_tokens_per_layer" not in name:
            parameter.data.fill_(PLAIN)
    for buffer in model.buffers():
        buffer.fill_(1.0 if buffer.is_floating_point() else 0)
    model.tie_weights()
    for module in model.modules():  # buffers that are computed: rotary frequencies
        if hasattr(module, "compute_default_rope_parameters"):
            module.__init__(config, device=device)
    return model
