"""The decoder: embed, layers, LM head. A page to read aloud.

Owns the order of a layer's ops and the dropping of rows; refuses to know which kernels run them, where keys are stored and what a
request is. Every fact about a layer comes from its plan. Shape letters: N rows, M rows that go on after the last writer, R rows
for the head, D hidden, H heads, E head dim, V vocabulary, P per-layer-embedding dim. Read `ops/reference.py` for the ops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gemcutter.errors import RankError
from gemcutter.model.pipeline import BegunStep, LayerInputs, Observer, Pipeline
from gemcutter.model.rope import Rope
from gemcutter.ops import KernelSite
from gemcutter.ops.registry import KernelPlan, select_backend, select_kernel
from gemcutter.ops.step import KVCache, Rotation, Step, prepare
from gemcutter.ops.types import AdapterDeltas, LayerOutput, Linear, OpContext, Param, Precision, Ranks, StepLeader, matrix
from gemcutter.plan import LayerPlan, ModelPlan, RopeSpec
from gemcutter.quant import Weight
from gemcutter.quant.carried import adapters_of, carry, carrying_weights, without_adapter, without_deltas
from gemcutter.quant.packed import dtype_name

NO_CONTEXT = nullcontext()


class Layer:
    """One decoder layer: bound ops over exactly the parameters that its plan names."""

    def __init__(
        self,
        plan: ModelPlan,
        layer: LayerPlan,
        params: Mapping[str, Param],
        ctx: OpContext,
        kernels: KernelPlan,
        next_norm: Tensor | None,
    ) -> None:
        prefix = f"layers.{layer.index}."
        self.plan = layer
        self.params = {name.removeprefix(prefix): param for name, param in params.items() if name.startswith(prefix)}
        self.kernels: dict[str, str] = {}  # the name of each op's implementation

        def bind(op: str, **more: Tensor | None) -> Any:
            impl = select_kernel(kernels.at(op, layer)).impl
            self.kernels[op] = impl.name
            return impl.load()(plan, layer, self.params, ctx, **more)

        self.qkv, self.attention, self.attn_out, self.mlp = bind("qkv"), bind("attention"), bind("attn_out"), bind("mlp")
        self.ple_gate = bind("ple_gate") if layer.ple_dim else None
        self.fused: Callable[..., LayerOutput] | None = bind(
            "layer", next_norm=next_norm
        )  # all of these at once, if a kernel can

    def forward(
        self, x_ND: Tensor, step: Step, cache: KVCache, ple_MP: Tensor | None, normed_ND: Tensor | None = None
    ) -> LayerOutput:
        """Pass rows through the layer: [N, D] to [M, D], fewer rows in the layer that drops those whose states nobody wants.

        `normed_ND` is the rows' norm if the layer before has made it; returned is also that of the next layer, or None.
        """
        if self.fused is not None:
            return self.fused(x_ND, step, cache, ple_MP, normed_ND)
        q_MHE = self.qkv(x_ND, step, cache)  # norm, in-projection, q/k/v norms, RoPE; writes k, v iff the plan says so
        if self.plan.drops_rows and step.kept is not None:
            x_ND, step = x_ND[step.logit_rows_M], step.kept
        o_MHE = self.attention(q_MHE, step, cache)  # reads plan.kv_layer's pages through the group's block table
        x_MD = self.attn_out(x_ND, o_MHE, step.adapter_rows)  # out-projection, post-norm, residual
        x_MD = self.mlp(x_MD, step.adapter_rows)  # dense, or dense + experts; norms, residual
        if self.ple_gate is not None:
            x_MD = self.ple_gate(x_MD, ple_MP, step.adapter_rows)  # per-layer-embedding gate
        return x_MD, None


@dataclass(frozen=True, slots=True, eq=False)
class AdaptedBody:
    """What runs steps in which some row has an adapter: the decoder's own ops, but where a weight carries deltas.

    `version` counts the sets of adapters that a decoder has had.
    """

    params: Mapping[str, Param]
    adapters: tuple[str, ...]
    layers: tuple[Layer, ...]
    ple_embed: Callable[..., Tensor] | None
    version: int = 0


class Decoder:
    """A Gemma 4 text decoder over a plan and its parameters (canonical names), whose weights may carry adapters' deltas.

    `params` are those without deltas. Steps without adapters run over them, by ops that are bound once and know no adapter;
    `adapted` runs all other steps, and is replaced as a whole when adapters come and go. `adapters` names those that change
    nothing here, but a tower, and that sequences may ask for all the same. Of a rank's plan the decoder holds a slice, and
    `ranks` are the others; each of them runs the same steps, of which `leader`, in the first, tells them. Of a stage's plan it
    holds some layers, and `pipeline` leads to the others.
    """

    def __init__(
        self,
        plan: ModelPlan,
        params: Mapping[str, Param],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        kernels: str = "auto",
        activations: str | None = None,
        adapters: Iterable[str] = (),
        ranks: Ranks | None = None,
        leader: StepLeader | None = None,
        pipeline: Pipeline | None = None,
    ) -> None:
        self.ranks, self.leader, self.pipeline = ranks, leader, pipeline
        self.plan, self.params, self.dtype, self.device = plan, without_deltas(params), dtype, torch.device(device)
        self._is_on_gpu = self.device.type == "cuda"
        self.backend = select_backend(self.device.type, kernels)
        compute = dtype_name(dtype)
        rows = getattr(torch, self.backend.row_dtype(compute))
        self.precision = Precision(dtype, rows, self.backend.activations(compute, activations))
        self.ropes: dict[RopeSpec, Rope] = {layer.rope: Rope(layer.rope, self.device, rows) for layer in plan.layers}
        self._attn_kinds = plan.attn_kinds()

        how = "" if ranks is None else "group" if ranks.view is None else "native"
        site = KernelSite("linear", None, self.device.type, dtype_name(rows), compute, kernels, ranks=how)
        self.kernel_plan = KernelPlan(plan, site, self._stored)
        self.op_context = ctx = OpContext(bind_linear(self.params.values(), site), self.precision, ranks=ranks)
        self.kernels: dict[str, str] = {}
        if plan.has_ends:
            self._bind_ends(ctx, ranks)
        self._next_norms = self._following_norms()
        self.layers = tuple(self._bind_layer(layer, self.params, ctx, self.kernel_plan) for layer in plan.own_layers)
        self.ple_embed: Callable[..., Tensor] | None = None
        if plan.ple_dim and plan.has_ends:
            self.kernels["ple_embed"] = select_kernel(self.kernel_plan.at("ple_embed")).impl.name
            self.ple_embed = self._bind("ple_embed", self.params, ctx, self.kernel_plan)
        self.adapted = self._bind_adapted(params, tuple(sorted({*adapters, *adapters_of(params)})), 0)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Return the names of the adapters that a sequence's rows may ask for; any thread may ask."""
        return self.adapted.adapters

    @property
    def kernel_names(self) -> frozenset[str]:
        """Return the names of all implementations that were selected for layer ops and model ops."""
        return frozenset(self.kernels.values()).union(*(layer.kernels.values() for layer in self.layers))

    def capture_refusal(self) -> str | None:
        """Return why the decoder's steps can't be captured as CUDA graphs; None if they can."""
        if self.pipeline is not None:
            return "rows pass from stage to stage through the host"
        table = self.params.get("embed.ple")
        assert table is None or isinstance(table, Weight)
        return self.backend.capture_refusal(self.device, self.kernel_names, table)

    # ---- what is computed ----

    def prepare(self, step: Step) -> Step:
        """Complete a step for this decoder's kernels; steps that pass `forward` have been prepared."""
        return prepare(step, lambda rows: self.backend.attn_metadata(rows, self._attn_kinds))

    def on_device(self) -> AbstractContextManager[object]:
        """Make the decoder's GPU the current one, where Triton launches; a no-op on a CPU."""
        return torch.cuda.device(self.device) if self._is_on_gpu else NO_CONTEXT

    def forward(self, step: Step, cache: KVCache, observe: Observer | None = None) -> Tensor:
        """Run a prepared step: write its keys and values, return the final-normed states [M, D] of the rows that go on.

        `observe` is called with every layer's output.
        """
        if self.pipeline is not None:
            return self.pipeline.finish(self, self.pipeline.begin(self, step, cache, observe))
        with self.together(lambda leader: leader.step(step, cache)), self.on_device():
            return self.run_layers(self.embed_rows(step), step, cache, observe)

    @property
    def most_begun(self) -> int:
        """Return how many steps are worth beginning before the first of them is finished: one a stage."""
        return 1 if self.pipeline is None else self.pipeline.stages

    def begin(self, step: Step, cache: KVCache) -> BegunStep:
        """Begin a prepared step: what other stages can do meanwhile is under way then."""
        return BegunStep(step, cache) if self.pipeline is None else self.pipeline.begin(self, step, cache)

    def finish(self, begun: BegunStep) -> Tensor:
        """Return what `forward` would of a step that was begun; steps are finished in the order in which they were begun."""
        if self.pipeline is None:
            return self.forward(begun.step, begun.cache)
        return self.pipeline.finish(self, begun)

    def finish_all(self) -> None:
        """Complete all steps that were begun: from then on nothing writes to a cache but what is begun later."""
        if self.pipeline is not None:
            self.pipeline.finish_all(self)

    def embed_rows(self, step: Step) -> Tensor:
        """Return what enters the first layer: the embeddings of tokens, and what stands in their place."""
        x_ND = self.embed(step.ids_N)
        if step.media is not None:
            x_ND[step.media.rows_K] = step.media.embeds_KD.to(x_ND.dtype)
        return x_ND

    def run_layers(self, x_ND: Tensor, step: Step, cache: KVCache, observe: Observer | None = None) -> Tensor:
        """Run a prepared step from its embedded rows on; these may come from elsewhere than `embed`.

        Rows whose states nobody wants stop in the last writer, once their keys and values are written, or, in a drafter, before
        the first layer; no later layer and no head sees them.
        """
        layers, early, late = self.layer_inputs(x_ND, step)
        return self.run(layers, x_ND, step, cache, early, late, observe)

    def body_of(self, step: Step) -> Decoder | AdaptedBody:
        """Return what runs a step: the decoder's own ops, or those that know adapters, where some row asks for one."""
        return self.adapted if any(step.adapters) else self

    def layer_inputs(self, x_ND: Tensor, step: Step) -> tuple[Sequence[Layer], LayerInputs, LayerInputs]:
        """Return the layers that run a step, and the per-layer embeddings of those that all rows pass and of the others."""
        body = self.body_of(step)
        early, late = _embed_ple(self.plan, body.ple_embed, x_ND, step)
        return body.layers, early, late

    def run(
        self,
        layers: Sequence[Layer],
        x_ND: Tensor,
        step: Step,
        cache: KVCache,
        early: LayerInputs,
        late: LayerInputs,
        observe: Observer | None = None,
    ) -> Tensor:
        """Pass rows through the model's last layers, `early` ones with all rows, `late` ones with those that go on."""
        first, remaining, normed = len(early), step.remaining, None
        for layer, ple in zip(layers[:first], early, strict=True):
            x_ND, normed = layer.forward(x_ND, step, cache, ple, normed)
            if observe is not None:
                observe(layer.plan.index, x_ND)
        if step.keeps_none:
            if self.plan.writers:
                layers[first].qkv(x_ND, step, cache)  # the last keys and values; no row goes on
            return x_ND[:0]
        if step.kept is not None and not self.plan.writers:
            x_ND = x_ND[step.logit_rows_M]
        x_MD = x_ND
        for layer, ple in zip(layers[first:], late, strict=True):
            x_MD, normed = layer.forward(x_MD, step if layer.plan.drops_rows else remaining, cache, ple, normed)
            if observe is not None:
                observe(layer.plan.index, x_MD)
        return self.final_norm(x_MD)

    def logits(self, h_RD: Tensor) -> Tensor:
        """Return the soft-capped logits [R, V] of final-normed states, in float32."""
        with self.together(lambda leader: leader.head(h_RD)), self.on_device():
            return self.lm_head(h_RD)

    def check_ranks(self) -> None:
        """Raise RankError if the other ranks have ended: what a GPU has computed since then is nothing."""
        if self.leader is not None and (problem := self.leader.problem) is not None:
            raise RankError(problem)

    def together(self, tell: Callable[[StepLeader], AbstractContextManager[None]]) -> AbstractContextManager[object]:
        """Let other ranks do what follows, too, where this one leads them."""
        return NO_CONTEXT if self.leader is None else tell(self.leader)

    def multiply(self, x_ND: Tensor, name: str) -> Tensor:
        """Multiply rows with a matrix that belongs to no layer, such as a drafter's projections."""
        return self.op_context.linear(x_ND, matrix(self.params, name))

    def rope_tables(self, positions_N: Tensor) -> dict[RopeSpec, Rotation]:
        """Return the rotary tables of a step's positions, one pair a distinct spec."""
        return {spec: rope.tables(positions_N) for spec, rope in self.ropes.items()}

    # ---- adapters that come and go ----

    def with_adapter(self, name: str, deltas: AdapterDeltas) -> AdaptedBody:
        """Return what would run steps with one adapter more; any thread may bind it, while steps run."""
        before = self.adapted
        return self._bind_adapted(carry(before.params, deltas), tuple(sorted((*before.adapters, name))), before.version + 1)

    def without_adapter(self, name: str) -> AdaptedBody:
        """Return what would run steps with one adapter less; any thread may bind it, while steps run."""
        before = self.adapted
        others = tuple(each for each in before.adapters if each != name)
        return self._bind_adapted(without_adapter(before.params, name), others, before.version + 1)

    def on_stream(self) -> AbstractContextManager[object]:
        """Make the stream of the decoder's steps the current one, in whatever thread: a step sees what was made on it before."""
        if not self._is_on_gpu:
            return NO_CONTEXT
        found: AbstractContextManager[object] = torch.cuda.stream(torch.cuda.default_stream(self.device))
        return found

    # ---- what is bound ----

    def _bind(self, op: str, params: Mapping[str, Param], ctx: OpContext, kernels: KernelPlan) -> Callable[..., Tensor]:
        bound: Callable[..., Tensor] = select_kernel(kernels.at(op)).impl.load()(self.plan, params, ctx)
        return bound

    def _bind_ends(self, ctx: OpContext, ranks: Ranks | None) -> None:
        """Bind what comes before the first layer and after the last one."""
        self.kernels = {op: select_kernel(self.kernel_plan.at(op)).impl.name for op in ("embed", "final_norm", "lm_head")}
        self.embed, self.final_norm, self.lm_head = (self._bind(op, self.params, ctx, self.kernel_plan) for op in self.kernels)
        if ranks is not None and self.plan.cuts_head:
            self.embed = ctx.gatherer(self.embed, self.plan.head_rows)
            self.lm_head = _joined(self.plan, self.lm_head, ranks)

    def _bind_layer(self, layer: LayerPlan, params: Mapping[str, Param], ctx: OpContext, kernels: KernelPlan) -> Layer:
        """Bind a layer; it is given the norm that the next one begins with, which it may fuse into its last pass."""
        return Layer(self.plan, layer, params, ctx, kernels, self._next_norms[layer.index])

    def _following_norms(self) -> dict[int, Tensor | None]:
        """Return for each layer, by index, the norm that the one after it begins with."""
        own = self.plan.own_layers
        norms = [self.params[f"layers.{layer.index}.attn.norm"] for layer in own]
        following = [norm if isinstance(norm, Tensor) else None for norm in norms[1:]] + [None]
        return {layer.index: norm for layer, norm in zip(own, following, strict=True)}

    def _bind_adapted(self, params: Mapping[str, Param], adapters: tuple[str, ...], version: int) -> AdaptedBody:
        """Bind ops of their own to the weights that carry deltas; all others are those of steps without adapters."""
        layers, ple_embed = self.layers, self.ple_embed
        if changed := {name for name, _ in carrying_weights(params)}:
            kernels = self.kernel_plan
            low_rank = select_kernel(replace(kernels.site, op="linear", dtype="float32", stored="float32")).impl.load()
            ctx = replace(self.op_context, low_rank=low_rank)
            indices = {int(name.split(".")[1]) for name in changed if name.startswith("layers.")}
            with self.on_stream():
                layers = tuple(
                    self._bind_layer(own.plan, params, ctx, kernels) if own.plan.index in indices else own for own in layers
                )
                if "ple.in" in changed:
                    ple_embed = self._bind("ple_embed", params, ctx, kernels)
        return AdaptedBody(params, adapters, layers, ple_embed, version)

    def _stored(self, name: str) -> Sequence[str]:
        """List how the parts of a weight are held, each alone, as some ops multiply with them: q without k and v, say."""
        weight = self.params.get(name)
        return [Weight((part,)).stored for part in weight.parts] if isinstance(weight, Weight) else []


