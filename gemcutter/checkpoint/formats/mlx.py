"""MLX layouts: what mlx-lm and mlx-vlm write, quantized in any of MLX's modes or not at all.

Owns how MLX packs a module (`weight` with `scales`, and `biases` in the affine mode) and where it keeps experts; all other
names are Hugging Face's. Stored shapes and dtypes decide how a module is packed, because published configs often leave out an
override; entries that do name a module are checked against them. Refuses to know what the codes mean: that is in
`quant/affine.py` and `quant/microscaling.py`. Source: the layouts of mlx-community/gemma-4-*.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from gemcutter.checkpoint.container.lazy_tensor import LazyTensor
from gemcutter.checkpoint.container.source import Source
from gemcutter.checkpoint.container.stored_tensor import PackedTensor, StoredTensor
from gemcutter.checkpoint.formats import hf, hf_towers
from gemcutter.config import ModelConfig
from gemcutter.errors import CheckpointError
from gemcutter.param_spec import ParamKind
from gemcutter.plan import ModelPlan
from gemcutter.sidecar.small_file import shown
from gemcutter.tower_plan import TowerPlan

if TYPE_CHECKING:  # headers are read without torch
    from torch import Tensor

    from gemcutter.quant.packed import Packed

NAME = "MLX safetensors"

ARRAYS = ("weight", "scales", "biases", "global_scale")  # of one module, in the order in which they are listed
EXPERTS: dict[str, tuple[str, str | None]] = {
    "experts.switch_glu.gate_proj.weight": ("moe.in", "gate"),
    "experts.switch_glu.up_proj.weight": ("moe.in", "up"),
    "experts.switch_glu.down_proj.weight": ("moe.out", None),
}

AFFINE = "affine"
AFFINE_BITS = (1, 2, 3, 4, 5, 6, 8)
AFFINE_DTYPES = ("BF16", "F16", "F32")  # of scales and biases
MICRO = {(4, 32): "mxfp4", (8, 32): "mxfp8", (4, 16): "nvfp4"}  # (bits, group) -> mode; their scales are bytes
MODES = (AFFINE, *MICRO.values())


@dataclass(frozen=True, slots=True)
class ModuleMode:
    """How a module is packed, spelled as MLX's config does."""

    mode: str
    bits: int
    group_size: int

    @property
    def scheme(self) -> str:
        """Name the scheme as the packed weight will."""
        return f"affine{self.bits}g{self.group_size}" if self.mode == AFFINE else self.mode


def sniff(source: Source) -> bool:
    """Recognise MLX's mark, its packed modules (AWQ and GPTQ have scales too, but no `weight`) or its experts."""
    return source.metadata.get("format") == "mlx" or any(
        (name.endswith(".weight") and (tensor.dtype == "U32" or f"{name.removesuffix('weight')}scales" in source.tensors))
        or ".experts.switch_glu." in name
        for name, tensor in source.tensors.items()
    )


def config(source: Source, ignore: Sequence[str] = ()) -> ModelConfig:
    """Read the config beside the weights, without its quantization, which `pieces` checks module by module.

    Raises CheckpointError if there is none or it names a mode that MLX does not have, ConfigError for bad keys.
    """
    found = hf.read_config(source, ignore)
    claims = _claims(source)
    modes = {"": claims.get("mode")} | {key: claim.get("mode") for key, claim in claims.items() if isinstance(claim, dict)}
    problems = [
        f"quantization{key and f'[{shown(key)}]'}.mode: expected one of {', '.join(MODES)}, found {shown(mode)}"
        for key, mode in modes.items()
        if mode is not None and mode not in MODES
    ]
    if problems:
        raise CheckpointError(f"{source.folder / 'config.json'}: the weights are packed in a way that is unknown", problems)
    return replace(found, quantization=None)


def pieces(source: Source, plan: ModelPlan) -> Iterator[StoredTensor]:
    """Yield every stored tensor under its canonical name, the arrays of a packed module as one piece."""
    columns = {spec.name: spec.shape[-1] for spec in plan.params()} | {"head": plan.hidden}
    yield from _pieces(source.tensors.values(), columns, _claims(source), translate)


def tower_pieces(source: Source, tower: str, plan: TowerPlan) -> Iterator[StoredTensor]:
    """Yield the stored tensors of a tower as `pieces` does; convolutions as the plan has them."""
    specs = {spec.name: spec for spec in plan.params()}
    columns = {spec.name: spec.shape[-1] for spec in specs.values() if spec.kind is ParamKind.MATRIX}
    for piece in _pieces(hf_towers.tensors_of(source, tower), columns, _claims(source), hf_towers.piece):
        yield hf_towers.channels_first(piece, specs)


