"""The one place where a model's topology is decided, Gemma 4's or Gemma 3's.

`derive` turns a typed config into a `ModelPlan`: which layer owns which projections, which layer's keys and values it reads,
and every size. Modules, loader, cache, memory planner, kernels, benchmarks and documents read the plan and decide nothing
themselves. Refuses to know tensors, files and devices: standard library only, `import gemcutter.plan` works without torch. Read
`config.py` for the keys behind it, `model/text.py` for the maths it drives.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, NewType

from gemcutter.errors import ConfigError
from gemcutter.layer_params import layer_params
from gemcutter.param_spec import Access, ParamKind, ParamSpec
from gemcutter.shard import Shard, Slice, Stage

if TYPE_CHECKING:
    from gemcutter.config import ModelConfig, RopeConfig, TextConfig

# No config says where an assistant's queries stand. transformers and llama.cpp take the position of the last token, as mlx-vlm
# did before 0.7.10; since then it takes that of the last key (-1), as vLLM and SGLang do. Of the trained pair in tests/goldens,
# which was distilled with 0, a pass gives 2.43 and 2.44 tokens with 2 drafts, 3.25 and 3.41 with 4: either will do.
QUERY_OFFSET = 0
UNBOUND = -1  # kv_layer of a drafter's layer that is not bound to its target yet
INT8_SCALE_BYTES = 4  # of the float32 scale that each key and value vector of a head has in an int8 cache

VOCAB_UNIT = 16  # rows of a table of tokens that tensor parallelism keeps together: a panel of the CPU kernels
VOCAB_CUT: dict[str, Any] = {"shard_axis": -2, "shard_unit": VOCAB_UNIT, "is_even": False}

GroupId = NewType("GroupId", str)  # of layers whose keys and values share one block table
GLOBAL_GROUP = GroupId("global")


def group_of(window: int | None) -> GroupId:
    """Return the group of layers that keep the last `window` positions, or all of them (None)."""
    return GLOBAL_GROUP if window is None else GroupId(f"sliding-{window}")


class Attn(Enum):
    """What a layer's queries may see: the last `window` positions, or all of them."""

    SLIDING = "sliding"
    GLOBAL = "global"


