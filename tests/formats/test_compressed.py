"""Quantized Hugging Face files: every layout that is published for this family loads packed, and means what its writer says.

Owns the matrix of layouts, sizes, expert names and prefixes, what stays in place, and what the loader leaves alone. Read
`packers.py` for the tools that write the layouts, `test_compressed_broken.py` for what is refused. The values of single weights
are the business of `tests/unit/test_quant_scaled_int.py` and `test_quant_micro.py`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemcutter.checkpoint.container.lazy_tensor import LazyTensor, MappedFile
from gemcutter.checkpoint.container.source import Source
from gemcutter.checkpoint.container.stored_tensor import PackedTensor
from gemcutter.checkpoint.formats import compressed
from gemcutter.checkpoint.load.match import Checkpoint, format_of, open_checkpoint
from gemcutter.checkpoint.write.synth import SIZES
from gemcutter.model.text import Decoder
from gemcutter.quant import Weight, dequantize
from gemcutter.quant.packed import DenseStack, Stack
from tests.formats.packers import GROUP, PACKERS, Stored, pack_ct, pack_gemma, pack_gptq, words_of
from tests.formats.quantized import (
    APART,
    APART_MOE,
    FUSED,
    LINEARS,
    MOE,
    SUFFIXED,
    TEXT,
    WRAPPER,
    Files,
    params_of,
    quantize,
    random_model,
    write,
)
from tests.topologies import relative_error, run_alone

IDS = tuple(range(3, 23))
Q = "model.layers.0.self_attn.q_proj."


def values_of(param: Weight | Tensor) -> Tensor:
    return torch.cat([dequantize(part) for part in param.parts], dim=-2) if isinstance(param, Weight) else param


def check_equal(files: Files) -> tuple[Checkpoint, dict[str, Weight | Tensor]]:
    """Load both files and insist that every parameter is the same, bit for bit; give the packed one."""
    (checkpoint, packed), (_, dense) = params_of(files.packed), params_of(files.dense)
    assert list(packed) == list(dense)
    for name, wanted in dense.items():
        assert torch.equal(values_of(packed[name]), values_of(wanted)), name
    return checkpoint, packed


def logits(path: Path, kernels: str = "auto") -> Tensor:
    checkpoint, params = params_of(path)
    return run_alone(Decoder(checkpoint.plan, params, torch.float32, "cpu", kernels), IDS, chunk=7).logits


def is_packed(param: Weight | Tensor) -> bool:
    return isinstance(param, Weight) and not any(isinstance(part, Tensor) for part in param.parts)


# ---- the matrix ----


@pytest.mark.parametrize("like", SIZES)
@pytest.mark.parametrize("layout", PACKERS)
def test_every_layout_of_every_size_is_its_dense_twin(layout: str, like: str, tmp_path: Path) -> None:
    """Prefixes and towers alternate along the diagonal, so that each layout and each size meets both."""
    pack, config = PACKERS[layout]
    is_wrapped = (list(SIZES).index(like) + list(PACKERS).index(layout)) % 2
    tower = {"model.vision_tower.encoder.layers.0.self_attn.k_proj.linear.weight_packed": torch.zeros(4, 4, dtype=torch.int32)}
    files = quantize(tmp_path, like, pack, config(), prefix=WRAPPER if is_wrapped else TEXT, extra=tower if is_wrapped else {})
    checkpoint, params = check_equal(files)
    assert checkpoint.format == compressed.NAME
    assert checkpoint.matched.other_modules.keys() <= {"vision tower", "scales of activations"}
    linears = [name for name in params if name.endswith(("attn.in", "attn.out", "mlp.in", "mlp.out", "moe.in", "moe.out"))]
    assert all(is_packed(params[name]) for name in linears)
    assert not is_packed(params["embed.tokens"])
    for name, pieces in checkpoint.matched.pieces.items():
        for piece, part in zip(pieces, getattr(params[name], "parts", ()), strict=False):
            if isinstance(piece.data, PackedTensor):
                assert piece.data.dtype == part.scheme, "headers alone must tell the scheme"


@pytest.mark.parametrize("experts", [FUSED, APART, APART_MOE, SUFFIXED])
@pytest.mark.parametrize("layout", PACKERS)
def test_experts_come_under_every_name(layout: str, experts: str, tmp_path: Path) -> None:
    pack, config = PACKERS[layout]
    if experts == FUSED and layout.startswith(("gptq", "auto-round", "awq")):
        pytest.skip("these layouts have no stacks of experts: they store columns first")
    _, params = check_equal(quantize(tmp_path, MOE, pack, config(), experts=experts))
    moe_in = params["layers.0.moe.in"]
    assert isinstance(moe_in, Weight)
    assert moe_in.names == ("gate", "up")
    assert all(isinstance(part, Stack) is (experts != FUSED) for part in moe_in.parts)
    assert torch.equal(values_of(moe_in.expert(3)), values_of(moe_in)[3])


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize(
    ("layout", "like"),
    [
        ("ct-W4A16", "E2B"),
        ("ct-FP8_BLOCK", "E4B"),
        ("ct-NVFP4", "12B"),
        ("ct-W4A16_ASYM", MOE),
        ("modelopt-nvfp4", MOE),
        ("gptq", "31B"),
        ("awq", MOE),
        ("gemma-2-bit", "E2B"),
        ("ct-W8A8", "31B"),
        ("ct-MXFP8", MOE),
    ],
)
def test_logits_equal_the_dense_run_over_the_dequantized_values(layout: str, like: str, kernels: str, tmp_path: Path) -> None:
    pack, config = PACKERS[layout]
    files = quantize(tmp_path, like, pack, config(), prefix=WRAPPER)
    assert relative_error(logits(files.packed, kernels), logits(files.dense, kernels)) <= 1e-5


# ---- memory ----


@pytest.mark.parametrize("layout", ["ct-W4A16", "ct-FP8_DYNAMIC", "ct-NVFP4", "ct-W8A8", "gemma-4-bit", "modelopt-fp8"])
def test_weights_stay_as_large_as_the_file(layout: str, tmp_path: Path) -> None:
    pack, config = PACKERS[layout]
    files = quantize(tmp_path, MOE, pack, config())
    _, params = params_of(files.packed)
    assert sum(param.nbytes for param in params.values()) <= 1.05 * files.size_bytes


def test_codes_are_views_of_the_file(tmp_path: Path) -> None:
    pack, config = PACKERS["ct-W4A16"]
    checkpoint, params = params_of(quantize(tmp_path, MOE, pack, config()).packed)
    for name in ("layers.0.attn.in", "layers.0.moe.out"):
        (piece, *_), param = checkpoint.matched.pieces[name], params[name]
        assert isinstance(piece.data, PackedTensor)
        assert isinstance(param, Weight)
        first = param.parts[0].items[0] if isinstance(param.parts[0], Stack) else param.parts[0]
        assert first.codes.data_ptr() == piece.data.stored[0].raw().data_ptr()


def test_headers_are_enough_to_match(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack, config = PACKERS["ct-W4A16_ASYM"]
    files = quantize(tmp_path, MOE, pack, config())
    monkeypatch.setattr(MappedFile, "mapping", lambda self: pytest.fail(f"{self.path} was read while matching"))
    assert open_checkpoint(files.packed).plan.layers


# ---- dense experts, ignored modules, redundant and foreign tensors ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("experts", [APART, APART_MOE])
def test_dense_experts_that_are_stored_apart_are_never_copied(experts: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Nothing is quantized here: some writers only unstack the experts."""
    files = quantize(tmp_path, MOE, lambda weight: ({"weight": weight.to(dtype)}, weight), None, experts=experts)
    checkpoint, params = check_equal(files)
    for name in ("layers.1.moe.in", "layers.1.moe.out"):
        param, pieces = params[name], checkpoint.matched.pieces[name]
        assert isinstance(param, Weight)
        assert param.stored == str(dtype).removeprefix("torch.")
        assert param.expert(2).is_dense
        for part, piece in zip(param.parts, pieces, strict=True):
            assert isinstance(part, DenseStack)
            assert isinstance(piece.data, PackedTensor)
            assert [item.data_ptr() for item in part.items] == [stored.raw().data_ptr() for stored in piece.data.stored]
            assert part.nbytes == piece.data.nbytes
    assert relative_error(logits(files.packed), logits(files.dense)) <= 1e-5


