"""The plans of all published sizes, against numbers worked out by hand and counts written anew from the raw JSON.

Nothing here asks the plan what it thinks of itself: layers are spelled out run by run, totals are the published ones, and
operations are summed position by position. Read `test_config.py` for what a config may say.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gemcutter import config
from gemcutter.errors import ConfigError
from gemcutter.plan import UNBOUND, Attn, ModelPlan, Proj, derive

CONFIGS = Path(__file__).resolve().parents[1] / "goldens" / "configs"
SIZES = ("E2B", "E4B", "12B", "26B-A4B", "31B")
MIB = 2**20


def raw_config(size: str, drafter: bool = False) -> dict[str, Any]:
    """Read the published config.json of a size, or of its drafter."""
    name = f"gemma-4-{size}-it{'-assistant' if drafter else ''}.json"
    raw: dict[str, Any] = json.loads((CONFIGS / name).read_text(encoding="utf-8"))
    return raw


def plan_of(size: str) -> ModelPlan:
    return derive(config.read(raw_config(size)))


def drafter_of(size: str, target: ModelPlan | None = None) -> ModelPlan:
    return derive(config.read(raw_config(size, drafter=True)), target)


def published() -> Path:
    """Return the folder of the published presets, or skip the test that asks."""
    named = os.environ.get("GEMCUTTER_SPEC")
    spec = Path(named) if named else Path(__file__).resolve().parents[3] / "shared" / "spec"
    if not (spec / "configs").is_dir():
        pytest.skip(f"no presets in {spec}: set GEMCUTTER_SPEC to a folder that has configs/*.json")
    return spec / "configs"


def test_the_copies_here_are_the_published_presets() -> None:
    originals = {path.name: path.read_bytes() for path in published().glob("*.json")}
    assert originals == {path.name: path.read_bytes() for path in CONFIGS.glob("*.json")}
    assert len(originals) == 10


Row = tuple[Attn, Proj, int, int, int, int, int | None, int]
S, G, QKV, QK, Q = Attn.SLIDING, Attn.GLOBAL, Proj.QKV, Proj.QK_ONLY, Proj.Q_ONLY
OWN = -7  # kv_layer: the layer itself

# (periods, (sliding layers a period, sliding layer, global layer)), each layer as
# (attention, projections, kv_layer, heads, kv_heads, head_dim, window, mlp_width)
LAYERS: dict[str, list[tuple[int, int, Row, Row]]] = {
    "E2B": [
        (3, 4, (S, QKV, OWN, 8, 1, 256, 512, 6144), (G, QKV, OWN, 8, 1, 512, None, 6144)),
        (4, 4, (S, Q, 13, 8, 1, 256, 512, 12288), (G, Q, 14, 8, 1, 512, None, 12288)),
    ],
    "E4B": [
        (4, 5, (S, QKV, OWN, 8, 2, 256, 512, 10240), (G, QKV, OWN, 8, 2, 512, None, 10240)),
        (3, 5, (S, Q, 22, 8, 2, 256, 512, 10240), (G, Q, 23, 8, 2, 512, None, 10240)),
    ],
    "12B": [(8, 5, (S, QKV, OWN, 16, 8, 256, 1024, 15360), (G, QK, OWN, 16, 1, 512, None, 15360))],
    "26B-A4B": [(5, 5, (S, QKV, OWN, 16, 8, 256, 1024, 2112), (G, QK, OWN, 16, 2, 512, None, 2112))],
    "31B": [(10, 5, (S, QKV, OWN, 32, 16, 256, 1024, 21504), (G, QK, OWN, 32, 4, 512, None, 21504))],
}
DRAFTERS: dict[str, tuple[Row, Row]] = {
    "E2B": ((S, Q, 13, 4, 1, 256, 512, 2048), (G, Q, 14, 4, 1, 512, None, 2048)),
    "E4B": ((S, Q, 22, 4, 2, 256, 512, 2048), (G, Q, 23, 4, 2, 512, None, 2048)),
    "12B": ((S, Q, 46, 16, 8, 256, 1024, 8192), (G, Q, 47, 16, 1, 512, None, 8192)),
    "26B-A4B": ((S, Q, 28, 16, 8, 256, 1024, 8192), (G, Q, 29, 16, 2, 512, None, 8192)),
    "31B": ((S, Q, 58, 32, 16, 256, 1024, 8192), (G, Q, 59, 32, 4, 512, None, 8192)),
}


def rows_of(plan: ModelPlan) -> list[Row]:
    return [
        (layer.attn, layer.proj, layer.kv_layer, layer.heads, layer.kv_heads, layer.head_dim, layer.window, layer.mlp_width)
        for layer in plan.layers
    ]


@pytest.mark.parametrize("size", SIZES)
def test_every_layer_is_what_the_size_publishes(size: str) -> None:
    expected: list[Row] = []
    for periods, slidings, sliding, last in LAYERS[size]:
        for row in ((sliding,) * slidings + (last,)) * periods:
            expected.append((*row[:2], len(expected) if row[2] == OWN else row[2], *row[3:]))
    plan = plan_of(size)
    assert rows_of(plan) == expected
    assert [layer.index for layer in plan.layers] == list(range(len(expected)))
    assert {layer.kv_owner for layer in plan.layers} == {"self"}


@pytest.mark.parametrize("size", SIZES)
def test_rope_ple_and_experts_follow_the_size(size: str) -> None:
    plan, elastic = plan_of(size), size in ("E2B", "E4B")
    for layer in plan.layers:
        rope = (layer.rope.theta, layer.rope.head_dim, layer.rope.pairs, layer.rope.factor)
        assert rope == ((1e4, 256, 128, 1.0) if layer.attn is S else (1e6, 512, 64, 1.0))
        assert layer.ple_dim == (256 if elastic else 0)
        moe = layer.moe and (layer.moe.experts, layer.moe.top_k, layer.moe.width)
        assert moe == ((128, 8, 704) if size == "26B-A4B" else None)
    assert (plan.ple_vocab, plan.ple_dim) == ((262144, 256) if elastic else (0, 0))
    assert plan.context == (131072 if elastic else 262144)
    assert plan.bidirectional is not elastic
    assert (plan.vocab, plan.softcap, plan.eps, plan.tied_head, plan.pad_id) == (262144, 30.0, 1e-6, True, 0)
    assert (plan.is_drafter, plan.centroids) == (False, 0)


@pytest.mark.parametrize(
    ("size", "first_reader", "last_writers", "sliding", "full"),
    [
        ("E2B", 15, (13, 14), 12, 3),
        ("E4B", 24, (22, 23), 20, 4),
        ("12B", 48, (46, 47), 40, 8),
        ("26B-A4B", 30, (28, 29), 25, 5),
        ("31B", 60, (58, 59), 50, 10),
    ],
)
def test_writers_and_groups(size: str, first_reader: int, last_writers: tuple[int, int], sliding: int, full: int) -> None:
    plan = plan_of(size)
    assert plan.first_reader == len(plan.writers) == first_reader
    assert (plan.last_writer(S), plan.last_writer(G)) == last_writers
    windowed, unbounded = plan.groups()
    assert (windowed.name, windowed.window, len(windowed.layers)) == ("sliding", 512 if size in ("E2B", "E4B") else 1024, sliding)
    assert (unbounded.name, unbounded.window, len(unbounded.layers)) == ("global", None, full)
    assert sorted(windowed.layers + unbounded.layers) == list(range(first_reader))


@pytest.mark.parametrize("size", SIZES)
def test_a_layer_has_the_projections_that_its_place_needs(size: str) -> None:
    specs = {spec.name: spec for spec in plan_of(size).params()}
    for index, (_, proj, _, heads, kv_heads, head_dim, _, width) in enumerate(rows_of(plan_of(size))):
        q, kv = heads * head_dim, kv_heads * head_dim
        parts = {QKV: (("q", q), ("k", kv), ("v", kv)), QK: (("q", q), ("k", kv)), Q: (("q", q),)}[proj]
        assert specs[f"layers.{index}.attn.in"].parts == parts
        assert specs[f"layers.{index}.mlp.in"].shape[0] == 2 * width
        assert (f"layers.{index}.attn.k_norm" in specs) is (proj is not Q)


@pytest.mark.parametrize("size", SIZES)
def test_a_drafter_reads_the_last_writers_of_its_target(size: str) -> None:
    sliding, full = DRAFTERS[size]
    plan = drafter_of(size, plan_of(size))
    assert rows_of(plan) == [sliding, sliding, sliding, full]
    assert {layer.kv_owner for layer in plan.layers} == {"target"}
    assert (plan.first_reader, plan.writers, plan.groups(), plan.kv_bytes(1000)) == (0, (), (), 0)
    assert plan.is_drafter
    assert plan.backbone == plan_of(size).hidden
    assert (plan.centroids, plan.centroid_top_k) == ((2048, 32) if size in ("E2B", "E4B") else (0, 0))
    assert (plan.softcap, plan.ple_dim) == (None, 0)


@pytest.mark.parametrize("size", SIZES)
def test_a_drafter_without_a_target_is_unbound(size: str) -> None:
    assert [layer.kv_layer for layer in drafter_of(size).layers] == [UNBOUND] * 4


@pytest.mark.parametrize(("size", "other"), [(a, b) for a in SIZES for b in SIZES if a != b])
def test_a_drafter_refuses_every_other_target(size: str, other: str) -> None:
    with pytest.raises(ConfigError) as caught:
        drafter_of(size, plan_of(other))
    sliding, full = zip(DRAFTERS[size], DRAFTERS[other], strict=True)
    assert caught.value.problems == tuple(
        f"layer {index}: has {mine[4]} key heads of {mine[5]}, its target's layer {theirs[2]} writes {theirs[4]} of {theirs[5]}: "
        "not a drafter of this target"
        for index, (mine, theirs) in enumerate([sliding, sliding, sliding, full])
        if mine[4:6] != theirs[4:6]
    )


def test_a_drafter_refuses_a_target_of_another_width() -> None:
    raw = raw_config("E2B", drafter=True)
    raw["backbone_hidden_size"] = 2048
    with pytest.raises(ConfigError, match="made for a hidden size of 2048, its target has 1536"):
        derive(config.read(raw), plan_of("E2B"))


def test_a_drafter_whose_layers_do_not_all_read_is_refused() -> None:
    raw = raw_config("E2B", drafter=True)
    raw["text_config"]["num_kv_shared_layers"] = 3
    with pytest.raises(ConfigError, match="num_kv_shared_layers is 3, but a drafter's 4 layers all read their target"):
        derive(config.read(raw))


# text part only: embed.tokens, embed.ple, ple.in, layers without PLE and experts, PLE of the layers, experts
PARAMS = {
    "E2B": (402_653_184, 2_348_810_240, 13_762_560, 1_835_762_688, 27_578_880, 0),
    "E4B": (671_088_640, 2_818_572_288, 27_525_120, 3_890_666_752, 55_157_760, 0),
    "12B": (1_006_632_960, 0, 0, 10_900_713_472, 0, 0),
    "26B-A4B": (738_197_504, 0, 0, 1_656_956_160, 0, 22_837_985_280),
    "31B": (1_409_286_144, 0, 0, 29_288_053_760, 0, 0),
}
TOTALS = {"E2B": 4_628_569_344, "E4B": 7_463_013_376, "12B": 11_907_350_272, "26B-A4B": 25_233_141_760, "31B": 30_697_345_280}
DRAFTER_TOTALS = {"E2B": 77_731_328, "E4B": 78_517_760, "12B": 422_856_960, "26B-A4B": 419_711_232, "31B": 469_518_592}


@pytest.mark.parametrize("size", SIZES)
def test_parameters_are_the_published_ones(size: str) -> None:
    plan = plan_of(size)
    sums = dict.fromkeys(("embed.tokens", "embed.ple", "ple.in", "layers", "gates", "experts"), 0)
    for spec in plan.params():
        if spec.name in ("norm", "ple.norm") or spec.buffer:
            continue
        kind = "gates" if ".ple." in spec.name else "experts" if spec.name.endswith(("moe.in", "moe.out")) else "layers"
        sums[spec.name if spec.name in sums else kind] += spec.elements
    assert tuple(sums.values()) == PARAMS[size]
    assert plan.num_params() == TOTALS[size]
    assert plan.weight_bytes() == 2 * (TOTALS[size] + len(plan.layers))  # a scale a layer is a buffer, not a parameter
    assert plan.weight_bytes(rows_access=False) == plan.weight_bytes() - 2 * PARAMS[size][1]
    assert drafter_of(size).num_params() == DRAFTER_TOTALS[size]


@pytest.mark.parametrize("size", ["E2B", "E4B"])
def test_effective_parameters_leave_the_ple_table_out(size: str) -> None:
    rows = sum(spec.elements for spec in plan_of(size).params() if spec.access.value == "rows")
    assert TOTALS[size] - rows == {"E2B": 2_279_759_104, "E4B": 4_644_441_088}[size]


@pytest.mark.parametrize(
    ("size", "inside", "beyond", "mebibytes"),
    [
        ("E2B", 18_432, 6_144, (54, 198, 774)),
        ("E4B", 57_344, 16_384, (148, 532, 2_068)),
        ("12B", 344_064, 16_384, (448, 832, 2_368)),
        ("26B-A4B", 225_280, 20_480, (360, 840, 2_760)),
        ("31B", 901_120, 81_920, (1_440, 3_360, 11_040)),
    ],
)
def test_cache_bytes_are_the_published_ones(size: str, inside: int, beyond: int, mebibytes: tuple[int, int, int]) -> None:
    plan = plan_of(size)
    window = 512 if size in ("E2B", "E4B") else 1024
    assert plan.kv_bytes(0) == 0
    assert plan.kv_bytes(1) == inside
    assert plan.kv_bytes(window) == window * inside
    assert plan.kv_bytes(window + 1) - plan.kv_bytes(window) == beyond
    assert tuple(plan.kv_bytes(tokens * 1024) / MIB for tokens in (8, 32, 128)) == mebibytes
    assert plan.kv_bytes(32768, itemsize=1) == plan.kv_bytes(32768) // 2


@pytest.mark.parametrize("size", ["E2B", "E4B", "12B", "26B-A4B", "31B"])
def test_compact_layers_take_three_eighths_less(size: str) -> None:
    """Of 512 columns 128 turn: n and those take 640 elements a key head instead of 1024, beyond the window."""
    plan = plan_of(size)
    plain, compact = (plan.kv_bytes(200_001, compact=kind) - plan.kv_bytes(200_000, compact=kind) for kind in (False, True))
    assert compact == plain * (1 if size in ("E2B", "E4B") else 0.625)
    saved = plan.kv_bytes(200_000) - plan.kv_bytes(200_000, compact=True)
    assert saved == 200_000 * (plain - compact)
    assert plan.read_bytes(200_000) - plan.read_bytes(200_000, compact=True) == saved


def last_writer(text: dict[str, Any]) -> int:
    """Return the last layer with keys of its own; readers are the last layers of every size."""
    return int(text["num_hidden_layers"] - text["num_kv_shared_layers"]) - 1


def row_macs(text: dict[str, Any], index: int) -> tuple[int, int]:
    """Count one row's multiply-accumulates in a layer's matrices: in key and value projections, and in all others."""
    hidden, heads = int(text["hidden_size"]), text["num_attention_heads"]
    full, shared = text["layer_types"][index] == "full_attention", index > last_writer(text)
    head_dim = text["global_head_dim"] if full else text["head_dim"]
    kv_heads = (full and text["num_global_key_value_heads"]) or text["num_key_value_heads"]
    copies = 0 if shared else 1 if full and text["attention_k_eq_v"] else 2
    width = text["intermediate_size"] * (2 if shared and text["use_double_wide_mlp"] else 1)
    rest = 2 * heads * head_dim + 3 * width + 3 * text["hidden_size_per_layer_input"]
    if text["enable_moe_block"]:
        rest += text["num_experts"] + 3 * text["top_k_experts"] * text["moe_intermediate_size"]
    return copies * kv_heads * head_dim * hidden, rest * hidden


def query_flops(text: dict[str, Any], index: int, position: int) -> int:
    """Count the operations of one query's scores and values in a layer."""
    full = text["layer_types"][index] == "full_attention"
    keys = position + 1 if full else min(position + 1, int(text["sliding_window"]))
    return 4 * int(text["num_attention_heads"]) * int(text["global_head_dim" if full else "head_dim"]) * keys


