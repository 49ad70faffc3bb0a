"""What a checkpoint holds, what it lacks, and who can load it: the report behind `gemcutter doctor`.

Owns the report, one JSON object whose keys are always there. Nothing that is wrong with a checkpoint stops it: each part is
reported as far as it can be read, and the problems are listed. Reads headers and small files only, near or far. Refuses to print
(`cli/doctor.py`) and to repair. Read `remote_source.py` for how far files are reached, `engine_compat.py` for the other engines.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemcutter import config as configs
from gemcutter.checkpoint.container.source import Source
from gemcutter.checkpoint.container.stored_tensor import PackedTensor, StoredTensor
from gemcutter.checkpoint.doctor import towers
from gemcutter.checkpoint.doctor.engine_compat import find_facts, judge
from gemcutter.checkpoint.doctor.sidecar_files import SidecarFiles, read_sidecar_files
from gemcutter.checkpoint.doctor.towers import TowerReport
from gemcutter.checkpoint.formats import FORMATS, Format, lora
from gemcutter.checkpoint.load.match import FLOATS, Checkpoint, Matched, compare, table_notes
from gemcutter.checkpoint.remote.remote_source import received, survey
from gemcutter.config import ModelConfig
from gemcutter.errors import ConfigError, GemcutterError
from gemcutter.plan import LayerPlan, ModelPlan, derive

if TYPE_CHECKING:
    from gemcutter.checkpoint.doctor.values import ValueReport

SCHEMA = 1
FINE, REMARKS, BROKEN, UNREADABLE = "fine", "remarks", "broken", "unreadable"
EXIT_CODES = {FINE: 0, REMARKS: 1, BROKEN: 2, UNREADABLE: 2}
FEW_BITS = {"ple_table": 5.0, "router": 8.0}  # a weight; below it, quality is known to suffer

# The end of a parameter's name -> what it does; matrices only.
ROLES = {
    "embed.tokens": "embedding",
    "head": "head",
    "embed.ple": "ple_table",
    "ple.in": "ple_projections",
    "ple.gate": "ple_projections",
    "ple.out": "ple_projections",
    "attn.in": "attention",
    "attn.out": "attention",
    "mlp.in": "mlp",
    "mlp.out": "mlp",
    "moe.router": "router",
    "moe.in": "experts",
    "moe.out": "experts",
    "draft.in": "drafting",
    "draft.out": "drafting",
    "draft.centroids": "drafting",
}


@dataclass(frozen=True, slots=True)
class TextReport:
    """What loading makes of a checkpoint's text side: notes, and of each id that ends a reply, which files ask for it."""

    notes: tuple[str, ...]
    stops: Mapping[int, tuple[str, ...]]


ReadText = Callable[[Checkpoint, Sequence[str]], TextReport]  # of a checkpoint with towers of these names


def examine(
    model: str,
    ignore: Sequence[str] = (),
    read_text: ReadText | None = None,
    data: bool = False,
    progress: Callable[[int, int], None] | None = None,
    mmproj: Path | None = None,
) -> dict[str, Any]:
    """Report on the checkpoint that `model` names: a path, a hub id, a web address or "demo". Raises nothing of our own.

    Its towers are those that loading with all media would load; `mmproj` is a file or folder that holds them instead. A
    projector is reported on by itself.

    `status` is "fine", "remarks" (it loads, but see `remarks`), "broken" (it does not load) or "unreadable" (nothing was there
    to judge). `ignore` holds patterns of config keys and tensors to pass over. `read_text` reads the text side of a checkpoint on
    this machine just as loading does, and raises what that raises. With `data`, all values of decoder and towers are read, too,
    and `progress` is told the bytes. All sizes are bytes.
    """
    problems: list[str] = []
    try:
        source = survey(model, problems)
    except GemcutterError as error:
        return _report(model, UNREADABLE, problems=list(error.problems))
    problems = [f"file       {problem}" for problem in problems]
    if _is_adapter(source):
        return _adapter_report(model, source, problems, ignore)
    if towers.is_projector(source):
        return _projector_report(model, source, problems, ignore, data, progress)
    format = next(format for format in FORMATS if _is_of(format, source))
    config, plan, can_match = _read_model(format, source, ignore, problems)
    matched = None
    if plan is not None and can_match:
        try:
            matched = compare(plan, format.pieces(source, plan), problems, ignore, format.spell)
        except GemcutterError as error:
            problems += towers.problems_of("file", error)
    sidecar = read_sidecar_files(source, config)
    remarks = [*(_remarks(plan, config, matched) if plan and config and matched else ()), *sidecar.remarks]
    checkpoint, found_towers = None, list[TowerReport]()
    if config and plan and matched and not plan.is_drafter:
        checkpoint = Checkpoint(source, config, plan, matched, format.NAME)
        found_towers = towers.examine_towers(checkpoint, mmproj, ignore, problems)
    text = None
    if read_text is not None and source.remote is None and checkpoint is not None:
        try:
            text = read_text(checkpoint, [tower.name for tower in found_towers if tower.matched])
        except GemcutterError as error:
            problems += towers.problems_of("text", error)
    if text is None and not any(problem.startswith("text") for problem in problems):
        problems += [f"text       {problem}" for problem in sidecar.problems]
    elif text is not None:
        remarks += [*text.notes, *sidecar.problems]  # of files that loading passes by
    if data and matched is not None:
        values = _values(source, [matched, *(tower.matched for tower in found_towers if tower.matched)], progress)
        problems += values.problems
        remarks += values.remarks
    status = BROKEN if problems else REMARKS if remarks else FINE
    raw = _raw_config(source)
    return _report(
        model,
        status,
        source=source,
        format=format.NAME,
        problems=sorted(problems),
        remarks=remarks,
        stops={} if text is None else text.stops,
        config=config,
        plan=plan,
        matched=matched,
        sidecar=sidecar,
        facts=find_facts(source, raw, config, plan, matched),
        found_towers=found_towers,
    )


