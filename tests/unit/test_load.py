"""The strict loader's second half: where parameters lie in memory, in which dtype, and what is never read.

Owns checkpoints with values and the policy of `checkpoint/load/load_params.py`: what may stay mapped stays mapped, what must
be converted is converted exactly and piece by piece. Read `test_match.py` for which tensors fit at all.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemcutter.checkpoint.container.lazy_tensor import LazyTensor
from gemcutter.checkpoint.container.source import Source
from gemcutter.checkpoint.formats import hf
from gemcutter.checkpoint.load import load_params as module
from gemcutter.checkpoint.load.load_params import load_params
from gemcutter.checkpoint.load.match import Checkpoint, open_checkpoint
from gemcutter.checkpoint.remote.hub import DEMO_FOLDER
from gemcutter.checkpoint.write.synth import SIZES, shrink, write_size
from gemcutter.checkpoint.write.write_safetensors import Spec, write_json, write_sharded
from gemcutter.param_spec import Access
from gemcutter.quant import Weight
from gemcutter.quant.packing import PlainPacker

TINY_A = Path(__file__).parents[1] / "goldens" / "tiny-a"
CPU = torch.device("cpu")
STATUS = Path("/proc/self/status")
MB = 1_000_000

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a small E2B with random bfloat16 weights."""
    folder = tmp_path_factory.mktemp("load") / "e2b"
    write_size(replace(shrink(SIZES["E2B"]), hidden=32, mlp=24, head_dim=8, vocab=96, ple=6), folder)
    return folder


def rewrite(source: Path, folder: Path, change: Callable[[str, Tensor], Tensor | None]) -> Path:
    """Copy a checkpoint, each tensor changed or, for None, left out."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    changed = {name: change(name, tensor) for name, tensor in load_file(source / "model.safetensors").items()}
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, folder / "model.safetensors")
    return folder


def stored_as(dtype: torch.dtype) -> Callable[[str, Tensor], Tensor]:
    return lambda name, tensor: tensor.to(dtype)


def stack(param: Weight | Tensor) -> Tensor:
    """Return a parameter's values as one tensor."""
    return torch.cat(param.parts, dim=-2) if isinstance(param, Weight) else param


def expected(path: Path, checkpoint: Checkpoint) -> Tensors:
    """Read every parameter with the safetensors library, under its canonical name."""
    stored: Tensors = {}
    for file in sorted(path.glob("*.safetensors")):
        stored |= load_file(file)
    params: Tensors = {}
    for spec in checkpoint.plan.params():
        names = [hf.spell(spec.name, part) for part, _ in spec.parts] if spec.parts and len(spec.shape) == 2 else []
        params[spec.name] = torch.cat([stored[name] for name in names or [hf.spell(spec.name, None)]], dim=0)
    return params


def is_in_place(tensor: Tensor, stored: LazyTensor) -> bool:
    """Return whether a tensor is the mapped file itself, from its first byte to its last."""
    return tensor.data_ptr() == stored.raw().data_ptr() and tensor.nbytes == stored.nbytes


# ---- values ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", [DEMO_FOLDER, TINY_A], ids=["demo", "tiny-a"])
def test_every_parameter_has_the_values_of_the_file(path: Path, dtype: torch.dtype) -> None:
    checkpoint = open_checkpoint(path)
    params, wanted = load_params(checkpoint, dtype, CPU), expected(path, checkpoint)
    assert list(params) == list(wanted)
    for spec in checkpoint.plan.params():
        found = stack(params[spec.name])
        assert found.shape == spec.shape
        assert found.equal(wanted[spec.name].to(found.dtype))


