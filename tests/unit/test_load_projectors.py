"""Towers in other files than a release's: llama.cpp's projectors, Ollama's models, MLX's folders, Gemma's mobile files.

Owns `goldens/projectors`: random wrappers, and what llama.cpp's own converter made of their towers; and wrappers whose towers
have more layers than their decoders, saved in every layout. Read `test_load_towers.py` for Hugging Face's own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import gguf as gguf_library
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from gemcutter.checkpoint.container.source import Source
from gemcutter.checkpoint.formats import gguf_towers
from gemcutter.checkpoint.load.match import open_checkpoint
from gemcutter.errors import CheckpointError
from gemcutter.load_options import LoadOptions
from gemcutter.loading import OpenModel, open_model
from gemcutter.media.audio import cut_sound
from gemcutter.media.image import cut_image
from tests import gguf_files, mlx_files
from tests.formats.packers import pack_gemma
from tests.images import drawing
from tests.sounds import tones
from tests.topologies import relative_error
from tests.trained import trained
from tests.wrappers import build_wrapper, patch_shape, sound_shape

GOLDENS = Path(__file__).parents[1] / "goldens" / "projectors"
SIZES = ("E2B", "26B-A4B", "12B")
MOBILE = {"quant_method": "gemma", "num_bits": 8, "module_quant_configs": {"audio_tower": {"num_bits": 2}}}
OUT = "mm.input_projection.weight"
LAYERS = 12  # of towers, more than the decoder has
Types = Mapping[str, gguf_library.GGMLQuantizationType]
NO_TYPES: Types = {}
Tensors = dict[str, Tensor]


def opened(model: Path, mmproj: Path | None = None, media: tuple[str, ...] = ("image",)) -> OpenModel:
    return open_model(LoadOptions(model=str(model), dtype="float32", media=media, mmproj=None if mmproj is None else str(mmproj)))


def rows(model: OpenModel) -> Tensor:
    """Return what two images become, and two sounds where the model hears."""
    found = list[Tensor]()
    if model.vision is not None:
        shape = patch_shape(model.vision.plan)
        found += model.vision.encode([cut_image(drawing(*size), 70, shape) for size in ((60, 90), (300, 100))])
    if model.audio is not None:
        shape_of_sounds = sound_shape(model.audio.plan)
        found += model.audio.encode([cut_sound((tones(samples), 16_000), shape_of_sounds) for samples in (4000, 21_000)])
    return torch.cat(found)


# ---- llama.cpp's projectors ----


@pytest.mark.parametrize("size", SIZES)
def test_projectors_of_llama_cpp_hold_the_same_towers(size: str) -> None:
    folder, media = GOLDENS / size, ("image",) if size == "26B-A4B" else ("image", "audio")
    wanted = rows(opened(folder, media=media))
    assert relative_error(rows(opened(folder, folder / "mmproj-f32.gguf", media)), wanted) < 1e-6
    if (packed := folder / "mmproj-q8_0.gguf").exists():
        error = relative_error(rows(opened(folder, packed, media)), wanted)
        assert 1e-4 < error < 0.03


def test_names_are_spelled_as_they_are_read() -> None:
    for size in SIZES:
        reader = gguf_library.GGUFReader(GOLDENS / size / "mmproj-f32.gguf")
        for tensor in reader.tensors:
            found = gguf_towers.translate(tensor.name)
            assert found is not None
            assert gguf_towers.spell(*found) == tensor.name


def test_a_projector_beside_a_gguf_model_is_found(tmp_path: Path) -> None:
    folder = GOLDENS / "E2B"
    model = as_gguf(folder, tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match="none beside it; put its mmproj file there, or pass it as --mmproj"):
        opened(model)
    shutil.copy(folder / "mmproj-q8_0.gguf", tmp_path / "a-mmproj-Q8_0.gguf")
    shutil.copy(folder / "mmproj-f32.gguf", tmp_path / "mmproj-F32.gguf")
    media = ("image", "audio")
    assert torch.equal(rows(opened(model, media=media)), rows(opened(folder, folder / "mmproj-f32.gguf", media)))
    assert opened(model).checkpoint.plan.bidirectional is False
    assert open_checkpoint(as_gguf(GOLDENS / "26B-A4B", tmp_path / "other.gguf")).plan.bidirectional


def test_other_projectors_are_refused(tmp_path: Path) -> None:
    folder = GOLDENS / "E2B"
    narrow = changed(tmp_path / "narrow.gguf", lambda tensors: tensors.update({OUT: tensors[OUT][:32]}))
    with pytest.raises(CheckpointError, match=r"(?s)the vision tower does not match.*is it the projector of this model\?"):
        opened(folder, narrow)
    with pytest.raises(CheckpointError, match=r"this model has no audio tower \(it has no tensors of one\)"):
        opened(GOLDENS / "E2B", GOLDENS / "26B-A4B" / "mmproj-f32.gguf", ("audio",))
    with pytest.raises(CheckpointError, match="holds no towers; pass the mmproj file"):
        opened(folder, as_gguf(folder, tmp_path / "text.gguf"))
    foreign = gguf_library.GGUFWriter(tmp_path / "llava.gguf", "clip")
    foreign.add_string("clip.vision.projector_type", "mlp")
    foreign.add_tensor("v.patch_embd.weight", np.ones((4, 3, 16, 16), np.float32))
    close(foreign)
    with pytest.raises(CheckpointError, match="a projector of type 'mlp'; those of Gemma 4 are gemma4v"):
        opened(folder, tmp_path / "llava.gguf")


def test_a_projector_without_a_tensor_is_refused_by_name(tmp_path: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        del tensors["v.blk.1.ffn_up.weight"], tensors["v.blk.1.ffn_up.input_min"]
        tensors["v.blk.0.strange.weight"] = np.ones((4, 4), np.float32)

    with pytest.raises(CheckpointError) as caught:
        opened(GOLDENS / "E2B", changed(tmp_path / "mmproj.gguf", change))
    assert [text.split(":")[0].split()[:2] for text in caught.value.problems] == [
        ["missing", "vision.layers.1.mlp.in.up.input_min"],
        ["missing", "vision.layers.1.mlp.in[up]"],
        ["unknown", "mmproj.gguf"],
    ]


def test_a_packed_table_of_positions_is_read(tmp_path: Path) -> None:
    table, folder = "v.position_embd.weight", GOLDENS / "E2B"
    q8 = gguf_library.GGMLQuantizationType.Q8_0
    found = dict[str, np.ndarray]()
    changed(tmp_path / "same.gguf", found.update)
    packed = gguf_library.quants.quantize(found[table], q8)
    dense = gguf_library.quants.dequantize(packed, q8)
    plain = changed(tmp_path / "plain.gguf", lambda tensors: tensors.update({table: dense}))
    stored = changed(tmp_path / "packed.gguf", lambda tensors: tensors.update({table: packed}), {table: q8})
    assert torch.equal(rows(opened(folder, stored)), rows(opened(folder, plain)))
    assert not torch.equal(rows(opened(folder, stored)), rows(opened(folder, folder / "mmproj-f32.gguf")))


def test_the_header_of_a_projector_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, projector = as_gguf(GOLDENS / "E2B", tmp_path / "model.gguf"), tmp_path / "mmproj.gguf"
    shutil.copy(GOLDENS / "E2B" / "mmproj-f32.gguf", projector)
    read, original = list[str](), Source.open.__func__  # type: ignore[attr-defined]

    def opening(cls: type[Source], path: Path) -> Source:
        read.append(path.name)
        found: Source = original(cls, path)
        return found

    monkeypatch.setattr(Source, "open", classmethod(opening))
    for media in (("image", "audio"), ("auto",)):
        read.clear()
        found = opened(model, media=media)
        assert found.vision is not None
        assert found.audio is not None
        assert read == ["model.gguf", "mmproj.gguf"]


def changed(
    path: Path,
    change: Callable[[dict[str, np.ndarray]], object],
    packed: Types = NO_TYPES,
) -> Path:
    """Write E2B's projector with other tensors; those that are `packed` are the bytes of blocks."""
    reader, writer = gguf_library.GGUFReader(GOLDENS / "E2B" / "mmproj-f32.gguf"), gguf_library.GGUFWriter(path, "clip")
    for key, field in reader.fields.items():
        if key.startswith("clip.") and len(field.types) == 1:
            writer.add_key_value(key, field.contents(), field.types[0])
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    change(tensors)
    for name, array in tensors.items():
        writer.add_tensor(name, array, raw_dtype=packed.get(name))
    close(writer)
    return path


