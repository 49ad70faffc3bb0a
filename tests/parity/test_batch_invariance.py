"""Batch invariance of the reference kernels: a sequence's numbers are the same bits alone, in any batch and at any chunk size.

Owns that one claim, in float32 and bfloat16, for the whole engine and for each word, on widths that are no multiple of a vector
register: library kernels treat the elements left over in another way. `auto` kernels make no such promise. Read
`gemcutter/ops/reference.py` for how it is kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gemcutter.engine.engine import Engine
from gemcutter.model.text import Decoder
from gemcutter.ops import reference
from gemcutter.ops.reference import gelu_mul, linear, rms_norm, rope, softcap
from gemcutter.quant import Weight
from tests.parity.batches import Answer, Job, drive
from tests.topologies import SIZES, Raw, build_decoder, build_oracle, plan_of, prompt

DTYPES = [torch.float32, torch.bfloat16]
CONTEXT = 192
# Matrix libraries keep rows apart in tiles of one shape only while a row's length fills their registers, as published widths do.
TOPOLOGIES: dict[str, Raw] = {
    "E2B": SIZES["E2B"] | {"hidden_size_per_layer_input": 16, "intermediate_size": 48},
    "26B-A4B": SIZES["26B-A4B"] | {"moe_intermediate_size": 16, "num_experts": 4, "top_k_experts": 2},
}
JOBS = (
    Job(prompt(40, 1), wants_logprobs=True),
    Job(prompt(1, 2)),
    Job(prompt(17, 3), joins=1),
    Job(prompt(30, 4), joins=2, wants_states=True),
    Job(prompt(9, 5), joins=5, max_tokens=12),
)


@pytest.fixture(autouse=True)
def _short_key_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let even these short sequences take several blocks of keys."""
    monkeypatch.setattr(reference, "KEY_BLOCK", 16)


@functools.cache
def decoder(name: str, dtype: torch.dtype) -> Decoder:
    """Build a decoder of reference kernels once."""
    raw = TOPOLOGIES[name]
    return build_decoder(build_oracle(raw, seed=5), plan_of(raw), dtype, kernels="reference")


def run(name: str, dtype: torch.dtype, jobs: tuple[Job, ...], max_rows: int, max_sequences: int) -> list[Answer]:
    """Run jobs in a fresh engine."""
    return drive(Engine(decoder(name, dtype), CONTEXT, max_batched_tokens=max_rows, max_num_seqs=max_sequences), jobs)


@functools.cache
def alone(name: str, dtype: torch.dtype) -> list[Answer]:
    """Run each job by itself, its prompt in one chunk."""
    return [run(name, dtype, (replace(job, joins=0),), CONTEXT, 1)[0] for job in JOBS]


def assert_same_bits(found: list[Answer], wanted: list[Answer]) -> None:
    """Compare every number of two lists of answers exactly."""
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.report is not None
        assert theirs.report is not None
        assert mine.report.top_logits == theirs.report.top_logits
        assert mine.report.logprobs == theirs.report.logprobs
        assert [row.tolist() for chunk in mine.report.hidden_states for row in chunk] == [
            row.tolist() for chunk in theirs.report.hidden_states for row in chunk
        ]
        assert mine.tokens == theirs.tokens
        assert mine.logprobs == theirs.logprobs


@pytest.mark.parametrize(("max_rows", "max_sequences"), [(1, 1), (7, 1), (7, 4), (64, 4)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_a_sequence_keeps_its_bits(name: str, dtype: torch.dtype, max_rows: int, max_sequences: int) -> None:
    assert_same_bits(run(name, dtype, JOBS, max_rows, max_sequences), alone(name, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_skipped_rows_change_no_bits(dtype: torch.dtype) -> None:
    ids = prompt(50, 6)
    jobs = (Job(ids), Job(ids, wants_logprobs=True))
    skipping, keeping = run("E2B", dtype, jobs, 64, 2)
    assert skipping.report is not None
    assert keeping.report is not None
    assert skipping.report.top_logits == keeping.report.top_logits
    assert (skipping.tokens, skipping.logprobs) == (keeping.tokens, keeping.logprobs)


@pytest.fixture(params=[1, 3], ids=lambda count: f"{count} threads")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Set torch's threads: they cut elementwise work at places that depend on the number of rows."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def assert_rows_apart(word: Callable[[Tensor], Tensor], rows: Tensor) -> None:
    """Compare a word over all rows with the same word over some of them, bit for bit."""
    whole = word(rows)
    for count in (1, 2, 3, 16, 33, 100):
        for start in range(0, len(rows) - count, 41):
            assert torch.equal(word(rows[start : start + count]), whole[start : start + count]), (
                f"rows {start} to {start + count}"
            )


def draw_rows(width: int, dtype: torch.dtype) -> Tensor:
    """Draw rows [N, width], enough of them for torch to spread elementwise work over threads."""
    return 3 * torch.randn(521, width, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [6, 37, 128, 256])
@pytest.mark.parametrize("word", ["rms_norm", "rope", "gelu_mul", "softcap"])
def test_no_elementwise_word_lets_a_row_see_its_neighbours(word: str, width: int, dtype: torch.dtype, threads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scale, angles = torch.rand(width, generator=generator), torch.rand(width // 2, generator=generator)
    words: dict[str, Callable[[Tensor], Tensor]] = {
        "rms_norm": lambda x: rms_norm(x, scale, 1e-6),
        "rope": lambda x: rope(x[:, : width // 2 * 2], angles.cos().to(dtype), angles.sin().to(dtype)),
        "gelu_mul": lambda x: gelu_mul(x, x.flip(-1)),
        "softcap": lambda x: softcap(x, 30.0),
    }
    assert_rows_apart(words[word], draw_rows(width, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("columns", "rows"), [(16, 48), (48, 16), (256, 64), (64, 256)])
def test_no_product_lets_a_row_see_its_neighbours(rows: int, columns: int, dtype: torch.dtype, threads: int) -> None:
    weight = Weight((torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype),))
    assert_rows_apart(lambda x: linear(x, weight), draw_rows(columns, dtype))