def flops(text: dict[str, Any], tokens: int, wanted: int, skip: bool) -> tuple[int, int]:
    """Count the operations of a prefill, position by position: in matrices, and in attention."""
    matrices, attention = 2 * wanted * text["vocab_size"] * text["hidden_size"], 0
    for index in range(text["num_hidden_layers"]):
        kv, rest = row_macs(text, index)
        for position in range(tokens):
            goes_through = not skip or index < last_writer(text) or position >= tokens - wanted
            if goes_through or index == last_writer(text):
                matrices += 2 * kv
            if goes_through:
                matrices += 2 * rest
                attention += query_flops(text, index, position)
    return matrices, attention


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_flops_are_the_sum_over_positions(size: str, skip: bool) -> None:
    text, plan = raw_config(size)["text_config"], plan_of(size)
    for tokens, wanted in ((1, 1), (5, 0), (600, 1), (600, 600), (1100, 7), (1100, 800)):
        matrices, attention = flops(text, tokens, wanted, skip)
        assert plan.flops(tokens, wanted, skip, attention=False) == matrices
        assert plan.flops(tokens, wanted, skip) == matrices + attention


# GFLOP a token: all layers, head, layers up to the last writer
GFLOP = {"E2B": (3.754, 0.805, 1.140), "E4B": (7.946, 1.342, 4.603), "12B": (21.800, 2.013, 21.800)}
GFLOP |= {"26B-A4B": (6.167, 1.476, 6.167), "31B": (58.573, 2.819, 58.573)}


