"""The one way from options to a decoder: `open_model`, used by the Python API, the benchmark, `verify` and `score` alike.

Owns the order of things: files and headers, what the machine can do, weights, adapters, the place of large tables, the decoder.
Refuses to know tokenizers, templates and requests. Read `load_options.py` for the options, `api.py` for what is built upon this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from gemcutter.checkpoint.container.stored_tensor import release_pages
from gemcutter.checkpoint.formats.lora import Adapter, open_adapter
from gemcutter.checkpoint.load.adapters import Maker, attach, fold, fold_tower, read_deltas, read_tower_deltas
from gemcutter.checkpoint.load.held import changed_pieces, pieces_of
from gemcutter.checkpoint.load.load_params import Progress, load_params, load_tower
from gemcutter.checkpoint.load.match import Checkpoint, Matched, open_checkpoint
from gemcutter.checkpoint.load.match_towers import MatchedAudio, MatchedVision, find_tower_files, match_audio, match_vision
from gemcutter.checkpoint.load.memory_needs import Holding, param_memory, quant_notes
from gemcutter.checkpoint.load.packed_weight_cache import PackedWeightCache
from gemcutter.checkpoint.load.ple_placement import place_table
from gemcutter.checkpoint.load.slices import column_unit
from gemcutter.checkpoint.remote.hub import locate
from gemcutter.engine.cuda_graphs import CapturedSteps
from gemcutter.engine.engine import Engine
from gemcutter.engine.loop import EngineLoop
from gemcutter.engine.memory import make_pool
from gemcutter.engine.speculate.assistant import AssistantProposer
from gemcutter.engine.speculate.draft_model import DraftModelProposer
from gemcutter.engine.speculate.ngram import NgramProposer
from gemcutter.engine.speculate.speculator import Speculator
from gemcutter.errors import KernelError, RequestError
from gemcutter.load_options import AUTO_MEDIA, DEFAULT_CONTEXT, LoadOptions, check_dtype, own_dtype
from gemcutter.media.budgets import BUDGETS
from gemcutter.model.audio import AudioTower
from gemcutter.model.drafter import Drafter, sort_under_centroids
from gemcutter.model.pipeline import Pipeline
from gemcutter.model.text import Decoder
from gemcutter.model.vision import VisionTower
from gemcutter.ops.registry import CPU, select_backend
from gemcutter.ops.turns import Turns
from gemcutter.ops.types import AdapterDeltas, Param, Pipe, Ranks, matrix
from gemcutter.parallel.follower import EngineParts, Follower
from gemcutter.parallel.launch import await_ranks, launch
from gemcutter.parallel.leader import Leader
from gemcutter.parallel.rendezvous import lead, number_on_host, ranks_on_host, torchrun_rank
from gemcutter.parallel.stages import cut_stages
from gemcutter.param_spec import Access
from gemcutter.plan import ModelPlan, derive
from gemcutter.quant import Weight
from gemcutter.quant.cpu_packed import CpuPackedWeight
from gemcutter.quant.recipes import widest_group
from gemcutter.shard import Place, Shard
from gemcutter.tower_plan import TowerPlan, TowerPlans

FP8_CAPABILITY = (8, 9)
QUANT_OF_DRAFTERS = "q4"  # beside a 4-bit target

Towers = Sequence[VisionTower | AudioTower]  # those that are loaded


@dataclass(frozen=True, slots=True)
class OpenModel:
    """A checkpoint and its decoder. `notes` say what loading left out or what an option costs."""

    options: LoadOptions
    checkpoint: Checkpoint
    decoder: Decoder
    notes: list[str] = field(default_factory=list)
    drafter: Drafter | Decoder | None = None
    vision: VisionTower | None = None
    audio: AudioTower | None = None
    turns: Turns = field(default_factory=Turns)  # of towers and engine on the cores

    def engine(self) -> Engine:
        """Make an engine of the options' limits. Raises CapacityError if there is no memory for its cache."""
        how = self.options
        return Engine(
            self.decoder,
            DEFAULT_CONTEXT if how.context is None else how.context,
            how.max_batched_tokens,
            how.max_num_seqs,
            how.prefix_cache_bytes,
            kv_dtype=cache_dtype(how.kv),
            max_stall_ms=how.max_stall_ms,
            speculator=self.speculator(),
            largest_block=max(BUDGETS) if self.vision is not None and self.checkpoint.plan.bidirectional else 0,
            turns=self.turns,
        )

    def speculator(self) -> Speculator | None:
        """Return what guesses tokens, None where nothing is to be guessed."""
        how = self.options
        mode = how.speculate or ("off" if how.draft_model is None else "auto")
        ngram = NgramProposer() if mode in ("auto", "ngram") else None
        drafting: AssistantProposer | DraftModelProposer | None = None
        if isinstance(self.drafter, Drafter):
            drafting = AssistantProposer(self.drafter)
        elif self.drafter is not None:
            context = DEFAULT_CONTEXT if how.context is None else how.context
            drafting = DraftModelProposer(self.drafter, context, how.max_num_seqs)
        return Speculator(ngram, drafting, how.draft_tokens) if ngram or drafting else None


