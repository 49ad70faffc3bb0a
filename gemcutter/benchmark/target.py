"""What is measured: a decoder from a file, or one of a released geometry with synthetic weights.

Owns the way there, as `load` takes it but without tokenizer and templates, and how long it took. Refuses to know tests. Read
`synthetic.py` for synthetic weights, `gemcutter/api.py` for the load that users see.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from gemcutter.api import check_activations, check_device, check_dtype
from gemcutter.benchmark import synthetic
from gemcutter.benchmark.memory import forget_peak
from gemcutter.checkpoint.load.load_params import load_params
from gemcutter.checkpoint.load.match import open_checkpoint
from gemcutter.checkpoint.remote.hub import locate
from gemcutter.errors import RequestError
from gemcutter.model.text import Decoder
from gemcutter.ops.bind import triton_refusal
from gemcutter.ops.reference import Param
from gemcutter.plan import ModelPlan
from gemcutter.quant import Weight


@dataclass(frozen=True, slots=True)
class Compute:
    """How to compute, in the words of `gemcutter.load`; None is its default."""

    kernels: str = "auto"
    dtype: str | None = None
    activations: str | None = None
    device: str = "cpu"

    @property
    def is_native(self) -> bool:
        """Return whether the native kernels serve. Raises KernelError for activations that would be ignored."""
        return check_activations(self.activations, check_device(self.device), self.kernels)


@dataclass(frozen=True, slots=True)
class BenchTarget:
    """A decoder, what it is called, and how long it took to load; None where nothing was loaded from a file."""

    name: str
    quant: str
    how: Compute
    decoder: Decoder
    load_s: float | None

    @property
    def plan(self) -> ModelPlan:
        """Return the decoder's plan."""
        return self.decoder.plan


def from_preset(preset: str, quant: str, layers: int | None, how: Compute) -> BenchTarget:
    """Make a model of a size's geometry, or of its first layers. Raises ConfigError for names that are none."""
    plan = synthetic.plan_of(preset, layers)
    params = synthetic.make_params(plan, quant, cpu_packed=how.is_native, device=check_device(how.device))
    forget_peak()  # of making what others load
    name = preset if layers is None else f"{preset}, {layers} layers"
    return BenchTarget(name, quant, how, _decode(plan, params, how, how.dtype or "bfloat16"), None)


def from_file(model: str, how: Compute) -> BenchTarget:
    """Load a checkpoint. Raises CheckpointError, ConfigError, and RequestError for one that can't run alone."""
    started = time.perf_counter()
    checkpoint = open_checkpoint(locate(model))
    if checkpoint.plan.is_drafter:
        raise RequestError(f"{model} is an assistant, which can't run alone; measure its target instead")
    dtype = how.dtype or checkpoint.config.dtype
    device = check_device(how.device)
    gpu_packed = triton_refusal(device.type, how.kernels) is None
    params = load_params(checkpoint, check_dtype(dtype), device, cpu_packed=how.is_native, gpu_packed=gpu_packed)
    decoder = _decode(checkpoint.plan, params, how, dtype)
    stored = sorted({param.stored for param in params.values() if isinstance(param, Weight)})
    return BenchTarget(model, ", ".join(stored), how, decoder, time.perf_counter() - started)


def _decode(plan: ModelPlan, params: dict[str, Param], how: Compute, dtype: str) -> Decoder:
    return Decoder(plan, params, check_dtype(dtype), check_device(how.device), how.kernels, how.activations)
