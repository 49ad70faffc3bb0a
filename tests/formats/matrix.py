"""The matrix of what loads: formats and schemes against sizes, each written in four states; and the README's table of it.

Owns the cells: how each is written, and what is declared of it. `test_matrix.py` proves the declarations, and that the README
holds the table made of them; `python -m tests.formats.matrix --write README.md` puts it there. Refuses to know how a format packs
a matrix: that is in `packers.py`, `quantized.py`, `tests/mlx_files.py` and `tests/gguf_files.py`.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import gguf as gguf_library
import torch
from safetensors.torch import load_file
from torch import Tensor

from gemcutter import config as configs
from gemcutter.checkpoint.formats import compressed, gguf, hf, mlx
from gemcutter.checkpoint.write.synth import SIZES, shrink, write_size
from gemcutter.param_spec import ParamSpec
from gemcutter.plan import ModelPlan, Proj, derive
from tests import gguf_files, mlx_files
from tests.formats.packers import BLOCK, GROUP, PACKERS, Packer, Stored
from tests.formats.quantized import APART, FUSED, TEXT, WRAPPER, Raw, Tensors, quantize, wrap, write

Key = tuple[str, str | None]  # a parameter and its part
Files = tuple[Path, Path]  # a checkpoint, and the same values as plain float32

NARROW, WIDE = 64, 256  # of matrices; the larger is the size of GGUF's larger blocks
TOWER_LAYERS = 6  # more than the decoders here have, and than those before the first layer that reads another's keys
BEGIN, END = "<!-- matrix:begin -->", "<!-- matrix:end -->"


@dataclass(frozen=True, slots=True)
class State:
    """What else a file holds: tensors that its layers do not use; a wrapper's prefix, config and vision tower."""

    has_unread: bool
    is_wrapped: bool

    def __str__(self) -> str:
        return f"{'unread' if self.has_unread else 'lean'}-{'multimodal' if self.is_wrapped else 'text'}"


STATES = tuple(State(has_unread, is_wrapped) for has_unread in (False, True) for is_wrapped in (False, True))


@dataclass(frozen=True, slots=True)
class Note:
    """A footnote of the README; `error` holds words of the message with which a file is refused, if that is what it explains."""

    text: str
    error: str = ""


# ---- models ----


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A small random model with a size's traits.

    `unread` is what older exports store and no layer uses; `own_values` gives layers that take keys as values a projection of
    values, equal to that of the keys.
    """

    raw: Raw
    plan: ModelPlan
    tensors: dict[Key, Tensor]
    unread: dict[Key, Tensor]
    own_values: dict[Key, Tensor]

    def named(self, state: State) -> Tensors:
        """Return the tensors under Hugging Face's names, with those that no layer uses if the state has them."""
        return {hf.spell(*key): tensor for key, tensor in (self.tensors | (self.unread if state.has_unread else {})).items()}