@pytest.mark.parametrize("size", SIZES)
def test_flops_a_token_are_the_published_ones(size: str) -> None:
    text, plan = raw_config(size)["text_config"], plan_of(size)
    layers, head, owners = GFLOP[size]
    assert plan.flops(1, 0, skip_rows=False, attention=False) / 1e9 == pytest.approx(layers, abs=5e-4)
    assert (plan.flops(1, 1, attention=False) - plan.flops(1, 0, skip_rows=False, attention=False)) / 1e9 == pytest.approx(
        head, abs=5e-4
    )
    # The published shortcut passes whole rows through the last writer; here an unwanted row stops there after keys and values.
    stopped = 2 * row_macs(text, last_writer(text))[1]
    assert (plan.flops(1, 0, attention=False) + stopped) / 1e9 == pytest.approx(owners, abs=5e-4)


@pytest.mark.parametrize(
    ("size", "gflop"),
    [
        ("E2B", (1.06, 3.88, 15.15)),
        ("E4B", (1.09, 3.91, 15.18)),
        ("12B", (2.82, 9.26, 35.03)),
        ("26B-A4B", (1.76, 5.79, 21.89)),
        ("31B", (7.05, 23.15, 87.58)),
    ],
)
def test_attention_of_one_query_costs_what_is_published(size: str, gflop: tuple[float, float, float]) -> None:
    plan = plan_of(size)

    def attention(tokens: int) -> int:
        return plan.flops(tokens, skip_rows=False) - plan.flops(tokens, skip_rows=False, attention=False)

    costs = [(attention(tokens) - attention(tokens - 1)) / 1e9 for tokens in (8192, 32768, 131072)]
    assert costs == pytest.approx(gflop, abs=6e-3)


