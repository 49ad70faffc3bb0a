"""Towers on Triton's kernels against the reference: no op that only a CPU has is taken.

Read `parity/test_vision.py` and `parity/test_audio_tower.py` for towers against transformers.
"""

from __future__ import annotations

import pytest
import torch

from gemcutter.media.audio import SoundFrames
from gemcutter.media.image import ImagePatches
from gemcutter.model.audio import AudioTower
from gemcutter.model.vision import VisionTower
from gemcutter.ops import TOWER_OPS, KernelSite
from gemcutter.ops.registry import select_kernel
from gemcutter.ops.types import Param
from gemcutter.param_spec import ParamKind
from gemcutter.quant import Weight
from gemcutter.tower_config import AudioConfig, VisionConfig
from gemcutter.tower_plan import AudioPlan, VisionPlan, plan_audio, plan_vision
from tests.topologies import relative_error

VISION = VisionConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
    position_embedding_size=16,
    use_clipped_linears=True,
)
AUDIO = AudioConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    subsampling_conv_channels=(8, 4),
    gradient_clipping=5.0,
    output_proj_dims=24,
)
OUT = 40
TOLERANCE = 2e-5


def params_of(plan: VisionPlan | AudioPlan, device: torch.device) -> dict[str, Param]:
    """Draw a tower's parameters, with bounds that cut some values off."""
    draw, found = torch.Generator().manual_seed(0), dict[str, Param]()
    for spec in plan.params():
        if spec.kind is ParamKind.MATRIX:
            rows = [rows for _, rows in spec.parts] or [spec.shape[0]]
            drawn = [torch.randn(each, *spec.shape[1:], generator=draw) * spec.shape[-1] ** -0.5 for each in rows]
            found[spec.name] = Weight(tuple(each.to(device) for each in drawn), tuple(part for part, _ in spec.parts))
        elif spec.kind is ParamKind.SCALAR:
            found[spec.name] = torch.tensor(-2.0 if spec.name.endswith("min") else 2.0)
        else:
            found[spec.name] = (1 + 0.3 * torch.randn(spec.shape, generator=draw)).to(device)
    return found


def test_a_vision_tower(device: torch.device) -> None:
    plan = plan_vision(VISION, OUT)
    assert isinstance(plan, VisionPlan)
    draw = torch.Generator().manual_seed(1)
    images = [
        ImagePatches(torch.randint(0, 256, (rows * columns, 768), generator=draw).byte(), rows, columns, rows * columns // 9, "")
        for rows, columns in ((3, 6), (6, 3))
    ]
    params = params_of(plan, device)
    found = VisionTower(plan, params, torch.float32, device, "triton").encode(images)
    wanted = VisionTower(plan, params, torch.float32, device, "reference").encode(images)
    for each, other in zip(found, wanted, strict=True):
        assert relative_error(each, other) < TOLERANCE


def test_an_audio_tower(device: torch.device) -> None:
    plan = plan_audio(AUDIO, OUT)
    assert isinstance(plan, AudioPlan)
    draw = torch.Generator().manual_seed(1)
    sounds = [SoundFrames(torch.randn(frames, 128, generator=draw), -(-frames // 4), "") for frames in (30, 61)]
    params = params_of(plan, device)
    found = AudioTower(plan, params, torch.float32, device, "triton").encode(sounds)
    wanted = AudioTower(plan, params, torch.float32, device, "reference").encode(sounds)
    for each, other in zip(found, wanted, strict=True):
        assert relative_error(each, other) < TOLERANCE


@pytest.mark.parametrize("op", TOWER_OPS)
def test_no_op_of_a_cpu_is_taken(op: str, device: torch.device) -> None:
    for place, kernels in (("cuda", "auto"), (device.type, "triton")):
        site = KernelSite(op, None, place, "bfloat16", "bfloat16", kernels)
        assert select_kernel(site).impl.name == "reference"  # which says that layers are computed op by op
