"""The comparison with other engines and the chart of contexts: files, turns, tables. No speed is tested."""

from __future__ import annotations

import struct
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import adapters, busy, contexts, op_shares, peers, ratios
from bench.engines.state import grow
from bench.synthetic import write_model
from gemcutter import native
from gemcutter.benchmark.harness import BenchCase
from gemcutter.benchmark.synthetic import plan_of
from gemcutter.benchmark.target import from_file
from gemcutter.checkpoint.load.match import open_checkpoint
from gemcutter.load_options import LoadOptions
from gemcutter.plan import ModelPlan

ROOT = Path(__file__).parents[2]
MACHINE = {"cpu": "AMD EPYC (Zen 3)", "cores": 2, "features": ["avx2"]}


def row(test: str, tok_s: float, tokens: int, **more: Any) -> dict[str, Any]:
    return {"test": test, "tok_s": tok_s, "tok_s_min": tok_s, "tok_s_max": tok_s, "tokens": tokens, **more}


def outcome(version: str, *rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"about": {"version": version}, "peak_bytes": 2_000_000_000, "rows": list(rows), "problems": {}, **more}


def comparison(model: str = "E2B") -> dict[str, Any]:
    ours = outcome(
        "1.0",
        row("pp512", 300.0, 512, ceiling_tok_s=400.0, share=0.75),
        row("tg64@d16384", 18.0, 64, ceiling_tok_s=20.0, share=0.9),
        about={"version": "1.0", "weight_bytes": 1_400_000_000},
    )
    return {
        "model": model,
        "quant": "q4_0",
        "layers": 35,
        "threads": 2,
        "rates": {"read_bytes_per_s": 32e9},
        "first_token_s": 1.25,
        "first_text_s": 1.5,
        "engines": {
            "gemcutter": ours,
            "llama.cpp": outcome("0.3", row("pp512", 25.0, 512), row("tg64@d16384", 12.0, 64)),
            "transformers bfloat16": outcome("5.0", row("pp512", 10.0, 100)),
            "mlx-lm": outcome("", problems={"": "No module named 'mlx'"}),
        },
    }


# ---- results and the table ----


def test_a_result_joins_those_of_its_day_and_machine_and_replaces_its_like(tmp_path: Path) -> None:
    first = ratios.keep(comparison(), MACHINE, "2026-01-05", tmp_path)
    assert first.name == "2026-01-05-amd-epyc-zen-3-2-cores.json"
    ratios.keep(comparison("E4B"), MACHINE, "2026-01-05", tmp_path)
    ratios.keep(comparison() | {"rates": {"read_bytes_per_s": 1.0}}, MACHINE, "2026-01-05", tmp_path)
    ratios.keep(comparison("12B"), MACHINE, "2025-12-31", tmp_path)
    (tmp_path / "contexts-2027-01-01-x.json").write_text("{}")
    ratios.keep(comparison("31B"), MACHINE | {"features": ["avx2", "amx_int8"]}, "2025-11-30", tmp_path)  # of another kind
    newest, other = ratios.newest(tmp_path)
    assert [(run["model"], run["date"], run["rates"]["read_bytes_per_s"]) for run in newest["runs"]] == [
        ("E4B", "2026-01-05", 32e9),
        ("E2B", "2026-01-05", 1.0),
        ("12B", "2025-12-31", 32e9),
    ]
    assert [run["model"] for run in other["runs"]] == ["31B"]
    assert ratios.newest(tmp_path / "nowhere") == []


