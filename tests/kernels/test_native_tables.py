"""Per-layer embeddings from a table that stays as its file packs it: rows are laid out natively, one by one, and lose no bit."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gemcutter import native
from gemcutter.errors import KernelError
from gemcutter.ops import reference, types
from gemcutter.ops.cpu import layer_ops, model_ops
from gemcutter.ops.types import OpContext, Precision
from gemcutter.quant import Weight, affine
from gemcutter.quant.cpu_packing import row_source
from gemcutter.quant.gguf_blocks import TYPES, Blocks
from gemcutter.quant.packed import Packed
from gemcutter.shard import Slice
from tests.unit.test_quant_gguf_blocks import random_blocks

pytestmark = pytest.mark.skipif(native.load_library() is None, reason=str(native.missing()))

ROWS, LAYERS, DIM, HIDDEN = 40, 3, 256, 64
VALUES = torch.randn(ROWS, LAYERS * DIM, generator=torch.Generator().manual_seed(0))
BLOCK_TYPES = ("Q4_0", "Q8_0", "Q4_K", "Q6_K", "IQ4_NL", "IQ4_XS", "Q5_0")  # the last has no native loop


def block_rows(name: str) -> Blocks:
    """Make rows of random blocks, of which the first are extreme."""
    kind = TYPES[name]
    count = LAYERS * DIM // kind.values
    return Blocks(random_blocks(name, ROWS * count).view(ROWS, count * kind.nbytes), kind)


TABLES: dict[str, Callable[[], Packed]] = {
    **{name: lambda name=name: block_rows(name) for name in BLOCK_TYPES},
    **{f"affine{bits}": lambda bits=bits: affine.quantize(VALUES.bfloat16(), bits, 64) for bits in (4, 8)},
}
PLAN: Any = SimpleNamespace(ple_dim=DIM, ple_vocab=ROWS, ple_rows=Slice(-2, 0, ROWS, ROWS), hidden=HIDDEN, eps=1e-6)


@pytest.mark.parametrize("span", [(0, LAYERS), (1, 3)])
@pytest.mark.parametrize("name", TABLES)
def test_rows_of_packed_tables(name: str, span: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    params = {
        "embed.ple": Weight((TABLES[name](),)),
        "ple.in": Weight((torch.randn(LAYERS * DIM, HIDDEN, generator=torch.Generator().manual_seed(1)),)),
        "ple.norm": torch.linspace(0.5, 1.5, DIM),
    }
    x, ids = torch.randn(9, HIDDEN), torch.tensor([20, 39, 17, 17, 16, 15, 31, 32, 38])  # the first rows have infinite scales
    monkeypatch.setattr(types, "TABLE_ROWS", 4)
    ctx = OpContext(layer_ops.linear, Precision())
    fast = model_ops.build_ple_embed(PLAN, params, ctx)
    wanted = reference.build_ple_embed(PLAN, params, OpContext(reference.linear))(x, ids, *span)
    for rows in (9, 1):
        found = fast(x[:rows], ids[:rows], *span)
        assert torch.allclose(found, wanted[:rows], rtol=1e-5, atol=1e-4, equal_nan=True)
    given = list[int]()
    ctx.table_pages.release = lambda: given.append(1)  # rows are gathered piece by piece then, apart from the projection
    assert torch.allclose(fast(x, ids, *span), wanted, rtol=1e-5, atol=1e-4, equal_nan=True)
    assert len(given) >= 2
    with pytest.raises((KernelError, IndexError), match=r"an id|out of range"):
        fast(x, ids + 8, *span)


def test_which_tables_the_library_lays_out() -> None:
    assert [name for name in TABLES if row_source(TABLES[name]()) is None] == ["Q5_0"]
