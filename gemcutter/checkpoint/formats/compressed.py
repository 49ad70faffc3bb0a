"""Quantized Hugging Face layouts: compressed-tensors, FP8, ModelOpt, GPTQ, AWQ, AutoRound and Gemma's own mobile files.

Owns what they share: modules have Hugging Face's names, a tensor's ending says what it is to its module's weight, and experts
may be stored one by one. Endings, shapes and dtypes decide how a weight is packed; the config only settles what they leave
open, and must not contradict them. Its lists of targets and ignored modules are never run: they are patterns of a stranger's
making, and a module that was ignored is dense in the file. Scales of activations and caches are not loaded, since both stay
unquantized here. Refuses to know what codes mean: that is in `quant/scaled_int.py` and `quant/microscaling.py`. Source: the
layouts of google's QAT releases, RedHatAI, nvidia, Intel and cyankiwi.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from gemcutter.checkpoint.container.lazy_tensor import DTYPES, LazyTensor
from gemcutter.checkpoint.container.source import Source
from gemcutter.checkpoint.container.stored_tensor import PackedTensor, StoredTensor
from gemcutter.checkpoint.formats import hf, hf_towers
from gemcutter.config import ModelConfig
from gemcutter.errors import CheckpointError
from gemcutter.plan import ModelPlan
from gemcutter.sidecar.small_file import shown
from gemcutter.tower_plan import TowerPlan

if TYPE_CHECKING:  # headers are read without torch
    from torch import Tensor

    from gemcutter.quant.packed import Packed

NAME = "quantized Hugging Face safetensors"
spell = hf.spell

METHODS = ("compressed-tensors", "fp8", "modelopt", "gptq", "awq", "auto-round", "gemma")
FORMATS = (  # of compressed-tensors
    "dense",
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "mixed-precision",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
)
# What a tensor is to its module's weight, by the ending of its name; in the order in which a weight's tensors are listed.
ROLES = {
    "weight": "codes",
    "weight_packed": "codes",
    "embedding_quantized": "codes",
    "qweight": "words",  # columns first, as GPTQ and AWQ store them
    "weight_scale": "scales",
    "weight_scale_inv": "scales",  # a multiplier in spite of its name
    "embedding_scale": "scales",
    "scales": "scales",
    "weight_global_scale": "divisor",
    "weight_scale_2": "factor",
    "weight_zero_point": "zeros",
    "qzeros": "zeros",
    "weight_g_idx": "index",
    "g_idx": "index",
    "weight_shape": "shape",
    "pre_quant_scale": "pre_quant_scale",  # of inputs; known so that it is refused
}
EXPERTS: dict[str, tuple[str, str | None]] = {
    "gate_proj": ("moe.in", "gate"),
    "up_proj": ("moe.in", "up"),
    "gate_up_proj": ("moe.in", None),
    "down_proj": ("moe.out", None),
}
# layers.3.moe.experts.17.down_proj.weight_packed; some writers join the ending with "_" and leave "weight_" out
EXPERT = re.compile(
    r"layers\.([0-9]{1,9})\.(?:moe\.)?experts\.(?:([0-9]{1,9})\.)?(gate_proj|up_proj|gate_up_proj|down_proj)(?:[._](.+))?"
)
ACTIVATIONS = re.compile(r".*[._](?:(?:input|output)_(?:activation_)?|[qkv]_)(?:global_)?(?:scale|zero_point)")
TELLING = re.compile(
    r".*(?:\.(?:qweight|embedding_quantized|weight_(?:packed|scale|scale_inv))|\.quant_state\..*|\.experts\.[0-9]+\..*|_packed)"
)

CODES = ("I32", "U8", "I8", "F8_E4M3")  # dtypes of packed weights
BYTE_SCALES = ("U8", "F8_E8M0")  # exponents: the mark of microscaling
BITS_KEYS, GROUP_KEYS = ("num_bits", "bits", "w_bit"), ("group_size", "q_group_size")
BLOCK_KEYS = ("block_structure", "weight_block_size")
NOT_WEIGHTS = ("input_activations", "output_activations", "kv_cache_scheme", "transform_config", "sparsity_config")
DEFAULT_BLOCK = (128, 128)
REPAIR = "download or convert it again"
SHOWN = 8  # experts that a message lists

Key = tuple[str, str | None]  # of a weight: canonical name and part
Data = LazyTensor | PackedTensor
Tensors = Mapping[str, LazyTensor]  # of one module, by role
Translate = Callable[[LazyTensor], StoredTensor]  # names a tensor canonically


@dataclass(frozen=True, slots=True)
class Claims:
    """What the config says of all weights together: widths in bits, columns of a group, rows and columns of a block."""

    bits: frozenset[int]
    groups: frozenset[int]
    blocks: frozenset[tuple[int, int]]
    needs_zeros: bool  # every group of modules is said to have zero points
    has_plain_zeros: bool  # GPTQ's zero points are stored as they are, not less one


@dataclass(frozen=True, slots=True)
class ModuleLayout:
    """How a module is packed: the scheme's name, the logical shape, and what makes the weight."""

    scheme: str
    shape: tuple[int, ...]
    build: Callable[[], Packed]


