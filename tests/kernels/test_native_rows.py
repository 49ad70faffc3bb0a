"""A row's result does not depend, bit for bit, on how many rows (1 to 16) are computed beside it.

Owns that claim for native kernels: every scheme of products, attention of several rows of one sequence, and whole decoders, so
that drafts which are verified in one step get the text of single steps. Whether results are right, the other tests of this folder
say. Read `test_native_packed.py` for how matrices are made.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from gemcutter import api, native
from gemcutter.checkpoint.remote.hub import DEMO_FOLDER
from gemcutter.model.text import Decoder
from gemcutter.ops.step import Step
from gemcutter.plan import LayerPlan
from tests.kernels import test_native_attention as attention
from tests.kernels import test_native_dense as dense
from tests.kernels import test_native_packed as packed
from tests.kernels.test_native_layers import PLANS, decoder
from tests.topologies import prompt, run_alone

pytestmark = pytest.mark.skipif(native.load_library() is None, reason=str(native.missing()))

MOST_ROWS = 16
F32, BF16 = torch.float32, torch.bfloat16
TINY_A = Path(__file__).parents[1] / "goldens" / "tiny-a"


# ---- products ----


@pytest.mark.parametrize("columns", [512, 768, 1056])
@pytest.mark.parametrize("kind", packed.FORMATS, ids=lambda kind: kind.name)
def test_packed_products(kind: packed.Format, columns: int, level: str) -> None:
    """Columns fill whole runs of blocks, end in a part of one, or (where the scheme allows it) in very few blocks."""
    if columns % 256 and kind.scales >= packed.SUPER32:
        pytest.skip("super-blocks have 256 columns")
    matrix = packed.make(kind, 37, columns)
    x = np.random.default_rng(5).standard_normal((MOST_ROWS, columns)).astype(np.float32)
    for activations in (packed.INT8, packed.BF16_ROWS, packed.FLOAT_ROWS):
        alone = np.concatenate([packed.multiply([matrix], x[row : row + 1], activations) for row in range(MOST_ROWS)])
        for count in range(2, MOST_ROWS + 1):
            found = packed.multiply([matrix], x[-count:], activations)
            assert np.array_equal(found, alone[-count:]), f"{count} rows, activations {activations}"


@pytest.mark.parametrize("columns", [37, 256, 1000, 4128])
@pytest.mark.parametrize("dtype", dense.CODES, ids=str)
@pytest.mark.usefixtures("level")
def test_dense_products(dtype: torch.dtype, columns: int) -> None:
    parts = (dense.randn(35, columns, seed=1).to(dtype),)
    x_ND = dense.randn(MOST_ROWS, columns, seed=2)
    for activations in (dense.BF16_ROWS, dense.FLOAT_ROWS):
        alone = torch.cat([dense.linear(row[None], parts, activations) for row in x_ND])
        for count in range(2, MOST_ROWS + 1):
            found = dense.linear(x_ND[-count:].contiguous(), parts, activations)
            assert found.equal(alone[-count:]), f"{count} rows, activations {activations}"


# ---- attention ----


def attend_row(q_NHE: Tensor, step: Step, pool: attention.Cache, layer: LayerPlan, row: int) -> Tensor:
    """Attend with one row of a step alone."""
    positions = step.positions_N[row : row + 1]
    single = attention.prepared(Step(positions, positions, positions, (0, 1), step.kv_ranges, {}, None, {}), layer)
    return attention.attend(q_NHE[row : row + 1].contiguous(), single, pool, layer)


# Lengths around where pieces of keys become longer (each 512 from 4096 on), and beyond the last such place.
PASTS = [0, 3, 120, 500, 1013, 4089, 4600, 20000]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("window", [None, 1, 9, 512])
@pytest.mark.parametrize("past", PASTS)
@pytest.mark.usefixtures("level")
def test_rows_of_one_sequence_attend_alone(past: int, window: int | None, dtype: torch.dtype) -> None:
    """Whole steps and their ends; then the last row's own key is no number, and no earlier row may feel it."""
    for heads, kv_heads, dim in ((8, 1, 64), (4, 2, 48)):
        layer = attention.plan(heads, kv_heads, dim, window)
        start = 0 if window is None else max(0, past + 1 - window)
        q_NHE, step, pool = attention.make([attention.rows(MOST_ROWS, past, start)], layer, dtype, past % 2 == 1, torch.nan)
        alone = torch.cat([attend_row(q_NHE, step, pool, layer, row) for row in range(MOST_ROWS)])
        assert alone.isfinite().all()
        for count in (2, 3, 5, 8, 9, 16):
            part = slice(MOST_ROWS - count, MOST_ROWS)
            positions = step.positions_N[part]
            few = Step(positions, positions, positions, (0, count), step.kv_ranges, {}, None, {})
            found = attention.attend(q_NHE[part].contiguous(), attention.prepared(few, layer), pool, layer)
            assert found.equal(alone[part]), f"{count} rows"
        (span,) = step.kv_ranges[layer.group]
        newest = span.where.stop - 1 if isinstance(span.where, slice) else span.where[-1]
        pool.keys[newest] = pool.values[newest] = torch.nan
        assert attention.attend(q_NHE, step, pool, layer)[:-1].equal(alone[:-1])