@pytest.mark.parametrize("shard_bytes", [1, 20_000])
def test_shards_load_like_one_file(shard_bytes: int, source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    specs: list[Spec] = [(name, "BF16", tuple(tensor.shape)) for name, tensor in tensors.items()]
    files = write_sharded(tmp_path, specs, tensors.values(), max_shard_bytes=shard_bytes)
    assert len(files) > 3
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    whole, sharded = (load_params(open_checkpoint(path), torch.float32, CPU) for path in (source, tmp_path))
    assert list(whole) == list(sharded)
    assert all(stack(whole[name]).equal(stack(sharded[name])) for name in whole)


# ---- dtypes ----


@pytest.mark.parametrize(
    ("stored", "compute", "kept"),
    [
        (torch.bfloat16, torch.bfloat16, True),
        (torch.bfloat16, torch.float32, True),
        (torch.float16, torch.float32, True),
        (torch.float16, torch.bfloat16, True),
        (torch.float32, torch.float32, True),
        (torch.float32, torch.bfloat16, False),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_matrices_stay_mapped_unless_stored_wider(
    stored: torch.dtype, compute: torch.dtype, kept: bool, source: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(rewrite(source, tmp_path, stored_as(stored)))
    params, wanted = load_params(checkpoint, compute, CPU), expected(tmp_path, checkpoint)
    matrices = [spec for spec in checkpoint.plan.params() if len(spec.shape) > 1 and spec.access is Access.DENSE]
    assert len(matrices) > 90
    for spec in matrices:
        param = params[spec.name]
        assert isinstance(param, Weight)
        assert param.names == tuple(part for part, _ in spec.parts)
        assert {part.dtype for part in param.parts} == {stored if kept else compute}
        pieces = checkpoint.matched.pieces[spec.name]
        assert [is_in_place(part, piece.data) for part, piece in zip(param.parts, pieces, strict=True)] == [kept] * len(pieces)
        assert stack(param).equal(wanted[spec.name].to(getattr(torch, param.stored)))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float32])
def test_vectors_are_float32_and_the_rows_only_table_stays_mapped(
    stored: torch.dtype, compute: torch.dtype, source: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(rewrite(source, tmp_path, stored_as(stored)))
    params = load_params(checkpoint, compute, CPU)
    vectors = [spec.name for spec in checkpoint.plan.params() if len(spec.shape) == 1]
    assert len(vectors) > 100
    for name in vectors:
        param = params[name]
        assert isinstance(param, Tensor)
        assert param.dtype == torch.float32
        assert param.data_ptr() != checkpoint.matched.pieces[name][0].data.raw().data_ptr()  # small, and never to be written
    (table,) = tensors_of(params["embed.ple"])
    assert table.dtype == stored
    assert is_in_place(table, checkpoint.matched.pieces["embed.ple"][0].data)


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float32])
def test_parts_of_mixed_dtypes_are_converted_to_one(compute: torch.dtype, source: Path, tmp_path: Path) -> None:
    """Kernels are chosen by the dtype of a weight, so it has one; what is stored alike beside it stays mapped."""

    def widen_queries(name: str, tensor: Tensor) -> Tensor:
        return tensor.float() if "q_proj" in name else tensor

    checkpoint = open_checkpoint(rewrite(source, tmp_path, widen_queries))
    params, wanted = load_params(checkpoint, compute, CPU), expected(tmp_path, checkpoint)
    mixed, alike = params["layers.0.attn.in"], params["layers.0.mlp.in"]
    assert isinstance(mixed, Weight)
    assert [part.dtype for part in mixed.parts] == [compute] * 3
    assert stack(mixed).equal(wanted["layers.0.attn.in"].to(compute))
    assert isinstance(alike, Weight)
    assert alike.stored == "bfloat16"


@pytest.mark.parametrize("copy_bytes", [4, 1000, 4096, 1 << 20])
def test_conversion_is_exact_whatever_the_tiles(
    copy_bytes: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(module, "COPY_BYTES", copy_bytes)
    small = {"layers.0.mlp.in", "layers.0.attn.out"}
    folder = rewrite(source, tmp_path, lambda name, tensor: torch.randn(tensor.shape, generator=generator))
    checkpoint = open_checkpoint(folder)
    wanted = expected(tmp_path, checkpoint)
    specs = [spec for spec in checkpoint.plan.params() if spec.name in small]
    loader = module._Loader(torch.bfloat16, CPU, PlainPacker(CPU), None, module.PackedWeights({}), 0.0)
    for spec in specs:  # one by one: four bytes a tile are slow
        param = loader.load(spec, checkpoint.matched.pieces[spec.name])
        assert stack(param).equal(wanted[spec.name].to(torch.bfloat16))
    assert len(specs) == len(small)


def test_an_absent_layer_scalar_is_one(source: Path, tmp_path: Path) -> None:
    folder = rewrite(source, tmp_path, lambda name, tensor: None if name.endswith("layer_scalar") else tensor)
    params = load_params(open_checkpoint(folder), torch.bfloat16, CPU)
    scales = [stack(params[f"layers.{index}.scale"]) for index in range(15)]
    assert all(scale.equal(torch.ones(1)) for scale in scales)


@pytest.mark.parametrize("stored", [torch.int64, torch.int32])
def test_integers_stay_integers(stored: torch.dtype, tmp_path: Path) -> None:
    text = {
        "model_type": "gemma4_text",
        "vocab_size": 12,
        "hidden_size": 4,
        "intermediate_size": 4,
        "num_hidden_layers": 1,
        "layer_types": ["full_attention"],
        "num_kv_shared_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 2,
        "global_head_dim": 2,
    }
    drafter = {"use_ordered_embeddings": True, "num_centroids": 3, "centroid_intermediate_top_k": 1}
    write_json(
        tmp_path / "config.json", {"model_type": "gemma4_assistant", "backbone_hidden_size": 6, "text_config": text} | drafter
    )
    norms = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0)).to(stored)
    tensors = {
        "model.embed_tokens.weight": torch.randn(12, 4),
        "model.norm.weight": torch.randn(4),
        **{f"model.layers.0.{norm}.weight": torch.randn(4) for norm in norms},
        "model.layers.0.self_attn.q_proj.weight": torch.randn(2, 4),
        "model.layers.0.self_attn.q_norm.weight": torch.randn(2),
        "model.layers.0.self_attn.o_proj.weight": torch.randn(4, 2),
        **{f"model.layers.0.mlp.{name}_proj.weight": torch.randn(4, 4) for name in ("gate", "up", "down")},
        "pre_projection.weight": torch.randn(4, 12),
        "post_projection.weight": torch.randn(6, 4),
        "masked_embedding.centroids.weight": torch.randn(3, 4),
        "masked_embedding.token_ordering": order,
    }
    save_file(tensors, tmp_path / "model.safetensors")
    params = load_params(open_checkpoint(tmp_path), torch.bfloat16, CPU)
    found = stack(params["draft.order"])
    assert found.dtype == torch.long
    assert found.equal(order.long())
    assert stack(params["draft.centroids"]).equal(tensors["masked_embedding.centroids.weight"].to(torch.bfloat16))


