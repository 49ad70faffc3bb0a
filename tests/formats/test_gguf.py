"""GGUF checkpoints of Gemma 4: the files of llama.cpp against its numbers, every block type, layout and damage.

The dense oracle reads the same bytes with the gguf library, so that differences are ours and not the quantizer's.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gemcutter
from gemcutter.checkpoint.container.lazy_tensor import LazyTensor
from gemcutter.checkpoint.container.source import Source
from gemcutter.checkpoint.container.stored_tensor import PackedTensor
from gemcutter.checkpoint.formats import gguf
from gemcutter.checkpoint.load.load_params import load_params
from gemcutter.checkpoint.load.match import Checkpoint, open_checkpoint, read_checkpoint
from gemcutter.checkpoint.remote.hub import DEMO_FOLDER
from gemcutter.errors import CheckpointError, ConfigError
from gemcutter.model.text import Decoder
from gemcutter.plan import ModelPlan
from gemcutter.quant import Weight, gguf_blocks
from tests.gguf_files import Tensors, dense, describe, divisors, every, save, tensors_of
from tests.parity.test_golden import Engine, Request, loss, report, run
from tests.topologies import relative_error, run_alone
from tests.trained import golden, trained

TINY_A = Path(__file__).parents[1] / "goldens" / "tiny-a"
FILES = ["tiny-e-Q8_0.gguf", "tiny-e-Q4_0.gguf", "tiny-e-Q4_K_M.gguf", "tiny-a-Q4_0.gguf"]


@functools.cache
def opened(path: Path) -> Checkpoint:
    return open_checkpoint(path)


@functools.cache
def original(name: str) -> tuple[ModelPlan, Tensors]:
    """Return tensors of a checkpoint that the files here are made from, and its plan with what GGUF takes for granted."""
    checkpoint = opened({"e": DEMO_FOLDER, "a": TINY_A}[name])
    return replace(checkpoint.plan, bidirectional=not checkpoint.plan.ple_dim), tensors_of(checkpoint)


def decoder_of(checkpoint: Checkpoint, kernels: str = "reference") -> Decoder:
    return Decoder(checkpoint.plan, load_params(checkpoint, torch.float32, torch.device("cpu")), torch.float32, "cpu", kernels)


def make(folder: Path, name: str = "e", kind: str = "Q8_0", **options: Any) -> Path:
    """Write a GGUF file of a checkpoint, its matrices all in one type."""
    plan, tensors = original(name)
    return save(folder / "model.gguf", plan, options.pop("tensors", tensors), every(kind), **{"extra": divisors(plan)} | options)


# ---- llama.cpp's files and numbers ----


def engine_of(name: str) -> Engine:
    return Engine(decoder_of(opened(trained(name)), "auto"), 1024, max_batched_tokens=512, max_num_seqs=12)


@pytest.mark.parametrize("name", FILES)
def test_losses_are_those_of_llama_cpp(name: str) -> None:
    """It rounds activations to 8 bits, which moves the loss by a few hundredths of a percent."""
    mean, count = loss(engine_of(name), [golden("prompts")["passage_600"]["token_ids"]])
    assert count == golden(name)["passage_600"]["n_predicted"]
    assert mean == pytest.approx(golden(name)["passage_600"]["nll_mean"], rel=1e-3)


@pytest.mark.parametrize(("name", "golden_name", "kind"), [("e", "tiny-e-f16", "F16"), ("a", "tiny-a-Q8_0", "Q8_0")])
def test_files_too_large_to_keep_are_made_again(name: str, golden_name: str, kind: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make(tmp_path, name, kind))
    engine = Engine(decoder_of(checkpoint, "auto"), 1024, max_batched_tokens=512, max_num_seqs=1)
    mean, _ = loss(engine, [golden("prompts")["passage_600"]["token_ids"]])
    assert mean == pytest.approx(golden(f"{golden_name}.gguf")["passage_600"]["nll_mean"], rel=1e-3)


@pytest.mark.parametrize("name", FILES)
def test_greedy_text_is_that_of_llama_cpp(name: str) -> None:
    """Two thirds of the texts agree; the others part where llama.cpp's own choice was narrow."""
    prompts = golden(name)["prompts"]
    answers = run(engine_of(name), [Request(tuple(each["token_ids"]), max_tokens=16, top_logits=10) for each in prompts])
    whole = 0
    for each, events in zip(prompts, answers, strict=True):
        parted = [step for step, event in enumerate(events) if event.token != each["greedy_ids"][step]]
        assert not parted or each["greedy_margins"][parted[0]] < 0.3, each["id"]
        whole += not parted
        assert len(set(dict(report(events).top_logits)) & set(each["top10_ids"])) >= 8, each["id"]
    assert whole >= 8


