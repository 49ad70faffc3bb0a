"""Brings adapters to a model's weights: folded in for good, or carried beside them for the requests that ask.

Owns the arithmetic of folding (float32, some rows at a time, one rounding or quantization), for loading and for converting, and
what each way costs. Refuses to know names: read `formats/lora.py` for those, `quant/lora.py` for a delta, `ops/lora.py` for what
happens to deltas at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from gemcutter.checkpoint.container.stored_tensor import StoredTensor, release_pages
from gemcutter.checkpoint.formats.lora import Adapter, Factors
from gemcutter.checkpoint.load.match import Checkpoint
from gemcutter.checkpoint.load.row_chunks import CHUNK_ROWS, Run, row_chunks
from gemcutter.checkpoint.load.slices import deltas_on_rank, first_row
from gemcutter.errors import CheckpointError
from gemcutter.param_spec import ParamSpec
from gemcutter.plan import ModelPlan
from gemcutter.quant import Part, Weight, dequantize
from gemcutter.quant.carried import carry
from gemcutter.quant.lora import Delta, cut_deltas
from gemcutter.quant.packed import dtype_name
from gemcutter.quant.packing import Packer, PlainPacker
from gemcutter.quant.recipes import RECIPES

Params = Mapping[str, Weight | Tensor]
Pieces = Mapping[str, tuple[StoredTensor, ...]]  # the stored tensors of every parameter

FOLD_ELEMENTS = 1 << 21  # elements of a weight that are dequantized at a time


def fold(
    params: Params,
    adapter: Adapter,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    quant: str | None = None,
    packer: Packer | None = None,
) -> tuple[dict[str, Weight | Tensor], str]:
    """Add an adapter's changes to the decoder's weights, as `fold_factors` does; return the parameters and a note.

    Raises CheckpointError for values that are not finite.
    """
    maker = Maker(dtype, device, quant, packer or PlainPacker(device), model_dtype(checkpoint))
    factors = _held(adapter.factors, params)
    folded, cost = fold_factors(params, factors, checkpoint.matched.pieces, maker, checkpoint.plan.params())
    return folded, f"adapter {adapter.path.name}: {len(factors)} changes merged; {cost}"


def fold_tower(
    params: Params, adapter: Adapter, tower: str, pieces: Pieces, maker: Maker
) -> tuple[dict[str, Weight | Tensor], list[str]]:
    """Do what `fold` does for a loaded tower, "vision" or "audio"; without changes of it, its parameters are as they were."""
    factors = adapter.of_tower(tower)
    if not factors:
        return dict(params), []
    folded, cost = fold_factors(params, factors, pieces, maker)
    return folded, [f"adapter {adapter.path.name}: {len(factors)} changes of the {tower} tower merged; {cost}"]


def fold_factors(
    params: Params, factors: Sequence[Factors], pieces: Pieces, maker: Maker, specs: Iterable[ParamSpec] = ()
) -> tuple[dict[str, Weight | Tensor], str]:
    """Add changes to the weights, for all requests, and return the parameters and what that costs, in words.

    `specs`, of a rank's plan, say which slices of weights and changes are there; without any they are whole.

    Only the parts that change are copied: dense and in the maker's dtype, whatever they were before, or quantized by its recipe
    once they are merged, some rows at a time. The others stay as they are. Raises CheckpointError for values that are not finite.
    """
    folded, before, after, kinds = dict(params), 0, 0, dict[str, None]()
    known = {spec.name: spec for spec in specs}
    for name, changes in _by_parameter(factors).items():
        weight, stored = _weight(params, name), pieces[name]
        is_fused = len(weight.parts) > 1 and any(piece.part is None for piece in stored)  # one tensor, loaded for all its parts
        deltas = _changes("", weight, changes, maker.device, known.get(name))
        parts, release = list[Part](), partial(release_pages, stored)
        for part, (start, stop) in zip(weight.parts, weight.edges(), strict=True):
            found = tuple(cut_deltas(deltas, start, stop))
            made, kind = maker.make(name, part, found, release) if found or is_fused else (part, "")
            parts.append(made)
            if kind:
                kinds[kind] = None
                before, after = before + part.nbytes, after + made.nbytes
        folded[name] = replace(weight, parts=maker.packer.arrange(parts))
        release()
    held = f"{', '.join(kinds)}, {after / 1e6:.1f} MB in memory beside {before / 1e6:.1f} MB in the file"
    return folded, f"what they change is held as {held}"


def merged_rows(runs: Iterable[Run], factors: Sequence[Factors], spec: ParamSpec) -> Iterator[Tensor]:
    """Yield stored rows of a parameter in order, as `row_chunks` does, in float32 and with an adapter's changes added."""
    starts = dict(zip((part for part, _ in spec.parts), accumulate((rows for _, rows in spec.parts), initial=0), strict=False))
    deltas = [_delta("", each, 0 if each.part is None else starts[each.part], torch.device("cpu")) for each in factors]
    for run in runs:
        own = deltas if run.expert is None else [_of_expert(delta, run.expert) for delta in deltas]
        first = run.offset + run.start
        for rows in row_chunks([run]):
            yield _added(rows, own, first, torch.device("cpu"))
            first += rows.shape[0]


