"""What is measured: a decoder from a file, or one of a released geometry with synthetic weights.

Owns how long it took to load, and who drafts for it; the way there is `loading.py`'s, the same as for every other use of a model.
Refuses to know tests. Read `synthetic.py` for synthetic weights, `drafts.py` for what drafts are worth.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from gemcutter.benchmark import synthetic
from gemcutter.benchmark.drafts import MEASURED, DraftSetup
from gemcutter.benchmark.memory import forget_peak
from gemcutter.benchmark.planned_model import from_checkpoint
from gemcutter.benchmark.roofline import HasBytes
from gemcutter.checkpoint.container.source import Source
from gemcutter.checkpoint.load.match import Checkpoint
from gemcutter.engine.speculate.speculator import Speculator
from gemcutter.load_options import LoadOptions, check_dtype
from gemcutter.loading import OpenModel, cache_dtype, find_device, make_decoder, open_model
from gemcutter.model.drafter import Drafter
from gemcutter.model.text import Decoder
from gemcutter.ops.registry import CPU, select_backend
from gemcutter.plan import ModelPlan
from gemcutter.quant import Weight
from gemcutter.quant.packed import dtype_name


@dataclass(frozen=True, slots=True)
class BenchTarget:
    """A decoder, what it is called, how long it took to load, and from where; None where nothing was loaded from a file."""

    name: str
    quant: str
    how: LoadOptions
    decoder: Decoder
    load_s: float | None
    checkpoint: Checkpoint | None = None
    drafts: DraftSetup | None = None  # who drafts in tests of replies, if somebody does
    notes: tuple[str, ...] = ()  # what loading left out, and what an option costs

    @property
    def plan(self) -> ModelPlan:
        """Return the decoder's plan, of all stages where it is one of several."""
        return self.decoder.plan.all_stages

    @property
    def weights(self) -> Mapping[str, HasBytes]:
        """Return what the plan's parameters take: those that are here, or, where others are in other stages, as planned."""
        decoder, checkpoint = self.decoder, self.checkpoint
        if decoder.plan.stage is None or checkpoint is None:
            return decoder.params
        whole = replace(checkpoint, plan=decoder.plan.whole or decoder.plan)
        compute = dtype_name(decoder.dtype)
        return from_checkpoint(self.name, whole, compute, decoder.device.type, self.how.quant).weights(self.plan)

    @property
    def source(self) -> Source | None:
        """Return the files that the model was loaded from."""
        return None if self.checkpoint is None else self.checkpoint.source

    @property
    def kv_dtype(self) -> torch.dtype:
        """Return the dtype of keys and values."""
        return cache_dtype(self.how.kv) or self.decoder.dtype

    def close(self) -> None:
        """End the decoder's other ranks."""
        if self.decoder.leader is not None:
            self.decoder.leader.close()


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
    """Load a checkpoint as `gemcutter.load` does, without tokenizer and templates. Raises GemcutterError.

    Repacked weights are kept only if that was asked for: nothing is to be written while speed is measured.
    """
    how = replace(how, repack_cache=bool(how.repack_cache))
    started = time.perf_counter()
    opened = open_model(how)
    weights = [param for param in opened.decoder.params.values() if isinstance(param, Weight)]
    kinds = {Weight((part,)).stored for weight in weights for part in weight.parts}
    stored = sorted({CPU.unpacked(kind) for kind in kinds})  # as the file has it, not as kernels want it
    took_s = time.perf_counter() - started
    return BenchTarget(
        how.model, ", ".join(stored), how, opened.decoder, took_s, opened.checkpoint, _drafts(opened), tuple(opened.notes)
    )


def _drafts(opened: OpenModel) -> DraftSetup | None:
    """Return who drafts as the options say, None where nobody does."""
    speculator, how = opened.speculator(), opened.options
    if speculator is None:
        return None
    drafter = opened.drafter.decoder if isinstance(opened.drafter, Drafter) else opened.drafter
    about = {
        "kind": MEASURED,
        "speculate": how.speculate or "auto",
        "draft_model": how.draft_model if drafter is not None else None,
        "draft_tokens": how.draft_tokens,
    }

    def make() -> Speculator:
        found = opened.speculator()
        assert found is not None
        return found

    return DraftSetup(make, about, nbytes=0 if drafter is None else sum(param.nbytes for param in drafter.params.values()))
