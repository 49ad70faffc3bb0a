"""Matches what a checkpoint holds against what the plan needs, from headers alone.

Owns `Checkpoint` (a source with config, plan and matched pieces) and the
one error that lists every missing, misshaped and unknown tensor. Refuses to know foreign names (`formats/`) and to allocate
(`load_params.py`). Imports no torch.
"""

from __future__ import annotations

import contextlib
import fnmatch
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gemcutter import config as configs
from gemcutter.checkpoint.container.source import Source
from gemcutter.checkpoint.container.stored_tensor import PackedTensor, StoredTensor
from gemcutter.checkpoint.formats import FORMATS, Format, hf
from gemcutter.errors import CheckpointError
from gemcutter.param_spec import ParamSpec
from gemcutter.plan import ModelPlan, derive

Piece = tuple[str, str | None]  # a parameter, and the part of it that is stored; None where it is stored whole
Spell = Callable[[str, str | None], str]  # a parameter and its part to the name of a tensor in a file

FLOATS = ("BF16", "F16", "F32")
MANY = 10  # wrong shapes, from which on they may have one reason
INTEGERS = ("I64", "I32")


@dataclass(slots=True)
class Matched:
    """The pieces of every parameter, and what a checkpoint holds beyond them."""

    pieces: dict[str, tuple[StoredTensor, ...]] = field(default_factory=dict)  # in the order of the spec's parts
    redundant: list[StoredTensor] = field(default_factory=list)  # the decoder has such tensors, but not in this place
    other_modules: dict[str, list[StoredTensor]] = field(default_factory=dict)  # towers and the like, by kind
    defaults: list[ParamSpec] = field(default_factory=list)  # absent, and their absence has a meaning
    ignored: list[StoredTensor] = field(default_factory=list)
    missing: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)  # label and shape of what the plan needs in vain
    unknown: list[StoredTensor] = field(default_factory=list)
    misshapen: list[tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)  # shapes expected and found

    def common_mistake(self, plan: ModelPlan) -> str:
        """Return what nearly all wrong shapes have in common, to follow a summary; nothing where they have nothing."""
        pairs = Counter(
            pair
            for expected, found in self.misshapen
            for pair in {(a, b) for a, b in zip(expected, found, strict=False) if a != b}
        )
        if len(self.misshapen) < MANY or not pairs:
            return ""
        (expected, found), times = pairs.most_common(1)[0]
        if expected != plan.hidden or times < 0.8 * len(self.misshapen):
            return ""
        return f": nearly all have {found} where config.json's hidden_size is {expected}; are both of one model?"

    def notes(self, plan: ModelPlan, loaded: Collection[str] = ()) -> list[str]:
        """Return notes on what was left out and why; `loaded` are kinds of other modules that were not."""
        notes = []
        if self.redundant:
            readers = {piece.name.split(".")[1] for piece in self.redundant if piece.name and piece.name.startswith("layers.")}
            size = sum(piece.data.nbytes for piece in self.redundant) / 1e6
            place = f"{len(readers)} layers that do not use them" if readers else "a tied head"
            notes.append(f"{len(self.redundant)} tensors of {place} skipped, as planned ({size:.1f} MB)")
        notes += [
            f"{len(pieces)} tensors of the {kind} not loaded" for kind, pieces in self.other_modules.items() if kind not in loaded
        ]
        return [*notes, *table_notes(plan)]


