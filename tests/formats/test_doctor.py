"""The doctor's report on real checkpoints, broken ones and remote ones, and its form."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from gemcutter.checkpoint.doctor.doctor import EXIT_CODES, examine, spell_ranges
from gemcutter.checkpoint.remote.hub import DEMO_FOLDER
from gemcutter.checkpoint.write import synth
from tests.formats.web import cut_off, serve, write_hollow
from tests.trained import trained

Report = dict[str, Any]


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_off(monkeypatch, tmp_path)


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """Return a copy of the demo that a test may break."""
    return Path(shutil.copytree(DEMO_FOLDER, tmp_path / "demo"))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def edit(folder: Path, name: str, **changes: Any) -> None:
    """Change keys of a JSON file; None takes a key away."""
    raw = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


def pack(folder: Path, quantization: dict[str, Any]) -> None:
    """Let a config name a quantization, and one tensor hold codes."""
    edit(folder, "config.json", quantization_config=quantization)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: torch.zeros(tensors[name].numel() // 2, 1, dtype=torch.uint8)}, folder / "model.safetensors")


def kinds(report: Report) -> set[str]:
    return {problem["kind"] for problem in report["problems"]}


def texts(report: Report) -> str:
    return "\n".join(problem["text"] for problem in report["problems"])


def engines(report: Report, verdict: str) -> set[str]:
    return {each["engine"] for each in report["verdicts"] if each["verdict"] == verdict}


# ---- sound checkpoints ----


def test_the_demo_is_fine() -> None:
    report = examine("demo")
    assert (report["status"], report["exit_code"], report["problems"], report["remarks"]) == ("fine", 0, [], [])
    assert report["model"]["readers"] == 4
    assert [row["reads"] for row in report["layers"]] == ["own"] * 6 + [5, 5, 5, 4]
    assert report["layers"][6]["owns"] == ["q"]
    assert sum(row["bytes"] for row in report["layers"]) < report["tensor_bytes"]
    assert report["text"]["template"] == "chat_template.jinja"
    assert report["text"]["eos_token_ids"] == [1, 7]
    assert report["verdicts"][0] == {
        "engine": "gemcutter",
        "verdict": "loads",
        "versions": "this one",
        "why": None,
        "threads": [],
    }
    assert set(report["facts"]) == {
        *("safetensors", "config", "dense", "kv_shared", "shared_kv_omitted", "text_class", "spelled_by_layer")
    }


TRAITS = {
    "E2B": {"kv_shared", "shared_kv_omitted", "text_class"},
    "E4B": {"kv_shared", "shared_kv_omitted", "text_class"},
    "12B": {"k_eq_v", "unified"},
    "26B-A4B": {"k_eq_v", "moe", "text_class"},
    "31B": {"k_eq_v", "text_class"},
}


@pytest.mark.parametrize("like", TRAITS)
def test_facts_of_every_size(tmp_path: Path, like: str) -> None:
    synth.write_checkpoint(like, tmp_path / like)
    report = examine(str(tmp_path / like))
    assert report["status"] == "fine", report["remarks"]
    assert set(report["facts"]) == {"safetensors", "config", "dense", "spelled_by_layer"} | TRAITS[like]
    assert {row["role"] for row in report["roles"]} >= {"attention", "mlp", "embedding"}
    assert ("experts" in {row["role"] for row in report["roles"]}) == (like == "26B-A4B")


REAL = {
    "tiny-e": ("fine", {"kv_shared", "shared_kv_omitted", "dense"}),
    "tiny-a": ("fine", {"k_eq_v", "moe", "dense"}),
    "tiny-e-release": ("remarks", {"shared_kv_present", "towers", "wrapper_prefix"}),
    "tiny-e-assistant": ("fine", {"drafter"}),
    "tiny-e-mlx-4bit": ("remarks", {"mlx", "ple_projection_packed", "shared_kv_omitted"}),
    "tiny-e-mlx-8bit": ("fine", {"mlx", "ple_projection_packed"}),
    "tiny-a-mlx-4bit": ("fine", {"mlx", "moe", "k_eq_v"}),
    "tiny-e-mlx-mxfp4": ("remarks", {"mlx", "mlx_micro"}),
    "tiny-e-Q8_0.gguf": ("fine", {"gguf", "kv_shared"}),
    "tiny-e-Q4_0.gguf": ("fine", {"gguf", "shared_kv_omitted"}),
    "tiny-e-Q4_K_M.gguf": ("fine", {"gguf"}),
    "tiny-a-Q4_0.gguf": ("fine", {"gguf", "moe", "k_eq_v"}),
}


@pytest.mark.parametrize("name", REAL)
def test_real_files(name: str) -> None:
    report = examine(str(trained(name)))
    status, facts = REAL[name]
    assert (report["status"], report["problems"]) == (status, [])
    assert facts <= set(report["facts"])
    assert sum(stored["bytes"] for row in report["roles"] for stored in row["stored"]) <= report["tensor_bytes"]


def test_redundant_tensors_are_named_and_weighed() -> None:
    report = examine(str(trained("tiny-e-release")))
    assert len(report["redundant"]) == 12
    assert {row["name"].split(".")[-2] for row in report["redundant"]} == {"k_proj", "v_proj", "k_norm"}
    assert sum(row["bytes"] for row in report["redundant"]) == sum(row["redundant"]["bytes"] for row in report["layers"])
    assert [row["redundant"]["tensors"] for row in report["layers"]] == [0] * 6 + [3] * 4
    assert set(report["left_aside"]) == {"vision tower", "audio tower"}
    assert any("12 tensors of 4 layers" in remark for remark in report["remarks"])


def test_an_adapter_is_no_checkpoint_of_its_own() -> None:
    report = examine(str(trained("tiny-e-lora")))
    assert report["exit_code"] == 2
    assert "is an adapter" in texts(report)


# ---- remarks ----


def remarks_after(demo: Path, change: Callable[[Path], object]) -> str:
    change(demo)
    report = examine(str(demo))
    assert (report["status"], report["exit_code"], report["problems"]) == ("remarks", 1, [])
    return "\n".join(report["remarks"])


REMARKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a layer in float32": (
        lambda demo: rewrite(
            demo, lambda held: held.update({name: held[name].float() for name in held if ".3." in name and "proj" in name})
        ),
        "8 matrices of layers 3 are F32, the others BF16",
    ),
    "float16": (
        lambda demo: rewrite(demo, lambda held: held.update({name: tensor.half() for name, tensor in held.items()})),
        "weights are float16",
    ),
    "no layer scalars": (
        lambda demo: rewrite(
            demo, lambda held: [held.pop(name) for name in list(held) if name.endswith("layer_scalar")] and None
        ),
        "10 layers have no layer_scalar",
    ),
    "a spare head": (
        lambda demo: rewrite(demo, lambda held: held.update({"lm_head.weight": held["model.embed_tokens.weight"].clone()})),
        "1 tensors of a tied head skipped",
    ),
    "no template": (lambda demo: (demo / "chat_template.jinja").unlink(), "no chat template"),
    "no generation config": (lambda demo: (demo / "generation_config.json").unlink(), "no generation_config.json"),
    "no bos": (lambda demo: edit(demo, "tokenizer_config.json", add_bos_token=False), "add_bos_token is false"),
    "no pad": (lambda demo: edit(demo, "tokenizer_config.json", pad_token=None), "no pad token"),
    "one end": (
        lambda demo: [edit(demo, name, eos_token_id=1) for name in ("generation_config.json", "config.json")],
        "end tokens [1] leave out <turn|> (7)",
    ),
}


@pytest.mark.parametrize("case", REMARKS)
def test_remarks(demo: Path, case: str) -> None:
    change, words = REMARKS[case]
    assert words in remarks_after(demo, change)


def test_towers_that_are_only_named(demo: Path) -> None:
    text = json.loads((demo / "config.json").read_text())
    wrapper = {"model_type": "gemma4", "text_config": text, "vision_config": {"model_type": "gemma4_vision"}}
    (demo / "config.json").write_text(json.dumps(wrapper))
    report = examine(str(demo))
    assert report["remarks"] == ["the config names towers for vision, and there are no tensors of theirs"]
    assert "towers_absent" in report["facts"]
    assert "mlx-vlm" in engines(report, "fails")


# ---- broken checkpoints ----


def dropped(name: str) -> Callable[[Path], object]:
    return lambda demo: rewrite(demo, lambda held: held.pop(name))


def cut(demo: Path, kept: int) -> None:
    raw = (demo / "model.safetensors").read_bytes()
    (demo / "model.safetensors").write_bytes(raw[:kept])


BROKEN: dict[str, tuple[Callable[[Path], object], set[str], str]] = {
    "a tensor is missing": (dropped("model.layers.0.self_attn.k_proj.weight"), {"missing"}, "layers.0.attn.in[k] (64, 256)"),
    "a tensor has another shape": (
        lambda demo: rewrite(demo, lambda held: held.update({"model.norm.weight": torch.ones(7)})),
        {"shape"},
        "norm (256,) expected, model.safetensors:model.norm.weight has (7,)",
    ),
    "a tensor is of integers": (
        lambda demo: rewrite(demo, lambda held: held.update({"model.norm.weight": torch.ones(256, dtype=torch.int32)})),
        {"dtype"},
        "norm: BF16, F16, F32 expected",
    ),
    "a tensor is unknown": (
        lambda demo: rewrite(demo, lambda held: held.update({"foo.bar": torch.ones(2)})),
        {"unknown"},
        "foo.bar: not part of this model",
    ),
    "the data are cut": (lambda demo: cut(demo, 1_000_000), {"file"}, "is truncated: 1,000,000 bytes of"),
    "the header is cut": (lambda demo: cut(demo, 100), {"file", "missing"}, "is truncated: its header takes"),
    "the file is empty": (lambda demo: cut(demo, 0), {"file", "missing"}, "is truncated: 0 bytes"),
    "the config is absent": (lambda demo: (demo / "config.json").unlink(), {"config"}, "no config.json beside the weights"),
    "the config is no JSON": (lambda demo: (demo / "config.json").write_text("{"), {"config"}, "is not valid JSON"),
    "a key is unknown": (lambda demo: edit(demo, "config.json", warp=9), {"config"}, "warp: unknown key"),
    "a key is wrong": (lambda demo: edit(demo, "config.json", hidden_size="big"), {"config"}, "hidden_size: expected an integer"),
    "another family": (lambda demo: edit(demo, "config.json", model_type="llama"), {"config"}, "model_type: expected one of"),
    "an unknown scheme": (
        lambda demo: pack(demo, {"quant_method": "bitsandbytes"}),
        {"config"},
        "bitsandbytes",
    ),
    "the tokenizer is absent": (lambda demo: (demo / "tokenizer.json").unlink(), {"text"}, "there is no tokenizer.json"),
    "a small file is damaged": (
        lambda demo: (demo / "generation_config.json").write_bytes(b"\xff"),
        {"text"},
        "generation_config.json: the file is not valid UTF-8",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints_are_reported_and_not_raised(demo: Path, case: str) -> None:
    change, found, words = BROKEN[case]
    change(demo)
    report = examine(str(demo))
    assert (report["status"], report["exit_code"]) == ("broken", 2)
    assert kinds(report) == found
    assert words in texts(report)
    assert report["verdicts"][0]["verdict"] == "fails"
    json.dumps(report, allow_nan=False)


def test_all_problems_come_at_once_with_all_that_can_be_read(demo: Path) -> None:
    dropped("model.layers.0.self_attn.k_proj.weight")(demo)
    dropped("model.embed_tokens.weight")(demo)
    edit(demo, "config.json", warp=9)
    (demo / "tokenizer_config.json").write_text("[]")
    report = examine(str(demo))
    assert kinds(report) == {"config", "missing", "text"}
    assert {row["name"]: row["shape"] for row in report["missing"]} == {
        "layers.0.attn.in[k]": [64, 256],
        "embed.tokens": [4096, 256],
    }
    assert report["layers"][0]["missing"] == 1
    assert report["layers"][0]["tensors"] > 0
    assert report["model"]["layers"] == 10
    assert report["roles"]


def test_a_quantized_checkpoint_that_cant_be_read_still_has_a_topology(demo: Path) -> None:
    pack(demo, {"quant_method": "bitsandbytes", "load_in_4bit": True})
    report = examine(str(demo))
    assert report["model"]["readers"] == 4
    assert "bitsandbytes" in report["facts"]
    assert kinds(report) == {"config"}  # and not a list of every tensor that does not match


def test_ignored_patterns_are_no_problems(demo: Path) -> None:
    edit(demo, "config.json", warp=9)
    rewrite(demo, lambda held: held.update({"foo.bar": torch.ones(2)}))
    assert examine(str(demo), ("warp", "foo.*"))["problems"] == []


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("nvfp4"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_json_stops_it(demo: Path, data: st.DataObject) -> None:
    """Any value at any key of any small file leads to a report."""
    name = data.draw(st.sampled_from(["config.json", "generation_config.json", "tokenizer_config.json"]))
    whole = json.loads((DEMO_FOLDER / name).read_text())
    extra = ["quantization", "quantization_config", "architectures", "added_tokens_decoder", "chat_template", "per_layer_config"]
    key = data.draw(st.sampled_from(sorted({*whole, *extra})))
    (demo / name).write_text(json.dumps(whole | {key: data.draw(JSON_VALUES)}))
    report = examine(str(demo))
    (demo / name).write_text(json.dumps(whole))
    assert report["status"] in EXIT_CODES
    json.dumps(report, allow_nan=False)


# ---- far away ----


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """Return a folder that holds the demo's files without the large ones, and a model of true size without data."""
    write_hollow(tmp_path / "site", "E4B")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        shutil.copy(DEMO_FOLDER / name, tmp_path / "site" / name)
    return tmp_path / "site"


