"""Sounds to frames: decoding, rates and log-mel frames against the official processors, and what strangers may send.

The oracles are transformers' own loader and feature extractors. Read `tests/sounds.py` for the sounds.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.audio_utils import load_audio
from transformers.models.gemma4 import Gemma4AudioFeatureExtractor
from transformers.models.gemma4_unified import Gemma4UnifiedAudioFeatureExtractor

from gemcutter.errors import RequestError
from gemcutter.media import decode_sound
from gemcutter.media.audio import MEL_BINS, SoundShape, cut_sound
from gemcutter.media.decode_sound import read_samples
from tests.sounds import RATE, SPEECH, saved, tones

MEL, RAW = SoundShape(), SoundShape(640)
EXTRACTOR = Gemma4AudioFeatureExtractor()
FILES: list[tuple[str, dict[str, Any]]] = [
    ("WAV", {}),
    ("WAV", {"subtype": "PCM_24"}),
    ("WAV", {"subtype": "FLOAT"}),
    ("WAV", {"subtype": "ULAW"}),
    ("FLAC", {}),
    ("OGG", {}),
    ("OGG", {"subtype": "OPUS"}),
    ("MP3", {}),
    ("AIFF", {}),
]


def official_tokens(count: int) -> int:
    """Count the soft tokens of so many valid frames as the two convolutions of the tower do, each of stride 2."""
    for _ in range(2):
        count = (count + 2 - 3) // 2 + 1
    return count


# ---- against the official processors ----


@pytest.mark.parametrize("samples", [161, 320, 800, 801, 16000, 16001, 48017, 479_999, 480_000])
def test_log_mel_frames_are_the_official_ones(samples: int) -> None:
    sound = tones(samples)
    official = EXTRACTOR([sound], return_tensors="np")
    valid = official["input_features_mask"][0]
    found = cut_sound((sound, RATE), MEL)
    assert found.values_FC.shape == (valid.sum(), MEL_BINS)
    assert np.abs(found.values_FC.numpy() - official["input_features"][0][valid]).max() < 1e-5
    assert found.soft_tokens == official_tokens(int(valid.sum()))


@pytest.mark.parametrize("name", ["lantern", "window", "lamp"])
def test_frames_of_speech_are_the_official_ones(name: str) -> None:
    """Of a file at another rate, through the official loader."""
    file = SPEECH / f"{name}.flac"
    official = EXTRACTOR([load_audio(str(file), RATE, backend="soundfile")], return_tensors="np")
    valid = official["input_features_mask"][0]
    found = cut_sound(file, MEL)
    assert np.abs(found.values_FC.numpy() - official["input_features"][0][valid]).max() < 1e-5
    assert found.soft_tokens == official_tokens(int(valid.sum()))


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 5000))
def test_as_many_frames_as_official_ones_are_valid(samples: int) -> None:
    sound = tones(samples)
    valid = int(EXTRACTOR([sound])["input_features_mask"][0].sum())
    found = cut_sound((sound, RATE), MEL)
    assert len(found.values_FC) == valid
    assert found.soft_tokens == (official_tokens(valid) if valid else 0)


def test_published_counts_of_soft_tokens() -> None:
    for samples, tokens in ((1, 0), (160, 0), (161, 1), (800, 1), (RATE, 25), (480_000, 750)):
        assert cut_sound((tones(samples), RATE), MEL).soft_tokens == tokens
    for samples, tokens in ((1, 1), (640, 1), (641, 2), (480_000, 750)):
        assert cut_sound((tones(samples), RATE), RAW).soft_tokens == tokens


@pytest.mark.parametrize("samples", [1, 640, 641, 16000, 48017])
def test_raw_frames_are_the_official_ones(samples: int) -> None:
    sound = tones(samples)
    official = Gemma4UnifiedAudioFeatureExtractor()([sound], return_tensors="np")["input_features"][0]
    found = cut_sound((sound, RATE), RAW)
    assert np.array_equal(found.values_FC.numpy(), official)
    assert found.soft_tokens == len(official)


@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000])
@pytest.mark.parametrize(("form", "options"), FILES, ids=lambda value: str(value))
def test_files_are_read_as_the_official_loader_reads_them(
    form: str, options: dict[str, Any], rate: int, channels: int, tmp_path: Path
) -> None:
    if channels > 2 and form in ("MP3", "OGG"):
        pytest.skip("soundfile writes no such file")
    if options.get("subtype") == "OPUS" and rate == 44100:
        pytest.skip("Opus has no such rate")
    sound = np.stack([tones(rate // 2, seed, rate) for seed in range(channels)], axis=1)
    path = tmp_path / "sound"
    path.write_bytes(saved(sound, rate, form, **options))
    official = load_audio(str(path), RATE, backend="soundfile")
    for source in (path, str(path), path.read_bytes(), bytearray(path.read_bytes())):
        found = read_samples(source)
        assert found.dtype == np.float32
        assert found.shape == official.shape
        assert np.abs(found - official).max() < 1e-6


def test_arrays_are_read_as_files_are() -> None:
    whole = np.stack([(tones(RATE, seed) * 8000).astype(np.int16) for seed in range(2)], axis=1)
    wanted = read_samples(saved(whole, 22050))
    for array in (whole, whole.astype(np.int32) << 16, whole / 32768, (whole / 32768).astype(np.float32)):
        assert np.abs(read_samples((array, 22050)) - wanted).max() < 1e-6
    assert np.array_equal(read_samples((whole[:, 0] / 32768, np.int64(RATE))), (whole[:, 0] / 32768).astype(np.float32))


# ---- contents ----


def test_the_digest_tells_contents_and_cuts_apart() -> None:
    sound = tones(RATE)
    other = sound.copy()
    other[5000] += 0.1
    digests = [cut_sound((each, RATE), shape).digest for each in (sound, other) for shape in (MEL, RAW, SoundShape(320))]
    assert len(set(digests)) == 6
    assert cut_sound(saved(sound, subtype="FLOAT"), MEL).digest == digests[0]


def test_silence_has_frames_too() -> None:
    found = cut_sound((np.zeros(RATE, np.float32), RATE), MEL)
    assert found.values_FC.min() == found.values_FC.max() == pytest.approx(np.log(1e-3))


def test_what_encoders_add_beyond_the_limit_is_cut_off() -> None:
    sound = tones(480_000 + 1600)
    assert np.array_equal(read_samples((sound, RATE)), sound[:480_000])
    assert cut_sound((sound, RATE), RAW).soft_tokens == 750
    assert len(read_samples((tones(30 * 48000 + 4800, rate=48000), 48000))) == 480_000
    for source in ((tones(480_000 + 1601), RATE), saved(tones(480_000 + 1601), form="FLAC")):
        with pytest.raises(RequestError, match="longer than 30 s; cut it into several sounds"):
            read_samples(source)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "an empty file"),
        (b"hello", "no sound that can be read; give WAV, FLAC, Ogg or MP3"),
        (b"\0\0\0\x20ftypM4A " + bytes(40), "an MP4 or M4A file; save its sound as WAV"),
        (b"\x1aE\xdf\xa3" + bytes(40), "a WebM or Matroska file"),
        (saved(tones(900), form="VOC"), "VOC files are not read"),
        (saved(tones(0)), "no samples; there is nothing to hear"),
        (saved(np.full(900, np.nan), subtype="FLOAT"), "samples that are not finite"),
        (saved(np.full(900, 3e30), subtype="FLOAT"), r"samples of up to 3e\+30"),
        (saved(tones(9000), 500), "500 samples a second; expected 1,000 to 384,000"),
        (saved(np.zeros((90, 65))), "65 channels; expected 1 to 64"),
        (saved(tones(RATE), form="FLAC")[:-9000], "can't be decoded .*; is the file damaged"),
        (saved(tones(RATE), form="OGG")[:200], "can't be decoded"),
        ("no/such/file.wav", "there is no file no/such/file.wav"),
        ("https://example.com/a.wav", "addresses are not followed"),
        (7, "expected a path, a file's bytes, or a pair of a numpy array and its rate, found 7"),
        (tones(900), "a pair of a numpy array and its rate in samples a second, found an array alone"),
        ((tones(900),), r"found \(ndarray\)"),
        (([0.0, 0.1], RATE), r"found \(list, int\)"),
        ((tones(900), 16000.0), "a rate of whole samples a second, found 16000.0"),
        ((tones(900), True), "a rate of whole samples a second, found True"),
        ((tones(900), 10**9), "1,000,000,000 samples a second"),
        ((tones(900)[None], RATE), "900 channels"),
        ((np.zeros((9, 9, 9)), RATE), r"found \[9, 9, 9\] of float64"),
        ((np.zeros(900, np.uint8), RATE), r"found \[900\] of uint8"),
        ((np.zeros((0, 2)), RATE), "nothing to hear"),
        ((np.full(900, 1e300), RATE), "not finite"),
        ((tones(900) * 32768, RATE), "as floating-point numbers they reach from -1 to 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_sound_is_one_clear_error(source: Any, message: str) -> None:
    with pytest.raises(RequestError, match=rf"^audio\[3\]: .*{message}"):
        read_samples(source, "audio[3]")


def test_files_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_sound, "MAX_FILE_BYTES", 1 << 20)
    (tmp_path / "large.wav").write_bytes(bytes(2 << 20))
    for source in (bytes(2 << 20), tmp_path / "large.wav"):
        with pytest.raises(RequestError, match="more than 1 MiB"):
            read_samples(source)


def test_a_header_that_promises_more_than_there_is_takes_no_memory() -> None:
    data = bytearray(saved(tones(RATE)))
    at = data.index(b"data") + 4
    data[4:8] = data[at : at + 4] = b"\xff\xff\xff\xff"  # as programs that write into pipes leave it
    assert len(read_samples(bytes(data))) == RATE


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_mutated_files_are_sounds_or_clear_errors(data: st.DataObject) -> None:
    form, options = data.draw(st.sampled_from(FILES))
    mutated = bytearray(saved(tones(2000), form=form, **options))
    for _ in range(data.draw(st.integers(1, 6))):
        mutated[data.draw(st.integers(0, len(mutated) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(mutated[: data.draw(st.integers(1, len(mutated)))])
    with contextlib.suppress(RequestError):
        assert read_samples(cut).ndim == 1