def bind_linear(params: Iterable[Param], site: KernelSite) -> Linear:
    """Select the kernel of every kind of stored weight once; a call then only looks it up."""
    weights = [param for param in params if isinstance(param, Weight)]
    kinds = {part.stored for weight in weights for part in (weight, *(Weight((each,)) for each in weight.parts))}
    table = {stored: select_kernel(replace(site, stored=stored)).impl.load() for stored in kinds}
    if len(table) == 1:
        (only,) = table.values()
        return only
    return lambda x_ND, weight: table[weight.stored](x_ND, weight)


def _joined(plan: ModelPlan, lm_head: Callable[[Tensor], Tensor], ranks: Ranks) -> Callable[[Tensor], Tensor]:
    """Return the head whose logits are those of all ranks side by side."""
    return lambda h_RD: ranks.join(lm_head(h_RD), plan.head_widths)


def _embed_ple(plan: ModelPlan, embed: Callable[..., Tensor] | None, x_ND: Tensor, step: Step) -> tuple[LayerInputs, LayerInputs]:
    """Return the per-layer embeddings of the layers that all rows pass, and of the others, which only some pass."""
    first, count = plan.num_full_layers, len(plan.layers)
    if embed is None:
        return [None] * first, [None] * (count - first)

    def rows(x: Tensor, step: Step, start: int, stop: int) -> Sequence[Tensor]:
        return embed(x, _ple_ids(plan, step.ple_ids_N), start, stop, step.adapter_rows).unbind(1) if start < stop else []

    if step.kept is None:
        found = rows(x_ND, step, 0, count)
        return found[:first], found[first:]
    late = [] if step.keeps_none else rows(x_ND[step.logit_rows_M], step.kept, first, count)
    return rows(x_ND, step, 0, first), late


def _ple_ids(plan: ModelPlan, ids_N: Tensor) -> Tensor:
    """Return the ids to look up in the table of per-layer embeddings.

    Where a vocabulary was extended and the table was not, new ids have no row there: they get the padding token's, as other
    implementations of this architecture do for ids outside of the table.
    """
    if plan.ple_vocab >= plan.vocab:
        return ids_N
    return torch.where(ids_N < plan.ple_vocab, ids_N, plan.pad_id if plan.pad_id < plan.ple_vocab else 0)
