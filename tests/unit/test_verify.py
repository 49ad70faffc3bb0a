"""`gemcutter verify`: measures follow their definitions, sound models pass, spoilt ones fail where they are spoilt."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemcutter import native
from gemcutter.api import load
from gemcutter.checkpoint.container.source import Source
from gemcutter.checkpoint.doctor.fingerprint import BLOCK_BYTES, sampled_sha256
from gemcutter.checkpoint.load.load_params import Progress
from gemcutter.checkpoint.remote.hub import DEMO_FOLDER
from gemcutter.cli import main
from gemcutter.errors import CheckpointError, RequestError
from gemcutter.parity import oracle
from gemcutter.parity.certificate import Side, certify, default_tokens, encode
from gemcutter.parity.compare import HEAD_ROWS, Drift, LayerDrift, compare
from gemcutter.parity.limits import BFLOAT16, EIGHT_BIT, FLOAT32, FOUR_BIT, Stored, choose_limits, first_divergent, judge
from gemcutter.parity.trace import LAYER_ROWS, Trace, kept_positions
from tests.adapters import draw, places, tensors_of, write_adapter

GOLDENS = Path(__file__).parents[1] / "goldens"
SHORT = ("--tokens", "80")  # the demo's window is 64
WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextmanager
def no_bar(title: str) -> Iterator[Progress]:
    """Stand in for a bar; what is told must be possible."""

    def advance(done: int, total: int) -> None:
        assert 0 < done <= total, title

    yield advance


def verify(out: Path, *words: str, code: int = 0) -> dict[str, Any]:
    """Run the command and give its certificate, which must be strict JSON."""
    assert main(["verify", *words, "--out", str(out / "certificate.json")]) == code

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    found: dict[str, Any] = json.loads((out / "certificate.json").read_text(), parse_constant=refuse)
    return found


def copy_of_demo(folder: Path, change: Callable[[dict[str, Tensor]], None] | None = None) -> Path:
    """Copy the demo model, its tensors changed."""
    folder.mkdir()
    for file in DEMO_FOLDER.iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copy(file, folder / file.name)
    tensors = load_file(DEMO_FOLDER / WEIGHTS)
    if change is not None:
        change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


def edit_json(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a JSON file."""
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


# ---- sound models ----


def test_the_demo_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "demo"]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1] == "PASS"
    assert "ours     demo in bfloat16 on cpu, auto kernels" in shown
    assert "against  demo in float32 on cpu, reference kernels\n" in shown
    assert "built-in, 256 tokens" in shown
    assert "not longer than the window" not in shown
    assert shown.count("\nok  ") == 5
    assert re.search(r"^negative log-likelihood, nats a token: \d\.\d{4} here, \d\.\d{4} there$", shown, re.MULTILINE)