def sniff(source: Source) -> bool:
    """Recognise telling endings of names, experts stored one by one, or a config that names a quantization method.

    A method that is left over from the checkpoint that this one was made from, all of whose tensors are dense, does not count.
    """
    if any(TELLING.fullmatch(name) for name in source.tensors):
        return True
    found = _quantization(source)
    return "quant_method" in found and not (hf.is_dense(source) and not any(_changes_dense(found)))


def config(source: Source, ignore: Sequence[str] = ()) -> ModelConfig:
    """Read the config beside the weights.

    Raises CheckpointError if there is none or the weights are quantized in a way that is not read here, ConfigError for bad keys.
    """
    found = hf.read_config(source, ignore)
    problems = list(_refusals(source, _quantization(source)))
    if problems:
        raise CheckpointError(
            f"{source.path}: these quantized weights can't be read; use the checkpoint that they were made from, or one in "
            f"compressed-tensors, GPTQ, AWQ, ModelOpt, MLX or GGUF",
            problems,
        )
    return found


def pieces(source: Source, plan: ModelPlan) -> Iterator[StoredTensor]:
    """Yield every stored tensor under its canonical name, the tensors of a packed module, or of all experts, as one piece."""
    shapes = {spec.name: spec.shape for spec in plan.params()}
    yield from _pieces(source, source.tensors.values(), shapes, hf.translate)


def tower_pieces(source: Source, tower: str, plan: TowerPlan) -> Iterator[StoredTensor]:
    """Yield the stored tensors of a tower as `pieces` does."""
    shapes = {spec.name: spec.shape for spec in plan.params()}
    yield from _pieces(source, hf_towers.tensors_of(source, tower), shapes, hf_towers.piece)


def _pieces(
    source: Source, tensors: Iterable[LazyTensor], shapes: Mapping[str, tuple[int, ...]], translate: Translate
) -> Iterator[StoredTensor]:
    whole = dict[Key, dict[str, LazyTensor]]()
    apart = dict[Key, dict[int, dict[str, LazyTensor]]]()
    for tensor in tensors:
        place = _place(tensor, translate)
        if place is None:
            piece = translate(tensor)
            is_aside = piece.name is None and ACTIVATIONS.fullmatch(tensor.name)
            yield StoredTensor("(scales of activations)", None, tensor) if is_aside else piece
            continue
        key, index, role = place
        if key[0] not in shapes:
            yield StoredTensor(*key, tensor)
            continue
        found = whole.setdefault(key, {}) if index is None else apart.setdefault(key, {}).setdefault(index, {})
        if found.setdefault(role, tensor) is not tensor:
            yield StoredTensor(*key, tensor)  # which the first of this role makes a duplicate
    claims = _claims(_quantization(source))
    for key, roles in whole.items():
        yield _piece(key, roles, partial(_read, roles, shapes[key[0]][-1], claims))
    for key, experts in apart.items():
        if (key[0], None) in whole:
            key = (key[0], None)  # stored both ways: a duplicate
        yield _piece(key, experts[min(experts)], partial(_join, experts, shapes[key[0]], claims))


