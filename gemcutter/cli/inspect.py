"""`gemcutter inspect`: what a checkpoint is, and how it will run.

Owns the report, one object from which both the tables and --json are made; every size in it comes from the plan. Reads headers
only and imports no torch, so that it answers at once whatever the checkpoint's size. Read `gemcutter/plan.py` for what the
columns mean.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemcutter.checkpoint.container.lazy_tensor import DTYPES
from gemcutter.checkpoint.container.stored_tensor import PackedTensor
from gemcutter.checkpoint.doctor.doctor import spell_ranges
from gemcutter.checkpoint.doctor.towers import describe_tower, match_towers
from gemcutter.checkpoint.formats.lora import Adapter, open_adapter
from gemcutter.checkpoint.load.held import ITEM_BYTES, changed_pieces, held_as
from gemcutter.checkpoint.load.match import Checkpoint, Piece, read_checkpoint
from gemcutter.checkpoint.load.match_towers import find_tower_files
from gemcutter.checkpoint.load.memory_needs import (
    WeightMemory,
    kv_widths,
    other_memory,
    quant_notes,
    recipe_scheme,
    step_memory,
    weight_memory,
)
from gemcutter.checkpoint.remote.hub import locate
from gemcutter.cli import options
from gemcutter.cli.failure import UsageError
from gemcutter.cli.terminal import new_table, spell_bytes, spell_count, spell_tower, spell_work, tables
from gemcutter.errors import ConfigError, RequestError
from gemcutter.load_options import DEFAULT_CONTEXT, own_dtype
from gemcutter.ops import KernelSite
from gemcutter.ops.registry import KernelPlan, Selection, select_backend
from gemcutter.param_spec import Access
from gemcutter.plan import LayerPlan
from gemcutter.tower_plan import TowerPlan, derive_audio, derive_vision

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

HELP = """
Show what a checkpoint is and how it will run.

That is: its layers and whose keys and values they read, what it holds beyond them, memory and work by context length, and the
kernels that would be chosen, with the reasons against the others. Only headers are read: of a model on the hub a few kilobytes,
before anything is downloaded. Drafters (assistants) can be inspected, too. Towers for images and sounds are shown with how they
are stored, in the model's files or in a projector: the one beside a GGUF model, or --mmproj.

The last line says how much memory a run with one sequence of that length would need, with --quant, --adapter and --kv as given.
Dense weights that stay mapped from the file are in the system's page cache: they count as used, but can be dropped and read
again, so that less memory makes a model slow before it fails. The rest (Python, torch, buffers) is an estimate, within 15 % of
all that was measured.
"""
EXAMPLES = """\b
Examples:
  gemcutter inspect demo
  gemcutter inspect ./gemma-4-E2B-it --context 8192,131072 --dtype float32
  gemcutter inspect e4b --quant q4 --context 32768
  gemcutter inspect demo --json
