"""The whole measurement as one object: a row a test, each beside its ceiling; and the object as a table.

Owns the order of things (tests first, the machine's rates last, because their buffers would count as the model's memory) and the
names in the JSON: sizes in bytes, times in seconds. Refuses to know how a test runs (`engine.py`) and what a ceiling is
(`roofline.py`).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch

from gemcutter.benchmark import breakdown, hardware, roofline
from gemcutter.benchmark.cores import DISTURBED, undisturbed
from gemcutter.benchmark.drafts import REPLAY
from gemcutter.benchmark.drafts import measure as measure_drafts
from gemcutter.benchmark.harness import MAX_ROWS, BenchCase, BenchEngine
from gemcutter.benchmark.peak import KINDS
from gemcutter.benchmark.target import BenchTarget
from gemcutter.cache.kv_cache import scale_bytes
from gemcutter.checkpoint.doctor.fingerprint import sampled_sha256
from gemcutter.errors import RequestError
from gemcutter.model.text import Decoder
from gemcutter.plan import ModelPlan
from gemcutter.quant.packed import dtype_name

Progress = Callable[[int, int], None]  # tests done, tests in all


def measure(
    target: BenchTarget,
    tests: Sequence[BenchCase],
    repeats: int,
    *,
    max_rows: int = MAX_ROWS,
    with_breakdown: bool = False,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Run all tests, `repeats` times each; give everything that was found. Raises RequestError for tests that can't run."""
    check(target, tests)
    rows = list[dict[str, Any]]()
    for _, group in groupby(tests, key=lambda test: test.depth):
        for row in _run(target, list(group), repeats, max_rows, with_breakdown):
            rows.append(row)
            progress(len(rows), len(tests))
    device = target.decoder.device
    peak = hardware.peak_bytes(device)
    rates = hardware.measure_rates(device)
    native = hardware.native_rate(target.decoder) if target.decoder.backend.name == "cpu" else None
    if native is not None:
        rates["native_flops_per_s"] = native
    reads = {test.batch: roofline.token_bytes(target.plan, target.weights, test.batch) for test in tests}
    for row, test in zip(rows, tests, strict=True):
        row |= ceiling(target.plan, reads[test.batch], target.kv_dtype.itemsize, test, rates, scale_bytes(target.kv_dtype))
        row["share"] = row["tok_s"] / row["ceiling_tok_s"]
    return describe(target, max_rows) | {
        "rates": rates,
        "memory": memory(target, peak),
        "rows": rows,
        "machine": hardware.describe(device),
    }


def check(target: BenchTarget, tests: Sequence[BenchCase]) -> None:
    """Raise RequestError unless every test fits the model's context."""
    room = target.plan.context
    problems = [
        f"{test.name}: needs {test.context} positions, the model was made for {room}" for test in tests if test.context > room
    ]
    if not tests:
        problems.append("no test is asked for: every -p and -n is 0")
    if problems:
        raise RequestError("the tests can't run", problems)


def _run(
    target: BenchTarget, tests: Sequence[BenchCase], repeats: int, max_rows: int, with_breakdown: bool
) -> Iterator[dict[str, Any]]:
    """Run tests of one depth, whose cache goes when they are done."""
    drafts = target.drafts
    prompt_rows, speculator = (1, None) if drafts is None else (drafts.longest, drafts.make())
    engine = BenchEngine(target.decoder, tests, max_rows, target.kv_dtype, prompt_rows, speculator)
    engine.warm_up()
    for test in tests:
        row: dict[str, Any] = {"test": test.name, "tokens": test.tokens, "depth": test.depth, "batch": test.batch}
        if drafts is not None and test.kind == "tg":
            runs = measure_drafts(engine, test, drafts, repeats)
            row |= _speeds(test, [(each.tokens, each.seconds) for each in runs.drafted]) | {"speculation": runs.as_object()}
        else:
            found, disturbed = undisturbed(partial(_plain, engine, test), repeats)
            row |= _speeds(test, [(each.tokens, each.seconds) for each in found])
            row |= {"disturbed": disturbed, "lost_core_share": max(each.lost for each in found)}
        if with_breakdown:
            row["breakdown_s"] = breakdown.measure(target.decoder, partial(engine.run, test))
        yield row | {"peak_bytes": hardware.peak_bytes(target.decoder.device)}


def _plain(engine: BenchEngine, test: BenchCase) -> tuple[int, float]:
    return test.total, engine.run(test)


def _speeds(test: BenchCase, runs: Sequence[tuple[int, float]]) -> dict[str, Any]:
    """Return the speeds of runs of so many tokens in so many seconds each."""
    speeds = [tokens / seconds for tokens, seconds in runs]
    is_prompt = test.kind == "pp"
    latency = statistics.median(seconds if is_prompt else seconds * test.batch / tokens for tokens, seconds in runs)
    return {
        "tok_s": statistics.median(speeds),
        "tok_s_min": min(speeds),
        "tok_s_max": max(speeds),
        "ttft_s" if is_prompt else "tpot_s": latency,
        "repeats": len(runs),
    }