# ---- towers with more layers than the decoder has, in every layout ----


@cache
def tall() -> PreTrainedModel:
    return build_wrapper("E2B", hears=True, num_hidden_layers=LAYERS, of_audio={"num_hidden_layers": LAYERS})


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("released") / "model"
    tall().save_pretrained(folder)
    plan = open_checkpoint(folder).plan
    assert min(layer.index for layer in plan.layers if not layer.writes) < LAYERS > len(plan.layers)
    return folder


def rewritten(source: Path, target: Path, tensors: Tensors, **more: Any) -> Path:
    """Write tensors with the config of another folder."""
    target.mkdir()
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | more))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors", {"format": "pt"})
    return target


def as_mlx(source: Path, folder: Path, recipe: mlx_files.Recipe | None) -> tuple[Path, Path]:
    """Write the layout of mlx-vlm, its matrices packed by a recipe, and densely what these stand for."""
    stored, plain = Tensors(), Tensors()
    for name, tensor in load_file(source / "model.safetensors").items():
        own, plain[name] = name.removeprefix("model."), tensor
        if own.startswith("language_model."):
            own = own.replace("language_model.", "language_model.model.", 1)
        if tensor.ndim > 2 and own.endswith(("conv.weight", "conv1d.weight")):
            tensor = tensor.movedim(1, -1)
        is_packed = recipe is not None and "tower" in own and own.endswith(".linear.weight") and tensor.shape[-1] % 32 == 0
        if is_packed and recipe is not None:
            arrays, plain[name] = recipe(tensor)
            stored |= {f"{own.removesuffix('weight')}{ending}": array for ending, array in arrays.items()}
        else:
            stored[own] = tensor
    quantization = {"quantization": {"group_size": 32, "bits": 8}} if recipe else {}
    return rewritten(source, folder / "mlx", stored, **quantization), rewritten(source, folder / "plain", plain)