class Proj(Enum):
    """Which projections and norms a layer owns."""

    QKV = "qkv"  # own keys, own values
    QK_ONLY = "qk"  # the value is the raw key projection, normed without a weight (global layers of 12B, 26B-A4B, 31B)
    Q_ONLY = "q"  # reads what another layer wrote (E2B 15..34, E4B 24..41, every drafter layer)

    @property
    def writes(self) -> bool:
        """Return whether the layer writes keys and values to the cache."""
        return self is not Proj.Q_ONLY


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding of one layer: the first `pairs` of head_dim/2 pairs (i, i + head_dim/2) rotate, the others stay."""

    theta: float
    head_dim: int
    pairs: int
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class MoEPlan:
    """A mixture of experts beside the dense branch: `top_k` of `experts`, each `width` wide.

    A rank of a tensor-parallel group holds experts `first` to `first + held - 1`; elsewhere `held` is None, which means all.
    """

    experts: int
    top_k: int
    width: int
    first: int = 0
    held: int | None = None

    @property
    def num_held(self) -> int:
        """Count the experts that are held."""
        return self.experts if self.held is None else self.held


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What one layer is, owns and reads."""

    index: int
    attn: Attn
    proj: Proj
    kv_layer: int  # whose pages this layer reads; == index iff it writes
    kv_owner: str  # "self", or "target" for a drafter
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None  # keys that a query may see, itself included; None: all
    rope: RopeSpec
    mlp_width: int
    moe: MoEPlan | None
    ple_dim: int
    mlp_unit: int = 1  # columns of the MLP that tensor parallelism keeps together: a group of quantized weights, say
    q_scale: float = 1.0  # of the queries; the loader folds it into their norm's weight (Gemma 3)
    has_v_norm: bool = True  # values are normed, without a weight, before they are written (not in Gemma 3)
    drops_rows: bool = False  # the model's last writer, where rows end whose logits nobody wants; set by ModelPlan

    @property
    def writes(self) -> bool:
        """Return whether the layer writes keys and values."""
        return self.proj.writes

    @property
    def group(self) -> GroupId:
        """Return the group whose block table names the pages that this layer writes or reads."""
        return group_of(self.window)

    def attn_parts(self) -> tuple[tuple[str, int], ...]:
        """List the rows of the in-projection: what this layer's place in the model needs, and nothing else."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            Proj.QKV: (("q", q), ("k", kv), ("v", kv)),
            Proj.QK_ONLY: (("q", q), ("k", kv)),
            Proj.Q_ONLY: (("q", q),),
        }[self.proj]

    @property
    def rotary_dims(self) -> int:
        """Count the columns of a key that the rotary embedding rotates."""
        return 2 * self.rope.pairs

    @property
    def can_compact(self) -> bool:
        """Return whether the cache may keep normalised keys once for keys and values, and of keys only the rotary columns."""
        return self.proj is Proj.QK_ONLY and self.has_v_norm and self.rotary_dims < self.head_dim

    def kv_elements(self, compact: bool = False) -> int:
        """Count the cache elements that one token costs in this layer: keys and values, 0 for a reader."""
        key_dims = self.rotary_dims if compact and self.can_compact else self.head_dim
        return self.kv_heads * (key_dims + self.head_dim) if self.writes else 0

    def kv_bytes(self, itemsize: float, compact: bool = False, scale_bytes: int = 0) -> float:
        """Count the cache bytes that one token costs in this layer; each key and value vector of a head has a scale beside it."""
        return itemsize * self.kv_elements(compact) + (2 * self.kv_heads * scale_bytes if self.writes else 0)

    def visible(self, tokens: int) -> int:
        """Count the keys that the query at position tokens - 1 sees."""
        return tokens if self.window is None else min(tokens, self.window)


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Writers that share one block table, because they keep the same span of positions."""

    id: GroupId
    window: int | None
    layers: tuple[int, ...]

    @property
    def name(self) -> str:
        """Return "sliding" or "global"."""
        return Attn.GLOBAL.value if self.window is None else Attn.SLIDING.value


