"""Merged checkpoints: what `convert` writes with an adapter is what PEFT merges, and what loading with the adapter computes.

Owns merging into files, and quantizing what was merged, both ways. Refuses to judge how adapters are read: `test_lora.py`.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gemcutter
from gemcutter.checkpoint.container.source import Source
from gemcutter.checkpoint.convert.convert import convert
from gemcutter.checkpoint.formats.lora import open_adapter
from gemcutter.checkpoint.load.match import open_checkpoint
from gemcutter.checkpoint.remote.hub import DEMO_FOLDER
from gemcutter.checkpoint.write.atomic_replace import MANIFEST
from gemcutter.cli import main
from gemcutter.cli.terminal import spell_bytes
from gemcutter.errors import CheckpointError
from gemcutter.quant import Weight, dequantize
from tests.adapters import PREFIX, draw, places, tensors_of, write_adapter
from tests.formats.test_convert import contents
from tests.formats.web import cut_off, serve
from tests.parity.test_round_trip import saved
from tests.topologies import SIZES, build_oracle
from tests.trained import golden, trained

ROOT = Path(__file__).parents[2]
TINY_A = ROOT / "tests" / "goldens" / "tiny-a"


@pytest.fixture(name="adapter", scope="module")
def _adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write an adapter of every matrix of the demo."""
    plan = open_checkpoint(DEMO_FOLDER).plan
    return write_adapter(tmp_path_factory.mktemp("adapter") / "mine", tensors_of(draw(plan, places(plan))))


def values(path: Path) -> dict[str, Tensor]:
    """Return every stored tensor in float32."""
    return {name: tensor.torch().float() for name, tensor in Source.open(path).tensors.items()}


# ---- against PEFT ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", ["E2B", "26B-A4B", "31B"])
def test_what_is_written_is_what_peft_merges(size: str, dtype: torch.dtype, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = build_oracle(SIZES[size], seed=7).to(dtype)
    base = saved(copy.deepcopy(model), tmp_path / "base")
    config = peft.LoraConfig(
        r=3,
        lora_alpha=7,
        target_modules=r".*layers\.\d+\..*(proj|gate|projection)$",
        target_parameters=["experts.gate_up_proj", "experts.down_proj"] if size == "26B-A4B" else None,
        rank_pattern={"down_proj": 2},
    )
    wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, 0.0, 0.2, generator=generator)
    wrapped.save_pretrained(tmp_path / "adapter")
    report = convert(base, tmp_path / "ours", "hf", adapter=tmp_path / "adapter")
    theirs = values(saved(wrapped.merge_and_unload(), tmp_path / "theirs"))
    ours, before = values(tmp_path / "ours"), values(base)
    assert ours.keys() == before.keys() == theirs.keys()
    assert report.deeds["merged"] == sum(not torch.equal(ours[name], before[name]) for name in ours) > 10
    step = torch.finfo(dtype).eps
    for name, wanted in theirs.items():  # theirs rounds the change to the dtype, ours rounds the sum once
        change = (wanted - before[name]).abs()
        slack = step * (wanted.abs() + 2 * change) + (1e-5 if dtype == torch.float32 else step) * change.max()
        assert bool(((ours[name] - wanted).abs() <= slack).all()), name


@pytest.mark.parametrize(("to", "name"), [("hf", "m"), ("mlx", "m"), ("gguf", "m.gguf")])
def test_merged_files_say_what_the_adapted_model_says(to: str, name: str, tmp_path: Path) -> None:
    path, wanted = trained("tiny-e-lora"), golden("tiny-e-lora")
    convert(DEMO_FOLDER, tmp_path / name, to, adapter=path)
    model = gemcutter.load(str(tmp_path / name), dtype="float32", context=1024)
    ids = [each["token_ids"] for each in wanted["prompts"]]
    found = model.generate(ids, max_tokens=12, ignore_eos=True, temperature=0, suppress=())
    same = [
        list(mine.tokens) == theirs["greedy_ids"][:12] for mine, theirs in zip(found, wanted["prompts"], strict=True)
    ]  # weights are rounded to bfloat16 once more than in the golden run, which may turn a close call
    assert sum(same) >= len(same) - 1
    (whole,) = model.generate([golden("prompts")["passage_600"]["token_ids"]], max_tokens=0, prompt_logprobs=0)
    mean = -sum(entry.logprob for entry in whole.prompt.logprobs) / len(whole.prompt.logprobs)
    assert mean == pytest.approx(wanted["passage_600"]["nll_mean"], abs=2e-3)


# ---- merged, then quantized ----