@pytest.mark.parametrize("name", FILES)
def test_logits_are_those_of_the_dense_values(name: str) -> None:
    ids = tuple(golden("prompts")["passage_600"]["token_ids"][:150])  # beyond two windows
    checkpoint = opened(trained(name))
    found, wanted = (run_alone(decoder, ids, chunk=64).logits for decoder in (decoder_of(checkpoint), dense(checkpoint)))
    assert relative_error(found, wanted) < 1e-5


@pytest.mark.parametrize("name", FILES)
def test_plan_and_config_are_the_original_s(name: str) -> None:
    mine = opened(trained(name))
    assert mine.plan == original(name[5])[0]
    assert mine.format == "GGUF"
    assert not mine.matched.notes(mine.plan)


@pytest.mark.parametrize("name", FILES)
def test_weights_stay_in_the_file(name: str) -> None:
    """What is held beside the mapped file is a few vectors: under 5 % of it."""
    checkpoint = opened(trained(name))
    params = load_params(checkpoint, torch.float32, torch.device("cpu"))
    mapped = next(iter(checkpoint.source.tensors.values())).mapped
    start = torch.frombuffer(mapped.mapping(), dtype=torch.uint8).data_ptr()
    inside = range(start, start + mapped.size_bytes)
    held = 0
    for param in params.values():
        for part in param.parts if isinstance(param, Weight) else (param,):
            data = part.data if isinstance(part, gguf_blocks.Blocks) else part
            assert isinstance(data, torch.Tensor)
            held += 0 if data.data_ptr() in inside else data.nbytes
    assert 0 < held < 0.05 * mapped.size_bytes


# ---- files made here ----


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", *gguf.BLOCKS[:-2]])
def test_every_type_runs_as_its_dense_values(kind: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make(tmp_path, kind=kind))
    stored = {piece.data.dtype for pieces in checkpoint.matched.pieces.values() for piece in pieces}
    assert kind in stored
    ids = tuple(range(40, 52))
    found, wanted = (run_alone(decoder, ids, chunk=5).logits for decoder in (decoder_of(checkpoint), dense(checkpoint)))
    assert wanted.isfinite().all()
    assert relative_error(found, wanted) < 1e-5


def test_types_are_those_that_are_decoded() -> None:
    assert set(gguf.BLOCKS) == set(gguf_blocks.TYPES)


@pytest.mark.parametrize("name", ["e", "a"])
def test_lossless_files_are_the_original(name: str, tmp_path: Path) -> None:
    """A bfloat16 model in BF16: the same bits in another container, of every trait that the two sizes have."""
    plan, tensors = original(name)
    checkpoint = open_checkpoint(make(tmp_path, name, "BF16"))
    assert checkpoint.plan == plan
    for pieces in checkpoint.matched.pieces.values():
        for piece in pieces:
            assert isinstance(piece.data, LazyTensor)
            assert piece.data.torch().equal(tensors[str(piece.name), piece.part].to(piece.data.torch().dtype)), piece.label