def _pieces(
    tensors: Iterable[LazyTensor],
    columns: Mapping[str, int],
    claims: Mapping[str, Any],
    translate: Callable[[LazyTensor], StoredTensor],
) -> Iterator[StoredTensor]:
    """Yield tensors under the names that `translate` gives them; `columns` are those of every weight that may be packed."""
    claims = {hf.strip(module): claim for module, claim in claims.items()}
    modules: dict[str, dict[str, LazyTensor]] = {}
    for tensor in tensors:
        module, _, array = tensor.name.rpartition(".")
        if array in ARRAYS:
            modules.setdefault(module, {})[array] = tensor
        else:
            yield translate(tensor)
    for module, arrays in modules.items():
        yield from _module(module, arrays, columns, claims.get(hf.strip(module)), translate)


def translate(tensor: LazyTensor) -> StoredTensor:
    """Name one tensor canonically; `name` stays None for what the format does not know."""
    layer = hf.LAYER.fullmatch(hf.strip(tensor.name))
    if layer and layer[2] in EXPERTS:
        name, part = EXPERTS[layer[2]]
        return StoredTensor(f"layers.{int(layer[1])}.{name}", part, tensor)
    return hf.translate(tensor)


def spell(name: str, part: str | None) -> str:
    """Return the name that mlx-lm writes for a canonical parameter or part; experts are stored by part.

    A packed module keeps its codes there; its scales and biases end in `scales` and `biases` instead of `weight`.
    """
    section, index, own = (*name.split(".", 2), "", "")[:3]
    for mlx, canonical in EXPERTS.items():
        if section == "layers" and canonical == (own, part):
            return f"model.layers.{index}.{mlx}"
    return hf.spell(name, part)


# ---- one module ----


def _module(
    module: str,
    arrays: dict[str, LazyTensor],
    columns: Mapping[str, int],
    claim: object,
    translate: Callable[[LazyTensor], StoredTensor],
) -> Iterator[StoredTensor]:
    """Yield a module as one piece, packed or dense; of those without `columns`, which need no unpacking, every array."""
    stored = tuple(arrays[name] for name in ARRAYS if name in arrays)
    codes = stored[0]
    place = translate(replace(codes, name=f"{module}.weight"))
    if place.name is None or place.name not in columns:
        yield from (StoredTensor(place.name, place.part, tensor) for tensor in stored)
    elif arrays.keys() == {"weight"} and codes.dtype != "U32":
        yield StoredTensor(place.name, place.part, codes, _contradiction(claim, None))
    else:
        width = columns[place.name]
        try:
            layout = _layout(arrays, width)
        except ValueError as error:
            yield StoredTensor(place.name, place.part, codes, str(error))
            return
        build = partial(_build, layout, arrays, width)
        packed = PackedTensor(codes.name, layout.scheme, (*codes.shape[:-1], width), stored, build)
        yield StoredTensor(place.name, place.part, packed, _contradiction(claim, layout))


def _layout(arrays: Mapping[str, LazyTensor], columns: int) -> ModuleMode:
    """Return, from headers, how a module with so many columns is packed. Raises ValueError with everything that does not fit."""
    codes, scales = arrays.get("weight"), arrays.get("scales")
    if codes is None or scales is None:
        found = " and ".join(name for name in ARRAYS if name in arrays)
        raise ValueError(f"no {'scales' if codes else 'weight'} beside {found}; download or convert it again")
    if len(codes.shape) not in (2, 3) or codes.shape[:-1] != scales.shape[:-1]:
        raise ValueError(
            "weight and scales: [rows, ...] or [experts, rows, ...], alike but for the last axis, expected, "
            f"found {list(codes.shape)} and {list(scales.shape)}"
        )
    words, groups = codes.shape[-1], scales.shape[-1]
    bits = 32 * words // columns if 32 * words % columns == 0 else 0
    group = columns // groups if groups and columns % groups == 0 else 0
    mode = AFFINE if scales.dtype in AFFINE_DTYPES else MICRO.get((bits, group), "")
    problems = [] if codes.dtype == "U32" else [f"weight: U32 expected, found {codes.dtype}"]
    if scales.dtype not in (*AFFINE_DTYPES, "U8"):
        problems.append(f"scales: {', '.join(AFFINE_DTYPES)} or U8 expected, found {scales.dtype}")
    elif not group:
        problems.append(f"scales: {groups} groups do not divide {columns} columns")
    elif not mode:
        known = ", ".join(f"{mode} ({bits} bits, groups of {group})" for (bits, group), mode in MICRO.items())
        problems.append(f"weight: {words} words and {groups} scale bytes for {columns} columns fit none of {known}")
    if mode == AFFINE and bits not in AFFINE_BITS:
        known = f"{', '.join(map(str, AFFINE_BITS[:-1]))} or {AFFINE_BITS[-1]}"
        problems.append(f"weight: {words} words of 32 bits do not hold {columns} columns of {known} bits")
    problems += _companion_problems(mode, arrays, scales)
    if problems:
        raise ValueError("; ".join(problems))
    return ModuleMode(mode, bits, group)


