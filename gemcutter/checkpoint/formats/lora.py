"""LoRA adapters as PEFT saves them: adapter_config.json and adapter_model.safetensors.

Owns their names, the config's keys and the check against plans, from headers alone: every change is one of the decoder's or of
a loaded tower's, or known to have no effect, or a problem. Refuses to compute: read `checkpoint/load/adapters.py` for that.
Imports no torch. Source: the layouts of PEFT 0.21, whose stacked experts have A [r * X, in] with an expert's rows together, and
B [out, r * X] with an expert's columns apart.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gemcutter.checkpoint.container.lazy_tensor import LazyTensor
from gemcutter.checkpoint.container.source import Source
from gemcutter.checkpoint.formats import hf, hf_towers
from gemcutter.errors import CheckpointError
from gemcutter.param_spec import Access, ParamKind, ParamSpec
from gemcutter.plan import ModelPlan
from gemcutter.sidecar.small_file import shown
from gemcutter.tower_plan import TowerPlans

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FLOATS = ("BF16", "F16", "F32")
MERGE = "merge it into its base with the tool that trained it, and load the result"

HALF = re.compile(r"(?:base_model\.model\.)?(?P<module>.+?)\.lora_(?P<half>[AB])(?:\.[^.]+)?\.weight")
EXPERTS = re.compile(r"(?P<module>layers\.[0-9]{1,9}\.(?:moe\.)?experts)(?:\.base_layer)*")
PLAIN_PATTERN = re.compile(r"\^?[\w.-]+")

READ = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights"}
# Keys of training, bookkeeping, and of which modules have tensors, which the tensors themselves say.
NEUTRAL = {
    *("task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version", "megatron_core"),
    *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config"),
    "ensure_weight_tying",
}
# Keys that change the maths, where they are set.
REFUSED = {
    "use_dora": "DoRA rescales whole weights",
    "modules_to_save": "it replaces whole modules",
    "trainable_token_indices": "it replaces rows of the embeddings",
    "alora_invocation_tokens": "it applies from some token on only",
    "lora_bias": "it adds biases, and no layer of this family has one",
    "layer_replication": "it repeats layers",
    "fan_in_fan_out": "it was made for transposed weights",
}
# Ways to initialise that leave the base as it is; the others move a part of its weights into the adapter.
HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal")

FOREIGN_TENSORS = {
    "lora_embedding_": f"adapted embeddings can't be read; {MERGE}",
    "lora_magnitude_vector": f"DoRA rescales whole weights; {MERGE}",
    "modules_to_save": f"a whole module, not a change of one; {MERGE}",
}
SHAPE_OF_DECODER = re.compile(r"shape +(?! |vision\.|audio\.)")  # a problem
LAYER = re.compile(r"layers\.([0-9]{1,9})\.")
READS_HIDDEN = re.compile(r"\b(?:[qkv]_proj|gate_proj|up_proj)\b")  # modules whose inputs are as wide as the model
IGNORE_HINT = re.compile(r"; --ignore '[^']*' to skip it$")
SHOWN = 10  # problems of a kind that an error lists
LIMIT = 1e9  # of ranks and alphas, so that every scale is a number


@dataclass(frozen=True, slots=True)
class Factors:
    """A change of one weight or part: scale times up [out, r] times down [r, in], or such a pair for each of `experts`."""

    name: str
    part: str | None
    rank: int
    scale: float
    down: LazyTensor
    up: LazyTensor
    experts: int = 0

    @property
    def label(self) -> str:
        """Name the parameter and part for a message."""
        return f"{self.name}[{self.part}]" if self.part else self.name


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter whose headers fit a plan."""

    path: Path
    factors: tuple[Factors, ...]
    idle: tuple[str, ...]  # changes of keys and values that their layers don't use
    other_modules: Mapping[str, int] = field(default_factory=dict)  # changes of towers that are not loaded, by kind
    of_towers: tuple[Factors, ...] = ()  # changes of those that are

    @property
    def num_changes(self) -> int:
        """Count the changes that have an effect."""
        return len(self.factors) + len(self.of_towers)

    def of_tower(self, tower: str) -> list[Factors]:
        """Return the changes of a tower, "vision" or "audio", if it is loaded."""
        return [each for each in self.of_towers if each.name.startswith(f"{tower}.")]

    def notes(self) -> list[str]:
        """Return notes on what of the adapter has no effect, and why."""
        notes = []
        if self.idle:
            layers = len({label.split(".")[1] for label in self.idle})
            notes.append(
                f"adapter {self.path.name}: {len(self.idle)} changes of keys and values have no effect, "
                f"because {layers} layers do not use theirs"
            )
        notes += [
            f"adapter {self.path.name}: {count} changes of the {kind} not loaded" for kind, count in self.other_modules.items()
        ]
        return notes


