"""Decides what becomes of every tensor of a checkpoint that is converted.

Owns the targets and the quantizations that each can hold, the layout of experts and towers in them, and what is dropped or
restored. Everything is decided from headers. Refuses to know bytes (`tensor_writers.py`), files and configs (`convert.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from gemcutter.checkpoint.container.lazy_tensor import LazyTensor
from gemcutter.checkpoint.container.stored_tensor import PackedTensor, StoredTensor
from gemcutter.checkpoint.convert.tensor_writers import Output, copied, made, rearranged, stored, zeros
from gemcutter.checkpoint.formats import gguf, gguf_metadata, hf, mlx
from gemcutter.checkpoint.formats.lora import Adapter, Factors
from gemcutter.checkpoint.load.adapters import merged_rows
from gemcutter.checkpoint.load.match import Checkpoint
from gemcutter.checkpoint.load.row_chunks import Run, dense_dtype, whole
from gemcutter.config import WRAPPER_TYPES
from gemcutter.errors import CheckpointError, ConfigError
from gemcutter.param_spec import ParamSpec
from gemcutter.plan import ModelPlan, Proj
from gemcutter.quant.recipes import RECIPES, Recipe, Scheme
from gemcutter.quant_names import find_quant

DENSE = {"bf16": "BF16", "f16": "F16"}
# target -> what may be asked of it, and the recipe that this means
TARGETS: dict[str, dict[str, Recipe | None]] = {
    "hf": dict.fromkeys(("none", *DENSE)),
    "mlx": dict.fromkeys(("none", *DENSE)) | {name: RECIPES[name] for name in ("q4", "q8", "mlx4", "mlx8")},
    "gguf": dict.fromkeys(("none", *DENSE))
    | {"q4": RECIPES["Q4_0"], "q8": RECIPES["Q8_0"], "Q4_0": RECIPES["Q4_0"], "Q8_0": RECIPES["Q8_0"]},
    "mmproj": dict.fromkeys(("none", *DENSE)) | {"q8": RECIPES["Q8_0"], "Q8_0": RECIPES["Q8_0"]},
}
SHARED_KV = ("keep", "drop", "restore")
MODEL_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """What a conversion shall make: the target's format, its quantization, and what happens to keys and values nobody reads."""

    to: str
    quant: str = "none"
    shared_kv: str = "keep"

    @property
    def recipe(self) -> Recipe | None:
        """Return the recipe of the asked quantization, if it is one."""
        return TARGETS[self.to][find_quant(self.quant, TARGETS[self.to])]

    @property
    def dense(self) -> str | None:
        """Return the dtype that all matrices get, if one was asked for."""
        return DENSE.get(find_quant(self.quant, TARGETS[self.to]))

    def problems(self) -> list[str]:
        """Return what is wrong with the options themselves."""
        if self.to not in TARGETS:
            return [f"to: expected {', '.join(TARGETS)}, found {self.to!r}"]
        found = []
        try:
            find_quant(self.quant, TARGETS[self.to])
        except ConfigError as error:
            is_name = self.quant.lower() in {name.lower() for names in TARGETS.values() for name in names}
            listed = f"quant: {self.to} files hold {', '.join(TARGETS[self.to])}, found {self.quant!r}"
            found.append(listed if is_name else str(error))
        if self.shared_kv not in SHARED_KV:
            found.append(f"shared_kv: expected {', '.join(SHARED_KV)}, found {self.shared_kv!r}")
        return found


@dataclass(slots=True)
class Listing:
    """Every tensor of the target, and every one of the source that it lacks, with the reason."""

    outputs: list[Output] = field(default_factory=list)
    dropped: list[tuple[str, str]] = field(default_factory=list)
    is_verbatim: bool = False  # names and config are the source's own
    wraps: bool = False  # names carry the prefix of a multimodal wrapper


def list_outputs(checkpoint: Checkpoint, options: ConvertOptions, adapter: Adapter | None = None) -> Listing:
    """Decide what becomes of every tensor. Raises CheckpointError, listing all tensors that the target can't take."""
    return _Lister(checkpoint, options, adapter).run()