@dataclass(frozen=True, slots=True)
class Others:
    """The other processes of a model: ranks that share this one's layers, stages that have others, and, in the first, all."""

    ranks: Ranks | None = None
    pipe: Pipe | None = None
    stages: int = 1
    leader: Leader | None = None


def open_model(options: LoadOptions, progress: Progress | None = None) -> OpenModel:
    """Load a checkpoint as the options say. Raises GemcutterError with everything that is wrong."""
    checkpoint, started = open_checkpoint(locate(options.model), options.ignore), torchrun_rank()
    if started is not None:
        options = replace(options, tensor_parallel=ranks_of_stage(started[1], options.pipeline_parallel))
    place = Place(0, options.tensor_parallel, options.pipeline_parallel)
    if options.ple == "split" and place.tensor_parallel == 1:
        raise RequestError(
            "ple split: tensor-parallel processes share the table, and there is one; use tensor_parallel 2 or more"
        )
    if place.count == 1:
        return _open(options, checkpoint, progress)
    check_processes(options, place.count if started is None else ranks_on_host())
    stages = stages_of(checkpoint, options)
    checkpoint = at_place(checkpoint, place, stages, options)
    ranks, pipe, leader = launch(options, stages) if started is None else lead(options, stages)
    others = Others(ranks if place.tensor_parallel > 1 else None, pipe, len(stages), leader)
    try:
        opened = _open(on_device_of(options, number_on_host()), checkpoint, progress, others)
        leader.settle = opened.decoder.finish_all
        await_ranks(leader)
    except BaseException:
        leader.close()
        raise
    return opened


def _open(options: LoadOptions, checkpoint: Checkpoint, progress: Progress | None, others: Others = Others()) -> OpenModel:
    device = find_device(options)
    name, note = own_dtype(checkpoint.config.dtype) if options.dtype is None else (check_dtype(options.dtype), None)
    dtype, notes = getattr(torch, name), [] if note is None else [note]
    if checkpoint.plan.is_drafter:
        model = options.model
        raise RequestError(f"{model} is an assistant: it drafts for its target and can't run alone; load the target instead")
    seen, heard = match_towers(options, checkpoint)
    plans = TowerPlans(None if seen is None else seen[0], None if heard is None else heard[0])
    merged = None if options.adapter is None else find_adapter(options.adapter, checkpoint, plans, options.ignore)
    apart = {name: find_adapter(path, checkpoint, plans, options.ignore) for name, path in options.adapters.items()}
    backend = select_backend(device.type, options.kernels)
    packer = backend.packer(device, dtype)
    cache, keeps = None, options.repack_cache
    if packer.makes_panels and keeps is not False:
        cache = PackedWeightCache.of(checkpoint, options.quant, is_asked=keeps is not None)
    changed = frozenset() if merged is None else changed_pieces(merged, checkpoint)
    params = load_params(checkpoint, dtype, device, progress, options.quant, packer, cache, changed)
    if "embed.ple" in params:
        params["embed.ple"] = place_table(matrix(params, "embed.ple"), options.ple, device)
    if options.quant is not None:
        notes += quant_notes(checkpoint, options.quant, changed)
    if merged is not None and merged.factors:
        params, note = fold(params, merged, checkpoint, dtype, device, options.quant, packer)
        notes.append(note)
    notes += panel_notes(options, params)
    for name, each in apart.items():
        params = attach(params, each, name, device, checkpoint.plan)
    notes += [note for each in filter(None, (merged, *apart.values())) for note in each.notes()]
    if backend is not CPU and device.type == "cpu" and options.kernels == "auto":
        notes.append(f"several times slower than it could be: {CPU.refusal('cpu', options.kernels)}")
    decoder = make_decoder(checkpoint.plan, params, options, dtype, device, tuple(apart), others)
    if "embed.ple" in params and (device.type == "cpu" or options.ple == "mmap"):
        decoder.op_context.table_pages.release = partial(release_pages, checkpoint.matched.pieces["embed.ple"])
    drafter = open_drafter(options, decoder, notes) if options.drafts_by_model else None
    vision, audio, turns = None, None, Turns()
    if seen is not None:
        weights = tower_params(*seen, merged, options, decoder, notes)
        vision = VisionTower(seen[0], weights, dtype, device, options.kernels, turns)
    if heard is not None:
        weights = tower_params(*heard, merged, options, decoder, notes)
        audio = AudioTower(heard[0], weights, dtype, device, options.kernels, turns)
    for name, each in apart.items():
        add_to_towers([tower for tower in (vision, audio) if tower is not None], name, each, device)
    return OpenModel(options, checkpoint, decoder, notes, drafter, vision, audio, turns)


