"""The decoder: embed, layers, head. A page to read aloud.

Owns the order of a layer's sentences and the dropping of rows; refuses to know which kernels run them, where keys are stored
and what a request is. Every fact about a layer comes from its plan. Shape letters: N rows, M kept rows, R rows for the head, D
hidden, H heads, E head dim, V vocabulary, P per-layer-embedding dim. Read `ops/reference.py` for the sentences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gemcutter.model.rope import Rope
from gemcutter.ops import Site
from gemcutter.ops.adapt import AdapterRows, adapt
from gemcutter.ops.bind import choose
from gemcutter.ops.reference import Linear, Param, Words, rms_norm, vector
from gemcutter.ops.step import Pool, Step
from gemcutter.plan import LayerPlan, ModelPlan, RopeSpec
from gemcutter.quant import Weight

Observer = Callable[[int, Tensor], None]  # layer index and its output rows


class Layer:
    """One decoder layer: bound sentences over exactly the parameters that its plan names."""

    def __init__(self, plan: ModelPlan, layer: LayerPlan, params: Mapping[str, Param], words: Words, site: Site) -> None:
        prefix = f"layers.{layer.index}."
        self.plan = layer
        self.params = {name.removeprefix(prefix): param for name, param in params.items() if name.startswith(prefix)}
        self.scale = float(vector(self.params, "scale"))
        self.is_last_writer = layer.index == plan.first_reader - 1

        def sentence(verb: str) -> Callable[..., Tensor]:
            provider = choose(_at(site, verb)).provider
            bound: Callable[..., Tensor] = provider.load()(plan, layer, self.params, words)
            return bound

        self.project, self.attend, self.mix = sentence("project"), sentence("attend"), sentence("mix")
        self.feed = sentence("feed")
        self.inject = sentence("inject") if layer.ple_dim else None

    def forward(self, x_ND: Tensor, step: Step, pool: Pool, ple_MP: Tensor | None) -> Tensor:
        """Pass rows through the layer; the last writer gives back the kept rows only."""
        q_MHE = self.project(x_ND, step, pool)  # norm, in-projection, q/k/v norms, rope; writes k, v iff the plan says so
        if self.is_last_writer and step.keep_M is not None:
            x_ND, step = x_ND[step.keep_M], step.kept()
        o_MHE = self.attend(q_MHE, step, pool)  # reads plan.kv_layer's pages through the group's table
        x_MD = self.mix(x_ND, o_MHE)  # out-projection, post-norm, residual
        x_MD = self.feed(x_MD)  # dense, or dense + experts; norms, residual
        if self.inject is not None:
            x_MD = self.inject(x_MD, ple_MP)  # per-layer-embedding gate
        return x_MD * self.scale


class Decoder:
    """A Gemma 4 text decoder over a plan and its parameters (canonical names)."""

    def __init__(
        self,
        plan: ModelPlan,
        params: Mapping[str, Param],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        kernels: str = "auto",
    ) -> None:
        self.plan, self.params, self.dtype, self.device = plan, params, dtype, torch.device(device)
        site = Site("linear", None, self.device.type, _spell(dtype), _spell(dtype), invariant=kernels == "reference")
        linear = _bind_linear(site, params)
        deltas = [delta for param in params.values() if isinstance(param, Weight) for delta in param.deltas]
        self.adapters = tuple(sorted({delta.adapter for delta in deltas}))
        self.adapter_rows = AdapterRows()
        if deltas:
            low_rank = choose(replace(site, dtype="float32", stored="float32")).provider.load()
            linear = adapt(linear, low_rank, self.adapter_rows)
        attention = choose(_at(site, "attention")).provider.load()
        self.layers = tuple(Layer(plan, layer, params, Words(linear, attention(layer)), site) for layer in plan.layers)
        self.ropes: dict[RopeSpec, Rope] = {layer.rope: Rope(layer.rope, self.device, dtype) for layer in plan.layers}

        def sentence(verb: str) -> Callable[..., Tensor]:
            bound: Callable[..., Tensor] = choose(_at(site, verb)).provider.load()(plan, params, Words(linear), dtype)
            return bound

        self.embed = sentence("embed")
        self.ple = sentence("ple") if plan.ple_dim else None
        self.head = sentence("head")
        self.norm = vector(params, "norm")

    def forward(self, step: Step, pool: Pool, observe: Observer | None = None) -> Tensor:
        """Run a step: write its keys and values, give the final-normed states [M, D] of the rows it keeps.

        Rows whose states nobody wants stop in the last writer, once their keys and values are written; no later layer and no
        head sees them. `observe` is called with every layer's output.
        """
        cut, kept = self.plan.first_reader - 1, step.kept()
        self.adapter_rows.begin(step, kept)
        x_ND = self.embed(step.ids_N)
        x_MD = x_ND if step.keep_M is None else x_ND[step.keep_M]
        late = self._ple(x_MD, kept, cut, len(self.layers)) if not step.keeps_none else []
        for layer, ple in zip(self.layers[:cut], self._ple(x_ND, step, 0, cut), strict=True):
            x_ND = layer.forward(x_ND, step, pool, ple)
            if observe is not None:
                observe(layer.plan.index, x_ND)
        if step.keeps_none:
            self.layers[cut].project(x_ND, step, pool)  # the last keys and values; no row goes on
            return x_MD
        x_MD = x_ND
        for layer, ple in zip(self.layers[cut:], late, strict=True):
            x_MD = layer.forward(x_MD, step if layer.is_last_writer else kept, pool, ple)
            if observe is not None:
                observe(layer.plan.index, x_MD)
        return rms_norm(x_MD, self.norm, self.plan.eps)

    def _ple(self, x_ND: Tensor, step: Step, first: int, last: int) -> Sequence[Tensor | None]:
        """Give the per-layer embeddings [N, P] of layers first to last - 1, or Nones where the model has none."""
        if self.ple is None or first == last:
            return [None] * (last - first)
        return self.ple(x_ND, step.ple_ids_N, first, last).unbind(1)

    def logits(self, h_RD: Tensor) -> Tensor:
        """Give the soft-capped logits [R, V] of final-normed states, in float32."""
        return self.head(h_RD)

    def rope_tables(self, positions_N: Tensor) -> dict[RopeSpec, tuple[Tensor, Tensor]]:
        """Give the rotary tables of a step's positions, one pair a distinct spec."""
        return {spec: rope.tables(positions_N) for spec, rope in self.ropes.items()}


def _bind_linear(site: Site, params: Mapping[str, Param]) -> Linear:
    """Choose the kernel of every kind of stored weight once; a call then only looks it up."""
    kinds = {part.stored for param in params.values() if isinstance(param, Weight) for part in (param, *_each_part(param))}
    table = {stored: choose(replace(site, stored=stored)).provider.load() for stored in kinds}
    if len(table) == 1:
        (only,) = table.values()
        return only
    return lambda x_ND, weight: table[weight.stored](x_ND, weight)


def _each_part(weight: Weight) -> Iterator[Weight]:
    """List the parts apart, as some sentences multiply with them: q without k and v, say."""
    yield from (Weight((part,)) for part in weight.parts)


def _spell(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _at(site: Site, verb: str) -> Site:
    return replace(site, verb=verb)
