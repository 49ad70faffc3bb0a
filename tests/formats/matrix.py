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
from gemcutter.checkpoint.synth import SIZES, shrink, write_size
from gemcutter.plan import ModelPlan, ParamSpec, Proj, derive
from tests import gguf_files, mlx_files
from tests.formats.packers import PACKERS, Packer, Stored
from tests.formats.quantized import APART, FUSED, TEXT, WRAPPER, Raw, Tensors, quantize, wrap, write

Key = tuple[str, str | None]  # a parameter and its part
Files = tuple[Path, Path]  # a checkpoint, and the same values as plain float32

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
Write = Callable[[Path, str, State], Files]  # a folder to make, a size and a state


@dataclass(frozen=True, slots=True)
class Note:
    """A footnote of the README; `error` holds words of the message with which a file is refused, if that is what it explains."""

    text: str
    error: str = ""


@dataclass(frozen=True, slots=True)
class Layout:
    """A row: what wrote the files, how matrices are stored, and what is declared of the outcome."""

    format: str  # the NAME of the module that reads it
    title: str
    scheme: str
    write: Write = field(repr=False)
    refusal: Note | None = None
    remarks: tuple[Note, ...] = ()

    def __str__(self) -> str:
        return f"{self.title} {self.scheme}"

    def notes(self, like: str) -> list[Note]:
        """Give the footnotes of a size's cell."""
        if self.refusal is not None:
            return [self.refusal]
        return [note for note in self.remarks if note is not OWN_VALUES or own_values(like)]

    def redundant(self, like: str) -> set[str]:
        """Name what is expected to be passed over where a file holds all of `unread`."""
        return {_label(key) for key in unread(like) if not (OWN_VALUES in self.remarks and key in own_values(like))}


# ---- models ----


@functools.cache
def model(like: str) -> tuple[Raw, Tensors]:
    """Give config and tensors of a small model with a size's traits, wide enough for GGUF's largest blocks."""
    size = shrink(SIZES[like])
    experts = {"experts": 4, "top_k": 2, "expert_width": 256} if size.experts else {}
    readers = {"layers": 4, "readers": 2} if size.readers else {"layers": 2}
    widths = {"hidden": 256, "mlp": 256, "head_dim": 16, "vocab": 64, "ple": 256 if size.ple else 0}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / like
        write_size(replace(size, period=2, **widths, **readers, **experts), path)
        raw = json.loads((path / "config.json").read_text())
        return raw, {name: tensor.float() for name, tensor in load_file(path / "model.safetensors").items()}


@functools.cache
def plan_of(like: str) -> ModelPlan:
    return derive(configs.read(model(like)[0]))


@functools.cache
def unread(like: str) -> dict[Key, Tensor]:
    """Draw what older exports store and no layer uses: keys of layers that read another's, values of those that have none."""
    draw, found = torch.Generator().manual_seed(1), dict[Key, Tensor]()
    for layer in plan_of(like).layers:
        stem, rows = f"layers.{layer.index}.attn", layer.kv_heads * layer.head_dim
        for part in ("k", "v") if layer.proj is Proj.Q_ONLY else ("v",) if layer.proj is Proj.QK_ONLY else ():
            found[f"{stem}.in", part] = torch.randn(rows, plan_of(like).hidden, generator=draw)
        if layer.proj is Proj.Q_ONLY:
            found[f"{stem}.k_norm", None] = torch.randn(layer.head_dim, generator=draw)
    return found


def own_values(like: str) -> dict[Key, Tensor]:
    """Give the keys' projections of layers that take keys as values, as projections of the values."""
    tensors, layers = model(like)[1], plan_of(like).layers
    names = [f"layers.{layer.index}.attn.in" for layer in layers if layer.proj is Proj.QK_ONLY]
    return {(name, "v"): tensors[hf.spell(name, "k")] for name in names}


def tensors_of(like: str, state: State) -> Tensors:
    """Give a model's tensors under Hugging Face's names, with those that no layer uses if the state has them."""
    extra = {hf.spell(*key): tensor for key, tensor in unread(like).items()} if state.has_unread else {}
    return model(like)[1] | extra


def tower(prefix: str) -> Tensors:
    """Make a vision tower whose layers have the names of the decoder's, with and without what wraps them."""
    names = ("k_proj.weight", "v_proj.weight", "k_norm.weight", "k_proj.linear.weight")
    stems = [f"{prefix}vision_tower.encoder.layers.{index}.self_attn." for index in range(TOWER_LAYERS)]
    return {f"{stem}{name}": torch.full((8, 8) if "proj" in name else (8,), torch.nan) for stem in stems for name in names}