# ---- names ----


def _place(tensor: LazyTensor, translate: Translate) -> tuple[Key, int | None, str] | None:
    """Return the weight a tensor belongs to, and as what: key, expert if stored apart, and role; None for those of no weight."""
    bare = hf.strip(tensor.name)
    expert = EXPERT.fullmatch(bare)
    if expert:
        layer, index, projection, ending = expert.groups("")
        role = ROLES.get(ending or "weight") or ROLES.get(f"weight_{ending}")
        name, part = EXPERTS[projection]
        return ((f"layers.{int(layer)}.{name}", part), int(index) if index else None, role) if role else None
    module, _, ending = bare.rpartition(".")
    if ending not in ROLES:
        return None
    piece = translate(replace(tensor, name=f"{module}.weight"))
    if piece.name is None or piece.name.startswith("("):
        return None
    return (piece.name, piece.part), None, ROLES[ending]


# ---- one weight ----


def _piece(key: Key, tensors: Tensors, read: Callable[[], Data]) -> StoredTensor:
    """Make a weight's piece; what headers show to be wrong with it becomes the piece's fault."""
    try:
        return StoredTensor(*key, read())
    except ValueError as error:
        return StoredTensor(*key, _listed(tensors)[0], str(error))


def _read(tensors: Tensors, columns: int, claims: Claims) -> Data:
    """Describe a module's weight from headers: packed, or as it is. Raises ValueError with what does not fit."""
    if tensors.keys() == {"codes"} and tensors["codes"].dtype not in CODES:
        return tensors["codes"]
    layout = _layout(tensors, columns, claims)
    stored = _listed(tensors)
    return PackedTensor(stored[0].name, layout.scheme, layout.shape, stored, layout.build)


def _join(experts: Mapping[int, Tensors], shape: tuple[int, ...], claims: Claims) -> PackedTensor:
    """Describe experts that are stored one by one as one weight. Raises ValueError where they do not make up the plan's."""
    surplus = [index for index in sorted(experts) if index >= shape[0]]
    num_missing = shape[0] - len(experts) + len(surplus)
    if num_missing:
        missing = list(islice((index for index in range(shape[0]) if index not in experts), SHOWN + 1))
        raise ValueError(f"{num_missing} of {shape[0]} experts are missing: {_listing(missing)}; {REPAIR}")
    if surplus:
        raise ValueError(f"{shape[0]} experts expected, found {_listing(surplus)} besides; is this the config of these weights?")
    each = [_read(experts[index], shape[-1], claims) for index in range(shape[0])]
    kinds: dict[str, int] = {}
    for index, data in enumerate(each):
        kinds.setdefault(f"{data.dtype} {list(data.shape)}", index)
    if len(kinds) > 1:
        (kind, index), (other, second) = list(kinds.items())[:2]
        raise ValueError(f"experts: all of one kind expected, expert {index} is {kind}, expert {second} {other}")
    stored = tuple(tensor for data in each for tensor in ((data,) if isinstance(data, LazyTensor) else data.stored))
    first = each[0]
    scheme = first.dtype if isinstance(first, PackedTensor) else DTYPES[first.dtype][1]
    return PackedTensor(stored[0].name, scheme, (len(each), *first.shape), stored, partial(_stack, each))