@pytest.mark.parametrize("recipe", [None, mlx_files.like_mlx(8, 32), mlx_files.micro("mxfp4")])
def test_mlx(released: Path, recipe: mlx_files.Recipe | None, tmp_path: Path) -> None:
    packed, plain = as_mlx(released, tmp_path, recipe)
    media = ("image", "audio")
    assert relative_error(rows(opened(packed, media=media)), rows(opened(plain, media=media))) < 1e-5
    assert "tower" not in " ".join(opened(packed, media=media).notes)


def test_mobile_files(released: Path, tmp_path: Path) -> None:
    """Gemma's own quantizer packs towers by rows, and leaves their bounds out."""
    stored, plain = Tensors(), Tensors()
    for name, tensor in load_file(released / "model.safetensors").items():
        if name.endswith(".linear.weight"):
            arrays, plain[name] = pack_gemma(8 if "vision" in name else 2, "weight", 1, tensor)
            stored |= {f"{name.removesuffix('weight')}{ending}": array for ending, array in arrays.items()}
        elif not name.endswith(("_min", "_max")):
            stored[name] = plain[name] = tensor
    packed = rewritten(released, tmp_path / "mobile", stored, quantization_config=MOBILE)
    dense, media = rewritten(released, tmp_path / "plain", plain), ("image", "audio")
    assert relative_error(rows(opened(packed, media=media)), rows(opened(dense, media=media))) < 1e-5


def test_ollama_keeps_towers_in_the_models_file(released: Path, tmp_path: Path) -> None:
    """Some of its names mean another tensor than llama.cpp's, and its bounds lie in one tensor."""
    model = as_gguf(released, tmp_path / "sha256-0a1b2c", with_towers=True)
    media = ("image", "audio")
    assert relative_error(rows(opened(model, media=media)), rows(opened(released, media=media))) < 1e-6
    text = open_model(LoadOptions(model=str(model), dtype="float32"))
    assert text.vision is text.audio is None


def test_towers_of_one_folder_for_the_text_of_another(released: Path, tmp_path: Path) -> None:
    text = {name: tensor for name, tensor in load_file(released / "model.safetensors").items() if "language_model" in name}
    alone = rewritten(released, tmp_path / "text", text)
    with pytest.raises(CheckpointError, match="the files hold no vision tower, only its config"):
        opened(alone)
    assert torch.equal(rows(opened(alone, released)), rows(opened(released)))


# ---- writing GGUF files ----


