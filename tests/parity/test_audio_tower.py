"""The audio towers against transformers, in float32: every size's traits, sounds of unequal lengths in one pass.

Read `tests/wrappers.py` for the models, `test_sounds.py` for whole prompts with sounds.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from gemcutter.errors import NumericError
from gemcutter.model import audio
from tests.topologies import KERNELS, TOLERANCE, relative_error
from tests.wrappers import AUDIO, audio_plan, build_audio_tower, build_wrapper, cut_tones, official_sound_rows

UNEQUAL = (161, 801, 7000, 16000, 7681, 48017)  # samples: 1, 2, 11, 25, 12 and 75 or 76 soft tokens
TRAITS: dict[str, dict[str, Any]] = {
    "a short memory": {"attention_chunk_size": 5, "attention_context_left": 9},
    "a look ahead": {"attention_chunk_size": 6, "attention_context_left": 7, "attention_context_right": 4},
    "chunks longer than what is seen": {"attention_chunk_size": 20, "attention_context_left": 5},
    "clamps that bite": {"gradient_clipping": 0.8, "residual_weight": 0.3, "conv_kernel_size": 3},
    "a low cap": {"attention_logit_cap": 1.5},
    "no bounds": {"use_clipped_linears": False},
}


@cache
def model_of(size: str, seed: int = 0) -> PreTrainedModel:
    return build_wrapper(size, seed, hears=True)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("size", AUDIO)
def test_rows_are_those_of_transformers(size: str, kernels: str) -> None:
    model = model_of(size)
    sounds = cut_tones(model, UNEQUAL)
    wanted, found = official_sound_rows(model, sounds), build_audio_tower(model, kernels=kernels).encode(sounds)
    assert [len(rows) for rows in found] == [sound.soft_tokens for sound in sounds] == [len(rows) for rows in wanted]
    for each, other in zip(found, wanted, strict=True):
        assert relative_error(each, other) < TOLERANCE


@pytest.mark.parametrize("size", AUDIO)
def test_thirty_seconds(size: str) -> None:
    model = model_of(size, seed=1)
    (sound,) = cut_tones(model, [480_000])
    (found,), (wanted,) = build_audio_tower(model).encode([sound]), official_sound_rows(model, [sound])
    assert found.shape == (750, audio_plan(model).out)
    assert relative_error(found, wanted) < TOLERANCE


@pytest.mark.parametrize("trait", TRAITS)
def test_other_traits_that_configs_name(trait: str) -> None:
    model = build_wrapper("E2B", hears=True, of_audio=TRAITS[trait])
    sounds = cut_tones(model, [16000, 30000])
    for each, other in zip(build_audio_tower(model).encode(sounds), official_sound_rows(model, sounds), strict=True):
        assert relative_error(each, other) < TOLERANCE


@pytest.mark.parametrize("size", AUDIO)
def test_sounds_do_not_hear_each_other(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(size)
    sounds, tower = cut_tones(model, [*UNEQUAL, 100]), build_audio_tower(model, kernels="reference")
    together, alone = tower.encode(sounds), [tower.encode([sound])[0] for sound in sounds]
    monkeypatch.setattr(audio, "PASS_TOKENS", 40)
    in_passes = tower.encode(sounds)
    assert not tower.encode([])
    assert together[-1].shape == (0 if size != "12B" else 1, audio_plan(model).out)
    for each, other, third in zip(together, alone, in_passes, strict=True):
        assert each.shape == other.shape == third.shape
        if len(each):
            assert relative_error(each, other) < 1e-6
            assert relative_error(each, third) < 1e-6


def test_a_row_depends_on_the_past_alone() -> None:
    model = model_of("E2B")
    tower = build_audio_tower(model, kernels="reference")
    short, long = cut_tones(model, [40_000])[0], cut_tones(model, [40_000])[0]
    long.values_FC[200:] += 1  # changed from soft token 50 on, and seen by one before it: convolutions look ahead
    before, after = tower.encode([short])[0], tower.encode([long])[0]
    assert torch.equal(before[:49], after[:49])
    assert not torch.equal(before[50:], after[50:])


def test_bounds_matter_and_may_be_absent() -> None:
    model = build_wrapper("E2B", hears=True)
    sounds, tower = cut_tones(model, [16000]), build_audio_tower(model)
    clipped = tower.encode(sounds)[0]
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith(("_min", "_max")):
                buffer.fill_(-torch.inf if name.endswith("_min") else torch.inf)
    wanted = official_sound_rows(model, sounds)[0]
    assert relative_error(build_audio_tower(model).encode(sounds)[0], wanted) < TOLERANCE
    assert relative_error(clipped, wanted) > 1e-2


def test_bfloat16_is_as_near_as_transformers_own() -> None:
    model = build_wrapper("E4B", hears=True)
    sounds = cut_tones(model, [16000, 30000])
    wanted = torch.cat(official_sound_rows(model, sounds))
    found = torch.cat(build_audio_tower(model, torch.bfloat16).encode(sounds))
    model = model.to(torch.bfloat16)
    official = torch.cat(official_sound_rows(model, sounds))
    assert (found - wanted).abs().mean() < 1.2 * (official - wanted).abs().mean()


def test_rows_that_are_not_finite_are_an_error() -> None:
    model = build_wrapper("E2B", hears=True)
    with torch.no_grad():
        model.model.audio_tower.output_proj.bias.fill_(torch.nan)
    with pytest.raises(NumericError, match="audio: the tower's rows are not finite"):
        build_audio_tower(model).encode(cut_tones(model, [16000]))