def parameters(model: str, **options: Any) -> dict[str, Weight | Tensor]:
    """Load a model and return its parameters."""
    return dict(gemcutter.load(model, context=64, **options).decoder.params)


@pytest.mark.parametrize("quant", ["q4", "q8", "mlx4", "Q4_0"])
def test_quantizing_at_load_is_quantizing_in_a_file(quant: str, adapter: Path, tmp_path: Path) -> None:
    to, name = ("gguf", "m.gguf") if quant == "Q4_0" else ("mlx", "m")
    convert(DEMO_FOLDER, tmp_path / name, to, quant, adapter=adapter)
    ours, written = parameters("demo", quant=quant, adapter=str(adapter)), parameters(str(tmp_path / name))
    plain = parameters("demo", quant=quant)
    for key, param in ours.items():
        wanted = written[key]
        if isinstance(param, Tensor) or isinstance(wanted, Tensor):
            assert torch.equal(param, wanted)  # type: ignore[arg-type]
            continue
        found, base = param, plain[key]
        assert isinstance(base, Weight)
        assert (found.nbytes, found.stored) == (base.nbytes, base.stored), key  # nothing is held wider than without an adapter
        if key == "embed.ple":
            continue  # loading leaves the table as it is
        for mine, theirs in zip(found.parts, wanted.parts, strict=True):
            assert torch.equal(dequantize(mine), dequantize(theirs)), key


def test_experts_are_quantized_once_they_are_merged(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(TINY_A)
    moe, hidden = checkpoint.plan.layers[0].moe, checkpoint.plan.hidden
    assert moe is not None
    generator = torch.Generator().manual_seed(0)
    shapes = {"experts.base_layer": (2 * moe.width, hidden), "experts": (hidden, moe.width)}
    tensors = {}
    for module, (rows, columns) in shapes.items():
        tensors[f"{PREFIX}model.layers.0.{module}.lora_A.weight"] = torch.randn(3 * moe.experts, columns, generator=generator)
        tensors[f"{PREFIX}model.layers.0.{module}.lora_B.weight"] = torch.randn(rows, 3 * moe.experts, generator=generator) / 9
    path = write_adapter(tmp_path / "adapter", tensors)
    convert(TINY_A, tmp_path / "m", "mlx", "q4", adapter=path)
    ours, written, base = (
        parameters(str(TINY_A), quant="q4", adapter=str(path)),
        parameters(str(tmp_path / "m")),
        parameters(str(TINY_A), quant="q4"),
    )
    for key in ("layers.0.moe.in", "layers.0.moe.out", "layers.1.moe.in"):
        mine, theirs, plain = (torch.cat([dequantize(part) for part in each[key].parts], 1) for each in (ours, written, base))  # type: ignore[union-attr]
        assert torch.equal(mine, theirs), key
        assert torch.equal(mine, plain) == (key == "layers.1.moe.in")


PEAK = """
import sys, torch
import gemcutter
from gemcutter.benchmark.memory import forget_peak, peak_rss_bytes
torch.set_num_threads(1)
gemcutter.load("demo", context=64)
forget_peak()
before = peak_rss_bytes()
gemcutter.load(sys.argv[1], context=64, quant="q4", adapter=sys.argv[2] or None)
print(peak_rss_bytes() - before)
"""


@pytest.mark.slow
def test_merging_before_quantizing_takes_no_memory_for_a_dense_model(tmp_path: Path) -> None:
    from gemcutter.checkpoint.write import synth

    size = synth.Size(2048, 8192, 8, 4, 8, 1, window=64, context=4096, media_blocks=None, vocab=4096)
    synth.write_size(size, tmp_path / "base")
    plan = open_checkpoint(tmp_path / "base").plan
    path = write_adapter(tmp_path / "adapter", tensors_of(draw(plan, places(plan))))
    peaks = []
    for adapter in ("", str(path)):
        command = [sys.executable, "-c", PEAK, str(tmp_path / "base"), adapter]
        peaks.append(int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout))
    dense = sum(2 * spec.elements for spec in plan.params())
    assert peaks[1] < peaks[0] + 0.1 * dense


# ---- bases that are quantized already ----


