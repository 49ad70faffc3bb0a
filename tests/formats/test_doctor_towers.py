"""Towers and projectors in the reports of `doctor` and `inspect`: their sizes, how they are stored, and what is wrong with them.

The oracles are the files' own tensors and the loader. That verdicts agree on damaged files is `test_doctor_agrees.py`'s.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf as gguf_library
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemcutter.checkpoint.doctor.doctor import examine
from gemcutter.checkpoint.formats import hf
from gemcutter.checkpoint.remote.hub import DEMO_FOLDER
from gemcutter.cli import main
from gemcutter.errors import GemcutterError
from gemcutter.load_options import LoadOptions
from gemcutter.loading import open_model
from tests import mlx_files
from tests.unit.test_load_projectors import GOLDENS, LAYERS, as_gguf, as_mlx, changed, close, tall

Report = dict[str, Any]
SIZES = {"E2B": ("vision", "audio"), "26B-A4B": ("vision",), "12B": ("vision", "audio")}
AFFINE = mlx_files.affine(8, 32)
TOWER = "model.vision_tower.encoder.layers.1."


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("released")
    model = tall()
    (folder / "config.json").write_text(model.config.to_json_string())
    tensors = {name: each.clone() for name, each in model.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, folder / "model.safetensors")
    return folder


def texts(report: Report) -> str:
    """Return all problems but those of tokenizers, which these folders lack."""
    return "\n".join(f"{each['kind']} {each['text']}" for each in report["problems"] if each["kind"] != "text")


def weighed(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Return the bytes of each tower in a safetensors file."""
    sizes = dict[str, int]()
    for name, tensor in tensors.items():
        kind = hf.tower_kind(hf.strip(name))
        if kind is not None:
            tower = kind.strip("()").removesuffix(" tower")
            sizes[tower] = sizes.get(tower, 0) + tensor.nbytes
    return sizes


def projector_bytes(path: Path) -> int:
    return sum(int(tensor.n_bytes) for tensor in gguf_library.GGUFReader(path).tensors)


# ---- sound towers ----


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mmproj", [None, "mmproj-f32.gguf"])
def test_towers_are_sized_and_weighed(size: str, mmproj: str | None) -> None:
    folder = GOLDENS / size
    projector = None if mmproj is None else folder / mmproj
    report = examine(str(folder), data=True, mmproj=projector)
    assert texts(report) == ""
    assert [tower["name"] for tower in report["towers"]] == list(SIZES[size])
    model = open_model(LoadOptions(model=str(folder), media=("auto",), mmproj=None if projector is None else str(projector)))
    for tower, loaded in zip(report["towers"], (model.vision, model.audio), strict=False):
        assert loaded is not None
        plan = loaded.plan
        assert (tower["layers"], tower["hidden"], tower["out"]) == (plan.num_layers, plan.hidden, model.checkpoint.plan.hidden)
        assert tower["parameters"] == plan.num_params()
        assert tower["file"] == mmproj
        assert [row["dtype"] for row in tower["stored"]] == ["F32"]
        assert tower["stored"][0]["bits_per_weight"] == 32
        assert tower["problems"] == []
    sizes = {tower["name"]: tower["bytes"] for tower in report["towers"]}
    if projector is None:
        assert sizes == weighed(load_file(folder / "model.safetensors"))
    else:
        assert sum(sizes.values()) == projector_bytes(projector)


@pytest.mark.parametrize("name", [*(f"{size}/mmproj-f32.gguf" for size in SIZES), "E2B/mmproj-q8_0.gguf"])
def test_a_projector_by_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = examine(str(GOLDENS / name), data=True)
    assert (report["status"], report["format"], report["problems"], report["model"]) == ("fine", "GGUF projector", [], None)
    assert [tower["name"] for tower in report["towers"]] == list(SIZES[name.partition("/")[0]])
    assert sum(tower["bytes"] for tower in report["towers"]) == projector_bytes(GOLDENS / name)
    (verdict,) = report["verdicts"]
    assert (verdict["verdict"], verdict["why"]) == ("loads", "beside the model that it is for (--mmproj)")
    assert main(["doctor", str(GOLDENS / name)]) == 0
    shown = capsys.readouterr().out
    assert "format      GGUF projector: " in shown
    assert "vision      " in shown
    assert "unknown" not in shown