# ---- experts ----


def test_experts_are_stacks_in_two_parts_of_one_mapped_tensor() -> None:
    checkpoint = open_checkpoint(TINY_A)
    params = load_params(checkpoint, torch.bfloat16, CPU)
    moe = checkpoint.plan.layers[0].moe
    assert moe is not None
    stored = checkpoint.source.tensors["model.layers.0.experts.gate_up_proj"]
    whole, param = stored.torch(), params["layers.0.moe.in"]
    assert isinstance(param, Weight)
    assert param.names == ("gate", "up")
    assert [tuple(part.shape) for part in param.parts] == [(moe.experts, moe.width, checkpoint.plan.hidden)] * 2
    assert param.parts[0].data_ptr() == stored.raw().data_ptr()  # views of the file: nothing was copied
    assert param.parts[1].data_ptr() == whole[0, moe.width].data_ptr()
    one = param.expert(3)
    assert (one.rows, one.columns) == (2 * moe.width, checkpoint.plan.hidden)
    assert torch.cat(one.parts).equal(whole[3])
    assert one.part("up").parts[0].equal(whole[3, moe.width :])


# ---- what is read ----


def test_redundant_tensors_are_never_read(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A released file with all it carries: what the plan does not need must not even be mapped to a tensor."""
    plan = open_checkpoint(source).plan
    readers = [layer.index for layer in plan.layers if not layer.writes]
    extra = {
        f"model.layers.{index}.self_attn.{name}.weight": torch.ones(3, 2)
        for index in readers
        for name in ("k_proj", "v_proj", "k_norm")
    }
    extra |= {"lm_head.weight": torch.ones(96, 32), "model.vision_tower.encoder.layers.12.self_attn.k_proj.weight": torch.ones(2)}
    extra |= {"model.layers.0.odd": torch.ones(2)}
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(load_file(source / "model.safetensors") | extra, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path, ["*.odd"])
    assert len(checkpoint.matched.redundant) == 3 * len(readers) + 1

    read, original = list[str](), LazyTensor.raw

    def record(tensor: LazyTensor) -> Tensor:
        read.append(tensor.name)
        return original(tensor)

    monkeypatch.setattr(LazyTensor, "raw", record)  # the way to every byte of a tensor
    params = load_params(checkpoint, torch.bfloat16, CPU)
    assert sorted(read) == sorted(load_file(source / "model.safetensors"))  # each needed tensor once
    assert params.keys() == {spec.name for spec in plan.params()}


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float32])
def test_progress_reaches_its_total(compute: torch.dtype, source: Path, tmp_path: Path) -> None:
    folder = rewrite(source, tmp_path, lambda name, tensor: None if name.endswith("layer_scalar") else tensor)
    tensors = load_file(folder / "model.safetensors") | {"lm_head.weight": torch.ones(96, 32)}  # redundant: not counted
    save_file(tensors, folder / "model.safetensors")
    calls = list[tuple[int, int]]()
    checkpoint = open_checkpoint(folder)
    load_params(checkpoint, compute, CPU, lambda done, total: calls.append((done, total)))
    (total,) = {total for _, total in calls}
    assert total == Source.open(folder).total_bytes - 96 * 32 * 4
    done = [done for done, _ in calls]
    assert done == sorted(done)
    assert done[0] > 0
    assert done[-1] == total
    assert len(calls) == len(list(checkpoint.plan.params()))


# ---- memory ----


def resident(kind: str) -> int:
    """Count the resident bytes of this process: `RssAnon`, its own, or `RssFile`, mapped from files."""
    found = re.search(rf"^{kind}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 32 MB of bfloat16, nearly all in the embedding and the per-layer embeddings."""
    folder = tmp_path_factory.mktemp("load") / "large"
    size = replace(shrink(SIZES["E2B"]), hidden=64, mlp=24, head_dim=8, vocab=100_000, ple=6)
    write_size(size, folder)
    return folder


@pytest.mark.skipif(not STATUS.exists(), reason="counts resident pages through /proc")
@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float32])
def test_a_mapped_checkpoint_costs_no_memory_of_its_own(compute: torch.dtype, large: Path) -> None:
    checkpoint = open_checkpoint(large)
    assert checkpoint.source.total_bytes > 30 * MB
    before, mapped_before = resident("RssAnon"), resident("RssFile")
    params = load_params(checkpoint, compute, CPU)
    pages = [
        part.view(torch.uint8).flatten()[::4096] for name in ("embed.tokens", "embed.ple") for part in tensors_of(params[name])
    ]
    assert sum(int(page.max()) for page in pages) > 0  # touch every page
    assert resident("RssAnon") - before < 4 * MB
    assert resident("RssFile") - mapped_before > 20 * MB


@pytest.mark.skipif(not STATUS.exists(), reason="counts resident pages through /proc")
def test_converted_pages_are_given_back(large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COPY_BYTES", 1 << 20)
    checkpoint = open_checkpoint(rewrite(large, tmp_path, stored_as(torch.float32)))
    before, mapped_before, peak = resident("RssAnon"), resident("RssFile"), [0]
    params = load_params(checkpoint, torch.bfloat16, CPU, lambda *_: peak.append(resident("RssFile")))
    table = params["embed.tokens"]
    assert isinstance(table, Weight)
    assert table.nbytes == 12.8 * MB
    assert max(peak) - mapped_before < 6 * MB  # of 60 MB
    assert resident("RssAnon") - before < table.nbytes + 4 * MB


def tensors_of(param: Weight | Tensor) -> tuple[Tensor, ...]:
    return param.parts if isinstance(param, Weight) else (param,)