class _Lister:
    """One conversion while it is being decided."""

    def __init__(self, checkpoint: Checkpoint, options: ConvertOptions, adapter: Adapter | None) -> None:
        self.changes: dict[str, list[Factors]] = {}  # of the adapter, by parameter
        for factors in () if adapter is None else adapter.factors:
            self.changes.setdefault(factors.name, []).append(factors)
        self.changed_modules = {} if adapter is None else adapter.other_modules
        self.checkpoint, self.plan, self.matched, self.options = checkpoint, checkpoint.plan, checkpoint.matched, options
        self.is_gguf_source = checkpoint.format == gguf.NAME
        self.is_remote = checkpoint.source.remote is not None  # for a preview, which takes the usual for granted
        self.model_dtype = MODEL_DTYPES.get(checkpoint.config.dtype.removeprefix("torch.").lower(), "BF16")
        self.listing = Listing(is_verbatim=self._is_verbatim(), wraps=self._wraps())
        self.problems: list[str] = []

    def run(self) -> Listing:
        if self.listing.is_verbatim and self.changes:
            raise CheckpointError(
                f"{self.checkpoint.source.path} is quantized, and what an adapter changes can't stay so without being quantized "
                f"again; {_packed_remedy(self.options.to)}"
            )
        if self.listing.is_verbatim:
            self._copy_all()
        else:
            for spec in self.plan.params():
                self._param(spec, self.matched.pieces[spec.name])
            self._beside()
            self._redundant()
            if self.options.to == "gguf":
                values = torch.tensor(gguf_metadata.frequencies(self.plan))
                self.listing.outputs.append(made(gguf.ROPE_DIVISORS, values))
        self._drop("ignored, as asked", self.matched.ignored)
        if self.options.shared_kv == "restore":
            self._restore()
        if self.problems:
            raise CheckpointError(
                f"{self.checkpoint.source.path} can't become {self.options.to} ({len(self.problems)} problems)", self.problems
            )
        return self.listing

    # ---- the decoder ----

    def _param(self, spec: ParamSpec, pieces: tuple[StoredTensor, ...]) -> None:
        if not pieces:
            return  # its absence has a meaning, which the target's readers share
        for part, shape, runs in _cut(spec, pieces, is_fused=self._fuses(spec)):
            changes = [each for each in self.changes.get(spec.name, ()) if part is None or each.part in (None, part)]
            merged = partial(merged_rows, runs, changes, spec) if changes else None
            self._store(spec.name, part, shape, runs, is_integer=spec.integer, merged=merged)

    def _fuses(self, spec: ParamSpec) -> bool:
        """Return whether the target keeps the parts of a parameter in one tensor: only experts, and not in MLX."""
        return len(spec.shape) == 3 and self.options.to != "mlx"

    def _store(
        self,
        name: str,
        part: str | None,
        shape: tuple[int, ...],
        runs: list[Run],
        is_integer: bool = False,
        merged: Callable[[], Iterator[Tensor]] | None = None,
    ) -> None:
        spelled = self._spell(name, part)
        if spelled is None:
            self.problems.append(f"{runs[0].data.origin}: {self.options.to} files have no name for {name}")
            return
        dtype = runs[0].data.dtype if is_integer else self._dtype(name, shape, runs)
        self.listing.outputs.append(stored(spelled, shape, runs, dtype, self._scheme(name, shape), merged))

    def _scheme(self, name: str, shape: tuple[int, ...]) -> Scheme | None:
        recipe = self.options.recipe
        return recipe.scheme(name, shape[-1]) if recipe is not None and len(shape) > 1 else None

    def _dtype(self, name: str, shape: tuple[int, ...], runs: list[Run]) -> str:
        """Choose the dtype of what is stored dense, and of MLX's scales."""
        is_small = len(shape) == 1 or name.endswith("moe.router")  # which GGUF knows in float32 alone
        if self.options.to == "gguf" and is_small:
            return "F32"
        if self.options.dense is not None:
            return self.options.dense
        found = {dense_dtype(run.data) for run in runs}
        usual = found.pop() if len(found) == 1 else None
        if usual is None:
            return self.model_dtype
        if is_small and self.is_gguf_source and (self.is_remote or _is_exact(runs[0].data, self.model_dtype)):
            return self.model_dtype
        return usual

    def _spell(self, name: str, part: str | None) -> str | None:
        spell: Callable[[str, str | None], str] = {"hf": hf.spell, "mlx": mlx.spell, "gguf": gguf.spell}[self.options.to]
        try:
            spelled = spell(name, part)
        except (StopIteration, KeyError):
            return None
        if not self.listing.wraps:
            return spelled
        if self.options.to == "mlx":
            return f"language_model.{spelled}"
        return f"model.language_model.{spelled.removeprefix('model.')}" if spelled.startswith("model.") else spelled

    # ---- what the decoder does not use ----

    def _redundant(self) -> None:
        if self.options.shared_kv == "drop":
            self._drop("never read: the layer uses another layer's keys and values", self.matched.redundant)
            return
        for piece in self.matched.redundant:
            if piece.name == "head":
                self._drop("the head is tied to the embeddings", [piece])
            elif piece.part is None and piece.name is not None and piece.name.endswith("attn.in"):
                self._drop("never read, and fused with what is", [piece])
            else:
                assert piece.name is not None
                self._store(piece.name, piece.part, piece.data.shape, whole(piece.data))

    def _restore(self) -> None:
        """Add zeros for the keys and values of every layer that reads another's, where an engine demands such tensors."""
        there = {(piece.name, piece.part) for piece in self.matched.redundant}
        first = next(piece for piece in self.matched.pieces["layers.0.attn.norm"])
        if self.listing.is_verbatim and self._spell("layers.0.attn.norm", None) != first.data.name:
            self.problems.append(
                f"{first.data.origin}: zeros would be named otherwise than the tensors beside them; convert without restore first"
            )
            return
        for name, part, shape in _absent_kv(self.plan):
            spelled = self._spell(name, part)
            if (name, part) not in there and spelled is not None:
                is_f32 = self.options.to == "gguf" and len(shape) == 1
                dtype = "F32" if is_f32 else self.options.dense or self.model_dtype
                self.listing.outputs.append(zeros(spelled, shape, dtype, self._scheme(name, shape)))

    def _beside(self) -> None:
        for kind, pieces in self.matched.other_modules.items():
            if not kind.endswith("tower") or (self.options.to == "hf" and not self.listing.wraps):
                self._drop(kind, pieces)
            elif self.options.to == "gguf":
                self._drop(f"{kind}: GGUF keeps it in a file of its own: convert --to mmproj", pieces)
            else:
                self._towers(pieces)

    def _towers(self, pieces: list[StoredTensor]) -> None:
        """Carry a tower over as it is, but for its convolutions: MLX has their channels last."""
        kind = str(pieces[0].name).strip("()")
        if kind in self.changed_modules:
            self.problems.append(
                f"the adapter changes {self.changed_modules[kind]} matrices of the {kind}, which is copied as it is; "
                f"--ignore '*{kind.replace(' ', '_')}*.lora_*' to merge without them"
            )
        prefix = "model." if self.options.to == "hf" else ""
        was_mlx = self.checkpoint.format == mlx.NAME
        for piece in pieces:
            data, name = piece.data, prefix + hf.strip(piece.data.name)
            if isinstance(data, PackedTensor) or (self.options.to == "hf" and data.dtype == "U32"):
                self.problems.append(f"{data.origin}: packed, and no part of the decoder; --ignore '{data.name}' to leave it out")
            elif was_mlx == (self.options.to == "mlx") or not _is_convolution(data):
                self.listing.outputs.append(copied(name, data))
            else:
                order = (
                    (0, *range(2, len(data.shape)), 1) if self.options.to == "mlx" else (0, -1, *range(1, len(data.shape) - 1))
                )
                self.listing.outputs.append(rearranged(name, data, order))

    def _drop(self, why: str, pieces: list[StoredTensor]) -> None:
        for piece in pieces:
            names = [piece.data.name] if isinstance(piece.data, LazyTensor) else [each.name for each in piece.data.stored]
            self.listing.dropped += [(name, why) for name in names]

    # ---- packed weights that stay as they are ----

    def _is_verbatim(self) -> bool:
        """Return whether source and target are of one container, and packed weights pass through it untouched."""
        container = {mlx.NAME: "mlx", gguf.NAME: "gguf"}.get(self.checkpoint.format, "hf")
        is_packed = any(dense_dtype(piece.data) is None for found in self.matched.pieces.values() for piece in found)
        return self.options.dense is None and self.options.recipe is None and container == self.options.to and is_packed

    def _copy_all(self) -> None:
        out = self.matched.ignored + (self.matched.redundant if self.options.shared_kv == "drop" else [])
        if self.options.shared_kv == "drop":
            self._drop("never read: the layer uses another layer's keys and values", self.matched.redundant)
        gone = {tensor.name for piece in out for tensor in _arrays(piece)}
        self.listing.outputs += [copied(name, data) for name, data in self.checkpoint.source.tensors.items() if name not in gone]

    def _wraps(self) -> bool:
        is_wrapper = self.checkpoint.config.model_type in WRAPPER_TYPES
        has_towers = any(kind.endswith("tower") for kind in self.matched.other_modules)
        return is_wrapper and (self.options.to == "mlx" or (self.options.to == "hf" and has_towers))


