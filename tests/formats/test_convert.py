"""Converting: what is written equals what the formats' own tools write, comes back bit for bit, and is whole or not there."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gemcutter.checkpoint.container.source import Source
from gemcutter.checkpoint.container.stored_tensor import PackedTensor
from gemcutter.checkpoint.convert.convert import Report, convert
from gemcutter.checkpoint.load.match import Checkpoint, open_checkpoint
from gemcutter.checkpoint.remote.hub import DEMO_FOLDER
from gemcutter.checkpoint.write.atomic_replace import MANIFEST
from gemcutter.checkpoint.write.synth import SIZES, write_checkpoint
from gemcutter.checkpoint.write.write_safetensors import write_safetensors
from gemcutter.cli.convert import make_texts
from gemcutter.errors import CheckpointError, GemcutterError
from tests.trained import given

ROOT = Path(__file__).parents[2]
TINY_A = ROOT / "tests" / "goldens" / "tiny-a"


def contents(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Return every stored tensor's dtype, shape and bytes."""
    return {name: (tensor.dtype, tensor.shape, bytes(tensor.raw().numpy())) for name, tensor in Source.open(path).tensors.items()}


def run(source: Path, target: Path, to: str, quant: str = "none", shared_kv: str = "keep", **options: bool) -> Report:
    return convert(source, target, to, quant, shared_kv, texts=make_texts, **options)  # type: ignore[arg-type]


def beside(target: Path) -> set[str]:
    """Return the names in the target's folder."""
    return set(os.listdir(target.parent))


# ---- round trips ----


@pytest.mark.parametrize("model", [DEMO_FOLDER, TINY_A], ids=["demo", "tiny-a"])
@pytest.mark.parametrize(
    ("between", "to", "there", "back"), [("m", "mlx", "none", "none"), ("x.gguf", "gguf", "none", "none")], ids=["mlx", "gguf"]
)
def test_round_trip_gives_every_byte_back(model: Path, between: str, to: str, there: str, back: str, tmp_path: Path) -> None:
    run(model, tmp_path / between, to, there)
    run(tmp_path / between, tmp_path / "back", "hf", back)
    assert contents(tmp_path / "back") == contents(model)
    wanted = open_checkpoint(model).plan
    if to == "gguf":  # which has no key for it: models without per-layer embeddings have blocks of images
        wanted = replace(wanted, bidirectional=not wanted.ple_dim)
    assert open_checkpoint(tmp_path / "back").plan == wanted


def test_round_trip_through_float16_gives_back_what_it_can_hold(tmp_path: Path) -> None:
    run(DEMO_FOLDER, tmp_path / "x.gguf", "gguf", "f16")
    run(tmp_path / "x.gguf", tmp_path / "back", "hf", "bf16")
    before, after = contents(DEMO_FOLDER), contents(tmp_path / "back")
    for name, (dtype, shape, content) in before.items():
        values = torch.frombuffer(bytearray(content), dtype=torch.bfloat16)
        assert after[name][:2] == (dtype, shape)
        assert after[name][2] == bytes(values.half().bfloat16().view(torch.uint8).numpy())
    assert sum(before[name] == after[name] for name in before) > 0.5 * len(before)


@pytest.mark.parametrize("like", SIZES)
def test_all_sizes_pass_through_all_formats(like: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_checkpoint(like, source)
    run(source, tmp_path / "mlx", "mlx")
    run(tmp_path / "mlx", tmp_path / "x.gguf", "gguf")
    run(tmp_path / "x.gguf", tmp_path / "back", "hf")
    assert contents(tmp_path / "back") == contents(source)


def test_multimodal_checkpoint_keeps_its_towers_through_mlx(tmp_path: Path) -> None:
    source = given("tiny-e-release")
    there = run(source, tmp_path / "m", "mlx")
    run(tmp_path / "m", tmp_path / "back", "hf")
    assert there.deeds["rearranged"] > 0  # convolutions, whose channels MLX has last
    assert contents(tmp_path / "back") == contents(source)
    gone = run(source, tmp_path / "x.gguf", "gguf")
    assert any("vision tower" in why for why in gone.dropped)


def test_assistant_keeps_its_integers(tmp_path: Path) -> None:
    source = given("tiny-e-assistant")
    run(source, tmp_path / "m", "mlx", "q8")
    run(source, tmp_path / "n", "hf")
    assert contents(tmp_path / "n") == contents(source)
    with pytest.raises(CheckpointError, match="assistant"):
        run(source, tmp_path / "x.gguf", "gguf")


# ---- against the tools ----


@pytest.mark.parametrize(
    ("source", "quant", "wanted"),
    [("tiny-e", "mlx4", "tiny-e-mlx-4bit"), ("tiny-e", "mlx8", "tiny-e-mlx-8bit"), ("tiny-a", "mlx4", "tiny-a-mlx-4bit")],
)
def test_mlx_equals_what_mlx_lm_writes(source: str, quant: str, wanted: str, tmp_path: Path) -> None:
    run(given(source), tmp_path / "m", "mlx", quant)
    assert contents(tmp_path / "m") == contents(given(wanted))
    ours, theirs = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "m", given(wanted)))
    assert ours == theirs