def _label(key: Key) -> str:
    return f"{key[0]}[{key[1]}]" if key[1] else key[0]


# ---- how each format is written ----


def write_like_hf(pack: Packer, config: Callable[[], Raw | None], experts: str, folder: Path, like: str, state: State) -> Files:
    """Write Hugging Face's names, every linear module packed."""
    prefix, extra = (WRAPPER, tower("model.")) if state.is_wrapped else (TEXT, {})
    given = model(like)[0], tensors_of(like, state)
    files = quantize(folder, given, pack, config(), experts=experts, prefix=prefix, extra=extra)
    return files.packed, files.dense


def write_mlx(recipe: mlx_files.Recipe, folder: Path, like: str, state: State) -> Files:
    """Write MLX's modules, all matrices packed, embeddings and router too."""
    raw = model(like)[0]
    source = write(folder / "source", raw, tensors_of(like, state))
    if not state.is_wrapped:
        return mlx_files.convert(source, folder, lambda module: recipe)
    kind = {"multimodal": True, "model_type": wrap(raw)["model_type"]}
    return mlx_files.convert(source, folder, lambda module: recipe, prefix="language_model.model.", extra=tower(""), **kind)


def write_gguf(kind: str, folder: Path, like: str, state: State) -> Files:
    """Write llama.cpp's names; a multimodal model as Ollama does, the tower beside the decoder."""
    plan, choice = plan_of(like), gguf_files.every(kind)
    stored, extra = dict(_stored(like)), gguf_files.divisors(plan)
    if state.has_unread:
        stored |= unread(like) | own_values(like)
    if state.is_wrapped:
        layers = (f"v.blk.{index}.attn_{name}.weight" for index in range(TOWER_LAYERS) for name in ("k", "v", "q"))
        extra |= dict.fromkeys(layers, torch.full((8, 8), torch.nan).numpy())
    folder.mkdir()
    packed = gguf_files.save(folder / "model.gguf", plan, stored, choice, extra=extra)
    return packed, write(folder / "dense", model(like)[0], _read_by_library(kind, like))


def _stored(like: str) -> gguf_files.Tensors:
    """Give a model's tensors by parameter and part."""
    return {key: model(like)[1][hf.spell(*key)] for spec in plan_of(like).params() for key in _keys(spec)}


def _keys(spec: ParamSpec) -> list[Key]:
    """List what a parameter is stored as: its parts, but experts whole."""
    return [(spec.name, part) for part, _ in spec.parts if len(spec.shape) == 2] or [(spec.name, None)]


@functools.cache
def _read_by_library(kind: str, like: str) -> Tensors:
    """Give the values that the gguf library reads out of what it stored."""
    found, choice = Tensors(), gguf_files.every(kind)
    for key, values in _stored(like).items():
        name = choice(key[0], values) if values.ndim > 1 else "F32"
        read = gguf_library.dequantize(gguf_files.store(values, name), gguf_library.GGMLQuantizationType[name])
        found[hf.spell(*key)] = torch.tensor(read).float().view(values.shape)
    return found


def pack_dense(dtype: torch.dtype, weight: Tensor) -> tuple[Stored, Tensor]:
    """Store a matrix as it is."""
    return {"weight": weight.to(dtype)}, weight.to(dtype).float()


def pack_bitsandbytes(weight: Tensor) -> tuple[Stored, Tensor]:
    """Give a matrix the tensors that bitsandbytes stores for its 4-bit floats; what they hold is beside the point."""
    codes = torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8)
    return {"weight": codes, "weight.absmax": torch.ones(4), "weight.quant_state.bitsandbytes__nf4": codes[:9, 0].clone()}, weight


def pack_smoothed(weight: Tensor) -> tuple[Stored, Tensor]:
    """Give a matrix the scales that ModelOpt's AWQ multiplies the inputs with."""
    stored, values = PACKERS["modelopt-nvfp4"][0](weight)
    return stored | {"pre_quant_scale": torch.ones(weight.shape[1])}, values


def transformed() -> dict[str, Any]:
    """Give the config of a compressed-tensors model whose activations are rotated."""
    rotation = {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "input"}]}
    return PACKERS["ct-W4A16"][1]() | {"transform_config": {"config_groups": {"u": rotation}}}


