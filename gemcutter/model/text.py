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
from gemcutter.ops import MATRICES, NEXT_NORM, Site
from gemcutter.ops.adapt import AdapterRows, adapt
from gemcutter.ops.bind import choose, row_dtype, row_form
from gemcutter.ops.reference import Linear, Numerics, Param, Words
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
        self.is_last_writer = layer.index == plan.first_reader - 1

        attention = choose(replace(site, verb="attention", layer=layer)).provider.load()
        words = replace(words, attention=attention(layer))

        self.providers = set[str]()

        following = params.get(f"layers.{layer.index + 1}.attn.norm")
        given = self.params if following is None else {**self.params, NEXT_NORM: following}

        def sentence(verb: str) -> Callable[..., Tensor]:
            provider = choose(replace(_at(site, verb, self.params, MATRICES.get(verb, ())), layer=layer)).provider
            self.providers.add(provider.name)
            bound: Callable[..., Tensor] = provider.load()(plan, layer, given, words)
            return bound

        self.project, self.attend, self.mix = sentence("project"), sentence("attend"), sentence("mix")
        self.feed = sentence("feed")
        self.inject = sentence("inject") if layer.ple_dim else None
        self.whole: Callable[..., Tensor] | None = sentence("layer")  # all of these at once, if a provider can

    def forward(self, x_ND: Tensor, step: Step, pool: Pool, ple_MP: Tensor | None) -> Tensor:
        """Pass rows through the layer; the last writer gives back the kept rows only."""
        if self.whole is not None:
            return self.whole(x_ND, step, pool, ple_MP)
        q_MHE = self.project(x_ND, step, pool)  # norm, in-projection, q/k/v norms, rope; writes k, v iff the plan says so
        if self.is_last_writer and step.keep is not None:
            x_ND, step = x_ND[step.keep_M], step.kept()
        o_MHE = self.attend(q_MHE, step, pool)  # reads plan.kv_layer's pages through the group's table
        x_MD = self.mix(x_ND, o_MHE)  # out-projection, post-norm, residual
        x_MD = self.feed(x_MD)  # dense, or dense + experts; norms, residual
        if self.inject is not None:
            x_MD = self.inject(x_MD, ple_MP)  # per-layer-embedding gate
        return x_MD


class Decoder:
    """A Gemma 4 text decoder over a plan and its parameters (canonical names)."""

    def __init__(
        self,
        plan: ModelPlan,
        params: Mapping[str, Param],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        kernels: str = "auto",
        activations: str | None = None,
    ) -> None:
        self.plan, self.params, self.dtype, self.device = plan, params, dtype, torch.device(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # where Triton launches
        place, compute = self.device.type, _spell(dtype)
        rows = getattr(torch, row_dtype(place, compute, kernels))
        self.numerics = Numerics(dtype, rows, row_form(place, compute, kernels, activations))
        site = Site("linear", None, place, _spell(rows), compute, kernels=kernels)
        linear = _bind_linear(site, params)
        deltas = [delta for param in params.values() if isinstance(param, Weight) for delta in param.deltas]
        self.adapters = tuple(sorted({delta.adapter for delta in deltas}))
        self.adapter_rows = AdapterRows()
        self.providers = set[str]()  # of the sentences, by name
        self.ropes: dict[RopeSpec, Rope] = {layer.rope: Rope(layer.rope, self.device, rows) for layer in plan.layers}

        def end(verb: str, linear: Linear, here: Site, *names: str) -> Callable[..., Tensor]:
            provider, words = choose(_at(here, verb, params, names)).provider, Words(linear, None, self.numerics)
            self.providers.add(provider.name)
            bound: Callable[..., Tensor] = provider.load()(plan, params, words)
            return bound

        def body(linear: Linear, here: Site) -> tuple[tuple[Layer, ...], Callable[..., Tensor] | None]:
            words = Words(linear, None, self.numerics, here.adapted)
            layers = tuple(Layer(plan, layer, params, words, here) for layer in plan.layers)
            return layers, end("ple", linear, here, *MATRICES["ple"]) if plan.ple_dim else None

        self.embed, self.norm = end("embed", linear, site, *MATRICES["embed"]), end("norm", linear, site)
        self.head = end("head", linear, site, "embed.tokens" if plan.tied_head else "head")
        self.layers, self.ple = self.adapted = body(linear, site)
        self.providers.update(*(layer.providers for layer in self.layers))
        if deltas:  # steps in which some row has an adapter meet sentences of their own, so that all others lose nothing
            low_rank = choose(replace(site, dtype="float32", stored="float32")).provider.load()
            self.adapted = body(adapt(linear, low_rank, self.adapter_rows), replace(site, adapted=True))

    def forward(self, step: Step, pool: Pool, observe: Observer | None = None) -> Tensor:
        """Run a step: write its keys and values, give the final-normed states [M, D] of the rows it keeps.

        Rows whose states nobody wants stop in the last writer, once their keys and values are written; no later layer and no
        head sees them. `observe` is called with every layer's output.
        """
        cut, kept = self.plan.first_reader - 1, step.kept()
        self.adapter_rows.begin(step, kept)
        layers, embed_ple = self.adapted if any(step.adapters) else (self.layers, self.ple)

        def ple_rows(x: Tensor, rows: Step, first: int, last: int) -> Sequence[Tensor | None]:
            if embed_ple is None or first == last:
                return [None] * (last - first)
            return embed_ple(x, rows.ple_ids_N, first, last).unbind(1)

        x_ND = self.embed(step.ids_N)
        x_MD = x_ND if step.keep is None else x_ND[step.keep_M]
        if step.keep is None:
            every = ple_rows(x_ND, step, 0, len(layers))
            early, late = every[:cut], every[cut:]
        else:
            early = ple_rows(x_ND, step, 0, cut)
            late = [] if step.keeps_none else ple_rows(x_MD, kept, cut, len(layers))
        for layer, ple in zip(layers[:cut], early, strict=True):
            x_ND = layer.forward(x_ND, step, pool, ple)
            if observe is not None:
                observe(layer.plan.index, x_ND)
        if step.keeps_none:
            layers[cut].project(x_ND, step, pool)  # the last keys and values; no row goes on
            return x_MD
        x_MD = x_ND
        for layer, ple in zip(layers[cut:], late, strict=True):
            x_MD = layer.forward(x_MD, step if layer.is_last_writer else kept, pool, ple)
            if observe is not None:
                observe(layer.plan.index, x_MD)
        return self.norm(x_MD)

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


def _at(site: Site, verb: str, params: Mapping[str, Param], names: Sequence[str]) -> Site:
    """Give a sentence's site: how the matrices that it meets are stored, and whether adapters change them."""
    weights = [param for name in names if isinstance(param := params.get(name), Weight)]
    kinds = sorted({each.stored for weight in weights for each in _each_part(weight)})
    adapted = site.adapted and any(weight.deltas for weight in weights)
    return replace(site, verb=verb, stored="+".join(kinds) or site.stored, adapted=adapted)
