"""`gemcutter inspect`: what it says is what the plan says, for every kind of checkpoint, and at once."""

from __future__ import annotations

import json
import resource
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gemcutter import config as configs
from gemcutter.checkpoint.formats import hf
from gemcutter.checkpoint.load.match import open_checkpoint
from gemcutter.checkpoint.remote.hub import DEMO_FOLDER
from gemcutter.checkpoint.write import synth
from gemcutter.cli import main
from gemcutter.ops import OPS
from gemcutter.param_spec import ParamSpec
from gemcutter.plan import ModelPlan, derive


def inspect_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """Run the command with --json; stdout must hold that one object."""
    assert main(["inspect", "--json", *words]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def write_sparse(folder: Path, raw: dict[str, Any], extra: dict[str, tuple[int, ...]] | None = None) -> ModelPlan:
    """Write a checkpoint whose header is whole and whose data is a hole in the file, BF16 throughout."""
    plan = derive(configs.read(raw))
    shapes = dict(stored for spec in plan.params() for stored in stored_parts(spec)) | (extra or {})
    header, end = dict[str, Any](), 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * elements(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(raw))
    return plan


def stored_parts(spec: ParamSpec) -> list[tuple[str, tuple[int, ...]]]:
    """List a parameter's tensors as checkpoints store them."""
    if not spec.parts or len(spec.shape) == 3:
        return [(hf.spell(spec.name, None), spec.shape)]
    return [(hf.spell(spec.name, part), (rows, spec.shape[-1])) for part, rows in spec.parts]


def elements(shape: tuple[int, ...]) -> int:
    """Multiply the sizes."""
    product = 1
    for size in shape:
        product *= size
    return product


def test_the_demo_from_end_to_end(capsys: pytest.CaptureFixture[str]) -> None:
    found = inspect_json(capsys, "demo", "--context", "100,4096")
    plan = open_checkpoint(DEMO_FOLDER).plan
    assert found["format"] == hf.NAME
    assert found["file_bytes"] == sum(spec.elements for spec in plan.params()) * 2
    assert found["first_reader"] == 6
    assert [row["kv_source"] for row in found["layers"]] == ["own"] * 6 + [5, 5, 5, 4]
    assert [row["projection"] for row in found["layers"]] == ["qkv"] * 6 + ["q"] * 4
    assert found["layers"][9] == {
        "index": 9,
        "attention": "global",
        "projection": "q",
        "kv_source": 4,
        "window": None,
        "heads": 4,
        "kv_heads": 1,
        "head_dim": 128,
        "mlp_width": 1024,
        "experts": None,
        "ple_dim": 64,
        "bytes": 2 * sum(spec.elements for spec in plan.params() if spec.name.startswith("layers.9.")),
    }
    counts = found["parameters"]
    assert counts["total"] == plan.num_params() == sum(counts.values()) - counts["total"]
    assert counts["per_layer_embedding"] == 4096 * 10 * 64
    short, long = found["contexts"]
    assert short["tokens"] == 100
    assert long == {
        "tokens": 4096,
        "kv_bytes": plan.kv_bytes(4096, 2),
        "read_bytes_per_token": plan.read_bytes(4096, 2, 2),
        "prefill_flops": plan.flops(4096),
        "prefill_flops_all_rows": plan.flops(4096, skip_rows=False),
    }
    assert long["prefill_flops"] < long["prefill_flops_all_rows"]
    assert found["skipped"] == {"tensors": 0, "bytes": 0}


def test_bytes_follow_the_compute_dtype(capsys: pytest.CaptureFixture[str]) -> None:
    narrow, wide = (inspect_json(capsys, "demo", "--dtype", name, "--context", "4096") for name in ("bfloat16", "float32"))
    assert wide["contexts"][0]["kv_bytes"] == 2 * narrow["contexts"][0]["kv_bytes"]
    assert wide["weights"] == narrow["weights"]  # mapped as they are stored
    gpu = inspect_json(capsys, "demo", "--dtype", "float32", "--device", "cuda:0")
    assert gpu["weights"]["bytes"] == 2 * narrow["weights"]["bytes"]


def test_kernels_come_with_the_reasons_against_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    kernels = {row["op"]: row for row in inspect_json(capsys, "demo", "--kernels", "reference")["kernels"]}
    assert kernels.keys() == {*OPS}
    assert kernels["attention"]["kernel"] == "reference"
    assert [refusal["kernel"] for refusal in kernels["attention"]["refusals"]] == ["native", "triton", "torch"]
    assert kernels["attention"]["refusals"][0]["reason"]
    assert main(["inspect", "demo", "--kernels", "reference"]) == 0
    assert kernels["attention"]["refusals"][0]["reason"] in capsys.readouterr().out


def test_the_tables_show_every_layer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "demo"]) == 0
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines() if line.lstrip()[:1].isdigit()]
    assert rows[5][:6] == ["5", "sliding", "64", "q", "k", "v"]
    assert rows[9][:6] == ["9", "global", "all", "q", "layer", "4"]
    assert rows[10][0] == "4096"
    assert "11.48 M" in shown


