"""Tensor-parallel plans: all slices together are the whole model, and each rank's layers have the sizes of its slices."""

from __future__ import annotations

from collections import Counter

import pytest

from gemcutter import config as configs
from gemcutter.checkpoint.write.synth import SIZES, spell_config
from gemcutter.checkpoint.write.synth_assistant import ASSISTANTS, spell_assistant
from gemcutter.errors import ConfigError
from gemcutter.param_spec import ParamKind, ParamSpec
from gemcutter.plan import ModelPlan, derive
from gemcutter.shard import Shard, Slice

REPLICATED = {"embed.ple", "ple.in", "moe.router", "ple.gate", "ple.out"}  # matrices that every rank holds


def plan_of(size: str) -> ModelPlan:
    return derive(configs.read(spell_config(SIZES[size])))


def kind_of(spec: ParamSpec) -> str:
    return spec.name.split(".", 2)[2] if spec.name.startswith("layers.") else spec.name


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("size", SIZES)
def test_slices_cover_every_tensor(size: str, world: int) -> None:
    plan = plan_of(size)
    ranks = [list(plan.shard(rank, world).params()) for rank in range(world)]
    for whole, *parts in zip(plan.params(), *ranks, strict=True):
        assert {part.stored_shape for part in parts} == {whole.shape}
        if whole.shard_axis is None:
            assert all(part == whole for part in parts)
            assert len(whole.shape) == 1 or kind_of(whole) in REPLICATED
            continue
        for index, (_, rows) in enumerate(
            whole.parts if parts[0].slices and whole.shard_axis == -2 and whole.parts else [("", 0)]
        ):
            pieces = [part.slices[index] for part in parts]
            held = Counter(at for piece in pieces for at in range(piece.start, piece.stop))
            assert sorted(held) == list(range(rows or whole.shape[whole.shard_axis]))
            assert len(set(held.values())) == 1  # all of it once, or each key head by as many ranks as any other
            assert {piece.axis for piece in pieces} == {whole.shard_axis}
        for part in parts:
            axis = len(part.shape) + whole.shard_axis
            assert part.shape[axis] == sum(piece.size for piece in part.slices)
            assert part.shape[:axis] + part.shape[axis + 1 :] == whole.shape[:axis] + whole.shape[axis + 1 :]