def test_shared_keys_and_values_are_left_out(tmp_path: Path) -> None:
    plan, tensors = original("e")
    donor = {part: tensors["layers.5.attn.in", part] for part in ("k", "v")}
    spare: Tensors = {}
    for layer in plan.layers[6:9]:
        spare |= {(f"layers.{layer.index}.attn.in", part): torch.randn(*donor[part].shape) for part in donor}
        spare[f"layers.{layer.index}.attn.k_norm", None] = torch.randn(layer.head_dim)
    whole = open_checkpoint(make(tmp_path, kind="Q4_0", tensors=tensors | spare))
    (tmp_path / "bare").mkdir()
    bare = open_checkpoint(make(tmp_path / "bare", kind="Q4_0"))
    assert (whole.plan, len(whole.matched.redundant)) == (bare.plan, 9)
    assert whole.matched.notes(plan)[0].startswith("9 tensors of 3 layers that do not use them skipped")
    ids = tuple(range(60, 80))
    assert run_alone(decoder_of(whole), ids, chunk=7).logits.equal(run_alone(decoder_of(bare), ids, chunk=7).logits)


@pytest.mark.parametrize("name", ["e", "a"])
def test_other_ways_to_store_the_same_weights(name: str, tmp_path: Path) -> None:
    """q, k and v in one tensor; gates and ups of all experts in two instead of one."""
    plan, tensors = original(name)
    changed = dict(tensors)
    for layer in plan.layers:
        prefix = f"layers.{layer.index}."
        if name == "e":
            parts = [changed.pop((f"{prefix}attn.in", part)) for part, _ in layer.attn_parts()]
            changed[f"{prefix}attn.in", None] = torch.cat(parts)
        else:
            gate, up = changed.pop((f"{prefix}moe.in", None)).chunk(2, dim=1)
            changed |= {(f"{prefix}moe.in", "gate"): gate, (f"{prefix}moe.in", "up"): up}
    usual = open_checkpoint(make(tmp_path, name, "Q4_0"))
    (tmp_path / "other").mkdir()
    other = open_checkpoint(make(tmp_path / "other", name, "Q4_0", tensors=changed))
    assert len(other.source.tensors) != len(usual.source.tensors)
    ids = tuple(range(100, 120))
    assert run_alone(decoder_of(other), ids, chunk=20).logits.equal(run_alone(decoder_of(usual), ids, chunk=20).logits)


def test_a_split_file_is_the_whole(tmp_path: Path) -> None:
    make(tmp_path, parts=3)
    assert len(list(tmp_path.glob("*.gguf"))) == 3
    whole = open_checkpoint(tmp_path)
    assert whole.plan == original("e")[0]
    assert len({piece.data.origin.split(":")[0] for pieces in whole.matched.pieces.values() for piece in pieces}) == 3


def test_towers_in_the_same_file_are_left_aside(tmp_path: Path) -> None:
    """Ollama keeps them there, with layers that are called like the decoder's."""
    tower = {f"v.blk.{index}.attn_k.weight": np.ones((4, 4), np.float32) for index in range(12)}
    tower |= {"a.blk.0.attn_k.weight": np.ones((4, 4), np.float32), "mm.input_projection.weight": np.ones((4, 4), np.float32)}
    checkpoint = open_checkpoint(
        make(tmp_path, extra=tower | divisors(original("e")[0]), metadata={"vision.block_count": 12, "audio.block_count": 1})
    )
    assert {kind: len(pieces) for kind, pieces in checkpoint.matched.other_modules.items()} == {
        "vision tower": 13,
        "audio tower": 1,
    }


def test_spell_is_the_inverse_of_translate() -> None:
    for name in ("e", "a"):
        for canonical, part in original(name)[1]:
            assert gguf.translate(gguf.spell(canonical, part)) == (canonical, part)