def table_notes(plan: ModelPlan) -> Iterator[str]:
    """Yield a note where the vocabulary was extended, and the table of per-layer embeddings was not."""
    if plan.ple_dim and plan.ple_vocab < plan.vocab:
        yield (
            f"the table of per-layer embeddings has {plan.ple_vocab:,} rows, the vocabulary {plan.vocab:,} tokens: ids from "
            f"{plan.ple_vocab:,} on get the padding token's per-layer embedding"
        )


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose headers fit its plan."""

    source: Source
    config: configs.ModelConfig
    plan: ModelPlan
    matched: Matched
    format: str

    def notes(self, loaded: Collection[str] = ()) -> list[str]:
        """Return notes on what was passed over, and what does not fit together; `loaded` are towers that were not, by kind."""
        wrapped = next((prefix for prefix in hf.WRAPPERS if all(name.startswith(prefix) for name in self.source.tensors)), None)
        carried = [] if wrapped is None else [f"all tensors' names begin with {wrapped!r}, which a training script left there"]
        return [*self.config.notes, *carried, *self.matched.notes(self.plan, loaded)]


def open_checkpoint(path: Path, ignore: Sequence[str] = ()) -> Checkpoint:
    """Read headers and config, derive the plan, match every tensor; no tensor data is read.

    `ignore` holds patterns of config keys and tensor names to pass over. Raises ConfigError or CheckpointError with all problems.
    """
    return read_checkpoint(Source.open(path), ignore)


def read_checkpoint(source: Source, ignore: Sequence[str] = ()) -> Checkpoint:
    """Do what `open_checkpoint` does with a source that is open already. Raises the same."""
    format = format_of(source)
    config = format.config(source, ignore)
    plan = derive(config)
    matched = match(plan, format.pieces(source, plan), str(source.path), ignore, format.spell)
    return Checkpoint(source, config, plan, matched, format.NAME)


def format_of(source: Source) -> Format:
    """Return the first format that takes the source for its own. Raises CheckpointError for a damaged config."""
    return next(format for format in FORMATS if format.sniff(source))


def match(
    plan: ModelPlan, pieces: Iterable[StoredTensor], source: str, ignore: Sequence[str] = (), spell: Spell | None = None
) -> Matched:
    """Find every parameter's tensors. Raises CheckpointError that lists all problems; nothing is allocated."""
    problems: list[str] = []
    matched = compare(plan, pieces, problems, ignore, spell)
    if problems:
        raise mismatch(source, problems, matched.common_mistake(plan))
    return matched


def mismatch(source: str, problems: Sequence[str], hint: str = "") -> CheckpointError:
    """Return the error of a checkpoint that does not hold what a plan needs."""
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    return CheckpointError(f"{source} does not match the plan ({count}, nothing was allocated){hint}", sorted(problems))


def compare(
    plan: ModelPlan,
    pieces: Iterable[StoredTensor],
    problems: list[str],
    ignore: Sequence[str] = (),
    spell: Spell | None = None,
) -> Matched:
    """Find the tensors that fit every parameter, noting every problem instead of raising.

    `spell` says how the format names a parameter or a part of one, for what is missing.
    """
    return compare_specs(plan.params(), plan.redundant(), pieces, problems, ignore, spell)


def compare_specs(
    wanted: Iterable[ParamSpec],
    redundant: Collection[Piece],
    pieces: Iterable[StoredTensor],
    problems: list[str],
    ignore: Sequence[str] = (),
    spell: Spell | None = None,
) -> Matched:
    """Do what `compare` does for any parameters; `redundant` are pieces that the model has, though not in this place."""
    specs = {spec.name: spec for spec in wanted}
    matched, found = Matched(), dict[tuple[str, str | None], StoredTensor]()
    for piece in pieces:
        if any(fnmatch.fnmatchcase(piece.data.name, pattern) for pattern in ignore):
            matched.ignored.append(piece)
        elif piece.name is not None and piece.name.startswith("("):
            matched.other_modules.setdefault(piece.name.strip("()"), []).append(piece)
        elif piece.name in specs and _has_part(specs[piece.name], piece.part):
            twin = found.setdefault((piece.name, piece.part), piece)
            if twin is not piece:
                problems.append(f"duplicate  {piece.label}: {twin.data.origin} and {piece.data.origin}")
        elif (piece.name, piece.part) in redundant:
            matched.redundant.append(piece)
        else:
            matched.unknown.append(piece)
            problems.append(f"unknown    {piece.data.origin}: not part of this model; --ignore '{piece.data.name}' to skip it")
    names = _file_names(found.values(), spell)
    for spec in specs.values():
        matched.pieces[spec.name] = tuple(_take(spec, found, matched, problems, names))
    _check_defaults(specs.values(), matched, problems)
    return matched