def model_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Return the dtype that the config gives the model's dense weights; bfloat16 where it names none that weights are kept in."""
    name = checkpoint.config.dtype.removeprefix("torch.").lower()
    return {"float16": torch.float16, "float32": torch.float32}.get(name, torch.bfloat16)


def attach(
    params: Params, adapter: Adapter, name: str, device: torch.device, plan: ModelPlan | None = None
) -> dict[str, Weight | Tensor]:
    """Let the weights carry an adapter's changes under a name, for the requests that ask for it. Raises as `read_deltas` does."""
    return carry(params, read_deltas(params, adapter, name, device, plan))


def read_deltas(
    params: Params, adapter: Adapter, name: str, device: torch.device, plan: ModelPlan | None = None
) -> dict[str, list[Delta]]:
    """Read an adapter's changes of the decoder's parameters, by parameter, scaled and in float32, into memory of their own.

    With the `plan` of a tensor-parallel rank, those are read that concern its slices, on a pipeline's stage those of its layers.
    Raises CheckpointError for changes that can't be told apart by rows: of experts, which see only the rows sent to them, and of
    a head of its own, which sees only the rows that want logits.
    """
    stuck = [each for each in adapter.factors if each.experts or each.name == "head"]
    if stuck:
        problems = [f"{each.label}: {each.down.origin}" for each in stuck]
        raise CheckpointError(f"the adapter {adapter.path} can only be merged (adapter=, --adapter): it changes these", problems)
    return _deltas(params, _held(adapter.factors, params), name, device, () if plan is None else plan.params())


def read_tower_deltas(params: Params, adapter: Adapter, tower: str, name: str, device: torch.device) -> dict[str, list[Delta]]:
    """Read an adapter's changes of a loaded tower, "vision" or "audio", as `read_deltas` does the decoder's."""
    return _deltas(params, adapter.of_tower(tower), name, device)


def _deltas(
    params: Params, factors: Sequence[Factors], name: str, device: torch.device, specs: Iterable[ParamSpec] = ()
) -> dict[str, list[Delta]]:
    known = {spec.name: spec for spec in specs}
    return {
        parameter: _changes(name, _weight(params, parameter), changes, device, known.get(parameter))
        for parameter, changes in _by_parameter(factors).items()
    }


def _changes(name: str, weight: Weight, changes: Sequence[Factors], device: torch.device, spec: ParamSpec | None) -> list[Delta]:
    """Read changes of one weight; with a spec, as much of them as it says that the weight is of a whole."""
    if spec is None or not spec.slices:
        return [_delta(name, each, _first_row(weight, each), device) for each in changes]
    return deltas_on_rank([_delta(name, each, first_row(spec, each.part), device) for each in changes], spec)


def _held(factors: Sequence[Factors], params: Params) -> list[Factors]:
    """Return the changes of parameters that are held here; on a pipeline's stage others are not."""
    return [each for each in factors if each.name in params]