def _is_adapter(source: Source) -> bool:
    try:
        return lora.is_adapter(source)
    except GemcutterError:
        return False


def _adapter_report(model: str, source: Source, problems: list[str], ignore: Sequence[str]) -> dict[str, Any]:
    """Report on an adapter as far as it can be judged without its base."""
    found, remarks = list[str](), list[str]()
    try:
        problems.append(f"config     {source.folder} is an adapter and no model: {lora.describe(source, found, ignore)}")
    except GemcutterError as error:
        found += error.problems
    problems += [f"config     {problem}" for problem in found]
    if not found:
        remarks.append("its settings and names are read; whether its shapes fit is told where it is loaded")
    return _report(model, BROKEN, source=source, format="PEFT adapter", problems=sorted(problems), remarks=remarks)


def _projector_report(
    model: str,
    source: Source,
    problems: list[str],
    ignore: Sequence[str],
    data: bool,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    """Report on a projector: it is sound if its towers are what its metadata says; which model it is for, no file tells."""
    found, remarks = towers.examine_projector(source, ignore, problems), list[str]()
    if not found:
        problems.append("file       this projector holds no towers of Gemma 4")
    if data:
        values = _values(source, [tower.matched for tower in found if tower.matched], progress)
        problems, remarks = problems + values.problems, values.remarks
    status = BROKEN if problems else REMARKS if remarks else FINE
    return _report(
        model,
        status,
        source=source,
        format=towers.PROJECTOR,
        problems=sorted(problems),
        remarks=remarks,
        found_towers=found,
    )


def _values(source: Source, found: Sequence[Matched], progress: Callable[[int, int], None] | None) -> ValueReport:
    from gemcutter.checkpoint.doctor.values import ValueReport, examine_values  # which needs torch

    if source.remote is not None:
        return ValueReport(["values     are not read over a network: download the checkpoint first"])
    return examine_values(found, progress)


# ---- as far as it can be read ----


def _read_model(
    format: Format, source: Source, ignore: Sequence[str], problems: list[str]
) -> tuple[ModelConfig | None, ModelPlan | None, bool]:
    """Return config and plan, and whether the format can read the weights; note every problem.

    Keys that the config's reader refuses are problems, and then passed over; weights in a scheme that no format reads leave the
    config readable.
    """
    config, can_match = None, True
    try:
        config = format.config(source, ignore)
    except GemcutterError as error:
        problems += towers.problems_of("config", error)
        config = _try(lambda: format.config(source, ("*",)))
        if config is None:
            can_match = False
            raw = _raw_config(source)
            config = None if raw is None else _try(lambda: configs.read(raw, ignore=("*",)))
    try:
        return config, None if config is None else derive(config), can_match
    except ConfigError as error:
        problems += towers.problems_of("config", error)
        return config, None, False


def _is_of(format: Format, source: Source) -> bool:
    """Return whether the checkpoint is of a format. One that stumbles over a damaged config is passed by; the last takes all."""
    try:
        return format.sniff(source)
    except GemcutterError:
        return False


def _try(read: Callable[[], ModelConfig]) -> ModelConfig | None:
    try:
        return read()
    except GemcutterError:
        return None


def _raw_config(source: Source) -> dict[str, Any] | None:
    try:
        return source.read_json("config.json")
    except GemcutterError:
        return None


# ---- remarks ----


def _remarks(plan: ModelPlan, config: ModelConfig, matched: Matched) -> Iterator[str]:
    pieces = [piece for found in matched.pieces.values() for piece in found]
    yield from (note for note in matched.notes(plan) if "skipped" in note)
    yield from config.notes
    yield from table_notes(plan)
    if matched.defaults and config.model_type.startswith("gemma4"):
        yield f"{len(matched.defaults)} layers have no layer_scalar: they are read as 1.0, which a trained model's are not"
    dense = [piece for piece in pieces if not isinstance(piece.data, PackedTensor) and len(piece.data.shape) > 1]
    if not any(isinstance(piece.data, PackedTensor) for piece in pieces):
        yield from _mixed(dense)
        if any(piece.data.dtype == "F16" for piece in dense):
            yield "weights are float16: fine as storage, but activations of this family overflow where engines compute in it"
    for row in _roles(matched):
        for scheme in row["stored"]:
            if scheme["bits_per_weight"] < FEW_BITS.get(row["role"], 0):
                bits, role = scheme["bits_per_weight"], row["role"].replace("_", " ")
                yield f"{role}: {scheme['dtype']} leaves {bits:.1f} bits a weight, where quality is known to suffer"
    absent = [tower for tower in config.towers if not any(tower in kind for kind in matched.other_modules)]
    if absent and not plan.is_drafter:
        yield f"the config names towers for {' and '.join(absent)}, and there are no tensors of theirs"


def _mixed(dense: Sequence[StoredTensor]) -> Iterator[str]:
    """Report matrices of another float type than most, in a checkpoint that is not quantized."""
    sizes = Counter[str]()
    for piece in dense:
        sizes[piece.data.dtype] += piece.data.nbytes
    usual = sizes.most_common(1)[0][0] if sizes else ""
    for dtype in FLOATS:
        odd = [piece for piece in dense if piece.data.dtype == dtype != usual]
        if odd:
            layers = sorted({int(piece.name.split(".")[1]) for piece in odd if piece.name and piece.name.startswith("layers.")})
            where = f" of layers {spell_ranges(layers)}" if layers else f" ({odd[0].label})"
            yield f"{len(odd)} matrices{where} are {dtype}, the others {usual}"


# ---- the parts of the report ----


def _report(
    model: str,
    status: str,
    *,
    source: Source | None = None,
    format: str | None = None,
    problems: Iterable[str] = (),
    remarks: Iterable[str] = (),
    config: ModelConfig | None = None,
    plan: ModelPlan | None = None,
    matched: Matched | None = None,
    sidecar: SidecarFiles | None = None,
    facts: tuple[str, ...] = (),
    stops: Mapping[int, tuple[str, ...]] | None = None,
    found_towers: Sequence[TowerReport] = (),
) -> dict[str, Any]:
    client = None if source is None else received(source)
    return {
        "schema": SCHEMA,
        "source": model,
        "status": status,
        "exit_code": EXIT_CODES[status],
        "problems": [_split(problem) for problem in problems],
        "remarks": list(remarks),
        "path": None if source is None else str(source.path),
        "format": format,
        "files": [] if source is None else _files(source),
        "tensors": 0 if source is None else len(source.tensors),
        "tensor_bytes": 0 if source is None else source.total_bytes,
        "received": client and {"requests": client.requests, "bytes": client.received_bytes},
        "model": None if plan is None or config is None else _model(plan, config),
        "towers": [towers.describe_tower(tower) for tower in found_towers],
        "layers": [] if plan is None else [_layer(layer, plan, matched) for layer in plan.layers],
        "missing": [] if matched is None else [{"name": name, "shape": list(shape)} for name, shape in matched.missing],
        "unknown": [] if matched is None else [_named(piece) for piece in matched.unknown],
        "redundant": [] if matched is None else [_named(piece) for piece in matched.redundant],
        "left_aside": {} if matched is None else {kind: _pile(pieces) for kind, pieces in matched.other_modules.items()},
        "dtypes": [] if source is None else _dtypes(source),
        "roles": [] if matched is None else _roles(matched),
        "text": None if sidecar is None else _text(sidecar),
        "stops": [{"id": id, "asked_by": list(who)} for id, who in sorted((stops or {}).items())],
        "facts": list(facts),
        "verdicts": []
        if source is None
        else [_own_verdict(status, format), *([] if format == towers.PROJECTOR else judge(facts))],
    }


def _split(problem: str) -> dict[str, str]:
    kind, _, text = problem.partition(" ")
    known = kind in ("file", "config", "text", "missing", "unknown", "shape", "dtype", "duplicate", "packing", "values")
    return {"kind": kind, "text": text.strip()} if known else {"kind": "file", "text": problem}


def _own_verdict(status: str, format: str | None) -> dict[str, Any]:
    verdicts = {FINE: "loads", REMARKS: "loads", BROKEN: "fails"}
    whys = {FINE: None, REMARKS: "see the remarks", BROKEN: "see the problems"}
    why = whys[status] or ("beside the model that it is for (--mmproj)" if format == towers.PROJECTOR else None)
    return {"engine": "gemcutter", "verdict": verdicts[status], "versions": "this one", "why": why, "threads": []}


def _files(source: Source) -> list[dict[str, Any]]:
    sizes = {tensor.file: tensor.mapped.size_bytes for tensor in source.tensors.values()}
    return [{"name": file.name, "bytes": sizes.get(file)} for file in source.files]


def _model(plan: ModelPlan, config: ModelConfig) -> dict[str, Any]:
    moe = next((layer.moe for layer in plan.layers if layer.moe), None)
    return {
        "model_type": config.model_type,
        "is_drafter": plan.is_drafter,
        "parameters": plan.num_params(),
        "layers": len(plan.layers),
        "readers": sum(not layer.writes for layer in plan.layers),
        "hidden": plan.hidden,
        "vocab": plan.vocab,
        "context": plan.context,
        "window": next((layer.window for layer in plan.layers if layer.window), None),
        "experts": moe and {"count": moe.experts, "top_k": moe.top_k, "width": moe.width},
        "ple_dim": plan.ple_dim,
        "tied_head": plan.tied_head,
        "towers": list(config.towers),
    }


def _layer(layer: LayerPlan, plan: ModelPlan, matched: Matched | None) -> dict[str, Any]:
    """Return what a layer needs by the plan, and what the checkpoint has of it."""
    prefix = f"layers.{layer.index}."
    pieces = [] if matched is None else [p for name, found in matched.pieces.items() if name.startswith(prefix) for p in found]
    spare = [] if matched is None else [piece for piece in matched.redundant if (piece.name or "").startswith(prefix)]
    return {
        "index": layer.index,
        "attention": layer.attn.value,
        "owns": [part for part, _ in layer.attn_parts()],
        "reads": "own" if layer.writes else "target" if layer.kv_owner == "target" else layer.kv_layer,
        "mlp_width": layer.mlp_width,
        "tensors": len(pieces),
        "bytes": sum(piece.data.nbytes for piece in pieces),
        "missing": 0 if matched is None else sum(name.startswith(prefix) for name, _ in matched.missing),
        "redundant": _pile(spare),
    }


def _dtypes(source: Source) -> list[dict[str, Any]]:
    counts, sizes = Counter[str](), Counter[str]()
    for tensor in source.tensors.values():
        counts[tensor.dtype] += 1
        sizes[tensor.dtype] += tensor.nbytes
    return [{"dtype": dtype, "tensors": counts[dtype], "bytes": size} for dtype, size in sizes.most_common()]


def _roles(matched: Matched) -> list[dict[str, Any]]:
    """List, by role, how matrices are stored, the largest share first."""
    piles: dict[str, dict[str, list[int]]] = {}
    for name, pieces in matched.pieces.items():
        role = ROLES.get(name.split(".", 2)[2] if name.startswith("layers.") else name)
        for piece in pieces if role is not None else ():
            pile = piles.setdefault(role or "", {}).setdefault(piece.data.dtype, [0, 0, 0])
            pile[0] += 1
            pile[1] += piece.data.nbytes
            pile[2] += _elements(piece)
    return [
        {
            "role": role,
            "stored": [
                {"dtype": dtype, "tensors": count, "bytes": nbytes, "bits_per_weight": round(8 * nbytes / max(elements, 1), 3)}
                for dtype, (count, nbytes, elements) in sorted(piles[role].items(), key=lambda item: -item[1][1])
            ],
        }
        for role in dict.fromkeys(ROLES.values())
        if role in piles
    ]


def _elements(piece: StoredTensor) -> int:
    count = 1
    for size in piece.data.shape:
        count *= size
    return count


def _text(sidecar: SidecarFiles) -> dict[str, Any]:
    found = asdict(sidecar)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in found.items() if key not in _LISTED}


_LISTED = ("problems", "remarks")  # which stand among all problems and remarks


def _named(piece: StoredTensor) -> dict[str, Any]:
    return {"name": piece.data.name, "file": piece.data.origin.partition(":")[0], "bytes": piece.data.nbytes}


def _pile(pieces: Sequence[StoredTensor]) -> dict[str, int]:
    return {"tensors": len(pieces), "bytes": sum(piece.data.nbytes for piece in pieces)}


def spell_ranges(numbers: Sequence[int]) -> str:
    """Format ascending numbers with their runs drawn together: "0-3, 5, 7-9"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
