"""The vision towers against transformers, in float32: every size's traits, images of unequal sizes in one pass.

Read `tests/wrappers.py` for the models, `test_media.py` for whole prompts with images.
"""

from __future__ import annotations

import pytest
import torch

from gemcutter.errors import NumericError, RequestError
from gemcutter.model import vision
from tests.topologies import KERNELS, TOLERANCE, relative_error
from tests.wrappers import VISION, build_tower, build_wrapper, cut_drawings, official_rows

UNEQUAL = [(60, 90, 70), (200, 30, 70), (30, 300, 140), (48, 48, 70)]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("size", VISION)
def test_rows_are_those_of_transformers(size: str, kernels: str) -> None:
    model = build_wrapper(size)
    images = cut_drawings(model, UNEQUAL)
    wanted, found = official_rows(model, images), build_tower(model, kernels=kernels).encode(images)
    assert [len(rows) for rows in found] == [image.soft_tokens for image in images]
    for each, other in zip(found, wanted, strict=True):
        assert relative_error(each, other) < TOLERANCE


@pytest.mark.parametrize("budget", [280, 560])
@pytest.mark.parametrize("size", ["E2B", "12B"])
def test_larger_budgets_and_narrow_images(size: str, budget: int) -> None:
    model = build_wrapper(size, seed=1)
    images = cut_drawings(model, [(50, 2500, budget), (100, 80, budget)])
    for each, other in zip(build_tower(model).encode(images), official_rows(model, images), strict=True):
        assert relative_error(each, other) < TOLERANCE


@pytest.mark.parametrize("size", ["E4B", "31B", "12B"])
def test_images_do_not_see_each_other(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_wrapper(size)
    images, tower = cut_drawings(model, UNEQUAL), build_tower(model, kernels="reference")
    together, alone = tower.encode(images), [tower.encode([image])[0] for image in images]
    monkeypatch.setattr(vision, "PASS_PATCHES", len(images[0].levels_PC) + len(images[1].levels_PC))
    in_passes = tower.encode(images)
    assert not tower.encode([])
    for each, other, third in zip(together, alone, in_passes, strict=True):
        assert relative_error(each, other) < 1e-6
        assert relative_error(each, third) < 1e-6


def test_bounds_matter_and_may_be_absent() -> None:
    model = build_wrapper("E2B")
    images, tower = cut_drawings(model, UNEQUAL[:1]), build_tower(model)
    clipped = tower.encode(images)[0]
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith(("_min", "_max")):
                buffer.fill_(-torch.inf if name.endswith("_min") else torch.inf)
    wanted = official_rows(model, images)[0]
    open_rows = build_tower(model).encode(images)[0]
    assert relative_error(open_rows, wanted) < TOLERANCE
    assert relative_error(clipped, wanted) > 1e-2


def test_bfloat16_is_as_near_as_transformers_own() -> None:
    model = build_wrapper("26B-A4B")
    images = cut_drawings(model, UNEQUAL[:2])
    wanted = torch.cat(official_rows(model, images))
    found = torch.cat(build_tower(model, torch.bfloat16).encode(images))
    official = torch.cat(official_rows(model.to(torch.bfloat16), images))
    assert (found - wanted).abs().mean() < 1.2 * (official - wanted).abs().mean()


def test_an_image_beyond_the_position_table_is_refused() -> None:
    model = build_wrapper("E2B", position_embedding_size=64)
    tower = build_tower(model)
    (wide,) = cut_drawings(model, [(50, 2500, 70)])
    with pytest.raises(RequestError, match=r"\d+ x 3 patches, the position table of this model has 64; lower max_soft_tokens"):
        tower.encode([wide])


def test_rows_that_are_not_finite_are_an_error() -> None:
    model = build_wrapper("12B")
    (image,) = cut_drawings(model, UNEQUAL[:1])
    with torch.no_grad():
        model.model.embed_vision.patch_dense.bias.fill_(torch.nan)
    with pytest.raises(NumericError, match="not finite"):
        build_tower(model).encode([image])