def test_the_table_has_a_row_a_test_and_a_column_an_engine() -> None:
    lines = ratios.table(comparison() | {"date": "2026-01-05"}).splitlines()
    assert lines[0] == "**E2B, q4_0, 2 threads** (2026-01-05)"
    assert ratios.table(comparison()).splitlines() == ["**E2B, q4_0, 2 threads**", *lines[1:]]
    assert lines[2:] == [
        "| | gemcutter | ceiling | share | llama.cpp | transformers bfloat16 |",
        "|---|---|---|---|---|---|",
        "| prompt of 512 tokens | 300 | 400 | 75% | 25.0 (12x) | 10.0 (30x, of 100 tokens) |",
        "| reply of 64 tokens after 16384 | 18.0 | 20.0 | 90% | 12.0 (1.5x) | - |",
        "",
        "The machine reads 32.0 GB/s. gemcutter's peak memory is 2,000 MB: 1,400 MB of weights, and 600 MB for all else, Python "
        "and torch included. From a cold process, with the file in the page cache, to the first token: 1.25 s; to its text: "
        "1.50 s. Versions: gemcutter 1.0, llama.cpp 0.3, transformers bfloat16 5.0. "
        "Not measured: mlx-lm (No module named 'mlx').",
    ]


def test_the_readme_shows_the_newest_result() -> None:
    shown = ratios.README.read_text().partition(ratios.BEGIN)[2].partition(ratios.END)
    assert shown[1], "the README has lost its markers"
    assert shown[0].strip() == ratios.blocks(ratios.newest())


# ---- shares of ops ----


def test_an_op_is_compared_with_the_longer_of_its_floors() -> None:
    peaks = {"float32": 10.0, "bfloat16": 20.0, "int8": 50.0}
    read = op_shares.measure(op_shares.Op("product, q4_0, 1 rows", 100.0, 1000.0, lambda: None), "avx2", peaks, 100.0)
    assert (read["floor_ms"], read["limit"]) == (10_000.0, "memory")
    computed = op_shares.measure(op_shares.Op("product, q4_0, 9 rows", 1000.0, 1000.0, lambda: None), "avx2", peaks, 100.0)
    assert (computed["floor_ms"], computed["limit"]) == (20_000.0, "int8 products")
    dense = op_shares.measure(op_shares.Op("attention, global, 9 rows of 9", 1000.0, 1.0, lambda: None), "avx2", peaks, 100.0)
    assert (dense["floor_ms"], dense["limit"]) == (50_000.0, "bfloat16 products")


@pytest.mark.skipif(native.missing() is not None, reason="measures the native kernels")
def test_the_ops_whose_shares_are_measured_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op_shares, "STREAMED_BYTES", 1)
    for quant in op_shares.QUANTS:
        for op in op_shares.product_ops("tiny:E2B", quant):
            op.work()
    model = op_shares.plan_of("tiny:E2B")
    for layer in model.layers[:6]:
        found = op_shares.attention_op(model, layer, 64, 8).work()
        assert isinstance(found, torch.Tensor)
        assert found.isfinite().all()


# ---- turns ----

WORKER = """
import sys, time
sys.path.insert(0, {engines!r})
from turns import serve

def load():
    {load}
    def run(kind, tokens, depth):
        {run}
    return run, {{"version": "7"}}

serve(load)
"""


def engine(tmp_path: Path, name: str, run: str = "return tokens / 100", load: str = "print('noise')") -> peers.Engine:
    script = tmp_path / f"{name}.py"
    script.write_text(WORKER.format(engines=str(ROOT / "bench" / "engines"), load=load, run=run))
    return peers.Engine(name, str(script), ())


@pytest.mark.parametrize("serial", [False, True])
def test_engines_take_turns_and_slow_ones_get_fewer_tokens(tmp_path: Path, serial: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "REST_S", 0)
    fast, slow = engine(tmp_path, "fast"), engine(tmp_path, "slow", run="return tokens / 2.0")
    peers.compare([fast, slow], [BenchCase("pp", 500), BenchCase("tg", 8, 9)], rounds=2, budget_s=50, serial=serial)
    assert fast.as_object()["rows"] == [row("pp500", 100.0, 500), row("tg8@d9", 100.0, 8)]
    assert slow.as_object()["rows"] == [row("pp500", 2.0, 100), row("tg8@d9", 2.0, 8)]
    assert fast.speeds["pp500"] == [100.0, 100.0]
    assert fast.about["version"] == "7"
    assert fast.peak_bytes is None or fast.peak_bytes > 1e6