"""
CONTEXTS = (4096, 32768, 131072)
PROJECTIONS = {"qkv": "q k v", "qk": "q k, v = k", "q": "q"}

Contexts = Annotated[
    str | None,
    typer.Option(
        "--context",
        metavar="TOKENS,...",
        help=f"Context lengths to size memory and work for.  [default: {','.join(map(str, CONTEXTS))}]",
    ),
]


@dataclass(frozen=True, slots=True)
class Use:
    """How the checkpoint would be loaded."""

    dtype: str
    device: str
    kernels: str
    quant: str | None = None
    kv: str | None = None
    adapter: Adapter | None = None

    @property
    def place(self) -> str:
        """Return the type of device."""
        return self.device.partition(":")[0]

    @property
    def kv_item_bytes(self) -> int:
        """Return the bytes of one element of the cache."""
        return kv_widths(self.dtype, self.kv)[0]

    @property
    def kv_scale_bytes(self) -> int:
        """Return the bytes of the scale beside each key and value vector of a head."""
        return kv_widths(self.dtype, self.kv)[1]


def inspect(
    model: options.Model,
    contexts: Contexts = None,
    dtype: options.Dtype = None,
    device: options.Device = "cpu",
    kernels: options.Kernels = "auto",
    quant: options.Quant = None,
    adapter: options.Adapter = None,
    kv: options.Kv = None,
    as_json: options.Json = False,
    ignore: options.Ignore = None,
    mmproj: options.Mmproj = None,
) -> None:
    """Print the report of one checkpoint. Raises UsageError or GemcutterError."""
    asked = None if contexts is None else options.parse_integers("--context", contexts)
    if asked is not None and (not asked or min(asked) < 1):
        raise UsageError(f"--context: expected positive numbers, found {contexts!r}")
    if kv == "fp8" and device == "cpu":
        raise UsageError("--kv fp8: keys and values are kept as 8-bit floats on a GPU only; use --kv int8, or add --device cuda")
    if kv == "int8" and device != "cpu":
        raise UsageError("--kv int8: a choice for models on a CPU; on a GPU use kv fp8")
    from gemcutter.checkpoint.remote.remote_source import (
        open_source,
    )  # which knows the web, and takes as long to import as all the rest

    checkpoint = read_checkpoint(open_source(model), tuple(ignore or ()))
    compute = dtype or own_dtype(checkpoint.config.dtype)[0]
    if asked and max(asked) > checkpoint.plan.context:
        raise RequestError(f"--context {max(asked)}: the model was made for {checkpoint.plan.context} tokens at most")
    lengths = asked or tuple(length for length in CONTEXTS if length <= checkpoint.plan.context) or (checkpoint.plan.context,)
    merged = None if adapter is None else open_adapter(locate(adapter), checkpoint.plan, tuple(ignore or ()))
    towers = describe_towers(checkpoint, None if mmproj is None else locate(mmproj), tuple(ignore or ()))
    found = describe(checkpoint, model, lengths, Use(compute, device, kernels, quant, kv, merged), towers)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        show(found)


# ---- the report ----


def describe(
    checkpoint: Checkpoint, model: str, contexts: Sequence[int], use: Use, towers: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Return everything that `inspect` shows. Bytes count what is stored for layers, what is held in memory for weights."""
    plan, source, config = checkpoint.plan, checkpoint.source, checkpoint.config
    backend, stored = select_backend(use.place, use.kernels), stored_dtype(checkpoint)
    stored = DTYPES[stored][1] if stored in DTYPES else stored
    changed = frozenset() if use.adapter is None else changed_pieces(use.adapter, checkpoint)
    held = weight_memory(checkpoint, use.dtype, use.place, backend.packing, use.quant, changed)
    weights, item_bytes = count_weights(checkpoint, use, held)
    selections = select_kernels(checkpoint, use, changed)
    is_compact = any(map(backend.is_compact, plan.layers))
    return {
        "model": model,
        "path": str(source.path),
        "format": checkpoint.format,
        "model_type": config.model_type,
        "is_drafter": plan.is_drafter,
        "files": [file.name for file in source.files],
        "file_bytes": source.total_bytes,
        "stored_dtype": stored,
        "compute_dtype": use.dtype,
        "hidden": plan.hidden,
        "vocab": plan.vocab,
        "context": plan.context,
        "layers": [describe_layer(layer, checkpoint) for layer in plan.layers],
        "first_reader": plan.first_reader,
        "parameters": count_parameters(checkpoint),
        "towers": towers,
        "skipped": _pile(checkpoint.matched.redundant),
        "left_aside": {kind: _pile(pieces) for kind, pieces in checkpoint.matched.other_modules.items()},
        "ignored": _pile(checkpoint.matched.ignored),
        "notes": list_notes(checkpoint, use, changed, [f"{name} tower" for name, tower in towers.items() if tower.get("stored")]),
        "weights": weights,
        "contexts": [describe_context(checkpoint, tokens, item_bytes, use, is_compact) for tokens in contexts],
        "memory": describe_memory(checkpoint, contexts, use, held, is_compact),
        "kernels": [describe_kernel(selection, layers, plan.layers) for selection, layers in selections],
    }


def count_weights(checkpoint: Checkpoint, use: Use, held: WeightMemory) -> tuple[dict[str, int], float]:
    """Return the bytes of the weights and of one element: as they are stored, or as --quant and --adapter make them."""
    plan = checkpoint.plan
    if use.quant is None and use.adapter is None:
        item_bytes = held_bytes(checkpoint, use.dtype, use.device)
        whole, read = plan.weight_bytes(item_bytes), plan.weight_bytes(item_bytes, rows_access=False)
    else:
        read = held.held
        whole = read + held.by_rows
        item_bytes = read / plan.weight_bytes(1.0, rows_access=False)
    return {"bytes": whole, "read_whole_bytes": read}, item_bytes


def list_notes(checkpoint: Checkpoint, use: Use, changed: frozenset[Piece], towers: Sequence[str]) -> list[str]:
    """Return what would be left out, and which options would have no effect; `towers` are described already."""
    notes = checkpoint.notes(towers)
    if use.adapter is not None:
        notes += [f"adapter {use.adapter.path.name}: {len(use.adapter.factors)} changes to merge", *use.adapter.notes()]
    return notes if use.quant is None else [*notes, *quant_notes(checkpoint, use.quant, changed)]