def open_rank(options: LoadOptions, stages: Sequence[range], place: Place, ranks: Ranks, pipe: Pipe | None) -> Follower:
    """Load a place's part of a checkpoint that another process leads, and of its assistant.

    Raises GemcutterError with everything that is wrong.
    """
    checkpoint = at_place(open_checkpoint(locate(options.model), options.ignore), place, stages, options)
    others = Others(ranks if place.tensor_parallel > 1 else None, pipe, len(stages))
    opened = _open(replace(options, media=()), checkpoint, None, others)  # towers are the leader's
    decoder = opened.decoder

    def read_adapter(name: str, path: str, ignore: Sequence[str]) -> AdapterDeltas:
        return read_deltas(decoder.params, find_adapter(path, checkpoint, None, ignore), name, decoder.device, decoder.plan)

    if decoder.device.type == "cuda":
        torch.cuda.set_device(decoder.device)
    drafter = opened.drafter if isinstance(opened.drafter, Drafter) else None
    return Follower(decoder, drafter, EngineParts(make_pool, CapturedSteps), read_adapter)


def on_rank(checkpoint: Checkpoint, shard: Shard, quant: str | None, splits_ple: bool = False) -> Checkpoint:
    """Return a checkpoint with the plan of a tensor-parallel rank. Raises ConfigError for a model that can't be shared so."""
    unit = column_unit(checkpoint.matched.pieces, widest_group(quant) if quant else 1)
    return replace(checkpoint, plan=checkpoint.plan.shard(shard.rank, shard.world, unit, splits_ple))


def at_place(checkpoint: Checkpoint, place: Place, stages: Sequence[range], options: LoadOptions) -> Checkpoint:
    """Return a checkpoint with the plan of what a place holds. Raises ConfigError for a model that can't be shared so."""
    if place.tensor_parallel > 1:
        checkpoint = on_rank(checkpoint, place.shard, options.quant, options.splits_ple)
    if len(stages) == 1:
        return checkpoint
    return replace(checkpoint, plan=checkpoint.plan.on_stage(stages[place.stage]))


def stages_of(checkpoint: Checkpoint, options: LoadOptions) -> tuple[range, ...]:
    """Return the layers of each stage, of which the fullest holds as little as possible. Raises ConfigError for too many."""
    compute = own_dtype(checkpoint.config.dtype)[0] if options.dtype is None else check_dtype(options.dtype)
    place = torch.device(options.device).type
    packing = select_backend(place, options.kernels).packing
    held = param_memory(checkpoint, Holding(compute, place, packing, options.quant))
    weights = {name: memory.held for name, memory in held.items()}
    return cut_stages(checkpoint.plan, weights, options.pipeline_parallel)


def ranks_of_stage(ranks: int, stages: int) -> int:
    """Return how many of torchrun's ranks each stage has. Raises RequestError where the stages can't have equally many."""
    if ranks % stages:
        raise RequestError(f"pipeline_parallel {stages}: torchrun started {ranks} ranks, which so many stages can't share evenly")
    return ranks // stages


def check_processes(options: LoadOptions, here: int) -> None:
    """Raise KernelError for a device that `here` processes of this host can't share."""
    if options.device == "cpu":
        return
    several = f"{here} processes"
    if ":" in options.device:
        raise KernelError(
            f"device {options.device}: {several} take a GPU each; use the device cuda, and CUDA_VISIBLE_DEVICES to choose"
        )
    find_device(options)
    if not torch.distributed.is_nccl_available():
        raise KernelError(f"device {options.device}: {several} sum by NCCL, which this build of torch lacks")
    if here > torch.cuda.device_count():
        raise KernelError(f"device {options.device}: {several} need a GPU each, and this machine has {torch.cuda.device_count()}")