@pytest.mark.usefixtures("level")
def test_sequences_attend_apart() -> None:
    """A batch of drafts: each row equals itself alone, whatever the other sequences are."""
    layer = attention.plan(8, 2, 64, None)
    parts = [attention.rows(5, 700), attention.rows(16, 4090), attention.rows(1, 0), attention.rows(9, 130)]
    q_NHE, step, pool = attention.make(parts, layer, BF16, listed=True, poison=torch.nan)
    found, at = attention.attend(q_NHE, step, pool, layer), 0
    for part, span in zip(parts, step.kv_ranges[layer.group], strict=True):
        for row in range(at, at + len(part.positions)):
            positions = step.positions_N[row : row + 1]
            single = Step(positions, positions, positions, (0, 1), {layer.group: (span,)}, {}, None, {})
            alone = attention.attend(q_NHE[row : row + 1].contiguous(), attention.prepared(single, layer), pool, layer)
            assert found[row : row + 1].equal(alone)
        at += len(part.positions)


# ---- whole decoders ----


def assert_steps_agree(fast: Decoder, ids: tuple[int, ...], counts: tuple[int, ...]) -> None:
    """Compare every layer, the states and the logits of steps of several rows with those of single steps."""
    alone = run_alone(fast, ids, 1)
    for count in counts:
        found = run_alone(fast, ids, count)
        for index, (mine, theirs) in enumerate(zip(found.layers, alone.layers, strict=True)):
            assert mine.equal(theirs), f"{count} rows, layer {index}"
        assert found.states.equal(alone.states)
        for start in range(0, len(ids), count):  # `run_alone` takes all rows through the head at once
            part = slice(start, start + count)
            assert fast.logits(found.states[part]).equal(torch.cat([fast.logits(row[None]) for row in found.states[part]]))


@pytest.mark.parametrize("stored", [F32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.usefixtures("level")
def test_dense_decoders(name: str, stored: torch.dtype) -> None:
    """Windows of 8 positions, which steps of several rows reach beyond."""
    assert_steps_agree(decoder(name, stored, dtype=stored), prompt(40), (2, 5, 8, 16))


@pytest.mark.parametrize(
    ("folder", "quant"), [(DEMO_FOLDER, "q4"), (TINY_A, "q4"), (TINY_A, "q8"), (DEMO_FOLDER, "mlx4")], ids=str
)
@pytest.mark.usefixtures("level")
def test_packed_decoders(folder: Path, quant: str) -> None:
    model = api.load(str(folder), dtype="bfloat16", quant=quant, context=512)
    assert_steps_agree(model.decoder, prompt(33), (3, 8, 13, 16))
