"""Sounds drawn by formula, files of them as soundfile writes them, and speech: espeak-ng 1.51 said it, soundfile packed it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

RATE = 16_000
SPEECH = Path(__file__).parent / "goldens" / "speech"  # lantern, window and lamp, at 22,050 samples a second


def tones(samples: int, seed: int = 0, rate: int = RATE) -> np.ndarray:
    """Return samples [T], float32: gliding tones that swell and fade, over faint noise."""
    generator, time = np.random.default_rng(seed), np.arange(samples) / rate
    found = 0.02 * generator.standard_normal(samples)
    for pitch, swell in generator.uniform((90, 1), (2500, 7), (5, 2)):
        found += 0.1 * np.sin(2 * np.pi * pitch * time * (1 + 0.1 * time)) * (1 + np.sin(swell * time))
    return np.asarray(found, np.float32)


def saved(samples: np.ndarray, rate: int = RATE, form: str = "WAV", **options: Any) -> bytes:
    """Return the bytes of a file with samples [T] or [T, channels]."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=form, **options)
    return buffer.getvalue()