# ---- facts about tensors ----


def _cut(
    spec: ParamSpec, pieces: tuple[StoredTensor, ...], is_fused: bool
) -> Iterator[tuple[str | None, tuple[int, ...], list[Run]]]:
    """Yield what a parameter becomes: its parts one by one, or all of it; with shapes, and the stored rows to take."""
    if not spec.parts:
        yield None, spec.shape, whole(pieces[0].data)
        return
    edges = pairwise(accumulate((rows for _, rows in spec.parts), initial=0))
    by_part: dict[str, list[Run]] = {}
    for (part, _), (start, stop) in zip(spec.parts, edges, strict=True):
        if pieces[0].part is None:
            by_part[part] = [Run(run.data, run.expert, start, stop) for run in whole(pieces[0].data)]
        else:
            by_part[part] = whole(next(piece.data for piece in pieces if piece.part == part), start)
    if is_fused and pieces[0].part is None:
        yield None, spec.shape, whole(pieces[0].data)
    elif is_fused:
        yield None, spec.shape, [run for one_expert in zip(*by_part.values(), strict=True) for run in one_expert]
    else:
        for part, rows in spec.parts:
            yield part, (*spec.shape[:-2], rows, spec.shape[-1]), by_part[part]


def _packed_remedy(to: str) -> str:
    """Return how to merge an adapter into a packed checkpoint of the target's own kind."""
    if to == "hf":
        return "--quant bf16 writes a dense checkpoint"
    return "--quant q4 or q8 quantizes once they are merged, --quant bf16 writes a dense checkpoint"


def _absent_kv(plan: ModelPlan) -> Iterator[tuple[str, str | None, tuple[int, ...]]]:
    """List what layers that read another's keys and values would own if they wrote their own."""
    for layer in plan.layers:
        if layer.writes or layer.kv_owner != "self":
            continue
        shape = (layer.kv_heads * layer.head_dim, plan.hidden)
        parts = ("k", "v") if plan.layers[layer.kv_layer].proj is Proj.QKV else ("k",)
        for part in parts:
            yield f"layers.{layer.index}.attn.in", part, shape
        yield f"layers.{layer.index}.attn.k_norm", None, (layer.head_dim,)


def _arrays(piece: StoredTensor) -> tuple[LazyTensor, ...]:
    return (piece.data,) if isinstance(piece.data, LazyTensor) else piece.data.stored


def _is_exact(data: LazyTensor | PackedTensor, dtype: str) -> bool:
    """Return whether a small tensor's values fit a narrower dtype."""
    assert isinstance(data, LazyTensor)
    values = data.torch()
    return bool((values.to({"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]) == values).all())


def _is_convolution(data: LazyTensor) -> bool:
    return len(data.shape) in (3, 4) and data.name.endswith(("conv.weight", "conv1d.weight"))