def test_a_quantized_base_needs_a_word_on_what_shall_become_of_it(adapter: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    convert(DEMO_FOLDER, base, "mlx", "mlx8")
    with pytest.raises(CheckpointError, match=r"is quantized.*--quant q4 or q8.*--quant bf16"):
        convert(base, tmp_path / "out", "mlx", adapter=adapter)
    dense = convert(base, tmp_path / "dense", "mlx", "bf16", adapter=adapter)
    assert dense.deeds["merged and dequantized"] > 80
    again = convert(base, tmp_path / "again", "mlx", "mlx4", adapter=adapter)
    assert again.deeds["merged and requantized"] > 80
    assert any("quantized already" in note for note in again.notes())
    merged, base_values = contents(tmp_path / "dense"), open_checkpoint(base)
    (piece,) = base_values.matched.pieces["layers.0.mlp.out"]
    (change,) = (each for each in open_adapter(adapter, base_values.plan).factors if each.name == "layers.0.mlp.out")
    exact = piece.data.build().dequantize() + change.scale * change.up.torch().float() @ change.down.torch().float()  # type: ignore[union-attr]
    found = torch.frombuffer(bytearray(merged["model.layers.0.mlp.down_proj.weight"][2]), dtype=torch.bfloat16).view(exact.shape)
    torch.testing.assert_close(found.float(), exact, rtol=0.005, atol=1e-4)


# ---- what is said of it ----


def test_the_manifest_names_the_adapter_and_every_change(adapter: Path, tmp_path: Path) -> None:
    convert(DEMO_FOLDER, tmp_path / "m", "mlx", "q4", adapter=adapter)
    found = json.loads((tmp_path / "m" / MANIFEST).read_text())
    assert found["adapter"]["name"] == "mine"
    assert len(found["adapter"]["sha256"]) == 64
    deeds = {tensor["name"]: tensor["deed"] for tensor in found["tensors"]}
    assert deeds["model.layers.0.mlp.down_proj.weight"] == "merged and quantized"
    assert deeds["model.embed_tokens.weight"] == "quantized"
    assert sum("merged" in deed for deed in deeds.values()) == found["adapter"]["changes"]


def test_towers_are_not_merged_in_silence(tmp_path: Path) -> None:
    from tests.trained import given

    source = given("tiny-e-release")
    plan = open_checkpoint(source).plan
    tower = {
        f"base_model.model.model.vision_tower.encoder.layers.0.self_attn.q_proj.linear.lora_{half}.weight": torch.ones(2, 2)
        for half in "AB"
    }
    path = write_adapter(tmp_path / "adapter", tower | tensors_of(draw(plan, [("layers.0.attn.in", "q")])))
    with pytest.raises(CheckpointError) as caught:
        convert(source, tmp_path / "out", "hf", adapter=path)
    (problem,) = caught.value.problems
    assert "changes 1 matrices of the vision tower" in problem
    pattern = problem.partition("--ignore '")[2].partition("'")[0]
    report = convert(source, tmp_path / "out", "hf", adapter=path, ignore=[pattern])
    assert report.deeds["merged"] == 1
    assert convert(source, tmp_path / "x.gguf", "gguf", adapter=path).deeds["merged"] == 1  # which holds no tower


def test_the_command_line_merges_and_previews(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["convert", "demo", str(tmp_path / "m"), "--to", "mlx", "--quant", "Q4", "--adapter", str(adapter)]
    assert main([*words, "--dry-run"]) == 0
    planned, notes = capsys.readouterr()
    assert not (tmp_path / "m").exists()
    assert "would hold" in planned
    assert "nothing was written" in notes
    assert "adapter mine: " in notes
    assert main(words) == 0
    written = capsys.readouterr().out
    assert written == planned.replace("would hold ", "")
    assert " affine4g64 (" in written
    assert "merged and quantized" in written
    held = sum(tensor.nbytes for tensor in Source.open(tmp_path / "m").tensors.values())
    assert f"{spell_bytes(held)} of tensors" in written
    assert main([*words[:-2], "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["types"]["affine4g64"]["tensors"] > 50


def test_what_grows_and_why_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(DEMO_FOLDER, tmp_path / "q", "mlx", "q4")
    assert main(["convert", str(tmp_path / "q"), str(tmp_path / "hf"), "--to", "hf"]) == 0
    assert "larger than the source" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["hf", "x.gguf"])
def test_a_preview_reads_headers_over_the_network(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would be made of a remote checkpoint is what is made of its local copy."""
    cut_off(monkeypatch, tmp_path / "cache")
    source, target = tmp_path / "source" / name, str(tmp_path / "out")
    convert(DEMO_FOLDER, source, "gguf" if name.endswith("gguf") else "hf")
    told = []
    with serve(source.parent) as site:
        for model in (f"{site.url}/{name}{'' if name.endswith('gguf') else '/'}", str(source)):
            assert main(["convert", model, target, "--to", "mlx", "--quant", "q4", "--dry-run", "--json"]) == 0
            told.append(json.loads(capsys.readouterr().out))
        assert site.sent_bytes < 4e6 < told[0]["source_bytes"]
    assert told[0] == told[1]
    assert not Path(target).exists()
