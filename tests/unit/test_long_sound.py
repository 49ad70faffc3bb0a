"""Sounds longer than a model hears, as windows: nothing is lost, nothing twice, and cuts lie where it is quiet."""

from __future__ import annotations

import io
from itertools import pairwise

import numpy as np
import pytest
import soundfile

from gemcutter.errors import RequestError
from gemcutter.media.decode_sound import MAX_SAMPLES, RATE, read_samples
from gemcutter.media.long_sound import EARLIEST, QUIET, quietest, read_windows


def wav(samples: np.ndarray, rate: int = RATE, subtype: str = "FLOAT") -> bytes:
    """Return samples as a file."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="WAV", subtype=subtype)
    return buffer.getvalue()


def noise(seconds: float, rate: int = RATE) -> np.ndarray:
    return np.random.default_rng(3).uniform(-0.5, 0.5, int(seconds * rate)).astype(np.float32)


def test_a_sound_that_is_heard_whole_is_one_window() -> None:
    for seconds in (0.3, 29.9, 30.0, 30.05):
        (window,) = read_windows(wav(noise(seconds)), "file", 60)
        assert window.start_s == 0
        np.testing.assert_array_equal(window.samples, noise(seconds)[:MAX_SAMPLES])


def test_windows_hold_every_sample_once() -> None:
    samples = noise(95.3)
    windows = read_windows(wav(samples), "file", 120)
    assert len(windows) > 3
    np.testing.assert_array_equal(np.concatenate([window.samples for window in windows]), samples)
    assert all(EARLIEST < len(window.samples) <= MAX_SAMPLES for window in windows[:-1])
    for before, after in pairwise(windows):
        assert before.stop_s == pytest.approx(after.start_s)


def test_cuts_lie_in_pauses() -> None:
    samples, pauses = noise(85), (24.0, 51.0, 75.0)
    for pause in pauses:
        samples[int(pause * RATE) : int((pause + 0.5) * RATE)] *= 0.01
    starts = [window.start_s for window in read_windows(wav(samples), "file", 120)]
    assert len(starts) == 4
    for start, pause in zip(starts[1:], pauses, strict=True):
        assert pause <= start <= pause + 0.5


def test_the_quietest_place_is_the_one_of_a_plain_search() -> None:
    samples = noise(30) * np.linspace(1, 0.3, MAX_SAMPLES, dtype=np.float32)
    places = range(EARLIEST, MAX_SAMPLES - QUIET + 1, RATE // 100)
    sums = [float(np.sum(np.square(samples[at : at + QUIET], dtype=np.float64))) for at in places]
    assert quietest(samples) == list(places)[int(np.argmin(sums))] + QUIET // 2
    assert quietest(np.zeros(MAX_SAMPLES, np.float32)) > MAX_SAMPLES - QUIET


def test_other_rates_and_channels_are_brought_to_the_models() -> None:
    times = np.arange(44_100 * 40) / 44_100
    stereo = np.stack([np.sin(2 * np.pi * 440 * times), np.zeros_like(times)], axis=1) * 0.8
    found = np.concatenate([window.samples for window in read_windows(wav(stereo, 44_100), "file", 60)])
    assert abs(len(found) - 40 * RATE) <= 1
    wanted = 0.4 * np.sin(2 * np.pi * 440 * np.arange(len(found)) / RATE)
    np.testing.assert_allclose(found[1000:-1000], wanted[1000:-1000], atol=1e-3)
    short = stereo[: 44_100 * 5]
    np.testing.assert_allclose(read_windows(wav(short, 44_100), "f", 60)[0].samples, read_samples(wav(short, 44_100)), atol=1e-5)


def test_silence_is_known() -> None:
    samples = np.concatenate([noise(25), np.zeros(RATE * 40, np.float32), noise(10)])
    windows = read_windows(wav(samples), "file", 120)
    assert [window.is_silent for window in windows] == [False, True, False]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"no sound", "file: no sound that can be read"),
        (b"", "file: an empty file"),
        (wav(noise(0)), "file: no samples"),
        (wav(noise(61)), "file: longer than 60 s"),
        (wav(np.full(100, np.nan, np.float32)), "file: samples that are not finite"),
        (b"\x00\x00\x00\x18ftypM4A ", "file: an MP4 or M4A file"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_cannot_be_heard_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read_windows(data, "file", 60)