def test_how_packed_towers_are_stored_is_told(released: Path, tmp_path: Path) -> None:
    packed, _ = as_mlx(released, tmp_path, AFFINE)
    (vision, audio) = examine(str(packed), data=True)["towers"]
    assert {row["dtype"] for row in vision["stored"]} == {"affine8g32", "F32"}
    assert vision["bytes"] + audio["bytes"] == sum(weighed(load_file(packed / "model.safetensors")).values())
    (bits,) = (row["bits_per_weight"] for row in vision["stored"] if row["dtype"] == "affine8g32")
    assert 8 < bits <= 10


def test_the_projector_beside_a_gguf_model_and_towers_within_it(tmp_path: Path, released: Path) -> None:
    model = as_gguf(GOLDENS / "E2B", tmp_path / "model.gguf")
    assert examine(str(model))["towers"] == []
    shutil.copy(GOLDENS / "E2B" / "mmproj-q8_0.gguf", tmp_path / "mmproj-q8_0.gguf")
    towers = examine(str(model), data=True)["towers"]
    assert [(tower["name"], tower["file"]) for tower in towers] == [("vision", "mmproj-q8_0.gguf"), ("audio", "mmproj-q8_0.gguf")]
    assert {row["dtype"] for row in towers[0]["stored"]} == {"F32", "F16", "Q8_0"}
    ollama = examine(str(as_gguf(released, tmp_path / "sha256-0a1b2c", with_towers=True)), data=True)
    assert texts(ollama) == ""
    assert [(tower["name"], tower["file"]) for tower in ollama["towers"]] == [("vision", None), ("audio", None)]
    assert [tower["layers"] for tower in ollama["towers"]] == [LAYERS, LAYERS]


# ---- what is wrong with them ----


def spoil(name: str, tensor: Tensor | None) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor

    return change


