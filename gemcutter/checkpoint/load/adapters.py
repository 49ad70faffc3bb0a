"""Brings adapters to a model's weights: folded in for good, or carried beside them for the requests that ask.

Owns the arithmetic of folding (float32, some rows at a time, one rounding) and what each way costs. Refuses to know names: read
`formats/lora.py` for those, `quant/lora.py` for a delta, `ops/lora.py` for what happens to deltas at run time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gemcutter.checkpoint.container.lazy_tensor import LazyTensor
from gemcutter.checkpoint.formats.lora import Adapter, Factors
from gemcutter.checkpoint.load.match import Checkpoint
from gemcutter.errors import CheckpointError
from gemcutter.quant import Part, Weight, dequantize
from gemcutter.quant.carried import carry
from gemcutter.quant.lora import Delta, cut_deltas
from gemcutter.quant.packed import dtype_name

Params = Mapping[str, Weight | Tensor]

FOLD_ELEMENTS = 1 << 22  # elements of a weight that are dequantized at a time


def fold(
    params: Params, adapter: Adapter, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, Weight | Tensor], str]:
    """Add an adapter's changes to the weights, for all requests, and return the parameters and a note of what that costs.

    Only the parts that change are copied, dense and as `dtype`, whatever they were before; the others stay as they are.
    """
    folded, before, after = dict(params), 0, 0
    for name, factors in _by_parameter(adapter).items():
        weight = _weight(params, name)
        deltas = [_delta("", each, weight, device) for each in factors]
        parts = list[Part]()
        for part, (start, stop) in zip(weight.parts, weight.edges(), strict=True):
            found = tuple(cut_deltas(deltas, start, stop))
            parts.append(_fold_part(part, found, dtype, device) if found else part)
            before += part.nbytes if found else 0
            after += parts[-1].nbytes if found else 0
        folded[name] = replace(weight, parts=tuple(parts))
        _release(checkpoint, name)
    note = (
        f"adapter {adapter.path.name}: {len(adapter.factors)} changes merged; what they change is held as {dtype_name(dtype)}, "
        f"{after / 1e6:.1f} MB in memory beside {before / 1e6:.1f} MB in the file"
    )
    return folded, note


def attach(params: Params, adapter: Adapter, name: str, device: torch.device) -> dict[str, Weight | Tensor]:
    """Let the weights carry an adapter's changes under a name, for the requests that ask for it. Raises as `read_deltas` does."""
    return carry(params, read_deltas(params, adapter, name, device))


def read_deltas(params: Params, adapter: Adapter, name: str, device: torch.device) -> dict[str, list[Delta]]:
    """Read an adapter's changes of these parameters, by parameter, scaled and in float32, into memory of their own.

    Raises CheckpointError for changes that can't be told apart by rows: of experts, which see only the rows sent to them, and of
    a head of its own, which sees only the rows that want logits.
    """
    stuck = [each for each in adapter.factors if each.experts or each.name == "head"]
    if stuck:
        problems = [f"{each.label}: {each.down.origin}" for each in stuck]
        raise CheckpointError(f"the adapter {adapter.path} can only be merged (adapter=, --adapter): it changes these", problems)
    return {
        parameter: [_delta(name, each, _weight(params, parameter), device) for each in factors]
        for parameter, factors in _by_parameter(adapter).items()
    }


def _by_parameter(adapter: Adapter) -> dict[str, list[Factors]]:
    found: dict[str, list[Factors]] = {}
    for each in adapter.factors:
        found.setdefault(each.name, []).append(each)
    return found


def _weight(params: Params, name: str) -> Weight:
    found = params[name]
    assert isinstance(found, Weight), name
    return found


def _delta(name: str, factors: Factors, weight: Weight, device: torch.device) -> Delta:
    """Read a pair of factors, scaled; PEFT keeps the rows of an expert's A together and the columns of its B apart."""
    down, up = (half.torch().to(device, torch.float32, copy=True) for half in (factors.down, factors.up))
    if factors.experts:
        down = down.view(factors.experts, factors.rank, -1)
        up = up.view(-1, factors.rank, factors.experts).permute(2, 0, 1).contiguous()
    start = 0 if factors.part is None else weight.edges()[weight.names.index(factors.part)][0]
    return Delta(name, start, down, up.mul_(factors.scale))


def _fold_part(part: Part, deltas: Sequence[Delta], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Compute a part and its changes in float32, and round once."""
    out = torch.empty(part.shape, dtype=dtype, device=device)
    whole = Weight((part,), deltas=tuple(deltas))
    pairs = [(whole, out)] if out.ndim == 2 else [(whole.expert(index), each) for index, each in enumerate(out.unbind(0))]
    for weight, target in pairs:
        start = 0
        for rows in weight.row_chunks(FOLD_ELEMENTS):
            wide, stop = dequantize(rows).to(device), start + rows.shape[0]
            for delta in weight.deltas:
                wide = wide.addmm(delta.up[start:stop], delta.down)
            target[start:stop] = wide
            start = stop
    return out


def _release(checkpoint: Checkpoint, name: str) -> None:
    """Release the mapped pages that were only read to be changed."""
    for piece in checkpoint.matched.pieces[name]:
        for tensor in (piece.data,) if isinstance(piece.data, LazyTensor) else piece.data.stored:
            tensor.release()