def _companion_problems(mode: str, arrays: Mapping[str, LazyTensor], scales: LazyTensor) -> Iterator[str]:
    """Return what is wrong with a module's biases and global scale; an unknown mode is somebody else's complaint."""
    biases, factor = arrays.get("biases"), arrays.get("global_scale")
    if mode == AFFINE and biases is None:
        yield "biases: missing beside weight and scales; download or convert it again"
    elif mode == AFFINE and biases is not None and (biases.shape != scales.shape or biases.dtype not in AFFINE_DTYPES):
        yield f"biases: {list(scales.shape)} like the scales expected, found {biases.dtype} {list(biases.shape)}"
    elif mode in MICRO.values() and biases is not None:
        yield f"biases: {mode} has none"
    if factor is not None and mode and mode != "nvfp4":
        yield f"global_scale: only nvfp4 has one, and this is {mode}"
    elif factor is not None and mode and (factor.dtype != "F32" or math.prod(factor.shape) not in (1, *scales.shape[:-2])):
        yield f"global_scale: one F32 number, or one for each expert, expected, found {factor.dtype} {list(factor.shape)}"


# ---- what the config says ----


def _claims(source: Source) -> dict[str, Any]:
    """Return the config's quantization: settings of all modules, and an object or false under a module's own name."""
    raw = source.read_json("config.json") or {}
    claims = raw.get("quantization") or raw.get("quantization_config")
    return claims if isinstance(claims, dict) else {}


def _contradiction(claim: object, layout: ModuleMode | None) -> str | None:
    """Return how a module's own entry in the config disagrees with its stored arrays. A field that is left out says nothing."""
    remedy = "what is stored decides: correct or remove the entry, or use the config that came with the weights"
    if claim is None or claim is True:
        return None
    if claim is False or layout is None:
        if (claim is False) is (layout is None):
            return None
        said, found = ("not quantized", "is") if claim is False else ("quantized", "is not")
        return f"config.json has it {said}, and it {found}; {remedy}"
    if not isinstance(claim, dict):
        return f"config.json: an object or false expected in quantization, found {shown(claim)}"
    fields = {"bits": layout.bits, "group_size": layout.group_size, "mode": layout.mode}
    wrong = [f"{key} {shown(claim[key])}" for key, value in fields.items() if claim.get(key) not in (None, value)]
    if not wrong:
        return None
    return f"config.json has it in {', '.join(wrong)}, the stored arrays hold {layout.scheme}; {remedy}"


# ---- the weight itself ----


def _build(layout: ModuleMode, arrays: Mapping[str, LazyTensor], columns: int) -> Packed:
    """Make the packed weight of mapped views."""
    from gemcutter.quant.affine import Affine
    from gemcutter.quant.microscaling import Micro, from_mlx

    codes, scales = arrays["weight"], arrays["scales"]
    if layout.mode == AFFINE:
        return Affine(_bytes(codes), _values(scales), _values(arrays["biases"]), layout.bits, layout.group_size)
    if "global_scale" in arrays:
        return from_mlx(codes.torch(), scales.torch(), columns, arrays["global_scale"].torch())
    return Micro(layout.mode, _bytes(codes), scales.torch())


def _bytes(codes: LazyTensor) -> Tensor:
    """View words as bytes, which lie anywhere: MLX does not pad its headers, so most of its files misalign their tensors."""
    return codes.raw().view(*codes.shape[:-1], 4 * codes.shape[-1])


def _values(stored: LazyTensor) -> Tensor:
    """Return scales or biases as floats."""
    values = stored.torch()
    stored.release()  # where they are misaligned they have just been copied, and their pages are not needed again
    return values