BROKEN = {
    "missing": (spoil(f"{TOWER}self_attn.q_proj.linear.weight", None), "missing vision.layers.1.attn.in[q] (32, 32)"),
    "bound": (spoil(f"{TOWER}mlp.up_proj.input_max", None), "missing vision.layers.1.mlp.in.up.input_max"),
    "shape": (spoil(f"{TOWER}self_attn.k_norm.weight", torch.ones(7)), "shape vision.layers.1.attn.k_norm (16,) expected"),
    "unknown": (
        spoil("model.audio_tower.layers.0.foo.weight", torch.ones(7)),
        "audio_tower.layers.0.foo.weight: not part of this model",
    ),
    "projector": (spoil("model.embed_audio.embedding_projection.weight", None), "missing audio.out (48, 40)"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_does_not_load_is_a_problem(case: str, released: Path, tmp_path: Path) -> None:
    change, words = BROKEN[case]
    folder = Path(shutil.copytree(released, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    report = examine(str(folder))
    assert words in texts(report)
    with pytest.raises(GemcutterError) as raised:
        open_model(LoadOptions(model=str(folder), media=("auto",)))
    found = {f"{each['kind']:10} {each['text']}" for each in report["problems"] if each["kind"] != "text"}
    assert found == set(raised.value.problems)
    names = {tower["name"]: bool(tower["problems"]) for tower in report["towers"]}
    assert names == {"vision": "vision" in words, "audio": "audio" in words}
    assert open_model(LoadOptions(model=str(folder))).vision is None  # text alone loads


def test_a_bad_config_and_another_models_projector(released: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(released, tmp_path / "model"))
    raw = json.loads((folder / "config.json").read_text())
    raw["vision_config"]["patch_size"] = "wide"
    (folder / "config.json").write_text(json.dumps(raw))
    assert "config vision_config.patch_size: expected an integer" in texts(examine(str(folder)))
    out = "mm.input_projection.weight"
    narrow = changed(tmp_path / "narrow.gguf", lambda tensors: tensors.update({out: tensors[out][:32]}))
    report = texts(examine(str(released), mmproj=narrow))
    assert "shape vision.out (48, 32) expected" in report
    assert "is it the projector of this model?" in report
    report = texts(examine(str(narrow)))
    assert "shape audio.out (32, 40) expected" in report  # the towers' rows are not of one width
    assert "is it the projector" not in report
    text = as_gguf(released, tmp_path / "text.gguf")
    assert "holds no towers; pass the mmproj file" in texts(examine(str(released), mmproj=text))


def test_damaged_projectors_by_themselves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def lacks(tensors: dict[str, np.ndarray]) -> None:
        del tensors["v.blk.1.ffn_up.weight"]

    path = changed(tmp_path / "lacks.gguf", lacks)
    assert "missing vision.layers.1.mlp.in[up] (48, 32): v.blk.1.ffn_up.weight is in no file" in texts(examine(str(path)))
    assert main(["doctor", str(path)]) == 2
    assert "does not load" in capsys.readouterr().out
    foreign = gguf_library.GGUFWriter(tmp_path / "llava.gguf", "clip")
    foreign.add_string("clip.vision.projector_type", "mlp")
    foreign.add_tensor("v.patch_embd.weight", np.ones((4, 3, 16, 16), np.float32))
    close(foreign)
    assert "a projector of type 'mlp'; those of Gemma 4 are gemma4v" in texts(examine(str(tmp_path / "llava.gguf")))
    empty = gguf_library.GGUFWriter(tmp_path / "empty.gguf", "clip")
    empty.add_tensor("resampler.weight", np.ones((4, 4), np.float32))
    close(empty)
    assert "this projector holds no towers of Gemma 4" in texts(examine(str(tmp_path / "empty.gguf")))


def test_values_of_towers_are_read_on_request(released: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(released, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    conv = "model.audio_tower.subsample_conv_projection.layer1.conv.weight"
    tensors[conv][2, 3, 1, 1] = float("nan")
    tensors[f"{TOWER}self_attn.q_proj.linear.weight"][3, 3] = float("inf")
    tensors[f"{TOWER}self_attn.v_proj.input_min"] = torch.tensor(float("nan"))
    tensors[f"{TOWER}self_attn.q_proj.output_max"] = torch.tensor(float("inf"))  # which bounds nothing
    tensors["model.embed_vision.embedding_projection.weight"][5] = 2.0
    save_file(tensors, folder / "model.safetensors")
    assert texts(examine(str(folder))) == ""
    seen = list[tuple[int, int]]()
    report = examine(str(folder), data=True, progress=lambda done, total: seen.append((done, total)))
    assert "values not finite (NaN or infinity) in 3 tensors" in texts(report)
    for name in (conv, "self_attn.q_proj.linear.weight (1 of 32 rows)", "self_attn.v_proj.input_min (1 of 1 rows)"):
        assert name in texts(report)
    assert any("rows of a single value in 1 tensor: model.safetensors:model.embed_vision" in each for each in report["remarks"])
    assert seen[-1][0] == seen[-1][1] > sum(weighed(tensors).values())

    def spoiled(arrays: dict[str, np.ndarray]) -> None:
        arrays["v.patch_embd.weight"] = np.where(arrays["v.patch_embd.weight"] > 0.03, np.nan, arrays["v.patch_embd.weight"])

    assert "not finite (NaN or infinity) in 1 tensor" in texts(examine(str(changed(tmp_path / "nan.gguf", spoiled)), data=True))


def test_a_tokenizer_without_markers_is_a_problem_as_loading_finds(tmp_path: Path) -> None:
    from gemcutter.cli.doctor import read_text
    from tests.formats.mutations import write_sound

    folder = write_sound("towers", tmp_path / "model")
    assert examine(str(folder), read_text=read_text)["problems"] == []
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("<|image|>", "<|picture|>"))
    assert "the tokenizer has no <|image|>" in str(examine(str(folder), read_text=read_text)["problems"])


# ---- inspect ----


def test_inspect_shows_towers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = GOLDENS / "E2B"
    for more in ([], ["--mmproj", str(folder / "mmproj-q8_0.gguf")]):
        wanted = examine(str(folder), mmproj=Path(more[1]) if more else None)["towers"]
        assert main(["inspect", str(folder), "--json", *more]) == 0
        found = json.loads(capsys.readouterr().out)
        assert [each["name"] for each in wanted] == list(found["towers"])
        assert all(found["towers"][each["name"]] == found["towers"][each["name"]] | each for each in wanted)
        assert not any("not loaded" in note for note in found["notes"])
        assert main(["inspect", str(folder), *more]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert ("3 layers, hidden 32, 0.06 M parameters; F32 228 kB; loaded on request" in shown) is not bool(more)
        assert ("Q8_0 24.5 kB, F16 9.22 kB in mmproj-q8_0.gguf; loaded on request" in shown) is bool(more)
    assert main(["inspect", str(folder), "--mmproj", str(DEMO_FOLDER)]) == 0
    assert "the files hold none of its tensors" in " ".join(capsys.readouterr().out.split())
    assert main(["inspect", str(folder), "--mmproj", str(as_gguf(folder, tmp_path / "text.gguf"))]) == 1
    assert "holds no towers" in capsys.readouterr().err


def test_inspect_tells_of_towers_that_would_not_load(released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(released, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"{TOWER}self_attn.q_proj.linear.weight"]
    save_file(tensors, folder / "model.safetensors")
    assert main(["inspect", str(folder)]) == 0
    assert "vision would not load: missing vision.layers.1.attn.in[q]" in " ".join(capsys.readouterr().out.split())
