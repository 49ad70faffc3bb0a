"""Who can load a checkpoint: facts about it, and the rules of engines.json that speak of such facts.

Owns the vocabulary of facts, which is fixed: a rule names facts and nothing else, so that what engines fail on is data. Refuses
to guess: an engine of which no rule speaks is unknown. Read `engines.json` for the rules and their public sources.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from gemcutter.checkpoint.container.source import Source
from gemcutter.checkpoint.container.stored_tensor import PackedTensor
from gemcutter.checkpoint.load.match import Matched
from gemcutter.config import ModelConfig
from gemcutter.plan import ModelPlan, Proj

RULES = Path(__file__).with_name("engines.json")

# ---- the vocabulary ----

CONTAINERS = {
    "safetensors": "the weights are in safetensors files",
    "gguf": "the weights are in GGUF files",
    "config": "there is a config.json in Hugging Face's spelling",
}
SCHEMES = {
    "dense": "no weight is quantized",
    "mlx": "MLX wrote it",
    "mlx_micro": "MLX quantized it with mxfp4, mxfp8 or nvfp4, which have no biases",
    "compressed_tensors": "quant_method compressed-tensors",
    "modelopt": "quant_method modelopt",
    "bitsandbytes": "quant_method bitsandbytes",
    "auto_round": "quant_method auto-round",
    "nvfp4": "some experts or matrices are NVFP4 in one of the safetensors dialects",
}
TOPOLOGY = {
    "drafter": "it is an assistant",
    "gemma3": "it is a Gemma 3 model",
    "unified": "it is of the 12B's family, without towers of their own",
    "kv_shared": "some layers read the keys and values of others",
    "k_eq_v": "some layers have no value projection",
    "moe": "it has experts",
}
CONTENT = {
    "shared_kv_present": "layers that read others' keys and values have such tensors all the same",
    "shared_kv_omitted": "layers that read others' keys and values have no such tensors",
    "ple_projection_packed": "per_layer_model_projection is quantized",
    "experts_apart": "experts are stored one by one",
    "experts_underscored": "names of experts' tensors end in _packed or _scale",
    "experts_under_moe": "names of experts' tensors have .moe. in them",
    "experts_without_input_scale": "some experts have a weight_scale_2 and no input_scale",
    "vision_packed": "the projection behind the vision tower is quantized",
    "wrapper_prefix": "names begin with model.language_model.",
    "towers": "there are tensors of towers",
    "towers_absent": "the config names towers, and the files hold none",
}
CONFIG = {
    "text_class": "architectures names Gemma4ForCausalLM",
    "spelled_by_layer": "only per_layer_config gives the sizes of global layers",
}
FACTS: dict[str, str] = CONTAINERS | SCHEMES | TOPOLOGY | CONTENT | CONFIG

METHODS = {
    "compressed-tensors": "compressed_tensors",
    "modelopt": "modelopt",
    "bitsandbytes": "bitsandbytes",
    "auto-round": "auto_round",
}
MICRO = ("mxfp4", "mxfp8", "nvfp4")
EXPERT = re.compile(r"\.experts\.[0-9]+\.")


# ---- facts ----


def find_facts(
    source: Source,
    raw: Mapping[str, Any] | None,
    config: ModelConfig | None,
    plan: ModelPlan | None,
    matched: Matched | None,
) -> tuple[str, ...]:
    """List the facts that hold, in the vocabulary's order; of what is None (unreadable) none is claimed."""
    found = set(_name_facts(source)) | set(_scheme_facts(source, raw))
    if raw is not None:
        found.add("config")
        architectures = raw.get("architectures")
        if isinstance(architectures, list) and "Gemma4ForCausalLM" in architectures:
            found.add("text_class")
    if config is not None:
        found |= set(_config_facts(config, "towers" in found))
    if plan is not None and matched is not None:
        found |= set(_plan_facts(plan, matched))
    return tuple(fact for fact in FACTS if fact in found)


