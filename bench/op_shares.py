"""What each kind of CPU op reaches of the machine, level by level, and what bounds it: instructions or memory.

Owns the list of ops: products of every stored format with few and with many rows, and attention of prompts and of single rows,
over windows and over whole contexts. An op can't take less time than its operations at the highest rate of the level's
multiplying instructions, nor than its bytes at the memory's: the longer of the two is its floor, and the floor over the time is
its share. Sizes are those of a preset's first layers. Refuses to know whole models; read `gemcutter bench --breakdown` for those.

    python bench/op_shares.py --preset E2B -t 2 --levels avx2 avx512_bf16 --json bench/results/ops.json
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemcutter import native
from gemcutter.benchmark.hardware import describe, read_rate
from gemcutter.benchmark.peak import peak_rates
from gemcutter.benchmark.synthetic import make_params, plan_of
from gemcutter.ops import reference
from gemcutter.ops.cpu.layer_ops import build_attention
from gemcutter.ops.registry import CPU, select_backend
from gemcutter.ops.step import KVRange, Step, prepare
from gemcutter.ops.types import OpContext, Precision, matrix
from gemcutter.plan import LayerPlan, ModelPlan

QUANTS = ("q4_0", "mlx4", "q8_0", "q6_k", "mxfp4", "iq4_xs", "bf16")
ROWS = (1, 4, 16, 32, 512)
CONTEXTS = (512, 4096, 32768)
PROMPT_ROWS = 512
STREAMED_BYTES = 256 << 20  # of matrices in turn: more than any cache holds
LEAST_S = 0.25  # of a measurement, whose median counts
LEAST_RUNS = 5
FAST = Precision(torch.bfloat16, torch.float32, "int8")  # as models are computed with by default


@dataclass(frozen=True, slots=True)
class Op:
    """What runs, its products and sums, and the bytes that it must read."""

    name: str
    operations: float
    nbytes: float
    work: Callable[[], object]


def product_ops(preset: str, quant: str) -> Iterator[Op]:
    """List products with the first layer's widest matrix, or with a head in 6 bits."""
    plan, dtype = plan_of(preset, 1), torch.bfloat16
    stored = "q4_0" if quant == "q6_k" else quant
    params = make_params(plan, stored, select_backend("cpu", "auto").packer(torch.device("cpu"), dtype))
    weight = matrix(params, "layers.0.mlp.in")
    if quant == "q6_k":
        head = matrix(params, "embed.tokens")
        weight = head.slice(0, weight.rows // 16 * 16)
    copies = [copy.deepcopy(weight) for _ in range(STREAMED_BYTES // weight.nbytes + 1)]
    for rows in ROWS:
        x = torch.randn(rows, weight.columns)
        calls = itertools.cycle([CPU.matmul(each, x, "int8") for each in copies])  # as a model's layers follow each other
        operations = 2.0 * rows * weight.rows * weight.columns
        yield Op(f"product, {quant}, {rows} rows", operations, weight.nbytes, lambda calls=calls: next(calls)())


class FilledCache:
    """Keys and values [T, K, E] in bfloat16 that only attention reads."""

    def __init__(self, layer: LayerPlan, tokens: int) -> None:
        self.keys, self.values = (torch.randn(tokens, layer.kv_heads, layer.head_dim).bfloat16() for _ in range(2))

    def write(self, layer: int, slots_N: Tensor, k_NKE: Tensor, v_NKE: Tensor) -> None:
        """Take no more."""
        raise AssertionError("this cache is full")

    def read(self, layer: int, span: KVRange) -> tuple[Tensor, Tensor]:
        """Return the keys and values of a range."""
        return self.keys[span.where], self.values[span.where]

    def storage(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return all of both."""
        return self.keys, self.values

    def int8(self, layer: int) -> None:
        """Return that nothing is stored in 8 bits."""


def attention_ops(preset: str) -> Iterator[Op]:
    """List prompts of PROMPT_ROWS rows and single rows behind contexts, in a sliding and in a global layer."""
    model = plan_of(preset)
    for layer in {layer.window: layer for layer in model.layers if layer.writes}.values():
        for context in CONTEXTS if layer.window is None else CONTEXTS[:2]:
            for rows in (1, PROMPT_ROWS):
                yield attention_op(model, layer, context, rows)


def attention_op(model: ModelPlan, layer: LayerPlan, context: int, rows: int) -> Op:
    """Describe the attention of the last `rows` of `context` positions."""
    cache = FilledCache(layer, context)
    positions = torch.arange(context - rows, context)
    spans = {layer.group: (KVRange(0, slice(0, context)),)}
    step = Step(positions, positions, positions, (0, rows), spans, {}, None, {})
    step = prepare(step, lambda of: CPU.attn_metadata(of, [(layer.group, layer.rope)]))
    run = build_attention(model, layer, {}, OpContext(reference.linear, FAST))
    q_NHE = torch.randn(rows, layer.heads, layer.head_dim) * layer.head_dim**-0.5
    seen = sum(layer.visible(int(position) + 1) for position in positions)
    nbytes = 2 * min(context, (layer.window or context) + rows) * layer.kv_heads * layer.head_dim * cache.keys.itemsize
    kind = "global" if layer.window is None else f"window {layer.window}"
    name = f"attention, {kind}, {rows} rows of {context}"
    return Op(name, 4.0 * seen * layer.heads * layer.head_dim, nbytes, lambda: run(q_NHE, step, cache))


def median_s(work: Callable[[], object]) -> float:
    """Return the median time of a piece of work, after one run that is not counted."""
    work()
    times: list[float] = []
    until = time.perf_counter() + LEAST_S
    while len(times) < LEAST_RUNS or time.perf_counter() < until:
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def kinds_of(op: Op) -> tuple[str, ...]:
    """Name the products that can compute an op: attention and dense weights have no int8 ones."""
    return ("float32", "bfloat16") if op.name.startswith(("attention", "product, bf16")) else ("float32", "bfloat16", "int8")


def measure(op: Op, level: str, peaks: dict[str, float], read_bytes: float) -> dict[str, Any]:
    """Time an op and compare it with its floor."""
    kind = max((kind for kind in kinds_of(op) if kind in peaks), key=lambda kind: peaks[kind])
    seconds, by_products, by_memory = median_s(op.work), op.operations / peaks[kind], op.nbytes / read_bytes
    limit = f"{kind} products" if by_products > by_memory else "memory"
    floor = max(by_products, by_memory)
    return {
        "op": op.name,
        "level": level,
        "ms": 1e3 * seconds,
        "floor_ms": 1e3 * floor,
        "share": floor / seconds,
        "limit": limit,
        "ops_per_s": op.operations / seconds,
    }


def run(preset: str, levels: list[str], quants: list[str]) -> Iterator[dict[str, Any]]:
    """Measure all ops at some levels."""
    read_bytes = read_rate()
    for level in levels:
        native.set_level(level)
        peaks = peak_rates()
        for quant in quants:
            for op in product_ops(preset, quant):
                yield measure(op, level, peaks, read_bytes)
        for op in attention_ops(preset):
            yield measure(op, level, peaks, read_bytes)


def spell(row: dict[str, Any]) -> str:
    """Spell a line of the table."""
    cells = f"{row['level']:12} {row['op']:40} {row['ms']:9.3f} {row['floor_ms']:9.3f}"
    return f"{cells} {row['share']:6.0%} {row['ops_per_s'] / 1e9:8.0f}  {row['limit']}"


def main() -> int:
    """Measure, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--preset", default="E2B")
    parser.add_argument("-t", "--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--levels", nargs="+", default=[native.level()])
    parser.add_argument("--quants", nargs="+", choices=QUANTS, default=list(QUANTS))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if native.load_library() is None:
        sys.exit(f"op_shares.py measures the CPU kernels: {native.missing()}")
    torch.set_num_threads(given.threads)
    print(f"{'level':12} {'op':40} {'ms':>9} {'floor':>9} {'share':>6} {'G ops/s':>8}  bounded by")
    rows = []
    for row in run(given.preset, given.levels, given.quants):
        print(spell(row), flush=True)
        rows.append(row)
    if given.json:
        about = {"date": str(date.today()), "preset": given.preset, "threads": given.threads, "machine": describe()}
        given.json.write_text(json.dumps(about | {"rows": rows, "ops": len(rows)}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
