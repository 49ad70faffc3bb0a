"""`gemcutter plan`: what a model needs on several ranks, and how fast these can be, without having them.

Owns the options and the tables; the arithmetic is in `gemcutter/benchmark/`. Refuses to know what a rank holds: read
`benchmark/scale.py` for that. Reads headers only, or nothing at all for a preset.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemcutter.cli import options
from gemcutter.cli.bench import ModelArgument, Preset, check_quant
from gemcutter.cli.failure import UsageError
from gemcutter.cli.terminal import new_table, print_json, spell_bytes, tables
from gemcutter.errors import RequestError
from gemcutter.load_options import DEFAULT_CONTEXT, own_dtype

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from gemcutter.benchmark.devices import Device
    from gemcutter.benchmark.planned_model import PlannedModel

HELP = """
Say what a model needs on several ranks, and how fast these can be at the most.

The model is MODEL, of which only headers are read, or --preset: the geometry of a released size, stored as --quant says, which
needs no file. --tp ranks share every layer; --pp cuts the layers into stages, each on ranks of its own. Layers that read the
keys and values of another one stay on its stage.

Memory is that of the fullest rank: weights by kind, as they are held once they are loaded, keys and values of --batch sequences
of --context tokens, beginnings of prompts that are kept, and buffers. Speeds are bounds, as the ceilings of `gemcutter bench`
are: the bytes that a token must read over --memory-bandwidth, or operations over --flops, and then what ranks exchange over
--link-bandwidth, with --link-latency for each exchange. No launch and no wait is counted. --device names what has these figures;
docs/guide/scale.md says where they come from. On GPUs this is a forecast that nobody has measured yet.
"""
EXAMPLES = """\b
Examples:
  gemcutter plan --preset 31B --quant bf16 --tp 2 --device l40s
  gemcutter plan --preset 26B-A4B --quant q4_0 --tp 2 --device epyc-9004 --batch 8
  gemcutter plan ./gemma-4-E4B-it --tp 2 --pp 2 --device cpu --memory 16
  gemcutter plan --preset 12B --quant q8_0 --memory-bandwidth 80 --flops 2 --json
"""
PRESET_QUANT = "bf16"

TensorParallel = Annotated[
    int, typer.Option("--tp", "--tensor-parallel", metavar="N", min=1, help="Ranks that share every layer.")
]
Stages = Annotated[int, typer.Option("--pp", "--pipeline-parallel", metavar="M", min=1, help="Stages of contiguous layers.")]
DeviceName = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="NAME",
        help="What a rank runs on: cpu, cuda, h100, h200, a100-80g, l40s, rtx-4090, mi300x, m4-max or epyc-9004.",
    ),
]
Memory = Annotated[
    float | None, typer.Option(metavar="GB", min=0.001, help="Memory of a rank.  [default: the device's]", show_default=False)
]
Bandwidth = Annotated[
    float | None,
    typer.Option(
        "--memory-bandwidth",
        metavar="GB/S",
        min=0.001,
        help="What a rank reads a second.  [default: the device's]",
        show_default=False,
    ),
]
Flops = Annotated[
    float | None,
    typer.Option(
        metavar="TFLOP/S", min=0.001, help="What a rank computes a second.  [default: the device's]", show_default=False
    ),
]
LinkBandwidth = Annotated[
    float | None,
    typer.Option(metavar="GB/S", min=0.001, help="What a rank receives a second.  [default: the device's]", show_default=False),
]
LinkLatency = Annotated[
    float | None,
    typer.Option(metavar="US", min=0, help="Microseconds of one exchange.  [default: the device's]", show_default=False),
]
Context = Annotated[
    int | None,
    typer.Option(metavar="TOKENS", min=1, help="Positions of each sequence.  [default: 32768]", show_default=False),
]
Batch = Annotated[int, typer.Option(metavar="N", min=1, help="Sequences that run at once.")]
Prompt = Annotated[int, typer.Option("-p", "--prompt", metavar="TOKENS", min=1, help="Rows of the prompt that is timed.")]
Rows = Annotated[int, typer.Option(metavar="N", min=1, help="Rows of one step, the chunk of a long prompt.")]


def plan(
    model: ModelArgument = None,
    preset: Preset = None,
    quant: options.Quant = None,
    tp: TensorParallel = 1,
    pp: Stages = 1,
    device: DeviceName = "cpu",
    memory: Memory = None,
    memory_bandwidth: Bandwidth = None,
    flops: Flops = None,
    link_bandwidth: LinkBandwidth = None,
    link_latency: LinkLatency = None,
    context: Context = None,
    batch: Batch = 1,
    prompt: Prompt = 2048,
    rows: Rows = 512,
    kv: options.Kv = None,
    prefix_cache_bytes: options.PrefixCacheBytes = None,
    dtype: options.Dtype = None,
    ignore: options.Ignore = None,
    as_json: options.Json = False,
) -> None:
    """Print the plan of one model on some ranks. Raises UsageError or GemcutterError."""
    if (model is None) == (preset is None):
        raise UsageError("give either MODEL or --preset")
    recipe = check_quant(quant, is_preset=model is None)
    prefix_bytes = options.parse_bytes("--prefix-cache-bytes", prefix_cache_bytes)

    from gemcutter.benchmark.devices import GB, MICROSECONDS, TFLOPS, find_device
    from gemcutter.benchmark.scale import Workload
    from gemcutter.benchmark.scale_report import describe, make_plan, other_sizes

    def times(value: float | None, unit: float) -> float | None:
        return None if value is None else value * unit

    chosen = find_device(device).changed(
        memory_bytes=times(memory, GB),
        bandwidth=times(memory_bandwidth, GB),
        flops=times(flops, TFLOPS),
        link_bandwidth=times(link_bandwidth, GB),
        link_latency_s=times(link_latency, MICROSECONDS),
    )
    check_kv(kv, chosen)
    planned = plan_for(model, preset, recipe, dtype, chosen, tuple(ignore or ()))
    length = fitting_context(context, planned)
    work = Workload(length, batch, rows, min(prompt, length), kv, prefix_bytes)
    made = make_plan(planned, chosen, work, tp, pp)
    found = describe(made) | {"tensor_parallel_sizes": other_sizes(made)}
    if as_json:
        print_json(found)
    else:
        show(found)


def check_kv(kv: str | None, device: Device) -> None:
    """Raise UsageError for a cache that a type of device does not have."""
    if kv == "fp8" and device.place == "cpu":
        raise UsageError(
            f"--kv fp8: keys and values are kept as 8-bit floats on a GPU only, and {device.name} is a CPU; use int8"
        )
    if kv == "int8" and device.place != "cpu":
        raise UsageError(f"--kv int8: a choice for models on a CPU, and {device.name} is a GPU; use fp8")


def plan_for(
    model: str | None, preset: str | None, quant: str | None, dtype: str | None, device: Device, ignore: tuple[str, ...]
) -> PlannedModel:
    """Return what is planned for: a checkpoint's headers, or a size. Raises GemcutterError."""
    from gemcutter.benchmark.planned_model import from_checkpoint, from_preset

    if model is None:
        return from_preset(str(preset), quant or PRESET_QUANT, dtype or "bfloat16", device.place)
    from gemcutter.checkpoint.load.match import read_checkpoint
    from gemcutter.checkpoint.remote.remote_source import open_source

    checkpoint = read_checkpoint(open_source(model), ignore)
    return from_checkpoint(model, checkpoint, dtype or own_dtype(checkpoint.config.dtype)[0], device.place, quant)