def _layout(tensors: Tensors, columns: int, claims: Claims) -> ModuleLayout:
    """Return how a module is packed. Raises ValueError with what does not fit."""
    codes, scales = tensors.get("codes") or tensors.get("words"), tensors.get("scales")
    if codes is None or scales is None:
        raise ValueError(f"no {'weight' if codes is None else 'scales'} beside {_endings(tensors)}; {REPAIR}")
    if len(codes.shape) not in (2, 3):
        raise ValueError(f"[rows, columns] or [experts, rows, columns] expected, found {list(codes.shape)}")
    if claims.needs_zeros and "zeros" not in tensors:
        raise ValueError(f"no zero points beside {_endings(tensors)}, and config.json says symmetric: false; {REPAIR}")
    if "words" in tensors:
        return _columns_first(tensors, codes, scales, columns, claims)
    has_micro_scales = scales.dtype in BYTE_SCALES or not tensors.keys().isdisjoint(("divisor", "factor"))
    if codes.dtype == "U8" and (has_micro_scales or scales.dtype == "F8_E4M3"):
        return _micro(tensors, codes, scales)
    if codes.dtype == "F8_E4M3" and scales.dtype in BYTE_SCALES:
        return _micro(tensors, codes, scales)
    if codes.dtype in ("I32", "U8"):
        return _integers(tensors, codes, scales, columns, claims)
    if codes.dtype in ("I8", "F8_E4M3"):
        return _values(tensors, codes, scales, claims)
    raise ValueError(f"{', '.join(CODES)} expected beside {scales.name.rpartition('.')[2]}, found {codes.dtype}")


def _integers(tensors: Tensors, codes: LazyTensor, scales: LazyTensor, columns: int, claims: Claims) -> ModuleLayout:
    """Take integers packed along the columns into words, as compressed-tensors has them, or bytes, as Gemma's files do."""
    _check_roles(tensors, "packed integers", "codes", "scales", "zeros", "index", "shape")
    unit, width = 8 * DTYPES[codes.dtype][0], codes.shape[-1]
    bits = _bits(width, unit, columns, claims)
    group = _group(columns, scales.shape[-1] if len(scales.shape) == len(codes.shape) else 1, claims)
    kind = "packed" if width == _over(columns * bits, unit) else "words"
    shape = (*codes.shape[:-1], columns)
    return ModuleLayout(_scheme(f"{kind}{bits}", group, tensors), shape, partial(_build_integers, tensors, shape, bits, group))


def _values(tensors: Tensors, codes: LazyTensor, scales: LazyTensor, claims: Claims) -> ModuleLayout:
    """Take int8 or float8 values with a scale of the tensor, of each row, of runs of columns or of blocks."""
    _check_roles(tensors, "8-bit values", "codes", "scales", "zeros", "shape")
    block = _block(codes.shape, scales, claims)
    group = block[1] if block and scales.shape[-1] > 1 else None
    scheme = _scheme("int8" if codes.dtype == "I8" else "fp8", group, tensors)
    return ModuleLayout(scheme, codes.shape, partial(_build_values, tensors, block))


def _micro(tensors: Tensors, codes: LazyTensor, scales: LazyTensor) -> ModuleLayout:
    """Take microscaling floats: exponents as scales, or small floats with one number of the matrix beside them."""
    is_nv = scales.dtype not in BYTE_SCALES or not tensors.keys().isdisjoint(("divisor", "factor"))
    scheme = "nvfp4" if is_nv else "mxfp4" if codes.dtype == "U8" else "mxfp8"
    if is_nv and tensors.keys().isdisjoint(("divisor", "factor")):
        raise ValueError(f"no weight_global_scale or weight_scale_2 beside {_endings(tensors)}; {REPAIR}")
    second = "divisor" if "divisor" in tensors else "factor"
    _check_roles(tensors, scheme, "codes", "scales", "shape", *((second,) if is_nv else ()))
    shape = (*codes.shape[:-1], codes.shape[-1] * (1 if scheme == "mxfp8" else 2))
    return ModuleLayout(scheme, shape, partial(_build_micro, tensors, shape))


