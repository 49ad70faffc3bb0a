"""What vision and audio towers are built from: clipped products, adapters' changes, and passes of bounded size.

Owns `TowerContext` and what towers have in common. Refuses to know what a tower reads. Read `vision.py` and `audio.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from gemcutter.errors import NumericError
from gemcutter.model.text import bind_linear
from gemcutter.ops import KernelSite
from gemcutter.ops.lora import add_low_rank
from gemcutter.ops.reference import rms_norm
from gemcutter.ops.registry import select_backend, select_kernel
from gemcutter.ops.turns import Turns
from gemcutter.ops.types import AdapterDeltas, Linear, Param, matrix, vector
from gemcutter.param_spec import ParamSpec
from gemcutter.quant import Weight
from gemcutter.quant.carried import carry
from gemcutter.quant.lora import Delta
from gemcutter.quant.packed import dtype_name

Module = Callable[[Tensor], Tensor]
Params = Mapping[str, Param]
Encode = Callable[[Any], Tensor]  # what a tower reads of some images or sounds to rows of the decoder
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TowerContext:
    """What a tower's modules are built from: the product, the dtype of rows and that of the computation, device and kernels."""

    linear: Linear
    dtype: torch.dtype
    device: torch.device
    site: KernelSite
    compute: str
    turns: Turns  # on the cores, which other threads compute on, too


def open_context(
    params: Params, dtype: torch.dtype, device: torch.device | str, kernels: str, turns: Turns | None = None
) -> TowerContext:
    """Return the context of a tower over these parameters; `dtype`, `kernels` and `turns` are the decoder's."""
    place, compute = torch.device(device), dtype_name(dtype)
    rows = select_backend(place.type, kernels).row_dtype(compute)
    site = KernelSite("linear", None, place.type, rows, compute, kernels)
    return TowerContext(bind_linear(params.values(), site), getattr(torch, rows), place, site, compute, turns or Turns())


@dataclass(frozen=True, slots=True, eq=False)
class TowerBody:
    """What computes a tower's rows: as the checkpoint has it, or with what one adapter adds to its products.

    `digest` tells what adapters change apart, hexadecimal; empty where nothing is changed.
    """

    encode: Encode
    digest: str = ""


class TowerBodies:
    """The bodies of one tower, of which all threads may ask at any time: its own, and one for each adapter that changes it.

    `build` makes what encodes of parameters, whose weights may carry one adapter's deltas, and the context to bind them in.
    """

    def __init__(self, params: Params, ctx: TowerContext, build: Callable[[Params, TowerContext], Encode]) -> None:
        self.params, self._ctx, self._build = params, ctx, build
        self._own = TowerBody(build(params, ctx))
        self._adapted: Mapping[str, TowerBody] = {}  # replaced as a whole

    def of(self, adapter: object = None) -> TowerBody:
        """Return what computes for a request with an adapter: the tower's own body where no such one changes it."""
        return self._adapted.get(adapter, self._own) if isinstance(adapter, str) else self._own

    def add(self, adapter: str, deltas: AdapterDeltas) -> None:
        """Bind a body for those of an adapter's changes, by parameter, that are of this tower; without any, its own serves it."""
        own = {name: more for name, more in deltas.items() if name in self.params}
        if own:
            with on_device(self._ctx):
                made = self._build(carry(self.params, own), _adapted_context(self._ctx, adapter))
            self._adapted = {**self._adapted, adapter: TowerBody(made, _digest(own))}

    def remove(self, adapter: str) -> None:
        """Forget an adapter's body; passes that compute with it go on, and their rows are known by what changed them."""
        self._adapted = {name: body for name, body in self._adapted.items() if name != adapter}