def test_packed_pieces_say_what_they_are(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make(tmp_path, kind="Q4_K"))
    (piece,) = checkpoint.matched.pieces["layers.0.attn.out"]
    assert isinstance(piece.data, PackedTensor)
    assert (piece.data.dtype, piece.data.shape, piece.data.origin) == ("Q4_K", (256, 256), "model.gguf:blk.0.attn_output.weight")


# ---- what is refused ----


BAD_METADATA: list[tuple[dict[str, Any], str]] = [
    ({"embedding_length": None}, "gemma4.embedding_length: missing"),
    ({"attention.head_count": "four"}, "gemma4.attention.head_count: expected an integer, found 'four'"),
    ({"attention.head_count_kv": [1, 1]}, "gemma4.attention.head_count_kv: expected an integer, or one for each of 10 layers"),
    ({"attention.layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon: expected a finite number"),
    ({"feed_forward_length": [512] * 9 + [1024]}, "gemma4.feed_forward_length: expected [512, 512, 512,"),
    ({"attention.value_length": 64}, "gemma4.attention.value_length: expected 128, found 64"),
    ({"rope.dimension_count": 32}, "gemma4.rope.dimension_count: expected 128, found 32"),
    ({"attention.sliding_window_pattern": "odd"}, "attention.sliding_window_pattern: expected an integer"),
    ({"attention.scale": 0.5}, "gemma4.attention.scale: expected 1, found 0.5"),
    ({"novelty": 3}, "gemma4.novelty: unknown key (3); if it can't change the maths, pass --ignore gemma4.novelty"),
    ({"block_count": 0}, "gemma4.block_count: 0 layers"),
    ({"block_count": 2**32 - 1}, "gemma4.block_count: 4294967295 layers"),
    ({"attention.shared_kv_layers": 10}, "feed_forward_length"),
    ({"attention.key_length": 0, "attention.value_length": 0}, "global_head_dim: expected an integer from 1"),
]


@pytest.mark.parametrize(("change", "expected"), BAD_METADATA, ids=lambda value: value if isinstance(value, str) else None)
def test_bad_metadata_is_told(change: dict[str, Any], expected: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        open_checkpoint(make(tmp_path, metadata=change))
    assert "model.gguf" in str(caught.value)
    assert expected in str(caught.value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return Source.open(make(tmp_path_factory.mktemp("whole")))


KEYS = st.sampled_from([key for key in describe(original("e")[0], "gemma4") if "." not in key or not key.startswith("tokenizer")])
ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 3),
    st.integers(-(2**63), 2**64),
    st.floats(),
    st.text(max_size=4),
    st.just("an array"),
)


@settings(max_examples=300, deadline=None)
@given(changes=st.dictionaries(KEYS, ANYTHING, min_size=1, max_size=3), architecture=st.sampled_from(["gemma4", "gemma3"]))
def test_any_metadata_is_read_or_refused(changes: dict[str, Any], architecture: str, whole: Source) -> None:
    array = whole.metadata["gemma4.attention.sliding_window_pattern"]
    metadata = {key.replace("gemma4", architecture): value for key, value in whole.metadata.items()}
    metadata["general.architecture"] = architecture
    for key, value in changes.items():
        metadata[f"{architecture}.{key}"] = array if value == "an array" else value
    with contextlib.suppress(ConfigError, CheckpointError):
        read_checkpoint(replace(whole, metadata=metadata))


def test_all_bad_keys_come_at_once_and_some_can_be_ignored(tmp_path: Path) -> None:
    path = make(tmp_path, metadata={"novelty": 3, "embedding_length": None, "attention.head_count": -1.5})
    with pytest.raises(ConfigError) as caught:
        open_checkpoint(path)
    assert len(caught.value.problems) == 3
    assert open_checkpoint(make(tmp_path, metadata={"novelty": 3}), ignore=["gemma4.nov*"]).plan == original("e")[0]


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("clip", "a projector for images and audio"),
        ("llama", "of the architecture 'llama'"),
    ],
)
def test_other_architectures_are_refused(architecture: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=expected):
        open_checkpoint(make(tmp_path, architecture=architecture))


