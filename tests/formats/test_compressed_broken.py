"""Quantized Hugging Face files that are broken, hostile or of another kind: one error that names every fault, and no harm done.

Read `test_compressed.py` for the files that are sound.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gemcutter.checkpoint.formats import compressed
from gemcutter.errors import CheckpointError
from tests.formats.packers import PACKERS
from tests.formats.quantized import MOE, Raw, Tensors, params_of, quantize, random_model, write

Q = "model.layers.0.self_attn.q_proj."
EXPERT = "model.layers.0.experts.3.down_proj."


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a sound W4A16 file of the MoE model, for each test to break in its own way."""
    pack, config = PACKERS["ct-W4A16"]
    return quantize(tmp_path_factory.mktemp("sound"), MOE, pack, config()).packed


def broken(sound: Path, folder: Path, change: Callable[[Tensors, Raw], None]) -> Path:
    """Copy a checkpoint after a change of its tensors and config."""
    tensors, raw = load_file(sound / "model.safetensors"), json.loads((sound / "config.json").read_text())
    change(tensors, raw)
    return write(folder / "broken", raw, tensors)


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        params_of(path)
    assert max(map(len, str(caught.value).splitlines())) < 400, "a line that nobody reads"
    return str(caught.value)


def put(name: str, make: Callable[[Tensor], Tensor | None], source: str | None = None) -> Callable[[Tensors, Raw], None]:
    def change(tensors: Tensors, raw: Raw) -> None:
        made = make(tensors[source or name])
        if made is None:
            del tensors[name]
        else:
            tensors[name] = made

    return change


def claim(**keys: Any) -> Callable[[Tensors, Raw], None]:
    return lambda tensors, raw: raw["quantization_config"].update(keys)


def bits(count: int) -> Callable[[Tensors, Raw], None]:
    return lambda tensors, raw: raw["quantization_config"]["config_groups"]["group_0"]["weights"].update(num_bits=count)