def close(writer: gguf_library.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def as_gguf(source: Path, path: Path, with_towers: bool = False) -> Path:
    """Write the decoder of a folder, and its towers as Ollama does."""
    checkpoint = open_checkpoint(source)
    extra, metadata = gguf_files.divisors(checkpoint.plan), dict[str, Any]()
    if with_towers:
        extra |= ollama_towers(load_file(source / "model.safetensors"))
        config = json.loads((source / "config.json").read_text())
        for tower in ("vision", "audio"):
            of = config[f"{tower}_config"]
            metadata |= {
                f"{tower}.block_count": of["num_hidden_layers"],
                f"{tower}.embedding_length": of["hidden_size"],
                f"{tower}.feed_forward_length": of.get("intermediate_size", 4 * of["hidden_size"]),
                f"{tower}.attention.head_count": of["num_attention_heads"],
            }
        metadata |= {"vision.patch_size": 16, "vision.num_channels": 3, "vision.projector.scale_factor": 3}
    tensors = gguf_files.tensors_of(checkpoint)
    return gguf_files.save(path, checkpoint.plan, tensors, gguf_files.every("F32"), extra=extra, metadata=metadata)


OLLAMA = {  # in its converter's order: the first that a name holds is replaced
    "model.": "",
    ".linear.weight": ".weight",
    "audio_tower.subsample_conv_projection.layer0.conv": "a.conv1d.0",
    "audio_tower.subsample_conv_projection.layer0.norm": "a.conv1d.0.norm",
    "audio_tower.subsample_conv_projection.layer1.conv": "a.conv1d.1",
    "audio_tower.subsample_conv_projection.layer1.norm": "a.conv1d.1.norm",
    "audio_tower.subsample_conv_projection.input_proj_linear": "a.pre_encode.out",
    "audio_tower.layers": "a.blk",
    "self_attn.relative_k_proj": "linear_pos",
    "self_attn.per_dim_scale": "per_dim_scale.weight",
    "norm_post_attn": "ln2",
    "norm_pre_attn": "ln1",
    "self_attn.post": "attn_out",
    "feed_forward1.pre_layer_norm": "ffn_norm",
    "feed_forward1.post_layer_norm": "ffn_post_norm",
    "feed_forward1.ffw_layer_1": "ffn_up",
    "feed_forward1.ffw_layer_2": "ffn_down",
    "feed_forward2.pre_layer_norm": "ffn_norm_1",
    "feed_forward2.post_layer_norm": "ffn_post_norm_1",
    "feed_forward2.ffw_layer_1": "ffn_up_1",
    "feed_forward2.ffw_layer_2": "ffn_down_1",
    "lconv1d.depthwise_conv1d": "conv_dw",
    "lconv1d.pre_layer_norm": "conv_norm",
    "lconv1d.conv_norm": "norm_conv",
    "lconv1d.linear_start": "conv_pw1",
    "lconv1d.linear_end": "conv_pw2",
    "norm_out": "layer_pre_norm",
    "embed_audio.embedding_projection": "mm.a.input_projection",
    "audio_tower.output_proj": "mm.a.fc",
    "vision_tower.encoder.layers": "v.blk",
    "vision_tower.patch_embedder.input_proj": "v.patch_embd",
    "vision_tower.patch_embedder.position_embedding_table": "v.position_embd.weight",
    "embed_vision.embedding_projection": "mm.input_projection",
    "input_layernorm": "ln1",
    "pre_feedforward_layernorm": "ln2",
    "post_attention_layernorm": "attn_post_norm",
    "post_feedforward_layernorm": "ffn_post_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.down_proj": "ffn_down",
    "mlp.up_proj": "ffn_up",
    "self_attn.o_proj": "attn_out",
    **{f"self_attn.{name}_norm": f"attn_{name}_norm" for name in "qk"},
    **{f"self_attn.{name}_proj": f"attn_{name}" for name in "qkv"},
}
CLAMPED = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def ollama_towers(tensors: Tensors) -> dict[str, np.ndarray]:
    found = dict[str, np.ndarray]()
    towers = {name: tensor.float() for name, tensor in tensors.items() if "language_model" not in name}
    for name, tensor in towers.items():
        own = name
        for old, new in OLLAMA.items():
            own = own.replace(old, new, 1)
        if own.startswith("v.") and own.endswith(("_min", "_max")):
            continue
        if own.endswith("patch_embd.weight"):
            tensor = tensor.view(-1, 16, 16, 3).permute(0, 3, 1, 2)
        elif own.endswith("conv_dw.weight"):
            tensor = tensor.squeeze(1)
        elif own.endswith("per_dim_scale.weight"):
            tensor = torch.nn.functional.softplus(tensor)
        found[own] = tensor.reshape(tensor.shape or (1,)).contiguous().numpy()
    bounds = ("input_min", "input_max", "output_min", "output_max")
    found["v.clamp_data"] = np.array(
        [
            float(towers[f"model.vision_tower.encoder.layers.{layer}.{module}.{bound}"])
            for layer in range(LAYERS)
            for module in CLAMPED
            for bound in bounds
        ]
        + [0.0] * 4,
        np.float32,
    )
    return found


def test_auto_takes_the_tower_of_a_projector() -> None:
    folder = GOLDENS / SIZES[0]
    options = {"model": str(folder), "dtype": "float32", "media": ("auto",), "context": 64}
    found = open_model(LoadOptions(**options, mmproj=str(folder / "mmproj-f32.gguf")))  # type: ignore[arg-type]
    wanted = open_model(LoadOptions(**options | {"media": ("image", "audio")}))  # type: ignore[arg-type]
    assert relative_error(rows(found), rows(wanted)) < 1e-6
    alone = open_model(LoadOptions(model=str(trained("tiny-e-Q4_K_M.gguf")), media=("auto",), context=64))
    assert alone.vision is None
