"""What is measured: a decoder from a file, or one of a released geometry with synthetic weights.

Owns how long it took to load; the way there is `loading.py`'s, the same as for every other use of a model. Refuses to know tests.
Read `synthetic.py` for synthetic weights.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from gemcutter.benchmark import synthetic
from gemcutter.benchmark.memory import forget_peak
from gemcutter.checkpoint.container.source import Source
from gemcutter.load_options import LoadOptions, check_dtype
from gemcutter.loading import find_device, make_decoder, open_model
from gemcutter.model.text import Decoder
from gemcutter.ops.registry import CPU, select_backend
from gemcutter.plan import ModelPlan
from gemcutter.quant import Weight


@dataclass(frozen=True, slots=True)
class BenchTarget:
    """A decoder, what it is called, how long it took to load, and from where; None where nothing was loaded from a file."""

    name: str
    quant: str
    how: LoadOptions
    decoder: Decoder
    load_s: float | None
    source: Source | None = None
    notes: tuple[str, ...] = ()  # what loading left out, and what an option costs

    @property
    def plan(self) -> ModelPlan:
        """Return the decoder's plan."""
        return self.decoder.plan

    @property
    def kv_dtype(self) -> torch.dtype:
        """Return the dtype of keys and values."""
        return self.decoder.dtype if self.how.kv is None else torch.float8_e4m3fn


def from_preset(preset: str, quant: str, layers: int | None, how: LoadOptions) -> BenchTarget:
    """Make a model of a size's geometry, or of its first layers. Raises ConfigError for names that are none."""
    plan, device = synthetic.plan_of(preset, layers), find_device(how)
    dtype = getattr(torch, check_dtype(how.dtype or "bfloat16"))
    packer = select_backend(device.type, how.kernels).packer(device, dtype)
    params = synthetic.make_params(plan, quant, packer, device)
    forget_peak()  # of making what others load
    name = preset if layers is None else f"{preset}, {layers} layers"
    return BenchTarget(name, quant, how, make_decoder(plan, params, how, dtype, device), None)


def from_file(how: LoadOptions) -> BenchTarget:
    """Load a checkpoint as `gemcutter.load` does, without tokenizer and templates. Raises GemcutterError."""
    started = time.perf_counter()
    opened = open_model(how)
    weights = [param for param in opened.decoder.params.values() if isinstance(param, Weight)]
    kinds = {Weight((part,)).stored for weight in weights for part in weight.parts}
    stored = sorted({CPU.unpacked(kind) for kind in kinds})  # as the file has it, not as kernels want it
    took_s = time.perf_counter() - started
    source = opened.checkpoint.source
    return BenchTarget(how.model, ", ".join(stored), how, opened.decoder, took_s, source, tuple(opened.notes))