def describe_memory(
    checkpoint: Checkpoint, contexts: Sequence[int], use: Use, held: WeightMemory, is_compact: bool
) -> dict[str, Any]:
    """Return what a run needs at each context length, with one sequence: bytes on the CPU, or on the GPU."""
    plan = checkpoint.plan
    is_packed = any(isinstance(piece.data, PackedTensor) for found in checkpoint.matched.pieces.values() for piece in found)
    is_packing = use.quant is not None or use.adapter is not None or (is_packed and held.resident > held.mapped)
    other = other_memory(checkpoint, is_packing) if use.place == "cpu" else step_memory(plan)
    weights = held.held
    sizes = {tokens: plan.kv_bytes(tokens, use.kv_item_bytes, is_compact, use.kv_scale_bytes) for tokens in contexts}
    return {
        "device": use.device,
        "mapped_weight_bytes": held.mapped,
        "resident_weight_bytes": held.resident,
        "on_disk_weight_bytes": held.by_rows,
        "other_bytes": other,
        "by_context": [
            {"tokens": tokens, "kv_bytes": size, "needs_bytes": weights + size + other} for tokens, size in sizes.items()
        ],
    }


def select_kernels(
    checkpoint: Checkpoint, use: Use, changed: frozenset[Piece] = frozenset()
) -> list[tuple[Selection, tuple[int, ...]]]:
    """Select the kernels that a decoder of this checkpoint would select, from headers alone."""
    backend, plan, pieces = select_backend(use.place, use.kernels), checkpoint.plan, checkpoint.matched.pieces
    matrices = {spec.name: spec for spec in plan.params() if len(spec.shape) > 1}

    def stored(name: str) -> list[str]:
        if name not in matrices:
            return []
        kinds, spec = held_as(pieces[name], use.dtype, use.place, backend.packing), matrices[name]
        is_table = spec.access is Access.ROWS
        scheme = None if use.quant is None or is_table else recipe_scheme(use.quant, spec)
        for index, piece in enumerate(pieces[name]):
            is_changed = (name, piece.part) in changed
            if scheme is not None and (is_changed or not isinstance(piece.data, PackedTensor)):
                kinds[index] = backend.packing(scheme)
            elif is_changed:
                kinds[index] = use.dtype
        return kinds

    site = KernelSite("linear", None, use.place, backend.row_dtype(use.dtype), use.dtype, use.kernels)
    return list(KernelPlan(plan, site, stored).selections())


def describe_kernel(selection: Selection, layers: tuple[int, ...], among: Sequence[LayerPlan]) -> dict[str, Any]:
    """Return one row of the kernel table: an op, its kernel, the layers that get it (None: all, or no layer's op), and why."""
    return {
        "op": selection.site.op,
        "kernel": selection.impl.name,
        "stored": selection.site.stored,
        "layers": list(layers) if 0 < len(layers) < len(among) else None,
        "refusals": [{"kernel": name, "reason": reason} for name, reason in selection.refusals],
    }


def describe_context(checkpoint: Checkpoint, tokens: int, item_bytes: float, use: Use, is_compact: bool) -> dict[str, Any]:
    """Return memory and work at one context length."""
    plan = checkpoint.plan
    # a drafter has no prefill: its target's keys and values are there already
    flops = (None, None) if plan.is_drafter else (plan.flops(tokens), plan.flops(tokens, skip_rows=False))
    return {
        "tokens": tokens,
        "kv_bytes": plan.kv_bytes(tokens, use.kv_item_bytes, is_compact, use.kv_scale_bytes),
        "read_bytes_per_token": plan.read_bytes(tokens, item_bytes, use.kv_item_bytes, is_compact, use.kv_scale_bytes),
        "prefill_flops": flops[0],
        "prefill_flops_all_rows": flops[1],
    }