def test_a_remote_report_is_the_local_one(model_folder: Path) -> None:
    here = examine(str(model_folder))
    with serve(model_folder) as site:
        there = examine(f"{site.url}/")
    assert there["received"]["bytes"] < here["tensor_bytes"] / 1000
    differing = {"source", "path", "received", "text", "remarks", "status", "exit_code", "verdicts"}
    assert {key: value for key, value in here.items() if key not in differing} == {
        key: value for key, value in there.items() if key not in differing
    }
    assert here["text"] | {"end_markers": None} == there["text"] | {"end_markers": None}  # the tokenizer was not fetched


def gguf(metadata: dict[str, int], padding: int) -> bytes:
    """Return a GGUF file with one tensor; `padding` makes its data as large as a real one's."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    entries = b"".join(text(key) + struct.pack("<II", 4, value) for key, value in metadata.items())
    tensor = text("output_norm.weight") + struct.pack("<IQIQ", 1, padding // 4, 0, 0)
    head = struct.pack("<4sIQQ", b"GGUF", 3, 1, len(metadata)) + entries + tensor
    return head + bytes(-len(head) % 32) + bytes(padding)


def test_remote_gguf_files_are_read_by_ranges(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(gguf({"gemma4.block_count": 3}, 40_000_000))
    here = examine(str(tmp_path / "model.gguf"))
    with serve(tmp_path) as site:
        there = examine(f"{site.url}/model.gguf")
        assert site.sent_bytes < 400_000
    assert there["facts"] == here["facts"] == ["gguf"]
    assert [problem["kind"] for problem in there["problems"]] == [problem["kind"] for problem in here["problems"]] != []
    assert there["tensors"] == 1


def test_a_real_remote_gguf_file() -> None:
    with serve(trained("tiny-e-Q8_0.gguf").parent) as site:
        there = examine(f"{site.url}/tiny-e-Q8_0.gguf")
    here = examine(str(trained("tiny-e-Q8_0.gguf")))
    for key in ("status", "problems", "model", "layers", "roles", "facts", "text", "verdicts"):
        assert there[key] == here[key]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("owner/model", "the hub can't be reached"),
        ("./absent", "does not exist on this machine"),
        ("no such thing", "is neither an existing path"),
        ("http://127.0.0.1:9/model.safetensors", "check the address and the network"),
        ("", "is neither an existing path"),
    ],
)
def test_what_can_not_be_reached(source: str, words: str) -> None:
    report = examine(source)
    assert (report["status"], report["exit_code"]) == ("unreadable", 2)
    assert words in texts(report) or "can't be downloaded" in texts(report)
    assert report["verdicts"] == []


# ---- the report's form ----

SHAPE = {
    "schema": int,
    "source": str,
    "status": str,
    "exit_code": int,
    "problems": list,
    "remarks": list,
    "path": str,
    "format": str,
    "files": list,
    "tensors": int,
    "tensor_bytes": int,
    "received": dict,
    "model": dict,
    "towers": list,
    "layers": list,
    "missing": list,
    "unknown": list,
    "redundant": list,
    "left_aside": dict,
    "dtypes": list,
    "roles": list,
    "text": dict,
    "stops": list,
    "facts": list,
    "verdicts": list,
}
NESTED = {
    "problems": {"kind", "text"},
    "files": {"name", "bytes"},
    "layers": {"index", "attention", "owns", "reads", "mlp_width", "tensors", "bytes", "missing", "redundant"},
    "missing": {"name", "shape"},
    "unknown": {"name", "file", "bytes"},
    "redundant": {"name", "file", "bytes"},
    "dtypes": {"dtype", "tensors", "bytes"},
    "roles": {"role", "stored"},
    "verdicts": {"engine", "verdict", "versions", "why", "threads"},
    "towers": {"name", "file", "layers", "hidden", "out", "parameters", "bytes", "stored", "problems"},
}
OPTIONAL = {"path", "format", "received", "model", "text"}  # null where there is nothing to say


def test_the_schema_is_stable(demo: Path) -> None:
    rewrite(demo, lambda held: held.update({"foo": torch.ones(2), "lm_head.weight": held.pop("model.embed_tokens.weight")}))
    for source in ("demo", str(demo), "./absent"):
        report = json.loads(json.dumps(examine(source)))
        assert list(report) == list(SHAPE)
        assert report["schema"] == 1  # to be raised whenever a key changes its name or its meaning
        for key, kind in SHAPE.items():
            assert isinstance(report[key], kind) or (key in OPTIONAL and report[key] is None), key
        for key, keys in NESTED.items():
            assert all(set(row) == keys for row in report[key]), key
    assert set(examine("demo")["model"]) == {
        *("model_type", "is_drafter", "parameters", "layers", "readers", "hidden", "vocab", "context", "window"),
        *("experts", "ple_dim", "tied_head", "towers"),
    }


def test_ranges_are_spelled() -> None:
    assert spell_ranges([]) == ""
    assert spell_ranges([3]) == "3"
    assert spell_ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"


# ---- what follows for other engines ----


def test_known_failures_of_known_files(demo: Path) -> None:
    """The load bug of this family, both ways round: tensors that are demanded in vain, and tensors that are refused."""
    omitted = examine(str(demo))
    assert engines(omitted, "fails") >= {"mlx-lm", "mlx-vlm", "mlx-swift-lm"}
    assert {"llama.cpp"} <= engines(omitted, "no conversion")

    def restore(held: dict[str, torch.Tensor]) -> None:
        for layer in range(6, 10):
            kept = 4 if layer == 9 else 5
            for part in ("k_proj", "v_proj", "k_norm"):
                held[f"model.layers.{layer}.self_attn.{part}.weight"] = held[
                    f"model.layers.{kept}.self_attn.{part}.weight"
                ].clone()

    rewrite(demo, restore)
    present = examine(str(demo))
    assert present["exit_code"] == 1
    assert "shared_kv_present" in present["facts"]
    assert not engines(present, "fails") & {"mlx-lm", "mlx-swift-lm"}


def test_moe_dialects_are_told_from_names(tmp_path: Path) -> None:
    """Files that no format may read still have facts."""
    layer = "model.language_model.layers.0"
    names = {
        f"{layer}.moe.experts.0.down_proj.weight_scale_2": torch.ones(1),
        f"{layer}.experts.1.down_proj_packed": torch.ones(1),
        "embed_vision.embedding_projection.scales": torch.ones(1),
    }
    save_file(names, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "modelopt"}}))
    facts = set(examine(str(tmp_path))["facts"])
    assert facts >= {"experts_apart", "experts_under_moe", "experts_underscored", "experts_without_input_scale", "modelopt"}
    assert facts >= {"nvfp4", "vision_packed", "wrapper_prefix"}