def fitting_context(asked: int | None, planned: PlannedModel) -> int:
    """Return the positions of a sequence. Raises RequestError for more than the model was made for."""
    most = planned.plan.context
    if asked is not None and asked > most:
        raise RequestError(f"--context {asked}: the model was made for {most} tokens at most")
    return asked or min(DEFAULT_CONTEXT, most)


# ---- as tables ----


def show(found: dict[str, Any]) -> None:
    """Print the plan as tables on stdout."""
    with tables(120) as console:
        _show(found, console)


def _show(found: dict[str, Any], console: Console) -> None:
    console.print(_head(found), soft_wrap=True)
    for table in (_memory(found), _exchanges(found["stages"]), _speeds(found["speeds"])):
        if table is not None:
            console.print()
            console.print(table)
    for line in _verdict(found):
        console.print(line, soft_wrap=True)


def _head(found: dict[str, Any]) -> str:
    device, work = found["device"], found["workload"]
    ranks = found["tensor_parallel"] * found["pipeline_stages"]
    figures = [
        (device["memory_bytes"], 1e9, "GB"),
        (device["bandwidth"], 1e9, "GB/s"),
        (device["flops"], 1e12, "TFLOP/s"),
        (device["link_bandwidth"] if ranks > 1 else None, 1e9, "GB/s between ranks"),
        (device["link_latency_s"] if ranks > 1 else None, 1e-6, "us an exchange"),
    ]
    told = ", ".join(f"{value / unit:g} {name}" for value, unit, name in figures if value is not None)
    quant = f", quantized by {found['quant']}" if found["quant"] else ""
    place = f"{ranks} rank{'s' if ranks > 1 else ''}, {device['title']} each" if ranks > 1 else f"one rank, {device['title']}"
    return (
        f"{found['model']}, stored {found['stored']}{quant}: {place}{f' ({told})' if told else ''}\n"
        f"{work['batch']} sequence{'s' if work['batch'] > 1 else ''} of {work['context']} tokens, "
        f"keys and values in {work['kv'] or found['compute_dtype']}"
    )


