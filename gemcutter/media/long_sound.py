"""Sounds of any length as windows that a model can hear, cut where they are quietest.

Owns where windows end: at the quietest fifth of a second of their last third, so that few words are cut in two. A window that
holds next to nothing is left out, because models hear words in silence. Refuses to know what is made of windows. Read
`decode_sound.py` for files and their limits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gemcutter.errors import RequestError
from gemcutter.media.decode_sound import LOUDEST, MAX_SAMPLES, PADDING_S, RATE, SoundSource, blocks, opened

EARLIEST = 2 * MAX_SAMPLES // 3  # sample before which no window ends
QUIET = RATE // 5  # samples over which it is measured how quiet a place is
STEP = RATE // 100  # from one such place to the next
SILENCE = 1e-3  # of full scale: -60 dB


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """A stretch of a sound: samples [T] at RATE, MAX_SAMPLES at most, and when it begins in seconds."""

    start_s: float
    samples: np.ndarray

    @property
    def stop_s(self) -> float:
        """Return when it ends."""
        return self.start_s + len(self.samples) / RATE

    @property
    def is_silent(self) -> bool:
        """Return whether there is next to nothing to hear."""
        return float(np.abs(self.samples).max(initial=0.0)) < SILENCE


def read_windows(source: SoundSource, name: str, most_s: float) -> list[Window]:
    """Return the windows of a sound file, in order and without a gap; a sound that a model hears whole is one.

    Raises RequestError, which begins with `name`, for what is no sound, is damaged, or lasts longer than `most_s` seconds.
    """
    found, start, waiting = list[Window](), 0, np.empty(0, np.float32)
    for part in _resampled(source, name):
        if not np.isfinite(part).all() or float(np.abs(part).max(initial=0.0)) > LOUDEST:
            raise RequestError(f"{name}: samples that are not finite, or beyond full scale; is it damaged?")
        waiting = np.concatenate([waiting, part])
        if start + len(waiting) > (most_s + PADDING_S) * RATE:
            raise RequestError(f"{name}: longer than {most_s:g} s; cut it into several sounds")
        while len(waiting) > MAX_SAMPLES + PADDING_S * RATE:
            cut = quietest(waiting[:MAX_SAMPLES])
            found.append(Window(start / RATE, waiting[:cut].copy()))
            start, waiting = start + cut, waiting[cut:]
    if len(waiting):
        found.append(Window(start / RATE, waiting[:MAX_SAMPLES].copy()))
    if not found:
        raise RequestError(f"{name}: no samples; there is nothing to hear")
    return found


def quietest(samples: np.ndarray) -> int:
    """Return the middle of the quietest QUIET samples from EARLIEST on; of equals, the last."""
    power = np.concatenate([[0.0], np.cumsum(np.square(samples[EARLIEST:], dtype=np.float64))])
    sums = power[QUIET::STEP] - power[:-QUIET:STEP]
    place = len(sums) - 1 - int(np.argmin(sums[::-1]))
    return EARLIEST + place * STEP + QUIET // 2


def _resampled(source: SoundSource, name: str) -> Iterator[np.ndarray]:
    """Yield the samples of a file at RATE, block by block."""
    with opened(source, name) as file:
        if file.samplerate == RATE:
            yield from blocks(file, name)
            return
        import soxr

        stream = soxr.ResampleStream(file.samplerate, RATE, 1, dtype="float32", quality="HQ")
        for block in blocks(file, name):
            yield stream.resample_chunk(np.ascontiguousarray(block))
        yield stream.resample_chunk(np.empty(0, np.float32), last=True)