def _adapted_context(ctx: TowerContext, adapter: str) -> TowerContext:
    """Return a context whose product adds an adapter's changes to every row, where the weight carries any."""
    low_rank: Linear = select_kernel(replace(ctx.site, dtype="float32", stored="float32")).impl.load()

    def linear(x_ND: Tensor, weight: Weight) -> Tensor:
        out = ctx.linear(x_ND, weight)
        if weight.deltas:
            add_low_rank(out, x_ND, weight, {adapter: slice(None)}, low_rank)
        return out

    return replace(ctx, linear=linear)


def _digest(deltas: Mapping[str, Sequence[Delta]]) -> str:
    """Return a digest of changes by their values, so that equal ones have equal rows, whatever they are called."""
    digest = hashlib.sha256()
    for name in sorted(deltas):
        for delta in deltas[name]:
            digest.update(f"{name} {delta.start} {tuple(delta.down.shape)} {tuple(delta.up.shape)}".encode())
            for half in (delta.down, delta.up):
                digest.update(half.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def build_whole(op: str, plan: Any, params: Params, ctx: TowerContext, *more: Any) -> Any:
    """Build a layer of a tower as one op; None where there is no such kernel."""
    build, activations = _select_whole(op, params, ctx)
    return build(plan, params, activations, *more)


def _select_whole(op: str, params: Params, ctx: TowerContext) -> tuple[Callable[..., Any], str]:
    """Return what builds an op of a tower's layer at once from its parameters, if it can, and how its products take rows."""
    kinds = {Weight((part,)).stored for each in params.values() if isinstance(each, Weight) for part in each.parts}
    impl = select_kernel(replace(ctx.site, op=op, stored="+".join(sorted(kinds)))).impl
    is_narrow = ctx.compute == "bfloat16" and kinds == {"bfloat16"}
    return impl.load(), "bf16" if is_narrow else select_backend(ctx.device.type, ctx.site.kernels).activations(ctx.compute, None)


@contextmanager
def on_device(ctx: TowerContext) -> Iterator[None]:
    """Compute without gradients on the context's device, which Triton launches on only where it is the current one."""
    with torch.inference_mode(), torch.cuda.device(ctx.device) if ctx.device.type == "cuda" else nullcontext():
        yield


def build_linear(params: Params, name: str, ctx: TowerContext, part: str | None = None) -> Module:
    """Build a product whose input and output are clamped where the checkpoint says how far their values reach."""
    weight = matrix(params, name) if part is None else matrix(params, name).part(part)
    prefix = name if part is None else f"{name}.{part}"
    if f"{prefix}.input_min" not in params:
        return lambda x_ND: ctx.linear(x_ND, weight)
    low, high, least, most = (
        float(vector(params, f"{prefix}.{bound}")) for bound in ("input_min", "input_max", "output_min", "output_max")
    )
    return lambda x_ND: ctx.linear(x_ND.clamp(low, high), weight).clamp_(least, most)


def within(params: Params, prefix: str) -> dict[str, Param]:
    """Return the parameters under a prefix, without it."""
    return {name.removeprefix(prefix): param for name, param in params.items() if name.startswith(prefix)}


def passes(items: Sequence[T], size: Callable[[T], int], most: int) -> Iterator[list[T]]:
    """Yield items in order, as many at a time as have `most` together, one at least."""
    group, total = list[T](), 0
    for item in items:
        if group and total + size(item) > most:
            yield group
            group, total = [], 0
        group.append(item)
        total += size(item)
    if group:
        yield group


def build_projector(spec: ParamSpec, eps: float, params: Params, ctx: TowerContext, what: str) -> Module:
    """Build what makes rows of the decoder, float32, of a tower's: a norm without a weight, and the product with `spec`.

    It raises NumericError, which begins with `what` the rows were made of, unless all are finite.
    """
    weight = matrix(params, spec.name)

    def rows_of_decoder(rows_ND: Tensor) -> Tensor:
        rows = ctx.linear(rms_norm(rows_ND, None, eps), weight).float()
        if not torch.isfinite(rows).all():
            raise NumericError(f"{what}: the tower's rows are not finite; `gemcutter doctor MODEL --data` looks at its weights")
        return rows

    return rows_of_decoder