@functools.cache
def model(like: str, width: int = NARROW) -> Model:
    """Make the model of a size; all of its matrices' rows are multiples of `width` but for those of the attention's output."""
    size = shrink(SIZES[like])
    has_experts, has_readers, has_ple = size.experts > 0, size.readers > 0, size.ple > 0
    small = replace(
        size,
        hidden=width,
        mlp=width,
        layers=4 if has_readers else 2,
        period=2,
        head_dim=16,
        readers=2 if has_readers else 0,
        ple=width if has_ple else 0,
        experts=4 if has_experts else 0,
        top_k=2 if has_experts else 0,
        expert_width=width if has_experts else 0,
        vocab=64,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / like
        write_size(small, path)
        raw = json.loads((path / "config.json").read_text())
        stored = {name: tensor.float() for name, tensor in load_file(path / "model.safetensors").items()}
    plan = derive(configs.read(raw))
    tensors = {key: stored[hf.spell(*key)] for spec in plan.params() for key in _keys(spec)}
    names = [f"layers.{layer.index}.attn.in" for layer in plan.layers if layer.proj is Proj.QK_ONLY]
    return Model(raw, plan, tensors, _draw_unread(plan), {(name, "v"): tensors[name, "k"] for name in names})


def _keys(spec: ParamSpec) -> list[Key]:
    """List what a parameter is stored as: its parts, but experts whole."""
    return [(spec.name, part) for part, _ in spec.parts if len(spec.shape) == 2] or [(spec.name, None)]


def _draw_unread(plan: ModelPlan) -> dict[Key, Tensor]:
    """Draw keys and values for layers that read another's, values for those that take their keys."""
    draw, found = torch.Generator().manual_seed(1), dict[Key, Tensor]()
    for layer in plan.layers:
        stem, rows = f"layers.{layer.index}.attn", layer.kv_heads * layer.head_dim
        for part in ("k", "v") if layer.proj is Proj.Q_ONLY else ("v",) if layer.proj is Proj.QK_ONLY else ():
            found[f"{stem}.in", part] = torch.randn(rows, plan.hidden, generator=draw)
        if layer.proj is Proj.Q_ONLY:
            found[f"{stem}.k_norm", None] = torch.randn(layer.head_dim, generator=draw)
    return found


def tower(prefix: str) -> Tensors:
    """Make a vision tower whose layers have the names of the decoder's, with and without what wraps them."""
    names = ("k_proj.weight", "v_proj.weight", "k_norm.weight", "k_proj.linear.weight")
    stems = [f"{prefix}vision_tower.encoder.layers.{index}.self_attn." for index in range(TOWER_LAYERS)]
    return {f"{stem}{name}": torch.full((8, 8) if "proj" in name else (8,), torch.nan) for stem in stems for name in names}


# ---- how each format is written ----


def write_like_hf(
    pack: Packer, config: Callable[[], Raw | None], experts: str, folder: Path, model: Model, state: State
) -> Files:
    """Write Hugging Face's names, every linear module packed."""
    prefix, extra = (WRAPPER, tower("model.")) if state.is_wrapped else (TEXT, {})
    files = quantize(folder, (model.raw, model.named(state)), pack, config(), experts=experts, prefix=prefix, extra=extra)
    return files.packed, files.dense


def write_mlx(recipe: mlx_files.Recipe, folder: Path, model: Model, state: State) -> Files:
    """Write MLX's modules, all matrices packed, embeddings and router too."""
    source = write(folder / "source", model.raw, model.named(state))
    if not state.is_wrapped:
        return mlx_files.convert(source, folder, lambda module: recipe)
    kind = {"multimodal": True, "model_type": wrap(model.raw)["model_type"]}
    return mlx_files.convert(source, folder, lambda module: recipe, prefix="language_model.model.", extra=tower(""), **kind)


def write_gguf(kind: str, folder: Path, model: Model, state: State) -> Files:
    """Write llama.cpp's names; a multimodal model as Ollama does, the tower beside the decoder."""
    stored, extra = model.tensors, gguf_files.divisors(model.plan)
    if state.has_unread:
        stored = stored | model.unread | model.own_values
    if state.is_wrapped:
        layers = (f"v.blk.{index}.attn_{name}.weight" for index in range(TOWER_LAYERS) for name in ("k", "v", "q"))
        extra |= dict.fromkeys(layers, torch.full((8, 8), torch.nan).numpy())
    folder.mkdir()
    packed = gguf_files.save(folder / "model.gguf", model.plan, stored, gguf_files.every(kind), extra=extra)
    return packed, write(folder / "dense", model.raw, _read_by_library(kind, model))


@functools.cache
def _read_by_library(kind: str, model: Model) -> Tensors:
    """Return the values that the gguf library reads out of what it stored."""
    found, choice = Tensors(), gguf_files.every(kind)
    for key, values in model.tensors.items():
        name = choice(key[0], values) if values.ndim > 1 else "F32"
        read = gguf_library.dequantize(gguf_files.store(values, name), gguf_library.GGMLQuantizationType[name])
        found[hf.spell(*key)] = torch.tensor(read).float().view(values.shape)
    return found


def pack_dense(dtype: torch.dtype, weight: Tensor) -> tuple[Stored, Tensor]:
    """Store a matrix as it is."""
    return {"weight": weight.to(dtype)}, weight.to(dtype).float()


def pack_bitsandbytes(weight: Tensor) -> tuple[Stored, Tensor]:
    """Store for a matrix the tensors that bitsandbytes stores for its 4-bit floats; what they hold is beside the point."""
    codes = torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8)
    return {"weight": codes, "weight.absmax": torch.ones(4), "weight.quant_state.bitsandbytes__nf4": codes[:9, 0].clone()}, weight


