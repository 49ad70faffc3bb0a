"""Sounds as audio towers read them: log-mel frames, or raw samples cut into frames.

Owns the official front end: frames of 20 ms every 10 ms, their magnitude spectra under a Hann window, 128 triangular filters on
the mel scale of HTK, the logarithm of it all plus a floor. Frames that would reach beyond the sound are left out. Refuses to know
files and towers. Read `decode_sound.py` for files, `model/audio.py` for who reads frames.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from gemcutter.media.decode_sound import RATE, SoundSource, read_samples

FRAME, HOP, SPECTRUM = 320, 160, 512  # samples: of a frame, from one to the next, and of its padded spectrum
BEFORE = FRAME // 2  # zeros in front, so that the first frame has the beginning in its middle
MEL_BINS = 128
MEL_FLOOR = 1e-3  # added, so that silence has a logarithm
TOKEN_FRAMES = 4  # that become one soft token: 40 ms


@dataclass(frozen=True, slots=True)
class SoundShape:
    """How a model cuts sounds: into log-mel frames, four a soft token, or with `raw_samples` into as many raw samples a token."""

    raw_samples: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class SoundFrames:
    """The frames of one sound, in order: values_FC, float32.

    `soft_tokens` is how many rows of the decoder they become, none for a sound of less than a frame. `digest` tells contents
    apart: the values, and how they were cut.
    """

    values_FC: Tensor
    soft_tokens: int
    digest: str


def cut_sound(source: SoundSource, shape: SoundShape, name: str = "audio") -> SoundFrames:
    """Return the frames of a sound.

    `source` is a file's path or bytes, or a pair of an array, [T] or [T, channels], and its rate in samples a second. Raises
    RequestError, which begins with `name`, for what is too long, damaged or no sound.
    """
    samples = read_samples(source, name)
    if shape.raw_samples is None:
        values = log_mel(samples)
        soft_tokens = -(-len(values) // TOKEN_FRAMES)
    else:
        values = np.pad(samples, (0, -len(samples) % shape.raw_samples)).reshape(-1, shape.raw_samples)
        soft_tokens = len(values)
    content = hashlib.sha256(f"sound {shape.raw_samples} {values.shape}".encode())
    content.update(np.ascontiguousarray(values).data)
    return SoundFrames(torch.from_numpy(values), soft_tokens, content.hexdigest())


def log_mel(samples: np.ndarray) -> np.ndarray:
    """Return the log-mel frames [F, MEL_BINS] of samples [T], float32: one for every HOP samples that another follows."""
    count = max(len(samples) - 1, 0) // HOP
    if not count:
        return np.empty((0, MEL_BINS), np.float32)
    padded = np.pad(samples, (BEFORE, 0))
    frames = np.lib.stride_tricks.sliding_window_view(padded, FRAME)[: count * HOP : HOP]
    spectra = np.abs(np.fft.rfft(frames * _window(), n=SPECTRUM, axis=-1))
    found: np.ndarray = np.log(spectra @ _filters() + MEL_FLOOR).astype(np.float32)
    return found


@cache
def _window() -> np.ndarray:
    """Return the periodic Hann window, float32."""
    window: np.ndarray = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(FRAME) / FRAME)).astype(np.float32)
    return window


@cache
def _filters() -> np.ndarray:
    """Return triangles over the spectrum [SPECTRUM / 2 + 1, MEL_BINS], each 1 at its peak, whose corners are even in mels."""
    nyquist = RATE / 2
    corners = _hertz(np.linspace(0, _mels(nyquist), MEL_BINS + 2))
    away = np.linspace(0, nyquist, SPECTRUM // 2 + 1)[:, None] - corners
    widths = np.diff(corners)
    found: np.ndarray = np.maximum(0, np.minimum(away[:, :-2] / widths[:-1], -away[:, 2:] / widths[1:]))
    return found


def _mels(hertz: float) -> float:
    return float(2595 * np.log10(1 + hertz / 700))


def _hertz(mels: np.ndarray) -> np.ndarray:
    found: np.ndarray = 700 * (10 ** (mels / 2595) - 1)
    return found
