"""Images for tests, drawn by formula, and an antialiased bicubic resampling in float64 that shares no code with the package.

Owns what a picture holds, so that goldens made elsewhere mean the same one. Refuses to judge: read `unit/test_image.py`.
"""

from __future__ import annotations

import numpy as np


def drawing(height: int, width: int) -> np.ndarray:
    """Return an image [H, W, 3] with smooth waves in red, steep edges in green and a fine pattern in blue."""
    y, x = np.mgrid[0:height, 0:width]
    waves = 127 + 127 * np.sin(x / 9 + y / 5)
    noise = ((x * 7919 + y * 104729) // 13) % 256
    return np.stack([waves, (x * 7 + y) % 256, noise], axis=-1).astype(np.uint8)


def resampled(image_HWC: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resample as the definition says: across, then down, each pass rounded to whole levels and clamped."""
    across = _levels(np.einsum("ow,hwc->hoc", _kernel(image_HWC.shape[1], width), image_HWC.astype(np.float64)))
    return _levels(np.einsum("oh,hwc->owc", _kernel(image_HWC.shape[0], height), across.astype(np.float64)))


def _levels(values: np.ndarray) -> np.ndarray:
    return np.clip(np.floor(values + 0.5), 0, 255).astype(np.uint8)


def _kernel(size: int, wanted: int) -> np.ndarray:
    """Return the weights [wanted, size] of a cubic (a = -0.5) as wide as a new pixel, at least as an old one."""
    scale = size / wanted
    width = max(scale, 1.0)
    centres = (np.arange(wanted) + 0.5) * scale
    distance = np.abs(np.arange(size)[None] + 0.5 - centres[:, None]) / width
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
    return np.asarray(weights / weights.sum(1, keepdims=True))
