"""From every scheme to panels, without loss: which schemes have such a form, and which numbers theirs are.

Owns `pack_for_cpu`, which repacks a part a few panels at a time, and one small function a scheme that takes its bytes apart
into a `UnpackedWeight`. Values stay what the scheme's own `dequantize` says, bit for bit; only zero points that differ by group
become biases, which rounds once more where the scales are float32. 8-bit floats stay such. Refuses to know files. Read
`cpu_layout.py` for grids, `csrc/cpu/repack.cpp` for the same work done natively.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from gemcutter.native import Matrix
from gemcutter.quant.affine import Affine
from gemcutter.quant.bits import E2M1_DOUBLED, float8, halves, planes, unpack
from gemcutter.quant.cpu_layout import (
    BF16,
    BLOCK,
    E4M3,
    F16,
    F32,
    PANEL,
    S8,
    SCALES_OF,
    SUPER16,
    SUPER32,
    T4,
    U4,
    U6,
    PackedLayout,
    UnpackedWeight,
    to_panels,
)
from gemcutter.quant.cpu_packed import CpuPackedWeight
from gemcutter.quant.gguf_blocks import Blocks
from gemcutter.quant.gguf_blocks_iq import LEVEL_TYPES
from gemcutter.quant.gguf_blocks_short import NONLINEAR
from gemcutter.quant.gguf_blocks_ternary import codes_tq1_0, codes_tq2_0
from gemcutter.quant.hugepage_arena import allocate
from gemcutter.quant.microscaling import Micro
from gemcutter.quant.native_repack import BLOCK_KINDS, STREAM_KINDS, RepackSource, repack
from gemcutter.quant.packed import Packed, Stack
from gemcutter.quant.scaled_int import Awq, ScaledInt

CHUNK_ELEMENTS = 1 << 20  # of a matrix taken apart at a time: some 10 MB while they are repacked
NATIVE_CHUNK_ELEMENTS = 1 << 24  # of a matrix read at a time, whose mapped pages are given back: 9 to 17 MB


def pack_for_cpu(part: Packed, after_chunk: Callable[[], None] | None = None) -> CpuPackedWeight | None:
    """Repack a matrix or a stack of them; None where the scheme, its groups or its columns have no form as panels.

    `after_chunk` is called when some rows of `part` were read and are not needed again.
    """
    layout = None if 0 in part.shape else cpu_layout_of(part)
    if layout is None:
        return None
    *experts, rows, columns = part.shape
    data = allocate((*experts, -(-rows // PANEL), layout.stride(columns)))
    whole = CpuPackedWeight(data, rows, columns, layout, part.scheme, order_of(part))
    for index in range(part.shape[0] if experts else 1):
        source, target = (part.expert(index), whole.expert(index)) if experts else (part, whole)
        assert not isinstance(source, Tensor)
        elements = CHUNK_ELEMENTS if source_of(source) is None else NATIVE_CHUNK_ELEMENTS
        step = max(PANEL, elements // columns // PANEL * PANEL)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            _fill(target.rows(start, stop), source.rows(start, stop))
            if after_chunk is not None:
                after_chunk()
    return whole


def _fill(target: CpuPackedWeight, source: Packed) -> None:
    """Write rows as panels: natively where the library knows the scheme, else as the definition does."""
    stored = source_of(source)
    if stored is None or not repack(stored, target.matrix(), torch.get_num_threads()):
        target.data.copy_(to_panels(take_apart(source)))


def source_of(part: Packed) -> RepackSource | None:
    """Return where rows lie for the native library; None where it does not know the scheme."""
    if isinstance(part, Blocks) and part.scheme in BLOCK_KINDS and part.data.stride(-1) == 1:
        return RepackSource(codes=part.data.data_ptr(), code_stride=part.data.stride(-2), kind=BLOCK_KINDS[part.scheme])
    if isinstance(part, Affine) and part.bits in STREAM_KINDS and _affine_dtype(part) == part.scales.dtype:
        return _stream(part.codes, part.scales, part.biases, part.bits, 128)
    if isinstance(part, ScaledInt) and part.zeros is None and part.group_of is None and _is_stream(part):
        return _stream(part.codes, part.scales, None, part.bits, 0 if part.kind == "int" else 128)
    return None


def _is_stream(part: ScaledInt) -> bool:
    return part.kind in ("packed", "int") and part.bits in STREAM_KINDS


def _stream(codes: Tensor, scales: Tensor, biases: Tensor | None, bits: int, flip: int) -> RepackSource | None:
    """Describe codes without gaps; None where a row's codes or scales do not lie side by side."""
    numbers = [scales] if biases is None else [scales, biases]
    strides = {each.stride(-2) for each in numbers}
    if codes.stride(-1) != 1 or len(strides) > 1 or any(each.stride(-1) != 1 and each.shape[-1] > 1 for each in numbers):
        return None
    return RepackSource(
        codes=codes.data_ptr(),
        scales=scales.data_ptr(),
        biases=None if biases is None else biases.data_ptr(),
        code_stride=codes.stride(-2) * codes.itemsize,
        scale_stride=strides.pop() * scales.itemsize,
        kind=STREAM_KINDS[bits],
        flip=flip if bits == 8 else 0,
    )