def on_device_of(options: LoadOptions, gpu: int) -> LoadOptions:
    """Return the options of one of several processes, which computes on a GPU of its own where they compute on GPUs."""
    return options if options.device == "cpu" else replace(options, device=f"cuda:{gpu}")


def cache_dtype(kv: str | None) -> torch.dtype | None:
    """Return the dtype of a cache that is kept as the option `kv` says; None: the compute dtype."""
    return None if kv is None else {"fp8": torch.float8_e4m3fn, "int8": torch.int8}[kv]


def match_towers(options: LoadOptions, checkpoint: Checkpoint) -> tuple[MatchedVision | None, MatchedAudio | None]:
    """Return plan and tensors of each tower that is to be loaded. Raises ConfigError or CheckpointError with all problems."""
    if not options.media:
        return None, None
    files, media = find_tower_files(checkpoint, None if options.mmproj is None else locate(options.mmproj)), options.media
    if AUTO_MEDIA in media:
        named = {"image" if name == "video" else name for name in media if name != AUTO_MEDIA}
        media = tuple(medium for medium in files.media if not named or medium in named)
    seen = match_vision(files, options.ignore) if {"image", "video"} & set(media) else None
    return seen, match_audio(files, options.ignore) if "audio" in media else None


def tower_params(
    plan: TowerPlan, matched: Matched, merged: Adapter | None, options: LoadOptions, decoder: Decoder, notes: list[str]
) -> Mapping[str, Param]:
    """Return the parameters of a matched tower, which is computed as the decoder is, with an adapter's changes merged."""
    tower, dtype, device = plan.projector.name.partition(".")[0], decoder.dtype, decoder.device
    packer = select_backend(device.type, options.kernels).packer(device, dtype)
    changed = frozenset() if merged is None else pieces_of(merged.of_tower(tower), matched.pieces)
    params = load_tower(plan.params(), matched.pieces, dtype, device, packer, changed)
    if merged is not None:
        params, more = fold_tower(params, merged, tower, matched.pieces, Maker(dtype, device, None, packer, dtype))
        notes += more
    return params


def open_drafter(options: LoadOptions, target: Decoder, notes: list[str]) -> Drafter | Decoder | None:
    """Load the assistant, or smaller model, that the options name for a decoder that is there, and note what is special about it.

    None for a smaller model on a rank that follows, since it runs whole where the ranks are led, and for an assistant on all
    stages but the last, which has the keys and values that it reads. Raises GemcutterError with everything that is wrong, or
    does not fit the target.
    """
    assert options.draft_model is not None
    if not target.plan.has_ends:
        return None
    found = open_checkpoint(locate(options.draft_model), options.ignore)
    if not found.plan.is_drafter and found.plan.vocab != target.plan.vocab:
        vocabs = f"{found.plan.vocab:,} tokens, {options.model} has {target.plan.vocab:,}"
        raise RequestError(f"draft_model: {options.draft_model} knows {vocabs}; name its assistant, or a smaller Gemma 4")
    follows = target.leader is None and (target.ranks is not None or target.pipeline is not None)
    if not found.plan.is_drafter and follows:
        return None
    ranks = target.ranks if found.plan.is_drafter else None
    bound = replace(found, plan=derive(found.config, target.plan.whole or target.plan)) if found.plan.is_drafter else found
    if ranks is not None:
        bound = on_rank(bound, ranks.shard, options.quant)
    quant = options.quant
    if quant is None and _has_four_bits(target):
        quant = QUANT_OF_DRAFTERS
        notes.append(f"the draft model is quantized to 4 bits ({quant}), as its target is")
    packer = select_backend(target.device.type, options.kernels).packer(target.device, target.dtype)
    params = load_params(bound, target.dtype, target.device, None, quant, packer)
    if bound.plan.ple_dim:
        params["embed.ple"] = place_table(matrix(params, "embed.ple"), options.ple, target.device)
    params = sort_under_centroids(bound.plan, params)
    decoder = make_decoder(bound.plan, params, options, target.dtype, target.device, others=Others(ranks))
    return Drafter(decoder, target) if found.plan.is_drafter else decoder