# ---- the rows ----

TOWER_FILE = Note("A tower in the same file, where Ollama puts it, is left aside; llama.cpp's `mmproj` files hold no text model.")
OWN_VALUES = Note(
    "No key of a GGUF file says that values are the raw keys; the absence of `attn_v` does. Where it is stored it is used, and a copy "
    "of the keys' gives the same numbers."
)
ONLY_BLOCKS = Note(f"Of GGUF's block types {', '.join(gguf.BLOCKS)} are read.", "is not read, only")
NO_BITSANDBYTES = Note("Use the checkpoint that it was made from, and `--quant q4`.", "quant_method 'bitsandbytes'")
NO_TRANSFORMS = Note("The weights fit rotated activations only, which are not made here.", "transform_config")
NO_SMOOTHING = Note("Its inputs want a scale for each channel, `pre_quant_scale`, which is not applied here.", "pre_quant_scale")


def _quantized(title: str, scheme: str, packer: str) -> Layout:
    pack, config = PACKERS[packer]
    return Layout(compressed.NAME, title, scheme, partial(write_like_hf, pack, config, APART))


def _plain(scheme: str, dtype: torch.dtype) -> Layout:
    return Layout(hf.NAME, "Hugging Face", scheme, partial(write_like_hf, partial(pack_dense, dtype), lambda: None, FUSED))


def _refused(title: str, scheme: str, pack: Packer, config: Callable[[], Raw], why: Note) -> Layout:
    return Layout(compressed.NAME, title, scheme, partial(write_like_hf, pack, config, APART), why)


def _gguf(scheme: str, kind: str, why: Note | None = None) -> Layout:
    return Layout(gguf.NAME, "GGUF", scheme, partial(write_gguf, kind), why, (TOWER_FILE, OWN_VALUES))


LAYOUTS = (
    _plain("BF16", torch.bfloat16),
    _plain("F16", torch.float16),
    Layout(mlx.NAME, "MLX", "affine 4-bit", partial(write_mlx, mlx_files.like_mlx(4, 64))),
    Layout(mlx.NAME, "MLX", "affine 8-bit", partial(write_mlx, mlx_files.like_mlx(8, 64))),
    *(Layout(mlx.NAME, "MLX", mode, partial(write_mlx, mlx_files.micro(mode))) for mode in ("mxfp4", "mxfp8", "nvfp4")),
    _gguf("F16", "F16"),
    _gguf("Q8_0", "Q8_0"),
    _gguf("Q4_0", "Q4_0"),
    _gguf("Q4_K", "Q4_K"),
    _gguf("IQ1, IQ2, IQ3, TQ1, TQ2", "TQ2_0", ONLY_BLOCKS),
    _quantized("compressed-tensors", "FP8, by row", "ct-FP8_DYNAMIC"),
    _quantized("compressed-tensors", "FP8, by block", "ct-FP8_BLOCK"),
    _quantized("compressed-tensors", "W8A8-int8", "ct-W8A8"),
    _quantized("compressed-tensors", "W4A16", "ct-W4A16"),
    _quantized("compressed-tensors", "NVFP4", "ct-NVFP4"),
    _refused("compressed-tensors", "with transforms", PACKERS["ct-W4A16"][0], transformed, NO_TRANSFORMS),
    _quantized("GPTQ", "4-bit", "gptq"),
    _quantized("AWQ", "4-bit", "awq"),
    _quantized("ModelOpt", "FP8", "modelopt-fp8"),
    _quantized("ModelOpt", "NVFP4", "modelopt-nvfp4"),
    _refused("ModelOpt", "NVFP4 with AWQ", pack_smoothed, PACKERS["modelopt-nvfp4"][1], NO_SMOOTHING),
    _refused("bitsandbytes", "nf4", pack_bitsandbytes, lambda: {"quant_method": "bitsandbytes"}, NO_BITSANDBYTES),
)


# ---- the README's table ----

INTRODUCTION = """\
Every cell is four files of a small random model: with and without the tensors that its layers do not use (keys and values of layers
that read another's, values of layers that take their keys), as a text model and inside a multimodal wrapper whose tower's layers
have the decoder's names. *yes*: all four load and give the logits of the same values in float32; *no*: all four are refused, with
the reason. `python -m tests.formats.matrix --write README.md` makes the table, `tests/formats/test_matrix.py` proves it."""


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