def join(chunks: Iterable[Packed], shape: tuple[int, ...]) -> CpuPackedWeight:
    """Repack a matrix or a stack of them, `shape`, that comes as rows in order: multiples of 16, but for the last of a matrix."""
    *experts, rows, columns = shape
    whole: CpuPackedWeight | None = None
    done = 0  # panels of all matrices
    for chunk in chunks:
        grid = take_apart(chunk)
        if whole is None:
            data = allocate((*experts, -(-rows // PANEL), grid.layout.stride(columns)))
            whole = CpuPackedWeight(data, rows, columns, grid.layout, chunk.scheme)
        some = to_panels(grid)
        whole.data.flatten(0, -2)[done : done + len(some)] = some
        done += len(some)
    assert whole is not None
    assert done == whole.data.shape[:-1].numel()
    return whole


def cpu_layout_of(part: Packed) -> PackedLayout | None:
    """Return how a part would be coded as panels; None if it can't be."""
    if isinstance(part, Stack):
        return cpu_layout_of(part.items[0])
    columns, layout = part.shape[-1], None
    if isinstance(part, Blocks):
        found = BLOCK_TYPES.get(part.scheme)
        layout = None if found is None else found[0]
    elif isinstance(part, Affine):
        layout = _affine_layout(part)
    elif isinstance(part, Micro) and part.scheme == "mxfp8":
        layout = PackedLayout(E4M3, BF16, part.group)
    elif isinstance(part, Micro):
        scales = BF16 if part.scheme == "mxfp4" else F16 if part.factor is None else F32
        layout = PackedLayout(T4, scales, part.group, levels=E2M1_DOUBLED)
    elif isinstance(part, ScaledInt):
        layout = _scaled_layout(part)
    elif isinstance(part, Awq):
        layout = PackedLayout(U4, F32, part.group, has_bias=True)
    if layout is None or columns % layout.run or (layout.group % BLOCK and layout.group != BLOCK // 2):
        return None
    return layout


def take_apart(part: Packed) -> UnpackedWeight:
    """Take rows of a single matrix apart, on the device that they lie on; their scheme must have a layout."""
    layout = cpu_layout_of(part)
    assert layout is not None
    if isinstance(part, Blocks):
        codes, *arrays = BLOCK_TYPES[part.scheme][1](part.data.reshape(-1, part.kind.nbytes))
        rows, columns = part.shape
        return UnpackedWeight(layout, codes.reshape(rows, columns), tuple(array.reshape(rows, -1) for array in arrays))
    if isinstance(part, Affine):
        codes, dtype = unpack(part.codes, part.bits, dtype=torch.uint8), _affine_dtype(part)
        return UnpackedWeight(layout, codes ^ 128 if part.bits == 8 else codes, (part.scales.to(dtype), part.biases.to(dtype)))
    if isinstance(part, Micro) and part.scheme == "mxfp8":
        return UnpackedWeight(layout, part.codes, (float8(part.scales, torch.float8_e8m0fnu).bfloat16(),))
    if isinstance(part, Micro):
        return UnpackedWeight(layout, unpack(part.codes, 4, dtype=torch.uint8), (_micro_scales(part),))
    if isinstance(part, ScaledInt):
        return _scaled_grid(part, layout)
    assert isinstance(part, Awq)
    codes, zeros = part.integers()
    scales = part.scales.index_select(1, part.chosen).t().float()
    return UnpackedWeight(layout, codes.contiguous(), (scales, -(scales * zeros)))


# ---- numbers with scales: MLX, compressed-tensors, GPTQ, AWQ ----


def _affine_dtype(part: Affine) -> torch.dtype:
    return part.scales.dtype if part.scales.dtype == part.biases.dtype else torch.float32


def _affine_layout(part: Affine) -> PackedLayout:
    codes = U4 if part.bits <= 4 else U6 if part.bits <= 6 else S8
    return PackedLayout(codes, SCALES_OF[_affine_dtype(part)], part.group, True, 128 if codes == S8 else 0)


def order_of(part: Packed) -> Tensor | None:
    """Return the columns of a matrix sorted by group, int32; None where groups lie one after the other."""
    if not isinstance(part, ScaledInt) or part.group_of is None:
        return None
    return part.group_of.argsort(stable=True).to(torch.int32)


def _group_size(part: ScaledInt) -> int | None:
    """Return how many columns each group has; None where they differ, or experts have groups of their own."""
    if part.group_of is None:
        group = part.group or part.num_columns
        return None if part.num_columns % group else group  # the last group may be shorter
    groups = part.scales.shape[-1]
    if len(part.shape) > 2:
        return None
    counts = part.group_of.bincount(minlength=groups)
    return part.num_columns // groups if bool((counts * groups == part.num_columns).all()) else None


def _scaled_layout(part: ScaledInt) -> PackedLayout | None:
    group = _group_size(part)
    if group is None:
        return None
    if part.kind == "fp":
        return None if part.zeros is not None else PackedLayout(E4M3, SCALES_OF[part.scales.dtype], group)
    codes = U4 if part.bits <= 4 else U6 if part.bits <= 6 else S8
    offset = 128 if part.bits == 8 and part.kind != "int" else 0
    if part.zeros is not None:
        return PackedLayout(codes, F32, group, True, offset)
    return PackedLayout(codes, SCALES_OF[part.scales.dtype], group, offset=offset - part.zero)


def _scaled_grid(part: ScaledInt, layout: PackedLayout) -> UnpackedWeight:
    codes, order = (part.codes if part.kind == "fp" else part.integers()).view(torch.uint8), order_of(part)
    codes = codes.contiguous() if order is None else codes.index_select(-1, order)
    if part.kind == "fp":
        return UnpackedWeight(layout, codes, (part.scales,))
    if part.bits == 8 and part.kind != "int":
        codes = codes ^ 128
    if part.zeros is None:
        return UnpackedWeight(layout, codes, (part.scales,))
    scales = part.scales.float()  # of 16 bits, as they nearly always are, times 8-bit zero points: exact
    return UnpackedWeight(layout, codes, (scales, -(scales * (part.zeros.float() + part.zero))))


def _micro_scales(part: Micro) -> Tensor:
    """Halve the scales, in a dtype that holds them exactly."""
    if part.scheme == "mxfp4":
        return float8(part.scales, torch.float8_e8m0fnu).mul_(0.5).bfloat16()
    scales = float8(part.scales, torch.float8_e4m3fn)
    if part.factor is None:
        return scales.mul_(0.5).half()
    return (scales / part.factor if part.is_divisor else scales * part.factor).mul_(0.5)


# ---- GGUF: uint8 [B, bytes of a block] to codes and arrays, [B, numbers] each ----


def _fifth_bits(blocks: Tensor, start: int) -> Tensor:
    return planes(blocks[:, start + 4 :], 4, 16) | unpack(blocks[:, start : start + 4], 1, dtype=torch.uint8) << 4


def _six_bits(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Read the scales and minima of Q4_K and Q5_K, uint8 [B, 8] each."""
    low, minimum, nibbles = blocks[:, 4:16].chunk(3, dim=-1)
    scales = torch.cat((low & 63, nibbles & 15 | low >> 2 & 48), dim=-1)
    return scales, torch.cat((minimum & 63, nibbles >> 4 | minimum >> 2 & 48), dim=-1)


def _q4_0(blocks: Tensor) -> tuple[Tensor, ...]:
    return planes(blocks[:, 2:], 4, 16), halves(blocks, 0)


def _q4_1(blocks: Tensor) -> tuple[Tensor, ...]:
    return planes(blocks[:, 4:], 4, 16), halves(blocks, 0), halves(blocks, 2)


def _q5_0(blocks: Tensor) -> tuple[Tensor, ...]:
    return _fifth_bits(blocks, 2), halves(blocks, 0)


def _q5_1(blocks: Tensor) -> tuple[Tensor, ...]:
    return _fifth_bits(blocks, 4), halves(blocks, 0), halves(blocks, 2)


def _q8_0(blocks: Tensor) -> tuple[Tensor, ...]:
    return blocks[:, 2:], halves(blocks, 0)


def _iq4_nl(blocks: Tensor) -> tuple[Tensor, ...]:
    return planes(blocks[:, 2:], 4, 16), halves(blocks, 0)


def _mxfp4(blocks: Tensor) -> tuple[Tensor, ...]:
    """2^(e - 128), also for e = 255; the two smallest are subnormal."""
    exponent = blocks[:, :1].int()
    bits = torch.where(exponent < 2, 0x00200000 << exponent.clamp(max=1), (exponent - 1) << 23)
    return planes(blocks[:, 1:], 4, 16), bits.view(torch.float32).bfloat16()


def _nvfp4(blocks: Tensor) -> tuple[Tensor, ...]:
    """Scales without a sign: 0x7F is zero, and 0xFF is 480."""
    scales = float8(blocks[:, :4] & 0x7F, torch.float8_e4m3fn).nan_to_num_(480).mul_(0.5)
    return planes(blocks[:, 4:], 4, 8), torch.where(blocks[:, :4] == 0x7F, 0.0, scales).half()


def _q2_k(blocks: Tensor) -> tuple[Tensor, ...]:
    """Short runs with minima have no form of their own: scales and biases become float32."""
    scales = halves(blocks, 80).float() * (blocks[:, :16] & 15)
    return planes(blocks[:, 16:80], 2, 32), scales, -(halves(blocks, 82).float() * (blocks[:, :16] >> 4))


def _q3_k(blocks: Tensor) -> tuple[Tensor, ...]:
    scales = planes(blocks[:, 96:104], 4, 8) | planes(blocks[:, 104:108], 2, 4) << 4
    codes = planes(blocks[:, 32:96], 2, 32) | planes(blocks[:, :32], 1, 32) << 2
    return codes, halves(blocks, 108), scales.view(torch.int8) - 32


def _q4_k(blocks: Tensor) -> tuple[Tensor, ...]:
    return planes(blocks[:, 16:], 4, 32), halves(blocks, 0), halves(blocks, 2), *_six_bits(blocks)


def _q5_k(blocks: Tensor) -> tuple[Tensor, ...]:
    codes = planes(blocks[:, 48:], 4, 32) | planes(blocks[:, 16:48], 1, 32) << 4
    return codes, halves(blocks, 0), halves(blocks, 2), *_six_bits(blocks)


def _q6_k(blocks: Tensor) -> tuple[Tensor, ...]:
    codes = planes(blocks[:, :128], 4, 64) | planes(blocks[:, 128:192], 2, 32) << 4
    return codes, halves(blocks, 208), blocks[:, 192:208].view(torch.int8)


def _iq4_xs(blocks: Tensor) -> tuple[Tensor, ...]:
    """Runs of 32 as two of 16 with one scale."""
    scales = unpack(blocks[:, 4:8], 4, dtype=torch.uint8) | unpack(blocks[:, 2:4], 2, dtype=torch.uint8) << 4
    signed = scales.view(torch.int8).sub(32).repeat_interleave(2, -1)
    return planes(blocks[:, 8:], 4, 16), halves(blocks, 0), signed


BLOCK_TYPES: dict[str, tuple[PackedLayout, Callable[[Tensor], tuple[Tensor, ...]]]] = {
    "Q4_0": (PackedLayout(U4, F16, 32, offset=-8), _q4_0),
    "Q4_1": (PackedLayout(U4, F16, 32, has_bias=True), _q4_1),
    "Q5_0": (PackedLayout(U6, F16, 32, offset=-16), _q5_0),
    "Q5_1": (PackedLayout(U6, F16, 32, has_bias=True), _q5_1),
    "Q8_0": (PackedLayout(S8, F16, 32), _q8_0),
    "IQ4_NL": (PackedLayout(T4, F16, 32, levels=NONLINEAR), _iq4_nl),
    "MXFP4": (PackedLayout(T4, BF16, 32, levels=E2M1_DOUBLED), _mxfp4),
    "NVFP4": (PackedLayout(T4, F16, 16, levels=E2M1_DOUBLED), _nvfp4),
    "Q2_K": (PackedLayout(U4, F32, 16, has_bias=True), _q2_k),
    "Q3_K": (PackedLayout(U4, SUPER16, 16, offset=-4), _q3_k),
    "Q4_K": (PackedLayout(U4, SUPER32, 32), _q4_k),
    "Q5_K": (PackedLayout(U6, SUPER32, 32), _q5_k),
    "Q6_K": (PackedLayout(U6, SUPER16, 16, offset=-32), _q6_k),
    "IQ4_XS": (PackedLayout(T4, SUPER16, 16, levels=NONLINEAR), _iq4_xs),
    **{
        name: (PackedLayout(T4, SUPER16, 16, levels=each.levels, exponent=each.exponent), each.split)
        for name, each in LEVEL_TYPES.items()
    },
    "TQ1_0": (PackedLayout(U4, F16, 256, offset=-1), lambda blocks: (codes_tq1_0(blocks), halves(blocks, 52))),
    "TQ2_0": (PackedLayout(U4, F16, 256, offset=-1), lambda blocks: (codes_tq2_0(blocks), halves(blocks, 64))),
}


def row_source(part: Packed) -> tuple[Matrix, RepackSource] | None:
    """Describe a matrix whose rows the native library lays out one by one, and the form of such a row; None if it can't."""
    source, layout = source_of(part), cpu_layout_of(part)
    if source is None or layout is None or len(part.shape) != 2:
        return None
    row = CpuPackedWeight(torch.empty(1, 0, dtype=torch.uint8), 1, part.shape[1], layout, part.scheme).matrix()
    row.data, row.stride = None, layout.stride(part.shape[1])
    return row, source