@pytest.mark.parametrize(
    ("source", "quant", "wanted", "same"),
    [
        ("tiny-e", "Q8_0", "tiny-e-Q8_0.gguf", 163),
        ("tiny-e", "Q4_0", "tiny-e-Q4_0.gguf", 142),
        ("tiny-a", "Q4_0", "tiny-a-Q4_0.gguf", 121),
    ],
)
def test_gguf_equals_what_llama_cpp_writes(source: str, quant: str, wanted: str, same: int, tmp_path: Path) -> None:
    run(given(source), tmp_path / "x.gguf", "gguf", quant)
    ours, theirs = contents(tmp_path / "x.gguf"), contents(given(wanted))
    assert ours.keys() == theirs.keys()
    alike = [name for name in ours if ours[name][0] == theirs[name][0]]  # a few get other types there, such as Q6_K
    assert len(alike) >= same
    assert [name for name in alike if ours[name] != theirs[name]] == []


def test_gguf_py_reads_what_we_write(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
    run(DEMO_FOLDER, tmp_path / "x.gguf", "gguf", "Q8_0")
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    stored = contents(tmp_path / "x.gguf")
    assert {t.name: bytes(t.data.tobytes()) for t in reader.tensors} == {name: found[2] for name, found in stored.items()}
    raw = json.loads((DEMO_FOLDER / "tokenizer.json").read_text())
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert all(tokens[id] == piece for piece, id in raw["model"]["vocab"].items())
    assert reader.fields["tokenizer.ggml.merges"].contents() == [" ".join(pair) for pair in raw["model"]["merges"]]
    assert reader.fields["tokenizer.chat_template"].contents() == (DEMO_FOLDER / "chat_template.jinja").read_text()


@pytest.mark.parametrize("model", [DEMO_FOLDER, TINY_A], ids=["demo", "tiny-a"])
def test_mlx_lm_says_the_same(model: Path, tmp_path: Path) -> None:
    utils = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed")
    core = pytest.importorskip("mlx.core")
    import gemcutter

    run(model, tmp_path / "m", "mlx", "q4")
    theirs, _ = utils.load_model(tmp_path / "m")
    theirs.set_dtype(core.float32)
    mine = gemcutter.load(str(tmp_path / "m"), dtype="float32", context=256)
    ids = mine.tokenizer.encode("In the beginning God created the heaven and the", bos=True)
    expected = mine.generate([ids], max_tokens=12, ignore_eos=True, temperature=0.0, suppress=())[0].tokens
    logits = theirs(core.array([[*ids, *expected]]))[0, len(ids) - 1 : -1]
    assert core.argmax(logits, axis=-1).tolist() == list(expected)


@pytest.mark.slow
def test_transformers_loads_what_came_from_gguf(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    run(DEMO_FOLDER, tmp_path / "x.gguf", "gguf")
    run(tmp_path / "x.gguf", tmp_path / "back", "hf")
    text = "What is a lantern? <|turn>user\nNaïve 🙂  two"
    before, after = (transformers.AutoTokenizer.from_pretrained(path) for path in (DEMO_FOLDER, tmp_path / "back"))
    assert after(text).input_ids == before(text).input_ids
    assert after.decode(after(text).input_ids) == before.decode(before(text).input_ids)
    ids = torch.tensor([before(text).input_ids])
    with torch.inference_mode():
        logits = [
            transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits
            for path in (DEMO_FOLDER, tmp_path / "back")
        ]
    assert torch.equal(*logits)


# ---- quantization ----


def schemes(checkpoint: Checkpoint) -> dict[str, str]:
    return {name: found[0].data.dtype for name, found in checkpoint.matched.pieces.items() if found}


def test_q4_spends_bits_where_they_count(tmp_path: Path) -> None:
    run(DEMO_FOLDER, tmp_path / "m", "mlx", "q4")
    found = schemes(open_checkpoint(tmp_path / "m"))
    assert found["layers.0.attn.in"] == found["layers.9.mlp.out"] == "affine4g64"
    assert found["embed.tokens"] == "affine6g64"
    assert found["embed.ple"] == found["ple.in"] == found["layers.3.ple.gate"] == "affine8g64"
    assert found["norm"] == "BF16"


@pytest.mark.parametrize(("to", "target"), [("mlx", "m"), ("gguf", "x.gguf")])
def test_packed_weights_stay_or_become_dense_as_the_target_can_hold(to: str, target: str, tmp_path: Path) -> None:
    run(DEMO_FOLDER, tmp_path / "q" / target, to, "q8")
    again = run(tmp_path / "q" / target, tmp_path / "again" / target, to)
    assert contents(tmp_path / "again" / target) == contents(tmp_path / "q" / target)
    assert set(again.deeds) == {"kept"}
    same = run(tmp_path / "q" / target, tmp_path / "same" / target, to, "q8")
    assert contents(tmp_path / "same" / target) == contents(tmp_path / "q" / target)
    assert "requantized" not in same.deeds
    dense = run(tmp_path / "q" / target, tmp_path / "dense", "hf")
    assert dense.deeds["dequantized"] > 80
    piece = open_checkpoint(tmp_path / "q" / target).matched.pieces["layers.0.mlp.out"][0].data
    assert isinstance(piece, PackedTensor)
    values = piece.build().dequantize().bfloat16()
    stored = Source.open(tmp_path / "dense").tensors["model.layers.0.mlp.down_proj.weight"].torch()
    assert torch.equal(stored, values)


def test_quantizing_twice_is_told(tmp_path: Path) -> None:
    run(DEMO_FOLDER, tmp_path / "m", "mlx", "q8")
    report = run(tmp_path / "m", tmp_path / "x.gguf", "gguf", "q4")
    assert any("quantized already" in note for note in report.notes())


def test_float16_refuses_what_it_can_not_hold(tmp_path: Path) -> None:
    shutil.copytree(DEMO_FOLDER, tmp_path / "source")
    tensors = {name: tensor.torch().clone() for name, tensor in Source.open(DEMO_FOLDER).tensors.items()}
    tensors["model.layers.2.mlp.down_proj.weight"][3, 4] = 1e6
    specs = [(name, "BF16", tuple(tensor.shape)) for name, tensor in tensors.items()]
    write_safetensors(tmp_path / "source" / "model.safetensors", specs, tensors.values())
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp.*9\.99e\+05 exceeds float16"):
        run(tmp_path / "source", tmp_path / "out", "hf", "f16")
    assert beside(tmp_path / "out") == {"source"}


@pytest.mark.parametrize(("quant", "worst"), [("q4", 0.02), ("q8", 0.002)])
def test_loading_quantizes_like_converting_and_costs_little(quant: str, worst: float, tmp_path: Path) -> None:
    import gemcutter

    golden = json.loads((ROOT / "tests" / "goldens" / "prompts.json").read_text())
    ids = golden["passage_600"]["token_ids"]

    def nll(model: str, **options: str) -> float:
        loaded = gemcutter.load(model, dtype="float32", context=1024, **options)  # type: ignore[arg-type]
        found = loaded.generate([ids], max_tokens=0, prompt_logprobs=0)[0].prompt.logprobs
        return -sum(one.logprob for one in found) / len(found)

    plain, quantized = nll("demo"), nll("demo", quant=quant)
    assert quantized != plain
    assert abs(quantized - plain) < worst
    run(DEMO_FOLDER, tmp_path / "m", "mlx", quant)
    assert nll(str(tmp_path / "m")) == pytest.approx(quantized, abs=2e-3)  # but for the table, which loading leaves alone


def test_loading_refuses_other_quantizations() -> None:
    import gemcutter

    with pytest.raises(GemcutterError, match="quant: expected q4, q8, mlx4, mlx8, Q4_0 or Q8_0, found 'q5'"):
        gemcutter.load("demo", quant="q5")


# ---- keys and values that nobody reads ----


@pytest.mark.parametrize(("to", "target"), [("hf", "m"), ("mlx", "m"), ("gguf", "x.gguf")])
def test_shared_kv_is_restored_kept_and_dropped(to: str, target: str, tmp_path: Path) -> None:
    run(DEMO_FOLDER, tmp_path / "plain" / target, to)
    restored = run(DEMO_FOLDER, tmp_path / "restored" / target, to, "none", "restore")
    assert restored.deeds["restored"] == 4 * 3
    found = open_checkpoint(tmp_path / "restored" / target)
    assert len(found.matched.redundant) == 4 * 3
    for piece in found.matched.redundant:
        assert not isinstance(piece.data, PackedTensor)
        assert not piece.data.raw().any()
    kept = run(tmp_path / "restored" / target, tmp_path / "kept" / target, to)
    assert contents(tmp_path / "kept" / target) == contents(tmp_path / "restored" / target)
    assert not kept.dropped
    run(tmp_path / "restored" / target, tmp_path / "dropped" / target, to, "none", "drop")
    assert contents(tmp_path / "dropped" / target) == contents(tmp_path / "plain" / target)


def test_packed_files_drop_shared_kv_without_a_change_to_the_rest(tmp_path: Path) -> None:
    run(DEMO_FOLDER, tmp_path / "with", "mlx", "mlx4", "restore")
    run(DEMO_FOLDER, tmp_path / "without", "mlx", "mlx4")
    report = run(tmp_path / "with", tmp_path / "dropped", "mlx", "none", "drop")
    assert contents(tmp_path / "dropped") == contents(tmp_path / "without")
    assert sum(report.dropped.values()) == 4 * (2 * 3 + 1)  # k and v in three arrays each, and a norm


# ---- what is beside the tensors ----


def test_manifest_tells_what_was_done(tmp_path: Path) -> None:
    run(DEMO_FOLDER, tmp_path / "m", "mlx", "mlx4", "restore")
    found = json.loads((tmp_path / "m" / MANIFEST).read_text())
    assert found["options"] == {"to": "mlx", "quant": "mlx4", "shared_kv": "restore"}
    assert len(found["source"]["headers_sha256"]) == 64
    deeds = {tensor["name"]: (tensor["deed"], tensor["stored"]) for tensor in found["tensors"]}
    assert deeds["model.layers.0.mlp.gate_proj.weight"] == ("quantized", "affine4g64")
    assert deeds["model.norm.weight"] == ("kept", "BF16")
    assert deeds["model.layers.9.self_attn.k_norm.weight"] == ("restored", "BF16")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "m" / name).read_bytes() == (DEMO_FOLDER / name).read_bytes()


# ---- whole or not there ----


@pytest.mark.parametrize(
    ("target", "to", "quant", "expected"),
    [
        ("out", "gguf", "none", "ends in .gguf"),
        ("out.gguf", "hf", "none", "folder"),
        ("out", "hf", "q4", "hf files hold none, bf16, f16"),
        ("out", "mlx", "Q4_0", "mlx files hold"),
        ("out", "onnx", "none", "hf, mlx, gguf, mmproj"),
    ],
)
def test_wishes_that_can_not_be_fulfilled_are_refused(target: str, to: str, quant: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=expected):
        run(DEMO_FOLDER, tmp_path / target, to, quant)
    assert os.listdir(tmp_path) == []


def test_target_is_replaced_only_when_asked_and_only_if_it_is_ours(tmp_path: Path) -> None:
    run(DEMO_FOLDER, tmp_path / "m", "mlx")
    before = contents(tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"exists.*--force"):
        run(DEMO_FOLDER, tmp_path / "m", "mlx", "q8")
    assert contents(tmp_path / "m") == before
    run(DEMO_FOLDER, tmp_path / "m", "mlx", "q8", force=True)
    assert contents(tmp_path / "m") != before
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(CheckpointError, match="not written by convert"):
        run(DEMO_FOLDER, tmp_path / "home", "hf", force=True)
    with pytest.raises(CheckpointError, match="the source itself"):
        run(tmp_path / "m", tmp_path / "m", "hf", force=True)
    run(DEMO_FOLDER, tmp_path / "x.gguf", "gguf")
    with pytest.raises(CheckpointError, match="exists"):
        run(DEMO_FOLDER, tmp_path / "x.gguf", "gguf")
    run(DEMO_FOLDER, tmp_path / "x.gguf", "gguf", "q8", force=True)
    assert beside(tmp_path / "m") == {"m", "home", "x.gguf", f"x.{MANIFEST}"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(CheckpointError, match="can't be written"):
        run(DEMO_FOLDER, tmp_path / "closed" / "m", "hf")


CONVERT = """
import sys, time
from pathlib import Path
from gemcutter.checkpoint.convert.convert import convert
def wait(done, total):
    print(done, flush=True)
    time.sleep(float(sys.argv[4]))
convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[5], force=True, progress=wait)
"""


def child(source: Path, target: Path, to: str, pause: float, quant: str = "none") -> list[str]:
    return [sys.executable, "-c", CONVERT, str(source), str(target), to, str(pause), quant]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("to", "name", "with_old"), [("mlx", "m", True), ("gguf", "x.gguf", False)], ids=["mlx-replacing", "gguf-fresh"]
)
def test_killed_run_leaves_no_half_and_its_leftovers_go(to: str, name: str, with_old: bool, tmp_path: Path) -> None:
    source, target = tmp_path / "in" / "source", tmp_path / "out" / name
    shutil.copytree(DEMO_FOLDER, source)
    if with_old:
        run(source, target, to, "q8")
    before, old = contents(source), contents(target) if with_old else None
    with subprocess.Popen(child(source, target, to, 0.05), stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        for _ in range(10):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert any(".partial-" in left for left in beside(target))
    assert contents(source) == before
    assert (contents(target) if target.exists() else None) == old
    run(source, target, to, force=with_old)
    assert not any(".partial-" in left for left in beside(target))
    assert len(contents(target)) >= len(before)


@pytest.mark.slow
def test_living_run_is_left_alone(tmp_path: Path) -> None:
    with subprocess.Popen(child(DEMO_FOLDER, tmp_path / "m", "hf", 0.005), stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        process.stdout.readline()
        (working,) = (name for name in beside(tmp_path / "m") if ".partial-" in name)
        run(DEMO_FOLDER, tmp_path / "m", "hf", "bf16")
        assert working in beside(tmp_path / "m")
        process.communicate()
        assert process.returncode == 0  # it came last, and was allowed to replace
    assert beside(tmp_path / "m") == {"m"}


def test_folder_that_stepped_aside_comes_back(tmp_path: Path) -> None:
    run(DEMO_FOLDER, tmp_path / "m", "mlx")
    before = contents(tmp_path / "m")
    (tmp_path / "m").rename(tmp_path / "m.replaced-0123abcd")  # as a kill between the two renames leaves it
    with pytest.raises(CheckpointError, match="exists"):
        run(DEMO_FOLDER, tmp_path / "m", "mlx")
    assert contents(tmp_path / "m") == before
    assert beside(tmp_path / "m") == {"m"}


@pytest.mark.slow
@pytest.mark.parametrize(("to", "name"), [("hf", "m"), ("gguf", "x.gguf")])
def test_full_disk_is_told_and_leaves_nothing(to: str, name: str, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    command = child(DEMO_FOLDER, tmp_path / name, to, 0.0)
    found = subprocess.run(command, preexec_fn=limit, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert "can't be written: File too large" in found.stderr
    assert os.listdir(tmp_path) == []


def test_lack_of_room_is_told_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match="1 bytes free"):
        run(DEMO_FOLDER, tmp_path / "m", "hf")
    assert os.listdir(tmp_path) == []


# ---- memory ----

PEAK = """
import resource, sys
from pathlib import Path
import torch
from gemcutter.checkpoint.convert.convert import convert
torch.set_num_threads(1)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(Path(sys.argv[1]), Path(sys.argv[2] + "/warm"), "hf")
before = peak()
convert(Path(sys.argv[3]), Path(sys.argv[2]) / sys.argv[4], sys.argv[5], sys.argv[6])
print((peak() - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("to", "name", "quant"), [("hf", "m", "f16"), ("mlx", "m", "mlx4"), ("gguf", "x.gguf", "Q8_0")])
def test_memory_is_a_tile_and_not_a_tensor(to: str, name: str, quant: str, tmp_path: Path) -> None:
    source = tmp_path / "large"
    shutil.copytree(DEMO_FOLDER, source)
    raw = json.loads((source / "config.json").read_text())
    rows = 131072
    (source / "config.json").write_text(json.dumps(raw | {"vocab_size": rows, "vocab_size_per_layer_input": 4096}))
    tensors = {name: tensor.torch() for name, tensor in Source.open(DEMO_FOLDER).tensors.items()}
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].repeat(rows // 4096, 1)
    specs = [(key, "BF16", tuple(tensor.shape)) for key, tensor in tensors.items()]
    write_safetensors(source / "model.safetensors", specs, tensors.values())
    largest = 2 * rows * 256
    command = [sys.executable, "-c", PEAK, str(DEMO_FOLDER), str(tmp_path), str(source), name, to, quant]
    started = time.perf_counter()
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert time.perf_counter() - started < 120
    assert int(found.stdout) < largest