@dataclass(frozen=True, slots=True)
class _Settings:
    """What the config says of ranks and scales; a pattern's place is kept, because the first that matches counts."""

    rank: int | None
    alpha: float
    is_rslora: bool
    ranks: Mapping[str, tuple[int, Any]]
    alphas: Mapping[str, tuple[int, Any]]

    def of(self, module: str, stored: int) -> tuple[int, float]:
        """Return the rank that a module should have, and the scale of its change; `stored` counts where the config is broken."""
        rank = _first_match(self.ranks, module, self.rank or stored)
        alpha = _first_match(self.alphas, module, self.alpha)
        return rank, alpha / (rank**0.5 if self.is_rslora else rank)


def open_adapter(path: Path, plan: ModelPlan, ignore: Sequence[str] = (), towers: TowerPlans | None = None) -> Adapter:
    """Read an adapter's headers (a folder, or the .safetensors file in it) and match them with the plans it is for.

    `towers` are those that are loaded: changes of others are counted. `ignore` holds patterns of config keys and tensor names to
    pass over. Raises CheckpointError with all problems; an adapter that changes nothing is one.
    """
    source = Source.open(_find_weights(path))
    raw = source.read_json(CONFIG)
    if raw is None:
        raise CheckpointError(f"{source.folder}: no {CONFIG} beside the adapter's weights; it holds their scale, so copy it too")
    problems = list[str]()
    settings = _read_settings(raw, ignore, problems)
    pairs = _pair(source, ignore, problems)
    adapter = _match(path, plan, towers or TowerPlans(), settings, pairs, problems)
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        base = _other_base(raw, pairs, plan, problems)
        if base is not None:  # then nothing of it can be skipped
            problems = [IGNORE_HINT.sub("", problem) for problem in problems]
        summary = f"the adapter {path} does not fit the model ({count}, nothing was allocated)"
        raise CheckpointError(summary if base is None else f"{summary}: {base}", _shortened(sorted(problems)))
    if not adapter.num_changes:
        rest = [f"{len(adapter.idle)} changes of keys and values that no layer uses"] if adapter.idle else []
        rest += [f"{count} changes of the {kind}" for kind, count in adapter.other_modules.items()]
        remedy = "; those apply where the towers are loaded (media)" if adapter.other_modules else ""
        found = ", ".join(rest) or "no tensors"
        raise CheckpointError(f"the adapter {path} changes nothing in the decoder; it holds {found}{remedy}")
    return adapter


def is_adapter(source: Source) -> bool:
    """Return whether a folder holds an adapter and no model. Raises CheckpointError for a damaged config."""
    return source.read_json("config.json") is None and source.read_json(CONFIG) is not None


def describe(source: Source, problems: list[str], ignore: Sequence[str] = ()) -> str:
    """Return what an adapter changes, in a line, noting everything that is wrong with it whatever its base is."""
    raw = source.read_json(CONFIG) or {}
    settings, pairs = _read_settings(raw, ignore, problems), _pair(source, ignore, problems)
    layers = {int(found[1]) for module in pairs if (found := LAYER.search(module))}
    kinds = dict.fromkeys(module.rpartition(".")[2] for module in pairs)
    base = raw.get("base_model_name_or_path")
    made_for = f"for {shown(base)}" if isinstance(base, str) and base else "for a model that it does not name"
    rank = "a rank of its own for each matrix" if settings.rank is None else f"rank {settings.rank}"
    return (
        f"a LoRA adapter {made_for}: {rank}, alpha {settings.alpha:g}, {len(pairs)} matrices ({', '.join(kinds)}) of "
        f"{len(layers)} layers; load that model with --adapter {source.folder}"
    )