@dataclass(frozen=True)
class ModelPlan:
    """A whole decoder: its layers and the sizes around them."""

    layers: tuple[LayerPlan, ...]
    hidden: int
    vocab: int
    softcap: float | None
    eps: float
    context: int  # positions the model was made for
    ple_vocab: int
    ple_dim: int
    pad_id: int
    tied_head: bool
    bidirectional: bool  # media rows of one block see each other in windowed layers
    backbone: int | None = None  # a drafter's: the target's hidden size
    centroids: int = 0
    centroid_top_k: int = 0
    cuts_ple: bool = False  # whether tensor-parallel ranks share the rows of the table of per-layer embeddings
    query_offset: int = 0  # a drafter's: where its queries stand, from the position of the last token, which has no key yet
    rank: Shard | None = None  # the tensor-parallel rank whose plan this is, as `shard` makes it
    stage: Stage | None = None  # the pipeline's stage whose plan this is, as `on_stage` makes it
    whole: ModelPlan | None = None  # and the plan that was cut, where `rank` or `stage` is given

    def __post_init__(self) -> None:
        last = self.first_reader - 1
        if any(layer.drops_rows != (layer.index == last) for layer in self.layers):
            marked = tuple(replace(layer, drops_rows=layer.index == last) for layer in self.layers)
            object.__setattr__(self, "layers", marked)

    @property
    def is_drafter(self) -> bool:
        """Return whether the plan is an assistant's."""
        return self.backbone is not None

    @cached_property
    def num_full_layers(self) -> int:
        """Count the layers that every row passes whole: rows whose logits nobody wants end inside the next one, the last writer.

        In a drafter, none of whose layers writes, such rows end before the first layer.
        """
        return max(self.first_reader - 1, 0)

    def attn_kinds(self) -> tuple[tuple[GroupId, RopeSpec], ...]:
        """List the distinct pairs of block table and rotary embedding among the layers that are held here."""
        return tuple(dict.fromkeys((layer.group, layer.rope) for layer in self.own_layers))

    @cached_property
    def own_layers(self) -> tuple[LayerPlan, ...]:
        """List the layers that are held here: all of them, or those of a pipeline's stage."""
        return self.layers if self.stage is None else self.layers[self.stage.first : self.stage.stop]

    @property
    def all_stages(self) -> ModelPlan:
        """Return the plan without the cut into stages; a rank's plan stays one."""
        return self if self.stage is None else replace(self, stage=None, whole=None if self.rank is None else self.whole)

    @property
    def has_ends(self) -> bool:
        """Return whether the token table and the head are held here, as everywhere but in most stages of a pipeline."""
        return self.stage is None or self.stage.is_last

    @cached_property
    def writers(self) -> tuple[LayerPlan, ...]:
        """List the layers held here that write keys and values."""
        return tuple(layer for layer in self.own_layers if layer.writes)

    @cached_property
    def first_reader(self) -> int:
        """Return the index from which on all layers are Q_ONLY; the number of layers if there are none."""
        return max((layer.index + 1 for layer in self.layers if layer.writes), default=0)

    def groups(self) -> tuple[KVGroup, ...]:
        """List the groups of writers with one window, in the order of their first layer.

        In a stage's plan the groups are the whole model's, since all stages share block tables, with the layers held here.
        """
        windows = dict.fromkeys(layer.window for layer in self.layers if layer.writes)
        return tuple(
            KVGroup(group_of(window), window, tuple(w.index for w in self.writers if w.window == window)) for window in windows
        )

    def last_writer(self, attn: Attn) -> int:
        """Return the layer whose keys a reader of this attention type reads. Raises ConfigError if none writes."""
        found = [layer.index for layer in self.layers if layer.writes and layer.attn is attn]
        if not found:
            raise ConfigError(f"no {attn.value} layer writes keys and values")
        return found[-1]

    def redundant(self) -> frozenset[tuple[str, str | None]]:
        """Return the names and parts of tensors that checkpoints may carry although this plan has no use for them.

        Checkpoints written by engines that build all layers alike hold keys and values of layers that only read, values of
        layers whose values are their keys, and the head of a tied model.
        """
        found: list[tuple[str, str | None]] = [("head", None)] if self.tied_head else []
        for layer in self.layers:
            name, owned = f"layers.{layer.index}.attn", {part for part, _ in layer.attn_parts()}
            found += [(f"{name}.in", part) for part in ("k", "v") if part not in owned]
            found += [] if layer.writes else [(f"{name}.k_norm", None)]
        return frozenset(found)

    def shard(self, rank: int, world: int, mlp_unit: int = 1, cuts_ple: bool = False) -> ModelPlan:
        """Return the plan of one tensor-parallel rank: its heads, MLP columns, experts and rows of the vocabulary.

        Key heads fewer than ranks are held by several; `mlp_unit` columns of an MLP stay together. A drafter's head stays whole,
        since candidates come from all of it, and so does the table of per-layer embeddings, but where `cuts_ple` says that ranks
        share its rows, too. Raises ConfigError for a model that so many ranks can't share.
        """
        shard = Shard(rank, world)
        if not 0 <= rank < world:
            raise ConfigError(f"rank {rank} of {world}: expected 0 to {world - 1}")
        uneven = {layer.heads for layer in self.layers if layer.heads % world}
        if uneven:
            heads = uneven.pop()
            why = f"{heads} query heads can't be shared evenly by them; take a number of ranks that divides {heads}"
            raise ConfigError(f"tensor parallelism over {world} ranks: {why}")
        whole = replace(self, cuts_ple=True) if cuts_ple else self
        if mlp_unit > 1:
            whole = replace(whole, layers=tuple(replace(layer, mlp_unit=mlp_unit) for layer in self.layers))
        for spec in whole.params():
            try:
                spec.on_rank(shard)
            except ConfigError as error:
                raise ConfigError(f"tensor parallelism over {world} ranks: {spec.name}: {error}") from None
        layers = tuple(_layer_on_rank(layer, shard) for layer in whole.layers)
        return replace(whole, layers=layers, rank=shard, whole=whole)

    def on_stage(self, layers: range) -> ModelPlan:
        """Return the plan of the stage of a pipeline that holds these layers. Raises ConfigError for cuts that can't be."""
        stage = Stage(layers.start, layers.stop, len(self.layers))
        if not {*layers[:1], layers.stop} <= {0, *self.stage_starts, stage.count}:
            raise ConfigError(
                f"layers {stage.first} to {stage.stop - 1} can't be a stage: a reader would be apart from its source"
            )
        return replace(self, stage=stage, whole=self.whole or self)

    @property
    def mlp_unit(self) -> int:
        """Return how many columns of an MLP stay together when ranks share it."""
        return self.layers[0].mlp_unit

    @property
    def cuts_head(self) -> bool:
        """Return whether tensor-parallel ranks share the rows of the token table and the head."""
        return not self.is_drafter

    @property
    def head_rows(self) -> Slice:
        """Return the rows of the vocabulary whose logits this rank computes; all of them outside a tensor-parallel group."""
        return _vocab_slice(self.rank if self.rank and self.cuts_head else Shard(0, 1), self.vocab)

    @property
    def ple_rows(self) -> Slice:
        """Return the rows of the table of per-layer embeddings that this rank holds: all, where ranks do not share them."""
        return _vocab_slice(self.rank if self.rank and self.cuts_ple else Shard(0, 1), self.ple_vocab)

    @property
    def head_widths(self) -> tuple[int, ...]:
        """Return how many rows of the vocabulary each rank computes the logits of."""
        ranks = () if self.rank is None else (Shard(rank, self.rank.world) for rank in range(self.rank.world))
        return tuple(_vocab_slice(rank, self.vocab).size for rank in ranks)

    def params(self) -> Iterator[ParamSpec]:
        """List every tensor of the decoder under its canonical name; in a rank's or stage's plan, what it holds of them."""
        if self.whole is not None:
            own = (spec for spec in self.whole.params() if self.stage is None or self.stage.holds(spec.layer))
            yield from own if self.rank is None else (spec.on_rank(self.rank) for spec in own)
            return
        hidden, ple_width = self.hidden, len(self.layers) * self.ple_dim
        vocabulary: dict[str, Any] = VOCAB_CUT if self.cuts_head else {}
        yield ParamSpec("embed.tokens", (self.vocab, hidden), **vocabulary)
        if not self.tied_head:
            yield ParamSpec("head", (self.vocab, hidden), **vocabulary)
        if self.ple_dim:
            shared: dict[str, Any] = VOCAB_CUT if self.cuts_ple else {}
            yield ParamSpec("embed.ple", (self.ple_vocab, ple_width), access=Access.ROWS, **shared)
            yield ParamSpec("ple.in", (ple_width, hidden))
            yield ParamSpec("ple.norm", (self.ple_dim,), ParamKind.NORM)
        for layer in self.layers:
            yield from layer_params(layer, hidden)
        yield ParamSpec("norm", (hidden,), ParamKind.NORM)
        if self.backbone is not None:
            yield ParamSpec("draft.in", (hidden, 2 * self.backbone))
            yield ParamSpec("draft.out", (self.backbone, hidden))
        if self.centroids:
            yield ParamSpec("draft.centroids", (self.centroids, hidden))
            yield ParamSpec("draft.order", (self.vocab,), ParamKind.INDEX, buffer=True)

    def num_params(self) -> int:
        """Count the parameters of the decoder, the tied head once, buffers left out (as model cards count)."""
        return sum(spec.elements for spec in self.params() if not spec.buffer)

    def weight_bytes(self, itemsize: float = 2.0, rows_access: bool = True) -> int:
        """Count the bytes of all tensors at `itemsize` bytes an element; `rows_access=False` leaves the PLE table out."""
        return int(itemsize * sum(spec.elements for spec in self.params() if rows_access or spec.access is Access.DENSE))

    def kv_bytes(self, tokens: int, itemsize: float = 2.0, compact: bool = False, scale_bytes: int = 0) -> int:
        """Count the cache bytes that a sequence of `tokens` needs: windows for windowed writers, nothing for readers.

        `compact` stores every layer compactly that can be; each key and value vector of a head has a scale of `scale_bytes`.
        """
        return int(sum(layer.kv_bytes(itemsize, compact, scale_bytes) * layer.visible(tokens) for layer in self.writers))

    def read_bytes(
        self, tokens: int = 0, itemsize: float = 2.0, kv_itemsize: float = 2.0, compact: bool = False, kv_scale_bytes: int = 0
    ) -> int:
        """Count the bytes that decoding one token must read: weights once, its embedding rows, keys and values of `tokens`."""
        # A tied table is read whole as the head, and one row of it as the embedding.
        weights = sum(self._read_elements(spec) for spec in self.params()) + (self.hidden if self.tied_head else 0)
        read = ((self.layers[layer.kv_layer], layer.visible(tokens)) for layer in self.own_layers if layer.kv_layer >= 0)
        return int(itemsize * weights + sum(own.kv_bytes(kv_itemsize, compact, kv_scale_bytes) * seen for own, seen in read))

    def _read_elements(self, spec: ParamSpec) -> int:
        if spec.access is Access.ROWS or (spec.name == "embed.tokens" and not self.tied_head):
            return spec.shape[1]
        if spec.kind is ParamKind.EXPERTS:
            moe = next(layer.moe for layer in self.layers if layer.moe)
            return spec.elements * moe.top_k // moe.experts
        return spec.elements

    def read_share(self, spec: ParamSpec, batch: int = 1) -> float:
        """Return the share of a tensor that decoding one token of each of `batch` sequences reads.

        Of experts that is what independent choices of `top_k` give on average.
        """
        if spec.kind is not ParamKind.EXPERTS:
            return 1.0
        moe = next(layer.moe for layer in self.layers if layer.moe)
        return 1.0 - (1.0 - moe.top_k / moe.experts) ** batch

    def flops(self, tokens: int, wanted: int = 1, skip_rows: bool = True, attention: bool = True) -> int:
        """Count the floating-point operations of a prefill of `tokens` rows, `wanted` of which need logits.

        2 per multiply-accumulate. With `skip_rows`, unwanted rows stop once the last writer has its keys and values;
        without it they pass every layer. The head runs on wanted rows either way. `attention` adds scores and values.
        """
        layers = sum(self.layer_flops(layer, tokens, wanted, skip_rows, attention) for layer in self.own_layers)
        return 2 * self.head_rows.size * self.hidden * wanted + layers

    def layer_flops(self, layer: LayerPlan, tokens: int, wanted: int = 1, skip_rows: bool = True, attention: bool = True) -> int:
        """Count what one layer does in such a prefill; of experts a rank does its share, as chosen on average."""
        rows = self.whole_rows(layer, tokens, wanted) if skip_rows else tokens
        total = 2 * _row_macs(layer, self.hidden) * rows
        total += 2 * 2 * layer.heads * layer.head_dim * _seen(layer, tokens, rows) if attention else 0
        if skip_rows and layer.drops_rows:  # keys and values are still made for all rows
            kv_rows = sum(rows for part, rows in layer.attn_parts() if part != "q")
            total += 2 * self.hidden * kv_rows * (tokens - wanted)
        return total

    def whole_rows(self, layer: LayerPlan, rows: int, wanted: int) -> int:
        """Count those of a step's rows that pass a layer whole, when the states of `wanted` are wanted."""
        return rows if layer.index < self.num_full_layers else wanted

    @property
    def stage_starts(self) -> tuple[int, ...]:
        """List the layers, the first one apart, that a pipeline's stage may begin with.

        From there on nothing is read that a layer before has written, and the last stage has all that an assistant reads: the
        last writer of each kind of attention.
        """
        last = {layer.attn: layer.index for layer in self.layers if layer.writes}
        needed = (*last.values(), *(layer.kv_layer for layer in self.layers if not layer.writes))
        return tuple(range(1, min(needed, default=0) + 1))