def test_what_fails_is_named_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "REST_S", 0)
    absent = engine(tmp_path, "absent", load="import no_such_engine")
    broken = engine(tmp_path, "broken", run="raise SystemExit('its last words')")
    partial = engine(tmp_path, "partial", run="if depth: raise NotImplementedError('short contexts only')\n        return 1.0")
    late = engine(tmp_path, "late", run="time.sleep(60)")
    fine = engine(tmp_path, "fine")
    peers.compare([absent, broken, partial, late, fine], [BenchCase("pp", 70), BenchCase("pp", 70, 5)], 1, 1.0, serial=False)
    assert absent.problems == {"": "ModuleNotFoundError: No module named 'no_such_engine'"}
    assert broken.problems == {"": "pp70 with 64 tokens: its last words"}
    assert partial.problems == {"pp70@d5": "pp70@d5 with 64 tokens: short contexts only"}
    assert late.problems == {"": "pp70 with 64 tokens: no answer within 1 s"}
    assert list(partial.speeds) == ["pp70"]
    assert list(fine.speeds) == ["pp70", "pp70@d5"]


def test_our_own_engine_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "REST_S", 0)
    write_model(tmp_path / "tiny.gguf", "tiny:E2B", "q4_0")
    ours = peers.Engine("gemcutter", "run_gemcutter.py", (str(tmp_path / "tiny.gguf"), "1"))
    peers.compare([ours], [BenchCase("tg", 4)], 1, 5.0, serial=False)
    assert not ours.problems
    assert "Q4_0" in ours.about["quant"]
    assert ours.speeds["tg4"][0] > 0


def test_a_busy_machine_is_compared_with_the_idle_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "REST_S", 0)
    monkeypatch.setattr(busy, "SETTLE_S", 0)
    running = list[int]()
    start = busy.busy

    def noted(processes: int) -> Any:
        running.append(processes)
        return start(processes)

    monkeypatch.setattr(busy, "busy", noted)
    engines = [engine(tmp_path, "gemcutter"), engine(tmp_path, "absent", load="import no_such_engine")]
    tests = [BenchCase("tg", 8)]
    rows = busy.rows_of(busy.compare(engines, tests, [0, 2], 2, 50.0), tests)
    assert running == [0, 2, 0, 2]
    assert [(each["busy"], each["engine"], each["tok_s"], each["share"]) for each in rows] == [
        (0, "gemcutter", 100.0, 1.0),
        (2, "gemcutter", 100.0, 1.0),
    ]
    shown = busy.table({"rows": rows, "cores": 2, "threads": 2})
    assert "| tg8 | 2 | 0.50x | 100 (1.00x) |" in shown


# ---- files for other engines ----