def _find_weights(path: Path) -> Path:
    if not os.path.isdir(path) or os.path.lexists(path / WEIGHTS):
        return path / WEIGHTS if os.path.isdir(path) else path
    if os.path.lexists(path / "adapter_model.bin"):
        raise CheckpointError(
            f"{path} holds no {WEIGHTS}, only adapter_model.bin: a pickle, which can run code; save it as safetensors"
        )
    if os.path.lexists(path / "adapters.safetensors"):
        raise CheckpointError(f"{path} holds an adapter of mlx-lm, which can't be read; fuse it into its base with mlx_lm.fuse")
    raise CheckpointError(f"{path} holds no {WEIGHTS}; an adapter is a folder with this file and {CONFIG}")


def _other_base(
    raw: Mapping[str, Any], pairs: Mapping[str, Mapping[str, LazyTensor]], plan: ModelPlan, problems: Sequence[str]
) -> str | None:
    """Return what the adapter was made for, beside what this model is; None where its shapes give no reason to doubt it."""
    depth, widths = 0, set[int]()
    for module, halves in pairs.items():
        if found := LAYER.match(hf.strip(module)):  # one of the decoder's, and no tower's
            depth = max(depth, int(found[1]) + 1)
            if "A" in halves and READS_HIDDEN.search(module) and len(halves["A"].shape) == 2:
                widths.add(halves["A"].shape[1])
    is_other = depth > len(plan.layers) or (len(widths) == 1 and widths != {plan.hidden})
    if not is_other and not any(SHAPE_OF_DECODER.match(problem) for problem in problems):
        return None
    name = raw.get("base_model_name_or_path")
    told = (
        f"{shown(name)} (base_model_name_or_path)" if isinstance(name, str) and name else "another model, which it does not name"
    )
    width = f" and a hidden size of {widths.pop()}" if len(widths) == 1 else ""
    return (
        f"it was made for {told}, with at least {depth} layers{width}; "
        f"this model has {len(plan.layers)} layers and a hidden size of {plan.hidden}"
    )


def _shortened(problems: Sequence[str]) -> list[str]:
    """Return at most SHOWN problems of each kind, which is their first word, and how many more there are."""
    kinds: dict[str, list[str]] = {}
    for problem in problems:
        kinds.setdefault(problem.split()[0], []).append(problem)
    listed = list[str]()
    for kind, found in kinds.items():
        listed += found[:SHOWN]
        if len(found) > SHOWN:
            listed.append(f"{kind:<10} and {len(found) - SHOWN} more")
    return listed


# ---- the config ----


def _read_settings(raw: Mapping[str, Any], ignore: Sequence[str], problems: list[str]) -> _Settings:
    """Read the keys that matter, noting those whose meaning can't be kept."""
    known = {key: value for key, value in raw.items() if not any(fnmatch.fnmatchcase(key, pattern) for pattern in ignore)}
    for key in known.keys() - READ - NEUTRAL:
        if known[key] and key in REFUSED:
            problems.append(f"config     {key}: {REFUSED[key]}; {MERGE}")
        elif known[key]:
            problems.append(f"config     {shown(key)[1:-1]}: an unknown key, set to {shown(known[key])}; --ignore it to skip it")
    if (kind := known.get("peft_type")) != "LORA":
        problems.append(f'config     peft_type: expected "LORA", found {shown(kind)}; only LoRA adapters can be read')
    if (bias := known.get("bias", "none")) != "none":
        problems.append(f'config     bias: expected "none", found {shown(bias)}; no layer of this family has one')
    init = known.get("init_lora_weights")
    if not isinstance(init, bool | str | None) or init not in HARMLESS_INITS:
        problems.append(
            f"config     init_lora_weights: {shown(init)} may have changed the base's weights as well; save the adapter with "
            "path_initial_model_for_weight_conversion, which makes it a plain one"
        )
    if not isinstance(is_rslora := known.get("use_rslora", False), bool):
        problems.append(f"config     use_rslora: expected true or false, found {shown(is_rslora)}")
    rank, alpha = known.get("r"), known.get("lora_alpha")
    if not _is_rank(rank):
        problems.append(f"config     r: expected 1 or more, found {shown(rank)}")
    if not _is_alpha(alpha):
        problems.append(f"config     lora_alpha: expected a number, found {shown(alpha)}")
    return _Settings(
        rank if _is_rank(rank) else None,
        float(alpha) if isinstance(alpha, int | float) and _is_alpha(alpha) else 1.0,
        is_rslora is True,
        _read_patterns(known, "rank_pattern", problems),
        _read_patterns(known, "alpha_pattern", problems),
    )