def _columns_first(tensors: Tensors, words: LazyTensor, scales: LazyTensor, columns: int, claims: Claims) -> ModuleLayout:
    """Take GPTQ's words, which hold neighbouring columns, or AWQ's, which hold neighbouring rows: the scales tell which."""
    if "zeros" not in tensors:
        raise ValueError(f"no qzeros beside {_endings(tensors)}; {REPAIR}")
    if len(words.shape) != 2 or len(scales.shape) != 2:
        raise ValueError(f"qweight and scales: two axes expected, found {list(words.shape)} and {list(scales.shape)}")
    groups, rows = scales.shape
    if words.shape[0] == columns and 8 * words.shape[1] == rows:
        _check_roles(tensors, "AWQ", "words", "scales", "zeros")
        scheme = f"awq4g{columns // max(groups, 1)}"
        return ModuleLayout(scheme, (rows, columns), partial(_build_awq, tensors))
    bits = 32 * words.shape[0] // columns
    if words.shape[1] != rows or 32 * words.shape[0] != bits * columns:
        raise ValueError(
            f"qweight {list(words.shape)} and scales {list(scales.shape)} for {columns} columns: GPTQ's [columns * bits / 32, "
            "rows] or AWQ's [columns, rows / 8], and [groups, rows] expected"
        )
    _check_roles(tensors, "GPTQ", "words", "scales", "zeros", "index")
    if claims.bits and bits not in claims.bits:
        raise ValueError(f"qweight: {bits} bits by its shape, config.json says {_listing(sorted(claims.bits))}")
    group = _group(columns, groups, claims)
    return ModuleLayout(
        _scheme(f"gptq{bits}", group, tensors),
        (rows, columns),
        partial(_build_gptq, tensors, bits, group, claims.has_plain_zeros),
    )


