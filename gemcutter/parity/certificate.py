"""The parity certificate: one text, two sides, one JSON object.

Owns what a certificate says and in which order things happen: all that can be refused is refused first, then one side runs after
the other over the same ids. Mapped checkpoints cost no memory of their own, so both sides stay loaded; transformers copies its
weights to float32, runs last and keeps its head alone. Read `trace.py` for the running, `compare.py` for the measures and
`limits.py` for the verdict.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from gemcutter import __version__, native
from gemcutter.api import Model
from gemcutter.checkpoint.doctor.fingerprint import sampled_sha256
from gemcutter.checkpoint.load.load_params import Progress
from gemcutter.errors import CheckpointError, RequestError
from gemcutter.ops.devices import cpu_features
from gemcutter.ops.registry import CPU
from gemcutter.parity import oracle
from gemcutter.parity.compare import Drift, compare
from gemcutter.parity.limits import Stored, choose_limits, first_divergent, judge
from gemcutter.parity.passage import PASSAGE
from gemcutter.parity.trace import CHUNK_ROWS, SINGLE_ROWS, Trace, kept_positions, trace
from gemcutter.plan import LayerPlan, ModelPlan
from gemcutter.quant import Weight
from gemcutter.quant.packed import dtype_name

BUILT_IN = "built-in"  # the name of the text that is the default
VERSION = 1  # of the certificate's layout
BEYOND_WINDOW = 192  # tokens after which every windowed layer has let go of keys for more than a chunk
SHOWN = 8  # differences of two plans that an error lists
# What may differ between two checkpoints of one model: none of it changes a text's logits.
IMMATERIAL = {"layers", "context", "pad_id", "tied_head", "bidirectional", "mlp_unit"}
# The processor's features that kernels are chosen by, here or in the libraries beneath.
FEATURES = {"avx", "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"}  # x86
FEATURES |= {"asimd", "i8mm", "bf16", "sve"}  # Arm

Bars = Callable[[str], AbstractContextManager[Progress]]  # opens a bar of that title


@dataclass(frozen=True, slots=True)
class Side:
    """One configuration of this engine: a loaded model, and how it was asked for."""

    name: str
    model: Model
    kernels: str
    quant: str | None = None
    adapter: str | None = None


def certify(ours: Side, theirs: Side | None, ids: Sequence[int], bars: Bars, text: str = BUILT_IN) -> dict[str, Any]:
    """Run ids of `encode` through both sides (`theirs` None: transformers, over the same files); return the certificate, as JSON.

    `text` names in it where the ids come from.

    Raises CheckpointError where the two are not of one model or the other library can't run it, RequestError where it is absent.
    """
    if theirs is not None:
        check_same_plan(ours, theirs)
    source = ours.model.checkpoint.source
    version = oracle.check(source.path) if theirs is None else ""
    kept_K = kept_positions(len(ids))
    traces = [_trace(side, ids, kept_K, bars) for side in (ours, theirs) if side is not None]
    if theirs is None:
        traces.append(oracle.trace(source.folder, ids, kept_K))
    with bars("comparing") as advance:
        drift = compare(traces[0], traces[1], ids, kept_K, advance)
    described = describe(ours)
    against = {"engine": f"transformers {version}", "dtype": "float32"} if theirs is None else describe(theirs)
    stored = None if _share_weights(ours, described, theirs, against) else (_stored(ours), _stored(theirs))
    return {
        "certificate": VERSION,
        "sampled_sha256": described["sampled_sha256"],
        **_findings(drift, (_arithmetic(described), _arithmetic(against)), stored),
        "text": _describe_ids(ours.model, ids) | {"source": text},
        "ours": described,
        "against": against,
        "versions": {"gemcutter": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": machine(),
    }


def _trace(side: Side, ids: Sequence[int], kept_K: Tensor, bars: Bars) -> Trace:
    with bars(f"running {side.name}, {side.kernels} kernels") as advance:
        return trace(side.model.decoder, ids, kept_K, advance)


def _share_weights(ours: Side, described: dict[str, Any], theirs: Side | None, against: dict[str, Any]) -> bool:
    """Return whether both sides compute with the very same weights."""
    if theirs is None:
        return ours.quant is None and ours.adapter is None
    is_one_file = bool(described["sampled_sha256"] == against["sampled_sha256"])
    return is_one_file and (ours.quant, ours.adapter) == (theirs.quant, theirs.adapter)


def _stored(side: Side | None) -> Stored:
    return Stored(("float32",), 32.0, 32.0) if side is None else stored_weights(side.model)


# ---- what both sides must share ----


def default_tokens(plan: ModelPlan) -> int:
    """Return the length of a text that outruns every window, as far as the model's context goes."""
    window = max((layer.window or 0 for layer in plan.layers), default=0)
    return min(window + BEYOND_WINDOW, plan.context)