FAULTS: dict[str, tuple[Callable[[Tensors, Raw], None], str]] = {
    "no scales": (
        put(f"{Q}weight_scale", lambda t: None),
        "attn.in[q]: model.safetensors:" + f"{Q}weight_packed: no scales beside",
    ),
    "no codes": (put(f"{Q}weight_packed", lambda t: None), "no weight beside weight_scale and weight_shape"),
    "an expert's scales": (put(f"{EXPERT}weight_scale", lambda t: None), "layers.0.moe.out"),
    "scales of other rows": (put(f"{Q}weight_scale", lambda t: t[:-1]), "scales: one for the tensor, for each of 256 rows"),
    "scales of other groups": (put(f"{Q}weight_scale", lambda t: t.repeat(1, 4)[:, :5]), "5 groups do not divide 64 columns"),
    "scales without groups": (put(f"{Q}weight_scale", lambda t: t[:, :0]), "scales: 0 groups found"),
    "scales with too many axes": (put(f"{Q}weight_scale", lambda t: t[None, None]), "scales: one for the tensor"),
    "scales of integers": (put(f"{Q}weight_scale", lambda t: t.int()), "float32 or float16 or bfloat16 expected, found int32"),
    "codes without axes": (put(f"{Q}weight_packed", lambda t: t[0, 0]), "[rows, columns] or [experts, rows, columns] expected"),
    "codes with four axes": (put(f"{Q}weight_packed", lambda t: t[None, None]), "expected, found [1, 1, 256, 8]"),
    "codes of fewer rows": (put(f"{Q}weight_packed", lambda t: t[:-1]), "shape      layers.0.attn.in[q] (256, 64) expected"),
    "codes of fewer columns": (put(f"{Q}weight_packed", lambda t: t[:, :-1]), "3 bits by its width, config.json says 4"),
    "codes of more columns": (
        put(f"{Q}weight_packed", lambda t: t.repeat(1, 3)),
        "24 items of 32 bits a row do not hold 64 columns",
    ),
    "codes without columns": (put(f"{Q}weight_packed", lambda t: t[:, :0]), "0 items of 32 bits a row do not hold 64 columns"),
    "codes of another dtype": (
        put(f"{Q}weight_packed", lambda t: t.short()),
        "I32, U8, I8, F8_E4M3 expected beside weight_scale",
    ),
    "another width": (bits(8), "4 bits by its width, config.json says 8"),
    "another shape": (put(f"{Q}weight_shape", lambda t: t + 1), "weight_shape: [256, 64] expected, found [257, 65]"),
    "a huge shape": (put(f"{Q}weight_shape", lambda t: torch.zeros(5000, dtype=torch.long)), "found I64 [5000]"),
    "zero points of other rows": (
        put(f"{Q}weight_zero_point", lambda t: torch.zeros(9, 2, dtype=torch.int32), f"{Q}weight_packed"),
        "zero points: 32 words expected for 256 values of 4 bits, found 9",
    ),
    "an index out of range": (
        put(f"{Q}weight_g_idx", lambda t: torch.full((64,), 7, dtype=torch.int32), f"{Q}weight_packed"),
        "g_idx: groups 0 to 1 expected, found 7 to 7",
    ),
    "an index of other columns": (
        put(f"{Q}weight_g_idx", lambda t: torch.zeros(63, dtype=torch.int32), f"{Q}weight_packed"),
        "g_idx: shape [64] expected, found [63]",
    ),
    "scaled inputs": (
        put(f"{Q}pre_quant_scale", lambda t: torch.ones(64), f"{Q}weight_packed"),
        "pre_quant_scale beside it: packed integers have no such tensor",
    ),
    "a missing expert": (
        lambda tensors, raw: [tensors.pop(name) for name in list(tensors) if name.startswith(EXPERT)] and None,
        "moe.out: model.safetensors:model.layers.0.experts.0.down_proj.weight_packed: 1 of 4 experts are missing: 3;",
    ),
    "an expert too many": (
        put("model.layers.0.experts.999999999.down_proj.weight", lambda t: t.float(), f"{EXPERT}weight_packed"),
        "4 experts expected, found 999999999 besides",
    ),
    "an expert of another kind": (
        put(f"{EXPERT}weight_scale", lambda t: t[:, :1]),
        "expert 0 is packed4g32 [64, 64], expert 3 packed4 [64, 64]",
    ),
    "an index beyond counting": (
        put(f"model.layers.0.experts.{'9' * 50}.down_proj.weight", lambda t: t.float(), f"{EXPERT}weight_packed"),
        "not part of this model",
    ),
    "a weight packed twice": (put(f"{Q}weight", lambda t: t.float(), f"{Q}weight_packed"), "duplicate  layers.0.attn.in[q]"),
    "experts stored twice": (
        put("model.layers.0.experts.down_proj", lambda t: torch.zeros(4, 64, 64), f"{EXPERT}weight_packed"),
        "duplicate  layers.0.moe.out",
    ),
    "scales of nothing": (put("model.layers.0.foo.weight_scale", lambda t: t.clone(), f"{Q}weight_scale"), "unknown"),
    "another format": (claim(format="marlin-24"), "format 'marlin-24': expected one of dense, pack-quantized"),
    "a format of one group": (claim(config_groups={"group_0": {"format": "mxfp6-pack-quantized"}}), "'mxfp6-pack-quantized'"),
    "rotated weights": (claim(transform_config={"config_groups": {"R1": {}}}), "transform_config"),
    "sparse weights": (claim(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config.format 'sparse-24-bitmask'"),
    "another method": (claim(quant_method="bitsandbytes"), "quant_method 'bitsandbytes': expected one of compressed-tensors"),
    "a method that is no text": (claim(quant_method=["x"] * 10_000), "quant_method ['x', "),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(fault: str, sound: Path, tmp_path: Path) -> None:
    change, message = FAULTS[fault]
    assert message in refusal(broken(sound, tmp_path, change))


def test_faults_of_all_weights_are_named_at_once(sound: Path, tmp_path: Path) -> None:
    names = [f"model.layers.{layer}.self_attn.q_proj.weight_scale" for layer in range(2)]
    message = refusal(broken(sound, tmp_path, lambda tensors, raw: [tensors.pop(name) for name in names] and None))
    assert "2 problems, nothing was allocated" in message
    assert all(f"layers.{layer}.attn.in[q]" in message for layer in range(2))


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize(("layout", "ending"), [("ct-NVFP4", "weight_global_scale"), ("modelopt-nvfp4", "weight_scale_2")])
def test_a_scale_that_would_make_a_weight_nothing_is_refused(layout: str, ending: str, value: float, tmp_path: Path) -> None:
    pack, config = PACKERS[layout]
    sound = quantize(tmp_path, "12B", pack, config()).packed
    change = put(f"{Q}{ending}", lambda t: torch.full_like(t, value))
    assert f"{ending}: positive numbers expected, found {value}" in refusal(broken(sound, tmp_path, change))


def test_zero_points_that_the_config_promises_must_be_there(tmp_path: Path) -> None:
    pack, config = PACKERS["ct-W4A16_ASYM"]
    sound = quantize(tmp_path, "12B", pack, config()).packed
    message = refusal(broken(sound, tmp_path, put(f"{Q}weight_zero_point", lambda t: None)))
    assert (
        "no zero points beside weight_packed and weight_scale and weight_shape, and config.json says symmetric: false" in message
    )


def test_nested_claims_do_not_exhaust_the_stack(sound: Path, tmp_path: Path) -> None:
    def nest(tensors: Tensors, raw: Raw) -> None:
        for _ in range(300):
            raw["quantization_config"] = {"deeper": raw["quantization_config"], "quant_method": "compressed-tensors"}

    checkpoint, _ = params_of(broken(sound, tmp_path, nest))
    assert checkpoint.format == compressed.NAME


def test_patterns_of_the_config_are_never_run(sound: Path, tmp_path: Path) -> None:
    """A target may be a regular expression, and one that takes an age to fail."""
    evil = "re:(" + "[a-z.]*)*" * 9 + "!"
    checkpoint, _ = params_of(broken(sound, tmp_path, claim(ignore=[evil], targets=[evil], modules_to_not_convert=[evil])))
    assert checkpoint.format == compressed.NAME


def test_bitsandbytes_is_refused_by_name(tmp_path: Path) -> None:
    raw, tensors = random_model("12B")
    tensors = tensors | {f"{Q}weight.quant_state.bitsandbytes__nf4": torch.zeros(8, dtype=torch.uint8)}
    message = refusal(write(tmp_path / "bnb", raw, tensors))
    assert "quant_method 'bitsandbytes'" in message
    assert "use the checkpoint that they were made from, or one in compressed-tensors, GPTQ" in message