def test_float32_agrees_strictly_and_the_certificate_says_how(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = verify(tmp_path, "demo", "--dtype", "float32", "--json", *SHORT)
    assert json.loads(capsys.readouterr().out) == found
    assert found["passed"]
    assert found["limits"] == "float32"
    assert set(found) == {
        "certificate", "sampled_sha256", "passed", "limits", "limits_because", "checks", "nll_nats", "max_logit_position",
        "worst_position", "first_divergent_layer", "layers", "text", "ours", "against", "versions", "machine",
    }  # fmt: skip
    assert {check["measure"] for check in found["checks"]} == {
        "max_abs_logit_difference", "mean_kl_nats", "nll_difference_nats", "layer_drift", "top1_agreement",
    }  # fmt: skip
    assert all(set(check) == {"measure", "found", "limit", "passed"} for check in found["checks"])
    assert found["first_divergent_layer"] is None
    assert [layer["layer"] for layer in found["layers"]] == list(range(10))
    assert all(0 < layer["mean"] <= layer["worst"] < 1e-5 for layer in found["layers"])  # two ways of summing, one result
    assert found["text"]["is_longer_than_window"]
    assert (found["text"]["source"], found["text"]["tokens"], found["text"]["window"]) == ("built-in", 80, 64)
    assert (found["ours"]["level"], found["against"]["level"]) == (native.level(), None)
    assert found["ours"]["kernels_by_op"]["attention"] == ["torch" if native.missing() else "native"]
    assert [*found["against"]["kernels_by_op"].values()] == [["reference"]] * len(found["ours"]["kernels_by_op"])
    assert found["sampled_sha256"] == sampled_sha256(Source.open(DEMO_FOLDER)) == found["against"]["sampled_sha256"]
    assert found["versions"]["torch"] == torch.__version__


def test_the_likelihood_is_the_oracles() -> None:
    """Chunks, single rows at the end and poisoned caches included."""
    ids = json.loads((GOLDENS / "prompts.json").read_text())["passage_600"]["token_ids"]
    golden = json.loads((GOLDENS / "tiny-e.json").read_text())["passage_600"]["nll_mean"]
    side = Side("demo", load("demo", dtype="float32", context=1), "auto")
    found = certify(side, side, ids, no_bar)
    assert found["nll_nats"]["ours"] == pytest.approx(golden, rel=1e-5)
    assert [check["found"] for check in found["checks"]] == [0, 0, 0, 0, 1]  # two runs of one model are the same, bit for bit


@pytest.mark.parametrize("model", ["demo", str(GOLDENS / "tiny-a")])
def test_transformers_agrees(model: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    found = verify(tmp_path, model, "--against", "transformers", "--dtype", "float32", *SHORT)
    assert found["passed"]
    assert found["limits"] == "float32"
    assert found["against"]["engine"].startswith("transformers 5")
    assert all(layer["worst"] < 1e-5 for layer in found["layers"])


def test_quantized_weights_are_judged_as_such(tmp_path: Path) -> None:
    found = verify(tmp_path, "demo", "--quant", "q4", *SHORT)
    assert found["limits"] == "4-bit"
    assert found["ours"]["bits_per_weight"] < 8 < 16 == found["against"]["bits_per_weight"]
    kl = next(check["found"] for check in found["checks"] if check["measure"] == "mean_kl_nats")
    assert 1e-3 < kl < 0.25


def test_another_checkpoint_of_the_same_model(tmp_path: Path) -> None:
    def widen(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: tensor.float() for name, tensor in tensors.items()})

    wide = copy_of_demo(tmp_path / "wide", widen)
    found = verify(tmp_path, "demo", "--against", str(wide), "--dtype", "float32", *SHORT)
    assert found["limits"] == "bfloat16"
    assert "bfloat16 (16.0 bits a weight) here, float32 (32.0 bits a weight) there" in found["limits_because"]
    assert found["ours"]["sampled_sha256"] != found["against"]["sampled_sha256"]
    assert max(layer["worst"] for layer in found["layers"]) < 1e-5  # the values are the same


def test_a_mapped_table_is_one_of_the_ways_to_load(tmp_path: Path) -> None:
    found = verify(tmp_path, "demo", "--ple", "mmap", "--dtype", "float32", *SHORT)
    assert found["limits"] == "float32"


def test_both_sides_have_the_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = load("demo").plan
    folder = str(write_adapter(tmp_path / "mine", tensors_of(draw(plan, places(plan)))))
    plain, adapted = (verify(tmp_path, "demo", "--dtype", "float32", *SHORT, *words) for words in ([], ["--adapter", folder]))
    assert plain["limits"] == adapted["limits"] == "float32"
    assert plain["ours"]["model"] == "demo"
    assert adapted["ours"]["model"] == adapted["against"]["model"] == f"demo with {folder}"
    assert abs(plain["nll_nats"]["against"] - adapted["nll_nats"]["against"]) > 0.01
    assert "on both sides, so its effect does not show; --against-adapter none" in capsys.readouterr().out
    assert main(["verify", "demo", "--against", "transformers", "--adapter", folder]) == 2
    assert "transformers, which runs the checkpoint without it" in capsys.readouterr().err


def test_an_adapted_model_is_compared_with_its_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = load("demo").plan
    folder = str(write_adapter(tmp_path / "mine", tensors_of(draw(plan, places(plan)))))
    words = ["demo", "--adapter", folder, "--against-adapter", "none", "--dtype", "float32", *SHORT]
    found = verify(tmp_path, *words, code=1)
    assert (found["ours"]["adapter"], found["against"]["adapter"], found["against"]["model"]) == (folder, None, "demo")
    assert found["limits_because"] != "the same weights, computed in float32 on both sides"
    kl = next(check["found"] for check in found["checks"] if check["measure"] == "mean_kl_nats")
    assert kl > 0.01
    assert f"adapter  {folder} here, none there" in capsys.readouterr().out
    pytest.importorskip("transformers")
    theirs = verify(tmp_path, *words, "--against", "transformers", code=1)
    assert theirs["nll_nats"]["against"] == pytest.approx(found["nll_nats"]["against"], rel=1e-4)


def test_a_merged_checkpoint_is_compared_with_base_and_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = load("demo").plan
    folder = write_adapter(tmp_path / "mine", tensors_of(draw(plan, places(plan))))
    merged = tmp_path / "merged"
    assert main(["convert", "demo", str(merged), "--to", "hf", "--adapter", str(folder)]) == 0
    words = [str(merged), "--against", "demo", "--dtype", "float32", *SHORT]
    assert verify(tmp_path, *words, "--against-adapter", str(folder))["passed"]
    assert not verify(tmp_path, *words, code=1)["passed"]
    capsys.readouterr()


# ---- spoilt models ----


@pytest.mark.parametrize(
    ("layer", "name"),
    [(0, "layer_scalar"), (3, "mlp.gate_proj.weight"), (4, "self_attn.k_norm.weight"), (8, "self_attn.q_norm.weight")],
)
def test_a_spoilt_layer_is_named(layer: int, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[f"model.layers.{layer}.{name}"] *= 1.5

    spoilt = copy_of_demo(tmp_path / "spoilt", spoil)
    found = verify(tmp_path, str(spoilt), "--against", "demo", "--dtype", "float32", *SHORT, code=1)
    assert not found["passed"]
    assert found["first_divergent_layer"] == layer
    shown = capsys.readouterr().out
    assert f"\nfirst divergent layer: {layer}\n" in shown
    assert shown.splitlines()[-1] == "FAIL"


def test_a_spoilt_norm_after_the_last_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"] *= 1.5

    words = [str(copy_of_demo(tmp_path / "spoilt", spoil)), "--against", "demo", "--dtype", "float32", *SHORT]
    assert main(["verify", *words]) == 1
    assert "no layer drifts beyond its limit" in capsys.readouterr().out


def test_not_a_number_fails_and_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.2.mlp.down_proj.weight"][0, 0] = math.nan

    found = verify(tmp_path, str(copy_of_demo(tmp_path / "spoilt", spoil)), "--against", "demo", *SHORT, code=1)
    assert found["first_divergent_layer"] == 2
    assert [check["found"] for check in found["checks"]] == [None] * 4 + [0.0]
    shown = capsys.readouterr().out
    assert "not a number" in shown
    assert "not a number nats" not in shown
    assert "\nok  " not in shown


# ---- what is refused ----


def test_another_model_is_refused_with_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "demo", "--against", str(GOLDENS / "tiny-a")]) == 1
    shown = capsys.readouterr().err
    assert "is not a checkpoint of the same model as demo" in shown
    assert "\n  layers: 10 here, 6 there" in shown
    narrow = copy_of_demo(tmp_path / "narrow")
    edit_json(narrow / "config.json", lambda config: config.update(sliding_window=32))
    assert main(["verify", "demo", "--against", str(narrow)]) == 1
    shown = capsys.readouterr().err
    assert "\n  layers.0.window: 64 here, 32 there" in shown
    assert "layers.4." not in shown  # a global layer