@pytest.mark.parametrize("size", SIZES)
def test_decoding_reads_weights_once_and_the_visible_keys(size: str) -> None:
    text, plan = raw_config(size)["text_config"], plan_of(size)
    _, table, _, _, _, experts = PARAMS[size]
    ple_row = text["num_hidden_layers"] * text["hidden_size_per_layer_input"]
    idle = experts - experts // 16  # 8 of 128 experts answer
    weights = TOTALS[size] + len(plan.layers) - table - idle + ple_row + text["hidden_size"]
    assert plan.read_bytes() == 2 * weights
    assert plan.read_bytes(itemsize=0.5) == weights // 2
    # Readers read their source's keys anew; one query's attention does 4 operations a head and value of each of them.
    for tokens in (1, 100, 5000):
        keys = sum(
            query_flops(text, index, tokens - 1) // (4 * layer.heads) * 2 * layer.kv_heads
            for index, layer in enumerate(plan.layers)
        )
        assert plan.read_bytes(tokens) - plan.read_bytes() == 2 * keys
        assert plan.read_bytes(tokens, kv_itemsize=1) - plan.read_bytes() == keys


def test_a_reader_without_a_source_is_named_with_the_reason() -> None:
    raw = raw_config("E2B")
    raw["text_config"]["num_kv_shared_layers"] = 32  # leaves three sliding writers
    with pytest.raises(ConfigError) as caught:
        derive(config.read(raw))
    assert "7 problems" in caught.value.summary
    assert caught.value.problems == tuple(
        f"layer {index} is Q_ONLY (32 of 35 layers share keys and values) but no global layer before layer 3 writes keys and "
        "values for it to read"
        for index in (4, 9, 14, 19, 24, 29, 34)
    )