def test_redundant_tensors_and_towers_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = synth.spell_config(synth.shrink(synth.SIZES["E2B"]))
    reader = raw["num_hidden_layers"] - 1
    extra = {f"model.layers.{reader}.self_attn.k_norm.weight": (32,), "model.vision_tower.patch.weight": (8, 8)}
    write_sparse(tmp_path, raw, extra)
    found = inspect_json(capsys, str(tmp_path))
    assert found["skipped"] == {"tensors": 1, "bytes": 64}
    assert found["left_aside"] == {"vision tower": {"tensors": 1, "bytes": 128}}
    assert len(found["notes"]) == 2
    assert main(["inspect", str(tmp_path)]) == 0
    assert all(note in capsys.readouterr().out for note in found["notes"][:1])
    extra = {"model.layers.0.self_attn.foo.weight": (4,)}
    write_sparse(tmp_path, raw, extra)
    assert main(["inspect", str(tmp_path)]) == 1
    assert "unknown    model.safetensors:model.layers.0.self_attn.foo.weight" in capsys.readouterr().err
    assert inspect_json(capsys, str(tmp_path), "--ignore", "*.foo.weight")["ignored"]["tensors"] == 1


def test_towers_of_the_config_are_sized_and_bad_ones_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = synth.spell_config(synth.shrink(synth.SIZES["E2B"]))
    towers = {"vision_config": {"num_hidden_layers": 2, "standardize": True}, "audio_config": {"hidden_size": "wide"}}
    write_sparse(tmp_path, {"model_type": "gemma4", "text_config": text} | towers)
    found = inspect_json(capsys, str(tmp_path))["towers"]
    layers = 2 * (4 * 768 * 768 + 3 * 768 * 3072 + 4 * 768 + 2 * 64)
    parameters = layers + 768 * 768 + 2 * 10240 * 768 + 768 * text["hidden_size"]
    sizes = {"layers": 2, "hidden": 768, "parameters": parameters, "bfloat16_bytes": 2 * (parameters + 2 * 768)}
    assert found["vision"] == sizes
    assert found["audio"]["problems"][0].startswith("audio_config.hidden_size: expected an integer")
    assert main(["inspect", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "2 layers, hidden 768" in shown
    assert "the files hold none of its tensors" in shown
    assert "would not load: audio_config.hidden_size: expected an integer" in shown
    assert inspect_json(capsys, "demo")["towers"] == {}


def test_a_drafter_can_be_inspected_but_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = json.loads((DEMO_FOLDER / "config.json").read_text()) | {
        "num_hidden_layers": 2,
        "layer_types": [configs.SLIDING, configs.FULL],
        "num_kv_shared_layers": 2,
        "per_layer_config": {"1": {"head_dim": 128}},
        "hidden_size_per_layer_input": 0,
        "use_double_wide_mlp": False,
    }
    raw = {"model_type": "gemma4_assistant", "backbone_hidden_size": 512, "text_config": text, "dtype": "bfloat16"}
    write_sparse(tmp_path, raw)
    found = inspect_json(capsys, str(tmp_path), "--context", "64")
    assert found["is_drafter"]
    assert [row["kv_source"] for row in found["layers"]] == ["target", "target"]
    assert found["contexts"][0]["kv_bytes"] == 0
    assert found["contexts"][0]["prefill_flops"] is None
    assert main(["inspect", str(tmp_path)]) == 0
    assert "drafter" in capsys.readouterr().out
    assert main(["run", str(tmp_path), "Hi"]) == 1
    assert "assistant" in capsys.readouterr().err


def test_a_dtype_that_cannot_compute_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sparse(tmp_path, synth.spell_config(synth.shrink(synth.SIZES["12B"])) | {"dtype": "float16"})
    assert inspect_json(capsys, str(tmp_path))["compute_dtype"] == "bfloat16"
    assert inspect_json(capsys, str(tmp_path), "--dtype", "f32")["compute_dtype"] == "float32"
    assert main(["inspect", str(tmp_path), "--dtype", "float16"]) != 0
    assert "exceed its range" in capsys.readouterr().err


def test_a_context_beyond_the_models_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "demo", "--context", "200000"]) == 1
    assert "131072 tokens at most" in capsys.readouterr().err


def test_sixty_gigabytes_take_a_moment(tmp_path: Path) -> None:
    plan = write_sparse(tmp_path, synth.spell_config(synth.SIZES["31B"]))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "gemcutter.cli", "inspect", "--json", str(tmp_path)], capture_output=True, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert json.loads(done.stdout)["parameters"]["total"] == plan.num_params() > 30e9
    # CPU seconds, which a busy machine stretches less than the clock: 0.4 to 1.6, and ten times as many to read all bytes
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 6