@pytest.mark.parametrize(("preset", "quant"), [("tiny:E2B", "q4_0"), ("tiny:26B-A4B", "q8_0"), ("tiny:12B", "bf16")])
def test_a_synthetic_file_is_the_preset(preset: str, quant: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_model(path, preset, quant)
    assert open_checkpoint(path).plan.layers == plan_of(preset).layers
    logits = from_file(LoadOptions(model=str(path))).decoder
    assert logits.plan.vocab == plan_of(preset).vocab
    assert [found.name for found in tmp_path.iterdir()] == ["model.gguf"]


def state(cells: int, layers: int, row_bytes: int) -> bytes:
    """Format one cache of a saved state; byte i of a row is i, plus 16 for every row."""
    found = struct.pack("<II", 1, cells)
    for position in range(cells):
        found += struct.pack("<III", position, 1, 0)
    found += struct.pack("<II", 0, layers)
    rows = bytes(16 * row + i for row in range(cells) for i in range(row_bytes))
    return found + (struct.pack("<IQ", 1, row_bytes) + rows) * (2 * layers)


def test_a_state_grows_to_any_depth_and_windows_stay() -> None:
    seed = b"12345678" + state(2, 1, 4) + state(2, 3, 2)
    assert grow(seed, 2, 8) == seed
    grown = grow(seed, 5, 3)
    rows = bytes(16 * row + i for row in (0, 1, 0, 1, 0) for i in range(4))
    assert grown[: 8 + 8] == b"12345678" + struct.pack("<II", 1, 5)
    assert rows in grown
    windowed = grown[8 + 8 + 5 * 12 + 8 + 2 * (12 + len(rows)) :]
    positions = struct.unpack_from("<" + "III" * 3, windowed, 8)
    assert (struct.unpack_from("<II", windowed), positions[::3]) == ((1, 3), (2, 3, 4))
    assert len(windowed) == 8 + 3 * 12 + 8 + 6 * (12 + 3 * 2)


@pytest.mark.parametrize("change", [b"more", None])
def test_a_state_of_another_layout_is_refused(change: bytes | None) -> None:
    seed = b"12345678" + state(2, 1, 4) + state(2, 3, 2)
    with pytest.raises(NotImplementedError, match="another layout"):
        grow(seed[:-40] if change is None else seed + change, 5, 3)


# ---- the chart ----


def test_the_chart_shows_every_context_and_both_lines() -> None:
    rows = [{"depth": depth, "tok_s": 1e3 / ms, "ceiling_tok_s": 1e3 / (ms - 5)} for depth, ms in ((0, 50.0), (65536, 75.5))]
    found = {
        "model": "E<2>B",
        "quant": "q4_0",
        "threads": 2,
        "machine": MACHINE,
        "rates": {"read_bytes_per_s": 32e9},
        "rows": rows,
    }
    tree = ElementTree.fromstring(contexts.draw(found, "2026-01-05"))
    words = [node.text for node in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert {"0", "64k", "50.0", "75.5", "80", "gemcutter"} <= set(words)
    lines = {node.get("class"): node for node in tree.iter("{http://www.w3.org/2000/svg}polyline")}
    assert lines.keys() == {"ours", "floor"}
    for node in tree.iter("{http://www.w3.org/2000/svg}circle"):
        assert 0 < float(node.attrib["cx"]) < contexts.WIDTH
        assert 0 < float(node.attrib["cy"]) < contexts.HEIGHT


@pytest.mark.parametrize(
    ("rough", "step"), [(0.03, 0.1), (0.4, 0.5), (1.0, 1.0), (3.3, 5.0), (7.0, 10.0), (10.0, 10.0), (120, 200)]
)
def test_steps_are_round(rough: float, step: float) -> None:
    assert contexts.nice_step(rough) == step


# ---- adapters ----


def test_requests_with_an_adapter_are_measured_beside_those_without(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--preset", "tiny:E2B", "--layers", "5", "--rank", "3", "-p", "20", "-n", "2", "-r", "1", "-t", "1"]
    assert adapters.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["reply of 2"] * 3 + ["prompt of 20"] * 3
    assert adapters.main(["--preset", "E3B"]) == 1


def test_the_drawn_adapter_changes_every_matrix_of_the_layers() -> None:
    plan = plan_of("tiny:26B-A4B", 6)
    deltas = adapters.draw_adapter(plan, 3, wide=True)
    stacks = {spec.name for spec in plan.params() if len(spec.shape) == 3}
    matrices = {spec.name for spec in plan.params() if len(spec.shape) == 2 and spec.name.startswith("layers.")}
    assert deltas.keys() == matrices - stacks
    assert all(sum(len(delta.up) for delta in found) == spec_rows(plan, name) for name, found in deltas.items())


def spec_rows(plan: ModelPlan, name: str) -> int:
    return next(spec.shape[0] for spec in plan.params() if spec.name == name)
