"""Parameters whose weights carry adapters' deltas: how deltas come to them and leave again.

Nothing that is stored is copied: a weight with deltas has the parts of the weight without. Refuses to know files and kernels.
Read `lora.py` for a delta, `checkpoint/load/adapters.py` for who reads them, `model/text.py` for who binds kernels to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from gemcutter.quant import Weight
from gemcutter.quant.lora import Delta

Params = Mapping[str, Weight | Tensor]


def carry(params: Params, deltas: Mapping[str, Sequence[Delta]]) -> dict[str, Weight | Tensor]:
    """Return parameters that carry more deltas, given by parameter."""
    carrying = dict(params)
    for name, more in deltas.items():
        weight = params[name]
        assert isinstance(weight, Weight), name
        carrying[name] = replace(weight, deltas=(*weight.deltas, *more))
    return carrying


def without_deltas(params: Params) -> dict[str, Weight | Tensor]:
    """Return parameters as their files have them."""
    return _keep(params, lambda delta: False)


def without_adapter(params: Params, adapter: str) -> dict[str, Weight | Tensor]:
    """Return parameters that carry nothing of one adapter."""
    return _keep(params, lambda delta: delta.adapter != adapter)


def _keep(params: Params, wanted: Callable[[Delta], bool]) -> dict[str, Weight | Tensor]:
    kept = dict(params)
    for name, weight in carrying_weights(params):
        kept[name] = replace(weight, deltas=tuple(filter(wanted, weight.deltas)))
    return kept


def carrying_weights(params: Params) -> Iterable[tuple[str, Weight]]:
    """Return the weights that carry deltas, each with its name."""
    return [(name, param) for name, param in params.items() if isinstance(param, Weight) and param.deltas]


def adapters_of(params: Params) -> tuple[str, ...]:
    """Return the names of all adapters whose deltas are carried, sorted."""
    return tuple(sorted({delta.adapter for _, weight in carrying_weights(params) for delta in weight.deltas}))
