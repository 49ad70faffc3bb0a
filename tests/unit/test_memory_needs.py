"""What `inspect` says that a model needs is what a load of it holds, and what a run of it takes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import gemcutter
from gemcutter import native
from gemcutter.checkpoint.convert.convert import convert
from gemcutter.checkpoint.load.held import changed_pieces
from gemcutter.checkpoint.load.match import open_checkpoint
from gemcutter.checkpoint.load.memory_needs import PANEL_BITS, panel_bits, weight_memory
from gemcutter.checkpoint.remote.hub import DEMO_FOLDER
from gemcutter.checkpoint.write.synth import SIZES, write_size
from gemcutter.cli import main
from gemcutter.loading import find_adapter
from gemcutter.plan import INT8_SCALE_BYTES
from gemcutter.quant import affine
from gemcutter.quant.cpu_layout import PANEL
from gemcutter.quant.cpu_packing import BLOCK_TYPES, cpu_layout_of
from gemcutter.quant.gguf_blocks import TYPES, Blocks
from tests.adapters import draw, places, tensors_of, write_adapter
from tests.trained import trained

ROOT = Path(__file__).parents[2]
needs_native = pytest.mark.skipif(native.missing() is not None, reason="weights stay as they are without the native kernels")


def inspect_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """Run the command with --json."""
    capsys.readouterr()
    assert main(["inspect", "--json", *words]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


# ---- weights ----


@pytest.mark.parametrize("scheme", BLOCK_TYPES)
def test_bits_of_panels_are_those_of_the_layout(scheme: str) -> None:
    kind = TYPES[scheme]
    layout = cpu_layout_of(Blocks(torch.zeros(16, kind.row_bytes(1024), dtype=torch.uint8), kind))
    assert layout is not None
    assert PANEL_BITS[scheme] == 8 * layout.panel_bytes(1024) / (PANEL * 1024)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64])
def test_bits_of_affine_panels_are_those_of_the_layout(bits: int, group: int) -> None:
    part = affine.quantize(torch.randn(16, 1024).bfloat16(), bits, group)
    layout = cpu_layout_of(part)
    assert layout is not None
    assert panel_bits(part.scheme) == 8 * layout.panel_bytes(1024) / (PANEL * 1024)


@needs_native
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("demo", {}),
        ("demo", {"quant": "q4"}),
        ("demo", {"quant": "Q8_0", "adapter": True}),
        ("demo", {"dtype": "float32", "adapter": True}),
        ("tiny-e-Q4_K_M.gguf", {}),
        ("tiny-e-Q4_0.gguf", {"quant": "q8"}),
        ("tiny-e-mlx-4bit", {"adapter": True}),
        ("tiny-e-mlx-mxfp4", {}),
        ("tiny-a", {"quant": "mlx4"}),
    ],
    ids=str,
)
def test_weights_take_what_was_foretold(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    path = DEMO_FOLDER if name == "demo" else ROOT / "tests/goldens/tiny-a" if name == "tiny-a" else trained(name)
    checkpoint = open_checkpoint(path)
    given, changed = dict(options), frozenset[Any]()
    if options.get("adapter"):
        plan = checkpoint.plan
        given["adapter"] = str(write_adapter(tmp_path / "mine", tensors_of(draw(plan, places(plan)[::3]))))
        changed = changed_pieces(find_adapter(given["adapter"], checkpoint), checkpoint)
    model = gemcutter.load(str(path), context=64, **given)
    dtype = str(model.decoder.dtype).removeprefix("torch.")
    told = weight_memory(checkpoint, dtype, "cpu", model.decoder.backend.packing, options.get("quant"), changed)
    tables = model.decoder.params["embed.ple"].nbytes if checkpoint.plan.ple_dim else 0
    held = sum(param.nbytes for param in model.decoder.params.values())
    assert told.by_rows == tables
    assert told.mapped + told.resident == pytest.approx(held - tables, rel=0.01)  # rows of 64 bytes and padded panels apart


# ---- what inspect says ----


def test_needs_follow_the_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, packed = (inspect_json(capsys, "demo", *words)["memory"] for words in ([], ["--quant", "q4"]))
    plan = open_checkpoint(DEMO_FOLDER).plan
    for row in plain["by_context"]:
        assert row["kv_bytes"] == plan.kv_bytes(row["tokens"], 2)
        weights = plain["mapped_weight_bytes"] + plain["resident_weight_bytes"]
        assert row["needs_bytes"] == weights + row["kv_bytes"] + plain["other_bytes"]
    assert plain["mapped_weight_bytes"] > 10 * plain["resident_weight_bytes"]
    assert packed["mapped_weight_bytes"] == 0
    assert packed["resident_weight_bytes"] < plain["mapped_weight_bytes"] / 2.5
    half = inspect_json(capsys, "demo", "--device", "cuda", "--kv", "fp8")["memory"]
    assert 2 * half["by_context"][0]["kv_bytes"] == plain["by_context"][0]["kv_bytes"]
    assert main(["inspect", "demo", "--kv", "fp8"]) == 2
    refused = capsys.readouterr().err
    assert "on a GPU only" in refused
    assert "use --kv int8" in refused
    scaled = inspect_json(capsys, "demo", "--kv", "int8")
    tokens = scaled["memory"]["by_context"][0]["tokens"]
    assert scaled["memory"]["by_context"][0]["kv_bytes"] == plan.kv_bytes(tokens, 1, scale_bytes=INT8_SCALE_BYTES)
    assert scaled["contexts"][0]["kv_bytes"] == plan.kv_bytes(scaled["contexts"][0]["tokens"], 1, scale_bytes=INT8_SCALE_BYTES)
    assert half["by_context"][0]["kv_bytes"] < scaled["memory"]["by_context"][0]["kv_bytes"]
    assert main(["inspect", "demo", "--device", "cuda", "--kv", "int8"]) == 2
    assert "on a GPU use kv fp8" in capsys.readouterr().err
    plan = open_checkpoint(DEMO_FOLDER).plan
    adapter = str(write_adapter(tmp_path / "mine", tensors_of(draw(plan, places(plan)))))
    merged = inspect_json(capsys, "demo", "--adapter", adapter)
    assert merged["memory"]["resident_weight_bytes"] > 10 * plain["resident_weight_bytes"]
    assert any("83 changes to merge" in note for note in merged["notes"])


def test_the_last_line_says_what_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    found = inspect_json(capsys, "demo", "--context", "1000,32768,65536")["memory"]
    assert main(["inspect", "demo", "--context", "1000,32768,65536", "--quant", "q4"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("needs about ")
    assert " at 32768 tokens: weights in memory 5.54 MB, keys and values " in last
    assert [row["tokens"] for row in found["by_context"]] == [1000, 32768, 65536]
    assert main(["inspect", "demo", "--context", "1000"]) == 0
    assert " at 1000 tokens: weights mapped from the file 17.7 MB" in capsys.readouterr().out.splitlines()[-1]


def test_kernels_and_weights_are_those_of_the_quantization(capsys: pytest.CaptureFixture[str]) -> None:
    found = inspect_json(capsys, "demo", "--quant", "q4")
    assert found["weights"]["read_whole_bytes"] == found["memory"]["resident_weight_bytes"]
    if native.missing() is None:
        assert "cpu-packed-affine4g64" in {row["stored"] for row in found["kernels"]}


@pytest.mark.parametrize("command", ["run", "inspect", "bench"])
def test_a_quantization_without_effect_is_told(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = tmp_path / "m"
    convert(DEMO_FOLDER, packed, "mlx", "q8")
    words = {"run": ["run", str(packed), "Hi", "-n", "1"], "inspect": ["inspect", str(packed)]}.get(
        command, ["bench", "--model", str(packed), "-p", "4", "-n", "1", "-r", "1"]
    )
    assert main([*words, "--quant", "q4"]) == 0
    shown = "".join(capsys.readouterr())
    assert "quant q4 has no effect: all matrices (affine8g64) are packed in the file already" in " ".join(shown.split())
    assert main(words) == 0
    assert "has no effect" not in "".join(capsys.readouterr())


# ---- what a run takes ----

RUN = """
import json, sys
import torch
import gemcutter
from gemcutter.benchmark.memory import peak_rss_bytes
torch.set_num_threads(1)
model = gemcutter.load(sys.argv[1], max_num_seqs=1, prefix_cache_bytes=0, **json.loads(sys.argv[2]))
model.generate([[20 + index * 37 % 4000 for index in range(600)]], max_tokens=4, ignore_eos=True, temperature=0)
print(peak_rss_bytes())
"""


@pytest.mark.slow
@needs_native
@pytest.mark.parametrize("quant", [None, "q4"])
@pytest.mark.parametrize("like", ["demo", "E2B", "26B-A4B"])
def test_a_run_takes_what_was_foretold(like: str, quant: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = "demo"
    if like != "demo":  # the size's own widths; fewer layers, experts and tokens, so that it fits a test
        size = SIZES[like]
        fewer = {"layers": 5, "period": 5, "readers": 0} if like == "E2B" else {"layers": 2, "period": 2, "experts": 16}
        write_size(replace(size, **fewer, vocab=4096), tmp_path / "m")
        model = str(tmp_path / "m")
    told = inspect_json(capsys, model, "--context", "604", *(["--quant", quant] if quant else []))["memory"]
    given = json.dumps({"quant": quant} if quant else {})
    command = [sys.executable, "-c", RUN, model, given]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    # Mapped experts that no row has chosen are never read, so a run of two layers may take less than it could.
    slack = 0.25 if like == "26B-A4B" and quant is None else 0.15
    needs, took = told["by_context"][0]["needs_bytes"], int(done.stdout)
    assert 0.85 * took <= needs <= (1 + slack) * took