@pytest.mark.parametrize("world", [2, 8])
@pytest.mark.parametrize("size", SIZES)
def test_a_ranks_layers_have_the_sizes_of_its_slices(size: str, world: int) -> None:
    plan = plan_of(size)
    for rank in range(world):
        mine = plan.shard(rank, world)
        specs = {spec.name: spec for spec in mine.params()}
        for layer, whole in zip(mine.layers, plan.layers, strict=True):
            prefix = f"layers.{layer.index}."
            assert specs[f"{prefix}attn.in"].parts == layer.attn_parts()
            assert specs[f"{prefix}attn.out"].shape == (plan.hidden, layer.heads * layer.head_dim)
            assert specs[f"{prefix}mlp.in"].shape == (2 * layer.mlp_width, plan.hidden)
            assert layer.heads * world == whole.heads
            assert layer.kv_heads == max(1, whole.kv_heads // world)
            assert (layer.proj, layer.kv_layer, layer.drops_rows) == (whole.proj, whole.kv_layer, whole.drops_rows)
            if layer.moe is not None and whole.moe is not None:
                assert layer.moe.held == whole.moe.experts // world
                assert specs[f"{prefix}moe.in"].shape[0] == layer.moe.held
                assert specs[f"{prefix}moe.in"].slices == (
                    Slice(-3, layer.moe.first, layer.moe.first + layer.moe.held, whole.moe.experts),
                )
        assert mine.head_rows == Slice(-2, rank * plan.vocab // world, (rank + 1) * plan.vocab // world, plan.vocab)
        assert mine.kv_bytes(4096) * world >= plan.kv_bytes(4096)


def test_query_heads_stay_with_the_key_head_that_they_read() -> None:
    """Fewer key heads than ranks: a rank holds the one that its query heads are grouped over."""
    plan = plan_of("26B-A4B")  # 16 query heads, 8 key heads in windowed layers and 2 in global ones
    for layer in (plan.layers[0], plan.layers[5]):
        group = layer.heads // layer.kv_heads
        for rank in range(8):
            q, k = next(spec for spec in plan.shard(rank, 8).params() if spec.name == f"layers.{layer.index}.attn.in").slices[:2]
            heads = range(q.start // layer.head_dim, q.stop // layer.head_dim)
            keys = range(k.start // layer.head_dim, k.stop // layer.head_dim)
            assert {head // group for head in heads} == set(keys)


def test_the_whole_plan_counts_once() -> None:
    plan = plan_of("31B")
    ranks = [plan.shard(rank, 4) for rank in range(4)]
    cut = sum(spec.elements for spec in plan.params() if spec.shard_axis is not None)
    held = sum(spec.elements for rank in ranks for spec in rank.params() if spec.shard_axis is not None)
    assert held == cut
    assert all(rank.whole is plan and rank.rank == Shard(index, 4) for index, rank in enumerate(ranks))
    assert {rank.read_bytes(1000) for rank in ranks} == {ranks[0].read_bytes(1000)}
    assert ranks[0].read_bytes(1000) < plan.read_bytes(1000)


@pytest.mark.parametrize("size", SIZES)
def test_ranks_share_the_table_of_per_layer_embeddings_where_that_is_asked_for(size: str) -> None:
    plan = plan_of(size)
    whole = {spec.name: spec for spec in plan.params()}
    for cuts in (False, True):
        ranks = [plan.shard(rank, 4, cuts_ple=cuts) for rank in range(4)]
        held = [{spec.name: spec for spec in rank.params()} for rank in ranks]
        for name, spec in whole.items() if cuts else ():
            assert [each[name].shard_axis for each in held] == [-2 if name == "embed.ple" else spec.shard_axis] * 4
        if not plan.ple_dim:
            continue
        edges = [(rank.ple_rows.start, rank.ple_rows.stop) for rank in ranks]
        assert [each["embed.ple"].shape[0] for each in held] == [stop - start for start, stop in edges]
        if cuts:
            assert [start for start, _ in edges] == [0, *(stop for _, stop in edges[:-1])]
        assert edges[-1] == (edges[-1][0] if cuts else 0, plan.ple_vocab)


@pytest.mark.parametrize(
    ("rank", "world", "message"),
    [
        (2, 2, "rank 2 of 2: expected 0 to 1"),
        (-1, 4, "rank -1 of 4"),
        (0, 3, "over 3 ranks: 8 query heads can't be shared evenly"),
        (0, 16, "over 16 ranks: 8 query heads can't be shared evenly"),
    ],
)
def test_uneven_shares_are_refused(rank: int, world: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_of("E2B").shard(rank, world)


def test_an_mlp_is_cut_between_groups_of_columns() -> None:
    """The dense branch of 26B-A4B, 2112 columns in groups of 64: 16 and 17 of them."""
    plan = plan_of("26B-A4B")
    ranks = [plan.shard(rank, 2, mlp_unit=64) for rank in range(2)]
    assert [rank.layers[0].mlp_width for rank in ranks] == [16 * 64, 17 * 64]
    for rank in ranks:
        specs = {spec.name: spec for spec in rank.params()}
        (columns,), (gate, up) = specs["layers.0.mlp.out"].slices, specs["layers.0.mlp.in"].slices
        assert (columns.start, columns.stop) == (gate.start, gate.stop) == (up.start, up.stop)
        assert columns.start % 64 == 0
    with pytest.raises(ConfigError, match="33 blocks of 64 can't be shared by 64 ranks"):
        Shard(0, 64).cut(-1, 2112, 64, is_even=False)


def test_the_last_block_may_be_smaller() -> None:
    pieces = [Shard(rank, 3).cut(-2, 1000, 16, is_even=False) for rank in range(3)]
    assert [(piece.start, piece.stop) for piece in pieces] == [(0, 336), (336, 672), (672, 1000)]
    with pytest.raises(ConfigError, match="can't be shared evenly"):
        Shard(0, 2).cut(-2, 1000, 16)


def test_a_drafters_head_stays_whole() -> None:
    drafter = derive(configs.read(spell_assistant(ASSISTANTS["E2B"], SIZES["E2B"])))
    mine = drafter.shard(1, 2)
    assert mine.tied_head == drafter.tied_head
    assert mine.head_rows.size == drafter.vocab
    assert {spec.name for spec in mine.params()} == {spec.name for spec in drafter.params()}


def test_every_parameter_has_a_kind() -> None:
    kinds: dict[str, set[ParamKind]] = {}
    for size in SIZES:
        for spec in plan_of(size).params():
            kinds.setdefault(kind_of(spec), set()).add(spec.kind)
    assert all(len(found) == 1 for found in kinds.values())
    of = {name: found.pop() for name, found in kinds.items()}
    assert {name for name, kind in of.items() if kind is ParamKind.NORM} == {name for name in of if name.endswith("norm")}
    assert {name for name, kind in of.items() if kind is ParamKind.EXPERTS} == {"moe.in", "moe.out"}
    assert {name for name, kind in of.items() if kind is ParamKind.VECTOR} == {"moe.router_scale", "moe.expert_scale"}
    assert {name for name, kind in of.items() if kind is ParamKind.SCALAR} == {"scale"}


@pytest.mark.parametrize("size", SIZES)
def test_what_is_redundant_is_what_other_layers_own(size: str) -> None:
    plan = plan_of(size)
    owned = {(spec.name, part) for spec in plan.params() for part in ([name for name, _ in spec.parts] or [None])}
    redundant = plan.redundant()
    assert not redundant & owned
    per_layer = {("attn.in", "k"), ("attn.in", "v"), ("attn.k_norm", None)}
    every = {(f"layers.{layer.index}.{name}", part) for layer in plan.layers for name, part in per_layer}
    assert (redundant | owned) & every == every
    assert redundant - every == ({("head", None)} if plan.tied_head else set())


def test_only_the_last_writer_drops_rows() -> None:
    for size in SIZES:
        plan = plan_of(size)
        assert [layer.index for layer in plan.layers if layer.drops_rows] == [plan.num_full_layers]
        assert plan.num_full_layers == plan.first_reader - 1