def _seen(layer: LayerPlan, tokens: int, rows: int) -> int:
    """Sum the visible keys over the last `rows` of `tokens` queries."""
    first = tokens - rows + 1
    if layer.window is None:
        return (first + tokens) * rows // 2
    ramp = max(0, min(tokens, layer.window) - first + 1)  # queries that see fewer keys than the window
    return (2 * first + ramp - 1) * ramp // 2 + (rows - ramp) * layer.window


def _row_macs(layer: LayerPlan, hidden: int) -> int:
    """Count the multiply-accumulates of one row in one layer's matrix products, its share of the PLE projection included."""
    attn = hidden * (sum(rows for _, rows in layer.attn_parts()) + layer.heads * layer.head_dim)
    mlp = 3 * hidden * layer.mlp_width
    moe, experts = layer.moe, 0
    if moe is not None:
        experts = hidden * (moe.experts + 3 * moe.width * moe.top_k * moe.num_held // moe.experts)
    return attn + mlp + experts + 3 * hidden * layer.ple_dim


def _vocab_slice(rank: Shard, rows: int) -> Slice:
    return rank.cut(-2, rows, VOCAB_UNIT, is_even=False)


def _layer_on_rank(layer: LayerPlan, shard: Shard) -> LayerPlan:
    """Return the sizes of what one rank holds of a layer."""
    moe = layer.moe
    if moe is not None:
        share = shard.cut(-3, moe.experts)
        moe = replace(moe, first=share.start, held=share.size)
    heads, kv_heads = (shard.cut(-2, size).size for size in (layer.heads, layer.kv_heads))
    width = shard.cut(-2, layer.mlp_width, layer.mlp_unit, is_even=False).size
    return replace(layer, heads=heads, kv_heads=kv_heads, mlp_width=width, moe=moe)


def derive(config: ModelConfig, target: ModelPlan | None = None) -> ModelPlan:
    """Decide every layer of a model from its config.

    `target` binds a drafter's layers to the layers of its target that write what they read; without it a drafter's `kv_layer`
    stays UNBOUND. Raises ConfigError that lists every layer with a problem and why.
    """
    text, problems = config.text, list[str]()
    attns = [Attn.SLIDING if kind == "sliding_attention" else Attn.GLOBAL for kind in text.layer_types]
    first_shared = text.num_hidden_layers - text.num_kv_shared_layers
    if config.is_drafter and first_shared:
        problems.append(
            f"num_kv_shared_layers is {text.num_kv_shared_layers}, but a drafter's {len(attns)} layers all read their target"
        )
        first_shared = 0
    layers = tuple(_layer(config, attns, index, first_shared, target, problems) for index in range(len(attns)))
    if problems:
        raise ConfigError(f"the config contradicts itself ({len(problems)} problem{'s' if len(problems) > 1 else ''})", problems)
    if target is not None and config.backbone_hidden_size != target.hidden:
        raise ConfigError(
            f"the drafter was made for a hidden size of {config.backbone_hidden_size}, its target has {target.hidden}"
        )
    return ModelPlan(
        layers,
        hidden=text.hidden_size,
        vocab=text.vocab_size,
        softcap=text.final_logit_softcapping,
        eps=text.rms_norm_eps,
        context=text.max_position_embeddings,
        ple_vocab=text.vocab_size_per_layer_input if text.hidden_size_per_layer_input else 0,
        ple_dim=text.hidden_size_per_layer_input,
        pad_id=text.pad_token_id,
        tied_head=text.tie_word_embeddings,
        bidirectional=text.bidirectional == "vision",
        backbone=config.backbone_hidden_size,
        centroids=config.num_centroids,
        centroid_top_k=config.centroid_top_k,
        query_offset=QUERY_OFFSET,
    )


def _layer(
    config: ModelConfig, attns: list[Attn], index: int, first_shared: int, target: ModelPlan | None, problems: list[str]
) -> LayerPlan:
    text, attn = config.text, attns[index]
    shared = index >= first_shared
    k_eq_v = text.attention_k_eq_v and attn is Attn.GLOBAL
    proj = Proj.Q_ONLY if shared else Proj.QK_ONLY if k_eq_v else Proj.QKV
    head_dim, kv_heads = _head_sizes(text, attn, index, problems)
    if text.num_attention_heads % kv_heads:
        problems.append(f"layer {index}: {text.num_attention_heads} query heads can't be grouped over {kv_heads} key heads")
    layer = LayerPlan(
        index,
        attn,
        proj,
        kv_layer=_kv_layer(config, attns, index, first_shared, target, problems),
        kv_owner="target" if config.is_drafter else "self",
        heads=text.num_attention_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        window=text.sliding_window if attn is Attn.SLIDING else None,
        rope=_rope(text.rope["sliding_attention" if attn is Attn.SLIDING else "full_attention"], head_dim),
        mlp_width=text.intermediate_size * (2 if text.use_double_wide_mlp and shared and not config.is_drafter else 1),
        moe=MoEPlan(text.num_experts, text.top_k_experts, text.moe_intermediate_size) if text.num_experts else None,
        ple_dim=text.hidden_size_per_layer_input,
        q_scale=text.query_pre_attn_scalar**-0.5,
        has_v_norm=text.has_v_norm,
    )
    if target is not None and layer.kv_layer >= 0:
        source = target.layers[layer.kv_layer]
        if (source.kv_heads, source.head_dim) != (kv_heads, head_dim):
            problems.append(
                f"layer {index}: has {kv_heads} key heads of {head_dim}, its target's layer {source.index} writes "
                f"{source.kv_heads} of {source.head_dim}: not a drafter of this target"
            )
        layer = replace(layer, window=source.window)  # whatever its own config says: older keys are not there
    return layer


def _head_sizes(text: TextConfig, attn: Attn, index: int, problems: list[str]) -> tuple[int, int]:
    """Resolve head_dim and key heads of a layer from both spellings: global_* keys, or one object a layer."""
    head_dim, kv_heads = text.head_dim, text.num_key_value_heads
    if attn is Attn.GLOBAL:
        published = text.global_head_dim or (512 if text.per_layer is None else None)  # 512: what a config without both means
        head_dim = published or head_dim
        if text.attention_k_eq_v and text.num_global_key_value_heads:
            kv_heads = text.num_global_key_value_heads
    override = (text.per_layer or {}).get(index, {})
    for key, value in (("head_dim", head_dim), ("num_key_value_heads", kv_heads)):
        spelled_twice = attn is Attn.GLOBAL and (text.global_head_dim if key == "head_dim" else text.num_global_key_value_heads)
        if spelled_twice and override.get(key, value) != value:
            problems.append(f"layer {index}: per_layer_config says {key} {override[key]}, the global_* keys say {value}")
    head_dim, kv_heads = override.get("head_dim", head_dim), override.get("num_key_value_heads", kv_heads)
    if head_dim % 2:
        problems.append(f"layer {index}: head_dim {head_dim} is odd; rotary pairs need an even one")
    return head_dim, kv_heads


def _kv_layer(
    config: ModelConfig, attns: list[Attn], index: int, first_shared: int, target: ModelPlan | None, problems: list[str]
) -> int:
    if index < first_shared:
        return index
    attn = attns[index]
    if config.is_drafter:
        return UNBOUND if target is None else target.last_writer(attn)
    sources = [i for i in range(first_shared) if attns[i] is attn]
    if not sources:
        problems.append(
            f"layer {index} is Q_ONLY ({config.text.num_kv_shared_layers} of {len(attns)} layers share keys and values) but no "
            f"{attn.value} layer before layer {first_shared} writes keys and values for it to read"
        )
        return UNBOUND
    return sources[-1]


@lru_cache(maxsize=64)  # one object for equal rotations: steps find theirs by identity
def _rope(rope: RopeConfig, head_dim: int) -> RopeSpec:
    # "proportional" rotates int(partial * head_dim // 2) pairs, with exponents over the whole head_dim
    pairs = int(rope.partial * head_dim // 2) if rope.kind == "proportional" else head_dim // 2
    return RopeSpec(rope.theta, head_dim, pairs, 1.0 if rope.kind == "default" else rope.factor)