def encode(ours: Side, theirs: Side | None, text: str | None, tokens: int | None) -> list[int]:
    """Return the first `tokens` ids of a text (None: the built-in one, again and again if need be).

    Raises RequestError where there are not even two or more are wanted than the model's context holds, CheckpointError where the
    model has no such ids or the other side's tokenizer gives others.
    """
    plan, tokenizer = ours.model.plan, ours.model.tokenizer
    if tokens is not None and not 2 <= tokens <= plan.context:
        raise RequestError(f"--tokens {tokens}: expected 2 to {plan.context}, the context that the model was made for")
    wanted = tokens or default_tokens(plan)
    times = 1 if text is not None else -(-wanted // len(tokenizer.encode(PASSAGE, bos=False)))
    whole = "\n".join([PASSAGE] * times) if text is None else text
    ids = tokenizer.encode(whole, bos=True)[:wanted]
    if len(ids) < 2:
        raise RequestError("the text is too short: at least two tokens are needed, <bos> included")
    if max(ids) >= plan.vocab:
        raise CheckpointError(
            f"{ours.name}: its tokenizer gives the id {max(ids)}, its vocabulary has {plan.vocab} tokens; are both of one model?"
        )
    if theirs is not None:
        _check_same_ids(ours, theirs, ids, theirs.model.tokenizer.encode(whole, bos=True)[:wanted])
    return ids


def _check_same_ids(ours: Side, theirs: Side, ids: list[int], others: list[int]) -> None:
    for position, (mine, other) in enumerate(zip_longest(ids, others)):
        if mine != other:
            here, there = _spell_token(ours, mine), _spell_token(theirs, other)
            raise CheckpointError(
                f"{ours.name} and {theirs.name} have different tokenizers: token {position} of the text is {here} in the first, "
                f"{there} in the second; compare checkpoints of one model, or give both the same tokenizer.json"
            )


def _spell_token(side: Side, id: int | None) -> str:
    return "missing" if id is None else f"{id} ({side.model.tokenizer.piece(id)!r})"


def check_same_plan(ours: Side, theirs: Side) -> None:
    """Raise CheckpointError, with what differs, unless two models are of the same shape and do the same things."""
    plans = [side.model.plan.whole or side.model.plan for side in (ours, theirs)]  # of a rank that of the whole model
    differences = list(_differences(*plans))
    if differences:
        more = [f"and {len(differences) - SHOWN} more"] if len(differences) > SHOWN else []
        raise CheckpointError(
            f"{theirs.name} is not a checkpoint of the same model as {ours.name}; their layers can't be compared",
            [*differences[:SHOWN], *more],
        )


def _differences(ours: ModelPlan, theirs: ModelPlan) -> Iterator[str]:
    yield from _fields(ours, theirs, "")
    if len(ours.layers) != len(theirs.layers):
        yield f"layers: {len(ours.layers)} here, {len(theirs.layers)} there"
        return
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        yield from _fields(mine, other, f"layers.{mine.index}.")


def _fields(ours: ModelPlan | LayerPlan, theirs: ModelPlan | LayerPlan, place: str) -> Iterator[str]:
    for name in (field.name for field in fields(ours) if field.name not in IMMATERIAL):
        mine, other = getattr(ours, name), getattr(theirs, name)
        if mine != other:
            yield f"{place}{name}: {mine} here, {other} there"


# ---- what the certificate says ----


def _arithmetic(side: dict[str, Any]) -> str:
    """Return the dtype that a side's rounding is judged as: rows that are rounded before products count as bfloat16."""
    is_exact = side.get("activations", "float32") == "float32"
    dtype: str = side["dtype"] if is_exact else "bfloat16"
    return dtype


def _findings(drift: Drift, dtypes: tuple[str, str], stored: tuple[Stored, Stored] | None) -> dict[str, Any]:
    limits, reason = choose_limits(dtypes, stored)
    checks, divergent = judge(drift, limits), first_divergent(drift, limits)
    ours, theirs = drift.nll
    worst = drift.worst_position
    return {
        "passed": all(check.passed for check in checks),
        "limits": limits.name,
        "limits_because": reason,
        "checks": [asdict(check) | {"found": _finite(check.found)} for check in checks],
        "nll_nats": {"ours": _finite(ours), "against": _finite(theirs)},
        "max_logit_position": drift.max_logit_position,
        "worst_position": {"position": worst, "kl_nats": _finite(drift.kl[worst])},
        "first_divergent_layer": None if divergent is None else divergent.layer,
        "layers": [
            {"layer": layer.layer, "mean": _finite(layer.mean), "worst": _finite(layer.worst), "worst_position": layer.position}
            for layer in drift.layers
        ],
    }


def _finite(number: float) -> float | None:
    """JSON has neither NaN nor infinity."""
    return number if math.isfinite(number) else None


def _describe_ids(model: Model, ids: Sequence[int]) -> dict[str, Any]:
    window = max((layer.window or 0 for layer in model.plan.layers), default=0)
    return {
        "tokens": len(ids),
        "ids_sha256": hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest(),
        "window": window or None,
        "is_longer_than_window": len(ids) > window,
        "chunk_rows": CHUNK_ROWS,
        "single_rows": min(SINGLE_ROWS, len(ids)),
    }


def describe(side: Side) -> dict[str, Any]:
    """Return what a side is and which kernels it runs on."""
    model, decoder = side.model, side.model.decoder
    dtype, stored = dtype_name(decoder.dtype), stored_weights(model)
    kernels: dict[str, list[str]] = {}  # of each op, those that some layer has
    for selection, _ in decoder.kernel_plan.selections():
        names = kernels.setdefault(selection.site.op, [])
        names += [] if selection.impl.name in names else [selection.impl.name]
    return {
        "engine": f"gemcutter {__version__}",
        "model": side.name,
        "sampled_sha256": sampled_sha256(model.checkpoint.source),
        "format": model.checkpoint.format,
        "stored": list(stored.kinds),
        "bits_per_weight": round(stored.mean_bits, 3),
        "quant": side.quant,
        "adapter": side.adapter,
        "device": str(decoder.device),
        "dtype": dtype,
        "kernels": side.kernels,
        "level": native.level() if decoder.backend.name == "cpu" else None,
        "activations": decoder.precision.activations,
        "kernels_by_op": kernels,
    }


def stored_weights(model: Model) -> Stored:
    """Return how a model's weights are stored as it computes with them; repacking for kernels changes no value."""
    weights = [param for param in model.decoder.params.values() if isinstance(param, Weight)]
    kinds = {CPU.unpacked(kind) for kind in _kinds(model)}
    elements = [sum(math.prod(part.shape) for part in weight.parts) for weight in weights]
    bits = [8 * weight.nbytes / count for weight, count in zip(weights, elements, strict=True)]
    mean = sum(map(math.prod, zip(bits, elements, strict=True))) / sum(elements)
    return Stored(tuple(sorted(kinds)), mean, min(bits))


def _kinds(model: Model) -> list[str]:
    """List how the parts of all weights are stored, as kernels spell it."""
    weights = [param for param in model.decoder.params.values() if isinstance(param, Weight)]
    return sorted({Weight((part,)).stored for weight in weights for part in weight.parts})


def machine() -> dict[str, Any]:
    """Describe where the certificate was made."""
    return {
        "platform": platform.platform(),
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "features": sorted(cpu_features() & FEATURES),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