def _has_four_bits(decoder: Decoder) -> bool:
    """Return whether most of what a token reads is held in 5 bits an element or less, scales included."""
    weights = [(spec, decoder.params[spec.name]) for spec in decoder.plan.params() if spec.access is Access.DENSE]
    matrices = [(spec, param) for spec, param in weights if isinstance(param, Weight)]
    return 8 * sum(param.nbytes for _, param in matrices) <= 5 * sum(spec.elements for spec, _ in matrices)


def panel_notes(options: LoadOptions, params: Mapping[str, Param]) -> list[str]:
    """Return notes on options that concern repacked weights alone, where none is repacked."""
    weights = [param for param in params.values() if isinstance(param, Weight)]
    if any(isinstance(part, CpuPackedWeight) for weight in weights for part in weight.parts):
        return []
    given = {"repack_cache": options.repack_cache is True, f"activations {options.activations}": options.activations is not None}
    return [f"{name} has no effect: no weight is repacked for the CPU kernels" for name, is_given in given.items() if is_given]


def make_decoder(
    plan: ModelPlan,
    params: Mapping[str, Param],
    options: LoadOptions,
    dtype: torch.dtype,
    device: torch.device,
    adapters: tuple[str, ...] = (),
    others: Others = Others(),
) -> Decoder:
    """Make a decoder over parameters that are there already; `adapters` may be asked for, though they change only towers.

    Of a rank's or a stage's plan it takes part with the others.
    """
    how = (plan, params, dtype, device, options.kernels, options.activations, adapters, others.ranks, others.leader)
    return Decoder(*how, None if others.pipe is None else Pipeline(others.pipe, others.stages))


def find_device(options: LoadOptions) -> torch.device:
    """Return the options' device. Raises KernelError if this machine has none such, or it lacks what the options need."""
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise KernelError("device cuda: torch finds no CUDA device here; use the device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise KernelError(f"device {options.device}: this machine has {torch.cuda.device_count()} CUDA devices")
    if options.kv == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        raise KernelError(f"kv {options.kv}: this GPU has no 8-bit floats")
    return device


def find_adapter(path: str, checkpoint: Checkpoint, towers: TowerPlans | None = None, ignore: Sequence[str] = ()) -> Adapter:
    """Return an adapter, from a folder or the hub, that fits a checkpoint and its loaded towers. Raises CheckpointError with all
    that does not.
    """
    return open_adapter(locate(path), checkpoint.plan.whole or checkpoint.plan, ignore, towers)


def load_adapter(
    name: str, path: str, loop: EngineLoop, checkpoint: Checkpoint, towers: Towers, ignore: Sequence[str] = ()
) -> list[str]:
    """Let requests ask for an adapter by name while the model serves; return notes on what of it has no effect.

    One adapter at a time may come or go. Raises what `EngineLoop.load_adapter` does, and CheckpointError for an adapter that
    can't be read or does not fit; nothing has changed then.
    """
    decoder, notes = loop.engine.decoder, list[str]()
    is_read = False

    def read() -> AdapterDeltas:
        nonlocal is_read
        adapter = find_adapter(path, checkpoint, _plans(towers), ignore)
        is_read = True
        notes.extend(adapter.notes())
        add_to_towers(towers, name, adapter, decoder.device)  # before any request may ask for it
        if decoder.leader is not None:
            decoder.leader.load_adapter(name, path, ignore)
        return read_deltas(decoder.params, adapter, name, decoder.device, decoder.plan)

    try:
        loop.load_adapter(name, read)
    except BaseException:
        for tower in towers if is_read else ():
            tower.bodies.remove(name)
        if is_read and decoder.leader is not None:
            decoder.leader.unload_adapter(name)
        raise
    return notes


def unload_adapter(name: str, loop: EngineLoop, towers: Towers) -> None:
    """Unload an adapter that no request uses. Raises what `EngineLoop.unload_adapter` does."""
    loop.unload_adapter(name)
    if (leader := loop.engine.decoder.leader) is not None:
        leader.unload_adapter(name)
    for tower in towers:
        tower.bodies.remove(name)


def add_to_towers(towers: Towers, name: str, adapter: Adapter, device: torch.device) -> None:
    """Let towers compute with an adapter's changes of them, for the requests that ask for it by name."""
    for tower in towers:
        tower.bodies.add(name, read_tower_deltas(tower.bodies.params, adapter, tower.name, name, device))


def _plans(towers: Towers) -> TowerPlans:
    """Return the plans of loaded towers."""
    vision = next((tower.plan for tower in towers if isinstance(tower, VisionTower)), None)
    return TowerPlans(vision, next((tower.plan for tower in towers if isinstance(tower, AudioTower)), None))