def test_modules_that_were_ignored_are_dense(tmp_path: Path) -> None:
    """ModelOpt's 31B release packs the feed-forward alone; whatever the config says of it, the file decides."""
    pack, config = PACKERS["modelopt-nvfp4"]
    files = quantize(tmp_path, "31B", pack, config())
    dense, stored = load_file(files.dense / "model.safetensors"), load_file(files.packed / "model.safetensors")
    for name, tensor in dense.items():
        if ".self_attn." in name and name.endswith(LINEARS):
            for ending in ("weight", "weight_scale", "weight_scale_2", "input_scale"):
                del stored[name.removesuffix("weight") + ending]
            stored[name] = tensor
    save_file(stored, files.packed / "model.safetensors")
    _, params = check_equal(files)
    assert not is_packed(params["layers.0.attn.in"])
    assert is_packed(params["layers.0.mlp.in"])


def test_tables_may_be_packed(tmp_path: Path) -> None:
    """As in Gemma's mobile files: 2-bit tables and head of their own, a scale for each layer's share of a PLE row."""
    raw, tensors = random_model("E4B")
    raw, layers = raw | {"tie_word_embeddings": False}, raw["num_hidden_layers"]
    twin, stored = dict(tensors), {name: tensor.bfloat16() for name, tensor in tensors.items()}
    twin["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 0.5
    for name, pack in {
        "model.embed_tokens.": partial(pack_gemma, 2, "embedding_quantized", 1),
        "model.embed_tokens_per_layer.": partial(pack_gemma, 4, "embedding_quantized", layers),
        "lm_head.": partial(pack_gemma, 2, "weight", 1),
    }.items():
        one, twin[f"{name}weight"] = pack(twin[f"{name}weight"])
        stored.pop(f"{name}weight", None)
        stored |= {name + ending: tensor for ending, tensor in one.items()}
    quantization = {"quant_method": "gemma", "num_bits": 4, "module_quant_configs": {"^lm_head$": {"num_bits": 2}}}
    files = Files(write(tmp_path / "packed", raw, stored, quantization), write(tmp_path / "dense", raw, twin), 0)
    _, params = check_equal(files)
    assert all(is_packed(params[name]) for name in ("embed.tokens", "embed.ple", "head"))
    assert relative_error(logits(files.packed), logits(files.dense)) <= 1e-5


def test_gemmas_own_quantizer_agrees() -> None:
    from transformers.integrations.gemma_quant import QuantizedEmbedding, QuantizedLinear

    for bits in (2, 4, 8):
        stored, values = pack_gemma(bits, "weight", 1, torch.randn(16, 64))
        module = QuantizedLinear(64, 16, num_bits=bits)
        module.load_state_dict(stored)
        assert torch.equal(module._dequantize_weights(), values)
        stored, values = pack_gemma(bits, "embedding_quantized", 4, torch.randn(16, 64))
        table = QuantizedEmbedding(16, 64, torch.float32, num_bits=bits)
        table.embedding_quantized.data, table.embedding_scale.data = stored["embedding_quantized"], stored["embedding_scale"]
        assert torch.equal(table.weight, values)


def test_what_readers_do_not_need_is_skipped_with_its_scales(tmp_path: Path) -> None:
    """The mobile releases keep packed keys and values of layers that read another's."""
    pack, config = PACKERS["ct-W4A16"]
    one, _ = pack(torch.randn(16, 64))
    reader = random_model("E2B")[0]["num_hidden_layers"] - 1
    extra = {f"model.layers.{reader}.self_attn.{part}_proj.{ending}": t.clone() for part in "kv" for ending, t in one.items()}
    extra |= {"model.layers.0.self_attn.k_proj.k_scale": torch.tensor(0.5), "model.layers.0.self_attn.q_scale": torch.tensor(0.5)}
    extra |= {"model.layers.0.self_attn.q_proj.input_global_scale": torch.tensor([0.5])}
    checkpoint, _ = check_equal(quantize(tmp_path, "E2B", pack, config(), extra=extra))
    assert len(checkpoint.matched.redundant) == 2
    assert {kind: len(found) for kind, found in checkpoint.matched.other_modules.items()} == {
        "leftovers of other engines": 1,
        "scales of activations": 2,
    }


@pytest.mark.parametrize("layout", ["ct-W4A16", "gptq"])
def test_columns_may_be_grouped_out_of_order(layout: str, tmp_path: Path) -> None:
    """Activation order: `g_idx` names each column's group."""
    pack, config = PACKERS[layout]

    def shuffled(weight: Tensor) -> tuple[Stored, Tensor]:
        columns = weight.shape[1]
        order = torch.randperm(columns, generator=torch.Generator().manual_seed(0))
        group_of = torch.arange(columns) // GROUP
        stored, values = pack(weight)
        half, scale = (8, "weight_scale") if layout == "ct-W4A16" else (0, "scales")
        wide = stored[scale].float() if half else stored[scale].t().float()
        codes = (values / wide[:, group_of]).round()  # less the zero point, which moves with the group
        if not half:
            stored["qzeros"] = torch.full_like(stored["qzeros"], 0x77777777)  # one zero point for all: 8, stored less one
            codes = codes.clamp(-8, 7)
            stored["qweight"] = words_of((codes + 8).long(), 4).t().contiguous()
        stored["g_idx" if not half else "weight_g_idx"] = group_of[order].int()
        return stored, codes * wide[:, group_of[order]]

    _, params = check_equal(quantize(tmp_path, "12B", shuffled, config()))
    part = params["layers.0.mlp.out"].parts[0]
    assert part.scheme == ("packed4-indexed" if layout == "ct-W4A16" else "gptq4-indexedz")


# ---- who reads what ----


@pytest.mark.parametrize(
    ("name", "reader"),
    [
        (f"{Q}weight", "hf"),
        (f"{Q}weight_packed", "compressed"),
        (f"{Q}weight_scale", "compressed"),
        (f"{Q}qweight", "compressed"),
        ("model.embed_tokens.embedding_quantized", "compressed"),
        ("model.layers.0.experts.7.up_proj.weight", "compressed"),
    ],
)
def test_files_are_told_apart_by_their_names(name: str, reader: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    tensor = LazyTensor(name, "F32", (1,), 4, 8, MappedFile(tmp_path / "config.json"))
    source = Source(tmp_path, tmp_path, (), {name: tensor}, {})
    assert format_of(source).__name__.rpartition(".")[2] == reader


def test_modelopts_older_file_of_settings_counts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4", "group_size": 16}}')
    packed = LazyTensor("a.weight", "U8", (1,), 4, 1, MappedFile(tmp_path / "config.json"))
    assert not compressed.sniff(Source(tmp_path, tmp_path, (), {}, {}))  # settings of a quantization that nothing has
    source = Source(tmp_path, tmp_path, (), {packed.name: packed}, {})
    assert compressed.sniff(source)
    assert not list(compressed._refusals(source, compressed._quantization(source)))


def test_old_packing_is_told_by_its_width() -> None:
    """compressed-tensors before 0.20 let no 3-bit integer straddle words; where both layouts fit, the config decides."""
    claims = compressed._claims({"config_groups": {"a": {"weights": {"num_bits": 7}, "input_activations": {"num_bits": 8}}}})
    assert compressed._bits(7, 32, 64, compressed._claims({})) == 3
    assert compressed._bits(16, 32, 64, claims) == 7
    with pytest.raises(ValueError, match=r"7, 8 bits would all fit its width; config\.json must name the one that is meant"):
        compressed._bits(16, 32, 64, compressed._claims({}))


def test_the_packers_are_close_to_what_they_pack() -> None:
    """A packer that loses the weight would prove nothing."""
    weight = torch.randn(64, 96)
    for pack, tolerance in ((partial(pack_ct, "W4A16"), 0.1), (partial(pack_gptq, 4, GROUP, False), 0.1)):
        assert float((pack(weight)[1] - weight).abs().max()) < tolerance * float(weight.abs().max())