def _bits(width: int, unit: int, columns: int, claims: Claims) -> int:
    """Return how wide integers are of which so many columns take `width` words of `unit` bits. Raises ValueError."""
    fits = [bits for bits in range(1, 9) if width == _over(columns * bits, unit)]
    if unit == 32:  # no integer straddles words in files older than compressed-tensors 0.20
        fits += [bits for bits in range(1, 9) if bits not in fits and width == _over(columns, unit // bits)]
    chosen = [bits for bits in fits if not claims.bits or bits in claims.bits]
    if len(chosen) == 1:
        return chosen[0]
    known = _listing(sorted(claims.bits))
    if not fits:
        raise ValueError(f"{width} items of {unit} bits a row do not hold {columns} columns of 1 to 8 bits")
    if not chosen:
        raise ValueError(f"{_listing(sorted(fits))} bits by its width, config.json says {known}; use the config of these weights")
    raise ValueError(f"{_listing(sorted(chosen))} bits would all fit its width; config.json must name the one that is meant")


def _group(columns: int, groups: int, claims: Claims) -> int | None:
    """Return the columns of a group, None for whole rows; by the config where a group of its size fits, or else by division."""
    if groups <= 1:
        return None
    named = [group for group in claims.groups if _over(columns, group) == groups]
    if len(named) > 1:
        raise ValueError(f"groups of {_listing(sorted(named))} columns would all fit the scales; config.json must name one")
    if not named and columns % groups:
        raise ValueError(f"scales: {groups} groups do not divide {columns} columns, and config.json names no group that fits")
    return named[0] if named else columns // groups


def _block(shape: tuple[int, ...], scales: LazyTensor, claims: Claims) -> tuple[int, int] | None:
    """Return the rows and columns that share a scale; None where scales are of the tensor or its rows."""
    rows, columns = shape[-2:]
    if len(scales.shape) != len(shape) or scales.shape[-2:] == (rows, 1) or math.prod(scales.shape) == 1:
        return None
    found = scales.shape[-2:]
    if found[0] == rows:
        return 1, _group(columns, found[1], claims) or columns
    blocks = sorted(claims.blocks | {DEFAULT_BLOCK, (max(rows, 1), max(columns, 1))})
    fits = [block for block in blocks if found == (_over(rows, block[0]), _over(columns, block[1]))]
    if not fits:
        known = " or ".join(f"{block[0]} x {block[1]}" for block in blocks[:SHOWN])
        raise ValueError(f"scales {list(scales.shape)}: one for each block of {known} of {list(shape)} expected")
    return fits[0]


def _scheme(start: str, group: int | None, tensors: Tensors) -> str:
    return f"{start}{f'g{group}' if group else ''}{'z' if 'zeros' in tensors else ''}"


def _over(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


def _check_roles(tensors: Tensors, kind: str, *known: str) -> None:
    """Raise ValueError if a module has tensors that mean nothing to its layout: passing over them would change the maths."""
    extra = {role: tensor for role, tensor in tensors.items() if role not in known}
    if extra:
        raise ValueError(f"{_endings(extra)} beside it: {kind} have no such tensor, or none that is read here")


def _listed(tensors: Tensors) -> tuple[LazyTensor, ...]:
    """List a module's tensors, codes first."""
    return tuple(tensors[role] for role in dict.fromkeys(ROLES.values()) if role in tensors)


def _endings(tensors: Tensors) -> str:
    return " and ".join(tensor.name.rpartition(".")[2] for tensor in _listed(tensors))


def _listing(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:SHOWN])) + (", ..." if len(numbers) > SHOWN else "")


# ---- the weights themselves ----


def _optional(tensors: Tensors, role: str) -> Tensor | None:
    return tensors[role].torch() if role in tensors else None


def _build_integers(tensors: Tensors, shape: tuple[int, ...], bits: int, group: int | None) -> Packed:
    from gemcutter.quant.scaled_int import from_packed

    _check_shape(tensors, shape)
    zeros, group_of = _optional(tensors, "zeros"), _optional(tensors, "index")
    codes, scales = tensors["codes"].torch(), tensors["scales"].torch()
    return from_packed(codes, scales, bits, shape[-1], zeros=zeros, group=group, group_of=group_of)


def _build_values(tensors: Tensors, block: tuple[int, int] | None) -> Packed:
    from gemcutter.quant.scaled_int import from_values

    codes, scales = tensors["codes"].torch(), tensors["scales"].torch()
    _check_shape(tensors, tuple(codes.shape))
    return from_values(codes, scales, zeros=_optional(tensors, "zeros"), block=block)


def _build_micro(tensors: Tensors, shape: tuple[int, ...]) -> Packed:
    from gemcutter.quant.microscaling import from_compressed, from_modelopt

    _check_shape(tensors, shape)
    codes, scales = tensors["codes"].torch(), tensors["scales"].torch()
    if "factor" in tensors:
        weight = from_modelopt(codes, scales, tensors["factor"].torch())
    else:
        weight = from_compressed(codes, scales, _optional(tensors, "divisor"))
    for role in ("divisor", "factor"):  # of the whole matrix: a bad one would make every value zero, infinite or NaN
        for value in tensors[role].torch().flatten().tolist() if role in tensors else ():
            if not 0 < value < math.inf:
                raise ValueError(f"{tensors[role].name.rpartition('.')[2]}: positive numbers expected, found {value}")
    return weight


def _build_gptq(tensors: Tensors, bits: int, group: int | None, has_plain_zeros: bool) -> Packed:
    from gemcutter.quant.scaled_int import from_gptq

    words, zeros, scales = (tensors[role].torch() for role in ("words", "zeros", "scales"))
    return from_gptq(words, zeros, scales, bits, group=group, group_of=_optional(tensors, "index"), is_v2=has_plain_zeros)


def _build_awq(tensors: Tensors) -> Packed:
    from gemcutter.quant.scaled_int import from_awq

    return from_awq(tensors["words"].torch(), tensors["zeros"].torch(), tensors["scales"].torch())


def _stack(items: Sequence[Data]) -> Packed:
    from gemcutter.quant.packed import stack

    return stack([item.torch() if isinstance(item, LazyTensor) else item.build() for item in items])


def _check_shape(tensors: Tensors, shape: tuple[int, ...]) -> None:
    """Raise ValueError if the file says another shape than its arrays and the plan have."""
    said = tensors.get("shape")
    if said is None:
        return
    is_small = said.dtype in ("I64", "I32") and math.prod(said.shape) in (2, 3)
    sizes = said.torch().flatten().tolist() if is_small else None
    if sizes not in (list(shape), list(shape[-2:])):
        raise ValueError(f"weight_shape: {list(shape)} expected, found {sizes or f'{said.dtype} {list(said.shape)}'}")


# ---- what the config says ----


def _quantization(source: Source) -> dict[str, Any]:
    """Return the config's account of the quantization, or that of the file in which ModelOpt used to put it; {} for neither."""
    raw = source.read_json("config.json") or {}
    if "quantization" in raw:  # MLX's key
        return {}
    found = raw.get("quantization_config")
    if found is None:
        apart = (source.read_json("hf_quant_config.json") or {}).get("quantization")
        found = {"quant_method": "modelopt"} | apart if isinstance(apart, dict) else None
    return found if isinstance(found, dict) else {}


def _refusals(source: Source, quantization: Mapping[str, Any]) -> Iterator[str]:
    """Return what of the config can't be read here; what only concerns single weights is found with them."""
    method = quantization.get("quant_method")
    if method is None and any(".quant_state." in name for name in source.tensors):
        method = "bitsandbytes"
    if method is not None and method not in METHODS:
        yield f"quant_method {shown(method)}: expected one of {', '.join(METHODS)}"
    formats = {found["format"] for found in _objects(quantization) if isinstance(found.get("format"), str)}
    if method == "compressed-tensors":
        yield from (
            f"format {shown(each)}: expected one of {', '.join(FORMATS)}" for each in sorted(formats) if each not in FORMATS
        )
    yield from _changes_dense(quantization)


def _changes_dense(quantization: Mapping[str, Any]) -> Iterator[str]:
    """Return what of the config gives dense tensors another meaning, which is not read here."""
    transform, sparsity = quantization.get("transform_config"), quantization.get("sparsity_config")
    if isinstance(transform, dict) and transform.get("config_groups"):
        yield "transform_config: its weights fit transformed activations only, which are not made here"
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        yield f"sparsity_config.format {shown(sparsity['format'])}: only dense tensors are read"


def _claims(quantization: Mapping[str, Any]) -> Claims:
    """Gather what the config says of weights, wherever in it."""
    bits, groups, blocks, symmetric = set[int](), set[int](), set[tuple[int, int]](), set[bool]()
    for found in _objects(quantization):
        bits |= {found[key] for key in BITS_KEYS if type(found.get(key)) is int and 1 <= found[key] <= 8}
        groups |= {found[key] for key in GROUP_KEYS if type(found.get(key)) is int and found[key] > 0}
        symmetric |= {found[key] for key in ("symmetric",) if isinstance(found.get(key), bool)}
        for key in BLOCK_KEYS:
            block = found.get(key)
            if isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block):
                blocks.add((block[0], block[1]))
    packing = str(quantization.get("packing_format") or quantization.get("backend") or "gptq")
    is_plain = quantization.get("quant_method") == "auto-round" and "gptq" not in packing
    is_v2 = quantization.get("checkpoint_format") == "gptq_v2"
    return Claims(frozenset(bits), frozenset(groups), frozenset(blocks), symmetric == {False}, is_plain or is_v2)


def _objects(quantization: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield every object within the config that speaks of weights; a stack, because a file may nest without end."""
    left = [quantization]
    while left:
        found = left.pop()
        yield found
        left += [value for key, value in found.items() if key not in NOT_WEIGHTS and isinstance(value, dict)]