def _memory(found: dict[str, Any]) -> Table:
    """Lay out the memory of each stage's fullest rank, a row for each thing that takes some."""
    stages = found["stages"]
    names = [f"layers {_layers(stage)}" for stage in stages]
    table = new_table("Memory of a rank", "<of", *names, "<where")
    for kind in dict.fromkeys(kind for stage in stages for kind in stage["weights"]):
        held = [stage["weights"].get(kind, {}) for stage in stages]
        table.add_row(kind, *(_size(sum(each.values())) for each in held), _where(held, found["device"]["place"]))
    rows = {
        "weights": "weight_bytes",
        "keys and values": "kv_bytes",
        "beginnings kept for reuse": "prefix_bytes",
        "rows on their way, logits": "buffer_bytes",
        "Python, torch, tokenizer": "process_bytes",
        "needs": "needs_bytes",
    }
    for name, key in rows.items():
        if any(stage[key] for stage in stages):
            table.add_row(
                name, *(_size(stage[key]) for stage in stages), _aside(name), style="bold" if key == "needs_bytes" else ""
            )
    return table


def _aside(name: str) -> str:
    return {"weights": "in all, but for rows on disk", "rows on their way, logits": "estimated"}.get(name, "")


def _where(held: Sequence[dict[str, int]], place: str) -> str:
    words = {
        "mapped": "mapped from the file",
        "resident": "in memory",
        "by_rows": "on disk: rows of the tokens in use are read" if place == "cpu" else "in the host's memory, read by rows",
    }
    return ", ".join(word for name, word in words.items() if any(each.get(name) for each in held))


def _size(count: float) -> str:
    return spell_bytes(count) if count else "-"


def _exchanges(stages: Sequence[dict[str, Any]]) -> Table | None:
    """Lay out what the ranks of each stage exchange for one token; None where there is one rank."""
    rows = [(stage, each) for stage in stages for each in stage["exchanges_per_token"]]
    if not rows and len(stages) == 1:
        return None
    table = new_table("Exchanges for a token", "<of", "<layers", "times", "bytes each", "a rank receives")
    for stage, each in rows:
        table.add_row(
            each["name"], _layers(stage), str(each["times"]), spell_bytes(each["bytes"]), spell_bytes(each["received_bytes"])
        )
    for stage in stages if len(stages) > 1 else ():
        size = spell_bytes(stage["handed_on_bytes_per_token"])
        table.add_row(
            "rows for the first stage" if stage is stages[-1] else "rows for the next stage", _layers(stage), "1", size, size
        )
    return table


def _layers(stage: dict[str, Any]) -> str:
    first, last = stage["first_layer"], stage["last_layer"]
    return str(first) if first == last else f"{first}-{last}"


def _speeds(speeds: Sequence[dict[str, Any]]) -> Table:
    table = new_table("At the most", "<test", "tokens/s", "a step", "reading", "computing", "exchanging", "<bound by")
    for row in speeds:
        many = f", {row['batch']} sequences" if row["batch"] > 1 else ""
        name = f"prompt of {row['tokens']}" if row["test"] == "prompt" else f"reply after {row['depth']} tokens{many}"
        times = (_time(row[key]) for key in ("seconds", "read_s", "compute_s", "exchange_s"))
        table.add_row(name, _speed(row["tok_s"]), *times, row["bound"] or "-")
    return table


def _speed(tokens: float | None) -> str:
    if tokens is None:
        return "-"
    return f"{tokens:.0f}" if tokens >= 1000 else f"{tokens:.3g}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _verdict(found: dict[str, Any]) -> Iterator[str]:
    """Yield whether it fits, which numbers of ranks would, and which figures are missing for speeds."""
    device, needs = found["device"], found["needs_bytes"]
    if device["memory_bytes"] is not None:
        has = spell_bytes(device["memory_bytes"])
        verdict = (
            f"fits: a rank needs {spell_bytes(needs)} of {has}"
            if found["fits"]
            else (f"does not fit: a rank needs {spell_bytes(needs)} and has {has}")
        )
        beside = "" if device["place"] == "cpu" else ", beside what the driver takes"
        yield verdict + beside
    told = [f"{row['tensor_parallel']} ({_fit(row)})" for row in found["tensor_parallel_sizes"]]
    yield f"tensor-parallel ranks and what each needs: {', '.join(told)}"
    for row in found["tensor_parallel_sizes"]:
        if row["problem"]:
            yield f"  not {row['tensor_parallel']}: {row['problem']}"
    missing = [f"--{name}" for name, key in FIGURES.items() if device[key] is None and _is_wanted(key, found)]
    if missing:
        yield f"for speeds, say {', '.join(missing)}, or take a --device that has these figures"


FIGURES = {
    "memory-bandwidth": "bandwidth",
    "flops": "flops",
    "link-bandwidth": "link_bandwidth",
    "link-latency": "link_latency_s",
}


def _is_wanted(key: str, found: dict[str, Any]) -> bool:
    return not key.startswith("link") or found["tensor_parallel"] * found["pipeline_stages"] > 1


def _fit(row: dict[str, Any]) -> str:
    if row["problem"]:
        return "impossible"
    size = spell_bytes(row["needs_bytes"])
    return size if row["fits"] is None else f"{size}, {'fits' if row['fits'] else 'too much'}"