def pack_smoothed(weight: Tensor) -> tuple[Stored, Tensor]:
    """Store for a matrix the scales that ModelOpt's AWQ multiplies the inputs with."""
    stored, values = PACKERS["modelopt-nvfp4"][0](weight)
    return stored | {"pre_quant_scale": torch.ones(weight.shape[1])}, values


def transformed() -> dict[str, Any]:
    """Return the config of a compressed-tensors model whose activations are rotated."""
    rotation = {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "input"}]}
    return PACKERS["ct-W4A16"][1]() | {"transform_config": {"config_groups": {"u": rotation}}}


# ---- the rows ----


@dataclass(frozen=True, slots=True)
class Layout:
    """A row: what wrote the files, how matrices are stored, and what is declared of the outcome."""

    format: str  # the NAME of the module that reads it
    title: str
    scheme: str
    stored: str  # what headers call the decoder's matrices
    write: Callable[[Path, Model, State], Files] = field(repr=False)  # into a folder that it makes
    refusal: Note | None = None
    remarks: tuple[Note, ...] = ()
    width: int = NARROW

    def __str__(self) -> str:
        return f"{self.title} {self.scheme}"

    def files(self, folder: Path, like: str, state: State) -> Files:
        """Write a cell's files of one state."""
        return self.write(folder, model(like, self.width), state)

    def notes(self, like: str) -> list[Note]:
        """Return the footnotes of a size's cell."""
        if self.refusal is not None:
            return [self.refusal]
        return [note for note in self.remarks if note is not OWN_VALUES or model(like).own_values]

    def redundant(self, like: str) -> set[str]:
        """Name what is to be passed over where a file holds all that no layer uses."""
        used = model(like).own_values if OWN_VALUES in self.remarks else {}
        return {f"{name}[{part}]" if part else name for name, part in model(like).unread.keys() - used.keys()}


TOWER_FILE = Note(
    "A tower in the same file, where Ollama puts it, is left aside here; llama.cpp's `mmproj` files hold no text model."
)
OWN_VALUES = Note(
    "GGUF has no key for values that are the raw keys: `attn_v` is absent, or it is stored and used, with equal results."
)
NO_BITSANDBYTES = Note("Use the checkpoint that it was made from, and `--quant q4`.", "quant_method 'bitsandbytes'")
NO_TRANSFORMS = Note("The weights fit rotated activations only, which are not made here.", "transform_config")
NO_SMOOTHING = Note("Its inputs want a scale for each channel, `pre_quant_scale`, which is not applied here.", "pre_quant_scale")


def _plain(scheme: str, dtype: torch.dtype) -> Layout:
    pack = partial(pack_dense, dtype)
    return Layout(hf.NAME, "Hugging Face", scheme, scheme, partial(write_like_hf, pack, lambda: None, FUSED))


def _mlx(scheme: str, stored: str, recipe: mlx_files.Recipe) -> Layout:
    return Layout(mlx.NAME, "MLX", scheme, stored, partial(write_mlx, recipe))


def _gguf(scheme: str, kind: str, width: int = NARROW) -> Layout:
    return Layout(gguf.NAME, "GGUF", scheme, kind, partial(write_gguf, kind), None, (TOWER_FILE, OWN_VALUES), width)


def _quantized(title: str, scheme: str, stored: str, packer: str) -> Layout:
    pack, config = PACKERS[packer]
    return Layout(compressed.NAME, title, scheme, stored, partial(write_like_hf, pack, config, APART))