def test_another_tokenizer_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def swap(tokenizer: dict[str, Any]) -> None:
        vocab = tokenizer["model"]["vocab"]
        vocab["▁the"], vocab["▁of"] = vocab["▁of"], vocab["▁the"]

    other = copy_of_demo(tmp_path / "other")
    edit_json(other / "tokenizer.json", swap)
    assert main(["verify", "demo", "--against", str(other)]) == 1
    shown = capsys.readouterr().err
    assert "have different tokenizers: token " in shown
    assert "'▁the'" in shown


def test_transformers_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["verify", "demo", "--against", "transformers"]) == 1
    shown = capsys.readouterr().err
    assert "pip install 'transformers" in shown
    assert shown.count("\n") == 1


def test_transformers_gets_only_what_it_can_read(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    single = tmp_path / "weights.gguf"
    single.write_bytes(b"")
    with pytest.raises(RequestError, match=r"not weights\.gguf"):
        oracle.check(single)
    folder = copy_of_demo(tmp_path / "partial", lambda tensors: tensors.__delitem__("model.layers.0.mlp.gate_proj.weight"))
    with pytest.raises(CheckpointError, match=r"it misses 1 tensors, such as model\.layers\.0\.mlp"):
        oracle.trace(folder, [2, 3, 4], kept_positions(3))
    (folder / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"can't run it \(ValueError"):
        oracle.trace(folder, [2, 3, 4], kept_positions(3))


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (["--tokens", "1"], 1, "--tokens 1: expected 2 to 131072"),
        (["--tokens", "200000"], 1, "expected 2 to 131072"),
        (["--text", "{empty}"], 1, "the text is too short"),
        (["--text", "{absent}"], 1, "absent can't be read"),
        (["--out", "{absent}/certificate.json"], 2, "is no folder"),
        (["--against", "./no-such-model"], 1, "does not exist"),
        (["--kernels", "fast"], 2, "expected auto, triton or reference"),
        (["--ple", "host"], 1, "ple host: a choice for models on a GPU"),
        (["--kv", "fp8"], 2, "--kv"),  # the cache of a certificate is its own
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_misuse(words: list[str], code: int, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").write_bytes(b"")
    places = {"empty": str(tmp_path / "empty"), "absent": str(tmp_path / "absent")}
    assert main(["verify", "demo", *(word.format(**places) for word in words)]) == code
    shown = capsys.readouterr()
    assert expected in shown.err
    assert not shown.out


# ---- texts ----


def test_a_text_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("A short text, which no window can hold back.")
    assert main(["verify", "demo", "--text", str(tmp_path / "text.txt")]) == 0
    shown = capsys.readouterr().out
    assert "not longer than the window of 64" in shown
    ids = load("demo").encode("A short text, which no window can hold back.")
    assert f"{len(ids)} tokens, the last {min(16, len(ids))} one at a time" in shown


def test_the_built_in_text_goes_on_as_long_as_it_is_wanted() -> None:
    side = Side("demo", load("demo", context=1), "auto")
    assert default_tokens(side.model.plan) == 64 + 192
    once = encode(side, None, None, 1000)
    thrice = encode(side, None, None, 4000)
    assert (len(once), len(thrice)) == (1000, 4000)
    assert thrice[:1000] == once
    assert encode(side, None, "A lamp.", None) == side.model.encode("A lamp.")


# ---- measures and limits ----


def test_measures_are_those_of_their_definitions() -> None:
    draw = torch.Generator().manual_seed(5)
    rows, hidden, vocab, layers = 2 * HEAD_ROWS + 7, 12, 31, 3
    ids = torch.randint(vocab, (rows,), generator=draw).tolist()
    head_VD = torch.randn(vocab, hidden, generator=draw)
    kept_K = kept_positions(rows)

    def some() -> Trace:
        outputs = torch.randn(layers, rows, hidden, generator=draw)
        return Trace(tuple(outputs), torch.randn(rows, hidden, generator=draw), lambda h_RD: h_RD @ head_VD.t())

    ours, theirs = some(), some()
    found = compare(ours, theirs, ids, kept_K, lambda done, total: None)
    a, b = ((side.states_ND @ head_VD.t()).double() for side in (ours, theirs))
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    kl = torch.nn.functional.kl_div(p, q, reduction="none", log_target=True).sum(-1)
    assert found.mean_kl == pytest.approx(float(kl.mean()))
    assert found.worst_position == int(kl.argmax())
    assert found.max_logit == pytest.approx(float((a - b).abs().max()))
    assert found.max_logit_position == int((a - b).abs().amax(-1).argmax())
    assert found.top1 == pytest.approx(float((a.argmax(-1) == b.argmax(-1)).double().mean()))
    loss = [float(torch.nn.functional.cross_entropy(side[:-1], torch.tensor(ids[1:]))) for side in (a, b)]
    assert found.nll == pytest.approx(loss)
    apart = (ours.layers[1] - theirs.layers[1]).norm(dim=1) / theirs.layers[1].norm(dim=1)
    assert found.layers[1].mean == pytest.approx(float(apart.mean()))
    assert found.layers[1].worst == pytest.approx(float(apart.max()))
    assert found.layers[1].position == int(apart.argmax())


def test_kept_rows_are_spread_over_the_text() -> None:
    assert kept_positions(90).tolist() == list(range(90))
    kept = kept_positions(10 * LAYER_ROWS).tolist()
    assert len(set(kept)) == LAYER_ROWS
    assert (kept[0], kept[-1]) == (0, 10 * LAYER_ROWS - 1)
    assert max(b - a for a, b in pairwise(kept)) <= 11


def test_limits_follow_what_the_sides_do_not_share() -> None:
    wide, half = Stored(("float32",), 32.0, 32.0), Stored(("bfloat16",), 16.0, 16.0)
    eight, mixed = Stored(("affine8",), 8.5, 8.5), Stored(("affine4", "affine8"), 7.5, 4.5)
    both, one = ("float32", "float32"), ("bfloat16", "float32")
    assert choose_limits(both, None)[0] is choose_limits(both, (half, half))[0] is FLOAT32
    assert choose_limits(one, None)[0] is choose_limits(both, (half, wide))[0] is BFLOAT16
    assert choose_limits(one, (eight, eight))[0] is BFLOAT16
    assert choose_limits(both, (eight, half))[0] is choose_limits(one, (half, eight))[0] is EIGHT_BIT
    assert choose_limits(both, (mixed, half))[0] is choose_limits(one, (half, mixed))[0] is FOUR_BIT


def test_every_measure_can_fail_alone() -> None:
    def drift(**changes: Any) -> Drift:
        sound: dict[str, Any] = {"agreeing": 2, "kl": [0.0, 0.0], "loss_ours": [1.0], "loss_theirs": [1.0]}
        return Drift(**(sound | {"layers": [LayerDrift(0, 0.0, 0, 0.0)]} | changes))

    assert all(check.passed for check in judge(drift(), FLOAT32))
    spoilt = {
        "max_abs_logit_difference": {"max_logit": math.nan},
        "mean_kl_nats": {"kl": [0.0, 1.0]},
        "nll_difference_nats": {"loss_ours": [0.5]},
        "layer_drift": {"layers": [LayerDrift(0, 0.0, 0, 0.0), LayerDrift(1, math.nan, 0, math.nan)]},
        "top1_agreement": {"agreeing": 1},
    }
    for measure, change in spoilt.items():
        assert [check.measure for check in judge(drift(**change), FLOAT32) if not check.passed] == [measure]
    divergent = first_divergent(drift(**spoilt["layer_drift"]), FLOAT32)
    assert divergent is not None
    assert divergent.layer == 1


# ---- the key of a certificate ----


def hash_of(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None = None, shards: int = 1) -> str:
    """Write a checkpoint and give its fingerprint."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config or {"a": 1, "b": 2}))
    for shard in range(shards):
        save_file(dict(list(tensors.items())[shard::shards]), folder / f"part-{shard}.safetensors")
    return sampled_sha256(Source.open(folder))


def test_the_key_is_the_contents_and_not_the_layout(tmp_path: Path) -> None:
    blocks = 1000
    tensors = {"big": torch.zeros(blocks, BLOCK_BYTES, dtype=torch.uint8), "small": torch.ones(3), "empty": torch.zeros(0)}
    names = (tmp_path / str(number) for number in range(100))
    plain = hash_of(next(names), tensors)
    assert hash_of(next(names), dict(reversed(tensors.items())), {"b": 2, "a": 1}, shards=2) == plain
    different = {hash_of(next(names), tensors, {"a": 1, "b": 3}), hash_of(next(names), {**tensors, "more": torch.ones(1)})}
    different.add(hash_of(next(names), {**tensors, "small": torch.tensor([1.0, 1.0, 1.0000001])}))
    different.add(hash_of(next(names), {**tensors, "small": torch.ones(3).view(torch.int32)}))
    different.add(hash_of(next(names), {**tensors, "small": torch.ones(3, 1)}))
    for place in ((0, 0), (-1, -1)):
        changed = tensors["big"].clone()
        changed[place] = 1
        different.add(hash_of(next(names), {**tensors, "big": changed}))
    assert len(different | {plain}) == 8
    assert hash_of(next(names), {**tensors, "big": tensors["big"] + 1}) not in different | {plain}


def test_a_converted_file_agrees_strictly_and_has_a_key_of_its_own(tmp_path: Path) -> None:
    """A GGUF file's key covers what its header keeps where it lies, such as the vocabulary."""
    file = tmp_path / "demo.gguf"
    assert main(["convert", "demo", str(file), "--to", "gguf"]) == 0
    found = verify(tmp_path, str(file), "--against", "demo", "--dtype", "float32", *SHORT)
    assert found["limits"] == "float32"
    assert found["ours"]["sampled_sha256"] != found["against"]["sampled_sha256"]
    place = Source.open(file).metadata["tokenizer.ggml.token_type"].offset
    whole = bytearray(file.read_bytes())
    whole[place] += 1
    file.write_bytes(whole)
    assert sampled_sha256(Source.open(file)) != found["sampled_sha256"]
