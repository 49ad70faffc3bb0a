"""Images as vision towers read them: decoded, upright, opaque, resized to a budget of soft tokens, cut into patches.

Owns the limits on what strangers send, the sizes and the resampling of the official processor (bicubic with antialias on whole
levels, first across, then down, each pass rounded and clamped), and the order of values in a patch. Pillow decodes and torch
resamples; a message names the image and the remedy. Refuses to know towers. Read `decode.py` for files, `model/vision.py` for who
reads patches.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gemcutter.media.budgets import check_budget
from gemcutter.media.decode import ImageSource, read_pixels

LEVELS = 255  # of a colour, above 0


@dataclass(frozen=True, slots=True)
class PatchShape:
    """How a model cuts images: a soft token covers `pool` x `pool` patches of `patch` x `patch` pixels.

    With `merges` these are one patch of its own, as the 12B reads it.
    """

    patch: int = 16
    pool: int = 3
    merges: bool = False

    @property
    def soft_token_pixels(self) -> int:
        """Return the side of the square that a soft token covers, in pixels."""
        return self.patch * self.pool

    @property
    def side(self) -> int:
        """Return the side of what is cut out as one patch, in pixels."""
        return self.soft_token_pixels if self.merges else self.patch


@dataclass(frozen=True, slots=True, eq=False)
class ImagePatches:
    """The patches of one image, `rows` times `columns` of them, row by row.

    `levels_PC` (uint8) are a patch's pixels in the order row, column, colour; `soft_tokens` is how many rows of the decoder they
    become. `digest` tells contents apart: the pixels, and how they were cut.
    """

    levels_PC: Tensor
    rows: int
    columns: int
    soft_tokens: int
    digest: str

    def values(self) -> Tensor:
        """Return the patches [P, C] in float32, between 0 and 1."""
        return self.levels_PC * (1 / LEVELS)

    def positions(self) -> Tensor:
        """Return the column and the row of every patch, [P, 2]."""
        return grid_positions(self.rows, self.columns)


def grid_positions(rows: int, columns: int) -> Tensor:
    """Return the column and the row of every cell of a grid, row by row, [rows * columns, 2]."""
    return torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(-1)


def cut_image(source: ImageSource, budget: int, shape: PatchShape, name: str = "image") -> ImagePatches:
    """Return the patches of an image that becomes at most `budget` soft tokens.

    `source` is a file's path or bytes, a PIL image, or an array [H, W] or [H, W, 1, 3 or 4] of uint8 or uint16. Raises
    RequestError, which begins with `name`, for what is too large, damaged or no image.
    """
    check_budget(budget)
    pixels_HWC = read_pixels(source, name)
    height, width = fit_size(pixels_HWC.shape[0], pixels_HWC.shape[1], budget, shape)
    levels_HWC = resize(pixels_HWC, height, width)
    side, channels = shape.side, levels_HWC.shape[2]
    rows, columns = height // side, width // side
    cut = levels_HWC.view(rows, side, columns, side, channels).permute(0, 2, 1, 3, 4)
    levels_PC = cut.reshape(rows * columns, side * side * channels)
    content = hashlib.sha256(f"{height} {width} {side} {shape.pool}".encode())
    content.update(levels_PC.numpy().data)
    return ImagePatches(levels_PC, rows, columns, height * width // shape.soft_token_pixels**2, content.hexdigest())


def fit_size(height: int, width: int, budget: int, shape: PatchShape) -> tuple[int, int]:
    """Return the height and width to which an image is resized, in pixels: multiples of a soft token's side.

    They keep the aspect ratio, but for rounding down, and fill the budget, whether the image is larger or smaller. An image so
    narrow that a side would vanish becomes one soft token narrow and as long as the budget allows.
    """
    unit = shape.soft_token_pixels
    factor = math.sqrt(budget * unit**2 / (height * width))
    high, wide = math.floor(factor * height / unit), math.floor(factor * width / unit)
    if not high:
        high, wide = 1, min(width // height, budget)
    elif not wide:
        high, wide = min(height // width, budget), 1
    return high * unit, wide * unit


def resize(pixels_HWC: np.ndarray, height: int, width: int) -> Tensor:
    """Return an image of uint8 in another size, bicubic with antialias; one of that size already as it is."""
    image = torch.from_numpy(pixels_HWC)
    if image.shape[:2] == (height, width):
        return image
    planes = image.permute(2, 0, 1)[None]
    resized = F.interpolate(planes, size=(height, width), mode="bicubic", align_corners=False, antialias=True)
    return resized[0].permute(1, 2, 0).contiguous()