def _refused(title: str, scheme: str, pack: Packer, config: Callable[[], Raw], why: Note) -> Layout:
    return Layout(compressed.NAME, title, scheme, "", partial(write_like_hf, pack, config, APART), why)


LAYOUTS = (
    _plain("BF16", torch.bfloat16),
    _plain("F16", torch.float16),
    _mlx("affine 4-bit", "affine4g64", mlx_files.like_mlx(4, 64)),
    _mlx("affine 8-bit", "affine8g64", mlx_files.like_mlx(8, 64)),
    *(_mlx(mode, mode, mlx_files.micro(mode)) for mode in ("mxfp4", "mxfp8", "nvfp4")),
    *(_gguf(kind, kind) for kind in ("F16", "Q8_0", "Q4_0")),
    *(_gguf(kind, kind, WIDE) for kind in ("Q4_K", "IQ4_XS", "IQ3_S", "IQ2_XXS", "IQ1_M", "TQ2_0")),
    _quantized("compressed-tensors", "FP8, by row", "fp8", "ct-FP8_DYNAMIC"),
    _quantized("compressed-tensors", "FP8, by block", f"fp8g{BLOCK[1]}", "ct-FP8_BLOCK"),
    _quantized("compressed-tensors", "W8A8-int8", "int8", "ct-W8A8"),
    _quantized("compressed-tensors", "W4A16", f"packed4g{GROUP}", "ct-W4A16"),
    _quantized("compressed-tensors", "NVFP4", "nvfp4", "ct-NVFP4"),
    _refused("compressed-tensors", "with transforms", PACKERS["ct-W4A16"][0], transformed, NO_TRANSFORMS),
    _quantized("GPTQ", "4-bit", f"gptq4g{GROUP}z", "gptq"),
    _quantized("AWQ", "4-bit", f"awq4g{GROUP}", "awq"),
    _quantized("ModelOpt", "FP8", "fp8", "modelopt-fp8"),
    _quantized("ModelOpt", "NVFP4", "nvfp4", "modelopt-nvfp4"),
    _refused("ModelOpt", "NVFP4 with AWQ", pack_smoothed, PACKERS["modelopt-nvfp4"][1], NO_SMOOTHING),
    _refused("bitsandbytes", "nf4", pack_bitsandbytes, lambda: {"quant_method": "bitsandbytes"}, NO_BITSANDBYTES),
)


# ---- the README's table ----

INTRODUCTION = """\
Every cell is four files of a small random model: with and without the tensors that its layers do not use (keys and
values of layers that read another's, values of layers that take their keys), as a text model and inside a multimodal
wrapper whose tower's layers have the decoder's names. *yes*: all four load and give the logits of the same values in
float32; *no*: all four are refused, with the reason. `tests/formats/test_matrix.py` proves it."""


def table() -> str:
    """Write the table of all declared outcomes in Markdown, its footnotes below it."""
    notes: list[Note] = []
    lines = [f"| format | stored as | {' | '.join(SIZES)} |", "|---|---|" + "---|" * len(SIZES)]
    for layout in LAYOUTS:
        cells = []
        for like in SIZES:
            found = layout.notes(like)
            notes += [note for note in found if note not in notes]
            marks = ", ".join(str(notes.index(note) + 1) for note in found)
            cells.append(("no" if layout.refusal else "yes") + (f" <sup>{marks}</sup>" if marks else ""))
        lines.append(f"| {layout.title} | {layout.scheme} | {' | '.join(cells)} |")
    below = [f"{number}. {note.text}" for number, note in enumerate(notes, 1)]
    return "\n".join([INTRODUCTION, "", *lines, "", *below])


def put_into(text: str) -> str:
    """Put the table between the markers of a text. Raises ValueError if they are not there, each once, in order."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(f"{BEGIN} and then {END} expected, each once")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> None:
    """Print the table, or write it into a file."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE", help=f"put it between {BEGIN} and {END} of this file")
    path = parser.parse_args().write
    if path is None:
        print(table())
    else:
        path.write_text(put_into(path.read_text()))


if __name__ == "__main__":
    main()