def ceiling(
    plan: ModelPlan,
    weight_bytes: int,
    kv_itemsize: int,
    test: BenchCase,
    rates: Mapping[str, float],
    kv_scale_bytes: int = 0,
) -> dict[str, Any]:
    """Return the speed that a machine of these rates allows, and the rate that bounds it.

    `weight_bytes` are those that decoding one token of each sequence reads; keys and values take `kv_itemsize` bytes an element,
    and `kv_scale_bytes` a vector of a head.
    """
    if test.kind == "tg":
        seen = test.depth + 1 + (test.tokens + 1) // 2  # of a reply's steps, on average
        read = weight_bytes / test.batch + plan.read_bytes(seen, 0, kv_itemsize, kv_scale_bytes=kv_scale_bytes)
        return {"ceiling_tok_s": rates["read_bytes_per_s"] / read, "ceiling": "read_bytes_per_s", "read_bytes_per_token": read}
    flops = roofline.prefill_flops(plan, test.depth, test.tokens)
    best = best_products(rates)
    return {"ceiling_tok_s": test.tokens * rates[best] / flops, "ceiling": best, "flops": flops}


def best_products(rates: Mapping[str, float]) -> str:
    """Name the highest rate of products: of the processor's instructions where it was measured, else of whole matrices."""
    peaks = [name for name in rates if name.endswith("_peak_ops_per_s")]
    return max(peaks or (name for name in rates if name.endswith("flops_per_s")), key=lambda name: rates[name])


def describe(target: BenchTarget, max_rows: int) -> dict[str, Any]:
    """Return what was measured, and how it was computed."""
    return {
        "model": target.name,
        "sampled_sha256": None if target.source is None else sampled_sha256(target.source),
        "quant": target.quant,
        "params": target.plan.num_params(),
        "layers": len(target.plan.layers),
        "dtype": dtype_name(target.decoder.dtype),
        "kernels": target.how.kernels,
        "fallbacks": fallbacks(target.decoder),
        "activations": target.decoder.precision.activations,
        "threads": torch.get_num_threads(),
        "max_rows": max_rows,
        "load_s": target.load_s,
        "speculation": None if target.drafts is None else dict(target.drafts.about),
    }


def fallbacks(decoder: Decoder) -> list[dict[str, Any]]:
    """Return the ops that run on torch's slower kernels because the ones of the decoder's own backend refused them, and why."""
    own = {"cpu": "native", "triton": "triton"}.get(decoder.backend.name)
    return [
        {"op": selection.site.op, "kernel": selection.impl.name, "reason": reason, "layers": list(layers)}
        for selection, layers in decoder.kernel_plan.selections()
        for name, reason in selection.refusals
        if name == own
    ]


def memory(target: BenchTarget, peak: int) -> dict[str, int]:
    """Put the peak beside what must be held: the weights, but for tables that are only gathered from, and a draft model."""
    held = roofline.held_bytes(target.decoder.plan, target.decoder.params)
    drafter = 0 if target.drafts is None else target.drafts.nbytes
    return {"peak_bytes": peak, "weight_bytes": held, "draft_model_bytes": drafter, "over_weights_bytes": peak - held - drafter}


# ---- what a reader sees ----

CEILINGS = {
    "read_bytes_per_s": "reading weights, keys and values",
    "float32_flops_per_s": "float32 products",
    "bfloat16_flops_per_s": "bfloat16 products",
    "native_flops_per_s": "native products in the cache",
    "float32_peak_ops_per_s": "the processor's float32 products",
    "int8_peak_ops_per_s": "the processor's int8 products",
    "bfloat16_peak_ops_per_s": "the processor's bfloat16 products",
}
PRODUCTS = {
    "float32_flops_per_s": "float32",
    "bfloat16_flops_per_s": "bfloat16",
    "native_flops_per_s": "native",
}
PEAKS = {f"{kind}_peak_ops_per_s": kind for kind in KINDS}


def show(found: dict[str, Any]) -> str:
    """Lay a measurement out for a reader."""
    here, rates, memory = found["machine"], found["rates"], found["memory"]
    lines = [
        f"{found['model']} ({found['quant']}): {found['params'] / 1e9:.3f} B parameters",
        f"computed in {found['dtype']}, activations {found['activations']}; native kernels: {here['native']}",
        *spell_fallbacks(found["fallbacks"]),
        f"{here['cpu']}, {here['cores']} cores, {found['threads']} threads; torch {here['torch']}",
        *spell_rates(rates),
        "",
        *_table(found["rows"]),
        *spell_disturbed(found["rows"]),
        *spell_speculation(found),
        "",
        f"peak memory {memory['peak_bytes'] / 1e6:,.0f} MB: weights {memory['weight_bytes'] / 1e6:,.0f} MB, "
        + (f"the draft model {memory['draft_model_bytes'] / 1e6:,.0f} MB, " if memory["draft_model_bytes"] else "")
        + f"all else {memory['over_weights_bytes'] / 1e6:,.0f} MB (cache, buffers, Python, torch)",
    ]
    if found["load_s"] is not None:
        lines.append(f"load {found['load_s']:.2f} s")
    if found.get("first_token_s") is not None:
        lines.append(
            f"from a cold process to the first token {found['first_token_s']:.2f} s, to its text {found['first_text_s']:.2f} s"
        )
    timed = [row for row in found["rows"] if "breakdown_s" in row]
    if timed:
        lines += ["", "milliseconds a token, and their share, in one more run with clocks:", "", *_breakdown(timed)]
    return "\n".join(lines)