def test_readers_alone_are_refused_unless_they_are_a_drafter() -> None:
    raw = raw_config("E2B")
    raw["text_config"]["num_kv_shared_layers"] = 35
    with pytest.raises(ConfigError, match="35 problems") as caught:
        derive(config.read(raw))
    assert len(caught.value.problems) == 35


def test_heads_that_do_not_fit_are_named_layer_by_layer() -> None:
    raw = raw_config("31B")
    raw["text_config"] |= {"num_key_value_heads": 12, "global_head_dim": 511}
    with pytest.raises(ConfigError) as caught:
        derive(config.read(raw))
    assert "layer 0: 32 query heads can't be grouped over 12 key heads" in caught.value.problems
    assert "layer 5: head_dim 511 is odd; rotary pairs need an even one" in caught.value.problems
    assert len(caught.value.problems) == 60


def test_a_plan_without_writers_of_a_kind_says_so() -> None:
    with pytest.raises(ConfigError, match="no sliding layer writes keys and values"):
        drafter_of("E2B").last_writer(S)


def test_plan_and_config_import_the_standard_library_only() -> None:
    program = (
        "import sys; before = set(sys.modules); import gemcutter.plan, gemcutter.config;"
        "roots = {name.split('.')[0] for name in set(sys.modules) - before};"
        "print(sorted(roots - sys.stdlib_module_names - {'gemcutter'}), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[] False\n"