def _check_defaults(specs: Iterable[ParamSpec], matched: Matched, problems: list[str]) -> None:
    """Report parameters that some layers have and others lack: their absence means something only where all are absent."""
    optional = Counter(spec.name.rpartition(".")[2] for spec in specs if spec.default is not None)
    for name in {spec.name.rpartition(".")[2] for spec in matched.defaults}:
        absent = [spec for spec in matched.defaults if spec.name.endswith(f".{name}")]
        if len(absent) < optional[name]:
            for spec in absent:
                matched.missing.append((spec.name, spec.shape))
                problems.append(f"missing    {spec.name} {spec.shape}: other layers have one; a checkpoint has all or none")


def _file_names(pieces: Iterable[StoredTensor], spell: Spell | None) -> Spell | None:
    """Return how these files would name a parameter: as the format does, with the prefix that their other tensors have."""
    if spell is None:
        return None

    def named(name: str, part: str | None) -> str:
        for each in (part, None):  # experts' gate and up are one tensor in some formats
            with contextlib.suppress(StopIteration):
                return spell(name, each)
        return name

    for piece in pieces:
        own = named(piece.name or "", piece.part)
        bare = own.removeprefix("model.")
        if bare != own and piece.data.name.endswith(bare):
            return _prefixed(piece.data.name.removesuffix(bare), named)
    return named


def _prefixed(prefix: str, spell: Spell) -> Spell:
    def named(name: str, part: str | None) -> str:
        own = spell(name, part)
        return prefix + own.removeprefix("model.") if own.startswith("model.") else own

    return named


def _has_part(spec: ParamSpec, part: str | None) -> bool:
    return part is None or any(part == name for name, _ in spec.parts)


def _take(
    spec: ParamSpec,
    found: dict[tuple[str, str | None], StoredTensor],
    matched: Matched,
    problems: list[str],
    names: Spell | None,
) -> Iterator[StoredTensor]:
    """Yield a parameter's pieces in order, checked; report what is missing or does not fit."""
    whole = found.get((spec.name, None))
    wanted = [(None, spec.shape)] if whole or not spec.parts else [(part, _part_shape(spec, rows)) for part, rows in spec.parts]
    for part, shape in wanted:
        piece = found.get((spec.name, part))
        label = f"{spec.name}[{part}]" if part else spec.name
        if piece is None and spec.default is not None:
            matched.defaults.append(spec)
        elif piece is None:
            matched.missing.append((label, shape))
            named = "" if names is None else f": {names(spec.name, part)} is in no file; download them again"
            problems.append(f"missing    {label} {shape}{named}")
        elif piece.fault is not None:
            problems.append(f"packing    {label}: {piece.data.origin}: {piece.fault}")
        elif piece.data.shape != shape:
            matched.misshapen.append((shape, piece.data.shape))
            problems.append(
                f"shape      {label} {shape} expected, {piece.data.origin} has {piece.data.shape}{_hint(spec, shape, piece)}"
            )
        elif isinstance(piece.data, PackedTensor) and not spec.integer and len(spec.shape) > 1:
            yield piece
        elif piece.data.dtype not in (INTEGERS if spec.integer else FLOATS):
            kinds = ", ".join(INTEGERS if spec.integer else FLOATS)
            problems.append(f"dtype      {label}: {kinds} expected, {piece.data.origin} is {piece.data.dtype}")
        else:
            yield piece


def _part_shape(spec: ParamSpec, rows: int) -> tuple[int, ...]:
    return (*spec.shape[:-2], rows, spec.shape[-1])


def _hint(spec: ParamSpec, shape: tuple[int, ...], piece: StoredTensor) -> str:
    """Name the config key that most likely explains a wrong shape."""
    if ".mlp." in spec.name and any(2 * a == b or a == 2 * b for a, b in zip(shape, piece.data.shape, strict=False)):
        return ": half or twice the width that config.json gives this layer; are both of one model?"
    return ""