def _read_patterns(raw: Mapping[str, Any], key: str, problems: list[str]) -> dict[str, tuple[int, Any]]:
    """Read a map from modules to values, in order. A regular expression is refused: a stranger's can take years to match."""
    patterns, is_value = raw.get(key) or {}, _is_rank if key == "rank_pattern" else _is_alpha
    if not isinstance(patterns, dict):
        problems.append(f"config     {key}: expected an object, found {shown(patterns)}")
        return {}
    found: dict[str, tuple[int, Any]] = {}
    for place, (pattern, value) in enumerate(patterns.items()):
        plain = pattern.replace("\\.", ".").removesuffix("$")
        if not PLAIN_PATTERN.fullmatch(plain):
            problems.append(
                f"config     {key}: {shown(pattern)} is no plain name of a module; write out each module that it means"
            )
        elif not is_value(value):
            problems.append(f"config     {key}: {shown(pattern)} is set to {shown(value)}")
        else:
            found.setdefault(plain, (place, value))
    return found


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= LIMIT


def _is_alpha(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -LIMIT <= value <= LIMIT


def _first_match(patterns: Mapping[str, tuple[int, Any]], module: str, default: Any) -> Any:
    """Return the value of the first pattern that names the module or, without a ^, the end of its name."""
    words = module.split(".")
    names = [f"^{module}", *(".".join(words[start:]) for start in range(len(words)))] if patterns else []
    return min((patterns[name] for name in names if name in patterns), default=(0, default))[1]


# ---- the tensors ----


def _pair(source: Source, ignore: Sequence[str], problems: list[str]) -> dict[str, dict[str, LazyTensor]]:
    """Sort the tensors by module and half, noting those that are neither half of a change."""
    found: dict[str, dict[str, LazyTensor]] = {}
    for tensor in source.tensors.values():
        if any(fnmatch.fnmatchcase(tensor.name, pattern) for pattern in ignore):
            continue
        half = HALF.fullmatch(tensor.name)
        if half is None:
            why = next((why for mark, why in FOREIGN_TENSORS.items() if mark in tensor.name), "not a half of a LoRA change")
            problems.append(f"unknown    {tensor.origin}: {why}; --ignore '{tensor.name}' to skip it")
            continue
        twin = found.setdefault(half["module"], {}).setdefault(half["half"], tensor)
        if twin is not tensor:
            problems.append(f"duplicate  {twin.origin} and {tensor.origin}")
    return found


def _match(
    path: Path,
    plan: ModelPlan,
    towers: TowerPlans,
    settings: _Settings,
    pairs: Mapping[str, Mapping[str, LazyTensor]],
    problems: list[str],
) -> Adapter:
    """Find every change's parameter, noting all problems."""
    of_towers = {spec.name: spec for spec in towers.params()}
    specs = {spec.name: spec for spec in plan.params()} | of_towers
    factors, idle, other_modules = dict[str, Factors](), list[str](), dict[str, int]()
    for module, halves in pairs.items():
        if len(halves) < 2:
            (half, tensor), other = next(iter(halves.items())), "B" if "A" in halves else "A"
            problems.append(f"missing    lora_{other} of {module}, whose lora_{half} is {tensor.origin}")
            continue
        down, up = halves["A"], halves["B"]
        name, part = _locate(module, down, up, specs)
        label = f"{name}[{part}]" if part else str(name)
        spec = specs.get(name or "")
        if name is None:
            problems.append(f"unknown    {down.origin}: not part of this model; --ignore '{module}.*' to skip it")
        elif name.startswith("("):
            other_modules[name.strip("()")] = other_modules.get(name.strip("()"), 0) + 1
        elif _is_unused(plan, name, part, spec):
            idle.append(label)
        elif spec is None or not _is_multiplied(spec):
            problems.append(f"unknown    {down.origin}: {_refusal(name, spec)}; --ignore '{module}.*' to skip it")
        elif label in factors:
            problems.append(f"duplicate  {label}: {factors[label].down.origin} and {down.origin}")
        else:
            factors[label] = _check(spec, part, module, settings, down, up, problems)
    own, others = (tuple(each for each in factors.values() if (each.name in of_towers) is is_other) for is_other in (False, True))
    return Adapter(path, own, tuple(idle), other_modules, others)


def _is_multiplied(spec: ParamSpec) -> bool:
    """Return whether rows are multiplied with a parameter: no embedding, convolution, vector or table."""
    is_matrix = spec.kind in (ParamKind.MATRIX, ParamKind.EXPERTS) and spec.access is not Access.ROWS
    return is_matrix and len(spec.shape) > 1 and not spec.name.startswith("embed.")


def _locate(module: str, down: LazyTensor, up: LazyTensor, specs: Mapping[str, ParamSpec]) -> tuple[str | None, str | None]:
    """Name the parameter that a module's change belongs to; None if there is none such.

    A clippable module keeps its matrix in a module of its own, `linear`. Stacked experts are one module with two parameters,
    told apart by the shapes.
    """
    stored = hf.strip(module)
    if (kind := hf.tower_kind(stored)) is not None:
        prefix = kind.strip("()").replace(" tower", ".")
        is_loaded = any(name.startswith(prefix) for name in specs)
        return (hf_towers.translate(f"{stored}.weight") or (None, None)) if is_loaded else (kind, None)
    bare = stored.removesuffix(".linear")
    experts = EXPERTS.fullmatch(bare)
    if experts is None:
        piece = hf.translate(replace(down, name=f"{bare}.weight"))
        return piece.name, piece.part
    prefix = f"layers.{int(experts['module'].split('.')[1])}.moe."
    for name in ("in", "out"):
        spec = specs.get(prefix + name)
        if spec is not None and (down.shape[1:], up.shape[:1]) == (spec.shape[2:], spec.shape[1:2]):
            return spec.name, None
    return (f"{prefix}in" if f"{prefix}in" in specs else None), None


def _is_unused(plan: ModelPlan, name: str, part: str | None, spec: ParamSpec | None) -> bool:
    """Return whether a change is of keys or values that this layer, by its plan, does not make."""
    return spec is not None and name.endswith(".attn.in") and part in ("k", "v") and part not in dict(spec.parts)


def _refusal(name: str, spec: ParamSpec | None) -> str:
    if name == "head":
        return "the model's head is its embedding table, which has no change of its own"
    return f"the model has no {name}" if spec is None else f"{name} is no matrix that rows are multiplied with"


def _check(
    spec: ParamSpec, part: str | None, module: str, settings: _Settings, down: LazyTensor, up: LazyTensor, problems: list[str]
) -> Factors:
    """Pair two halves, noting what does not fit the parameter or the config."""
    rows = dict(spec.parts)[part] if part is not None else spec.shape[-2]
    experts = spec.shape[0] if len(spec.shape) == 3 else 0
    stored = down.shape[0] // max(experts, 1) if down.shape else 0
    inner = {"moe.in": ".gate_up_proj", "moe.out": ".down_proj"}.get(".".join(spec.name.split(".")[2:]), "") if experts else ""
    rank, scale = settings.of(re.sub(r"(\.base_layer)+$", "", module) + inner, max(stored, 1))
    wide = rank * max(experts, 1)
    label = f"{spec.name}[{part}]" if part else spec.name
    for half, shape in ((down, (wide, spec.shape[-1])), (up, (rows, wide))):
        if half.shape != shape:
            problems.append(f"shape      {label} {shape} expected for rank {rank}, {half.origin} has {half.shape}")
        if half.dtype not in FLOATS:
            problems.append(f"dtype      {label}: {', '.join(FLOATS)} expected, {half.origin} is {half.dtype}")
    return Factors(spec.name, part, rank, scale, down, up, experts)