def describe_layer(layer: LayerPlan, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return one row of the layer table; `bytes` are the stored ones of its own tensors."""
    prefix = f"layers.{layer.index}."
    owned = [pieces for name, pieces in checkpoint.matched.pieces.items() if name.startswith(prefix)]
    return {
        "index": layer.index,
        "attention": layer.attn.value,
        "projection": layer.proj.value,
        "kv_source": "own" if layer.writes else "target" if layer.kv_owner == "target" else layer.kv_layer,
        "window": layer.window,
        "heads": layer.heads,
        "kv_heads": layer.kv_heads,
        "head_dim": layer.head_dim,
        "mlp_width": layer.mlp_width,
        "experts": layer.moe and {"count": layer.moe.experts, "top_k": layer.moe.top_k, "width": layer.moe.width},
        "ple_dim": layer.ple_dim,
        "bytes": sum(piece.data.nbytes for pieces in owned for piece in pieces),
    }


def describe_towers(checkpoint: Checkpoint, projector: Path | None, ignore: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the sizes of each tower, with its projector, and how it is stored, or the problems that keep it from being loaded.

    Where there are no tensors, sizes are those of the config, if it names the tower. Raises CheckpointError for a `projector`
    that holds no towers.
    """
    found = dict[str, dict[str, Any]]()
    for report in match_towers(find_tower_files(checkpoint, projector), ignore):
        found[report.name] = describe_tower(report) | ({} if report.plan is None else _as_bfloat16(report.plan))
    for name, derive in (("vision", derive_vision), ("audio", derive_audio)):
        if name in found:
            continue
        try:
            plan = derive(checkpoint.config)
        except ConfigError as error:
            found[name] = {"problems": list(error.problems)}
            continue
        if plan is not None:
            sizes = {"layers": plan.num_layers, "hidden": plan.hidden, "parameters": plan.num_params()}
            found[name] = sizes | _as_bfloat16(plan)
    return found


def _as_bfloat16(plan: TowerPlan) -> dict[str, int]:
    """Return the bytes of a tower in bfloat16, whatever it is stored as."""
    return {"bfloat16_bytes": 2 * sum(spec.elements for spec in plan.params())}


def stored_dtype(checkpoint: Checkpoint) -> str:
    """Return the dtype (in safetensors spelling) or the packed scheme that most bytes of the decoder are stored in."""
    sizes = Counter[str]()
    for pieces in checkpoint.matched.pieces.values():
        for piece in pieces:
            sizes[piece.data.dtype] += piece.data.nbytes
    return sizes.most_common(1)[0][0]


def held_bytes(checkpoint: Checkpoint, dtype: str, device: str) -> float:
    """Return the bytes that an element of the weights takes in memory; an average where they are packed, and stay so."""
    stored = stored_dtype(checkpoint)
    if stored not in DTYPES:
        total = sum(piece.data.nbytes for pieces in checkpoint.matched.pieces.values() for piece in pieces)
        return total / sum(spec.elements for spec in checkpoint.plan.params())
    # A mapped weight keeps its width; what is stored wider than it is computed, or goes to a GPU, is converted once.
    return min(ITEM_BYTES[dtype], DTYPES[stored][0]) if device == "cpu" else ITEM_BYTES[dtype]


def count_parameters(checkpoint: Checkpoint) -> dict[str, int]:
    """Count the decoder's parameters by place; tied tensors count once, buffers not at all."""
    counts = {"total": checkpoint.plan.num_params(), "layers": 0, "embedding": 0, "per_layer_embedding": 0, "other": 0}
    for spec in checkpoint.plan.params():
        section = spec.name.partition(".")[0]
        place = {"layers": "layers", "head": "embedding"}.get(section, "other")
        place = {"embed.tokens": "embedding", "embed.ple": "per_layer_embedding"}.get(spec.name, place)
        counts[place] += 0 if spec.buffer else spec.elements
    return counts


def _pile(pieces: Sequence[Any]) -> dict[str, int]:
    return {"tensors": len(pieces), "bytes": sum(piece.data.nbytes for piece in pieces)}


# ---- as tables ----


def show(found: dict[str, Any]) -> None:
    """Print the report as tables on stdout."""
    with tables(120) as console:
        _show(found, console)


def _show(found: dict[str, Any], console: Console) -> None:
    for line in _head(found):
        console.print(line)
    kernels = found["kernels"]
    is_plain = len({row["kernel"] for row in kernels}) == 1 and not any(row["refusals"] for row in kernels)
    for table in (_layers(found["layers"]), _contexts(found["contexts"]), None if is_plain else _kernels(kernels)):
        console.print()
        console.print(f"Kernels: {kernels[0]['kernel']}, for every op" if table is None else table)
    if not found["is_drafter"]:
        console.print(_needs(found["memory"]), soft_wrap=True)


def _needs(memory: dict[str, Any]) -> str:
    """Format what a run needs, at the default context if that is among those asked for, else at the longest."""
    rows = memory["by_context"]
    row = next((row for row in rows if row["tokens"] == DEFAULT_CONTEXT), rows[-1])
    parts = {
        "weights mapped from the file": memory["mapped_weight_bytes"],
        "weights in memory": memory["resident_weight_bytes"],
        "keys and values": row["kv_bytes"],
        "all else": memory["other_bytes"],
    }
    told = ", ".join(f"{name} {spell_bytes(size)}" for name, size in parts.items() if size > 1e6)
    where = "" if memory["device"] == "cpu" else f" on {memory['device']}, beside what CUDA itself takes"
    return f"needs about {spell_bytes(row['needs_bytes'])} at {row['tokens']} tokens{where}: {told}"


def _head(found: dict[str, Any]) -> Iterator[str]:
    counts, weights, layers = found["parameters"], found["weights"], found["layers"]
    kind = "a drafter: it runs only beside its target" if found["is_drafter"] else "a decoder"
    parts = ", ".join(f"{name.replace('_', ' ')} {spell_count(n)}" for name, n in counts.items() if n and name != "total")
    yield f"{found['path']}: {found['model_type']}, {kind}"
    yield f"  format      {found['format']}, {_files(found['files'])}, {spell_bytes(found['file_bytes'])}"
    yield f"  dtypes      stored {found['stored_dtype']}, computed {found['compute_dtype']}"
    yield f"  sizes       {len(layers)} layers, hidden {found['hidden']}, vocabulary {found['vocab']}, context {found['context']}"
    yield f"  parameters  {spell_count(counts['total'])}: {parts}"
    aside = weights["bytes"] - weights["read_whole_bytes"]
    yield f"  weights     {spell_bytes(weights['bytes'])}" + (
        f", of which {spell_bytes(aside)} are read by rows and stay on disk" if aside else ""
    )
    for name, tower in found["towers"].items():
        if tower.get("stored"):
            yield f"  {name:<11} {spell_tower(tower)}; loaded on request"
        elif tower.get("problems"):
            problems = tower["problems"]
            yield f"  {name:<11} would not load: {problems[0]}{f', and {len(problems) - 1} more' if len(problems) > 1 else ''}"
        else:
            yield f"  {name:<11} {spell_tower(tower | {'stored': ()})}; the files hold none of its tensors"
    for line in found["notes"]:
        yield f"  note        {line}"


def _files(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} files"


def _layers(layers: Sequence[dict[str, Any]]) -> Table:
    optional = {"experts": any(row["experts"] for row in layers), "PLE": any(row["ple_dim"] for row in layers)}
    extra = [name for name, is_shown in optional.items() if is_shown]
    table = new_table("Layers", "layer", "<attention", "window", "<owns", "<reads", "heads", "kv", "dim", "MLP", *extra, "bytes")
    for row in layers:
        source, moe = row["kv_source"], row["experts"]
        cells = {"experts": f"{moe['top_k']} of {moe['count']} x {moe['width']}" if moe else "", "PLE": str(row["ple_dim"])}
        table.add_row(
            str(row["index"]),
            row["attention"],
            str(row["window"] or "all"),
            PROJECTIONS[row["projection"]],
            f"layer {source}" if isinstance(source, int) else source,
            *(str(row[name]) for name in ("heads", "kv_heads", "head_dim", "mlp_width")),
            *(cells[name] for name in extra),
            spell_bytes(row["bytes"]),
        )
    return table


def _contexts(contexts: Sequence[dict[str, Any]]) -> Table:
    table = new_table("By context", "tokens", "KV memory", "read per token", "prefill", "if all rows ran", "saved")
    for row in contexts:
        flops, whole = row["prefill_flops"], row["prefill_flops_all_rows"]
        work = ("-", "-", "-") if flops is None else (spell_work(flops), spell_work(whole), f"{1 - flops / whole:.0%}")
        table.add_row(
            str(row["tokens"]),
            spell_bytes(row["kv_bytes"]),
            spell_bytes(row["read_bytes_per_token"]),
            *work,
        )
    return table


def _kernels(kernels: Sequence[dict[str, Any]]) -> Table:
    table = new_table("Kernels", "<op", "<kernel", "<weights", "<layers")
    table.add_column("why not a faster one")
    for row in kernels:
        reasons = "; ".join(f"{refusal['kernel']}: {refusal['reason']}" for refusal in row["refusals"])
        layers = "" if row["layers"] is None else spell_ranges(row["layers"])
        table.add_row(row["op"], row["kernel"], row["stored"] if row["op"] == "linear" else "", layers, reasons)
    return table