def spell_rates(rates: Mapping[str, float]) -> Iterator[str]:
    """Yield what the machine can do: bytes, the processor's products, and what whole products of matrices reach of them."""
    best = rates[best_products(rates)]
    speeds = [f"{PRODUCTS[name]} {rate / 1e9:.0f} ({rate / best:.0%})" for name, rate in rates.items() if name in PRODUCTS]
    peaks = [f"{PEAKS[name]} {rate / 1e9:.0f}" for name, rate in rates.items() if name in PEAKS]
    yield f"this machine reads {rates['read_bytes_per_s'] / 1e9:.1f} GB/s"
    if peaks:
        yield f"its instructions make {', '.join(peaks)} billion operations a second; products of matrices in the cache, and"
        yield f"their share of the best of these: {', '.join(speeds)}"
    else:
        yield f"GFLOP/s of products: {', '.join(speeds)}"


def spell_fallbacks(fallbacks: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield a line for every reason why ops are slower than they could be."""
    reasons: dict[str, list[str]] = {}
    for each in fallbacks:
        ops = reasons.setdefault(each["reason"], [])
        ops += [] if each["op"] in ops else [each["op"]]
    for reason, ops in reasons.items():
        yield f"slower than it could be: {', '.join(ops)} on torch's kernels, because {reason}"


def _table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    cells = [("test", "tok/s", "from", "to", "ceiling", "share", "TTFT (s)", "TPOT (ms)", "of")]
    for row in rows:
        first = f"{row['ttft_s']:.3f}" if "ttft_s" in row else ""
        each = f"{row['tpot_s'] * 1e3:.2f}" if "tpot_s" in row else ""
        speeds = (f"{row[name]:.2f}" for name in ("tok_s", "tok_s_min", "tok_s_max", "ceiling_tok_s"))
        cells.append((row["test"], *speeds, f"{row['share']:.1%}", first, each, CEILINGS[row["ceiling"]]))
    return _aligned(cells)


def spell_disturbed(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield a line for every test some of whose runs did not get their cores."""
    for row in rows:
        if row.get("disturbed"):
            least = row["lost_core_share"]
            yield (
                f"{row['test']}: other programs took cores from {row['disturbed']} of its runs, which were repeated"
                + (f"; of those that count one still lost {least:.0%} of its cores' time" if least > DISTURBED else "")
            )


def spell_speculation(found: dict[str, Any]) -> Iterator[str]:
    """Yield what became of drafts in each test of replies: a title that says whose they were, and a table."""
    about, rows = found["speculation"], [row for row in found["rows"] if "speculation" in row]
    if not rows:
        return
    count = "as many as pay" if about["draft_tokens"] is None else str(about["draft_tokens"])
    if about["kind"] == REPLAY:
        shares = " ".join(f"{share:.2f}" for share in about["acceptance"])
        title = f"replay: drafts are right at each place as often as was asked for ({shares}), and take the assistant's time"
    else:
        who = about["draft_model"] and f"by {about['draft_model']}"
        title = f"drafts {who or 'looked up in the text'}; greedy replies to {about['text']}"
    yield from ("", f"{title}; {count} at a time", "")
    cells = [("test", "plain tok/s", "times as fast", "steps", "tokens/step", "drafted", "right", "right at each place, of all")]
    for row in rows:
        own = row["speculation"]
        shares = " ".join(f"{right / own['bursts']:.2f}" for right in own["accepted_at"] if right) or "none"
        numbers = (f"{own['plain_tok_s']:.2f}", f"{own['to_plain']:.2f}", str(own["steps"]), f"{own['tokens_per_step']:.2f}")
        counts = (str(own["drafted"]), str(own["accepted"]))
        cells.append((row["test"], *numbers, *counts, shares + ("" if own["same_replies"] else "; some replies differ")))
    yield from _aligned(cells)


def _breakdown(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    ops = [op for op in (*breakdown.OPS, breakdown.REST) if any(op in row["breakdown_s"] for row in rows)]
    cells = [("", *(text for row in rows for text in (row["test"], "")), "")]
    for op in ops:
        line = [op]
        for row in rows:
            spent = row["breakdown_s"]
            seconds = spent.get(op, 0.0)
            line += [f"{seconds * 1e3 / row['tokens']:.3f}", f"{seconds / sum(spent.values()):.1%}"]
        cells.append((*line, ""))
    return _aligned(cells)


def _aligned(cells: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Lay a table out: the first and the last column to the left, all others to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for first, *middle, last in cells:
        padded = (cell.rjust(width) for cell, width in zip(middle, widths[1:-1], strict=True))
        yield "  ".join([first.ljust(widths[0]), *padded, last]).rstrip()