def _by_parameter(factors: Sequence[Factors]) -> dict[str, list[Factors]]:
    found: dict[str, list[Factors]] = {}
    for each in factors:
        found.setdefault(each.name, []).append(each)
    return found


def _weight(params: Params, name: str) -> Weight:
    found = params[name]
    assert isinstance(found, Weight), name
    return found


def _first_row(weight: Weight, factors: Factors) -> int:
    return 0 if factors.part is None else weight.edges()[weight.names.index(factors.part)][0]


def _delta(name: str, factors: Factors, start: int, device: torch.device) -> Delta:
    """Read a pair of factors, scaled; PEFT keeps the rows of an expert's A together and the columns of its B apart."""
    down, up = (half.torch().to(device, torch.float32, copy=True) for half in (factors.down, factors.up))
    if factors.experts:
        down = down.view(factors.experts, factors.rank, -1)
        up = up.view(-1, factors.rank, factors.experts).permute(2, 0, 1).contiguous()
    return Delta(name, start, down, up.mul_(factors.scale))


def _of_expert(delta: Delta, index: int) -> Delta:
    return replace(delta, down=delta.down[index], up=delta.up[index])


def _added(rows: Part, deltas: Sequence[Delta], first: int, device: torch.device) -> Tensor:
    """Return rows `first` and on of a parameter in float32, with what the deltas add to them."""
    wide = dequantize(rows).to(device)
    if isinstance(rows, Tensor) and wide.data_ptr() == rows.data_ptr():
        wide = wide.clone()  # float32 in the file, which is not written to
    for delta in cut_deltas(deltas, first, first + len(wide)):
        wide[delta.start : delta.start + len(delta.up)].addmm_(delta.up, delta.down)
    return wide


@dataclass(frozen=True, slots=True)
class Maker:
    """How merged parts are held."""

    dtype: torch.dtype
    device: torch.device
    quant: str | None
    packer: Packer
    model_dtype: torch.dtype  # in which what was packed is rounded before it is quantized, as `convert` does

    def make(self, name: str, part: Part, deltas: Sequence[Delta], release: Callable[[], None]) -> tuple[Part, str]:
        """Merge one part in float32 and round once, or quantize; return it, and how it is held.

        `release` gives the mapped pages back that were read so far, and is called after every chunk.
        """
        chunks = _merged_chunks(part, deltas, self.device, release)
        scheme = None if self.quant is None else RECIPES[self.quant].scheme(name, part.shape[-1])
        if scheme is not None:
            rounded = part.dtype if isinstance(part, Tensor) else self.model_dtype
            try:
                return self.packer.quantize((rows.to(rounded) for rows in chunks), part.shape, scheme), scheme.name
            except ValueError as error:
                raise CheckpointError(f"{name} can't be quantized once it is merged: {error}; is the adapter damaged?") from error
        out = torch.empty(part.shape, dtype=self.dtype, device=self.device)
        flat, start = out.view(-1, part.shape[-1]), 0
        for rows in chunks:
            flat[start : start + len(rows)] = rows
            start += len(rows)
        return out, dtype_name(self.dtype)


def _merged_chunks(part: Part, deltas: Sequence[Delta], device: torch.device, release: Callable[[], None]) -> Iterator[Tensor]:
    """Yield the rows of a part, expert by expert, with its deltas added: multiples of a panel, but for the last of a matrix."""
    step = max(CHUNK_ROWS, FOLD_ELEMENTS // part.shape[-1] // CHUNK_ROWS * CHUNK_ROWS)
    whole = Weight((part,))
    matrices = [(whole, deltas)]
    if len(part.shape) == 3:
        matrices = [(whole.expert(index), [_of_expert(delta, index) for delta in deltas]) for index in range(part.shape[0])]
    for matrix, own in matrices:
        for start in range(0, matrix.rows, step):
            (rows,) = matrix.slice(start, min(start + step, matrix.rows)).parts
            yield _added(rows, own, start, device)
            release()