def test_an_assistant_must_say_how_wide_its_target_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gemma4-assistant\.embedding_length_out: missing"):
        open_checkpoint(make(tmp_path, architecture="gemma4-assistant"))


def test_divisors_that_are_no_gemma_s_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rope_freqs\.weight: expected ones and then huge divisors"):
        open_checkpoint(make(tmp_path, extra={"rope_freqs.weight": np.linspace(1, 8, 64, dtype=np.float32)}))
    with pytest.raises(ConfigError, match=r"rope_freqs\.weight: expected ones and then huge divisors in F32"):
        open_checkpoint(make(tmp_path, extra={"rope_freqs.weight": np.ones(64, np.float16)}))
    many = make(tmp_path, extra={"rope_freqs.weight": np.ones(1 << 17, np.float32)})  # headers may promise terabytes
    with pytest.raises(ConfigError, match=r"rope_freqs\.weight: expected ones and then huge divisors in F32"):
        open_checkpoint(many)
    assert open_checkpoint(make(tmp_path, extra={})).plan == original("e")[0]


def test_what_cannot_be_unpacked_is_told_from_headers(tmp_path: Path) -> None:
    """A type without a decoder, and blocks that lie across two layers' values in the per-layer table."""
    path, plan = make(tmp_path), original("e")[0]
    source = Source.open(path)
    changes = {
        "blk.0.ffn_down.weight": ("Q8_K", (256, 512), "Q8_K is not read, only F32, F16, BF16, Q4_0"),
        "per_layer_token_embd.weight": ("Q6_K", (4096, 768), "Q6_K's blocks of 256 span several layers of 64 values each"),
    }
    for name, (dtype, shape, _) in changes.items():
        source.tensors[name] = replace(source.tensors[name], dtype=dtype, shape=shape)
    faults = {piece.data.name: piece.fault for piece in gguf.pieces(source, plan) if piece.fault}
    assert faults.keys() == changes.keys()
    assert all(str(faults[name]).startswith(expected) for name, (*_, expected) in changes.items())
    with pytest.raises(CheckpointError, match=r"packing    embed\.ple: .*: Q6_K's blocks"):
        read_checkpoint(source)


def test_missing_and_unknown_tensors_are_all_named(tmp_path: Path) -> None:
    tensors = {key: value for key, value in original("e")[1].items() if key not in [("norm", None), ("layers.3.attn.in", "k")]}
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(make(tmp_path, tensors=tensors, extra={"blk.0.foo.weight": np.ones(4, np.float32)}))
    assert list(caught.value.problems) == [
        "missing    layers.3.attn.in[k] (64, 256): blk.3.attn_k.weight is in no file; download them again",
        "missing    norm (256,): output_norm.weight is in no file; download them again",
        "unknown    model.gguf:blk.0.foo.weight: not part of this model; --ignore 'blk.0.foo.weight' to skip it",
    ]


# ---- from a path to a text ----


def test_a_file_without_a_vocabulary_takes_what_lies_beside_it(tmp_path: Path) -> None:
    path = make(tmp_path)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        gemcutter.load(str(path), dtype="float32", context=64)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((DEMO_FOLDER / name).read_bytes())
    assert gemcutter.load(str(tmp_path), dtype="float32", context=64).generate("In the beginning", max_tokens=4).text


def test_a_file_is_all_that_a_chat_needs() -> None:
    model = gemcutter.load(str(trained("tiny-e-Q4_K_M.gguf")), dtype="float32", context=256)
    demo = gemcutter.load("demo", dtype="float32", context=256)
    assert model.defaults.stop_ids == demo.defaults.stop_ids
    assert model.defaults.suppress == demo.defaults.suppress
    question = [{"role": "user", "content": "What is a synonym of big?"}]
    assert model.encode(question) == demo.encode(question)
    assert model.chat(question, max_tokens=12).text == demo.chat(question, max_tokens=12).text