def _name_facts(source: Source) -> Iterator[str]:
    yield "gguf" if any(file.suffix == ".gguf" for file in source.files) else "safetensors"
    names = source.tensors
    experts = [name for name in names if EXPERT.search(name)]
    tests = {
        "experts_apart": bool(experts),
        "experts_underscored": any(".experts." in name and name.endswith(("_packed", "proj_scale")) for name in names),
        "experts_under_moe": any(".moe.experts." in name for name in names),
        "experts_without_input_scale": any(
            name.endswith(".weight_scale_2") and f"{name.removesuffix('.weight_scale_2')}.input_scale" not in names
            for name in experts
        ),
        "vision_packed": any("embed_vision." in name and name.endswith(".scales") for name in names),
        "wrapper_prefix": any(name.startswith("model.language_model.") for name in names),
        "nvfp4": any(name.endswith((".weight_scale_2", ".weight_global_scale")) for name in names),
        "towers": any("vision_tower." in name or "audio_tower." in name or "vision_embedder." in name for name in names),
    }
    yield from (fact for fact, holds in tests.items() if holds)


def _scheme_facts(source: Source, raw: Mapping[str, Any] | None) -> Iterator[str]:
    blocks = [raw.get(key) for key in ("quantization", "quantization_config")] if raw is not None else []
    found = [block for block in blocks if isinstance(block, dict)]
    yield from (METHODS[str(block.get("quant_method"))] for block in found if str(block.get("quant_method")) in METHODS)
    if source.metadata.get("format") == "mlx" or any("quant_method" not in block and "group_size" in block for block in found):
        yield "mlx"
        if any(block.get("mode") in MICRO for block in found):
            yield "mlx_micro"


def _config_facts(config: ModelConfig, has_towers: bool) -> Iterator[str]:
    if config.model_type.startswith("gemma3"):
        yield "gemma3"
    if config.model_type.startswith("gemma4_unified"):
        yield "unified"
    if config.towers and not has_towers:
        yield "towers_absent"
    if config.text.is_spelled_by_layer:
        yield "spelled_by_layer"


def _plan_facts(plan: ModelPlan, matched: Matched) -> Iterator[str]:
    layers = plan.layers
    if plan.is_drafter:
        yield "drafter"
    elif not all(layer.writes for layer in layers):
        yield "kv_shared"
        readers = tuple(f"layers.{layer.index}." for layer in layers if not layer.writes)
        held = any((piece.name or "").startswith(readers) for piece in matched.redundant)
        yield "shared_kv_present" if held else "shared_kv_omitted"
    if any(layer.proj is Proj.QK_ONLY for layer in layers):
        yield "k_eq_v"
    if any(layer.moe for layer in layers):
        yield "moe"
    pieces = [piece for found in matched.pieces.values() for piece in found]
    if not any(isinstance(piece.data, PackedTensor) for piece in pieces):
        yield "dense"
    if any(isinstance(piece.data, PackedTensor) for piece in matched.pieces.get("ple.in", ())):
        yield "ple_projection_packed"


# ---- verdicts ----


@cache
def read_rules() -> dict[str, Any]:
    """Return the rules as they stand in engines.json."""
    found: dict[str, Any] = json.loads(RULES.read_text(encoding="utf-8"))
    return found


def judge(facts: tuple[str, ...]) -> list[dict[str, Any]]:
    """Give a verdict for every rule that speaks and, for each engine without one, "unknown"."""
    book = read_rules()
    verdicts = []
    for engine in book["engines"]:
        spoken = [rule for rule in book["rules"] if rule["engine"] == engine and _speaks(rule["when"], facts)]
        verdicts += [
            {"engine": engine, "verdict": rule["effect"]} | {key: rule[key] for key in ("versions", "why", "threads")}
            for rule in spoken
        ] or [{"engine": engine, "verdict": "unknown", "versions": None, "why": None, "threads": []}]
    return verdicts


def _speaks(conditions: list[str], facts: tuple[str, ...]) -> bool:
    return all((condition.lstrip("!") in facts) != condition.startswith("!") for condition in conditions)
